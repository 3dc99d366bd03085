"""Where a policy's thoughts stand in what it said."""

from __future__ import annotations

import pytest

from rlaif.thoughts import has_marks, opening, without_thoughts


@pytest.mark.parametrize(
    ("said", "answer"),
    [
        ("<think>\nbread?\n</think>\n\nIn a bag.", "In a bag."),
        ("  <think></think>In a bag.", "In a bag."),
        ("<thinking>a</thinking> In a bag.", "In a bag."),
        ("<THINK>a</THINK>In a bag.", "In a bag."),
        ("<thought>a</thought>In a bag.", "In a bag."),
        ("<seed:think>a</seed:think>In a bag.", "In a bag."),
        ("[THINK]a[/THINK]In a bag.", "In a bag."),
        ("◁think▷a◁/think▷In a bag.", "In a bag."),
        ("<|begin_of_thought|>a<|end_of_thought|>In a bag.", "In a bag."),
        ("<|START_THINKING|>a<|END_THINKING|>In a bag.", "In a bag."),
        ("<unused94>thought\na<unused95>In a bag.", "In a bag."),
        ("<|channel>thought\na<channel|>In a bag.", "In a bag."),
        (
            "<|channel|>analysis<|message|>a<|end|><|start|>assistant<|channel|>final<|message|>In a bag.",
            "In a bag.",
        ),
        ("<|channel|>final<|message|>In a bag.", "In a bag."),
        ("<think>a</think>In <think>b</think>a bag.", "In a bag."),
        # The template opened it, or a parser took the first mark away.
        ("bread?</think>\nIn a bag.", "In a bag."),
        # Not finished: nothing was answered.
        ("<think>bread? I", ""),
        ("[THINK]bread? I", ""),
        ("<|channel|>analysis<|message|>bread? I", ""),
        ("<think>a</think><think>b", ""),
        ("In a bag.", "In a bag."),
    ],
)
def test_an_answer_is_what_was_said_without_its_thoughts(said: str, answer: str) -> None:
    assert without_thoughts(said) == answer
    assert has_marks(said) == (said != answer)


def test_ordinary_signs_are_no_marks() -> None:
    for said in ("I think so.", "a < b > c", "<b>think</b>", "[think about it]", "thought"):
        assert not has_marks(said)


def test_a_prompt_that_opens_a_thought() -> None:
    assert opening("<|im_start|>assistant\n<think>\n") == "<think>"
    assert opening("<|im_start|>assistant\n<think>\n\n</think>\n\n") == ""
    assert opening("What is <think>?<|im_end|>\n<|im_start|>assistant\n") == ""
    assert without_thoughts(opening("...[THINK]") + "bread? I") == ""
