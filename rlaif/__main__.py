"""`python -m rlaif`, and the `rlaif` command."""

from __future__ import annotations

import sys


def main() -> None:
    """The command line; Ctrl-C while it is still being imported is no traceback either."""
    try:
        from rlaif.cli import main as command

        command()
    except KeyboardInterrupt:
        print("rlaif: interrupted", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
