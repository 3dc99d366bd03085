"""Votes that were cast before: tables of other people's judges, and the log of a run.

In: a CSV, JSON or JSONL table with one row a pair and judge (or a run's votes.jsonl), and the labelled pairs that it
is about. Out: votes on those pairs. A cell that names no side is an abstention (`unparsed`), never a tie. In a table
the row says which pair it is about by an id or index, and a second order may be mapped back already
(`winner_ba_mapped`) or still name slots (`winner_ba`).
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from rlaif.errors import UserError
from rlaif.judging.labelled import ID_COLUMNS, ROW_NUMBERS, Labelled, find_column, outcome_of, parse_columns, read_table
from rlaif.records import Ballot, Outcome, Usage, Vote

_COLUMNS: dict[str, tuple[str, ...]] = {
    "id": ID_COLUMNS,
    "set": ("subset", "file", "set", "dataset"),
    "judge": ("judge", "model", "juror"),
    "voice": ("strategy", "voice", "template"),
    "label": ("label",),
    "order": ("order",),
    "forward": ("winner_ab", "forward", "winner", "outcome", "verdict", "result"),
    "reversed": ("winner_ba_mapped", "reversed_mapped"),
    "reversed_slots": ("winner_ba", "reversed"),
}
_MAP_KEYS = tuple(_COLUMNS)
_MIRROR: dict[Outcome, Outcome] = {"first": "second", "second": "first", "tie": "tie", "abstain": "abstain"}
_NO_USAGE = Usage()


def parse_votes_map(text: str | None) -> dict[str, str]:
    """The column map of a table of votes."""
    return parse_columns(text, "--votes-map", _MAP_KEYS) if text else {}


def parse_where(conditions: Sequence[str]) -> dict[str, set[str]]:
    """Column → allowed values; the same column twice allows both."""
    out: dict[str, set[str]] = {}
    for condition in conditions:
        column, equals, value = condition.partition("=")
        if not equals or not column:
            raise UserError(f"--where {condition}: expected COLUMN=VALUE")
        out.setdefault(column, set()).add(value)
    return out


def narrow(
    rows: Sequence[Labelled], where: Mapping[str, set[str]], other_columns: Sequence[str] = ()
) -> tuple[list[Labelled], dict[str, set[str]]]:
    """The labelled rows that fit the conditions on their own columns, and the conditions on other columns.

    Raises:
        UserError: a condition on a column that is nowhere, or nothing is left.
    """
    mine = {c for row in rows for c in row.columns}
    for column in where:
        if column not in mine and column not in other_columns:
            known = ", ".join(sorted(mine | set(other_columns)))
            raise UserError(f"--where {column}=...: no such column; there is {known}")
    own = {c: values for c, values in where.items() if c in mine}
    left = [r for r in rows if all(r.columns.get(c) in values for c, values in own.items())]
    if not left:
        raise UserError("--where: no labelled pair fits; leave a condition out")
    return left, {c: v for c, v in where.items() if c in other_columns}


def read_recorded(
    path: Path,
    rows: Sequence[Labelled],
    columns: Mapping[str, str] | None = None,
    where: Mapping[str, set[str]] | None = None,
) -> tuple[list[Labelled], list[Vote]]:
    """The labelled rows that the file has votes on (and that fit `where`), and those votes, pair by pair.

    Raises:
        UserError: the file can't be read, its rows aren't about these pairs, its labels are others, or two votes
            answer one question (with the line).
    """
    if _is_log(path):
        left, rest = narrow(rows, where or {}, ("judge", "voice"))
        votes = [v for v in read_votes_log(path) if all(getattr(v.ballot, c) in values for c, values in rest.items())]
    else:
        table = read_table(path)
        if not table:
            raise UserError(f"{path}: no recorded votes")
        left, rest = narrow(rows, where or {}, tuple(table[0].values))
        votes = list(_table(path, table, left, columns or {}, rest, rows))
    by_id: dict[str, list[Vote]] = {r.id: [] for r in left}
    for vote in votes:
        if vote.ballot.pair_id in by_id:
            by_id[vote.ballot.pair_id].append(vote)
    voted = [r for r in left if by_id[r.id]]
    if not voted:
        raise UserError(
            f"{path}: no vote is on a labelled pair; a vote and its pair share an id or a row number "
            "(--votes-map id=COLUMN)"
        )
    return voted, [v for r in voted for v in by_id[r.id]]


def read_votes_log(path: Path) -> list[Vote]:
    """The votes of a run's votes.jsonl.

    Raises:
        UserError: the file can't be read, or a line isn't a vote.
    """
    out = []
    number = 0
    try:
        with path.open(encoding="utf-8") as lines, _without_collector():
            for line in lines:
                number += 1
                if line.strip():
                    out.append(Vote.model_validate_json(line))
    except ValidationError as e:
        error = e.errors()[0]
        where = ".".join(str(p) for p in error["loc"]) or "row"
        raise UserError(f"{path}:{number}: {where}: {error['msg']}") from e
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"{path}: can't read the votes ({e})") from e
    return out


def _is_log(path: Path) -> bool:
    """The file is JSONL whose rows hold a ballot."""
    if path.suffix != ".jsonl":
        return False
    try:
        with path.open(encoding="utf-8") as lines:
            return '"ballot"' in next((line for line in lines if line.strip()), "")
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"{path}: can't read the votes ({e})") from e


@contextmanager
def _without_collector() -> Iterator[None]:
    """Records hold no cycles, and the collector walks all of them again and again: two thirds of the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _table(
    path: Path,
    table: Sequence[Any],
    rows: Sequence[Labelled],
    chosen: Mapping[str, str],
    where: Mapping[str, set[str]],
    all_rows: Sequence[Labelled],
) -> Iterator[Vote]:
    head = table[0].values
    for column in chosen.values():
        if column not in head:
            raise UserError(f"{path}: no column `{column}`; it has {', '.join(head)}")
    of = {key: chosen.get(key) or find_column(names, head) for key, names in _COLUMNS.items()}
    if not any(of[k] for k in ("forward", "reversed", "reversed_slots")):
        results = [c for c in head if c.endswith("_result")]
        of["forward"] = results[0] if len(results) == 1 else None
    if of["id"] is None or not any(of[k] for k in ("forward", "reversed", "reversed_slots")):
        what = "id" if of["id"] is None else "forward"
        raise UserError(f"{path}: which column is the {what}? It has {', '.join(head)}; say --votes-map {what}=COLUMN")
    files = {r.file for r in rows}
    by_set = of["set"] is not None and any(row.values[of["set"]] in files for row in table)
    pair_of = {(r.file if by_set else None, r.key): r for r in rows}
    if len(pair_of) < len(rows):
        raise UserError(
            f"{path}: several labelled files have a row `{rows[0].key}`; the votes need a column that names the file "
            "(--votes-map set=COLUMN)"
        )
    if "id" not in chosen:
        _refuse_other_ids(path, table, all_rows, str(of["id"]), of["set"] if by_set else None)
    seen: dict[str, str] = {}
    for row in table:
        values = row.values
        if any(str(values.get(c)) not in allowed for c, allowed in where.items()):
            continue
        pair = pair_of.get((values[of["set"]] if by_set else None, str(values[of["id"]])))
        if pair is None:
            continue
        if of["label"] and outcome_of(values[of["label"]]) not in (pair.label, None):
            raise UserError(
                f"{row.where}: the label of {pair.id} is {values[of['label']]} here and {pair.label} among the "
                "labelled pairs: they are about different pairs; narrow with --where, or give the file that fits"
            )
        judge = str(values[of["judge"]]) if of["judge"] else path.stem
        voice = str(values[of["voice"]]) if of["voice"] else "recorded"
        for order, cell, slots in _cells(row, of):
            id = f"{pair.id}|{judge}|{voice}|{order}"
            if id in seen:
                others = [c for c in head if c not in set(of.values())] + ([of["set"]] if of["set"] else [])
                raise UserError(
                    f"{row.where}: a second vote of {judge}/{voice} on {pair.id} ({order}; the first: {seen[id]}); "
                    f"narrow with --where COLUMN=VALUE ({', '.join(map(str, others)) or 'no other column'})"
                )
            seen[id] = row.where
            yield _vote(id, pair.id, judge, voice, order, cell, slots)


