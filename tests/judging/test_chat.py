"""The chat judge against a server that fails on purpose: every ballot is a vote or owed, none is lost or cast twice."""

from __future__ import annotations

import asyncio
import json
import math
import re
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from rlaif.config import ChatSettings
from rlaif.constitutions.constitution import load_constitution
from rlaif.constitutions.templates import load_template
from rlaif.errors import BudgetSpent, JudgeUnavailable, UserError
from rlaif.judging import chat
from rlaif.judging.ballots import juror_names, make_chat_ballots
from rlaif.judging.candidates import Candidate
from rlaif.judging.chat import ChatJudge
from rlaif.judging.kinds import ChatKind
from rlaif.judging.servers import Address, Pace
from rlaif.judging.spending import Spent, Wasted, spent_on
from rlaif.judging.transport import Answer, OpenAIServer, read_reply, read_usage, retry_after_s
from rlaif.records import Message, Pair, Usage
from rlaif.rundir.store import read_grown
from tests.judging.fault_server import FAULTS, FaultServer

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]

TEXT = load_constitution(ROOT / "constitutions", "assistant@1")
LETTER = load_template(ROOT / "prompts/judge", "pairwise")
REASONED = load_template(ROOT / "prompts/judge", "pairwise_reasoned")
JSON = load_template(ROOT / "prompts/judge", "pairwise_json")
KEY = "sk-very-secret-key-0123456789"


@pytest.fixture(autouse=True)
def _key(monkeypatch):
    monkeypatch.setenv("TEST_KEY", KEY)


def questions(n):
    """`n` pairs; the second answer is the longer one."""
    pairs = [Pair(id=f"p{i}", prompt_id=f"x{i}", first=f"a{i}", second=f"b{i}", method="all") for i in range(n)]
    candidates = [
        Candidate(
            completion_id=f"{side}{i}", prompt_id=f"x{i}", messages=(Message(role="user", content=f"Question {i}?"),),
            finish_reason="stop", text="Yes." if side == "a" else f"No, and that is number {i}.",
        )
        for i in range(n) for side in "ab"
    ]  # fmt: skip
    return pairs, candidates


def settings(server, **changes):
    tree = {
        "kind": "chat", "model": "m", "base_url": server if isinstance(server, str) else server.url,
        "api_key_env": "TEST_KEY", "timeout_s": 10, "cache": None,
    }  # fmt: skip
    return ChatSettings.model_validate({**tree, **changes})


class Cast:
    """A judge with its ballots; `run()` collects votes until the end or an error."""

    def __init__(self, judge_settings, n=4, templates=(LETTER,), skip=(), spent=None, wasted=None, **ballots):
        self.pairs, self.candidates = questions(n)
        self.ballots = [
            b
            for b in make_chat_ballots(self.pairs, TEXT, judge_settings.jurors, templates, **ballots)
            if b.id not in skip
        ]
        self.templates = templates
        self.judge = ChatJudge(judge_settings, spent, backoff_s=0.02, wasted=wasted)
        self.votes = []
        self.error = None

    def stream(self):
        return self.judge.cast(iter(self.ballots), self.pairs, self.candidates, TEXT, self.templates)

    def run(self):
        try:
            for chunk in self.stream():
                assert chunk
                self.votes += chunk
        except (UserError, JudgeUnavailable) as e:
            self.error = e
        assert "\n" not in str(self.error)
        assert KEY not in str(self.error)
        return self.votes

    @property
    def ids(self):
        return [v.ballot.id for v in self.votes]


def test_votes_of_a_server_that_answers():
    with FaultServer() as server:
        cast = Cast(settings(server), 8, (LETTER,))
        votes = cast.run()
    assert cast.error is None
    assert sorted(cast.ids) == sorted(b.id for b in cast.ballots)
    for vote in votes:
        assert vote.outcome == "second"
        assert vote.p_first == pytest.approx(0.2 / 0.95, abs=1e-4)
        assert vote.mass_neither == pytest.approx(0.05, abs=1e-4)
        assert (vote.model, vote.finish_reason, vote.attempts, vote.cached) == ("m-1", "stop", 1, False)
        assert (vote.usage.prompt_tokens, vote.usage.completion_tokens) == (100, 2)
        assert vote.raw_reply == ("B" if vote.ballot.order == "forward" else "A")
        assert vote.prompt_hash
        assert vote.latency_s > 0
        assert KEY not in vote.model_dump_json()
    assert server.keys == {KEY}
    assert "user-agent" in server.headers
    assert not [name for name in server.headers if name.startswith("x-")]  # nothing about this machine
    spent = spent_on(votes, cast.judge.settings)
    assert cast.judge.spent == Spent(calls=16, tokens=16 * 102) == spent.model_copy(update={"answered": frozenset()})
    assert spent.answered == {votes[0].ballot.judge}


