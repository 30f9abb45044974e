"""The diffusion service's engine and diffusers' `ZImagePipeline` on one checkpoint in this process, given the same
embeddings: so that nothing is compared but how pictures are made."""

import asyncio
import io
import json
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import ZImagePipeline
from PIL import Image

from benchmarks.baseline import PNG_LEVEL
from services.diffusion.engine import DiffusionEngine
from services.diffusion.jobs import Picture, PictureRequest
from services.diffusion.loading import limits_of, load_zimage
from services.diffusion.model import ZImageModel
from services.diffusion.order import Limits
from services.diffusion.settings import DiffusionSettings
from shared.schemas.diffusion import DiffusionParameters
from shared.tensors import to_chunks
from shared.wire import parse_header

MANY = 1_000  # pictures that may wait
READY_S = 0.01
SHORTEST, LENGTHS = 12, 20  # tokens of the texts: within one length that is padded alike


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """A picture to draw."""

    seed: int
    width: int = 256
    height: int = 256
    steps: int = 9
    lora: str | None = None

    def text(self, width: int, dtype: torch.dtype) -> torch.Tensor:
        """Hidden states that belong to the seed, [tokens, width]."""
        generator = torch.Generator().manual_seed(self.seed)
        tokens = SHORTEST + self.seed % LENGTHS
        return torch.randn((tokens, width), generator=generator).to(dtype)

    def fields(self) -> dict[str, Any]:
        """As the service takes them."""
        return {
            "width": self.width,
            "height": self.height,
            "steps": self.steps,
            "seed": self.seed,
            "guidance_scale": 0.0,
            "shift": 3.0,
            "long_prompt_mode": "interpolate",
            "loras": None if self.lora is None else [{"name": self.lora}],
        }


class Script:
    """diffusers' pipeline, as a script would use it."""

    def __init__(self, pipeline: Any) -> None:
        self.pipeline = pipeline
        self.pipeline.set_progress_bar_config(disable=True)

    @classmethod
    def load(cls, checkpoint: Path) -> "Script":
        """The pipeline of a directory, in bfloat16 on the CPU."""
        return cls(
            ZImagePipeline.from_pretrained(
                checkpoint, text_encoder=None, tokenizer=None, dtype=torch.bfloat16, local_files_only=True
            )
        )

    def draw(self, wanted: Wanted) -> Any:
        """The picture, as PIL has it."""
        return self.draw_batch([wanted])[0]

    def draw_batch(self, several: Sequence[Wanted]) -> Sequence[Any]:
        """Pictures of one size in one call, as PIL has them."""
        transformer, first = self.pipeline.transformer, several[0]
        width, dtype, device = transformer.config.cap_feat_dim, transformer.dtype, transformer.device
        pictures: Sequence[Any] = self.pipeline(
            prompt_embeds=[wanted.text(width, dtype).to(device) for wanted in several],
            width=first.width,
            height=first.height,
            num_inference_steps=first.steps,
            guidance_scale=0.0,
            generator=[torch.Generator("cpu").manual_seed(wanted.seed) for wanted in several],
        ).images
        return pictures

    def draw_pngs(self, several: Sequence[Wanted]) -> float:
        """Seconds for these pictures, one after the other, PNGs included."""
        started = time.perf_counter()
        for wanted in several:
            self.draw(wanted).save(io.BytesIO(), "PNG", compress_level=PNG_LEVEL)
        return time.perf_counter() - started


@asynccontextmanager
async def studio(settings: DiffusionSettings, limits: Limits | None = None) -> AsyncIterator["Studio"]:
    """An engine that has loaded what the settings name."""
    async with engine_of(lambda: load_zimage(settings), limits or limits_of(settings)) as ours:
        yield ours


@asynccontextmanager
async def engine_of(load: Callable[[], ZImageModel], limits: Limits) -> AsyncIterator["Studio"]:
    """An engine that has loaded a model."""
    engine = DiffusionEngine(load, limits, max_waiting=MANY, png_compression=PNG_LEVEL)
    engine.device.start()
    await asyncio.to_thread(_wait_until_loaded, engine)
    try:
        yield Studio(engine)
    finally:
        await engine.stop()


def _wait_until_loaded(engine: DiffusionEngine) -> None:
    while engine.device.unready_reason() == "the model is being loaded":
        time.sleep(READY_S)


class Studio:
    """The engine, asked as the service's routes ask it."""

    def __init__(self, engine: DiffusionEngine) -> None:
        self._engine = engine

    async def draw(self, wanted: Wanted) -> Picture:
        """The picture."""
        facts = self._engine.facts
        text = wanted.text(facts.text_width, getattr(torch, facts.dtype))
        message = bytearray(b"".join(to_chunks({"text": text}, {"parameters": json.dumps(wanted.fields())})))
        parameters = DiffusionParameters.model_validate_json(json.dumps(wanted.fields()))
        request = PictureRequest(parameters, message, parse_header(message))
        async for item in self._engine.generate(request):
            if isinstance(item, Picture):
                return item
        raise RuntimeError("no picture came")

    async def draw_at_once(self, several: Sequence[Wanted]) -> float:
        """Seconds for these pictures, asked for by as many clients at once."""
        started = time.perf_counter()
        async with asyncio.TaskGroup() as group:
            for wanted in several:
                group.create_task(self.draw(wanted))
        return time.perf_counter() - started


def pixels_of(picture: Picture) -> Any:
    """What the PNG shows, as whole numbers [height, width, 3]."""
    with Image.open(io.BytesIO(picture.png)) as image:
        return np.asarray(image).astype(int)
