"""The engine's options as `benchmarks.gpu` measures them: each makes a model of its own of copies of the same parts."""

import copy
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.models.attention_dispatch import attention_backend
from safetensors.torch import save_file

from benchmarks.gpu_models import SHIFT, Models
from services.diffusion.loading import assemble
from services.diffusion.model import ZImageModel
from services.diffusion.settings import DiffusionSettings
from shared.settings import Device

LORA, LORA_RANK = "random", 16
ALL, ENDS, ONE = (1, 2, 4, 8), (1, 8), (1,)


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """A way to run the engine: a name, settings, and how many pictures are made at a time."""

    name: str
    settings: dict[str, Any] = field(default_factory=dict)
    batches: Sequence[int] = ENDS
    lora: bool = False

    @property
    def compiles(self) -> bool:
        """Whether blocks are compiled first."""
        return bool(self.settings.get("compile"))


OPTIONS = (  # what matters most first: there may not be time for all
    Option(name="engine", batches=ALL),
    Option(name="compile", settings={"compile": True}, batches=ALL),
    Option(name="compile, cudnn", settings={"compile": True, "attention": "cudnn"}),
    Option(
        name="compile, cudnn, fp8_dynamic",
        settings={"compile": True, "attention": "cudnn", "quantization": "fp8_dynamic"},
    ),
    Option(name="compile, int8_dynamic", settings={"compile": True, "quantization": "int8_dynamic"}),
    Option(name="cudnn", settings={"attention": "cudnn"}),
    Option(name="flash_3", settings={"attention": "flash_3"}),
    Option(name="flash", settings={"attention": "flash"}),
    Option(name="sage", settings={"attention": "sage"}),
    Option(name="native", settings={"attention": "native"}, batches=ONE),
    Option(name="fp8", settings={"quantization": "fp8"}, batches=ONE),
    Option(name="int8", settings={"quantization": "int8"}, batches=ONE),
    Option(name="fp8_dynamic", settings={"quantization": "fp8_dynamic"}, batches=ONE),
    Option(name="int8_dynamic", settings={"quantization": "int8_dynamic"}, batches=ONE),
    Option(name="compile, fp8", settings={"compile": True, "quantization": "fp8"}, batches=ONE),
    Option(name="compile, int8", settings={"compile": True, "quantization": "int8"}, batches=ONE),
    Option(name="cache-dit", settings={"cache_dit": True}, batches=ONE),
    Option(name="a LoRA of rank 16", lora=True, batches=ONE),
    Option(name="channels-last VAE", settings={"vae_channels_last": True}, batches=ONE),
    Option(name="VAE in tiles", settings={"vae_tiling_pixels": 0}, batches=ONE),
    Option(name="offload by blocks", settings={"cpu_offload": True}, batches=ONE),
    Option(name="offload of the whole DiT", settings={"cpu_offload": True, "offload_mode": "model"}, batches=ONE),
)


@contextmanager
def built(models: Models, option: Option, side: int) -> Iterator[ZImageModel]:
    """A model with that option, compiled for pictures of so many pixels a side where it is. Raises UnusableModel where
    this machine lacks what it needs."""
    with ExitStack() as stack:
        stack.enter_context(attention_backend())  # diffusers keeps what was chosen last for the next model
        device, folder = Device(models.device.type), None
        if option.lora:
            folder = Path(stack.enter_context(TemporaryDirectory()))
            _write_lora(folder / f"{LORA}.safetensors", models.transformer)
        sizes = (f"{side}x{side}",) if option.compiles else ()
        settings = DiffusionSettings(
            dit_device=device, vae_device=device, lora_dir=folder, compile_sizes=sizes, **option.settings
        )
        scheduler_config = dict(FlowMatchEulerDiscreteScheduler(shift=SHIFT).config)
        yield assemble(copy.deepcopy(models.transformer), copy.deepcopy(models.vae), scheduler_config, settings)


def _write_lora(path: Path, transformer: Any) -> None:
    """A change to every attention, as trainers make it by default."""
    tensors: dict[str, torch.Tensor] = {}
    generator = torch.Generator().manual_seed(0)
    for index, block in enumerate(transformer.layers):
        for name in ("to_q", "to_k", "to_v"):
            layer, base = getattr(block.attention, name), f"diffusion_model.layers.{index}.attention.{name}"
            down = torch.randn((LORA_RANK, layer.in_features), generator=generator) / layer.in_features**0.5
            up = 0.1 * torch.randn((layer.out_features, LORA_RANK), generator=generator)
            tensors |= {f"{base}.lora_A.weight": down.bfloat16(), f"{base}.lora_B.weight": up.bfloat16()}
    save_file(tensors, path)
