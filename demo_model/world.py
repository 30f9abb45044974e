"""What the demo model knows: one or two shapes of a dozen colours, with a pattern, a size and a place, on a background.

A combination of colour, shape, pattern and place is either for training or held out, never both: `is_held_out` decides
by the names alone, so training and evaluation agree without a list.
"""

import random
import zlib
from dataclasses import dataclass
from enum import StrEnum


class Shape(StrEnum):
    """What is drawn."""

    CIRCLE = "circle"
    SQUARE = "square"
    TRIANGLE = "triangle"
    STAR = "star"
    DIAMOND = "diamond"
    RING = "ring"
    CROSS = "cross"
    HEART = "heart"


class Colour(StrEnum):
    """The palette; `RGB` has the values."""

    RED = "red"
    ORANGE = "orange"
    YELLOW = "yellow"
    GREEN = "green"
    CYAN = "cyan"
    BLUE = "blue"
    PURPLE = "purple"
    PINK = "pink"
    BROWN = "brown"
    BLACK = "black"
    GRAY = "gray"
    WHITE = "white"


Rgb = tuple[int, int, int]
"""Red, green and blue, 0 to 255."""

RGB: dict[Colour, Rgb] = {
    Colour.RED: (218, 38, 38),
    Colour.ORANGE: (245, 140, 25),
    Colour.YELLOW: (248, 216, 48),
    Colour.GREEN: (40, 155, 70),
    Colour.CYAN: (70, 205, 220),
    Colour.BLUE: (38, 78, 208),
    Colour.PURPLE: (128, 48, 178),
    Colour.PINK: (246, 145, 192),
    Colour.BROWN: (122, 74, 36),
    Colour.BLACK: (22, 22, 22),
    Colour.GRAY: (130, 130, 130),
    Colour.WHITE: (248, 248, 248),
}


class Pattern(StrEnum):
    """How a shape is filled: in one tone, or in two."""

    PLAIN = "plain"
    STRIPED = "striped"
    DOTTED = "dotted"


class Size(StrEnum):
    """Half the extent of a shape, as a share of the picture's short side: see `RADIUS`."""

    SMALL = "small"
    MEDIUM = "medium"
    LARGE = "large"


RADIUS: dict[Size, float] = {Size.SMALL: 0.13, Size.MEDIUM: 0.18, Size.LARGE: 0.25}


class Place(StrEnum):
    """A cell of a grid of three by three."""

    TOP_LEFT = "top left"
    TOP = "top"
    TOP_RIGHT = "top right"
    LEFT = "left"
    CENTER = "center"
    RIGHT = "right"
    BOTTOM_LEFT = "bottom left"
    BOTTOM = "bottom"
    BOTTOM_RIGHT = "bottom right"

    @property
    def column(self) -> int:
        """0 to 2 from the left."""
        return list(Place).index(self) % 3

    @property
    def row(self) -> int:
        """0 to 2 from the top."""
        return list(Place).index(self) // 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Thing:
    """One shape in the picture."""

    shape: Shape
    colour: Colour
    pattern: Pattern = Pattern.PLAIN
    size: Size = Size.MEDIUM
    place: Place = Place.CENTER


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """One or two things on a background of one colour."""

    background: Colour
    things: tuple[Thing, ...]


def accent(colour: Colour) -> Rgb:
    """The second tone of a pattern: lighter for dark colours, darker for light ones."""
    red, green, blue = RGB[colour]
    dark = 0.3 * red + 0.59 * green + 0.11 * blue < 120
    return mix(RGB[colour], (255, 255, 255), 0.6) if dark else mix(RGB[colour], (0, 0, 0), 0.45)


def mix(one: Rgb, other: Rgb, share: float) -> Rgb:
    """A colour between two: `share` 0 is the first, 1 the second."""
    red, green, blue = (round(a + (b - a) * share) for a, b in zip(one, other, strict=True))
    return red, green, blue


def is_held_out(thing: Thing) -> bool:
    """Whether this colour, shape, pattern and place together are kept from training: one combination in eight."""
    name = f"{thing.colour} {thing.shape} {thing.pattern} {thing.place}"
    return zlib.crc32(name.encode()) % 8 == 0


def random_scene(rng: random.Random, *, held_out: bool = False, things: int | None = None) -> Scene:
    """A scene whose things are all held out, or none of them. `things` is 1 or 2; None draws it."""
    count = things if things is not None else (2 if rng.random() < 0.4 else 1)
    while True:
        background = rng.choice(list(Colour))
        places = _places(rng, count)
        sizes = list(Size) if count == 1 else [Size.SMALL, Size.MEDIUM]
        drawn = tuple(_thing(rng, background, place, rng.choice(sizes)) for place in places)
        if all(is_held_out(thing) is held_out for thing in drawn):
            return Scene(background=background, things=drawn)


def _places(rng: random.Random, count: int) -> list[Place]:
    while True:
        places = rng.sample(list(Place), count)
        if count == 1 or _apart(*places):
            return places


def _apart(one: Place, other: Place) -> bool:
    return abs(one.column - other.column) == 2 or abs(one.row - other.row) == 2


def _thing(rng: random.Random, background: Colour, place: Place, size: Size) -> Thing:
    colour = rng.choice([colour for colour in Colour if colour is not background])
    patterns = [Pattern.PLAIN]
    if distance(accent(colour), RGB[background]) > 90:  # else the pattern would look like holes
        patterns = [Pattern.PLAIN, Pattern.PLAIN, Pattern.STRIPED, Pattern.DOTTED]
    return Thing(shape=rng.choice(list(Shape)), colour=colour, pattern=rng.choice(patterns), size=size, place=place)


def distance(one: Rgb, other: Rgb) -> float:
    """Euclidean distance of two colours in RGB, 0 to 442."""
    return float(sum((a - b) ** 2 for a, b in zip(one, other, strict=True)) ** 0.5)
