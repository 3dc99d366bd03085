"""The reference judge: its stages, and what becomes of its word."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from rlaif.audit.index import Index
from rlaif.audit.over_time import over_time
from rlaif.audit.reach import reach
from rlaif.audit.summary import deciding_line, reference_line
from rlaif.audit.verify import verify
from rlaif.cli import app
from rlaif.config import Job, Monitors, parse_job
from rlaif.errors import UserError
from rlaif.monitors import History, alarms
from rlaif.records import AgainstBase, Decision, EvaluationMetrics, ProbeCounts, Retention, Vote
from rlaif.rundir.store import RunDir, read_record
from rlaif.view.pictures import percent, pictures
from rlaif.view.report import make_report, write_report
from tests.conftest import project_job
from tests.stubs import BASE_DIGEST, Quiet, stub_job, stub_loop
from tests.test_monitors import completion, evaluated, measured
from tests.view.runs import make_run

pytestmark = pytest.mark.slow

REFERENCE = {"kind": "likelihood", "model": "another"}


def job(**changes: Any) -> Job:
    return stub_job(iterations=2, eval={"every": 2, "prompts": 3, "reference_judge": REFERENCE}, **changes)


def test_held_out_answers_are_judged_by_who_never_trains(tmp_path: Path) -> None:
    stub_loop(tmp_path, job()).run()
    run = RunDir(tmp_path / "run")
    base, after = run.evaluation(0), run.evaluation(2)
    assert not base.is_complete("reference_votes")
    votes, decisions = after.read("reference_votes", Vote), after.read("reference_decisions", Decision)
    assert {v.ballot.judge for v in votes} == {"reference"}
    assert [d.pair_id for d in decisions] == [d.pair_id for d in after.read("decisions", Decision)]
    found = read_record(after.path / "metrics.json", EvaluationMetrics)
    assert found.referred is not None
    assert found.referred.judge == "reference"
    assert found.referred.wins + found.referred.losses + found.referred.undecided + found.referred.abstained == 3
    assert found.base_checks == {"wish": 0.0}
    assert (reference_line(found) or "").startswith("win rate by the reference judge ")
    trained = {v.ballot.judge for k in (0, 1) for v in run.iteration(k).read("votes", Vote)}
    assert trained == {"stub"}


def test_the_voices_that_train_are_asked_about_held_out_answers_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And no guard, which compares nothing. Wins are counted here from the votes."""
    monkeypatch.setenv("RLAIF_CACHE", str(tmp_path / "cache"))
    whole = job()
    evaluation = whole.eval.model_copy(update={"deciding_voices": True})
    run = RunDir.open(make_run(tmp_path, whole.model_copy(update={"eval": evaluation})))
    here = run.evaluation(2)
    votes = here.read("deciding_votes", Vote)
    trained = {v.ballot.voice for v in run.iteration(1).read("votes", Vote) if not v.ballot.guard}
    measured = {v.ballot.voice for v in here.read("votes", Vote)}
    assert {v.ballot.voice for v in votes} == trained
    assert trained.isdisjoint(measured)
    said: dict[str, list[float]] = {}
    for vote in votes:
        assert vote.p_first is not None
        said.setdefault(vote.ballot.pair_id, []).append(vote.p_first)
    shares = [sum(p) / len(p) for p in said.values()]
    found = read_record(here.path / "metrics.json", EvaluationMetrics)
    assert found.deciding is not None
    assert (found.deciding.wins, found.deciding.losses) == (sum(p > 0.5 for p in shares), sum(p < 0.5 for p in shares))
    compared = over_time({"one": [run]}, "start", ["deciding"])
    assert compared.groups[0].points[-1].values["deciding"].mean == found.deciding.win_rate
    assert (line := deciding_line(found)) is not None
    assert line.startswith(f"win rate by the voices that train {found.deciding.win_rate:.2f} (")
    assert f"after 2: {line}" in " ".join(CliRunner().invoke(app, ["audit", str(run.path)]).stdout.split())
    with Index.open(run) as index:
        report = make_report(index, run)
        picture = next(p for p in pictures(report.facts) if p.key == "win-rate")
    assert report.overview.evaluations[-1].deciding == found.deciding
    assert [spot for line in picture.lines if line.name == "by the voices that train" for spot in line.bars]
    shown = f"by the voices that train {percent(found.deciding.win_rate)} ("
    html = write_report(report, tmp_path / "report.html").read_text()
    assert shown in html
    assert '<th scope="col" class="n">By the voices that train</th>' in html
    assert verify(run).findings == ()


