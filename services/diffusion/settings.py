"""What the diffusion service is told."""

import json
from pathlib import Path
from typing import Annotated, Any, NamedTuple, Self

from pydantic import AfterValidator, BeforeValidator, Field, model_validator
from pydantic_core import PydanticCustomError
from pydantic_settings import NoDecode

from shared.settings import DEFAULT_MAX_PIXELS, Device, Dtype, ModelSettings, setting

LORA_SUFFIX = ".safetensors"
MAX_SCALE = 10.0


class LoraFile(NamedTuple):
    """A LoRA to add to the DiT's weights, and how much of it."""

    path: Path
    scale: float = 1.0


def parse_lora(text: str) -> LoraFile:
    """Reads `path` or `path:scale`; a path may hold colons of its own. Raises PydanticCustomError."""
    path, colon, number = text.rpartition(":")
    if not colon or not (_is_number(number) or path.lower().endswith(LORA_SUFFIX)):
        path, number = text, "1.0"
    if not path:
        raise PydanticCustomError("zimage_lora_path", "a LoRA is given as path or path:scale")
    if not _is_number(number) or not abs(float(number)) <= MAX_SCALE:  # `not <=` catches NaN too
        raise PydanticCustomError("zimage_lora_scale", "its scale must be a number between -10 and 10")
    return LoraFile(Path(path), float(number))


def split_list(value: Any) -> Any:
    """The items of a text, which is a JSON list (what the command line passes on) or separated by commas."""
    if not isinstance(value, str):
        return value
    text = value.strip()
    if not text.startswith("["):
        return [item.strip() for item in text.split(",")] if text else []
    try:
        return json.loads(text)
    except ValueError:
        raise PydanticCustomError("zimage_list", "this is neither a JSON list nor items between commas") from None


def _check_lora(text: str) -> str:
    parse_lora(text)
    return text


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


Loras = Annotated[tuple[Annotated[str, AfterValidator(_check_lora)], ...], NoDecode, BeforeValidator(split_list)]
Paths = Annotated[tuple[Path, ...], NoDecode, BeforeValidator(split_list)]
Scale = Annotated[float, Field(ge=-MAX_SCALE, le=MAX_SCALE, allow_inf_nan=False)]
Scales = Annotated[tuple[Scale, ...], NoDecode, BeforeValidator(split_list)]


class DiffusionSettings(ModelSettings):
    """Settings of the diffusion service."""

    diffusion_host: str = setting(
        "127.0.0.1", key="diffusion.host", description="address that the diffusion service listens on"
    )
    diffusion_port: int = setting(
        7864, key="diffusion.port", ge=0, le=65535, description="its port; 0 picks a free one"
    )
    dit_device: Device = setting(
        Device.AUTO,
        key="devices.dit",
        panel="Model & device",
        description="Device for the DiT transformer (cpu/cuda/mps/auto).",
    )
    vae_device: Device = setting(
        Device.AUTO,
        key="devices.vae",
        panel="Model & device",
        description="Device for the VAE (cpu/cuda/mps/auto).",
    )
    diffusion_dtype: Dtype = setting(
        Dtype.AUTO, key="diffusion.dtype", description="number format of the weights; auto is the checkpoint's own"
    )
    max_pixels: int = setting(
        DEFAULT_MAX_PIXELS, key="generation.max_pixels", ge=256, description="largest width x height of a picture"
    )
    diffusion_max_waiting: int = setting(
        32, key="diffusion.max_waiting", ge=1, description="pictures that may wait; beyond it a request is refused"
    )
    png_compression: int = setting(
        1, key="diffusion.png_compression", ge=0, le=9, description="zlib level of the PNG; 1 is quick, hardly larger"
    )
    cpu_offload: bool = setting(
        default=False,
        key="optimization.cpu_offload",
        panel="Optimization",
        description="Enable CPU offload for transformer.",
    )
    flash_attn: bool = setting(
        default=False, key="optimization.flash_attn", panel="Optimization", description="Enable Flash Attention."
    )
    compile: bool = setting(
        default=False,
        key="optimization.compile",
        panel="Optimization",
        description="Compile transformer with torch.compile.",
    )
    lora: Loras = setting(
        (), key="", panel="LoRA", description="LoRA file path with optional scale (path:scale). Repeatable."
    )
    lora_paths: Paths = setting(
        (), key="lora.paths", description="LoRA files, fused in this order; --lora wins over it"
    )
    lora_scales: Scales = setting(
        (), key="lora.scales", description="how much of each, -10 to 10, one number a path; none is 1.0 for all"
    )

    @property
    def loras(self) -> tuple[LoraFile, ...]:
        """The LoRAs to fuse, in order: those of --lora where it is given, else those of the file."""
        if "lora" in self.model_fields_set:
            return tuple(parse_lora(text) for text in self.lora)
        scales = self.lora_scales or (1.0,) * len(self.lora_paths)
        return tuple(map(LoraFile, self.lora_paths, scales))

    @property
    def address(self) -> tuple[str, int]:
        """Host and port to listen on."""
        return self.diffusion_host, self.diffusion_port

    @model_validator(mode="after")
    def _scales_match_paths(self) -> Self:
        paths, scales = len(self.lora_paths), len(self.lora_scales)
        if scales and scales != paths:
            raise PydanticCustomError(
                "zimage_lora_scales",
                "lora.scales must have one number for each entry of lora.paths: there are {paths} paths and {scales} "
                "scales",
                {"paths": paths, "scales": scales},
            )
        return self