def test_a_loop_that_runs_already_is_left_alone():
    """A notebook's thread has one."""

    async def in_a_notebook():
        with FaultServer() as server:
            return Cast(settings(server), 3).run(), asyncio.get_running_loop().is_running()

    votes, still = asyncio.run(in_a_notebook())
    assert still
    assert [v.outcome for v in votes] == ["second"] * 6


def test_requests_ask_for_what_the_template_needs():
    def say(body):
        return '{"verdict": "tie"}' if "response_format" in body else "Hm.\nVerdict: A"

    with FaultServer(say=say) as server:
        cast = Cast(settings(server, extra_body={"top_k": 1, "temperature": None}), 1, (LETTER, REASONED, JSON))
        votes = cast.run()
    of_template = {b["max_tokens"]: b for b in server.bodies}
    assert of_template[8]["top_logprobs"] == 20
    assert of_template[512]["top_logprobs"] == 5
    assert "logprobs" not in of_template[400]
    assert of_template[400]["response_format"]["json_schema"]["schema"]["required"] == ["reason", "verdict"]
    assert all(b["top_k"] == 1 and "temperature" not in b and "seed" not in b for b in server.bodies)
    assert [m["role"] for m in server.bodies[0]["messages"]] == ["system", "user"]
    assert Counter(v.outcome for v in votes) == {"abstain": 2, "tie": 2, "first": 1, "second": 1}
    assert all(v.p_first is None for v in votes)


def test_samples_have_seeds_of_their_own():
    with FaultServer() as server:
        cast = Cast(settings(server, temperature=0.7, samples=3), 1, seed=5)
        cast.run()
    assert len({b["seed"] for b in server.bodies}) == 3
    assert {b["seed"] for b in server.bodies} == {b.seed for b in cast.ballots}


@pytest.mark.parametrize(("clamp", "expected"), [(None, 0.99), ((0.4, 0.6), 0.6)], ids=["free", "clamped"])
def test_reasoned_votes_can_be_clamped(clamp, expected):
    """As in Constitutional AI; a letter without reasoning never is."""
    top = [{"token": t, "logprob": math.log(p)} for t, p in ((" A", 0.99), (" B", 0.01))]
    logprobs = {"content": [{"token": " A", "logprob": -0.01, "top_logprobs": top}]}

    class Canned:
        def __init__(self, *_):
            pass

        async def ask(self, body):
            said = "A" if body["max_tokens"] == 8 else "So.\nVerdict: A"
            choice = {"message": {"content": said}, "logprobs": logprobs, "finish_reason": "stop"}
            tree = {"choices": [choice]}
            return Answer(reply=read_reply(json.dumps(tree).encode(), "m"), attempts=1, latency_s=0.1)

        async def close(self):
            pass

    cast = Cast(settings("http://127.0.0.1:9/v1", clamp=clamp), 1, (LETTER, REASONED))
    cast.judge = ChatJudge(cast.judge.settings, connect=Canned)
    found = {(v.ballot.voice, v.ballot.order): v.p_first for v in cast.run()}
    assert found == {
        ("pairwise", "forward"): pytest.approx(0.99),
        ("pairwise", "reversed"): pytest.approx(0.01),
        ("pairwise_reasoned", "forward"): pytest.approx(expected),
        ("pairwise_reasoned", "reversed"): pytest.approx(1 - expected),
    }


@pytest.mark.parametrize("seed", range(3))
def test_whatever_fails_every_ballot_ends_as_a_vote(seed):
    with FaultServer(share=0.05, seed=seed) as server:
        cast = Cast(settings(server, timeout_s=1, concurrency=16), 100)
        votes = cast.run()
    assert cast.error is None
    assert sorted(cast.ids) == sorted(b.id for b in cast.ballots)
    assert set(server.fates) == {*FAULTS, "fine"}
    for vote in votes:
        assert (vote.outcome == "abstain") == (vote.abstain_reason is not None)
        assert (vote.abstain_reason == "infra_error") == (vote.error is not None)
        assert vote.outcome in ("second", "abstain")
    assert {v.abstain_reason for v in votes} - {None} <= {"truncated", "empty", "infra_error"}
    assert sum(v.attempts for v in votes) == server.requests


def test_concurrency_is_bounded_and_used():
    with FaultServer(latency_s=0.03) as server:
        assert len(Cast(settings(server, concurrency=7), 40).run()) == 80
    assert server.most_open == 7


def test_without_retries_every_fault_has_its_own_reason():
    with FaultServer(share=0.09, seed=4) as server:
        cast = Cast(settings(server, timeout_s=1, max_retries=0, breaker_failures=200, reask=0), 60)
        votes = cast.run()
    said = " ".join(v.error or "" for v in votes)
    for words in ("HTTP 429: slow down", "HTTP 500", "no reply within 1 s", "without a choice", "not JSON"):
        assert words in said
    assert sum(v.abstain_reason == "truncated" for v in votes) == server.fates["truncated"] > 0
    assert sum(v.abstain_reason == "empty" for v in votes) == server.fates["null_content"] > 0
    cut = [v for v in votes if v.error and ("not completed" in v.error or "disconnect" in v.error)]
    assert len(cut) == server.fates["cut"] > 0


