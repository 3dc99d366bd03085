"""`rlaif constitution log RUN`: a run's texts, what each change did to old pairs, when held-out answers followed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from rlaif.audit.text_log import TextLog, followed, text_log
from rlaif.cli import app
from rlaif.constitutions.constitution import diff, parse_constitution
from rlaif.records import EvaluationMetrics, IterationMetrics, Preference, UnderText
from rlaif.review.queue import sent_to_review
from rlaif.rundir.store import RunDir, read_record, write_json
from tests.review.runs import give, loop_of, review_job
from tests.stubs import Quiet, stub_job, stub_loop, text, write_texts


def finished(root: Path, progress: Quiet | None = None, **changes: Any) -> RunDir:
    job = stub_job(**changes)
    loop = stub_loop(root, job, progress=progress)
    write_json(loop.dir.path / "run.json", {"schema_version": 1, "job": job.model_dump(mode="json")})
    loop.run()
    return RunDir.open(loop.dir.path)


def kept(run: RunDir, *iterations: int) -> int:
    """Pairs that the judge's votes kept in these iterations."""
    rows = [p for k in iterations for p in run.iteration(k).read("preferences", Preference)]
    return sum(p.source == "judge" for p in rows)


def parsed(number: int, version: int | None = None) -> Any:
    return parse_constitution(text(number), "rules", version or number, "v1.yaml")


def stretches(found: TextLog) -> list[tuple[int, int, tuple[str, ...]]]:
    return [(t.since, t.until, t.names) for t in found.texts]


def test_a_stored_run_of_every_schema_answers(stored: RunDir) -> None:
    found = text_log(stored)
    assert found.problems == ()
    assert stretches(found) == [(0, 1, ("rules@1",)), (2, 3, ("rules@2",))]
    first, second = found.texts
    assert (first.changes, first.old_pairs) == (None, None)
    assert second.changes is not None
    assert {c.principle for c in second.changes} == {None, "wish"}
    assert second.old_pairs is not None
    assert (second.old_pairs.unknown, second.old_pairs.valid_again) == (kept(stored, 0, 1), 0) == (5, 0)
    assert second.old_pairs.expired == 0, "from before iterations looked at old pairs"
    told = CliRunner().invoke(app, ["constitution", "log", str(stored.path)]).stdout
    said = "old pairs: 5 kept pairs were judged under another text, and nobody asked what this one makes of them"
    assert said in " ".join(told.split())
    assert [(t.followed.evaluations, t.followed.first) for t in found.texts] == [(1, None), (1, None)]


def test_two_texts_by_schedule(tmp_path: Path) -> None:
    run = finished(tmp_path)
    found = text_log(run)
    assert stretches(found) == [(0, 1, ("rules@1",)), (2, 3, ("rules@2",))]
    assert found.texts[1].changes == tuple(diff(parsed(1), parsed(2)))
    assert [t.hash for t in found.texts] == [parsed(1).hash, parsed(2).hash]
    old = found.texts[1].old_pairs
    assert old is not None
    assert old.expired == kept(run, 0, 1) > kept(run, 1) > 0
    assert (old.valid_again, old.max_age, old.share) == (0, 4, 0.4)


def test_pairs_past_replays_age_are_not_lost_to_a_change(tmp_path: Path) -> None:
    run = finished(tmp_path, replay={"share": 0.0, "max_age": 1})
    old = text_log(run).texts[1].old_pairs
    assert old is not None
    assert (old.unknown, old.expired, old.share) == (kept(run, 1), 0, 0.0)
    told = CliRunner().invoke(app, ["constitution", "log", str(run.path)])
    assert "(within replay.max_age 1); this job replays none (replay.share 0)" in " ".join(told.stdout.split())


def test_pairs_of_a_text_that_comes_back_are_valid_again(tmp_path: Path) -> None:
    run = finished(tmp_path, schedule={0: "rules@1", 2: "rules@2", 3: "rules@1"})
    found = text_log(run)
    assert stretches(found) == [(0, 1, ("rules@1",)), (2, 2, ("rules@2",)), (3, 3, ("rules@1",))]
    old = found.texts[2].old_pairs
    assert old is not None
    assert (old.expired, old.valid_again) == (kept(run, 2), kept(run, 0, 1))
    replayed = [p.source for p in run.iteration(3).read("preferences", Preference)].count("replay")
    assert 0 < replayed <= old.valid_again
    assert found.texts[2].followed.evaluations == 1  # those of its first stretch are not its own


