"""Pictures and weights to compare, of this service and of diffusers' own pipeline."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import ZImagePipeline

from services.diffusion.loading import load_zimage
from services.diffusion.model import ZImageModel
from services.diffusion.settings import DiffusionSettings
from services.diffusion.shapes import Lora
from shared.schemas.diffusion import DiffusionParameters
from shared.schemas.fields import LongPromptMode

SIZE, STEPS, SEED = 64, 2, 7


def load(checkpoint: Path, **options: Any) -> ZImageModel:
    """The service's model on the CPU."""
    return load_zimage(DiffusionSettings(model_path=checkpoint, dit_device="cpu", vae_device="cpu", **options))


def load_pipeline(checkpoint: Path, dtype: torch.dtype) -> Any:
    """diffusers' pipeline of the same directory, without its text encoder."""
    pipeline = ZImagePipeline.from_pretrained(checkpoint, text_encoder=None, tokenizer=None, dtype=dtype)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def embeddings(tokens: int, seed: int = 3) -> torch.Tensor:
    """Random hidden states of the tiny checkpoint's width."""
    return torch.randn((tokens, 64), generator=torch.Generator().manual_seed(seed))


def draw(
    model: ZImageModel,
    *,
    guidance: float = 0.0,
    tokens: int = 20,
    negative_tokens: int = 40,
    height: int = SIZE,
    loras: tuple[Lora | tuple[str, float], ...] = (),
) -> Any:
    """The picture as whole numbers [height, width, 3]; LoRAs may be told by their names."""
    parameters = DiffusionParameters(
        width=SIZE,
        height=height,
        steps=STEPS,
        seed=SEED,
        guidance_scale=guidance,
        shift=3.0,
        long_prompt_mode=LongPromptMode.TRUNCATE,
    )
    negative = embeddings(negative_tokens, 4) if guidance else None
    picture = model.start(parameters, embeddings(tokens), negative, named(model, *loras))
    while not picture.finished:
        model.step([picture])
    return model.decode([picture])[0].astype(int)


def named(model: ZImageModel, *loras: Lora | tuple[str, float]) -> tuple[Lora, ...]:
    """LoRAs of the shelf, as it saw their files last, by their names."""
    files = model.adapters.shelf.files
    return tuple((files[lora] if isinstance(lora, str) else lora, scale) for lora, scale in loras)


def draw_by_pipeline(pipeline: Any, *, guidance: float = 0.0, tokens: int = 20, negative_tokens: int = 40) -> Any:
    """The same picture by diffusers."""
    dtype = pipeline.transformer.dtype
    result = pipeline(
        prompt_embeds=[embeddings(tokens).to(dtype)],
        negative_prompt_embeds=[embeddings(negative_tokens, 4).to(dtype)] if guidance else None,
        width=SIZE,
        height=SIZE,
        num_inference_steps=STEPS,
        guidance_scale=guidance,
        generator=torch.Generator().manual_seed(SEED),
    )
    return np.array(result.images[0]).astype(int)


def weights(transformer: Any) -> dict[str, torch.Tensor]:
    """A copy of every weight."""
    return {name: tensor.clone() for name, tensor in transformer.state_dict().items()}


def same_weights(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Same names, same bits (of numbers: a zero's sign does not count)."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
