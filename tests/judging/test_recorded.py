"""Recorded votes find their pairs, keep what was said, and are never taken for votes on other pairs."""

from __future__ import annotations

import gzip
import json

import pytest

from rlaif.data.labelled import Labelled, read_labelled
from rlaif.data.recorded import join_recorded, parse_votes_map, parse_where, read_recorded, read_votes_log
from rlaif.data.sides import cell_lines
from rlaif.errors import UserError
from tests.judging.vote_makers import make_vote
from tests.public_data import folder, needs


def labelled(n, label="first", file="easy", **columns):
    return Labelled(id=f"{file}/{n}", key=str(n), file=file, slice=file, prompt="x", first="a", second="b", label=label,
                    columns=columns)  # fmt: skip


ROWS = [labelled(0), labelled(1, "second")]


def csv_file(tmp_path, head, *lines):
    path = tmp_path / "votes.csv"
    path.write_text("\n".join([head, *lines]) + "\n")
    return path


def said(votes):
    return [(v.ballot.pair_id, v.ballot.judge, v.ballot.voice, v.ballot.order, v.outcome) for v in votes]


def test_both_orders_in_one_row(tmp_path):
    head = "row,judge,strategy,label,winner_ab,winner_ba_mapped"
    path = csv_file(tmp_path, head, "0,J,plain,1,1,2", "1,J,plain,2,,2")
    rows, votes = read_recorded(path, ROWS)[:2]
    assert said(votes) == [
        ("easy/0", "J", "plain", "forward", "first"),
        ("easy/0", "J", "plain", "reversed", "second"),
        ("easy/1", "J", "plain", "forward", "abstain"),
        ("easy/1", "J", "plain", "reversed", "second"),
    ]
    assert votes[2].abstain_reason == "unparsed"
    assert {v.attempts for v in votes} == {0}
    assert rows == ROWS


def test_a_second_order_that_names_slots_is_mapped_back(tmp_path):
    path = csv_file(tmp_path, "id,winner_ab,winner_ba", "0,A,A", "1,tie,b")
    _, votes = read_recorded(path, ROWS)[:2]
    assert [(j, o, out) for _, j, _, o, out in said(votes)] == [
        ("votes", "forward", "first"), ("votes", "reversed", "second"),
        ("votes", "forward", "tie"), ("votes", "reversed", "first"),
    ]  # fmt: skip


def test_one_row_a_vote(tmp_path):
    path = csv_file(tmp_path, "id,order,verdict", "0,forward,first", "0,reversed,no idea")
    rows, votes = read_recorded(path, ROWS)[:2]
    assert [v.outcome for v in votes] == ["first", "abstain"]
    assert votes[1].raw_reply == "no idea"
    assert rows == ROWS[:1]


def test_one_result_column_by_any_name(tmp_path):
    path = tmp_path / "gpt.json"
    path.write_text(json.dumps([{"idx": 0, "gpt_result": "1"}, {"idx": 1, "gpt_result": "garbage"}]))
    _, votes = read_recorded(path, ROWS)[:2]
    assert [(v.ballot.judge, v.outcome) for v in votes] == [("gpt", "first"), ("gpt", "abstain")]


def test_a_map_for_unusual_names(tmp_path):
    path = csv_file(tmp_path, "n,who,how,x,y", "0,J,plain,1,1")
    columns = parse_votes_map("id=n,judge=who,voice=how,forward=x,reversed=y")
    assert [v.ballot.order for v in read_recorded(path, ROWS, columns).votes] == ["forward", "reversed"]


def test_files_are_kept_apart_by_the_column_that_names_them(tmp_path):
    path = csv_file(tmp_path, "subset,row,judge,winner_ab", "easy,0,J,1", "hard,0,J,2", "other,0,J,2")
    rows = [labelled(0), labelled(0, file="hard")]
    assert [v.outcome for v in read_recorded(path, rows)[1]] == ["first", "second"]
    assert [v.outcome for v in read_recorded(path, rows[:1])[1]] == ["first"]


def pairs_and_votes(tmp_path, own, theirs):
    rows = [{own: n, "prompt": f"q{n}", "first": "x", "second": "y", "label": 1 + n % 2} for n in range(1, 7)]
    (tmp_path / "p.json").write_text(json.dumps(rows))
    lines = [f"{n},{1 + n % 2}" for n in range(1, 7)]
    return read_labelled([tmp_path / "p.json"]).rows, csv_file(tmp_path, f"{theirs},winner_ab", *lines)


