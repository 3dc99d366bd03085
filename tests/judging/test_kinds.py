"""A judge is a union by kind: whose keys are whose, what an older run holds, and that nobody else asks for the kind."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from rlaif.config import (
    JUDGES,
    ChatSettings,
    Job,
    LikelihoodSettings,
    OwnJudge,
    load_job,
    may_change,
    of_run,
    parse_job,
)
from rlaif.errors import UserError
from rlaif.judging.kinds import ChatKind, LikelihoodKind, kind_of
from rlaif.loop.launch import check_resume
from rlaif.records import stored
from rlaif.rundir.store import RunDir, write_json

ROOT = Path(__file__).resolve().parents[2]
CHAT = {"kind": "chat", "model": "m", "base_url": "http://127.0.0.1:1/v1", "api_key_env": None}
HOME = ("rlaif/judging/kinds.py", "rlaif/judging/own.py")
"""Where a kind of judge is at home; its settings in rlaif/config.py name it as a field's value."""


def of(judge: dict[str, Any]) -> Any:
    return parse_job({"constitution": "a", "judge": judge}, "job").judge


def all_keys(judge: dict[str, Any]) -> dict[str, Any]:
    """A judge as run.json of older runs has it: every kind's keys."""
    defaults = of({"kind": "chat", "model": "m"}).model_dump(mode="json") | of({}).model_dump(mode="json")
    return {"votes": None} | defaults | judge


def test_nobody_else_asks_for_the_kind_of_a_judge() -> None:
    asks = re.compile(r"judge\w*(?:\.settings)?\.kind\s*(?:[!=]=|\b(?:not )?in\b)|\b_KINDS\b")
    # Where a variable holds the kind: `kind == "chat"`.
    named = re.compile(r"\bkind\s*[!=]=\s*[\"'](?:chat|likelihood)[\"']")
    found = []
    for folder in ("rlaif", "benchmarks", "examples", "scripts"):
        for path in [*(ROOT / folder).rglob("*.py"), *(ROOT / folder).rglob("*.html")]:
            name = path.relative_to(ROOT).as_posix()
            if name not in HOME:
                lines = enumerate(path.read_text().splitlines(), 1)
                found += [f"{name}:{n}: {line.strip()}" for n, line in lines if asks.search(line) or named.search(line)]
    assert found == []
    assert asks.search('if run.job.judge.kind == "chat":')
    assert named.search("if kind != 'likelihood':")


def test_each_kind_has_settings_of_its_own() -> None:
    assert type(of({})) is LikelihoodSettings
    assert type(of(CHAT)) is ChatSettings
    assert type(of({"kind": "my.judges:Mine", "slack": 1})) is OwnJudge
    assert isinstance(kind_of(of({})), LikelihoodKind)
    assert isinstance(kind_of(of(CHAT)), ChatKind)
    assert set(JUDGES) == {"likelihood", "chat"}


@pytest.mark.parametrize(
    ("judge", "message"),
    [
        ({"temperature": 1}, r"unknown key `judge\.temperature` for `judge\.kind: likelihood`; it is known to `chat`"),
        ({"jury": [{"model": "n"}]}, r"`judge\.jury` for `judge\.kind: likelihood`; it is known to `chat`"),
        (
            {**CHAT, "score_temperature": 2},
            r"`judge\.score_temperature` for `judge\.kind: chat`.*known to `likelihood`",
        ),
        ({**CHAT, "tempersture": 1}, r"unknown key `judge\.tempersture`; did you mean `temperature`"),
        ({**CHAT, "budget": {"call": 1}}, r"unknown key `judge\.budget\.call`; did you mean `calls`"),
        (
            {"kind": "chatt"},
            r"judge\.kind: no judge is called 'chatt'; there are `likelihood`, `chat`, and `mod",
        ),
        ({"kind": "my judge:It"}, r"judge\.kind: .*pattern"),
        ("chat", r"judge: expected a section"),
    ],
)
def test_a_key_of_another_kind_is_refused(judge: Any, message: str) -> None:
    with pytest.raises(UserError, match=message) as e:
        of(judge)
    assert "[" not in str(e.value).partition("judge")[0]  # pydantic's names of a union's members stay inside


