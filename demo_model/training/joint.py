"""Fourth stage: language model and DiT together. The diffusion loss flows into the text through hidden state -2."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL, ZImageTransformer2DModel
from torch import Tensor, nn
from transformers import Qwen3ForCausalLM

from demo_model import captions
from demo_model.training.dit import MULTIPLE, new_dit, predict, use_real_rotation
from demo_model.training.facts import FactReader, answers, facts_loss
from demo_model.training.latents import Example, Pool, examples_of, make_pool
from demo_model.training.loop import Losses, Schedule, run_stage
from demo_model.training.text import HIDDEN_LAYER, IGNORED, TextBatches, language_loss
from demo_model.world import Size
from services.diffusion.fitting import interpolate

SCHEDULE = Schedule(steps=4500, learning_rate=1.2e-3)
EASY = 0.45  # share of the steps that show one thing at a time, and no small one
SMALL_ONLY = 0.54  # share of the steps before other sizes than 128x128 come
SIZES = ((128, 128), (256, 256), (192, 128), (128, 192), (256, 192), (192, 256), (320, 320))
"""Width and height in pixels; 256x256 has a larger part of the steps than the rest."""
POOL = {(128, 128): 20_000, (256, 256): 8_000}
POOL_OTHERS = 600
BLENDED = {(128, 128): 3_000, (256, 256): 1_500}
BATCH_TOKENS = 32 * 96  # image and text tokens of a batch
REWRITING = 3  # conversations of the rewriter beside each batch
CAPTION_WEIGHT, REWRITE_WEIGHT, FACTS_WEIGHT = 0.03, 0.1, 0.3
SHIFT = 3.0
THING_APART = 0.3  # mean squared distance from the background's latent at which a latent belongs to a thing
SMALLEST_SHARE = 0.02  # of a picture that may count as much as all the rest
PURE_NOISE = (0.5, 0.15)  # share of the examples at sigma 1, where only the text tells what to draw: at first, later on


class Pools:
    """The latents of all sizes, and blended ones of those in `BLENDED`."""

    def __init__(self, vae: AutoencoderKL, folder: Path) -> None:
        self._plain: dict[tuple[int, int], Pool] = {}
        for index, size in enumerate(SIZES):
            seed = 5_000_000 + 10 * index
            examples = examples_of(seed, POOL.get(size, POOL_OTHERS), blended=False)
            path = folder / f"latents-{size[0]}x{size[1]}.safetensors"
            self._plain[size] = make_pool(vae, path, size, examples, seed=seed + 1)
        self._easy = [i for i, one in enumerate(self._plain[SIZES[0]].examples) if _is_easy(one)]
        self._blended: dict[tuple[int, int], Pool] = {}
        for index, (size, count) in enumerate(BLENDED.items()):
            seed = 6_000_000 + 10 * index
            path = folder / f"latents-blended-{size[0]}x{size[1]}.safetensors"
            self._blended[size] = make_pool(vae, path, size, examples_of(seed, count, blended=True), seed=seed + 1)

    def batch(self, rng: random.Random, share: float) -> tuple[list[Example], Tensor]:
        """Examples of one size and their latents, float32; `share` is how far the training has come, 0 to 1."""
        size = SIZES[0]
        if share < EASY:
            return self._take(self._plain[size], rng, 32, self._easy)
        kind = rng.random()
        if kind < 0.12:
            return self._take(self._blended[size], rng, 32)
        if share >= SMALL_ONLY and kind > 0.35:
            size = SIZES[1] if kind < 0.82 else rng.choice(SIZES[2:])
        tokens = (size[0] // 16) * (size[1] // 16) + 32
        return self._take(self._plain[size], rng, max(4, BATCH_TOKENS // tokens))

    def take(
        self, rng: random.Random, size: tuple[int, int], count: int, *, blended: bool
    ) -> tuple[list[Example], Tensor]:
        """Some examples of one size of `SIZES`, or of `BLENDED`."""
        return self._take(self._blended[size] if blended else self._plain[size], rng, count)

    @staticmethod
    def _take(
        pool: Pool, rng: random.Random, count: int, among: Sequence[int] | None = None
    ) -> tuple[list[Example], Tensor]:
        chosen = rng.sample(range(len(pool.examples)) if among is None else among, count)
        return [pool.examples[index] for index in chosen], pool.latents[chosen].float()


@dataclass(frozen=True, slots=True, kw_only=True)
class Learnt:
    """What the stages before have trained: `reader` keeps the text from losing the facts that it gathers."""

    text: Qwen3ForCausalLM
    reader: FactReader
    vae: AutoencoderKL


def train_together(
    learnt: Learnt, batches: TextBatches, folder: Path, device: torch.device
) -> ZImageTransformer2DModel:
    """Trains the language model further, and a new DiT with it; answers the DiT."""
    text, reader = learnt.text, learnt.reader
    torch.manual_seed(2)
    dit = new_dit().to(device)
    use_real_rotation(dit)
    pools = Pools(learnt.vae, folder / "latents")

    def losses(step: int) -> Losses:
        rng = random.Random(7_000_000 + step)
        examples, latents = pools.batch(rng, step / SCHEDULE.steps)
        latents = latents.to(device)
        with torch.autocast(device.type, torch.bfloat16):
            states, said, language = _read(text, batches, examples, rng, device)
            sigma = _sigmas(rng, len(latents), step / SCHEDULE.steps).to(device)
            noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(step)).to(device)
            spread = sigma[:, None, None, None]
            output = predict(dit, (1 - spread) * latents + spread * noise, 1 - sigma, states, said)
            tokens, targets = batches.rewriting(rng, REWRITING)
            rewritten = text(tokens.to(device), use_cache=False).logits
        flow = flow_loss(output.float(), latents, noise)
        rewrite = language_loss(rewritten, targets.to(device))
        facts = FACTS_WEIGHT * facts_loss(reader(states, said), told(examples).to(device))
        return {"flow": flow, "facts": facts, "caption": CAPTION_WEIGHT * language, "rewrite": REWRITE_WEIGHT * rewrite}

    run_stage("joint", {"text": text, "dit": dit, "reader": reader}, SCHEDULE, losses, folder)
    return dit


def flow_loss(output: Tensor, latents: Tensor, noise: Tensor) -> Tensor:
    """Mean squared error to x0 minus noise, all `[n, 16, height, width]`, half of it around the things.

    They are a twentieth of a picture: unweighted, thousands of steps go by in which only backgrounds follow the text.
    """
    return (balance(around_things(latents)) * (output - (latents - noise)).pow(2)).mean()


def balance(inside: Tensor) -> Tensor:
    """Weights of mean 1 with which the inside of each picture counts as much as its outside, however small it is.

    `inside` is bool, of any shape that begins with the pictures.
    """
    flat = inside.flatten(1).float()
    share = flat.mean(1, keepdim=True).clamp(SMALLEST_SHARE, 1 - SMALLEST_SHARE)
    weights = flat / share + (1 - flat) / (1 - share)
    return (weights / weights.mean(1, keepdim=True)).view(inside.shape)


def belongs_to_things(latents: Tensor) -> Tensor:
    """Whether each latent of `[n, 16, height, width]` differs from the background's: bool `[n, 1, height, width]`."""
    background = latents.flatten(2).median(-1).values[..., None, None]
    return (latents - background).pow(2).mean(1, keepdim=True) > THING_APART