@pytest.mark.parametrize("column", ["id", "pair_id", "idx", "index", "row"])
def test_both_files_call_a_pair_by_the_same_column(tmp_path, column):
    rows, path = pairs_and_votes(tmp_path, column, column)
    voted, votes = read_recorded(path, rows)[:2]
    assert [v.outcome for v in votes] == [r.label for r in voted]
    assert len(voted) == 6


def test_numbers_of_another_column_are_not_taken_for_ids(tmp_path):
    rows, path = pairs_and_votes(tmp_path, "number", "pair_id")  # from 0 here, from 1 there
    with pytest.raises(UserError, match=r"`pair_id` 6 is no labelled pair's row number; .*--votes-map id=pair_id"):
        read_recorded(path, rows)
    rows, path = pairs_and_votes(tmp_path, "pair_id", "row")
    assert len(read_recorded(path, rows)[0]) == 6


def test_where_narrows_votes_and_pairs(tmp_path):
    path = csv_file(tmp_path, "row,judge,strategy,winner_ab", "0,J,a,1", "0,J,b,2", "0,K,a,2", "1,J,a,1")
    rows = [labelled(0, topic="maths"), labelled(1, topic="chat")]

    def found(*conditions):
        return [(v.ballot.pair_id[-1], v.ballot.judge, v.ballot.voice)
                for v in read_recorded(path, rows, where=parse_where(conditions))[1]]  # fmt: skip

    assert found("judge=J", "strategy=a") == [("0", "J", "a"), ("1", "J", "a")]
    assert parse_where(["a=b,c=d"]) == {"a": {"b,c=d"}}
    assert found("judge=J", "judge=K", "topic=maths") == [("0", "J", "a"), ("0", "J", "b"), ("0", "K", "a")]


@pytest.mark.parametrize(
    ("lines", "where", "message"),
    [
        (["row,winner_ab", "0,1", "0,2"], [], "votes.csv:3: a second vote of votes/recorded on easy/0"),
        (["row,judge,winner_ab,run", "0,J,1,a", "0,J,1,b"], [], r"narrow with --where COLUMN=VALUE \(run\)"),
        (["row,label,winner_ab", "0,2,1"], [], "votes.csv:2: the label of easy/0 is 2 here and first"),
        (["row,winner_ab", "7,1"], [], "no vote is on a labelled pair"),
        (["row,winner_ab", "0,1"], ["judge=J"], "no row has --where judge=J; there is votes"),
        (
            ["row,winner_ab", "0,1"],
            ["topic=a"],
            "--where topic=...: no such column; there is judge, row, voice, winner_ab",
        ),
        (["row,winner_ab", "0,1"], ["judge"], "--where judge: expected COLUMN=VALUE"),
        (["a,b", "0,1"], [], "which column is the forward.*--votes-map forward=COLUMN"),
        (["a,winner", "0,1"], [], "which column is the id.*--votes-map id=COLUMN"),
        (["id,b", "0,1"], [], "which column is the forward"),
        (["row,order,winner", "0,up,1"], [], "order: found 'up', expected forward or reversed"),
        (["row,winner"], [], "no recorded votes"),
    ],
)
def test_what_does_not_fit_is_one_line(tmp_path, lines, where, message):
    with pytest.raises(UserError, match=message) as e:
        read_recorded(csv_file(tmp_path, *lines), ROWS, where=parse_where(where))
    assert "\n" not in str(e.value)


def test_a_log_of_votes(tmp_path):
    path = tmp_path / "votes.jsonl"
    votes = [make_vote(o, n, 0.75, voice="v").model_copy() for n, o in enumerate(("first", "second"))]
    path.write_text("".join(v.model_dump_json() + "\n" for v in votes))
    assert read_votes_log(path) == votes
    rows = [labelled(0).model_copy(update={"id": "p"}), labelled(1)]
    assert read_recorded(path, rows)[:2] == (rows[:1], votes)
    path.write_text('{"ballot": {}}\n')
    with pytest.raises(UserError, match=r"votes.jsonl:1: ballot.id: Field required"):
        read_votes_log(path)
    path.write_text(votes[0].model_dump_json() + "\n{")
    with pytest.raises(UserError, match=r"votes.jsonl:2: row: Invalid JSON"):
        read_recorded(path, rows)
    with pytest.raises(UserError, match=r"gone.jsonl: can't read the votes"):
        read_recorded(tmp_path / "gone.jsonl", rows)


def test_the_log_of_a_newer_run_is_read(tmp_path):
    vote = make_vote("first", 0, 0.75, voice="v")
    path = tmp_path / "votes.jsonl"
    path.write_text(json.dumps(vote.model_dump(mode="json") | {"mood": "good"}) + "\n")
    assert read_votes_log(path) == [vote]


