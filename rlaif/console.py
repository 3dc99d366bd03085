"""The one console for results: stdout, as wide as the terminal, or 160 columns when piped (a table is never cut)."""

from __future__ import annotations

import re
import sys

from rich.console import Console

PIPED_COLUMNS = 160
_ACTIVE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
"""Control characters but tab and newline, and those that turn the direction of writing."""


def stdout_console() -> Console:
    """A console on stdout that never colours numbers by itself."""
    return Console(highlight=False, width=None if sys.stdout.isatty() else PIPED_COLUMNS)


def visible(text: str) -> str:
    """A model's or a user's text as a terminal may show it: what would steer the terminal is replaced."""
    return _ACTIVE.sub("\N{REPLACEMENT CHARACTER}", text.replace("\r\n", "\n"))


def inert(text: str) -> str:
    """`visible`, for a rich console: no markup either."""
    from rich.markup import escape

    return escape(visible(text))