def test_a_generator_closed_early_owes_what_it_did_not_yield():
    with FaultServer(latency_s=0.03) as server:
        first = Cast(settings(server, concurrency=4), 20)
        stream = first.stream()
        first.votes += next(stream)
        first.votes += next(stream)
        stream.close()
        assert 0 < len(first.votes) < 40
        second = Cast(settings(server, concurrency=4), 20, skip=set(first.ids))
        second.run()
    assert Counter(first.ids + second.ids) == Counter(b.id for b in Cast(settings(server), 20).ballots)


def test_memory_does_not_grow_with_ballots():
    """Ballots are taken from their iterator only when there is room."""
    with FaultServer() as server:
        cast = Cast(settings(server, concurrency=4), 60)
        taken = 0

        def counted():
            nonlocal taken
            for ballot in cast.ballots:
                taken += 1
                yield ballot

        stream = cast.judge.cast(counted(), cast.pairs, cast.candidates, TEXT, cast.templates)
        seen = 0
        for chunk in stream:
            seen += len(chunk)
            assert taken - seen <= 16
        assert seen == 120


# Budget


def test_a_budget_of_calls_is_exact_and_what_was_under_way_is_kept():
    with FaultServer(latency_s=0.01) as server:
        cast = Cast(settings(server, budget={"calls": 11}), 20)
        cast.run()
        assert isinstance(cast.error, BudgetSpent)
        assert "judge.budget.calls=11 is spent" in str(cast.error)
        assert len(cast.votes) == server.requests == 11
        more = Cast(settings(server, budget={"calls": 40}), 20, skip=set(cast.ids), spent=cast.judge.spent)
        more.run()
    assert more.error is None
    assert server.requests == 40
    assert len(set(cast.ids + more.ids)) == 40


def test_failed_calls_leave_room_in_the_budget():
    with FaultServer(share=1.0, faults=("error_500",), only_first_attempt=True) as server:
        cast = Cast(settings(server, budget={"calls": 8}, max_retries=2), 4)
        cast.run()
    assert cast.error is None
    assert len(cast.votes) == 8
    assert server.requests == 16


@pytest.mark.parametrize("concurrency", [1, 4])
def test_answers_without_a_reply_count(concurrency):
    with FaultServer(share=1.0, faults=("no_choices",)) as server:
        cast = Cast(settings(server, budget={"calls": 7}, max_retries=2, concurrency=concurrency), 20)
        votes = cast.run()
    assert isinstance(cast.error, BudgetSpent)
    assert cast.judge.spent.calls == server.requests <= 7
    assert server.requests > 7 - concurrency
    assert {v.abstain_reason for v in votes} <= {"infra_error"}


def test_what_an_answer_without_a_reply_cost_counts():
    assert read_usage(b'{"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": 2}}').prompt_tokens == 5
    assert read_usage(b"{torn") == read_usage(b"[]") == Usage()


@pytest.mark.parametrize(
    ("budget", "name"), [({"tokens": 1000}, "tokens"), ({"money": 0.001}, "money")], ids=["tokens", "money"]
)
def test_tokens_and_money_stop_the_run(budget, name):
    prices = {"m": {"prompt": 1.0, "completion": 2.0}}
    with FaultServer(latency_s=0.01) as server:
        cast = Cast(settings(server, budget=budget, prices=prices, concurrency=2), 20)
        cast.run()
    assert isinstance(cast.error, BudgetSpent)
    assert f"judge.budget.{name}" in str(cast.error)
    assert 10 <= len(cast.votes) == server.requests <= 9 + 2 * 2
    assert cast.judge.spent.money == pytest.approx(len(cast.votes) * 104 / 1e6)


@pytest.mark.parametrize("usage", [None, {}, {"prompt_tokens": 0, "completion_tokens": 0}, {"prompt_tokens": -5}])
@pytest.mark.parametrize("budget", [{"tokens": 3000}, {"money": 0.003}], ids=["tokens", "money"])
def test_a_budget_holds_with_a_server_that_reports_no_usage(usage, budget):
    prices = {"m": {"prompt": 1.0, "completion": 1.0}}
    with FaultServer(usage=usage) as server:
        cast = Cast(settings(server, budget=budget, prices=prices, concurrency=1), 40)
        votes = cast.run()
    assert isinstance(cast.error, BudgetSpent)
    assert "estimated" in str(cast.error)
    asked = sum(len(m["content"]) for m in server.bodies[0]["messages"])
    assert all(v.usage.estimated and asked / 5 < v.usage.prompt_tokens < asked / 3 for v in votes)
    assert spent_on(votes, cast.judge.settings).tokens == cast.judge.spent.tokens >= 3000