@needs("pandalm", "GPT-3.5 and PandaLM-7B are right on 628 and 574 of 794 pairs, as recorded")
@pytest.mark.parametrize(("judge", "right", "unparsed"), [("gpt-3.5-turbo", 628, 8), ("pandalm-7b", 574, 0)])
def test_pandalm_verdicts_as_they_are(judge, right, unparsed):
    rows = read_labelled([folder("pandalm") / "data__testset-v1.json"]).rows
    voted, votes = read_recorded(folder("pandalm") / f"data__{judge}-testset-v1.json", rows)[:2]
    assert len(voted) == len(votes) == 794
    assert sum(v.outcome == r.label for v, r in zip(votes, voted, strict=True)) == right
    assert sum(v.abstain_reason == "unparsed" for v in votes) == unparsed


TRUTH = [1 + n % 2 for n in range(12)]
VOTED = [w if n % 4 else 3 - w for n, w in enumerate(TRUTH)]  # right on 9 of 12
MORE = [labelled(n, "first" if w == 1 else "second") for n, w in enumerate(TRUTH)]
KEYS = {"easy": {str(n) for n in range(12)}}


def table(tmp_path, *rows):
    path = tmp_path / "t.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def right(found):
    sides = {r.id: r.label for r in found.rows}
    return sum(v.outcome == sides[v.ballot.pair_id] for v in found.votes), len(found.votes)


@pytest.mark.parametrize(
    ("words", "columns"),
    [
        ((1, 2), ""),
        (("model_1", "model_2"), ""),
        (("A>>B", "B>>A"), ""),
        (("A>B", "b>a"), ""),
        (("Output (a)", "Output (b)"), ""),
        ((0, 1), "first_is=0,second_is=1"),
        ((1, 0), "first_is=1,second_is=0"),
        ((True, False), "first_is=true,second_is=false"),
        ((1, -1), "first_is=1,second_is=-1"),
        (("L", "R"), "first_is=l,second_is=r"),
    ],
)
def test_every_way_to_name_a_side_gives_the_same_votes(tmp_path, words, columns):
    path = table(tmp_path, *({"id": n, "winner": words[v - 1]} for n, v in enumerate(VOTED)))
    found = read_recorded(path, MORE, parse_votes_map(columns or None))
    assert right(found) == (9, 12)
    assert {(c.value, c.outcome) for c in found.cells} == {(str(words[0]), "first"), (str(words[1]), "second")}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((0, 1), r"the winners in `winner` are 0 and 1; say which is which, .*--votes-map first_is=0,second_is=1"),
        ((1.0, 0.0), "are 0 and 1; say which"),
        ((0, 1, 2), "are 0 and 1 and 2; say which is which, .*,tie_is=2"),
        ((1, -1), "are -1 and 1; say which is which, .*first_is=1,second_is=-1"),
        ((True, False), "no cell of `winner` names a side; found '(True|False)'"),
        (("gpt", "claude"), "no cell of `winner` names a side"),
        ((0.9, 0.1), "no cell of `winner` names a side"),
        ((None, ""), "no cell of `winner` names a side"),
    ],
)
def test_words_that_name_no_side_for_sure_are_refused(tmp_path, words, message):
    path = table(tmp_path, *({"id": n, "winner": words[n % len(words)]} for n in range(12)))
    with pytest.raises(UserError, match=message) as e:
        read_recorded(path, MORE)
    assert "\n" not in str(e.value)


def test_ties_and_what_is_not_read_are_told_apart_and_counted(tmp_path):
    words = ["draw", "neither", "tie (bothbad)", "Tie (inconsistent)", "error", "error", None, *VOTED[7:]]
    found = read_recorded(table(tmp_path, *({"id": n, "winner": w} for n, w in enumerate(words))), MORE)
    assert [v.outcome for v in found.votes[:7]] == ["tie"] * 4 + ["abstain"] * 3
    assert {(c.value, c.count) for c in found.cells if c.outcome == "abstain"} == {("error", 2), ("", 1)}
    lines = cell_lines(found.cells, "recorded winners")
    assert lines[1] == "recorded winners that name no side, counted as abstentions: 'error' 2, empty 1"


def test_two_games_of_fastchat(tmp_path):
    rows = ({"id": n, "g1_winner": f"model_{v}", "g2_winner": f"model_{w}"}
            for n, (v, w) in enumerate(zip(VOTED, TRUTH, strict=True)))  # fmt: skip
    found = read_recorded(table(tmp_path, *rows), MORE)
    assert right(found) == (21, 24)
    assert [v.ballot.order for v in found.votes[:2]] == ["forward", "reversed"]


