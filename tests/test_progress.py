"""Progress that is piped: one line for each thing that is told."""

from __future__ import annotations

import io
import re
import sys
import time

import pytest
from rich.console import Console

from rlaif.cli.beat import VoteCount, heartbeat
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


def test_a_long_stage_says_how_far_it_is_and_a_talkative_one_nothing_more() -> None:
    out = io.StringIO()
    progress = PlainProgress(Console(file=out, width=80), 2, silence_s=0.0)
    progress.beat()
    progress.note("loading judge, learner")
    progress.beat()
    progress.stage(1, "judge", 72, "votes", "rules@1")
    progress.advance(24)
    progress.beat()
    progress.advance(48)
    progress.note("done")
    lines = [re.sub(r"\d+(\.\d)? s", "N s", line) for line in out.getvalue().splitlines()]
    assert lines == [
        "… N s since: starting",
        "loading judge, learner",
        "… N s since: loading judge, learner",
        "iteration 2/2  judge: 24 of 72 votes, N s",
        "iteration 2/2  judge: 72/72 votes in N s",
        "done",
    ]
    out = io.StringIO()
    quick = PlainProgress(Console(file=out, width=80), 2, silence_s=60)
    quick.stage(0, "judge", 2, "votes", "rules@1")
    quick.beat()
    assert out.getvalue() == ""


def test_a_piped_run_has_a_heartbeat(monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.StringIO()
    monkeypatch.setattr("rlaif.cli.progress.Console", lambda **_: Console(file=out, width=80))
    monkeypatch.setattr("rlaif.cli.progress.HEARTBEAT_S", 0.01)
    with make_progress(2) as progress:
        progress.stage(0, "update", 6, "steps", "rules@1")
        wait_for(lambda: "update: 0 of 6 steps, 0 s" in out.getvalue())
    silent = out.getvalue()
    time.sleep(0.1)
    assert out.getvalue() == silent, "no word after the end"


def wait_for(condition, within_s: float = 10.0) -> None:
    end = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_heartbeat_ends_with_its_block_whatever_ends_it() -> None:
    beats: list[int] = []
    with pytest.raises(ValueError), heartbeat(lambda: beats.append(1), 0.01):
        wait_for(lambda: beats)
        raise ValueError
    before = len(beats)
    time.sleep(0.1)
    assert len(beats) == before


def test_votes_are_counted_in_lines_when_piped(capsys: pytest.CaptureFixture[str]) -> None:
    count = VoteCount(total=3)
    with count.told(every_s=0.05):
        count(2)
        wait_for(lambda: "2 of 3 votes, 0 s\n" in seen(capsys))
        count(1)
    assert seen(capsys).endswith("3 of 3 votes, 0 s\n")
    with VoteCount().told(60):
        pass
    assert seen(capsys) == "0 votes, 0 s\n"


def test_votes_are_a_number_that_moves_on_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    count = VoteCount()
    with count.told(0.01):
        count(2)
        count(2)
    assert seen(capsys) == "2 votes, 0 s\r4 votes, 0 s\r"


def seen(capsys: pytest.CaptureFixture[str]) -> str:
    return capsys.readouterr().err
