"""`zimage download`, run as a process against a hub on the loopback."""

import errno
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants
from loopback_hub import COMMIT, Hub, files_of, loopback_hub

from shared.wire import TensorMeta, build_header
from tests.servers import Ended, environment, free_port, run, wait_until, zimage
from zimage.hub_errors import explain
from zimage.published import REPOSITORIES, Published

Z_IMAGE, QWEN = (REPOSITORIES[model].name for model in Published)
TRANSFORMER = "transformer/diffusion_pytorch_model.safetensors"
UNWANTED = {
    "README.md": b"# Z-Image",
    ".gitattributes": b"*.safetensors",
    "assets/gallery.json": b"{}",
    "assets/picture.png": b"png",
    "transformer/diffusion_pytorch_model.bin": b"\x80\x04pickle",
    "text_encoder/pytorch_model.pt": b"\x80\x04pickle",
    "vae/model.pkl": b"\x80\x04pickle",
    "transformer/run_me.py": b"raise SystemExit",
}


@pytest.fixture
def wanted(tiny_checkpoint: Path) -> dict[str, bytes]:
    """The files of a Z-Image directory that we load."""
    files = {name: data for name, data in files_of(tiny_checkpoint).items() if name != "made_by_zimage.json"}
    return {**files, "tokenizer/merges.txt": b"#version: 0.2\n"}


@pytest.fixture
def hub(wanted: dict[str, bytes]) -> Iterator[Hub]:
    with loopback_hub(**{Z_IMAGE: {**wanted, **UNWANTED}}) as running:
        yield running


