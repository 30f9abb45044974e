"""`services.gateway.pictures` and `services.gateway.files`: what the gateway writes without looking inside."""

import errno
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors import safe_open

from services.diffusion.png import encode_png
from services.gateway.clients import Embeddings
from services.gateway.files import write_embeddings
from services.gateway.pictures import with_parameters
from shared.errors import StorageFailed

values = st.none() | st.booleans() | st.integers(0, 2**63 - 1) | st.floats(0, 30) | st.text(max_size=60)


@given(st.dictionaries(st.text(st.characters(codec="ascii", categories=["L"]), min_size=1), values, max_size=8))
def test_parameters_in_a_png(parameters: dict[str, Any]) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (8, 12, 3), dtype=np.uint8)
    png = with_parameters(encode_png(pixels, compression=1), parameters)
    with Image.open(io.BytesIO(png)) as image:
        image.load()  # which checks the sums of all chunks
        assert np.array_equal(np.asarray(image), pixels)
        assert json.loads(image.text["zimage"]) == parameters
    with Image.open(io.BytesIO(png)) as image:
        image.verify()


def embeddings(fill: int = 1) -> Embeddings:
    return Embeddings("BF16", (3, 8), memoryview(bytes([fill]) * 48))


def test_a_file_of_embeddings(tmp_path: Path) -> None:
    path = write_embeddings(tmp_path / "new" / "folder", embeddings(), {"formatted_prompt": '两只猫 "x"'})
    with safe_open(path, "pt") as file:
        assert file.keys() == ["embeddings"]
        assert file.get_slice("embeddings").get_shape() == [3, 8]
        assert file.get_slice("embeddings").get_dtype() == "BF16"
        assert file.metadata() == {"formatted_prompt": '两只猫 "x"'}
    assert path.read_bytes().endswith(bytes(embeddings().data))


def test_its_name_follows_from_what_it_holds(tmp_path: Path) -> None:
    first = write_embeddings(tmp_path, embeddings(1), {"a": "b"})
    assert write_embeddings(tmp_path, embeddings(1), {"a": "b"}) == first
    assert write_embeddings(tmp_path, embeddings(2), {"a": "b"}) != first
    assert write_embeddings(tmp_path, embeddings(1), {"a": "c"}) != first
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".safetensors"] * 3


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(StorageFailed, match="could not be saved") as failed:
        write_embeddings(tmp_path / "file" / "embeddings", embeddings(), {})
    assert str(tmp_path) not in failed.value.detail


def test_a_disk_that_is_full_keeps_no_half_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(StorageFailed, match="No space left"):
        write_embeddings(tmp_path, embeddings(), {})
    assert not list(tmp_path.iterdir())


def test_a_disk_that_is_nearly_full_is_left_to_the_history(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.gateway.files.LEAST_FREE_BYTES", 1 << 60)
    with pytest.raises(StorageFailed, match="nearly full"):
        write_embeddings(tmp_path, embeddings(), {})
    assert not list(tmp_path.iterdir())
