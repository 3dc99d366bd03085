"""A run's small files, plans, metrics and texts, as rows of the index: all of them anew whenever one changes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlaif.audit.index_fresh import Key, small_digest
from rlaif.audit.tables import SMALL_TABLES
from rlaif.errors import RlaifError
from rlaif.records import Plan, Record, lift_metrics
from rlaif.rundir.store import RunDir, read_json, read_record

if TYPE_CHECKING:
    import duckdb

_KEY: Key = ("small", -1, -1)


def take_small(run: RunDir, connection: duckdb.DuckDBPyConnection) -> None:
    """Takes in plans, metrics and texts."""
    _Small(run, connection).take()


def split_problem(path: Path, problem: str | OSError | RlaifError) -> tuple[int | None, str]:
    """What is wrong with a file as line and message, without its name."""
    if isinstance(problem, OSError):
        return None, f"can't be read ({problem.strerror})"
    line, _, message = str(problem).removeprefix(f"{path}:").partition(": ")
    return (int(line), message) if line.isdigit() else (None, str(problem).removeprefix(f"{path}: "))


class _Small:
    def __init__(self, run: RunDir, connection: duckdb.DuckDBPyConnection):
        self.run, self.connection = run, connection

    def take(self) -> None:
        seen = small_digest(self.run)
        for name in SMALL_TABLES:
            self.connection.execute(f"DELETE FROM {name}")
        self.connection.execute("DELETE FROM problems WHERE source_table = ?", [_KEY[0]])
        for k in self.run.iterations():
            self._iteration(k)
        for k in self.run.evaluations():
            self._evaluation(k)
        for path in sorted((self.run.path / "constitutions").glob("*/constitution.json")):
            if (content := self._read(path)) is not None:
                self._insert("constitutions", path.parent.name, _text_name(content), _dumped(content))
        self.connection.execute("UPDATE small SET digest = ?", [seen])

    def _iteration(self, k: int) -> None:
        here = self.run.iteration(k)
        plan, metrics = self._read(here.path / "plan.json", Plan), self._read(here.path / "metrics.json")
        made, skipped = None, None
        try:
            if here.is_complete("updates"):
                made = here.policy_made()
                skipped = made is None
        except (PermissionError, RlaifError) as e:
            self._problem(here.path / "updates.meta.json", e)
        text = _of(plan or metrics, "constitution", dict) or {}
        in_force = _of(_of(_of(plan, "source", dict), "in_force", dict), "constitution", dict) or text
        policy = _of(plan or metrics, "policy", dict) or {}
        self._insert(
            "iterations", k, _of(text, "hash", str), _text_name(text), _of(in_force, "hash", str), _text_name(in_force),
            _of(policy, "iteration", int),
            _of(policy, "digest", str), made, skipped, _dumped(lift_metrics(metrics)),
        )  # fmt: skip

    def _evaluation(self, k: int) -> None:
        metrics = self._read(self.run.evaluation(k).path / "metrics.json")
        # An evaluation that is under way is judged under the text in force in the iteration that led to it.
        plan = None if metrics else self._read(self.run.iteration(max(k - 1, 0)).path / "plan.json", Plan)
        given = _of(_of(plan, "source", dict), "in_force", dict)
        text = _of(metrics or given or plan, "constitution", dict) or {}
        self._insert("evaluations", k, _of(text, "hash", str), _text_name(text), _dumped(metrics))

    def _read(self, path: Path, record: type[Record] | None = None) -> dict[str, Any] | None:
        """A JSON object, or None for a file that isn't there or holds none, which is kept as a problem."""
        try:
            value = read_record(path, record).model_dump(mode="json") if record else read_json(path)
            if isinstance(value, dict):
                return value
            self._problem(path, "not a JSON object; it was damaged after it was written")
        except FileNotFoundError:
            pass
        except (PermissionError, RlaifError) as e:
            self._problem(path, e)
        return None

    def _insert(self, table: str, *values: Any) -> None:
        self.connection.execute(f"INSERT INTO {table} VALUES ({', '.join('?' * len(values))})", list(values))

    def _problem(self, path: Path, problem: str | OSError | RlaifError) -> None:
        self._insert("problems", *_KEY, str(path.relative_to(self.run.path)), *split_problem(path, problem))


def _text_name(text: dict[str, Any]) -> str | None:
    return f"{text['name']}@{text['version']}" if "name" in text and "version" in text else None


def _of(value: dict[str, Any] | None, name: str, kind: type) -> Any:
    """A field of a JSON object; None when it is of another type."""
    found = (value or {}).get(name)
    return found if isinstance(found, kind) else None


def _dumped(value: Any) -> str | None:
    return None if value is None else json.dumps(value, ensure_ascii=False)
