"""One model on several servers: who is asked, what becomes of the ballots of one that fails, and what is said of it."""

from __future__ import annotations

import asyncio
import random
import re
import time
from collections import Counter
from contextlib import ExitStack
from types import SimpleNamespace

import pytest

from rlaif.audit.overview import price_of
from rlaif.config import ChatSettings
from rlaif.errors import JudgeUnavailable, UserError
from rlaif.judging import servers
from rlaif.judging.ballots import juror_names
from rlaif.judging.servers import Address, Pace, least_busy, others_left, to_be_tried
from rlaif.judging.spending import spent_on
from rlaif.judging.verdicts import aggregate, by_pair
from rlaif.records import digest
from tests.judging.fault_server import FaultServer
from tests.judging.test_chat import TEXT, Cast, settings

NOWHERE = "http://127.0.0.1:9/v1"


@pytest.fixture(autouse=True)
def _key(monkeypatch):
    monkeypatch.setenv("TEST_KEY", "sk-very-secret-key-0123456789")


@pytest.fixture
def clock(monkeypatch):
    """The time that servers are left out by; tests move it on."""
    now = SimpleNamespace(at=100.0)
    monkeypatch.setattr(servers, "time", SimpleNamespace(monotonic=lambda: now.at))
    return now


def of(*servers_or_urls, **changes):
    """Settings of a judge on these servers."""
    urls = [s if isinstance(s, str) else s.url for s in servers_or_urls]
    return settings("http://h/v1", base_url=urls, **changes)


def name(server):
    return f"127.0.0.1:{server.port}/v1"


def addresses(n):
    return [Address(f"http://h{i}/v1/", Pace(None), Pace(None)) for i in range(n)]


def said(cast):
    """Everything of the votes but how they came about, by ballot."""
    how = {"latency_s", "attempts", "server", "fingerprint", "cached"}
    return {v.ballot.id: v.model_dump(exclude=how) for v in cast.votes}


# Who is asked


def test_the_least_busy_one_is_asked():
    a, b, c = every = addresses(3)
    with a.asked(), a.asked(), b.asked():
        assert least_busy(every, ()) is c
        with c.asked(), c.asked():
            assert least_busy(every, ()) is b
            assert least_busy(every, {b}) is a
    assert [x.under_way for x in every] == [0, 0, 0]


def test_of_equally_busy_ones_the_one_is_asked_that_waited_longest(clock):
    """Or a judge with little to do would never ask the last one, and never see that it is gone."""
    every = addresses(3)
    asked = []
    for _ in range(7):
        clock.at += 1
        with (least := least_busy(every, ())).asked():
            asked.append(every.index(least))
    assert asked == [0, 1, 2, 0, 1, 2, 0]


def test_one_that_fails_is_left_out_longer_and_longer_and_tried_by_one(clock):
    a, b = every = addresses(2)
    waits = []
    for _ in range(9):
        spell, began = a.spell, clock.at
        a.failed(spell, 1.0)
        a.failed(spell, 1.0)  # another request that was under way: no news
        assert not a.is_in
        assert least_busy(every, ()) is b
        assert to_be_tried(every, ()) is None
        while to_be_tried(every, ()) is None:
            clock.at += 0.5
        waits.append(clock.at - began)
        with a.tried_again():
            assert to_be_tried(every, ()) is None  # others go elsewhere meanwhile
    assert waits == [1, 2, 4, 8, 16, 32, 60, 60, 60]
    assert a.answered(a.spell)
    assert a.is_in
    a.failed(a.spell, 1.0)
    clock.at += 1
    assert a.is_due


def test_what_was_asked_before_it_failed_takes_it_back_in_no_more(clock):
    [a] = addresses(1)
    before = a.spell
    assert a.failed(before, 1.0)
    assert not a.answered(before)
    assert not a.is_in


def test_one_that_asks_to_wait_is_left_out_so_long_and_no_longer_the_next_time(clock):
    [a] = addresses(1)
    for asked, until in ((20.0, 20.0), (20.0, 20.0), (500.0, 60.0)):
        a.failed(a.spell, 1.0, asked)
        clock.at += until - 0.1
        assert not a.is_due
        clock.at += 0.1
        assert a.is_due
    a.failed(a.spell - 1, 1.0, 30.0)  # an older request was asked to wait, too
    assert not a.is_due


