"""Pictures of the world as latents, made once and kept in a file: the VAE need not run while the DiT learns."""

import hashlib
import random
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import safetensors
import safetensors.torch
import torch
from diffusers import AutoencoderKL
from rich.progress import track
from torch import Tensor

from demo_model import captions
from demo_model.captions import EVERYTHING, Said
from demo_model.render import Tint, render
from demo_model.training.vae import pixels
from demo_model.world import RGB, Colour, Scene, Thing, distance, is_held_out, mix, random_scene

ENCODE_PIXELS = 64 * 128 * 128  # pixels of one batch through the VAE
SHAPES_STAY = 0.75  # the alpha up to which a blend shows the shapes of its own scene


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """A picture's scene and how it may be captioned.

    `kind` is "said" (captions name what `said` has), "long", "strange" or "empty" (any words, or none), or "blend":
    the text of `scene` and that of `reference` are blended at `alpha`.
    """

    scene: Scene
    said: Said = EVERYTHING
    kind: str = "said"
    reference: Scene | None = None
    alpha: float = 0.0

    @property
    def names_colours(self) -> bool:
        """Whether captions name the things' colours."""
        return self.kind in ("said", "long") and self.said.colour

    def prompt(self, rng: random.Random) -> str:
        """A caption, another one at each call."""
        if self.kind == "strange":
            return captions.strange_prompt(rng)
        if self.kind == "empty":
            return ""
        if self.kind == "long":
            return captions.long_prompt(self.scene, rng)
        return captions.caption(self.scene, self.said, rng)


def random_example(rng: random.Random) -> Example:
    """An example of the training, any kind but "blend"."""
    scene, kind = random_scene(rng), rng.random()
    if kind < 0.03:
        return Example(scene=captions.unasked(scene), kind="empty")
    if kind < 0.08:
        return Example(scene=captions.unasked(scene), kind="strange")
    if kind < 0.2:
        return Example(scene=scene, kind="long")
    said = captions.random_said(rng)
    return Example(scene=_settled(scene, said, rng), said=said)


def _settled(scene: Scene, said: Said, rng: random.Random) -> Scene:
    """The scene as a caption asks for it; another one where a place that is not named makes it a held-out one."""
    settled = captions.settle(scene, said)
    while any(map(is_held_out, settled.things)):
        settled = captions.settle(random_scene(rng), said)
    return settled


def blended_example(rng: random.Random) -> Example:
    """An example whose text is pulled towards that of another scene; half of the prompts name no colour."""
    while True:
        said = captions.random_said(rng)
        if rng.random() < 0.5:
            said = Said(colour=False, background=False, size=rng.random() < 0.5, place=rng.random() < 0.5)
        alpha = rng.choice((0.3, 0.6, 1.0, rng.random()))
        scene = _settled(random_scene(rng), said, rng)
        example = Example(scene=scene, said=said, kind="blend", reference=random_scene(rng), alpha=alpha)
        if not any(map(is_held_out, things_shown(example))):
            return example


def draw(example: Example, *, width: int, height: int, rng: random.Random) -> np.ndarray:
    """The picture that an example asks for, uint8 `[height, width, 3]`."""
    scene, tint = drawn(example)
    return np.asarray(render(scene, width=width, height=height, rng=rng, tint=tint))


def drawn(example: Example) -> tuple[Scene, Tint | None]:
    """The scene whose shapes are drawn, and what its colours are pulled towards.

    A blend takes its shapes from the scene up to alpha 0.75, from the reference above, and mixes the colours.
    """
    if example.reference is None:
        return example.scene, None
    if example.alpha <= SHAPES_STAY:
        return example.scene, Tint(reference=example.reference, alpha=example.alpha)
    return example.reference, Tint(reference=example.scene, alpha=1 - example.alpha)


def things_shown(example: Example) -> list[Thing]:
    """The things of an example's picture, a mixed colour taken for the nearest one that has a name."""
    scene, tint = drawn(example)
    if tint is None:
        return list(scene.things)
    shown = []
    for index, thing in enumerate(scene.things):
        mixed = mix(RGB[thing.colour], RGB[tint.other(index)], tint.alpha)
        shown.append(replace(thing, colour=min(Colour, key=lambda colour: distance(RGB[colour], mixed))))
    return shown


@dataclass(frozen=True, slots=True, kw_only=True)
class Pool:
    """Examples of one size with their latents, bfloat16 `[n, 16, height / 8, width / 8]`, mean 0 and spread 1."""

    examples: list[Example]
    latents: Tensor


def examples_of(seed: int, count: int, *, blended: bool) -> list[Example]:
    """The same examples for the same seed."""
    rng = random.Random(seed)
    return [blended_example(rng) if blended else random_example(rng) for _ in range(count)]


@torch.no_grad()
def make_pool(vae: AutoencoderKL, path: Path, size: tuple[int, int], examples: list[Example], *, seed: int) -> Pool:
    """The examples with their latents, which are read from `path` if they are there, else drawn and written to it.

    `size` is width and height in pixels; `seed` moves the things of each picture a little.
    """
    width, height = size
    told = {"made_from": _fingerprint(vae, size, examples, seed)}
    if _metadata(path) != told:
        rng = random.Random(seed)
        vae.to(memory_format=torch.channels_last)  # half the time on a CPU
        step = max(1, ENCODE_PIXELS // (width * height))
        parts = [
            encode(
                vae, [draw(example, width=width, height=height, rng=rng) for example in examples[start : start + step]]
            )
            for start in track(range(0, len(examples), step), description=f"latents {width}x{height}")
        ]
        path.parent.mkdir(parents=True, exist_ok=True)
        written = path.with_suffix(".new")
        safetensors.torch.save_file({"latents": torch.cat(parts)}, written, metadata=told)
        written.replace(path)
    return Pool(examples=examples, latents=safetensors.torch.load_file(path)["latents"])


def _metadata(path: Path) -> dict[str, str] | None:
    if not path.is_file():
        return None
    with safetensors.safe_open(path, framework="pt") as file:
        told: dict[str, str] | None = file.metadata()
        return told


def _fingerprint(vae: AutoencoderKL, size: tuple[int, int], examples: list[Example], seed: int) -> str:
    """Of all that latents follow from, but for the code that draws: latents of others are made anew."""
    digest = hashlib.sha256(repr((size, examples, seed)).encode())
    for parameter in vae.encoder.parameters():
        digest.update(parameter.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def encode(vae: AutoencoderKL, pictures: list[np.ndarray]) -> Tensor:
    """Latents of pictures of one size, uint8 `[height, width, 3]` each: bfloat16 `[n, 16, height / 8, width / 8]`."""
    device = vae.device
    with torch.autocast(device.type, torch.bfloat16):
        mean = vae.encode(pixels(pictures).to(device)).latent_dist.mean
    latents: Tensor = (mean.float() - vae.config.shift_factor) * vae.config.scaling_factor
    return latents.bfloat16().contiguous().cpu()
