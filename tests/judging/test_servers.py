"""What servers answer that is no plain reply: each form over real HTTP, and what becomes of it."""

from __future__ import annotations

import datetime
import email.utils
import ipaddress
import json
import re
import shutil
import ssl
import subprocess
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from rlaif.config import ChatSettings, Price
from rlaif.errors import JudgeUnavailable, UserError
from rlaif.judging.answers import NoReply, read_reply, read_usage, retry_after_s
from rlaif.judging.ballots import request_parameters
from rlaif.judging.spending import cost, spent_on
from rlaif.judging.transport import OpenAIServer, check_address
from rlaif.records import Usage
from tests.judging.fault_server import FaultServer, longer
from tests.judging.test_chat import JSON, LETTER, REASONED, TEXT, Cast, settings

pytestmark = pytest.mark.slow

TEMPLATES = {"letter": LETTER, "last_line": REASONED, "json": JSON}
SAYS = {"letter": "{R}", "last_line": "Well.\nVerdict: {R}", "json": '{"reason": "x", "verdict": "{R}"}'}


@pytest.fixture(autouse=True)
def _key(monkeypatch):
    monkeypatch.setenv("TEST_KEY", "sk-very-secret-key-0123456789")


def filled(tree, body):
    """A tree with the letter of the better answer for {R}, and of the other for {W}."""
    right = longer(body)
    wrong = {"A": "B", "B": "A"}[right]
    if isinstance(tree, str):
        return tree.replace("{R}", right).replace("{W}", wrong)
    if isinstance(tree, list):
        return [filled(t, body) for t in tree]
    return {k: filled(v, body) for k, v in tree.items()} if isinstance(tree, dict) else tree


def choice(content, finish="stop", **more):
    """A choice that says this."""
    fields = {name: more.pop(name) for name in ("error", "index") if name in more}
    return {"index": 0, "finish_reason": finish, "message": {"role": "assistant", "content": content, **more}, **fields}


def server_of(*choices, usage=None, **top):
    """A server that gives these choices in turn to every question, the last of them for ever."""

    def answer(body, times):
        mine = choices[min(times, len(choices)) - 1]
        tree = {"model": "m-1", "choices": mine if isinstance(mine, list) else [mine], **top}
        return 200, {}, filled(tree | ({"usage": usage} if usage else {}), body)

    return FaultServer(answer=answer)


def number_of(body):
    """Which of the pairs is asked about."""
    return int(re.search(r"Question (\d+)\?", body["messages"][-1]["content"])[1])


def becomes(choices, kind, then=None, **changes):
    """What becomes of the questions about one pair each, whose first answer is one of these choices; a ballot's two
    orders must agree."""

    def answer(body, times):
        mine = choices[number_of(body)] if times == 1 or then is None else then
        return 200, {}, filled({"choices": [mine]}, body)

    with FaultServer(answer=answer) as server:
        cast = cast_of(server, kind, len(choices), breaker_failures=1000, **changes)
    assert cast.error is None, cast.error
    found = {}
    for vote in cast.votes:
        found.setdefault(int(vote.ballot.pair_id[1:]), set()).add(vote.abstain_reason or vote.outcome)
    assert all(len(f) == 1 for f in found.values()), found
    return cast.votes, [found[n].pop() for n in range(len(choices))]


def cast_of(server, kind="letter", n=2, **changes):
    """Votes of a server on a few pairs, its settings those of a test."""
    cast = Cast(settings(server, **changes), n, (TEMPLATES[kind],))
    cast.run()
    return cast


def outcomes(cast):
    """What became of the votes."""
    assert cast.error is None, cast.error
    return {v.abstain_reason or v.outcome for v in cast.votes}


# Outages under HTTP 200


CONTENTS = ["", None, "{W}", [], "Verdict: {W}", '{"verdict": "{W}"}']
OUTAGES = [
    {"finish": "error", "error": {"code": 502, "message": "upstream idle timeout"}},
    {"finish": "error"},
    {"finish": "stop", "error": {"message": "provider returned error"}},
    {"finish": None, "error": "overloaded"},
    {"finish": "ERROR"}, {"finish": "network_error"}, {"finish": "insufficient_system_resource"},
    {"finish": "abort"}, {"finish": "cancelled"}, {"finish": "a word of tomorrow"},
]  # fmt: skip


@pytest.mark.parametrize("kind", ["letter", "last_line", "json"])
def test_an_outage_is_tried_again_and_never_a_vote(kind, tmp_path):
    choices = [choice(content, **outage) for outage in OUTAGES for content in CONTENTS]
    votes, found = becomes(choices, kind, choice(SAYS[kind]), cache=str(tmp_path))
    assert set(found) == {"second"}
    assert {(v.attempts, v.reasked) for v in votes} == {(2, 0)}


def test_what_is_stored_of_an_outage_is_the_reply_after_it(tmp_path):
    down = choice("{W}", "error", error={"code": 502, "message": "upstream idle timeout"})
    with server_of(down, choice("{R}")) as server:
        assert outcomes(cast_of(server, cache=str(tmp_path))) == {"second"}
        again = cast_of(server, cache=str(tmp_path))
        assert outcomes(again) == {"second"}
        assert all(v.cached for v in again.votes)


@pytest.mark.parametrize(
    "answer",
    [
        {"error": {"code": 429, "message": "rate limited"}},
        {"error": {"code": "rate_limit_exceeded", "message": "slow down"}},
        {"error": {"code": 529, "message": "overloaded"}, "choices": []},
        {"error": "no capacity"},
        {"code": 429, "message": "too many requests", "data": None},
        [{"error": {"code": 503, "status": "UNAVAILABLE", "message": "try later"}}],
        {"choices": None, "message": "busy"},
    ],
)
def test_an_error_instead_of_choices_is_tried_again(answer):
    with FaultServer(answer=lambda body, times: (200, {}, answer) if times == 1 else None) as server:
        cast = cast_of(server)
        assert outcomes(cast) == {"second"}
        assert {v.attempts for v in cast.votes} == {2}
    with FaultServer(answer=lambda body, times: (200, {}, answer)) as server:
        cast = cast_of(server, max_retries=0)
    assert isinstance(cast.error, JudgeUnavailable)
    assert "base_url" not in str(cast.error)


def test_an_outage_that_lasts_pauses_and_is_not_stored(tmp_path):
    down = choice("{W}", "error", error={"code": 502, "message": "upstream idle timeout"})
    with server_of(down) as server:
        cast = cast_of(server, n=8, max_retries=1, breaker_failures=5, cache=str(tmp_path))
        assert cast.votes == []
        assert isinstance(cast.error, JudgeUnavailable)
        assert "upstream idle timeout" in str(cast.error)
    with server_of(choice("{R}")) as server:
        cast = cast_of(server, n=8, cache=str(tmp_path))
        assert outcomes(cast) == {"second"}
        assert not any(v.cached for v in cast.votes)


def test_a_request_that_is_refused_under_200_is_not_tried_again():
    def answer(body, times):
        if "Question 1?" in body["messages"][-1]["content"]:
            return 200, {}, {"error": {"code": 400, "message": "context too long"}}
        return None

    with FaultServer(answer=answer) as server:
        cast = cast_of(server, n=3)
        assert sorted(v.abstain_reason or "" for v in cast.votes) == ["", "", "", "", "infra_error", "infra_error"]
        assert {v.attempts for v in cast.votes} == {1}