def _refuse_other_ids(
    path: Path, table: Sequence[Any], rows: Sequence[Labelled], column: str, set_: str | None
) -> None:
    """Numbers of two columns may look alike and count differently: of columns with other names all must be known."""
    own = {r.id_column for r in rows}
    if own == {column} or (own == {None} and column.lower() in ROW_NUMBERS):
        return
    files, keys = {r.file for r in rows}, {r.key for r in rows}
    for row in table:
        id = str(row.values[column])
        if (set_ is None or row.values[set_] in files) and id not in keys:
            theirs = " or ".join(f"`{name}`" if name else "row number" for name in sorted(own, key=str))
            raise UserError(
                f"{row.where}: `{column}` {id} is no labelled pair's {theirs}; say which columns are the same ids "
                f"(--votes-map id={column}, --map id=COLUMN)"
            )


_Order = Literal["forward", "reversed"]


def _cells(row: Any, of: Mapping[str, str | None]) -> Iterator[tuple[_Order, Any, bool]]:
    """(order, cell, the cell names a slot of the reversed order) for each vote of a row."""
    if of["order"]:
        order = str(row.values[of["order"]]).strip().lower()
        if order not in ("forward", "reversed"):
            raise UserError(f"{row.where}: {of['order']}: found {order!r}, expected forward or reversed")
        yield ("reversed" if order == "reversed" else "forward"), row.values[of["forward"]], False
        return
    if of["forward"]:
        yield "forward", row.values[of["forward"]], False
    if of["reversed"]:
        yield "reversed", row.values[of["reversed"]], False
    elif of["reversed_slots"]:
        yield "reversed", row.values[of["reversed_slots"]], True


def _vote(id: str, pair_id: str, judge: str, voice: str, order: _Order, cell: Any, slots: bool) -> Vote:
    outcome: Outcome = outcome_of(cell) or "abstain"
    # Built without validation: every field is made here, and a table may have a million cells.
    ballot = Ballot.model_construct(
        id=id, pair_id=pair_id, judge=judge, voice=voice, principles=(), order=order, constitution="", template=voice
    )
    return Vote.model_construct(
        ballot=ballot,
        model=judge,
        outcome=_MIRROR[outcome] if slots else outcome,
        abstain_reason="unparsed" if outcome == "abstain" else None,
        raw_reply="" if cell is None else str(cell),
        attempts=0,
        usage=_NO_USAGE,
    )
