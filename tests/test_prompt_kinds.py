"""Prompt sets as people have them: chats in cells, ShareGPT, preference sets, content parts, other names, slices."""

from __future__ import annotations

import csv
import gzip
import io
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from rlaif.config import Columns
from rlaif.data.prompts import load_prompts
from rlaif.errors import UserError
from rlaif.records import Prompt

CHAT = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Why sleep?"},
    {"role": "assistant", "content": "To rest."},
    {"role": "user", "content": "How long?"},
    {"role": "assistant", "content": "Eight hours."},
]
ASKED = [("system", "Be kind."), ("user", "Why sleep?"), ("assistant", "To rest."), ("user", "How long?")]
HH = "\n\nHuman: Why sleep?\n\nAssistant: To rest.\n\nHuman: How long?\n\nIn hours.\n\nAssistant:"
SHARE_GPT = [
    {"from": "human", "value": "Why sleep?"},
    {"from": "gpt", "value": "To rest."},
    {"from": "human", "value": "How long?"},
    {"from": "gpt", "value": "Eight hours."},
]


def said(prompt: Prompt) -> list[tuple[str, str]]:
    return [(m.role, m.content) for m in prompt.messages]


def load(folder: Path, *rows: dict[str, Any], **columns: str) -> list[Prompt]:
    (folder / "set.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return load_prompts("set.jsonl", folder, columns=Columns(**columns))


def refused(folder: Path, *rows: dict[str, Any], **columns: str) -> str:
    with pytest.raises(UserError) as error:
        load(folder, *rows, **columns)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("column", ["prompt", "messages", "conversations"])
@pytest.mark.parametrize("write", [json.dumps, repr], ids=["json", "python"])
def test_a_csv_cell_holds_a_chat(tmp_path: Path, column: str, write: Any) -> None:
    out = io.StringIO()
    csv.writer(out).writerows([["id", column], ["a", write(CHAT)]])
    (tmp_path / "set.csv").write_text(out.getvalue())
    (prompt,) = load_prompts("set.csv", tmp_path)
    assert said(prompt) == ASKED


@pytest.mark.parametrize("text", ['["a", "b"]', "[{1: 2}]", '{"role": "user"}', "Human: hello", "[x] is a box"])
def test_text_that_is_no_chat_stays_text(tmp_path: Path, text: str) -> None:
    (prompt,) = load(tmp_path, {"prompt": text})
    assert said(prompt) == [("user", text)]


def test_a_broken_chat_in_a_cell_is_not_asked_as_text(tmp_path: Path) -> None:
    assert "`prompt` is text but not JSON" in refused(tmp_path, {"prompt": '[{"role": "user", "content": "Why?"'})


def test_share_gpt(tmp_path: Path) -> None:
    rows = [
        {"conversations": SHARE_GPT},
        {"conversations": [{"from": "system", "value": "Be kind."}, *SHARE_GPT]},
        {"conversations": SHARE_GPT[:1], "system": "Be kind."},
        {"conversations": CHAT[1:2], "system": ""},
        {"messages": SHARE_GPT[:3], "id": "from"},
    ]
    found = [said(p) for p in load(tmp_path, *rows)]
    assert found == [ASKED[1:], ASKED, ASKED[:2], ASKED[1:2], ASKED[1:]]


def test_a_speaker_that_is_none_of_ours_is_named(tmp_path: Path) -> None:
    assert "role" in refused(tmp_path, {"conversations": [{"from": "function", "value": "{}"}, *SHARE_GPT]})


@pytest.mark.parametrize(
    "row",
    [
        {"chosen": CHAT, "rejected": [*CHAT[:-1], {"role": "assistant", "content": "No."}]},
        {"chosen": json.dumps(CHAT), "rejected": json.dumps(CHAT[:-1])},
        {"chosen": CHAT, "rejected": CHAT},
        {"chosen": CHAT},
        {"prompt": CHAT[:-1], "chosen": CHAT[-1:], "rejected": CHAT[-1:]},
        {"prompt": CHAT[:-1], "chosen": "Eight.", "rejected": "No.", "messages": None},
    ],
)
def test_preference_sets_as_chats(tmp_path: Path, row: dict[str, Any]) -> None:
    (prompt,) = load(tmp_path, row)
    assert said(prompt) == ASKED


def test_preferences_that_part_early_ask_what_they_share(tmp_path: Path) -> None:
    (prompt,) = load(tmp_path, {"chosen": CHAT, "rejected": [*CHAT[:2], {"role": "assistant", "content": "No idea."}]})
    assert said(prompt) == ASKED[:2]


def test_hh_rlhf(tmp_path: Path) -> None:
    wanted = [*ASKED[1:3], ("user", "How long?\n\nIn hours.")]
    (pair,) = load(
        tmp_path, {"chosen": f"{HH} Eight.", "rejected": f"{HH} I won't say.\n\nHuman: Why?\n\nAssistant: So."}
    )
    (alone,) = load(tmp_path, {"prompt": HH})
    assert said(pair) == said(alone) == wanted


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"chosen": "Eight.", "rejected": "No."}, "answer without its prompt"),
        ({"chosen": CHAT[1:], "rejected": CHAT[3:]}, "same prompt"),
        ({"chosen": f"{HH} a", "rejected": "\n\nHuman: Other?\n\nAssistant: b"}, "same prompt"),
    ],
)
def test_preferences_without_a_prompt_are_refused(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    assert message in refused(tmp_path, row)


def test_content_parts(tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "Why ", "image": None}, {"type": "text", "text": "sleep?"}]
    (prompt,) = load(tmp_path, {"messages": [{"role": "user", "content": parts}]})
    assert said(prompt) == [("user", "Why sleep?")]
    picture = [{"type": "image", "image": "a.png"}, *parts]
    assert "part of type `image`" in refused(tmp_path, {"prompt": [{"role": "user", "content": picture}]})


