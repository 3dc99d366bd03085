"""Prompt sets as people have them: chats in cells, ShareGPT, preference sets, content parts, other names, slices."""

from __future__ import annotations

import csv
import gzip
import io
import json
from pathlib import Path
from typing import Any

import pytest

from rlaif.config import Columns
from rlaif.errors import UserError
from rlaif.prompts import load_prompts
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
