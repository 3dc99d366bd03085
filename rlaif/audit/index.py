"""The index of a run: its JSONL files as DuckDB tables (`rlaif.audit.tables`), kept outside the run.

A run directory goes in, SQL answers come out. The index is one file in the user's cache folder and can be thrown away
at any time. `index_fresh` says what it has still to take in, `index_take` takes it in; damaged lines are skipped and
named in `problems`.

It is one database, and not a Parquet file for each finished stage with views over them: such views open every stage's
file anew for every question, which takes three to five times the processor time, and a reader needs the lock as well.

Any number of processes may use it at once: who reads holds a shared lock and a read-only connection for one question,
who updates holds the lock alone, and everything that it took in of one folder appears at once.
"""

from __future__ import annotations

import fcntl
import glob
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlaif.audit.index_fresh import Owed, file_of, look, missing
from rlaif.audit.index_take import Intake, Progress, create, taken_in
from rlaif.audit.rows import read_lines
from rlaif.audit.tables import create_statements
from rlaif.errors import RlaifError, UserError, first_line
from rlaif.models import cache_root
from rlaif.records import digest
from rlaif.rundir.store import RunDir, disk_errors

if TYPE_CHECKING:
    import duckdb

VERSION = 5
"""Rises when what is taken in changes; an index of another version, other tables or another DuckDB is made anew."""

MEMORY_LIMIT = "1GB"
_LOCK_WAIT_S = 0.05


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
                self.problems = self._problems()
                return
            except _duckdb().Error as e:
                # Torn by a full disk or a killed machine: it is only a copy.
                # A lock is not ours: somebody looks at the file with DuckDB itself.
                if attempt == 2 or "Could not set lock" in str(e):
                    raise RlaifError(f"{self.path}: the index can't be used ({first_line(e)})") from e
                with self._lock(alone=True):
                    self._remove()

    def source_lines(self, table: str, row: dict[str, Any], lines: Iterable[int]) -> dict[int, bytes]:
        """Lines of the file that a row of a stage's table came from: line number → bytes.

        `row` has `iteration` and `evaluation`.
        """
        path = self.file_of(table, row)
        return read_lines(path, lines) if path.exists() else {}

    def file_of(self, table: str, row: dict[str, Any]) -> Path:
        """The file that a row of a stage's table came from; `row` has `iteration` and `evaluation`."""
        k = row["iteration"]
        here = self.run.iteration(k) if k is not None else self.run.evaluation(row["evaluation"] or 0)
        return file_of(here, table) or self.run.path / f"{table}.jsonl"

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

    # Updating.

    def _problems(self) -> list[str]:
        with self.session():
            found = self.rows("SELECT file, line, message FROM problems ORDER BY file, line")
            texts = self.rows(
                "SELECT DISTINCT constitution AS hash FROM iterations WHERE hash IS NOT NULL ORDER BY ALL"
            )
        gone = missing(self.run, (r["hash"] for r in texts))
        lines = ("" if r["line"] is None else f":{r['line']}" for r in found)
        read = (f"{self.run.path / r['file']}{line}: {r['message']}" for r, line in zip(found, lines, strict=True))
        return [*dict.fromkeys([*gone, *read])]

    def _owed(self) -> Owed | None:
        if not self.path.exists():
            return look(self.run, {}, "")
        with self._reading() as connection:
            taken, small = taken_in(connection)
        return look(self.run, taken, small)

    def _update(self) -> None:
        with self._lock(alone=True), _writable(self.path):
            fresh = not self.path.exists()
            with self._connect(read_only=False) as connection:
                if fresh:
                    self._remove_others()
                    create(connection)
                taken, small = taken_in(connection)
                if (owed := look(self.run, taken, small)) is not None:  # else another process did it
                    Intake(self.run, connection).take(owed, taken, self._progress)

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


@contextmanager
def _writable(path: Path) -> Iterator[None]:
    try:
        with disk_errors(path):
            yield
    except UserError as e:
        raise UserError(f"{e}; set RLAIF_CACHE to a folder for the index of runs") from e
