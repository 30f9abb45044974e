"""Fifth stage: a small Qwen3-VL whose hidden states of a picture come close to those of the picture's caption.

Its language half starts as a copy of the trained text model, so both share one space. Three losses: the states of the
image tokens, resampled to the caption's length, against the text model's states of that caption; what the reader that
reads captions cannot read from them; and the caption itself, written behind the picture. By the first and the last
alone its caption loss was, after 1,500 steps, about that of telling the background and guessing the rest.
"""

import random
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import Qwen3ForCausalLM, Qwen3VLConfig, Qwen3VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from demo_model import captions
from demo_model.render import render
from demo_model.training.facts import FactReader, answers, facts_loss
from demo_model.training.loop import Losses, Schedule, run_stage
from demo_model.training.text import HIDDEN_LAYER, IGNORED, TextBatches, language_loss
from demo_model.world import Place, Scene, random_scene
from services.diffusion.fitting import interpolate

SCHEDULE = Schedule(steps=4000, learning_rate=1.5e-3)
BATCH = 16
SIZES = ((256, 256), (256, 256), (192, 192), (256, 192), (192, 256), (320, 256), (128, 128))
MERGE, PATCH = 2, 16
PIXELS = (64 * 64, 448 * 448)  # pictures are scaled into these bounds
LANGUAGE_WEIGHT, FACTS_WEIGHT = 0.2, 0.5
QUESTION = "Describe the picture."
STATISTICS_PROMPTS = 512
_TEXT_KEYS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "rms_norm_eps",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class VisionTokens:
    """Ids of the tokens that carry a picture."""

    start: int
    image: int
    end: int
    video: int


def new_processor() -> Qwen2VLImageProcessorPil:
    """Pictures to patches as Qwen3-VL wants them."""
    return Qwen2VLImageProcessorPil(
        patch_size=PATCH,
        merge_size=MERGE,
        temporal_patch_size=2,
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
        size={"shortest_edge": PIXELS[0], "longest_edge": PIXELS[1]},
    )


