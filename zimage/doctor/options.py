"""What the options of the diffusion service need, and what was measured for it on this machine."""

from collections.abc import Iterator
from types import ModuleType
from typing import Any

from rich.filesize import decimal

from services.diffusion.kernels import wanted_kernels
from services.diffusion.settings import DiffusionSettings
from shared.checkpoint import UnusableModel
from shared.logs import configure_logs
from shared.settings import Quantization
from zimage.doctor import machine
from zimage.doctor.attention import attention_rows
from zimage.doctor.libraries import package_row, try_import
from zimage.doctor.row import Row, lacking, missing, note, ok

FP8_CAPABILITY = (8, 9)
CALIBRATION = "calibration"
CALIBRATE = "measure it with `zimage doctor --calibrate`"


def option_rows(
    settings: DiffusionSettings | None, torch: ModuleType | str, device: str, *, encoder: Quantization
) -> Iterator[Row]:
    """A row for each option; `settings` are None where this machine draws no pictures, `device` is where it would.
    `encoder` is how the text encoder's weights are kept on this machine."""
    wanted = DiffusionSettings.model_construct() if settings is None else settings
    capability = torch.cuda.get_device_capability() if isinstance(torch, ModuleType) and device == "cuda" else None
    kernels = wanted_kernels(wanted)
    yield package_row("peft", "for --lora and --lora-dir", needed=bool(wanted.loras or wanted.lora_dir))
    yield package_row(
        "torchao",
        "for --quantization and encoder.quantization",
        needed={wanted.quantization, encoder} != {Quantization.NONE},
    )
    yield _fp8_row(capability, needed=wanted.quantization is Quantization.FP8_DYNAMIC)
    yield package_row("cache-dit", "for --cache-dit", needed=wanted.cache_dit)
    yield machine.compiler_row(device, needed=wanted.compile)
    yield _offload_row(device)
    yield ok("VAE options", "tiling, batches and channels last need nothing more")
    yield from attention_rows(capability, wanted=() if kernels is None else kernels[0].names)


def calibration_row(settings: DiffusionSettings) -> Row:
    """Whether it was measured how much memory pictures take here."""
    calibration: Any = try_import("services.diffusion.calibration")
    if isinstance(calibration, str):
        return note(CALIBRATION, f"not looked at: {calibration}")
    try:
        sizes = len(calibration.read_measured(settings).decode)
    except UnusableModel as error:
        return note(CALIBRATION, f"not looked at: {error}")
    if not sizes:
        return note(CALIBRATION, "not done: a cautious formula says how much memory pictures take", CALIBRATE)
    return ok(CALIBRATION, f"{sizes} sizes were measured with this model and these options")


def calibrate(settings: DiffusionSettings) -> Iterator[Row]:
    """Loads the model, measures how much memory pictures of several sizes take, keeps it, and tells it."""
    modules = [try_import(f"services.diffusion.{name}") for name in ("loading", "calibration")]
    broken = [module for module in modules if isinstance(module, str)]
    if broken:
        yield missing(CALIBRATION, f"not possible: {broken[0]}", "see the rows of the libraries")
        return
    configure_logs("doctor")  # to standard error: the findings are for standard output
    loading, calibration = (module for module in modules if isinstance(module, ModuleType))
    try:
        measured = calibration.measure(loading.load_zimage(settings), settings)
    except UnusableModel as error:
        yield missing(CALIBRATION, str(error), "correct it first")
        return
    for pixels, decoding in measured.decode.items():
        yield ok(f"{CALIBRATION} {pixels} pixels", f"decoding takes {decimal(decoding)} at its height")
    for tokens, step in measured.step.items():
        yield ok(f"{CALIBRATION} {tokens} tokens", f"a step takes {decimal(step)} at its height")
    yield ok(CALIBRATION, f"kept in {calibration.write_measured(settings, measured)}")


def _fp8_row(capability: tuple[int, int] | None, *, needed: bool) -> Row:
    what = "fp8 arithmetic"
    if capability is not None and capability >= FP8_CAPABILITY:
        return ok(what, "usable; for --quantization fp8_dynamic")
    return lacking(
        what,
        "it needs a CUDA device of compute capability 8.9 or newer; for --quantization fp8_dynamic",
        "choose fp8, int8 or int8_dynamic",
        needed=needed,
    )


def _offload_row(device: str) -> Row:
    if device == "cpu":
        return note("CPU offload", "changes nothing where the DiT runs on the CPU")
    return ok("CPU offload", "usable, by blocks or of the whole DiT")
