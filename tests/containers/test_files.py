"""The Compose files and the stack file as Docker reads them, without starting anything."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from docker_engine import SERVICES, docker, refusal
from servers import ROOT

GPU_FILES, CPU_FILES = ("compose.yaml",), ("compose.yaml", "compose.cpu.yaml")
NODE_FILES, STACK_FILE = ("deploy/compose.encoder.yaml",), "deploy/stack.yaml"
MODELS = {"MODEL_PATH": "/srv/z-image", "VL_MODEL_PATH": "/srv/qwen3-vl"}


def compose_config(*files: str) -> tuple[str, ...]:
    given = [part for file in files for part in ("--file", file)]
    return ("compose", *given, "--profile", "*", "config", "--format", "json")


def read(*files: str, **environment: str) -> dict[str, Any]:
    """The services, by name, after merging and filling in variables."""
    services = json.loads(docker(*compose_config(*files), **environment))["services"]
    assert isinstance(services, dict)
    return services


def gpus(service: dict[str, Any]) -> list[str]:
    """The GPUs that a service reserves, by their numbers."""
    reserved = service.get("deploy", {}).get("resources", {}).get("reservations", {}).get("devices") or []
    assert all(device["driver"] == "nvidia" and device["capabilities"] == ["gpu"] for device in reserved)
    return [number for device in reserved for number in device["device_ids"]]


def source(service: dict[str, Any], target: str) -> str:
    """What is mounted at a path of a container."""
    (mounted,) = [str(volume["source"]) for volume in service["volumes"] if volume["target"] == target]
    return mounted


def test_each_model_has_its_own_gpu() -> None:
    services = read(*GPU_FILES, ENCODER_GPU="1", DIFFUSION_GPU="2", **MODELS)
    assert {name: gpus(service) for name, service in services.items() if gpus(service)} == {
        "encoder": ["1"],
        "diffusion": ["2"],
    }
    assert services["encoder"]["environment"]["ZIMAGE_TEXT_ENCODER_DEVICE"] == "cuda"
    assert services["diffusion"]["environment"]["ZIMAGE_DIT_DEVICE"] == "cuda"
    assert services["vl"]["environment"]["ZIMAGE_VL_DEVICE"] == "cpu"
    assert {service["build"]["args"]["TORCH_BUILD"] for name, service in services.items() if name != "redis"} == {
        "cuda"
    }


def test_the_overrides_of_the_readme_do_what_they_say(tmp_path: Path) -> None:
    blocks = re.findall(r"```yaml\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    told = []
    for index, block in enumerate(blocks):
        file = tmp_path / f"compose.{index}.yaml"
        file.write_text(block, encoding="utf-8")
        services = read(*GPU_FILES, str(file), **MODELS)
        told.append({name: gpus(service) for name, service in services.items() if gpus(service)})
    assert told == [{"diffusion": ["0"]}, {"encoder": ["0"], "diffusion": ["0"], "vl": ["1"]}]


def test_without_a_gpu_none_is_asked_for() -> None:
    services = read(*CPU_FILES, **MODELS)
    assert [name for name, service in services.items() if gpus(service)] == []
    told = {**services["encoder"]["environment"], **services["diffusion"]["environment"]}
    assert {told[f"ZIMAGE_{part}_DEVICE"] for part in ("TEXT_ENCODER", "DIT", "VAE")} == {"cpu"}
    assert {services[name]["build"]["args"]["TORCH_BUILD"] for name in SERVICES if name != "gateway"} == {"cpu"}


@pytest.mark.parametrize(("environment", "count"), [({}, 0), ({"VL_MODEL_PATH": "/srv/qwen3-vl"}, 1)])
def test_a_vision_model_turns_vision_on(environment: dict[str, str], count: int) -> None:
    services = read(*GPU_FILES, MODEL_PATH="/srv/z-image", **environment)
    assert services["vl"]["deploy"]["replicas"] == count
    assert bool(services["gateway"]["environment"]["ZIMAGE_VL_URLS"]) is bool(count)


def test_models_are_those_named_or_the_demo_model() -> None:
    named = read(*CPU_FILES, **MODELS)
    assert [source(named[name], "/models/z-image") for name in ("encoder", "diffusion")] == ["/srv/z-image"] * 2
    assert source(named["vl"], "/models/qwen3-vl") == "/srv/qwen3-vl"
    demo = read(*CPU_FILES)
    assert source(demo["encoder"], "/models/z-image").endswith("/demo_model/checkpoints/z-image")
    assert source(demo["vl"], "/models/qwen3-vl").endswith("/demo_model/checkpoints/qwen3-vl")
    assert demo["vl"]["deploy"]["replicas"] == 1


def test_the_api_is_published_to_this_machine_unless_told_otherwise() -> None:
    published = {name: service.get("ports") for name, service in read(*GPU_FILES).items() if service.get("ports")}
    assert list(published) == ["gateway"]
    (port,) = published["gateway"] or []
    assert (port["host_ip"], port["published"], port["target"]) == ("127.0.0.1", "7860", 7860)
    (port,) = read(*GPU_FILES, ZIMAGE_HOST="0.0.0.0", ZIMAGE_PORT="80")["gateway"]["ports"]
    assert (port["host_ip"], port["published"], port["target"]) == ("0.0.0.0", "80", 7860)


def test_a_node_elsewhere_asks_for_a_token() -> None:
    assert "ZIMAGE_SERVICE_TOKEN" in refusal(*compose_config(*NODE_FILES))
    secret = {"ZIMAGE_SERVICE_TOKEN": "that of all machines", "ZIMAGE_ALLOW_NO_TOKEN": "false"}
    nodes = read(*NODE_FILES, **secret)
    assert gpus(nodes["encoder"]) == []
    assert gpus(nodes["encoder-gpu"]) == ["0"]
    for node in nodes.values():
        assert secret.items() <= node["environment"].items()
        assert [port["target"] for port in node["ports"]] == [7861]


def test_the_stack_is_one_that_swarm_accepts() -> None:
    command = ("stack", "config", "--compose-file", STACK_FILE)
    assert "MODEL_PATH" in refusal(*command)
    told = docker(*command, MODEL_PATH="/srv/z-image")
    for service in SERVICES:
        assert f"image: zimage-{service}:latest" in told
    assert told.count("endpoint_mode: dnsrr") == len(SERVICES)  # all but the gateway, and Redis
    assert told.count("node.labels.zimage.role == gpu") == 1
    assert "ZIMAGE_SERVICE_TOKEN:" not in told
