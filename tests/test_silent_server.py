"""A judge's server that answers nothing while others do its work is told, and so is its return."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from rlaif.audit.summary import status_of
from rlaif.config import Job, Monitors
from rlaif.judging.kinds import kind_of
from rlaif.loop import Loop
from rlaif.monitors import History, alarms, back_again, iteration_metrics
from rlaif.records import IterationMetrics, Plan, PolicyVersion, Vote
from tests.judging.fault_server import FaultServer
from tests.judging.vote_makers import make_vote
from tests.stubs import Quiet, stub_job
from tests.test_ahead import with_header
from tests.test_loop_chat import chat_job, chat_loop, greater_number
from tests.test_monitors import RULES, completion

LISTED = {"chat:m": ("a:1/v1", "b:1/v1")}


def vote(juror: str, server: str | None, cached: bool = False) -> Vote:
    made: Vote = make_vote("first")
    ballot = made.ballot.model_copy(update={"judge": juror})
    return made.model_copy(update={"ballot": ballot, "server": server, "cached": cached})


def votes(juror: str, **answered: int) -> list[Vote]:
    return [vote(juror, f"{server}:1/v1") for server, n in answered.items() for _ in range(n)]


def iteration(
    k: int, some: list[Vote], listed: Mapping[str, tuple[str, ...]] = LISTED, more: tuple[Vote, ...] = ()
) -> IterationMetrics:
    policy = PolicyVersion(iteration=0, digest="d")
    plan = Plan(iteration=k, seed=0, constitution=RULES.ref, policy=policy, prompt_ids=(), evaluate=False)
    return iteration_metrics(plan, [completion(0, "a")], [], some, [], [], [], 0, {}, servers=listed, more_votes=more)


def told(*iterations: IterationMetrics, **settings: Any) -> list[str]:
    watching = Monitors.model_validate({"short_answers": {"action": "off"}, "silent_server": settings})
    return [alarm.message for alarm in alarms(watching, History(iterations))]


def back(*iterations: IterationMetrics, **settings: Any) -> list[str]:
    return back_again(Monitors.model_validate({"silent_server": settings}), History(iterations))


def test_one_that_answers_nothing_is_named_with_what_the_others_answered() -> None:
    quiet = iteration(0, votes("chat:m", a=16))
    assert quiet.servers == {"chat:m": {"a:1/v1": 16, "b:1/v1": 0}}
    assert told(quiet) == [
        "the judge's server b:1/v1 answered none of 16 votes, others all of them; logs/judge.log says why"
    ]
    assert told(quiet, action="off") == []
    assert told(iteration(0, votes("chat:m", a=15, b=1))) == []


def test_few_votes_say_nothing() -> None:
    few = iteration(0, votes("chat:m", a=15))
    assert told(few) == []
    assert len(told(few, votes=7)) == 1


def test_only_votes_that_were_asked_anew_count() -> None:
    """A vote from the cache, or one that nobody answered, is no word of a server; one on an old pair is."""
    stored = [vote("chat:m", None, cached=True)] * 20 + [vote("chat:m", None)] * 20
    assert told(iteration(0, stored + votes("chat:m", a=15))) == []
    assert told(iteration(0, votes("chat:m", a=40), more=(vote("chat:m", "b:1/v1"),))) == []


def test_servers_that_are_not_listed_any_more_say_nothing() -> None:
    """Those of an earlier start of the run had other ports."""
    assert told(iteration(0, votes("chat:m", old=40, older=40))) == []


def test_each_juror_is_looked_at_with_its_own_servers() -> None:
    listed = {"chat:m": ("a:1/v1", "b:1/v1"), "chat:n@b": ("b:1/v1",), "chat:o": ("b:1/v1", "c:1/v1")}
    busy = [*votes("chat:m", a=40), *votes("chat:n@b", b=40)]
    assert told(iteration(0, busy, listed)) == []  # it had its hands full; and nobody asked the third juror anything
    (said,) = told(iteration(0, [*busy, *votes("chat:o", b=24)], listed))
    assert "c:1/v1 answered none of 24 votes" in said


def test_one_that_answers_again_is_told_once() -> None:
    quiet, few, both = (iteration(k, some) for k, some in enumerate([
        votes("chat:m", a=40), votes("chat:m", a=3), votes("chat:m", a=20, b=21),
    ]))  # fmt: skip
    assert back(quiet) == back(quiet, few) == back(both) == back(both, few) == []
    said = ["the judge's server b:1/v1 answers again, 21 votes in this iteration"]
    assert back(quiet, both) == back(quiet, few, both) == back(both, quiet, both) == said
    assert back(quiet, both, both) == []
    assert back(quiet, both, action="off") == []


def test_a_judge_says_which_servers_share_its_ballots() -> None:
    jury = [{"model": "n", "base_url": "http://me@b:1/v1", "api_key_env": None}]
    judge = {"kind": "chat", "model": "m", "base_url": ["http://a:1/v1/", "https://b:1/v1"], "api_key_env": None}
    assert kind_of(stub_job(judge={**judge, "jury": jury}).judge).listed() == {
        "chat:m": ("a:1/v1", "b:1/v1"),
        "chat:n@b:1": ("b:1/v1",),
    }
    assert kind_of(stub_job().judge).listed() == {}


# Over HTTP


def two_servers(a: FaultServer, b: FaultServer, iterations: int) -> Job:
    judge = {"base_url": [a.url, b.url], "templates": ["pairwise", "pairwise_reasoned"], "concurrency": 4}
    return chat_job(a, judge, iterations=iterations, constitution="rules@1", monitors={"short_answers": {"limit": 0}})


def said_of(loop: Loop) -> list[tuple[str, int | None, str]]:
    return [(e.kind, e.iteration, e.message) for e in loop.dir.events() if e.kind in ("alarm", "judge_server")]


@pytest.mark.slow
def test_a_run_tells_of_a_server_that_is_down_and_of_its_return(tmp_path: Path) -> None:
    with FaultServer(say=greater_number) as a:
        with FaultServer() as b:
            pass
        loop = with_header(chat_loop(tmp_path, two_servers(a, b, 2)))
        loop.run()
        name = f"127.0.0.1:{b.port}/v1"
        down = f"the judge's server {name} answered none of 24 votes, others all of them; logs/judge.log says why"
        assert said_of(loop) == [("alarm", k, down) for k in range(2)]
        assert [alarm.message for alarm in status_of(loop.dir).alarms] == [down, down]
        progress = loop.progress
        assert isinstance(progress, Quiet)
        assert f"alarm in iteration 1: {down}" in progress.notes
        with FaultServer(say=greater_number, port=b.port) as again:
            loop = chat_loop(tmp_path, two_servers(a, b, 4))
            loop.run()
            assert again.requests
    kind, iteration, message = said_of(loop)[2]
    assert (kind, iteration) == ("judge_server", 2)
    assert message.startswith(f"the judge's server {name} answers again, ")
    assert len(said_of(loop)) == 3


@pytest.mark.slow
def test_a_server_is_asked_however_little_there_is_to_ask(tmp_path: Path) -> None:
    """One ballot at a time goes to one after another: that one is silent says that it is down."""
    with FaultServer(say=greater_number) as a, FaultServer(say=greater_number) as b:
        job = two_servers(a, b, 1)
        judge = job.judge.model_copy(update={"concurrency": 1})
        loop = chat_loop(tmp_path, job.model_copy(update={"judge": judge}))
        loop.run()
    assert said_of(loop) == []
    assert abs(a.requests - b.requests) <= 1
