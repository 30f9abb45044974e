"""The attention kernels that diffusers knows: which of them this machine can use."""

from collections.abc import Sequence
from typing import Any

from services.diffusion.kernels import KERNELS, Kernels
from services.diffusion.option_settings import Attention
from zimage.doctor.libraries import try_import
from zimage.doctor.row import Row, lacking, note, ok

DISPATCH = "diffusers.models.attention_dispatch"
_LABELS = {Attention.CUDNN: "cuDNN", Attention.FLASH_3: "flash 3"}


def attention_rows(capability: tuple[int, int] | None, *, wanted: Sequence[str] = ()) -> list[Row]:
    """A row for each kind; `capability` is that of the CUDA device, None without one; of the `wanted` ones, by
    diffusers' names, one must be usable.

    diffusers checks the packages itself, but not the device: kernels that do not fit it fail at the first step.
    """
    dispatch = try_import(DISPATCH)
    if isinstance(dispatch, str):
        return [note("attention", f"not looked at: diffusers cannot be imported ({dispatch})")]
    lacks = {kind: _lack(kernels, dispatch, capability) for kind, kernels in KERNELS.items()}
    asked = [kind for kind, kernels in KERNELS.items() if set(kernels.names) & set(wanted)]
    unusable = bool(asked) and all(lacks[kind] is not None for kind in asked)
    return [
        ok(_what(kind), "usable")
        if found is None
        else lacking(_what(kind), *found, needed=unusable and kind is asked[0])
        for kind, found in lacks.items()
    ]


def _what(kind: Attention) -> str:
    return f"attention {_LABELS.get(kind, kind.value)}"


def _lack(kernels: Kernels, dispatch: Any, capability: tuple[int, int] | None) -> tuple[str, str] | None:
    """What is in the way of kernels, and what to do; None where nothing is."""
    try:
        dispatch._check_attention_backend_requirements(dispatch.AttentionBackendName(kernels.names[0]))
    except RuntimeError:
        return "its package is missing or too old", kernels.install
    except (AttributeError, ValueError):
        return "this release of diffusers does not know it", ""
    if kernels.capability is None or (capability is not None and capability >= kernels.capability):
        return None
    needed = ".".join(map(str, kernels.capability))
    return f"it needs a CUDA device of compute capability {needed} or newer", ""
