"""`python -m services.vl`: runs the service alone, configured by `ZIMAGE_...` in the environment."""

from services.vl.settings import VlSettings
from shared.serving import run_service

if __name__ == "__main__":
    run_service("vl", VlSettings, "services.vl.app")
