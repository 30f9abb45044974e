"""What a reference costs: a picture with one against the same picture without, an extraction against the bare model.

That cost depends neither on a picture's size nor on its steps, so small pictures of few steps show it best: it weighs
most there, and there is time for many pairs, which it takes, as equal pictures differ by 15 % on a shared machine.
"""

import base64
import io
import statistics
import time
from collections.abc import Callable
from typing import Any

import httpx2
import numpy as np
import torch
from PIL import Image
from transformers import Qwen3VLForConditionalGeneration

from benchmarks.processes import serve
from benchmarks.results import Figure, Findings, median_ratio
from benchmarks.setting import Setting
from services.vl.images import read_picture
from services.vl.loading import load_vision_model
from services.vl.model import VisionModel
from services.vl.settings import VlSettings

NAME = "vision"
PICTURES, QUICK_PICTURES = 400, 2
EXTRACTIONS, QUICK_EXTRACTIONS = 48, 2
SIDE, REFERENCE_SIDE = 128, 512
PICTURE_AIM, EXTRACTION_AIM = 1.03, 1.1
BODY: dict[str, Any] = {"prompt": "A cat sleeping in the sun " * 3, "width": SIDE, "height": SIDE, "steps": 2}


def run(setting: Setting) -> Findings:
    """A server of its own, whose vision-language model stays loaded: loading is not what is measured."""
    folder = setting.vision_model
    data_dir = setting.data_dir / "vision"
    data_dir.mkdir(exist_ok=True)
    with (
        serve(setting.model, data_dir, "--vl-model-path", str(folder), ZIMAGE_VL_AUTO_UNLOAD="false") as server,
        httpx2.Client(base_url=server.url, trust_env=False, timeout=None) as client,
    ):
        pictures = _pictures(client, QUICK_PICTURES if setting.quick else PICTURES)
        client.delete("/api/vl/cache").raise_for_status()
        extractions = _extractions(client, Bare(setting), QUICK_EXTRACTIONS if setting.quick else EXTRACTIONS)
        client.delete("/api/vl/cache").raise_for_status()
    with_one, without = zip(*pictures, strict=True)
    through, bare = zip(*extractions, strict=True)
    figures = [
        Figure(
            benchmark=NAME,
            what="a picture with a cached reference / without",
            value=median_ratio(with_one, without),
            aim=PICTURE_AIM,
        ),
        Figure(benchmark=NAME, what="a picture with one", value=1000 * statistics.median(with_one), unit="ms"),
        Figure(
            benchmark=NAME,
            what="an extraction through the gateway / the bare forward",
            value=median_ratio(through, bare),
            aim=EXTRACTION_AIM,
        ),
        Figure(benchmark=NAME, what="an extraction", value=1000 * statistics.median(through), unit="ms"),
    ]
    return Findings(figures, {"pictures_s": pictures, "extractions_s": extractions})


class Bare:
    """transformers' own forward on what the service reads of a picture, in this process."""

    def __init__(self, setting: Setting) -> None:
        folder = setting.vision_model
        self._reader: VisionModel = load_vision_model(VlSettings(vl_model_path=folder))
        dtype = getattr(torch, self._reader.facts.dtype)
        self._model: Any = Qwen3VLForConditionalGeneration.from_pretrained(folder, dtype=dtype).eval()

    @torch.inference_mode()
    def seconds(self, picture: bytes) -> float:
        """Of one forward; decoding and cutting up are not counted."""
        inputs = self._reader.prepare(read_picture(picture), "", None, max_tokens=1 << 14)
        ids = torch.tensor([inputs.ids])
        given = {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "pixel_values": inputs.patches,
            "image_grid_thw": inputs.grid,
            "mm_token_type_ids": (ids == self._model.config.image_token_id).int(),
        }
        started = time.perf_counter()
        self._model(**given, output_hidden_states=True, use_cache=False)
        return time.perf_counter() - started


def _pictures(client: httpx2.Client, count: int) -> list[tuple[float, float]]:
    """Seconds with and without a reference, each first as often as second; a first pair warms both up."""
    embeddings_id = _extracted(client, _png(0)).json()["embeddings_id"]

    def with_one(seed: int) -> float:
        body = {**BODY, "seed": seed, "vl_embeddings_id": embeddings_id, "vl_alpha": 0.3}
        return _timed(lambda: client.post("/api/vl/generate", json=body))

    def without(seed: int) -> float:
        return _timed(lambda: client.post("/api/generate", json={**BODY, "seed": seed}))

    return [_pair(with_one, without, number) for number in range(count + 1)][1:]


def _extractions(client: httpx2.Client, bare: Bare, count: int) -> list[tuple[float, float]]:
    """Seconds of an extraction of a picture that is not cached, and of the forward alone."""
    pngs = [_png(number) for number in range(count + 1)]

    def through(number: int) -> float:
        return _timed(lambda: _extracted(client, pngs[number]))

    return [_pair(through, lambda number: bare.seconds(pngs[number]), number) for number in range(count + 1)][1:]


def _pair(one: Callable[[int], float], other: Callable[[int], float], number: int) -> tuple[float, float]:
    if number % 2:
        return one(number), other(number)
    second = other(number)
    return one(number), second


def _timed(call: Callable[[], httpx2.Response]) -> float:
    started = time.perf_counter()
    call().raise_for_status()
    return time.perf_counter() - started


def _extracted(client: httpx2.Client, png: bytes) -> httpx2.Response:
    return client.post("/api/vl/extract", json={"image": base64.b64encode(png).decode()})


def _png(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (16, 16, 3), dtype=np.uint8)
    target = io.BytesIO()
    Image.fromarray(pixels).resize((REFERENCE_SIDE, REFERENCE_SIDE)).save(target, "PNG")
    return target.getvalue()