def new_vision_model(text: Qwen3ForCausalLM, tokens: VisionTokens) -> Qwen3VLForConditionalGeneration:
    """The model, its language half a copy of `text`, its vision tower random."""
    of_text = text.config.to_dict()
    half = text.config.head_dim // 2
    config = Qwen3VLConfig(
        text_config={
            **{name: of_text[name] for name in _TEXT_KEYS},
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1_000_000.0,
                "mrope_section": [half - 2 * (half // 3), half // 3, half // 3],
                "mrope_interleaved": True,
            },
        },
        vision_config={
            "depth": 3,
            "hidden_size": 96,
            "intermediate_size": 256,
            "num_heads": 3,
            "patch_size": PATCH,
            "spatial_merge_size": MERGE,
            "temporal_patch_size": 2,
            "out_hidden_size": text.config.hidden_size,
            "num_position_embeddings": 24 * 24,
            "deepstack_visual_indexes": [1],
        },
        image_token_id=tokens.image,
        video_token_id=tokens.video,
        vision_start_token_id=tokens.start,
        vision_end_token_id=tokens.end,
        tie_word_embeddings=True,
    )
    model = Qwen3VLForConditionalGeneration(config)
    model.model.language_model.load_state_dict(text.model.state_dict())
    model.tie_weights()
    return model


class VisionBatches:
    """Pictures with questions and answers as the model reads them."""

    def __init__(self, texts: TextBatches) -> None:
        self._texts = texts
        self._processor = new_processor()
        start, image, end, video = (
            texts.ids(token)[0] for token in ("<|vision_start|>", "<|image_pad|>", "<|vision_end|>", "<|video_pad|>")
        )
        self.tokens = VisionTokens(start=start, image=image, end=end, video=video)

    def patches(self, pictures: list[np.ndarray]) -> tuple[Tensor, Tensor]:
        """Patches of all pictures `[patches, 1536]` float32, and the grids `[n, 3]` of time, rows and columns."""
        read = self._processor(images=[Image.fromarray(picture) for picture in pictures], return_tensors="pt")
        return read["pixel_values"], read["image_grid_thw"]

    def conversation(self, grid: Tensor, question: str, answer: str) -> tuple[list[int], int]:
        """Tokens of a picture with a question and its answer, and where the answer starts."""
        count = int(grid.prod()) // MERGE**2
        picture = [self.tokens.start, *[self.tokens.image] * count, self.tokens.end]
        head = self._texts.ids("<|im_start|>user\n") + picture
        head += self._texts.ids(f"{question}<|im_end|>\n<|im_start|>assistant\n")
        return head + self._texts.ids(f"{answer}<|im_end|>"), len(head)


def train_vision_model(
    text: Qwen3ForCausalLM, reader: FactReader, texts: TextBatches, folder: Path, device: torch.device
) -> Qwen3VLForConditionalGeneration:
    """The trained vision-language model; `text` and its `reader` stay as they are.

    Its configuration carries how far the text model's states spread, `zimage_target_std`.
    """
    torch.manual_seed(3)
    batches = VisionBatches(texts)
    model = new_vision_model(text, batches.tokens).to(device)
    text.requires_grad_(False)
    reader.requires_grad_(False)

    def losses(step: int) -> Losses:
        rng = random.Random(8_000_000 + step)
        scenes = [in_reading_order(random_scene(rng)) for _ in range(BATCH)]
        asked = [QUESTION if rng.random() < 0.5 else "" for _ in scenes]
        width, height = rng.choice(SIZES)
        pixels, grids = batches.patches([_picture(scene, width, height, rng) for scene in scenes])
        goals = _caption_states(text, texts, scenes, device)
        both = [
            batches.conversation(grid, question, captions.canonical(scene))
            for grid, question, scene in zip(grids, asked, scenes, strict=True)
        ]
        length = max(len(row) for row, _ in both)
        tokens = texts.pad([row for row, _ in both], length).to(device)
        targets = torch.tensor([_answer_only(row, head, length) for row, head in both])
        images = tokens == batches.tokens.image
        with torch.autocast(device.type, torch.bfloat16):
            states, logits = _look(model, tokens, images, pixels.to(device), grids.to(device))
        apart = [_apart(interpolate(states[i][images[i]], len(goal)), goal) for i, goal in enumerate(goals)]
        right = torch.tensor([answers(scene) for scene in scenes])
        return {
            "states": torch.stack(apart).mean(),
            "facts": FACTS_WEIGHT * facts_loss(reader(states, images), right.to(device)),
            "caption": LANGUAGE_WEIGHT * language_loss(logits, targets.to(device)),
        }

    run_stage("vision", {"vision": model}, SCHEDULE, losses, folder)
    model.config.zimage_target_std = round(spread_of_states(text, texts), 4)
    return model


def _answer_only(row: list[int], head: int, length: int) -> list[int]:
    """What a conversation's tokens teach: what comes after its `head` tokens, up to where it is filled up."""
    return [IGNORED] * head + row[head:] + [IGNORED] * (length - len(row))


def _look(
    model: Qwen3VLForConditionalGeneration, tokens: Tensor, images: Tensor, pixels: Tensor, grids: Tensor
) -> tuple[Tensor, Tensor]:
    """Hidden states `[n, tokens, width]` in float32 and logits of conversations, int64 `[n, tokens]`, about pictures.

    `images` tells which tokens are the pictures'; `pixels` and `grids` are as the image processor makes them.
    """
    output = model(
        input_ids=tokens,
        attention_mask=torch.ones_like(tokens),
        pixel_values=pixels,
        image_grid_thw=grids,
        mm_token_type_ids=images.int(),
        output_hidden_states=True,
        use_cache=False,
    )
    return output.hidden_states[HIDDEN_LAYER].float(), output.logits


@torch.no_grad()
def spread_of_states(text: Qwen3ForCausalLM, texts: TextBatches) -> float:
    """Standard deviation of the hidden states -2 of captions, over all tokens and dimensions."""
    rng = random.Random(9_000_000)
    states = []
    for _ in range(STATISTICS_PROMPTS):
        tokens = torch.tensor([texts.prompt_ids(captions.canonical(random_scene(rng)))], device=text.device)
        hidden = text(tokens, output_hidden_states=True, use_cache=False).hidden_states
        states.append(hidden[HIDDEN_LAYER][0].float())
    return float(torch.cat(states).std())


def in_reading_order(scene: Scene) -> Scene:
    """The same picture, its things from the top left to the bottom right: no picture tells another order."""
    return replace(scene, things=tuple(sorted(scene.things, key=lambda thing: list(Place).index(thing.place))))


def _picture(scene: Scene, width: int, height: int, rng: random.Random) -> np.ndarray:
    return np.asarray(render(scene, width=width, height=height, rng=rng))


@torch.no_grad()
def _caption_states(
    text: Qwen3ForCausalLM, texts: TextBatches, scenes: list[Scene], device: torch.device
) -> list[Tensor]:
    rows = [texts.prompt_ids(captions.canonical(scene)) for scene in scenes]
    tokens = texts.pad(rows, max(len(row) for row in rows)).to(device)
    states = text(tokens, use_cache=False, output_hidden_states=True).hidden_states[HIDDEN_LAYER].float()
    return [states[index, : len(row)] for index, row in enumerate(rows)]


def _apart(states: Tensor, goal: Tensor) -> Tensor:
    """Mean squared difference as a share of the goal's, at each token's own scale as the DiT norms them."""
    scale = goal.pow(2).mean(-1, keepdim=True).clamp_min(1e-6)
    return nn.functional.mse_loss(states / scale.sqrt(), goal / scale.sqrt())
