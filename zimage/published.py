"""The published models that `zimage download` knows, and which of their files we load."""

from dataclasses import dataclass
from enum import StrEnum


class Published(StrEnum):
    """The models that can be downloaded."""

    Z_IMAGE_TURBO = "z-image-turbo"
    QWEN3_VL_4B_INSTRUCT = "qwen3-vl-4b-instruct"


@dataclass(frozen=True, slots=True)
class Repository:
    """Where a model is on the Hugging Face hub, which files we load (never pickles), and where its weights are."""

    name: str
    patterns: tuple[str, ...]
    weights: tuple[str, ...]


REPOSITORIES = {
    Published.Z_IMAGE_TURBO: Repository(
        "Tongyi-MAI/Z-Image-Turbo",
        (
            "model_index.json",
            *(f"{part}/*.json" for part in ("scheduler", "text_encoder", "tokenizer", "transformer", "vae")),
            *(f"{part}/*.safetensors" for part in ("text_encoder", "transformer", "vae")),
            "tokenizer/*.txt",
            "tokenizer/*.jinja",
        ),
        ("text_encoder", "transformer", "vae"),
    ),
    Published.QWEN3_VL_4B_INSTRUCT: Repository(
        "Qwen/Qwen3-VL-4B-Instruct", ("*.json", "*.safetensors", "*.txt", "*.jinja"), (".",)
    ),
}
