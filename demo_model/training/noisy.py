"""Batches for the stages that train the DiT alone: noisy latents, and what the finished text says of them."""

import random
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import torch
from diffusers import ZImageTransformer2DModel
from torch import Tensor

from demo_model.render import render
from demo_model.seeing import Vision
from demo_model.training.dit import MULTIPLE, predict_and_show
from demo_model.training.joint import (
    SHIFT,
    SIZES,
    Learnt,
    Pools,
    blended_states,
    reference_states,
    token_rows,
)
from demo_model.training.latents import Example, blended_example, random_example
from demo_model.training.text import HIDDEN_LAYER, TextBatches
from demo_model.training.vae import LATENT_CHANNELS
from demo_model.world import Scene

IMAGES = {(128, 128): 32, (256, 256): 10}
"""Pictures of a batch by size; of the other sizes as many as make about as many tokens."""
IMAGES_OTHERS = 14
SMALLEST, LARGER = 0.15, 0.93  # the batches up to these shares are of 128x128 and of 256x256; other sizes fill the rest
BLENDED_SHARE = {(128, 128): 0.35, (256, 256): 0.3}  # of the batches of a size that show blended texts
COMPILED = 32  # forwards: two sizes, two lengths of prompts, several models with gradients or without
REMEMBERED = 8192  # references whose states are kept: those of the pools
SEEN = 0.7  # share of the references that are seen; the rest are read
WITHOUT_TURN = 0.5  # share of those that are seen without the tokens of the user's turn around the picture
PURE_NOISE = 0.2  # share of the examples at sigma 1
SIGMA_CENTER, SIGMA_SPREAD = 0.8, 1.1  # of the logistic normal that the others' sigma comes from, before the shift

See = Callable[[Scene], tuple[Tensor, Tensor] | None]
"""Hidden states of a picture of a scene, `[tokens, width]`, and those of the picture's own tokens; None for scenes that
are read instead."""
Take = Callable[..., tuple[list[Example], Tensor]]
"""As `Pools.take`."""
Shown = tuple[Tensor, list[Tensor]]
"""What `predict_and_show` answers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """What a batch is of: pictures of one size, of prompts that are blended with references or not, and `wanted`."""

    size: tuple[int, int]
    blended: bool = False
    wanted: Callable[[Example], bool] = lambda _: True


@dataclass(frozen=True, slots=True, kw_only=True)
class Noisy:
    """A batch of one size: `latents` and `noise` `[n, 16, height, width]`, mixed at `sigma` `[n]`, and the prompts'
    hidden states `[n, tokens, width]`, of which those are filling that are not `said` (bool `[n, tokens]`). Latents are
    0 where pictures are yet to be drawn.

    `without_turn` are the same states where of a seen reference the picture's own tokens alone are blended in, `text`
    those of the prompts alone."""

    examples: list[Example]
    latents: Tensor
    noise: Tensor
    sigma: Tensor
    states: Tensor
    without_turn: Tensor
    text: Tensor
    said: Tensor

    @property
    def blended(self) -> bool:
        """Whether the prompts are blended with references."""
        return any(example.kind == "blend" for example in self.examples)

    @property
    def flow(self) -> Tensor:
        """What the DiT is to answer, x0 minus noise."""
        return self.latents - self.noise

    @property
    def mixed(self) -> Tensor:
        """The latents under their noise."""
        spread = self.sigma[:, None, None, None]
        return (1 - spread) * self.latents + spread * self.noise


class NoisyBatches:
    """Draws batches; those of a step are always the same.

    Of the references of blends some are what `see` makes of their pictures, the others their words.
    """

    def __init__(  # noqa: PLR0913 - what batches are made of, by name
        self,
        learnt: Learnt,
        batches: TextBatches,
        see: Vision,
        latents: Path,
        device: torch.device,
        *,
        seed: int,
        seen_share: float = SEEN,
    ) -> None:
        self._learnt = learnt
        self._batches = batches
        self._pools = Pools(learnt.vae, latents)
        self._device = device
        self._seed = seed
        self._seen_share = seen_share

        @lru_cache(REMEMBERED)
        def seen(reference: Scene, *, image_tokens_only: bool) -> Tensor:
            picture = render(reference, width=256, height=256)
            return see.states(picture, image_tokens_only=image_tokens_only).bfloat16()

        self._seen = seen

    def of_step(self, step: int, *, may_blend: bool = True) -> Noisy:
        """The batch of a step. Prompts run in the precision of the autocast around the call."""
        rng = random.Random(self._seed + step)
        size = _random_size(rng)
        blended = rng.random() < BLENDED_SHARE.get(size, 0.0)
        return self._batch(step, rng, Kind(size=size, blended=blended and may_blend), self._pools.take)

    def to_draw(self, step: int, kind: Kind) -> Noisy:
        """The batch of a step, of one kind and with pictures that are yet to be drawn: its examples are of no pool."""
        return self._batch(step, random.Random(self._seed + step), kind, undrawn)

    @torch.no_grad()
    def _batch(self, step: int, rng: random.Random, kind: Kind, take: Take) -> Noisy:
        rows, examples, latents = _batch(take, self._batches, rng, kind)
        count = len(rows)
        states, without_turn, text, said = _read(
            self._learnt,
            self._batches,
            rows,
            examples,
            lambda reference: self._see(reference, rng),
        )
        sigma = _sigmas(rng, count)
        noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(step))
        return Noisy(
            examples=examples,
            latents=latents.to(self._device),
            noise=noise.to(self._device),
            sigma=sigma.to(self._device),
            states=states,
            without_turn=without_turn,
            text=text,
            said=said,
        )

    def _see(self, reference: Scene, rng: random.Random) -> tuple[Tensor, Tensor] | None:
        if rng.random() >= self._seen_share:
            return None
        picture = self._seen(reference, image_tokens_only=True)
        return picture if rng.random() < WITHOUT_TURN else self._seen(reference, image_tokens_only=False), picture

    @torch.no_grad()
    def nothing(self) -> tuple[Tensor, Tensor]:
        """The states of the empty prompt and what of them is said, as a batch of one."""
        states, _, _, said = _read(self._learnt, self._batches, [self._batches.prompt_ids("")], [], lambda _: None)
        return states, said


class Draw:
    """`predict_and_show` of a batch, compiled where there is a compiler: nearly twice as fast for most batches."""

    @cached_property
    def _quick(self) -> Callable[..., Shown]:
        torch._dynamo.config.recompile_limit = COMPILED
        compiled: Any = torch.compile(predict_and_show, dynamic=False) if shutil.which("c++") else predict_and_show
        return compiled  # type: ignore[no-any-return]

    def __call__(
        self, dit: ZImageTransformer2DModel, mixed: Tensor, sigma: Tensor, states: Tensor, said: Tensor
    ) -> Shown:
        """The DiT's output and tokens for latents under noise of `sigma` `[n]`, told `states`."""
        height, width = mixed.shape[2:]
        often = (8 * width, 8 * height) in IMAGES and states.shape[1] <= 2 * MULTIPLE
        forward = self._quick if often else predict_and_show
        return forward(dit, mixed, 1 - sigma, states, said)


