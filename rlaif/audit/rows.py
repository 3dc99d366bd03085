"""Rows of a run's files, one at a time, and damaged lines by their number: a file may be larger than memory."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TypeVar

from pydantic import ValidationError

from rlaif.errors import RlaifError
from rlaif.records import Record, stored

_PAIR_ID = re.compile(rb'"pair_id":\s*"((?:[^"\\]|\\.)*)"')
R = TypeVar("R", bound=Record)


def rows_of(path: Path, record: type[R]) -> Iterator[R]:
    """A file's rows.

    Raises:
        RlaifError: a line is damaged.
    """
    for number, (row, problem) in enumerate(rows_or_problems(path, record), 1):
        if row is None:
            raise RlaifError(f"{path}:{number}: not a {record.__name__} ({problem}); it was damaged")
        yield row


def sound_rows(path: Path, record: type[R]) -> Iterator[R]:
    """A file's rows without the damaged lines."""
    return (row for row, _ in rows_or_problems(path, record) if row is not None)


def rows_or_problems(path: Path, record: type[R]) -> Iterator[tuple[R | None, str]]:
    """Of each line the row, or None and why it is none."""
    with path.open("rb") as f:
        for line in f:
            try:
                yield stored(record, line), ""
            except ValidationError as e:
                yield None, e.errors()[0]["msg"]


def pair_named(line: bytes) -> str | None:
    """The pair that a line of votes.jsonl is about, without reading the rest of it."""
    match = _PAIR_ID.search(line)
    return match[1].decode("utf-8", "replace") if match else None


def line_at(path: Path, place: int) -> int:
    """The number of the line, from 1, that begins at a byte."""
    with path.open("rb") as f:
        return f.read(place).count(b"\n") + 1


def read_lines(path: Path, numbers: Iterable[int]) -> dict[int, bytes]:
    """Some lines of a file, by number from 1; reads up to the last of them only."""
    wanted = sorted(set(numbers))
    out: dict[int, bytes] = {}
    if not wanted:
        return out
    line = 1
    with path.open("rb") as f:
        while wanted and (block := f.readlines(1 << 20)):
            while wanted and wanted[0] < line + len(block):
                number = wanted.pop(0)
                out[number] = block[number - line]
            line += len(block)
    return out
