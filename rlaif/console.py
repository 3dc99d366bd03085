"""The one console for results: stdout, as wide as the terminal, or 160 columns when piped (a table is never cut)."""

from __future__ import annotations

import sys

from rich.console import Console

PIPED_COLUMNS = 160


def stdout_console() -> Console:
    """A console on stdout that never colours numbers by itself."""
    return Console(highlight=False, width=None if sys.stdout.isatty() else PIPED_COLUMNS)
