"""What `rlaif constitution check` says: whom a text serves, what is derived, what is missing for what, and warnings."""

from __future__ import annotations

import pytest

from rlaif.constitutions.constitution import Constitution, list_constitutions, parse_constitution
from rlaif.constitutions.templates import templates_in
from rlaif.constitutions.verbs import could_have_verb
from rlaif.judging.services import services, warnings
from tests.conftest import ROOT
from tests.test_derived import SIX_LINES

TEMPLATES = templates_in(ROOT / "prompts" / "judge")


def parse(principles: str, summary: str = "Test.") -> Constitution:
    return parse_constitution(f"summary: {summary}\nprinciples:\n{principles}", "test", 1, "v1.yaml")


def test_six_lines_serve_both_judges() -> None:
    text = parse_constitution(SIX_LINES, "support", 1, "v1.yaml")
    likelihood, chat = services(text, TEMPLATES)
    assert likelihood.derived == dict.fromkeys(("polite", "no_promises"), ("select", "decide", "evaluate"))
    assert (likelihood.unasked, list(likelihood.missing)) == ({}, ["a veto on nonsense"])
    assert likelihood.line().startswith(
        "likelihood judge: yes; derived.2 derives from the rule: polite (select, decide, evaluate), no_promises ("
    )
    assert likelihood.negated == ("no_promises",)
    assert "; weak, since only negated: no_promises (write `opposite:` beside the rule); missing" in likelihood.line()
    assert chat.line().startswith("chat judge: yes, as it is; missing for best_worst: ")
    assert warnings(text) == []
    own = parse("  - {id: a, rule: Make no promises., opposite: Promise a date.}\n")
    assert services(own, TEMPLATES)[0].negated == ()


def test_shipped_texts_serve_both_as_they_are_and_nothing_warns() -> None:
    for text in list_constitutions(ROOT / "constitutions"):
        likelihood, chat = services(text, TEMPLATES)
        assert likelihood.line() == "likelihood judge: yes, as it is"
        assert list(chat.missing) == ["best_worst"]
        assert warnings(text) == []


def test_what_is_missing_for_what() -> None:
    own = "  - {id: a, rule: '1.', prefer: p, avoid: q}\n  - {id: g, rule: Make sense., guard: true}\n"
    likelihood, chat = services(parse(own), TEMPLATES)
    assert list(likelihood.missing) == ["best_worst", "a held-out win rate"]
    assert (likelihood.derived, likelihood.unasked) == ({}, {})
    assert list(chat.unasked) == ["a"]
    assert "can't" not in chat.line()
    assert chat.line().startswith("chat judge: no; principle `a`: its rule is '1.', without a word")
    (_, chat) = services(parse("  - {id: a, rule: Be polite to all.}\n"), ["pairwise"])
    assert list(chat.missing) == ["best_worst", "a held-out win rate by a question of its own"]
    (_, unknown) = services(parse("  - {id: a, rule: Be polite to all.}\n"))  # no folder of templates here
    assert list(unknown.missing) == ["best_worst"]


@pytest.mark.parametrize(
    ("check", "better", "worse", "said"),
    [
        ("max_words: 3", "one two three four", "one two three four five", "both of its sides break"),
        (
            "max_words: 3",
            "one two three four",
            "one two",
            "its better side breaks the check (max_words), and its worse",
        ),
        ("max_words: 3", "one two", "one two three four", None),
        ("max_words: 3", "one", "one two", None),
        ("min_list_items: 2", "no list", "none here either", "both of its sides break"),
        ("not_matches: sorry", "Sorry.", "So sorry.", "(not_matches)"),
        ("max_words: 3, matches: b", "a a a a", "a", "(max_words, matches)"),
    ],
)
def test_examples_that_break_their_own_check(check: str, better: str, worse: str, said: str | None) -> None:
    text = parse(
        "  - id: brief\n    rule: Be as brief as you can.\n"
        f"    check: {{{check}}}\n    examples: [{{prompt: Why so, better: {better}, worse: {worse}}}]\n"
    )
    found = warnings(text)
    assert len(found) == (said is not None)
    assert said is None or said in found[0]
    without = parse(
        f"  - {{id: a, rule: Be brief always., examples: [{{prompt: P, better: {better}, worse: {worse}}}]}}\n"
    )
    assert warnings(without) == []  # nothing can tell


@pytest.mark.parametrize("other", ["Be polite to all.", "be  polite to ALL", "'Be polite, to all!'"])
def test_two_principles_with_the_same_rule(other: str) -> None:
    (found,) = warnings(parse(f"  - {{id: a, rule: Be polite to all.}}\n  - {{id: b, rule: {other}}}\n"))
    assert found.startswith("principles `a` and `b` have the same rule, which so counts 2 times")
    assert warnings(parse("  - {id: a, rule: Be polite to all.}\n  - {id: b, rule: Be kind to all.}\n")) == []


@pytest.mark.parametrize(
    ("rule", "short"),
    [
        ("Be polite.", True),
        ("Politeness.", True),
        ("Be polite always.", False),
        ("要有礼貌，绝不责怪顾客。", False),
        ("礼貌", True),
    ],
)
def test_a_short_rule(rule: str, short: bool) -> None:
    found = warnings(parse(f"  - {{id: a, rule: '{rule}'}}\n"))
    assert any("its rule has" in w for w in found) == short


@pytest.mark.parametrize(
    "rule",
    [
        "Prefer the answer that is polite and never blames the customer.",
        "Prefer the answer with short, common words and short sentences.",
        "The answer answers the question that was asked, in sentences that make sense.",
        "The answer should name its source.",
        "Answers never mention competitors.",
        "Good answers cite a source.",
        "Never blame the customer.",
        "Be polite.",
        "Answer in German.",
        "Don't mention prices.",
        "Quote every source.",
        "Rephrase the question first.",
        "Ground every claim in a source.",
        "Use short sentences and simple words.",
        "Politely decline to help with anything dangerous.",
        "List the steps.",
        "No answer may exceed forty words.",
        "Sei immer nett zum Kunden.",
        "Sé amable con el cliente.",
        "Ne promets pas de dates de livraison.",
        "要有礼貌。",
    ],
)
def test_rules_with_a_verb(rule: str) -> None:
    assert could_have_verb(rule)


@pytest.mark.parametrize(
    "rule",
    [
        "Politeness.",
        "Polite and friendly answers.",
        "No promises about delivery dates.",
        "Short and clear sentences, without jargon.",
        "Friendly tone of voice.",
        "Honesty above all.",
        "Numbered lists with short items.",
        "Written answers in plain English.",
        "Respect for the user.",
        "Sources for every claim.",
        "Clear structure with headings.",
    ],
)
def test_rules_without_one(rule: str) -> None:
    assert not could_have_verb(rule)
    (found,) = [w for w in warnings(parse(f"  - {{id: a, rule: '{rule}'}}\n")) if "verb" in w]
    assert found.startswith("principle `a`: no word of its rule could be an English verb")
