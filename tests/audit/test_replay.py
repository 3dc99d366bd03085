"""Replay: a run's own settings give its own decisions back, others give what a run with them would have decided."""

from __future__ import annotations

import hashlib
import json
import math
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from rlaif.audit.replay import replay
from rlaif.audit.replay_iteration import Iteration
from rlaif.audit.replay_settings import settings_of
from rlaif.cli import app
from rlaif.config import Job
from rlaif.errors import UserError
from rlaif.judging.calibration import Calibration, Threshold, panels_of
from rlaif.judging.verdicts import by_pair
from rlaif.records import Decision, Pair, Vote
from rlaif.rundir.store import RunDir, write_json
from tests.judging.fault_server import FaultServer
from tests.stubs import BASE_DIGEST, stub_job, stub_loop
from tests.test_loop_chat import chat_job, chat_loop, cutting, greater_number

pytestmark = pytest.mark.slow


def with_header(root: Path, job: Job) -> RunDir:
    header = {"schema_version": 1, "job": job.model_dump(mode="json"), "models": {"policy": BASE_DIGEST}}
    (root / "run").mkdir(parents=True, exist_ok=True)
    write_json(root / "run" / "run.json", header)
    return RunDir(root / "run")


def stub_run(root: Path, job: Job) -> RunDir:
    run = with_header(root, job)
    stub_loop(root, job).run()
    return run


def mixed(body: dict[str, Any]) -> str:
    """A jury: one is right, one too unless the number is odd, one names the first slot, one can't be read at times."""
    told = greater_number(body)
    chance = hashlib.sha256(repr(body["messages"]).encode()).digest()[0]
    other = "B" if told == "A" else "A"
    return {"first": "A", "odd": other if chance % 3 == 0 else told, "vague": told if chance % 2 else "Well."}.get(
        body["model"], told
    )


