"""The demo model's training on a few steps: its forward is diffusers' own, and a stopped run goes on where it was."""

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from torch import nn

from demo_model import captions
from demo_model.captions import EVERYTHING, Said
from demo_model.training import facts
from demo_model.training.correcting import BLEND, LARGE, SMALL
from demo_model.training.dit import DIM, new_dit, predict, use_real_rotation
from demo_model.training.guidance import GUIDANCE, Guided, named_things, over_things
from demo_model.training.joint import SIZES, Learnt, around_things, balance, blended_states, reference_states
from demo_model.training.latents import Example, blended_example, random_example, things_shown
from demo_model.training.loop import Losses, Schedule, run_stage
from demo_model.training.noisy import Draw, Noisy, NoisyBatches
from demo_model.training.reading import (
    CELLS,
    WAVES,
    PatchReader,
    answers_of_patches,
    coverage,
    outlines_loss,
    reading_losses,
    things_loss,
    waves,
)
from demo_model.training.text import HIDDEN_LAYER, IGNORED, TextBatches, new_text_model, new_tokenizer
from demo_model.training.vae import CROP, mixed_crops, new_vae, vae_losses
from demo_model.training.vision import VisionBatches, in_reading_order, new_vision_model
from demo_model.world import Colour, Pattern, Place, Scene, Shape, Size, Thing, is_held_out, random_scene
from services.diffusion.fitting import interpolate


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return new_tokenizer()


