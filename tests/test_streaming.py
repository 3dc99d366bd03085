"""Streams: while the policy samples, the judge works on what is there; the log is that of the sequence."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from rlaif.errors import BudgetSpent, WorkerError
from rlaif.judging.kinds import kind_of
from rlaif.loop import Loop
from rlaif.loop.pairing import pairs_of_a_prompt
from rlaif.loop.streaming import streams
from rlaif.records import Completion, Score, Vote
from rlaif.rundir.store import RunDir, StageDir
from rlaif.workers.feed import Feed
from rlaif.workers.inline import InlineWorker
from rlaif.workers.placement import Placed
from rlaif.workers.process import ProcessWorker
from rlaif.workers.worker import Worker
from tests.conftest import project_job, until
from tests.judging.fault_server import FaultServer
from tests.stubs import Quiet, stub_job
from tests.test_loop_chat import chat_job, chat_loop, greater_number
from tests.test_resume import outcome

pytestmark = pytest.mark.slow


def log_of(run: Path) -> dict[str, Any]:
    """All rows, but for the order in which votes came and how long they took; final weights, and what was told."""
    found = outcome(run)
    for path in sorted(run.glob("iterations/*/*.jsonl")):
        if path.stem in ("completions", "scores", "pairs", "decisions"):
            found["rows"][str(path.relative_to(run))] = sorted(path.read_text().splitlines())
    for path in sorted(run.glob("iterations/*/*votes.jsonl")):
        votes = [json.loads(line) | {"latency_s": 0, "attempts": 1} for line in path.read_text().splitlines()]
        found["rows"][str(path.relative_to(run))] = sorted(json.dumps(v, sort_keys=True) for v in votes)
    for path in sorted(run.glob("iterations/*/updates.jsonl")):
        steps = [json.loads(line) | {"seconds": 0} for line in path.read_text().splitlines()]
        found["rows"][str(path.relative_to(run))] = steps
    return found


def in_an_order_of_their_own(loop: Loop, before_the_last: Callable[[StageDir], None] = lambda here: None) -> None:
    """Completions come one by one, prompts among each other; something happens before an iteration's last."""
    loop.sampler.ready()
    target: Any = loop.sampler.target  # type: ignore[attr-defined]
    sample, draw = target.sample, random.Random(3)

    def shuffled(**kwargs: Any) -> Iterator[list[Completion]]:
        rows = [c for chunk in sample(**kwargs) for c in chunk]
        draw.shuffle(rows)
        for n, row in enumerate(rows, 1):
            if n == len(rows) and kwargs["prefix"].isdigit():
                before_the_last(loop.dir.iteration(kwargs["iteration"]))
            yield [row]

    target.sample = shuffled


def asked_of_the_sampler(loop: Loop) -> dict[str, dict[str, Any]]:
    """What it is asked from here on, by the prefix of the answers' names."""
    loop.sampler.ready()
    target: Any = loop.sampler.target  # type: ignore[attr-defined]
    sample, asked = target.sample, dict[str, dict[str, Any]]()

    def noted(**kwargs: Any) -> Iterator[list[Completion]]:
        asked[kwargs["prefix"]] = kwargs
        yield from sample(**kwargs)

    target.sample = noted
    return asked


def votes_in(here: StageDir) -> int:
    """Durable ones of a stage that somebody is writing."""
    return (here.path / "votes.jsonl.partial").read_bytes().count(b"\n")


def someone_voted(here: StageDir) -> None:
    """Waits for a vote."""
    until(lambda: votes_in(here) > 0, 120)


def streamed_votes(run: RunDir) -> list[int | None]:
    """By iteration, the votes that were there before the last completion; None where nothing was streamed."""
    return [run.iteration(k).meta("completions").get("votes") for k in run.iterations()]


@pytest.mark.parametrize("slow", ["policy", "judge"])
@pytest.mark.parametrize("early_stop", [False, True])
def test_a_streamed_run_of_a_chat_judge_is_the_sequence(slow: str, early_stop: bool, tmp_path: Path) -> None:
    """Whether votes come before the last completion or after it."""
    asked_in: list[Path] = []

    def undecided(body: dict[str, Any]) -> str:
        if slow == "judge":
            until(lambda: all((here / "completions.jsonl").exists() for here in asked_in[-1].glob("iterations/*")), 120)
        if early_stop and "one letter" in body["messages"][0]["content"] and "question 1" in str(body["messages"]):
            return "A"  # these pairs' order flips, and nothing can save them
        return greater_number(body)

    judge = {"templates": ["pairwise", "pairwise_reasoned"], "early_stop": early_stop, "concurrency": 4}
    logs, votes = [], []
    with FaultServer(say=undecided) as server:
        for stream in (False, True):
            root = tmp_path / str(stream)
            root.mkdir()
            asked_in.append(root / "run")
            loop = chat_loop(root, chat_job(server, judge, pipeline={"stream": stream}, iterations=2))
            in_an_order_of_their_own(loop, someone_voted if stream and slow == "policy" else lambda here: None)
            loop.run()
            logs.append(log_of(root / "run"))
            votes.append(streamed_votes(loop.dir))
    assert votes[0] == [None, None]
    assert all(n is not None and (n > 0) == (slow == "policy") for n in votes[1])
    assert logs[0] == logs[1]


