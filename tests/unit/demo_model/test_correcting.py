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
    asked_for,
    correct,
    draw_and_correct,
    kept_losses,
    own_losses,
    parts_of,
    poses_in,
    pulled,
    sigmas,
)
from demo_model.training.dit import new_dit, use_real_rotation
from demo_model.training.guidance import means_over
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
    wrong = replace(meant, background=Colour.GREEN)
    picture = np.asarray(render(wrong, width=128, height=128))
    right = np.asarray(render(meant, width=128, height=128))
    assert np.abs(correct(example, picture).astype(int) - right).mean() < 1


def test_only_colours_that_are_asked_for_are_corrected() -> None:
    """The things' where the prompt names them, and the background's."""
    parts = parts_of([BOTH], _two_things())
    assert parts.sum((2, 3)).tolist() == [[4, 6, 144 - 10]]
    for said, asked in (
        (EVERYTHING, [True, True, True]),
        (Said(colour=False), [False, False, True]),
        (Said(background=False), [True, True, False]),
        (Said(colour=False, background=False), [False, False, False]),
    ):
        assert asked_for([Example(scene=BOTH, said=said)], parts).flatten().tolist() == asked


def test_what_is_left_open_is_not_learnt() -> None:
    """Colours of no part that the prompt names: the DiT gets no gradient from them."""
    dit, latents = _small_dit(), _two_things()
    for parts, learnt in ((parts_of([BOTH], latents), True), (torch.zeros(1, 3, 12, 12, dtype=torch.bool), False)):
        dit.zero_grad()
        own = _drawings(Example(scene=BOTH), latents, parts)
        (colours,) = own_losses(dit, dit, Draw(), own, 0).values()
        colours.backward()
        moved = sum(float(one.grad.abs().sum()) for one in dit.parameters() if one.grad is not None)
        assert (moved > 0) is learnt


def test_a_blend_goes_its_share_of_the_way_from_the_picture_without_it() -> None:
    """Each part's mean colour, wherever the part now stands; its pattern stays."""
    whole = torch.full((1, 16, 12, 12), 1.0)
    whole[:, :, 2:4, 1:3], whole[:, :, 9:11, 5:7] = 5.0, -5.0
    whole[:, :, 2, 1] = 7.0  # of a pattern
    parts = parts_of([BOTH], whole)
    plain = torch.stack([0.5 * _two_things(), _two_things()])  # the first step does not know yet
    goal, known = pulled([_blend(0.25)], plain, whole, parts)
    assert known.all()
    for step, (heart, star) in zip(goal, ((1.0, -1.0), (2.0, -2.0)), strict=True):
        means = means_over(step, parts)[0, :, 0]
        torch.testing.assert_close(means, torch.tensor([0.75 * heart + 0.25 * 5.5, 0.75 * star + 0.25 * -5.0, 0.25]))
        assert step[0, 0, 2, 1] - step[0, 0, 3, 1] == 2.0
    assert all(torch.equal(step, whole) for step in pulled([_blend(1.0)], plain, whole, parts)[0])


def test_a_blend_with_more_things_than_the_prompt_begins_with_the_last_one() -> None:
    plain, whole = torch.zeros(1, 16, 12, 12), torch.zeros(1, 16, 12, 12)
    plain[:, :, 1:3, 1:3] = 2.0
    whole[:, :, 1:3, 1:3], whole[:, :, 9:11, 5:7] = 4.0, 8.0
    one = replace(BOTH, things=(HEART,))
    example = replace(_blend(0.8), scene=one, reference=BOTH)
    parts = parts_of([BOTH], whole)
    (goal,), known = pulled([example], plain[None], whole, parts)
    assert known.all()
    torch.testing.assert_close(means_over(goal, parts)[0, :, 0], torch.tensor([0.4 + 3.2, 0.4 + 6.4, 0.0]))


def test_what_did_not_show_without_the_reference_is_not_known() -> None:
    whole = _two_things()
    parts, nothing = parts_of([BOTH], whole), torch.zeros(1, 1, 16, 12, 12)
    (goal,), known = pulled([_blend(0.5)], nothing, whole, parts)
    assert known.flatten().tolist() == [False, False, True]
    assert torch.equal(goal[:, :, 1:3, 1:3], whole[:, :, 1:3, 1:3])
    assert pulled([_blend(1.0)], nothing, whole, parts)[1].all()


