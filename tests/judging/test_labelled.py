"""Labelled pairs of other people's making are read as they are, and never guessed at."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rlaif.constitutions.constitution import load_constitution
from rlaif.data.labelled import parse_map, read_labelled
from rlaif.data.sides import cell_lines
from rlaif.errors import UserError
from rlaif.records import digest
from tests.public_data import folder, needs

ROOT = Path(__file__).resolve().parents[2]


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
        ("e.json", "{}", "expected a list of rows, .* found an object with nothing in it"),
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


@needs("llmbar", "LLMBar's two sets are read as they are")
@needs("pandalm", "PandaLM's ties and disputed pairs are counted and left out")
def test_public_sets_are_read_as_they_are():
    llmbar = read_labelled([folder("llmbar") / f"{name}.json" for name in ("natural", "adv_neighbor")])
    assert [r.slice for r in llmbar.rows].count("natural") == 100
    assert len(llmbar.rows) == 234
    natural = [r for r in llmbar.rows if r.slice == "natural"]
    assert sum(r.longer == r.label for r in natural) == 56
    pandalm = read_labelled([folder("pandalm") / "data__testset-v1.json"])
    assert len(pandalm.rows) + pandalm.excluded["tie"] == 879
    assert pandalm.excluded == {"tie": 85, "disputed": 120}


def labels(tmp_path, values, columns=None):
    rows = [{"prompt": "q", "first": "a", "second": "b", "label": v} for v in values]
    return read_labelled([write(tmp_path / "l.jsonl", *rows)], parse_map(columns))


@pytest.mark.parametrize(
    ("values", "columns"),
    [
        ([0, 1, 0, "tie"], "first_is=0,second_is=1"),  # the usual words for a tie stay
        ([0, 1, 0, 2], "first_is=0,second_is=1,tie_is=2"),
        ([1, 2, 1, 0], "first_is=1,second_is=2"),
        ([1, 2, 1, 3], "tie_is=3"),
        ([1, -1, 1, 0], "first_is=1,second_is=-1,tie_is=0"),
        (["L", "R", "l", "even"], "first_is=L,second_is=R,tie_is=even"),
        (["model_1", "model_2", "A>>B", "tie (inconsistent)"], None),
    ],
)
def test_ties_beside_any_names(tmp_path, values, columns):
    found = labels(tmp_path, values, columns)
    assert [r.label for r in found.rows] == ["first", "second", "first"]
    assert found.excluded == {"tie": 1}
    assert sum(c.count for c in found.labels) == 4


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([0, 1, "tie"], "are 0 and 1; say which is which, for example --map first_is=0,second_is=1"),
        ([0, 1, 2], r"are 0 and 1 and 2; say which is which, for example --map first_is=0,second_is=1,tie_is=2"),
        ([0, 2], "are 0 and 2; say which"),
        ([1, -1], "are -1 and 1; say which is which, for example --map first_is=1,second_is=-1"),
        ([True, False], "found True, expected 1, 2 or 0"),
    ],
)
def test_numbers_that_projects_count_differently_are_not_guessed_at(tmp_path, values, message):
    with pytest.raises(UserError, match=message):
        labels(tmp_path, values)


def test_how_labels_were_read_is_one_line(tmp_path):
    found = labels(tmp_path, [1, 2, 1, "tie"])
    assert cell_lines(found.labels, "labels") == ["labels as read: 1→first 2, 2→second 1, tie→tie 1"]


def test_half_a_surrogate_pair_is_replaced(tmp_path):
    rows = [{"prompt": "q\ud800", "first": "a\udc00 \U0001f600", "second": "b", "label": 1}]
    (only,) = read_labelled([write(tmp_path / "l.jsonl", *rows)]).rows
    assert (only.prompt, only.first) == ("q\ufffd", "a\ufffd \U0001f600")
    assert digest([only.prompt, only.first])


def test_a_table_by_any_ending(tmp_path):
    text = "ID,Prompt,First,Second,Label\n1,q,a,b,1\n2,q,a,b,2\n"
    for name, written in (("a.CSV", text), ("b.tsv", text.replace(",", "\t"))):
        (tmp_path / name).write_text(written)
        assert [r.label for r in read_labelled([tmp_path / name]).rows] == ["first", "second"]
    (tmp_path / "c.csv").write_text(text.replace(",", ";"))
    with pytest.raises(UserError, match=r"c.csv:1: one column, `ID;Prompt;.*separate columns by commas, or by tabs"):
        read_labelled([tmp_path / "c.csv"])
    (tmp_path / "d.csv").write_bytes("prompt,first,second,label\ncafé,a,b,1\n".encode("latin-1"))
    with pytest.raises(UserError, match="save it as UTF-8"):
        read_labelled([tmp_path / "d.csv"])
    (tmp_path / "e.csv").write_text("prompt,first,first,label\nq,a,b,1\n")
    with pytest.raises(UserError, match=r"e.csv:1: two columns are called `first`"):
        read_labelled([tmp_path / "e.csv"])


@pytest.mark.parametrize(
    "text",
    [
        ",prompt,first,second,label\n0,q,a,b,1\n1,q,a,b,2\n",  # pandas' to_csv()
        "\ufeff,prompt,first,second,label,\n0,q,a,b,1,\n1,q,a,b,2,\n",
        "\ufeffprompt,first,second,label\nq,a,b,1\nq,a,b,2\n,,,\n,,,,\n",
        'prompt, first, second, label\nq, "a", b, 1\nq, a, b, 2\n',
    ],
)
def test_tables_as_pandas_and_spreadsheets_write_them(tmp_path, text):
    (tmp_path / "p.csv").write_text(text, encoding="utf-8")
    rows = read_labelled([tmp_path / "p.csv"]).rows
    assert [(r.key, r.prompt, r.first, r.second, r.label) for r in rows] == [
        ("0", "q", "a", "b", "first"), ("1", "q", "a", "b", "second")
    ]  # fmt: skip
    assert not rows[0].columns


def test_a_cell_keeps_its_first_space_and_a_row_its_number(tmp_path):
    (tmp_path / "p.csv").write_text('prompt,first,second,label,"a, b"\nq, a,b,1,\n,,,,\nq,a,b,2,\n')
    rows = read_labelled([tmp_path / "p.csv"]).rows
    assert [(r.key, r.first) for r in rows] == [("0", " a"), ("2", "a")]


def test_two_rows_of_one_id_are_both_named(tmp_path):
    with pytest.raises(UserError, match=r"b.jsonl:3: two rows have the id `r0` \(the first: .*b.jsonl:1\)"):
        read_labelled([write(tmp_path / "b.jsonl", row(0), row(1), row(0))])


def talk(*contents):
    return [{"role": ("user", "assistant")[n % 2], "content": c} for n, c in enumerate(contents)]


def test_conversations(tmp_path):
    one = {"conversation_a": talk("Why?", "So."), "conversation_b": talk("Why?", "Because."), "winner": "model_b",
           "question_id": "x"}  # fmt: skip
    two = one | {"question_id": "y", "conversation_a": talk("Why?", "So.", "And?", "No."),
                 "conversation_b": talk("Why?", "Thus.", "And?", "Yes.")}  # fmt: skip
    first, second = read_labelled([write(tmp_path / "c.jsonl", one, two)]).rows
    assert (first.id, first.prompt, first.first, first.second, first.label) == (
        "x",
        "Why?",
        "So.",
        "Because.",
        "second",
    )
    assert (second.prompt, second.first) == ("Why?", "Assistant: So.\n\nUser: And?\n\nAssistant: No.")
    shared = {"chosen": talk("Hi", "Hello", "Why?", "So."), "rejected": talk("Hi", "Hello", "Why?", "Because.")}
    (only,) = read_labelled([write(tmp_path / "d.jsonl", shared)]).rows
    assert (only.prompt, only.first) == ("User: Hi\n\nAssistant: Hello\n\nUser: Why?", "So.")
    (only,) = read_labelled([write(tmp_path / "e.jsonl", {"prompt": talk("Why?"), "chosen": talk("", "So.")[1:],
                                                          "rejected": talk("", "No.")[1:]})]).rows  # fmt: skip
    assert (only.prompt, only.first, only.second) == ("Why?", "So.", "No.")
    with pytest.raises(UserError, match=r"f.jsonl:1: chosen and rejected share no first message"):
        read_labelled([write(tmp_path / "f.jsonl", {"chosen": talk("x", "y"), "rejected": talk("z", "y")})])
    with pytest.raises(UserError, match=r"g.jsonl:1: rejected: expected messages with role and content"):
        read_labelled([write(tmp_path / "g.jsonl", {"chosen": talk("x", "y"), "rejected": "z"})])


def test_a_question_that_several_rows_are_about_names_none(tmp_path):
    pair = {"question_id": 80, "question": "q", "answer1": "a", "answer2": "b", "winner": "model_1"}
    assert [r.id for r in read_labelled([write(tmp_path / "q.jsonl", pair, pair)]).rows] == ["0", "1"]
    assert [r.id for r in read_labelled([write(tmp_path / "r.jsonl", pair)]).rows] == ["80"]


def test_a_column_for_each_winner(tmp_path):
    def arena(*hot):
        return {"id": str(hot), "prompt": "q", "response_a": "a", "response_b": "b",
                **dict(zip(("winner_model_a", "winner_model_b", "winner_tie"), hot, strict=True))}  # fmt: skip

    found = read_labelled([write(tmp_path / "a.jsonl", arena(1, 0, 0), arena(0, 1, 0), arena(0, 0, 1))])
    assert [r.label for r in found.rows] == ["first", "second"]
    assert found.excluded == {"tie": 1}
    with pytest.raises(UserError, match=r"a.jsonl:1: 2 of winner_model_a, winner_model_b, winner_tie are 1"):
        read_labelled([write(tmp_path / "a.jsonl", arena(1, 1, 0))])


@pytest.mark.parametrize("blank", [None, "", " ", float("nan")])
def test_blank_cells_stop_nothing(tmp_path, blank):
    rows = [
        row(0, principle=blank),
        row(1, label=blank),
        {"id": "r2", "instruction": "Do", "input": blank, "first": "a", "second": "b", "label": 1},
    ]
    found = read_labelled([write(tmp_path / "b.jsonl", *rows[:2])])
    assert [(r.id, r.slice, "principle" in r.columns) for r in found.rows] == [("r0", "b", False)]
    assert found.excluded == {"unlabelled": 1}
    assert found.keys == {"b": {"r0", "r1"}}
    assert read_labelled([write(tmp_path / "c.jsonl", rows[2])]).rows[0].prompt == "Do"
    with pytest.raises(UserError, match=r"no labelled pairs \(1 rows are ties, disputed or unlabelled\)"):
        read_labelled([write(tmp_path / "d.jsonl", rows[1])])


def test_annotators_who_said_nothing_do_not_dispute(tmp_path):
    rows = [{"prompt": "q", "first": "a", "second": "b", "annotator1": x, "annotator2": y}
            for x, y in ((1, None), (None, 2), (1, 2), (None, None))]  # fmt: skip
    found = read_labelled([write(tmp_path / "p.json", *rows)])
    assert [r.label for r in found.rows] == ["first", "second"]
    assert found.excluded == {"disputed": 1, "unlabelled": 1}
    hot = {"prompt": "q", "first": "a", "second": "b", "winner_model_b": 1}
    found = read_labelled([write(tmp_path / "a.jsonl", {"winner_model_a": 0} | hot,
                                 hot | {"winner_model_a": None, "winner_model_b": None})])  # fmt: skip
    assert found.excluded == {"unlabelled": 1}


@pytest.mark.parametrize(
    ("names", "columns"),
    [
        (("response_a", "response_b"), None),
        (("answer1", "answer2"), None),
        (("left", "right"), "first=left,second=right"),
        (("response2", "response1"), "first=response2,second=response1"),  # not by the number in the name
    ],
)
def test_a_label_may_be_the_answers_column(tmp_path, names, columns):
    rows = [{"prompt": "q", names[0]: "a", names[1]: "b", "winner": w} for w in (names[0], names[1].upper(), "tie")]
    found = read_labelled([write(tmp_path / "p.json", *rows)], parse_map(columns))
    assert [r.label for r in found.rows] == ["first", "second"]
    assert found.excluded == {"tie": 1}


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"annotator1": 2, "annotator2": 1}, "not from annotator1, annotator2"),
        ({"winner_model_a": 0, "winner_model_b": 1}, "not from winner_model_a, winner_model_b"),
    ],
)
def test_a_label_column_wins_over_annotators_and_says_so(tmp_path, more, said):
    path = write(tmp_path / "p.json", {"prompt": "q", "first": "a", "second": "b", "label": 1, **more})
    found = read_labelled([path])
    assert [r.label for r in found.rows] == ["first"]
    assert found.notes == (f"p.json: labels are from `label`, {said} (--map label=COLUMN names another column)",)
    assert not read_labelled([path], parse_map("label=label")).notes


def labelled_by(tmp_path, *rows, **more):
    rows = [{"prompt": "q", "first": "a", "second": "b", **r} for r in rows]
    return read_labelled([write(tmp_path / "p.json", *rows)], **more)


def by_three(*cells):
    return [{f"annotator{n}": c for n, c in enumerate(row, 1)} for row in cells]


SAID = by_three((1, 1, 1), (1, 1, 2), (2, 2, 0), (1, 2, 0), (0, 0, 1), (2, None, None), (1, 2, None))


def test_the_majority_of_annotators(tmp_path):
    found = labelled_by(tmp_path, *SAID, annotators="majority")
    assert [(r.key, r.label) for r in found.rows] == [("0", "first"), ("1", "first"), ("2", "second"), ("5", "second")]
    assert found.excluded == {"disputed": 2, "tie": 1}
    found = labelled_by(tmp_path, *SAID)
    assert [r.key for r in found.rows] == ["0", "5"]
    assert found.excluded == {"disputed": 5}


@pytest.mark.parametrize(
    ("rows", "columns"),
    [
        ([{"votes": [1, 1, 2]}, {"votes": [2, 2, 2]}], "label=votes"),
        ([{"a1": 1, "b1": 1, "c1": 2}, {"a1": 2, "b1": 2, "c1": 2}], "label=a1|b1|c1"),
        ([{"notes": [{"by": x, "label": v} for x, v in zip("abc", vs, strict=True)]} for vs in ((1, 1, 2), (2, 2, 2))],
         "label=notes.*.label"),
        ([{"rater_1": "A", "rater_2": "A", "rater_3": "B"}, {"rater_1": "B", "rater_2": "B", "rater_3": "B"}], ""),
    ],
)  # fmt: skip
def test_several_labels_in_other_forms(tmp_path, rows, columns):
    found = labelled_by(tmp_path, *rows, columns=parse_map(columns or None), annotators="majority")
    assert [r.label for r in found.rows] == ["first", "second"]
    found = labelled_by(tmp_path, *rows, columns=parse_map(columns or None))
    assert [r.label for r in found.rows] == ["second"]


def test_what_names_no_label_is_said_once(tmp_path):
    rows = [{"label": v} for v in (1, 2, 3, 1)]
    with pytest.raises(UserError, match=r"p.json: row 2: label: found 3, .*none_is=NAME for no label"):
        labelled_by(tmp_path, *rows)
    assert labelled_by(tmp_path, *rows, columns={"none_is": "3"}).excluded == {"unlabelled": 1}
    assert labelled_by(tmp_path, *rows, columns={"tie_is": "3"}).excluded == {"tie": 1}
    assert labelled_by(tmp_path, *rows, columns={"none_is": "3|4"}).excluded == {"unlabelled": 1}


@pytest.mark.parametrize(
    ("names", "columns"),
    [
        (("first_finish_reason", "second_finish_reason"), ""),
        (("first_finish", "second_finish"), ""),
        (("finish_reason_first", "finish_reason_second"), ""),
        (("how.a", "how.b"), "first_finish=how.a,second_finish=how.b"),
    ],
)
def test_how_the_answers_ended(tmp_path, names, columns):
    ends = [("stop", "length"), ("STOP", "MAX_TOKENS"), ("end_turn", "max_tokens"), (None, "")]
    rows = [{"label": 1, **dict(zip(names, pair, strict=True))} for pair in ends]
    found = labelled_by(tmp_path, *rows, columns=parse_map(columns or None))
    assert [(r.first_finish, r.second_finish) for r in found.rows] == [("stop", "length")] * 3 + [(None, None)]
    assert found.rows[0].ends == {"0-first": "stop", "0-second": "length"}
    with pytest.raises(UserError, match=r"row 0: .*: found 'perhaps', expected stop or length"):
        labelled_by(tmp_path, {"label": 1, **dict.fromkeys(names, "perhaps")}, columns=parse_map(columns or None))
    with pytest.raises(UserError, match="say it of both answers"):
        labelled_by(tmp_path, {"label": 1, "x": "stop"}, columns={"first_finish": "x"})


@pytest.mark.parametrize("a", ["output", "response", "answer"])
@pytest.mark.parametrize(("one", "two"), [("_1", "_2"), ("_a", "_b")])
def test_ends_go_by_the_answers_names(tmp_path, a, one, two):
    row = {"prompt": "q", "label": 1, f"{a}{one}": "x", f"{a}{two}": "y",
           f"finish_reason{one}": "stop", f"finish_reason{two}": "length"}  # fmt: skip
    (found,) = read_labelled([write(tmp_path / "p.json", row)]).rows
    assert (found.first_finish, found.second_finish) == ("stop", "length")


HH = "\n\nHuman: What is bread?\n\nAssistant: Food.\n\nHuman: Of what?\n\nAssistant:"


def test_a_transcript_in_one_string(tmp_path):
    rows = [{"chosen": f"{HH} Flour.\n\nAnd water.", "rejected": f"{HH} Stones."},
            {"chosen": "\n\nHuman: Hi\n\nAssistant: Hello.", "rejected": "\n\nHuman: Hi\n\nAssistant:"}]  # fmt: skip
    first, second = read_labelled([write(tmp_path / "hh.jsonl", *rows)]).rows
    assert (first.first, first.second, first.label) == ("Flour.\n\nAnd water.", "Stones.", "first")
    assert first.prompt == "User: What is bread?\n\nAssistant: Food.\n\nUser: Of what?"
    assert [(m.role, m.content) for m in first.messages] == [
        ("user", "What is bread?"), ("assistant", "Food."), ("user", "Of what?")
    ]  # fmt: skip
    assert (second.prompt, second.first, second.second) == ("Hi", "Hello.", "")
    # What begins like one and isn't, is text.
    plain = {"prompt": "q", "chosen": "Human: a word", "rejected": "b"}
    assert read_labelled([write(tmp_path / "p.json", plain)]).rows[0].first == "Human: a word"


def test_a_prompt_that_is_a_chat_stays_one(tmp_path):
    chat = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}]
    (found,) = labelled_by(tmp_path, {"prompt": chat, "label": 1}).rows
    assert [m.role for m in found.messages] == ["system", "user"]
    talk = [{"from": "human", "value": "Hi"}]
    rows = {"chosen": [*talk, {"from": "gpt", "value": "Yes"}], "rejected": [*talk, {"from": "gpt", "value": "No"}]}
    (found,) = read_labelled([write(tmp_path / "s.json", rows)]).rows
    assert (found.prompt, found.first, [m.role for m in found.messages]) == ("Hi", "Yes", ["user"])
    (found,) = labelled_by(tmp_path, {"label": 1}).rows
    assert found.messages == ()


@needs("pandalm", "two of three annotators make 894 labels")
def test_the_majority_of_pandalms_annotators():
    """999 rows: 794 unanimous pairs with a better side, and those on which two of three agree."""
    found = read_labelled([folder("pandalm") / "data__testset-v1.json"], annotators="majority")
    assert (len(found.rows), found.excluded) == (894, {"tie": 105})


def test_ids_that_are_not_unique_can_be_left_out(tmp_path):
    rows = [{"id": "same", "label": 1}, {"id": "same", "label": 2}]
    with pytest.raises(UserError, match=r"two rows have the id `same` .*id= for row numbers"):
        labelled_by(tmp_path, *rows)
    assert [r.key for r in labelled_by(tmp_path, *rows, columns=parse_map("id=")).rows] == ["0", "1"]  # as it says


def test_a_system_prompt_of_its_own(tmp_path):
    (found,) = labelled_by(tmp_path, {"label": 1, "system_prompt": "Be kind."}).rows
    assert [(m.role, m.content) for m in found.messages] == [("system", "Be kind."), ("user", "q")]
    other = labelled_by(tmp_path, {"label": 1, "system": "model-7b"})
    assert other.rows[0].messages == ()
    assert other.notes == ("p.json: `system` is not shown to a judge (--map system=system shows it)",)
    (found,) = labelled_by(tmp_path, {"label": 1, "system": "Be kind."}, columns=parse_map("system=system")).rows
    assert found.messages[0].content == "Be kind."


def test_answers_that_share_no_message_need_a_prompt(tmp_path):
    rows = {"chosen": [{"role": "assistant", "content": "Yes"}], "rejected": [{"role": "assistant", "content": "No"}],
            "ask": "Well?"}  # fmt: skip
    path = write(tmp_path / "p.json", rows)
    with pytest.raises(UserError, match=r"share no first message to be the prompt; --map prompt=COLUMN names it"):
        read_labelled([path])
    (found,) = read_labelled([path], parse_map("prompt=ask")).rows
    assert (found.prompt, found.first) == ("Well?", "Yes")
