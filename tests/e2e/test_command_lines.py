"""Every way of starting the server that the specification shows, with paths and devices of this machine."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from servers import ROOT, Running, environment, free_port, http_client, picture, running, serve, wait_until, zimage

pytestmark = pytest.mark.slow
CONFIG = """
[default]
model_path = "{model}"
templates_dir = "{templates}"

[default.devices]
text_encoder = "cpu"
dit = "cpu"
vae = "cpu"

[default.generation]
width = 96
height = 64
steps = 2
guidance_scale = 0.0

[default.scheduler]
shift = 3.0

[default.optimization]
flash_attn = false
compile = false
cpu_offload = false

[default.lora]
paths = ["{lora}", "{lora}"]
scales = [0.8, 0.5]
"""


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA for the tiny checkpoint, in the original model's naming."""
    path = tmp_path_factory.mktemp("lora") / "style.safetensors"
    generator = torch.Generator().manual_seed(0)
    base = "diffusion_model.layers.0.attention.to_q"
    halves = {"lora_A.weight": (4, 64), "lora_B.weight": (64, 4)}
    save_file({f"{base}.{name}": torch.randn(shape, generator=generator) for name, shape in halves.items()}, path)
    return path


@pytest.fixture(scope="module")
def local(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """The specification's first example: a local encoder, each part on its device."""
    devices = ("--text-encoder-device", "cpu", "--dit-device", "cpu", "--vae-device", "cpu")
    with serve(tiny_checkpoint, tmp_path_factory.mktemp("local"), *devices, "--debug") as server:
        yield server


def test_an_api_encoder_gives_the_same_picture_as_the_local_one(
    local: Running, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    with local.client() as client:
        expected = client.post("/api/generate", json=picture(guidance_scale=2.0)).content
        encoder_url = client.get("/health").json()["services"]["encoder"]["url"]
    flags = ("--api-url", encoder_url, "--api-model", "Qwen3-4B", "--use-api-encoder")
    with (
        serve(tiny_checkpoint, tmp_path, *flags, "--dit-device", "cpu", "--vae-device", "cpu", "--debug") as server,
        server.client() as client,
    ):
        assert server.service("encoder") is None
        assert client.post("/api/generate", json=picture(guidance_scale=2.0)).content == expected
        assert client.post("/api/format-prompt", json={"prompt": "A cat sleeping"}).json()["token_count"] > 5
        assert client.get("/health").json()["encoder_loaded"] is True
        arrived = [event for event in server.events("diffusion") if event["event"] == "embeddings arrived"]
    with local.client() as client:
        sent = [event for event in local.events("encoder") if event["event"] == "encoded"]
    # what --debug is for: the numbers of two back ends side by side
    assert {"tokens", "first_20_ids", "shape", "dtype", "min", "max", "mean", "std", "first_5", "last_5"} <= set(
        sent[-1]
    )
    assert any(event["first_5"] == arrived[0]["first_5"] and event["shape"] == arrived[0]["shape"] for event in sent)


def test_a_config_file_with_a_profile_and_loras(
    local: Running, tiny_checkpoint: Path, lora: Path, tmp_path: Path
) -> None:
    config = tmp_path / "config.toml"
    config.write_text(CONFIG.format(model=tiny_checkpoint, templates=ROOT / "templates" / "z_image", lora=lora))
    port = free_port()
    arguments = ("--config", config, "--profile", "default", "--port", str(port), "--data-dir", tmp_path)
    with running(zimage("serve", *arguments), port, tmp_path) as server:
        server.wait_ready()
        with server.client() as client:
            made = client.post("/api/generate", json={"prompt": "A cat", "seed": 1})
            entry = client.get("/api/history?images=none").json()["history"][0]
        assert (entry["width"], entry["height"], entry["steps"], entry["shift"]) == (96, 64, 2, 3.0)
        assert [event["scale"] for event in server.events("diffusion") if event["event"] == "lora fused"] == [0.8, 0.5]
    with local.client() as client:
        plain = client.post("/api/generate", json={"prompt": "A cat", "seed": 1, "width": 96, "height": 64, "steps": 2})
    assert made.content != plain.content


def test_flags_with_loras_and_an_encoder_alone(tiny_checkpoint: Path, lora: Path, tmp_path: Path) -> None:
    flags = ("--lora", f"{lora}:0.8", "--lora", f"{lora}:0.5", "--shift", "2.0", "--hidden-layer", "-1")
    with serve(tiny_checkpoint, tmp_path, *flags) as server, server.client() as client:
        client.post("/api/generate", json=picture()).raise_for_status()
        entry = client.get("/api/history?images=none").json()["history"][0]
        assert (entry["shift"], entry["hidden_layer"]) == (2.0, -1)
        assert [event["scale"] for event in server.events("diffusion") if event["event"] == "lora fused"] == [0.8, 0.5]


def test_encoder_only_says_why_it_makes_no_pictures(tiny_checkpoint: Path, tmp_path: Path) -> None:
    with serve(tiny_checkpoint, tmp_path, "--encoder-only") as server, server.client() as client:
        assert client.post("/api/encode", json={"prompt": "A cat"}).status_code == 200
        refused = client.post("/api/generate", json=picture())
        assert refused.status_code == 503
        assert "--encoder-only" in refused.json()["detail"]
        health = client.get("/health").json()
        assert health["encoder_only_mode"] is True
        assert health["pipeline_loaded"] is False
        assert server.service("diffusion") is None


def test_the_background_scripts(tiny_checkpoint: Path, tmp_path: Path) -> None:
    for folder in ("scripts", "templates"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    scripts = tmp_path / "own"
    scripts.mkdir()
    for name in ("start-server.sh", "stop-server.sh"):
        (scripts / name).write_bytes((ROOT / "scripts" / name).read_bytes())
        (scripts / name).chmod(0o755)
    bin_dir = tmp_path / ".venv" / "bin"
    bin_dir.mkdir(parents=True)
    (bin_dir / "zimage").write_text(f'#!/bin/sh\nexec {" ".join(zimage())} "$@"\n')
    (bin_dir / "zimage").chmod(0o755)
    port = free_port()

    def script(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [scripts / name, *arguments],
            env=environment(PATH=os.environ["PATH"]),
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    arguments = (
        "--model-path",
        str(tiny_checkpoint),
        "--encoder-only",
        "--port",
        str(port),
        "--data-dir",
        str(tmp_path / "d"),
    )
    try:
        started = script("start-server.sh", *arguments)
        assert started.returncode == 0, started.stderr
        with http_client(f"http://127.0.0.1:{port}") as client:
            assert client.get("/health/ready").status_code == 200
        assert "Ready" in (tmp_path / "logs" / "server.log").read_text()
        assert script("start-server.sh", *arguments).returncode == 1
    finally:
        stopped = script("stop-server.sh")
    assert stopped.stdout.strip() == "stopped"
    assert script("stop-server.sh").stdout.strip() == "no server is running"
    assert wait_until(lambda: not (tmp_path / "logs" / "server.pid").exists(), "the process id is forgotten")