@pytest.mark.parametrize("slow", ["policy", "judge"])
def test_a_streamed_run_of_a_likelihood_judge_is_the_sequence_to_the_bit(
    slow: str, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pieces of four prompts; the real sampler, judge and learner."""
    pytest.importorskip("trl")
    from rlaif.judging.likelihood import LikelihoodJudge
    from rlaif.loop.launch import execute
    from rlaif.sampling import transformers
    from rlaif.sampling.role import SamplerRole

    monkeypatch.setattr(transformers, "BATCH", 6)
    sample, score = SamplerRole.sample, LikelihoodJudge.score
    streamed: list[RunDir] = []

    def slow_sample(self: SamplerRole, **kwargs: Any) -> Iterator[list[Completion]]:
        rank = {p.id: n for n, p in enumerate(kwargs["prompts"])}  # or the first piece could wait for the last row
        rows = sorted(
            (c for chunk in sample(self, **kwargs) for c in chunk), key=lambda c: (rank[c.prompt_id], -c.index)
        )
        yield rows[:-1]
        if slow == "policy" and streamed and kwargs["prefix"].isdigit():
            someone_voted(streamed[0].iteration(kwargs["iteration"]))
        yield rows[-1:]

    def slow_score(self: LikelihoodJudge, *args: Any, **kwargs: Any) -> Iterator[list[Score]]:
        if slow == "judge" and streamed:
            until(
                lambda: all(streamed[0].iteration(k).is_complete("completions") for k in streamed[0].iterations()),
                120,
            )
        yield from score(self, *args, **kwargs)

    monkeypatch.setattr(SamplerRole, "sample", slow_sample)
    monkeypatch.setattr(LikelihoodJudge, "score", slow_score)
    logs, votes = [], []
    for stream in (False, True):
        root = tmp_path / str(stream)
        root.mkdir()
        if stream:
            streamed.append(RunDir(root / "run"))
        job = project_job(
            root,
            tiny_model,
            iterations=1,
            schedule={0: "rules@1"},
            prompts={"per_iteration": 12},
            eval={"prompts": 1, "kl_prompts": 0},
            judge={"batch_tokens": 64},
            pairing={"max_pairs_per_prompt": 2},
            sampling={"max_tokens": 30},
            pipeline={"stream": stream},
        )
        assert kind_of(job.judge).prompts_at_once(pairs_of_a_prompt(job) * 30) == 4
        run = execute(job, root / "run", root, Quiet())
        log = log_of(run.path)
        log["events"] = {key: n for key, n in log["events"].items() if key[0] != "finished"}  # heads hold times
        log["policies"] = [run.iteration(k).policy_made() for k in run.iterations()]
        logs.append(log)
        votes.append(streamed_votes(run))
    assert logs[0]["policies"][-1] is not None
    assert all(n is not None and (n > 0) == (slow == "policy") for n in votes[1])
    assert logs[0] == logs[1]


# When something stops it.


def test_a_judge_that_stops_stops_the_sampling_and_what_was_asked_about_stays(tmp_path: Path) -> None:
    with FaultServer(say=greater_number) as server:
        loop = chat_loop(tmp_path, chat_job(server, {"budget": {"calls": 5}, "concurrency": 2}))
        in_an_order_of_their_own(loop, lambda here: until(lambda: votes_in(here) == 5, 120))
        with pytest.raises(BudgetSpent):
            loop.run()
        here = loop.dir.iteration(0)
        sampled = {c.id: c for c in here.durable("completions", Completion)}
        assert len(sampled) >= 3
        assert len(here.durable("votes", Vote)) == 5
        again = chat_loop(tmp_path, chat_job(server, pipeline={"stream": False}))
        again.run()
        after = {c.id: c for c in here.read("completions", Completion)}
        assert {i: after[i] for i in sampled} == sampled
        cast = [v for k in range(3) for v in loop.dir.iteration(k).read("votes", Vote)]
        evaluated = [v for n in loop.dir.evaluations() if n for v in loop.dir.evaluation(n).read("votes", Vote)]
        folders = [loop.dir.iteration(k) for k in range(3)]
        at_change = [v for f in folders if f.is_complete("change_votes") for v in f.read("change_votes", Vote)]
        assert len(cast) + len(evaluated) + len(at_change) == server.requests  # nobody was asked twice
    told = [e for e in loop.dir.events() if e.kind == "judging_interrupted"]
    assert [(e.iteration, e.data["durable"], e.data["asked_again"]) for e in told] == [(0, 5, [])]


def test_a_sampler_that_fails_is_the_runs_error_once_what_was_fed_is_answered(tmp_path: Path) -> None:
    with FaultServer(say=greater_number, latency_s=0.05) as server:
        loop = chat_loop(tmp_path, chat_job(server))
        first = asked_of_the_sampler(loop)
        target: Any = loop.sampler.target  # type: ignore[attr-defined]
        sample, before = target.sample, {*threading.enumerate()}

        def failing(**kwargs: Any) -> Iterator[list[Completion]]:
            chunks = sample(**kwargs)
            yield next(chunks)
            if kwargs["prefix"] == "0000":
                raise RuntimeError("out of memory")
            yield from chunks

        target.sample = failing
        with pytest.raises(WorkerError, match="sampler worker failed: RuntimeError: out of memory"):
            loop.run()
        votes = loop.dir.iteration(0).durable("votes", Vote)
        assert len(votes) == server.requests > 0
        assert "sampling" not in {t.name for t in {*threading.enumerate()} - before}
        there = {c.id for c in loop.dir.iteration(0).durable("completions", Completion)}
        again = chat_loop(tmp_path, chat_job(server))
        second = asked_of_the_sampler(again)
        again.run()
    assert (first["0000"]["have"], second["0000"]["have"]) == (set(), there)
    assert first["0000"]["prompts"] == second["0000"]["prompts"], "each in its place"


def test_completions_that_nobody_was_asked_about_are_sampled_anew(tmp_path: Path) -> None:
    """A part of them would be batched otherwise, and that changes samples."""
    with FaultServer(say=greater_number) as server:
        loop = chat_loop(tmp_path, chat_job(server, pipeline={"stream": False}))
        here = loop.dir.iteration(0)
        here.path.mkdir(parents=True)
        (here.path / "completions.jsonl.partial").write_text("no row\n")
        loop.run()
    assert len(here.read("completions", Completion)) == 18


# Whether it is streamed.


def test_it_is_streamed_where_judge_and_sampler_share_no_device() -> None:
    together, alone = Placed("process", ("0",)), Placed("process", ("1",))
    chat = stub_job(judge={"kind": "chat", "model": "m", "api_key_env": None})
    assert streams(chat, {"sampler": together, "judge": together})
    assert not streams(stub_job(), {"sampler": together, "judge": together})
    assert streams(stub_job(cluster={"judge": {"replicas": 2}}), {"sampler": together, "judge": together})
    assert not streams(stub_job(cluster={"learner": {"processes": 1}}), {"sampler": together, "judge": together})
    assert not streams(stub_job(), {"sampler": Placed("process"), "judge": Placed("process")})
    assert streams(stub_job(), {"sampler": together, "judge": alone})
    assert not streams(stub_job(pipeline={"stream": False}), {"sampler": together, "judge": alone})
    assert streams(stub_job(pipeline={"stream": True}), {"sampler": together, "judge": together})


# A call that is fed.


@pytest.fixture(params=["inline", "process"])
def doubling(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Worker]:
    make: Any = InlineWorker if request.param == "inline" else ProcessWorker
    with make("doubling", "tests.doubling:Doubling", {}, tmp_path / "log") as worker:
        yield worker


def test_a_call_is_fed_from_another_thread(doubling: Worker) -> None:
    feed = Feed()
    feed.put(2)
    answers = doubling.stream("run", feed=feed, first=[1])
    assert [next(answers), next(answers)] == [2, 4]

    def later() -> None:
        for item in range(3, 50):
            feed.put(item)
        feed.end()

    thread = threading.Thread(target=later)
    thread.start()
    assert list(answers) == [2 * item for item in range(3, 50)]
    thread.join()
    feed.put(1)  # nobody takes it any more
    assert doubling.call("add", a=1, b=2) == 3


def test_a_fed_call_that_fails_or_is_given_up_leaves_the_worker_usable(doubling: Worker) -> None:
    feed = Feed()
    feed.put(-1)
    with pytest.raises(WorkerError, match="-1 is none"):
        list(doubling.stream("run", feed=feed, first=[]))
    feed.put(7)
    given_up = doubling.stream("run", feed=Feed(), first=[1, 2])
    assert next(given_up) == 2
    given_up.close()  # type: ignore[attr-defined]
    assert doubling.call("add", a=1, b=2) == 3


# Kills: at writes of every stage, going on with the other setting each time.


@pytest.fixture(scope="module", params=["chat", "likelihood"])
def killed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    root = tmp_path_factory.mktemp("kills")
    settings = json.dumps([{"stream": False}, {"stream": True}, {"stream": False}])
    command = [sys.executable, "-m", "tests.kill_driver", str(root), "30", "0", "--pipeline", request.param, settings]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return root, json.loads(done.stdout)


def test_killed_streams_end_as_the_sequence_and_ask_nobody_twice(killed: tuple[Path, dict[str, Any]]) -> None:
    root, said = killed
    expected = outcome(root / "whole" / "run")
    assert {"iterations/completions", "iterations/votes"} < {k["stage"] for k in said["kills"]}
    for kill in said["kills"]:
        assert kill["exits"][-1] == 0, kill
        assert outcome(root / kill["folder"] / "run") == expected, kill["label"]
        assert not list((root / kill["folder"] / "run").rglob("*.partial")), kill["label"]
    assert {k["label"]: k["again"] for k in said["kills"] if k["again"]} == {}
    counts = [Counter((root / k["folder"] / "casts.log").read_text().split()) for k in said["kills"]]
    assert any(max(c.values()) > 1 for c in counts), "no vote was lost with its torn line"