class Editing(Quiet):
    """Writes a file when an iteration has ended."""

    def __init__(self, edits: dict[int, tuple[Path, str]]) -> None:
        super().__init__()
        self._edits = edits

    def iteration_done(self, iteration: int, metrics: IterationMetrics) -> None:
        if iteration in self._edits:
            path, content = self._edits[iteration]
            path.write_text(content)


def test_an_edited_file_is_a_change_and_the_same_text_under_a_new_version_is_none(tmp_path: Path) -> None:
    folder = write_texts(tmp_path, 1)
    edits = {0: (folder / "v1.yaml", text(3)), 1: (folder / "v2.yaml", "# as before\n" + text(3))}
    run = finished(tmp_path, Editing(edits), constitution="rules", iterations=3)
    found = text_log(run)
    assert stretches(found) == [(0, 0, ("rules@1",)), (1, 2, ("rules@1", "rules@2"))]
    assert found.texts[1].changes == tuple(diff(parsed(1), parsed(3, 1)))
    assert found.texts[1].old_pairs is not None
    assert found.texts[1].old_pairs.expired == kept(run, 0)


def test_old_labels_count_as_the_change_found_them(tmp_path: Path) -> None:
    changes: dict[str, Any] = {"schedule": {0: "rules@1", 2: "rules@2"}, "replay": {"share": 0.9}}
    loop_of(tmp_path, review_job(**changes, iterations=1)).run()
    run = RunDir.open(tmp_path / "run")
    pair = sent_to_review(run.iteration(0))[0].pair_id
    give(run, pair, "first")
    loop_of(tmp_path, review_job(**changes, iterations=3)).run()
    assert [p.pair_id for p in run.iteration(1).read("preferences", Preference) if p.source == "human"] == [pair]
    before = text_log(run).texts[1].old_pairs
    assert before is not None
    assert before.expired == kept(run, 0, 1) + 1
    give(run, pair, "second", author="bob")
    assert text_log(run).texts[1].old_pairs == before


def evaluation(updates: int, low: float | None, text_hash: str = "new") -> EvaluationMetrics:
    """Of the policy after so many iterations; `low` is its interval's lower end, None where nobody was asked."""
    stored = Path(__file__).resolve().parent.parent / "data/run_schema2/evaluations/0002/metrics.json"
    metrics = read_record(stored, EvaluationMetrics)
    return metrics.model_copy(
        update={
            "updates": updates,
            "constitution": metrics.constitution.model_copy(update={"hash": text_hash}),
            "mean_words": 10.0 * updates,
            "checks": {"wish": updates / 8},
            "win_rate": None if low is None else low + 0.1,
            "win_interval": None if low is None else (low, low + 0.2),
        }
    )


@pytest.mark.parametrize(
    ("evaluations", "count", "first", "not_after", "newest"),
    [
        ([], 0, None, None, None),
        ([evaluation(6, None)], 0, None, None, None),
        ([evaluation(6, 0.5)], 1, None, None, 2),  # an interval that holds one half shows nothing
        ([evaluation(6, 0.51)], 1, 2, None, 2),
        ([evaluation(8, 0.6), evaluation(6, 0.3), evaluation(7, 0.55)], 3, 3, 2, 4),
        ([evaluation(5, 0.6), evaluation(6, 0.4)], 2, 1, None, 2),  # followed once, lost since
        ([evaluation(4, 0.9)], 0, None, None, None),  # at the change: the policy before it
        ([evaluation(9, 0.9)], 0, None, None, None),  # after the text's last iteration
        ([evaluation(6, 0.9, "old")], 0, None, None, None),
    ],
)
def test_when_held_out_answers_followed(
    evaluations: list[EvaluationMetrics], count: int, first: int | None, not_after: int | None, newest: int | None
) -> None:
    found = followed(4, 7, "new", evaluations)
    assert (found.evaluations, found.not_after) == (count, not_after)
    assert (found.first and found.first.iterations, found.newest and found.newest.iterations) == (first, newest)