def test_usage_in_odd_forms():
    said = lambda usage: read_usage(json.dumps({"usage": usage}).encode())  # noqa: E731
    assert said({"prompt_tokens": 12.5, "completion_tokens": 1.0}) == Usage(prompt_tokens=13, completion_tokens=1)
    assert said({"prompt_tokens": "12", "completion_tokens": None}) == Usage(prompt_tokens=12)
    assert said({"prompt_tokens": -5, "completion_tokens": 3}) == Usage(completion_tokens=3)
    assert said({"prompt_tokens": math.inf}) == said({"prompt_tokens": math.nan}) == Usage()


def test_money_needs_prices():
    with pytest.raises(UserError, match="no price for `m`"):
        Cast(settings("http://127.0.0.1:1/v1", budget={"money": 1.0}))


# Odd replies


def test_a_reply_that_no_file_can_hold_is_a_vote(tmp_path):
    with FaultServer(say=lambda body: "A\ud800") as server:
        cast = Cast(settings(server, cache=str(tmp_path)), 2)
        votes = cast.run()
    assert [v.abstain_reason for v in votes] == ["unparsed"] * 4
    assert {v.raw_reply for v in votes} == {"A?"}
    assert all(v.model_dump_json() for v in votes)


def test_nothing_of_an_answer_holds_what_no_file_can():
    odd = "x\ud800"
    top = {"token": odd, "logprob": -0.1}
    logprobs = {"content": [top | {"top_logprobs": [top]}]}
    choice = {"message": {"content": None, "refusal": odd}, "finish_reason": "stop", "logprobs": logprobs}
    reply = read_reply(json.dumps({"choices": [choice], "model": odd}).encode(), "m")
    assert (reply.model, reply.refusal, reply.tokens[0].top[0].token) == ("x?",) * 3
    reply.model_dump_json()


def test_an_error_that_no_file_can_hold_is_a_vote():
    with FaultServer(status=fails(400, 1), message="no\ud800") as server:
        votes = Cast(settings(server, concurrency=1), 3).run()
    assert {v.error for v in votes} == {None, "HTTP 400: no?"}
    assert all(v.model_dump_json() for v in votes)


# A judge that is down, and users' mistakes


def test_a_server_that_is_not_there_pauses_the_run():
    cast = Cast(settings("http://127.0.0.1:9/v1", max_retries=1, breaker_failures=5), 20)
    assert cast.run() == []
    assert isinstance(cast.error, JudgeUnavailable)
    assert cast.error.exit_code == 2
    assert "127.0.0.1:9" in str(cast.error)
    assert "run again when it is back" in str(cast.error)


def test_also_with_fewer_ballots_than_the_breaker_waits_for():
    cast = Cast(settings("http://127.0.0.1:9/v1", max_retries=0), 1)
    assert cast.run() == []
    assert isinstance(cast.error, JudgeUnavailable)


def test_a_server_that_goes_down_keeps_its_votes_and_owes_the_rest():
    with FaultServer() as server:
        server.status = lambda body: 503 if server.requests > 11 else None
        cast = Cast(settings(server, max_retries=0, breaker_failures=4, concurrency=1), 20)
        cast.run()
    assert isinstance(cast.error, JudgeUnavailable)
    assert "HTTP 503" in str(cast.error)
    assert len(cast.votes) == 11
    assert all(v.outcome == "second" for v in cast.votes)


def test_a_juror_that_is_down_does_not_hide_behind_one_that_answers():
    with FaultServer() as server:
        jury = [{"model": "n", "base_url": "http://127.0.0.1:9/v1", "api_key_env": None}]
        cast = Cast(settings(server, jury=jury, max_retries=0, breaker_failures=5), 20)
        cast.run()
    assert isinstance(cast.error, JudgeUnavailable)
    assert "127.0.0.1:9" in str(cast.error)
    assert all(v.ballot.judge.startswith("chat:m@") and v.outcome == "second" for v in cast.votes)


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (401, ["TEST_KEY", "HTTP 401"]), (403, ["TEST_KEY", "HTTP 403"]), (404, ["`m`", "/v1", "HTTP 404"]),
        (400, ["rejects every request", "logprobs"]),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_at_once(status, words):
    with FaultServer(status=status, message=f"wrong {KEY} or\nBearer abcdefgh1234") as server:
        cast = Cast(settings(server, concurrency=4, breaker_failures=6), 20)
        assert cast.run() == []
    assert isinstance(cast.error, UserError)
    assert all(w in str(cast.error) for w in words)
    assert "abcdefgh1234" not in str(cast.error)
    assert server.requests <= 18  # a short question too


