"""The images: what is in them and what is not, who runs in them, what they say of themselves."""

import json
import re

import pytest
from docker_engine import BUILD_S, SERVICES, docker
from servers import ROOT

pytestmark = pytest.mark.slow
LOCK = ROOT / "requirements.lock"
TOOLS = ("gcc", "cc", "make", "git", "uv", "curl")
GATEWAY_BYTES = 200_000_000
BASE = "python:3.11-slim"
PACKAGES = "/opt/zimage/lib/python3.11/site-packages"
INSTALLED = f"""
from importlib.metadata import distributions
for found in distributions(path=["{PACKAGES}"]):
    print(found.name.lower().replace("_", "-"), found.version.partition("+")[0], sep="==")
"""
IN_A_CONTAINER = ("--rm", "--read-only", "--tmpfs", "/tmp", "--network", "none")  # noqa: S108 - in it


def inside(image: str, *command: str) -> str:
    return docker("run", *IN_A_CONTAINER, image, *command)


def config_of(image: str) -> dict[str, object]:
    found = json.loads(docker("image", "inspect", image))[0]["Config"]
    assert isinstance(found, dict)
    return found


def locked() -> set[str]:
    return set(re.findall(r"^([\w.-]+==[^\s;]+)", LOCK.read_text(encoding="utf-8"), re.MULTILINE))


@pytest.mark.parametrize("service", SERVICES)
def test_nothing_but_what_the_lock_names(images: dict[str, str], service: str) -> None:
    installed = set(inside(images[service], "python", "-c", INSTALLED).split())
    assert len(installed) > 20
    assert installed - locked() == set()


@pytest.mark.parametrize("service", SERVICES)
def test_no_build_tools_and_no_root(images: dict[str, str], service: str) -> None:
    assert inside(images[service], "sh", "-c", "id -u") == "10001"
    tools = inside(images[service], "sh", "-c", f"for tool in {' '.join(TOOLS)}; do command -v $tool; done; true")
    assert tools == ""
    refused = inside(images[service], "sh", "-c", "touch /code/a /opt/zimage/a /data/a 2>/dev/null || echo refused")
    assert refused == "refused"


@pytest.mark.parametrize("service", SERVICES)
def test_labels_port_and_health_check(images: dict[str, str], service: str) -> None:
    config = config_of(images[service])
    labels = config["Labels"]
    assert isinstance(labels, dict)
    assert labels["org.opencontainers.image.title"] == f"zimage-{service}"
    assert labels["org.opencontainers.image.licenses"] == "Apache-2.0"
    assert labels["org.opencontainers.image.version"]
    assert labels["org.opencontainers.image.description"]
    check = config["Healthcheck"]
    assert isinstance(check, dict)
    (port,) = [name.partition("/")[0] for name in dict(config["ExposedPorts"])]  # type: ignore[call-overload]
    assert check["Test"] == ["CMD", "python", "-m", "shared.healthcheck", port]


def test_the_gateway_is_light(images: dict[str, str]) -> None:
    sizes = [int(docker("image", "inspect", "--format", "{{.Size}}", name)) for name in (images["gateway"], BASE)]
    assert sizes[0] - sizes[1] < GATEWAY_BYTES
    names = inside(images["gateway"], "sh", "-c", f"ls {PACKAGES}").split()
    assert {"torch", "numpy", "transformers", "PIL"}.isdisjoint(names)


def test_the_torch_layer_is_shared(images: dict[str, str]) -> None:
    def layers(service: str) -> list[str]:
        found = json.loads(docker("image", "inspect", "--format", "{{json .RootFS.Layers}}", images[service]))
        assert isinstance(found, list)
        return found

    ours = layers("encoder")[:-1]  # all but the code
    assert layers("vl")[: len(ours)] == layers("diffusion")[: len(ours)] == layers("rewriter")[: len(ours)] == ours


def test_extras_are_built_in_where_they_are_asked_for(images: dict[str, str]) -> None:
    assert images
    name = "zimage-encoder:with-extras"
    arguments = [part for one in ("TORCH_BUILD=cpu", "EXTRAS=quantization") for part in ("--build-arg", one)]
    try:
        docker(
            "build",
            *("--file", "services/Dockerfile", "--target", "encoder", "--tag", name),
            *arguments,
            str(ROOT),
            timeout_s=BUILD_S,
        )
        assert inside(name, "python", "-c", "import torchao; print(torchao.__name__)") == "torchao"
    finally:
        docker("image", "rm", "--force", name, check=False)


def test_a_service_that_cannot_start_says_why(images: dict[str, str]) -> None:
    told = inside(images["encoder"], "sh", "-c", "python -m services.encoder 2>&1; echo status $?")
    assert "ZIMAGE_SERVICE_TOKEN" in told
    assert told.endswith("status 78")