def test_columns_by_name_and_path(tmp_path: Path) -> None:
    row = {"prompt": "not this", "q": {"text": "Why?"}, "about": "Be kind.", "n": 7, "turns": ["How?"]}
    (prompt,) = load(tmp_path, row, prompt="q.text", system="about", id="n")
    assert (prompt.id, said(prompt)) == ("7", [("system", "Be kind."), ("user", "Why?")])
    assert said(*load(tmp_path, row, prompt="turns.0")) == [("user", "How?")]
    assert said(*load(tmp_path, {"prompt": "Why?", "system": "Be kind."})) == [("user", "Why?")]


def test_a_wrong_column_is_named(tmp_path: Path) -> None:
    row = {"prompt": "Why?", "question": "How?"}
    assert "no column `qestion` (prompts.columns.prompt), found `prompt`, `question`" in refused(
        tmp_path, row, prompt="qestion"
    )
    assert "no row has a column `sytem` (prompts.columns.system)" in refused(tmp_path, row, system="sytem")
    assert "prompts.columns: {prompt: question}" in refused(tmp_path, {"question": "How?"})


def test_a_held_out_set_may_have_the_usual_names(tmp_path: Path) -> None:
    (tmp_path / "set.jsonl").write_text('{"prompt": "Why?"}\n')
    for columns in (Columns(prompt="question", system="about"), Columns(id="key")):
        (prompt,) = load_prompts("set.jsonl", tmp_path, columns=columns, columns_required=False)
        assert prompt.text == "Why?"


def test_two_system_prompts_are_refused(tmp_path: Path) -> None:
    assert "two system prompts" in refused(tmp_path, {"prompt": CHAT, "about": "Be rude."}, system="about")


