"""The run directory: stages are whole or absent, torn lines are owed again, one writer."""

from __future__ import annotations

import errno
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from rlaif.errors import RlaifError, UserError
from rlaif.records import Score
from rlaif.rundir import store
from rlaif.rundir.store import (
    RunDir,
    StageDir,
    file_digest,
    read_json,
    read_record,
    read_rows,
    replace_dir,
    replacing,
    write_json,
)


def score(n: int) -> Score:
    return Score(completion_id=f"c{n}", prompt_id="p", voice="v", value=n)


def produce(*chunks: list[Score]):
    def rows(done: list[Score]) -> Iterator[list[Score]]:
        seen.append(done)
        yield from chunks

    seen: list[list[Score]] = []
    rows.seen = seen  # type: ignore[attr-defined]
    return rows


def test_a_damaged_header_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(UserError, match=r"run.json: not a run's"):
        RunDir.open(tmp_path)


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    with replacing(path) as temporary:
        temporary.write_text("old")
    with pytest.raises(ZeroDivisionError), replacing(path) as temporary:
        temporary.write_text("half")
        raise ZeroDivisionError
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_where_a_folder_belongs(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("")
    with pytest.raises(UserError, match="can't write here"), RunDir(tmp_path / "runs" / "x").lock():
        pass


def test_a_stage_is_written_once_and_read_afterwards(tmp_path: Path) -> None:
    here = StageDir(tmp_path / "it")
    rows = here.rows("scores", Score, produce([score(1)], [score(2)]))
    assert rows == [score(1), score(2)] == here.read("scores", Score)
    never = produce([score(9)])
    assert here.rows("scores", Score, never) == rows
    assert never.seen == []
    assert here.is_complete("scores")
    meta = here.meta("scores")
    assert (meta["rows"], meta["schema_version"]) == (2, 2)
    assert meta["sha256"] == file_digest(tmp_path / "it/scores.jsonl")


def test_each_chunk_is_durable_before_the_next_is_asked_for(tmp_path: Path) -> None:
    here = StageDir(tmp_path)

    def rows(done: list[Score]) -> Iterator[list[Score]]:
        yield [score(1)]
        assert len((tmp_path / "scores.jsonl.partial").read_text().splitlines()) == 1
        assert not here.is_complete("scores")
        yield [score(2)]

    here.rows("scores", Score, rows)
    assert not (tmp_path / "scores.jsonl.partial").exists()


@pytest.mark.parametrize("torn", [b"", b'{"completion_id": "c2", "pro', b"\xff", b"x" * (store.READ_BACK * 2)])
def test_a_torn_last_line_is_owed_again(tmp_path: Path, torn: bytes) -> None:
    partial = tmp_path / "scores.jsonl.partial"
    partial.write_bytes(score(1).model_dump_json().encode() + b"\n" + torn)
    make = produce([score(2)])
    assert StageDir(tmp_path).rows("scores", Score, make) == [score(1), score(2)]
    assert make.seen == [[score(1)]]
    assert read_rows(tmp_path / "scores.jsonl", Score) == [score(1), score(2)]


def test_a_stage_that_cannot_be_continued_starts_again(tmp_path: Path) -> None:
    (tmp_path / "scores.jsonl.partial").write_text(score(1).model_dump_json() + "\n")
    make = produce([score(2)])
    assert StageDir(tmp_path).rows("scores", Score, make, resumable=False) == [score(2)]
    assert make.seen == [[]]


def test_before_commit_sees_all_rows_and_an_incomplete_stage(tmp_path: Path) -> None:
    here = StageDir(tmp_path)

    def commit() -> dict[str, int]:
        assert not here.is_complete("scores")
        return {"lines": len((tmp_path / "scores.jsonl.partial").read_text().splitlines())}

    here.rows("scores", Score, produce([score(1), score(2)]), before_commit=commit)
    assert here.meta("scores")["lines"] == 2


def test_a_failing_commit_leaves_the_stage_incomplete(tmp_path: Path) -> None:
    def commit() -> dict[str, int]:
        raise RlaifError("no")

    with pytest.raises(RlaifError):
        StageDir(tmp_path).rows("scores", Score, produce([score(1)]), before_commit=commit)
    assert not StageDir(tmp_path).is_complete("scores")


def test_damaged_files_name_file_and_line(tmp_path: Path) -> None:
    (tmp_path / "scores.jsonl").write_text(score(1).model_dump_json() + "\n{}\n")
    with pytest.raises(RlaifError, match=r"scores\.jsonl:2: not a Score of schema 2 or older"):
        StageDir(tmp_path).read("scores", Score)
    (tmp_path / "a.json").write_text("{\n,")
    write_json(tmp_path / "score.json", {"completion_id": "c", "prompt_id": "p"})
    with pytest.raises(RlaifError, match=r"score\.json: not a Score of schema 2 or older \(voice: Field required\)"):
        read_record(tmp_path / "score.json", Score)
    with pytest.raises(RlaifError, match=r"a\.json:2: not valid JSON"):
        read_json(tmp_path / "a.json")


@pytest.mark.parametrize(
    ("number", "kind", "message"),
    [(errno.ENOSPC, RlaifError, "no space left"), (errno.EROFS, UserError, "can't write here")],
)
def test_disk_errors_are_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, kind: type[RlaifError], message: str
) -> None:
    def fail(fd: int) -> None:
        raise OSError(number, "text")

    monkeypatch.setattr(store.os, "fsync", fail)
    for write in (
        lambda: write_json(tmp_path / "a.json", 1),
        lambda: StageDir(tmp_path).rows("scores", Score, produce([score(1)])),
    ):
        with pytest.raises(kind, match=message) as e:
            write()
        assert type(e.value) is kind
    assert not (tmp_path / "a.json").exists()


