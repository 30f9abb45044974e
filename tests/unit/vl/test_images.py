"""Foreign bytes to pixels."""

import numpy as np
import pytest
from pictures import FORMATS, bomb, encoded, malformed, pixels, scans
from PIL import Image

from services.vl import images
from services.vl.images import read_picture
from shared.errors import BodyTooLarge, InvalidField, OutOfMemory, ServiceError
from shared.pictures import MAX_PICTURE_BYTES


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_by_its_content(kind: str) -> None:
    picture = read_picture(encoded(kind=kind))
    assert (picture.mode, picture.size) == ("RGB", (96, 64))
    assert np.abs(np.asarray(picture).astype(int) - np.asarray(pixels())).mean() < 12


def test_lossless_pictures_keep_their_pixels() -> None:
    assert np.array_equal(np.asarray(read_picture(encoded())), np.asarray(pixels()))
    assert np.array_equal(np.asarray(read_picture(encoded(kind="WEBP", lossless=True))), np.asarray(pixels()))


@pytest.mark.parametrize("kind", FORMATS)
def test_exif_turns_the_picture(kind: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees, clockwise
    picture = read_picture(encoded(kind=kind, exif=exif))
    assert picture.size == (64, 96)
    expected = pixels().transpose(Image.Transpose.ROTATE_270)
    assert np.abs(np.asarray(picture).astype(int) - np.asarray(expected)).mean() < 12


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_parts_become_white(mode: str) -> None:
    picture = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    picture.putpixel((0, 0), (0, 0, 0, 255))
    read = np.asarray(read_picture(encoded(picture.convert(mode))))
    assert read[0, 0].max() < 8
    assert read[7, 7].min() == 255


def test_sixteen_bits_of_grey_keep_their_scale() -> None:
    grey = Image.fromarray(np.full((8, 8), 0x8000, np.uint16))
    assert np.asarray(read_picture(encoded(grey)))[0, 0].tolist() == [128, 128, 128]


def test_of_sixteen_bits_of_grey_one_level_may_be_transparent() -> None:
    levels = np.full((8, 8), 0x8000, np.uint16)
    levels[0, 0] = 0x4000
    read = np.asarray(read_picture(encoded(Image.fromarray(levels), transparency=0x4000)))
    assert read[0, 0].tolist() == [255, 255, 255]
    assert read[7, 7].tolist() == [128, 128, 128]


@pytest.mark.parametrize("mode", ["L", "1", "CMYK"])
def test_other_modes_become_rgb(mode: str) -> None:
    kind = "JPEG" if mode == "CMYK" else "PNG"
    assert read_picture(encoded(pixels().convert(mode), kind)).mode == "RGB"


@pytest.mark.parametrize("data", [b"", b"GIF89a", b"\x89PNG\r\n\x1a\n", encoded()[:-40], b"http://127.0.0.1/x.png"])
def test_what_is_no_picture_is_refused(data: bytes) -> None:
    with pytest.raises(InvalidField, match="'image' is"):
        read_picture(data)


@pytest.mark.parametrize("size", [(50_000, 50_000), (10_000, 9_000), (9_000, 6_000)])
def test_bombs_are_refused_before_they_are_decoded(size: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    def decode(_: object) -> None:
        raise AssertionError("it was decoded")

    data = bomb(*size)
    monkeypatch.setattr(images.Image.Image, "load", decode)
    with pytest.raises(InvalidField, match="pixels"):
        read_picture(data)


def test_a_jpeg_of_many_scans_is_refused_before_it_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    assert read_picture(scans(50)).size == (96, 64)
    data = scans(200)
    monkeypatch.setattr(images.Image.Image, "load", lambda _: pytest.fail("it was decoded"))
    with pytest.raises(InvalidField, match="100 scans"):
        read_picture(data)


def test_memory_that_runs_out_is_no_broken_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    def decode(_: object) -> None:
        raise MemoryError

    data = encoded()
    monkeypatch.setattr(images.Image.Image, "load", decode)
    with pytest.raises(OutOfMemory, match="too little free memory"):
        read_picture(data)


def test_ribbons_are_refused() -> None:
    with pytest.raises(InvalidField, match="200 times"):
        read_picture(encoded(Image.new("RGB", (2010, 10))))
    assert read_picture(encoded(Image.new("RGB", (2000, 10)))).size == (2000, 10)


def test_large_files_are_refused() -> None:
    with pytest.raises(BodyTooLarge, match=str(MAX_PICTURE_BYTES)):
        read_picture(encoded() + b"\0" * MAX_PICTURE_BYTES)


def test_whatever_comes_is_read_or_refused() -> None:
    refused = 0
    for data in malformed(700):
        try:
            assert read_picture(data).mode == "RGB"
        except ServiceError as error:
            assert error.status in (413, 422)
            refused += 1
    assert refused > 500
