"""Mechanical checks: what is counted, and what passes."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from rlaif.constitutions.checks import Check, count_list_items, count_words, reading_ease


@pytest.mark.parametrize(
    ("text", "words"), [("", 0), ("It's a well-known fact.", 4), ("- one\n- two", 2), ("3.5 kg", 3), ("été à Köln", 3)]
)
def test_words(text, words):
    assert count_words(text) == words


@pytest.mark.parametrize(
    ("text", "items"),
    [
        ("1. Boil\n2. Eat", 2),
        ("1) Boil\n(2) Eat", 2),
        ("- a\n* b\n• c", 3),
        ("In 1990. It was\n-5 degrees", 0),
        ("**Bold** start", 0),
        ("1.\n2.", 0),
    ],
)
def test_list_items(text, items):
    assert count_list_items(text) == items


def test_reading_ease_orders_simple_before_hard():
    simple = reading_ease("The cat sat on the mat. It was warm.")
    hard = reading_ease(
        "Atmospheric molecules preferentially scatter electromagnetic radiation of shorter wavelengths."
    )
    assert simple is not None
    assert hard is not None
    assert simple > 90
    assert hard < 10
    assert reading_ease("...") is None


@pytest.mark.parametrize(
    ("check", "text", "passes"),
    [
        ({"max_words": 3}, "one two three", True),
        ({"max_words": 3}, "one two three four", False),
        ({"min_words": 2}, "one", False),
        ({"min_list_items": 2}, "- a\n- b", True),
        ({"max_list_items": 0}, "- a", False),
        ({"matches": "because"}, "BECAUSE it is", True),
        ({"not_matches": "^i('m| am) sorry"}, "I'm sorry", False),
        ({"min_reading_ease": 60}, "", False),
        ({"min_words": 1, "max_words": 2}, "one two three", False),
    ],
)
def test_passes(check, text, passes):
    assert Check.model_validate(check).passes(text) is passes


def test_results_name_each_stated_condition():
    assert Check(min_words=5, min_list_items=1).results("- a b") == {"min_words": False, "min_list_items": True}


@pytest.mark.parametrize(
    "check", [{}, {"matches": "("}, {"matches": "a{99999999999}"}, {"max_words": -1}, {"max_word": 4}]
)
def test_a_check_that_cannot_be_meant_is_refused(check):
    with pytest.raises(ValidationError):
        Check.model_validate(check)
