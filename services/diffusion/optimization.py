"""Ways to run the DiT in less memory or less time, by diffusers' and torch's own means. Knows no request.

Without them a picture is bit for bit that of `ZImagePipeline`; with Flash Attention or compiled blocks it differs by
rounding, with offloaded weights not at all.
"""

import os
import shutil
import sys
from collections.abc import Callable, Sequence
from typing import Any

import structlog
import torch

from shared.checkpoint import UnusableModel

FLASH_BACKENDS = ("_flash_3", "flash")  # of diffusers, the faster first: `flash_attn_interface` and `flash-attn`
MAX_VARIANTS = 32  # of a compiled block: with and without modulation, a mask, guidance; torch stops at 8
CAUSE_CHARACTERS = 500
INSTALL_FLASH = "install it with `uv pip install flash-attn --no-build-isolation`"

log = structlog.get_logger(__name__)


def use_flash_attention(transformer: Any, device: torch.device) -> None:
    """Has every attention of the DiT computed by flash-attn, which takes no mask. Raises UnusableModel."""
    if device.type != "cuda":
        raise UnusableModel(
            f"--flash-attn needs an NVIDIA GPU, but the DiT runs on '{device}': choose --dit-device cuda or leave "
            "--flash-attn out"
        )
    if transformer.dtype not in (torch.bfloat16, torch.float16):
        raise UnusableModel(
            "--flash-attn computes in bfloat16 only, but the DiT's weights are "
            f"{str(transformer.dtype).removeprefix('torch.')}: set ZIMAGE_DIFFUSION_DTYPE=bfloat16 or leave it out"
        )
    for backend in FLASH_BACKENDS:
        try:
            transformer.set_attention_backend(backend)
        except RuntimeError:  # diffusers finds no package for it, or one that is too old
            continue
        log.info("flash attention is on", backend=backend)
        return
    raise UnusableModel(f"--flash-attn needs the package flash-attn 2.6.3 or newer: {INSTALL_FLASH} or leave it out")


def offload(transformer: Any, device: torch.device) -> None:
    """Keeps the DiT's weights in main memory; each block's are on the device only while it computes.

    On a GPU the next block is copied while this one computes.
    """
    transformer.enable_group_offload(
        onload_device=device, offload_type="block_level", num_blocks_per_group=1, use_stream=device.type == "cuda"
    )
    log.info("the weights of the DiT stay in main memory", device=str(device))


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


def try_compiled(draw: Callable[[], object]) -> None:
    """Compiles by drawing, so that no request has to wait for it. Raises UnusableModel when that fails."""
    from torch._dynamo.exc import TorchDynamoException

    log.info("compiling the DiT, which may take minutes")
    try:
        draw()
    except TorchDynamoException as error:
        log.warning("torch.compile failed", cause=repr(error)[:CAUSE_CHARACTERS])
        raise UnusableModel(
            "--compile does not work on this machine, the log has the cause: install a C++ compiler and Python's "
            "headers (`apt install g++ python3-dev`) or leave --compile out"
        ) from None


def _compilers(device: torch.device) -> Sequence[str]:
    """What torch (for the CPU) and Triton (for CUDA) look for, of which one is enough; MPS needs none."""
    if device.type == "cpu":
        return (os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++"),)
    if device.type == "cuda":
        return (os.environ["CC"],) if "CC" in os.environ else ("gcc", "clang")
    return ()
