"""Writes what was trained as the checkpoint directories that the project ships, in bfloat16."""

import json
import random
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, ZImageTransformer2DModel
from tokenizers import Tokenizer
from torch import nn
from transformers import Qwen3ForCausalLM, Qwen3VLForConditionalGeneration

from demo_model import captions
from demo_model.training.text import HIDDEN_LAYER, TextBatches
from demo_model.training.vision import new_processor
from demo_model.world import random_scene
from zimage.checkpoints import MODEL_INDEX
from zimage.tokenizer import save_tokenizer

STATISTICS_PROMPTS = 512


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


def export_vision(
    folder: Path, *, tokenizer: Tokenizer, vision: Qwen3VLForConditionalGeneration, text: Qwen3ForCausalLM
) -> None:
    """The Qwen3-VL directory; its configuration carries the spread of the text model's states, `zimage_target_std`."""
    vision.config.zimage_target_std = round(_spread(text, TextBatches(tokenizer)), 4)
    _in_bfloat16(vision).save_pretrained(folder)
    new_processor().save_pretrained(folder)
    save_tokenizer(tokenizer, folder)


@torch.no_grad()
def _spread(text: Qwen3ForCausalLM, texts: TextBatches) -> float:
    rng = random.Random(9_000_000)
    states = []
    for _ in range(STATISTICS_PROMPTS):
        tokens = torch.tensor([texts.prompt_ids(captions.canonical(random_scene(rng)))], device=text.device)
        hidden = text(tokens, output_hidden_states=True, use_cache=False).hidden_states
        states.append(hidden[HIDDEN_LAYER][0].float())
    return float(torch.cat(states).std())


def _in_bfloat16(part: Any) -> Any:
    return nn.Module.to(part, torch.bfloat16)
