"""How much memory pictures take: the formula against what is measured, what is kept of it, and what follows from it."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from fakes import embeddings, parameters

from services.diffusion import calibration
from services.diffusion.calibration import key_of, measure, peak_bytes, read_measured, write_measured
from services.diffusion.footprint import MARGIN, Footprint, Measured
from services.diffusion.loading import load_zimage
from services.diffusion.model import ZImageModel
from services.diffusion.settings import DiffusionSettings
from services.diffusion.shapes import Shape, padded

PLAIN = Footprint(width=256, text_width=128, item_bytes=2, vae_width=64, vae_item_bytes=2, tiling_pixels=10**9)
SMALL = Shape(height=64, width=64, text_tokens=32)


def settings(checkpoint: Path, data_dir: Path, **fields: Any) -> DiffusionSettings:
    return DiffusionSettings(model_path=checkpoint, data_dir=data_dir, dit_device="cpu", vae_device="cpu", **fields)


class TestMeasured:
    """What steps and decodings really take, counted by torch."""

    def test_the_profiler_counts_what_is_held_at_once(self) -> None:
        def work() -> None:
            first = torch.zeros(1000)
            second = first + 1
            del first
            _ = second * 2

        assert 8_000 <= peak_bytes("cpu", work) <= 8_000 + 1_000

    @pytest.mark.filterwarnings("ignore")
    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    @pytest.mark.parametrize("fields", [{}, {"width": 256, "height": 192}, {"guidance_scale": 2.0}])
    @pytest.mark.parametrize("pictures", [1, 3])
    def test_the_formula_is_never_too_low(
        self, request: pytest.FixtureRequest, dtype: str, fields: dict[str, Any], pictures: int, tmp_path: Path
    ) -> None:
        name = "tiny_checkpoint" if dtype == "float32" else "tiny_checkpoint_bf16"
        model = load_zimage(settings(request.getfixturevalue(name), tmp_path))
        negative = embeddings(40) if fields.get("guidance_scale") else None
        group = [model.start(parameters(seed=seed, **fields), embeddings(20), negative) for seed in range(pictures)]
        shape = group[0].shape
        step = peak_bytes("cpu", partial(model.step, group))
        assert (
            0.3 * model.footprint.step(pictures * shape.tokens) < step <= model.footprint.step(pictures * shape.tokens)
        )
        decode = peak_bytes("cpu", partial(model.decode, group))
        assert 0.3 * model.footprint.decode(pictures * shape.pixels) < decode
        assert decode <= model.footprint.decode(pictures * shape.pixels)

    @pytest.mark.slow
    @pytest.mark.filterwarnings("ignore")
    def test_in_tiles_a_large_picture_takes_less(self, tiny_checkpoint: Path, tmp_path: Path) -> None:
        whole = load_zimage(settings(tiny_checkpoint, tmp_path))
        tiled = load_zimage(settings(tiny_checkpoint, tmp_path, vae_tiling_pixels=0))
        taken = []
        for model in (whole, tiled):
            picture = model.start(parameters(width=1024, height=768, steps=1), embeddings(20), None)
            taken.append(peak_bytes("cpu", partial(model.decode, [picture])))
            assert taken[-1] <= model.footprint.decode(1024 * 768)
        assert taken[1] < 0.6 * taken[0]


class TestCalibration:
    """What `zimage doctor --calibrate` measures and the service reads."""

    @pytest.mark.filterwarnings("ignore")
    def test_it_is_measured_kept_and_used(self, tiny_checkpoint: Path, tmp_path: Path) -> None:
        wanted = settings(tiny_checkpoint, tmp_path, max_pixels=256 * 256)
        model = load_zimage(wanted)
        assert model.footprint.measured == Measured()
        measured = measure(model, wanted, ("64x64", "128x128", "256x256", "512x512"))
        assert sorted(measured.decode) == [64 * 64, 128 * 128, 256 * 256]
        path = write_measured(wanted, measured)
        assert path == tmp_path / "calibration.json"
        assert read_measured(wanted) == measured
        again = load_zimage(wanted)
        assert again.footprint.measured == measured
        size = 128 * 128
        assert again.footprint.decode(size) == int(MARGIN * measured.decode[size])
        assert again.footprint.decode(size) < model.footprint.decode(size)

    @pytest.mark.slow
    def test_it_is_measured_as_configured_where_memory_is_short(self, tiny_checkpoint: Path, tmp_path: Path) -> None:
        """Else what was decoded in tiles for want of memory would be taken for what decoding it whole takes."""
        wanted = settings(tiny_checkpoint, tmp_path)
        model = load_zimage(wanted)
        plain = measure(model, wanted, ("768x768",))
        model.footprint.tile_within(0)
        assert measure(model, wanted, ("768x768",)) == plain

    def test_with_other_options_it_does_not_count(self, tiny_checkpoint: Path, tmp_path: Path) -> None:
        wanted = settings(tiny_checkpoint, tmp_path)
        write_measured(wanted, Measured({100: 1}, {200: 2}))
        for option in ({"vae_tiling_pixels": 0}, {"vae_channels_last": True}, {"offload_mode": "model"}):
            assert key_of(settings(tiny_checkpoint, tmp_path, **option)) != key_of(wanted)
        other = settings(tiny_checkpoint, tmp_path, diffusion_dtype="bfloat16")
        assert key_of(other) != key_of(wanted)
        assert read_measured(other) == Measured()
        write_measured(other, Measured({1: 1}, {1: 1}))
        assert read_measured(wanted) == Measured({100: 1}, {200: 2})

    @pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 9, "entries": {}}', '{"format": 1, "entries": []}'])
    def test_a_file_that_makes_no_sense_does_not_count(self, tiny_checkpoint: Path, tmp_path: Path, text: str) -> None:
        (tmp_path / calibration.FILE).write_text(text)
        wanted = settings(tiny_checkpoint, tmp_path)
        assert read_measured(wanted) == Measured()
        entries = {"format": 1, "entries": {key_of(wanted): {"step": {"x": 1}, "decode": 7}}}
        (tmp_path / calibration.FILE).write_text(json.dumps(entries))
        assert read_measured(wanted) == Measured()


class TestEstimates:
    """From what was measured to sizes that were not."""

    MEASURED = replace(PLAIN, measured=Measured({100: 1_000, 1_000: 20_000}, {1_000: 5_000}))

    @pytest.mark.parametrize(
        ("tokens", "expected"),
        [(100, 1_000), (1_000, 20_000), (500, 10_000), (110, 2_200), (50, 500), (2_000, 40_000), (102, 2_040)],
    )
    def test_between_and_beyond(self, tokens: int, expected: int) -> None:
        assert self.MEASURED.step(tokens) == pytest.approx(MARGIN * expected, abs=1)

    def test_more_never_takes_less(self) -> None:
        taken = [self.MEASURED.step(tokens) for tokens in range(1, 3_000, 7)]
        assert taken == sorted(taken)

    def test_after_an_error_more_is_expected(self) -> None:
        footprint, two = replace(PLAIN), [SMALL, SMALL]
        for _ in range(20):
            footprint.note_error()
        assert PLAIN.together(two) < footprint.together(two) <= 4 * PLAIN.together(two)
        assert footprint.together([SMALL]) == PLAIN.together([SMALL]), "one alone is always given a try"
        for _ in range(200):
            footprint.note_success()
        assert footprint.together(two) == PLAIN.together(two)

    def test_pictures_together(self) -> None:
        large = Shape(height=128, width=128, text_tokens=32)
        alone, twice = PLAIN.together([SMALL]), PLAIN.together([SMALL, SMALL])
        assert alone < twice < 2 * alone + PLAIN.held(SMALL)
        assert PLAIN.together([large, SMALL]) == PLAIN.together([large]) + PLAIN.held(SMALL)
        assert PLAIN.together([]) == 0

    def test_small_pictures_are_decoded_at_once(self) -> None:
        at_once = replace(PLAIN, decode_pixels=3 * SMALL.pixels)
        assert at_once.together([SMALL]) == PLAIN.together([SMALL])
        decodings = [at_once.together([SMALL] * count) - count * PLAIN.held(SMALL) for count in (2, 3)]
        assert decodings == [2 * PLAIN.decode(SMALL.pixels), 3 * PLAIN.decode(SMALL.pixels)]

    def test_the_largest_picture_that_fits(self) -> None:
        large = Shape(height=2048, width=2048, text_tokens=96)
        room = PLAIN.together([Shape(height=512, width=512, text_tokens=96)])
        most = PLAIN.most_pixels(large, room)
        assert 0.7 * 512 * 512 < most < 1.3 * 512 * 512
        assert PLAIN.most_pixels(large, 0) == 0

    @pytest.mark.parametrize("measured", [Measured(), Measured({}, {256**2: 60_000_000, 2048**2: 320_000_000})])
    def test_what_cannot_be_decoded_whole_is_decoded_in_tiles(self, measured: Measured) -> None:
        """A size is not refused while larger ones, which are tiled anyway, would fit."""
        footprint = replace(PLAIN, tiling_pixels=1024**2, measured=measured)
        room = 600_000_000
        assert footprint.decode(1024**2) > room
        footprint.tile_within(room)
        assert 0 < footprint.tiled_above < 1024**2
        assert all(footprint.decode(side * side) <= room for side in range(64, 1536, 16))
        assert footprint.decode(256**2) == replace(PLAIN, measured=measured).decode(256**2), "it is whole as before"
        footprint.tile_within(10**12)
        assert footprint.tiled_above == 1024**2

    @pytest.mark.parametrize("measured", [Measured(), Measured({}, {256**2: 60_000_000, 2048**2: 320_000_000})])
    def test_a_picture_takes_the_least_in_tiles_where_it_can_be(self, measured: Measured) -> None:
        footprint = replace(PLAIN, tiling_pixels=1024**2, measured=measured)
        for side in (64, 512, 528, 768, 1024, 1040, 2048):
            shape = Shape(height=side, width=side, text_tokens=32)
            in_tiles = replace(footprint)
            in_tiles.decode_in_tiles(shape.pixels)
            assert footprint.least(shape) == min(one.together([shape]) for one in (footprint, in_tiles))
            assert footprint.tiled_above == 1024**2
            assert footprint.most_pixels(shape, footprint.least(shape) - 1) < shape.pixels
        elsewhere = replace(footprint, decodes_here=False)
        assert elsewhere.least(shape) == elsewhere.held(shape) + elsewhere.step(shape.tokens)


class TestShapes:
    """What lets pictures share a forward."""

    def test_padding(self) -> None:
        assert [padded(tokens) for tokens in (0, 1, 32, 33)] == [0, 32, 32, 64]

    def test_tokens(self) -> None:
        assert SMALL.tokens == 32 + 32
        assert replace(SMALL, negative_tokens=64).tokens == 2 * (32 + 64)

    def test_a_pictures_shape_is_known_before_it_is_begun(self, zimage_model: ZImageModel) -> None:
        begun = zimage_model.start(parameters(guidance_scale=1.0), embeddings(33), embeddings(7))
        assert begun.shape == Shape(height=64, width=64, text_tokens=64, negative_tokens=32)

    def test_loras_that_are_not_there_yet_take_memory_too(
        self, zimage_model: ZImageModel, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Those that are there are not counted twice."""
        monkeypatch.setattr(zimage_model.adapters, "bytes_of", lambda names: 1_000 * len(set(names)))
        plain, one = SMALL, replace(SMALL, loras=(("a", 1.0),))
        room = zimage_model.footprint.together([one, plain])
        assert not zimage_model.fits([one, plain], room)
        assert zimage_model.fits([one, plain], room + 1_000)
        monkeypatch.setattr("services.diffusion.model.free_memory", lambda _: room)
        monkeypatch.setattr(type(zimage_model.adapters), "loaded_bytes", 1_000)
        assert zimage_model.fits([one, plain], zimage_model.free_bytes())
