"""Messages and models that tests of the diffusion service and of the gateway share."""

import json
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from services.diffusion.denoising import Denoising
from services.diffusion.model import ZImageModel
from shared.schemas.diffusion import DiffusionParameters
from shared.schemas.fields import LongPromptMode
from shared.tensors import to_chunks

PATIENCE_S = 30.0
TEXT_WIDTH = 64  # length of a hidden state of the tiny checkpoint


def parameters(**fields: Any) -> DiffusionParameters:
    """Parameters of a small picture, with these fields changed."""
    defaults = {
        "width": 64,
        "height": 64,
        "steps": 4,
        "seed": 7,
        "guidance_scale": 0.0,
        "shift": 3.0,
        "long_prompt_mode": LongPromptMode.INTERPOLATE,
    }
    return DiffusionParameters(**{**defaults, **fields})


def embeddings(tokens: int, *, seed: int = 1, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Hidden states [tokens, TEXT_WIDTH]."""
    return torch.randn(tokens, TEXT_WIDTH, generator=torch.Generator().manual_seed(seed)).to(dtype)


def message(
    *, raw: dict[str, Any] | None = None, tensors: dict[str, torch.Tensor] | None = None, **fields: Any
) -> bytes:
    """A body of `/v1/generate`: the fields of a small picture changed by `fields`, then by unchecked `raw` ones."""
    wanted = {**json.loads(parameters(**fields).model_dump_json()), **(raw or {})}
    given = tensors if tensors is not None else {"text": embeddings(20), "negative": embeddings(5, seed=2)}
    return b"".join(to_chunks(given, {"parameters": json.dumps(wanted)}))


class WatchedModel(ZImageModel):
    """The real model, whose steps are counted, wait at a gate, and can be made to break."""

    def __init__(self, inner: ZImageModel) -> None:
        self.inner, self.facts, self.parts = inner, inner.facts, inner.parts
        self.adapters, self.capacity_bytes = inner.adapters, inner.capacity_bytes
        self._live = inner._live
        self.footprint = replace(inner.footprint)
        self.steps: list[tuple[int, ...]] = []  # the seeds of each step's group
        self.decoded: list[tuple[int, ...]] = []
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Event()
        self.break_next: list[Exception] = []
        self.break_decode: list[Exception] = []
        self.break_group: Callable[[Sequence[Denoising]], Exception | None] = lambda _: None
        self.break_device: list[Exception] = []
        self.free: int | None = None

    def read_embeddings(self, *arguments: Any) -> torch.Tensor:
        """As the model does it."""
        return self.inner.read_embeddings(*arguments)

    def start(self, *arguments: Any) -> Denoising:
        """As the model does it."""
        return self.inner.start(*arguments)

    def step(self, group: Sequence[Denoising]) -> Sequence[Denoising]:
        """Waits for the gate, then breaks or steps."""
        self.steps.append(tuple(picture.parameters.seed for picture in group))
        self.entered.set()
        assert self.gate.wait(PATIENCE_S)
        if self.break_next:
            raise self.break_next.pop(0)
        if (error := self.break_group(group)) is not None:
            raise error
        return self.inner.step(group)

    def decode(self, pictures: Sequence[Denoising]) -> Sequence[Any]:
        """Breaks or decodes."""
        self.decoded.append(tuple(picture.parameters.seed for picture in pictures))
        if self.break_decode:
            raise self.break_decode.pop(0)
        return self.inner.decode(pictures)

    def preview(self, picture: Denoising) -> Any:
        """As the model does it."""
        return self.inner.preview(picture)

    def free_bytes(self) -> int | None:
        """What the test says."""
        return self.free

    def check_device(self) -> None:
        """Answers, or breaks."""
        if self.break_device:
            raise self.break_device.pop(0)
