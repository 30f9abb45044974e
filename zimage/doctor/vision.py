"""The vision-language model: is there one, can it be used, and does it fit where it is to run?"""

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any

from rich.filesize import decimal

from shared.checkpoint import UnusableModel, read_json, weight_bytes
from zimage.doctor.configuration import Configuration
from zimage.doctor.libraries import try_import
from zimage.doctor.row import Row, lacking, missing, note, ok
from zimage.plan import runs_vl
from zimage.weights import read_weights

WHAT, TODO = "vision model", "name a whole Qwen3-VL directory with --vl-model-path, or leave the flag out"


def vision_rows(configuration: Configuration, tensors: ModuleType | None) -> Iterator[Row]:
    """The findings; `tensors` is the module `shared.tensors`, None where torch cannot be imported."""
    folder = configuration.vl.vl_model_folder
    if urls := configuration.gateway.vl_urls:
        yield note(WHAT, f"none is needed: the vl service runs at {', '.join(map(str, urls))}")
        return
    if folder is None or not runs_vl(configuration.gateway):
        yield note(WHAT, "none: pictures take no reference pictures", "name a Qwen3-VL directory with --vl-model-path")
        return
    try:
        weights = read_weights(folder)
    except UnusableModel as error:
        yield missing(WHAT, str(error), TODO)
        return
    yield ok(WHAT, f"{folder}: {decimal(weights.stored_bytes)} in {weights.files} files, {weights.dtype}")
    if tensors is not None:
        yield from _loaded_rows(folder, configuration, tensors)


def _loaded_rows(folder: Path, configuration: Configuration, tensors: Any) -> Iterator[Row]:
    """What only the service's own code can tell, which reads everything but the weights."""
    what, service = "vision processor", try_import("services.vl.loading")
    if isinstance(service, str):
        yield missing(what, f"not looked at: {service}", "see the rows of the libraries")
        return
    try:
        facts = service.load_vision_model(configuration.vl).facts
    except UnusableModel as error:
        yield missing(what, str(error), TODO)
        return
    yield ok(what, f"usable; hidden states of {facts.width} numbers, scaled to {facts.target_std:g}")
    text = _text_width(configuration)
    if text is not None and text != facts.width:
        detail = f"its hidden states have {facts.width} numbers, those of the text encoder {text}"
        yield missing(WHAT, detail, "choose a Qwen3-VL that belongs to the Z-Image model")
    yield _memory_row(folder, configuration, facts, tensors)


def _text_width(configuration: Configuration) -> int | None:
    """Length of the text encoder's hidden states, None where it runs elsewhere or cannot be read."""
    if configuration.runs_encoder:
        with suppress(UnusableModel):
            width = read_json(configuration.encoder.model_folder / "text_encoder" / "config.json").get("hidden_size")
            return width if isinstance(width, int) else None
    return None


def _memory_row(folder: Path, configuration: Configuration, facts: Any, tensors: Any) -> Row:
    settings, what = configuration.vl, f"vision weights on {facts.device}"
    device = tensors.pick_device(settings.vl_device)
    dtype = tensors.dtype_of(settings.vl_dtype, facts.dtype, device)
    needed, free = weight_bytes(folder, dtype.itemsize), tensors.free_memory(device)
    when = "while a picture is read" if settings.vl_auto_unload else "all the time"
    if free is None:
        return note(what, f"{decimal(needed)} {when}; how much memory is free cannot be told on this system")
    detail = f"{decimal(needed)} of {decimal(free)} that are free, {when}"
    if needed > free:
        todo = "free some memory, choose another --vl-device, or run the vl service on another machine"
        return lacking(what, detail, todo, needed=not settings.vl_auto_unload)
    return ok(what, detail)
