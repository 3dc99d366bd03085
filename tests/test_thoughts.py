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
        ("<reasoning>a</reasoning>In a bag.", "In a bag."),
        ("<reflection>a</reflection>\nIn a bag.", "In a bag."),
        ("<scratchpad>a</scratchpad>In a bag.", "In a bag."),
        ("<analysis>a</analysis>In a bag.", "In a bag."),
        ("<|thinking_start|>a<|thinking_end|>In a bag.", "In a bag."),
        ('<details type="reasoning" done="true">\n<summary>Thought</summary>\na</details>\nIn a bag.', "In a bag."),
        ("[REASONING]a[/REASONING]In a bag.", "In a bag."),
        ("<inner_monologue>a</inner_monologue>In a bag.", "In a bag."),
        ("<｜begin▁of▁thinking｜>a<｜end▁of▁thinking｜>In a bag.", "In a bag."),
        ("<|START_THINKING|>a<|END_THINKING|><|START_RESPONSE|>In a bag.<|END_RESPONSE|>", "In a bag."),
        ("<|START_RESPONSE|>In a bag.<|END_RESPONSE|>", "In a bag."),
        ("<|begin_of_thought|>a<|end_of_thought|>\n<|begin_of_solution|>In a bag.<|end_of_solution|>", "In a bag."),
        ("<|im_start|>think\na\n<|im_start|>answer\nIn a bag.", "In a bag."),
        ("<|channel|>analysis<|message|>a<|channel|>final <|constrain|>json<|message|>In a bag.", "In a bag."),
        ("<|channel|>analysis<|message|>a<|end|><|start|>assistant<|channel|>commentary<|message|>b<|end|>"
         "<|start|>assistant<|channel|>final<|message|>In a bag.", "In a bag."),
        ("analysisWe see.assistantfinalIn a bag.", "In a bag."),
        ("thought\na<channel|>In a bag.", "In a bag."),
        ("Here is my thought process: a Here is my response: In a bag.", "In a bag."),
        ("Thinking...\na\n...done thinking.\n\nIn a bag.", "In a bag."),
        ("Thinking Process:\n1. a\n</think>\n\nIn a bag.", "In a bag."),
        ("<think>a</think>\n\n<think>b</think>In a bag.", "In a bag."),
        ("<think>Asked about `</think>`, hm.</think>In a bag.", "In a bag."),
        # Behind the answer's beginning marks are text: it may speak of them.
        ("<think>a</think>Write <think> and </think> around it.", "Write <think> and </think> around it."),
        ("<think>a</think>In <think>b</think>a bag.", "In <think>b</think>a bag."),
        # Not finished: nothing was answered.
        ("<think>bread? I", ""),
        ("[THINK]bread? I", ""),
        ("<|channel|>analysis<|message|>bread? I", ""),
        ("<think>a</think><think>b", ""),
        ("<reasoning>a", ""),
        ("<think>I write `</think>` then", ""),
        ("In a bag.", "In a bag."),
    ],
)  # fmt: skip
def test_an_answer_is_what_was_said_without_its_thoughts(said: str, answer: str) -> None:
    assert without_thoughts(said) == answer
    assert has_marks(said) == (said != answer)


@pytest.mark.parametrize(
    "said",
    [
        "Qwen writes <think> before it answers, and </think> after.",
        "Put it in a bag.\n<think>\nIs that right?\n</think>\nYes.",
        "`<think>` opens a thought.",
        "```xml\n<think>\nplan\n</think>\n```",
        "Close it with </think>.",
        "bread?</think>\nIn a bag.",  # no prompt opened it
        "Use <reasoning> or <scratchpad> tags.",
        "The channel is <|channel|>analysis<|message|>.",
        "[Analysis] Bread keeps in a bag. [/Analysis]",
        "<details><summary>More</summary>Bread</details>",
        "[thinking](https://example.org) is a page.",
        # Words that an answer may begin with, and nothing that ends a thought.
        "Thinking... of you, I bought bread.",
        "Thinking process: look, then leap.",
        "thought\nis free",
        "Here is my thought process: bags keep bread fresh.",
        "analysisOfBread = 1",
        "<think about it> is no tag",
    ],
)
def test_an_answer_that_begins_with_no_thought_is_left_alone(said: str) -> None:
    assert without_thoughts(said) == said
    assert not has_marks(said)


def test_ordinary_signs_are_no_marks() -> None:
    for said in ("I think so.", "a < b > c", "<b>think</b>", "[think about it]", "thought"):
        assert not has_marks(said)


@pytest.mark.parametrize(
    ("begun", "mark"),
    [
        ("<|im_start|>assistant\n<think>\n", "<think>"),
        ("<|im_start|>assistant\n<think>\nOkay,", "<think>"),
        ("<|im_start|>assistant\n<think>\n\n</think>\n\n", ""),
        ("<|im_start|>assistant\n", ""),
        ("<|im_end|>\n[THINK]", "[THINK]"),
        ("<|START_THINKING|><|END_THINKING|><|START_RESPONSE|>", ""),
        ("<|start|>assistant", ""),
        ("<|start|>assistant<|channel|>final<|message|>", ""),
        ("<|start|>assistant<|channel|>analysis<|message|>", "<|start|>assistant<|channel|>analysis<|message|>"),
        ("<|im_start|>assistant\n<reasoning>", "<reasoning>"),
        ("", ""),
    ],
)
def test_a_template_that_begins_the_answer_with_a_thought(begun: str, mark: str) -> None:
    assert opening(begun) == mark
    if mark:
        assert without_thoughts(mark + "bread? I") == ""


def test_where_a_prompt_opened_a_thought_its_end_ends_it() -> None:
    assert without_thoughts(opening("...[THINK]") + "bread?[/THINK]\nIn a [/THINK] bag.") == "In a [/THINK] bag."
    assert without_thoughts(opening("<think>\n") + "bread?</think>\nIn a bag.") == "In a bag."
