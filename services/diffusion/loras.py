"""LoRAs: changes to the DiT's weights, read from files and added once, at the start. Knows no request.

They are added by diffusers' own means, so that the weights are bit for bit those of `ZImagePipeline` after
`load_lora_weights(..., use_safetensors=True)`, `fuse_lora(lora_scale=...)` and `unload_lora_weights()`. Read are
safetensors files with diffusers', Kohya's (`lora_unet_`) or the original model's (`diffusion_model.`) names.
"""

import io
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import structlog
import torch
from diffusers.loaders import ZImageLoraLoaderMixin
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from safetensors import SafetensorError
from safetensors.torch import load
from torch import nn

from services.diffusion.lora_settings import LORA_SUFFIX, LoraFile
from shared.checkpoint import UnusableModel
from shared.tensors import DEVICE_ERROR, is_out_of_memory
from shared.wire import WireError, read_file_header

PREFIX = "transformer."  # what diffusers puts before every name that it has translated
DOWN, UP = ".lora_A.weight", ".lora_B.weight"  # [rank, inputs] and [outputs, rank]: the change is UP @ DOWN
WRAPPED, LORA_PART = ".base_layer", ".lora_"  # names of a layer, and of what is added to it, once peft has wrapped it
SETTINGS = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora")
"""Those of peft's that say how a change follows from its halves. Others, as dropout, are for a training, or would have
peft make what the file does not hold."""
UNREADABLE = (ValueError, KeyError, TypeError, RuntimeError, AttributeError, IndexError, SafetensorError, re.error)
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
    """A file's halves under diffusers' names, checked against the DiT, and peft's `SETTINGS` that the file has."""

    tensors: Mapping[str, torch.Tensor]
    settings: Mapping[str, Any]

    @property
    def layers(self) -> int:
        """Layers that it changes."""
        return len(self.tensors) // 2

    @property
    def metadata(self) -> Mapping[str, Any] | None:
        """The settings as diffusers takes them; None where it is to tell them from the halves."""
        if not self.settings:
            return None
        layers = {_layer_of(name) for name in self.tensors}
        return {PREFIX + name: value for name, value in {**self.settings, "target_modules": sorted(layers)}.items()}


def read_lora(transformer: Any, path: Path) -> LoraTensors:
    """Reads a LoRA for this DiT. Raises UnusableModel, which names the file.

    The file is not mapped into memory, as diffusers would have it: what is written to it later changes nothing here.
    """
    check_file(path)
    try:
        stored = path.read_bytes()
        settings = _settings_of(read_file_header(io.BytesIO(stored)).metadata)
        tensors = ZImageLoraLoaderMixin.lora_state_dict(load(stored))
    except (*UNREADABLE, OSError) as error:
        log.warning("a LoRA cannot be read", path=str(path), cause=repr(error))
        raise UnusableModel(f"the LoRA {path} has tensors that are not those of a LoRA for Z-Image") from None
    _check_tensors(transformer, path, tensors)
    return LoraTensors(tensors, settings)


def add_lora(transformer: Any, path: Path, *, adapter: str = "fused") -> int:
    """Adds a file to the DiT as an adapter of peft, of that name; answers how many layers it changes.

    Raises UnusableModel, which names the file; whatever it raises, nothing of the adapter is left.
    """
    lora = read_lora(transformer, path)
    whole = False
    try:
        ZImageLoraLoaderMixin.load_lora_into_transformer(
            dict(lora.tensors), transformer, adapter_name=adapter, metadata=lora.metadata, low_cpu_mem_usage=True
        )
        whole = _is_whole(transformer, adapter)
    except UNREADABLE as error:
        if not _of_the_file(error):
            raise
        log.warning("a LoRA cannot be added", path=str(path), cause=repr(error))
        raise UnusableModel(f"the LoRA {path} cannot be added to this DiT") from None
    finally:
        if not whole:
            transformer.delete_adapters(adapter)
    if not whole:
        raise UnusableModel(f"the LoRA {path} lacks tensors that its settings ask for")
    transformer.eval()  # peft's new layers are in training
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


def _settings_of(metadata: Mapping[str, str]) -> Mapping[str, Any]:
    """What a file's metadata say of its change, in diffusers' form. Raises one of `UNREADABLE`."""
    said = json.loads(metadata.get(LORA_ADAPTER_METADATA_KEY) or "{}")
    return {name: said[PREFIX + name] for name in SETTINGS if PREFIX + name in said}


def _is_whole(transformer: Any, adapter: str) -> bool:
    """Every parameter of the adapter came with the file: those that did not have no memory, on the meta device."""
    mine = (one for name, one in transformer.named_parameters() if f".{adapter}." in f"{name}.")
    return not any(parameter.is_meta for parameter in mine)


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