def test_with_all_of_them_out_the_one_that_is_due_first_is_asked(clock):
    a, b = every = addresses(2)
    a.failed(a.spell, 4.0)
    b.failed(b.spell, 2.0)
    assert to_be_tried(every, ()) is least_busy(every, ()) is b
    assert to_be_tried(every, {b}) is a
    assert not others_left(every, {b})
    with b.tried_again():
        assert to_be_tried(every, ()) is a  # one that may hang holds nobody up
    clock.at += 4
    assert others_left(every, {b})


# What a job says


def test_a_list_is_named_by_its_model_alone():
    assert juror_names(of(NOWHERE).jurors) == ["chat:m"]
    assert juror_names(of(NOWHERE, "http://h/v1", jury=[{"model": "m", "base_url": NOWHERE}]).jurors) == [
        "chat:m",
        "chat:m@127.0.0.1:9",
    ]
    jury = [{"model": "m", "base_url": ["http://g/v1"], "temperature": 1.0}]
    assert juror_names(of(NOWHERE, jury=jury).jurors) == ["chat:m", "chat:m#2"]


def test_number_and_order_of_the_servers_change_no_ballot():
    urls = ["http://a/v1", "http://b/v1/", "http://c/v1"]
    found = {tuple(b.id for b in Cast(of(*some), 3).ballots) for some in (urls, urls[::-1], urls[:1], ["http://d/v1"])}
    assert len(found) == 1
    assert found != {tuple(b.id for b in Cast(settings(urls[0]), 3).ballots)}


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ([], "expected http"),
        (["http://a/v1", 7], "in quotes"),
        (8000, "in quotes"),
        (["http://a/v1", "http://a/v1/"], "named twice"),
        (["http://a/v1", "http://me:hunter2@b:x/v1"], "no address"),
    ],
)
def test_a_list_that_is_none(given, says):
    with pytest.raises(ValueError, match=says) as error:
        ChatSettings.model_validate({"kind": "chat", "model": "m", "base_url": given})
    [found] = error.value.errors(include_input=False)
    assert found["loc"] == ("base_url",)
    assert "hunter2" not in found["msg"]


def test_two_jurors_on_the_same_servers_in_another_order_are_one_voice():
    jury = [{"model": "m", "base_url": ["http://b/v1", "http://a/v1/"]}]
    with pytest.raises(ValueError, match="one voice"):
        of("http://a/v1", "http://b/v1", jury=jury)


@pytest.mark.parametrize("url", ["http://me:hunter2@b/v1", "http://b/v1?key=hunter2", "b/v1", "http://256.1.1.1/v1"])
def test_every_address_is_looked_at_and_no_password_shown(url):
    with pytest.raises(UserError, match=r"^judge\.base_url: ") as error:
        Cast(of(NOWHERE, url), 1)
    assert "hunter2" not in str(error.value)
    assert "hunter2" not in servers.server_name(url)


# Over HTTP


@pytest.mark.slow
def test_two_servers_share_the_ballots():
    with FaultServer(latency_s=0.1) as a, FaultServer(latency_s=0.1) as b:
        cast = Cast(of(a, b, concurrency=8), 40)
        cast.run()
    assert cast.error is None
    assert sorted(cast.ids) == sorted(x.id for x in cast.ballots)
    assert Counter(v.server for v in cast.votes) == {name(a): a.requests, name(b): b.requests}
    assert min(a.requests, b.requests) >= 30
    assert 2 <= a.most_open <= 4  # `concurrency` is that of both together
    assert 2 <= b.most_open <= 4
    assert all(re.search(rf"^host: 127.0.0.1:{s.port}\r$", head, re.M | re.I) for s in (a, b) for head in s.heads)


@pytest.mark.slow
def test_a_single_server_is_in_its_votes_too():
    with FaultServer() as a:
        cast = Cast(settings(a), 2)
        cast.run()
    assert {v.server for v in cast.votes} == {name(a)}