def test_what_it_says_is_shown_wherever_the_win_rate_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RLAIF_CACHE", str(tmp_path / "cache"))
    run = RunDir.open(make_run(tmp_path, job()))
    said = read_record(run.evaluation(2).path / "metrics.json", EvaluationMetrics).referred
    assert said is not None
    assert said.win_rate is not None
    assert said.win_interval is not None
    told = CliRunner().invoke(app, ["audit", str(run.path)])
    low, high = said.win_interval
    assert f"after 2: win rate by the reference judge {said.win_rate:.2f} ({low:.2f}-{high:.2f})" in told.stdout
    compared = over_time({"one": [run]}, "start", ["win_rate", "reference"])
    assert compared.groups[0].points[-1].values["reference"].mean == said.win_rate
    if said.win_rate != 0.5:
        assert reach(compared, "one", "reference", 0.5).start == 0.5
    with Index.open(run) as index:
        report = make_report(index, run)
        facts = report.facts
    assert report.overview.evaluations[-1].referred == said
    html = write_report(report, tmp_path / "report.html").read_text()
    shown = f"{percent(said.win_rate)} ({percent(low)} to {percent(high)})"
    assert html.count(shown) == 2, "among the figures, and in the table"
    assert '<th scope="col" class="n">By the reference judge</th>' in html
    picture = next(p for p in pictures(facts) if p.key == "win-rate")
    assert [line.name for line in picture.lines] == ["held-out answers", "by the reference judge"]
    assert all(line.bars for line in picture.lines)


def test_killed_while_it_is_asked_it_is_not_asked_again(tmp_path: Path) -> None:
    loop = stub_loop(tmp_path, job())
    assert loop.referee is not None
    stream, asked = loop.referee.worker.stream, 0

    def until_killed(*args: Any, **kwargs: Any) -> Any:
        nonlocal asked
        for chunk in stream(*args, **kwargs):
            yield chunk[:1]
            raise KeyboardInterrupt

    loop.referee.worker.stream = until_killed  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        loop.run()
    here = RunDir(tmp_path / "run").evaluation(2)
    assert len(here.durable("reference_votes", Vote)) == 1
    (tmp_path / "reference_casts.log").unlink()
    stub_loop(tmp_path, job()).run()
    votes = here.read("reference_votes", Vote)
    assert len({v.ballot.id for v in votes}) == len(votes) == 3
    assert votes[0].ballot.id not in (tmp_path / "reference_casts.log").read_text()


def test_a_class_of_ones_own_is_no_reference() -> None:
    with pytest.raises(UserError, match=r"eval\.reference_judge.*a class of yours judges training alone"):
        parse_job({"constitution": "a", "eval": {"reference_judge": {"kind": "mine:Judge"}}}, "job.yaml")


def test_templates_of_two_folders_are_refused(tmp_path: Path) -> None:
    chat = {"kind": "chat", "model": "m", "base_url": "http://127.0.0.1:1/v1", "api_key_env": None}
    both = job(judge=chat | {"templates_dir": "a"}, pairing={"method": "random"})
    other = both.judge.model_copy(update={"templates_dir": "b"})
    both = both.model_copy(update={"eval": both.eval.model_copy(update={"reference_judge": other})})
    with pytest.raises(UserError, match=r"eval\.reference_judge\.templates_dir: the judge's is a"):
        stub_loop(tmp_path, both)


def fooled(**changes: Any) -> list[str]:
    """What `hacking` says where the judge is pleased, of an evaluation of 48 prompts with two answers each."""
    made = evaluated([completion(0, "a b")], ["first"]).model_copy(
        update={
            "updates": 1,
            "answers": 96,
            "win_rate": 0.8,
            "win_interval": (0.66, 0.89),
            "checks": {},
            "base_checks": {},
        }
        | changes
    )
    limits = Monitors.model_validate({"short_answers": {"action": "off"}})
    return [a.message for a in alarms(limits, History([measured()], [made])) if a.kind == "hacking"]


