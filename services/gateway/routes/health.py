"""`GET /health`, in the form of the public API, from what the watch remembers."""

from fastapi import APIRouter

from services.gateway.state import Services
from shared.schemas.public import HealthAnswer, ServiceHealth

router = APIRouter(tags=["health"])

_ABSENT = ("diffusion", "rewriter", "vl")


@router.get("/health", summary="Is everything loaded?")
async def health(services: Services) -> HealthAnswer:
    """Always answers 200; `status` is `healthy` when every service is ready, else `starting` or `degraded`."""
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
