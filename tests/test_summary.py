"""What `rlaif status` and the model card say, from a stub run's directory."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from markupsafe import escape

from rlaif.audit.index import Index
from rlaif.audit.overview import overview
from rlaif.audit.summary import final_tables, held_out_answers, status_of, status_table, write_summary
from rlaif.cli.audit_run import print_overview
from rlaif.export import model_card
from rlaif.records import Preference
from rlaif.rundir.store import RunDir
from rlaif.view.facts import read_facts
from rlaif.view.html import render
from rlaif.view.report import make_report
from tests.data.make_run import write_header
from tests.stubs import stub_job, stub_loop, stub_prompts

STORED = Path(__file__).parent / "data" / "run_schema1"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RLAIF_CACHE", str(tmp_path / "cache"))


def test_status_counts_iterations_from_one_for_people(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = stub_job(iterations=1, monitors={"short_answers": {"limit": 99}})
    stub_loop(tmp_path, job).run()
    write_header(tmp_path / "run", job)
    run = RunDir.open(tmp_path / "run")
    status_table(run)
    assert "alarm in iteration 1: sampled answers have" in " ".join(capsys.readouterr().out.split())
    said = json.loads(status_of(run).model_dump_json())
    assert (said["iterations_done"], said["alarms"][0]["iteration"]) == (1, 0)
    assert said["constitution"]["name"] == "rules"


def test_status_tells_a_run_that_is_at_work_from_one_to_go_on_with(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run").mkdir()
    write_header(tmp_path / "run", stub_job())
    run = RunDir.open(tmp_path / "run")
    status_table(run)
    assert "go on with: rlaif run" in capsys.readouterr().out
    assert not (run.path / ".lock").exists()  # who only looks makes nothing
    with run.lock():
        status_table(run)
        assert status_of(run).at_work
    said = capsys.readouterr().out
    assert "a process is at work on it now" in said
    assert "go on with" not in said
    assert not status_of(run).at_work


def test_status_counts_one_as_one_and_says_no_null(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = stub_job(iterations=1)
    stub_loop(tmp_path, job).run()
    write_header(tmp_path / "run", job)
    status_table(RunDir.open(tmp_path / "run"))
    said = " ".join(capsys.readouterr().out.split())
    assert "; 1 policy " in said
    assert ", 1 learner's state " in said
    assert "checkpoints after 1 iteration, by keep_checkpoints (not set here): not set " in said


@pytest.mark.slow
def test_pairs_of_a_skipped_update_trained_nothing() -> None:
    """The second iteration's update was skipped; in this stored run its pairs still count as trained."""
    run = RunDir.open(STORED)
    skipped = [k for k in run.iterations() if run.iteration(k).meta("updates")["skipped"]]
    assert skipped
    left = sum(len(run.iteration(k).read("preferences", Preference)) for k in skipped)
    all_ = sum(len(run.iteration(k).read("preferences", Preference)) for k in run.iterations())
    assert left
    assert f"pairs trained on: {all_ - left} of 20 judged" in model_card(run, 4)
    facts = read_facts(Index.open(run), run)
    assert facts.trained == all_ - left
    assert f"Only {all_ - left} preferences were trained on." in make_report(Index.open(run), run).caveats
    html = render("report.html", report=(r := make_report(Index.open(run), run)), facts=r.facts, pictures=[], style="",
                  reasons={}, answers=[], job_yaml="")  # fmt: skip
    assert f"{all_ - left} trained on" in html


@pytest.mark.slow
def test_abstentions_of_an_evaluation_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(STORED, tmp_path / "run")
    path = tmp_path / "run" / "evaluations" / "0004" / "metrics.json"
    metrics = json.loads(path.read_text())
    path.write_text(json.dumps(metrics | {"win_rate": None, "win_interval": None, "abstained": metrics["answers"]}))
    run = RunDir.open(tmp_path / "run")
    final_tables(run, write_summary(run))
    some = f"{metrics['answers']} of {metrics['answers']}"
    assert f"after 4: the judge abstained on {some} answers" in " ".join(capsys.readouterr().out.split())
    assert f"| 4 | rules@2 | -, {some} abstained |" in model_card(run, 4)
    assert f"the judge abstained on {some} held-out answers" in " ".join(make_report(Index.open(run), run).caveats)


