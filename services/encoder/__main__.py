"""`python -m services.encoder`: runs the encoder alone, configured by `ZIMAGE_...` in the environment."""

from services.encoder.settings import EncoderSettings
from shared.serving import run_service

if __name__ == "__main__":
    run_service("encoder", EncoderSettings, "services.encoder.app")