def test_a_rejected_request_among_others_is_an_abstention():
    """Also several in a row: a server that rejects some questions is not down. They count by pair, here 4 of 5."""

    def too_long(body):
        number = int(re.search(r"Question (\d+)", body["messages"][-1]["content"])[1])
        return 400 if 3 <= number <= 6 else None

    with FaultServer(status=too_long, message="context too long") as server:
        cast = Cast(settings(server, concurrency=1, breaker_failures=5), 10)
        votes = cast.run()
    assert cast.error is None
    assert len(votes) == 20
    rejected = [v for v in votes if v.abstain_reason == "infra_error"]
    assert {v.ballot.pair_id for v in rejected} == {"p3", "p4", "p5", "p6"}
    assert all(v.error == "HTTP 400: context too long" and v.attempts == 1 for v in rejected)


@pytest.mark.parametrize("status", [400, 402, 403, 413])
def test_a_server_that_starts_to_reject_pauses_the_run(status):
    with FaultServer(message="Insufficient credits") as server:
        server.status = lambda body: status if server.requests > 11 else None
        cast = Cast(settings(server, breaker_failures=4, concurrency=1), 20)
        cast.run()
        assert isinstance(cast.error, JudgeUnavailable)
        assert f"HTTP {status}: Insufficient credits" in str(cast.error)
        assert [v.outcome for v in cast.votes] == ["second"] * 11
        assert server.requests <= 11 + 4 * 2 + 1  # a short question too
        server.status = None
        rest = Cast(settings(server), 20, skip=set(cast.ids), spent=spent_on(cast.votes, cast.judge.settings))
        assert {v.outcome for v in rest.run()} == {"second"}
    assert len(cast.ids + rest.ids) == 40


@pytest.mark.parametrize("numbers", [range(3, 30), range(26)], ids=["among others", "at the start"])
def test_questions_that_are_always_rejected_stop_no_run(numbers):
    """The server answers a short question, so it is theirs."""
    with FaultServer(status=fails(400, *numbers), message="no") as server:
        cast = Cast(settings(server, concurrency=1, breaker_failures=4), 32)
        votes = cast.run()
        assert cast.error is None
        assert {v.ballot.pair_id for v in votes if v.abstain_reason} == {f"p{n}" for n in numbers}
        assert len(votes) == 64
        short = server.requests - 64
        assert 0 < short <= len(numbers)
        assert cast.judge.spent.calls == 64 - 2 * len(numbers) + short
        known = spent_on(votes, cast.judge.settings)
        assert known.calls == 64 - 2 * len(numbers)


def test_a_judge_that_rejects_all_questions_but_a_short_one_ends_in_no_votes():
    with FaultServer(status=fails(400, *range(9)), message="no") as server:
        cast = Cast(settings(server, concurrency=1, breaker_failures=4), 9)
        assert cast.run() == []
    assert isinstance(cast.error, UserError)
    assert "too long for it" in str(cast.error)


def test_one_that_rejects_question_after_question_is_given_up(monkeypatch):
    """What is held back until it answers is bounded: somebody may wait for room to ask more."""
    monkeypatch.setattr(chat, "MOST_EXCUSED", 8)
    with FaultServer(status=fails(400, *range(40)), message="no") as server:
        cast = Cast(settings(server, concurrency=1, breaker_failures=4), 40)
        assert cast.run() == []
        assert server.requests < 16
    assert isinstance(cast.error, UserError)
    assert "too long for it" in str(cast.error)


def test_many_rejections_between_answers_pause_no_run():
    """What fails must not overtake what was answered before it: the answers in between end each streak."""
    rejects = lambda body: 400 if sum(map(ord, body["messages"][-1]["content"])) % 3 == 0 else None  # noqa: E731
    with FaultServer(status=rejects, latency_s=0.05) as server:
        cast = Cast(settings(server, concurrency=64, breaker_failures=8), 150)
        votes = cast.run()
    assert cast.error is None
    assert len(votes) == 300
    assert 60 < sum(v.abstain_reason == "infra_error" for v in votes) < 140


def test_a_redirected_request_is_answered():
    with FaultServer() as server, FaultServer() as old:
        old.redirect = server.url
        cast = Cast(settings(old), 2)
        assert {v.outcome for v in cast.run()} == {"second"}
    assert (cast.error, server.requests) == (None, 4)


def test_small_casts_that_are_rejected_add_up():
    with FaultServer() as server:
        cast = Cast(settings(server, breaker_failures=5), 8)
        cast.run()
        server.status = 400
        errors = []
        for n in range(8):
            mine = [b for b in cast.ballots if b.pair_id == f"p{n}"]
            try:
                list(cast.judge.cast(mine, cast.pairs, cast.candidates, TEXT, cast.templates))
            except JudgeUnavailable as e:
                errors.append((n, str(e)))
    assert errors[0][0] == 4


