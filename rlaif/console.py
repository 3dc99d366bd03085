"""The one console for results: stdout, as wide as the terminal, or 160 columns when piped (a table is never cut)."""

from __future__ import annotations

import sys

from rich.console import Console

PIPED_COLUMNS = 160
# Control characters but newline and tab → their pictures.
_PICTURES = (
    {i: 0x2400 + i for i in range(32) if i not in (9, 10)} | {127: 0x2421} | dict.fromkeys(range(128, 160), 65533)
)


def stdout_console() -> Console:
    """A console on stdout that never colours numbers by itself."""
    return Console(highlight=False, width=None if sys.stdout.isatty() else PIPED_COLUMNS)


def inert(text: str) -> str:
    """Somebody else's text for a rich console: no markup, and no control character that could steer a terminal."""
    from rich.markup import escape

    return escape(text.translate(_PICTURES))
