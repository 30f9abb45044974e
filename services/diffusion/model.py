"""DiT and VAE of a Z-Image directory: one denoising step for a group of pictures, and their decoding. Knows no queue.

A picture alone gets bit for bit what diffusers' `ZImagePipeline` computes for the same weights, embeddings, noise and
schedule; every operation below stands in the order and dtype in which the pipeline has it.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar
from weakref import WeakSet

import torch

from services.diffusion.blending import blend
from services.diffusion.cores import Cores
from services.diffusion.denoising import Denoising
from services.diffusion.fitting import fit, text_limit
from services.diffusion.footprint import Footprint
from services.diffusion.guidance import guide, guided_steps
from services.diffusion.memory import left_for_work
from services.diffusion.parts import ModelFacts, Parts
from services.diffusion.schedule import first_noise, make_scheduler
from services.diffusion.shapes import Lora, Shape, ShelfLora, padded
from shared.errors import InvalidField
from shared.schemas.diffusion import DiffusionParameters
from shared.tensors import free_memory, from_message, within_memory
from shared.wire import Header

TRAIN_STEPS = 1000  # the model sees (1000 - t) / 1000
PATCH = 2  # latent cells a side of one DiT token

T = TypeVar("T")


class ZImageModel:
    """A checkpoint at work, on the devices where its parts are. Raises UnusableModel when its weights leave no memory
    to pictures."""

    def __init__(self, parts: Parts, footprint: Footprint) -> None:
        self.parts = parts
        self._transformer, self._vae = transformer, vae = parts.transformer, parts.vae
        self._dtype: torch.dtype = transformer.dtype  # diffusers looks through every weight to tell it
        self._cell_px = 2 ** (len(vae.config.block_out_channels) - 1)  # pixels a side of one latent cell
        self._live: WeakSet[Denoising] = WeakSet()
        self.adapters = parts.adapters
        self.footprint = footprint
        self.capacity_bytes = left_for_work(parts.device, parts.weight_bytes)
        text_positions, rows, columns = transformer.config.axes_lens  # image positions count patches, from 0
        self.facts = ModelFacts(
            device=str(parts.device),
            dtype=str(self._dtype).removeprefix("torch."),
            text_width=transformer.config.cap_feat_dim,
            text_limit=text_limit(text_positions),
            max_width_px=columns * PATCH * self._cell_px,
            max_height_px=rows * PATCH * self._cell_px,
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
    def start(
        self,
        parameters: DiffusionParameters,
        text: torch.Tensor,
        negative: torch.Tensor | None,
        loras: tuple[Lora, ...] = (),
        references: Sequence[torch.Tensor] = (),
    ) -> Denoising:
        """Prepares a picture: its LoRAs, its noise, its schedule and its embeddings, fitted to the text limit, with
        the reference pictures' blended in.

        Raises InvalidField for a LoRA that cannot be used, and OutOfMemory.
        """
        return self._in_memory(partial(self._start, parameters, text, negative, loras, references))

    @torch.inference_mode()
    def step(self, group: Sequence[Denoising]) -> Sequence[Denoising]:
        """One denoising step for pictures of one size, with the same LoRAs, each at a step of its own.

        Answers those whose numbers overflowed. Raises OutOfMemory; then no picture of the group has changed.
        """
        self.adapters.use(group[0].loras)
        velocities, latents, finite = self._in_memory(partial(self._moved, group))
        for picture, velocity, moved in zip(group, velocities, latents, strict=True):
            picture.latents, picture.velocity = moved, velocity
            picture.step += 1
        return [picture for picture, good in zip(group, finite, strict=True) if not good]

    @torch.inference_mode()
    def decode(self, pictures: Sequence[Denoising]) -> Sequence[Any]:
        """Finished pictures of one size, each as a numpy array uint8 [height, width, 3], or None where its numbers
        overflowed. Raises OutOfMemory."""
        return within_memory(self.parts.vae_device, partial(self._decode, pictures), what="picture")

    @torch.inference_mode()
    def preview(self, picture: Denoising) -> Any:
        """What the picture looks like after its last step, as a numpy array uint8 [height / 8, width / 8, 3].

        The step's velocity points from the noise to where the model expects the picture. None without a map. Raises
        OutOfMemory.
        """
        return self._in_memory(partial(self._preview, picture))

    def rehearse(
        self, parameters: DiffusionParameters, *, tokens: int, negative_tokens: int | None = None, pictures: int = 1
    ) -> None:
        """Makes one step of pictures that nobody asked for. Raises what the forward raises."""
        text = torch.zeros(tokens, self.facts.text_width)
        negative = None if negative_tokens is None else torch.zeros(negative_tokens, self.facts.text_width)
        self.step([self.start(parameters, text, negative) for _ in range(pictures)])

    def fits(self, shapes: Sequence[Shape], free_bytes: int | None) -> bool:
        """Whether pictures of these shapes can be in the making at once, LoRAs and all."""
        loras = {lora for shape in shapes for lora, _ in shape.loras}
        if not self.adapters.fit(loras):
            return False
        return free_bytes is None or self.footprint.together(shapes) + self.adapters.bytes_of(loras) <= free_bytes

    def free_bytes(self) -> int | None:
        """What the device has for pictures and their LoRAs while none is in the making, None where that cannot be told.

        LoRAs that are there could be taken off it; weights that come only for the work are not there yet.
        """
        free = free_memory(self.parts.device)
        if free is None or self.capacity_bytes is None:
            return free
        return min(free + self.adapters.loaded_bytes, self.capacity_bytes)

    def make_room(self, shapes: Sequence[Shape], free_bytes: int | None) -> None:
        """Takes LoRAs off the device that leave too little of it for pictures of these shapes."""
        if free_bytes is not None:
            wanted = {lora for shape in shapes for lora, _ in shape.loras}
            self.adapters.keep_within(free_bytes - self.footprint.together(shapes), wanted)

    def drop_idle_loras(self) -> None:
        """Takes every LoRA off the device that no picture in the making has."""
        self.adapters.keep_within(0, self._loras_in_use())

    def check_device(self) -> None:
        """A little work, waited for: raises what the driver says when the device is lost, OutOfMemory when it has no
        room even for that."""
        self._in_memory(lambda: torch.ones(1, device=self.parts.device).sum().item())

    def _start(
        self,
        parameters: DiffusionParameters,
        text: torch.Tensor,
        negative: torch.Tensor | None,
        loras: tuple[Lora, ...],
        references: Sequence[torch.Tensor],
    ) -> Denoising:
        loras = self.adapters.load(loras, in_use=self._loras_in_use())
        device = self.parts.device
        rows, columns = (PATCH * (side // (PATCH * self._cell_px)) for side in (parameters.height, parameters.width))
        noise = first_noise(parameters.seed, channels=self._transformer.config.in_channels, height=rows, width=columns)
        scheduler = make_scheduler(
            self.parts.scheduler_config,
            steps=parameters.steps,
            shift=parameters.shift,
            image_tokens=(rows // PATCH) * (columns // PATCH),
            device=device,
        )
        picture = Denoising(
            parameters=parameters,
            latents=noise.to(device),
            text=self._condition(text, parameters, references),
            negative=None if negative is None else self._condition(negative, parameters),
            scheduler=scheduler,
            guided=guided_steps(scheduler.timesteps, parameters.cfg_truncation),
            loras=loras,
        )
        if self.parts.before_picture is not None:
            self._check_comparable(picture)
            self.parts.before_picture(parameters.steps)
        self._live.add(picture)
        return picture

    def _loras_in_use(self) -> set[ShelfLora]:
        return {lora for picture in self._live for lora, _ in picture.loras}

    def _check_comparable(self, picture: Denoising) -> None:
        """Raises InvalidField for a picture whose forwards cannot be compared with each other, one step's with the
        next one's."""
        negative = picture.negative
        if negative is None:
            return
        if not all(picture.guided):
            raise InvalidField("'cfg_truncation' must be 1 here: this server skips blocks by comparing steps.")
        if not self.parts.takes_masks and padded(len(negative)) != padded(len(picture.text)):
            raise InvalidField(
                "'guidance_scale' must be 0 for these texts: this server skips blocks by comparing steps, and its "
                "attention kernels take texts of unlike length one after the other."
            )

    def _moved(
        self, group: Sequence[Denoising]
    ) -> tuple[Sequence[torch.Tensor], Sequence[torch.Tensor], Sequence[bool]]:
        """Velocity and new latents of each, and whether these are finite. Fails for all or for none: then the
        schedulers are where they were."""
        velocities = self.parts.cores.each(self._velocities, group)
        try:
            latents = [
                picture.scheduler.step(
                    velocity, picture.scheduler.timesteps[picture.step], picture.latents, return_dict=False
                )[0]
                for picture, velocity in zip(group, velocities, strict=True)
            ]
            return velocities, latents, torch.stack([torch.isfinite(one).all() for one in latents]).tolist()
        except RuntimeError:
            for picture in group:
                picture.scheduler._step_index = picture.step  # has no way back of its own
            raise

    def _decode(self, pictures: Sequence[Denoising]) -> Sequence[Any]:
        cores = self.parts.cores if self.parts.vae_device.type == "cpu" else Cores(1)
        images = torch.stack(cores.each(self._images, pictures))
        finite = torch.isfinite(images).flatten(1).all(1).tolist()
        pixels = (images * 0.5 + 0.5).clamp(0, 1).float()
        arrays = (pixels * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu().numpy()
        return [array if good else None for array, good in zip(arrays, finite, strict=True)]

    def _preview(self, picture: Denoising) -> Any:
        if self.parts.preview is None or picture.velocity is None:
            return None
        expected = picture.latents - picture.scheduler.sigmas[picture.step] * picture.velocity
        return self.parts.preview.draw(expected)

    def _images(self, pictures: Sequence[Denoising]) -> Sequence[torch.Tensor]:
        """What the VAE makes of them, each [3, height, width], about -1 to 1."""
        config = self._vae.config
        latents = torch.stack([picture.latents for picture in pictures])
        latents = latents.to(device=self.parts.vae_device, dtype=self._vae.dtype)
        latents = (latents / config.scaling_factor) + config.shift_factor
        self._vae.use_tiling = pictures[0].shape.pixels > self.footprint.tiled_above
        images: torch.Tensor = self._vae.decode(latents, return_dict=False)[0]
        return list(images)

    def _velocities(self, group: Sequence[Denoising]) -> list[torch.Tensor]:
        """Where each picture moves, float32 [channels, height, width]."""
        guided = [picture for picture in group if picture.guides]
        latents = [picture.latents.to(self._dtype).unsqueeze(1) for picture in (*group, *guided)]
        captions = [picture.text for picture in group] + [p.negative for p in guided if p.negative is not None]
        times = [picture.scheduler.timesteps[picture.step] for picture in (*group, *guided)]
        outputs = self._predict(latents, (TRAIN_STEPS - torch.stack(times)) / TRAIN_STEPS, captions)
        negatives = iter(outputs[len(group) :])
        velocities = []
        for picture, output in zip(group, outputs, strict=False):
            prediction = output.float()
            if picture.guides:
                scale, normalization = picture.parameters.guidance_scale, picture.parameters.cfg_normalization
                prediction = guide(prediction, next(negatives).float(), scale=scale, normalization=normalization)
            velocities.append(-prediction.squeeze(1))
        return velocities

    def _predict(
        self, latents: Sequence[torch.Tensor], times: torch.Tensor, captions: Sequence[torch.Tensor]
    ) -> list[torch.Tensor]:
        """The DiT's output for each item, in one forward; where its attention takes no mask, which items of unequal
        length need, in one for each length."""
        groups: defaultdict[int, list[int]] = defaultdict(list)
        for index, caption in enumerate(captions):
            groups[0 if self.parts.takes_masks else padded(len(caption))].append(index)
        outputs: dict[int, torch.Tensor] = {}
        for items in groups.values():
            chosen = [latents[i] for i in items], times[items], [captions[i] for i in items]
            outputs.update(zip(items, self._transformer(*chosen, return_dict=False)[0], strict=True))
        return [outputs[index] for index in range(len(captions))]

    def _condition(
        self, embeddings: torch.Tensor, parameters: DiffusionParameters, references: Sequence[torch.Tensor] = ()
    ) -> torch.Tensor:
        """What the DiT reads of these embeddings: made where they are, as they may be far longer than what it reads."""
        fitted = fit(embeddings, self.facts.text_limit, parameters.long_prompt_mode)
        if parameters.blending is not None:
            fitted = blend(fitted, references, parameters.blending)
        return fitted.to(self.parts.device, self._dtype)

    def _in_memory(self, work: Callable[[], T]) -> T:
        return within_memory(self.parts.device, work, what="picture")
