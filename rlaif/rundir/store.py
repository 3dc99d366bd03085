"""The run directory: durable rows, stages that are complete or not, events, the lock.

A stage writes `<stage>.jsonl.partial`, a chunk at a time. When it is complete, `<stage>.meta.json` is
written (schema version, row count, digest, digests of rows and of inputs, seconds) and the partial file is renamed.
A reader therefore sees a stage either whole or not at all; whoever resumes reads the durable rows of the
partial file and owes the rest. See docs/run-directory.md.
"""

from __future__ import annotations

import base64
import datetime
import difflib
import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Generic, Protocol, Self, TypeVar

from pydantic import ValidationError

from rlaif.config import Job, of_run, parse_job
from rlaif.errors import RlaifError, UserError, first_problem
from rlaif.records import SCHEMA_VERSION, EvaluationMetrics, Event, IterationMetrics, Parent, Plan, Record, stored

R = TypeVar("R", bound=Record)
C = TypeVar("C", bound=Record, contravariant=True)

ROW_DIGEST_BYTES = 4
READ_BACK = 1 << 16
"""Bytes that are looked through at once for the end of a file's last whole line."""
LOCK = ".lock"
_LOOKED_AT_S = 0.2
"""Who looks whether a run is held holds it for a moment, which must not keep a writer out."""
STARTING = ".starting"
"""File in a run that has no run.json yet: its models are being loaded."""


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turns a full or read-only disk into one clear line; what was complete before stays complete."""
    try:
        yield
    except OSError as e:
        if e.errno in (errno.ENOSPC, errno.EDQUOT):
            raise RlaifError(f"{path}: no space left on the disk; free some and run the same command again") from e
        if e.errno in (errno.EROFS, errno.EACCES, errno.ENOTDIR, errno.EEXIST):
            raise UserError(f"{path}: can't write here ({e.strerror})") from e
        raise


def make_folder(path: Path) -> None:
    """Makes a folder and those above it, where they are missing.

    Raises:
        UserError: nothing can be written there.
    """
    try:
        with disk_errors(path):
            path.mkdir(parents=True, exist_ok=True)
    except FileNotFoundError as e:  # although its parents are made: a file system that takes no folders, as /proc
        raise UserError(f"{path}: can't write here ({e.strerror})") from e


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file to write instead of `path`, whose place it takes when the block ends well: it is the old one or the new
    one, whole. Surviving a power cut is the writer's matter (fsync)."""
    temporary = path.with_name(path.name + ".partial")
    with disk_errors(path):
        try:
            yield temporary
            os.replace(temporary, path)
        except BaseException:
            with suppress(OSError):
                temporary.unlink()
            raise


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file, durable, the old one or the new one, whole."""
    with replacing(path) as temporary, temporary.open("w") as f:
        json.dump(value, f, indent=1, ensure_ascii=False)
        f.write("\n")
        f.flush()
        os.fsync(f.fileno())


def read_json(path: Path) -> Any:
    """Reads a JSON file; a damaged one is an error that names it."""
    try:
        return json.loads(path.read_text())
    except UnicodeDecodeError as e:
        raise RlaifError(f"{path}: not UTF-8 (byte {e.start + 1}); it was damaged after it was written") from e
    except json.JSONDecodeError as e:
        raise RlaifError(f"{path}:{e.lineno}: not valid JSON ({e.msg}); it was damaged after it was written") from e


def read_source(path: Path) -> str:
    """A text's file as its author wrote it, to be shown; what isn't UTF-8, or is gone, is said in its place."""
    try:
        return path.read_text(errors="replace")
    except FileNotFoundError:
        return "(the run's copy is missing)"


def meta_missing(path: Path) -> str:
    """What is to be said of a complete stage whose meta file is gone."""
    return f"{path}: missing, though {path.name.removesuffix('.meta.json')}.jsonl is there"


def read_record(path: Path, record: type[R]) -> R:
    """Reads a JSON file that holds one record; another one is an error that names it."""
    try:
        return stored(record, read_json(path))
    except ValidationError as e:
        what = f"not a {record.__name__} of schema {SCHEMA_VERSION} or older"
        raise RlaifError(f"{path}: {what} ({first_problem(e)}); it was damaged after it was written") from e


def file_digest(path: Path) -> str:
    """sha256 of a file's bytes, hex."""
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def row_digest(line: bytes) -> bytes:
    """Four bytes that tell a line (its newline included) from others: where a file was changed, not whether."""
    return hashlib.blake2b(line, digest_size=ROW_DIGEST_BYTES).digest()


