"""DiT and VAE of a Z-Image directory: one denoising step for a group of pictures, and their decoding. Knows no queue.

A picture alone gets bit for bit what diffusers' `ZImagePipeline` computes for the same weights, embeddings, noise and
schedule; every operation below stands in the order and dtype in which the pipeline has it.
"""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import structlog
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, ZImageTransformer2DModel

from services.diffusion.fitting import SEQUENCE_MULTIPLE, fit, text_limit
from services.diffusion.loras import fuse_loras
from services.diffusion.memory import is_offloaded, require_room, weights_dtype
from services.diffusion.optimization import compile_blocks, offload, try_compiled, use_flash_attention
from services.diffusion.schedule import first_noise, make_scheduler
from services.diffusion.settings import DiffusionSettings
from shared.checkpoint import UnusableModel, read_json, require_parts, require_weights
from shared.errors import InvalidField, NumericalError, OutOfMemory
from shared.schemas.diffusion import DiffusionParameters
from shared.schemas.fields import LongPromptMode
from shared.tensors import from_message, pick_device
from shared.wire import Header

TRAIN_STEPS = 1000  # the model sees (1000 - t) / 1000
DEVICE_ERROR = torch.AcceleratorError  # of the driver, as a CUDA assert
PATCH = 2  # latent cells a side of one DiT token
REHEARSAL = DiffusionParameters(
    width=256, height=176, steps=1, seed=0, guidance_scale=0.0, shift=3.0, long_prompt_mode=LongPromptMode.TRUNCATE
)
REHEARSAL_TOKENS = 20
"""Padded, 192 tokens of picture and 32 of text: torch.compile takes lengths for the same number that are equal here,
to each other or to a width of the DiT, and compiles again once they differ."""

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What a caller may want to know of the loaded checkpoint. `text_limit` is in tokens."""

    device: str
    dtype: str
    text_width: int
    text_limit: int


@dataclass(slots=True)
class Denoising:
    """A picture in the making. `latents` is float32 [channels, height, width]; the embeddings are [tokens, width] in
    the DiT's dtype; `step` counts the steps that are done."""

    parameters: DiffusionParameters
    latents: torch.Tensor
    text: torch.Tensor
    negative: torch.Tensor | None
    scheduler: Any
    step: int = field(default=0)

    @property
    def finished(self) -> bool:
        """All steps are done."""
        return self.step >= self.parameters.steps

    @property
    def guided(self) -> bool:
        """Guidance is on, which takes two forwards' worth of work a step."""
        return self.negative is not None


