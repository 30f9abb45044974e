"""The engine's options as `benchmarks.gpu` measures them: each makes a model of its own from the same parts."""

import copy
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from safetensors.torch import save_file

from benchmarks.gpu_models import SHIFT, Models
from services.diffusion.adapters import Adapters
from services.diffusion.calibration import footprint_of
from services.diffusion.cores import Cores
from services.diffusion.footprint import Measured
from services.diffusion.memory import resident_bytes
from services.diffusion.model import Parts, ZImageModel
from services.diffusion.optimization import (
    cache_blocks,
    compile_blocks,
    offload,
    prepare_vae,
    quantize_blocks,
    set_attention,
)
from services.diffusion.settings import DiffusionSettings
from services.diffusion.shelf import Shelf

LORA, LORA_RANK = "random", 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """A way to run the engine: a name, settings, and the pictures that are made at a time."""

    name: str
    settings: dict[str, Any] = field(default_factory=dict)
    batches: Sequence[int] = (1, 8)
    lora: bool = False


ALL = (1, 2, 4, 8)
OPTIONS = (
    Option(name="engine", batches=ALL),
    Option(name="cuDNN attention", settings={"attention": "cudnn"}),
    Option(name="flash attention", settings={"attention": "flash"}),
    Option(name="flash attention 3", settings={"attention": "flash_3"}),
    Option(name="sage attention", settings={"attention": "sage"}),
    Option(name="channels-last VAE", settings={"vae_channels_last": True}, batches=(1,)),
    Option(name="a LoRA of rank 16", lora=True, batches=(1,)),
    Option(name="compile", settings={"compile": True}, batches=ALL),
    Option(name="compile, cuDNN attention", settings={"compile": True, "attention": "cudnn"}),
    Option(name="compile, int8 weights", settings={"compile": True, "quantization": "int8"}, batches=(1,)),
    Option(name="compile, int8 dynamic", settings={"compile": True, "quantization": "int8_dynamic"}),
    Option(name="compile, fp8 weights", settings={"compile": True, "quantization": "fp8"}, batches=(1,)),
    Option(name="compile, fp8 dynamic", settings={"compile": True, "quantization": "fp8_dynamic"}),
    Option(
        name="compile, fp8 dynamic, cuDNN attention",
        settings={"compile": True, "quantization": "fp8_dynamic", "attention": "cudnn"},
    ),
    Option(name="cache-dit", settings={"cache_dit": True}, batches=(1,)),
    Option(name="offload by blocks", settings={"cpu_offload": True}, batches=(1,)),
    Option(name="offload of the DiT", settings={"cpu_offload": True, "offload_mode": "model"}, batches=(1,)),
)


def build(models: Models, option: Option) -> ZImageModel:
    """A model with that option. Raises UnusableModel where this machine lacks what it needs."""
    device = models.device
    folder = Path(tempfile.mkdtemp()) if option.lora else None
    settings = DiffusionSettings(
        dit_device=device.type, vae_device=device.type, vae_tiling_pixels=10**9, lora_dir=folder, **option.settings
    )
    transformer, vae = copy.deepcopy(models.transformer), copy.deepcopy(models.vae)
    if folder is not None:
        _write_lora(folder / f"{LORA}.safetensors", transformer)
    prepare_vae(vae, settings)
    takes_masks = set_attention(transformer, settings, device)
    quantize_blocks(transformer, settings, device)
    if settings.cpu_offload:
        offload(transformer, vae, device, settings.offload_mode)
    if settings.compile:
        compile_blocks(transformer, device)
    before_picture: Callable[[int], None] | None = cache_blocks(transformer) if settings.cache_dit else None
    parts = Parts(
        transformer=transformer,
        vae=vae,
        device=device,
        vae_device=device,
        weight_bytes=resident_bytes(transformer, vae, settings, device),
        scheduler_config=dict(FlowMatchEulerDiscreteScheduler(shift=SHIFT).config),
        adapters=Adapters(transformer, Shelf(settings), settings.lora_max_bytes),
        takes_masks=takes_masks,
        before_picture=before_picture,
        cores=Cores(torch.get_num_threads() if device.type == "cpu" and not settings.compile else 1),
    )
    return ZImageModel(parts, footprint_of(transformer, vae, settings, Measured()))


def loader(models: Models, option: Option) -> Callable[[], ZImageModel]:
    """What makes the model when the engine's thread asks."""
    return partial(build, models, option)


def _write_lora(path: Path, transformer: Any) -> None:
    """A change to every attention, as trainers make it by default."""
    tensors = {}
    generator = torch.Generator().manual_seed(0)
    for index, block in enumerate(transformer.layers):
        for name in ("to_q", "to_k", "to_v"):
            layer, base = getattr(block.attention, name), f"diffusion_model.layers.{index}.attention.{name}"
            down = torch.randn((LORA_RANK, layer.in_features), generator=generator) / layer.in_features**0.5
            up = 0.1 * torch.randn((layer.out_features, LORA_RANK), generator=generator)
            tensors |= {f"{base}.lora_A.weight": down.bfloat16(), f"{base}.lora_B.weight": up.bfloat16()}
    save_file(tensors, path)
