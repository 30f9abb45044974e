"""`python -m services.gateway`: runs the gateway alone, configured by `ZIMAGE_...` in the environment."""

from services.gateway.settings import GatewaySettings
from shared.serving import run_service

if __name__ == "__main__":
    run_service("gateway", GatewaySettings, "services.gateway.app")
