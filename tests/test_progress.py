"""Progress that is piped: one line for each thing that is told."""

from __future__ import annotations

import io

from rich.console import Console

from rlaif.cli.progress import PlainProgress


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
