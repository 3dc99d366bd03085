"""The index over files that grow, change, vanish or are damaged, and with several processes at once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlaif.audit.index import Index
from rlaif.audit.overview import overview
from rlaif.audit.pairs import PairFilter, list_pairs
from rlaif.audit.rows import read_lines
from rlaif.audit.tables import STAGE_TABLES, duckdb_type
from rlaif.errors import UserError
from rlaif.records import Vote
from rlaif.rundir.store import RunDir

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parent.parent.parent


def count(index: Index, table: str) -> int:
    return int(index.rows(f"SELECT count(*) AS n FROM {table}")[0]["n"])


def test_types_follow_from_the_records() -> None:
    assert duckdb_type(Vote.model_fields["abstain_reason"].annotation) == "VARCHAR"
    assert duckdb_type(Vote.model_fields["p_first"].annotation) == "DOUBLE"
    assert '"principles" VARCHAR[]' in duckdb_type(Vote.model_fields["ballot"].annotation)
    assert "token_ids" not in STAGE_TABLES["preferences"].json_columns()  # what no column needs is not read


def test_lines_are_read_by_number(tmp_path: Path) -> None:
    path = tmp_path / "rows"
    path.write_bytes(b"".join(b"%d\n" % i for i in range(1, 400_000)))
    assert read_lines(path, [399_999, 1, 250_000]) == {1: b"1\n", 250_000: b"250000\n", 399_999: b"399999\n"}
    assert read_lines(path, [400_000]) == {}


def test_every_row_has_its_line(stored: RunDir) -> None:
    with Index.open(stored) as index:
        for r in index.rows("SELECT iteration, evaluation, line, ballot_id FROM votes"):
            line = index.source_lines("votes", r, [r["line"]])[r["line"]]
            assert json.loads(line)["ballot"]["id"] == r["ballot_id"]


def test_nothing_is_written_when_nothing_changed(stored: RunDir) -> None:
    with Index.open(stored) as index:
        before = index.path.stat().st_mtime_ns
        index.refresh()
        with Index.open(stored) as again:
            assert count(again, "votes") == 208
        assert index.path.stat().st_mtime_ns == before


def test_a_live_run_is_followed_line_by_line(copy: RunDir) -> None:
    """Votes grow, the last line is torn for a while, then the stage is completed under its final name."""
    here = copy.iteration(3).path
    whole = (here / "votes.jsonl").read_bytes()
    meta = (here / "votes.meta.json").read_bytes()
    later = {
        p.name: p.read_bytes() for s in ("votes", "decisions", "preferences", "updates") for p in here.glob(f"{s}.*")
    }
    for name in (*later, "metrics.json"):
        (here / name).unlink()
    lines = whole.splitlines(keepends=True)
    partial = here / "votes.jsonl.partial"
    with Index.open(copy) as index:
        assert index.problems == []
        assert count(index, "votes WHERE iteration = 3") == 0
        for done, torn in ((3, 0), (3, 40), (11, 7), (11, 300), (len(lines), 0)):
            partial.write_bytes(b"".join(lines[:done]) + (lines[done][:torn] if torn else b""))
            index.refresh()
            rows = index.rows("SELECT line, ballot_id FROM votes WHERE iteration = 3 ORDER BY line")
            expected = [json.loads(line)["ballot"]["id"] for line in lines[:done]]
            assert [r["ballot_id"] for r in rows] == expected
            assert [r["line"] for r in rows] == list(range(1, done + 1))
            assert index.problems == []
        undecided = list_pairs(index, PairFilter(iteration=3)).rows
        assert {r.status for r in undecided} == {None}
        (here / "votes.meta.json").write_bytes(meta)
        os.replace(partial, here / "votes.jsonl")
        for name, content in later.items():
            (here / name).write_bytes(content)
        index.refresh()
        assert count(index, "votes WHERE iteration = 3") == len(lines)
        assert {r.status for r in list_pairs(index, PairFilter(iteration=3)).rows} == {"kept", "dropped"}
        assert not overview(index, copy).iterations[3].done


def test_a_stage_that_was_begun_anew_is_read_anew(copy: RunDir) -> None:
    here = copy.iteration(3).path
    lines = (here / "votes.jsonl").read_bytes().splitlines(keepends=True)
    for p in [*here.glob("votes*"), *here.glob("decisions*"), *here.glob("preferences*"), *here.glob("updates*")]:
        p.unlink()
    partial = here / "votes.jsonl.partial"
    partial.write_bytes(b"".join(lines[:10]))
    with Index.open(copy) as index:
        partial.write_bytes(b"".join(reversed(lines[:20])))
        index.refresh()
        rows = index.rows("SELECT ballot_id FROM votes WHERE iteration = 3 ORDER BY line")
        assert [r["ballot_id"] for r in rows] == [json.loads(x)["ballot"]["id"] for x in reversed(lines[:20])]


def test_changed_and_removed_stages_are_taken_in_again(copy: RunDir) -> None:
    with Index.open(copy) as index:
        path = copy.iteration(0).path / "decisions.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        for r in rows:
            r["status"], r["winner"] = "dropped", None
        path.write_text("".join(json.dumps(r) + "\n" for r in rows))
        index.refresh()
        assert list_pairs(index, PairFilter(iteration=0, status="kept")).total == 0
        assert list_pairs(index, PairFilter(iteration=1, status="kept")).total == 3  # the others stayed
        path.unlink()
        index.refresh()
        assert count(index, "decisions WHERE iteration = 0") == 0
        assert index.problems == [f"{path}: missing, though updates.jsonl is there"]


@pytest.mark.parametrize(
    "damage", [b"{", b"", b"\xff\xfe\x00broken", b"[1, 2]", b'{"ballot": 3}', b'{"ballot": {"id": null}}', b"null"]
)
def test_a_damaged_line_is_named_and_the_rest_is_read(copy: RunDir, damage: bytes) -> None:
    path = copy.iteration(1).path / "votes.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    lines[6] = damage + b"\n"
    path.write_bytes(b"".join(lines))
    with Index.open(copy) as index:
        what = "not a line of votes; it was damaged after it was written, and is left out"
        assert index.problems == [f"{path}:7: {what}"]
        rows = index.rows("SELECT line, ballot_id FROM votes WHERE iteration = 1 ORDER BY line")
        assert [r["line"] for r in rows] == [n for n in range(1, 41) if n != 7]
        assert [r["ballot_id"] for r in rows] == [
            json.loads(line)["ballot"]["id"] for n, line in enumerate(lines, 1) if n != 7
        ]
        assert list_pairs(index).total == 20
    with Index.open(copy) as again:  # complete stages are looked at once; what was found stays known
        assert again.problems == [f"{path}:7: {what}"]


def test_a_cut_file_is_named(copy: RunDir) -> None:
    path = copy.iteration(1).path / "votes.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:-2]))
    with Index.open(copy) as index:
        assert index.problems == [f"{path}: has 38 lines, votes.meta.json says 40"]


def test_damaged_small_files_are_named(copy: RunDir) -> None:
    plan = copy.iteration(1).path / "plan.json"
    plan.write_text('{\n "iteration": ')
    events = copy.path / "events.jsonl"
    events.write_text(events.read_text() + "garbage\n")
    with Index.open(copy) as index:
        assert [p.split(": ")[0] for p in index.problems] == [f"{events}:5", f"{plan}:2"]
        assert overview(index, copy).iterations[1].constitution == "rules@1"  # metrics.json knows it too


def test_an_index_that_is_garbage_is_made_again(stored: RunDir) -> None:
    with Index.open(stored) as index:
        path = index.path
    path.write_bytes(b"garbage" * 1000)
    with Index.open(stored) as index:
        assert count(index, "votes") == 208


def test_another_layout_is_another_index(stored: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    with Index.open(stored) as index:
        old = index.path
    monkeypatch.setattr("rlaif.audit.index.VERSION", 99)
    with Index.open(stored) as index:
        assert index.path != old
        assert count(index, "votes") == 208
    assert not old.exists()


def test_a_cache_that_cannot_be_written_is_one_line(stored: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RLAIF_CACHE", "/proc/nowhere")
    with pytest.raises((UserError, OSError)) as caught:
        Index.open(stored)
    assert "/proc/nowhere" in str(caught.value)


def test_no_query_writes_or_reads_other_files(stored: RunDir, tmp_path: Path) -> None:
    secret = tmp_path / "secret.csv"
    secret.write_text("a\n1\n")
    with Index.open(stored) as index:
        for sql in (
            f"SELECT * FROM read_csv('{secret}')", f"SELECT * FROM '{secret}'", f"COPY votes TO '{tmp_path}/out.csv'",
            "DELETE FROM votes", "CREATE TABLE x (a INT)", f"ATTACH '{tmp_path}/x.db'", "SET memory_limit = '8GB'",
            "SELECT 1; DROP TABLE votes", "SELEC 1", "SELECT nothing FROM votes", "INSTALL httpfs", "",
        ):  # fmt: skip
            with pytest.raises(UserError, match=r"^sql: [^\n]+$"):
                index.ask(sql, 10)
        assert index.ask("SELECT count(*) AS n FROM votes", 10) == (["n"], [(208,)])
    assert not (tmp_path / "out.csv").exists()


def test_two_processes_at_once(copy: RunDir, index_folder: Path) -> None:
    """Each builds, asks and refreshes the same index while the run grows; none fails, both see all of it at the end."""
    here = copy.iteration(3).path
    lines = (here / "votes.jsonl").read_bytes().splitlines(keepends=True)
    for p in [*here.glob("votes*"), *here.glob("decisions*"), *here.glob("preferences*"), *here.glob("updates*")]:
        p.unlink()
    partial = here / "votes.jsonl.partial"
    partial.write_bytes(lines[0])
    code = f"""
