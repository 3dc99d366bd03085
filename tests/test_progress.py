"""Progress that is piped: one line for each thing that is told."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from rlaif.cli.progress import LiveProgress, PlainProgress, make_progress

METRICS: dict[str, Any] = {
    "constitution": {"name": "rules", "version": 1},
    "sampled": {"mean_words": 9.0, "ended_share": 0.5},
    "dropped_by_first_reason": {"tie": 2},
    "kept": 6,
    "pairs": 8,
    "loss": 0.5,
    "seconds": {"sample": 1.0},
}


def test_a_terminal_sees_the_stage_and_each_iteration(monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.StringIO()
    terminal = Console(file=out, force_terminal=True, width=150, color_system=None, legacy_windows=False)
    monkeypatch.setattr("rlaif.cli.progress.Console", lambda **_: terminal)
    with make_progress(4) as progress:
        assert isinstance(progress, LiveProgress)
        progress.iteration_done(0, METRICS)
        progress.stage(1, "votes", 12, "votes", "rules@1 [v1]")
        progress.advance(9)
        progress.note("alarm [head]")
    said = out.getvalue()
    assert "iteration 1/4 done  rules@1  kept 6/8 (dropped: tie 2)  loss 0.500" in said
    assert "iteration 2/4  votes  rules@1 [v1] kept 6/8" in said
    assert "9/12" in said
    assert "votes/s" in said
    assert "alarm [head]" in said


def test_a_line_of_a_log_is_never_broken() -> None:
    out = io.StringIO()
    progress = PlainProgress(Console(file=out, width=80), 4)
    progress.stage(0, "sample", 8, "answers", "assistant@1")
    progress.advance(8)
    progress.note("[head] " + "x" * 300)
    lines = out.getvalue().splitlines()
    assert lines[0].startswith("iteration 1/4  sample: 8/8 answers in ")
    assert lines[1:] == ["[head] " + "x" * 300]


def test_a_note_cannot_steer_the_terminal() -> None:
    out = io.StringIO()
    PlainProgress(Console(file=out, width=80), 4).note("alarm: \x1b]0;mine\x07 [red]x[/red]")
    assert out.getvalue() == "alarm: \ufffd]0;mine\ufffd [red]x[/red]\n"