def row_digests(lines: Iterable[bytes]) -> str:
    """The digests of lines, one after the other, base64: 5 MB for a million of them."""
    return base64.b64encode(b"".join(map(row_digest, lines))).decode()


def append_line(path: Path, line: str) -> None:
    """Appends one line to a file that only grows."""
    with disk_errors(path), path.open("ab+") as f:
        # A line torn by a kill must not swallow this one.
        if f.tell() and (f.seek(-1, os.SEEK_END), f.read(1))[1] != b"\n":
            f.write(b"\n")
        f.write(line.encode() + b"\n")


def read_grown(path: Path, record: type[R]) -> list[R]:
    """The whole lines of a file that only grows; one torn by a kill is left out. Empty when there is no file."""
    rows = []
    for line in path.read_bytes().splitlines() if path.exists() else []:
        try:
            rows.append(stored(record, line))
        except ValidationError:
            continue
    return rows


def read_rows(path: Path, record: type[R], only: re.Pattern[bytes] | None = None) -> list[R]:
    """Reads a complete JSONL file; a damaged line is an error that names file and line.

    `only` spares parsing: lines in which it is nowhere found are left out, unread.
    """
    return [row for _, row in each_row(path, record, only)]


def each_row(path: Path, record: type[R], only: re.Pattern[bytes] | None = None) -> Iterator[tuple[int, R]]:
    """As `read_rows`, a row at a time, each with the byte at which its line begins."""
    at = 0
    with path.open("rb") as f:
        for number, line in enumerate(f, 1):
            begins, at = at, at + len(line)
            if only is not None and only.search(line) is None:
                continue
            try:
                yield begins, stored(record, line)
            except ValidationError as e:
                problem = e.errors()[0]["msg"]
                what = f"not a {record.__name__} of schema {SCHEMA_VERSION} or older"
                raise RlaifError(f"{path}:{number}: {what} ({problem})") from e


class StageDir:
    """One folder of stages: an iteration or an evaluation."""

    def __init__(self, path: Path):
        self.path = path

    def is_complete(self, stage: str) -> bool:
        """Whether the stage's rows are all there."""
        return self._file(stage).exists()

    def is_begun(self, stage: str) -> bool:
        """Whether the stage was begun and isn't complete, by a process that is at work or by one that was stopped."""
        return (self.path / f"{stage}.jsonl.partial").exists()

    def has_begun_rows(self, stage: str) -> bool:
        """Whether it was begun, isn't complete, and holds something."""
        try:
            return (self.path / f"{stage}.jsonl.partial").stat().st_size > 0
        except FileNotFoundError:
            return False

    def meta(self, stage: str) -> dict[str, Any]:
        """The stage's meta file: rows, digest, inputs, seconds.

        Raises:
            RlaifError: it is gone or damaged.
        """
        path = self.path / f"{stage}.meta.json"
        try:
            meta = read_json(path)
        except FileNotFoundError as e:
            raise RlaifError(meta_missing(path)) from e
        if not isinstance(meta, dict) or not {"rows", "sha256"} <= meta.keys():
            raise RlaifError(f"{path}: not the meta file of a stage; it was damaged after it was written")
        return meta

    def policy_made(self) -> str | None:
        """Digest of the policy that the complete update made; None when it was skipped.

        Raises:
            RlaifError: the update's meta file is gone or damaged, so nobody knows.
        """
        meta = self.meta("updates")
        skipped, made = meta.get("skipped"), meta.get("policy_digest")
        if skipped is True:
            return None
        if skipped is False and isinstance(made, str):
            return made
        path = self.path / "updates.meta.json"
        raise RlaifError(f"{path}: doesn't say which policy was made; it was damaged after it was written")

    def read(self, stage: str, record: type[R], only: re.Pattern[bytes] | None = None) -> list[R]:
        """The rows of a complete stage; with `only`, those whose line it is found in."""
        return read_rows(self._file(stage), record, only)

    def durable(self, stage: str, record: type[R]) -> list[R]:
        """The rows that are on disk, of a complete stage or of an interrupted one."""
        return list(self.each(stage, record))

    def each(self, stage: str, record: type[R]) -> Iterator[R]:
        """The same, a row at a time."""
        return (row for _, row in self._each_at(stage, record))

    def note_each(self, stage: str, record: type[R], held: Held[R]) -> None:
        """Tells `held` of these rows."""
        for at, row in self._each_at(stage, record):
            held.note(row, at)

    def file(self, stage: str) -> Path:
        """Where the stage's rows are: a file that is whole, or one that is being written."""
        whole = self._file(stage)
        return whole if whole.exists() else self._partial(stage)

    def _each_at(self, stage: str, record: type[R]) -> Iterator[tuple[int, R]]:
        if self.is_complete(stage):
            return each_row(self._file(stage), record)
        return _recover(self._partial(stage), record)

    def rows(
        self,
        stage: str,
        record: type[R],
        produce: Callable[[list[R]], Iterable[list[R]]],
        *,
        inputs: Iterable[str] = (),
        resumable: bool = True,
        before_commit: Callable[[], dict[str, Any]] | None = None,
        writer: StageWriter[R] | None = None,
    ) -> list[R]:
        """The stage's rows: read when complete, otherwise produced, each chunk durable before the next is asked for.

        Args:
            produce: gets the rows that an interrupted attempt left, yields chunks of further rows.
            inputs: stages of this folder that the rows were made from; their digests go into the meta file.
            resumable: False when a part of the rows can't be completed later (sampling: batching changes samples).
            before_commit: runs when all rows are there, before the stage counts as complete; what it returns
                goes into the meta file.
            writer: of the stage, where it was begun already.
        """
        if self.is_complete(stage):
            return self.read(stage, record)
        begun = writer or self.writer(stage, record, resumable=resumable)
        rows: list[R] = begun.held
        begun.fill(lambda: produce(list(rows)), inputs, before_commit)
        return rows

    def writer(
        self, stage: str, record: type[R], *, resumable: bool = True, held: Held[R] | None = None
    ) -> StageWriter[R]:
        """Begins a stage, or goes on with it where an interrupted attempt left rows, if it is `resumable`. `held` is
        told of its rows; a list of them when absent."""
        self.path.mkdir(parents=True, exist_ok=True)
        return StageWriter(self, stage, record, resumable, Rows() if held is None else held)

    def _file(self, stage: str) -> Path:
        return self.path / f"{stage}.jsonl"

    def _partial(self, stage: str) -> Path:
        return self.path / f"{stage}.jsonl.partial"


