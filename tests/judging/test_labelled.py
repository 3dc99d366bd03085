"""Labelled pairs of other people's making are read as they are, and never guessed at."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rlaif.constitution import load_constitution
from rlaif.errors import UserError
from rlaif.judging.labelled import parse_map, read_labelled

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT.parent / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="the public data sets aren't in ../shared/data")


def row(n, label="first", **more):
    return {"id": f"r{n}", "principle": "brevity", "constitution": "test@1", "prompt": "Why?", "first": "So.",
            "second": "Because of much", "label": label, "split": "dev", "source": "written", **more}  # fmt: skip


def write(path, *rows):
    if path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        path.write_text("\n".join(json.dumps(r) if isinstance(r, dict) else r for r in rows))
    return path


def test_a_row_of_the_shipped_form(tmp_path):
    found = read_labelled([write(tmp_path / "b.jsonl", row(0), "", row(1, split="test"))], split="all")
    first = found.rows[0]
    assert (first.id, first.slice, first.constitution, first.label, first.split) == (
        "r0", "brevity", "test@1", "first", "dev"
    )  # fmt: skip
    assert first.columns["source"] == "written"
    assert first.longer == "second"
    assert first.texts == {"r0-first": "So.", "r0-second": "Because of much"}


def test_splits(tmp_path):
    path = write(tmp_path / "b.jsonl", row(0), row(1, split="test"))
    assert [r.id for r in read_labelled([path]).rows] == ["r0"]
    assert [r.id for r in read_labelled([path], split="test").rows] == ["r1"]
    foreign = write(tmp_path / "c.jsonl", row(0, split="train"))
    assert len(read_labelled([foreign]).rows) == 1
    with pytest.raises(UserError, match="leave --split test out"):
        read_labelled([foreign], split="test")


def test_ties_and_disputes_are_left_out_and_counted(tmp_path):
    rows = [{"instruction": "Do", "input": "", "response1": "a", "response2": "b", "annotator1": x, "annotator2": y}
            for x, y in ((1, 1), (2, 2), (0, 0), (1, 2), (0, 1))]  # fmt: skip
    found = read_labelled([write(tmp_path / "p.json", *rows)])
    assert [(r.key, r.label, r.prompt) for r in found.rows] == [("0", "first", "Do"), ("1", "second", "Do")]
    assert found.excluded == {"tie": 1, "disputed": 2}


def test_an_instruction_comes_with_what_it_is_about(tmp_path):
    path = write(tmp_path / "p.json", {"instruction": "Shorten.", "input": "A long text", "response1": "a",
                                       "response2": "b", "annotator1": 1})  # fmt: skip
    assert read_labelled([path]).rows[0].prompt == "Shorten.\n\nA long text"


def test_chosen_and_rejected(tmp_path):
    path = write(tmp_path / "p.jsonl", {"prompt": "x", "chosen": "good", "rejected": "bad", "subset": "chat"})
    (only,) = read_labelled([path]).rows
    assert (only.first, only.label, only.slice) == ("good", "first", "chat")


def test_names_in_capitals_and_labels_of_other_sets(tmp_path):
    rows = [{"Question": "x", "response_A": "a", "response_B": "b", "label": label}
            for label in ("A>B", "B>A", "A=B", 2.0, "model_a")]  # fmt: skip
    found = read_labelled([write(tmp_path / "p.json", *rows)])
    assert [r.label for r in found.rows] == ["first", "second", "second", "first"]
    assert found.excluded == {"tie": 1}


def test_a_csv_with_unusual_columns(tmp_path):
    path = tmp_path / "p.csv"
    path.write_text('q,left,right,best,topic\n"Say ""hi""\nplease",hello,bye,L,chat\nx,y,z,R,maths\n')
    found = read_labelled([path], parse_map("prompt=q,first=left,second=right,label=best,first_is=L,second_is=R"),
                          by="topic")  # fmt: skip
    assert [(r.prompt, r.label, r.slice) for r in found.rows] == [
        ('Say "hi"\nplease', "first", "chat"), ("x", "second", "maths")
    ]  # fmt: skip


def test_several_files_are_slices_and_rows_keep_apart(tmp_path):
    pair = {"input": "x", "output_1": "a", "output_2": "b", "label": 2}
    paths = [write(tmp_path / f"{name}.json", pair) for name in ("easy", "hard")]
    found = read_labelled(paths)
    assert [(r.id, r.key, r.file, r.slice) for r in found.rows] == [
        ("easy/0", "0", "easy", "easy"), ("hard/0", "0", "hard", "hard")
    ]  # fmt: skip
    assert found.digest != read_labelled(paths[:1]).digest


def test_by_file_whatever_the_columns(tmp_path):
    assert read_labelled([write(tmp_path / "b.jsonl", row(0))], by="file").rows[0].slice == "b"


@pytest.mark.parametrize(
    ("second", "message"),
    [
        (row(1, label="third"), r"b.jsonl:2: label: found 'third', expected 1, 2 or 0"),
        (row(0), "two rows have the id `r0`"),
        (row(1, first=None), r"b.jsonl:2: first: expected text, found NoneType"),
        (row(1, split="tst"), r"b.jsonl:2: split: found 'tst', expected dev or test"),
        ("{", r"b.jsonl:2: not valid JSON"),
        ("[1]", r"b.jsonl:2: expected an object"),
    ],
)
def test_bad_rows_are_named(tmp_path, second, message):
    with pytest.raises(UserError, match=message):
        read_labelled([write(tmp_path / "b.jsonl", row(0), second)])


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("no.jsonl", None, "can't read the file"),
        ("e.jsonl", "", "no labelled pairs"),
        ("e.json", "{}", "expected a list of rows, found dict"),
        ("e.json", "[\n{", "e.json:2: not valid JSON"),
        ("e.csv", "prompt,first,second,label\na,b,c\n", "e.csv:2: the row has another number of columns"),
        ("e.csv", "prompt,first,second\na,b,c\n", "which column is the label.*say --map label=COLUMN"),
        ("e.csv", "prompt,first,second,label\na,b,c,0\na,b,c,1\n", "the labels in `label` are 0 and 1"),
        ("e.csv", "prompt,first,second,label\na,b,c,0\na,b,c,tie\n", r"no labelled pairs \(2 rows are ties"),
    ],
)
def test_bad_files_are_one_line(tmp_path, name, text, message):
    path = tmp_path / name
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=message) as e:
        read_labelled([path])
    assert "\n" not in str(e.value)


def test_a_table_that_writes_zero_and_one_as_decimals_is_asked_which_is_which(tmp_path):
    path = tmp_path / "p.csv"
    path.write_text("prompt,first,second,label\nq,a,b,0.0\nq,a,b,1.0\n")
    with pytest.raises(UserError, match="0 and 1; say which is which"):
        read_labelled([path])
    assert [r.label for r in read_labelled([path], {"first_is": "0", "second_is": "1"}).rows] == ["first", "second"]


def test_cells_hold_what_text_holds(tmp_path):
    answer = "one\u2028two\x85three\x0cfour\nfive " + "x" * 140_000
    path = tmp_path / "p.csv"
    path.write_text(f'prompt,first,second,label\nq,"{answer}",b,1\n', encoding="utf-8")
    assert read_labelled([path]).rows[0].first == answer


def test_a_map_of_nonsense(tmp_path):
    path = write(tmp_path / "b.jsonl", row(0))
    with pytest.raises(UserError, match="no column `q`; it has id, principle"):
        read_labelled([path], parse_map("prompt=q"))
    for bad in ("prompt", "promt=q"):
        with pytest.raises(UserError, match=r"--map .*expected KEY=COLUMN.*keys: id, prompt"):
            parse_map(bad)


def test_every_shipped_row_names_a_shipped_constitution():
    rows = read_labelled([ROOT / "prompts" / "judge_bench.jsonl"], split="all").rows
    assert len(rows) >= 300
    for reference in {r.constitution for r in rows}:
        load_constitution(ROOT / "constitutions", reference)


@needs_data
def test_public_sets_are_read_as_they_are():
    llmbar = read_labelled([DATA / "llmbar" / f"{name}.json" for name in ("natural", "adv_neighbor")])
    assert [r.slice for r in llmbar.rows].count("natural") == 100
    assert len(llmbar.rows) == 234
    natural = [r for r in llmbar.rows if r.slice == "natural"]
    assert sum(r.longer == r.label for r in natural) == 56
    pandalm = read_labelled([DATA / "pandalm" / "data__testset-v1.json"])
    assert len(pandalm.rows) + pandalm.excluded["tie"] == 879
    assert pandalm.excluded == {"tie": 85, "disputed": 120}
