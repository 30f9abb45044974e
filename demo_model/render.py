"""Draws a scene with Pillow: the originals that the model learns from and that the judge is checked on."""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from PIL import Image, ImageDraw

from demo_model.world import RADIUS, RGB, Colour, Pattern, Place, Rgb, Scene, Shape, Thing, accent, mix

SUPERSAMPLING = 3  # drawn so many times larger and averaged: smooth edges
_CELLS = (0.22, 0.5, 0.78)
_MARGIN = 0.02
JITTER = 0.02  # of the short side, by which a thing is off its place at most
RESIZED = 0.07  # share by which a thing is larger or smaller at most

Point = tuple[float, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Pose:
    """How a thing differs from the usual: `scale` of its radius, and moved by shares of the picture's short side."""

    scale: float = 1.0
    x: float = 0.0
    y: float = 0.0

    @classmethod
    def random(cls, rng: random.Random) -> Self:
        """Within `RESIZED` and `JITTER`."""
        scale = rng.uniform(1 - RESIZED, 1 + RESIZED)
        return cls(scale=scale, x=rng.uniform(-JITTER, JITTER), y=rng.uniform(-JITTER, JITTER))


@dataclass(frozen=True, slots=True, kw_only=True)
class Tint:
    """Colours pulled towards those of another scene: 0 changes nothing, 1 takes them over."""

    reference: Scene
    alpha: float

    def other(self, index: int) -> Colour:
        """The colour that the thing of that number is pulled towards."""
        others = self.reference.things
        return others[min(index, len(others) - 1)].colour


def render(
    scene: Scene,
    *,
    width: int,
    height: int,
    rng: random.Random | None = None,
    tint: Tint | None = None,
    poses: Sequence[Pose] | None = None,
) -> Image.Image:
    """The picture of a scene, RGB.

    Its things stand as `poses` tell; without them `rng` moves and resizes each a little, as no two pictures are alike.
    """
    large = (width * SUPERSAMPLING, height * SUPERSAMPLING)
    ground = RGB[scene.background]
    if tint:
        ground = mix(ground, RGB[tint.reference.background], tint.alpha)
    image = Image.new("RGB", large, ground)
    for index, thing in enumerate(scene.things):
        tones = (RGB[thing.colour], accent(thing.colour))
        if tint:
            other = tint.other(index)
            tones = (mix(tones[0], RGB[other], tint.alpha), mix(tones[1], accent(other), tint.alpha))
        pose = poses[index] if poses else Pose.random(rng) if rng else Pose()
        _draw(image, thing, tones, pose)
    return image.reduce(SUPERSAMPLING)


def mask(shape: Shape, extent: int) -> Image.Image:
    """The shape alone, white on black (mode L), its outline filling a square of `extent` pixels."""
    large = Image.new("L", (extent * SUPERSAMPLING,) * 2, 0)
    half = extent * SUPERSAMPLING / 2
    _fill(ImageDraw.Draw(large), shape, (half, half), half)
    return large.reduce(SUPERSAMPLING)


def _draw(image: Image.Image, thing: Thing, tones: tuple[Rgb, Rgb], pose: Pose) -> None:
    radius = RADIUS[thing.size] * min(image.size) * pose.scale
    center = _center(thing.place, image.size, radius, pose)
    box = tuple(round(axis + sign * radius) for sign in (-1, 1) for axis in center)
    extent = (box[2] - box[0], box[3] - box[1])
    outline = Image.new("L", extent, 0)
    _fill(ImageDraw.Draw(outline), thing.shape, (extent[0] / 2, extent[1] / 2), radius)
    image.paste(_filling(thing.pattern, tones, extent, radius), (box[0], box[1]), outline)


def _center(place: Place, size: tuple[int, int], radius: float, pose: Pose) -> Point:
    short = min(size)
    reach = radius + _MARGIN * short
    axes = []
    for length, cell, moved in zip(size, (place.column, place.row), (pose.x, pose.y), strict=True):
        axes.append(min(max(_CELLS[cell] * length + moved * short, reach), length - reach))
    return axes[0], axes[1]


def _filling(pattern: Pattern, tones: tuple[Rgb, Rgb], extent: tuple[int, int], radius: float) -> Image.Image:
    filling = Image.new("RGB", extent, tones[0])
    draw, tone = ImageDraw.Draw(filling), tones[1]
    if pattern is Pattern.STRIPED:
        period = radius / 2
        for row in range(-1, 5):
            top = radius + (row - 2) * period + 0.3 * period
            draw.rectangle((0, top, extent[0], top + 0.4 * period), fill=tone)
    elif pattern is Pattern.DOTTED:
        spacing, dot = 0.6 * radius, 0.18 * radius
        for row in range(-2, 3):
            for column in range(-3, 4):
                x = radius + (column + (0.5 if row % 2 else 0.0)) * spacing
                y = radius + row * spacing * 0.9
                draw.ellipse((x - dot, y - dot, x + dot, y + dot), fill=tone)
    return filling


def _fill(draw: ImageDraw.ImageDraw, shape: Shape, center: Point, radius: float) -> None:
    x, y = center
    if shape in (Shape.CIRCLE, Shape.RING):
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=255)
        if shape is Shape.RING:
            hole = 0.52 * radius
            draw.ellipse((x - hole, y - hole, x + hole, y + hole), fill=0)
        return
    draw.polygon([(x + px * radius, y + py * radius) for px, py in _OUTLINES[shape]], fill=255)


def _star() -> list[Point]:
    reach = (1.0, 0.42)
    angles = [math.pi * (step / 5 - 0.5) for step in range(10)]
    return [(reach[step % 2] * math.cos(angle), reach[step % 2] * math.sin(angle)) for step, angle in enumerate(angles)]


def _heart() -> list[Point]:
    outline = []
    for step in range(48):
        t = 2 * math.pi * step / 48
        x = 16 * math.sin(t) ** 3
        y = 13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)
        outline.append((x / 17, -(y + 2.5) / 15))
    return outline


def _cross() -> list[Point]:
    arm = 0.34
    corners = [(arm, 1), (arm, arm), (1, arm), (1, -arm), (arm, -arm), (arm, -1)]
    return [*corners, *((-x, -y) for x, y in corners)]


_OUTLINES: dict[Shape, list[Point]] = {
    Shape.SQUARE: [(-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)],
    Shape.TRIANGLE: [(0.0, -0.95), (1.0, 0.8), (-1.0, 0.8)],
    Shape.STAR: _star(),
    Shape.DIAMOND: [(0.0, -1.0), (0.72, 0.0), (0.0, 1.0), (-0.72, 0.0)],
    Shape.CROSS: _cross(),
    Shape.HEART: _heart(),
}
