"""`ZImageModel` against diffusers' `ZImagePipeline`: alone bit for bit, in a group within rounding."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import forget_weights
from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
from fakes import TEXT_WIDTH, embeddings, parameters

from services.diffusion.denoising import Denoising
from services.diffusion.loading import load_zimage
from services.diffusion.model import ZImageModel
from services.diffusion.settings import DiffusionSettings
from services.encoder.model import TextEncoder
from shared.chat import Conversation, format_prompt
from shared.checkpoint import UnusableModel
from shared.errors import InvalidField, OutOfMemory
from shared.schemas.diffusion import DiffusionParameters
from shared.schemas.fields import LongPromptMode
from shared.tensors import to_chunks
from shared.wire import parse_header


def load(path: Path) -> ZImageModel:
    return load_zimage(DiffusionSettings(model_path=path, dit_device="cpu", vae_device="cpu"))


@pytest.fixture(scope="module")
def bf16_model(tiny_checkpoint_bf16: Path) -> ZImageModel:
    return load(tiny_checkpoint_bf16)


@pytest.fixture(scope="module")
def pipelines(tiny_checkpoint: Path, tiny_checkpoint_bf16: Path) -> dict[str, Any]:
    loaded = {
        "float32": ZImagePipeline.from_pretrained(tiny_checkpoint, dtype=torch.float32),
        "bfloat16": ZImagePipeline.from_pretrained(tiny_checkpoint_bf16, dtype=torch.bfloat16),
    }
    for pipeline in loaded.values():
        pipeline.set_progress_bar_config(disable=True)
    return loaded


@pytest.fixture(params=["float32", "bfloat16"])
def model(request: pytest.FixtureRequest) -> ZImageModel:
    model: ZImageModel = request.getfixturevalue("zimage_model" if request.param == "float32" else "bf16_model")
    assert model.facts.dtype == request.param
    return model


def with_parts(model: ZImageModel, **parts: Any) -> ZImageModel:
    """The same model with other parts."""
    return ZImageModel(replace(model.parts, **parts), replace(model.footprint))


def finish(model: ZImageModel, picture: Denoising) -> Denoising:
    while not picture.finished:
        model.step([picture])
    return picture


def ask_pipeline(pipeline: Any, wanted: DiffusionParameters, output_type: str, **prompt: Any) -> Any:
    """What diffusers draws; its scheduler is made anew, as another shift needs it."""
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler.from_config(pipeline.scheduler.config, shift=wanted.shift)
    return pipeline(
        height=wanted.height,
        width=wanted.width,
        num_inference_steps=wanted.steps,
        guidance_scale=wanted.guidance_scale,
        cfg_normalization=wanted.cfg_normalization,
        cfg_truncation=wanted.cfg_truncation,
        generator=torch.Generator("cpu").manual_seed(wanted.seed),
        output_type=output_type,
        **prompt,
    ).images


CASES = {
    "square": {},
    "one step": {"steps": 1},
    "nine steps": {"steps": 9},
    "wide": {"width": 96},
    "high": {"height": 112, "width": 48},
    "smallest": {"width": 16, "height": 16, "steps": 2},
    "shift 1": {"shift": 1.0},
    "shift 6.5": {"shift": 6.5},
    "guided": {"guidance_scale": 4.5},
    "guided, shortened": {"guidance_scale": 4.5, "cfg_normalization": 1.0},
    "guided, shortened more": {"guidance_scale": 2.0, "cfg_normalization": 0.4},
    "guided to the half": {"guidance_scale": 4.5, "cfg_truncation": 0.5, "steps": 9},
    "guided at the start, shortened": {
        "guidance_scale": 4.5,
        "cfg_truncation": 0.01,
        "cfg_normalization": 0.8,
        "steps": 5,
    },
    "guided a little, wide, one step": {"guidance_scale": 0.3, "width": 96, "steps": 1},
    "largest seed": {"seed": 2**63 - 1},
}


@pytest.mark.parametrize("fields", CASES.values(), ids=CASES.keys())
def test_alone_it_is_the_pipeline_bit_for_bit(
    model: ZImageModel, pipelines: dict[str, Any], fields: dict[str, Any]
) -> None:
    wanted = parameters(**fields)
    dtype = getattr(torch, model.facts.dtype)
    text, negative = embeddings(20, dtype=dtype), embeddings(5, seed=2, dtype=dtype)
    guided = wanted.guidance_scale > 0
    picture = finish(model, model.start(wanted, text, negative if guided else None))
    prompt = {"prompt_embeds": [text], "negative_prompt_embeds": [negative] if guided else None}
    pipeline = pipelines[model.facts.dtype]
    latents = ask_pipeline(pipeline, wanted, "latent", **prompt)[0]
    assert picture.latents.dtype == latents.dtype == torch.float32
    assert torch.equal(picture.latents, latents)
    expected = np.asarray(ask_pipeline(pipeline, wanted, "pil", **prompt)[0])
    pixels = model.decode([picture])[0]
    assert pixels.dtype == np.uint8
    assert pixels.shape == (wanted.height, wanted.width, 3)
    assert np.array_equal(pixels, expected)
    assert len(np.unique(pixels)) > 10  # a picture, not one grey


@pytest.mark.parametrize("tokens", [1, 31, 32, 33, 64, 100, 200])
def test_texts_of_any_length(zimage_model: ZImageModel, pipelines: dict[str, Any], tokens: int) -> None:
    wanted, text = parameters(steps=2), embeddings(tokens)
    picture = finish(zimage_model, zimage_model.start(wanted, text, None))
    latents = ask_pipeline(pipelines["float32"], wanted, "latent", prompt_embeds=[text])[0]
    assert torch.equal(picture.latents, latents)


@pytest.mark.parametrize("guidance_scale", [0.0, 3.0])
def test_from_the_prompt_on_it_is_the_pipelines_picture(
    zimage_model: ZImageModel, text_encoder: TextEncoder, pipelines: dict[str, Any], guidance_scale: float
) -> None:
    """The pipeline pads the text to 512 tokens before it encodes, which our encoder leaves out: it rounds otherwise."""
    wanted = parameters(width=96, guidance_scale=guidance_scale)
    texts = [format_prompt(Conversation(prompt=prompt)) for prompt in ("A cat sleeping in the sun", "")]
    text, negative = (text_encoder.hidden_states(text_encoder.tokenize([item]), -2)[0] for item in texts)
    picture = finish(zimage_model, zimage_model.start(wanted, text, negative if guidance_scale else None))
    expected = ask_pipeline(pipelines["float32"], wanted, "pil", prompt="A cat sleeping in the sun")[0]
    difference = np.abs(zimage_model.decode([picture])[0].astype(int) - np.asarray(expected).astype(int))
    assert np.percentile(difference, 99.9) <= 2


def test_another_prompt_or_seed_makes_another_picture(zimage_model: ZImageModel) -> None:
    pictures = [
        finish(zimage_model, zimage_model.start(parameters(seed=seed), embeddings(20, seed=text), None)).latents
        for seed, text in ((1, 1), (2, 1), (1, 2), (1, 1))
    ]
    assert not torch.equal(pictures[0], pictures[1])
    assert not torch.equal(pictures[0], pictures[2])
    assert torch.equal(pictures[0], pictures[3])


def group(model: ZImageModel, *, guided: bool = False, same_length: bool = True) -> list[Denoising]:
    """Three pictures of one size, each with its own seed, schedule and progress."""
    lengths = (20, 20, 20) if same_length else (20, 50, 9)
    fields = ({"seed": 1, "steps": 4}, {"seed": 2, "steps": 6, "shift": 1.5}, {"seed": 3, "steps": 3})
    pictures = [
        model.start(
            parameters(width=96, guidance_scale=2.5 * guided, **own),
            embeddings(length, seed=length + index),
            embeddings(7, seed=70 + index) if guided else None,
        )
        for index, (own, length) in enumerate(zip(fields, lengths, strict=True))
    ]
    model.step([pictures[1]])
    model.step([pictures[1]])
    model.step([pictures[2]])
    return pictures


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("same_length", [True, False])
def test_a_group_equals_each_alone_within_rounding(
    zimage_model: ZImageModel, *, guided: bool, same_length: bool
) -> None:
    together = group(zimage_model, guided=guided, same_length=same_length)
    alone = group(zimage_model, guided=guided, same_length=same_length)
    for _ in range(2):
        zimage_model.step(together)
        for picture in alone:
            zimage_model.step([picture])
    assert [picture.step for picture in together] == [2, 4, 3]
    for one, other in zip(together, alone, strict=True):
        torch.testing.assert_close(one.latents, other.latents, rtol=1e-5, atol=1e-5)
        assert one.step == other.step
        finish(zimage_model, one)
        finish(zimage_model, other)
        torch.testing.assert_close(one.latents, other.latents, rtol=1e-5, atol=1e-5)


def test_pictures_come_and_go_between_steps(zimage_model: ZImageModel) -> None:
    first, second = (zimage_model.start(parameters(seed=seed), embeddings(20), None) for seed in (1, 2))
    zimage_model.step([first])
    zimage_model.step([first, second])
    zimage_model.step([second, first])
    zimage_model.step([second])
    zimage_model.step([first])
    assert (first.step, second.step) == (4, 3)
    alone = finish(zimage_model, zimage_model.start(parameters(seed=1), embeddings(20), None))
    torch.testing.assert_close(first.latents, alone.latents, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", list(LongPromptMode))
def test_a_text_beyond_the_limit_is_fitted(zimage_model: ZImageModel, mode: LongPromptMode) -> None:
    limit = zimage_model.facts.text_limit
    assert limit == 1504
    picture = zimage_model.start(parameters(steps=1, long_prompt_mode=mode), embeddings(limit + 100), None)
    assert picture.text.shape == (limit, TEXT_WIDTH)
    zimage_model.step([picture])
    assert bool(torch.isfinite(picture.latents).all())


def test_the_longest_text_that_needs_no_fitting(zimage_model: ZImageModel, pipelines: dict[str, Any]) -> None:
    text, wanted = embeddings(1504), parameters(steps=1)
    picture = finish(zimage_model, zimage_model.start(wanted, text, None))
    assert torch.equal(picture.text, text)
    assert torch.equal(picture.latents, ask_pipeline(pipelines["float32"], wanted, "latent", prompt_embeds=[text])[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_embeddings_of_another_dtype_are_converted(zimage_model: ZImageModel, dtype: torch.dtype) -> None:
    picture = zimage_model.start(parameters(), embeddings(20, dtype=dtype), None)
    assert picture.text.dtype == torch.float32
    assert torch.equal(picture.text, embeddings(20, dtype=dtype).float())


def test_read_embeddings(zimage_model: ZImageModel) -> None:
    tensor = embeddings(3)
    message = bytearray(b"".join(to_chunks({"text": tensor})))
    assert torch.equal(zimage_model.read_embeddings(message, parse_header(message), "text"), tensor)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_embeddings_that_are_not_finite(zimage_model: ZImageModel, value: float, dtype: torch.dtype) -> None:
    tensor = embeddings(3).to(dtype)
    tensor[1, 5] = value
    message = bytearray(b"".join(to_chunks({"text": tensor})))
    with pytest.raises(InvalidField, match="'text' hold values that are not finite"):
        zimage_model.read_embeddings(message, parse_header(message), "text")


def test_latents_that_overflow_are_an_error_not_a_black_picture(zimage_model: ZImageModel) -> None:
    picture = finish(zimage_model, zimage_model.start(parameters(steps=1), embeddings(20), None))
    picture.latents = torch.full_like(picture.latents, float("nan"))
    good = finish(zimage_model, zimage_model.start(parameters(steps=1, seed=1), embeddings(20), None))
    none, pixels = zimage_model.decode([picture, good])
    assert none is None
    assert pixels.shape == (64, 64, 3)


class Starved:
    """Stands for a part on a device that is full."""

    def __init__(self, part: Any) -> None:
        self.part = part

    def __getattr__(self, name: str) -> Any:
        return getattr(self.part, name)

    def __call__(self, *_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory, a library's own text")

    decode = __call__


def test_too_little_memory_for_a_step_leaves_the_pictures_as_they_were(zimage_model: ZImageModel) -> None:
    pictures = [zimage_model.start(parameters(seed=seed), embeddings(20), None) for seed in (1, 2)]
    before = [replace(picture, latents=picture.latents.clone()) for picture in pictures]
    starved = with_parts(zimage_model, transformer=Starved(zimage_model.parts.transformer))
    with pytest.raises(OutOfMemory) as failed:
        starved.step(pictures)
    assert failed.value.retry_after_s
    assert "library" not in failed.value.detail
    for picture, old in zip(pictures, before, strict=True):
        assert picture.step == 0
        assert torch.equal(picture.latents, old.latents)
    zimage_model.step(pictures)
    assert [picture.step for picture in pictures] == [1, 1]


class StarvedScheduler:
    """Stands for a picture's scheduler, which finds the device full."""

    def __init__(self, scheduler: Any) -> None:
        self.timesteps, self.sigmas = scheduler.timesteps, scheduler.sigmas

    step = Starved.__call__


