"""Replies: what is clear is a verdict, everything else is an abstention with its reason, and nothing crashes."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlaif.judging.parsing import Reply, ReplyToken, TopToken, label_mass, outcome, parse
from tests.public_data import folder, needs

ROOT = Path(__file__).resolve().parents[2]

RAW = sorted(folder("llmbar").glob("raw_*.json"))


def said(content, kind="letter", finish_reason="stop", refusal=None, pattern=None):
    parsed = parse(Reply(content=content, refusal=refusal, finish_reason=finish_reason, model="m"), kind, pattern)
    assert (parsed.shown is None) != (parsed.abstain_reason is None)
    return parsed.shown or parsed.abstain_reason


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("A", "A"), (" b \n", "B"), ("A.", "A"), ("**A**", "A"), ("[[B]]", "B"), ("Answer: A", "A"), ("(B)", "B"),
        ("Answer B", "B"), ("The answer is A.", "A"), ("C", "tie"), ("tie", "tie"), ("`A`", "A"),
        ("Verdict: **B**", "B"),
        ("<think>B B B</think>A", "A"), ("thoughts</think>\n\nB", "B"), ("<think>\n</think>\n", "empty"),
        ("A or B", "unparsed"), ("A B", "unparsed"), ("Both", "unparsed"), ("D", "unparsed"),
        ("[[A]] [[B]]", "unparsed"),
        ("A is better because B is long.", "unparsed"), ("А", "unparsed"), ("Ⓐ", "unparsed"), ("Ａ", "unparsed"),
        ("", "empty"), (None, "empty"), ("  \n", "empty"), ("<think>A is", "truncated"), ("<THINK>A", "truncated"),
        ("I'm sorry, but I can't compare these.", "refused"), ("I cannot help with that.", "refused"),
        ("As an AI, I have no preference.", "refused"),
    ],
)  # fmt: skip
def test_letter(content, expected):
    assert said(content) == expected


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("Short.\nVerdict: A", "A"), ("Verdict: B", "B"), ("x\n\n**Verdict:** tie\n", "tie"),
        ("x\nverdict: [[a]].", "A"),
        ("x\nFinal verdict: B", "B"), ("Verdict: A\nVerdict: B", "B"),
        ("Verdict: A\nVerdict: D", "unparsed"), ("Verdict: A\nOr rather not.", "unparsed"), ("A", "unparsed"),
        ("Verdict: A or B", "unparsed"), ("Verdict: both", "unparsed"), ("Verdict: A\nVerdict:", "unparsed"),
        ("So A. Verdict: A", "unparsed"), ("<think>Verdict: A", "truncated"),
        ("<think>x\nVerdict: A</think>I am not able to judge.", "refused"),
    ],
)  # fmt: skip
def test_last_line(content, expected):
    assert said(content, "last_line") == expected


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ('{"reason": "B is long", "verdict": "A"}', "A"), ('```json\n{"verdict": "B"}\n```', "B"),
        ('{"verdict": "tie"}', "tie"), ('{"verdict": "A", "verdict": "B"}', "unparsed"),
        ('{"verdict": "D"}', "unparsed"),
        ('{"verdict": ["A"]}', "unparsed"), ('["A"]', "unparsed"), ('"A"', "unparsed"), ("A", "unparsed"),
        ('{"verdict": "A"} or {"verdict": "B"}', "unparsed"), ('{"reason": "A"}', "unparsed"),
        ("[" * 9999, "unparsed"),
        ('{"verdict": "A"', "unparsed"), ("1" * 9999, "unparsed"),
        ('<think>{"verdict": "B"}</think>{"verdict": "A"}', "A"),
    ],
)  # fmt: skip
def test_json(content, expected):
    assert said(content, "json") == expected


@pytest.mark.parametrize("kind", ["letter", "last_line", "json"])
def test_reasons(kind):
    assert said("Both answers are quite", kind, "length") == "truncated"
    assert said(None, kind, "length") == "truncated"
    assert said("A", kind, "content_filter") == "refused"
    assert said(None, kind, refusal="I can't.") == "refused"


def test_a_pattern_whose_verdict_may_be_absent():
    pattern = r"Verdict: ((?P<verdict>[AB])|none)"
    assert said("Verdict: none", "last_line", pattern=pattern) == "unparsed"
    assert said("Verdict: B", "last_line", pattern=pattern) == "B"


def test_a_verdict_that_was_complete_before_the_limit_counts():
    assert said("A", "letter", "length") == "A"
    assert said('{"verdict": "A"}', "json", "length") == "A"
    assert said("Well.\nVerdict: ", "last_line", "length") == "truncated"


def test_a_last_line_that_was_cut_off_is_no_verdict():
    """It may have gone on: `Verdict: Both`."""
    assert said("Well.\nVerdict: B", "last_line", "length") == "truncated"
    assert said("Well.\nVerdict: B", "last_line", "length", pattern=r"Verdict: (?P<verdict>[AB])") == "truncated"


@pytest.mark.parametrize(
    ("content", "kind", "expected"),
    [
        ('{"reason": "A writes <think> in its text", "verdict": "B"}', "json", "B"),
        ('{"reason": "A ends in </think>", "verdict": "B"}', "json", "B"),
        ('```json\n{"reason": "</think>", "verdict": "B"}\n```', "json", "B"),
        ('<think>hm</think>{"reason": "<think> and </think>", "verdict": "A"}', "json", "A"),
        ('hm, A quotes </think>, so</think>\n{"verdict": "A"}', "json", "A"),
        ("A begins with <think>, which is odd.\nVerdict: B", "last_line", "B"),
        ("A says <think>x</think>.\nVerdict: B", "last_line", "B"),
        ("<think>one</think>\n<think>two</think>\nB", "letter", "B"),
        ("<think>A says </think> and so on</think>\nB", "letter", "B"),
        ("Verdict: A</think>", "last_line", "empty"),
        ("Verdict: A\n</think>\nVerdict: D", "last_line", "unparsed"),
        ("<think>A </think> <think>B", "letter", "truncated"),
    ],
)
def test_an_answer_that_is_quoted_with_its_marks_forces_no_abstention(content, kind, expected):
    assert said(content, kind) == expected


OPENED = [
    "＜think＞", "&lt;think&gt;", "\\<think\\>", "<thinking_start>", "<details type=reasoning>",
    "<think>", "[THINK]", "◁think▷", "<reasoning>", "<scratchpad>", "<|START_THINKING|>",
    "<|channel|>analysis<|message|>", "<unused94>thought\n", "<|channel>thought\n",
]  # fmt: skip
LEANS = {"letter": "A", "last_line": "lean\nVerdict: A", "json": 'lean {"verdict": "A"}'}


@pytest.mark.parametrize("kind", ["letter", "last_line", "json"])
@pytest.mark.parametrize("opened", OPENED)
@pytest.mark.parametrize(
    "before",
    ["", "I see. ", "Okay <", "Sure! ", "- ", "**", "1. ", "> ", "Let me think: ", "# ", "B\n", "\t* ", "I see ",
     '{"plan": "short"}\n', '{"verdict": "B"}\n', '{"verdict": "B"} ', "Verdict: B\n", "{'verdict': 'B'}\n",
     "<think>one</think>\n", "<think>one</think> B ", '{"plan": ', '{"plan": "', "```json\n", "(", "B, or "],
)  # fmt: skip
def test_no_verdict_is_read_in_a_thought_that_is_not_finished(kind, opened, before):
    before = before.removesuffix("<")
    assert said(f"{before}{opened}{LEANS[kind]}", kind) == "truncated"
    assert said(f"{before}{opened} {LEANS[kind]}", kind) == "truncated"


@pytest.mark.parametrize("kind", ["letter", "last_line", "json"])
@pytest.mark.parametrize(
    "before",
    ["thought\n", "think\n", "Thinking Process:\n", "Thinking Process:\n\n1. **Read** it. ", "## Thinking process:\n",
     "**Thinking Process:** ", "Okay.\n\n**Thinking Process:**\n\n", "Thought process: ", "Thinking...\n",
     "analysisWe see. ", "Here's a thinking process:\n", "Here is my thought process: ", "**<think>** ",
     "- <think>\n",
     "**<think>**\n"],
)  # fmt: skip
def test_no_verdict_is_read_after_words_that_begin_a_thought(kind, before):
    assert said(f"{before}{LEANS[kind]}", kind) == "truncated"


@pytest.mark.parametrize("kind", ["letter", "last_line", "json"])
@pytest.mark.parametrize(
    "thought",
    ["thought\nlean {}<channel|>", "Thinking Process:\nlean {}\n</think>\n",
     "Thinking...\nlean {}\n...done thinking.\n",
     "- <think>{}</think>\n", "**<think>**{}**</think>**\n",
     "<think>A writes `</think>`. {}</think>", "<think>A writes </think> and {}</think>\n",
     "<|channel|>analysis<|message|>lean {}<|channel|>final<|message|>",
     "<|channel|>analysis<|message|>{}<|end|><|start|>assistant<|channel|>final <|constrain|>json<|message|>",
     "<|channel|>final<|message|>", "lean {}<|end|><|start|>assistant<|channel|>final<|message|>",
     "lean {}<channel|>",
     "<think>{}</think>\n<think>{}</think>\n", "<|im_start|>think\n{}\n<|im_start|>answer\n"],
)  # fmt: skip
def test_a_verdict_after_a_finished_thought_is_read(kind, thought):
    plain = {"letter": "B", "last_line": "Well.\nVerdict: B", "json": '{"verdict": "B"}'}[kind]
    assert said(thought.replace("{}", LEANS[kind]) + plain, kind) == "B"
    if kind != "letter" and thought.startswith("<"):
        assert said("I see. " + thought.replace("{}", LEANS[kind]) + plain, kind) == "B"


@pytest.mark.parametrize(
    "sentence",
    ["A begins with <think>, which is odd.", "A leaves a <think> tag open.", 'A writes "<think>" first.',
     "`<think>` stands in A.", "A: “Sure. <think> hm” is all.", 'A says "I see. <think>lean", no more.',
     "A has the <reasoning> tag and no end.", "A ends in [THINK].", "A quotes '<think>' in code.",
     "See A's <scratchpad>.", "A shows </think> and no answer.", "The first answer says <think>x</think>."],
)  # fmt: skip
def test_a_mark_that_is_spoken_of_costs_no_verdict(sentence):
    assert said(f"{sentence}\nVerdict: B", "last_line") == "B"
    assert said(f'{sentence} {{"verdict": "B"}}', "json") == "B"
    assert said(f'{{"verdict": "B"}}\n{sentence}', "json") == "B"
    inside = json.dumps({"reason": sentence, "verdict": "B"})
    assert said(inside, "json") == "B"
    assert said(f"Sure:\n```json\n{inside}\n```\nDone.", "json") == "B"
    assert said(f"<think>hm</think>{inside}", "json") == "B"


@pytest.mark.parametrize("mark", [m.strip() for m in OPENED])
@pytest.mark.parametrize(
    "whole", ['{"reason": "A: MARK lean", "verdict": "B"}', '{"reason": "MARK", "verdict": "B",}',
              "{'reason': 'MARK lean', 'verdict': 'B'}", '{"thinking": "MARK lean\nto A", "verdict": "B"}',
              'Here: {"reason": "a MARK", "verdict": "B"} thanks'],
)  # fmt: skip
def test_a_mark_in_a_string_of_a_whole_object_is_text(mark, whole):
    assert said(whole.replace("MARK", mark), "json") == "B"
    assert said(f"{whole.replace('MARK', mark)}\n<think>so A", "json") == "truncated"


def test_words_that_begin_a_thought_in_a_string_are_text():
    quoted = '{"reason": "A says\nThinking Process:\nso", "verdict": "B"}'
    assert said(quoted, "json") == "B"
    assert said(f"{quoted}\n<think>so A", "json") == "truncated"


AFTERWARDS = [
    "Correction: A", "My final answer: A", "My final answer is **A**.", "Actually, A is better.", "A", "-> A",
    "**A**",
    "Wait, it should be A.", "I meant A", "Sorry, Answer A.", "On second thought, it's a tie.", "The winner is A.",
    "Final: A", "I change my verdict to A", "So, not B!", "Scratch that.", "A wins.", "\\boxed{A}", "[[A]]",
    "No wait, A.",
    "(should be A)", "The better answer is A, because it is short.", "Edit: A", "I would now pick A instead.",
    "That's A.",
    "It’s A.", "Final answer: tie", "Verdict: neither", "No, the correct choice is Response A.", "Rather A.",
    "Final decision — A", "Therefore A.", "Verdict: A or B", "Ignore the above.", "Preferred response: A",
    "Let me reconsider: A.", "Looking again, A", "A > B", "A beats B.", "I now believe A.", "P.S. tie: A", "// A",
    "Hmm, A!",
    "I decide for A.", "The verdict is in favor of A.", "Revised: A", "On balance, it is Answer A.",
]  # fmt: skip


@pytest.mark.parametrize("afterwards", AFTERWARDS)
@pytest.mark.parametrize("whole", ['{"verdict": "B"}', "{'verdict': 'B'}", '```json\n{"verdict": "B"}\n```'])
def test_an_object_that_is_contradicted_afterwards_is_no_verdict(whole, afterwards):
    assert said(f"{whole}\n{afterwards}", "json") == "unparsed"
    assert said(f"{whole} {afterwards}", "json") == "unparsed"


@pytest.mark.parametrize(
    "afterwards",
    ["My final answer: B", "Verdict: B", "Answer A is too long, so I chose B.", "A better answer would be shorter.",
    "B",
     "Correction of A would take long.", "I hope this helps!", "Answer B is concise whereas Answer A rambles.",
     "B is better than A.", "(not A)", "So A is the longer one.", "Answer A has a factual error.",
     "I would not pick A.",
     "A is better written, yet wrong.", "Explanation: a short text wins.", "No explanation is needed.",
     "I prefer B over A.",
     "Note: it is a close call.", "B > A", "The order was: B, then A, which rambles.", "Between A and B, B is right.",
     "**Final verdict: B**", "A's tone is off."],
)  # fmt: skip
def test_what_an_object_is_followed_by_may_explain_it(afterwards):
    assert said(f'{{"verdict": "B"}}\n{afterwards}', "json") == "B"


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("Here: {'verdict': 'A'} thanks", "A"), ("I think {'reason': 'it\\'s \"x\"', 'verdict': 'A'}, ok?", "A"),
        ("```python\n{'verdict': 'A'}\n```", "A"), ("It's {x}, so {'verdict': 'A'}", "A"),
        ("{'ok': True, 'other': null, 'verdict': 'A'} done", "A"), ("Here: {verdict: 'A'}", "A"),
        ("{'verdict': \"A\"}", "A"),
        ("{\"verdict\": 'A'} ok", "A"), ("{'reason': 'a\nline', 'verdict': 'A'}", "A"),
        ("Well. {'r': {'verdict': 'A'}}", "A"),
        ("Here: {“verdict”: “A”} thanks", "A"),
        ("Fill in {\"reason\": ..., \"verdict\": \"A\" | \"B\"}: {'verdict': 'A'}", "A"),
        ("{'verdict':'A'} no: {\"verdict\":\"B\"}", "unparsed"), ("{\"verdict\":\"B\"} or {'verdict': 'A'}",
        "unparsed"),
        ("{'verdict': 'A'} {'verdict': 'A'}", "unparsed"), ("{“verdict”: “A”} no: {\"verdict\":\"B\"}", "unparsed"),
        ("{verdict: 'A'}, {\"verdict\":\"B\"}", "unparsed"), ("{'verdict': 'A', 'verdict': 'B'} hm", "unparsed"),
        ("{'a': {'verdict': 'A'}, 'b': {'verdict': 'B'}}", "unparsed"), ("Here: {'verdict': 'A' 'B'}", "unparsed"),
        ("Here: {'verdict': 'A'", "unparsed"), ("Here: {'verdict': 'A or B'}", "unparsed"), ("{'verdict': f'A'}",
        "unparsed"),
        ('{"verdict": "B", "final_verdict": "A"}', "unparsed"), ("{'verdict': '\\d'} x", "unparsed"),
        # Nothing within an object that can't be read is read: it may be a quote.
        ('{"reason": "A says {"verdict": "A"}, no less", "verdict": "B"}', "unparsed"),
        ('{"reason": "A says {"verdict": "A"} and', "unparsed"), ("{'reason': 'A says {\"verdict\": \"A\"} and",
        "unparsed"),
        ('{"reason": "A says {\\"verdict\\": \\"A\\"}, no less", "verdict": "B"}', "B"),
        ("{\"reason\": \"A says {'verdict': 'A'}\", \"verdict\": \"B\"}", "B"),
        ('{"result": {"verdict": "A"}', "unparsed"),
    ],
)  # fmt: skip
def test_objects_as_python_writes_them_and_what_contradicts_itself(content, expected):
    assert said(content, "json") == expected


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["letter", "last_line", "json"])
@pytest.mark.parametrize(
    "piece",
    ["<", "<think>", "</think>", "<think></think>", '"<think>" ', "a <think> tag ", "[", "◁", "{", "}", "{}",
    '{"a":', "{'a':", '"', "'", "<think>process</think>",
     "\\'", '\\"', '{"verdict": "A"} ', "{'verdict': 'A'} ", "\n", " ", " \n", "\t*", "- ", "analysis",
     "thinking process:\n",
     "<|channel|>", "<|channel|>final", "<|start|>assistant", "<|end|>", "assistant final", "Thinking... ", "A ",
     "not A, ", "so ",
     "the answer is ", "`", "```\n", "\\boxed{", "<a-", "<think a=", "<|im_end|>", ">", "verdict", ",", "no, wait, "],
)  # fmt: skip
def test_long_replies_are_parsed_in_time_that_follows_their_length(kind, piece):
    def seconds(length):
        begins, ends = ("", '{"verdict": "A"}\n', '{"reason": "', "<think>"), ("", ">", '{"verdict": "A"}')
        rows = [f"{begin}{piece * (length // len(piece))}{end}" for begin in begins for end in ends]
        started = time.process_time()
        for row in rows:
            said(row, kind)
        return time.process_time() - started

    assert seconds(20_000) < 2


@given(st.text(), st.sampled_from(["letter", "last_line", "json"]), st.sampled_from(["stop", "length", "odd", None]))
def test_nothing_crashes(content, kind, finish_reason):
    said(content, kind, finish_reason)


@given(st.text(alphabet='ABC*[]:. \nVerdictanswr<>/hk{}"'), st.sampled_from(["letter", "last_line", "json"]))
def test_nothing_crashes_near_a_verdict(content, kind):
    said(content, kind)


@pytest.mark.parametrize("kind", ["letter", "last_line", "json"])
@given(text=st.text(max_size=30))
def test_a_wrong_end_never_falls_back(kind, text):
    first = {"letter": "A", "last_line": "Verdict: A", "json": '{"verdict": "A"}'}[kind]
    assert said(f"{first}\n{text}\nVerdict: neither of them", kind) in ("unparsed", "truncated", "refused")


def test_slots_and_sides():
    assert [outcome(s, o) for o in ("forward", "reversed") for s in ("A", "B", "tie")] == [
        "first", "second", "tie", "second", "first", "tie",
    ]  # fmt: skip


def token(text, **top):
    return ReplyToken(token=text, top=tuple(TopToken(token=t, logprob=math.log(p)) for t, p in top.items()))


def test_label_mass():
    mass = label_mass([token("A", A=0.5, B=0.2, The=0.1, **{" A": 0.1})], "A")
    assert mass.p_first_shown == pytest.approx(0.75)
    assert mass.neither == pytest.approx(0.2)
    assert label_mass([token("A", A=0.9)], "A").p_first_shown == 1.0
    assert label_mass([token("Sure", Sure=0.9, A=0.1)], "A") is None
    assert label_mass([], "A") is None
    assert label_mass([token("A", Z=1.0)], "A") is None


def test_label_mass_is_read_where_the_verdict_stands():
    reply = [token("A", A=0.9, B=0.1), token(" is"), token("B", B=0.8, A=0.1), token("**", **{"**": 1.0})]
    assert label_mass(reply, "B").p_first_shown == pytest.approx(1 / 9)


@pytest.mark.parametrize(
    ("said", "verdict"),
    [
        ((" B", "\n", "Verdict", ":A"), "A"),  # the verdict's letter is no token of its own
        ((" A", "\n", "Verdict", ":A"), "A"),  # the same, and the reasoning ends on its letter
        ((" A", "ctually", " a", "."), "A"),
    ],
)
def test_label_mass_of_another_letter_is_none_of_the_verdict(said, verdict):
    assert label_mass([token(t, **{t: 0.9}) for t in said], verdict) is None


def test_what_follows_a_verdict_is_no_other_letter():
    reply = [token(" (", **{" (": 1.0}), token("B", B=0.8, A=0.2), *(token(t) for t in (")", " is", " better", "."))]
    assert label_mass(reply, "B").p_first_shown == pytest.approx(0.2)


@needs("llmbar", "full replies of real judges are read as their authors read them")
@pytest.mark.parametrize("path", RAW, ids=lambda p: p.stem)
def test_replies_of_real_judges(path):
    """Reasoned replies that end in `Therefore, Output (a) is better.`; `winner` is what their authors read."""
    pattern = r"Output \((?P<verdict>\w+)\) is better\."
    read = agreed = 0
    for row in json.loads(path.read_text()):
        for result in row["results"]:
            for swap in ("swap = False", "swap = True"):
                content, winner = result[swap]["completion"][0], result[swap]["winner"]
                for kind in ("letter", "last_line", "json"):
                    assert said(content, kind) in ("unparsed", "empty", "refused")
                verdict = said(content, "last_line", pattern=pattern)
                if verdict in ("A", "B"):
                    read += 1
                    order = "reversed" if swap.endswith("True") else "forward"
                    agreed += outcome(verdict, order) == {"1": "first", "2": "second"}.get(winner)
    # Two of Falcon's replies call both answers better in turn: their authors read another place than the last line.
    assert read - agreed <= (2 if path.stem == "raw_Natural_Falcon_CoT" else 0) + ("Neighbor_Falcon" in path.stem)
    assert read > (0.99 if "GPT-4" in path.stem else 0.5) * 2 * len(json.loads(path.read_text()))