def test_one_question_that_is_forbidden_is_an_abstention():
    """403 is also what a moderated question gets; only a juror that never answered has the wrong key."""
    with FaultServer(status=fails(403, 0), message="flagged") as server:
        cast = Cast(settings(server, concurrency=1), 4)
        votes = cast.run()
    assert cast.error is None
    assert [v.ballot.pair_id for v in votes if v.abstain_reason == "infra_error"] == ["p0", "p0"]
    assert all(v.error.startswith("HTTP 403: flagged (") for v in votes if v.error)


@pytest.mark.parametrize("fault", ["error_500", "wrong_type", "no_choices"])
def test_a_juror_that_never_gave_a_reply_pauses_the_run(fault):
    """Also with fewer ballots than the breaker waits for, and if it answers something."""
    with FaultServer(share=1.0, faults=(fault,)) as server:
        cast = Cast(settings(server, max_retries=0), 2)
        assert cast.run() == []
    assert isinstance(cast.error, JudgeUnavailable)
    assert "gives no usable reply" in str(cast.error)


def test_a_rejected_schema_says_how_to_do_without():
    with FaultServer(status=400, message="response_format json_schema is not supported") as server:
        cast = Cast(settings(server), 2, (JSON,))
        cast.run()
        assert "judge.extra_body: {response_format: null}" in str(cast.error)
        server.status = None
        without = Cast(settings(server, extra_body={"response_format": None}), 2, (JSON,))
        without.run()
    assert "response_format" not in server.bodies[-1]


def fails(status, *numbers):
    """The server's answer to these questions alone."""

    def fate(body):
        number = re.search(r"Question (\d+)", body["messages"][-1]["content"])
        return status if number and int(number[1]) in numbers else None

    return fate


@pytest.mark.parametrize("status", [400, 503])
def test_a_ballot_that_fails_for_good_ends_as_a_vote_when_all_others_are_stored(tmp_path, status):
    with FaultServer(status=fails(status, 3), message="no") as server:
        for _ in range(2):
            cast = Cast(settings(server, cache=str(tmp_path), max_retries=0), 10)
            votes = cast.run()
            assert cast.error is None
            assert len(votes) == 20
            assert [v.ballot.pair_id for v in votes if v.abstain_reason == "infra_error"] == ["p3", "p3"]
    assert sum(v.cached for v in votes) == 18


@pytest.mark.parametrize("status", [400, 503])
@pytest.mark.parametrize("where", ["process", "judge"])
def test_a_ballot_that_fails_for_good_ends_as_a_vote_when_it_alone_is_owed(status, where):
    with FaultServer(status=fails(status, 3), message="no") as server:
        first = Cast(settings(server, max_retries=0), 3)
        done = first.run()
        cast = Cast(settings(server, max_retries=0), 4, skip=first.ids, spent=spent_on(done, first.judge.settings))
        if where == "judge":
            cast.judge = first.judge
        votes = cast.run()
    assert cast.error is None
    assert [v.abstain_reason for v in votes] == ["infra_error"] * 2


def test_that_one_juror_answered_says_nothing_about_another():
    with FaultServer() as server:
        jury = [{"model": "n", "base_url": server.url, "api_key_env": None}]
        answered = spent_on(Cast(settings(server), 2).run(), settings(server))
        server.status = lambda body: 400 if body["model"] == "n" else None
        cast = Cast(settings(server, jury=jury), 4, spent=answered)
        cast.run()
    assert "rejects every request" in str(cast.error)
    assert {v.ballot.judge for v in cast.votes} <= answered.answered


def test_a_judge_that_goes_down_between_small_casts_is_found_out():
    with FaultServer() as server:
        cast = Cast(settings(server, max_retries=0, breaker_failures=5), 1)
        cast.run()
        server.status = 503
        for _ in range(3):
            if cast.error is None:
                cast.run()
    assert isinstance(cast.error, JudgeUnavailable)
    assert len(cast.votes) == 2 + 4


@pytest.mark.parametrize("key", ["sk-“quoted”-key", "sk-two\nlines", "sk-é"])
def test_a_key_that_no_header_can_hold_is_found_before_any_call(monkeypatch, key):
    monkeypatch.setenv("TEST_KEY", key)
    with pytest.raises(UserError, match="variable TEST_KEY holds characters") as e:
        Cast(settings("http://127.0.0.1:9/v1"))
    assert "sk-" not in str(e.value)


def test_a_missing_key_is_found_before_any_call(monkeypatch):
    monkeypatch.delenv("TEST_KEY")
    with FaultServer() as server:
        with pytest.raises(UserError, match="TEST_KEY is not set"):
            Cast(settings(server))
        assert server.requests == 0
        assert len(Cast(settings(server, api_key_env=None)).run()) == 8


def test_an_address_that_is_none():
    with pytest.raises(UserError, match="`localhost:8000/v1` is no address"):
        Cast(settings("localhost:8000/v1"))