def test_blends_keep_all_but_their_colours_as_it_was_without_the_turn() -> None:
    """The same DiT before and after: what is wrong is only what the tokens of the turn change."""
    dit, latents = _small_dit(), _two_things()
    own = _drawings(_blend(0.3), latents, parts_of([BOTH], latents))
    assert own_losses(dit, dit, Draw(), own, 0)["blends"] > 0
    same = replace(own, told=replace(own.told, without_turn=own.told.states))
    assert own_losses(dit, dit, Draw(), same, 0)["blends"] == 0


def test_prompts_keep_to_what_was_answered_but_for_the_colours_they_name() -> None:
    dit = _small_dit()
    batch = _noisy(2)
    assert kept_losses(dit, dit, Draw(), batch)["kept"] == 0
    named = replace(batch, latents=_two_things().expand(2, -1, -1, -1), noise=torch.randn(2, 16, 12, 12))
    assert kept_losses(dit, dit, Draw(), named)["kept"] > 0


def test_each_step_of_each_drawing_is_learnt_from_once() -> None:
    count = 3
    way = torch.arange(WAY)[:, None, None, None, None] * 10.0 + torch.arange(count)[:, None, None, None]
    own = Drawings(told=_noisy(count), way=way, corrected=way + 1, parts=torch.zeros(0))
    met = []
    for part in range(WAY):
        mixed, sigma, corrected = own.part(part)
        assert torch.equal(corrected, mixed + 1)
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
    own = draw_and_correct(dit, dit, Draw(), vae, told)
    assert own.way.shape == (WAY, 2, 16, 8, 8)
    assert torch.equal(own.way[0], told.noise)
    assert own.corrected.shape == (WAY, 2, 16, 8, 8)
    assert own.parts.shape == (2, 3, 8, 8)
    with torch.no_grad():
        first = (
            own.way[0] + (sigmas()[0] - sigmas()[1]) * Draw()(dit, own.way[0], torch.ones(2), told.states, told.said)[0]
        )
    torch.testing.assert_close(own.way[1], first, rtol=1e-4, atol=1e-4)


def test_things_of_latents_are_told_apart() -> None:
    one = replace(BOTH, things=(STAR,))
    things = shown_things([BOTH, one], _two_things().expand(2, -1, -1, -1))
    assert things.sum((2, 3)).tolist() == [[4, 6], [10, 0]]


def _small_dit() -> ZImageTransformer2DModel:
    torch.manual_seed(0)
    dit = new_dit().eval()
    for parameter in dit.parameters():
        nn.init.normal_(parameter, std=0.02)
    use_real_rotation(dit)
    return dit


def _two_things() -> torch.Tensor:
    """Latents of a picture of `BOTH`, of four and of six latents."""
    latents = torch.zeros(1, 16, 12, 12)
    latents[:, :, 1:3, 1:3], latents[:, :, 9:11, 5:8] = 2.0, -2.0
    return latents


def _blend(alpha: float) -> Example:
    reference = Scene(background=Colour.RED, things=(HEART,))
    return Example(scene=BOTH, kind="blend", reference=reference, alpha=alpha)


def _drawings(example: Example, corrected: torch.Tensor, parts: torch.Tensor) -> Drawings:
    """One drawing, that should have been `corrected`."""
    told = replace(_noisy(1), examples=[example])
    way = torch.randn(WAY, *corrected.shape)
    return Drawings(told=told, way=way, corrected=corrected.expand_as(way), parts=parts)


def _noisy(count: int, *, blended: bool = False) -> Noisy:
    states = torch.randn(count, 32, 192)
    return Noisy(
        examples=[_blend(0.3) if blended else Example(scene=BOTH)] * count,
        latents=torch.zeros(count, 16, 8, 8),
        noise=torch.randn(count, 16, 8, 8),
        sigma=torch.ones(count),
        states=states,
        without_turn=states.flip(1),
        text=states.flip(2),
        said=torch.ones(count, 32, dtype=torch.bool),
    )
