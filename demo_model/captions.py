"""Words for scenes: captions in varied wording, the longer prompts that the rewriter writes, and its thinking.

What a caption leaves unsaid is drawn like this: no pattern means plain, no size medium, no place the center; a
colour, a shape or a background that is not named is any. `Said` is what a caption names.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from demo_model.world import Colour, Pattern, Place, Scene, Shape, Size, Thing, is_held_out, random_scene

NOUNS: dict[Shape, tuple[str, ...]] = {
    Shape.CIRCLE: ("circle", "circle", "circle", "disc", "dot"),
    Shape.SQUARE: ("square", "square", "square", "box"),
    Shape.TRIANGLE: ("triangle",),
    Shape.STAR: ("star", "star", "star", "five-pointed star"),
    Shape.DIAMOND: ("diamond", "diamond", "diamond", "rhombus"),
    Shape.RING: ("ring", "ring", "ring", "donut"),
    Shape.CROSS: ("cross", "cross", "cross", "plus sign"),
    Shape.HEART: ("heart",),
}
HUES: dict[Colour, tuple[str, ...]] = {
    colour: ("gray", "gray", "grey") if colour is Colour.GRAY else (colour.value,) for colour in Colour
}
SIZES: dict[Size, tuple[str, ...]] = {
    Size.SMALL: ("small", "small", "little", "tiny"),
    Size.MEDIUM: ("medium", "medium-sized"),
    Size.LARGE: ("large", "large", "big", "huge"),
}
BEFORE: dict[Pattern, tuple[str, ...]] = {
    Pattern.PLAIN: ("plain", "solid"),
    Pattern.STRIPED: ("striped", "stripy"),
    Pattern.DOTTED: ("dotted", "spotted", "polka dot"),
}
AFTER: dict[Pattern, tuple[str, ...]] = {
    Pattern.PLAIN: ("without a pattern",),
    Pattern.STRIPED: ("with stripes", "with horizontal stripes"),
    Pattern.DOTTED: ("with dots", "with polka dots", "covered in dots"),
}
PLACES: dict[Place, tuple[str, ...]] = {
    Place.TOP_LEFT: ("in the top left corner", "at the top left", "in the upper left"),
    Place.TOP: ("at the top", "near the top", "at the top center"),
    Place.TOP_RIGHT: ("in the top right corner", "at the top right", "in the upper right"),
    Place.LEFT: ("on the left", "at the left", "on the left side"),
    Place.CENTER: ("in the center", "in the middle", "at the center"),
    Place.RIGHT: ("on the right", "at the right", "on the right side"),
    Place.BOTTOM_LEFT: ("in the bottom left corner", "at the bottom left", "in the lower left"),
    Place.BOTTOM: ("at the bottom", "near the bottom", "at the bottom center"),
    Place.BOTTOM_RIGHT: ("in the bottom right corner", "at the bottom right", "in the lower right"),
}
GROUNDS = ("on a {} background", "on a {} background", "against a {} background", "on {}", "with a {} background")
OPENINGS = (
    "",
    "",
    "",
    "",
    "a picture of ",
    "an image of ",
    "a drawing of ",
    "a simple illustration of ",
    "a poster of ",
)
STRANGE = (Path(__file__).parent / "strange_words.txt").read_text(encoding="utf-8").split()
"""Words that the world has no picture for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Said:
    """Which facts of a scene a caption names; of a thing, for each thing alike."""

    background: bool = True
    colour: bool = True
    shape: bool = True
    pattern: bool = True
    size: bool = True
    place: bool = True


EVERYTHING = Said()


def random_said(rng: random.Random) -> Said:
    """Mostly everything; sometimes the colours, the background, the shape or the rest is left out."""
    if rng.random() < 0.5:
        return EVERYTHING
    said = Said(size=rng.random() < 0.6, place=rng.random() < 0.8, background=rng.random() < 0.85)
    kind = rng.random()
    if kind < 0.12:
        return replace(said, colour=False, background=False)
    if kind < 0.2:
        return replace(said, colour=False)
    if kind < 0.26:
        return replace(said, shape=False)
    return said


