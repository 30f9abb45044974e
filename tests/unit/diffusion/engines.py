"""Engines for tests, requests to them, and what the model draws without one."""

import asyncio
import io
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
import torch
from fakes import WatchedModel, embeddings, message, parameters
from inprocess import eventually
from PIL import Image

from services.diffusion.engine import DiffusionEngine
from services.diffusion.jobs import Picture, PictureRequest
from services.diffusion.model import ZImageModel
from services.diffusion.order import Limits
from shared.wire import parse_header

MAX_WAITING = 3
LIMITS = Limits(running=32, batch=8, batch_tokens=2560, decode_pixels=140_000)
ONE_BY_ONE = Limits(running=1, batch=1, batch_tokens=1, decode_pixels=1)


@asynccontextmanager
async def running(model: ZImageModel, limits: Limits = LIMITS, **options: Any) -> AsyncIterator[DiffusionEngine]:
    """An engine that is ready."""
    engine = DiffusionEngine(lambda: model, limits, max_waiting=MAX_WAITING, png_compression=1, **options)
    engine.device.start()
    await eventually(lambda: engine.device.unready_reason() is None)
    try:
        yield engine
    finally:
        if isinstance(model, WatchedModel):
            model.gate.set()
        await engine.stop()


def request(
    tensors: dict[str, torch.Tensor] | None = None, request_id: str | None = None, **fields: Any
) -> PictureRequest:
    """A small picture unless the fields say otherwise."""
    body = bytearray(message(tensors=tensors, **fields))
    return PictureRequest(parameters(**fields), body, parse_header(body), request_id)


async def draw(engine: DiffusionEngine, wanted: PictureRequest) -> Picture:
    """The picture, without what is told before."""
    told = [item async for item in engine.generate(wanted)]
    assert len(told) == 1
    assert isinstance(told[0], Picture)
    return told[0]


def pixels_of(picture: Picture) -> np.ndarray:
    """What the PNG shows."""
    with Image.open(io.BytesIO(picture.png)) as image:
        return np.asarray(image)


def drawn_by(model: ZImageModel, *, guided: bool = False, **fields: Any) -> np.ndarray:
    """What the model draws without an engine."""
    negative = embeddings(5, seed=2) if guided else None
    picture = model.start(parameters(**fields), embeddings(20), negative)
    while not picture.finished:
        model.step([picture])
    return model.decode([picture])[0]


async def hold(engine: DiffusionEngine, model: WatchedModel, **fields: Any) -> asyncio.Task[Picture]:
    """A picture that stands in its first step until the gate opens."""
    model.gate.clear()
    model.entered.clear()
    task = asyncio.create_task(draw(engine, request(**fields)))
    await eventually(model.entered.is_set)
    return task


async def queue(engine: DiffusionEngine, count: int, **fields: Any) -> list[asyncio.Task[Picture]]:
    """Pictures that wait, in this order."""
    tasks = []
    for number in range(count):
        tasks.append(asyncio.create_task(draw(engine, request(seed=100 + number, **fields))))
        await eventually(lambda expected=number + 1: len(engine.pictures.waiting) == expected)
    return tasks