@pytest.mark.slow
def test_a_slow_one_gets_less():
    with FaultServer(latency_s=1.0) as slow, FaultServer(latency_s=0.01) as fast:
        cast = Cast(of(slow, fast, concurrency=8), 40)
        cast.run()
    assert cast.error is None
    assert fast.requests > 1.5 * slow.requests > 0
    assert slow.most_open <= 4


@pytest.mark.slow
def test_limits_are_those_of_each():
    with FaultServer() as a, FaultServer() as b:
        Cast(of(a, b, requests_per_minute=1200, concurrency=8), 10).run()
    for server in (a, b):
        assert server.requests == 10
        assert server.times[-1] - server.times[0] >= 0.7 * 9 * 0.05


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_whoever_answers_and_whatever_fails_the_votes_are_those_of_one_server(seed):
    """Three servers, each with its own faults and delays, beside one that always answers."""
    faults = ("rate_limit", "error_500", "cut", "no_choices", "bad_json", "slow")
    with FaultServer() as server:
        alone = Cast(of(server), 60)
        alone.run()
    with ExitStack() as stack:
        some = [
            stack.enter_context(
                FaultServer(
                    share=0.05, faults=faults, seed=10 * seed + n, latency_s=random.Random(seed + n).random() / 50
                )
            )
            for n in range(3)
        ]
        # Three requests of ten fail, which ones is a matter of timing: five retries lose one ballot in 1,400.
        cast = Cast(of(*some, concurrency=12, max_retries=20), 60)
        cast.run()
        asked = sum(s.requests for s in some)
    assert cast.error is None
    assert len(cast.ids) == len(set(cast.ids)) == 120
    assert said(cast) == said(alone)
    assert sum(v.attempts for v in cast.votes) == asked
    assert {v.server for v in cast.votes} == {name(s) for s in some}
    verdicts = [{k: aggregate(v) for k, v in by_pair(c.votes).items()} for c in (cast, alone)]
    assert verdicts[0] == verdicts[1]


@pytest.mark.slow
@pytest.mark.parametrize("status", [503, 500, 429])
def test_what_one_refuses_another_answers(status, capsys):
    with FaultServer(status=status, message="overloaded sk-very-secret-key-0123456789") as bad, FaultServer() as good:
        cast = Cast(of(bad, good, max_retries=0, concurrency=4), 30)
        cast.run()
    assert cast.error is None
    assert {(v.outcome, v.server) for v in cast.votes} == {("second", name(good))}
    assert 0 < bad.requests < 25
    assert sum(v.attempts for v in cast.votes) == bad.requests + good.requests
    told = capsys.readouterr().err
    assert told.count(f"judge: {name(bad)} is left out for now (HTTP {status}: overloaded") == 1
    assert "very-secret" not in told


@pytest.mark.slow
def test_one_that_dies_gives_its_ballots_to_the_other_and_comes_back(capsys):
    dies = FaultServer(latency_s=0.02).__enter__()
    back = FaultServer(latency_s=0.02, port=dies.port)
    with FaultServer(latency_s=0.02) as good:
        cast = Cast(of(good, dies, concurrency=8, max_retries=0), 200)
        with ExitStack() as stack:
            for chunk in cast.stream():
                cast.votes += chunk
                if len(cast.votes) >= 60 and dies.loop.is_running():
                    dies.__exit__()
                if len(cast.votes) >= 200 and not hasattr(back, "url"):
                    stack.enter_context(back)
    assert sorted(cast.ids) == sorted(b.id for b in cast.ballots)
    assert {v.outcome for v in cast.votes} == {"second"}
    assert 10 < dies.requests < 100
    assert back.requests > 10
    told = capsys.readouterr().err
    assert f"judge: {name(dies)} is left out for now (" in told
    assert told.rstrip().endswith(f"judge: {name(dies)} is back")


