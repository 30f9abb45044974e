"""`GET /health`, in the form of the public API, and `GET /api/nodes`, from what the watch remembers."""

from fastapi import APIRouter

from services.gateway.routes.refusals import LIST
from services.gateway.state import Services
from shared.schemas.health import HealthAnswer, NodesAnswer, ServiceHealth

router = APIRouter(tags=["health"])

_ABSENT = ("diffusion", "rewriter", "vl", "redis")


@router.get("/health", summary="Is everything loaded?")
async def health(services: Services) -> HealthAnswer:
    """Always answers 200; `status` is `healthy` when every service is ready and Redis there, else `starting` or
    `degraded`."""
    states = {state.status for state in services.health.values()}
    status = "healthy" if services.complete else "degraded" if "unreachable" in states else "starting"
    absent = {name: ServiceHealth(status="not_configured") for name in _ABSENT}
    return HealthAnswer(
        status=status,
        pipeline_loaded=services.is_ready("diffusion"),
        encoder_loaded=services.is_ready("encoder"),
        encoder_only_mode="diffusion" not in services.health,
        services={**absent, **services.health},
    )


@router.get("/api/nodes", summary="The nodes of every service", responses=LIST)
async def nodes(services: Services) -> NodesAnswer:
    """Which nodes there are, what each is, what it has to do, and what was the matter with it last."""
    return NodesAnswer(nodes=services.nodes)