CONTROLLED = {"length_controlled_win_rate": 0.6, "length_controlled_interval": [0.4, 0.8]}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fields", "line"),
    [
        (CONTROLLED, "after 4: win rate at equal length 0.60 (0.40-0.80)"),
        (
            {"length_controlled_unknown": "one_sided"},
            "after 4: win rate at equal length unknown: all verdicts are for one side",
        ),
        (
            {"length_controlled_unknown": "no_overlap"},
            "after 4: win rate at equal length unknown: too few answers are longer, or too few are shorter, than the "
            "base policy's",
        ),
        ({}, None),  # of a run that began before it was measured
    ],
)
def test_the_win_rate_at_equal_length_stands_beside_the_raw_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], fields: dict[str, Any], line: str | None
) -> None:
    shutil.copytree(STORED, tmp_path / "run")
    path = tmp_path / "run" / "evaluations" / "0004" / "metrics.json"
    raw = {"win_rate": 0.9, "win_interval": [0.8, 0.95]}
    path.write_text(json.dumps(json.loads(path.read_text()) | raw | fields))
    run = RunDir.open(tmp_path / "run")
    final_tables(run, write_summary(run))
    in_tables = capsys.readouterr().out
    index = Index.open(run)
    print_overview(overview(index, run))
    in_audit = capsys.readouterr().out
    for out in (in_tables, in_audit):
        assert [found for found in out.splitlines() if "equal length" in found] == ([line] if line else [])
    assert "win rate 0.90 (0.80-0.95)" in in_audit
    report = make_report(index, run)
    html = render(
        "report.html", report=report, facts=report.facts, pictures=[], style="", reasons={}, answers=[], job_yaml=""
    )
    assert ("60 % (40 % to 80 %)" in html.replace("\N{NO-BREAK SPACE}", " ")) == (fields == CONTROLLED)
    why = line.partition("unknown: ")[2] if line else ""
    assert html.count(f"unknown: {escape(why)}") == (2 if why else 0), "in the figures and in the table"
    about_length = [c for c in report.caveats if "may be a matter of length" in c]
    assert len(about_length) == bool(fields)
    assert all(why in c for c in about_length)
    in_card = "0.60 (0.40-0.80)" if fields == CONTROLLED else f"unknown: {why}" if why else ""
    assert f"| 0.90 (0.80-0.95) | {in_card} |" in model_card(run, 4)


@pytest.mark.slow
def test_a_model_card_has_the_reference_judges_word(tmp_path: Path) -> None:
    shutil.copytree(STORED, tmp_path / "run")
    path = tmp_path / "run" / "evaluations" / "0004" / "metrics.json"
    counts = {"wins": 5, "losses": 3, "undecided": 0, "abstained": 0}
    referred = {"judge": "chat:big@host", "win_rate": 0.62, "win_interval": [0.31, 0.86], **counts}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"referred": referred}))
    run = RunDir.open(tmp_path / "run")
    assert "- win rate by the reference judge 0.62 (0.31-0.86); it never trains" in model_card(run, 4)
    assert "reference judge" not in model_card(run, 2)


def test_a_prompt_that_nobody_answered_is_not_shown(tmp_path: Path) -> None:
    job = stub_job(iterations=1, eval={"prompts": 2})
    stub_loop(tmp_path, job).run()
    write_header(tmp_path / "run", job)
    (tmp_path / "run/prompts").mkdir(exist_ok=True)
    rows = "".join(p.model_dump_json() + "\n" for p in stub_prompts(4, "held"))
    (tmp_path / "run/prompts/held_out.jsonl").write_text(rows)
    shown = held_out_answers(RunDir.open(tmp_path / "run"))
    assert len(shown) == 2
    assert all(answer for p in shown for answer in p.answers.values())
