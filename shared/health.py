"""Health and metrics, the same for every service: `/health/live`, `/health/ready`, `/metrics`."""

from collections.abc import Callable

from fastapi import APIRouter, Response
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from pydantic import BaseModel

from shared.errors import Unready
from shared.problems import responses

Readiness = Callable[[], str | None]
"""Answers None when the service can work, else a sentence that says what it waits for."""

_SECONDS = (0.005, 0.02, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 180)


class Live(BaseModel):
    """The process answers."""

    status: str = "live"


class Ready(BaseModel):
    """Weights are loaded and dependencies reached."""

    status: str = "ready"


class Metrics:
    """The Prometheus metrics of one service, in a registry of their own."""

    def __init__(self, service: str) -> None:
        self.registry = CollectorRegistry()
        self.service = service
        self._requests = Counter(
            "zimage_requests", "Requests answered", ["service", "method", "route", "status"], registry=self.registry
        )
        self._seconds = Histogram(
            "zimage_request_seconds",
            "Time to answer a request",
            ["service", "route"],
            buckets=_SECONDS,
            registry=self.registry,
        )

    def observe_request(self, method: str, route: str, status: int, seconds: float) -> None:
        """Counts one answered request."""
        self._requests.labels(self.service, method, route, str(status)).inc()
        self._seconds.labels(self.service, route).observe(seconds)

    def gauge(self, name: str, text: str, read: Callable[[], float]) -> None:
        """Adds a value that is read whenever the metrics are."""
        Gauge(name, text, ["service"], registry=self.registry).labels(self.service).set_function(read)


def health_router(metrics: Metrics, readiness: Readiness) -> APIRouter:
    """The three endpoints."""
    router = APIRouter(tags=["health"])

    @router.get("/health/live", summary="Does the process answer?")
    async def live() -> Live:
        return Live()

    @router.get("/health/ready", summary="Can the service work?", responses=responses(Unready))
    async def ready() -> Ready:
        if (reason := readiness()) is not None:
            raise Unready(reason, retry_after_s=2)
        return Ready()

    @router.get("/metrics", summary="Prometheus metrics", response_class=Response)
    async def metrics_text() -> Response:
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    return router
