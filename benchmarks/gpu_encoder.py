"""The text encoder of `benchmarks.gpu`, as it is and quantized."""

import copy
import statistics
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from benchmarks.gpu_report import Encoding
from benchmarks.gpu_run import (
    GIB,
    NO_TIME,
    TEXT_TOKENS,
    Run,
    allocated_bytes,
    forget,
    free,
    peak_bytes,
    seconds_of,
    told,
)
from shared.settings import Quantization
from shared.tensors import quantize

ROUNDS = 3
PIPELINE_TOKENS = 512  # what diffusers pads every prompt to; in the service a short one has `TEXT_TOKENS`


def measure_encoder(run: Run) -> None:
    """The text encoder as it is and quantized, whose states are compared with those before."""
    device, encoder = run.models.device, run.models.encoder
    run.beside_bytes = allocated_bytes(device) - sum(weight.nbytes for weight in encoder.parameters())
    states = {tokens: _encode(run, "as it is", encoder, tokens, None) for tokens in (PIPELINE_TOKENS, TEXT_TOKENS)}
    run.beside_bytes = allocated_bytes(device)
    for kind in Quantization:
        if kind is Quantization.NONE:
            continue
        what = f"encoder.quantization = {kind}"
        if run.left_s <= 0:
            run.report.leave_out(what, NO_TIME)
            continue
        with told(run, what):
            _measure_quantized(run, kind, what, states)
        free(device)


def _measure_quantized(run: Run, kind: Quantization, what: str, states: Mapping[int, torch.Tensor]) -> None:
    """A function of its own: nothing holds the copy any more when what it took is given back."""
    quantized = copy.deepcopy(run.models.encoder)
    quantize(quantized, kind, run.models.device, flag=what, wanted=_is_of_a_layer)
    for tokens, before in states.items():
        _encode(run, kind.value, quantized, tokens, before)


def _is_of_a_layer(module: nn.Module, name: str) -> bool:
    return isinstance(module, nn.Linear) and name.startswith("layers.")


@torch.inference_mode()
def _encode(run: Run, option: str, encoder: Any, tokens: int, before: torch.Tensor | None) -> torch.Tensor:
    """The hidden states of one text, [1, tokens, width]."""
    device = run.models.device
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(encoder.config.vocab_size, (1, tokens), generator=generator).to(device)
    states: torch.Tensor = encoder(input_ids=ids, use_cache=False).last_hidden_state
    forget(device)
    seconds = statistics.median(
        seconds_of(device, lambda: encoder(input_ids=ids, use_cache=False)) for _ in range(ROUNDS)
    )
    cosine = functional.cosine_similarity((states if before is None else before).float(), states.float(), dim=-1)
    run.report.add(
        Encoding(
            option=option,
            tokens=tokens,
            seconds=seconds,
            memory_gib=max(0, peak_bytes(device) - run.beside_bytes) / GIB,
            cosine=cosine.mean().item(),
        )
    )
    return states
