"""How much memory a picture takes on the device beyond the weights: by a formula, or as measured. Knows no tensors.

Both a step and a decoding take memory in proportion to their size: attention is never stored whole, and the largest
tensors are a few times a block's width, or the VAE's last layers at the picture's full size. The formula's factors are
about one and a half times what was measured on checkpoints of several widths, in float32 and bfloat16.
"""

from bisect import bisect_left
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from services.diffusion.shapes import Shape

STEP_FACTOR = 24  # measured: 16 to 17 numbers of the block's width for each token
DECODE_FACTOR = 6  # measured: 3.5 to 5.5 numbers for each pixel and channel of the last layer but one
MARGIN = 1.1  # on what was measured: allocators round, and kernels keep a little for themselves
DISTRUST, MOST_DISTRUST, TRUST = 1.25, 4.0, 0.98
"""After an error pictures that are made together are expected to take so many times as much, up to so many in all;
after each picture that is done so many times."""
TILE_PX = 512  # a side of what the VAE decodes at a time when it decodes in tiles
LATENT_BYTES_PER_PIXEL = 1  # 16 channels of float32 for 64 pixels, and as much again for the last velocity

Points = Mapping[int, int]
"""Bytes by size."""


@dataclass(frozen=True, slots=True)
class Measured:
    """What a calibration found: bytes of a step by its tokens, of a decoding by its pixels."""

    step: Points = field(default_factory=dict)
    decode: Points = field(default_factory=dict)


@dataclass(slots=True, kw_only=True)
class Footprint:
    """Memory of the work on one model. Widths are in numbers, item sizes in bytes; `decode_pixels` of several pictures
    are decoded at once, unless the VAE has a device of its own. Larger pictures than `tiling_pixels` are decoded in
    tiles, and were when it was measured; where there is less memory, larger ones than `tiled_above`."""

    width: int
    text_width: int
    item_bytes: int
    vae_width: int
    vae_item_bytes: int
    tiling_pixels: int
    decode_pixels: int = 0
    decodes_here: bool = True
    measured: Measured = field(default_factory=Measured)
    distrust: float = 1.0
    tiled_above: int = field(init=False)

    def __post_init__(self) -> None:
        self.tiled_above = self.tiling_pixels

    def tile_within(self, room: int) -> None:
        """Decodes in tiles what cannot be decoded whole within `room` bytes: slower, but it can be drawn."""
        if not self.decodes_here:
            return
        low, high = 0, self.tiling_pixels
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self._decode_whole(middle) <= room else (low, middle - 1)
        self.tiled_above = low

    def decode_in_tiles(self, pixels: int) -> bool:
        """Decodes pictures of so many pixels in tiles, until `tile_within` says otherwise; answers whether that changes
        anything."""
        if pixels > self.tiled_above or pixels <= TILE_PX**2:
            return False
        self.tiled_above = pixels - 1
        return True

    def step(self, tokens: int) -> int:
        """Bytes of a forward of so many tokens, all its items together."""
        formula = STEP_FACTOR * self.width * self.item_bytes
        return int(_estimate(self.measured.step, tokens, formula))

    def decode(self, pixels: int) -> int:
        """Bytes of a decoding of so many pixels at once, 0 where the VAE has a device of its own."""
        if not self.decodes_here:
            return 0
        return self._decode_whole(pixels) if pixels <= self.tiled_above else self._decode_tiled(pixels)

    def _decode_whole(self, pixels: int) -> int:
        points = {size: taken for size, taken in self.measured.decode.items() if size <= self.tiling_pixels}
        return int(_estimate(points, pixels, self._decode_formula))

    def _decode_tiled(self, pixels: int) -> int:
        points = {size: taken for size, taken in self.measured.decode.items() if size > self.tiling_pixels}
        at_once = pixels if points else min(pixels, TILE_PX**2) + pixels // self.vae_width
        return int(_estimate(points, at_once, self._decode_formula))

    def _decode_least(self, pixels: int) -> int:
        """Bytes of a decoding in tiles where it can be had, though larger pictures are decoded whole."""
        if not self.decodes_here or pixels <= TILE_PX**2:
            return self.decode(pixels)
        return min(self.decode(pixels), self._decode_tiled(pixels))

    @property
    def _decode_formula(self) -> float:
        return DECODE_FACTOR * self.vae_width * self.vae_item_bytes

    def held(self, shape: Shape) -> int:
        """Bytes that a picture holds from its first step to its last: latents and embeddings."""
        embeddings = (shape.text_tokens + shape.negative_tokens) * self.text_width * self.item_bytes
        return LATENT_BYTES_PER_PIXEL * 2 * shape.pixels + embeddings

    def together(self, running: Sequence[Shape]) -> int:
        """Bytes that these pictures take at most at a time: one group steps, or its small pictures are decoded.

        One alone is always given a try: what was learned from errors is about pictures together.
        """
        if not running:
            return 0
        counts = Counter(running)
        steps = max(self.step(count * shape.tokens) for shape, count in counts.items())
        decodings = max(
            max(1, min(count, self.decode_pixels // shape.pixels)) * self.decode(shape.pixels)
            for shape, count in counts.items()
        )
        times = self.distrust if len(running) > 1 else 1.0
        return sum(map(self.held, running)) + int(times * max(steps, decodings))

    def least(self, shape: Shape) -> int:
        """Bytes that a picture takes alone where `decode_in_tiles` may be asked for."""
        return self.held(shape) + max(self.step(shape.tokens), self._decode_least(shape.pixels))

    def most_pixels(self, shape: Shape, room: int) -> int:
        """Pixels of the largest picture of that form which takes at the least no more than `room` bytes."""
        low, high = 0, shape.pixels
        while high - low > 1:
            middle = (low + high) // 2
            share = middle / shape.pixels
            step = self.step(int(shape.tokens * share))
            taken = int(self.held(shape) * share) + max(step, self._decode_least(middle))
            low, high = (middle, high) if taken <= room else (low, middle)
        return low

    def note_error(self) -> None:
        """The device ran out of memory all the same: for a while expect more."""
        self.distrust = min(self.distrust * DISTRUST, MOST_DISTRUST)

    def note_success(self) -> None:
        """A picture is done."""
        self.distrust = max(self.distrust * TRUST, 1.0)


def _estimate(points: Points, size: int, formula: float) -> float:
    """What was measured for the next larger size, shrunk in proportion but not below the next smaller one; beyond
    all of them the largest, grown in proportion; where nothing was measured the formula, which is bytes for each."""
    if not points or not size:
        return size * formula
    sizes = sorted(points)
    place = bisect_left(sizes, size)
    nearest = sizes[min(place, len(sizes) - 1)]
    least = points[sizes[place - 1]] if place else 0
    return MARGIN * max(points[nearest] * size / nearest, least)
