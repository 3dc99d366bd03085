"""Pictures as files: the same bytes for the same data, whatever the machine's matplotlib is set to."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import pytest

from rlaif.plotting import FORMATS, draw_intervals, drawn


def draw(path: Path, file_format: str) -> bytes:
    with drawn(path, file_format, (3, 2), 50, (1, 2)) as (left, right):
        left.plot([0, 1], [1, 2], label="line")
        left.legend()
        draw_intervals(right, [(1, 0.5, (0.4, 0.7))], "interval")
    return path.read_bytes()


@pytest.mark.parametrize("file_format", FORMATS)
def test_the_same_data_is_the_same_file(tmp_path: Path, file_format: str) -> None:
    first = draw(tmp_path / "first", file_format)
    backend = matplotlib.rcParams["backend"]
    with matplotlib.rc_context({"font.size": 20, "axes.facecolor": "black", "svg.hashsalt": None}):
        second = draw(tmp_path / "second", file_format)
        assert matplotlib.rcParams["font.size"] == 20, "what a notebook has set stays"
    assert first == second
    assert matplotlib.rcParams["backend"] == backend


def test_an_interval_reaches_its_ends(tmp_path: Path) -> None:
    with drawn(tmp_path / "x", "png", (3, 2), 50) as (axis,):
        draw_intervals(axis, [(1, 0.5, (0.4, 0.7)), (2, 0.6, (0.6, 0.6))], "interval")
        (bars,) = axis.containers[0].lines[2]
    assert [[tuple(end) for end in bar] for bar in bars.get_segments()] == [
        [(1, pytest.approx(0.4)), (1, pytest.approx(0.7))],
        [(2, pytest.approx(0.6)), (2, pytest.approx(0.6))],
    ]


def test_nothing_is_written_where_drawing_fails(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), drawn(tmp_path / "x.png", "png", (3, 2), 50):
        _ = 1 / 0
    assert not list(tmp_path.iterdir())
