"""The index of a run: its JSONL files as DuckDB tables (`rlaif.audit.tables`), kept outside the run.

A run directory goes in, SQL answers come out. The index is one file in the user's cache folder and can be thrown away
at any time. A complete stage is taken in once, and again when its file changes; a file that still grows is taken in
from where the last look ended. Damaged lines are skipped and named in `problems`.

Any number of processes may use it at once: who reads holds a shared lock and a read-only connection for one question,
who updates holds the lock alone, and everything that it took in of one folder appears at once.
"""

from __future__ import annotations

import fcntl
import glob
import hashlib
import json
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pydantic import ValidationError

from rlaif.audit.rows import read_lines
from rlaif.audit.tables import EVALUATION_STAGES, FILL_PANELS, SMALL_TABLES, STAGE_TABLES, create_statements
from rlaif.errors import RlaifError, UserError
from rlaif.models import cache_root
from rlaif.records import Plan, Record, digest, stored
from rlaif.rundir.stages import NAMES
from rlaif.rundir.store import RunDir, StageDir, disk_errors, meta_missing, read_json, read_record

if TYPE_CHECKING:
    import duckdb

VERSION = 3
"""Rises when what is taken in changes; an index of another version, other tables or another DuckDB is made anew."""

MEMORY_LIMIT = "1GB"
_TAIL_BYTES = 4096
"""Of a growing file: what was last taken in must still stand there, or the file was begun anew."""
_LOCK_WAIT_S = 0.05

Progress = Callable[[str, float], None]
"""Told what is being read, and the share of all bytes that is done."""


Key = tuple[str, int, int]
"""A part of a table: its name, the iteration or -1, the evaluation or -1."""


class Source(NamedTuple):
    """A JSONL file of the run that one table takes in."""

    table: str
    iteration: int | None
    evaluation: int | None
    path: Path
    grows: bool
    """Rows may still be added to it."""

    @property
    def key(self) -> Key:
        """Which part of a table it is."""
        return self.table, _or_minus_one(self.iteration), _or_minus_one(self.evaluation)


Owed = tuple[list[Source], list[Key], bool]


@dataclass(frozen=True)
class Taken:
    """What the index has of a source."""

    name: str
    size: int
    mtime_ns: int
    sha256: str | None
    """As the stage's meta file says it."""
    bytes: int
    """Whole lines that were taken in."""
    lines: int
    tail: str
    meta: str
    """Size and time of the stage's meta file."""