@pytest.mark.slow
def test_with_all_of_them_down_it_is_an_outage_as_with_one():
    with FaultServer(status=503) as a, FaultServer(status=503) as b:
        cast = Cast(of(a, b, NOWHERE, max_retries=1, breaker_failures=5, concurrency=2), 20)
        assert cast.run() == []
    assert isinstance(cast.error, JudgeUnavailable)
    assert f"{a.url}, {b.url}, {NOWHERE} is down, 5 ballots in a row failed after all attempts" in str(cast.error)
    assert a.requests
    assert b.requests


@pytest.mark.slow
def test_one_that_asks_to_wait_keeps_nobody_waiting():
    with FaultServer(share=1.0, faults=("rate_limit",), retry_after="30") as busy, FaultServer() as free:
        cast, began = Cast(of(busy, free, concurrency=2), 20), time.monotonic()
        cast.run()
    assert {v.server for v in cast.votes} == {name(free)}
    assert busy.requests <= 2
    assert time.monotonic() - began < 25


@pytest.mark.slow
def test_a_ballot_that_one_keeps_too_long_is_one_vote_of_the_other(tmp_path):
    with FaultServer(share=1.0, faults=("hang",)) as hangs, FaultServer() as good:
        wasted = tmp_path / "wasted.jsonl"
        cast = Cast(of(hangs, good, timeout_s=1, max_retries=0, concurrency=4), 20, wasted=wasted)
        cast.run()
    assert cast.error is None
    assert sorted(cast.ids) == sorted(b.id for b in cast.ballots)
    assert {v.server for v in cast.votes} == {name(good)}
    assert Counter(v.attempts for v in cast.votes)[2] == hangs.requests > 0
    spent = spent_on(cast.votes, cast.judge.settings)
    assert (spent.calls, spent.tokens) == (40, 40 * 102) == (cast.judge.spent.calls, cast.judge.spent.tokens)
    assert not wasted.exists()


@pytest.mark.slow
def test_a_wrong_key_at_one_is_a_mistake_at_once():
    with FaultServer(status=401) as strict, FaultServer() as good:
        cast = Cast(of(good, strict), 20)
        cast.run()
    assert isinstance(cast.error, UserError)
    assert f"judge.api_key_env: {strict.url} refused the key" in str(cast.error)


@pytest.mark.slow
def test_a_question_that_is_rejected_is_asked_of_nobody_else():
    with FaultServer(status=400, message="context too long") as a, FaultServer(status=400, message="no context") as b:
        cast = Cast(of(a, b, concurrency=1, breaker_failures=100), 3)
        cast.run()
        assert a.requests + b.requests == 6