class WriterClosed(Exception):
    """Nobody wants more rows of this stage from here: whoever makes them should stop."""


class Held(Protocol[C]):
    """What is held of a stage's rows while they are written."""

    def note(self, row: C, at: int) -> None:
        """One more that is durable; its line begins at this byte of the stage's file."""


class Rows(list[R]):
    """All of them."""

    def note(self, row: R, at: int) -> None:
        """One more."""
        self.append(row)


class StageWriter(Generic[R]):
    """A stage that is being written. Closed, it takes no more rows, from whichever thread."""

    def __init__(self, here: StageDir, stage: str, record: type[R], resumable: bool, held: Held[R]):
        self._here, self._stage = here, stage
        self._started = time.monotonic()
        self._partial = here.path / f"{stage}.jsonl.partial"
        if not resumable:
            self._partial.unlink(missing_ok=True)
        self.held: Any = held
        """What was told of every durable row."""
        self._count = 0
        for at, row in _recover(self._partial, record):
            held.note(row, at)
            self._count += 1
        self._lock = threading.Lock()
        with disk_errors(self._partial):
            self._file = self._partial.open("ab")

    def count(self) -> int:
        """How many are durable; waits for those that another thread is adding."""
        with self._lock:
            return self._count

    def add(self, chunk: Iterable[R]) -> None:
        """Appends rows; they are durable when it returns.

        Raises:
            WriterClosed: it was closed meanwhile.
        """
        rows = list(chunk)
        with self._lock, disk_errors(self._partial):
            self._check_open()
            begins = []
            for row in rows:
                begins.append(self._file.tell())
                self._file.write(row.model_dump_json().encode() + b"\n")
            self._file.flush()
            os.fsync(self._file.fileno())
            for row, at in zip(rows, begins, strict=True):
                self.held.note(row, at)
            self._count += len(rows)

    def fill(
        self,
        chunks: Callable[[], Iterable[list[R]]],
        inputs: Iterable[str],
        before_commit: Callable[[], dict[str, Any]] | None = None,
    ) -> None:
        """Adds what is left, each chunk durable before the next is asked for; then the stage is complete. Arguments as
        in `StageDir.rows`."""
        with self:
            for chunk in chunks():
                self.add(chunk)
            self.complete(inputs, before_commit() if before_commit else {})

    def complete(self, inputs: Iterable[str], extra: dict[str, Any]) -> None:
        """All rows are there: the stage is complete.

        Args:
            inputs: stages of this folder that the rows were made from; their digests go into the meta file.
            extra: goes there, too.

        Raises:
            WriterClosed: it was closed meanwhile.
        """
        with self._lock, disk_errors(self._partial):
            self._check_open()
            self._file.close()
            with self._partial.open("rb") as f:
                of_rows = row_digests(f)
            meta = {
                "schema_version": SCHEMA_VERSION,
                "rows": self._count,
                "sha256": file_digest(self._partial),
                "row_digests": of_rows,
                "inputs": {name: self._here.meta(name)["sha256"] for name in inputs},
                "seconds": round(time.monotonic() - self._started, 3),
                **extra,
            }
            # The meta file first: with the rename the stage is complete, and then its meta file must exist.
            write_json(self._here.path / f"{self._stage}.meta.json", meta)
            os.replace(self._partial, self._here.path / f"{self._stage}.jsonl")

    def close(self) -> None:
        """What is durable stays; the rest is owed."""
        with self._lock:
            self._file.close()

    def _check_open(self) -> None:
        if self._file.closed:
            raise WriterClosed(str(self._partial))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _recover(partial: Path, record: type[R]) -> Iterator[tuple[int, R]]:
    """The durable rows of an interrupted stage; a torn last line is cut off, it is owed again."""
    if partial.exists():
        _cut_torn_line(partial)
        yield from each_row(partial, record)


