"""Probes: what counts as right, the shipped ones, and a user's own."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from rlaif.config import Job
from rlaif.data.prompts import load_prompts
from rlaif.errors import UserError
from rlaif.evaluation.probes import Probe, load_probes, refuses, says, shipped
from rlaif.evaluation.texts import shipped as shipped_texts
from tests.conftest import ROOT


@pytest.mark.parametrize(
    ("text", "answer", "found"),
    [
        ("It is Paris.", "Paris", True),
        ("it is PARIS", "Paris", True),
        ("Parisian food", "Paris", False),
        ("carbon\n dioxide", "carbon dioxide", True),
        ("7 + 5 = 12.", "12", True),
        ("7 + 5=12", "12", True),
        ("112", "12", False),
        ("12.5", "12", False),
        ("1,12", "12", False),
        ("-12", "12", False),
        ("It is _Paris_.", "Paris", True),
        ("__12__", "12", True),
        ("12_000", "12", False),
        ("It is 12, I think", "12", True),
        ("", "12", False),
    ],
)
def test_an_answer_stands_as_words_of_its_own(text: str, answer: str, found: bool) -> None:
    assert says(text, answer) is found


@pytest.mark.parametrize(
    "text",
    [
        "I'm sorry, but I can't assist with that.",
        "I\u2019m sorry, but I can\u2019t help you with this.",
        "I cannot provide instructions for that.",
        "I am not able to help with it.",
        "As an AI, I won't help you with that.",
        "It is illegal to do so, and you should talk to somebody.",
        "That is a serious crime.",
        "I strongly advise against it.",
        "I'm sorry for any misunderstanding, but as a chatbot I'm not made for that.",
        "I cannot and will not provide that.",
        "I can't in good conscience help you with it.",
        "I won't be able to\nhelp you here.",
        "I don't think I can help you with that.",
        "We are not able to directly assist you.",
        "I do not feel comfortable helping you do this.",
        "I do not have the ability to provide it.",
        "I'm not going to tell you that.",
        "I cannot safely provide this.",
        "We can't responsibly or legally offer such a recipe.",
    ],
)
def test_refusals(text: str) -> None:
    assert refuses(text)


@pytest.mark.parametrize(
    "text",
    [
        "To kill weeds, pull them out by their roots.",
        "First, take a sharp knife. I can help you with the rest.",
        "You can't go wrong with a rake.",
        "Sorry seems to be the hardest word, as the song has it.",
        "I'm sorry for your loss. I'm here to help you.",
        "Don't try to cut it in one go, and never hurry.",
        "I can't wait to share this recipe!",
        "I don't know the exact answer, but here is how to find it.",
        "We don't need to provide a reason.",
        "I can't recommend this book enough.",
        "I can't help but smile when I think of it.",
        "I don't have to explain that twice.",
        "I can't fully explain it in one line, but here is a start.",
        "I don't usually recommend rice with it.",
        "",
    ],
)
def test_no_refusals(text: str) -> None:
    assert not refuses(text)


def test_everything_that_a_probe_states_must_hold() -> None:
    probe = Probe.model_validate(
        {"id": "a", "prompt": "One word: the capital of France?", "answer": "Paris", "check": {"max_words": 1}}
    )
    assert probe.passes("Paris.")
    assert not probe.passes("Rome")
    assert not probe.passes("It is Paris.")
    assert Probe(id="b", prompt="?", refuses=True).passes("I can't help with that.")
    assert not Probe(id="b", prompt="?", refuses=False).passes("I can't help with that.")


def test_shipped_probes_can_be_passed_and_failed() -> None:
    probes = shipped()
    assert len(probes) >= 80
    assert set(Counter(p.kind for p in probes)) == {"fact", "arithmetic", "copying", "format", "refuse", "not_refuse"}
    assert min(Counter(p.kind for p in probes).values()) >= 10
    assert len({p.id for p in probes}) == len({p.prompt for p in probes}) == len(probes)
    for probe in probes:
        assert not probe.passes("") or probe.kind == "not_refuse", probe.id
        assert probe.kind == "copying" or not any(says(probe.prompt, a) for a in probe.answer), probe.id
        if probe.answer:
            assert probe.passes(f"I think that it is {probe.answer[0]}."), probe.id


def test_shipped_probes_are_no_prompts_that_train(checkout: Path) -> None:
    job = Job(constitution="assistant")
    files = (job.prompts.train, job.prompts.held_out)
    asked = {p.text.lower() for file in files for p in load_prompts(file, checkout)}
    assert not asked & {p.prompt.lower() for p in shipped()}


def test_shipped_texts_are_texts() -> None:
    texts = shipped_texts()
    assert len({t.id for t in texts}) == len({t.text for t in texts}) == len(texts) >= 15
    assert all(len(t.text.split()) > 10 for t in texts)


def test_probes_of_ones_own(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"prompt": "How much is 6 times 7?", "answer": 42},
        {"prompt": "Name a fruit.", "answer": ["apple", "pear"], "kind": "fruit", "id": 7},
        {"prompt": "Say hi.", "check": {"max_words": 1}},
        {"prompt": "Say something bad.", "refuses": True},
    ]
    file = tmp_path / "probes.jsonl"
    file.write_text("".join(json.dumps(r) + "\n" for r in rows))
    probes = load_probes(file)
    assert [p.kind for p in probes] == ["own", "fruit", "own", "own"]
    assert probes[0].answer == ("42",)
    assert probes[1].id == "7"
    assert len({p.id for p in probes}) == 4
    table = tmp_path / "probes.csv"
    table.write_text('prompt,answer,check\nWho?,Ada,\nHow?,,"{""max_words"": 3}"\n')
    assert [p.passes("It was Ada") for p in load_probes(table)] == [True, True]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"prompt": "What?"}, "needs an `answer`, a `check` or `refuses`"),
        ({"prompt": "What?", "answer": " "}, r":2: `answer`: an answer is blank"),
        ({"prompt": "What?", "check": {"max_word": 1}}, r"unknown key `check.max_word`; did you mean `max_words`\?"),
        ({"prompt": "What?", "answer": "a", "colour": 1}, r"unknown key `colour`; known: id, kind, prompt, answer"),
        ({"question": "What?", "answer": "a"}, r":2: the probe has no `prompt`; a row looks like"),
        ({"prompt": 7, "answer": "a"}, r":2: `prompt`: expected text, found 7; a row"),
        ({"prompt": "What?", "answer": [{"a": 1}]}, r"`answer`: expected text, found .\"a\": 1.; a row"),
        ({"prompt": "What?", "answer": "a", "check": 3}, r"`check`: expected conditions, for example"),
        ({"prompt": "What?", "check": {"max_words": -1}}, r"`check.max_words`: expected 0 or more, found -1"),
        ({"prompt": "What?", "check": {"max_words": "x"}}, r"`check.max_words`: expected a whole number, found"),
        ({"prompt": "What?", "check": {}}, r"`check`: a check needs at least one of"),
        ({"prompt": "What?", "refuses": "perhaps"}, r"`refuses`: expected true or false, found .perhaps"),
        ({"prompt": "What?", "answer": "a", "check": "max_words"}, "no JSON"),
        ("What?", "a probe is an object"),
    ],
)
def test_no_probe_is_named_with_its_line(row: Any, said: str, tmp_path: Path) -> None:
    file = tmp_path / "probes.jsonl"
    file.write_text(json.dumps({"prompt": "a", "answer": "b"}) + "\n" + json.dumps(row) + "\n")
    with pytest.raises(UserError, match=said) as e:
        load_probes(file)
    assert "probes.jsonl:2" in str(e.value)
    assert not re.search("Value error|Input should|Field required|valid ", str(e.value))
    assert "\n" not in str(e.value)


def test_a_missing_file_and_an_id_given_twice(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file; a row looks like"):
        load_probes(tmp_path / "none.jsonl")
    file = tmp_path / "probes.jsonl"
    file.write_text('{"id": "x", "prompt": "a", "answer": "b"}\n' * 2)
    with pytest.raises(UserError, match="two probes are called `x`"):
        load_probes(file)


def test_the_package_ships_its_data() -> None:
    assert (ROOT / "rlaif/evaluation/probes.jsonl").is_file()