def test_a_password_in_the_address_is_refused_and_never_shown():
    given = settings("http://me:hunter2@127.0.0.1:9/v1", max_retries=0)
    with pytest.raises(UserError, match=r"^judge.base_url: http://127.0.0.1:9/v1 comes with a user") as e:
        Cast(given, 1).run()
    assert "hunter2" not in str(e.value)
    assert juror_names(given.jurors) == ["chat:m@127.0.0.1:9"]


# Cache


def test_a_stored_reply_is_a_vote_without_a_call(tmp_path):
    with FaultServer() as server:
        make = lambda **changes: Cast(settings(server, cache=str(tmp_path), **changes), 5)  # noqa: E731
        first = make()
        first.run()
        again = make(budget={"calls": 1})
        again.run()
        assert server.requests == 10
        changes = ({"temperature": 0.5}, {"max_tokens": 9}, {"model": "n"}, {"extra_body": {"top_k": 1}})
        for calls, change in enumerate(changes, 2):
            make(**change).run()
            assert server.requests == 10 * calls
    assert again.error is None
    assert again.judge.spent == Spent()
    assert not any(KEY.encode() in f.read_bytes() for f in tmp_path.rglob("*") if f.is_file())
    assert all((v.cached, v.attempts) == (True, 0) for v in again.votes)
    plain = [v.model_dump(exclude={"cached", "attempts", "latency_s", "server"}) for v in (*first.votes, *again.votes)]
    by_id = lambda v: v["ballot"]["id"]  # noqa: E731
    assert sorted(plain[:10], key=by_id) == sorted(plain[10:], key=by_id)


def test_what_is_asked_afresh_neither_reads_the_cache_nor_writes_it(tmp_path):
    with FaultServer() as server:
        first = Cast(settings(server, cache=str(tmp_path)), 5)
        asked = first.judge.cast(
            iter(first.ballots),
            first.pairs,
            first.candidates,
            TEXT,
            first.templates,
            **ChatKind(first.judge.settings).afresh(),
        )
        assert not any(v.cached for chunk in asked for v in chunk)
        assert server.requests == 10
        assert not any(v.cached for v in first.run())
        assert server.requests == 20
        again = first.judge.cast(iter(first.ballots), first.pairs, first.candidates, TEXT, first.templates, fresh=True)
        assert not any(v.cached for chunk in again for v in chunk)
        assert server.requests == 30


def test_answers_without_a_reply_count_against_the_budget_of_the_next_process(tmp_path):
    file = tmp_path / "wasted.jsonl"
    with FaultServer(share=1.0, faults=("no_choices",), only_first_attempt=True) as server:
        first = Cast(settings(server), 3, wasted=file)
        votes = first.run()
        assert first.judge.spent.calls == server.requests == 12
        file.write_text(file.read_text() + '{"judge": "torn')
        known = spent_on(votes, first.judge.settings, read_grown(file, Wasted))
        assert known.model_copy(update={"answered": frozenset()}) == first.judge.spent
        more = Cast(settings(server, budget={"calls": 12}), 4, skip=first.ids, spent=known, wasted=file)
        more.run()
        assert isinstance(more.error, BudgetSpent)
        assert server.requests == 12


def test_a_cache_that_fails_costs_no_vote(tmp_path, capsys):
    with FaultServer() as server:
        cast = Cast(settings(server, cache=str(tmp_path / "c")), 3)
        for file in (tmp_path / "c").glob("cache.db*"):
            file.write_bytes(b"no database" * 1000)
        assert {v.outcome for v in cast.run()} == {"second"}
    assert (cast.error, len(cast.votes)) == (None, 6)
    assert "judge.cache: " in (said := capsys.readouterr().err)
    assert said.count("going on without it") == 1


def test_failures_are_never_stored(tmp_path):
    with FaultServer() as server:
        answered = spent_on(Cast(settings(server), 1).run(), settings(server))
        server.share, server.faults = 1.0, ("error_500",)
        cast = Cast(settings(server, cache=str(tmp_path), max_retries=0), 3, spent=answered)
        assert {v.abstain_reason for v in cast.run()} == {"infra_error"}
        server.share = 0.0
        assert {v.outcome for v in Cast(settings(server, cache=str(tmp_path)), 3).run()} == {"second"}
        assert server.requests == 2 + 12


def test_an_unreadable_entry_is_asked_again(tmp_path):
    import diskcache

    with FaultServer() as server:
        Cast(settings(server, cache=str(tmp_path)), 2).run()
        with diskcache.Cache(str(tmp_path)) as cache:
            for key in list(cache):
                cache[key] = "{torn"
        assert {v.outcome for v in Cast(settings(server, cache=str(tmp_path)), 2).run()} == {"second"}
        assert server.requests == 8