def hub_environment(url: str, tmp_path: Path, **settings: str) -> dict[str, str]:
    """What the hub's library reads; nothing of what the developer has set."""
    outer = {name: "" for name in os.environ if name.startswith(("HF_", "HUGGING"))}
    return {**outer, "HF_ENDPOINT": url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_TELEMETRY": "1", **settings}


def download(url: str, tmp_path: Path, *arguments: str | Path, **settings: str) -> Ended:
    command = zimage("download", *arguments)
    return run(command, tmp_path, timeout_s=60, **hub_environment(url, tmp_path, **settings))


def downloaded(ended: Ended) -> Path:
    """The folder that the last line names."""
    assert ended.status == 0, ended.stderr
    return Path(ended.stdout.splitlines()[-1])


@pytest.mark.slow
def test_the_files_arrive_whole_once_and_serve_offline(hub: Hub, wanted: dict[str, bytes], tmp_path: Path) -> None:
    folder = downloaded(download(hub.url, tmp_path))
    assert files_of(folder) == wanted, "every file that we load, byte for byte, and no other"
    assert sorted(hub.asked_for()) == sorted(wanted), "each was fetched once"
    assert not set(UNWANTED) & set(hub.asked_for("HEAD"))
    assert folder.is_relative_to(tmp_path / "home" / "hub")
    hub.requests.clear()
    assert downloaded(download(hub.url, tmp_path)) == folder
    assert not hub.asked_for()
    hub.requests.clear()
    assert downloaded(download(hub.url, tmp_path, HF_HUB_OFFLINE="1")) == folder
    (folder / TRANSFORMER).unlink()
    refused(download(hub.url, tmp_path, HF_HUB_OFFLINE="1"), "HF_HUB_OFFLINE is set", "only a part of")
    assert not hub.requests


def test_a_folder_of_ones_own(hub: Hub, wanted: dict[str, bytes], tmp_path: Path) -> None:
    folder = downloaded(download(hub.url, tmp_path, "z-image-turbo", "--to", "models/turbo", "--revision", COMMIT))
    assert folder == tmp_path / "models" / "turbo"
    assert {name: data for name, data in files_of(folder).items() if not name.startswith(".cache/")} == wanted


def test_the_vision_model(tiny_checkpoint: Path, tmp_path: Path) -> None:
    files = {**files_of(tiny_checkpoint / "text_encoder"), **files_of(tiny_checkpoint / "tokenizer")}
    with loopback_hub(**{QWEN: {**files, "README.md": b"", "model.bin": b"pickle", ".gitattributes": b""}}) as hub:
        folder = downloaded(download(hub.url, tmp_path, "qwen3-vl-4b-instruct"))
        assert files_of(folder) == files


@pytest.mark.slow
def test_a_broken_connection_goes_on_where_it_broke(hub: Hub, wanted: dict[str, bytes], tmp_path: Path) -> None:
    size = constants.DOWNLOAD_CHUNK_SIZE + 50_000  # what the library keeps are whole pieces of this size
    large = build_header([TensorMeta("weight", "U8", (size,))]) + os.urandom(size)
    hub.files[Z_IMAGE][TRANSFORMER] = large
    hub.break_after[TRANSFORMER] = constants.DOWNLOAD_CHUNK_SIZE + 10_000
    folder = downloaded(download(hub.url, tmp_path))
    assert files_of(folder) == {**wanted, TRANSFORMER: large}
    assert [asked for _, _, asked in hub.requests if asked] == [f"bytes={constants.DOWNLOAD_CHUNK_SIZE}-"]


@pytest.mark.slow
def test_a_second_run_fetches_what_the_first_did_not_finish(hub: Hub, wanted: dict[str, bytes], tmp_path: Path) -> None:
    hub.withheld = TRANSFORMER
    settings = hub_environment(hub.url, tmp_path)
    with subprocess.Popen(zimage("download"), env=environment(**settings), stderr=subprocess.PIPE) as process:
        blobs = tmp_path / "home" / "hub" / f"models--{Z_IMAGE.replace('/', '--')}" / "blobs"
        others = len({data for name, data in wanted.items() if name != TRANSFORMER})
        wait_until(lambda: len([path for path in blobs.glob("*") if not path.suffix]) == others, "the others are there")
        process.kill()
        process.communicate()
    hub.withheld = None
    hub.requests.clear()
    assert files_of(downloaded(download(hub.url, tmp_path))) == wanted
    assert hub.asked_for() == [TRANSFORMER]


@pytest.mark.slow
def test_ctrl_c_ends_a_large_file_in_its_middle(hub: Hub, tmp_path: Path) -> None:
    hub.files[Z_IMAGE][TRANSFORMER] = bytes(64 << 20)
    hub.pause_s = 0.001
    settings = hub_environment(hub.url, tmp_path)
    arguments = zimage("download")
    with subprocess.Popen(arguments, env=environment(**settings), stderr=subprocess.PIPE, text=True) as process:
        wait_until(lambda: TRANSFORMER in hub.asked_for(), "the large file is under way")
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "the same command goes on" in err
    assert "Traceback" not in err
    assert hub.sent_bytes < 64 << 20
    assert not list(tmp_path.rglob("*.incomplete"))


REFUSALS = {
    "no token": ((401, {}), "set HF_TOKEN"),
    "forbidden": ((403, {}), "(403)"),
    "no repository": ((404, {"X-Error-Code": "RepoNotFound"}), "(404)"),
    "broken": ((500, {}), "status 500"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_a_refusal_is_one_sentence(hub: Hub, tmp_path: Path, name: str) -> None:
    hub.refusal, said = REFUSALS[name]
    refused(download(hub.url, tmp_path), said, Z_IMAGE if "status" not in said else hub.url)


@pytest.mark.slow
def test_a_token_opens_a_gated_model(hub: Hub, wanted: dict[str, bytes], tmp_path: Path) -> None:
    hub.token = "hf_secret"
    refused(download(hub.url, tmp_path, HF_TOKEN="hf_wrong"), "is gated", "HF_TOKEN")  # noqa: S106 - of this test
    assert files_of(downloaded(download(hub.url, tmp_path, HF_TOKEN=hub.token))) == wanted


def test_an_unknown_revision_is_one_sentence(hub: Hub, tmp_path: Path) -> None:
    refused(download(hub.url, tmp_path, "--revision", "nope"), "has no revision 'nope'")


def test_no_network_is_one_sentence(tmp_path: Path) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    refused(download(url, tmp_path), f"the hub at {url} cannot be reached")


def test_offline_without_a_copy_is_one_sentence(tmp_path: Path) -> None:
    refused(download("http://127.0.0.1:9", tmp_path, HF_HUB_OFFLINE="1"), "HF_HUB_OFFLINE is set", "no copy of")


def test_a_model_larger_than_the_disk_is_refused_before_it_comes(hub: Hub, tmp_path: Path) -> None:
    hub.claimed_sizes[TRANSFORMER] = 10**18
    refused(download(hub.url, tmp_path), "make room", "1.0 EB")
    assert not hub.asked_for()


def test_a_repository_without_the_model_is_one_sentence(hub: Hub, wanted: dict[str, bytes], tmp_path: Path) -> None:
    hub.files[Z_IMAGE] = {name: data for name, data in wanted.items() if name != TRANSFORMER}
    refused(download(hub.url, tmp_path), "cannot be used", "holds no .safetensors weights")


def test_a_folder_that_cannot_be_written_is_one_sentence(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    refused(download(hub.url, tmp_path, "--to", tmp_path / "file" / "model"), "name another folder with --to")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_disk_that_fills_up_is_one_sentence(number: int) -> None:
    said = explain(OSError(number, os.strerror(number)), Z_IMAGE, None, Path("/models"))
    assert said == "the disk of /models is full: make room, or name another folder with --to or HF_HOME"


def test_an_unforeseen_error_is_one_sentence_too() -> None:
    assert explain(OSError("Consistency check failed\nmore"), Z_IMAGE, None, Path("/models")) == (
        f"{Z_IMAGE} could not be downloaded from {constants.ENDPOINT}: Consistency check failed"
    )


def refused(ended: Ended, *said: str) -> None:
    """It ended with one sentence, after what the library may have told of its progress, and nothing on its output."""
    assert ended.status == 1
    assert not ended.stdout
    assert "Traceback" not in ended.stderr
    last = ended.stderr.splitlines()[-1]
    assert last.startswith("zimage: ")
    for text in said:
        assert text in last
