"""Hidden states in the form that leaves the service. A pure leaf: tensors in, bytes out."""

from services.vl.jobs import Extraction
from services.vl.model import ModelFacts
from shared.schemas.vl import EXTRACTED, STATES, Extracted
from shared.tensors import to_chunks


def tensor_answer(extraction: Extraction, facts: ModelFacts, layer: int) -> list[memoryview]:
    """Safetensors with the tensor `vl` [tokens, width] and what is told of it in the metadata, in pieces to be sent."""
    told = Extracted(
        fingerprint=facts.fingerprint,
        hidden_layer=layer,
        original_std=extraction.original_std,
        scaled_std=extraction.scaled_std,
    )
    return to_chunks({STATES: extraction.states}, {EXTRACTED: told.model_dump_json()})
