"""Loads DiT and VAE of a Z-Image directory and makes of them what the options ask for. Knows no request."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import structlog
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, ZImageTransformer2DModel

from services.diffusion.adapters import Adapters
from services.diffusion.calibration import footprint_of, read_measured
from services.diffusion.cores import Cores
from services.diffusion.loras import check_file, fuse_loras
from services.diffusion.memory import is_offloaded, require_room, resident_bytes, weights_dtype
from services.diffusion.model import ZImageModel
from services.diffusion.optimization import (
    cache_blocks,
    compile_blocks,
    flags_to_try,
    offload,
    prepare_vae,
    quantize_blocks,
    rehearsals,
    set_attention,
    try_options,
)
from services.diffusion.option_settings import Attention
from services.diffusion.order import Limits
from services.diffusion.parts import ModelFacts, Parts
from services.diffusion.preview import PreviewMap, example_picture, fit_preview
from services.diffusion.settings import DiffusionSettings
from services.diffusion.shelf import Shelf, default_files
from shared.checkpoint import UnusableModel, read_json, require_every_weight, require_parts, require_weights
from shared.errors import InvalidField, OutOfMemory
from shared.fingerprint import fingerprint_of, fingerprint_of_files
from shared.settings import Quantization
from shared.tensors import pick_device

CPU_BATCH_TOKENS = 2560
BATCH_TOKENS = {"cuda": 8192, "mps": 4096}
"""Tokens beyond which a larger forward is no quicker than two: two pictures of 1024x1024 take twice as long as one."""

log = structlog.get_logger(__name__)


def limits_of(settings: DiffusionSettings) -> Limits:
    """How many pictures are made, and how many together. A cache over steps holds for one picture at a time."""
    tokens = settings.diffusion_max_batch_tokens
    if not tokens:
        with suppress(UnusableModel):  # a device that is not there is told when the model is loaded
            tokens = BATCH_TOKENS.get(pick_device(settings.dit_device).type, 0)
    return Limits(
        running=1 if settings.cache_dit else settings.diffusion_max_running,
        batch=1 if settings.cache_dit else settings.diffusion_max_batch,
        batch_tokens=tokens or CPU_BATCH_TOKENS,
        decode_pixels=settings.vae_batch_pixels,
    )


def load_zimage(settings: DiffusionSettings) -> ZImageModel:
    """Loads `transformer`, `vae` and `scheduler` of the model directory. Raises UnusableModel."""
    root = require_parts(settings.model_folder, *settings.parts)
    scheduler_config = read_json(root / "scheduler" / "scheduler_config.json")
    _check_loras(settings)
    require_room(root, settings, pick_device(settings.dit_device))
    transformer = _load(ZImageTransformer2DModel, root / "transformer", settings)
    vae = _load(AutoencoderKL, root / "vae", settings)
    _check_fit(root, transformer, vae)
    model = assemble(transformer, vae, scheduler_config, settings)
    fingerprint = _fingerprint(root, settings, model.facts.dtype)
    model.facts = replace(model.facts, name=root.resolve().name, fingerprint=fingerprint)
    log.info("diffusion model loaded", model_path=str(root), vae_device=str(vae.device), **_logged(model.facts))
    return model


def assemble(
    transformer: Any, vae: Any, scheduler_config: Mapping[str, Any], settings: DiffusionSettings
) -> ZImageModel:
    """A model of these parts, which are put where the settings have them and made what the options ask for. It draws
    first with options that may not work here or are to be compiled. Raises UnusableModel."""
    device, vae_device = pick_device(settings.dit_device), pick_device(settings.vae_device)
    vae.to(vae_device)
    prepare_vae(vae, settings)
    preview = _fit_preview(vae)
    takes_masks = _prepare(transformer, settings, device)
    if is_offloaded(settings, device):
        offload(transformer, vae, device, settings.offload_mode)
    if settings.compile:
        compile_blocks(transformer, device)
    before_picture = cache_blocks(transformer) if settings.cache_dit else None
    parts = Parts(
        transformer=transformer,
        vae=vae,
        device=device,
        vae_device=vae_device,
        weight_bytes=resident_bytes(transformer, vae, settings, device),
        scheduler_config=dict(FlowMatchEulerDiscreteScheduler.from_config(scheduler_config).config),
        adapters=_adapters(transformer, settings),
        takes_masks=takes_masks,
        preview=preview,
        before_picture=before_picture,
        cores=Cores(_cores(settings, device)),
    )
    model = ZImageModel(parts, footprint_of(transformer, vae, settings, read_measured(settings)))
    room = settings.diffusion_memory_bytes or model.capacity_bytes
    if room is not None:
        model.footprint.tile_within(room)
    flags = flags_to_try(settings)
    if flags:
        try_options(lambda: _rehearse(model, settings, flags), flags)
    return model


def _check_loras(settings: DiffusionSettings) -> None:
    """Raises UnusableModel for LoRAs that are not there or not whole, before gigabytes of weights are read."""
    if settings.lora_dir is not None and not settings.lora_dir.is_dir():
        raise UnusableModel(f"the folder of LoRAs {settings.lora_dir} does not exist: name another with --lora-dir")
    for lora in settings.loras:
        check_file(lora.path)


def _fingerprint(root: Path, settings: DiffusionSettings, dtype: str) -> str:
    """Of the checkpoint, and of what else changes pictures by more than rounding."""
    loras = [(fingerprint_of_files([lora.path]), lora.scale) for lora in settings.loras]
    attention = settings.attention.value if settings.attention is Attention.SAGE else ""  # which rounds to 8 bits
    options = f"{dtype} {settings.quantization.value} {settings.cache_dit} {attention} {loras}"
    return fingerprint_of([root / part for part in settings.parts], options)


def _rehearse(model: ZImageModel, settings: DiffusionSettings, flags: Sequence[str]) -> None:
    drawn = rehearsals(settings, limits_of(settings).batch_of, takes_masks=model.parts.takes_masks)
    for rehearsal in drawn:
        size = f"{rehearsal.parameters.width}x{rehearsal.parameters.height}"
        try:
            model.rehearse(
                rehearsal.parameters,
                tokens=rehearsal.tokens,
                negative_tokens=rehearsal.negative_tokens,
                pictures=rehearsal.pictures,
            )
        except OutOfMemory:
            hint = "leave that size out of optimization.compile_sizes, or " if settings.compile else "leave out "
            raise UnusableModel(
                f"the device has too little free memory to try {' with '.join(flags)} on {rehearsal.pictures} pictures "
                f"of {size}: {hint}{flags[-1]}"
            ) from None


def _prepare(transformer: Any, settings: DiffusionSettings, device: torch.device) -> bool:
    """Puts the DiT where it belongs and makes of it what the options ask for; answers whether it takes masks."""
    offloaded = is_offloaded(settings, device)
    if settings.cpu_offload and not offloaded:
        log.warning("--cpu-offload changes nothing: the DiT runs on the CPU already")
    if not offloaded and settings.quantization is Quantization.NONE:
        transformer.to(device)
    fuse_loras(transformer, default_files(settings))
    takes_masks = set_attention(transformer, settings, device)
    quantize_blocks(transformer, settings, device)  # brings it to the device, where as it is it may not fit
    return takes_masks


def _adapters(transformer: Any, settings: DiffusionSettings) -> Adapters:
    """The LoRAs that requests may choose, those of the flags loaded already where there is a folder of them."""
    adapters = Adapters(transformer, Shelf(settings), settings.lora_max_bytes)
    try:
        adapters.load(adapters.choose(None))
    except InvalidField as error:
        raise UnusableModel(error.detail.rstrip(".")) from None
    return adapters


@torch.inference_mode()
def _fit_preview(vae: Any) -> PreviewMap | None:
    """How the VAE's latents look, found with an example that it encodes and decodes; None where that fails."""
    picture = example_picture().to(vae.device, vae.dtype)[None]
    latents = vae.encode(picture).latent_dist.mode()
    pixels = vae.decode(latents, return_dict=False)[0]
    if not bool(torch.isfinite(pixels).all()):
        log.warning("there will be no previews: the VAE makes no finite numbers of the example picture")
        return None
    return fit_preview((latents[0] - vae.config.shift_factor) * vae.config.scaling_factor, pixels[0])


def _load(kind: Any, folder: Path, settings: DiffusionSettings) -> Any:
    require_weights(folder)
    dtype = weights_dtype(folder, settings)
    loaded, loading = kind.from_pretrained(
        folder, dtype=dtype, use_safetensors=True, local_files_only=True, output_loading_info=True
    )
    require_every_weight(folder, loading["missing_keys"])
    return loaded.eval().requires_grad_(requires_grad=False)


def _cores(settings: DiffusionSettings, device: torch.device) -> int:
    """Threads among which a group is divided: the processor's, for compiled code and other devices one."""
    return torch.get_num_threads() if device.type == "cpu" and not settings.compile else 1


def _check_fit(root: Path, transformer: Any, vae: Any) -> None:
    if transformer.config.in_channels != vae.config.latent_channels:
        raise UnusableModel(
            f"{root} is not a Z-Image model: its transformer reads {transformer.config.in_channels} latent channels, "
            f"its VAE has {vae.config.latent_channels}"
        )


def _logged(facts: ModelFacts) -> dict[str, Any]:
    return {"device": facts.device, "dtype": facts.dtype, "text_limit": facts.text_limit}