def _cut_torn_line(path: Path) -> None:
    """A line without an end was being written when its writer was killed."""
    with path.open("rb") as f:
        size = whole = f.seek(0, os.SEEK_END)
        while whole:
            begins = max(0, whole - READ_BACK)
            f.seek(begins)
            if (end := f.read(whole - begins).rfind(b"\n")) >= 0:
                whole = begins + end + 1
                break
            whole = begins
    if whole < size:
        os.truncate(path, whole)


def rolling_back(path: Path) -> Path:
    """Beside a run's folder: what takes its place when the run is rolled back, whole before it does."""
    return path.with_name(f"{path.name}.rolling-back")


def refuse_half_rolled_back(path: Path) -> None:
    """A kill between the two renames of a rollback leaves a name without a run: nobody may start another there.

    Raises:
        UserError: it is so; with the command that finishes it.
    """
    if not path.exists() and (half := rolling_back(path)).is_dir():
        to = f" --to {parent.iterations}" if (parent := RunDir(half).parent) else ""
        raise UserError(f"{path}: its rollback was interrupted; `rlaif rollback {path}{to}` finishes it")


def _major(header: Any) -> int | None:
    version = header.get("schema_version") if isinstance(header, dict) else None
    major = re.fullmatch(r"(\d+)(?:\.\d+)*", str(version))
    return int(major[1]) if major else None


def _no_run(path: Path) -> str:
    """Why there is no run at a path, and what may have been meant."""
    if path.is_dir() and any(path.glob("*/run.json")):
        return f"this is a folder of runs; `rlaif runs {path}` lists them"
    if path.exists():
        return "not a run directory (no run.json in it); `rlaif run JOB` makes one under runs/"
    beside = [found.parent.name for found in path.absolute().parent.glob("*/run.json")]
    near = difflib.get_close_matches(path.name, beside, n=1)
    if near:
        return f"no such run; did you mean {path.with_name(near[0])}?"
    return "no such run; `rlaif runs` lists those in runs/, `rlaif run JOB` makes one"