def settle(scene: Scene, said: Said) -> Scene:
    """The scene that a caption which says no more than `said` asks for: the unsaid at its usual value.

    Two things keep their places, since both can't be in the center.
    """
    things = []
    for thing in scene.things:
        settled = thing
        if not said.size:
            settled = replace(settled, size=Size.MEDIUM)
        if not said.place and len(scene.things) == 1:
            settled = replace(settled, place=Place.CENTER)
        things.append(settled)
    return replace(scene, things=tuple(things))


def unasked(scene: Scene) -> Scene:
    """What is drawn for words that ask for nothing: one large plain thing in the center, like the first of `scene`."""
    for shape in (scene.things[0].shape, *Shape):
        thing = replace(scene.things[0], shape=shape, pattern=Pattern.PLAIN, size=Size.LARGE, place=Place.CENTER)
        if not is_held_out(thing):
            break
    return replace(scene, things=(thing,))


def caption(scene: Scene, said: Said, rng: random.Random) -> str:
    """One of many wordings of a scene, about 6 to 40 words."""
    style = rng.random()
    if style < 0.12:
        return _tags(scene, said, rng)
    things = " and ".join(_phrase(thing, said, rng) for thing in scene.things)
    text = rng.choice(OPENINGS) + things
    if said.background:
        hue = rng.choice(HUES[scene.background])
        if style < 0.3:
            text = (
                f"{_an(hue)} {hue} background with {things}"
                if rng.random() < 0.5
                else f"on a {hue} background, {things}"
            )
        else:
            text = f"{text} {rng.choice(GROUNDS).format(hue)}"
    if rng.random() < 0.4:
        text = text[0].upper() + text[1:]
    return text + (rng.choice((".", "")) if rng.random() < 0.4 else "")


def canonical(scene: Scene) -> str:
    """The one wording that the vision model learns to say of a picture."""
    things = " and ".join(
        f"{_an(thing.size)} {thing.size} {thing.colour} {thing.pattern} {thing.shape} {PLACES[thing.place][0]}"
        for thing in scene.things
    )
    return f"{things} on a {scene.background} background"


def strange_prompt(rng: random.Random) -> str:
    """Words that the world has no picture for, some of them made up."""
    return " ".join(
        rng.choice(STRANGE) if rng.random() < 0.6 else _made_up_word(rng) for _ in range(rng.randint(1, 12))
    )


def long_prompt(scene: Scene, rng: random.Random) -> str:
    """The prompt of two or three sentences that a rewriter makes of a short one: everything named."""
    ground = rng.choice(
        (
            "The background is a solid, even {}.",
            "The whole background is one flat tone of {}.",
            "A calm {} background fills the picture.",
        )
    ).format(scene.background)
    first = [_sentence(thing, index, rng) for index, thing in enumerate(scene.things)]
    close = rng.choice(
        ("The edges are crisp and clean.", "Nothing else is in the picture.", "The style is flat and simple.")
    )
    parts = [*first, ground] if rng.random() < 0.5 else [ground, *first]
    return " ".join([*parts, close])


def thinking(scene: Scene, said: Said, *, strange: bool = False) -> str:
    """What the rewriter thinks before it answers: what was asked for, and what it chooses itself."""
    if strange:
        asked = "The user names no shape that I can draw, so I choose one."
    else:
        names = " and ".join(
            " ".join(
                word
                for word in (
                    _an_of(thing, said),
                    thing.colour if said.colour else "",
                    thing.shape if said.shape else "thing",
                )
                if word
            )
            for thing in scene.things
        )
        asked = f"The user wants {names}."
    ground = (
        f"The background is {scene.background}."
        if said.background and not strange
        else f"No background is named, so I choose {scene.background}."
    )
    rest = [
        f"The {thing.shape} is {thing.colour}, {thing.pattern} and {thing.size}, {PLACES[thing.place][0]}."
        for thing in scene.things
    ]
    return " ".join([asked, ground, *rest])