@pytest.fixture(scope="module")
def likelihood(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    return stub_run(tmp_path_factory.mktemp("likelihood"), stub_job(filters={"min_kept_pairs": 3}))


@pytest.fixture(scope="module")
def jury(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """A chat run of four jurors, aggregated by Dawid-Skene."""
    root = tmp_path_factory.mktemp("jury")
    with FaultServer(say=mixed) as server:
        others = [{"model": m, "base_url": server.url, "api_key_env": None} for m in ("odd", "first", "vague")]
        filters = {"aggregate": "dawid_skene", "min_agreement": 0.7, "max_abstention_share": 0.4}
        job = chat_job(server, {"jury": others, "concurrency": 4}, filters=filters, prompts={"per_iteration": 20})
        run = with_header(root, job)
        chat_loop(root, job).run()
    return run


@pytest.fixture(scope="module")
def reviewed(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """A run whose filter sends the least certain pairs to people."""
    filters = {"min_kept_pairs": 2, "review": {"top_uncertain": 2}}
    run = stub_run(tmp_path_factory.mktemp("reviewed"), stub_job(filters=filters))
    assert any(d.status == "review" for d in run.iteration(0).read("decisions", Decision))
    return run


@pytest.fixture(params=["likelihood", "jury", "reviewed"])
def run(request: pytest.FixtureRequest, tmp_path: Path) -> RunDir:
    """A copy of each."""
    shutil.copytree(request.getfixturevalue(request.param).path, tmp_path / "run")
    return RunDir.open(tmp_path / "run")


def decisions(run: RunDir, k: int, **settings: Any) -> list[tuple[Decision, Decision]]:
    return list(Iteration(run, k, settings_of(run, run.path, **settings)[0]).decisions())


def tree(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {str(p): (p.stat().st_mtime_ns, p.read_bytes()) for p in sorted(folder.rglob("*")) if p.is_file()}


def edit_votes(run: RunDir, k: int, change: Callable[[Vote], Vote]) -> None:
    path = run.iteration(k).path / "votes.jsonl"
    votes = run.iteration(k).read("votes", Vote)
    path.write_text("".join(change(v).model_dump_json() + "\n" for v in votes))


def test_the_runs_own_settings_give_its_own_decisions_to_the_last_bit(run: RunDir) -> None:
    reasons = set()
    for k in run.iterations():
        made = run.iteration(k).read("decisions", Decision)
        again = decisions(run, k)
        assert [b for b, _ in again] == [a for _, a in again] == made
        reasons |= {r for d in made for r in d.reasons}
    assert len(reasons) >= 1
    found = replay(run, *settings_of(run, run.path))
    assert [(t.before, t.after) for t in found.transitions if t.before != t.after] == []
    assert (found.examples, found.problems, found.settings) == ((), (), {})
    assert found.total("pairs") == sum(len(run.iteration(k).read("decisions", Decision)) for k in run.iterations())


def test_the_order_of_votes_in_the_file_does_not_matter(run: RunDir) -> None:
    for k in run.iterations():
        path = run.iteration(k).path / "votes.jsonl"
        rows = path.read_text().splitlines(keepends=True)
        random.Random(k).shuffle(rows)
        path.write_text("".join(rows))
        assert all(before == after for before, after in decisions(run, k))


def test_juror_weights_are_fitted_for_each_iteration_as_the_loop_does(jury: RunDir) -> None:
    for k in jury.iterations():
        written = json.loads((jury.iteration(k).path / "jurors.json").read_text())["weights"]
        fit = Iteration(jury, k, settings_of(jury, jury.path)[0]).juror_fit()
        assert fit is not None
        assert fit.weights == written
    assert len({json.dumps(w) for w in written.items()}) > 1
    # and they matter: without them the same votes decide otherwise
    assert any(before != after for before, after in decisions(jury, 0, aggregate="mean"))


@pytest.mark.parametrize(
    "filters", [{"min_margin": 0.3}, {"aggregate": "majority", "min_agreement": 0.5, "min_margin": 0.1}]
)
def test_other_filters_decide_as_a_run_with_them_would(
    tmp_path: Path, likelihood: RunDir, filters: dict[str, Any]
) -> None:
    other = stub_run(tmp_path, stub_job(filters={"min_kept_pairs": 3, **filters}))
    (tmp_path / "filters.yaml").write_text(json.dumps(filters))
    again = decisions(likelihood, 0, filters=tmp_path / "filters.yaml")
    assert [after for _, after in again] == other.iteration(0).read("decisions", Decision)
    assert [b for b, _ in again] != [a for _, a in again]
    by_key = [f"filters.{key}={value}" for key, value in filters.items()]
    assert decisions(likelihood, 0, overrides=by_key) == again


def test_a_replay_says_what_changes(likelihood: RunDir) -> None:
    settings, changed = settings_of(likelihood, likelihood.path, overrides=["filters.min_margin=0.3"])
    found = replay(likelihood, settings, changed)
    made = [d for k in likelihood.iterations() for d in likelihood.iteration(k).read("decisions", Decision)]
    assert found.settings == {"filters.min_margin": (0.0, 0.3)}
    assert sum(t.pairs for t in found.transitions) == found.total("pairs") == len(made)
    assert found.total("kept_before") == sum(d.status == "kept" for d in made)
    assert found.total("newly_dropped") == found.total("kept_before") - found.total("kept_after") > 0
    gone = {(t.before, t.after): t.pairs for t in found.transitions}
    assert gone["kept", "low_margin"] == found.total("newly_dropped")
    assert found.total("newly_kept") == found.total("reversed") == 0
    example = found.examples[0]
    assert example.kind == "newly_dropped"
    assert example.first is not None
    assert example.first.startswith("answer 0.")
    assert any(i.updated and not i.would_update for i in found.iterations)


def test_pairs_that_people_labelled_count_for_an_update(tmp_path: Path, likelihood: RunDir) -> None:
    shutil.copytree(likelihood.path, tmp_path / "run")
    run = RunDir.open(tmp_path / "run")
    kept = sum(d.status == "kept" for d in run.iteration(0).read("decisions", Decision))

    def update(least: int) -> tuple[bool, bool]:
        settings, changed = settings_of(run, run.path, overrides=[f"filters.min_kept_pairs={least}"])
        found = replay(run, settings, changed).iterations[0]
        return found.updated, found.would_update

    assert (update(kept), update(kept + 1)) == ((True, True), (True, False))
    path = run.iteration(0).path / "preferences.meta.json"
    write_json(path, json.loads(path.read_text()) | {"labels": {"joined": {"one": "first", "two": "second"}}})
    assert (update(kept + 2), update(kept + 3)) == ((True, True), (True, False))
    path = run.iteration(0).path / "updates.meta.json"
    write_json(path, json.loads(path.read_text()) | {"skipped": True})
    assert update(kept) == (False, True)


def test_winners_that_turn_round_are_counted(tmp_path: Path, likelihood: RunDir) -> None:
    shutil.copytree(likelihood.path, tmp_path / "run")
    run = RunDir.open(tmp_path / "run")
    turned = {"first": "second", "second": "first"}
    path = run.iteration(0).path / "decisions.jsonl"
    made = run.iteration(0).read("decisions", Decision)
    lines = [d.model_copy(update={"winner": d.winner and turned[d.winner]}).model_dump_json() for d in made]
    path.write_text("\n".join(lines) + "\n")
    found = replay(run, *settings_of(run, run.path))
    assert found.total("reversed") == sum(d.status == "kept" for d in made) > 0
    assert found.examples[0].kind == "reversed"


def test_replies_are_read_again_with_todays_parser(tmp_path: Path, jury: RunDir) -> None:
    shutil.copytree(jury.path, tmp_path / "run")
    run = RunDir.open(tmp_path / "run")
    lost = 0

    def unread(vote: Vote) -> Vote:  # a parser that doesn't know the letter B
        nonlocal lost
        if vote.raw_reply != "B":
            return vote
        lost += 1
        return vote.model_copy(update={"outcome": "abstain", "abstain_reason": "unparsed", "p_first": None})

    edit_votes(run, 0, unread)
    assert lost > 5
    assert any(before != after for before, after in decisions(run, 0))
    settings, changed = settings_of(run, run.path, parser=True)
    again = Iteration(run, 0, settings)
    for before, after in again.decisions():  # p(first) isn't the same: label probabilities aren't in the log
        assert (before.status, before.winner, before.reasons) == (after.status, after.winner, after.reasons)
        assert before.verdict.agreement == after.verdict.agreement
    assert again.reparsed == lost
    found = replay(run, settings, changed)
    assert found.total("reparsed") == lost
    assert {t.before for t in found.transitions if t.before != t.after} == set()


def test_a_refusal_that_the_server_told_stays_one(tmp_path: Path, jury: RunDir) -> None:
    shutil.copytree(jury.path, tmp_path / "run")
    run = RunDir.open(tmp_path / "run")
    refused = {"outcome": "abstain", "abstain_reason": "refused", "p_first": None, "raw_reply": "It is not for me."}
    edit_votes(run, 0, lambda v: v.model_copy(update=refused) if v.ballot.order == "forward" else v)
    again = Iteration(run, 0, settings_of(run, run.path, parser=True)[0])
    assert {tuple(after.verdict.abstentions) for _, after in again.decisions()} <= {
        ("refused",),
        ("refused", "unparsed"),
    }
    assert again.reparsed == 0


def test_scores_are_read_again(tmp_path: Path, likelihood: RunDir) -> None:
    shutil.copytree(likelihood.path, tmp_path / "run")
    run = RunDir.open(tmp_path / "run")

    def scored(vote: Vote) -> Vote:  # as the likelihood judge records them: p(first) exact, scores with four decimals
        if vote.p_first is None:
            return (
                vote.model_copy(update={"score_first": 0.0, "score_second": 0.4, "outcome": "tie"})
                if (vote.ballot.voice.endswith("fluency"))
                else vote
            )
        return vote.model_copy(
            update={"score_first": round(4 * math.log(vote.p_first / (1 - vote.p_first)), 4), "score_second": 0.0}
        )

    edit_votes(run, 0, scored)
    assert all(before == after for before, after in decisions(run, 0, parser=True))
    colder = decisions(run, 0, parser=True, overrides=["judge.score_temperature=2.0"])
    assert all(
        abs(after.verdict.p_first - 0.5) > abs(before.verdict.p_first - 0.5)
        for before, after in colder
        if before.verdict.agreement == 1 and before.verdict.p_first is not None and after.verdict.p_first is not None
    )
    strict = decisions(run, 0, parser=True, overrides=["judge.fluency_tolerance=0.3"])
    assert {after.verdict.guard_second for _, after in strict} == {1}
    with pytest.raises(UserError, match=r"judge\.score_temperature: .*add --parser"):
        settings_of(run, run.path, overrides=["judge.score_temperature=2.0"])


def calibration_of(run: RunDir, threshold: float, **changes: Any) -> Calibration:
    votes = by_pair([v for k in run.iterations() for v in run.iteration(k).read("votes", Vote)])
    panels = tuple(p.hash for p in panels_of(votes))
    found = Threshold(accepted=True, threshold=threshold, pairs=50, kept=40, errors=0, error_bound=0.05, panels=panels)
    settings = settings_of(run, run.path)[0].job.filters
    content = {
        "made": "2026-01-01T00:00:00+00:00", "alpha": 0.1, "delta": 0.1, "score": "margin", "slices": {"all": found},
        "judge_kind": "likelihood", "models": ("stub",), "panels": panels_of(votes), "aggregate": "mean",
        "min_votes": settings.min_votes, "max_abstention_share": settings.max_abstention_share, "guards": True,
        "labelled": ("x",), "labelled_digest": "0",
    }  # fmt: skip
    return Calibration.model_validate(content | changes)


def test_a_calibration_takes_the_place_of_the_consistency_rules(tmp_path: Path, likelihood: RunDir) -> None:
    file = tmp_path / "calibration.json"
    write_json(file, calibration_of(likelihood, 0.5).model_dump(mode="json"))
    found = replay(likelihood, *settings_of(likelihood, tmp_path, calibration=file))
    assert {t.after for t in found.transitions} == {"kept", "uncalibrated", "tie"}
    for _, after in decisions(likelihood, 0, calibration=file):
        sure = abs(after.verdict.p_first - 0.5) * 2 >= 0.5  # type: ignore[operator]
        assert (after.status == "kept") == sure
    write_json(file, calibration_of(likelihood, 0.5, models=("other",)).model_dump(mode="json"))
    with pytest.raises(UserError, match="the judge's model is stub, calibrated was other"):
        replay(likelihood, *settings_of(likelihood, tmp_path, calibration=file))
    dropping = settings_of(likelihood, tmp_path, calibration=file, overrides=["filters.uncalibrated=drop"])
    assert replay(likelihood, *dropping).total("kept_after") == 0


def test_a_damaged_file_is_one_line_that_names_it(tmp_path: Path, likelihood: RunDir) -> None:
    text = next(likelihood.path.glob("constitutions/*/constitution.json")).relative_to(likelihood.path)
    for n, name in enumerate(("iterations/0001/plan.json", str(text), "prompts/train.jsonl")):
        shutil.copytree(likelihood.path, tmp_path / f"run{n}")
        path = tmp_path / f"run{n}" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text('{"seed": 1}\n')
        run = RunDir.open(tmp_path / f"run{n}")
        found = replay(run, *settings_of(run, run.path, overrides=["filters.min_margin=0.3"]))
        assert found.problems
        for problem in found.problems:
            assert re.match(f"{path}.*: not a (Plan|Constitution|Prompt) .* left out$", problem)
        left = {"plan.json": [0, 2, 3], "train.jsonl": [0, 1, 2, 3]}.get(path.name)
        if left is None:  # the iterations under that text
            left = [k for k in run.iterations() if run.plan(k).constitution.hash != path.parent.name]
        assert [i.iteration for i in found.iterations] == left


@pytest.mark.parametrize("stage", ["decisions", "pairs", "completions"])
def test_a_damaged_line_costs_its_pairs_alone(run: RunDir, stage: str) -> None:
    path = run.iteration(0).path / f"{stage}.jsonl"
    rows = path.read_text().splitlines(keepends=True)
    lost = {json.loads(rows[1])[{"decisions": "pair_id"}.get(stage, "id")]}
    if stage == "completions":
        lost = {p.id for p in run.iteration(0).read("pairs", Pair) if lost & {p.first, p.second}}
    path.write_text("".join([rows[0], "{}\n", *rows[2:]]))
    aggregate = "mean" if "dawid" in run.header["job"]["filters"]["aggregate"] else None
    settings = settings_of(run, run.path, aggregate=aggregate)
    before = len((run.iteration(0).path / "decisions.jsonl").read_text().splitlines())
    found = replay(run, *settings)
    assert [p.partition(" (")[0] for p in found.problems] == [f"{path}:2: not a {stage.capitalize()[:-1]}"]
    assert found.iterations[0].pairs == before - len(lost)
    assert len(found.iterations) == len(run.iterations())


def test_an_iteration_whose_files_do_not_fit_is_named_and_left_out(run: RunDir) -> None:
    whole = replay(run, *settings_of(run, run.path))
    path = run.iteration(0).path / "decisions.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([lines[1], lines[0], *lines[2:]]))
    found = replay(run, *settings_of(run, run.path))
    (problem,) = found.problems
    assert problem.startswith(f"{path}: doesn't fit pairs.jsonl at pair ")
    assert problem.endswith("; iteration 1 is left out")
    assert found.iterations == whole.iterations[1:]
    assert sum(t.pairs for t in found.transitions) == sum(r.pairs for r in found.iterations)


def test_an_iteration_without_its_votes_is_named(run: RunDir) -> None:
    path = run.iteration(1).path / "votes.jsonl"
    path.unlink()
    assert replay(run, *settings_of(run, run.path)).problems == (f"{path}: missing; iteration 2 is left out",)


def test_a_damaged_vote_is_named_and_its_pair_left_out(run: RunDir) -> None:
    path = run.iteration(0).path / "votes.jsonl"
    rows = path.read_text().splitlines(keepends=True)
    rows[2] = rows[2].replace('"outcome":', '"outcom":')
    path.write_text("".join(rows))
    if "dawid" in run.header["job"]["filters"]["aggregate"]:
        settings = settings_of(run, run.path, aggregate="mean")
    else:
        settings = settings_of(run, run.path)
    found = replay(run, *settings)
    assert found.problems == (f"{path}:3: not a Vote (Field required)",)
    made = run.iteration(0).read("decisions", Decision)
    assert found.iterations[0].pairs == len(made) - 1


def test_nothing_is_written(run: RunDir) -> None:
    before = tree(run.path)
    for arguments in ([], ["--parser", "--aggregate", "majority", "--set", "filters.min_agreement=0", "--json"]):
        done = CliRunner().invoke(app, ["audit", str(run.path), "replay", *arguments])
        assert done.exit_code == 0, done.output
    assert tree(run.path) == before


def test_the_command(likelihood: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = tmp_path / "job.yaml"
    job.write_text("constitution: x\nfilters:\n  min_margin: 0.3\n")
    told = CliRunner().invoke(app, ["audit", "replay", str(likelihood.path), "--filters", str(job)])
    assert told.exit_code == 0, told.output
    for expected in ("filters.min_margin: 0.0 -> 0.3", "low_margin", "newly dropped", "no update any more"):
        assert expected in told.output
    as_json = json.loads(
        CliRunner().invoke(app, ["audit", str(likelihood.path), "replay", "--filters", str(job), "--json"]).output
    )
    assert as_json["settings"] == {"filters.min_margin": [0.0, 0.3]}
    own = CliRunner().invoke(app, ["audit", str(likelihood.path), "replay"])
    assert "every decision is as it was made" in own.output


@pytest.mark.parametrize(
    ("content", "overrides", "message"),
    [
        ("min_agremeent: 0.8", [], "did you mean `min_agreement`"),
        ("- 1", [], "expected filter keys"),
        ("judge: {kind: likelihood}", [], "the job has no `filters` section"),
        ("a: [", [], r"filters.yaml:1: not valid YAML"),
        ("min_agreement: 0.8", ["sampling.temperature=1"], "recorded votes can't answer for it"),
    ],
)
def test_what_cannot_be_replayed_is_said(
    likelihood: RunDir, tmp_path: Path, content: str, overrides: list[str], message: str
) -> None:
    file = tmp_path / "filters.yaml"
    file.write_text(content)
    with pytest.raises(UserError, match=message):
        settings_of(likelihood, tmp_path, file, overrides)


@pytest.mark.parametrize("stage", ["updates", "preferences"])
@pytest.mark.parametrize("content", ["{}", "[1]", "{", None])
def test_an_iteration_whose_meta_file_is_damaged_is_named_and_left_out(
    tmp_path: Path, likelihood: RunDir, stage: str, content: str | None
) -> None:
    shutil.copytree(likelihood.path, tmp_path / "run")
    run = RunDir.open(tmp_path / "run")
    meta = run.iteration(1).path / f"{stage}.meta.json"
    meta.unlink() if content is None else meta.write_text(content)
    found = replay(run, settings_of(run, tmp_path)[0])
    assert [i.iteration for i in found.iterations] == [k for k in run.iterations() if k != 1]
    (problem,) = found.problems
    assert problem.startswith(f"{meta}:")
    assert problem.endswith("; iteration 2 is left out")


def test_winners_that_were_cut_off_are_decided_again_as_the_loop_would(tmp_path: Path) -> None:
    with FaultServer(say=greater_number) as server:
        job = chat_job(server)
        run = with_header(tmp_path, job)
        loop = chat_loop(tmp_path, job)
        cutting(loop, lambda c: c.index == 0)
        loop.run()
    dropped = [
        d for k in run.iterations() for d in run.iteration(k).read("decisions", Decision) if "cut_off" in d.reasons
    ]
    assert dropped
    same = replay(run, *settings_of(run, tmp_path))
    assert same.total("other_reasons") == same.total("newly_kept") == same.total("newly_dropped") == 0
    kept = replay(run, *settings_of(run, tmp_path, overrides=["filters.cut_off=keep"]))
    assert kept.total("newly_kept") == len(dropped)


def test_a_run_from_before_the_rule_is_replayed_without_it(tmp_path: Path) -> None:
    with FaultServer(say=greater_number) as server:
        job = chat_job(server)
    run = with_header(tmp_path, job)
    header = json.loads((tmp_path / "run" / "run.json").read_text())
    del header["job"]["filters"]["cut_off"]
    write_json(tmp_path / "run" / "run.json", header)
    assert job.filters.cut_off == "drop"
    assert RunDir(run.path).job().filters.cut_off == "keep"
