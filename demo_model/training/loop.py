"""The loop that every stage runs: progress bar, learning rate, averaged weights, and checkpoints to go on from."""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

SAVE_EVERY_S = 120.0
REPORT_EVERY = 25
EMA_DECAY = 0.998


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """Steps of a stage, its highest learning rate and the steps of warm-up; cosine down to a twentieth."""

    steps: int
    learning_rate: float
    warmup: int = 100
    weight_decay: float = 0.01

    def rate(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        if step < self.warmup:
            return self.learning_rate * (step + 1) / self.warmup
        share = min(1.0, (step - self.warmup) / max(1, self.steps - self.warmup))
        return self.learning_rate * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * share)))


Losses = Mapping[str, Tensor]
"""The parts of a loss by name, each a scalar; their sum is what is minimized."""


def run_stage(
    name: str,
    models: Mapping[str, nn.Module],
    schedule: Schedule,
    losses: Callable[[int], Losses],
    folder: Path,
) -> None:
    """Trains `models` for the steps of `schedule`, going on from the last checkpoint in `folder`, if there is one.

    `losses(step)` makes a batch of its own from the step's number, so a run that was stopped goes on with the batches
    that it would have seen. At the end the models hold their averaged weights, and `folder` has them too.
    """
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint = folder / f"{name}.state.safetensors"
    weights = Weights([p for model in models.values() for p in model.parameters() if p.requires_grad], schedule)
    weights.load(checkpoint)
    saved_at = time.monotonic()
    sums: dict[str, float] = {}
    with _progress() as progress:
        task = progress.add_task(name, total=schedule.steps, completed=weights.step, note="")
        while weights.step < schedule.steps:
            parts = losses(weights.step)
            weights.learn(parts)
            for key, part in parts.items():
                value = float(part.detach())
                sums[key] = 0.98 * sums.get(key, value) + 0.02 * value
            note = "  ".join(f"{key} {mean:.4f}" for key, mean in sums.items())
            progress.update(task, completed=weights.step, note=note)
            if weights.step % REPORT_EVERY == 0:
                progress.console.print(f"{name} {weights.step}/{schedule.steps}: {note}", highlight=False)
            if time.monotonic() - saved_at > SAVE_EVERY_S or weights.step == schedule.steps:
                weights.save(checkpoint)
                saved_at = time.monotonic()
    weights.take_averages()


class Weights:
    """What a stage trains, with its optimizer and the averages of its weights, after `step` steps of its schedule."""

    def __init__(self, parameters: list[Tensor], schedule: Schedule) -> None:
        self.step = 0
        self._parameters = parameters
        self._averages = [p.detach().clone() for p in parameters]
        self._schedule = schedule
        self._optimizer = torch.optim.AdamW(
            parameters, lr=schedule.learning_rate, betas=(0.9, 0.98), weight_decay=schedule.weight_decay, fused=True
        )

    def learn(self, losses: Losses) -> None:
        """One step down the sum of `losses`."""
        for group in self._optimizer.param_groups:
            group["lr"] = self._schedule.rate(self.step)
        torch.autograd.backward(torch.stack([part.float() for part in losses.values()]).sum())
        nn.utils.clip_grad_norm_(self._parameters, 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        decay = min(EMA_DECAY, (1 + self.step) / (10 + self.step))
        torch._foreach_lerp_(self._averages, self._parameters, 1 - decay)
        self.step += 1

    @torch.no_grad()
    def take_averages(self) -> None:
        """Gives the models their averaged weights."""
        torch._foreach_copy_(self._parameters, self._averages)

    def save(self, path: Path) -> None:
        """Writes all of it, whole or not at all."""
        tensors: dict[str, Tensor] = {}
        for index, (parameter, average) in enumerate(zip(self._parameters, self._averages, strict=True)):
            tensors[f"{index}.value"] = parameter.detach().contiguous()
            tensors[f"{index}.average"] = average.contiguous()
            state: dict[str, Any] = self._optimizer.state.get(parameter, {})  # none where no batch has used it yet
            if state:
                tensors[f"{index}.first"] = state["exp_avg"].contiguous()
                tensors[f"{index}.second"] = state["exp_avg_sq"].contiguous()
        written = path.with_suffix(".new")
        safetensors.torch.save_file(tensors, written, metadata={"step": str(self.step)})
        written.replace(path)

    @torch.no_grad()
    def load(self, path: Path) -> None:
        """Goes on from what `save` wrote, if it is there."""
        if not path.is_file():
            return
        with safetensors.safe_open(path, framework="pt") as file:
            self.step = int(file.metadata()["step"])
            for index, (parameter, average) in enumerate(zip(self._parameters, self._averages, strict=True)):
                parameter.copy_(file.get_tensor(f"{index}.value"))
                average.copy_(file.get_tensor(f"{index}.average"))
                if f"{index}.first" in file.keys():  # noqa: SIM118 - not a mapping
                    self._optimizer.state[parameter] = {
                        "step": torch.tensor(float(self.step), device=parameter.device),
                        "exp_avg": file.get_tensor(f"{index}.first").to(parameter),
                        "exp_avg_sq": file.get_tensor(f"{index}.second").to(parameter),
                    }


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