class ZImageModel:
    """The transformer, the VAE and the scheduler's configuration, each on its device."""

    def __init__(
        self, transformer: Any, vae: Any, scheduler_config: dict[str, Any], *, takes_masks: bool = True
    ) -> None:
        self._transformer, self._vae = transformer, vae
        self._takes_masks = takes_masks
        self._scheduler_config = scheduler_config
        self._cell_px = 2 ** (len(vae.config.block_out_channels) - 1)  # pixels a side of one latent cell
        self.facts = ModelFacts(
            device=str(transformer.device),
            dtype=str(transformer.dtype).removeprefix("torch."),
            text_width=transformer.config.cap_feat_dim,
            text_limit=text_limit(transformer.config.axes_lens[0]),
        )

    def read_embeddings(self, message: bytearray, header: Header, name: str) -> torch.Tensor:
        """The embeddings of that name, [tokens, width] as they came, sharing the message's memory.

        Raises InvalidField when they hold values that are not numbers.
        """
        embeddings = from_message(message, header, name)
        if not bool(torch.isfinite(embeddings).all()):
            raise InvalidField(f"The embeddings '{name}' hold values that are not finite numbers.")
        return embeddings

    @torch.inference_mode()
    def start(self, parameters: DiffusionParameters, text: torch.Tensor, negative: torch.Tensor | None) -> Denoising:
        """Prepares a picture: its noise, its schedule and its embeddings, fitted to the text limit."""
        device = self._transformer.device
        rows, columns = (PATCH * (side // (PATCH * self._cell_px)) for side in (parameters.height, parameters.width))
        noise = first_noise(parameters.seed, channels=self._transformer.config.in_channels, height=rows, width=columns)
        scheduler = make_scheduler(
            self._scheduler_config,
            steps=parameters.steps,
            shift=parameters.shift,
            image_tokens=(rows // PATCH) * (columns // PATCH),
            device=device,
        )
        return Denoising(
            parameters=parameters,
            latents=noise.to(device),
            text=self._condition(text, parameters),
            negative=None if negative is None else self._condition(negative, parameters),
            scheduler=scheduler,
        )

    @torch.inference_mode()
    def step(self, group: Sequence[Denoising]) -> None:
        """One denoising step for pictures of one size and the same guidance on/off, each at a step of its own.

        Raises OutOfMemory; then no picture of the group has changed.
        """
        guided = [picture for picture in group if picture.guided]
        latents = [picture.latents.to(self._transformer.dtype).unsqueeze(1) for picture in (*group, *guided)]
        captions = [picture.text for picture in group] + [p.negative for p in guided if p.negative is not None]
        times = [picture.scheduler.timesteps[picture.step] for picture in (*group, *guided)]
        outputs = self._predict(latents, (TRAIN_STEPS - torch.stack(times)) / TRAIN_STEPS, captions)
        negatives = iter(outputs[len(group) :])
        for picture, output in zip(group, outputs, strict=False):
            prediction = output.float()
            if picture.guided:
                prediction = prediction + picture.parameters.guidance_scale * (prediction - next(negatives).float())
            velocity = -prediction.squeeze(1)
            timestep = picture.scheduler.timesteps[picture.step]
            picture.latents = picture.scheduler.step(velocity, timestep, picture.latents, return_dict=False)[0]
            picture.step += 1

    @torch.inference_mode()
    def decode(self, picture: Denoising) -> Any:
        """The finished picture as a numpy array uint8 [height, width, 3]. Raises NumericalError, OutOfMemory."""
        config = self._vae.config
        latents = picture.latents.unsqueeze(0).to(device=self._vae.device, dtype=self._vae.dtype)
        latents = (latents / config.scaling_factor) + config.shift_factor
        try:
            image = self._vae.decode(latents, return_dict=False)[0]
        except torch.OutOfMemoryError:
            self._free_cache()
            raise OutOfMemory("The device has too little free memory for this picture.", retry_after_s=10) from None
        if not bool(torch.isfinite(image).all()):
            raise NumericalError("The model's numbers overflowed while it drew; try another seed or float32 weights.")
        pixels = (image[0] * 0.5 + 0.5).clamp(0, 1).float()
        return (pixels * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous().cpu().numpy()

    def rehearse(self) -> None:
        """Makes one step of a picture that nobody asked for. Raises what the forward raises."""
        text = torch.zeros(REHEARSAL_TOKENS, self.facts.text_width)
        self.step([self.start(REHEARSAL, text, None)])

    def _predict(
        self, latents: Sequence[torch.Tensor], times: torch.Tensor, captions: Sequence[torch.Tensor]
    ) -> list[torch.Tensor]:
        """The DiT's output for each item, in one forward; where its attention takes no mask, which items of unequal
        length need, in one for each length."""
        groups: defaultdict[int, list[int]] = defaultdict(list)
        for index, caption in enumerate(captions):
            groups[0 if self._takes_masks else math.ceil(len(caption) / SEQUENCE_MULTIPLE)].append(index)
        outputs: dict[int, torch.Tensor] = {}
        try:
            for items in groups.values():
                chosen = [latents[i] for i in items], times[items], [captions[i] for i in items]
                outputs.update(zip(items, self._transformer(*chosen, return_dict=False)[0], strict=True))
        except torch.OutOfMemoryError:
            self._free_cache()
            raise OutOfMemory("The device has too little free memory for this picture.", retry_after_s=10) from None
        return [outputs[index] for index in range(len(captions))]

    def _condition(self, embeddings: torch.Tensor, parameters: DiffusionParameters) -> torch.Tensor:
        fitted = fit(embeddings.to(self._transformer.device), self.facts.text_limit, parameters.long_prompt_mode)
        return fitted.to(self._transformer.dtype)

    def _free_cache(self) -> None:
        if self._transformer.device.type == "cuda":
            torch.cuda.empty_cache()


def load_zimage(settings: DiffusionSettings) -> ZImageModel:
    """Loads `transformer`, `vae` and `scheduler` of the model directory. Raises UnusableModel."""
    root = require_parts(settings.model_path, "transformer", "vae", "scheduler")
    scheduler_config = read_json(root / "scheduler" / "scheduler_config.json")
    device = pick_device(settings.dit_device)
    require_room(root, settings, device)
    transformer = _load(ZImageTransformer2DModel, root / "transformer", settings)
    vae = _load(AutoencoderKL, root / "vae", settings).to(pick_device(settings.vae_device))
    _check_fit(root, transformer, vae)
    _prepare(transformer, settings, device)
    model = ZImageModel(
        transformer,
        vae,
        dict(FlowMatchEulerDiscreteScheduler.from_config(scheduler_config).config),
        takes_masks=not settings.flash_attn,
    )
    if settings.compile:
        try_compiled(model.rehearse)
    log.info("diffusion model loaded", model_path=str(root), vae_device=str(vae.device), **_logged(model.facts))
    return model


def _prepare(transformer: Any, settings: DiffusionSettings, device: torch.device) -> None:
    """Puts the DiT where it belongs and makes of it what the options ask for."""
    offloaded = is_offloaded(settings, device)
    if settings.cpu_offload and not offloaded:
        log.warning("--cpu-offload changes nothing: the DiT runs on the CPU already")
    if not offloaded:
        transformer.to(device)
    fuse_loras(transformer, settings.loras)
    if settings.flash_attn:
        use_flash_attention(transformer, device)
    if offloaded:
        offload(transformer, device)
    if settings.compile:
        compile_blocks(transformer, device)


def _load(kind: Any, folder: Path, settings: DiffusionSettings) -> Any:
    require_weights(folder)
    dtype = weights_dtype(folder, settings)
    loaded = kind.from_pretrained(folder, dtype=dtype, use_safetensors=True, local_files_only=True)
    return loaded.eval().requires_grad_(requires_grad=False)


def _check_fit(root: Path, transformer: Any, vae: Any) -> None:
    if transformer.config.in_channels != vae.config.latent_channels:
        raise UnusableModel(
            f"{root} is not a Z-Image model: its transformer reads {transformer.config.in_channels} latent channels, "
            f"its VAE has {vae.config.latent_channels}"
        )


def _logged(facts: ModelFacts) -> dict[str, Any]:
    return {"device": facts.device, "dtype": facts.dtype, "text_limit": facts.text_limit}