PROCESS = """
import sys
from tests.judging.test_chat import Cast, settings
url, cache = sys.argv[1:]
votes = Cast(settings(url, cache=cache, api_key_env=None), 30).run()
print(len(votes), sum(v.cached for v in votes))
"""


def test_processes_share_the_cache(tmp_path):
    with FaultServer(latency_s=0.01) as server:
        command = [sys.executable, "-c", PROCESS, server.url, str(tmp_path)]
        running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
        done = [p.communicate(timeout=60)[0].split() for p in running]
        assert [d[0] for d in done] == ["60", "60"]
        asked = server.requests
        cast = Cast(settings(server, cache=str(tmp_path), api_key_env=None), 30)
        assert all(v.cached for v in cast.run())
        assert server.requests == asked <= 120


def test_a_cache_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"judge\.cache: can't write"):
        Cast(settings("http://127.0.0.1:9/v1", cache=str(tmp_path / "file/folder")))


# Limits


def test_requests_a_minute_are_spaced():
    with FaultServer() as server:
        Cast(settings(server, requests_per_minute=1200), 5).run()
    # Nine gaps of 50 ms; the first request also opens its connection.
    assert server.times[-1] - server.times[0] >= 0.7 * 9 * 0.05


def test_requests_a_minute_leave_no_burst_behind_full_slots():
    async def three(judge):
        slots = asyncio.Semaphore(2)
        address = Address(judge.base_url, Pace(300), Pace(None))
        server = OpenAIServer(judge.jurors[0], judge, slots, [address], 0.02)
        body = {"messages": [{"role": "user", "content": "hi"}]}
        await server.ask(body)
        await slots.acquire()
        await slots.acquire()
        asked = [asyncio.create_task(server.ask(body)) for _ in range(2)]
        await asyncio.sleep(0.5)
        slots.release()
        slots.release()
        await asyncio.gather(*asked)
        await server.close()

    with FaultServer(say=lambda body: "A") as server:
        asyncio.run(three(settings(server)))
    assert server.times[2] - server.times[1] >= 0.7 * 0.2


def test_the_pace_is_kept_between_casts():
    with FaultServer() as server:
        cast = Cast(settings(server, requests_per_minute=300, concurrency=1), 1)
        for _ in range(2):
            cast.run()
    assert server.times[2] - server.times[1] >= 0.7 * 0.2


def test_a_server_that_asks_to_wait_is_left_alone_by_all():
    async def three():
        pace, start = Pace(None), time.monotonic()
        await pace.wait()
        pace.hold(0.2)
        pace.hold(0.1)
        await asyncio.gather(pace.wait(), pace.wait())
        return time.monotonic() - start

    assert 0.19 < asyncio.run(three()) < 0.5


def test_a_retry_after_holds_all_requests():
    with FaultServer(share=1.0, faults=("rate_limit",), only_first_attempt=True, retry_after="0.4") as server:
        Cast(settings(server, concurrency=1), 1).run()
    assert len(server.times) == 4
    assert server.times[1] - server.times[0] >= 0.4


def test_tokens_a_minute_follow_the_servers_own_count():
    async def three():
        pace, start = Pace(6000), time.monotonic()
        await pace.wait(1)
        pace.correct(19)
        await pace.wait(1)
        return time.monotonic() - start

    assert 0.19 < asyncio.run(three()) < 0.5


@pytest.mark.parametrize(
    ("value", "low", "high"),
    [("2", 2, 2), ("0.5", 0.5, 0.5), ("-1", 0, 0), ("soon", None, None), ("nan", None, None), ("inf", None, None),
     ("Wed, 21 Oct 2015 07:28:00 GMT", 0, 0), ("Fri, 31 Dec 2060 23:59:59 GMT", 1e8, 1e10), (None, None, None)],
)  # fmt: skip
def test_retry_after(value, low, high):
    found = retry_after_s({} if value is None else {"retry-after": value})
    assert found is None if low is None else low <= found <= high


def test_retry_after_is_waited_for():
    with FaultServer(share=1.0, faults=("rate_limit",), only_first_attempt=True) as server:
        votes = Cast(settings(server, concurrency=1), 1).run()
    assert [v.attempts for v in votes] == [2, 2]
    per_question = {}
    for body, at in zip(server.bodies, server.times, strict=True):
        per_question.setdefault(json.dumps(body), []).append(at)
    assert all(b - a >= 0.05 for a, b in per_question.values())


def test_a_ballot_of_another_text_or_template_is_refused():
    cast = Cast(settings("http://127.0.0.1:9/v1"), 1)
    for change in ({"constitution": "other"}, {"template": "other"}, {"judge": "other"}):
        ballot = cast.ballots[0].model_copy(update=change)
        with pytest.raises(ValueError, match=r"another|no juror"):
            next(cast.judge.cast([ballot], cast.pairs, cast.candidates, TEXT, cast.templates))
