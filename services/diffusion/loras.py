"""LoRAs: changes to the DiT's weights, read from files and added once, at the start. Knows no request.

They are added by diffusers' own means, so that the weights are bit for bit those of `ZImagePipeline` after
`load_lora_weights(..., use_safetensors=True)`, `fuse_lora(lora_scale=...)` and `unload_lora_weights()`. Read are
safetensors files with diffusers', Kohya's (`lora_unet_`) or the original model's (`diffusion_model.`) names.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import structlog
import torch
from diffusers.loaders import ZImageLoraLoaderMixin
from torch import nn

from services.diffusion.lora_settings import LORA_SUFFIX, LoraFile
from shared.checkpoint import UnusableModel
from shared.tensors import DEVICE_ERROR, is_out_of_memory
from shared.wire import WireError, read_file_header

PREFIX = "transformer."  # what diffusers puts before every name that it has translated
DOWN, UP = ".lora_A.weight", ".lora_B.weight"  # [rank, inputs] and [outputs, rank]: the change is UP @ DOWN
WRAPPED, LORA_PART = ".base_layer", ".lora_"  # names of a layer, and of what is added to it, once peft has wrapped it
UNREADABLE = (ValueError, KeyError, TypeError, RuntimeError, AttributeError, IndexError)
"""What diffusers and peft raise, among others, for files that they cannot make sense of; `_of_the_file` tells those
of the device from them."""

log = structlog.get_logger(__name__)


def fuse_loras(transformer: Any, loras: Sequence[LoraFile]) -> None:
    """Adds each file's change times its scale to the weights, in the order given.

    Raises UnusableModel, which names the file; all headers are read before the first file is added.
    """
    for lora in loras:
        check_file(lora.path)
    for lora in loras:
        layers = _fuse(transformer, lora)
        log.info("lora fused", path=str(lora.path), scale=lora.scale, layers=layers)


def check_file(path: Path) -> None:
    """Raises UnusableModel unless the file is whole safetensors; reads its header only, never pickle."""
    if path.suffix.lower() != LORA_SUFFIX:
        raise UnusableModel(f"the LoRA {path} is not a {LORA_SUFFIX} file; pickled weights are never loaded")
    try:
        with path.open("rb") as file:
            header = read_file_header(file)
    except OSError as error:
        raise UnusableModel(f"the LoRA {path} cannot be read: {error.strerror}") from None
    except WireError as error:
        raise UnusableModel(f"the LoRA {path} cannot be read as safetensors: {error}") from None
    if any("dora_scale" in tensor.name for tensor in header.tensors):  # diffusers would drop them and draw amiss
        raise UnusableModel(f"the LoRA {path} is a DoRA, which cannot be used; give a plain LoRA")


@dataclass(frozen=True, slots=True)
class LoraTensors:
    """A file's halves under diffusers' names, checked against the DiT, and peft's settings where the file has them."""

    tensors: Mapping[str, torch.Tensor]
    metadata: Mapping[str, Any] | None

    @property
    def layers(self) -> int:
        """Layers that it changes."""
        return len(self.tensors) // 2


def read_lora(transformer: Any, path: Path) -> LoraTensors:
    """Reads a LoRA for this DiT. Raises UnusableModel, which names the file."""
    check_file(path)
    try:
        tensors, metadata = ZImageLoraLoaderMixin.lora_state_dict(
            str(path.parent),
            weight_name=path.name,
            use_safetensors=True,
            local_files_only=True,
            return_lora_metadata=True,
        )
    except (*UNREADABLE, OSError) as error:
        log.warning("a LoRA cannot be read", path=str(path), cause=repr(error))
        raise UnusableModel(f"the LoRA {path} has tensors that are not those of a LoRA for Z-Image") from None
    _check_tensors(transformer, path, tensors)
    return LoraTensors(tensors, metadata)


def add_lora(transformer: Any, path: Path, *, adapter: str | None = None) -> int:
    """Adds a file to the DiT as an adapter of peft, of that name; answers how many layers it changes.

    Raises UnusableModel, which names the file.
    """
    lora = read_lora(transformer, path)
    try:
        ZImageLoraLoaderMixin.load_lora_into_transformer(
            dict(lora.tensors), transformer, adapter_name=adapter, metadata=lora.metadata, low_cpu_mem_usage=True
        )
    except UNREADABLE as error:
        if not _of_the_file(error):
            raise
        log.warning("a LoRA cannot be added", path=str(path), cause=repr(error))
        raise UnusableModel(f"the LoRA {path} cannot be added to this DiT") from None
    return lora.layers


def _fuse(transformer: Any, lora: LoraFile) -> int:
    """Adds one file to the weights; answers the number of layers that it changes."""
    layers = add_lora(transformer, lora.path)
    try:
        transformer.fuse_lora(lora_scale=lora.scale)
        transformer.unload_lora()
    except UNREADABLE as error:
        if not _of_the_file(error):
            raise
        log.warning("a LoRA cannot be fused", path=str(lora.path), cause=repr(error))
        raise UnusableModel(f"the LoRA {lora.path} cannot be added to this DiT") from None
    return layers


def _of_the_file(error: Exception) -> bool:
    """Not of a device that has too little memory left, or that was lost."""
    return not (is_out_of_memory(error) or isinstance(error, DEVICE_ERROR))


def _check_tensors(transformer: Any, path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Every tensor must be one half of the change of a layer that there is, and hold finite numbers."""
    layers = {
        name.removesuffix(WRAPPED): module
        for name, module in transformer.named_modules()
        if isinstance(module, nn.Linear) and LORA_PART not in name
    }
    if not tensors:
        raise UnusableModel(f"the LoRA {path} is empty")
    for name, tensor in tensors.items():
        layer = layers.get(_layer_of(name))
        if layer is None:
            raise UnusableModel(f"the LoRA {path} is not for this model: its '{name}' matches no layer of the DiT")
        other = tensors.get(name.replace(DOWN, UP) if name.endswith(DOWN) else name.replace(UP, DOWN))
        if other is None or not _fits(layer, *((tensor, other) if name.endswith(DOWN) else (other, tensor))):
            raise UnusableModel(f"the LoRA {path} is not for this model: its '{name}' does not fit the DiT's layer")
        if not bool(torch.isfinite(tensor.float()).all()):
            raise UnusableModel(f"the LoRA {path} holds values that are not finite numbers, in '{name}'")


def _layer_of(name: str) -> str:
    for suffix in (DOWN, UP):
        if name.startswith(PREFIX) and name.endswith(suffix):
            return name.removeprefix(PREFIX).removesuffix(suffix)
    return ""


def _fits(layer: nn.Linear, down: torch.Tensor, up: torch.Tensor) -> bool:
    """`down` is [rank, inputs] and `up` [outputs, rank] of that layer."""
    return (
        down.ndim == up.ndim == 2
        and down.shape[1] == layer.in_features
        and up.shape[0] == layer.out_features
        and down.shape[0] == up.shape[1] > 0
    )