def test_a_group_steps_as_a_whole_or_not_at_all(zimage_model: ZImageModel) -> None:
    """Even where memory runs out after the forward, as the group is then tried again in halves."""
    pictures = [zimage_model.start(parameters(seed=seed), embeddings(20), None) for seed in (1, 2)]
    zimage_model.step(pictures)
    scheduler = pictures[1].scheduler
    pictures[1].scheduler = StarvedScheduler(scheduler)
    with pytest.raises(OutOfMemory):
        zimage_model.step(pictures)
    assert [picture.step for picture in pictures] == [1, 1]
    pictures[1].scheduler = scheduler
    for picture, seed in zip(pictures, (1, 2), strict=True):
        expected = finish(zimage_model, zimage_model.start(parameters(seed=seed), embeddings(20), None))
        assert torch.allclose(finish(zimage_model, picture).latents, expected.latents, atol=1e-4)


def test_too_little_memory_for_the_vae(zimage_model: ZImageModel) -> None:
    picture = finish(zimage_model, zimage_model.start(parameters(steps=1), embeddings(20), None))
    starved = with_parts(zimage_model, vae=Starved(zimage_model.parts.vae))
    with pytest.raises(OutOfMemory):
        starved.decode([picture])
    assert zimage_model.decode([picture])[0].shape == (64, 64, 3)


