"""The picture that comes out of the server is the one that diffusers' own pipeline makes."""

import io
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline
from PIL import Image
from safetensors.torch import load
from servers import Running

from shared.wire import MEDIA_TYPE

pytestmark = pytest.mark.slow
PROMPT = "A cat sleeping under a tree, orange fur"
UNCONDITIONAL = "<|im_start|>user\n<|im_end|>\n<|im_start|>assistant\n"


def embeddings(server: Running, *texts: str) -> list[torch.Tensor]:
    """What the server's encoder makes of texts, each alone."""
    made = []
    with server.service_client("encoder") as encoder:
        for text in texts:
            body = {"input": [text], "layer": -2}
            answer = encoder.post("/v1/hidden_states", json=body, headers={"accept": MEDIA_TYPE})
            made.append(load(answer.content)["hidden_states.0"])
    return made


@pytest.fixture(scope="module")
def pipeline(tiny_checkpoint: Path) -> Any:
    """diffusers' pipeline on the server's checkpoint."""
    pipeline = ZImagePipeline.from_pretrained(tiny_checkpoint, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.parametrize(
    "fields",
    [
        {"width": 128, "height": 128, "steps": 4, "guidance_scale": 0.0, "shift": 3.0},
        {"width": 160, "height": 96, "steps": 3, "guidance_scale": 2.5, "shift": 3.0},
        {"width": 64, "height": 96, "steps": 5, "guidance_scale": 0.0, "shift": 1.5},
    ],
)
def test_equals_the_pipeline(server: Running, client: httpx2.Client, pipeline: Any, fields: dict[str, Any]) -> None:
    body = {"prompt": PROMPT, "seed": 7, **fields}
    client.post("/api/generate", json={**body, "steps": 1, "guidance_scale": 0.0})  # else two texts may share a forward
    answer = client.post("/api/generate", json=body)
    assert answer.status_code == 200, answer.text
    formatted = client.post("/api/format-prompt", json={"prompt": PROMPT}).json()["formatted_prompt"]
    guided = fields["guidance_scale"] > 0
    texts = [formatted, UNCONDITIONAL] if guided else [formatted]
    text, *negative = embeddings(server, *texts)
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler.from_config(pipeline.scheduler.config, shift=fields["shift"])
    expected = pipeline(
        prompt_embeds=[text],
        negative_prompt_embeds=negative if guided else None,
        width=fields["width"],
        height=fields["height"],
        num_inference_steps=fields["steps"],
        guidance_scale=fields["guidance_scale"],
        generator=torch.Generator("cpu").manual_seed(7),
    ).images[0]
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(answer.content))), np.asarray(expected))
