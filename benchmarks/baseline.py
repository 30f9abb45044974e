"""The same pictures without the server: diffusers' `ZImagePipeline` and PIL, as a script would use them.

`python -m benchmarks.baseline MODEL` reads one JSON object a line (prompt, width, height, steps, seed) and answers one
a line with the seconds from the prompt to the PNG's bytes, of which `encode_s` were the text's.
"""

import io
import json
import sys
import time
from collections.abc import Mapping
from typing import Any

import torch
from diffusers import ZImagePipeline

PNG_LEVEL = 1  # the server's, as the level decides the time


class Script:
    """The pipeline, loaded in the checkpoint's own dtype."""

    def __init__(self, model: str) -> None:
        self._pipeline = ZImagePipeline.from_pretrained(model, dtype=torch.bfloat16, local_files_only=True)
        self._pipeline.set_progress_bar_config(disable=True)
        self._encode, self._encode_s = self._pipeline.encode_prompt, 0.0
        self._pipeline.encode_prompt = self._timed_encode

    def draw(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Makes a picture."""
        started = time.perf_counter()
        image = self._pipeline(
            prompt=request["prompt"],
            width=request["width"],
            height=request["height"],
            num_inference_steps=request["steps"],
            guidance_scale=0.0,
            generator=torch.Generator("cpu").manual_seed(request["seed"]),
        ).images[0]
        drawn = time.perf_counter()
        buffer = io.BytesIO()
        image.save(buffer, "PNG", compress_level=PNG_LEVEL)
        ended = time.perf_counter()
        return {
            "seconds": ended - started,
            "encode_s": self._encode_s,
            "png_s": ended - drawn,
            "size": image.size,
            "png_bytes": len(buffer.getvalue()),
        }

    def _timed_encode(self, *args: Any, **kwargs: Any) -> Any:
        started = time.perf_counter()
        encoded = self._encode(*args, **kwargs)
        self._encode_s = time.perf_counter() - started
        return encoded


def main() -> None:
    """Loads, says so, and draws until the input ends."""
    script = Script(sys.argv[1])
    print(json.dumps({"threads": torch.get_num_threads(), "torch": torch.__version__}), flush=True)
    for line in sys.stdin:
        print(json.dumps(script.draw(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