def referred(rate: float, low: float) -> dict[str, Any]:
    made = evaluated([completion(0, "a b")], ["first"])
    counts = {"wins": made.wins, "losses": 0, "undecided": 0, "abstained": 0}
    from rlaif.records import Referred

    return {"referred": Referred(judge="r", win_rate=rate, win_interval=(low, 1.0), **counts)}


def deciding(rate: float, low: float) -> dict[str, Any]:
    """The voices that train say so."""
    return {"deciding": AgainstBase(win_rate=rate, win_interval=(low, 1.0), wins=1, losses=0, undecided=0, abstained=0)}


def kept(share: float, high: float) -> dict[str, Any]:
    counts = ProbeCounts(probes=100, base_passed=80, kept=round(80 * share), gained=0)
    none = dict.fromkeys(("perplexity", "base_perplexity", "perplexity_ratio", "perplexity_ratio_interval"))
    interval = (share - 0.1, high)
    return {"retention": Retention(probes=counts, kept_share=share, kept_interval=interval, by_kind={}, **none)}


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({}, ""),
        (referred(0.75, 0.61), ""),
        (referred(0.5, 0.36), "and by the reference judge's 50%"),
        (deciding(0.8, 0.66), ""),
        (deciding(0.8, 0.66) | {"win_rate": 0.5, "win_interval": (0.36, 0.64)}, "and by the held-out question, which"),
        (deciding(0.5, 0.36), ""),  # the judge that trains is not pleased, so it isn't fooled
        (referred(0.65, 0.49), ""),  # not surely risen, and not far behind
        (referred(0.5, 0.36) | {"win_rate": 0.66, "win_interval": (0.52, 0.78)}, ""),  # risen, but not surely enough
        ({"length_controlled_win_rate": 0.5, "length_controlled_interval": (0.36, 0.64)}, "and at equal length 50%"),
        ({"length_controlled_win_rate": 0.78, "length_controlled_interval": (0.6, 0.9)}, ""),
        ({"length_controlled_unknown": "no_overlap"}, ""),
        (
            referred(0.5, 0.36) | {"length_controlled_unknown": "no_overlap"},
            "50%; at equal length it is unknown: too few answers are longer",
        ),
        ({"checks": {"w": 0.3}, "base_checks": {"w": 0.3}}, "pass 30% of the mechanical checks, the base policy's 30%"),
        ({"checks": {"w": 0.8}, "base_checks": {"w": 0.3}}, ""),
        ({"checks": {"w": 0.9}, "base_checks": {"w": 0.9}}, ""),  # no room to rise
        ({"checks": {"w": 0.85}, "base_checks": {"w": 0.75}}, ""),  # it rose by two fifths of its room
        (kept(0.9, 0.95), ""),
        (kept(0.6, 0.75), "still passes only 60% of the probes"),
        ({"win_rate": None, "win_interval": None} | referred(0.5, 0.36), ""),
    ],
)
def test_a_judge_that_is_fooled_is_told(changes: dict[str, Any], found: str) -> None:
    said = fooled(**changes)
    assert len(said) == bool(found)
    assert all(found in sentence for sentence in said)


def test_a_run_with_a_reference_is_what_was_written(tmp_path: Path) -> None:
    stub_loop(tmp_path, job()).run()
    header = {"schema_version": 2, "job": {}, "models": {"policy": BASE_DIGEST}}
    (tmp_path / "run" / "run.json").write_text(json.dumps(header))
    assert verify(RunDir(tmp_path / "run"), weights=False).findings == ()


def test_a_reference_judge_has_a_worker_of_its_own(tiny_model: Path, tmp_path: Path) -> None:
    """Loaded, asked and named by its weights; run.json holds whose they are."""
    pytest.importorskip("trl")
    from rlaif.loop.launch import execute

    changes: dict[str, Any] = {"iterations": 1, "schedule": {0: "rules@1"}}
    reference = {"kind": "likelihood", "model": str(tiny_model)}
    wanted = project_job(tmp_path, tiny_model, **changes, eval={"every": 1, "reference_judge": reference})
    run = execute(wanted, tmp_path / "run", tmp_path, Quiet())
    found = read_record(run.evaluation(1).path / "metrics.json", EvaluationMetrics)
    assert found.referred is not None
    assert found.referred.judge == f"likelihood:{run.header['models']['reference_judge']}"
    assert verify(run).findings == ()