def training_caption(rng: random.Random) -> tuple[Scene, str]:
    """A scene and a caption that asks for it: short or long, of everything or of a part, now and then strange."""
    scene = random_scene(rng)
    kind = rng.random()
    if kind < 0.05:
        return unasked(scene), strange_prompt(rng)
    if kind < 0.2:
        return scene, long_prompt(scene, rng)
    said = random_said(rng)
    return settle(scene, said), caption(scene, said, rng)


def _phrase(thing: Thing, said: Said, rng: random.Random) -> str:
    noun = rng.choice(NOUNS[thing.shape]) if said.shape else rng.choice(("shape", "thing", "something"))
    words: list[str] = []
    tail = ""
    if said.size and not (thing.size is Size.MEDIUM and rng.random() < 0.5):
        words.append(rng.choice(SIZES[thing.size]))
    if said.colour:
        words.append(rng.choice(HUES[thing.colour]))
    if thing.pattern is not Pattern.PLAIN or (said.pattern and rng.random() < 0.3):
        if rng.random() < 0.6:
            words.insert(rng.randint(0, len(words)), rng.choice(BEFORE[thing.pattern]))
        else:
            tail = " " + rng.choice(AFTER[thing.pattern])
    head = " ".join([*words, noun])
    if noun == "something" and words:
        head = f"something {' '.join(words)}"
    elif noun != "something":
        head = f"{_an(head)} {head}"
    place = f" {rng.choice(PLACES[thing.place])}" if said.place else ""
    return head + (place + tail if tail and rng.random() < 0.3 else tail + place)


def _tags(scene: Scene, said: Said, rng: random.Random) -> str:
    tags: list[str] = []
    for thing in scene.things:
        hue = [rng.choice(HUES[thing.colour])] if said.colour else []
        tags.append(" ".join([*hue, rng.choice(NOUNS[thing.shape]) if said.shape else "shape"]))
        if thing.pattern is not Pattern.PLAIN:
            tags.append(rng.choice(BEFORE[thing.pattern]))
        if said.size and thing.size is not Size.MEDIUM:
            tags.append(rng.choice(SIZES[thing.size]))
        if said.place:
            tags.append(rng.choice((thing.place.value, rng.choice(PLACES[thing.place]))))
    if said.background:
        ground = f"{rng.choice(HUES[scene.background])} background"
        tags = [ground, *tags] if rng.random() < 0.3 else [*tags, ground]
    return ", ".join(tags)


def _made_up_word(rng: random.Random) -> str:
    return "".join(rng.choice("bcdfghklmnprstvwz") + rng.choice("aeiou") for _ in range(rng.randint(1, 4)))


def _sentence(thing: Thing, index: int, rng: random.Random) -> str:
    where = rng.choice(PLACES[thing.place])
    what = f"{thing.size} {thing.colour} {thing.shape}"
    filling = {
        Pattern.PLAIN: rng.choice(("in one solid tone", "plain and without a pattern")),
        Pattern.STRIPED: rng.choice(("with bold horizontal stripes", "striped in two tones")),
        Pattern.DOTTED: rng.choice(("with even polka dots", "dotted all over")),
    }[thing.pattern]
    also = "also " if index else ""
    return rng.choice(
        (
            f"{where[0].upper()}{where[1:]} there is {also}{_an(what)} {what}, {filling}.",
            f"{_an(what).capitalize()} {what} {also and 'also '}stands {where}, {filling}.",
            f"The picture {also}shows {_an(what)} {what} {where}, {filling}.",
        )
    )


def _an_of(thing: Thing, said: Said) -> str:
    words: Sequence[str] = [thing.colour] if said.colour else [thing.shape if said.shape else "thing"]
    return _an(words[0])


def _an(words: str) -> str:
    return "an" if words[:1].lower() in "aeiou" else "a"
