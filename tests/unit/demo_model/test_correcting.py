"""The last stage of the demo model's training: what a picture should have been, and which steps learn from it."""

import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, ZImageTransformer2DModel
from torch import nn

from demo_model.captions import EVERYTHING, Said
from demo_model.judge import judge
from demo_model.render import JITTER, RESIZED, Pose, render
from demo_model.training.correcting import (
    STEPS,
    WAY,
    Drawings,
    coloured,
    correct,
    draw_and_correct,
    is_reference,
    kept_losses,
    own_losses,
    poses_in,
    sigmas,
)
from demo_model.training.dit import new_dit, use_real_rotation
from demo_model.training.latents import Example
from demo_model.training.noisy import Draw, Noisy
from demo_model.training.reading import shown_things
from demo_model.training.vae import new_vae
from demo_model.world import RGB, Colour, Pattern, Place, Scene, Shape, Size, Thing, random_scene

STAR = Thing(shape=Shape.STAR, colour=Colour.BLUE, size=Size.SMALL, place=Place.BOTTOM)
HEART = Thing(shape=Shape.HEART, colour=Colour.PINK, place=Place.TOP_LEFT)
BOTH = Scene(background=Colour.WHITE, things=(HEART, STAR))


def test_sigmas_are_those_of_the_checkpoints_scheduler() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.sigma_min = 0.0
    scheduler.set_timesteps(STEPS)
    torch.testing.assert_close(sigmas(), scheduler.sigmas[:STEPS])


@pytest.mark.parametrize("side", [128, 256])
def test_a_picture_is_drawn_anew_where_its_things_stand(side: int) -> None:
    """The same shapes, whatever their colours are, moved and resized: what is drawn anew is the picture again."""
    rng = random.Random(1)
    for _ in range(20):
        scene = random_scene(rng, things=rng.choice((1, 2)))
        if any(thing.pattern is not Pattern.PLAIN for thing in scene.things):
            continue
        poses = [Pose.random(rng) for _ in scene.things]
        picture = np.asarray(render(scene, width=side, height=side, poses=poses))
        again = correct(Example(scene=scene), picture)
        assert np.abs(again.astype(int) - picture).mean() < 1.2
    usual = poses_in(BOTH, np.asarray(render(BOTH, width=side, height=side)))
    for pose in usual:
        assert (pose.scale, pose.x, pose.y) == pytest.approx((1, 0, 0), abs=0.02)


def test_a_thing_is_corrected_within_what_the_world_allows() -> None:
    """A blot is no thing of this world, nothing at all none either: both become the thing that is asked for."""
    scene = Scene(background=Colour.WHITE, things=(HEART,))
    blot = np.full((128, 128, 3), RGB[Colour.WHITE], dtype=np.uint8)
    assert poses_in(scene, blot) == [Pose()]
    blot[:60, :70] = RGB[Colour.RED]
    (pose,) = poses_in(scene, blot)
    assert pose.scale == 1 + RESIZED
    assert abs(pose.x) <= JITTER
    verdict = judge(render(scene, width=256, height=256, poses=[pose]))
    assert [(seen.colour, seen.shape, seen.place) for seen in verdict.things] == [
        (Colour.PINK, Shape.HEART, Place.TOP_LEFT)
    ]


def test_wrong_colours_become_those_that_the_prompt_names() -> None:
    wrong = replace(BOTH, things=(replace(HEART, colour=Colour.PURPLE), replace(STAR, colour=Colour.CYAN)))
    picture = np.asarray(render(wrong, width=128, height=128))
    meant = np.asarray(render(BOTH, width=128, height=128))
    assert np.abs(correct(Example(scene=BOTH), picture).astype(int) - meant).mean() < 1


def test_a_reference_that_takes_the_prompts_place_is_what_is_drawn() -> None:
    meant = Scene(background=Colour.RED, things=(STAR,))
    example = Example(scene=BOTH, kind="blend", reference=meant, alpha=1.0)
    assert is_reference(example)
    wrong = replace(meant, background=Colour.GREEN)
    picture = np.asarray(render(wrong, width=128, height=128))
    right = np.asarray(render(meant, width=128, height=128))
    assert np.abs(correct(example, picture).astype(int) - right).mean() < 1


def test_only_colours_that_are_asked_for_are_corrected() -> None:
    """Of a prompt the things' where it names them, and the background's; of a reference all."""
    latents = torch.zeros(1, 16, 12, 12)
    latents[:, :, 1:3, 1:3], latents[:, :, 9:11, 5:8] = 2.0, -2.0
    said = {
        (True, True): EVERYTHING,
        (False, True): Said(colour=False),
        (True, False): Said(background=False),
        (False, False): Said(colour=False, background=False),
    }
    whole = [4, 6, 144 - 10]
    for (things, ground), what in said.items():
        asked = [things, things, ground]
        parts = coloured(_drawings(Example(scene=BOTH, said=what), latents))
        assert parts.sum((2, 3)).tolist() == [[cells * one for cells, one in zip(whole, asked, strict=True)]]
    reference = Example(scene=BOTH, said=Said(colour=False), kind="blend", reference=BOTH, alpha=1.0)
    assert coloured(_drawings(reference, latents)).sum((2, 3)).tolist() == [whole]


