"""The same texts without the server: transformers' `generate`, one after another, as a script would use it.

`python -m benchmarks.texts MODEL` reads one JSON object a line (messages, max_tokens) and answers one a line with the
seconds from the conversation to its text, and how many tokens that has.
"""

import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, Qwen3ForCausalLM


class Script:
    """The language model of a Z-Image directory, loaded in the checkpoint's own dtype."""

    def __init__(self, model: Path) -> None:
        self._model = Qwen3ForCausalLM.from_pretrained(model / "text_encoder", dtype=torch.bfloat16).eval()
        self._tokenizer = AutoTokenizer.from_pretrained(model / "tokenizer")

    def write(self, wanted: Mapping[str, Any]) -> dict[str, Any]:
        """Writes a text greedily."""
        started = time.perf_counter()
        inputs = self._tokenizer.apply_chat_template(
            wanted["messages"], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        written = self._model.generate(
            **inputs, max_new_tokens=wanted["max_tokens"], do_sample=False, eos_token_id=self._tokenizer.eos_token_id
        )[0, inputs["input_ids"].shape[1] :]
        self._tokenizer.decode(written, skip_special_tokens=True)
        return {"seconds": time.perf_counter() - started, "tokens": len(written)}


def main() -> None:
    """Loads, says so, and writes until the input ends."""
    script = Script(Path(sys.argv[1]))
    print(json.dumps({"threads": torch.get_num_threads(), "torch": torch.__version__}), flush=True)
    for line in sys.stdin:
        print(json.dumps(script.write(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