class RunDir:
    """A run's directory: `run.json`, `events.jsonl`, texts, iterations, evaluations, the learner's state."""

    def __init__(self, path: Path):
        self.path = path

    @classmethod
    def open(cls, path: Path) -> RunDir:
        """Opens an existing run for reading.

        Raises:
            UserError: no run there, or one that a newer rlaif wrote.
        """
        refuse_half_rolled_back(path)
        if (path / STARTING).exists() and not (path / "run.json").exists():
            raise UserError(f"{path}: this run is starting, or stopped while it was; nothing is in it yet")
        if not (path / "run.json").exists():
            raise UserError(f"{path}: {_no_run(path)}")
        run = cls(path)
        header = run.header
        if (major := _major(header)) is None:
            raise UserError(f"{path / 'run.json'}: not a run's (no schema_version in it); restore the file")
        if major > SCHEMA_VERSION:
            version = header["schema_version"]
            raise UserError(f"{path}: written with schema {version}, this rlaif reads up to {SCHEMA_VERSION}; upgrade")
        if not isinstance(header.get("job"), dict):
            raise UserError(f"{path / 'run.json'}: not a run's (no job in it); restore the file")
        if wrong := [n for n in ("models", "packages") if not isinstance(header.get(n, {}), dict)]:
            raise UserError(f"{path / 'run.json'}: not a run's ({wrong[0]} is no mapping); restore the file")
        for name in ("judge", "policy", "filters"):  # readers look into these without parsing the job of an older run
            if not isinstance(header["job"].get(name, {}), dict):
                raise UserError(f"{path / 'run.json'}: not a run's (job.{name} is no mapping); restore the file")
        return run

    @property
    def header(self) -> dict[str, Any]:
        """run.json."""
        header: dict[str, Any] = read_json(self.path / "run.json")
        return header

    @property
    def schema(self) -> int | None:
        """The major schema version of run.json: the newest that any of its rows has. A minor one only adds. None where
        there is none in it."""
        return _major(self.header)

    @property
    def parent(self) -> Parent | None:
        """The run that this one went on from, where it is a branch.

        Raises:
            RlaifError: run.json says it, and is damaged.
        """
        found = self.header.get("parent")
        try:
            return None if found is None else stored(Parent, found)
        except ValidationError as e:
            raise RlaifError(f"{self.path / 'run.json'}: its parent is none ({first_problem(e)})") from e

    def done(self) -> list[int]:
        """The iterations that are done, in order."""
        return [k for k in self.iterations() if (self.iteration(k).path / "metrics.json").exists()]

    def job(self) -> Job:
        """The job as run.json has it.

        Raises:
            UserError: it isn't one.
        """
        tree = of_run(self.header.get("job", {}))
        try:
            return stored(Job, tree)  # of a newer rlaif, it may have settings that there weren't
        except ValidationError:
            return parse_job(tree, str(self.path / "run.json"))  # says what is wrong

    def plan(self, k: int) -> Plan:
        """The plan of iteration k."""
        return read_record(self.iteration(k).path / "plan.json", Plan)

    def iteration(self, k: int) -> StageDir:
        """The folder of iteration k, from 0."""
        return StageDir(self.path / "iterations" / f"{k:04d}")

    def evaluation(self, updates: int) -> StageDir:
        """The folder of the evaluation after so many iterations; 0 is the base policy."""
        return StageDir(self.path / "evaluations" / f"{updates:04d}")

    def iterations(self) -> list[int]:
        """The iterations that were begun, in order."""
        return _numbers(self.path / "iterations")

    def evaluations(self) -> list[int]:
        """The evaluations that were begun, in order."""
        return _numbers(self.path / "evaluations")

    def iterations_measured(self, numbers: Iterable[int]) -> list[IterationMetrics]:
        """metrics.json of those of some iterations that are done, in order."""
        paths = (self.iteration(k).path / "metrics.json" for k in numbers)
        return [read_record(path, IterationMetrics) for path in paths if path.exists()]

    def evaluations_measured(self, numbers: Iterable[int]) -> list[EvaluationMetrics]:
        """metrics.json of those of some evaluations that are done, in order."""
        paths = (self.evaluation(updates).path / "metrics.json" for updates in numbers)
        return [read_record(path, EvaluationMetrics) for path in paths if path.exists()]

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Holds the run for one writer.

        Raises:
            UserError: another process is writing it.
        """
        from filelock import FileLock, Timeout  # brings asyncio: not for who only reads

        refuse_half_rolled_back(self.path)
        make_folder(self.path)
        lock = FileLock(self.path / LOCK)
        try:
            lock.acquire(timeout=_LOOKED_AT_S)
        except Timeout as e:
            raise UserError(f"{self.path}: another process writes this run; wait for it, or use another --name") from e
        try:
            yield
        finally:
            lock.release()

    def is_held(self) -> bool:
        """Whether a process writes the run now; nothing is made for that, so a run that may only be read can be
        asked."""
        try:
            with (self.path / LOCK).open("rb") as lock:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:  # never held, or a file system without locks
            return False
        return False

    def event(self, kind: str, message: str, iteration: int | None = None, /, **data: Any) -> Event:
        """Appends one line to events.jsonl."""
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
        event = Event(time=now, kind=kind, iteration=iteration, message=message, data=data)
        append_line(self.path / "events.jsonl", event.model_dump_json())
        return event

    def events(self) -> list[Event]:
        """All whole lines of events.jsonl."""
        return read_grown(self.path / "events.jsonl", Event)


def _numbers(folder: Path) -> list[int]:
    return sorted(int(p.name) for p in folder.iterdir() if p.name.isdigit()) if folder.is_dir() else []


def replace_dir(temporary: Path, final: Path) -> None:
    """Moves a finished folder to its place; a half-made older attempt there is removed first."""
    if final.exists():
        shutil.rmtree(final)
    os.replace(temporary, final)
