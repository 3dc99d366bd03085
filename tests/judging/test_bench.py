"""The bench counts what it says: right before and after the filter, coverage, and no label for a silent judge."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rlaif.config import Filters
from rlaif.constitution import load_constitution, parse_constitution
from rlaif.errors import UserError
from rlaif.judging.bench import Labelled, judge_rows, read_labelled, slices, table, wilson
from rlaif.records import Vote

ROOT = Path(__file__).resolve().parents[2]
CONSTITUTION = parse_constitution(
    """
summary: Test.
principles:
  - {id: answers, rule: Answer the question., guard: true}
  - {id: brief, rule: Be brief., prefer: Be brief., avoid: Be long., paraphrases: [{prefer: Short., avoid: Long.}]}
""",
    "test",
    1,
    "test.yaml",
)


def row(n, label="first", principle="brevity", **more):
    return Labelled(
        id=f"r{n}", principle=principle, constitution="test@1", prompt="Why?", first="So.", second="Because of much",
        label=label, split="dev", source="written", **more,
    )  # fmt: skip


class FakeJudge:
    """Votes `answers[pair id]`, one outcome for each voice; guards are even."""

    def __init__(self, answers):
        self.answers = answers

    def cast(self, ballots, pairs, candidates, constitution):
        for b in ballots:
            outcome = "tie" if b.guard else self.answers[b.pair_id][b.voice == "brief/main"]
            reason = "empty" if outcome == "abstain" else None
            yield [Vote(ballot=b, model="fake", outcome=outcome, abstain_reason=reason, raw_reply="")]


def test_counts_before_and_after_the_filter():
    rows = [row(0), row(1), row(2, "second"), row(3, principle="lists"), row(4, principle="lists")]
    answers = {
        "r0": ("first", "first"),  # kept, right
        "r1": ("second", "second"),  # kept, wrong
        "r2": ("second", "first"),  # a tie: wrong, dropped
        "r3": ("abstain", "first"),  # right, kept
        "r4": ("abstain", "abstain"),  # no verdict: wrong, dropped
    }
    brevity, lists, everything = slices(judge_rows(rows, FakeJudge(answers), lambda _: CONSTITUTION, Filters()))
    assert (brevity.name, brevity.pairs, brevity.correct, brevity.kept, brevity.kept_correct) == ("brevity", 3, 1, 2, 1)
    assert brevity.coverage == pytest.approx(2 / 3)
    assert brevity.kept_accuracy == 0.5
    assert (lists.correct, lists.kept, lists.kept_correct) == (1, 1, 1)
    assert (everything.name, everything.pairs, everything.correct, everything.kept) == ("all", 5, 2, 3)
    assert brevity.reasons == {"tie": 1, "low_agreement": 1}
    assert table([brevity, everything], "t").row_count == 2


def test_an_answer_that_stops_in_the_middle_was_cut_off():
    assert row(0).candidate("first").finish_reason == "stop"
    assert row(0).candidate("second").finish_reason == "length"


def test_wilson():
    assert wilson(0, 0) == (0.0, 1.0)
    assert wilson(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-3)


def write(path, *rows):
    path.write_text("\n".join(json.dumps(r) if isinstance(r, dict) else r for r in rows))
    return path


def test_reading_takes_one_split(tmp_path):
    good = row(0).model_dump()
    path = write(tmp_path / "b.jsonl", good, "", {**good, "id": "r1", "split": "test"})
    assert [r.id for r in read_labelled(path, "test")] == ["r1"]
    assert len(read_labelled(path)) == 2


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ({"label": "third", "id": "x"}, ":2: label"),
        ({"id": "r0"}, "two rows have the id `r0`"),
        ({"extra": 1, "id": "x"}, ":2: extra"),
    ],
)
def test_bad_rows_are_named(tmp_path, second, message):
    good = row(0).model_dump()
    with pytest.raises(UserError, match=message):
        read_labelled(write(tmp_path / "b.jsonl", good, {**good, **second}))


def test_missing_file_and_empty_split(tmp_path):
    with pytest.raises(UserError, match="can't read"):
        read_labelled(tmp_path / "no.jsonl")
    with pytest.raises(UserError, match="no labelled pairs of split test"):
        read_labelled(write(tmp_path / "b.jsonl", row(0).model_dump()), "test")


def test_every_shipped_row_names_a_shipped_constitution():
    rows = read_labelled(ROOT / "prompts" / "judge_bench.jsonl")
    assert len(rows) >= 300
    for reference in {r.constitution for r in rows}:
        load_constitution(ROOT / "constitutions", reference)
