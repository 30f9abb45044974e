"""The demo model's world: what is held out, what is drawn, what captions say, and whether the judge sees it."""

import itertools
import random
import re

import numpy as np
import pytest
from PIL import Image

from demo_model import captions
from demo_model.captions import EVERYTHING, NOUNS, Said
from demo_model.judge import judge, score
from demo_model.render import Tint, render
from demo_model.world import RGB, Colour, Pattern, Place, Scene, Shape, Thing, is_held_out, random_scene

SIZES = [(128, 128), (256, 256), (192, 256), (384, 256), (512, 512)]


def test_about_one_combination_in_eight_is_held_out_and_no_scene_mixes_them() -> None:
    combinations = itertools.product(Shape, Colour, Pattern, Place)
    held_out = [is_held_out(Thing(shape=s, colour=c, pattern=p, place=w)) for s, c, p, w in combinations]
    assert 0.1 < sum(held_out) / len(held_out) < 0.15
    rng = random.Random(1)
    for index in range(200):
        scene = random_scene(rng, held_out=index % 2 == 1)
        assert {is_held_out(thing) for thing in scene.things} == {index % 2 == 1}


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES)
def test_the_judge_sees_what_was_drawn(size: tuple[int, int]) -> None:
    rng = random.Random(2)
    for index in range(40):
        scene = random_scene(rng, held_out=index % 2 == 1)
        assert score(render(scene, width=size[0], height=size[1], rng=rng), scene).whole, scene


@pytest.mark.parametrize("shape", Shape)
@pytest.mark.parametrize("pattern", Pattern)
def test_each_shape_in_each_pattern_is_told_from_the_others(shape: Shape, pattern: Pattern) -> None:
    thing = Thing(shape=shape, colour=Colour.BLUE, pattern=pattern)
    verdict = judge(render(Scene(background=Colour.YELLOW, things=(thing,)), width=256, height=256))
    assert [(seen.shape, seen.colour, seen.place) for seen in verdict.things] == [(shape, Colour.BLUE, Place.CENTER)]


def test_the_judge_is_not_fooled_by_a_wrong_picture() -> None:
    circle = Thing(shape=Shape.CIRCLE, colour=Colour.RED, place=Place.TOP_LEFT)
    asked = Scene(background=Colour.WHITE, things=(circle,))
    drawn = Scene(background=Colour.WHITE, things=(Thing(shape=Shape.SQUARE, colour=Colour.RED, place=Place.RIGHT),))
    verdict = score(render(drawn, width=256, height=256), asked)
    assert (verdict.background, verdict.colour, verdict.shape, verdict.place) == (True, True, False, False)
    empty = score(render(Scene(background=Colour.WHITE, things=()), width=256, height=256), asked)
    assert (empty.background, empty.colour, empty.shape, empty.place) == (True, False, False, False)


@pytest.mark.parametrize("lighter", range(-8, 9, 4))
def test_a_gray_without_white_is_gray_a_little_lighter_or_darker(lighter: int) -> None:
    """White's second tone is nearly gray, but a pattern of white shows white as well."""
    gray = Thing(shape=Shape.HEART, colour=Colour.GRAY)
    drawn = np.asarray(render(Scene(background=Colour.ORANGE, things=(gray,)), width=256, height=256)).copy()
    inside = (drawn == RGB[Colour.GRAY]).all(axis=2)
    drawn[inside] = RGB[Colour.GRAY][0] + lighter
    (seen,) = judge(Image.fromarray(drawn)).things
    assert seen.colour is Colour.GRAY


def test_a_tint_moves_every_colour_towards_the_reference() -> None:
    rng = random.Random(3)
    scene = random_scene(rng, things=1)
    reference = Scene(background=Colour.RED, things=scene.things)
    goal = np.array(RGB[Colour.RED], dtype=float)
    corners = [
        np.asarray(render(scene, width=128, height=128, tint=Tint(reference=reference, alpha=alpha)))[0, 0]
        for alpha in (0.0, 0.3, 0.6, 1.0)
    ]
    away = [float(np.abs(corner - goal).sum()) for corner in corners]
    assert away == sorted(away, reverse=True)
    assert away[-1] == 0
    assert tuple(corners[0]) == RGB[scene.background]


def test_a_full_caption_names_every_colour_and_shape() -> None:
    rng = random.Random(4)
    for _ in range(300):
        scene = random_scene(rng)
        text = captions.caption(scene, EVERYTHING, rng).lower().replace("grey", "gray")
        for thing in scene.things:
            assert any(noun in text for noun in NOUNS[thing.shape]), text
            assert re.search(rf"\b{thing.colour}\b", text), text
        assert re.search(rf"\b{scene.background}\b", text), text


def test_a_caption_without_colours_names_none() -> None:
    rng = random.Random(5)
    for _ in range(200):
        text = captions.caption(random_scene(rng), Said(colour=False, background=False), rng).lower()
        assert not any(re.search(rf"\b{colour}\b", text) for colour in [*Colour, "grey"]), text


def test_rewritten_prompts_and_thinking_name_the_scene() -> None:
    rng = random.Random(6)
    for _ in range(100):
        scene = random_scene(rng)
        for text in (captions.long_prompt(scene, rng), captions.thinking(scene, EVERYTHING)):
            for thing in scene.things:
                assert re.search(rf"\b{thing.colour}\b", text), text
                assert re.search(rf"\b{thing.shape}\b", text), text
