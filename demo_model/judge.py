"""Says what a picture shows: background, and for each thing its colour, shape and place.

No network: the background is what most of the border shows, things are connected regions that differ from it, a colour
is the one whose tone, or whose two tones if both are there, a region's pixels are nearest to, and a shape the one whose
drawn mask covers it best.
On rendered originals it is right in over 99 of 100, which the evaluation checks before it judges anything.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from demo_model.render import mask
from demo_model.world import RGB, Colour, Place, Rgb, Scene, Shape, accent

EXTENT = 48  # pixels of the square in which masks are compared
SMALLEST = 0.004  # share of the picture that a region needs to be a thing
BOTH_TONES = 0.15  # share of a region that each tone of a pattern covers at least
APART = 48.0  # distance in RGB from the background at which a pixel belongs to a thing

Pixels = NDArray[np.uint8]
Mask = NDArray[np.bool_]


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """A thing that the judge found."""

    colour: Colour
    shape: Shape
    place: Place
    area: int  # pixels


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What a picture shows; the largest thing comes first."""

    background: Colour
    things: tuple[Seen, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """Which facts of a scene a picture got right, each for all of its things."""

    background: bool
    colour: bool
    shape: bool
    place: bool

    @property
    def whole(self) -> bool:
        """Everything right."""
        return self.background and self.colour and self.shape and self.place


def judge(picture: Image.Image) -> Verdict:
    """What a picture of the world shows."""
    pixels = np.asarray(picture.convert("RGB"))
    nearest = _nearest(pixels, [RGB[colour] for colour in Colour])
    border = np.concatenate([nearest[0], nearest[-1], nearest[:, 0], nearest[:, -1]])
    background = list(Colour)[np.bincount(border, minlength=len(Colour)).argmax()]
    ground = np.median(pixels[nearest == list(Colour).index(background)], axis=0)
    foreground = np.sqrt(((pixels - ground) ** 2).sum(axis=2)) > APART
    regions = [region for region in _regions(foreground) if region.sum() >= SMALLEST * foreground.size]
    regions.sort(key=lambda region: -int(region.sum()))
    return Verdict(background=background, things=tuple(_see(region, pixels) for region in regions))


def score(picture: Image.Image, scene: Scene) -> Score:
    """How a picture fits a scene. Each thing is held against the found one whose place is nearest."""
    verdict = judge(picture)
    found = list(verdict.things[: max(len(scene.things), 1)])
    right = {"colour": True, "shape": True, "place": True}
    for thing in scene.things:
        if not found:
            right = dict.fromkeys(right, False)
            break
        match = min(found, key=lambda seen: _cells_between(seen.place, thing.place))
        found.remove(match)
        right["colour"] &= match.colour is thing.colour
        right["shape"] &= match.shape is thing.shape
        right["place"] &= match.place is thing.place
    return Score(background=verdict.background is scene.background, **right)


def _nearest(pixels: Pixels, palette: list[Rgb]) -> NDArray[np.int64]:
    """Which colour of the palette is nearest, for each pixel."""
    best = np.full(pixels.shape[:2], np.inf, dtype=np.float32)
    index = np.zeros(pixels.shape[:2], dtype=np.int64)
    for number, tone in enumerate(palette):
        away = ((pixels.astype(np.float32) - np.array(tone, dtype=np.float32)) ** 2).sum(axis=2)
        index[away < best] = number
        best = np.minimum(best, away)
    return index


def _regions(foreground: Mask) -> list[Mask]:
    """Connected regions, found by spreading the largest label over neighbours until nothing changes."""
    height, width = foreground.shape
    labels = np.where(foreground, np.arange(1, height * width + 1).reshape(height, width), 0)
    while True:
        before = labels.copy()
        for axis in (0, 1):
            for flipped in (False, True):
                labels = _sweep(labels, foreground, axis, flipped=flipped)
        if np.array_equal(before, labels):
            break
    return [labels == label for label in np.unique(labels) if label]


def _sweep(labels: NDArray[np.int64], foreground: Mask, axis: int, *, flipped: bool) -> NDArray[np.int64]:
    turned = labels if axis == 0 else labels.T
    inside = foreground if axis == 0 else foreground.T
    turned = (turned[::-1] if flipped else turned).copy()
    inside = inside[::-1] if flipped else inside
    for row in range(1, len(turned)):
        above = turned[row - 1]
        joined = inside[row] & (above > 0)
        turned[row] = np.where(joined, np.maximum(turned[row], above), turned[row])
    turned = turned[::-1] if flipped else turned
    return turned if axis == 0 else turned.T


def _see(region: Mask, pixels: Pixels) -> Seen:
    rows, columns = np.nonzero(region)
    height, width = region.shape
    cell = (_cell(_middle(rows) / height), _cell(_middle(columns) / width))
    return Seen(
        colour=colour_of(pixels[region].astype(np.float32)),
        shape=_shape(region[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]),
        place=list(Place)[3 * cell[0] + cell[1]],
        area=int(region.sum()),
    )


def colour_of(pixels: NDArray[np.float32]) -> Colour:
    """The colour of a thing from its pixels `[n, 3]`. A gray without any white in it is no pattern of white, though
    white's second tone is nearly gray."""
    away: dict[Colour, float] = {}
    for colour in Colour:
        first, second = (_away(pixels, tone) for tone in (RGB[colour], accent(colour)))
        is_pattern = BOTH_TONES <= float((first <= second).mean()) <= 1 - BOTH_TONES
        away[colour] = float((np.minimum(first, second) if is_pattern else first).mean())
    return min(away, key=lambda colour: away[colour])


def _away(pixels: NDArray[np.float32], tone: Rgb) -> NDArray[np.float32]:
    distances: NDArray[np.float32] = np.linalg.norm(pixels - np.array(tone, dtype=np.float32), axis=1)
    return distances


def _middle(positions: NDArray[np.int64]) -> float:
    return (float(positions.min()) + float(positions.max()) + 1) / 2


def _cell(share: float) -> int:
    return min(2, int(share * 3))


def _shape(region: Mask) -> Shape:
    drawn = _fit(region)
    overlaps = {shape: _overlap(drawn, known) for shape, known in _masks().items()}
    return max(overlaps, key=lambda shape: overlaps[shape])


def _overlap(one: NDArray[np.float32], other: NDArray[np.float32]) -> float:
    return float(np.minimum(one, other).sum() / np.maximum(one, other).sum())


def _fit(region: Mask) -> NDArray[np.float32]:
    """The region in a square of `EXTENT`, its proportions kept, centered."""
    height, width = region.shape
    side = max(height, width)
    square = Image.new("L", (side, side))
    square.paste(Image.fromarray(region.astype(np.uint8) * 255), ((side - width) // 2, (side - height) // 2))
    fitted: NDArray[np.float32] = np.asarray(square.resize((EXTENT, EXTENT), Image.Resampling.BOX), dtype=np.float32)
    return fitted / np.float32(255)


@lru_cache(maxsize=1)
def _masks() -> dict[Shape, NDArray[np.float32]]:
    known = {}
    for shape in Shape:
        drawn = np.asarray(mask(shape, 4 * EXTENT)) > 127
        rows, columns = np.nonzero(drawn)
        known[shape] = _fit(drawn[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1])
    return known


def _cells_between(one: Place, other: Place) -> int:
    return abs(one.row - other.row) + abs(one.column - other.column)