USABLE = {"choices": [choice("{W}")]}
REFUSALS = [
    (401, {"error": {"code": 401, "message": "no"}}), (401, {"error": {"code": "invalid_api_key", "message": "no"}}),
    (401, {"error": {"type": "authentication_error", "message": "no"}}), (401, {"error": "Incorrect API key provided"}),
    (401, {"code": 401, "message": "Unauthorized"}), (401, {"error": {"status": "UNAUTHENTICATED", "message": "no"}}),
    (401, {"base_resp": {"status_code": 1004, "status_msg": "login fail"}}),
    (401, {"base_resp": {"status_code": 2049, "status_msg": "invalid api key, try again"}}),
    (401, {"object": "error", "type": "AuthenticationError", "code": "401", "message": "no"}),
    (404, {"error": {"code": 404, "message": "no"}}), (404, {"error": {"code": "model_not_found", "message": "no"}}),
    (404, {"error": {"type": "invalid_request_error", "code": "model_not_found", "message": "no"}}),
    (404, {"error": "model 'm' not found, try pulling it first"}),
    (404, {"code": 20012, "message": "Model does not exist"}),
    (404, {"object": "error", "message": "no", "type": "NotFoundError", "code": 404}),
    (404, {"error": {"code": "404", "message": "no"}}),
]  # fmt: skip


def no_reply(tree):
    """Why there is no reply in an answer."""
    with pytest.raises(NoReply) as found:
        read_reply(json.dumps(tree).encode(), "m")
    return found.value


@pytest.mark.parametrize(("status", "answer"), REFUSALS)
def test_a_wrong_key_or_model_under_200_is_known_as_one(status, answer):
    assert (no_reply(answer).status, no_reply(answer).kind) == (status, "rejected")
    if answer.get("code") != 20012:  # a number that nobody knows, beside a reply
        assert no_reply(USABLE | answer).status == status


@pytest.mark.parametrize(("status", "answer"), [REFUSALS[n] for n in (0, 6, 9, 12)])
def test_a_wrong_key_or_model_under_200_says_what_the_status_would(status, answer):
    with FaultServer(answer=lambda body, times: (200, {}, answer)) as server:
        cast = cast_of(server)
    assert isinstance(cast.error, UserError)
    assert f"error {status} under HTTP 200" in str(cast.error)
    assert ("in TEST_KEY (" if status == 401 else "judge.model, judge.base_url: ") in str(cast.error)
    assert server.requests <= 4  # nothing is tried again


@pytest.mark.parametrize(
    ("message", "hint", "answer"),
    [
        ("'max_tokens' is not supported with this model", "{max_completion_tokens: 4096}",
         lambda said: {"error": {"code": 400, "message": said}}),
        ("temperature does not support 0", "judge.extra_body: {temperature: null}",
         lambda said: {"error": {"type": "invalid_request_error", "message": said}}),
        ("You are not allowed to request logprobs", "judge.logprobs: false",
         lambda said: {"error": {"code": 403, "message": said}}),
        ("response_format is not supported", "judge.extra_body: {response_format: null}",
         lambda said: {"base_resp": {"status_code": 2013, "status_msg": said}}),
        ("Unknown parameter: 'seed'", "judge.extra_body: {seed: null}",
         lambda said: {"object": "error", "type": "BadRequestError", "message": said}),
        ("top_logprobs must be at most 5", "judge.extra_body: {top_logprobs: 5}",
         lambda said: {"code": 422, "message": said}),
    ],
)  # fmt: skip
def test_a_parameter_that_is_refused_under_200_says_how_to_do_without(message, hint, answer):
    with FaultServer(answer=lambda body, times: (200, {}, answer(message))) as server:
        cast = cast_of(server)
    assert isinstance(cast.error, UserError)
    assert hint in str(cast.error)


@pytest.mark.parametrize("error", [{"code": 400, "message": "System role not supported"}, "System role not supported"])
def test_a_system_message_that_is_refused_under_200_is_merged(error):
    def answer(body, times):
        return (200, {}, {"error": error}) if body["messages"][0]["role"] == "system" else None

    with FaultServer(answer=answer) as server:
        cast = cast_of(server, n=6, concurrency=1)
    assert outcomes(cast) == {"second"}


@pytest.mark.parametrize(
    "failure",
    [
        {"base_resp": {"status_code": 1002, "status_msg": "rate limit"}},
        {"base_resp": {"status_code": "1013", "status_msg": "internal"}},
        {"base_resp": {"status_code": 1000}}, {"base_resp": {"status_code": -1, "status_msg": "odd"}},
        {"BaseResp": {"StatusCode": 1001, "StatusMessage": "timeout"}}, {"success": False, "message": "busy"},
        {"status": "failed"}, {"object": "error", "message": "busy"}, {"error_code": 18, "error_msg": "qps"},
        {"code": 503, "message": "busy"}, {"code": "429", "msg": "busy"}, {"type": "error", "message": "busy"},
    ],
)  # fmt: skip
def test_failures_by_other_names_are_no_replies(failure):
    for beside in ({}, USABLE, {"choices": None}):
        assert no_reply(beside | failure).kind == "down"


def test_a_failure_in_base_resp_is_tried_again():
    def answer(body, times):
        failed = filled(USABLE, body) | {"base_resp": {"status_code": 1002, "status_msg": "rate limit"}}
        return (200, {}, failed) if times == 1 else None

    with FaultServer(answer=answer) as server:
        cast = cast_of(server, n=1)
    assert outcomes(cast) == {"second"}
    assert {v.attempts for v in cast.votes} == {2}


@pytest.mark.parametrize(
    "fine",
    [
        {"base_resp": {"status_code": 0, "status_msg": "success"}}, {"base_resp": {"status_code": "0"}},
        {"base_resp": {}}, {"base_resp": None}, {"code": 0, "message": "success"}, {"code": 200},
        {"code": "200", "msg": "ok"}, {"success": True}, {"error": None, "errors": []}, {"error_code": 0},
        {"status": "completed"}, {"object": "chat.completion"}, {"type": "message"},
    ],
)  # fmt: skip
def test_a_reply_that_says_that_all_is_well(fine):
    tree = {"choices": [choice("A")], **fine}
    assert read_reply(json.dumps(tree).encode(), "m").content == "A"


@pytest.mark.parametrize("finish", [1, 0, 2.5, True, False, ["stop"], [], {"type": "stop"}, {}, {"reason": "length"}])
def test_a_finish_reason_that_is_no_word_is_a_failure(finish):
    for name, mine in (("finish_reason", choice("A", finish)),
                       ("native_finish_reason", choice("A", None) | {"native_finish_reason": finish})):  # fmt: skip
        found = no_reply({"choices": [mine]})
        assert found.kind == "unfinished"
        assert f"{name} is no word" in str(found)
    said = choice("A") | {"native_finish_reason": finish}
    assert read_reply(json.dumps({"choices": [said]}).encode(), "m").finish_reason == "stop"


def test_a_reply_whose_finish_reason_is_no_word_is_tried_again():
    with server_of(choice("{W}", 1), choice("{R}")) as server:
        cast = cast_of(server, n=1)
    assert outcomes(cast) == {"second"}
    assert {v.attempts for v in cast.votes} == {2}


@pytest.mark.parametrize(
    "content", ["", None, "  \n", [], "\u200b", "<think>so</think>", [{"type": "text", "text": ""}]]
)
@pytest.mark.parametrize("more", [{}, {"reasoning_content": "Verdict: {W}"}, {"reasoning": "{W}"}])
def test_an_empty_reply_is_asked_once_more(content, more, tmp_path):
    with server_of(choice(content, **more), choice("{R}")) as server:
        cast = cast_of(server, cache=str(tmp_path))
        assert outcomes(cast) == {"second"}
        assert [(v.attempts, v.reasked) for v in cast.votes] == [(2, 1)] * 4
        # The first is in the budget too.
        assert cast.judge.spent.calls == 8 == spent_on(cast.votes, cast.judge.settings).calls
    with server_of(choice(content, **more)) as server:
        cast = cast_of(server, cache=str(tmp_path / "b"))
        assert outcomes(cast) == {"empty"}
        assert server.requests == 8
    with server_of(choice("{R}")) as server:
        assert not any(v.cached for v in cast_of(server, cache=str(tmp_path / "b")).votes)


def test_only_empty_replies_pause_the_run():
    with server_of(choice("")) as server:
        cast = cast_of(server, n=8, breaker_failures=6)
    assert "gives no finished reply, 6 ballots in a row failed after all attempts (last: an empty reply)" in str(
        cast.error
    )