def test_what_is_left_open_is_not_learnt() -> None:
    """Colours of no part that the prompt names: the DiT gets no gradient from them."""
    dit = _small_dit()
    latents = torch.zeros(1, 16, 12, 12)
    latents[:, :, 1:3, 1:3], latents[:, :, 9:11, 5:8] = 2.0, -2.0
    for said, learnt in ((Said(colour=False, background=False), False), (EVERYTHING, True)):
        dit.zero_grad()
        (colours,) = own_losses(dit, Draw(), _drawings(Example(scene=BOTH, said=said), latents), 0).values()
        colours.backward()
        moved = sum(float(one.grad.abs().sum()) for one in dit.parameters() if one.grad is not None)
        assert (moved > 0) is learnt


def test_blends_keep_to_what_was_answered_without_the_turn() -> None:
    """The same DiT before and after: what is wrong is only what the tokens of the turn change."""
    dit = _small_dit()
    batch = _noisy(2, blended=True)
    assert kept_losses(dit, dit, Draw(), batch)["blends"] > 0
    assert kept_losses(dit, dit, Draw(), replace(batch, without_turn=batch.states))["blends"] == 0


def test_each_step_of_each_drawing_is_learnt_from_once() -> None:
    count = 3
    way = torch.arange(WAY)[:, None, None, None, None] * 10.0 + torch.arange(count)[:, None, None, None]
    own = Drawings(told=_noisy(count), way=way, corrected=torch.zeros(count, 1, 1, 1), scenes=[BOTH] * count)
    met = []
    for part in range(WAY):
        mixed, sigma = own.part(part)
        steps = (mixed.flatten() // 10).long()
        torch.testing.assert_close(sigma, sigmas()[steps])
        assert (mixed.flatten() % 10).tolist() == [0, 1, 2]
        met += list(zip(steps.tolist(), range(count), strict=True))
    assert len(set(met)) == len(met) == WAY * count


@pytest.mark.parametrize("blended", [False, True])
def test_drawings_begin_with_the_noise_and_end_near_their_correction(*, blended: bool) -> None:
    dit, vae = _small_dit(), new_vae().eval()
    vae.register_to_config(scaling_factor=1.0, shift_factor=0.0)
    told = _noisy(2, blended=blended)
    own = draw_and_correct(dit, Draw(), vae, told)
    assert own.way.shape == (WAY, 2, 16, 8, 8)
    assert torch.equal(own.way[0], told.noise)
    assert own.corrected.shape == (2, 16, 8, 8)
    with torch.no_grad():
        first = (
            own.way[0] + (sigmas()[0] - sigmas()[1]) * Draw()(dit, own.way[0], torch.ones(2), told.states, told.said)[0]
        )
    torch.testing.assert_close(own.way[1], first, rtol=1e-4, atol=1e-4)


def test_things_of_latents_are_told_apart() -> None:
    latents = torch.zeros(2, 16, 12, 12)
    latents[:, :, 1:3, 1:3], latents[:, :, 9:11, 5:8] = 2.0, -2.0
    one = replace(BOTH, things=(STAR,))
    things = shown_things([BOTH, one], latents)
    assert things.sum((2, 3)).tolist() == [[4, 6], [10, 0]]


def _small_dit() -> ZImageTransformer2DModel:
    torch.manual_seed(0)
    dit = new_dit().eval()
    for parameter in dit.parameters():
        nn.init.normal_(parameter, std=0.02)
    use_real_rotation(dit)
    return dit


def _drawings(example: Example, corrected: torch.Tensor) -> Drawings:
    """One drawing, that should have been `corrected`."""
    told = replace(_noisy(1), examples=[example])
    way = torch.randn(WAY, *corrected.shape)
    return Drawings(told=told, way=way, corrected=corrected, scenes=[BOTH])


def _noisy(count: int, *, blended: bool = False) -> Noisy:
    states = torch.randn(count, 32, 192)
    example = Example(scene=BOTH)
    if blended:
        reference = Scene(background=Colour.RED, things=(HEART,))
        example = Example(scene=BOTH, kind="blend", reference=reference, alpha=0.3)
    return Noisy(
        examples=[example] * count,
        latents=torch.zeros(count, 16, 8, 8),
        noise=torch.randn(count, 16, 8, 8),
        sigma=torch.ones(count),
        states=states,
        without_turn=states.flip(1),
        said=torch.ones(count, 32, dtype=torch.bool),
    )
