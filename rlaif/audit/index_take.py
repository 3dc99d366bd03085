"""Files of a run as rows of the index, with a diagnosis of every line that is none.

In: sources that `index_fresh` found owed. Out: rows in the index's tables, and a row of `problems` for each damaged or
missing line or file. A complete file is taken in as a whole, one that grows from where the last look ended: its last
line may be torn, or still being written. All that is taken in of one folder appears at once.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from rlaif.audit.index_fresh import Key, Owed, Source, Taken
from rlaif.audit.index_small import split_problem, take_small
from rlaif.audit.tables import FILL_PANELS, STAGE_TABLES, create_statements
from rlaif.errors import RlaifError
from rlaif.records import Record, stored
from rlaif.rundir.store import RunDir, StageDir

if TYPE_CHECKING:
    import duckdb

_TAIL_BYTES = 4096
"""Of a growing file: what was last taken in must still stand there, or the file was begun anew."""
_OF_PART = "source_table = ? AND iteration = ? AND evaluation = ?"

Progress = Callable[[str, float], None]
"""Told what is being read, and the share of all bytes that is done."""


def create(connection: duckdb.DuckDBPyConnection) -> None:
    """Makes the tables, and those in which the index keeps what it has taken in."""
    key = "source_table VARCHAR, iteration INTEGER, evaluation INTEGER"
    with _transaction(connection):
        for statement in create_statements():
            connection.execute(statement)
        connection.execute(
            f"CREATE TABLE files ({key}, name VARCHAR, size BIGINT, mtime_ns BIGINT, bytes BIGINT, "
            "lines INTEGER, tail VARCHAR, meta VARCHAR)"
        )
        connection.execute(f"CREATE TABLE problems ({key}, file VARCHAR, line INTEGER, message VARCHAR)")
        connection.execute("CREATE TABLE small (digest VARCHAR)")
        connection.execute("INSERT INTO small VALUES ('')")


def taken_in(connection: duckdb.DuckDBPyConnection) -> tuple[dict[Key, Taken], str]:
    """What the index has of each file, and the digest of the small files that it saw."""
    rows = connection.execute(
        "SELECT source_table, iteration, evaluation, name, size, mtime_ns, bytes, lines, tail, meta FROM files"
    ).fetchall()
    small = connection.execute("SELECT digest FROM small").fetchall()[0][0]
    return {(r[0], r[1], r[2]): Taken(*r[3:]) for r in rows}, small


class Intake:
    """Takes files of a run into an index that is open for writing."""

    def __init__(self, run: RunDir, connection: duckdb.DuckDBPyConnection):
        self.run, self.connection = run, connection

    def take(self, owed: Owed, taken: dict[Key, Taken], progress: Progress) -> None:
        """Does what is owed; `taken` is what the index has."""
        sizes = [_size(s.path) for s in owed.sources]
        total, done = sum(sizes) or 1, 0
        with _transaction(self.connection):
            for key in owed.gone:
                self._forget(key)
        for folder, group in groupby(zip(owed.sources, sizes, strict=True), lambda item: item[0].path.parent):
            of_folder = list(group)
            progress(f"{folder.parent.name}/{folder.name}", done / total)
            self._take_folder([source for source, _ in of_folder], taken)
            done += sum(size for _, size in of_folder)
        if owed.small:
            with _transaction(self.connection):
                take_small(self.run, self.connection)
        progress("done", 1.0)

    def _take_folder(self, sources: list[Source], taken: dict[Key, Taken]) -> None:
        """Takes in a folder's files, all or none: in bulk, and line by line where that finds a damaged one."""
        import duckdb

        try:
            try:
                self._take_all(sources, taken, careful=False)
            except (_Damaged, duckdb.InvalidInputException, duckdb.ConversionException):
                self._take_all(sources, taken, careful=True)
        except (FileNotFoundError, duckdb.IOException):
            # Completed, that is renamed, just now: the next look finds it under its new name.
            if all(s.path.exists() for s in sources):
                raise

    def _take_all(self, sources: list[Source], taken: dict[Key, Taken], careful: bool) -> None:
        with _transaction(self.connection):
            for source in sources:
                try:
                    self._take(source, taken.get(source.key), careful)
                except PermissionError as e:  # not taken in, so that every look tries again
                    self._forget(source.key)
                    self._problem(source, None, f"can't be read ({e.strerror})")
            self._fill_panels(sources)

    def _take(self, source: Source, known: Taken | None, careful: bool) -> None:
        """Takes in one file: the whole of it, or what was added since the last look."""
        meta_seen = source.meta_seen()  # before it is read: a later change is seen by the next look
        status = source.path.stat()
        start, lines, end = 0, 0, status.st_size
        if source.grows:
            end = _end_of_lines(source.path, status.st_size)
            if known is not None and known.name == source.path.name and _still(source.path, known):
                start, lines = known.bytes, known.lines
        if start == 0:
            self._forget(source.key)
        if end > start:
            with _part(source.path, start, end) if source.grows else nullcontext(source.path) as path:
                lines += self._insert(source, path, lines, careful)
        self._check_meta(source, lines)
        self.connection.execute(f"DELETE FROM files WHERE {_OF_PART}", list(source.key))
        self.connection.execute(
            "INSERT INTO files VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            [*source.key, source.path.name, status.st_size, status.st_mtime_ns, end, lines, _tail(source.path, end),
             meta_seen],
        )  # fmt: skip

    def _check_meta(self, source: Source, lines: int) -> None:
        """Names what is wrong with a complete stage's meta file, and a stage with other rows than it says."""
        if (meta := source.meta) is None:
            return
        try:
            rows = StageDir(meta.parent).meta(source.table)["rows"]
        except (PermissionError, RlaifError) as e:
            self._problem(source, *split_problem(meta, e), meta)
            return
        if rows != lines:
            self._problem(source, None, f"has {lines} lines, {meta.name} says {rows}")

    def _insert(self, source: Source, path: Path, before: int, careful: bool) -> int:
        """Inserts a file's rows, numbered from `before` + 1; how many lines it has.

        Raises:
            _Damaged: not every line is a row. Which ones, and the right numbers for all others, takes a slower look.
        """
        lines = _count_lines(path)
        if not careful:
            if self._read(source, path, before, strict=True) != lines:
                raise _Damaged
            return lines
        record = STAGE_TABLES[source.table].record
        assert record is not None
        with _mended(path, record) as (mended, damaged):
            self._read(source, mended, before, strict=False)
        for line in damaged:
            what = f"not a line of {source.table}; it was damaged after it was written, and is left out"
            self._problem(source, before + line, what)
        return lines

    def _read(self, source: Source, path: Path, before: int, strict: bool) -> int:
        """Inserts the sound rows of a file; how many there are. `strict` fails at a value of another type."""
        table = STAGE_TABLES[source.table]
        fields = ", ".join(f"{name}: '{kind}'" for name, kind in table.json_columns().items())
        columns = ", ".join(c.source for c in table.columns)
        places = {"iteration": source.iteration, "evaluation": source.evaluation, "held_out": source.iteration == 1}
        where = ", ".join("?" if c.name in places else "? + r.line" for c in table.where)
        values = [places.get(c.name, before) for c in table.where]
        sound = " AND ".join(f"r.{name} IS NOT NULL" for name in (table.key, *(table.required() if strict else ())))
        read = (
            f"read_json(?, format = 'newline_delimited', ignore_errors = {'false' if strict else 'true'}, "
            f"columns = {{{fields}}})"
        )
        found = self.connection.execute(
            f"INSERT INTO {table.name} SELECT {where}, {columns} FROM (SELECT row_number() OVER () AS line, * FROM "
            f"{table.rows_of(read)}) r WHERE {sound}",
            [*values, str(path)],
        ).fetchall()
        return int(found[0][0])

    def _fill_panels(self, sources: list[Source]) -> None:
        for source in sources:
            if source.table == "votes":
                where, values = _where(source.key)
                self.connection.execute(f"DELETE FROM panels WHERE {where}", values)
                self.connection.execute(FILL_PANELS, [source.iteration, source.evaluation])

    def _forget(self, key: Key) -> None:
        """Removes what was taken in of a source."""
        table = key[0]
        where, values = _where(key)
        for name in (table, "panels") if table == "votes" else (table,):
            self.connection.execute(f"DELETE FROM {name} WHERE {where}", values)
        for name in ("files", "problems"):
            self.connection.execute(f"DELETE FROM {name} WHERE {_OF_PART}", list(key))

    def _problem(self, source: Source, line: int | None, message: str, path: Path | None = None) -> None:
        """Keeps a problem of a source; `path` is the file when it isn't the source's own."""
        # The run may be named otherwise, or lie elsewhere, when problems are printed.
        file = str((path or source.path).relative_to(self.run.path))
        self.connection.execute("INSERT INTO problems VALUES (?, ?, ?, ?, ?, ?)", [*source.key, file, line, message])


class _Damaged(Exception):
    """A file has lines that are no rows."""


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
