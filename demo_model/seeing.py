"""What the demo's vision-language model makes of a picture, through transformers alone."""

from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import Qwen3VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from demo_model.training.text import HIDDEN_LAYER
from shared.chat import Conversation, format_prompt


class Vision:
    """The vision-language model, for hidden states of pictures."""

    def __init__(self, folder: Path, tokenizer: Any, device: torch.device) -> None:
        self._model: Any = (
            Qwen3VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).to(device).eval()
        )
        self._processor = Qwen2VLImageProcessorPil.from_pretrained(folder)
        self._tokenizer = tokenizer
        self._device = device
        self.target_std = float(self._model.config.zimage_target_std)

    @torch.no_grad()
    def states(self, picture: Image.Image) -> Tensor:
        """Hidden states of a picture's tokens, float32 `[tokens, width]`."""
        read = self._processor(images=[picture], return_tensors="pt")
        count = int(read["image_grid_thw"].prod()) // self._processor.merge_size**2
        prompt = f"<|vision_start|>{'<|image_pad|>' * count}<|vision_end|>"
        text = format_prompt(Conversation(prompt=prompt))
        tokens = self._tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids.to(self._device)
        of_picture = tokens == self._model.config.image_token_id
        output = self._model(
            input_ids=tokens,
            attention_mask=torch.ones_like(tokens),
            pixel_values=read["pixel_values"].to(self._device),
            image_grid_thw=read["image_grid_thw"].to(self._device),
            mm_token_type_ids=of_picture.int(),
            output_hidden_states=True,
            use_cache=False,
        )
        states: Tensor = output.hidden_states[HIDDEN_LAYER][of_picture].float()
        return states
