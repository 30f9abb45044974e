"""The attention kernels that the DiT can be computed with, and what each needs. A table; imports no torch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from services.diffusion.option_settings import Attention, OptionSettings

FLASH_INSTALL = "install it with `--no-build-isolation`, by pip or uv,"


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernels:
    """diffusers' names for them, the best first; the compute capability that they need; the package. Those that take
    no masks compute items of unequal length one after the other."""

    names: Sequence[str]
    capability: tuple[int, int] | None = None
    package: str = ""
    install: str = ""
    takes_masks: bool = False


KERNELS: Mapping[Attention, Kernels] = {
    Attention.NATIVE: Kernels(names=["native"], takes_masks=True),
    Attention.CUDNN: Kernels(names=["_native_cudnn"], capability=(8, 0), takes_masks=True),
    Attention.FLASH: Kernels(
        names=["flash"], capability=(8, 0), package="flash-attn 2.6.3 or newer", install=FLASH_INSTALL
    ),
    Attention.FLASH_3: Kernels(
        names=["_flash_3"],
        capability=(9, 0),
        package="flash_attn_interface of Flash Attention 3",
        install="build it from the folder hopper of its repository,",
    ),
    Attention.SAGE: Kernels(
        names=["sage"],
        capability=(8, 0),
        package="sageattention 2.1.1 or newer",
        install="install it with `--no-build-isolation`, by pip or uv,",
    ),
}
FLASH_ATTN = Kernels(
    names=["_flash_3", "flash"], capability=(8, 0), package="flash-attn 2.6.3 or newer", install=FLASH_INSTALL
)
"""What the flag --flash-attn stands for."""


def wanted_kernels(settings: OptionSettings) -> tuple[Kernels, str] | None:
    """The kernels that are asked for and the flag that asks, None where torch may choose."""
    if settings.attention is not Attention.AUTO:
        return KERNELS[settings.attention], f"--attention {settings.attention}"
    return (FLASH_ATTN, "--flash-attn") if settings.flash_attn else None
