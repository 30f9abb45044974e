"""Previews: a linear map from latents to colours, found with one example."""

import numpy as np
import torch
from fakes import embeddings, parameters
from torch.nn import functional

from services.diffusion.model import ZImageModel
from services.diffusion.preview import example_picture, fit_preview


def test_a_linear_decoder_is_found() -> None:
    generator = torch.Generator().manual_seed(0)
    weights, offset = 0.1 * torch.randn((3, 16), generator=generator), torch.tensor([0.1, -0.2, 0.0])
    latents = torch.randn((16, 32, 32), generator=generator)
    colours = torch.einsum("co,ohw->chw", weights, latents) + offset[:, None, None]
    found = fit_preview(latents, functional.interpolate(colours[None], scale_factor=8, mode="nearest")[0])
    assert torch.allclose(found.weights, torch.cat([weights, offset[:, None]], dim=1), atol=1e-4)
    other = torch.randn((16, 4, 6), generator=generator)
    expected = (torch.einsum("co,ohw->chw", weights, other) + offset[:, None, None]) * 0.5 + 0.5
    drawn = found.draw(other)
    assert drawn.dtype == np.uint8
    assert drawn.shape == (4, 6, 3)
    assert np.abs(drawn - (expected.clamp(0, 1) * 255).permute(1, 2, 0).numpy()).max() <= 1


def test_channels_that_say_nothing_do_not_matter() -> None:
    latents = torch.zeros((16, 8, 8))
    latents[0] = torch.linspace(-1, 1, 64).reshape(8, 8)
    pixels = functional.interpolate(latents[:1].repeat(3, 1, 1)[None], scale_factor=8, mode="nearest")[0]
    assert torch.isfinite(fit_preview(latents, pixels).weights).all()


def test_the_example_is_always_the_same_and_full_of_colours() -> None:
    picture = example_picture()
    assert torch.equal(picture, example_picture())
    assert picture.shape == (3, 256, 256)
    assert picture.abs().max() <= 1
    assert picture.flatten(1).std(1).min() > 0.2


@torch.inference_mode()
def test_of_another_picture_it_is_nearer_than_one_grey(zimage_model: ZImageModel) -> None:
    vae, preview = zimage_model.parts.vae, zimage_model.parts.preview
    assert preview is not None
    latents = vae.encode(-example_picture().flip(-1)[None]).latent_dist.mode()
    pixels = (vae.decode(latents, return_dict=False)[0][0] * 0.5 + 0.5).clamp(0, 1) * 255
    small = functional.avg_pool2d(pixels, 8).permute(1, 2, 0).numpy()
    drawn = preview.draw((latents[0] - vae.config.shift_factor) * vae.config.scaling_factor).astype(float)
    assert np.abs(drawn - small).mean() < 0.7 * np.abs(small - small.mean((0, 1))).mean()


def test_it_needs_a_step_and_is_an_eighth_of_the_size(zimage_model: ZImageModel) -> None:
    picture = zimage_model.start(parameters(width=128, height=96), embeddings(20), None)
    assert zimage_model.preview(picture) is None
    zimage_model.step([picture])
    assert zimage_model.preview(picture).shape == (12, 16, 3)
