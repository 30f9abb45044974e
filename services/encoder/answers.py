"""Hidden states in the two forms that leave the encoder. A pure leaf: tensors in, bytes out."""

import base64
import json
from collections.abc import Sequence
from typing import Any

import torch

from services.encoder.engine import Encoded
from services.encoder.model import ModelFacts
from shared.schemas.encoder import FINGERPRINT, HiddenStatesRequest
from shared.tensors import data_of, to_chunks


def tensor_answer(encoded: Sequence[Encoded], facts: ModelFacts, layer: int) -> list[memoryview]:
    """Safetensors with `hidden_states.<i>` [tokens, width] for text i, in the model's dtype, in pieces to be sent."""
    tensors = {f"hidden_states.{index}": item.states for index, item in enumerate(encoded)}
    return to_chunks(tensors, {"model": facts.name, "layer": str(layer), FINGERPRINT: facts.fingerprint})


def json_answers(encoded: Sequence[Encoded], facts: ModelFacts, request: HiddenStatesRequest) -> bytes:
    """The JSON form: one object where one text was asked for, else a list. Numbers are float32."""
    answers = [_json_answer(item.states, facts, request) for item in encoded]
    return json.dumps(answers[0] if isinstance(request.input, str) else answers, separators=(",", ":")).encode()


def _json_answer(states: torch.Tensor, facts: ModelFacts, request: HiddenStatesRequest) -> dict[str, Any]:
    numbers = states.to(torch.float32)
    as_base64 = request.encoding_format == "base64"
    return {
        "hidden_states": base64.b64encode(data_of(numbers.contiguous())).decode() if as_base64 else numbers.tolist(),
        "shape": list(states.shape),
        "model": facts.name,
        "layer": request.layer,
        "dtype": facts.dtype,
        "encoding_format": request.encoding_format,
    }