class Index:
    """Answers to SQL about one run. Use it as a context manager; several threads may ask at once."""

    def __init__(self, run: RunDir, progress: Progress | None = None):
        """Use `open`; this one looks at nothing yet."""
        import duckdb

        self.run = run
        self._name = f"{run.path.resolve().name}-{digest(str(run.path.resolve()))}"
        layout = digest([VERSION, duckdb.__version__, create_statements()])
        self.path = cache_root() / "audit" / f"{self._name}-{layout}.duckdb"
        self.problems: list[str] = []
        """One line for each damaged or missing file or line."""
        self._progress = progress or (lambda what, share: None)
        self._local = threading.local()
        with _writable(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)

    @classmethod
    def open(cls, run: RunDir, progress: Progress | None = None) -> Index:
        """The index, up to date with the run.

        Raises:
            UserError: the cache folder can't be written.
        """
        index = cls(run, progress)
        index.refresh()
        return index

    def __enter__(self) -> Index:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Nothing is held open between questions."""

    @contextmanager
    def session(self) -> Iterator[None]:
        """Questions asked inside, by this thread, share one connection and see one state of the index."""
        if self._local.__dict__.get("connection") is not None:
            yield
            return
        with self._reading() as connection:
            self._local.connection = connection
            try:
                yield
            finally:
                self._local.connection = None

    def rows(self, sql: str, parameters: Sequence[Any] = ()) -> list[dict[str, Any]]:
        """The rows that a query gives, as mappings of column to value.

        Raises:
            duckdb.Error: the query is wrong, or tries to write or to read another file.
        """
        with self.session():
            cursor = self._local.connection.execute(sql, list(parameters))
            names = [d[0] for d in cursor.description or ()]
            return [dict(zip(names, row, strict=True)) for row in cursor.fetchall()]

    def ask(self, sql: str, limit: int) -> tuple[list[str], list[tuple[Any, ...]]]:
        """A user's own query: column names, and at most `limit` rows.

        Raises:
            UserError: it is wrong, more than one statement, or wants more than to read these tables.
        """
        import duckdb

        try:
            with self._reading() as connection:
                statements = connection.extract_statements(sql)
                if len(statements) != 1:
                    raise UserError(f"sql: one SELECT at a time, found {len(statements)} statements")
                if statements[0].type not in (duckdb.StatementType.SELECT, duckdb.StatementType.EXPLAIN):
                    raise UserError(f"sql: read-only, and this is a {statements[0].type.name}; ask with SELECT")
                cursor = connection.execute(statements[0])
                return [d[0] for d in cursor.description or ()], cursor.fetchmany(limit)
        except duckdb.Error as e:
            raise UserError(f"sql: {' '.join(str(e).split())}") from e

    def refresh(self) -> None:
        """Takes in what the run wrote since the last look; cheap when that is nothing."""
        for attempt in (1, 2):
            try:
                if self._owed() is not None:
                    self._update()
                with self.session():
                    found = self.rows("SELECT file, line, message FROM problems ORDER BY file, line")
                    missing = self._missing()
                read = [
                    f"{self.run.path / r['file']}{'' if r['line'] is None else ':' + str(r['line'])}: {r['message']}"
                    for r in found
                ]
                self.problems = [*dict.fromkeys([*missing, *read])]
                return
            except _duckdb().Error as e:
                # Torn by a full disk or a killed machine: it is only a copy.
                # A lock is not ours: somebody looks at the file with DuckDB itself.
                if attempt == 2 or "Could not set lock" in str(e):
                    raise RlaifError(f"{self.path}: the index can't be used ({_first_line(e)})") from e
                with self._lock(alone=True):
                    self._remove()

    def source_lines(self, table: str, row: dict[str, Any], lines: Iterable[int]) -> dict[int, bytes]:
        """Lines of the file that a row of a stage's table came from: line number → bytes.

        `row` has `iteration` and `evaluation`.
        """
        found = self._path_of(table, row["iteration"], row["evaluation"])
        return read_lines(found, lines) if found else {}

    def file_of(self, table: str, row: dict[str, Any]) -> Path:
        """The file that a row of a stage's table came from; `row` has `iteration` and `evaluation`."""
        found = self._path_of(table, row["iteration"], row["evaluation"])
        return found or self.run.path / f"{table}.jsonl"

    def unknown_updates(self) -> dict[int, str]:
        """Iteration → why it isn't known which policy its update, which is done, made."""
        out = {}
        for r in self.rows("SELECT iteration FROM iterations WHERE skipped IS NULL ORDER BY iteration"):
            here = self.run.iteration(r["iteration"])
            try:
                if here.is_complete("updates"):
                    here.policy_made()
            except (RlaifError, OSError) as e:
                out[r["iteration"]] = str(e)
        return out

    # Looking at the run.

    def _path_of(self, table: str, iteration: int | None, evaluation: int | None) -> Path | None:
        here = self.run.iteration(iteration) if iteration is not None else self.run.evaluation(evaluation or 0)
        for name in (f"{table}.jsonl", f"{table}.jsonl.partial"):
            if (here.path / name).exists():
                return here.path / name
        return None

    def _sources(self) -> list[Source]:
        """Every JSONL file of the run, in the order of the log."""
        path = self.run.path
        found = [
            # Two files of one table: the number only tells them apart (column `held_out`).
            Source("prompts", 0, None, path / "prompts" / "train.jsonl", False),
            Source("prompts", 1, None, path / "prompts" / "held_out.jsonl", False),
            Source("events", None, None, path / "events.jsonl", True),
            Source("labels", None, None, path / "review" / "labels.jsonl", True),
        ]
        found = [s for s in found if s.path.exists()]
        for k in self.run.iterations():
            found += self._stages(self.run.iteration(k).path, NAMES, k, None)
        for k in self.run.evaluations():
            found += self._stages(self.run.evaluation(k).path, EVALUATION_STAGES, None, k)
        return found

    def _stages(
        self, folder: Path, stages: Sequence[str], iteration: int | None, evaluation: int | None
    ) -> list[Source]:
        names = {e.name for e in os.scandir(folder)}
        found = []
        for stage in stages:
            if f"{stage}.jsonl" in names:
                found.append(Source(stage, iteration, evaluation, folder / f"{stage}.jsonl", False))
            elif f"{stage}.jsonl.partial" in names:
                found.append(Source(stage, iteration, evaluation, folder / f"{stage}.jsonl.partial", True))
        return found

    def _missing(self) -> list[str]:
        """Files that must have been there: what is made from them is."""
        out = []
        begun = any(self.run.iteration(k).is_complete(NAMES[0]) for k in self.run.iterations())
        for name, lost in (
            ("events.jsonl", "alarms, if there were any, can't be told"),
            ("prompts/train.jsonl", "no prompt's text can be shown or searched"),
        ):
            if begun and not (self.run.path / name).exists():
                out.append(f"{self.run.path / name}: missing; {lost}")
        for r in self.rows("SELECT DISTINCT constitution AS hash FROM iterations WHERE hash IS NOT NULL ORDER BY ALL"):
            copy = self.run.path / "constitutions" / r["hash"] / "constitution.json"
            if not copy.exists():
                out.append(f"{copy}: missing, though iterations were judged under it")
        for numbers, folder, stages in (
            (self.run.iterations(), self.run.iteration, NAMES),
            (self.run.evaluations(), self.run.evaluation, EVALUATION_STAGES),
        ):
            for k in numbers:
                here = folder(k)
                there = [here.is_complete(s) for s in stages]
                last = max((i for i, t in enumerate(there) if t), default=-1)
                if stages is NAMES and last >= 0 and not (here.path / "plan.json").exists():
                    out.append(f"{here.path / 'plan.json'}: missing, though {stages[last]}.jsonl is there")
                out += [
                    f"{here.path / stages[i]}.jsonl: missing, though {stages[last]}.jsonl is there"
                    for i in range(last)
                    if not there[i]
                ]
                metas = [here.path / f"{s}.meta.json" for s, complete in zip(stages, there, strict=True) if complete]
                out += [meta_missing(meta) for meta in metas if not meta.exists()]
        return out

    def _small_files(self) -> list[Path]:
        path = self.run.path
        found = [path / "run.json"]
        for k in self.run.iterations():
            found += [self.run.iteration(k).path / n for n in ("plan.json", "metrics.json", "updates.meta.json")]
        found += [self.run.evaluation(k).path / "metrics.json" for k in self.run.evaluations()]
        return [*found, *sorted((path / "constitutions").glob("*/constitution.json"))]

    def _small_digest(self) -> str:
        seen = []
        for path in self._small_files():
            with suppress(FileNotFoundError):
                status = path.stat()
                seen.append((str(path.relative_to(self.run.path)), status.st_size, status.st_mtime_ns, status.st_mode))
        return digest(seen)

    def _owed(self) -> Owed | None:
        """What an update has to do: sources to take in, parts to remove, whether small files changed."""
        taken: dict[Key, Taken] = {}
        small = ""
        if self.path.exists():
            with self._reading() as connection:
                taken = _taken(connection.execute(_FILES).fetchall())
                small = connection.execute("SELECT digest FROM small").fetchall()[0][0]
        return self._compare(taken, small)

    def _compare(self, taken: dict[Key, Taken], small: str) -> Owed | None:
        sources = self._sources()
        owed = []
        for source in sources:
            try:
                status = source.path.stat()
            except FileNotFoundError:  # renamed just now; the next look finds it
                continue
            known = taken.get(source.key)
            now = (source.path.name, status.st_size, status.st_mtime_ns, _meta_seen(source))
            if known is None or now != (known.name, known.size, known.mtime_ns, known.meta):
                owed.append(source)
        gone = sorted(set(taken) - {s.key for s in sources})
        small_changed = self._small_digest() != small
        return (owed, gone, small_changed) if owed or gone or small_changed else None

    # Updating.

    def _update(self) -> None:
        with self._lock(alone=True), _writable(self.path):
            fresh = not self.path.exists()
            with self._connect(read_only=False) as connection:
                if fresh:
                    self._remove_others()
                    _create(connection)
                taken = _taken(connection.execute(_FILES).fetchall())
                small = connection.execute("SELECT digest FROM small").fetchall()[0][0]
                owed = self._compare(taken, small)
                if owed is None:  # another process did it
                    return
                sources, gone, small_changed = owed
                sizes = [_size(s.path) for s in sources]
                total, done = sum(sizes) or 1, 0
                with _transaction(connection):
                    for key in gone:
                        _forget(connection, key)
                for folder, group in groupby(zip(sources, sizes, strict=True), lambda item: item[0].path.parent):
                    of_folder = list(group)
                    self._progress(f"{folder.parent.name}/{folder.name}", done / total)
                    try:
                        try:
                            self._take_folder(connection, [s for s, _ in of_folder], taken, careful=False)
                        except (_Damaged, _duckdb().InvalidInputException, _duckdb().ConversionException):
                            self._take_folder(connection, [s for s, _ in of_folder], taken, careful=True)
                    except (FileNotFoundError, _duckdb().IOException):
                        # Completed, that is renamed, just now: the next look finds it under its new name.
                        if all(s.path.exists() for s, _ in of_folder):
                            raise
                    done += sum(size for _, size in of_folder)
                if small_changed:
                    with _transaction(connection):
                        self._take_small(connection)
                self._progress("done", 1.0)

    def _take_folder(
        self, connection: duckdb.DuckDBPyConnection, sources: list[Source], taken: dict[Key, Taken], careful: bool
    ) -> None:
        """Takes in a folder's files, all or none."""
        with _transaction(connection):
            for source in sources:
                try:
                    self._take(connection, source, taken.get(source.key), careful)
                except PermissionError as e:  # not taken in, so that every look tries again
                    _forget(connection, source.key)
                    self._problem(connection, source, None, f"can't be read ({e.strerror})")
            self._fill_panels(connection, sources)

    def _take(self, connection: duckdb.DuckDBPyConnection, source: Source, known: Taken | None, careful: bool) -> None:
        """Takes in one file: the whole of it, or what was added since the last look."""
        meta_seen = _meta_seen(source)
        status = source.path.stat()
        start, lines, end = 0, 0, status.st_size
        if source.grows:
            end = _end_of_lines(source.path, status.st_size)
            if known is not None and known.name == source.path.name and _still(source.path, known):
                start, lines = known.bytes, known.lines
        if start == 0:
            _forget(connection, source.key)
        if end > start:
            with _part(source.path, start, end) if source.grows else nullcontext(source.path) as path:
                lines += self._insert(connection, source, path, lines, careful)
        sha256 = None
        meta = source.path.with_name(f"{source.table}.meta.json")
        if not source.grows and meta.exists():
            try:
                found = StageDir(meta.parent).meta(source.table)
                sha256 = _of(found, "sha256", str)
                if found["rows"] != lines:
                    self._problem(connection, source, None, f"has {lines} lines, {meta.name} says {found['rows']}")
            except (PermissionError, RlaifError) as e:
                self._problem(connection, source, *_split(meta, e), meta)
        connection.execute(
            "DELETE FROM files WHERE source_table = ? AND iteration = ? AND evaluation = ?", list(source.key)
        )
        connection.execute(
            "INSERT INTO files VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            [*source.key, source.path.name, status.st_size, status.st_mtime_ns, sha256, end, lines,
             _tail(source.path, end), meta_seen],
        )  # fmt: skip

    def _insert(
        self, connection: duckdb.DuckDBPyConnection, source: Source, path: Path, before: int, careful: bool
    ) -> int:
        """Inserts a file's rows, numbered from `before` + 1; how many lines it has.

        Raises:
            _Damaged: not every line is a row. Which ones, and the right numbers for all others, takes a slower look.
        """
        lines = _count_lines(path)
        if not careful:
            if self._read(connection, source, path, before, strict=True) != lines:
                raise _Damaged
            return lines
        record = STAGE_TABLES[source.table].record
        assert record is not None
        with _mended(path, record) as (mended, damaged):
            self._read(connection, source, mended, before, strict=False)
        for line in damaged:
            what = f"not a line of {source.table}; it was damaged after it was written, and is left out"
            self._problem(connection, source, before + line, what)
        return lines

    def _read(
        self, connection: duckdb.DuckDBPyConnection, source: Source, path: Path, before: int, strict: bool
    ) -> int:
        """Inserts the sound rows of a file; how many there are. `strict` fails at a value of another type."""
        table = STAGE_TABLES[source.table]
        fields = ", ".join(f"{name}: '{kind}'" for name, kind in table.json_columns().items())
        columns = ", ".join(c.source for c in table.columns)
        places = {"iteration": source.iteration, "evaluation": source.evaluation, "held_out": source.iteration == 1}
        where = ", ".join("?" if c.name in places else "? + r.line" for c in table.where)
        values = [places.get(c.name, before) for c in table.where]
        sound = " AND ".join(f"r.{name} IS NOT NULL" for name in (table.key, *(table.required() if strict else ())))
        found = connection.execute(
            f"INSERT INTO {table.name} SELECT {where}, {columns} FROM (SELECT row_number() OVER () AS line, * FROM "
            f"read_json(?, format = 'newline_delimited', ignore_errors = {'false' if strict else 'true'}, "
            f"columns = {{{fields}}})) r WHERE {sound}",
            [*values, str(path)],
        ).fetchall()
        return int(found[0][0])

    def _fill_panels(self, connection: duckdb.DuckDBPyConnection, sources: list[Source]) -> None:
        for source in sources:
            if source.table == "votes":
                where, values = _where(source.key)
                connection.execute(f"DELETE FROM panels WHERE {where}", values)
                connection.execute(FILL_PANELS, [source.iteration, source.evaluation])

    def _problem(
        self,
        connection: duckdb.DuckDBPyConnection,
        source: Source,
        line: int | None,
        message: str,
        path: Path | None = None,
    ) -> None:
        """Keeps a problem of a source; `path` is the file when it isn't the source's own."""
        connection.execute(
            "INSERT INTO problems VALUES (?, ?, ?, ?, ?, ?)",
            [*source.key, self._relative(path or source.path), line, message],
        )

    def _relative(self, path: Path) -> str:
        """A path as problems keep it: the run may be named otherwise, or lie elsewhere, when they are printed."""
        return str(path.relative_to(self.run.path))

    def _take_small(self, connection: duckdb.DuckDBPyConnection) -> None:
        """Takes in plans, metrics and texts, all of them anew."""
        key: Key = ("small", -1, -1)
        seen = self._small_digest()
        _forget(connection, key)
        for name in SMALL_TABLES:
            connection.execute(f"DELETE FROM {name}")

        def read(path: Path, record: type[Record] | None = None) -> dict[str, Any] | None:
            try:
                value = read_record(path, record).model_dump(mode="json") if record else read_json(path)
                if isinstance(value, dict):
                    return value
                told(path, "not a JSON object; it was damaged after it was written")
            except FileNotFoundError:
                pass
            except (PermissionError, RlaifError) as e:
                told(path, e)
            return None

        def told(path: Path, problem: str | OSError | RlaifError) -> None:
            found = _split(path, problem)
            connection.execute("INSERT INTO problems VALUES (?, ?, ?, ?, ?, ?)", [*key, self._relative(path), *found])

        for k in self.run.iterations():
            here = self.run.iteration(k).path
            plan, metrics = read(here / "plan.json", Plan), read(here / "metrics.json")
            made, skipped = None, None
            try:
                if self.run.iteration(k).is_complete("updates"):
                    made = self.run.iteration(k).policy_made()
                    skipped = made is None
            except (PermissionError, RlaifError) as e:
                told(here / "updates.meta.json", e)
            text = _of(plan or metrics, "constitution", dict) or {}
            policy = _of(plan or metrics, "policy", dict) or {}
            connection.execute(
                "INSERT INTO iterations VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                [k, _of(text, "hash", str), _text_name(text), _of(policy, "iteration", int), _of(policy, "digest", str),
                 made, skipped, _dumped(metrics)],
            )  # fmt: skip
        for k in self.run.evaluations():
            metrics = read(self.run.evaluation(k).path / "metrics.json")
            # An evaluation that is under way is judged under the text of the iteration that led to it.
            plan = None if metrics else read(self.run.iteration(max(k - 1, 0)).path / "plan.json", Plan)
            text = _of(metrics or plan, "constitution", dict) or {}
            connection.execute(
                "INSERT INTO evaluations VALUES (?, ?, ?, ?)",
                [k, _of(text, "hash", str), _text_name(text), _dumped(metrics)],
            )
        for path in sorted((self.run.path / "constitutions").glob("*/constitution.json")):
            if (content := read(path)) is not None:
                connection.execute(
                    "INSERT INTO constitutions VALUES (?, ?, ?)",
                    [path.parent.name, _text_name(content), _dumped(content)],
                )
        connection.execute("UPDATE small SET digest = ?", [seen])

    # The file.

    @contextmanager
    def _reading(self) -> Iterator[duckdb.DuckDBPyConnection]:
        with self._lock(alone=False), self._connect(read_only=True) as connection:
            yield connection

    def _connect(self, read_only: bool) -> duckdb.DuckDBPyConnection:
        settings: dict[str, Any] = {"memory_limit": MEMORY_LIMIT}
        if read_only:
            settings |= {"enable_external_access": "false", "lock_configuration": "true"}
        return _duckdb().connect(str(self.path), read_only=read_only, config=settings)

    @contextmanager
    def _lock(self, alone: bool) -> Iterator[None]:
        """Holds the index's lock, between threads as well as between processes."""
        with _writable(self.path):
            lock = open(f"{self.path}.lock", "a")  # noqa: SIM115
        with lock as f:
            kind = fcntl.LOCK_EX if alone else fcntl.LOCK_SH
            told = False
            while True:
                try:
                    fcntl.flock(f, kind | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if not told:
                        self._progress("waiting for another process that uses the index", 0.0)
                        told = True
                    time.sleep(_LOCK_WAIT_S)
            yield

    def _remove_others(self) -> None:
        """Removes indexes of this run that an earlier rlaif or DuckDB left."""
        for old in self.path.parent.glob(f"{glob.escape(self._name)}-*"):
            if not old.name.startswith(self.path.name):
                with suppress(OSError):
                    old.unlink()

    def _remove(self) -> None:
        for suffix in ("", ".wal"):
            Path(f"{self.path}{suffix}").unlink(missing_ok=True)


def _duckdb() -> Any:
    import duckdb

    return duckdb


def _or_minus_one(value: int | None) -> int:
    return -1 if value is None else value


def _split(path: Path, problem: str | OSError | RlaifError) -> tuple[int | None, str]:
    """What is wrong with a file as line and message, without its name."""
    if isinstance(problem, OSError):
        return None, f"can't be read ({problem.strerror})"
    line, _, message = str(problem).removeprefix(f"{path}:").partition(": ")
    return (int(line), message) if line.isdigit() else (None, str(problem).removeprefix(f"{path}: "))


def _text_name(text: dict[str, Any]) -> str | None:
    return f"{text['name']}@{text['version']}" if "name" in text and "version" in text else None


def _of(value: dict[str, Any] | None, name: str, kind: type) -> Any:
    """A field of a JSON object; None when it is of another type."""
    found = (value or {}).get(name)
    return found if isinstance(found, kind) else None


def _meta_seen(source: Source) -> str:
    """Size and time of the meta file of a complete stage."""
    meta = source.path.with_name(f"{source.table}.meta.json")
    if source.grows or not meta.exists():
        return ""
    status = meta.stat()
    return f"{status.st_size}:{status.st_mtime_ns}"


class _Damaged(Exception):
    """A file has lines that are no rows."""


def _dumped(value: Any) -> str | None:
    return None if value is None else json.dumps(value, ensure_ascii=False)


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


@contextmanager
def _writable(path: Path) -> Iterator[None]:
    try:
        with disk_errors(path):
            yield
    except UserError as e:
        raise UserError(f"{e}; set RLAIF_CACHE to a folder for the index of runs") from e


_FILES = "SELECT source_table, iteration, evaluation, name, size, mtime_ns, sha256, bytes, lines, tail, meta FROM files"


def _taken(rows: list[tuple[Any, ...]]) -> dict[Key, Taken]:
    return {(r[0], r[1], r[2]): Taken(*r[3:]) for r in rows}


def _create(connection: duckdb.DuckDBPyConnection) -> None:
    key = "source_table VARCHAR, iteration INTEGER, evaluation INTEGER"
    with _transaction(connection):
        for statement in create_statements():
            connection.execute(statement)
        connection.execute(
            f"CREATE TABLE files ({key}, name VARCHAR, size BIGINT, mtime_ns BIGINT, sha256 VARCHAR, bytes BIGINT, "
            "lines INTEGER, tail VARCHAR, meta VARCHAR)"
        )
        connection.execute(f"CREATE TABLE problems ({key}, file VARCHAR, line INTEGER, message VARCHAR)")
        connection.execute("CREATE TABLE small (digest VARCHAR)")
        connection.execute("INSERT INTO small VALUES ('')")


@contextmanager
def _transaction(connection: duckdb.DuckDBPyConnection) -> Iterator[None]:
    connection.execute("BEGIN")
    try:
        yield
    except BaseException:
        connection.execute("ROLLBACK")
        raise
    connection.execute("COMMIT")


def _where(key: Key) -> tuple[str, list[Any]]:
    """A condition for the rows of a source in its table, and its parameters."""
    table, iteration, evaluation = key
    places = {c.name for c in STAGE_TABLES[table].where}  # what a row says itself is another thing
    if "held_out" in places:
        return "held_out = ?", [iteration == 1]
    if "iteration" not in places:
        return "true", []
    where = "iteration IS NOT DISTINCT FROM nullif(?, -1) AND evaluation IS NOT DISTINCT FROM nullif(?, -1)"
    return where, [iteration, evaluation]


def _forget(connection: duckdb.DuckDBPyConnection, key: Key) -> None:
    """Removes what was taken in of a source."""
    table = key[0]
    if table in STAGE_TABLES:
        where, values = _where(key)
        connection.execute(f"DELETE FROM {table} WHERE {where}", values)
        if table == "votes":
            connection.execute(f"DELETE FROM panels WHERE {where}", values)
    for name in ("files", "problems"):
        connection.execute(f"DELETE FROM {name} WHERE source_table = ? AND iteration = ? AND evaluation = ?", list(key))


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _count_lines(path: Path) -> int:
    """Lines of a file; one without a line break at the end counts."""
    lines, last = 0, b"\n"
    with path.open("rb") as f:
        while block := f.read(1 << 20):
            lines += block.count(b"\n")
            last = block[-1:]
    return lines + (last != b"\n")


@contextmanager
def _mended(path: Path, record: type[Record]) -> Iterator[tuple[Path, list[int]]]:
    """A copy in which every damaged line is an empty object, so that all others keep their number; and the numbers."""
    damaged = []
    with tempfile.NamedTemporaryFile(suffix=".jsonl") as copy, path.open("rb") as f:
        for number, line in enumerate(f, 1):
            try:
                stored(record, line)
                copy.write(line.rstrip(b"\n") + b"\n")
            except ValidationError:
                damaged.append(number)
                copy.write(b"{}\n")
        copy.flush()
        yield Path(copy.name), damaged


def _end_of_lines(path: Path, size: int) -> int:
    """Bytes up to the last line break: a line behind it is torn, or still being written."""
    with path.open("rb") as f:
        end = size
        while end > 0:
            start = max(0, end - (1 << 16))
            f.seek(start)
            found = f.read(end - start).rfind(b"\n")
            if found >= 0:
                return start + found + 1
            end = start
    return 0


def _tail(path: Path, end: int) -> str:
    """Digest of the last bytes before `end`."""
    start = max(0, end - _TAIL_BYTES)
    with path.open("rb") as f:
        f.seek(start)
        return hashlib.sha256(f.read(end - start)).hexdigest()


def _still(path: Path, known: Taken) -> bool:
    """What was taken in of a growing file still stands there."""
    return path.stat().st_size >= known.bytes and _tail(path, known.bytes) == known.tail


@contextmanager
def _part(path: Path, start: int, end: int) -> Iterator[Path]:
    """A copy of the bytes from `start` to `end`: the file itself may grow while it is read."""
    with tempfile.NamedTemporaryFile(suffix=".jsonl") as part, path.open("rb") as f:
        f.seek(start)
        left = end - start
        while left and (block := f.read(min(left, 1 << 20))):
            part.write(block)
            left -= len(block)
        part.flush()
        yield Path(part.name)
