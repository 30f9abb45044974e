"""Writes what was trained as the checkpoint directories that the project ships, in bfloat16."""

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, ZImageTransformer2DModel
from tokenizers import Tokenizer
from torch import nn
from transformers import Qwen3ForCausalLM, Qwen3VLForConditionalGeneration

from demo_model.training.vision import new_processor
from zimage.checkpoints import MODEL_INDEX
from zimage.tokenizer import save_tokenizer


def export_model(
    folder: Path, *, tokenizer: Tokenizer, text: Qwen3ForCausalLM, dit: ZImageTransformer2DModel, vae: AutoencoderKL
) -> None:
    """The Z-Image directory."""
    save_tokenizer(tokenizer, folder / "tokenizer")
    text.generation_config.eos_token_id = tokenizer.token_to_id("<|im_end|>")
    text.generation_config.pad_token_id = tokenizer.token_to_id("<|endoftext|>")
    parts: dict[str, Any] = {"text_encoder": text, "transformer": dit, "vae": vae}
    for name, part in parts.items():
        _in_bfloat16(part).save_pretrained(folder / name)
    FlowMatchEulerDiscreteScheduler(shift=3.0).save_pretrained(folder / "scheduler")
    (folder / "model_index.json").write_text(json.dumps(MODEL_INDEX, indent=2) + "\n")


def export_vision(folder: Path, *, tokenizer: Tokenizer, vision: Qwen3VLForConditionalGeneration) -> None:
    """The Qwen3-VL directory."""
    _in_bfloat16(vision).save_pretrained(folder)
    new_processor().save_pretrained(folder)
    save_tokenizer(tokenizer, folder)


def _in_bfloat16(part: Any) -> Any:
    return nn.Module.to(part, torch.bfloat16)