import sys, time
from pathlib import Path
from rlaif.audit.index import Index
from rlaif.audit.overview import overview
from rlaif.rundir.store import RunDir
run = RunDir.open(Path({str(copy.path)!r}))
seen = 0
with Index.open(run) as index:
    deadline = time.monotonic() + 60
    while seen < {len(lines)} and time.monotonic() < deadline:
        index.refresh()
        now = overview(index, run).iterations[3].votes
        assert now >= seen, (now, seen)
        seen = now
print(seen)
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    asking = [
        subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    with partial.open("ab") as f:
        for line in lines[1:]:
            f.write(line)
            f.flush()
            time.sleep(0.02)
    assert [p.communicate(timeout=90)[0].strip() for p in asking] == [str(len(lines))] * 2


def test_threads_may_ask_while_another_updates(copy: RunDir) -> None:
    path = copy.path / "events.jsonl"
    failed: list[Exception] = []
    with Index.open(copy) as index:

        def ask() -> None:
            try:
                for _ in range(15):
                    assert overview(index, copy).totals.pairs == 20
            except Exception as e:
                failed.append(e)

        threads = [threading.Thread(target=ask) for _ in range(2)]
        for t in threads:
            t.start()
        for n in range(10):
            with path.open("a") as f:
                f.write(f'{{"time":"t","kind":"note","iteration":null,"message":"{n}","data":{{}}}}\n')
            index.refresh()
        for t in threads:
            t.join()
        assert failed == []
        assert count(index, "events WHERE kind = 'note'") == 10


@pytest.mark.parametrize(
    ("name", "line", "field", "value"),
    [
        ("decisions", 2, "verdict", {"agreement": "high"}),
        ("pairs", 1, "first", None),
        ("preferences", 3, "agreement", "high"),
        ("votes", 4, "p_first", "high"),
    ],
)
def test_a_value_of_another_type_is_a_damaged_line(
    copy: RunDir, name: str, line: int, field: str, value: object
) -> None:
    path = copy.iteration(1).path / f"{name}.jsonl"
    rows = [json.loads(row) for row in path.read_text().splitlines()]
    rows[line - 1][field] = rows[line - 1][field] | value if isinstance(value, dict) else value
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with Index.open(copy) as index:
        what = f"not a line of {name}; it was damaged after it was written, and is left out"
        assert index.problems == [f"{path}:{line}: {what}"]
        assert count(index, f"{name} WHERE iteration = 1") == len(rows) - 1


def test_files_that_are_gone_are_named(copy: RunDir) -> None:
    constitution = overview(Index.open(copy), copy).iterations[0].constitution
    assert constitution == "rules@1"
    gone = [copy.path / "events.jsonl", copy.path / "prompts/train.jsonl", copy.iteration(2).path / "plan.json"]
    gone += sorted((copy.path / "constitutions").glob("*/constitution.json"))[:1]
    for path in gone:
        path.unlink()
    with Index.open(copy) as index:
        assert {p.partition(": missing")[0] for p in index.problems} == {str(path) for path in gone}


@pytest.mark.parametrize("content", [b"[]", b'{"iteration": "x"}', b'"\xff"', b"null"])
def test_a_plan_of_another_shape_is_named(copy: RunDir, content: bytes) -> None:
    plan = copy.iteration(1).path / "plan.json"
    plan.write_bytes(content)
    with Index.open(copy) as index:
        assert len(index.problems) == 1
        assert index.problems[0].startswith(f"{plan}: not ")
        assert overview(index, copy).iterations[1].constitution == "rules@1"


def test_a_changed_meta_file_is_looked_at_again(copy: RunDir) -> None:
    meta = copy.iteration(1).path / "votes.meta.json"
    with Index.open(copy) as index:
        assert index.problems == []
        meta.write_text(json.dumps(json.loads(meta.read_text()) | {"rows": 41}))
        index.refresh()
        assert index.problems == [f"{meta.with_name('votes.jsonl')}: has 40 lines, votes.meta.json says 41"]


def test_problems_name_the_run_as_it_is_named_now(copy: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    (copy.iteration(1).path / "plan.json").write_text("{")
    monkeypatch.chdir(copy.path.parent)
    for named in (Path("run"), copy.path):
        with Index.open(RunDir.open(named)) as index:
            assert [p.partition(":")[0] for p in index.problems] == [f"{named}/iterations/0001/plan.json"]


def refuse(monkeypatch: pytest.MonkeyPatch, refused: Path) -> None:
    """Lets a file be one that may not be opened: root may open all."""
    path_open = Path.open

    def opened(self: Path, *arguments: object, **named: object) -> object:
        if self == refused:
            raise PermissionError(13, "Permission denied", str(self))
        return path_open(self, *arguments, **named)  # type: ignore[call-overload]

    monkeypatch.setattr(Path, "open", opened)


def test_a_file_that_cannot_be_read_is_a_problem_of_that_file(copy: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    votes = copy.iteration(1).path / "votes.jsonl"
    with monkeypatch.context() as patched:
        refuse(patched, votes)
        with Index.open(copy) as index:
            assert index.problems == [f"{votes}: can't be read (Permission denied)"]
            assert count(index, "votes WHERE iteration = 0") > 0
            assert count(index, "votes WHERE iteration = 1") == 0
    with Index.open(copy) as index:
        assert index.problems == []
        assert count(index, "votes WHERE iteration = 1") == 40


def test_a_lock_that_cannot_be_written_names_the_setting(stored: RunDir) -> None:
    with Index.open(stored) as index:
        lock = Path(f"{index.path}.lock")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("builtins.open", _refusing(lock))
        with pytest.raises(UserError, match="set RLAIF_CACHE"):
            Index.open(stored)


def _refusing(refused: Path) -> Callable[..., Any]:
    real = open

    def opened(file: Any, *arguments: Any, **named: Any) -> Any:
        if str(file) == str(refused):
            raise PermissionError(13, "Permission denied", str(file))
        return real(file, *arguments, **named)

    return opened


@pytest.mark.parametrize("stage", ["votes", "preferences", "updates"])
def test_a_lost_meta_file_is_named_once(copy: RunDir, stage: str) -> None:
    meta = copy.iteration(2).path / f"{stage}.meta.json"
    with Index.open(copy) as index:
        meta.unlink()
        index.refresh()
        assert index.problems == [f"{meta}: missing, though {stage}.jsonl is there"]
        assert list(index.unknown_updates()) == ([2] if stage == "updates" else [])


@pytest.mark.parametrize("stage", ["votes", "updates"])
@pytest.mark.parametrize("content", ["{}", "[1]", "{", "null"])
def test_a_damaged_meta_file_is_named_once(copy: RunDir, stage: str, content: str) -> None:
    meta = copy.iteration(2).path / f"{stage}.meta.json"
    meta.write_text(content)
    with Index.open(copy) as index:
        (problem,) = index.problems
        assert problem.startswith(f"{meta}:")
        assert "it was damaged after it was written" in problem


@pytest.mark.parametrize("changed", [{"skipped": None}, {"skipped": "no"}, {"policy_digest": 3}])
def test_a_meta_file_that_does_not_tell_the_policy_is_named(copy: RunDir, changed: dict[str, object]) -> None:
    meta = copy.iteration(2).path / "updates.meta.json"
    meta.write_text(json.dumps(json.loads(meta.read_text()) | changed))
    with Index.open(copy) as index:
        assert index.problems == [f"{meta}: doesn't say which policy was made; it was damaged after it was written"]