def test_facts(zimage_model: ZImageModel) -> None:
    facts = zimage_model.facts
    assert (facts.device, facts.dtype, facts.text_width, facts.text_limit) == ("cpu", "float32", TEXT_WIDTH, 1504)
    assert (facts.max_width_px, facts.max_height_px) == (8192, 8192)


def test_the_longest_sides_are_those_that_the_dit_has_positions_for(zimage_model: ZImageModel) -> None:
    """Whatever the text's length: image positions begin at 0 beside it."""
    config = {**zimage_model.parts.transformer.config, "axes_lens": (66, 4, 6)}
    small = with_parts(zimage_model, transformer=ZImageTransformer2DModel.from_config(config).eval())
    sides = {"height": small.facts.max_height_px, "width": small.facts.max_width_px}
    assert sides == {"height": 64, "width": 96}
    small.step([small.start(parameters(**sides), embeddings(64), None)])
    for side in sides:
        picture = small.start(parameters(**{**sides, side: sides[side] + 16}), embeddings(64), None)
        with pytest.raises(IndexError):
            small.step([picture])


def test_a_device_that_is_full_says_so(zimage_model: ZImageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    zimage_model.check_device()
    monkeypatch.setattr(torch, "ones", full)
    with pytest.raises(OutOfMemory):
        zimage_model.check_device()


def test_weights_that_leave_nothing_for_pictures(zimage_model: ZImageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.diffusion.memory.total_memory", lambda _: 8_000_000_000)
    assert with_parts(zimage_model, weight_bytes=7_999_999_999).capacity_bytes == 1
    with pytest.raises(UnusableModel, match=r"^the weights take 12.3 GB, but the device 'cpu' has 8 GB in all") as no:
        with_parts(zimage_model, weight_bytes=12_300_000_000)
    assert "\n" not in str(no.value)


def test_only_diffusions_parts_are_needed(tiny_checkpoint: Path, tmp_path: Path) -> None:
    for part in ("transformer", "vae", "scheduler"):
        shutil.copytree(tiny_checkpoint / part, tmp_path / part)
    assert load(tmp_path).facts.text_width == TEXT_WIDTH


@pytest.mark.parametrize("part", ["transformer", "vae", "scheduler"])
def test_a_directory_that_lacks_a_part(tiny_checkpoint: Path, tmp_path: Path, part: str) -> None:
    folder = Path(shutil.copytree(tiny_checkpoint, tmp_path / "model"))
    shutil.rmtree(folder / part)
    with pytest.raises(UnusableModel, match=f"'{part}' is missing"):
        load(folder)


@pytest.mark.parametrize("part", ["transformer", "vae"])
def test_pickled_or_truncated_weights_are_refused(tiny_checkpoint: Path, tmp_path: Path, part: str) -> None:
    folder = Path(shutil.copytree(tiny_checkpoint, tmp_path / "model"))
    weights = folder / part / "diffusion_pytorch_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UnusableModel, match="is truncated"):
        load(folder)
    weights.unlink()
    torch.save({"a": torch.ones(1)}, weights.with_suffix(".bin"))
    with pytest.raises(UnusableModel, match="pickled"):
        load(folder)


@pytest.mark.parametrize(("part", "lost"), [("transformer", "layers.0.feed_forward.w1"), ("vae", "decoder.conv_out")])
def test_weights_that_lack_some_are_refused(tiny_checkpoint: Path, tmp_path: Path, part: str, lost: str) -> None:
    folder = Path(shutil.copytree(tiny_checkpoint, tmp_path / "model"))
    forget_weights(folder / part, lost)
    with pytest.raises(UnusableModel, match=f"is not complete: it lacks {lost}"):
        load(folder)


def test_a_vae_that_does_not_fit_the_transformer(zimage_model: ZImageModel) -> None:
    from services.diffusion.loading import _check_fit

    class Part:
        def __init__(self, **config: int) -> None:
            self.config = type("Config", (), config)

    with pytest.raises(UnusableModel, match="16 latent channels, its VAE has 4"):
        _check_fit(Path("model"), Part(in_channels=16), Part(latent_channels=4))


def test_guidance_doubles_the_forward_and_nothing_else_does(zimage_model: ZImageModel) -> None:
    calls: list[int] = []

    class Counting(Starved):
        def __call__(self, latents: Any, *arguments: Any, **keywords: Any) -> Any:
            calls.append(len(latents))
            return self.part(latents, *arguments, **keywords)

    counting = with_parts(zimage_model, transformer=Counting(zimage_model.parts.transformer))
    finish(counting, counting.start(parameters(steps=3), embeddings(20), None))
    finish(counting, counting.start(parameters(steps=2, guidance_scale=2.0), embeddings(20), embeddings(5)))
    assert calls == [1, 1, 1, 2, 2]
