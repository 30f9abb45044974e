"""Brings the spread of hidden states to that of the text encoder's. Pure functions from tensors to tensors."""

from dataclasses import dataclass

import torch

from shared.errors import NumericalError


@dataclass(frozen=True, slots=True)
class Scaled:
    """Hidden states [tokens, width], and their standard deviation over all numbers before and after."""

    states: torch.Tensor
    original_std: float
    scaled_std: float


def scale(states: torch.Tensor, target_std: float | None) -> Scaled:
    """Multiplies [tokens, width] so that its standard deviation is `target_std`; None leaves the states as they are.

    The factor is applied in float32, the dtype stays. Raises NumericalError for states that are not finite.
    """
    numbers = states.to(torch.float32)
    original = numbers.std(correction=0).item()
    if not bool(torch.isfinite(numbers).all()):
        raise NumericalError("The vision-language model made values that are not numbers of this picture.")
    if target_std is None or original == 0:
        return Scaled(states, original, original)
    scaled = (numbers * (target_std / original)).to(states.dtype)
    return Scaled(scaled, original, scaled.to(torch.float32).std(correction=0).item())
