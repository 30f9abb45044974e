"""Measures how much memory steps and decodings take on this device, and keeps the answer in the data directory.

`zimage doctor --calibrate` measures; the service reads. What was measured holds for one device, one model and one set
of options; a service with others goes by the formula of `footprint`.
"""

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import structlog
import torch

from services.diffusion.footprint import Footprint, Measured
from services.diffusion.model import ZImageModel
from services.diffusion.option_settings import parse_size
from services.diffusion.settings import DiffusionSettings
from shared.errors import OutOfMemory
from shared.schemas.diffusion import DiffusionParameters
from shared.schemas.fields import LongPromptMode
from shared.tensors import pick_device

FILE = "calibration.json"
FORMAT = 1
SIZES = ("128x128", "256x256", "512x512", "768x768", "1024x1024", "1536x1536", "2048x2048")
TOKENS = 96  # of a prompt of middling length
OPTIONS = (
    *("diffusion_dtype", "attention", "flash_attn", "compile", "quantization", "cpu_offload", "offload_mode"),
    *("cache_dit", "vae_tiling_pixels", "vae_channels_last"),
)
"""Settings that change how much memory work takes."""
_ALLOCATION = "[memory]"

log = structlog.get_logger(__name__)


def footprint_of(transformer: Any, vae: Any, settings: DiffusionSettings, measured: Measured) -> Footprint:
    """The footprint of a loaded model."""
    return Footprint(
        width=transformer.config.dim,
        text_width=transformer.config.cap_feat_dim,
        item_bytes=transformer.dtype.itemsize,
        vae_width=vae.config.block_out_channels[min(1, len(vae.config.block_out_channels) - 1)],
        vae_item_bytes=vae.dtype.itemsize,
        tiling_pixels=settings.vae_tiling_pixels,
        decode_pixels=settings.vae_batch_pixels,
        decodes_here=pick_device(settings.vae_device) == pick_device(settings.dit_device),
        measured=measured,
    )


def measure(model: ZImageModel, settings: DiffusionSettings, sizes: Sequence[str] = SIZES) -> Measured:
    """Draws a step and a picture of each size, the smallest first, and ends where the device is too small."""
    # `Measured` tells whole from tiled by what is configured
    model.footprint.tiled_above = model.footprint.tiling_pixels
    step: dict[int, int] = {}
    decode: dict[int, int] = {}
    for width, height in map(parse_size, sizes):
        if width * height > settings.max_pixels:
            break
        try:
            picture = model.start(_parameters(width, height), torch.zeros(TOKENS, model.facts.text_width), None)
            step[picture.shape.tokens] = peak_bytes(model.facts.device, partial(model.step, [picture]))
            decode[picture.shape.pixels] = peak_bytes(model.facts.device, partial(model.decode, [picture]))
            log.info("measured", width=width, height=height)
        except OutOfMemory:
            log.info("the device is too small for this size", width=width, height=height)
            break
    return Measured(step, decode)


def peak_bytes(device: str, work: Callable[[], object]) -> int:
    """Bytes that the work holds at its height beyond what was there before; it is done twice, the first time to warm
    up. On the CPU they are counted by torch's profiler, as the system does not tell what the allocator keeps."""
    work()
    if not device.startswith("cuda"):
        return _profiled(work)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    work()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def read_measured(settings: DiffusionSettings) -> Measured:
    """What was measured with this device, model and options; nothing where that was not done."""
    entry = _read(settings.data_dir / FILE).get(key_of(settings), {})
    try:
        return Measured(
            *({int(size): int(taken) for size, taken in entry[name].items()} for name in ("step", "decode"))
        )
    except (KeyError, ValueError, AttributeError, TypeError):
        return Measured()


def write_measured(settings: DiffusionSettings, measured: Measured) -> Path:
    """Keeps what was measured beside what was measured with other options; answers the file."""
    path = settings.data_dir / FILE
    entries = {**_read(path), key_of(settings): {"step": dict(measured.step), "decode": dict(measured.decode)}}
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps({"format": FORMAT, "entries": entries}, indent=2) + "\n")
    part.replace(path)
    return path


def key_of(settings: DiffusionSettings) -> str:
    """What decides how much memory work takes: the device, the model and the options, in one line."""
    device = pick_device(settings.dit_device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    options = [f"{field}={getattr(settings, field)}" for field in OPTIONS]
    folder = str(settings.model_folder.resolve())
    return " ".join([name, f"torch={torch.__version__}", f"vae={settings.vae_device}", *options, folder])


def _profiled(work: Callable[[], object]) -> int:
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True, acc_events=True) as profiler:
        work()
    kept = highest = 0
    recorded = profiler.profiler.kineto_results.events()  # the only place that has each allocation
    for event in sorted((one for one in recorded if one.name() == _ALLOCATION), key=lambda one: one.start_ns()):
        kept += event.nbytes()
        highest = max(highest, kept)
    return highest


def _parameters(width: int, height: int) -> DiffusionParameters:
    return DiffusionParameters(
        width=width,
        height=height,
        steps=4,
        seed=0,
        guidance_scale=0.0,
        shift=3.0,
        long_prompt_mode=LongPromptMode.TRUNCATE,
    )


def _read(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        entries: dict[str, Any] = document["entries"] if document["format"] == FORMAT else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return entries if isinstance(entries, dict) else {}