@pytest.mark.parametrize("reask", [0, 1, 3])
def test_what_is_unreadable_is_asked_again_so_often(reask):
    usage = {"prompt_tokens": 10, "completion_tokens": 1}
    with server_of(*[choice("Both are fine")] * 3, choice("{R}"), usage=usage) as server:
        cast = cast_of(server, reask=reask)
    assert outcomes(cast) == ({"second"} if reask == 3 else {"unparsed"})
    assert {(v.attempts, v.reasked, v.usage.prompt_tokens) for v in cast.votes} == {
        (reask + 1, reask, 10 * (reask + 1))
    }
    assert cast.judge.spent.tokens == spent_on(cast.votes, cast.judge.settings).tokens == 4 * 11 * (reask + 1)


def test_another_ask_of_a_sampled_reply_has_another_seed():
    with server_of(choice("Both"), choice("{R}")) as server:
        cast = cast_of(server, temperature=0.7, n=1)
    assert len({b["seed"] for b in server.bodies}) == 2
    assert {v.reasked for v in cast.votes} == {1}


def test_an_unreadable_reply_stays_one_when_the_next_ask_fails():
    down = choice("", "error")
    with server_of(choice("Both"), down) as server:
        cast = cast_of(server, max_retries=1)
    assert outcomes(cast) == {"unparsed"}
    assert {(v.attempts, v.reasked) for v in cast.votes} == {(3, 0)}


# Cut off, refused


@pytest.mark.parametrize(
    "finish", ["length", "MAX_TOKENS", "max_tokens", "model_length", "max_output_tokens", "incomplete", "token_limit",
               "FinishReason.MAX_TOKENS", "model_context_window_exceeded", None],
)  # fmt: skip
def test_a_cut_off_last_line_is_no_verdict(finish, tmp_path):
    with server_of(choice("Because.\nVerdict: {W}", finish)) as server:
        cast = cast_of(server, "last_line", cache=str(tmp_path))
        assert outcomes(cast) == {"truncated"}
        assert len(server.bodies) == 4
        assert not any(v.cached for v in cast_of(server, "last_line", cache=str(tmp_path)).votes)


def test_a_reply_that_the_server_behind_it_cut_off():
    with server_of(choice("Because.\nVerdict: {W}") | {"native_finish_reason": "MAX_TOKENS"}) as server:
        assert outcomes(cast_of(server, "last_line")) == {"truncated"}
    with server_of(choice("Because.\nVerdict: {R}") | {"native_finish_reason": "a word of theirs"}) as server:
        assert outcomes(cast_of(server, "last_line")) == {"second"}


@pytest.mark.parametrize("finish", ["stop", "STOP", "end_turn", "eos", "eos_token", "stop_sequence", "COMPLETE",
                                    "FINISH_REASON_STOP", "end_of_sequence"])  # fmt: skip
def test_a_finished_reply_in_other_words(finish):
    with server_of(choice("Because.\nVerdict: {R}", finish)) as server:
        assert outcomes(cast_of(server, "last_line")) == {"second"}


@pytest.mark.parametrize("finish", ["content_filter", "SAFETY", "refusal", "RECITATION", "PROHIBITED_CONTENT",
                                    "guardrail_intervened"])  # fmt: skip
def test_a_refusal_in_other_words(finish):
    with server_of(choice("{W}", finish)) as server:
        assert outcomes(cast_of(server)) == {"refused"}


# Thoughts


MARKS = [
    ("<think>", "</think>"), ("<thinking>", "</thinking>"), ("<thought>", "</thought>"), ("[THINK]", "[/THINK]"),
    ("<reasoning>", "</reasoning>"), ("<reflection>", "</reflection>"), ("◁think▷", "◁/think▷"),
    ("<seed:think>", "</seed:think>"), ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<|begin_of_thought|>", "<|end_of_thought|>"), ("<scratchpad>", "</scratchpad>"),
    ("<analysis>", "</analysis>"), ("[REASONING]", "[/REASONING]"), ("<inner_thoughts>", "</inner_thoughts>"),
    ("<think >", "</ think>"), ("<｜begin▁of▁thinking｜>", "<｜end▁of▁thinking｜>"),
    ("<antThinking>", "</antThinking>"),
]  # fmt: skip
"""That may stand after other text."""
FIRST_MARKS = [
    ("<|channel|>analysis<|message|>", "<|end|><|start|>assistant<|channel|>final<|message|>"),
    ("analysisWe see", "assistantfinal"), ("<unused94>thought\n", "<unused95>"),
    ("<|channel>thought\n", "<channel|>"), ("Thinking...\n", "\n...done thinking.\n\n"),
    ("Here is my thought process: ", "Here is my response: "),
]  # fmt: skip
LEANS = {"letter": "Maybe {W}. {W}", "last_line": "lean\nVerdict: {W}\n", "json": '{"verdict": "{W}"}'}


@pytest.mark.parametrize("kind", ["letter", "last_line", "json"])
def test_thoughts_are_not_read(kind):
    lean = LEANS[kind]
    thought = [choice(f"{a}{lean}{b}{SAYS[kind]}") for a, b in MARKS + FIRST_MARKS]
    assert becomes(thought, kind)[1] == ["second"] * len(thought)
    unfinished = [choice(f"{a}{lean}") for a, _ in MARKS + FIRST_MARKS]
    assert becomes(unfinished, kind)[1] == ["truncated"] * len(unfinished)
    later = [choice(f"Okay.\n{a}{lean}") for a, _ in MARKS]
    assert becomes(later, kind)[1] == ["truncated"] * len(later)


@pytest.mark.parametrize("closed", ["</think>", "[/THINK]", "</thought>", "◁/think▷", "<|END_THINKING|>"])
def test_a_thought_whose_beginning_stands_in_the_prompt(closed):
    with server_of(choice('Maybe {"verdict": "{W}"}, no.' + closed + "\n" + SAYS["json"])) as server:
        assert outcomes(cast_of(server, "json")) == {"second"}
    with server_of(choice('Maybe {"verdict": "{W}"}, no.' + closed + "\nI have no idea")) as server:
        assert outcomes(cast_of(server, "json")) == {"unparsed"}
    with server_of(choice("Verdict: {W}" + closed)) as server:
        assert outcomes(cast_of(server, "last_line")) == {"empty"}


@pytest.mark.parametrize(
    "content",
    [
        [{"type": "reasoning", "text": "Maybe {W}"}, {"type": "text", "text": "{R}"}],
        [{"type": "thinking", "thinking": [{"type": "text", "text": "{W}"}]}, {"type": "text", "text": "{R}"}],
        [{"type": "redacted_thinking", "data": "x"}, {"type": "output_text", "text": "{R}"}],
        [{"text": "{W}", "thought": True}, {"text": "{R}"}],
        ["{R}"], ["", "{R}"], [{"type": "text", "text": {"value": "{R}"}}],
    ],
)  # fmt: skip
def test_content_in_parts(content):
    with server_of(choice(content, reasoning_content="{W}", thinking="{W}")) as server:
        assert outcomes(cast_of(server)) == {"second"}


def test_choices_out_of_order():
    both = [{**choice("{W}"), "index": 1}, {**choice("{R}"), "index": 0}]
    with server_of(both) as server:
        assert outcomes(cast_of(server)) == {"second"}


# Forms