@pytest.mark.parametrize("orders", [("forward", "reversed"), ("ab", "BA"), ("original", "swapped"), (0, 1),
                                    (False, True)])  # fmt: skip
@pytest.mark.parametrize(
    ("slots", "columns"),
    [(False, "order=o,forward=w"), (True, "order=o,reversed_slots=w"), (True, "order=o,forward=w,reversed_slots=w")],
)
def test_an_order_column_names_sides_or_slots(tmp_path, orders, slots, columns):
    rows = []
    for n, v in enumerate(VOTED):
        rows += [{"id": n, "o": orders[0], "w": v}, {"id": n, "o": orders[1], "w": 3 - v if slots else v}]
    found = read_recorded(table(tmp_path, *rows), MORE, parse_votes_map(columns))
    assert right(found) == (18, 24)
    assert [v.ballot.order for v in found.votes[:2]] == ["forward", "reversed"]


def test_row_numbers_from_one_are_refused(tmp_path):
    path = table(tmp_path, *({"row": n + 1, "winner": v} for n, v in enumerate(VOTED)))
    for columns in ({}, {"id": "row"}):
        with pytest.raises(UserError, match=r"t.jsonl:12: `row` is 12, and the labelled file's rows .* from 0 to 11"):
            read_recorded(path, MORE, columns, keys=KEYS)
    # A row that was left out for its tie is still a row.
    path = table(tmp_path, *({"row": n, "winner": v} for n, v in enumerate(VOTED)))
    assert len(read_recorded(path, MORE[:-1], keys=KEYS).rows) == 11


def test_an_id_of_a_row_that_was_left_out_is_known(tmp_path):
    rows = [{"id": n, "prompt": "q", "first": "x", "second": "y", "label": (1, 2, "tie")[n]} for n in range(3)]
    (tmp_path / "p.json").write_text(json.dumps(rows))
    found = read_labelled([tmp_path / "p.json"])
    path = csv_file(tmp_path, "pair_id,winner", "0,1", "1,2", "2,1")
    assert len(read_recorded(path, found.rows, keys=found.keys).rows) == 2


def test_what_is_left_out_is_counted(tmp_path):
    path = table(tmp_path, *({"id": n, "winner": 1} for n in (0, 1, 11, 77, 78)))
    named = [r.model_copy(update={"id_column": "id"}) for r in MORE[:10]]
    found = read_recorded(path, named, keys=KEYS)
    assert (len(found.rows), found.unvoted, found.strangers) == (2, 8, 2)


@pytest.mark.parametrize(
    ("rows", "columns", "message"),
    [
        ([{"id": 0, "winner": 1}, {"id": 1}], "", "t.jsonl:2: no `winner`; write null where there is nothing"),
        ([{"id": 0, "winner": 1, "judge": "J"}, {"id": 1, "winner": 1}], "", "t.jsonl:2: no `judge`"),
        ([{"id": 0, "winner": 1}, {"winner": 1}], "", "t.jsonl:2: no `id`"),
        ([{"id": 0, "w": 1}], "forward=w,first_is=1", "--votes-map: name both sides"),
        ([{"id": 0, "w": 1}], "forward=w,first_is=1,second_is=1", "--votes-map: name both sides"),
    ],
)
def test_a_row_that_lacks_something_is_named(tmp_path, rows, columns, message):
    with pytest.raises(UserError, match=message):
        read_recorded(table(tmp_path, *rows), MORE, parse_votes_map(columns or None))


def test_a_condition_that_no_vote_fits_lists_what_there_is(tmp_path):
    path = csv_file(tmp_path, "row,judge,winner", "0,GPT-4,1", "1,ChatGPT,1")
    with pytest.raises(UserError, match=r"no row has --where judge=gpt4; there is ChatGPT, GPT-4"):
        read_recorded(path, ROWS, where=parse_where(["judge=gpt4"]))


IDS = [labelled(n, "first" if w == 1 else "second").model_copy(update={"id_column": "id"}) for n, w in enumerate(TRUTH)]


def running(**more):
    """Votes on the twelve pairs, last pair first, numbered by themselves."""
    return [{"id": n, "pair_id": 11 - n, "winner": VOTED[11 - n], **more} for n in range(12)]


