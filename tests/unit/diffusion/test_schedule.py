"""`services.diffusion.schedule` against diffusers' own pipeline code."""

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.z_image.pipeline_z_image import calculate_shift, get_default_z_image_sigmas, retrieve_timesteps
from hypothesis import given
from hypothesis import strategies as st

from services.diffusion.schedule import first_noise, make_scheduler

CONFIG = {
    name: value
    for name, value in FlowMatchEulerDiscreteScheduler(shift=3.0).config.items()
    if name != "_use_default_values"  # would make diffusers forget what the tests change
}
CPU = torch.device("cpu")


def make(steps: int, shift: float = 3.0, **config: object) -> FlowMatchEulerDiscreteScheduler:
    return make_scheduler({**CONFIG, **config}, steps=steps, shift=shift, image_tokens=16, device=CPU)


def pipeline_timesteps(steps: int, shift: float, image_tokens: int = 16, **config: object) -> torch.Tensor:
    """What `ZImagePipeline.__call__` does, by its own functions."""
    scheduler = FlowMatchEulerDiscreteScheduler.from_config({**CONFIG, **config}, shift=shift)
    mu = calculate_shift(
        image_tokens,
        scheduler.config.get("base_image_seq_len", 256),
        scheduler.config.get("max_image_seq_len", 4096),
        scheduler.config.get("base_shift", 0.5),
        scheduler.config.get("max_shift", 1.15),
    )
    timesteps: torch.Tensor = retrieve_timesteps(
        scheduler, steps, "cpu", sigmas=get_default_z_image_sigmas(steps), mu=mu
    )[0]
    return timesteps


@pytest.mark.parametrize("steps", [1, 2, 4, 8, 9, 50, 100])
@pytest.mark.parametrize("shift", [3.0, 1.0, 0.5, 6.5, 100.0])
def test_timesteps_are_the_pipelines(steps: int, shift: float) -> None:
    scheduler = make(steps, shift)
    assert torch.equal(scheduler.timesteps, pipeline_timesteps(steps, shift))
    assert scheduler.timesteps.shape == (steps,)
    assert scheduler.timesteps[0] == 1000
    assert scheduler.sigmas[-1] == 0


@given(st.integers(1, 100), st.floats(0.05, 100))
def test_sigmas_are_shifted_by_the_formula(steps: int, shift: float) -> None:
    sigmas = np.linspace(1.0, 1 / steps, steps)
    expected = shift * sigmas / (1 + (shift - 1) * sigmas)
    scheduler = make(steps, shift)
    np.testing.assert_allclose(scheduler.sigmas[:-1].numpy(), expected, rtol=1e-5)
    assert bool((scheduler.timesteps.diff() < 0).all())


def test_a_schedule_that_shifts_by_size() -> None:
    dynamic = {"use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15}
    config = {**CONFIG, **dynamic}
    small = make_scheduler(config, steps=4, shift=3.0, image_tokens=256, device=CPU).timesteps
    large = make_scheduler(config, steps=4, shift=3.0, image_tokens=4096, device=CPU).timesteps
    assert not torch.equal(small, large)
    assert torch.equal(small, pipeline_timesteps(4, 3.0, 256, **dynamic))
    assert torch.equal(large, pipeline_timesteps(4, 3.0, 4096, **dynamic))


def test_schedulers_do_not_share_anything() -> None:
    first, second = make(4, 3.0), make(9, 1.0)
    alone = make(4, 3.0)
    latents, velocity = torch.zeros(16, 2, 2), torch.ones(16, 2, 2)
    expected = alone.step(velocity, alone.timesteps[0], latents, return_dict=False)[0]
    for step in range(9):
        second.step(velocity, second.timesteps[step], latents, return_dict=False)
    assert torch.equal(first.step(velocity, first.timesteps[0], latents, return_dict=False)[0], expected)
    assert (len(first.timesteps), len(second.timesteps)) == (4, 9)
    assert torch.equal(make(4, 3.0).timesteps, alone.timesteps)


def test_the_configuration_is_not_changed() -> None:
    config = dict(CONFIG)
    make_scheduler(config, steps=2, shift=7.0, image_tokens=16, device=CPU)
    assert config == CONFIG
    assert config["shift"] == 3.0


@given(st.integers(0, 2**63 - 1))
def test_noise_is_that_of_the_pipelines_generator(seed: int) -> None:
    noise = first_noise(seed, channels=16, height=4, width=6)
    expected = torch.randn((1, 16, 4, 6), generator=torch.Generator("cpu").manual_seed(seed))
    assert noise.shape == (16, 4, 6)
    assert noise.dtype == torch.float32
    assert torch.equal(noise, expected[0])


def test_a_seed_means_the_same_noise_and_another_another() -> None:
    draw = [first_noise(seed, channels=16, height=8, width=8) for seed in (0, 0, 1, 2**63 - 1)]
    assert torch.equal(draw[0], draw[1])
    assert not torch.equal(draw[0], draw[2])
    assert not torch.equal(draw[2], draw[3])


def test_the_global_generator_is_left_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first_noise(1, channels=16, height=4, width=4)
    assert torch.equal(torch.rand(3), expected)