def around_things(latents: Tensor) -> Tensor:
    """The rows and columns that hold a thing, where they cross, and a latent more: bool `[n, 1, height, width]`.

    Of a box each side of an outline weighs the same. Where things alone weighed more, what is drawn grew too large:
    to miss a part of a thing cost five times what it cost to draw beyond its outline.
    """
    things = nn.functional.max_pool2d(belongs_to_things(latents).float(), 3, stride=1, padding=1).bool()
    return things.any(-1, keepdim=True) & things.any(-2, keepdim=True)


def _read(
    text: Qwen3ForCausalLM,
    batches: TextBatches,
    examples: Sequence[Example],
    rng: random.Random,
    device: torch.device,
) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states of the examples' prompts `[n, tokens, width]`, which of them are said, and the language loss."""
    rows = [batches.prompt_ids(example.prompt(rng)) for example in examples]
    references, tokens, inside = token_rows(batches, rows, examples)
    output = text(tokens.to(device), use_cache=False, output_hidden_states=True)
    language = language_loss(output.logits, tokens.masked_fill(~inside, IGNORED).to(device))
    states = output.hidden_states[HIDDEN_LAYER]
    blended = blended_states(states, rows, reference_states(states, rows, references), examples)
    return blended, inside[: len(rows)].to(device), language


def token_rows(
    batches: TextBatches, rows: list[list[int]], examples: Sequence[Example]
) -> tuple[list[list[int]], Tensor, Tensor]:
    """The examples' references as tokens, then prompts and references together: int64 `[n, tokens]`, and which are
    not filling."""
    references = [batches.prompt_ids(captions.canonical(e.reference)) for e in examples if e.reference is not None]
    every = [*rows, *references]
    length = max(len(row) for row in every)
    length += -length % MULTIPLE
    counts = torch.tensor([len(row) for row in every])
    return references, batches.pad(every, length), torch.arange(length)[None] < counts[:, None]


def reference_states(states: Tensor, rows: list[list[int]], references: list[list[int]]) -> list[Tensor]:
    """The hidden states of each reference's words `[tokens, width]`, of states as `token_rows` puts them."""
    return [states[len(rows) + index, : len(reference)] for index, reference in enumerate(references)]


def blended_states(
    states: Tensor, rows: list[list[int]], references: Sequence[Tensor], examples: Sequence[Example]
) -> Tensor:
    """The prompts' hidden states `[n, tokens, width]`, pulled towards their references where there are some.

    `states` begins with those of the prompts; `references` holds hidden states `[tokens, width]`.
    """
    if not references:
        return states
    pulled = []
    for one, row, reference, example in zip(states, rows, references, examples, strict=False):
        count = len(row)
        pulled.append(
            torch.cat([torch.lerp(one[:count], interpolate(reference, count).to(one), example.alpha), one[count:]])
        )
    return torch.stack(pulled)


def told(examples: Sequence[Example]) -> Tensor:
    """The facts that each prompt tells, int64 `[n, questions]`; none where it is strange, empty or blended."""
    rows = []
    for example in examples:
        known = answers(example.scene, example.said)
        rows.append(known if example.kind in ("said", "long") else [IGNORED] * len(known))
    return torch.tensor(rows)


def _is_easy(example: Example) -> bool:
    return (
        example.kind in ("said", "long")
        and len(example.scene.things) == 1
        and example.scene.things[0].size is not Size.SMALL
    )


def _sigmas(rng: random.Random, count: int, share: float) -> Tensor:
    first, later = PURE_NOISE
    pure = first if share < EASY else later
    values = []
    for _ in range(count):
        base = torch.sigmoid(torch.tensor(rng.gauss(0.0, 1.2))).item()
        values.append(1.0 if rng.random() < pure else SHIFT * base / (1 + (SHIFT - 1) * base))
    return torch.tensor(values)
