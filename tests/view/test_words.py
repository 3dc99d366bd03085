"""Words that are new against an older text."""

from __future__ import annotations

import itertools
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlaif.view.words import MOST_WORDS, new_words


def new(before: str | None, after: str) -> list[str]:
    return [piece.text for piece in new_words(before, after) if piece.new]


@pytest.mark.parametrize(
    ("before", "after", "marked"),
    [
        ("The cat sat.", "The cat sat.", []),
        ("The cat sat.", "The black cat sat.", ["black"]),
        ("The cat sat.", "The cat lay down.", ["lay down"]),  # the space between new words too
        ("The cat sat.", "A cat sat!", ["A", "!"]),
        ("I saw a dog there.", "Once there was a story.", ["Once there was a story"]),  # "a" is there by chance
        ("one two", "two  one", ["two"]),
        ("x", "", []),
        ("", "all of it", ["all of it"]),
        (None, "nothing to compare with", []),
        ("猫は魚を食べる", "猫は肉を食べる", ["肉"]),
        ("at 10:30 for 2.50", "at 10:35 for 2.50", ["10:35"]),
        ("it's well-known", "it's well-made", ["well-made"]),
    ],
)
def test_what_is_new(before: str | None, after: str, marked: list[str]) -> None:
    assert new(before, after) == marked


@given(st.text("ab .\n", max_size=30), st.text("ab .\n", max_size=30))
def test_the_pieces_are_the_text(before: str, after: str) -> None:
    pieces = new_words(before, after)
    assert "".join(p.text for p in pieces) == after
    assert all(a.new != b.new for a, b in itertools.pairwise(pieces))
    assert all(p.text for p in pieces)


def test_a_policy_that_repeats_itself_costs_no_minute() -> None:
    started = time.monotonic()
    new_words("very good " * (MOST_WORDS // 2), "good very fine " * (MOST_WORDS // 3))
    assert time.monotonic() - started < 5
    assert new("a", "b " * (MOST_WORDS + 1)) == []
