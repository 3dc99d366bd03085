"""The loop with a judge on two servers: kills, and a reference judge that has a list of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from contextlib import closing
from pathlib import Path

import pytest

from rlaif.judging.kinds import kind_of
from rlaif.loop import Loop
from rlaif.loop.running import Referee
from rlaif.records import EvaluationMetrics, Vote
from rlaif.rundir.store import RunDir, read_record
from rlaif.workers.inline import InlineWorker
from rlaif.workers.process import ProcessWorker
from tests.conftest import until
from tests.judging.fault_server import FaultServer
from tests.stubs import stub_job
from tests.test_loop_chat import ROOT, all_votes, chat_loop, greater_number
from tests.test_resume import outcome

pytestmark = pytest.mark.slow


CHAT = {"kind": "chat", "api_key_env": None, "cache": None, "max_retries": 0, "reask": 0}


def name(server: FaultServer) -> str:
    return f"127.0.0.1:{server.port}/v1"


# A kill


CONCURRENCY = 4
_KILLED = "import sys; from pathlib import Path; from tests.test_loop_servers import run; run(Path(sys.argv[1]))"


def run(root: Path) -> Loop:
    """Goes on with the run below `root` as its job file says, with the judge in a process of its own."""
    given = json.loads((root / "job.json").read_text())
    judge = {**CHAT, "model": "m", "base_url": given["urls"], "templates": ["pairwise", "pairwise_reasoned"]}
    judge["concurrency"] = CONCURRENCY
    job = stub_job(iterations=2, judge=judge, filters={"min_kept_pairs": 2}, pipeline={"staleness": given["staleness"]})
    loop = chat_loop(root, job)
    factory = "rlaif.judging.chat:make"
    with closing(ProcessWorker("judge", factory, {"settings": job.judge}, root / "judge.log")) as loop.judge:
        loop.run()
    return loop


def durable(root: Path) -> list[str]:
    """Ballots of the first iteration that have a durable vote."""
    return [v.ballot.id for v in RunDir(root / "run").iteration(0).durable("votes", Vote)]


@pytest.mark.parametrize("staleness", [0, 1])
def test_a_run_that_is_killed_while_two_servers_judge_asks_again_only_what_was_in_flight(
    staleness: int, tmp_path: Path
) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    with FaultServer(say=greater_number, latency_s=0.1) as a, FaultServer(say=greater_number, latency_s=0.1) as b:
        for root, servers in ((whole, [a]), (killed, [a, b])):
            root.mkdir()
            given = {"urls": [s.url for s in servers], "staleness": staleness}
            (root / "job.json").write_text(json.dumps(given))
        run(whole)
        a.seen.clear()
        command = [sys.executable, "-c", _KILLED, str(killed)]
        here = os.environ | {"PYTHONPATH": str(ROOT)}
        process = subprocess.Popen(command, cwd=killed, env=here, stderr=subprocess.PIPE)
        try:
            until(lambda: process.poll() is not None or len(durable(killed)) >= 8, 120)
            assert process.poll() is None, process.stderr and process.stderr.read().decode()
        finally:
            process.kill()
            process.communicate()
        until(lambda: a.open + b.open == 0, 120)  # the judge's process ends with the loop
        before, kept = len(durable(killed)), a.requests + b.requests
        loop = run(killed)
        asked = a.seen + b.seen
    (event,) = [e for e in loop.dir.events() if e.kind == "judging_interrupted" and e.iteration == 0]
    assert event.data["durable"] == before
    assert kept - before <= len(event.data["asked_again"]) <= 4 * CONCURRENCY
    assert max(asked.values()) <= 2
    assert sum(n == 2 for n in asked.values()) <= len(event.data["asked_again"])
    votes = Counter(v.ballot.id for v in all_votes(loop))
    assert len(asked) == len(votes) == votes.total()
    assert {v.server for v in all_votes(loop)} == {name(a), name(b)}
    ends = [outcome(root / "run") for root in (whole, killed)]
    for end in ends:  # who answered, and how fast
        end["rows"] = {path: rows for path, rows in end["rows"].items() if not path.endswith("votes.jsonl")}
    assert ends[0] == ends[1]


# A reference judge


def referred_loop(root: Path, urls: list[str]) -> Loop:
    """A likelihood judge decides (a stub), and one on several servers says what it thinks of held-out answers."""
    reference = {**CHAT, "model": "r", "base_url": urls, "concurrency": 2}
    evaluated = {"every": 2, "prompts": 4, "reference_judge": reference}
    loop = chat_loop(root, stub_job(iterations=2, eval=evaluated))
    loop.judge = loop.measurer
    asked = loop.job.eval.reference_judge
    assert asked is not None
    worker = InlineWorker("reference", "rlaif.judging.chat:make", {"settings": asked})
    loop.referee = Referee(kind_of(asked), kind_of(asked).name(None), worker)
    return loop


def test_a_reference_judge_on_two_servers(tmp_path: Path) -> None:
    with FaultServer(say=greater_number, latency_s=0.05) as a, FaultServer(say=greater_number, latency_s=0.05) as b:
        loop = referred_loop(tmp_path, [a.url, b.url])
        loop.run()
    here = loop.dir.evaluation(2)
    votes = here.read("reference_votes", Vote)
    assert len(votes) == a.requests + b.requests == 8  # both orders
    assert Counter(v.server for v in votes) == {name(a): a.requests, name(b): b.requests}
    assert {v.ballot.judge for v in votes} == {"chat:r"}
    found = read_record(here.path / "metrics.json", EvaluationMetrics).referred
    assert found is not None
    assert found.judge == "chat:r"
    assert found.wins + found.losses == 4


def test_what_one_server_of_the_reference_judge_cannot_answer_another_does(tmp_path: Path) -> None:
    with FaultServer(status=503) as down, FaultServer(say=greater_number) as up:
        loop = referred_loop(tmp_path / "one", [down.url, up.url])
        loop.run()
        assert down.requests
        alone = referred_loop(tmp_path / "alone", [up.url])
        alone.run()
    votes = loop.dir.evaluation(2).read("reference_votes", Vote)
    assert {(v.server, v.outcome != "abstain") for v in votes} == {(name(up), True)}
    # On another list it is the same judge, and asked the same.
    others = alone.dir.evaluation(2).read("reference_votes", Vote)
    assert {v.ballot.id for v in votes} == {v.ballot.id for v in others}
    both = [read_record(run.dir.evaluation(2).path / "metrics.json", EvaluationMetrics) for run in (loop, alone)]
    assert both[0].referred == both[1].referred
