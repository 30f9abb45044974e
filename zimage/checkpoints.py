"""Makes checkpoints with random weights in the directory layout of the published Z-Image: to test and to measure with.

They draw noise, but through the real architecture: Qwen3 text encoder, Z-Image DiT, AutoencoderKL, flow matching.
"""

import json
from enum import StrEnum
from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from tokenizers import Tokenizer
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.utils import logging as transformers_logging

from zimage.architecture import Shape, make_text_encoder, make_transformer, make_vae
from zimage.tokenizer import save_tokenizer, train_tokenizer

VISION_PATCH = 16
VISION_LAYERS = 8  # the API reads layers -1 to -6; the first one is changed by the vision tower's own states
FORMAT_VERSION = 3  # raise it when the layout below changes: older directories are then made anew


class Size(StrEnum):
    """How large the random model is."""

    TINY = "tiny"
    SMALL = "small"
    BENCH = "bench"


SHAPES = {
    Size.TINY: Shape(
        text_width=64,
        text_layers=4,
        text_heads=4,
        heads=4,
        axes_dims=(8, 4, 4),
        layers=2,
        refiner_layers=1,
        vae_channels=(8, 16, 16, 16),
    ),
    Size.SMALL: Shape(  # of the bundled demo model
        text_width=192,
        text_layers=6,
        text_heads=6,
        heads=4,
        axes_dims=(16, 24, 24),
        layers=5,
        refiner_layers=1,
        vae_channels=(24, 48, 64, 64),
        vae_attention=False,
    ),
    Size.BENCH: Shape(
        text_width=256,
        text_layers=36,
        text_heads=4,
        heads=8,
        axes_dims=(32, 48, 48),
        layers=8,
        refiner_layers=2,
        vae_channels=(32, 64, 128, 128),
        vision_layers=24,  # as many as the published model has, like those of the text
    ),
}


def make_checkpoint(folder: Path, *, size: Size = Size.TINY, dtype: str = "bfloat16", seed: int = 0) -> Path:
    """Writes a checkpoint, the same for the same arguments, and answers its folder. An equal one is left as it is."""
    recipe = {"size": size.value, "dtype": dtype, "seed": seed, "version": FORMAT_VERSION}
    stamp = folder / "made_by_zimage.json"
    if stamp.is_file() and json.loads(stamp.read_text()) == recipe:
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    shape, torch_dtype = SHAPES[size], getattr(torch, dtype)
    tokenizer = train_tokenizer()
    save_tokenizer(tokenizer, folder / "tokenizer")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        parts = {
            "text_encoder": make_text_encoder(shape, tokenizer.get_vocab_size()),
            "transformer": make_transformer(shape),
            "vae": make_vae(shape),
        }
    transformers_logging.disable_progress_bar()  # a shard of kilobytes is written before a bar is drawn
    for name, part in parts.items():
        torch.nn.Module.to(part, torch_dtype)  # past diffusers' own `to`, which warns of parts that this model lacks
        part.save_pretrained(folder / name)
    FlowMatchEulerDiscreteScheduler(shift=3.0).save_pretrained(folder / "scheduler")
    (folder / "model_index.json").write_text(json.dumps(MODEL_INDEX, indent=2) + "\n")
    stamp.write_text(json.dumps(recipe) + "\n")
    return folder


def make_vision_checkpoint(folder: Path, *, size: Size = Size.TINY, dtype: str = "bfloat16", seed: int = 0) -> Path:
    """Writes a Qwen3-VL checkpoint, whose hidden states are as wide as those of `make_checkpoint`'s text encoder."""
    recipe = {"size": size.value, "dtype": dtype, "seed": seed, "version": FORMAT_VERSION, "vision": True}
    stamp = folder / "made_by_zimage.json"
    if stamp.is_file() and json.loads(stamp.read_text()) == recipe:
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer()
    save_tokenizer(tokenizer, folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _vision_model(SHAPES[size], tokenizer)
    transformers_logging.disable_progress_bar()
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    Qwen2VLImageProcessorPil(
        patch_size=VISION_PATCH,
        merge_size=2,
        temporal_patch_size=2,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
        size={"shortest_edge": 64 * 64, "longest_edge": 512 * 512},
    ).save_pretrained(folder)
    stamp.write_text(json.dumps(recipe) + "\n")
    return folder


MODEL_INDEX = {
    "_class_name": "ZImagePipeline",
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "Qwen3ForCausalLM"],
    "tokenizer": ["transformers", "Qwen2Tokenizer"],
    "transformer": ["diffusers", "ZImageTransformer2DModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


def _vision_model(shape: Shape, tokenizer: Tokenizer) -> Any:
    head = shape.text_width // shape.text_heads
    config = Qwen3VLConfig(
        text_config={
            "vocab_size": tokenizer.get_vocab_size(),
            "hidden_size": shape.text_width,
            "intermediate_size": 3 * shape.text_width,
            "num_hidden_layers": max(VISION_LAYERS, shape.text_layers),
            "num_attention_heads": shape.text_heads,
            "num_key_value_heads": max(1, shape.text_heads // 4),
            "head_dim": head,
            "max_position_embeddings": 40_960,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1_000_000.0,
                "mrope_section": [head // 2 - 2 * (head // 6), head // 6, head // 6],
                "mrope_interleaved": True,
            },
        },
        vision_config={
            "depth": shape.vision_layers,
            "hidden_size": shape.text_width,
            "intermediate_size": 2 * shape.text_width,
            "num_heads": 4,
            "patch_size": VISION_PATCH,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "out_hidden_size": shape.text_width,
            "num_position_embeddings": 16 * 16,
            "deepstack_visual_indexes": [0],
        },
        image_token_id=tokenizer.token_to_id("<|image_pad|>"),
        video_token_id=tokenizer.token_to_id("<|video_pad|>"),
        vision_start_token_id=tokenizer.token_to_id("<|vision_start|>"),
        vision_end_token_id=tokenizer.token_to_id("<|vision_end|>"),
        tie_word_embeddings=True,
    )
    return Qwen3VLForConditionalGeneration(config)
