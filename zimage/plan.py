"""What runs on one machine: which services, where each listens, and what each is told in its environment."""

import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from platformdirs import user_data_path

from services.gateway.settings import GatewaySettings

LOOPBACK = "127.0.0.1"
GATEWAY, ENCODER, DIFFUSION = "gateway", "encoder", "diffusion"


class CannotStart(Exception):
    """Something on this machine is in the way; the text is one sentence for the operator."""


@dataclass(frozen=True, slots=True)
class Listener:
    """A listening socket that outlives the process which serves it, so that a restart keeps the port."""

    socket: socket.socket
    url: str


@dataclass(frozen=True, slots=True)
class ServicePlan:
    """One service to run: its module, its socket and its environment beyond the supervisor's own."""

    name: str
    listener: Listener
    environment: Mapping[str, str] = field(default_factory=dict)

    @property
    def module(self) -> str:
        """The Python module to run."""
        return f"services.{self.name}"


def default_data_dir() -> Path:
    """The platform's folder for a user's data, or what `ZIMAGE_DATA_DIR` names."""
    named = os.environ.get("ZIMAGE_DATA_DIR")
    return Path(named) if named else user_data_path("zimage", appauthor=False)


def listen(host: str, port: int) -> Listener:
    """Opens a listening socket; port 0 picks a free one. Raises CannotStart."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        opened = socket.create_server((host, port), family=family, backlog=512)
    except OSError as error:
        why = error.strerror or str(error)
        raise CannotStart(f"cannot listen on {host} port {port}: {why}; choose another with --port") from None
    opened.setblocking(False)
    shown = f"[{host}]" if family == socket.AF_INET6 else host
    return Listener(opened, f"http://{shown}:{opened.getsockname()[1]}")


def plan_services(settings: GatewaySettings, environment: Mapping[str, str] | None = None) -> Sequence[ServicePlan]:
    """The services in the order in which they start; the gateway is last, and the first to stop. Raises CannotStart.

    `environment` is told to each of them besides what this process's environment holds.
    """
    public = listen(settings.host, settings.port)
    told = dict(environment or {})
    plans = []
    if not settings.use_api_encoder:
        plans.append(ServicePlan(ENCODER, listen(LOOPBACK, 0), told))
    if not settings.encoder_only:
        plans.append(ServicePlan(DIFFUSION, listen(LOOPBACK, 0), told))
    urls = {f"ZIMAGE_{plan.name.upper()}_URL": plan.listener.url for plan in plans}
    return [*plans, ServicePlan(GATEWAY, public, {**told, **urls})]
