"""Pictures as files, PNG or SVG: the one module that draws with matplotlib, which it imports when something is drawn.

In: a path, and axes that the caller draws on. Out: a file that depends on what was drawn alone, not on the day or on
anybody's matplotlibrc. The pages of `rlaif view` need none of it: view/pictures.py is geometry for their own SVG, whose
colours a style sheet has.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

FORMATS = ("png", "svg")
_STYLE = {"legend.fontsize": 7, "svg.hashsalt": "rlaif"}
_METADATA = {"png": {"Software": None}, "svg": {"Date": None}}

Spread = tuple[float, float, tuple[float, float]]
"""x, y, and the ends of y's interval."""


@contextmanager
def drawn(
    path: Path, file_format: str, size: tuple[float, float], dpi: int, panels: tuple[int, int] = (1, 1)
) -> Iterator[list[Any]]:
    """Axes to draw on, row by row; the file is written when the block ends well.

    Args:
        file_format: one of `FORMATS`, whatever the path ends in.
        size: width and height in inches.
        dpi: pixels an inch, of a PNG.
        panels: rows and columns; the panels of a column share its x axis.

    Raises:
        OSError: the file can't be written.
    """
    import matplotlib
    from matplotlib.figure import Figure  # not pyplot, which would choose a backend for a whole notebook

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE)
        figure = Figure(figsize=size, layout="constrained")
        yield [*figure.subplots(*panels, sharex=True, squeeze=False).flat]
        figure.savefig(path, format=file_format, dpi=dpi, metadata=_METADATA[file_format])


def draw_intervals(axis: Any, points: Sequence[Spread], label: str) -> None:
    """A series with its intervals."""
    below = [y - low for _, y, (low, _) in points]
    above = [high - y for _, y, (_, high) in points]
    x, y = [x for x, _, _ in points], [y for _, y, _ in points]
    axis.errorbar(x, y, yerr=[below, above], fmt="s-", capsize=3, label=label)