def test_a_votes_own_number_is_not_taken_for_the_pairs_id(tmp_path):
    path = table(tmp_path, *running())
    assert right(read_recorded(path, IDS, keys=KEYS)) == (9, 12)
    assert right(read_recorded(path, IDS, {"id": "id"}, keys=KEYS)) == (3, 12)  # as asked for
    # Neither is the pandas index, nor any other column than the labelled file's own.
    rows = [{("index" if k == "id" else k): v for k, v in r.items()} for r in running()]
    by_index = [r.model_copy(update={"id_column": "index"}) for r in MORE]
    assert right(read_recorded(table(tmp_path, *rows), by_index, keys=KEYS)) == (9, 12)
    rows = [{("idx" if k == "pair_id" else k): v for k, v in r.items()} for r in running()]
    by_idx = [r.model_copy(update={"id_column": "idx"}) for r in MORE]
    assert right(read_recorded(table(tmp_path, *rows), by_idx, keys=KEYS)) == (9, 12)


def test_both_files_have_an_id_and_a_pair_id(tmp_path):
    rows = [r.model_copy(update={"columns": {"pair_id": f"p{n}"}}) for n, r in enumerate(IDS)]
    agreeing = [{"id": n, "pair_id": f"p{n}", "winner": v} for n, v in enumerate(VOTED)]
    assert right(read_recorded(table(tmp_path, *agreeing), rows, keys=KEYS)) == (9, 12)
    with pytest.raises(UserError, match=r"t.jsonl:1: `pair_id` is 11 here, and p0 on the .* --votes-map id=pair_id"):
        read_recorded(table(tmp_path, *running()), rows, keys=KEYS)
    assert right(read_recorded(table(tmp_path, *running()), rows, {"id": "id"}, keys=KEYS)) == (3, 12)


