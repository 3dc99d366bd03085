"""What a reply or a difference of scores says of a pair: for the judges, and for a replay of what they said."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from rlaif.config import LikelihoodSettings
from rlaif.constitutions.templates import load_template
from rlaif.judging.outcomes import Said, said_by_guard, said_by_scores, said_in_reply, tolerances
from rlaif.judging.parsing import Reply, ReplyToken, TopToken
from rlaif.judging.verdicts import position_bias

ROOT = Path(__file__).resolve().parent.parent.parent
LETTER, REASONED = (load_template(ROOT / "prompts" / "judge", name) for name in ("pairwise", "pairwise_reasoned"))


def reply(content: str, a: float | None = None) -> Reply:
    tops = () if a is None else tuple(TopToken(token=t, logprob=math.log(p)) for t, p in (("A", a), ("B", 0.9 - a)))
    tokens = (ReplyToken(token=content.split()[-1], top=tops),) if tops else ()
    return Reply(content=content, finish_reason="stop", tokens=tokens, model="m")


def test_the_labels_masses_speak_for_the_pairs_sides() -> None:
    forward = said_in_reply(reply("A", 0.6), LETTER, "forward", None)
    backward = said_in_reply(reply("A", 0.6), LETTER, "reversed", None)
    assert (forward.outcome, backward.outcome) == ("first", "second")
    assert forward.p_first == pytest.approx(2 / 3)
    assert backward.p_first == pytest.approx(1 / 3)
    assert forward.mass_neither == backward.mass_neither == pytest.approx(0.1)


def test_a_log_without_probabilities_keeps_what_was_read_from_them() -> None:
    assert said_in_reply(reply("A"), LETTER, "forward", None) == Said("first")
    assert said_in_reply(reply("A"), LETTER, "forward", None, recorded=0.7).p_first == 0.7
    assert said_in_reply(reply("A", 0.6), LETTER, "forward", None, recorded=0.7).p_first != 0.7


def test_a_tie_and_an_abstention_speak_for_no_side() -> None:
    assert said_in_reply(reply("Verdict: tie"), REASONED, "forward", None, recorded=0.7) == Said("tie")
    unclear = said_in_reply(reply("Well."), REASONED, "forward", None, recorded=0.7)
    assert unclear == Said("abstain", "unparsed")


def test_only_a_template_that_reasons_first_is_clamped() -> None:
    bounds = (0.4, 0.6)
    assert said_in_reply(reply("Verdict: A"), REASONED, "forward", bounds, recorded=0.9).p_first == 0.6
    assert said_in_reply(reply("Verdict: B"), REASONED, "forward", bounds, recorded=0.1).p_first == 0.4
    assert said_in_reply(reply("A"), LETTER, "forward", bounds, recorded=0.9).p_first == 0.9


def test_scores_and_guards_name_the_side_that_is_ahead() -> None:
    assert said_by_scores(2.0, 2.0) == Said("first", p_first=pytest.approx(1 / (1 + math.exp(-1))))
    assert said_by_scores(-1e9, 1.0) == Said("second", p_first=0.0)
    assert said_by_scores(0.0, 1.0) == Said("tie", p_first=0.5)
    tolerance = tolerances(LikelihoodSettings(relevance_tolerance=0.2))["relevance"]
    assert [said_by_guard(d, tolerance).outcome for d in (0.3, 0.2, -0.2, -0.3)] == ["first", "tie", "tie", "second"]


def test_position_bias_is_of_the_votes_for_a_slot() -> None:
    assert position_bias(3, 4) == 0.75
    assert position_bias(0, 0) is position_bias(None, None) is None