JSON_FORMS = [
        ('Here is my evaluation:\n\n```json\n{"reason": "x", "verdict": "{R}"}\n```', "second"),
        ('```\n{"verdict": "{R}"}\n```\nI hope this helps.', "second"),
        ('{"reason": "line one\nline two\ttab", "verdict": "{R}"}', "second"),
        ('{"reason": "x", "verdict": "{R}",}', "second"), ('[{"reason": "a, }", "verdict": "{R}"},]', "second"),
        ('\ufeff{"verdict": "{R}"}', "second"), ('{"verdict": "{R}"}<|im_end|>', "second"),
        ('{"result": {"verdict": "{R}"}}', "second"), ("{'reason': 'it is', 'verdict': '{R}'}", "second"),
        ("{“reason”: “x”， “verdict”: “{R}”}", "second"),
    ('{"Verdict": "**{R}**"}', "second"), ('{"verdict": "Answer {R}"}', "second"),
        ('In the set {x, y}: {"verdict": "{R}"}', "second"),
        ('{"reason":"x","verdict":"{W}"}\n{"reason":"x","verdict":"{R}"}', "unparsed"),
        ('{"verdict":"{R}"}\n{"verdict":"{R}"}', "unparsed"), ('{"verdict":"{W}","verdict":"{R}"}', "unparsed"),
        ('{"verdict":"{W}"}\nOn reflection, verdict: {R}', "unparsed"), ('{"verdict": "{W} or {R}"}', "unparsed"),
        ('{"verdict": null}', "unparsed"), ('{"verdict": "{R}"', "unparsed"), ("{'verdict': ['{R}']}", "unparsed"),
        ('{"a": {"verdict": "{W}"}, "b": {"verdict": "{R}"}}', "unparsed"),
]  # fmt: skip


def test_forms_of_json():
    contents, expected = zip(*JSON_FORMS, strict=True)
    found = becomes([choice(c) for c in contents], "json")[1]
    assert dict(zip(contents, found, strict=True)) == dict(zip(contents, expected, strict=True))


LINES = [
        *((line, "second") for line in (
            "### Verdict: {R}", "Verdict：{R}", "**Verdict: {R}**", "> Verdict: {R}", "- **Verdict:** {R}",
            "\\boxed{{R}}", "$\\boxed{\\text{{R}}}$", "Verdict: \\boxed{{R}}", "[[{R}]]", "Verdict: {R}<|im_end|>",
            "Verdict: {R}</s>", "Verdict: {R}\n<|eot_id|>", "Verdict:\u00a0{R}", "Verdict: {R}\u200b",
            "\ufeffVerdict: {R}",
            "Final verdict = {R}!", "The verdict is {R}.", "Verdict is: {R}", "Therefore, my verdict: Answer {R}",
            "Verdict — {R}", "`Verdict: {R}`", "```\nVerdict: {R}\n```", "Verdict: {R}\n\n---", "Verdict: <b>{R}</b>",
            "<verdict>Verdict: {R}</verdict>", "Verdict: {R}<end_of_turn>", "Verdict -> {R}", "Verdict：{R}。",
        "Verdict: {R}<｜end▁of▁sentence｜>",
        )),
        *((line, "unparsed") for line in (
            "Verdict: {R} or {W}", "Verdict: {R}/{W}", "Verdict: not {R}", "Verdict: {R}, but {W} is close", "{R}",
            "Verdict: {W}\nVerdict:", "Verdict: {W}\nBut I am not sure.", "\\boxed{{R}} \\boxed{{W}}",
            "[[{R}]] [[{W}]]",
            "Verdict: {R} is what I would say if", "Verdict: {W}{R}", "My verdict is that {R}",
        )),
]  # fmt: skip


def test_forms_of_the_last_line():
    lines, expected = zip(*LINES, strict=True)
    found = becomes([choice(f"Because.\n\n{line}") for line in lines], "last_line")[1]
    assert dict(zip(lines, found, strict=True)) == dict(zip(lines, expected, strict=True))


LETTERS = [
        *((c, "second") for c in (
            "\u200b{R}", "{R}<|im_end|>", "\\boxed{{R}}", "Answer：{R}", "<answer>{R}</answer>", "### {R}", "({R})",
            "{R}</s>",
            "My verdict is {R}.", "Option {R}", "“{R}”", "```\n{R}\n```", "<|begin_of_solution|>{R}<|end_of_solution|>",
        )),
        *((c, "unparsed") for c in (
            "A and B", "{R}{W}", "{R}, {W}", "{W}\n{R}", "{W}</s>{R}", "Not {R}", "{R} vs {W}",
            "\\boxed{{W}} or \\boxed{{R}}",
        )),
]  # fmt: skip


def test_forms_of_a_letter():
    contents, expected = zip(*LETTERS, strict=True)
    found = becomes([choice(c) for c in contents], "letter")[1]
    assert dict(zip(contents, found, strict=True)) == dict(zip(contents, expected, strict=True))


# What it costs


