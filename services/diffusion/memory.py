"""Where the weights of DiT and VAE are kept, in which dtype, and whether they fit there. Loads nothing."""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from services.diffusion.option_settings import OffloadMode
from services.diffusion.settings import DiffusionSettings
from shared.checkpoint import UnusableModel, checkpoint_dtype
from shared.settings import Quantization
from shared.tensors import CPU, bytes_of, dtype_of, loaded_bytes, pick_device, require_memory, total_memory

NAMES = {"transformer": "the DiT", "vae": "the VAE"}


def is_offloaded(settings: DiffusionSettings, device: torch.device) -> bool:
    """The DiT computes on `device`, but its weights stay in main memory."""
    return settings.cpu_offload and device.type != "cpu"


def weights_dtype(folder: Path, settings: DiffusionSettings) -> torch.dtype:
    """The dtype that the weights of that folder are loaded in: by the device on which they compute."""
    device = pick_device(settings.vae_device if folder.name == "vae" else settings.dit_device)
    return dtype_of(settings.diffusion_dtype, checkpoint_dtype(folder), device)


def part_bytes(folder: Path, settings: DiffusionSettings) -> int:
    """Bytes of the weights of that folder once they are loaded."""
    quantization = settings.quantization if folder.name == "transformer" else Quantization.NONE
    return loaded_bytes(folder, weights_dtype(folder, settings), quantization)


def require_room(root: Path, settings: DiffusionSettings, device: torch.device) -> None:
    """Raises UnusableModel when the weights do not fit where they are to be; the DiT computes on `device`.

    What is offloaded as a whole must fit into main memory, and the largest part of it on the device.
    """
    sizes = {part: part_bytes(root / part, settings) for part in NAMES}
    vae_device = pick_device(settings.vae_device)
    offloaded = _offloaded_parts(settings, device, vae_device)
    places: defaultdict[torch.device, list[str]] = defaultdict(list)
    for part, place in (("transformer", device), ("vae", vae_device)):
        places[CPU if part in offloaded else place].append(part)
    needs = [*places.items()]
    if offloaded and settings.offload_mode is OffloadMode.MODEL:
        needs.append((device, [max(offloaded, key=sizes.__getitem__)]))
    for place, parts in needs:
        require_memory(
            place,
            sum(sizes[part] for part in parts),
            what=f"{' and '.join(NAMES[part] for part in parts)} of {root}",
            advice=_advice(settings, place),
        )


def left_for_work(device: torch.device, weights: int) -> int | None:
    """Bytes that so many bytes of weights leave of the device, None where that cannot be told. Raises UnusableModel
    when they leave nothing."""
    total = total_memory(device)
    if total is None:
        return None
    if weights >= total:
        raise UnusableModel(
            f"the weights take {weights / 1e9:.3g} GB, but the device '{device}' has {total / 1e9:.3g} GB in all: "
            "nothing is left for pictures; choose --quantization or --cpu-offload, or another device with --dit-device"
        )
    return total - weights


def resident_bytes(transformer: Any, vae: Any, settings: DiffusionSettings, device: torch.device) -> int:
    """Bytes of weights that lie on the DiT's device while it computes: all, or of blocks that come and go nearly none.

    Of a whole DiT that is offloaded, DiT and VAE lie there in turns.
    """
    weights = {part: sum(map(bytes_of, part.parameters())) for part in (transformer, vae)}
    if is_offloaded(settings, device):
        return max(weights.values()) if settings.offload_mode is OffloadMode.MODEL else weights[vae]
    there = [part for part in (transformer, vae) if part.device.type == device.type]
    return sum(weights[part] for part in there)


def _offloaded_parts(settings: DiffusionSettings, device: torch.device, vae_device: torch.device) -> Sequence[str]:
    """Parts whose weights wait in main memory: as a whole, a VAE on the DiT's device comes and goes too."""
    if not is_offloaded(settings, device):
        return []
    in_turns = settings.offload_mode is OffloadMode.MODEL and vae_device.type == device.type
    return ["transformer", "vae"] if in_turns else ["transformer"]


def _advice(settings: DiffusionSettings, place: torch.device) -> str:
    other = "choose other devices with --dit-device and --vae-device"
    if place.type != "cpu" and settings.cpu_offload and settings.offload_mode is OffloadMode.MODEL:
        return f"free some of it, set optimization.offload_mode to 'group', or {other}"
    if place.type == "cpu" or settings.cpu_offload:
        return f"free some of it, or {other}"
    if settings.quantization is not Quantization.NONE:
        return f"free some of it, choose --cpu-offload instead of --quantization, or {other}"
    return f"free some of it, halve it with --quantization, keep the DiT in main memory with --cpu-offload, or {other}"
