"""`python -m services.rewriter`: runs the rewriter alone, configured by `ZIMAGE_...` in the environment."""

from services.rewriter.settings import RewriterSettings
from shared.serving import run_service

if __name__ == "__main__":
    run_service("rewriter", RewriterSettings, "services.rewriter.app")
