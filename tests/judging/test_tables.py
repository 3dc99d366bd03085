"""Files as people have them are the same rows: packed, under the wrong ending, by column, nested."""

from __future__ import annotations

import bz2
import csv
import gzip
import json
import lzma
from pathlib import Path

import pytest

from rlaif.data.labelled import parse_map, read_labelled
from rlaif.data.tables import at_path, file_names, read_rows, read_table
from rlaif.errors import UserError

ROWS = [{"prompt": f"q{n}", "first": "x", "second": "y", "label": 1 + n % 2} for n in range(4)]
LIST, LINES = json.dumps(ROWS), "\n".join(map(json.dumps, ROWS)) + "\n"
COLUMNS = {k: [r[k] for r in ROWS] for k in ROWS[0]}
CSV = "prompt,first,second,label\n" + "".join(f"{r['prompt']},x,y,{r['label']}\n" for r in ROWS)


def values(path):
    return [{k: str(v) for k, v in row.values.items()} for row in read_table(path)]


AS_TEXT = [{k: str(v) for k, v in row.items()} for row in ROWS]


@pytest.mark.parametrize("pack", [lambda b: b, gzip.compress, bz2.compress, lzma.compress], ids=["", "gz", "bz2", "xz"])
@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("t.json", LIST),
        ("t.jsonl", LINES),
        ("t.csv", CSV),
        ("t.tsv", CSV.replace(",", "\t")),
        ("t.json", LINES),  # as datasets' to_json writes it
        ("t.jsonl", LIST),
        ("t.jsonl", json.dumps(ROWS, indent=1)),
        ("t.json", json.dumps(COLUMNS)),
        ("t.json", json.dumps({"name": "mine"} | COLUMNS)),
        ("t.jsonl", json.dumps(COLUMNS)),
        ("t.jsonl", json.dumps(COLUMNS, indent=1)),
        ("t.json", json.dumps({"version": 1, "data": ROWS})),
        ("t.json", json.dumps({k: {str(n): v for n, v in enumerate(c)} for k, c in COLUMNS.items()})),
    ],
)
def test_every_form_is_the_same_rows(tmp_path, pack, name, text):
    packed = pack(text.encode())
    ending = {b"\x1f\x8b": ".gz", b"BZ": ".bz2", b"\xfd7": ".xz"}.get(packed[:2], "")
    path = tmp_path / f"{name}{ending}"
    path.write_bytes(packed)
    assert values(path) == AS_TEXT
    unlabelled = tmp_path / name  # packed, and not called so
    unlabelled.write_bytes(packed)
    assert values(unlabelled) == AS_TEXT
    assert {r.file for r in read_labelled([path]).rows} == {"t"}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "t.json.gz",
            gzip.compress(LIST.encode(), mtime=0)[:-9],
            r"t.json.gz: can't unpack the file \(gzip: .*fetch it again",
        ),
        ("t.json.gz", b"\x1f\x8bno", "can't unpack the file"),
        ("t.json.xz", lzma.compress(b"[]")[:-4], "can't unpack the file"),
        ("t.zip", b"PK\x03\x04...", "this is a zip file; write it as JSONL"),
        ("t.parquet", b"PAR1...", "this is a Parquet file; write it as"),
        ("t.json", b'{"prompt": ["a"], "chosen": ["b", "c"]}', r"not equally long \(`prompt` 1, `chosen` 2\)"),
        ("t.json", b'{"a": 1}', "found an object with `a`"),
        ("t.json", b'"text"', "expected a list of rows, found str"),
        ("t.json", b'[{"a": 1},\n{]', r"t.json:2: not valid JSON"),
        ("t.jsonl", b'{"a": 1}\n{]', r"t.jsonl:2: not valid JSON"),
    ],
)
def test_what_can_not_be_read_is_one_line(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as e:
        read_table(path)
    assert "\n" not in str(e.value)


def test_rows_as_they_stand_have_their_places(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("id,prompt\na,x\nb\n,\n")
    places = [(f"{path}:2", {"id": "a", "prompt": "x"}), (f"{path}:3", {"id": "b", "prompt": None})]
    assert read_rows(path) == [*places, (f"{path}:4", {"id": "", "prompt": ""})]
    with pytest.raises(UserError, match=r"t.csv:3: the row has another number of columns"):
        read_table(path)
    (tmp_path / "t.json").write_text("[" * 100_000)
    for read in (read_rows, read_table):
        with pytest.raises(UserError, match=r"t.json: nested too deeply"):
            read(tmp_path / "t.json")


def test_files_of_one_name_are_told_apart(tmp_path):
    paths = [tmp_path / p for p in ("a/test.json", "b/test.json", "b/other.json")]
    for path in paths:
        path.parent.mkdir(exist_ok=True)
        path.write_text(LIST)
    assert file_names(paths) == ["a/test", "b/test", "other"]
    found = read_labelled(paths)
    assert len(found.rows) == 12
    assert list(found.keys) == list(found.counts) == ["a/test", "b/test", "other"]
    assert [r.id for r in found.rows[::4]] == ["a/test/0", "b/test/0", "other/0"]
    assert {r.slice for r in found.rows} == {"a/test", "b/test", "other"}

    def named(*names):
        return file_names([Path("/x") / n for n in names])

    assert named("a/t.json", "a/t.csv") == ["t.json", "t.csv"]
    assert named("a/1/t.json", "a/2/t.json", "b/1/t.json") == ["a/1/t", "a/2/t", "b/1/t"]
    assert named("a/t.json", "b/t.json", "a/t.csv") == ["a/t.json", "b/t.json", "a/t.csv"]
    assert named("t.json.gz") == ["t"]
    with pytest.raises(UserError, match="is given twice"):
        read_labelled([paths[0], paths[0]])


@pytest.mark.parametrize(
    ("path", "found"),
    [
        ("a", {"b": [{"c": 1}, {"c": 2}], "d.e": {"f": 3}}),
        ("a.b.1.c", 2),
        ("a.b.-1.c", 2),
        ("a.b.*.c", [1, 2]),
        ("a.d.e.f", 3),
        ("a.b.2.c", None),
        ("a.b.c", None),
        ("s.x.0", "in text"),
        ("n.x", None),
    ],
)
def test_paths(path, found):
    row = {"a": {"b": [{"c": 1}, {"c": 2}], "d.e": {"f": 3}}, "s": '{"x": ["in text"]}', "n": 1}
    assert at_path(row, path) == found


def nested(n):
    return {"task": {"text": f"q{n}"}, "outputs": [{"text": "x"}, {"text": "y"}],
            "results": [{"swap = False": {"winner": str(1 + n % 2)}}], "meta": {"topic": "ab"[n % 2]}}  # fmt: skip


def test_columns_inside_columns(tmp_path):
    path = tmp_path / "n.json"
    path.write_text(json.dumps([nested(n) for n in range(4)]))
    columns = parse_map(
        "prompt=task.text,first=outputs.0.text,second=outputs.1.text,label=results.0.swap = False.winner"
    )
    found = read_labelled([path], columns, by="meta.topic", also=["meta.topic"])
    assert [(r.prompt, r.first, r.second, r.label) for r in found.rows[:2]] == [
        ("q0", "x", "y", "first"),
        ("q1", "x", "y", "second"),
    ]
    assert [r.slice for r in found.rows] == ["a", "b", "a", "b"]
    assert found.rows[0].columns["meta.topic"] == "a"
    with pytest.raises(UserError, match=r"no column `labell`; it has .*has a path, for example label=results.0.winner"):
        read_labelled([path], columns | {"label": "labell"})
    with pytest.raises(UserError, match=r"no column `results.7.winner`"):
        read_labelled([path], columns | {"label": "results.7.winner"})


def test_a_cell_of_a_csv_file_may_hold_json(tmp_path):
    path = tmp_path / "n.csv"
    lines = [f'q,x,y,"{{""winner"": {1 + n % 2}}}"' for n in range(4)]
    path.write_text("\n".join(["prompt,first,second,result", *lines]))
    found = read_labelled([path], parse_map("label=result.winner"))
    assert [r.label for r in found.rows] == ["first", "second"] * 2


@pytest.mark.parametrize("read", [read_table, read_rows])
@pytest.mark.parametrize(
    ("content", "rows"), [("prompt,first\nq,{long}\n", 1), ("{long},first\n1,2\n", 1), ('"prompt,{long}\n', 0)]
)
def test_cells_of_any_length_are_read_also_in_the_first_line(tmp_path: Path, read, content: str, rows: int) -> None:
    csv.field_size_limit(131_072)  # as a fresh process has it
    path = tmp_path / "long.csv"
    path.write_text(content.replace("{long}", "x" * 200_000))
    assert len([*read(path)]) == rows