def test_where_following_begins() -> None:
    """A policy that wins at the change hasn't followed; what comes after it may."""
    at = UnderText(
        constitution=evaluation(4, 0.9).constitution, win_rate=0.8, win_interval=(0.6, 0.9), wins=8, losses=2,
        undecided=0, abstained=0,
    )  # fmt: skip
    found = followed(4, 7, "new", [evaluation(6, 0.4)], at)
    assert found.at_change is not None
    assert (found.at_change.win_rate, found.at_change.iterations) == (0.8, 0)
    assert (found.evaluations, found.first) == (1, None)
    assert followed(4, 7, "new", [], at.model_copy(update={"win_rate": None})).at_change is None


def test_the_command(tmp_path: Path) -> None:
    run = finished(tmp_path)
    for k, low in ((2, 0.4), (3, 0.45), (4, 0.625)):
        under = run.plan(k - 1).constitution.hash
        run.evaluation(k).path.mkdir(exist_ok=True)
        write_json(run.evaluation(k).path / "metrics.json", evaluation(k, low, under).model_dump(mode="json"))
    before = {p: p.read_bytes() for p in run.path.rglob("*") if p.is_file()}
    told = CliRunner().invoke(app, ["constitution", "log", str(run.path)])
    assert told.exit_code == 0, told.output
    lines = told.stdout.splitlines()
    assert lines[0] == f"iterations 1 to 2: rules@1 {parsed(1).hash}"
    assert "held-out answers: not yet; win rate 0.50 (95 % interval 0.40 to 0.60) after 2 iterations under it" in lines
    assert f"iterations 3 to 4: rules@2 {parsed(2).hash}" in lines
    assert lines[lines.index("wish changed: rule") :][1:3] == ["  - Rule 1.", "  + Rule 2."]
    (at,) = [line for line in lines if line.startswith("at the change: win rate ")]
    assert at.endswith(" after 0 iterations under it")
    assert f"old pairs: {kept(run, 0, 1)} kept pairs can't be replayed any more (within replay.max_age 4)" in lines
    [followed] = [line for line in lines if line.startswith("held-out answers: followed; ")]
    assert "followed; win rate 0.72 (95 % interval 0.62 to 0.82) after 2 " in followed
    assert followed.endswith("under it, not yet after 1")
    checks = "38% pass the check of wish after 1 iteration; 40.0 words, 50% pass the check of wish after 2 iterations"
    assert f"they have 30.0 words, {checks}" in lines
    found = CliRunner().invoke(app, ["constitution", "log", str(run.path), "--json"]).stdout
    assert TextLog.model_validate_json(found) == text_log(run)
    assert json.loads(found)["texts"][1]["followed"]["first"]["iterations"] == 2
    assert {p: p.read_bytes() for p in run.path.rglob("*") if p.is_file()} == before


def test_a_run_at_its_start_and_a_folder_that_is_none(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    run.iteration(0).path.mkdir(parents=True)  # the plan isn't written yet
    write_json(run.path / "run.json", {"schema_version": 1, "job": stub_job().model_dump(mode="json")})
    told = CliRunner().invoke(app, ["constitution", "log", str(run.path)])
    assert (told.exit_code, told.stdout.split(": ")[1]) == (0, "no iteration has begun yet\n")
    assert CliRunner().invoke(app, ["constitution", "log", str(tmp_path)]).exit_code != 0


def test_what_is_gone_is_said_and_the_rest_is_shown(copy: RunDir) -> None:
    [first, second] = text_log(copy).texts
    shutil.rmtree(copy.path / "constitutions" / first.hash)
    (copy.path / "iterations/0001/preferences.meta.json").unlink()
    found = text_log(copy)
    assert (found.texts[0], found.texts[1].followed) == (first, second.followed)
    assert (found.texts[1].changes, found.texts[1].old_pairs) == (None, None)
    [text_gone, pairs_gone] = found.problems
    assert text_gone.endswith("the run's copy of a text is gone; what changed in iteration 3 isn't known")
    assert "preferences.meta.json" in pairs_gone
    told = CliRunner().invoke(app, ["constitution", "log", str(copy.path)])
    assert told.exit_code == 0
    assert told.stderr.count("rlaif: ") == 2
