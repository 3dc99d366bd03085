"""The benchmark from recorded votes to decisions times what it says."""

from __future__ import annotations

from pathlib import Path

from benchmarks.judge_verdicts import VOICES, make_votes, measure
from rlaif.judging.verdicts import by_pair


def test_votes_are_twenty_a_pair_in_both_orders() -> None:
    votes = make_votes(50)
    pairs = by_pair(votes)
    assert [len(v) for v in pairs.values()] == [2 * VOICES, 2 * VOICES, 10]
    assert {v.ballot.order for v in votes} == {"forward", "reversed"}
    assert make_votes(50) == votes


def test_every_part_is_timed(tmp_path: Path) -> None:
    path = tmp_path / "votes.jsonl"
    path.write_text("".join(v.model_dump_json() + "\n" for v in make_votes(40)))
    seconds = measure(path)
    assert list(seconds) == ["read", "parse", "verdicts", "panels", "decisions"]
    assert all(s > 0 for s in seconds.values())
