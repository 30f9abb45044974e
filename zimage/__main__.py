"""`zimage` and `python -m zimage`."""

import sys

from shared.settings import InvalidSettings
from zimage.cli import app
from zimage.plan import CannotStart


def main() -> None:
    """Runs the command line; what cannot be started ends with one sentence and status 1."""
    try:
        app()
    except (CannotStart, InvalidSettings) as error:
        sys.stderr.write(f"zimage: {error}\n")
        sys.exit(1)


if __name__ == "__main__":
    main()
