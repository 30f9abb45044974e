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
    as_chosen,
    coloured,
    correct,
    corrected_latents,
    draw_and_correct,
    own_losses,
    poses_in,
    sigmas,
)
from demo_model.training.dit import new_dit, use_real_rotation
from demo_model.training.latents import Example, encode
from demo_model.training.noisy import Draw, Noisy
from demo_model.training.reading import shown_things
from demo_model.training.vae import new_vae
from demo_model.world import RGB, Colour, Pattern, Place, Scene, Shape, Size, Thing, is_held_out, random_scene

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
        again = correct(scene, picture)
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
    assert np.abs(correct(BOTH, picture).astype(int) - meant).mean() < 1


def test_colours_that_the_prompt_leaves_open_stay_as_they_were_chosen() -> None:
    chosen = replace(BOTH, background=Colour.GREEN, things=(replace(HEART, colour=Colour.RED), STAR))
    assert not any(map(is_held_out, chosen.things))
    picture = np.asarray(render(chosen, width=128, height=128))
    said = {
        "all": (EVERYTHING, BOTH),
        "background": (Said(colour=False), replace(chosen, background=BOTH.background)),
        "colours": (Said(background=False), replace(BOTH, background=Colour.GREEN)),
        "nothing": (Said(colour=False, background=False), chosen),
    }
    for named, (what, meant) in said.items():
        assert as_chosen(Example(scene=BOTH, said=what), picture).scene == meant, named


def test_a_chosen_combination_that_is_held_out_is_not_learnt() -> None:
    rng = random.Random(2)
    free = Said(colour=False, background=False)
    met = 0
    for _ in range(100):
        scene = random_scene(rng, things=1)
        (thing,) = scene.things
        other = replace(thing, colour=rng.choice([colour for colour in Colour if colour is not scene.background]))
        picture = np.asarray(render(replace(scene, things=(other,)), width=128, height=128))
        kept = as_chosen(Example(scene=scene, said=free), picture)
        assert not any(map(is_held_out, kept.scene.things))
        met += is_held_out(other)
    assert met > 3


def test_a_blend_is_between_what_is_drawn_without_a_reference_and_the_reference() -> None:
    """As latents, in the shapes of the prompt; near the reference in its shapes."""
    torch.manual_seed(0)
    vae = new_vae().eval()
    vae.register_to_config(scaling_factor=1.0, shift_factor=0.0)
    plain = Scene(background=Colour.BLACK, things=(replace(HEART, colour=Colour.WHITE),))
    reference = Scene(background=Colour.RED, things=(STAR,))
    free = np.asarray(render(plain, width=128, height=128))
    said = Said(colour=False, background=False)
    example = Example(scene=Scene(background=Colour.BLUE, things=(HEART,)), said=said, kind="blend")
    for alpha, drawn, share in ((0.6, plain, 0.6), (0.9, reference, 0.1), (1.0, reference, 0.0)):
        chosen = as_chosen(replace(example, reference=reference, alpha=alpha), free)
        picture = render(drawn, width=128, height=128)
        other = replace(drawn, background=Colour.BLACK, things=(replace(drawn.things[0], colour=Colour.WHITE),))
        if drawn is plain:
            other = replace(plain, background=Colour.RED, things=(replace(HEART, colour=Colour.BLUE),))
        ends = encode(vae, [np.asarray(one) for one in (picture, render(other, width=128, height=128))]).float()
        (latents,) = corrected_latents(vae, [chosen], [np.asarray(picture)])
        torch.testing.assert_close(latents, torch.lerp(ends[0], ends[1], share), rtol=0.01, atol=0.02)


def test_only_colours_that_are_asked_for_are_corrected() -> None:
    """Of a prompt the things' where it names them, and the background's; of a blend all."""
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
    blend = Example(scene=BOTH, said=Said(colour=False), kind="blend", reference=BOTH, alpha=0.3)
    assert coloured(_drawings(blend, latents)).sum((2, 3)).tolist() == [whole]


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
        alone=states.flip(1),
        said=torch.ones(count, 32, dtype=torch.bool),
    )