@pytest.mark.parametrize(("height", "width"), [(16, 16), (20, 12)], ids=["whole", "filled up"])
def test_the_training_forward_equals_diffusers_own(height: int, width: int) -> None:
    torch.manual_seed(0)
    dit = new_dit().eval()
    for parameter in dit.parameters():
        nn.init.normal_(parameter, std=0.05)
    states, counts = torch.randn(2, 64, 192), (50, 41)
    latents, time = torch.randn(2, 16, height, width), torch.tensor([0.3, 0.7])
    said = torch.arange(64)[None] < torch.tensor(counts)[:, None]
    with torch.no_grad():
        texts = [state[:count] for state, count in zip(states, counts, strict=True)]
        theirs = torch.stack(dit(list(latents[:, :, None]), time, texts, return_dict=False)[0])[:, :, 0]
        use_real_rotation(dit)
        ours = predict(dit, latents, time, states, said)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_a_stopped_stage_goes_on_with_the_same_steps(tmp_path: Path) -> None:
    def model() -> nn.Linear:
        torch.manual_seed(1)
        return nn.Linear(4, 4)

    def losses(of: nn.Linear) -> Any:
        def at(step: int) -> Losses:
            if step == 6 and of is stopped:
                raise KeyboardInterrupt
            batch = torch.randn(8, 4, generator=torch.Generator().manual_seed(step))
            return {"error": (of(batch) - batch).pow(2).mean()}

        return at

    whole, stopped, resumed = model(), model(), model()
    schedule = Schedule(steps=10, learning_rate=1e-2, warmup=2)
    run_stage("whole", {"model": whole}, schedule, losses(whole), tmp_path / "whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("demo_model.training.loop.SAVE_EVERY_S", 0.0)
        with pytest.raises(KeyboardInterrupt):
            run_stage("part", {"model": stopped}, schedule, losses(stopped), tmp_path / "part")
    seen: list[int] = []

    def rest(step: int) -> Losses:
        seen.append(step)
        return losses(resumed)(step)

    run_stage("part", {"model": resumed}, schedule, rest, tmp_path / "part")
    assert seen == [6, 7, 8, 9]
    torch.testing.assert_close(resumed.weight, whole.weight)


def test_a_finished_stage_only_loads_its_averages(tmp_path: Path) -> None:
    def losses(step: int) -> Losses:
        return {"error": model.weight.pow(2).sum()}

    def never(step: int) -> Losses:
        raise AssertionError(step)

    model = nn.Linear(2, 2)
    schedule = Schedule(steps=3, learning_rate=1e-2)
    run_stage("stage", {"model": model}, schedule, losses, tmp_path)
    again = nn.Linear(2, 2)
    run_stage("stage", {"model": again}, schedule, never, tmp_path)
    torch.testing.assert_close(again.weight, model.weight)


def test_the_vae_learns_what_lies_between_two_colours() -> None:
    rng = random.Random(4)
    apart = 0.0
    for _ in range(10):
        first, last, between, alpha = mixed_crops(rng)
        assert first.shape == last.shape == between.shape == (CROP, CROP, 3)
        meant = first + alpha * (last.astype(float) - first)
        assert np.abs(between - meant).max() <= 4, "the same shapes in the same place"
        apart = max(apart, np.abs(last.astype(float) - first).mean())
    assert apart > 30
    torch.manual_seed(0)
    vae = new_vae()
    losses = vae_losses(vae, 0, torch.device("cpu"))
    assert set(losses) == {"l1", "l2", "kl", "line"}
    sum(losses.values(), torch.zeros(())).backward()
    assert all(parameter.grad is not None for parameter in vae.parameters())


def test_guidance_is_learnt_from_what_prompt_and_nothing_give(tokenizer: Tokenizer) -> None:
    """At first the error is the way that guidance goes on beyond the prompt, weighed around the things."""
    torch.manual_seed(0)
    dit, texts = new_dit(), TextBatches(tokenizer)
    for parameter in dit.parameters():
        nn.init.normal_(parameter, std=0.05)
    use_real_rotation(dit)
    text = new_text_model(tokenizer.get_vocab_size()).eval()
    ids, empty = texts.prompt_ids("a red circle on blue"), texts.prompt_ids("")
    with torch.no_grad():
        states, nothing = (
            text(torch.tensor([row + [0] * (32 - len(row))]), output_hidden_states=True).hidden_states[HIDDEN_LAYER]
            for row in (ids, empty)
        )
    said, of_nothing = (torch.arange(32)[None] < len(row) for row in (ids, empty))
    latents = torch.zeros(2, 16, 8, 8)
    latents[:, :, 2:4, 2:4] = 1.0
    batch = Noisy(
        examples=[],
        latents=latents,
        noise=torch.randn(2, 16, 8, 8),
        sigma=torch.tensor([1.0, 0.5]),
        states=states.expand(2, -1, -1),
        without_turn=states.expand(2, -1, -1),
        text=states.expand(2, -1, -1),
        said=said.expand(2, -1),
    )
    goal = Guided(dit, (nothing, of_nothing), Draw())(batch)
    with torch.no_grad():
        told, untold = (
            predict(dit, batch.mixed, 1 - batch.sigma, s.expand(2, -1, -1), w.expand(2, -1))
            for s, w in ((states, said), (nothing, of_nothing))
        )
    assert not torch.allclose(told, untold)
    torch.testing.assert_close(goal, told + GUIDANCE * (told - untold), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("make", [random_example, blended_example])
def test_no_example_shows_what_is_held_out(make: Callable[[random.Random], Example]) -> None:
    rng = random.Random(3)
    for _ in range(4000):
        example = make(rng)
        assert not any(map(is_held_out, example.scene.things))
        assert example.reference is None or not any(map(is_held_out, example.reference.things))
        assert not any(map(is_held_out, things_shown(example))), "nor what mixed colours look like"


def test_the_mean_over_a_thing_is_told_apart_from_the_rest() -> None:
    def thing(place: Place) -> Thing:
        return Thing(shape=Shape.CIRCLE, colour=Colour.RED, size=Size.SMALL, place=place)

    corners = Scene(background=Colour.BLUE, things=(thing(Place.TOP_LEFT), thing(Place.BOTTOM_RIGHT)))
    middle = Scene(background=Colour.BLUE, things=(thing(Place.CENTER),))
    latents = torch.zeros(3, 16, 12, 12)
    latents[:2, :, 1:3, 1:3], latents[:2, :, 9:11, 8:11] = 2.0, -2.0
    latents[2, :, 5:7, 5:7] = 2.0
    batch = Noisy(
        examples=[
            Example(scene=corners),
            Example(scene=corners, said=replace(EVERYTHING, colour=False)),
            Example(scene=middle),
        ],
        latents=latents,
        noise=torch.zeros_like(latents),
        sigma=torch.ones(3),
        states=torch.zeros(3, 32, 8),
        without_turn=torch.zeros(3, 32, 8),
        text=torch.zeros(3, 32, 8),
        said=torch.ones(3, 32, dtype=torch.bool),
    )
    assert not batch.blended
    things = named_things(batch)
    assert things.shape == (3, 2, 12, 12)
    assert things.sum((2, 3)).tolist() == [[4, 6], [0, 0], [4, 0]], "where no colour is named nothing is"
    means = over_things(torch.arange(144.0).view(1, 1, 12, 12).expand(3, 16, -1, -1), things)
    assert means[0, 0, 1:3, 1:3].unique().tolist() == [19.5]
    assert means[0, 0, 9:11, 8:11].unique().tolist() == [123.0]
    assert means[0].count_nonzero() == 16 * 10
    assert not means[1].any()


def test_batches_of_a_step_are_always_the_same(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = TextBatches(tokenizer)
    vae = new_vae()
    vae.register_to_config(scaling_factor=1.0, shift_factor=0.0)
    learnt = Learnt(text=new_text_model(tokenizer.get_vocab_size()), reader=facts.FactReader(), vae=vae)
    monkeypatch.setattr("demo_model.training.joint.POOL", dict.fromkeys(SIZES, 10))
    monkeypatch.setattr("demo_model.training.joint.BLENDED", dict.fromkeys(SIZES[:2], 10))
    monkeypatch.setattr("demo_model.training.joint.SIZES", SIZES[:2])
    monkeypatch.setattr("demo_model.training.noisy.SIZES", (*SIZES[:2], SIZES[1]))
    monkeypatch.setattr("demo_model.training.noisy.IMAGES", dict.fromkeys(SIZES[:2], 4))
    noisy = NoisyBatches(learnt, texts, cast("Any", None), tmp_path, torch.device("cpu"), seed=1, seen_share=0.0)
    for step in range(4):
        one, other = noisy.of_step(step), noisy.of_step(step)
        assert one.examples == other.examples
        assert len(one.examples) == len(one.latents) == len(one.states) == len(one.said) == len(one.sigma)
        torch.testing.assert_close((one.mixed, one.states, one.said), (other.mixed, other.states, other.said))
        assert torch.equal(one.mixed[one.sigma == 1], one.noise[one.sigma == 1])
    for kind in (LARGE, SMALL, BLEND):
        one, other = noisy.to_draw(0, kind), noisy.to_draw(0, kind)
        assert one.examples == other.examples != noisy.to_draw(1, kind).examples
        assert all(map(kind.wanted, one.examples))
        assert one.blended is kind.blended
        assert not one.latents.any()
        torch.testing.assert_close((one.noise, one.states), (other.noise, other.states))
        assert torch.equal(one.text, one.states) is not kind.blended
    states, said = noisy.nothing()
    assert states.shape[:2] == said.shape == (1, 32)
    assert said.sum() == len(texts.prompt_ids(""))


def test_words_of_the_world_are_single_tokens_and_prompts_stay_short(tokenizer: Tokenizer) -> None:
    for word in (" circle", " triangle", " background", " purple", " striped", " corner"):
        assert len(tokenizer.encode(word, add_special_tokens=False).ids) == 1, word
    texts, rng = TextBatches(tokenizer), random.Random(1)
    lengths = [len(texts.prompt_ids(captions.training_caption(rng)[1])) for _ in range(200)]
    assert max(lengths) <= 96
    assert sorted(lengths)[100] <= 32


def test_rewriting_batches_learn_the_answer_only(tokenizer: Tokenizer) -> None:
    texts = TextBatches(tokenizer)
    tokens, targets = texts.rewriting(random.Random(2), 8)
    assert tokens.shape == targets.shape
    for row, target in zip(tokens, targets, strict=True):
        learnt = target != IGNORED
        text = tokenizer.decode(row[learnt].tolist(), skip_special_tokens=False)
        asked = tokenizer.decode(row[: int(learnt.nonzero()[0])].tolist(), skip_special_tokens=False)
        assert text.endswith("<|im_end|>")
        assert "<|im_start|>" not in text
        assert ("</think>" in text) != ("</think>" in asked)


def test_the_facts_of_a_scene_are_answers_to_the_questions() -> None:
    first = Thing(shape=Shape.HEART, colour=Colour.PINK, pattern=Pattern.DOTTED, size=Size.SMALL, place=Place.LEFT)
    one = facts.answers(Scene(background=Colour.BLUE, things=(first,)))
    assert one[:6] == [5, 7, 7, 3, 2, 0]
    assert one[6:] == [IGNORED] * 5
    rng = random.Random(1)
    for _ in range(100):
        right = facts.answers(random_scene(rng))
        assert len(right) == len(facts.QUESTIONS)
        assert all(a == IGNORED or 0 <= a < len(kind) for a, kind in zip(right, facts.QUESTIONS, strict=True))


def test_facts_are_read_from_what_is_said_alone() -> None:
    reader, states = facts.FactReader(), torch.randn(2, 10, 192)
    said = torch.arange(10)[None] < torch.tensor([[4], [10]])
    read = reader(states, said)
    assert [logits.shape for logits in read] == [(2, len(kind)) for kind in facts.QUESTIONS]
    alone = reader(states[:1, :4], said[:1, :4])
    torch.testing.assert_close([logits[:1] for logits in read], list(alone))


def test_each_patch_of_a_thing_is_told_what_it_belongs_to() -> None:
    """Latents of a scene in which each thing is one patch: its answers are that thing's; nothing is asked elsewhere."""
    first = Thing(shape=Shape.HEART, colour=Colour.PINK, place=Place.TOP_LEFT)
    second = Thing(shape=Shape.STAR, colour=Colour.BLUE, size=Size.SMALL, place=Place.BOTTOM)
    scene = Scene(background=Colour.WHITE, things=(first, second))
    latents = torch.zeros(2, 16, 12, 12)
    latents[:, :, 2, 3] = 3.0
    latents[:, :, 10, 6:8] = -3.0
    inside, right = answers_of_patches([Example(scene=scene), Example(scene=scene, kind="strange")], latents)
    assert inside.shape == (2, 36)
    assert inside.nonzero().tolist() == [[0, 7], [0, 33], [1, 7], [1, 33]]
    facts_of_both = facts.answers(scene)
    assert right[:2].tolist() == [facts_of_both[1:6], facts_of_both[6:]]
    assert (right[2:] == IGNORED).all()  # strange words tell nothing
    loss = things_loss(PatchReader(), list(torch.randn(5, 2, 36, DIM)), [Example(scene=scene)] * 2, latents)
    assert 0 < loss < 10


def test_outlines_are_told_by_the_text_alone() -> None:
    square = Thing(shape=Shape.SQUARE, colour=Colour.BLACK, size=Size.LARGE, place=Place.CENTER)
    scene = Scene(background=Colour.RED, things=(square,))
    covered = coverage(scene, (192, 128))
    assert covered.shape == (8 * 12, CELLS * CELLS)
    assert covered.mean().item() == pytest.approx((2 * 0.9 * 0.25) ** 2 * 128 / 192, abs=0.005)
    middle = covered.view(8, 12, CELLS, CELLS)[4, 6]
    assert (middle == 1).all()
    assert (covered[0] == 0).all()
    reader, shown, latents = PatchReader(), list(torch.randn(5, 2, 96, DIM)), torch.zeros(2, 16, 16, 24)
    told = Example(scene=scene)
    assert 0.4 < outlines_loss(reader, shown, [told, told], latents) < 2
    for untold in (Example(scene=scene, kind="strange"), Example(scene=scene, said=Said(shape=False))):
        alone = outlines_loss(reader, [tokens[:1] for tokens in shown], [told], latents)
        torch.testing.assert_close(outlines_loss(reader, shown, [told, untold], latents), alone)
        assert outlines_loss(reader, shown, [untold, untold], latents) == 0
    assert set(reading_losses(reader, shown, [told, told], latents)) == {"things", "outlines", "positions"}


def test_positions_are_told_by_waves_along_rows_and_columns() -> None:
    told = waves((192, 128)).view(8, 12, 2, WAVES)
    assert (told[:, :1, 0] == told[:, :, 0]).all()
    assert (told[:1, :, 1] == told[:, :, 1]).all()
    assert told[0, 0, 0, 0] > 0.9 > -0.9 > told[-1, -1, 0, 0]
    assert len({tuple(row) for row in told.view(96, -1).tolist()}) == 96  # no two patches alike


def test_both_sides_of_an_outline_weigh_the_same() -> None:
    """A ring's hole and the corners around it lie in its box."""
    latents = torch.zeros(1, 16, 12, 12)
    latents[:, :, 3:8, 4:9] = 3.0
    latents[:, :, 4:7, 5:8] = 0.0
    inside = around_things(latents)[0, 0]
    expected = torch.zeros(12, 12, dtype=torch.bool)
    expected[2:9, 3:10] = True
    assert torch.equal(inside, expected)


def test_a_small_thing_weighs_as_much_as_all_around_it() -> None:
    inside = torch.zeros(3, 1, 12, 12, dtype=torch.bool)
    inside[0, :, 3:6, 4:7] = True
    inside[1, :, :, :9] = True
    weights = balance(inside)
    for weight, where in zip(weights[:2], inside[:2], strict=True):
        torch.testing.assert_close(weight[where].sum(), torch.tensor(72.0))
        torch.testing.assert_close(weight[~where].sum(), torch.tensor(72.0))
    torch.testing.assert_close(weights[2], torch.ones(1, 12, 12))  # nothing to be seen: all alike


def test_outlines_of_small_things_weigh_nearly_as_much_as_those_of_large_ones() -> None:
    """A reader that sees nothing anywhere is nearly as wrong, though four times as many patches show the large one."""
    losses = []
    for size in (Size.SMALL, Size.LARGE):
        scene = Scene(background=Colour.RED, things=(Thing(shape=Shape.RING, colour=Colour.BLACK, size=size),))
        reader, shown = PatchReader(), list(torch.zeros(5, 1, 256, DIM))
        with torch.no_grad():
            for parameter in reader.parameters():
                parameter.fill_(-2.0)  # everywhere: surely nothing
        losses.append(outlines_loss(reader, shown, [Example(scene=scene)], torch.zeros(1, 16, 32, 32)).item())
    assert losses[0] > 0.5 * losses[1]


def test_blending_pulls_each_prompt_to_its_own_reference() -> None:
    states, rows = torch.randn(5, 8, 4), [[1] * 6, [1] * 8]
    words = [[1] * 3, [1] * 8, [1] * 5]
    read = reference_states(states, rows, words)
    assert [len(one) for one in read] == [3, 8, 5]
    assert torch.equal(read[2], states[4, :5])
    scene = random_scene(random.Random(1))
    blends = [Example(scene=scene, kind="blend", reference=scene, alpha=alpha) for alpha in (0.25, 1.0)]
    blended = blended_states(states, rows, read[:2], blends)
    torch.testing.assert_close(blended[0, :6], 0.75 * states[0, :6] + 0.25 * interpolate(read[0], 6))
    assert torch.equal(blended[0, 6:], states[0, 6:])  # filling
    torch.testing.assert_close(blended[1], read[1])
    assert blended_states(states, rows, [], blends) is states


def test_words_that_ask_for_nothing_show_one_large_thing_never_a_held_out_one() -> None:
    rng = random.Random(5)
    for _ in range(300):
        scene = random_scene(rng)
        (thing,) = captions.unasked(scene).things
        assert (thing.size, thing.place, thing.pattern) == (Size.LARGE, Place.CENTER, Pattern.PLAIN)
        assert thing.colour is scene.things[0].colour
        assert not is_held_out(thing)


def test_a_picture_is_told_from_the_top_left_to_the_bottom_right() -> None:
    star = Thing(shape=Shape.STAR, colour=Colour.RED, place=Place.BOTTOM_LEFT)
    ring = Thing(shape=Shape.RING, colour=Colour.BLUE, place=Place.TOP_RIGHT)
    one, other = (Scene(background=Colour.WHITE, things=things) for things in ((star, ring), (ring, star)))
    assert in_reading_order(one) == in_reading_order(other) == other


def test_the_vision_model_starts_as_the_text_model(tokenizer: Tokenizer) -> None:
    """Without a picture its language half gives the same states: both share one space from the start."""
    torch.manual_seed(2)
    text = new_text_model(tokenizer.get_vocab_size()).eval()
    texts = TextBatches(tokenizer)
    vision = new_vision_model(text, VisionBatches(texts).tokens).eval()
    tokens = torch.tensor([texts.prompt_ids(captions.canonical(random_scene(random.Random(3))))])
    with torch.no_grad():
        ours = vision(input_ids=tokens, output_hidden_states=True).hidden_states
        theirs = text(input_ids=tokens, output_hidden_states=True).hidden_states
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