@pytest.mark.parametrize(
    ("usage", "expected"),
    [
        # Thoughts beside the completion, within it, in the total alone, and with no total at all.
        ({"prompt_tokens": 21, "completion_tokens": 1, "total_tokens": 622,
          "completion_tokens_details": {"reasoning_tokens": 600}}, (21, 601, 0, 600)),
        ({"prompt_tokens": 21, "completion_tokens": 601, "total_tokens": 622,
          "completion_tokens_details": {"reasoning_tokens": 600}}, (21, 601, 0, 600)),
        ({"prompt_tokens": 21, "completion_tokens": 1, "total_tokens": 622}, (21, 601, 0, 600)),
        ({"prompt_tokens": 21, "completion_tokens": 1, "reasoning_tokens": 600}, (21, 601, 0, 600)),
        ({"prompt_tokens": 1000, "completion_tokens": 10, "total_tokens": 1010,
          "prompt_tokens_details": {"cached_tokens": 900}}, (1000, 10, 900, 0)),
        ({"prompt_tokens": 1000, "completion_tokens": 10, "prompt_cache_hit_tokens": 900,
          "prompt_cache_miss_tokens": 100}, (1000, 10, 900, 0)),
        ({"prompt_tokens": 1000, "completion_tokens": 10, "cached_tokens": 900}, (1000, 10, 900, 0)),
        ({"input_tokens": 100, "output_tokens": 10, "cache_read_input_tokens": 900}, (1000, 10, 900, 0)),
        ({"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 1010, "cache_read_input_tokens": 900},
         (1000, 10, 900, 0)),
        ({"prompt_tokens": 1000, "completion_tokens": 10, "total_tokens": 1010, "cache_read_input_tokens": 900},
         (1000, 10, 900, 0)),
        ({"prompt_tokens": 5, "completion_tokens": 2, "total_tokens": "odd", "prompt_tokens_details": None,
          "completion_tokens_details": []}, (5, 2, 0, 0)),
        ({"prompt_tokens": 5, "completion_tokens": 2, "total_tokens": 3}, (5, 2, 0, 0)),
        ({"total_tokens": 622, "completion_tokens": 22}, (600, 22, 0, 0)),
    ],
)  # fmt: skip
def test_usage_of_thoughts_and_cached_tokens(usage, expected):
    with server_of(choice("{R}"), usage=usage) as server:
        cast = cast_of(server, n=1)
    for vote in cast.votes:
        u = vote.usage
        assert (u.prompt_tokens, u.completion_tokens, u.cached_tokens, u.reasoning_tokens) == expected
    assert cast.judge.spent.tokens == 2 * (expected[0] + expected[1])
    assert read_usage(json.dumps({"usage": usage}).encode()).prompt_tokens == expected[0]


def test_prices_of_thoughts_and_cached_tokens():
    usage = Usage(prompt_tokens=1000, completion_tokens=601, cached_tokens=900, reasoning_tokens=600)
    assert cost(usage, Price(prompt=1, completion=2)) == pytest.approx((1000 + 2 * 601) / 1e6)
    assert cost(usage, Price(prompt=1, completion=2, cached=0.1, reasoning=3)) == pytest.approx((190 + 2 + 1800) / 1e6)
    assert cost(usage, Price(prompt=1, completion=2, cached=0, reasoning=0)) == pytest.approx((100 + 2) / 1e6)


def test_a_money_budget_counts_thoughts():
    usage = {"prompt_tokens": 21, "completion_tokens": 1, "total_tokens": 622}
    prices = {"m": {"prompt": 0, "completion": 1}}
    with server_of(choice("{R}"), usage=usage) as server:
        cast = cast_of(server, n=9, budget={"money": 0.002}, prices=prices, concurrency=1)
    assert "judge.budget.money" in str(cast.error)
    assert len(cast.votes) < 8


# Waits

_SOON = "34s"
GOOGLE = [{"error": {"code": 429, "status": "RESOURCE_EXHAUSTED", "details": [
    {"@type": "type.googleapis.com/google.rpc.Help"},
    {"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": _SOON}]}}]  # fmt: skip


@pytest.mark.parametrize(
    ("headers", "body", "seconds"),
    [
        ({"retry-after-ms": "20000"}, None, 20), ({"retry-after-ms": "20000", "retry-after": "1"}, None, 20),
        ({"retry-after": "1m30s"}, None, 90), ({}, GOOGLE, 34), ({}, GOOGLE[0], 34),
        ({}, {"error": {"details": [{"retryDelay": {"seconds": 34, "nanos": 500000000}}]}}, 34.5),
        ({}, {"retry_after": 7}, 7), ({}, {"error": {"retry_after_ms": 1500}}, 1.5),
        ({}, {"error": {"message": "Rate limit reached. Please try again in 620ms."}}, 0.62),
        ({}, {"error": {"message": "Please try again in 6m0s. Visit x"}}, 360),
        ({}, {"error": {"message": "Please retry in 34.07s."}}, 34.07),
        ({}, {"error": {"message": "Please wait 20 seconds and try again"}}, 20),
        ({"x-ratelimit-remaining-requests": "0", "x-ratelimit-reset-requests": "1s",
          "x-ratelimit-remaining-tokens": "0", "x-ratelimit-reset-tokens": "6m0s"}, None, 360),
        ({"x-ratelimit-remaining-requests": "9", "x-ratelimit-reset-requests": "8s"}, None, None),
        ({}, {"error": {"message": "Limit 3, used 3."}}, None), ({}, "<html>", None), ({}, None, None),
        ({"retry-after": "30 seconds"}, None, 30), ({"retry-after": "1h2m3s"}, None, 3723),
        ({"retry-after": "2 minutes, 5 secs"}, None, 125), ({"retry-after": "1500 ms"}, None, 1.5),
        ({}, {"error": {"message": "Please try again in 1h2m3s."}}, 3723),
        ({}, {"error": {"message": "Your quota will reset after 17h23m50s."}}, 62630),
        ({}, {"message": "Please retry after 1 hour and 5 minutes."}, 3900),
        ({}, {"message": "Try your request again in approximately 5.2 seconds"}, 5.2),
        ({}, {"message": "Too many requests; retry in 2 min"}, 120), ({}, {"message": "Retry-After: 20 seconds"}, 20),
        ({}, {"message": "Rate limited, wait at least 3s before the next"}, 3),
        ({}, {"message": "Gave up after 60 s. Please retry after 5 s."}, 5),
        ({"x-rate-limit-reset": "12"}, None, 12), ({"x-rate-limit-reset-requests": "1m0s"}, None, 60),
        ({"x-rate-limit-remaining": "4", "x-rate-limit-reset": "12"}, None, None),
        ({"x-rate-limit-remaining-tokens": "0", "x-rate-limit-reset-tokens": "250ms"}, None, 0.25),
        ({}, {"retryAfterMs": 1500}, 1.5), ({}, {"retry_after_ms": "1500"}, 1.5), ({}, {"error": {"retryAfter": 7}}, 7),
        ({}, {"error": {"retryAfterSeconds": 7}}, 7), ({}, {"detail": {"retry-after-ms": 250}}, 0.25),
        ({}, {"error": {"metadata": {"retry_in": "3s"}}}, 3), ({}, {"retryDelayMs": 20}, 0.02),
        ({}, {"error": {"message": "Rate limit exceeded: free-models-per-min.", "code": 429, "metadata": {"headers":
            {"X-RateLimit-Limit": "20", "X-RateLimit-Remaining": "0", "X-RateLimit-Reset": "41"}}}}, 41),
        ({}, {"error": {"metadata": {"headers": {"Retry-After": ["9"]}}}}, 9),
        ({}, {"error": {"message": "Provider returned error", "metadata": {"provider_name": "x", "raw":
            json.dumps({"error": {"details": [{"retryDelay": "34s"}]}})}}}, 34),
        ({}, {"error": {"metadata": {"raw": json.dumps([{"message": "Please try again in 620ms."}])}}}, 0.62),
        ({}, {"error": {"metadata": {"raw": "m is rate-limited upstream. Please retry in 3 s."}}}, 3),
    ],
)  # fmt: skip
def test_how_long_a_server_asks_to_wait(headers, body, seconds):
    found = retry_after_s(headers, body)
    assert found == (None if seconds is None else pytest.approx(seconds))


@pytest.mark.parametrize(
    "message",
    [
        "gave up after a wait of 120 seconds",
        "Gave up after the wait for 120 seconds.",
        "The request timed out after retrying for 30 seconds",
        "no answer, after a retry in 20 s",
        "Maximum wait 120 s exceeded",
        "the upstream was stopped while retrying for 20s",
        "connection reset after 30 seconds",
        "We could not wait 30 seconds",
        "waited 120 seconds",
        "3 retries in 20 s",
        "the model did not become available after 30 s",
        "retry limit of 3 in 30 s",
        "never try again in 10 seconds",
    ],
)
def test_a_wait_that_is_over_is_none(message):
    for body in ({"error": {"message": message}}, {"error": {"metadata": {"raw": message}}}):
        assert retry_after_s({}, body) is None


def test_times_of_day_to_wait_for():
    in_a_while = time.time() + 20
    assert retry_after_s({"x-ratelimit-reset": str(int(in_a_while * 1000))}) == pytest.approx(20, abs=2)
    assert retry_after_s({"x-ratelimit-reset": str(int(in_a_while))}) == pytest.approx(20, abs=2)
    assert retry_after_s({"retry-after": email.utils.formatdate(in_a_while, usegmt=True)}) == pytest.approx(20, abs=2)
    behind = {"X-RateLimit-Remaining": "0", "X-RateLimit-Reset": str(int(in_a_while * 1000))}
    assert retry_after_s({}, {"error": {"metadata": {"headers": behind}}}) == pytest.approx(20, abs=2)


@pytest.mark.parametrize("status", [429, 529, 503, 200])
@pytest.mark.parametrize("how", ["header", "body"])
def test_all_requests_wait_as_long_as_a_server_asks(status, how):
    body = {"error": {"code": 429, "message": "slow", "details": [{"retryDelay": "0.4s"}]}} if how == "body" else {}
    headers = {"retry-after-ms": "400"} if how == "header" else {}
    if status == 200 and how == "header":
        pytest.skip("an error under 200 says it in its body")
    with FaultServer(answer=lambda b, times: (status, headers, body) if times == 1 else None) as server:
        cast = cast_of(server, n=1, concurrency=1)
    assert outcomes(cast) == {"second"}
    assert server.times[1] - server.times[0] >= 0.4


@pytest.mark.parametrize("status", [429, 498, 529, 503])
def test_a_server_that_has_no_time_is_not_at_a_wrong_address(status):
    with FaultServer(answer=lambda b, times: (status, {}, {"error": {"message": "overloaded"}})) as server:
        cast = cast_of(server, max_retries=0)
    assert "is down" in str(cast.error)
    assert "base_url" not in str(cast.error)


# Connections


def fault_at(url, **changes):
    cast = Cast(settings(url, max_retries=0, timeout_s=5, **changes), 1)
    started = time.monotonic()
    cast.run()
    assert isinstance(cast.error, JudgeUnavailable)
    assert "no reply within" not in str(cast.error)
    assert time.monotonic() - started < 4
    return str(cast.error)


def test_connection_faults_are_named(monkeypatch):
    assert "connection refused: nothing listens at 127.0.0.1:9;" in fault_at("http://127.0.0.1:9/v1")
    assert "connection refused" in fault_at("http://localhost:9/v1")
    assert "no host `no-such-host.invalid` is known" in fault_at("http://no-such-host.invalid/v1")
    with FaultServer(share=1.0, faults=("cut",)) as server:
        assert "the connection was cut" in fault_at(server)
    for scheme in ("http", "https"):
        monkeypatch.setenv(f"{scheme.upper()}_PROXY", "http://127.0.0.1:9")
        said = fault_at(f"{scheme}://judge.example/v1")
        assert "the proxy can't be used" in said
        assert f"unset {scheme.upper()}_PROXY" in said


@pytest.mark.parametrize(
    ("scheme", "variable", "proxy"),
    [
        ("http", "HTTP_PROXY", "http://no-such-proxy.invalid:3128"),
        ("https", "HTTPS_PROXY", "http://me:hush@no-such-proxy.invalid:3128"),
        ("https", "https_proxy", "no-such-proxy.invalid:3128"),
        ("http", "ALL_PROXY", "http://no-such-proxy.invalid:3128"),
        ("https", "all_proxy", "http://127.0.0.1:9"),
    ],
)
def test_a_dead_proxy_is_blamed_itself(monkeypatch, scheme, proxy, variable):
    monkeypatch.setenv(variable, proxy)
    said = fault_at(f"{scheme}://judge.example/v1")
    where = proxy.rpartition("/")[2].rpartition("@")[2]
    assert f"the proxy can't be used (Cannot connect to host {where} " in said
    assert f"mend or unset {variable}, or name judge.example in NO_PROXY" in said
    assert "no host" not in said
    assert "hush" not in said


def test_an_unknown_host_beside_a_proxy_is_still_named(monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("NO_PROXY", "no-such-host.invalid")
    assert "no host `no-such-host.invalid` is known" in fault_at("http://no-such-host.invalid/v1")


def test_what_a_proxy_says_is_the_proxys(monkeypatch):
    with FaultServer(status=lambda body: 407) as server:
        monkeypatch.setenv("HTTP_PROXY", settings(server).base_url.removesuffix("/v1"))
        said = fault_at("http://judge.example/v1")
    assert re.search(r"the proxy 127\.0\.0\.1:\d+ wants a user and a password \(HTTP_PROXY\)", said)
    with FaultServer(share=1.0, faults=("cut",)) as server:
        monkeypatch.setenv("HTTP_PROXY", settings(server).base_url.removesuffix("/v1"))
        said = fault_at("http://judge.example/v1")
    assert re.search(r"the connection was cut .* through the proxy 127\.0\.0\.1:\d+ \(HTTP_PROXY\)", said)


def test_a_server_that_takes_too_long_says_so():
    with FaultServer(share=1.0, faults=("hang",)) as server:
        cast = cast_of(server, n=1, max_retries=0, timeout_s=0.5)
    assert "no reply within 0.5 s" in str(cast.error)


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is absent")
def test_certificates(tmp_path, monkeypatch):
    key, own = tmp_path / "key.pem", tmp_path / "own.pem"
    made = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=judge",
            "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(own)]  # fmt: skip
    subprocess.run(made, check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(own, key)
    with FaultServer(certificate=context) as server:
        said = fault_at(server)
        assert re.search(r"the certificate of 127\.0\.0\.1:\d+ isn't trusted \(self.signed certificate\)", said)
        assert "judge.ca_file" in said
        assert outcomes(cast_of(server, ca_file=str(own))) == {"second"}
        monkeypatch.setenv("SSL_CERT_FILE", str(own))
        assert outcomes(cast_of(server)) == {"second"}
    with pytest.raises(UserError, match=r"judge\.ca_file: .*key\.pem can't be used"):
        Cast(settings(server, ca_file=str(key)))


def tls_server(folder, name="IP:127.0.0.1", days=(-1, 2)):
    """What serves with a certificate of its own for this name and these days, and the certificate's file."""
    x509 = pytest.importorskip("cryptography.x509")
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.datetime.now(datetime.UTC)
    kind, _, value = name.partition(":")
    alternative = x509.IPAddress(ipaddress.ip_address(value)) if kind == "IP" else x509.DNSName(value)
    called = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "judge")])
    builder = x509.CertificateBuilder(called, called, key.public_key(), x509.random_serial_number())
    made = (
        builder.not_valid_before(now + datetime.timedelta(days[0]))
        .not_valid_after(now + datetime.timedelta(days[1]))
        .add_extension(x509.SubjectAlternativeName([alternative]), critical=False)
        .sign(key, hashes.SHA256())
    )
    pem, how = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    (folder / "own.pem").write_bytes(made.public_bytes(pem))
    (folder / "key.pem").write_bytes(key.private_bytes(pem, how, serialization.NoEncryption()))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "own.pem", folder / "key.pem")
    return FaultServer(certificate=context), str(folder / "own.pem")


