"""The columns and rows of the tab Answers."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from rlaif.audit.answers import AgainstBase, Answer, Answers, Evaluated, Evaluation, PromptLine
from rlaif.view.answering import MOST_COLUMNS, AnswersAsked, answers_table, near

pytestmark = pytest.mark.slow


def said(texts: Mapping[int, str]) -> Answers:
    """A prompt's answer after so many iterations."""

    def answer(text: str) -> Answer:
        return Answer(
            text=text, words=1, tokens=1, cut_off=False, pair_id=None, against_base=None, p_better=None, checks=()
        )

    return Answers(
        prompt_id="p",
        messages=(),
        evaluated=tuple(
            Evaluated(
                evaluation=Evaluation(updates=k, constitution="rules@1", hash="a", is_new=False),
                answers=(answer(text),),
            )
            for k, text in texts.items()
        ),
    )


def marked(texts: Mapping[int, str], against: str) -> list[list[str]]:
    """The marked words of each column."""
    (row,) = answers_table({"run": said(texts)}, against).rows  # type: ignore[arg-type]
    return [[p.text for p in cell.answers[0].pieces if p.new] for cell in row.cells if cell]


def test_words_are_marked_against_what_was_asked_for() -> None:
    texts = {0: "old old", 2: "old new", 4: "old new"}
    assert marked(texts, "before") == [[], ["new"], []]
    assert marked(texts, "base") == [[], ["new"], ["new"]]
    assert marked(texts, "nothing") == [[], [], []]


def test_runs_share_columns_and_say_what_they_share() -> None:
    found = answers_table(
        {"a": said({0: "x", 2: "y", 4: "z"}), "b": said({0: "x", 2: "y", 3: "z"})}, bases={"b": "/runs/b"}
    )
    assert found.columns == (0, 2, 3, 4)
    assert [row.base for row in found.rows] == ["", "/runs/b"]
    assert [cell.same_as if cell else None for cell in found.rows[0].cells] == ["", "", None, ""]
    assert [cell.same_as if cell else None for cell in found.rows[1].cells] == ["a", "a", "", None]


def test_many_evaluations_are_the_base_policy_and_the_newest() -> None:
    found = answers_table({"run": said({k: f"w{k}" for k in range(60)})})
    assert len(found.columns) == MOST_COLUMNS
    assert (found.columns[:2], found.columns[-1]) == ((0, 60 - MOST_COLUMNS + 1), 59)
    assert found.left_out == 60 - MOST_COLUMNS
    (row,) = found.rows
    assert row.cells[1] is not None
    assert [p.text for p in row.cells[1].answers[0].pieces if p.new] == [f"w{found.columns[1]}"], (
        "against the one before"
    )


@pytest.mark.parametrize(
    ("words", "newest", "shown"),
    [
        ((None, "won", "lost"), "lost", True),
        ((None, "won", "lost"), "won", False),
        ((None, "won", None), "won", True),  # the newest that was judged
        ((None, "equal"), "undecided", True),
        ((None, None), "won", False),
        ((None, "lost"), None, True),
    ],
)
def test_prompts_by_their_newest_verdict(
    words: tuple[AgainstBase | None, ...], newest: str | None, shown: bool
) -> None:
    line = PromptLine(prompt_id="p", prompt="?", against_base=words)
    assert AnswersAsked.model_validate({"newest": newest}).shows(line) is shown


def test_an_address_holds_what_was_asked_for() -> None:
    asked, problems = AnswersAsked.parse({"prompt": "a/b", "text": " é ", "marked": "base", "newest": "", "x": "1"})
    assert asked == AnswersAsked(prompt="a/b", text="é", marked="base")
    assert [p.partition("=")[0] for p in problems] == ["x"]
    assert asked.query() == "prompt=a%2Fb&text=%C3%A9&marked=base"
    assert asked.query(prompt="c") == "prompt=c&text=%C3%A9&marked=base"
    assert AnswersAsked(run=("a", "b c")).query() == "run=a&run=b+c"
    assert AnswersAsked().query() == ""


def test_the_prompts_before_and_after() -> None:
    lines = [PromptLine(prompt_id=p, prompt="?", against_base=()) for p in "abc"]
    assert [near(lines, p) for p in ("a", "b", "c", "elsewhere", None)] == [
        (None, "b"),
        ("a", "c"),
        ("b", None),
        (None, "a"),
        (None, "a"),
    ]
    assert near([], "a") == (None, None)
