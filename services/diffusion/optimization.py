"""Ways to run DiT and VAE in less memory or less time, by diffusers' and torch's own means. Knows no request.

Without them a picture is bit for bit that of `ZImagePipeline`. What each of them changes, docs/performance.md tells.
"""

import os
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import structlog
import torch
from accelerate import cpu_offload_with_hook
from torch import nn

from services.diffusion.footprint import TILE_PX
from services.diffusion.kernels import Kernels, wanted_kernels
from services.diffusion.option_settings import OffloadMode, OptionSettings, parse_size
from services.diffusion.shapes import Shape, shape_of
from shared.checkpoint import UnusableModel
from shared.errors import ServiceError
from shared.logs import adopt_loggers
from shared.schemas.diffusion import DiffusionParameters
from shared.schemas.fields import LongPromptMode
from shared.settings import Quantization
from shared.tensors import CPU, free_memory, quantize

MAX_VARIANTS = 32  # of a compiled block: with and without modulation, a mask, guidance; torch stops at 8
CAUSE_CHARACTERS = 500
QUANTIZED_PARTS = ("layers.", "noise_refiner.", "context_refiner.")
"""The blocks hold nearly all weights; what stands around them is small, and sensitive."""
KEPT_WHOLE = ".adaLN_modulation."
"""What a block does with the time: two hundredths of the weights, sensitive, and multiplied with one row a picture,
which kernels of 8 bits do not take."""
REHEARSAL_SIZE, REHEARSAL_TOKENS, REHEARSAL_NEGATIVE_TOKENS = (256, 176), 20, 70
"""Padded, 192 tokens of picture, 32 and 96 of texts: torch.compile takes lengths for the same number that are equal
here, to each other or to a width of the DiT, and compiles again once they differ."""
UNPADDED_TOKENS, UNPADDED_NEGATIVE_TOKENS = 32, 64
"""Of texts that several pictures need no padding for: torch compiles again for how they then lie in memory."""
PINNED_SHARE = 1.5  # torch takes pinned memory in powers of two
CACHE_SHARE, CACHE_WARMUP_STEPS = 4, 3  # one block in four always runs, and all do in the first steps
INSTALL_CACHE_DIT = "`ZIMAGE_EXTRAS=cache make install` adds it (to images: the same variable);"

log = structlog.get_logger(__name__)


def set_attention(transformer: Any, settings: OptionSettings, device: torch.device) -> bool:
    """Has the DiT's attention computed by the kernels that are asked for; answers whether they take masks.

    Raises UnusableModel.
    """
    wanted = wanted_kernels(settings)
    if wanted is None:
        return True
    kernels, flag = wanted
    use_kernels(transformer, device, kernels, flag)
    return kernels.takes_masks


def use_kernels(transformer: Any, device: torch.device, kernels: Kernels, flag: str) -> None:
    """Switches every attention of the DiT to these kernels. Raises UnusableModel, whose sentence names the flag."""
    if kernels.capability is not None:
        _check_device(transformer, device, kernels.capability, flag)
    for name in kernels.names:
        try:
            transformer.set_attention_backend(name)
        except RuntimeError:  # diffusers finds no package for it, or one that is too old
            continue
        log.info("attention kernels are set", backend=name)
        return
    raise UnusableModel(f"{flag} needs the package {kernels.package}: {kernels.install} or leave it out")


def quantize_blocks(transformer: Any, settings: OptionSettings, device: torch.device) -> None:
    """Keeps the weights of the DiT's blocks in fewer bits. Raises UnusableModel."""
    if settings.compile and settings.quantization is Quantization.INT8 and device.type == "cpu":
        raise UnusableModel(
            "--compile and --quantization int8 cannot be combined on a CPU, where what torch compiles of them crashes: "
            "choose int8_dynamic or leave one of them out"
        )
    quantize(
        transformer,
        settings.quantization,
        device,
        flag=f"--quantization {settings.quantization}",
        wanted=_is_quantized,
    )


def _is_quantized(module: nn.Module, name: str) -> bool:
    return isinstance(module, nn.Linear) and name.startswith(QUANTIZED_PARTS) and KEPT_WHOLE not in name


