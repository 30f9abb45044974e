"""A group that is divided among the cores of a processor: the same pictures, each in its place."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import pytest
import torch
from fakes import embeddings, parameters

from services.diffusion.cores import Cores
from services.diffusion.denoising import Denoising
from services.diffusion.model import ZImageModel


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("count", [1, 2, 3, 8])
@pytest.mark.parametrize("items", [0, 1, 2, 5, 9])
def test_every_item_once_and_in_order(count: int, items: int) -> None:
    seen: list[list[int]] = []

    def work(part: Sequence[int]) -> Sequence[int]:
        seen.append(list(part))
        return [10 * one for one in part]

    assert Cores(count).each(work, list(range(items))) == [10 * one for one in range(items)]
    assert sorted(one for part in seen for one in part) == list(range(items))
    assert len(seen) == (1 if items < 2 else min(count, items))


def test_threads_are_divided_and_given_back() -> None:
    torch.set_num_threads(6)
    counts = Cores(6).each(lambda part: [torch.get_num_threads() for _ in part], [1, 2, 3])
    assert counts == [2, 2, 2]
    assert torch.get_num_threads() == 6


def test_an_error_of_one_part_is_everybodys() -> None:
    def work(part: Sequence[int]) -> Sequence[int]:
        if 3 in part:
            raise torch.OutOfMemoryError("full")
        return part

    cores = Cores(2)
    with pytest.raises(torch.OutOfMemoryError):
        cores.each(work, [1, 2, 3])
    assert cores.each(work, [1, 2]) == [1, 2]


@pytest.mark.parametrize("guidance", [0.0, 2.0])
def test_pictures_are_those_of_one_forward(zimage_model: ZImageModel, guidance: float) -> None:
    def draw(model: ZImageModel) -> list[Denoising]:
        pictures = [
            model.start(
                parameters(seed=seed, guidance_scale=guidance),
                embeddings(20, seed=seed),
                embeddings(40, seed=9) if guidance else None,
            )
            for seed in range(5)
        ]
        for _ in range(4):
            assert model.step(pictures) == []
        return pictures

    divided = ZImageModel(replace(zimage_model.parts, cores=Cores(2)), zimage_model.footprint)
    ours, theirs = draw(divided), draw(zimage_model)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one.latents, other.latents, rtol=1e-5, atol=1e-5)
    for one, other in zip(divided.decode(ours), zimage_model.decode(theirs), strict=True):
        assert abs(one.astype(int) - other.astype(int)).max() <= 1
    assert not torch.equal(ours[0].latents, ours[1].latents)
