"""The attention back ends of diffusers: which of them this machine can use."""

from dataclasses import dataclass
from typing import Any

from zimage.doctor.libraries import try_import
from zimage.doctor.row import Row, lacking, note, ok

DISPATCH = "diffusers.models.attention_dispatch"


@dataclass(frozen=True, slots=True)
class Backend:
    """A back end: our word for it, its member of `AttentionBackendName`, and the compute capability that it needs."""

    what: str
    member: str
    capability: tuple[int, int] | None = None


BACKENDS = (
    Backend("attention native", "NATIVE"),
    Backend("attention cuDNN", "_NATIVE_CUDNN", (8, 0)),
    Backend("attention flash", "FLASH", (8, 0)),
    Backend("attention flash 3", "_FLASH_3", (9, 0)),
    Backend("attention sage", "SAGE", (8, 0)),
)


def attention_rows(capability: tuple[int, int] | None, *, flash_needed: bool) -> list[Row]:
    """A row for each back end; `capability` is that of the CUDA device, None without one.

    diffusers checks the packages itself, but not the device: a back end that does not fit it fails at the first step.
    """
    dispatch = try_import(DISPATCH)
    if isinstance(dispatch, str):
        return [note("attention", f"not looked at: diffusers cannot be imported ({dispatch})")]
    lacks = {backend: _lack(backend, dispatch, capability) for backend in BACKENDS}
    no_flash = not any(found is None for backend, found in lacks.items() if "flash" in backend.what)
    return [
        ok(backend.what, "usable")
        if found is None
        else lacking(backend.what, *found, needed=flash_needed and no_flash and backend.member == "FLASH")
        for backend, found in lacks.items()
    ]


def _lack(backend: Backend, dispatch: Any, capability: tuple[int, int] | None) -> tuple[str, str] | None:
    """What is in the way of a back end, and what to do; None where nothing is."""
    try:
        dispatch._check_attention_backend_requirements(dispatch.AttentionBackendName[backend.member])
    except RuntimeError as error:
        todo = str(error).partition(". Please ")[2].rstrip(".").replace("`", "")
        return "its package is missing or too old", todo
    except (AttributeError, KeyError):
        return "this release of diffusers does not know it", ""
    if backend.capability is None or (capability is not None and capability >= backend.capability):
        return None
    wanted = ".".join(map(str, backend.capability))
    return f"it needs a CUDA device of compute capability {wanted} or newer", ""