def offload(transformer: Any, vae: Any, device: torch.device, mode: OffloadMode) -> None:
    """Keeps the DiT's weights in main memory; each block's, or all of them, are on the device while they compute.

    By blocks, the next block is copied while this one computes on a GPU, from pages that the system may not move: a
    second copy of the weights for a while, which is done without where main memory has no room for it. As a whole, DiT
    and VAE make room for each other where both compute on that device.
    """
    if mode is OffloadMode.MODEL:
        _, dit_hook = cpu_offload_with_hook(transformer, device)
        if vae.device.type == device.type:
            _, vae_hook = cpu_offload_with_hook(vae, device, prev_module_hook=dit_hook)
            dit_hook.hook.prev_module_hook = vae_hook
    else:
        free, pinned = free_memory(CPU), PINNED_SHARE * sum(weight.nbytes for weight in transformer.parameters())
        transformer.enable_group_offload(
            onload_device=device,
            offload_type="block_level",
            num_blocks_per_group=1,
            use_stream=device.type == "cuda",
            low_cpu_mem_usage=free is not None and free < pinned,
        )
    log.info("the weights of the DiT stay in main memory", device=str(device), mode=mode.value)


def cache_blocks(transformer: Any) -> Callable[[int], None]:
    """Has the DiT skip blocks whose output hardly changes from step to step; answers what is to be called before each
    picture, with the number of its steps. Raises UnusableModel.

    The first blocks always run: how much they change tells whether the others are needed.
    """
    try:
        import cache_dit
    except ImportError:
        raise UnusableModel(f"--cache-dit needs the package cache-dit: {INSTALL_CACHE_DIT} else leave it out") from None
    adopt_loggers()

    def recipe(steps: int | None) -> Any:
        return cache_dit.DBCacheConfig(
            Fn_compute_blocks=max(1, len(transformer.layers) // CACHE_SHARE),
            max_warmup_steps=CACHE_WARMUP_STEPS,
            num_inference_steps=steps,
        )

    cache_dit.enable_cache(transformer, cache_config=recipe(None))
    return lambda steps: cache_dit.refresh_context(transformer, cache_config=recipe(steps))


def prepare_vae(vae: Any, settings: OptionSettings) -> None:
    """Sets how large the tiles are in which large pictures are decoded, and the order of the VAE's numbers."""
    cell_px = 2 ** (len(vae.config.block_out_channels) - 1)
    vae.tile_sample_min_size, vae.tile_latent_min_size = TILE_PX, TILE_PX // cell_px
    if settings.vae_channels_last:
        vae.to(memory_format=torch.channels_last)


def compile_blocks(transformer: Any, device: torch.device) -> None:
    """Has the DiT's repeated block compiled when it is first called, for any size of picture. Raises UnusableModel."""
    compilers = _compilers(device)
    if compilers and not any(shutil.which(name) for name in compilers):
        raise UnusableModel(
            f"--compile needs a C++ compiler, but {' or '.join(compilers)} is not on this machine: install one (`apt "
            "install g++`, on a Mac `xcode-select --install`) or leave --compile out"
        )
    import torch._dynamo as dynamo  # a second's work, which only this option needs

    dynamo.config.recompile_limit = MAX_VARIANTS
    transformer.compile_repeated_blocks(dynamic=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rehearsal:
    """Pictures that are drawn so that what they need is compiled; with guidance where there are `negative_tokens`."""

    parameters: DiffusionParameters
    pictures: int = 1
    tokens: int = REHEARSAL_TOKENS
    negative_tokens: int | None = None


def rehearsals(
    settings: OptionSettings, batch_of: Callable[[Shape], int], *, takes_masks: bool = True
) -> Sequence[Rehearsal]:
    """What is drawn at the start: the sizes that are configured where they are compiled, the largest first, as compiled
    kernels are chosen for what comes first; then a small one. Each by two as well where as many of that shape may be
    drawn together (`batch_of`). Then one with guidance, which needs masks (`takes_masks`: the kernels have them)."""
    small = _rehearsal(*REHEARSAL_SIZE)
    sizes = settings.compile_sizes if settings.compile else []
    configured = [_rehearsal(*parse_size(size)) for size in sizes]
    configured.sort(key=lambda parameters: -parameters.width * parameters.height)
    drawn: list[Rehearsal] = []
    for parameters in (*configured, small):
        shape = shape_of(parameters, text=REHEARSAL_TOKENS, negative=None, loras=())
        counts = range(1, min(2, batch_of(shape)) + 1)
        drawn += [Rehearsal(parameters=parameters, pictures=count) for count in counts]
    guided = small.model_copy(update={"guidance_scale": 1.0})
    alike = settings.cache_dit and not takes_masks  # other texts are refused then
    drawn.append(Rehearsal(parameters=guided, negative_tokens=REHEARSAL_TOKENS if alike else REHEARSAL_NEGATIVE_TOKENS))
    if settings.compile:
        if drawn[-2].pictures > 1:
            drawn.append(Rehearsal(parameters=small, pictures=2, tokens=UNPADDED_TOKENS))
        drawn.append(Rehearsal(parameters=guided, tokens=UNPADDED_TOKENS, negative_tokens=UNPADDED_NEGATIVE_TOKENS))
    return drawn


def flags_to_try(settings: OptionSettings) -> Sequence[str]:
    """The options that were set and whose kernels tell only by computing whether this machine can run them."""
    kernels = wanted_kernels(settings)
    flags = [] if kernels is None else [kernels[1]]
    if settings.quantization is not Quantization.NONE:
        flags.append(f"--quantization {settings.quantization}")
    return [*flags, "--compile"] if settings.compile else flags


def try_options(draw: Callable[[], object], flags: Sequence[str]) -> None:
    """Draws with options, so that no request has to wait for what they compile, nor fail where they do not work.

    Raises UnusableModel, and ServiceErrors as they are.
    """
    log.info("trying the options", flags=flags)
    try:
        draw()
    except (UnusableModel, ServiceError):
        raise
    except Exception as error:  # noqa: BLE001 - whatever a kernel raises: it is told, with the option that brought it
        log.warning("the options do not work", flags=flags, cause=repr(error)[:CAUSE_CHARACTERS])
        hint = "leave it out" if len(flags) == 1 else "leave one of them out"
        if flags[-1] == "--compile" and _is_the_compilers(error):
            flags, hint = (
                flags[-1:],
                "install a C++ compiler and Python's headers (`apt install g++ python3-dev`) or " + hint,
            )
        does = "does" if len(flags) == 1 else "do"
        raise UnusableModel(
            f"{' with '.join(flags)} {does} not work on this machine, the log has the cause: {hint}"
        ) from None


def _is_the_compilers(error: Exception) -> bool:
    from torch._dynamo.exc import TorchDynamoException  # a second's work

    return isinstance(error, TorchDynamoException)


def _check_device(transformer: Any, device: torch.device, capability: tuple[int, int], flag: str) -> None:
    if device.type != "cuda":
        raise UnusableModel(
            f"{flag} needs an NVIDIA GPU, but the DiT runs on '{device}': choose --dit-device cuda or leave {flag} out"
        )
    if transformer.dtype not in (torch.bfloat16, torch.float16):
        raise UnusableModel(
            f"{flag} computes in bfloat16 only, but the DiT's weights are "
            f"{str(transformer.dtype).removeprefix('torch.')}: set ZIMAGE_DIFFUSION_DTYPE=bfloat16 or leave it out"
        )
    if torch.cuda.is_available() and torch.cuda.get_device_capability(device) < capability:
        wanted = ".".join(map(str, capability))
        raise UnusableModel(f"{flag} needs a GPU of compute capability {wanted} or newer: leave {flag} out")


def _compilers(device: torch.device) -> Sequence[str]:
    """What torch (for the CPU) and Triton (for CUDA) look for, of which one is enough; MPS needs none."""
    if device.type == "cpu":
        return (os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++"),)
    if device.type == "cuda":
        return (os.environ["CC"],) if "CC" in os.environ else ("gcc", "clang")
    return ()


def _rehearsal(width: int, height: int) -> DiffusionParameters:
    return DiffusionParameters(
        width=width,
        height=height,
        steps=1,
        seed=0,
        guidance_scale=0.0,
        shift=3.0,
        long_prompt_mode=LongPromptMode.TRUNCATE,
    )