@pytest.mark.parametrize("column", ["item_id", "idx", "pair", "pairId"])
def test_another_column_that_fits_better_is_named(tmp_path, column):
    votes = [{"id": n, column: n // 3, "judge": "JKL"[n % 3], "winner": VOTED[n // 3]} for n in range(36)]
    path = table(tmp_path, *votes)
    with pytest.raises(UserError, match=rf"24 of 36 votes .*`id`.*--votes-map id={column} \(or id=id\)") as e:
        read_recorded(path, IDS, keys=KEYS)
    assert "\n" not in str(e.value)
    assert right(read_recorded(path, IDS, {"id": column}, keys=KEYS)) == (27, 36)
    assert read_recorded(path, IDS, {"id": "id"}, keys=KEYS).strangers == 24
    # Few strangers, or a column that fits no better, are no reason.
    assert read_recorded(table(tmp_path, *votes[:13]), IDS, keys=KEYS).strangers == 1
    assert read_recorded(table(tmp_path, *({**v, column: "?"} for v in votes)), IDS, keys=KEYS).strangers == 24


def note(found):
    return " ".join(found.notes)


@pytest.mark.parametrize("names", [("order", "ab", "ba"), ("swapped", False, True), ("swapped", "0", "1")])
def test_how_the_second_order_was_read_is_said(tmp_path, names):
    order, ab, ba = names
    rows = [{"id": n, order: o, "winner": "A"} for n in range(6) for o in (ab, ba)]
    found = read_recorded(table(tmp_path, *rows), MORE)
    assert [v.ballot.order for v in found.votes[:2]] == ["forward", "reversed"]
    assert found.notes == (
        "second order read as mapped back; --votes-map reversed_slots=winner if its cells name slots",
    )
    found = read_recorded(table(tmp_path, *rows), MORE, parse_votes_map("reversed_slots=winner"))
    assert found.notes == ("second order read as naming slots, and turned round; --votes-map reversed=winner if not",)
    assert cell_lines(found.cells, "recorded winners") == ["recorded winners as read: A→first 6, A→second 6"]
    assert not read_recorded(table(tmp_path, *rows[::2]), MORE).notes


def test_the_second_orders_column_says_how_it_is_read(tmp_path):
    path = csv_file(tmp_path, "id,g1_winner,g2_winner", "0,model_1,model_1")
    found = read_recorded(path, ROWS)
    assert [v.outcome for v in found.votes] == ["first", "first"]
    assert "--votes-map reversed_slots=g2_winner if" in note(found)
    found = read_recorded(path, ROWS, parse_votes_map("reversed_slots=g2_winner"))  # as it says
    assert [v.outcome for v in found.votes] == ["first", "second"]
    assert not read_recorded(csv_file(tmp_path, "id,winner_ab,winner_ba_mapped", "0,1,1"), ROWS).notes
    assert "reversed=winner_ba if not" in note(
        read_recorded(csv_file(tmp_path, "id,winner_ab,winner_ba", "0,1,1"), ROWS)
    )


@pytest.mark.parametrize("column", ["sample", "sample_index", "sample_id"])
@pytest.mark.parametrize(("cells", "numbers"), [((0, 1, 2), [0, 1, 2]), ((1, 2, 3), [1, 2, 3]), ("abc", [0, 1, 2])])
def test_samples_of_one_question(tmp_path, column, cells, numbers):
    rows = [{"id": n, column: c, "winner": v} for n, v in enumerate(VOTED) for c in cells]
    found = read_recorded(table(tmp_path, *rows), MORE)
    assert [v.ballot.sample_index for v in found.votes[:3]] == numbers
    assert len({v.ballot.id for v in found.votes}) == len(found.votes) == 36
    found = read_recorded(table(tmp_path, *rows), MORE, where=parse_where([f"{column}={cells[1]}"]))
    assert {v.ballot.sample_index for v in found.votes} == {0}


def test_a_column_of_running_numbers_is_no_sample(tmp_path):
    rows = [{"id": n // 2, "sample_id": n, "order": "ab" if n % 2 else "ba", "winner": 1} for n in range(24)]
    assert {v.ballot.sample_index for v in read_recorded(table(tmp_path, *rows), MORE).votes} == {0}
    rows = [{"id": n // 2, "sample_id": n, "run": n % 2, "winner": 1} for n in range(24)]
    with pytest.raises(UserError, match=r"t.jsonl:2: a second vote .* \(sample_id, run\), or say .*--votes-map "
                                        r"sample=COLUMN, voice=COLUMN or order=COLUMN") as e:  # fmt: skip
        read_recorded(table(tmp_path, *rows), MORE)
    assert "\n" not in str(e.value)
    found = read_recorded(table(tmp_path, *rows), MORE, parse_votes_map("sample=run"))
    assert [v.ballot.sample_index for v in found.votes[:2]] == [0, 1]


def test_a_vote_may_name_the_answers_column(tmp_path):
    rows = [{"id": n, "prompt": "q", "left": "x", "right": "y", "label": w} for n, w in enumerate(TRUTH)]
    (tmp_path / "p.json").write_text(json.dumps(rows))
    found = read_labelled([tmp_path / "p.json"], {"first": "left", "second": "right"})
    path = table(tmp_path, *({"id": n, "label": ("left", "right")[w - 1], "winner": ("Left", "Right")[v - 1]}
                             for n, (v, w) in enumerate(zip(VOTED, TRUTH, strict=True))))  # fmt: skip
    assert right(read_recorded(path, found.rows, keys=found.keys)) == (9, 12)


@pytest.mark.parametrize(
    ("stray", "known"),
    [(3, "1, 2"), ("-1.5", "1, 2"), ("D", "1, 2"), ("[[D]]", "1, 2"), ("model_c", "1, 2"), ("Output (d)", "1, 2")],
)
def test_a_code_that_is_neither_side_is_no_abstention(tmp_path, stray, known):
    words = [*VOTED[:5], stray, *VOTED[6:]]
    path = table(tmp_path, *({"id": n, "winner": w} for n, w in enumerate(words)))
    with pytest.raises(UserError, match=r"t.jsonl:6: winner: found .*, which is neither side \(1, 2\); .*tie_is=") as e:
        read_recorded(path, MORE)
    assert "\n" not in str(e.value)
    for key, outcome in (("tie_is", "tie"), ("none_is", "abstain")):  # as it says
        found = read_recorded(path, MORE, parse_votes_map(f"{key}={stray}"))
        assert [v.outcome for v in found.votes][5] == outcome
        assert sum(c.count for c in found.cells if c.outcome == outcome) == 1


def test_a_failure_written_as_a_number_is_named(tmp_path):
    path = table(tmp_path, *({"id": n, "winner": w} for n, w in enumerate([*VOTED[:11], -1])))
    with pytest.raises(UserError, match=r"are -1 and 1 and 2; .*--votes-map first_is=1,second_is=2,none_is=-1"):
        read_recorded(path, MORE)
    found = read_recorded(path, MORE, parse_votes_map("first_is=1,second_is=2,none_is=-1"))
    assert [v.outcome for v in found.votes][11] == "abstain"
    many = table(tmp_path, *({"id": n, "winner": w} for n, w in enumerate([*VOTED[:9], 3, 4, "5"])))
    assert right(read_recorded(many, MORE, parse_votes_map("none_is=3|4|5")))[1] == 12


def as_labelled(tmp_path, **more):
    rows = [{"prompt": f"q{n}", "first": f"x{n}", "second": f"y{n}", "label": w, **more} for n, w in enumerate(TRUTH)]
    (tmp_path / "p.json").write_text(json.dumps(rows))
    return read_labelled([tmp_path / "p.json"])


def read(path, found, columns="", **more):
    return read_recorded(
        path, found.rows, parse_votes_map(columns or None), keys=found.keys, counts=found.counts, **more
    )


def test_votes_without_an_id_are_read_in_row_order(tmp_path):
    labelled_ = as_labelled(tmp_path)
    found = read(table(tmp_path, *({"winner": v} for v in VOTED)), labelled_)
    assert right(found) == (9, 12)
    assert found.notes == ("t.jsonl: votes without an id, read in row order",)
    (tmp_path / "bare.json").write_text(json.dumps([["A", "B"][v - 1] for v in VOTED]))
    assert right(read(tmp_path / "bare.json", labelled_)) == (9, 12)
    (tmp_path / "bare.jsonl").write_text("".join(f"{v}\n" for v in VOTED))
    assert right(read(tmp_path / "bare.jsonl", labelled_)) == (9, 12)
    two = [{"judge": j, "winner": v if j == "K" else t} for j in "JK" for v, t in zip(VOTED, TRUTH, strict=True)]
    assert right(read(table(tmp_path, *two), labelled_)) == (21, 24)
    orders = [{"order": o, "winner": v} for v in VOTED for o in ("ab", "ba")]
    assert right(read(table(tmp_path, *orders), labelled_)) == (18, 24)
    with pytest.raises(UserError, match=r"which column is the id.* must be as many as the labelled .*: 11 here, p 12 "):
        read(table(tmp_path, *({"winner": v} for v in VOTED[:11])), labelled_)


def test_row_order_counts_rows_that_were_left_out(tmp_path):
    rows = [{"prompt": "q", "first": "x", "second": "y", "label": w} for w in (1, "tie", 2)]
    (tmp_path / "p.json").write_text(json.dumps(rows))
    found = read(table(tmp_path, *({"winner": v} for v in (1, 1, 2))), read_labelled([tmp_path / "p.json"]))
    assert right(found) == (2, 2)
    assert found.strangers == 0


def test_votes_in_row_order_that_repeat_the_answers_must_be_on_these(tmp_path):
    labelled_ = as_labelled(tmp_path)

    def votes(*answers):
        return table(
            tmp_path, *({"first": a, "second": b, "winner": v} for (a, b), v in zip(answers, VOTED, strict=True))
        )

    same = [(f"x{n}", f"y{n}") for n in range(12)]
    assert right(read(votes(*same), labelled_)) == (9, 12)
    with pytest.raises(UserError, match=r"t.jsonl:1: the answers are others than those of labelled row 0"):
        read(votes(*same[1:], same[0]), labelled_)
    turned = votes(*((b, a) for a, b in same))
    with pytest.raises(UserError, match=r"the other way round .*--votes-reversed FILE"):
        read(turned, labelled_)
    (tmp_path / "forward.json").write_text(json.dumps([{"winner": v} for v in VOTED]))
    found = read(tmp_path / "forward.json", labelled_, second=turned)  # as it says
    assert len(found.votes) == 24


@pytest.mark.parametrize("with_id", [True, False])
@pytest.mark.parametrize(
    ("name", "slots", "columns"),
    [
        ("winner", True, ""),
        ("winner", False, "reversed=winner"),
        ("winner", True, "reversed_slots=winner"),
        ("winner_ba", True, ""),
        ("winner_ba_mapped", False, ""),
        ("says", True, "forward=says"),
        ("says", False, "forward=winner,reversed=says"),
    ],
)
def test_each_order_in_a_file_of_its_own(tmp_path, with_id, name, slots, columns):
    labelled_ = as_labelled(tmp_path)
    ahead = "says" if columns == "forward=says" else "winner"

    def rows(column, cells):
        return [{column: c} | ({"row": n} if with_id else {}) for n, c in enumerate(cells)]

    (tmp_path / "one.json").write_text(json.dumps(rows(ahead, VOTED)))
    (tmp_path / "two.json").write_text(json.dumps(rows(name, [3 - t if slots else t for t in TRUTH])))
    found = read(tmp_path / "one.json", labelled_, columns, second=tmp_path / "two.json")
    assert right(found) == (21, 24)
    assert {(v.ballot.judge, v.ballot.order) for v in found.votes} == {("one", "forward"), ("one", "reversed")}
    if slots:
        assert any("naming slots, and turned round; --votes-map reversed=" in n for n in found.notes)


def test_a_file_of_one_order_has_no_column_of_orders(tmp_path):
    labelled_ = as_labelled(tmp_path)
    path = table(tmp_path, *({"row": n, "order": "ab", "winner": v} for n, v in enumerate(VOTED)))
    with pytest.raises(UserError, match="leave order out"):
        read(path, labelled_, "order=order", second=path)


def test_votes_of_several_files_are_those_of_several_judges(tmp_path):
    labelled_ = as_labelled(tmp_path)
    found = []
    for name, cells in (("a", VOTED), ("b", TRUTH[:6])):
        path = tmp_path / f"{name}.csv"
        path.write_text("\n".join(["row,winner", *(f"{n},{c}" for n, c in enumerate(cells))]))
        found.append(read(path, labelled_))
    joined = join_recorded(found, labelled_.rows)
    assert right(joined) == (15, 18)
    assert {v.ballot.judge for v in joined.votes} == {"a", "b"}
    assert joined.unvoted == 0
    assert sum(c.count for c in joined.cells) == 18
    with pytest.raises(UserError, match=r"two files have a vote on one question .*--votes-reversed"):
        join_recorded([found[0], found[0]], labelled_.rows)


def test_packed_votes_and_logs(tmp_path):
    labelled_ = as_labelled(tmp_path)
    text = "row,winner\n" + "".join(f"{n},{v}\n" for n, v in enumerate(VOTED))
    (tmp_path / "v.csv.gz").write_bytes(gzip.compress(text.encode()))
    assert right(read(tmp_path / "v.csv.gz", labelled_)) == (9, 12)
    votes = [make_vote(o, n, 0.75, voice="v") for n, o in enumerate(("first", "second"))]
    log = "".join(v.model_dump_json() + "\n" for v in votes)
    (tmp_path / "votes.jsonl.gz").write_bytes(gzip.compress(log.encode()))
    assert read_votes_log(tmp_path / "votes.jsonl.gz") == votes
    assert read_recorded(tmp_path / "votes.jsonl.gz", [ROWS[0].model_copy(update={"id": "p"})]).votes == votes


@needs("llmbar", "its raw replies give the votes of the table that was made of them")
@pytest.mark.parametrize(("set_", "raw", "judge"), [("natural", "Natural", "GPT-4"), ("natural", "Natural", "LLaMA2"),
                                                    ("adv_neighbor", "Neighbor", "Falcon")])  # fmt: skip
def test_raw_replies_with_nested_winners_and_no_id(set_, raw, judge):
    """LLMBar's own files give the votes of the table that was made of them."""
    labelled_ = read_labelled([folder("llmbar") / f"{set_}.json"])
    columns = "forward=results.0.swap = False.winner,reversed=results.0.swap = True.winner"
    found = read(folder("llmbar") / f"raw_{raw}_{judge}_CoT.json", labelled_, columns)
    path = folder("llmbar") / "recorded_verdicts.csv"
    tabulated = read(path, labelled_, where=parse_where([f"judge={judge}", "strategy=CoT"]))

    def outcomes(votes):
        return [(v.ballot.pair_id, v.ballot.order, v.outcome) for v in votes]

    assert outcomes(found.votes) == outcomes(tabulated.votes)


def test_a_condition_may_be_on_what_the_report_calls_a_judge(tmp_path):
    """A judge without a column of its own is called by its file, or by another column."""
    path = csv_file(tmp_path, "row,winner", "0,1", "1,2")
    assert len(read_recorded(path, ROWS, where=parse_where(["judge=votes", "voice=recorded"])).votes) == 2
    path = csv_file(tmp_path, "row,model,winner", "0,J,1", "1,J,2", "0,K,1")
    assert len(read_recorded(path, ROWS, where=parse_where(["judge=J"])).votes) == 2
    with pytest.raises(UserError, match="no row has --where judge=L; there is J, K"):
        read_recorded(path, ROWS, where=parse_where(["judge=L"]))


@pytest.mark.parametrize("cell", ["easy", "easy.json", "data/easy.jsonl", "easy.csv.gz"])
def test_a_vote_names_the_labelled_file_with_or_without_its_ending(tmp_path, cell):
    rows = [labelled(0), labelled(0, file="hard")]
    path = csv_file(tmp_path, "part,row,winner", f"{cell},0,1", "hard,0,2")
    with pytest.raises(UserError, match=r"several labelled files .*--votes-map set=COLUMN"):
        read_recorded(path, rows)
    found = read_recorded(path, rows, parse_votes_map("set=part"))  # as it says
    assert [v.outcome for v in found.votes] == ["first", "second"]
    with pytest.raises(UserError, match=r"no cell of `row` is a labelled file's name \(easy, hard\); found 0"):
        read_recorded(path, rows, parse_votes_map("set=row"))


def test_a_column_that_is_taken_for_another_can_be_left_out(tmp_path):
    path = csv_file(tmp_path, "row,order,winner", "0,17,1", "1,18,2")
    with pytest.raises(UserError, match=r"order: found '17', .*order= none"):
        read_recorded(path, ROWS)
    assert len(read_recorded(path, ROWS, parse_votes_map("order=")).votes) == 2  # as it says
