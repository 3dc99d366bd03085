"""Progress that is piped: one line for each thing that is told."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from rlaif.cli.progress import LiveProgress, PlainProgress, make_progress
from rlaif.records import IterationMetrics

METRICS = IterationMetrics.model_validate(
    {
        "iteration": 0,
        "constitution": {"name": "rules", "version": 1, "hash": "0" * 16},
        "policy": {"iteration": 0, "digest": "0" * 16},
        "sampled": {
            "answers": 16,
            "mean_words": 9.0,
            "mean_tokens": 12.0,
            "distinct_share": 0.8,
            "list_share": 0.0,
            "ended_share": 0.5,
        },
        "pairs": 8,
        "votes": 24,
        "abstentions": {},
        "kept": 6,
        "kept_share": 0.75,
        "dropped_by_first_reason": {"tie": 2},
        "mean_agreement": 0.9,
        "trained_pairs": 6,
        "replayed_pairs": 0,
        "steps": 3,
        "loss": 0.5,
        "margin": 0.1,
        "grad_norm": 1.0,
        "judge_tokens": 0,
        "seconds": {"sample": 1.0},
    }
)


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