@pytest.mark.parametrize(
    ("what", "says"),
    [
        ({"days": (-9, -2)}, r"of 127.0.0.1:\d+ has expired; the server needs a new one"),
        ({"days": (2, 9)}, r"of 127.0.0.1:\d+ isn't valid yet .* is this machine's clock right\?"),
        ({"name": "DNS:other.example"}, r"of 127.0.0.1:\d+ is for another host \(IP address mismatch"),
        (
            {"name": "IP:127.0.0.2"},
            r"of 127.0.0.1:\d+ is for another host .* give judge.base_url the host that it is for",
        ),
    ],
)
def test_a_certificate_that_no_ca_file_mends_says_what_is_wrong(tmp_path, what, says):
    server, own = tls_server(tmp_path, **what)
    with server:
        said = fault_at(server, ca_file=own)
    assert re.search(f"the certificate {says}", said)
    assert "ca_file" not in said


def test_another_hosts_certificate_by_name(tmp_path):
    server, own = tls_server(tmp_path)
    with server:
        said = fault_at(settings(server).base_url.replace("127.0.0.1", "localhost"), ca_file=own)
    assert re.search(r"the certificate of localhost:\d+ is for another host \(Hostname mismatch", said)


def test_plain_http_to_a_tls_port_is_named(tmp_path):
    server, _ = tls_server(tmp_path)
    with server:
        said = fault_at(settings(server).base_url.replace("https://", "http://"))
    assert "judge.base_url begins with https://" in said


@pytest.mark.parametrize(
    "page",
    [
        "<html><head><title>400 The plain HTTP request was sent to HTTPS port</title></head></html>",
        "Client sent an HTTP request to an HTTPS server.\n",
        "Bad Request. You're speaking plain HTTP to an SSL-enabled server port.",
    ],
)
def test_a_tls_server_that_says_so_is_understood(page):
    with FaultServer(status=lambda body: 400, message=page) as server:
        assert "judge.base_url: https://..." in str(cast_of(server).error)


@pytest.mark.parametrize(
    "url",
    [
        "http://a..b/v1", "http://.a/v1", "https://a..b:8000/v1", "http://" + "a" * 64 + "/v1",
        "http://x." + "a" * 70 + ".example/v1", "http://" + "ä" * 60 + "/v1", "http://" + ".".join(["a" * 60] * 5),
        "http://256.1.1.1/v1", "http://ho\u200bst/v1", "http://a。。b/v1", "http://a b/v1", "http://{HOST}/v1",
        "http://<host>:8000/v1", "http://a\\b/v1", " http://host/v1", "http://host/v1 ", "http://host/v1#x", "host/v1",
    ],
)  # fmt: skip
def test_an_address_that_is_none_is_the_users_mistake(url):
    with pytest.raises(UserError, match=r"^judge\.base_url: .* is no address") as e:
        check_address(settings(url).jurors[0])
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    "url",
    [
        "http://a_b-c/v1", "http://a.b./v1", "http://[::1]:8000/v1", "http://127.0.0.1:8000/v1", "http://bücher.example/v1",
        "http://" + "a" * 63 + "/v1", "https://generativelanguage.googleapis.com/v1beta/openai/",
    ],
)  # fmt: skip
def test_an_address_that_there_may_be_is_taken(url):
    check_address(settings(url).jurors[0])


