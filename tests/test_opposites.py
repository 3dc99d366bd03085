"""Rules turned around: what is asked for instead, and what is only negated."""

from __future__ import annotations

import pytest

from rlaif.constitutions.opposites import third_person, turned


@pytest.mark.parametrize(
    ("rule", "other"),
    [
        ("Prefer the answer that is laid out as a list.", "Prefer the answer that is laid out as a paragraph."),
        (
            "Prefer the answer with short, common words and short sentences.",
            "Prefer the answer with long, rare words and long sentences.",
        ),
        (
            "Prefer the answer that gives the key point in one or two sentences and stops.",
            "Prefer the answer that gives the smallest detail in many long sentences and goes on and on.",
        ),
        (
            "The answer should refuse dangerous help and help with what is harmless.",
            "The answer should give dangerous help and refuse what is harmful.",
        ),
        ("Keep a warm,\n friendly tone.", "Keep a cold, hostile tone."),
        ("Answers must be in British English.", "Answers must be in American English."),
        ("Be polite", "Be rude"),
        ("List the steps.", "Leave out the steps."),
        ("Give one or two sentences, or use a list.", "Give many long sentences, or use no list."),
        # A refusal is lifted, and what it refused stays, as far as it goes.
        ("Avoid jargon and long sentences.", "Use jargon and long sentences."),
        ("Prefer the answer that avoids long words.", "Prefer the answer that uses long words."),
        (
            "Prefer the answer that is polite and never blames the customer.",
            "Prefer the answer that is rude and always blames the customer.",
        ),
        ("Never blame the customer, and be kind.", "Always blame the customer, and be cruel."),
        # What holds under a condition holds under it still.
        ("Be brief when the question is simple.", "Be long when the question is simple."),
    ],
)
def test_known_words_are_replaced(rule: str, other: str) -> None:
    assert turned(rule) == (other, True)


@pytest.mark.parametrize(
    ("rule", "other"),
    [
        ("Do not mention prices.", "Always mention prices."),
        ("Always quote a source.", "Never quote a source."),
        ("Never answer without a reason.", "Always answer without a reason."),
        ("The answer must not mention prices.", "The answer must mention prices."),
        ("The answer does not speculate about illness.", "The answer speculates about illness."),
        ("Prefer the answer that makes no promises.", "Prefer the answer that makes many promises."),
        ("Ask a question back when the request is unclear.", "Ask no question back when the request is unclear."),
        ("Give reasons and examples.", "Give no reasons and no examples."),
        ("Prefer the answer with a glossary of terms.", "Prefer the answer without a glossary of terms."),
        ("Write as a pirate would.", "Never write as a pirate would."),
        ("Be a pirate.", "Be not a pirate."),
        ("Sei höflich.", "Never sei höflich."),
    ],
)
def test_the_rest_is_negated_and_says_so(rule: str, other: str) -> None:
    assert turned(rule) == (other, False)


@pytest.mark.parametrize(
    "rule", ["...", "", "Prefer the answer", "and, or, but", "never", "no", "{rule} {answer}", "42!"]
)
def test_odd_rules_are_turned_without_a_fault(rule: str) -> None:
    assert isinstance(turned(rule).rule, str)


def test_verbs_are_inflected() -> None:
    forms = {v: third_person(v) for v in ("use", "help with", "deny", "obey", "miss", "teach", "go", "be", "have")}
    assert list(forms.values()) == [
        "uses", "helps with", "denies", "obeys", "misses", "teaches", "goes", "is", "has",
    ]  # fmt: skip
