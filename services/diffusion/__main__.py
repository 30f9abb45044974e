"""`python -m services.diffusion`: runs the service alone, configured by `ZIMAGE_...` in the environment."""

from services.diffusion.settings import DiffusionSettings
from shared.serving import run_service

if __name__ == "__main__":
    run_service("diffusion", DiffusionSettings, "services.diffusion.app")