@pytest.mark.parametrize("proxy", ["http://a..b:3128", "a" * 64 + ":3128", "http://user:hush@a..b"])
def test_a_proxys_address_that_is_none(monkeypatch, proxy):
    monkeypatch.setenv("HTTPS_PROXY", proxy)
    with pytest.raises(UserError, match=r"^HTTPS_PROXY: .* is no address") as e:
        check_address(settings("https://judge.example/v1").jurors[0])
    assert "hush" not in str(e.value)
    check_address(settings("http://judge.example/v1").jurors[0])


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (400, "API key not valid. Please pass a valid API key."), (400, "API key expired. Please renew the API key."),
        (400, "Incorrect API key provided: sk***. You can obtain an API key from https://console.x.ai."),
        (403, "Method doesn't allow unregistered callers. Please use a valid API key."), (403, "Invalid API Key"),
        (422, "invalid x-api-key"), (400, "Your access token is invalid or expired"), (403, "missing API key"),
        (400, "invalid_api_key"), (400, "API_KEY_INVALID"),
    ],
)  # fmt: skip
def test_a_key_that_is_refused_under_another_status(status, message):
    with FaultServer(status=lambda body: status, message=message) as server:
        cast = cast_of(server, n=6, concurrency=1)
        assert len(server.bodies) <= 2
    assert isinstance(cast.error, UserError)
    assert "judge.api_key_env: " in str(cast.error)
    assert f"refused the key in TEST_KEY (HTTP {status}: {message}" in str(cast.error)


def test_what_is_said_of_other_things_is_not_about_the_key():
    for message in ("Invalid value for max_tokens", "the answer about an API is not valid", "unknown parameter `key`"):
        with FaultServer(status=lambda body: 400, message=message) as server:
            assert "judge.api_key_env" not in str(cast_of(server).error)


@pytest.mark.parametrize("content", [None, "no certificate"])
@pytest.mark.parametrize("url", ["https://api.openai.com/v1", "http://127.0.0.1:9/v1"])
def test_a_broken_ssl_cert_file_is_named(tmp_path, monkeypatch, content, url):
    file = tmp_path / "certs.pem"
    if content:
        file.write_text(content)
    monkeypatch.setenv("SSL_CERT_FILE", str(file))
    with pytest.raises(UserError, match=r"^SSL_CERT_FILE: .*certs\.pem, which can't be used") as e:
        check_address(settings(url).jurors[0])
    assert e.value.exit_code == 2


# Headers, query, and what the environment sets for OpenAI


def test_headers_and_query(monkeypatch):
    monkeypatch.setenv("AZURE_KEY", "azure-secret-0123")
    more = {"headers": {"api-key": "AZURE_KEY"}, "query": {"api-version": "2024-10-21"}, "api_key_env": None}
    with FaultServer(status=lambda body: 400, message="bad azure-secret-0123") as server:
        cast = cast_of(server, **more)
        assert "azure-secret" not in str(cast.error)
        server.status = None
        cast = cast_of(server, **more)
    assert outcomes(cast) == {"second"}
    assert all("POST /v1/chat/completions?api-version=2024-10-21 " in head for head in server.heads)
    assert all(re.search("^api-key: azure-secret-0123\r$", head, re.M | re.I) for head in server.heads)
    assert not any("authorization" in head.lower() for head in server.heads)
    assert all("azure-secret" not in v.model_dump_json() for v in cast.votes)


@pytest.mark.parametrize("value", [None, "", "two\nlines", "ü"])
def test_a_header_without_a_value(monkeypatch, value):
    if value is not None:
        monkeypatch.setenv("AZURE_KEY", value)
    with pytest.raises(UserError, match="variable AZURE_KEY"):
        Cast(settings("http://127.0.0.1:9/v1", headers={"api-key": "AZURE_KEY"}))


def test_what_the_environment_sets_for_openai_goes_nowhere_else(monkeypatch):
    import os

    ours = {"OPENAI_ORG_ID": "org-secret", "OPENAI_PROJECT_ID": "proj-secret",
            "OPENAI_CUSTOM_HEADERS": "X-Gateway: gateway-secret"}  # fmt: skip
    for name, value in ours.items():
        monkeypatch.setenv(name, value)
    with FaultServer() as server:
        assert outcomes(cast_of(server)) == {"second"}
    assert not any("secret" in head.replace("sk-very-secret", "") for head in server.heads)
    assert {name: os.environ[name] for name in ours} == ours


# Models without a system role, and other parameters that a model refuses


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (400, "System role not supported"),
        (400, "Conversation roles must alternate user/assistant/user/assistant/..."),
        (400, "Developer instruction is not enabled for models/gemma-3-4b-it"),
        (400, "Unsupported value: 'messages[0].role' does not support 'system' with this model."),
        (422, "Input should be 'user' or 'assistant'"), (400, "messages: first message must use the \"user\" role"),
        (400, "Unexpected role system"), (400, "System messages are not supported by this model"),
        (500, "Jinja Exception: System role not supported"),
    ],
)  # fmt: skip
def test_a_system_message_that_is_refused_is_merged(status, message):
    def answer(body, times):
        if body["messages"][0]["role"] == "system":
            return status, {}, {"error": {"message": message}}
        return None

    with FaultServer(answer=answer) as server:
        cast = cast_of(server, n=6, concurrency=1)
    assert outcomes(cast) == {"second"}
    assert sum(b["messages"][0]["role"] == "system" for b in server.bodies) <= 2
    user = server.bodies[-1]["messages"]
    assert [m["role"] for m in user] == ["user"]
    assert "one letter and nothing else" in user[0]["content"]
    assert "BEGIN ANSWER A" in user[0]["content"]


def test_a_system_message_can_be_merged_by_setting():
    with FaultServer() as server:
        cast = cast_of(server, system_role="merged")
        assert outcomes(cast) == {"second"}
        assert {m["role"] for b in server.bodies for m in b["messages"]} == {"user"}
        other = cast_of(server)
    assert not {v.ballot.id for v in cast.votes} & {v.ballot.id for v in other.votes}
    assert {v.prompt_hash for v in cast.votes} != {v.prompt_hash for v in other.votes}


