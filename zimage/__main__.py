"""`zimage` and `python -m zimage`."""

import sys

from shared.settings import InvalidSettings
from zimage.cli import app
from zimage.errors import CommandFailed


def main() -> None:
    """Runs the command line; what cannot be done ends with one sentence and status 1."""
    try:
        app()
    except (CommandFailed, InvalidSettings) as error:
        sys.stderr.write(f"zimage: {error}\n")
        sys.exit(1)


if __name__ == "__main__":
    main()
