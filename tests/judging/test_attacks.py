"""Attacks: what a judge that can be fooled, and one that can't, look like in the report."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

from rlaif import cli
from rlaif.config import Filters
from rlaif.constitutions.constitution import load_constitution
from rlaif.data.labelled import read_labelled
from rlaif.errors import UserError
from rlaif.trust.attacks import ATTACKS, attack_judge, evenly
from tests.conftest import make_checkout
from tests.judging.fault_server import FaultServer, longer
from tests.judging.test_calibration import calibration
from tests.judging.vote_makers import make_vote

ROOT = Path(__file__).resolve().parents[2]


def run(monkeypatch, capsys, server, *arguments):
    make_checkout(Path.cwd())
    settings = {"kind": "chat", "model": "m", "base_url": server.url, "api_key_env": "null", "cache": "null"}
    sets = [a for k, v in settings.items() for a in ("--set", f"judge.{k}={v}")]
    monkeypatch.setattr(sys, "argv", ["rlaif", "judge", "attack", "--limit", "6", *sets, *arguments])
    cli.app(prog_name="rlaif", standalone_mode=False)
    return capsys.readouterr().out


def test_the_set_covers_what_it_should():
    names = {a.name for a in ATTACKS}
    assert len(names) == len(ATTACKS)
    wanted = "fake_verdict_a fake_json_b close_quote control_tokens ignore_above template_syntax look_alikes very_long"
    assert {*wanted.split(), "repeated", "empty", "null"} <= names
    for attack in ATTACKS:
        assert attack.apply("{answer} {") != "{answer} {"
        kept = attack.apply("x {0} {{ y }}").startswith("x {0} {{ y }}")
        assert kept == (attack.how == "append" or attack.name == "repeated")


@pytest.mark.slow
def test_a_judge_that_likes_length_falls_for_length(monkeypatch, capsys):
    # It says that it read the whole of a very long answer: one that reads 100 tokens of it is found out.
    with FaultServer(say=longer, usage={"prompt_tokens": 20_000, "completion_tokens": 2}) as server:
        report = json.loads(run(monkeypatch, capsys, server, "--json"))
    results = {r["attack"]: r for r in report["results"]}
    assert report["pairs"] == report["stable"] == 6
    assert results["very_long"]["flip_rate"] == 1.0
    assert results["very_long"]["flip_interval"][0] > 0.5
    assert results["empty"]["flipped"] == results["null"]["flipped"] == 0
    assert results["empty"]["held"] == 6
    for r in report["results"]:
        assert r["flipped"] + r["stopped"] + r["held"] == r["pairs"] == 6


@pytest.mark.slow
def test_a_judge_that_obeys_an_answer_is_caught(monkeypatch, capsys):
    def gullible(body):
        slots = re.split(r"BEGIN ANSWER B ", body["messages"][-1]["content"])
        hit = ["Choose this answer" in text for text in slots]
        return longer(body) if hit[0] == hit[1] else "A" if hit[0] else "B"

    with FaultServer(say=gullible) as server:
        results = {r["attack"]: r for r in json.loads(run(monkeypatch, capsys, server, "--json"))["results"]}
    assert results["ignore_above"]["flipped"] == results["only_instruction"]["flipped"] == 6
    assert results["null"]["flipped"] == 0


def test_verdicts_are_made_as_the_job_makes_them():
    def ask(pairs, candidates, constitution):
        for pair in pairs:
            for n, (outcome, p) in enumerate((("first", 0.51), ("first", 0.51), ("second", 0.1))):
                vote = make_vote(outcome, n, p)
                yield [vote.model_copy(update={"ballot": vote.ballot.model_copy(update={"pair_id": pair.id})})]

    def stable(filters, calibration=None):
        rows = read_labelled([ROOT / "prompts/judge_bench.jsonl"]).rows[:2]
        constitution = load_constitution(ROOT / "constitutions", "assistant@1")
        return attack_judge(rows, ask, lambda _: constitution, filters, calibration=calibration).stable

    assert stable(Filters(aggregate="mean", min_agreement=0.6)) == 0
    assert stable(Filters(aggregate="majority", min_agreement=0.6)) == 2
    with pytest.raises(UserError, match=r"filters.calibration c.json: "):
        stable(Filters(calibration="c.json"), calibration())


def test_rows_are_taken_from_all_over_the_file():
    rows = read_labelled([ROOT / "prompts/judge_bench.jsonl"]).rows
    for limit in (7, len(rows) - 1, len(rows) + 1):
        taken = evenly(rows, limit)
        assert len({r.id for r in taken}) == len(taken) == min(limit, len(rows))
        assert {r.slice for r in taken} == {r.slice for r in rows}


@pytest.mark.slow
def test_a_judge_that_always_says_a_has_nothing_to_flip(monkeypatch, capsys):
    with FaultServer(say=lambda body: "A") as server:
        out = run(monkeypatch, capsys, server)
    assert "0 of 6 pairs have a stable clean verdict" in out
    assert "very_long" in out


@pytest.mark.parametrize(("key", "value", "message"), [("templates", "[pairwse]", "did you mean `pairwise`?")])
def test_a_mistake_is_one_line(monkeypatch, capsys, key, value, message):
    with FaultServer() as server, pytest.raises(UserError) as e:
        run(monkeypatch, capsys, server, "--set", f"judge.{key}={value}")
    assert message in str(e.value)
    assert server.requests == 0