@pytest.mark.parametrize("blank", ["", "   ", None, []])
def test_a_blank_prompt_says_so(tmp_path: Path, blank: Any) -> None:
    message = refused(tmp_path, {"id": "a", "prompt": blank})
    assert "found `" not in message
    assert "`prompt`" in message


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv"])
def test_gzip(tmp_path: Path, suffix: str) -> None:
    text = {".jsonl": '{"prompt": "Why?"}\n', ".json": '[{"prompt": "Why?"}]', ".csv": "prompt\nWhy?\n"}[suffix]
    (tmp_path / f"a.b{suffix}.gz").write_bytes(gzip.compress(text.encode()))
    assert [p.text for p in load_prompts(f"a.b{suffix}.gz", tmp_path)] == ["Why?"]
    (tmp_path / f"torn{suffix}.gz").write_bytes(gzip.compress(text.encode())[:-9])
    with pytest.raises(UserError, match="not a whole gzip file"):
        load_prompts(f"torn{suffix}.gz", tmp_path)


def test_gzip_of_what_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "set.parquet.gz").write_bytes(b"x")
    with pytest.raises(UserError, match=r"unknown format `.parquet.gz`"):
        load_prompts("set.parquet.gz", tmp_path)


def test_slices_of_a_saved_set(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_list([{"prompt": f"Why {i}?"} for i in range(10)])
    rows.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": rows, "extra": rows.select([9])}).save_to_disk(tmp_path / "two")

    def texts(source: str) -> list[str]:
        return [p.text for p in load_prompts(f"datasets:{tmp_path / source}", tmp_path)]

    for name in ("one", "two"):
        assert texts(name) == texts(f"{name}:train") == [f"Why {i}?" for i in range(10)]
        assert texts(f"{name}:train[:90%]") == [f"Why {i}?" for i in range(9)]
        assert texts(f"{name}:train[90%:]") == ["Why 9?"]
        assert texts(f"{name}:train[2:4]") == ["Why 2?", "Why 3?"]
    assert texts("two:train[:1]+extra") == ["Why 0?", "Why 9?"]
    for name, there in (("one", "train"), ("two", "train, extra")):
        with pytest.raises(UserError, match=f"no split `test`; there is {there}$"):
            texts(f"{name}:test")


def test_a_wrong_split_of_a_folder_lists_those_there_are(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    (tmp_path / "hub").mkdir()
    for split in ("train", "test"):
        (tmp_path / "hub" / f"{split}.jsonl").write_text('{"prompt": "Why?"}\n')
    with pytest.raises(UserError, match=r"trian.*'train'.*'test'") as error:
        load_prompts(f"datasets:{tmp_path / 'hub'}:trian", tmp_path)
    assert "\n" not in str(error.value)


def csv_of(folder: Path, *rows: list[str]) -> list[Prompt]:
    out = io.StringIO()
    csv.writer(out).writerows(rows)
    (folder / "set.csv").write_text(out.getvalue())
    return load_prompts("set.csv", folder)


NUMPY = "[" + "\n ".join(map(repr, CHAT)) + "]"


@pytest.mark.parametrize(
    "cell",
    [
        json.dumps([{"content": m["content"], "role": m["role"]} for m in CHAT]),
        json.dumps([{"name": None, **m} for m in CHAT], indent=1),
        repr([{"info": None, "content": m["content"], "role": m["role"]} for m in CHAT]),
        json.dumps({"messages": CHAT}),
        json.dumps({"id": 7, "conversations": CHAT}),
        repr({"model": "m", "messages": CHAT}),
        json.dumps({"system": "Be kind.", "messages": CHAT[1:]}),
        json.dumps(json.dumps(CHAT)),
        NUMPY,
        f"array([{', '.join(map(repr, CHAT))}], dtype=object)",
        f"array([{', '.join(map(repr, CHAT))}],\n      dtype=object)",
        repr(tuple(CHAT)),
        NUMPY.replace("'content': ", "'content': array([{'type': 'text', 'text': ").replace("'}", "'}], dtype=str)}"),
        json.dumps([{"value": m["content"], "from": m["role"]} for m in CHAT]),
        "\n".join(map(json.dumps, CHAT)),
    ],
)  # fmt: skip
@pytest.mark.parametrize("column", ["prompt", "messages", "chosen"])
def test_a_chat_in_a_cell_in_other_forms(tmp_path: Path, column: str, cell: str) -> None:
    (prompt,) = csv_of(tmp_path, ["id", column], ["a", cell])
    assert said(prompt) == ASKED


@pytest.mark.parametrize(
    "message", [{"role": "user", "content": 'It\'s {x} [y] "z"'}, {"content": 'It\'s {x} [y] "z"', "role": "user"}]
)
def test_a_single_message_is_a_chat(tmp_path: Path, message: dict[str, str]) -> None:
    for cell in (message, json.dumps(message), repr(message), f"[{message!r}]", f"array([{message!r}], dtype=object)"):
        (prompt,) = load(tmp_path, {"prompt": cell})
        assert said(prompt) == [("user", message["content"])]
        (prompt,) = load(tmp_path, {"messages": cell})
        assert said(prompt) == [("user", message["content"])]


@pytest.mark.parametrize(
    "cell",
    [
        '[{"content": "Why?", "role": "user"',
        "[{'role': 'user', 'content': 'Why is the sky ...",
        "[{'role': 'user', 'content': 'Why?'} ... {'role': 'user', 'content': 'How?'}]",
        "[{'role': 'user', 'content': 'Why?'}, ..., {'role': 'user', 'content': 'How?'}]",
        '{"messages": [{"role": "user", "content": "Why?"}',
        '[[{"role": "user", "content": "Why?"}]]',
        '["{\\"role\\": \\"user\\", \\"content\\": \\"Why?\\"}"]',
        "[Message(role='user', content='Why?')]",
        "ChatCompletionMessage(content='Why?', role='user')",
        "- role: user\n  content: Why?",
        "[{role: user, content: Why?}]",
        '[{"role": "user", "content": "Why?"}, "and how?"]',
        '{"chat": {"role": "user", "content": "Why?"}}',
        '[{"role": "user", "content": "Why?"}]\n[{"role": "user", "content": "How?"}]',
        "[{'from': 'human', 'value': 'Why?'",
    ],
)
def test_a_chat_that_can_not_be_read_is_not_asked_as_text(tmp_path: Path, cell: str) -> None:
    message = refused(tmp_path, {"prompt": "fine"}, {"prompt": cell})
    assert message.startswith(f"{tmp_path / 'set.jsonl'}:2: `prompt` ")
    assert 'give a chat as [{"role": "user", "content": "..."}]' in message


@pytest.mark.parametrize(
    "text",
    [
        '[{"from": "Berlin", "to": "Rome"}] Plan a trip.',
        '{"name": "Ann", "role": "admin"}',
        "[role: user] Say hello.",
        '{"role": "admin"} is what a config says. Why?',
        "- role: what does it mean?",
        'Explain [{"role": "user", "content": "hi"}] to me.',
        "{x} and [y]: which one?",
        "array([1, 2]) is what?",
        '{"prompt": "a cat on a mat", "steps": 20}',
        "User: is that a word?",
        "Human: hi\nWhat comes next?",
        "Q: 2 + 2?\nA: 4\nQ: 2 + 3?\nA:",
    ],
)
def test_text_that_is_only_about_roles_stays_text(tmp_path: Path, text: str) -> None:
    (prompt,) = load(tmp_path, {"prompt": text})
    assert said(prompt) == [("user", text)]


def test_transcripts_are_told_of(tmp_path: Path) -> None:
    whole = "Human: Why sleep?\n\nAssistant: To rest.\n\nSum this up."
    rows = [{"prompt": HH}, {"prompt": "Why?"}, {"prompt": whole}, {"prompt": whole.replace("\n", "\r\n") + "!"}]
    (tmp_path / "set.jsonl").write_text("".join(json.dumps({"id": i, **r}) + "\n" for i, r in enumerate(rows)))
    notes: list[str] = []
    prompts = load_prompts("set.jsonl", tmp_path, notes.append)
    assert [said(p)[-1] for p in prompts] == [
        ("user", t) for t in ("How long?\n\nIn hours.", "Why?", *["Why sleep?"] * 2)
    ]
    assert notes == [
        "set.jsonl: 3 prompts are transcripts (`Human: ... Assistant: ...`), read as chats; what 2 of them have after "
        f"the last `Assistant:` is left out as an answer, first at {tmp_path / 'set.jsonl'}:3 (`To rest. Sum this up.`)"
    ]
    notes.clear()
    csv_of(tmp_path, ["prompt"], ["\n\nHuman: Why sleep?"])
    (prompt,) = load_prompts("set.csv", tmp_path, notes.append)
    assert said(prompt) == [("user", "Why sleep?")]
    assert notes == ["set.csv: 1 prompt is a transcript (`Human: ... Assistant: ...`), read as chats"]


@pytest.mark.parametrize(
    "text",
    [
        "Human: Why?\nAssistant:",
        "User: Why?\n\nAssistant:",
        "### Human: Why?### Because.\n### Assistant: ",
        "USER: Why? ASSISTANT:",
        "user: Why?\nbot: So.\nuser: How?\nbot:",
    ],
)
def test_transcripts_in_other_forms_are_refused(tmp_path: Path, text: str) -> None:
    message = refused(tmp_path, {"prompt": text})
    assert "set.jsonl:1: `prompt` is a transcript that waits for an answer" in message
    assert "`messages`" in message


@pytest.mark.parametrize(
    ("row", "named"),
    [
        ({"id": "a", "question": "How?"}, "question"),
        ({"category": "home and garden", "id": 7, "query_text": "fix a tap"}, "query_text"),
        ({"id": "a b", "topic": "cooking at home", "frage": "Wie lange?"}, "frage"),
        ({"uid": "a", "system_prompt": "Be kind to all.", "Question": "How?"}, "Question"),
        ({"label": "is good", "answer": "By hand, that is how.", "x": "How is it done?"}, "x"),
        ({"prompt_id": "a b", "user": "u17", "q1": "Say something"}, "q1"),
        ({"id": 1, "dialog": [{"role": "user", "content": "How?"}]}, "dialog"),
        ({"id": 1, "data": {"question": "How?", "answer": "So it is."}}, "data.question"),
        ({"question_id": 81, "category": "writing", "turns": ["Write a post.", "Again."]}, "turns.0"),
        ({"id": 1, "My question: 1": "How?"}, '"My question: 1"'),
        ({"id": 1, "note": "x"}, "NAME"),
        ({"id": "a", "source": "a web page"}, "NAME"),
        ({"n": 3, "m": None}, "NAME"),
    ],
)
def test_the_column_that_is_proposed_holds_the_prompt(tmp_path: Path, row: dict[str, Any], named: str) -> None:
    assert refused(tmp_path, row).endswith(f"set prompts.columns: {{prompt: {named}}}")
    if named != "NAME":  # following the message works
        columns = yaml.safe_load(f"{{prompt: {named}}}")
        assert load(tmp_path, row, **columns)


@pytest.mark.parametrize(
    ("text", "mark"),
    [
        ("id;prompt\na;Why?\n", "`;`"),
        ("id;prompt\na;Why, then, so?\n", "`;`"),
        ("id\tprompt\na\tWhy?\n", "a tab"),
        ("id|prompt|category\na|Why?|x\n", "`|`"),
        ('"id";"question"\n"a";"Why?"\n', "`;`"),
    ],
)
@pytest.mark.parametrize("columns", [{}, {"prompt": "question"}])
def test_a_wrong_delimiter_is_named(tmp_path: Path, text: str, mark: str, columns: dict[str, str]) -> None:
    (tmp_path / "set.csv").write_text(text)
    with pytest.raises(UserError, match=r"set\.csv:2: ") as error:
        load_prompts("set.csv", tmp_path, columns=Columns(**columns))
    assert f"the delimiter looks to be {mark}; save the file with commas" in str(error.value)


def test_a_file_without_a_header_says_so(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="these are no names of columns"):
        csv_of(tmp_path, ["a", "Why is the sky blue?"], ["b", "How?"])
