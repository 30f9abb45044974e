"""The application factory: what makes every service behave alike around its own routes."""

from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from importlib.metadata import version
from typing import Any, Protocol

from fastapi import APIRouter, FastAPI

from shared.bodies import BodyLimits, CountedBodies
from shared.guard import Guard, KnownHosts
from shared.health import Metrics, Readiness, health_router
from shared.problems import install_handlers
from shared.requests import RequestContext


class Lifespan(Protocol):
    """What runs around an app's life."""

    def __call__(self, app: FastAPI, /) -> AbstractAsyncContextManager[Any]:
        """Starts the service's parts and yields once requests may come."""


def create_service(  # noqa: PLR0913 - the parts of an app, by their names
    *,
    description: str,
    lifespan: Lifespan,
    routers: Sequence[APIRouter],
    readiness: Readiness,
    metrics: Metrics,
    max_body_bytes: int | BodyLimits,
    token: str | None = None,
    hosts: Sequence[str] | None = None,
) -> FastAPI:
    """An app with request ids, limits, problems, health and metrics around the given routers.

    With `token` all but the health checks ask it of their callers; with `hosts` requests must name one of these, or a
    host that no stranger can make lead here.
    """
    app = FastAPI(
        title=f"Z-Image {metrics.service}",
        description=description,
        version=version("zimage-server"),
        lifespan=lifespan,
        redirect_slashes=False,  # DELETE /api/history/ with the index forgotten is not DELETE /api/history
        telemetry={"tracing": False, "metrics": False, "logs": False},
    )
    app.state.stop = _nobody_to_stop
    limits = max_body_bytes if isinstance(max_body_bytes, BodyLimits) else BodyLimits(max_body_bytes)
    app.add_middleware(CountedBodies, limits=limits)
    if token is not None:
        app.add_middleware(Guard, token=token)
    if hosts is not None:
        app.add_middleware(KnownHosts, patterns=hosts)
    app.add_middleware(RequestContext, metrics=metrics, limits=limits)
    install_handlers(app)
    app.include_router(health_router(metrics, readiness))
    for router in routers:
        app.include_router(router)
    return app


def _nobody_to_stop(exit_code: int) -> None:
    """Stands in for the server's `stop` while no server runs the app, as in a test."""