def test_an_override_of_another_kinds_key_is_refused(tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text("constitution: a\n")
    assert load_job(tmp_path / "job.yaml", ["judge.score_temperature=2"]).judge.model_dump()["score_temperature"] == 2
    chat = ["judge.kind=chat", "judge.model=m", "judge.temperature=1"]
    assert load_job(tmp_path / "job.yaml", chat).judge.model_dump()["temperature"] == 1
    with pytest.raises(UserError, match=r"`judge\.temperature`.*known to `chat`"):
        load_job(tmp_path / "job.yaml", ["judge.temperature=1"])


@pytest.mark.parametrize("judge", [{}, CHAT, {"missing_eos_penalty": 3.0}, {**CHAT, "temperature": 0.5, "samples": 2}])
def test_older_runs_with_the_keys_of_all_kinds_stay_readable(tmp_path: Path, judge: dict[str, Any]) -> None:
    job = parse_job({"constitution": "a", "judge": judge}, "job")
    tree = job.model_dump(mode="json") | {"judge": all_keys(job.judge.model_dump(mode="json"))}
    if "kind" in judge:
        tree["judge"] |= {"chat_template_args": {}, "score_temperature": 4.0}
    assert parse_job(tree, "run.json") == job
    write_json(tmp_path / "run.json", {"schema_version": 1, "job": tree})
    assert RunDir(tmp_path).job() == job


def test_what_said_nothing_in_an_older_run_is_left_out_whatever_it_was(tmp_path: Path) -> None:
    job = parse_job({"constitution": "a", "judge": CHAT}, "job")
    tree = job.model_dump(mode="json") | {"judge": all_keys(job.judge.model_dump(mode="json") | {"batch_tokens": 77})}
    with pytest.raises(UserError, match=r"`judge\.batch_tokens`"):  # a job file's
        parse_job(tree, "job.yaml")
    write_json(tmp_path / "run.json", {"schema_version": 1, "job": tree})
    assert RunDir(tmp_path).job() == job
    (tmp_path / "iterations" / "0000").mkdir(parents=True)
    (tmp_path / "iterations" / "0000" / "completions.jsonl").write_text("{}\n")
    assert check_resume(RunDir(tmp_path), job, allow_change=False) is None
    other = of_run(tree, ["judge.kind=likelihood", "judge.model=x"])
    assert parse_job(other, "run.json").judge == of({"model": "x", "batch_tokens": 77})
    with pytest.raises(UserError, match=r"`judge\.temperature`"):
        parse_job(of_run(tree, ["judge.kind=likelihood", "judge.temperature=1"]), "run.json")


def test_a_run_of_the_first_schema_opens() -> None:
    stored = RunDir.open(ROOT / "tests/data/run_schema1")
    assert stored.job().judge.kind == stored.header["job"]["judge"]["kind"]
    assert "score_temperature" in stored.header["job"]["judge"]
    assert "score_temperature" not in stored.job().judge.model_dump()


def test_run_json_holds_the_keys_of_the_kind_alone() -> None:
    keys = json.loads(parse_job({"constitution": "a"}, "job").model_dump_json())["judge"]
    assert "score_temperature" in keys
    assert not {"temperature", "jury", "templates", "base_url"} & keys.keys()


def test_settings_of_every_kind_may_change_as_they_say() -> None:
    chat, likelihood = (parse_job({"constitution": "a", "judge": judge}, "job") for judge in (CHAT, {}))
    assert may_change("judge.budget.calls", chat)
    assert may_change("judge.batch_tokens", likelihood)
    assert not may_change("judge.temperature", chat)
    assert not may_change("judge.slack", likelihood)
    own = parse_job({"constitution": "a", "judge": {"kind": "m:J", "cache": "here", "slack": 1}}, "job")
    assert not may_change("judge.cache", own)  # ours may; of this one nobody knows
    assert not may_change("judge.slack", own)
    assert may_change("judge.precision", own)


@pytest.mark.parametrize(
    ("was", "overrides", "kind", "model"),
    [
        ({"kind": "m:J", "slack": 1}, ["judge.kind=likelihood"], "likelihood", "embedded:smollm2-135m-instruct"),
        ({"kind": "m:J", "slack": 1}, ["judge.kind=m:Other", "judge.slack=2"], "m:Other", "Other"),
        ({}, ["judge.kind=m:J"], "m:J", "J"),
        (CHAT, ["judge.kind=m:J", "judge.model=org/m"], "m:J", "org/m"),
        ({"kind": "m:J", "slack": 1}, ["judge.slack=3"], "m:J", "J"),
    ],
)
def test_a_runs_judge_may_be_overridden_by_another_kind(
    was: dict[str, object], overrides: list[str], kind: str, model: str
) -> None:
    tree = parse_job({"constitution": "a", "judge": was}, "job").model_dump(mode="json")
    found = parse_job(of_run(tree, overrides), "run.json").judge
    assert (found.kind, found.model) == (kind, model)
    assert (found.model_extra or {}).get("slack") == {"judge.slack=2": 2, "judge.slack=3": 3}.get(overrides[-1])


def test_a_key_of_a_newer_rlaif_costs_code_of_ones_own_no_setting() -> None:
    tree = parse_job({"constitution": "a", "judge": {"kind": "m:J", "slack": 3}}, "job").model_dump(mode="json")
    tree["filters"]["added_later"] = 1
    tree["also"] = {"new": True}
    found = stored(Job, tree)
    assert found.judge.model_extra == {"slack": 3}
    assert found.filters == parse_job({"constitution": "a", "judge": {"kind": "m:J"}}, "job").filters


def test_what_follows_from_a_judge_where_the_job_says_nothing() -> None:
    for judge, method, cut_off in (
        ({}, "best_worst", "keep"),
        (CHAT, "random", "drop"),
        ({"kind": "m:J"}, "random", "drop"),
    ):
        job = parse_job({"constitution": "a", "judge": judge}, "job")
        assert (job.pairing.method, job.filters.cut_off) == (method, cut_off)
    with pytest.raises(UserError, match="`best_worst` needs a judge that scores single answers, `chat` compares two"):
        parse_job({"constitution": "a", "judge": CHAT, "pairing": {"method": "best_worst"}}, "job")
