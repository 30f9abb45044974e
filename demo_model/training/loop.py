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
    parameters: list[Tensor] = [p for model in models.values() for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters, lr=schedule.learning_rate, betas=(0.9, 0.98), weight_decay=schedule.weight_decay, fused=True
    )
    averages = [p.detach().clone() for p in parameters]
    step = _load(folder / f"{name}.state.safetensors", parameters, averages, optimizer)
    saved_at = time.monotonic()
    sums: dict[str, float] = {}
    with _progress() as progress:
        task = progress.add_task(name, total=schedule.steps, completed=step, note="")
        while step < schedule.steps:
            for group in optimizer.param_groups:
                group["lr"] = schedule.rate(step)
            parts = losses(step)
            loss = torch.stack([part.float() for part in parts.values()]).sum()
            torch.autograd.backward(loss)
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            decay = min(EMA_DECAY, (1 + step) / (10 + step))
            torch._foreach_lerp_(averages, parameters, 1 - decay)
            step += 1
            for key, part in parts.items():
                value = float(part.detach())
                sums[key] = 0.98 * sums.get(key, value) + 0.02 * value
            note = "  ".join(f"{key} {mean:.4f}" for key, mean in sums.items())
            progress.update(task, completed=step, note=note)
            if step % REPORT_EVERY == 0:
                progress.console.print(f"{name} {step}/{schedule.steps}: {note}", highlight=False)
            if time.monotonic() - saved_at > SAVE_EVERY_S or step == schedule.steps:
                _save(folder / f"{name}.state.safetensors", step, parameters, averages, optimizer)
                saved_at = time.monotonic()
    with torch.no_grad():
        torch._foreach_copy_(parameters, averages)


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )


def _save(
    path: Path, step: int, parameters: list[Tensor], averages: list[Tensor], optimizer: torch.optim.Optimizer
) -> None:
    tensors: dict[str, Tensor] = {}
    for index, (parameter, average) in enumerate(zip(parameters, averages, strict=True)):
        tensors[f"{index}.value"] = parameter.detach().contiguous()
        tensors[f"{index}.average"] = average.contiguous()
        state: dict[str, Any] = optimizer.state.get(parameter, {})  # none where no batch has used it yet
        if state:
            tensors[f"{index}.first"] = state["exp_avg"].contiguous()
            tensors[f"{index}.second"] = state["exp_avg_sq"].contiguous()
    written = path.with_suffix(".new")
    safetensors.torch.save_file(tensors, written, metadata={"step": str(step)})
    written.replace(path)


def _load(path: Path, parameters: list[Tensor], averages: list[Tensor], optimizer: torch.optim.Optimizer) -> int:
    if not path.is_file():
        return 0
    with safetensors.safe_open(path, framework="pt") as file:
        step = int(file.metadata()["step"])
        with torch.no_grad():
            for index, (parameter, average) in enumerate(zip(parameters, averages, strict=True)):
                parameter.copy_(file.get_tensor(f"{index}.value"))
                average.copy_(file.get_tensor(f"{index}.average"))
                if f"{index}.first" in file.keys():  # noqa: SIM118 - not a mapping
                    optimizer.state[parameter] = {
                        "step": torch.tensor(float(step), device=parameter.device),
                        "exp_avg": file.get_tensor(f"{index}.first").to(parameter),
                        "exp_avg_sq": file.get_tensor(f"{index}.second").to(parameter),
                    }
    return step
