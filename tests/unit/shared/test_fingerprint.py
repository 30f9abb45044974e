"""`shared.fingerprint`: equal files on whichever machine are the same model, others are not."""

from pathlib import Path

from shared.fingerprint import SAMPLE_BYTES, fingerprint_of, fingerprint_of_files


def folder(root: Path, weights: bytes = b"weights", config: bytes = b"{}") -> Path:
    root.mkdir()
    (root / "config.json").write_bytes(config)
    (root / "model.safetensors").write_bytes(weights)
    return root


def test_equal_folders_are_equal_wherever_they_lie(tmp_path: Path) -> None:
    one, other = folder(tmp_path / "one"), folder(tmp_path / "other")
    assert fingerprint_of([one], "bfloat16") == fingerprint_of([other], "bfloat16")
    assert len(fingerprint_of([one], "")) == 16


def test_weights_configuration_and_options_tell_models_apart(tmp_path: Path) -> None:
    first = folder(tmp_path / "first")
    seen = {
        fingerprint_of([first], "bfloat16"),
        fingerprint_of([first], "float32"),
        fingerprint_of([first, first], "bfloat16"),
        fingerprint_of([folder(tmp_path / "weights", weights=b"others!")], "bfloat16"),
        fingerprint_of([folder(tmp_path / "config", config=b"[]")], "bfloat16"),
        fingerprint_of([folder(tmp_path / "longer", weights=b"weights+")], "bfloat16"),
    }
    assert len(seen) == 6


def test_what_is_not_read_changes_nothing(tmp_path: Path) -> None:
    first = folder(tmp_path / "first")
    before = fingerprint_of([first], "")
    (first / "README.md").write_text("a description")
    assert fingerprint_of([first], "") == before


def test_large_files_are_sampled_from_end_to_end(tmp_path: Path) -> None:
    content = bytearray(200 * SAMPLE_BYTES)
    path = tmp_path / "model.safetensors"
    seen = set()
    for changed in (None, 0, len(content) - 1):
        if changed is not None:
            content[changed] ^= 1
        path.write_bytes(content)
        seen.add(fingerprint_of_files([path]))
    assert len(seen) == 3
