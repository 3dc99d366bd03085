"""Judge against human, against numbers worked out by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rlaif.records import Decision, HumanLabel
from rlaif.review.labels import labels_path
from rlaif.review.queue import Queue, sent_to_review
from rlaif.trust.agreement import Reviewed, agreement, band, cohens_kappa, labelled_pairs, measure
from tests.review.runs import give, reviewed
from tests.test_cli import rlaif  # noqa: F401  a fixture


def labelled(n: int, human: str, judge: str, agreement: float | None = 0.6, reasons: tuple[str, ...] = ()) -> Reviewed:
    pair = f"p{n}"
    verdict = {"pair_id": pair, "outcome": judge, "p_first": 0.5, "agreement": agreement, "valid_votes": 2}
    decision = {"pair_id": pair, "status": "review", "reasons": reasons, "winner": None, "verdict": verdict}
    label = {"pair_id": pair, "iteration": n % 2, "outcome": human, "author": "ann", "time": "t"}
    return Reviewed(
        label=HumanLabel.model_validate(label),
        decision=Decision.model_validate({**decision, "review_rule": "below_agreement"}),
        constitution="rules@1",
    )


# The 2x2 table of a textbook: 20 both first, 5 and 10 apart, 15 both second. p(o) = 0.7, p(e) = 0.5, kappa = 0.4.
TABLE = [("first", "first")] * 20 + [("first", "second")] * 5 + [("second", "first")] * 10 + [("second", "second")] * 15


def test_accuracy_and_kappa() -> None:
    pairs = [labelled(n, human, judge) for n, (human, judge) in enumerate(TABLE)]
    found = measure(pairs, "all", "all")
    assert (found.labels, found.decided, found.same) == (50, 50, 35)
    assert found.accuracy == 0.7
    assert found.kappa == pytest.approx(0.4)
    assert found.interval == pytest.approx((0.5625, 0.8090), abs=5e-4)


def test_who_names_no_side_is_counted_apart() -> None:
    cases = [("first", "first"), ("second", "first"), ("tie", "first"), ("tie", "tie"), ("first", "tie"),
             ("first", "abstain")]  # fmt: skip
    found = measure([labelled(n, *case) for n, case in enumerate(cases)], "all", "all")
    assert (found.labels, found.human_ties, found.judge_undecided, found.decided, found.same) == (6, 2, 2, 2, 1)
    assert found.accuracy == 0.5


def test_no_kappa_where_it_is_not_defined() -> None:
    assert cohens_kappa([], []) is None
    assert cohens_kappa(["first"] * 3, ["first"] * 3) is None
    assert cohens_kappa(["first", "second"], ["second", "first"]) == -1
    found = measure([], "all", "all")
    assert (found.accuracy, found.interval, found.kappa) == (None, (0, 1), None)


def test_slices() -> None:
    pairs = [
        labelled(0, "first", "first", agreement=1.0),
        labelled(1, "first", "second", agreement=0.5, reasons=("order_flip", "low_agreement")),
        labelled(2, "tie", "first", agreement=None, reasons=("low_agreement",)),
    ]
    rows = {(r.slice, r.value): r.labels for r in agreement(pairs)}
    assert rows == {
        ("all", "all"): 3, ("iteration", "0001"): 2, ("iteration", "0002"): 1, ("constitution", "rules@1"): 3,
        ("agreement", "0.5 to 0.7"): 1, ("agreement", "1"): 1, ("agreement", "none"): 1,
        ("sent by", "below_agreement"): 3, ("reason", "low_agreement"): 2, ("reason", "order_flip"): 1,
        ("reason", "none: would have been kept"): 1, ("author", "ann"): 3,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("value", "name"), [(0.0, "0 to 0.5"), (0.5, "0.5 to 0.7"), (0.9, "0.9 to 1"), (1.0, "1"), (1 - 1e-12, "1")]
)
def test_bands(value: float, name: str) -> None:
    assert band(value) == name


def test_the_verdict_stays_beside_the_label(tmp_path: Path) -> None:
    run = reviewed(tmp_path, iterations=2)
    asked = [d for k in (0, 1) for d in sent_to_review(run.iteration(k))]
    sided = [d for d in asked if d.verdict.outcome in ("first", "second")]
    assert len(sided) >= 3
    for n, d in enumerate(sided):
        give(run, d.pair_id, d.verdict.outcome if n else {"first": "second", "second": "first"}[d.verdict.outcome])
    tied = next(d for d in asked if d not in sided)
    Queue(run).answer(tied.pair_id, "t", "ann")
    pairs, problems = labelled_pairs(run)
    assert problems == ()
    assert [x.decision for x in pairs] == [d for d in asked if d in sided or d == tied]
    everything = agreement(pairs)[0]
    assert (everything.decided, everything.same) == (len(sided), len(sided) - 1)
    assert everything.human_ties == 1


def test_the_command(rlaif, tmp_path: Path) -> None:  # noqa: F811
    run = reviewed(tmp_path, iterations=2)
    code, out, _ = rlaif("audit", str(run.path), "agreement")
    assert code == 0
    assert "no pair is labelled yet" in out
    for d in sent_to_review(run.iteration(0)):
        give(run, d.pair_id, "first", "[bold]ann")
    labels_path(run).write_text(labels_path(run).read_text() + "{}\n")
    code, out, err = rlaif("audit", str(run.path), "agreement")
    assert code == 0
    assert "kappa" in out
    assert "[bold]ann" in out
    assert "labels.jsonl" in err
    code, out, _ = rlaif("audit", str(run.path), "agreement", "--json")
    found = json.loads(out)
    assert found["agreement"][0]["labels"] == len(found["labels"]) == len(sent_to_review(run.iteration(0)))
    assert {"judge", "judge_agreement", "reasons", "review_rule", "outcome", "author"} <= set(found["labels"][0])


def test_a_damaged_decision_costs_its_pair_only(tmp_path: Path) -> None:
    run = reviewed(tmp_path, iterations=2)
    for k in (0, 1):
        for d in sent_to_review(run.iteration(k)):
            give(run, d.pair_id, "first")
    whole, _ = labelled_pairs(run)
    path = run.iteration(0).path / "decisions.jsonl"
    lost = next(x for x in whole if x.label.iteration == 0).label.pair_id
    rows = path.read_text().splitlines(keepends=True)
    at = next(n for n, row in enumerate(rows) if lost in row)
    rows[at] = rows[at].replace('"p_first":', '"p_firs":')
    path.write_text("".join(rows))
    (run.iteration(1).path / "plan.json").unlink()
    pairs, problems = labelled_pairs(run)
    assert {x.label.pair_id for x in pairs} == {x.label.pair_id for x in whole if x.label.iteration == 0} - {lost}
    assert any(f"decisions.jsonl:{at + 1}: not a Decision" in p for p in problems)
    assert any("plan.json: No such file" in p for p in problems)
