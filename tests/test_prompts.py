"""Loading prompt sets, holding some out, and the order in which a run takes them."""

from __future__ import annotations

import builtins
import csv
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from rlaif.config import Columns, Prompts
from rlaif.data.prompts import check_enough, exclude_held_out, load_prompts, prompts_for, with_system
from rlaif.errors import UserError, needs_extra
from rlaif.records import Message, Prompt

ROWS = [
    {"id": "a", "category": "cooking", "prompt": "How do I boil an egg?"},
    {"id": "b", "category": "travel", "prompt": 'What is a "visa", and who needs one?'},
]


def user(text: str, id: str = "x") -> Prompt:
    return Prompt(id=id, messages=(Message(role="user", content=text),))


def numbered(n: int) -> list[Prompt]:
    return [user(f"question {i}", id=f"p{i}") for i in range(n)]


def write(path: Path, rows: list[Any]) -> Path:
    if path.suffix == ".jsonl":
        path.write_text("\n".join(json.dumps(r, ensure_ascii=False) for r in rows) + "\n")
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".csv":
        with path.open("w", newline="") as f:
            out = csv.DictWriter(f, list(rows[0]))
            out.writeheader()
            out.writerows(rows)
    else:
        pa = pytest.importorskip("pyarrow")
        parquet = pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pa.Table.from_pylist(rows), path)
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
def test_every_format_gives_the_same_prompts(tmp_path: Path, suffix: str) -> None:
    write(tmp_path / f"set{suffix}", ROWS)
    prompts = load_prompts(f"set{suffix}", tmp_path)
    assert [(p.id, p.category, p.text) for p in prompts] == [(r["id"], r["category"], r["prompt"]) for r in ROWS]
    assert [m.role for m in prompts[0].messages] == ["user"]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("set.json", "".join(json.dumps(r) + "\n" for r in ROWS)),  # as datasets' to_json writes it
        ("set.jsonl", json.dumps(ROWS, indent=1)),
        ("set.json", json.dumps({key: [r[key] for r in ROWS] for key in ROWS[0]})),
        ("set.json", json.dumps({"version": 1, "data": ROWS})),
    ],
)
def test_json_as_people_have_it_gives_the_same_prompts(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    assert [p.model_dump() for p in load_prompts(name, tmp_path)] == [
        p.model_dump() for p in load_prompts(write(tmp_path / "plain.jsonl", ROWS).name, tmp_path)
    ]


def test_a_single_row_of_lists_is_a_row(tmp_path: Path) -> None:
    write(tmp_path / "set.jsonl", [{"turns": ["Why?", "How?"]}])
    (prompt,) = load_prompts("set.jsonl", tmp_path, columns=Columns(prompt="turns.0"))
    assert prompt.text == "Why?"


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_chat_rows(tmp_path: Path, suffix: str) -> None:
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi, how are you?"}]
    cell = json.dumps(chat) if suffix == ".csv" else chat
    write(tmp_path / f"chat{suffix}", [{"id": "c", "messages": cell}])
    (prompt,) = load_prompts(f"chat{suffix}", tmp_path)
    assert [m.model_dump() for m in prompt.messages] == chat


def test_absolute_path_and_other_columns(tmp_path: Path) -> None:
    path = write(tmp_path / "set.jsonl", [{"prompt": "Why?", "source": "me"}])
    assert load_prompts(str(path), Path("/nowhere"))[0].text == "Why?"


def test_ids_by_content_are_stable_and_differ(tmp_path: Path) -> None:
    one = load_prompts(write(tmp_path / "1.jsonl", [{"prompt": "Why?"}, {"prompt": "Who?"}]).name, tmp_path)
    two = load_prompts(write(tmp_path / "2.json", [{"prompt": "Who?"}, {"prompt": "Why?"}]).name, tmp_path)
    assert [p.id for p in one] == [p.id for p in reversed(two)]
    assert one[0].id != one[1].id


def test_line_separator_inside_a_string(tmp_path: Path) -> None:
    write(tmp_path / "u.jsonl", [{"prompt": "one\u2028two"}])
    assert load_prompts("u.jsonl", tmp_path)[0].text == "one\u2028two"


BAD_LINES = {
    '{"prompt": "x"': "not valid JSON",
    '["x"]': "expected an object, found list",
    '{"text": "x"}': "either `prompt` (text) or `messages` (chat), found `text`",
    '{"prompt": "x", "messages": [{"role": "user", "content": "x"}]}': "found both",
    '{"prompt": "  "}': "`prompt` must be text that isn't blank, found '  '",
    '{"prompt": ""}': "`prompt` must be text that isn't blank, found ''",
    '{"prompt": null, "category": "x"}': "`prompt` must be text that isn't blank, found None",
    '{"id": "b", "messages": ""}': "`messages` must be a list of {{role, content}} that isn't empty, found ''",
    '{"prompt": 7}': "must be text",
    '{"messages": []}': "isn't empty",
    '{"messages": "hello"}': "not JSON",
    '{"messages": [{"role": "bot", "content": "x"}]}': "role",
    '{"messages": [{"role": "assistant", "content": "x"}]}': "must be the user's",
    '{"id": "a", "prompt": "again"}': "id `a` was already used at {path}:1",
}


@pytest.mark.parametrize("line", BAD_LINES)
def test_a_bad_row_is_named_by_file_and_line(tmp_path: Path, line: str) -> None:
    path = tmp_path / "set.jsonl"
    path.write_text(f'{{"id": "a", "prompt": "fine"}}\n\n{line}\n')
    with pytest.raises(UserError) as error:
        load_prompts("set.jsonl", tmp_path)
    assert str(error.value).startswith(f"{path}:3: ")
    assert BAD_LINES[line].format(path=path) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_repeated_prompt_without_ids_is_named(tmp_path: Path) -> None:
    write(tmp_path / "set.jsonl", [{"prompt": "Why?"}, {"prompt": "Why?"}])
    with pytest.raises(UserError, match=r"set.jsonl:2: .*set.jsonl:1; the prompt is repeated"):
        load_prompts("set.jsonl", tmp_path)


def test_a_csv_cell_holds_what_text_holds(tmp_path: Path) -> None:
    said = "one\u2028two\x85three\x0cfour " + "x" * 140_000
    (tmp_path / "set.csv").write_text(f"id,prompt\na,{said}\n", encoding="utf-8")
    assert [p.text for p in load_prompts("set.csv", tmp_path)] == [said]


def test_csv_rows_are_named_by_line(tmp_path: Path) -> None:
    (tmp_path / "set.csv").write_text("id,prompt\na,fine\nb,one, two\n")
    with pytest.raises(UserError, match=r"set.csv:3: more cells"):
        load_prompts("set.csv", tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("missing.jsonl", None, "no such prompt file"),
        ("set.txt", "x", "unknown format `.txt`"),
        ("set.jsonl", "\n", "no prompts in it"),
        ("set.json", '{"prompt": "x"}', "expected a list"),
        ("set.json", "[\n{]", r"set.json:2: not valid JSON"),
        ("set.parquet", "not parquet", "not a readable Parquet file"),
    ],
)
def test_a_bad_file_is_named(tmp_path: Path, name: str, content: str | None, says: str) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    if name.endswith(".parquet"):
        pytest.importorskip("pyarrow")
    with pytest.raises(UserError, match=says):
        load_prompts(name, tmp_path)