def undrawn(rng: random.Random, size: tuple[int, int], count: int, *, blended: bool) -> tuple[list[Example], Tensor]:
    """Examples as the pools have them, without a picture: their latents are 0."""
    latents = torch.zeros(count, LATENT_CHANNELS, size[1] // 8, size[0] // 8)
    return [blended_example(rng) if blended else random_example(rng) for _ in range(count)], latents


def _random_size(rng: random.Random) -> tuple[int, int]:
    kind = rng.random()
    if kind < SMALLEST:
        return SIZES[0]
    return SIZES[1] if kind < LARGER else rng.choice(SIZES[2:])


def _batch(
    take: Take, batches: TextBatches, rng: random.Random, kind: Kind
) -> tuple[list[list[int]], list[Example], Tensor]:
    """Prompts as tokens, their examples and the latents: prompts that fill up to one length, so that little is filled.

    Of twice or more as many drawn examples those are kept that fill up as the first one does.
    """
    rows: list[list[int]] = []
    chosen: list[tuple[Example, Tensor]] = []
    count = IMAGES.get(kind.size, IMAGES_OTHERS)
    while len(chosen) < count:
        examples, latents = take(rng, kind.size, 2 * count, blended=kind.blended)
        for example, latent in zip(examples, latents, strict=True):
            if not kind.wanted(example):
                continue
            row = batches.prompt_ids(example.prompt(rng))
            if kind.blended or not rows or _filled(len(row)) == _filled(len(rows[0])):
                rows.append(row)
                chosen.append((example, latent))
    kept = chosen[:count]
    return rows[:count], [example for example, _ in kept], torch.stack([latent for _, latent in kept])


def _filled(length: int) -> int:
    return length + -length % MULTIPLE


def _read(
    learnt: Learnt, batches: TextBatches, rows: list[list[int]], examples: Sequence[Example], see: See
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states of the prompts `[n, tokens, width]`, the same without the turns of references and without
    references at all, and which are said.

    A reference is what `see` answers for it, or else its words.
    """
    references, tokens, said = token_rows(batches, rows, examples)
    # hidden state -2 without the head, which would be most of the work
    model: Any = learnt.text.model
    states = model(tokens.to(model.device), use_cache=False, output_hidden_states=True).hidden_states[HIDDEN_LAYER]
    pulled_to = []
    for example, read in zip(examples, reference_states(states, rows, references), strict=False):
        seen = see(example.reference) if example.reference else None
        pulled_to.append((read, read) if seen is None else seen)
    blended, without_turn = (
        blended_states(states, rows, [seen[way] for seen in pulled_to], examples) for way in range(2)
    )
    return blended, without_turn, states[: len(rows)], said[: len(rows)].to(states.device)


def _sigmas(rng: random.Random, count: int) -> Tensor:
    values = []
    for _ in range(count):
        base = torch.sigmoid(torch.tensor(rng.gauss(SIGMA_CENTER, SIGMA_SPREAD))).item()
        values.append(1.0 if rng.random() < PURE_NOISE else SHIFT * base / (1 + (SHIFT - 1) * base))
    return torch.tensor(values)
