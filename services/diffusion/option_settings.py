"""What the diffusion service is told of ways to save time or memory."""

import re
from enum import StrEnum
from typing import Annotated, Self

from pydantic import AfterValidator, BeforeValidator, model_validator
from pydantic_core import PydanticCustomError
from pydantic_settings import NoDecode

from services.diffusion.lora_settings import LoraSettings
from shared.addresses import split_list
from shared.schemas.fields import MAX_SIDE_PX, SIDE_MULTIPLE_PX
from shared.settings import Quantization, setting


class Attention(StrEnum):
    """Which kernels compute the DiT's attention; auto is torch's own choice."""

    AUTO = "auto"
    NATIVE = "native"
    FLASH = "flash"
    FLASH_3 = "flash_3"
    SAGE = "sage"
    CUDNN = "cudnn"


class OffloadMode(StrEnum):
    """What --cpu-offload moves: one block at a time, or the whole DiT for as long as it computes."""

    GROUP = "group"
    MODEL = "model"


def parse_size(text: str) -> tuple[int, int]:
    """Width and height in pixels of a text like `1024x768`. Raises PydanticCustomError."""
    found = re.fullmatch(r"([0-9]{2,4})x([0-9]{2,4})", text)
    sides = (int(found[1]), int(found[2])) if found else (0, 0)
    if any(not SIDE_MULTIPLE_PX <= side <= MAX_SIDE_PX or side % SIDE_MULTIPLE_PX for side in sides):
        raise PydanticCustomError(
            "zimage_size", "a size is written like 1024x768, both multiples of {step}", {"step": SIDE_MULTIPLE_PX}
        )
    return sides


def _check_size(text: str) -> str:
    parse_size(text)
    return text


Sizes = Annotated[tuple[Annotated[str, AfterValidator(_check_size)], ...], NoDecode, BeforeValidator(split_list)]


class OptionSettings(LoraSettings):
    """Ways to draw in less time or memory. What each costs in quality stands in docs/performance.md."""

    cpu_offload: bool = setting(
        default=False,
        key="optimization.cpu_offload",
        panel="Optimization",
        description="Enable CPU offload for transformer.",
    )
    offload_mode: OffloadMode = setting(
        OffloadMode.GROUP,
        key="optimization.offload_mode",
        description="what --cpu-offload brings to the device at a time: a block (group) or the whole DiT (model)",
    )
    flash_attn: bool = setting(
        default=False, key="optimization.flash_attn", panel="Optimization", description="Enable Flash Attention."
    )
    attention: Attention = setting(
        Attention.AUTO,
        key="optimization.attention",
        panel="Optimization",
        description="Attention kernels of the DiT (auto/native/flash/flash_3/sage/cudnn).",
    )
    compile: bool = setting(
        default=False,
        key="optimization.compile",
        panel="Optimization",
        description="Compile transformer with torch.compile.",
    )
    compile_sizes: Sizes = setting(
        (),
        key="optimization.compile_sizes",
        description="sizes of pictures, as 1024x1024, that --compile draws once at the start",
    )
    quantization: Quantization = setting(
        Quantization.NONE,
        key="optimization.quantization",
        panel="Optimization",
        description="Number format of the DiT's weights: none, int8, int8_dynamic, fp8, fp8_dynamic.",
    )
    cache_dit: bool = setting(
        default=False,
        key="optimization.cache_dit",
        panel="Optimization",
        description="Skip blocks whose output hardly changes, by cache-dit; pictures are then made one at a time.",
    )
    vae_tiling_pixels: int = setting(
        2_400_000,
        key="optimization.vae_tiling_pixels",
        ge=0,
        description="pictures of more pixels are decoded in tiles, in less memory",
    )
    vae_batch_pixels: int = setting(
        280_000,
        key="optimization.vae_batch_pixels",
        ge=0,
        description="pictures of together at most so many pixels are decoded at once",
    )
    vae_channels_last: bool = setting(
        default=False,
        key="optimization.vae_channels_last",
        description="keep the VAE's numbers in the order that convolutions on some devices prefer",
    )

    @model_validator(mode="after")
    def _options_agree(self) -> Self:
        flash = (Attention.AUTO, Attention.FLASH, Attention.FLASH_3)
        contradictions = {
            "--flash-attn and another --attention contradict each other: leave one of them out": (
                self.flash_attn and self.attention not in flash
            ),
            "--compile and --lora-dir cannot be combined, as each set of LoRAs would be compiled anew: leave one out": (
                self.compile and self.lora_dir is not None
            ),
            "--cache-dit and --compile cannot be combined: leave one of them out": self.cache_dit and self.compile,
            "--cache-dit and --cpu-offload cannot be combined: leave one of them out": (
                self.cache_dit and self.cpu_offload
            ),
            "--quantization and --cpu-offload cannot be combined: leave one of them out": (
                self.quantization is not Quantization.NONE and self.cpu_offload
            ),
            "--lora-dir and --cpu-offload cannot be combined: leave one of them out": (
                self.lora_dir is not None and self.cpu_offload
            ),
        }
        for sentence, contradicts in contradictions.items():
            if contradicts:
                raise PydanticCustomError("zimage_options", sentence)
        return self
