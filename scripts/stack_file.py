"""Write deploy/stack.yaml, for Docker Swarm, from compose.yaml: `.venv/bin/python scripts/stack_file.py`.

Images, commands, environments and volumes are those of compose.yaml. What a swarm does otherwise is added here: several
replicas, where they may run, how they are looked up and replaced, and the token as a secret. What `docker stack deploy`
doesn't know, building, order of the start and GPU reservations, is left out. What this doesn't know: any machine; the
variables in the file are filled in by whoever deploys it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "compose.yaml"
TARGET = ROOT / "deploy" / "stack.yaml"
HEAD = """\
# The whole server on the machines of a Docker Swarm. Made from compose.yaml by scripts/stack_file.py: change those, not
# this file. README.md walks through two machines ("On a swarm").
#
#   docker node update --label-add zimage.role=gpu NODE      for each machine: gpu draws, cpu does the rest;
#   docker node update --label-add zimage.data=true NODE     one of them keeps the history
#   openssl rand -hex 32 | docker secret create zimage_service_token -
#   export MODEL_PATH=/path/on/every/machine ZIMAGE_REGISTRY=registry.example.com/
#   docker stack deploy -c deploy/stack.yaml zimage
#
# Variables besides: GATEWAY_REPLICAS, ENCODER_REPLICAS, REWRITER_REPLICAS (default 2), DIFFUSION_REPLICAS (1);
# ENCODER_ROLE, DIFFUSION_ROLE, ... for another label than the default; ZIMAGE_TEXT_ENCODER_DEVICE, ZIMAGE_DIT_DEVICE,
# ZIMAGE_VAE_DEVICE; with vision VL_MODEL_PATH, VL_REPLICAS=2 and ZIMAGE_VL_URLS=http://tasks.vl:7863; with LoRAs that
# requests may name LORA_PATH and ZIMAGE_LORA_DIR=/models/loras; ZIMAGE_PORT, ZIMAGE_TAG, ZIMAGE_PROFILE,
# ZIMAGE_REWRITER_BACKEND, ZIMAGE_REDIS_URL, REDIS_MAXMEMORY; DIFFUSION_PER_MACHINE (1), as two would share a GPU;
# ZIMAGE_API_KEY and ZIMAGE_REWRITER_API_KEY for the servers that an API encoder or rewriter asks; and a
# ZIMAGE_CONFIG_VERSION to count up when the configuration file that ZIMAGE_CONFIG names has changed. All other settings
# belong into that file.
"""

SECRET = "zimage_service_token"  # noqa: S105 - its name
LEFT_OUT = ("build", "depends_on", "env_file", "restart", "security_opt", "tmpfs")
REPLICAS = {"redis": 1, "gateway": 2, "encoder": 2, "rewriter": 2, "vl": 0, "diffusion": 1}
ROLES = {"gateway": "cpu", "encoder": "cpu", "rewriter": "cpu", "vl": "cpu", "diffusion": "gpu"}
PORTS = {"encoder": 7861, "rewriter": 7862, "vl": 7863, "diffusion": 7864}
API_KEYS = {"gateway": ("ZIMAGE_API_KEY",), "rewriter": ("ZIMAGE_API_KEY", "ZIMAGE_REWRITER_API_KEY")}
CONFIG = "/etc/zimage/config.toml"


def main() -> None:
    """Write the file and say so."""
    TARGET.parent.mkdir(exist_ok=True)
    TARGET.write_text(render(), encoding="utf-8")
    print(f"wrote {TARGET.relative_to(ROOT)}")


def render() -> str:
    """The whole file."""
    model = yaml.safe_load(SOURCE.read_text(encoding="utf-8"))
    stack = {
        "services": {name: _service(name, service) for name, service in model["services"].items()},
        "networks": {name: _network(network or {}) for name, network in model["networks"].items()},
        "volumes": {name: {} for name in model["volumes"]},
        "configs": {
            "config": {
                "name": "zimage-config-${ZIMAGE_CONFIG_VERSION:-1}",
                "file": "${ZIMAGE_CONFIG:-../config.example.toml}",
            }
        },
        "secrets": {SECRET: {"external": True}},
    }
    return HEAD + yaml.dump(stack, Dumper=_Plain, sort_keys=False, width=120)


class _Plain(yaml.SafeDumper):
    """Writes what stands in several places several times, and lists below their key indented."""

    def ignore_aliases(self, data: Any) -> bool:  # noqa: ARG002 - PyYAML's signature
        return True

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:  # noqa: ARG002, FBT001, FBT002
        super().increase_indent(flow, False)


def _network(network: dict[str, Any]) -> dict[str, Any]:
    """One that spans machines. That of the users may be joined by other containers, such as a proxy with TLS."""
    return {"driver": "overlay", **(network if network.get("internal") else {**network, "attachable": True})}


def _service(name: str, service: dict[str, Any]) -> dict[str, Any]:
    made = {key: value for key, value in service.items() if key not in (*LEFT_OUT, "deploy")}
    made["volumes"] = [_volume(item) for item in service["volumes"] if not _is_config(item)]
    made["volumes"] += [{"type": "tmpfs", "target": target} for target in service["tmpfs"]]  # its short form is ignored
    made["deploy"] = _deploy(name)
    if name == "redis":
        return made
    made["environment"] = _environment(name, service["environment"])
    made["configs"] = [{"source": "config", "target": CONFIG}]
    made["secrets"] = [SECRET]
    if name == "gateway":
        # A gateway whose services are away still answers; the swarm must not end it for that.
        check = ["CMD", "python", "-m", "shared.healthcheck", "7860", "--started"]
        made["healthcheck"] = {"test": check, "interval": "5s", "timeout": "15s", "start_period": "1h", "retries": 3}
        made["ports"] = [{"target": 7860, "published": "${ZIMAGE_PORT:-7860}"}]
    return made


def _environment(name: str, told: dict[str, Any]) -> dict[str, Any]:
    """As in compose.yaml, but for addresses, the secret, and what only Compose can work out."""
    environment = {key: value for key, value in told.items() if value is not None}
    del environment["ZIMAGE_SERVICE_TOKEN"], environment["ZIMAGE_ALLOW_NO_TOKEN"]
    environment["ZIMAGE_SERVICE_TOKEN_FILE"] = f"/run/secrets/{SECRET}"
    for service, port in PORTS.items():
        variable = f"ZIMAGE_{service.upper()}_URLS"
        if variable in environment:
            default = "" if service == "vl" else f"http://tasks.{service}:{port}"
            environment[variable] = f"${{{variable}:-{default}}}"
    if name == "encoder":
        environment["ZIMAGE_TEXT_ENCODER_DEVICE"] = "${ZIMAGE_TEXT_ENCODER_DEVICE:-cpu}"
    if name == "gateway":
        environment["ZIMAGE_VL_MODEL_PATH"] = "${VL_MODEL_PATH:-}"
    if name == "diffusion":
        environment["ZIMAGE_LORA_DIR"] = "${ZIMAGE_LORA_DIR:-}"
    for variable in API_KEYS.get(name, ()):
        environment[variable] = f"${{{variable}:-}}"
    return environment


def _deploy(name: str) -> dict[str, Any]:
    """How many, where, how they are found, and how one takes another's place: only once it is healthy."""
    label = f"zimage.role == ${{{name.upper()}_ROLE:-{ROLES[name]}}}" if name in ROLES else "zimage.data == true"
    count = REPLICAS[name]
    order = "start-first" if name == "gateway" else "stop-first"  # two models seldom fit into a machine
    change = {"parallelism": 1, "order": order, "failure_action": "rollback", "monitor": "30s"}
    placement: dict[str, Any] = {"constraints": [f"node.labels.{label}"]}
    if name == "diffusion":  # a second one would share the GPU of the first
        placement["max_replicas_per_node"] = "${DIFFUSION_PER_MACHINE:-1}"
    return {
        "replicas": count if name == "redis" else f"${{{name.upper()}_REPLICAS:-{count}}}",
        "endpoint_mode": "vip" if name == "gateway" else "dnsrr",
        "placement": placement,
        "update_config": change,
        "rollback_config": {"parallelism": 1, "order": order},
        "restart_policy": {"condition": "any", "delay": "2s"},
    }


def _is_config(volume: str | dict[str, Any]) -> bool:
    return isinstance(volume, dict) and volume["target"] == CONFIG


def _volume(volume: str | dict[str, Any]) -> str | dict[str, Any]:
    """A bind mount, whose folder must be on every machine; others as they are."""
    if isinstance(volume, str):
        return volume
    source = str(volume["source"])
    if source.startswith("${MODEL_PATH"):
        source = "${MODEL_PATH:?name the folder of the model}"
    elif source.startswith("${VL_MODEL_PATH"):
        source = "${VL_MODEL_PATH:-/VL_MODEL_PATH/is/not/set}"
    return {"type": "bind", "source": source, "target": volume["target"], "read_only": True}


if __name__ == "__main__":
    main()