def test_other_os_errors_stay_what_they_are(tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError), store.disk_errors(tmp_path):
        raise IsADirectoryError(errno.EISDIR, "text")


def test_a_failed_write_leaves_the_old_json(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"old": "ü"})
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"new": object()})
    assert read_json(tmp_path / "a.json") == {"old": "ü"}


def test_one_writer(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    with run.lock(), pytest.raises(UserError, match="another process writes this run"), RunDir(run.path).lock():
        pass
    with run.lock():
        pass


def test_what_is_no_run_or_a_newer_one_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a run directory"):
        RunDir.open(tmp_path)
    (tmp_path / "runs" / "online-0").mkdir(parents=True)
    write_json(tmp_path / "runs" / "online-0" / "run.json", {})
    with pytest.raises(UserError, match=r"runs: this is a folder of runs; `rlaif runs .*runs` lists them"):
        RunDir.open(tmp_path / "runs")
    with pytest.raises(UserError, match=r"onlin-0: no such run; did you mean .*runs/online-0\?"):
        RunDir.open(tmp_path / "runs" / "onlin-0")
    with pytest.raises(UserError, match="no such run; `rlaif runs` lists those"):
        RunDir.open(tmp_path / "runs" / "zzz")
    write_json(tmp_path / "run.json", {"schema_version": 3})
    with pytest.raises(UserError, match="written with schema 3, this rlaif reads up to 2"):
        RunDir.open(tmp_path)


def test_events_survive_a_torn_line(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    assert run.events() == []
    first = run.event("started", "ä", seed=1)
    with (tmp_path / "events.jsonl").open("a") as f:
        f.write('{"time": "2')
    second = run.event("alarm", "b", 3)
    assert run.events() == [first, second]
    assert second.iteration == 3
    assert json.loads((tmp_path / "events.jsonl").read_text().splitlines()[0])["data"] == {"seed": 1}


def test_numbers_of_iterations(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    assert run.iterations() == run.evaluations() == []
    for name in ("0010", "0002", "notes"):
        (tmp_path / "iterations" / name).mkdir(parents=True)
    assert run.iterations() == [2, 10]


def test_a_folder_replaces_an_older_one(tmp_path: Path) -> None:
    for name in ("new", "old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).write_text("")
    replace_dir(tmp_path / "new", tmp_path / "old")
    assert [p.name for p in (tmp_path / "old").iterdir()] == ["new"]


def test_a_run_without_a_job_is_named(tmp_path: Path) -> None:
    write_json(tmp_path / "run.json", {"schema_version": 1})
    with pytest.raises(UserError, match=r"run\.json: not a run's \(no job in it\)"):
        RunDir.open(tmp_path)


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="no /proc here")
def test_a_place_that_takes_no_folders_is_the_users_mistake() -> None:
    with pytest.raises(UserError, match=r"^/proc/rlaif: can't write here"), RunDir(Path("/proc/rlaif")).lock():
        pass


def test_a_file_of_other_bytes_is_an_error_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_bytes(b'{"a": "\xff"}')
    with pytest.raises(RlaifError, match=r"run\.json: not UTF-8 \(byte 8\)"):
        RunDir.open(tmp_path)


@pytest.mark.parametrize("wrong", [{"job": []}, {"models": None}, {"packages": []}, {"job": {"judge": None}}])
def test_a_header_of_another_shape_is_refused_when_it_is_opened(tmp_path: Path, wrong: dict[str, object]) -> None:
    write_json(tmp_path / "run.json", {"schema_version": 1, "job": {}} | wrong)
    with pytest.raises(UserError, match=r"run\.json: not a run's"):
        RunDir.open(tmp_path)


@pytest.mark.parametrize("content", ["[1]", "{}", "null", '{"rows": 1}'])
def test_a_damaged_meta_file_is_one_line_that_names_it(tmp_path: Path, content: str) -> None:
    path = tmp_path / "updates.meta.json"
    path.write_text(content)
    for ask in (lambda: StageDir(tmp_path).meta("updates"), StageDir(tmp_path).policy_made):
        with pytest.raises(RlaifError, match=rf"^{path}: not the meta file of a stage"):
            ask()
    path.unlink()
    with pytest.raises(RlaifError, match=rf"^{path}: missing, though updates.jsonl is there$"):
        StageDir(tmp_path).meta("updates")
