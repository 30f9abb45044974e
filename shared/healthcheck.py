"""`python -m shared.healthcheck PORT`: whether the service of this container is ready, as an exit status.

With `--started` it is enough that it was ready once and answers now: for an orchestrator that ends what is unhealthy,
and should not end a gateway because its services are away. Standard library only, and no curl: images hold neither.
"""

import argparse
import http.client
import sys
import tempfile
from pathlib import Path

TIMEOUT_S = 10.0
MARK = Path(tempfile.gettempdir()) / "zimage-was-ready"  # gone with the container's /tmp when it starts anew


def answers(port: int, path: str) -> bool:
    """Whether the service on this machine answers that path with 200, within `TIMEOUT_S` seconds."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT_S)
    try:
        connection.request("GET", path)
        return connection.getresponse().status == http.HTTPStatus.OK
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def is_healthy(port: int, *, started: bool, mark: Path = MARK) -> bool:
    """Whether the service is ready; with `started`, whether it answers and was ready at an earlier call or is now."""
    if not started:
        return answers(port, "/health/ready")
    if mark.exists():
        return answers(port, "/health/live")
    ready = answers(port, "/health/ready")
    if ready:
        mark.touch()
    return ready


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("port", type=int, help="where the service listens on this machine")
    parser.add_argument("--started", action="store_true", help="ready once, and answering now, is enough")
    options = parser.parse_args()
    sys.exit(not is_healthy(options.port, started=options.started))