@pytest.mark.slow
def test_a_system_message_that_one_refuses_is_merged_for_all():
    def answer(body, times):
        refused = body["messages"][0]["role"] == "system"
        return (400, {}, {"error": {"message": "System role not supported"}}) if refused else None

    with FaultServer(answer=answer) as old, FaultServer() as new:
        cast = Cast(of(old, new, concurrency=2), 20)
        cast.run()
    assert cast.error is None
    assert {v.server for v in cast.votes} == {name(old), name(new)}
    assert {b["messages"][0]["role"] for b in new.bodies[len(new.bodies) // 2 :]} == {"user"}


# Is it one model?


def model(root="/models/one", **more):
    return [{"id": "m", "root": root, "max_model_len": 4096, **more}]


@pytest.mark.slow
@pytest.mark.parametrize(
    "other",
    [model("/models/two"), [{"id": "m", "root": "/models/one", "max_model_len": 512}]],
    ids=["root", "max_model_len"],
)
def test_servers_of_different_models_are_found_out_before_they_are_asked(other):
    with FaultServer(models=model()) as a, FaultServer(models=other) as b:
        cast = Cast(of(a, b), 2)
        cast.run()
        assert a.requests + b.requests == 0
        assert isinstance(cast.error, UserError)
        assert f"judge.base_url: {a.url} and {b.url} list another model as `m`" in str(cast.error)
        assert "judge.fingerprint: false" in str(cast.error)
        trusting = Cast(of(a, b, fingerprint=False), 2)
        assert len(trusting.run()) == 4


@pytest.mark.slow
def test_what_servers_say_of_one_model_goes_into_the_votes():
    with FaultServer(models=model(created=1)) as a, FaultServer(models=model(created=2)) as b, FaultServer() as c:
        cast = Cast(of(a, b, c, NOWHERE, concurrency=6), 20)
        cast.run()
    assert cast.error is None
    found = {(v.server, v.fingerprint) for v in cast.votes}
    assert {s for s, _ in found} == {name(a), name(b), name(c)}
    assert {s for s, said in found if said and '"root": "/models/one"' in said} == {name(a), name(b)}


@pytest.mark.slow
def test_one_that_comes_back_with_another_model_is_found_out():
    with FaultServer(models=model(), latency_s=0.02) as a, FaultServer(models=model(), latency_s=0.02) as b:
        cast = Cast(of(a, b, concurrency=4), 200)
        error = None
        try:
            for chunk in cast.stream():
                cast.votes += chunk
                if len(cast.votes) > 20:
                    b.status, b.models = (503, model()) if b.status is None else (b.status, model("/models/two"))
                if len(cast.votes) > 60:
                    b.status = None
        except UserError as e:
            error = str(e)
        answered = Counter(v.server for v in cast.votes)
    assert error is not None
    assert "/models/two" in error
    assert answered[name(b)] <= 40


# What is stored, and what is owed


@pytest.mark.slow
def test_a_stored_reply_is_that_of_its_server_whatever_the_list(tmp_path):
    with FaultServer() as a, FaultServer() as b, FaultServer() as c:
        first = Cast(settings(a, cache=str(tmp_path)), 5)  # a job with one server
        first.run()
        for some in ((a, b), (b, a), (c, b, a)):
            again = Cast(of(*some, cache=str(tmp_path)), 5)
            again.run()
            assert {(v.cached, v.server) for v in again.votes} == {(True, None)}
        assert b.requests == c.requests == 0
        other = Cast(of(b, c, cache=str(tmp_path)), 5)  # perhaps another model of that name
        other.run()
        assert not any(v.cached for v in other.votes)
        assert b.requests + c.requests == 10
        both = Cast(of(b, c, cache=str(tmp_path)), 5)
        both.run()
        assert all(v.cached for v in both.votes)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_nobody_is_asked_twice_when_it_goes_on_with_other_servers(seed):
    with ExitStack() as stack:
        a, b, c = (stack.enter_context(FaultServer(latency_s=0.005 * (1 + (seed + n) % 3))) for n in range(3))
        votes = []
        for stop, some in ((10, [a, b]), (20, [b, a]), (30, [c]), (1000, [c, a, b])):
            answered = {v.prompt_hash for v in votes}
            for server in (a, b, c):
                server.bodies.clear()
            stream = Cast(of(*some, concurrency=4), 30, skip={v.ballot.id for v in votes}).stream()
            for chunk in stream:
                votes += chunk
                if len(votes) > stop:
                    stream.close()  # as a kill: what is under way is owed
            assert not answered & {digest(body["messages"]) for server in (a, b, c) for body in server.bodies}
    assert Counter(v.ballot.id for v in votes) == Counter(x.id for x in Cast(of(a), 30).ballots)


@pytest.mark.slow
def test_what_is_known_of_a_server_is_kept_between_casts(capsys):
    with FaultServer(status=503) as bad, FaultServer() as good:
        cast = Cast(of(bad, good, max_retries=0, concurrency=1), 10)
        for n in range(10):
            mine = [b for b in cast.ballots if b.pair_id == f"p{n}"]
            list(cast.judge.cast(mine, cast.pairs, cast.candidates, TEXT, cast.templates))
    assert bad.requests < 10
    assert capsys.readouterr().err.count("is left out") == 1


def test_a_server_belongs_to_no_event_loop():
    [a] = addresses(1)
    for _ in range(2):
        asyncio.run(a.requests.wait())


@pytest.mark.parametrize("judge", ["chat:a@b", "chat:a@b#2", "chat:a@b@host:1", "chat:a@b@host:1#2"])
def test_tokens_of_a_judge_on_several_servers_have_the_price_of_its_model(judge):
    assert price_of(judge, {"a@b": {"prompt": 1.0}, "c": {}}) == {"prompt": 1.0}
    assert price_of(judge, {"c": {}}) is None
