"""Measures a demo checkpoint: does it draw what it is told, rewrite without losing anything, and follow a reference?

Pictures are judged on combinations of colour, shape, pattern and place that are held out of training, rewriting and
references on prompts that name only a part of one; through diffusers' own pipeline and transformers' own models, not
through the server.
"""

import json
import random
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import ZImagePipeline
from PIL import Image
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor
from transformers import AutoTokenizer

from demo_model import captions
from demo_model.captions import EVERYTHING, NOUNS, Said
from demo_model.judge import Score, score
from demo_model.render import render
from demo_model.seeing import Vision
from demo_model.training.text import HIDDEN_LAYER
from demo_model.world import Colour, Scene, random_scene
from services.diffusion.blending import blend
from services.gateway.settings import GatewaySettings
from shared.chat import Conversation, format_prompt
from shared.schemas.diffusion import Blending
from shared.schemas.fields import BlendMode

SIZE, STEPS = 256, 9
SEEDS = (0, 1, 2)
PROMPTS = {1: 200, 2: 100}
"""Held-out prompts by how many things they name."""
ORIGINALS = 500
REWRITES = 200
REFERENCES = 60
ALPHAS = (0.0, 0.3, 0.6, 1.0)
BATCH = 10
PULL_GOAL = 90
TIE = 1.0  # grey levels of mean colour that count as no move


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One line of the table: what was reached, and what must be if there is a goal."""

    name: str
    reached: float
    goal: float | None = None
    unit: str = "%"
    smaller_is_better: bool = False

    @property
    def holds(self) -> bool:
        """Whether the goal is reached, or there is none."""
        if self.goal is None:
            return True
        return self.reached <= self.goal if self.smaller_is_better else self.reached >= self.goal


class Evaluation:
    """A loaded demo checkpoint: `model` the Z-Image directory, `vision` the Qwen3-VL one."""

    def __init__(self, model: Path, vision: Path, device: torch.device, *, share: float = 1.0) -> None:
        started = time.perf_counter()
        self._pipeline = ZImagePipeline.from_pretrained(model, dtype=torch.float32).to(device)
        self.load_s = time.perf_counter() - started
        self._pipeline.set_progress_bar_config(disable=True)
        self._text: Any = self._pipeline.text_encoder
        self._tokenizer: Any = AutoTokenizer.from_pretrained(model / "tokenizer")
        self._vision_folder = vision
        self._device = device
        self._share = share

    def run(self, grid: Path | None = None) -> list[Figure]:
        """All figures; writes a grid of pictures to `grid`."""
        figures = [*self.judge_itself(), *self.pictures(), *self.rewriting(), *self.speed()]
        if self._vision_folder.is_dir():
            figures += self.references()
        if grid:
            self.grid(grid)
        return figures

    def judge_itself(self) -> Iterator[Figure]:
        """The judge on rendered originals."""
        rng = random.Random(1)
        scores = []
        for _ in range(self._count(ORIGINALS)):
            scene = random_scene(rng, held_out=True)
            scores.append(score(render(scene, width=SIZE, height=SIZE, rng=rng), scene))
        yield Figure(name="the judge itself, on rendered originals", reached=_share([s.whole for s in scores]), goal=99)

    def pictures(self) -> Iterator[Figure]:
        """Held-out prompts, drawn with each seed."""
        rng = random.Random(2)
        scenes = [
            random_scene(rng, held_out=True, things=n)
            for n, count in PROMPTS.items()
            for _ in range(self._count(count))
        ]
        prompts = [captions.caption(scene, EVERYTHING, rng) for scene in scenes]
        jobs = [(scene, prompt, seed) for seed in SEEDS for scene, prompt in zip(scenes, prompts, strict=True)]
        scores: list[tuple[Scene, Score]] = []
        for start in track(range(0, len(jobs), BATCH), description="pictures"):
            part = jobs[start : start + BATCH]
            drawn = self.draw([self.states(prompt) for _, prompt, _ in part], [seed for _, _, seed in part])
            scores += [(scene, score(picture, scene)) for picture, (scene, _, _) in zip(drawn, part, strict=True)]
        one = [s for scene, s in scores if len(scene.things) == 1]
        two = [s for scene, s in scores if len(scene.things) == 2]
        yield Figure(name="background colour", reached=_share([s.background for _, s in scores]), goal=98)
        yield Figure(name="object colour", reached=_share([s.colour for s in one]), goal=95)
        yield Figure(name="shape", reached=_share([s.shape for s in one]), goal=85)
        yield Figure(name="place", reached=_share([s.place for s in one]), goal=95)
        both = [s.colour and s.shape and s.place for s in two]
        yield Figure(name="both objects of two", reached=_share(both), goal=70)

    def rewriting(self) -> Iterator[Figure]:
        """Short held-out prompts, rewritten."""
        rng = random.Random(3)
        kept, closed = [], []
        for _ in track(range(self._count(REWRITES)), description="rewriting"):
            scene = random_scene(rng, held_out=True)
            said = Said(background=rng.random() < 0.6, pattern=False, size=rng.random() < 0.4, place=rng.random() < 0.4)
            answer = self.rewrite(captions.caption(scene, said, rng))
            thought, _, rest = answer.partition("</think>")
            closed.append("<think>" in thought and bool(rest))
            kept.append(_keeps(rest, scene, said))
        yield Figure(name="rewriter keeps colours and shapes", reached=_share(kept), goal=95)
        yield Figure(name="rewriter closes its think block", reached=_share(closed), goal=100)

    def speed(self) -> Iterator[Figure]:
        """One picture on this machine, and loading."""
        states = self.states("a large red circle in the center on a blue background")
        self.draw([states], [0])
        times = []
        for _ in range(3):
            started = time.perf_counter()
            self.draw([states], [0])
            times.append(time.perf_counter() - started)
        name = f"a {SIZE}x{SIZE} picture of {STEPS} steps"
        yield Figure(name=name, reached=round(min(times), 2), goal=3, unit="s", smaller_is_better=True)
        yield Figure(name="loading", reached=round(self.load_s, 2), goal=5, unit="s", smaller_is_better=True)

    def references(self) -> Iterator[Figure]:
        """A red reference and a prompt without colours, blended: does more alpha bring the mean colour closer?

        A reference is the tokens of the picture, for `linear` also all tokens of its turn, as the server has them by
        default. Of the ways of blending only `linear` has a goal; the figures of the others are for the documents.
        """
        see = Vision.load(self._vision_folder, self._tokenizer, self._device)
        rng = random.Random(4)
        away: dict[tuple[BlendMode, bool], list[list[float]]] = {(mode, True): [] for mode in BlendMode}
        away[BlendMode.LINEAR, False] = []
        for index in track(range(self._count(REFERENCES)), description="references"):
            things = random_scene(rng, held_out=True, things=1).things
            reference = render(Scene(background=Colour.RED, things=things), width=SIZE, height=SIZE, rng=rng)
            scene = random_scene(rng, held_out=True, things=1)
            text = self.states(captions.caption(scene, Said(colour=False, background=False), rng))
            seen = {only: see.states(reference, image_tokens_only=only) for only in (True, False)}
            goal = np.asarray(reference, dtype=np.float64).mean((0, 1))
            (plain,) = self.draw([text], [index])
            for (mode, only), distances in away.items():
                states = [blend(text, [seen[only]], _blending(mode, alpha)) for alpha in ALPHAS[1:]]
                drawn = [plain, *self.draw(states, [index] * len(states))]
                distances.append([float(np.linalg.norm(np.asarray(p, np.float64).mean((0, 1)) - goal)) for p in drawn])
        yield from pull_figures(away)

    def grid(self, path: Path) -> None:
        """A picture of pictures: eight held-out prompts with two seeds each."""
        rng = random.Random(6)
        scenes = [random_scene(rng, held_out=True, things=1 + index % 2) for index in range(8)]
        states = [self.states(captions.canonical(scene)) for scene in scenes]
        sheet = Image.new("RGB", (4 * (SIZE + 8) + 8, 4 * (SIZE + 8) + 8), (255, 255, 255))
        for seed in (0, 1):
            for index, picture in enumerate(self.draw(states, [seed] * len(states))):
                row, column = 2 * (index // 4) + seed, index % 4
                sheet.paste(picture, (8 + column * (SIZE + 8), 8 + row * (SIZE + 8)))
        sheet.save(path, optimize=True)

    @torch.no_grad()
    def states(self, prompt: str) -> Tensor:
        """Hidden states of a prompt, float32 `[tokens, width]`."""
        text = format_prompt(Conversation(prompt=prompt))
        tokens = self._tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids.to(self._device)
        hidden = self._text(tokens, output_hidden_states=True, use_cache=False).hidden_states
        states: Tensor = hidden[HIDDEN_LAYER][0].float()
        return states

    def draw(self, states: list[Tensor], seeds: list[int]) -> list[Image.Image]:
        """One picture for each prompt's states, by diffusers' pipeline."""
        generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
        result = self._pipeline(
            prompt_embeds=states,
            generator=generators,
            height=SIZE,
            width=SIZE,
            num_inference_steps=STEPS,
            guidance_scale=0.0,
        )
        return list(result.images)

    @torch.no_grad()
    def rewrite(self, prompt: str) -> str:
        """What the language model makes of a short prompt, its thinking included."""
        system = "Rewrite the prompt. Keep what it names and add what is missing."
        text = format_prompt(Conversation(prompt=prompt, system_prompt=system))
        tokens = self._tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids.to(self._device)
        end = self._tokenizer.convert_tokens_to_ids("<|im_end|>")
        made = self._text.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=220,
            do_sample=False,
            eos_token_id=end,
            pad_token_id=end,
        )
        return str(self._tokenizer.decode(made[0, tokens.shape[1] :], skip_special_tokens=True))

    def _count(self, full: int) -> int:
        return max(1, round(full * self._share))


def pull_figures(away: Mapping[tuple[BlendMode, bool], list[list[float]]]) -> Iterator[Figure]:
    """What is told of the distances between mean colours, [cases][alphas] grey levels for each way of blending with the
    tokens of the picture only, or with all of its turn.

    The pull is the share of the way to the reference's colour that the picture has gone; steady are cases in which no
    alpha leaves it further away than the one before.
    """
    for (mode, only), cases in away.items():
        way = mode if only else f"{mode}, all tokens"
        steady = [all(later <= earlier + TIE for earlier, later in pairwise(case)) for case in cases]
        goal = PULL_GOAL if mode is BlendMode.LINEAR and only else None
        name = f"{way}: a red reference pulls the colour, more with alpha"
        yield Figure(name=name, reached=_share(steady), goal=goal)
        for place, alpha in enumerate(ALPHAS[1:], start=1):
            pulled = [1 - case[place] / case[0] for case in cases if case[0] > TIE]
            reached = round(100 * sum(pulled) / max(1, len(pulled)), 1)
            yield Figure(name=f"{way}: colour pull at alpha {alpha:g}", reached=reached)


def report(figures: list[Figure], console: Console, path: Path | None = None) -> None:
    """Prints the table, and writes the figures as JSON."""
    table = Table("figure", "reached", "goal", "")
    for figure in figures:
        goal = mark = ""
        if figure.goal is not None:
            goal = f"{'<=' if figure.smaller_is_better else '>='} {figure.goal:g} {figure.unit}"
            mark = "[green]holds[/]" if figure.holds else "[red]missed[/]"
        table.add_row(figure.name, f"{figure.reached:g} {figure.unit}", goal, mark)
    console.print(table)
    if path:
        path.write_text(json.dumps([asdict(figure) for figure in figures], indent=2) + "\n")


def _blending(mode: BlendMode, alpha: float) -> Blending:
    return Blending(mode=mode, alphas=[alpha], style_share=GatewaySettings.model_fields["vl_style_share"].default)


def _share(right: list[bool]) -> float:
    return round(100 * sum(right) / max(1, len(right)), 1)


def _keeps(text: str, scene: Scene, said: Said) -> bool:
    words = text.lower().replace("grey", "gray")
    colours = [thing.colour for thing in scene.things] + ([scene.background] if said.background else [])
    return all(re.search(rf"\b{colour}\b", words) for colour in colours) and all(
        any(re.search(rf"\b{noun}\b", words) for noun in NOUNS[thing.shape]) for thing in scene.things
    )
