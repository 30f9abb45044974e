"""LoRA files with random weights for a DiT, in the formats that trainers write."""

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import ZImagePipeline
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file

RANK, ALPHA = 4, 6
LAYERS = (
    "layers.0.attention.to_q",
    "layers.0.attention.to_k",
    "layers.0.attention.to_v",
    "layers.1.attention.to_out.0",
    "layers.1.feed_forward.w2",
    "layers.1.adaLN_modulation.0",
    "noise_refiner.0.feed_forward.w1",
    "context_refiner.0.attention.to_v",
)


def halves(transformer: Any, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, list[torch.Tensor]]:
    """For each layer `down` [rank, inputs] and `up` [outputs, rank]."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return (0.2 * torch.randn(shape, generator=generator)).to(dtype)

    modules = {name: transformer.get_submodule(name) for name in LAYERS}
    return {name: [random(RANK, m.in_features), random(m.out_features, RANK)] for name, m in modules.items()}


def write_diffusers(folder: Path, transformer: Any) -> Path:
    """What diffusers writes of an adapter that peft trained, with peft's settings in the metadata."""
    transformer.add_adapter(
        LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=list(LAYERS), init_lora_weights=False), adapter_name="made"
    )
    metadata = transformer.peft_config["made"].to_dict()
    ZImagePipeline.save_lora_weights(
        folder,
        transformer_lora_layers=get_peft_model_state_dict(transformer, adapter_name="made"),
        transformer_lora_adapter_metadata=metadata,
    )
    return folder / "pytorch_lora_weights.safetensors"


def with_settings(path: Path, to: Path, **settings: Any) -> Path:
    """Copies a file that diffusers wrote, with other settings of peft's."""
    with safe_open(path, "pt") as file:
        said = json.loads(file.metadata()[LORA_ADAPTER_METADATA_KEY])
    said |= {f"transformer.{name}": value for name, value in settings.items()}
    save_file(load_file(path), to, metadata={LORA_ADAPTER_METADATA_KEY: json.dumps(said)})
    return to


def write_kohya(folder: Path, transformer: Any, *, dtype: torch.dtype = torch.float32) -> Path:
    """Names as Kohya's scripts write them, with alpha, and the original model's one matrix for query, key and value."""
    tensors: dict[str, torch.Tensor] = {}
    for name, (down, up) in halves(transformer, dtype=dtype).items():
        if name.startswith("layers.0.attention"):
            continue
        base = "lora_unet_" + name.replace("to_out.0", "out").replace(".", "_")
        tensors |= {f"{base}.lora_down.weight": down, f"{base}.lora_up.weight": up}
        tensors[f"{base}.alpha"] = torch.tensor(float(ALPHA))
    width = transformer.config.dim
    generator = torch.Generator().manual_seed(1)
    base = "lora_unet_layers_0_attention_qkv"
    tensors[f"{base}.lora_down.weight"] = torch.randn((RANK, width), generator=generator).to(dtype)
    tensors[f"{base}.lora_up.weight"] = torch.randn((3 * width, RANK), generator=generator).to(dtype)
    tensors[f"{base}.alpha"] = torch.tensor(1.0)
    return write(folder / "kohya.safetensors", tensors)


def write_original(folder: Path, transformer: Any, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> Path:
    """The original model's names, as ComfyUI and ai-toolkit write them."""
    tensors: dict[str, torch.Tensor] = {}
    for name, (down, up) in halves(transformer, seed=seed, dtype=dtype).items():
        base = f"diffusion_model.{name}"
        tensors |= {f"{base}.lora_A.weight": down, f"{base}.lora_B.weight": up}
    return write(folder / f"original-{seed}.safetensors", tensors)


def write(path: Path, tensors: dict[str, torch.Tensor]) -> Path:
    """Any tensors as safetensors."""
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    return path
