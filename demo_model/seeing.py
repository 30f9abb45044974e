"""What the demo's vision-language model makes of a picture, through transformers alone."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import torch
from PIL import Image
from torch import Tensor
from transformers import Qwen3VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from demo_model.training.text import HIDDEN_LAYER
from shared.chat import Conversation, format_prompt


class Vision:
    """The vision-language model, for hidden states of pictures. `tokenize` answers the tokens of a text."""

    def __init__(
        self,
        model: Qwen3VLForConditionalGeneration,
        processor: Qwen2VLImageProcessorPil,
        tokenize: Callable[[str], list[int]],
    ) -> None:
        self._model: Any = model.eval()
        self._processor = processor
        self._tokenize = tokenize
        self._target_std = float(self._model.config.zimage_target_std)

    @classmethod
    def load(cls, folder: Path, tokenizer: Any, device: torch.device) -> Self:
        """From a Qwen3-VL directory and a tokenizer of transformers."""
        model: Any = Qwen3VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
        return cls(
            model.to(device),
            Qwen2VLImageProcessorPil.from_pretrained(folder),
            lambda text: tokenizer(text, add_special_tokens=False).input_ids,
        )

    @torch.no_grad()
    def states(self, picture: Image.Image, *, image_tokens_only: bool = False) -> Tensor:
        """Hidden states of a picture in a user's turn, as spread as those of texts: float32 `[tokens, width]`.

        As the server's vl service does it, the turn's own tokens are among them unless `image_tokens_only`.
        """
        read = self._processor(images=[picture], return_tensors="pt")
        count = int(read["image_grid_thw"].prod()) // self._processor.merge_size**2
        prompt = f"<|vision_start|>{'<|image_pad|>' * count}<|vision_end|>"
        tokens = torch.tensor([self._tokenize(format_prompt(Conversation(prompt=prompt)))], device=self._model.device)
        of_picture = tokens == self._model.config.image_token_id
        output = self._model(
            input_ids=tokens,
            attention_mask=torch.ones_like(tokens),
            pixel_values=read["pixel_values"].to(self._model.device),
            image_grid_thw=read["image_grid_thw"].to(self._model.device),
            mm_token_type_ids=of_picture.int(),
            output_hidden_states=True,
            use_cache=False,
        )
        wanted = of_picture if image_tokens_only else torch.ones_like(of_picture)
        states: Tensor = output.hidden_states[HIDDEN_LAYER][wanted].float()
        return states * (self._target_std / states.std(correction=0))