@pytest.mark.parametrize(
    ("message", "hint"),
    [
        ("Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead.",
         "judge.extra_body: {max_completion_tokens: 4096}"),
        ("Unsupported value: 'temperature' does not support 0.", "judge.extra_body: {temperature: null}"),
        ("You are not allowed to request logprobs from this model", "judge.logprobs: false"),
        ("top_logprobs must be at most 5", "judge.extra_body: {top_logprobs: 5}"),
        ("Argument not supported on this model: logprobs", "judge.logprobs: false"),
        ("The api-version query parameter is missing", "judge.query: {api-version"),
        ("Unknown parameter: 'seed'", "judge.extra_body: {seed: null}"),
        ("Could not finish the message because max_tokens or model output limit was reached.", "judge.max_tokens"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("status", [400, 403])
def test_a_parameter_that_is_refused_says_how_to_do_without(status, message, hint):
    with FaultServer(status=status, message=message) as server:
        cast = cast_of(server)
    assert isinstance(cast.error, UserError)
    assert hint in str(cast.error)


# Prompts that a server cuts


@pytest.mark.parametrize(("sentences", "limit"), [(900, 1000), (1000, 2048), (9000, 8192)])
def test_a_server_that_cuts_prompts_without_a_word_gives_no_votes(sentences, limit, tmp_path):
    """It counts a token for four characters, and never more than its limit."""

    def answer(body, times):
        sent = sum(len(m["content"]) for m in body["messages"])
        usage = {"prompt_tokens": min(sent // 4, limit), "completion_tokens": 1}
        return 200, {}, {"choices": [filled(choice("{R}"), body)], "usage": usage}

    def cast(server):
        made = Cast(settings(server, cache=str(tmp_path)), 6, (LETTER,))
        long = {f"{side}{n}" for n in (2, 4) for side in "ab"}
        made.candidates = [
            c.model_copy(update={"text": f"{c.text} and so on" * sentences}) if c.completion_id in long else c
            for c in made.candidates
        ]
        made.run()
        return made

    with FaultServer(answer=answer) as server:
        first = cast(server)
        assert first.error is None
        lost = [v for v in first.votes if v.abstain_reason == "infra_error"]
        assert sorted(v.ballot.pair_id for v in lost) == ["p2", "p2", "p4", "p4"]
        assert all(f"the server read {limit} tokens of a prompt of" in v.error for v in lost)
        assert sum(v.cached for v in cast(server).votes) == 8


def test_a_cut_shows_beside_a_prompt_of_half_the_length():
    server = OpenAIServer(settings("http://127.0.0.1:9/v1").jurors[0], settings("http://127.0.0.1:9/v1"), None, [], 1.0)
    for sent, counted in ((4000, 1000), (8200, 2048), (9000, 2048), (12_000, 2048), (9000, 3000), (12_500, 2100)):
        server.check_whole(counted, sent)
    with pytest.raises(NoReply, match="cuts long prompts off"):
        server.check_whole(2048, 18_000)
    server.check_whole(4500, 18_000)
    server.check_whole(0, 18_000)  # it doesn't count


@pytest.mark.parametrize("proxy", ["nonsense://x", "socks5://127.0.0.1:9"])
def test_a_proxy_that_is_none_is_named(monkeypatch, proxy):
    monkeypatch.setenv("HTTP_PROXY", proxy)
    cast = Cast(settings("http://judge.example/v1", max_retries=0), 1)
    cast.run()
    assert "HTTP_PROXY" in str(cast.error) or "proxies" in str(cast.error)


def test_silence_in_many_small_casts_adds_up():
    with server_of(choice("")) as server:
        cast = Cast(settings(server, breaker_failures=6), 8, (LETTER,))
        errors = []
        for n in range(8):
            mine = [b for b in cast.ballots if b.pair_id == f"p{n}"]
            try:
                list(cast.judge.cast(mine, cast.pairs, cast.candidates, TEXT, cast.templates))
            except JudgeUnavailable as e:
                errors.append((n, str(e)))
    assert errors[0][0] == 2


# Which model it was


def fingerprinted(name):
    def answer(body, times):
        return 200, {}, {"choices": [filled(choice("{R}"), body)], "system_fingerprint": name, "model": "m-1"}

    return answer


def test_stored_replies_of_another_fingerprint_do_not_count(tmp_path):
    with FaultServer(answer=fingerprinted("fp_1")) as server:
        first = cast_of(server, n=4, cache=str(tmp_path))
        assert {v.fingerprint for v in first.votes} == {"fp_1"}
        again = cast_of(server, n=4, cache=str(tmp_path))
        assert (sum(v.cached for v in again.votes), server.requests) == (7, 9)  # one shows the present one
        server.answer = fingerprinted("fp_2")
        other = cast_of(server, n=4, cache=str(tmp_path))
        assert {(v.fingerprint, v.cached) for v in other.votes} == {("fp_2", False)}
        off = cast_of(server, n=4, cache=str(tmp_path), fingerprint=False)
        assert all(v.cached for v in off.votes)


@pytest.mark.parametrize("field", ["root", "max_model_len", "created"])
def test_stored_replies_of_another_model_behind_the_name_do_not_count(tmp_path, field):
    is_now = {"id": "m", "root": "/models/one", "max_model_len": 4096, "created": 1700000000}
    with FaultServer(models=[{"id": "other"}, is_now]) as server:
        first = cast_of(server, cache=str(tmp_path))
        assert not any(v.cached for v in first.votes)
        assert all("/models/one" in v.fingerprint and "4096" in v.fingerprint for v in first.votes)
        assert all(v.cached for v in cast_of(server, cache=str(tmp_path)).votes)
        server.models = [{"id": "m", **is_now, field: 1}]
        assert not any(v.cached for v in cast_of(server, cache=str(tmp_path)).votes)
        server.models = [{**is_now, "created": time.time()}]  # the time of the answer tells nothing
    with FaultServer(models=[{"id": "m", "created": 1}]) as server:
        assert outcomes(cast_of(server, cache=str(tmp_path))) == {"second"}


def test_a_judge_of_older_jobs_reads_as_before():
    old = {"kind": "chat", "model": "m", "prices": {"m": {"prompt": 1, "completion": 2}}}
    judge = ChatSettings.model_validate(old)
    assert (judge.reask, judge.system_role, judge.headers, judge.ca_file) == (1, "auto", {}, None)


def test_the_settings_in_the_docs_can_be_used():
    """Each row of the table is a judge whose request a server answers."""
    import yaml

    page = (Path(__file__).resolve().parents[2] / "docs/judges.md").read_text()
    rows = re.findall(r"^\| ([^|]+) \| (.*) \|$", page.split("## Settings for servers")[1].split("\n\n- ")[0], re.M)
    rows = [(name, row) for name, row in rows if "`" in row and not name.startswith(("server", "-"))]
    assert len(rows) == 11
    inherited = {}
    for name, row in rows:
        found = [yaml.safe_load(text) for text in re.findall(r"`([a-z_]+: [^`]+)`", row)]
        tree = {key: value for f in found for key, value in f.items()}
        tree = inherited | tree if "the same" in row else tree
        inherited = tree
        given = ChatSettings.model_validate({"kind": "chat", "model": "m", **tree})
        body = request_parameters(given.jurors[0], JSON)
        assert ("logprobs" in request_parameters(given.jurors[0], LETTER)) == tree.get("logprobs", True), name
        assert ("max_tokens" in body) != ("max_completion_tokens" in body), name


def test_stored_replies_serve_while_the_server_is_down(tmp_path):
    with FaultServer(answer=fingerprinted("fp_1")) as server:
        cast_of(server, n=4, cache=str(tmp_path))
        server.answer, server.status = None, 503
        again = cast_of(server, n=4, cache=str(tmp_path), max_retries=0)
        assert outcomes(again) == {"second"}
        assert all(v.cached for v in again.votes)


def test_a_spent_budget_keeps_nobody_waiting_for_a_fingerprint(tmp_path):
    with FaultServer(answer=fingerprinted("fp_1")) as server:
        first = cast_of(server, n=4, cache=str(tmp_path))
        again = Cast(settings(server, cache=str(tmp_path), budget={"calls": 8}), 4, spent=first.judge.spent)
        again.run()
        assert "judge.budget.calls=8 is spent" in str(again.error)


def test_tls_to_a_plain_server_is_named():
    with ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        cast = Cast(settings(f"https://127.0.0.1:{server.server_port}/v1", max_retries=0), 1)
        cast.run()
        server.shutdown()
    assert "is judge.base_url an http:// address?" in str(cast.error)


@pytest.mark.parametrize(
    ("choice", "around"),
    [
        ({"message": {"content": "A", "error": {"code": 502, "message": "upstream"}}, "finish_reason": "stop"}, {}),
        ({"message": {"content": "A"}, "finish_reason": "stop", "native_finish_reason": "error"}, {}),
        ({"message": {"content": "A"}, "finish_reason": "stop"}, {"errors": [{"message": "upstream"}]}),
    ],
)
def test_a_failure_beside_a_usable_text_is_no_reply(choice, around):
    with pytest.raises(NoReply):
        read_reply(json.dumps({"choices": [choice], **around}).encode(), "m")
    plain = {"choices": [{"message": {"content": "A"}, "finish_reason": "stop"}], "errors": []}
    assert read_reply(json.dumps(plain).encode(), "m").content == "A"


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        ({"message": "maximum context length", "code": "context_length_exceeded"}, "rejected"),
        ({"message": "no", "type": "invalid_request_error", "code": None}, "rejected"),
        ({"message": "moderated", "code": "content_filter"}, "rejected"),
        ({"message": "upstream idle", "type": "server_error"}, "down"),
    ],
)
def test_an_error_in_words_is_rejected_or_down(error, kind):
    with pytest.raises(NoReply) as found:
        read_reply(json.dumps({"error": error}).encode(), "m")
    assert found.value.kind == kind
