"""The model directory: is it usable, how large are its parts, and do they fit where they are to run?

`tensors` is the module `shared.tensors`, None where torch cannot be imported.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from rich.filesize import decimal

from services.diffusion.kernels import wanted_kernels
from services.diffusion.settings import DiffusionSettings
from shared.checkpoint import UnusableModel, require_parts
from shared.settings import Device, Dtype, Quantization
from zimage.doctor.configuration import Configuration
from zimage.doctor.libraries import try_import
from zimage.doctor.row import Row, missing, note, ok
from zimage.weights import Weights, read_weights

TIGHT = 0.85
"""Share of the memory beyond which the weights leave little for the work itself."""


@dataclass(frozen=True, slots=True)
class Part:
    """A folder of the model directory with weights, and how it is to be loaded (`user`: by another service)."""

    name: str
    device: Device
    dtype: Dtype
    quantization: Quantization = Quantization.NONE
    offloaded: bool = False
    flash: bool = False
    user: str = ""

    @property
    def title(self) -> str:
        """What rows call it."""
        return f"{self.name} for the {self.user}" if self.user else self.name


def model_rows(configuration: Configuration, tensors: ModuleType | None) -> list[Row]:
    """The findings about the model."""
    parts = _parts(configuration)
    if not parts:
        return [note("model", "none is needed: encoder and diffusion run elsewhere or not at all")]
    encoder, diffusion = configuration.encoder, configuration.diffusion
    folders = encoder.parts * (configuration.runs_encoder or configuration.loads_second_encoder)
    folders += diffusion.parts * configuration.runs_diffusion
    try:
        root = require_parts(encoder.model_folder, *folders)
    except UnusableModel as error:
        return [missing("model", str(error), "get one: `zimage download`, whose last line is the --model-path")]
    bundled = encoder.model_path is None
    rows, whole = [ok("model", "the bundled demo model: simple shapes only" if bundled else str(root))], []
    for part in parts:
        row, weights = _part_row(root, part)
        rows.append(row)
        whole += [(part, weights)] if weights is not None else []
    return rows if tensors is None else [*rows, *_device_rows(root, whole, tensors)]


def lora_rows(configuration: Configuration) -> list[Row]:
    """A row for each LoRA file that is to be fused."""
    loras = configuration.diffusion.loras if configuration.runs_diffusion else ()
    service: Any = try_import("services.diffusion.loras") if loras else None
    if isinstance(service, str):
        return [missing("LoRA", f"not looked at: {service}", "see the rows of the libraries")]
    rows = []
    for lora in loras:
        try:
            service.check_file(lora.path)
            rows.append(ok("LoRA", f"{lora.path}, scale {lora.scale:g}"))
        except UnusableModel as error:
            rows.append(missing("LoRA", str(error), "name another file, or leave it out"))
    return rows


def _parts(configuration: Configuration) -> list[Part]:
    encoder, diffusion = configuration.encoder, configuration.diffusion
    parts = []
    if configuration.runs_encoder:
        kept: dict[str, Any] = {"quantization": encoder.text_encoder_quantization}
        parts.append(Part("text_encoder", encoder.text_encoder_device, encoder.text_encoder_dtype, **kept))
    if configuration.loads_second_encoder:
        rewriter = configuration.rewriter
        parts.append(Part("text_encoder", rewriter.rewriter_device, rewriter.rewriter_dtype, user="rewriter"))
    if configuration.runs_diffusion:
        how: dict[str, Any] = {
            "quantization": diffusion.quantization,
            "offloaded": diffusion.cpu_offload,
            "flash": _computes_in_16_bits(diffusion),
        }
        parts.append(Part("transformer", diffusion.dit_device, diffusion.diffusion_dtype, **how))
        parts.append(Part("vae", diffusion.vae_device, diffusion.diffusion_dtype))
    return parts


def _computes_in_16_bits(settings: DiffusionSettings) -> bool:
    """The attention kernels that are asked for take no float32."""
    wanted = wanted_kernels(settings)
    return wanted is not None and wanted[0].capability is not None


def _part_row(root: Path, part: Part) -> tuple[Row, Weights | None]:
    what = f"model {part.title}"
    try:
        weights = read_weights(root / part.name)
    except UnusableModel as error:
        return missing(what, str(error), "download it again; files that are whole are not fetched twice"), None
    files = "1 file" if weights.files == 1 else f"{weights.files} files"
    return ok(what, f"{decimal(weights.stored_bytes)} in {files}, {weights.dtype}"), weights


def _device_rows(root: Path, parts: Sequence[tuple[Part, Weights]], tensors: Any) -> list[Row]:
    """Whether the devices are there, and the weights of the parts that go to each fit on it together."""
    needed: Counter[Any] = Counter()
    rows = []
    for part, weights in parts:
        try:
            device = tensors.pick_device(part.device)
        except UnusableModel as error:
            rows.append(missing(f"device of {part.title}", str(error), "choose another device, or auto"))
            continue
        dtype = tensors.dtype_of(part.dtype, weights.dtype, device)
        if part.flash and dtype.itemsize > 2:
            todo = "set ZIMAGE_DIFFUSION_DTYPE=bfloat16, or leave --flash-attn out"
            rows.append(missing("attention flash", f"it computes in bfloat16, but the weights are {dtype}", todo))
        place = tensors.pick_device(Device.CPU) if part.offloaded else device
        needed[place] += tensors.loaded_bytes(root / part.name, dtype, part.quantization)
    return [*rows, *(_fit_row(device, size, tensors.free_memory(device)) for device, size in needed.items())]


def _fit_row(device: Any, needed: int, free: int | None) -> Row:
    what = f"weights on {device}"
    if free is None:
        return note(what, f"{decimal(needed)}; how much memory is free cannot be told on this system")
    detail = f"{decimal(needed)} of {decimal(free)} that are free"
    todo = "free some memory, choose other devices, try --cpu-offload, or run the encoder on another machine"
    if needed > free:
        return missing(what, detail, todo)
    if needed > TIGHT * free:
        return note(what, f"{detail}, which leaves little for the work itself", todo)
    return ok(what, detail)
