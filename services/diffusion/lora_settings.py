"""What the diffusion service is told of LoRAs."""

from pathlib import Path
from typing import Annotated, NamedTuple, Self

from pydantic import AfterValidator, BeforeValidator, model_validator
from pydantic_core import PydanticCustomError
from pydantic_settings import NoDecode

from shared.addresses import split_list
from shared.schemas.fields import MAX_LORA_SCALE, LoraScale
from shared.settings import ServiceSettings, setting

LORA_SUFFIX = ".safetensors"


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
    if not _is_number(number) or not abs(float(number)) <= MAX_LORA_SCALE:  # `not <=` catches NaN too
        raise PydanticCustomError("zimage_lora_scale", "its scale must be a number between -10 and 10")
    return LoraFile(Path(path), float(number))


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
Scales = Annotated[tuple[LoraScale, ...], NoDecode, BeforeValidator(split_list)]


class LoraSettings(ServiceSettings):
    """LoRAs that every picture has by default, and those that a request may choose."""

    lora: Loras = setting(
        (), key="", panel="LoRA", description="LoRA file path with optional scale (path:scale). Repeatable."
    )
    lora_paths: Paths = setting((), key="lora.paths", description="LoRA files, in this order; --lora wins over it")
    lora_scales: Scales = setting(
        (), key="lora.scales", description="how much of each, -10 to 10, one number a path; none is 1.0 for all"
    )
    lora_dir: Path | None = setting(
        None,
        key="lora.dir",
        panel="LoRA",
        description="Folder of LoRAs that requests may name; those of --lora are then the default of a request.",
    )
    lora_max_bytes: int = setting(
        2 << 30, key="lora.max_bytes", ge=1 << 20, description="bytes of LoRAs that are kept on the device"
    )

    @property
    def loras(self) -> tuple[LoraFile, ...]:
        """The LoRAs of a picture that names none, in order: those of --lora where it is given, else the file's."""
        if "lora" in self.model_fields_set:
            return tuple(parse_lora(text) for text in self.lora)
        scales = self.lora_scales or (1.0,) * len(self.lora_paths)
        return tuple(map(LoraFile, self.lora_paths, scales))

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