def test_not_utf8(tmp_path: Path) -> None:
    (tmp_path / "set.jsonl").write_bytes(b'{"prompt": "caf\xe9"}')
    with pytest.raises(UserError, match="not UTF-8"):
        load_prompts("set.jsonl", tmp_path)


def test_datasets_name_and_split(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: asked.append((name, split)) or ROWS)
    assert [p.id for p in load_prompts("datasets:me/questions", tmp_path)] == ["a", "b"]
    load_prompts("datasets:me/questions:test", tmp_path)
    assert asked == [("me/questions", "train"), ("me/questions", "test")]


CHAT = [{"role": "user", "content": "Why sleep?"}, {"role": "assistant", "content": "To rest."}]


@pytest.mark.parametrize("column", ["prompt", "messages"])
def test_a_chat_is_read_from_either_column_without_its_answer(tmp_path: Path, column: str) -> None:
    write(tmp_path / "set.jsonl", [{column: CHAT[:1]}, {column: [*CHAT, {"role": "user", "content": "How?"}, CHAT[1]]}])
    first, second = load_prompts("set.jsonl", tmp_path)
    assert [m.content for m in first.messages] == ["Why sleep?"]
    assert [m.content for m in second.messages] == ["Why sleep?", "To rest.", "How?"]


def test_a_data_set_may_repeat_prompts_and_have_both_columns(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    (tmp_path / "hub").mkdir()
    rows = [{"prompt": "Why sleep?", "messages": CHAT}] * 2 + [{"prompt": "Why eat?", "messages": CHAT}]
    write(tmp_path / "hub" / "train.parquet", rows)
    notes: list[str] = []
    source = f"datasets:{tmp_path / 'hub'}"
    assert [p.text for p in load_prompts(source, tmp_path, notes.append)] == ["Why sleep?", "Why eat?"]
    assert notes == [f"{source}: 1 repeated prompts skipped, 2 are left"]


def test_a_data_sets_id_must_not_name_two_prompts(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    (tmp_path / "hub").mkdir()
    write(tmp_path / "hub" / "train.parquet", [{"id": "a", "prompt": "Why?"}, {"id": "a", "prompt": "How?"}])
    with pytest.raises(UserError, match="id `a` was already used"):
        load_prompts(f"datasets:{tmp_path / 'hub'}", tmp_path)


def test_a_saved_data_set_is_read_from_its_folder(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    one = datasets.Dataset.from_list([{"prompt": CHAT[:1]}])
    one.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": one, "test": datasets.Dataset.from_list(ROWS)}).save_to_disk(tmp_path / "two")
    assert [p.text for p in load_prompts(f"datasets:{tmp_path / 'one'}", tmp_path)] == ["Why sleep?"]
    assert [p.id for p in load_prompts(f"datasets:{tmp_path / 'two'}:test", tmp_path)] == ["a", "b"]


def test_datasets_configuration(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    asked: list[Any] = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *names, split: asked.append((*names, split)) or ROWS)
    load_prompts("datasets:me/q:english:test", tmp_path)
    load_prompts("datasets:me/q:english:", tmp_path)
    assert asked == [("me/q", "english", "test"), ("me/q", "english", "train")]
    with pytest.raises(UserError, match="NAME:CONFIG:SPLIT"):
        load_prompts("datasets:me/q:a:b:c", tmp_path)


def test_datasets_failure_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")

    def fail(name: str, split: str) -> None:
        raise ConnectionError("no route\nmore")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(UserError, match=r"datasets:me/q: datasets can't load it \(no route\)"):
        load_prompts("datasets:me/q", tmp_path)


@pytest.mark.parametrize(("source", "module"), [("set.parquet", "pyarrow"), ("datasets:x", "datasets")])
def test_a_missing_package_names_the_extra(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, source: str, module: str
) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.split(".")[0] == module:
            raise ModuleNotFoundError(name, name=name)
        return real(name, *args, **kwargs)

    (tmp_path / "set.parquet").write_bytes(b"x")
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ModuleNotFoundError) as e:
        load_prompts(source, tmp_path)
    assert f"this needs {module}, " in str(needs_extra(e.value))


def test_with_system_respects_a_row_s_own() -> None:
    own = Prompt(id="o", messages=(Message(role="system", content="mine"), Message(role="user", content="x")))
    plain, kept = with_system([user("x"), own], "yours")
    assert [m.content for m in plain.messages] == ["yours", "x"]
    assert plain.id == "x"
    assert kept == own
    assert with_system([own], None) == [own]


def test_exclude_held_out_by_text_and_two_files_that_count_from_one() -> None:
    train = [user("a", id="1"), user("b", id="2"), user(" How  do I fly? ", id="3"), user("d", id="4")]
    held = [user("other", id="2"), *with_system([user("how do I fly?", id="h")], "system")]
    notes: list[str] = []
    left = exclude_held_out(train, held, notes.append)
    assert [p.messages[-1].content for p in left] == ["a", "b", "d"]
    assert [left[0].id, left[2].id] == ["1", "4"]
    assert left[1].id not in {"1", "2", "3", "4", "h"}
    assert [note.split()[0] for note in notes] == ["1", "1"]
    twice = exclude_held_out([user("same", id="1"), user("same", id="2")], [user("x", id="1"), user("y", id="2")])
    assert len({p.id for p in twice}) == 2


def test_a_message_with_fields_that_arrow_filled(tmp_path: Path) -> None:
    row = {"messages": [{"role": "user", "content": "Why?", "tool_calls": None, "name": None}]}
    (tmp_path / "p.jsonl").write_text(json.dumps(row))
    (prompt,) = load_prompts("p.jsonl", tmp_path)
    assert prompt.messages == (Message(role="user", content="Why?"),)


def test_a_slice_of_a_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    asked: list[tuple[str, ...]] = []
    monkeypatch.setattr(
        datasets, "load_dataset", lambda *names, split: asked.append((*names, split)) or [{"prompt": "Why?"}]
    )
    for source in ("datasets:a/b:train[:80%]", "datasets:a/b:main:train[80%:]", "datasets:a/b"):
        load_prompts(source, tmp_path)
    assert asked == [("a/b", "train[:80%]"), ("a/b", "main", "train[80%:]"), ("a/b", "train")]


@pytest.mark.parametrize("total", [5, 6, 7, 12])
@pytest.mark.parametrize("per_iteration", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_iterations_take_every_prompt_equally_and_none_twice(total: int, per_iteration: int, seed: int) -> None:
    prompts = numbered(total)
    iterations = [
        [p.id for p in prompts_for(prompts, seed, [per_iteration] * i, per_iteration)] for i in range(3 * total)
    ]
    assert all(len(set(taken)) == per_iteration for taken in iterations)
    stream = [id for taken in iterations for id in taken]
    for start in range(0, len(stream), total):
        assert len(set(stream[start : start + total])) == total  # a pass has every prompt once
    assert set(Counter(stream).values()) == {3 * per_iteration}


def test_fewer_prompts_than_an_iteration_takes_are_refused() -> None:
    settings = Prompts(train="few.jsonl", per_iteration=4)
    check_enough(numbered(4), settings)
    with pytest.raises(UserError, match=r"^prompts.per_iteration=4: few.jsonl has 3 prompts to train on"):
        check_enough(numbered(3), settings)


def test_iterations_are_pure() -> None:
    prompts = numbered(10)
    assert prompts_for(prompts, 3, [4] * 8, 4) == prompts_for(list(prompts), 3, [4] * 8, 4)
    assert prompts_for(prompts, 3, [4] * 8, 4) != prompts_for(prompts, 4, [4] * 8, 4)


def test_the_order_is_the_one_that_runs_have_gone_by() -> None:
    """Runs that go on must find it: two passes of 7, by threes."""
    found = [[int(p.id[1:]) for p in prompts_for(numbered(7), 0, [3] * i, 3)] for i in range(5)]
    assert found == [[6, 1, 2], [4, 3, 0], [5, 1, 4], [5, 6, 3], [0, 2, 1]]


@pytest.mark.parametrize("total", [5, 7, 12])
@pytest.mark.parametrize("seed", range(5))
def test_passes_stay_whole_when_iterations_take_another_number(total: int, seed: int) -> None:
    prompts, sizes = numbered(total), [2, 2, 5, 3, 5, 1, 4, 4, 4, 2, 5, 5, 3, 3, 1]
    iterations = [[p.id for p in prompts_for(prompts, seed, sizes[:i], n)] for i, n in enumerate(sizes)]
    assert all(len(set(taken)) == len(taken) == n for taken, n in zip(iterations, sizes, strict=True))
    stream = [id for taken in iterations for id in taken]
    for start in range(0, len(stream) - total + 1, total):
        assert len(set(stream[start : start + total])) == total


def test_no_prompts_left() -> None:
    with pytest.raises(UserError, match="no training prompts are left"):
        prompts_for([], 0, [], 4)
