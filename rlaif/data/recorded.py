"""Votes that were cast before: tables of other people's judges, and the log of a run.

In: a CSV, JSON or JSONL table with one row a pair and judge (or a run's votes.jsonl), and the labelled pairs that it
is about. Out: votes on those pairs, how their cells were read, and what was left out. A cell that names no side is an
abstention (`unparsed`), never a tie; a column in which none does is refused. In a table the row says which pair it is
about by an id or index, and a second order may be mapped back already (`winner_ba_mapped`) or still name slots
(`winner_ba`). Samples of one question are told apart by a column that numbers them. Votes without an id are read in row
order, where they are as many as the labelled rows; the second order may be a file of its own.
"""

from __future__ import annotations

import gc
import io
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple

from pydantic import ValidationError

from rlaif.data.labelled import ID_COLUMNS, ROW_NUMBERS, Labelled, find_column, parse_columns
from rlaif.data.sides import NAME_KEYS, Cell, Sides, count_cells
from rlaif.data.tables import Row, columns_of, file_names, read_table, read_text, with_paths
from rlaif.errors import UserError, cant_read
from rlaif.records import Ballot, Outcome, Usage, Vote, stored

_COLUMNS: dict[str, tuple[str, ...]] = {
    "id": ID_COLUMNS,
    "set": ("subset", "file", "set", "dataset"),
    "judge": ("judge", "model", "juror"),
    "voice": ("strategy", "voice", "template"),
    "label": ("label",),
    "sample": ("sample", "sample_index", "sample_id"),
    "order": ("order", "swapped"),
    "forward": ("winner_ab", "forward", "winner", "outcome", "verdict", "result", "g1_winner"),
    "reversed": ("winner_ba_mapped", "reversed_mapped", "g2_winner"),  # FastChat maps its second game back
    "reversed_slots": ("winner_ba", "reversed"),
}
_MAP_KEYS = (*_COLUMNS, *NAME_KEYS)
_Order = Literal["forward", "reversed"]
_ORDERS: dict[str, _Order] = {
    **dict.fromkeys(("forward", "ab", "original", "0", "false"), "forward"),
    **dict.fromkeys(("reversed", "ba", "swapped", "1", "true"), "reversed"),
}
_PAIR = "pair_id"
_BALLOT = ("judge", "voice")
"""What a condition may be on although no column is called so: what the report calls them."""
_ROW = " row"
"""The column of row numbers that votes without an id are given; no file's own."""
_BARE = "winner"
_MANY = 0.1
"""A larger share of votes on unknown pairs is a reason to look for a better column."""
_MIRROR: dict[Outcome, Outcome] = {"first": "second", "second": "first", "tie": "tie", "abstain": "abstain"}
_NO_USAGE = Usage()


class Recorded(NamedTuple):
    """Votes that were cast before, on labelled pairs."""

    rows: list[Labelled]
    """The pairs that have votes."""
    votes: list[Vote]
    """Pair by pair."""
    cells: tuple[Cell, ...]
    """How the cells were read; empty for a run's log."""
    unvoted: int
    """Labelled pairs (that fit the conditions) without a vote."""
    strangers: int
    """Votes on something that is no row of the labelled files."""
    notes: tuple[str, ...] = ()
    """What else a reader should know of how the table was read, one line each."""


def parse_votes_map(text: str | None) -> dict[str, str]:
    """The column map of a table of votes; `first_is`, `second_is` and `tie_is` say what its cells call them."""
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
    keys: Mapping[str, Collection[str]] | None = None,
    counts: Mapping[str, int] | None = None,
    second: Path | None = None,
    lenient: bool = False,
) -> Recorded:
    """The labelled rows that the file has votes on (and that fit `where`), and those votes.

    `keys` are those of all the labelled files' rows (`LabelledSet.keys`), by default those of `rows`; `counts` how many
    these are, for votes without an id. `second` is a table of the same judges' votes in the other order.
    `lenient`: a condition that no vote fits leaves none, as it may be about another file.

    Raises:
        UserError: the file can't be read, its rows aren't about these pairs, its labels are others, its cells don't
            say which side, another column fits the pairs better, or two votes answer one question (with the line).
    """
    cells: tuple[Cell, ...] = ()
    notes: tuple[str, ...] = ()
    if _is_log(path):
        if second is not None:
            raise UserError(f"--votes-reversed {second}: {path} is a run's log, which has both orders; leave it out")
        left, rest = narrow(rows, where or {}, ("judge", "voice"))
        logged = read_votes_log(path)
        votes = [v for v in logged if all(getattr(v.ballot, c) in values for c, values in rest.items())]
        known = {k if len(keys) == 1 else f"{f}/{k}" for f, some in keys.items() for k in some} if keys else set()
        known |= {r.id for r in rows}
        strangers = sum(v.ballot.pair_id not in known for v in votes)
        there = {c: sorted({str(getattr(v.ballot, c)) for v in logged}) for c in rest}
    else:
        votes, read, strangers, there, left = [], [], 0, {}, list(rows)
        for file in (path, second):
            if file is None:
                continue
            table = _read(file, columns or {}, where or {})
            left, rest = narrow(rows, where or {}, (*columns_of(table), *_BALLOT))
            order: _Order | None = None if second is None else "forward" if file is path else "reversed"
            reader = _Table(file, table, left, columns or {}, rest, rows, keys, counts or {}, order, path)
            votes += list(reader.votes())
            read += reader.cells
            strangers += reader.strangers
            notes += reader.notes()
            there |= {c: sorted(reader.there.get(c) or {str(row.values.get(c)) for row in table}) for c in rest}
        cells = count_cells(read)
    by_id: dict[str, list[Vote]] = {r.id: [] for r in left}
    for vote in votes:
        if vote.ballot.pair_id in by_id:
            by_id[vote.ballot.pair_id].append(vote)
    voted = [r for r in left if by_id[r.id]]
    if not voted:
        for column, values in there.items():
            if not (where or {})[column] & set(values):
                if lenient:
                    return Recorded([], [], (), len(left), 0)
                raise UserError(f"{path}: no row has --where {_condition(column, where)}; there is {_listed(values)}")
        raise UserError(
            f"{path}: no vote is on a labelled pair; a vote and its pair share an id or a row number "
            "(--votes-map id=COLUMN)"
        )
    return Recorded(voted, [v for r in voted for v in by_id[r.id]], cells, len(left) - len(voted), strangers, notes)


def join_recorded(found: Sequence[Recorded], labelled: Sequence[Labelled]) -> Recorded:
    """The votes of several files as those of one.

    Raises:
        UserError: two files have a vote of one judge on one question.
    """
    if len(found) == 1:
        return found[0]
    votes = [v for one in found for v in one.votes]
    if not votes:
        raise UserError("--where: no row of any --votes file fits; leave a condition out")
    if twice := [i for i, n in Counter(v.ballot.id for v in votes).items() if n > 1]:
        raise UserError(
            f"--votes: two files have a vote on one question ({twice[0]}); leave one out, or give that of the other "
            "order as --votes-reversed"
        )
    voted = {r.id for one in found for r in one.rows}
    rows = [r for r in labelled if r.id in voted]
    of_pair: dict[str, list[Vote]] = {r.id: [] for r in rows}
    for vote in votes:
        of_pair[vote.ballot.pair_id].append(vote)
    cells: Counter[tuple[str, Outcome]] = Counter()
    for cell in (c for one in found for c in one.cells):
        cells[cell.value, cell.outcome] += cell.count
    most = max(one.unvoted + len(one.rows) for one in found)
    return Recorded(
        rows,
        [v for r in rows for v in of_pair[r.id]],
        tuple(Cell(value=v, outcome=o, count=n) for (v, o), n in cells.most_common()),
        max(most - len(rows), 0),
        sum(one.strangers for one in found),
        tuple(dict.fromkeys(note for one in found for note in one.notes)),
    )


def _read(path: Path, columns: Mapping[str, str], where: Mapping[str, set[str]]) -> list[Row]:
    """The rows of a table of votes, with a column for each path that is asked for."""
    table = read_table(path, bare=_BARE)
    if not table:
        raise UserError(f"{path}: no recorded votes")
    return with_paths(table, [*(c for key, c in columns.items() if key not in NAME_KEYS), *where])


def _condition(column: str, where: Mapping[str, set[str]] | None) -> str:
    return " or ".join(f"{column}={value}" for value in sorted((where or {})[column]))


def _listed(values: Sequence[str], most: int = 10) -> str:
    return ", ".join(values[:most]) + (f", and {len(values) - most} others" if len(values) > most else "")


def read_votes_log(path: Path) -> list[Vote]:
    """The votes of a run's votes.jsonl.

    Raises:
        UserError: the file can't be read, or a line isn't a vote.
    """
    out = []
    number = 0
    try:
        with _lines(path) as lines, _without_collector():
            for line in lines:
                number += 1
                if line.strip():
                    out.append(stored(Vote, line))
    except ValidationError as e:
        error = e.errors()[0]
        where = ".".join(str(p) for p in error["loc"]) or "row"
        raise UserError(f"{path}:{number}: {where}: {error['msg']}") from e
    except (OSError, UnicodeDecodeError) as e:
        raise cant_read(path, "the votes", e) from e
    return out


def _is_log(path: Path) -> bool:
    """The file is JSONL whose rows hold a ballot."""
    if not path.name.lower().endswith((".jsonl", ".jsonl.gz", ".jsonl.bz2", ".jsonl.xz")):
        return False
    try:
        with _lines(path) as lines:
            return '"ballot"' in next((line for line in lines if line.strip()), "")
    except (OSError, UnicodeDecodeError) as e:
        raise cant_read(path, "the votes", e) from e


def _lines(path: Path) -> IO[str]:
    """The lines of a log, which may be long: only a packed one is held at once."""
    return path.open(encoding="utf-8") if path.suffix.lower() == ".jsonl" else io.StringIO(read_text(path))


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


class _Table:
    """How one table of votes is read: settled from its head and all of its cells, before the first vote."""

    def __init__(
        self,
        path: Path,
        table: Sequence[Any],
        rows: Sequence[Labelled],
        chosen: Mapping[str, str],
        where: Mapping[str, set[str]],
        all_rows: Sequence[Labelled],
        keys: Mapping[str, Collection[str]] | None,
        counts: Mapping[str, int],
        order: _Order | None = None,
        called: Path | None = None,
    ):
        """`order` is that of all of the table's votes, where it has a file of its own; a judge without a name is called
        by the file `called`."""
        self.path, self.called, self.order = path, called or path, order
        self.head = head = columns_of(table)
        if order is not None:
            if "order" in chosen:
                raise UserError("--votes-reversed: each file is of one order then; leave order out of --votes-map")
            other = "reversed" in chosen or "reversed_slots" in chosen
            if order == "forward":
                chosen = {k: c for k, c in chosen.items() if k not in ("reversed", "reversed_slots")}
            elif other:
                chosen = {k: c for k, c in chosen.items() if k != "forward"}
        for key, column in chosen.items():
            if column and key not in NAME_KEYS and column not in head:
                inner = any(isinstance(v, list | dict) for v in head.values())
                raise UserError(
                    f"{path}: no column `{column}`; it has {', '.join(head)}"
                    + (f"; a field inside one has a path, for example {key}=results.0.winner" if inner else "")
                )
        self.of = of = {
            key: (chosen[key] or None) if key in chosen else find_column(names, head) for key, names in _COLUMNS.items()
        }
        if "id" not in chosen:
            of["id"] = _id_column(head, all_rows)
        if "reversed_slots" in chosen and "reversed" not in chosen:
            of["reversed"] = None
        if not any(of[k] for k in _WINNERS):
            results = [c for c in head if c.endswith("_result")]
            of["forward"] = results[0] if len(results) == 1 else None
        if not any(of[k] for k in _WINNERS):
            raise UserError(
                f"{path}: which column is the forward? It has {', '.join(head)}; say --votes-map forward=COLUMN"
            )
        if order is not None:
            self._of_one_order(chosen)
        self.allowed = {c: values for c, values in where.items() if c in _BALLOT and c not in head}
        mine = {c: values for c, values in where.items() if c not in self.allowed}
        self.there: dict[str, set[str]] = {c: set() for c in self.allowed}
        self.rows = [r for r in table if all(str(r.values.get(c)) in allowed for c, allowed in mine.items())]
        files = {r.file for r in rows}
        self.set_names = _set_names((row.values.get(of["set"]) for row in table), files) if of["set"] else {}
        self.by_set = any(name in files for name in self.set_names.values())
        if chosen.get("set") and not self.by_set:
            raise UserError(
                f"{path}: no cell of `{of['set']}` is a labelled file's name ({_listed(sorted(files))}); found "
                f"{_listed(sorted(self.set_names))}"
            )
        self.in_row_order = of["id"] is None
        if self.in_row_order:
            self._number_rows(all_rows, counts)
        self.pair_of = {
            (r.file if self.by_set else None, str(r.number) if self.in_row_order else r.key): r for r in rows
        }
        if len(self.pair_of) < len(rows):
            raise UserError(
                f"{path}: several labelled files have a row `{rows[0].key}`; the votes need a column that names the "
                "file (--votes-map set=COLUMN)"
            )
        all_keys = {f: set(map(str, range(n))) for f, n in counts.items()} if self.in_row_order else keys
        all_keys = all_keys or _keys(all_rows)
        self.known = {(f if self.by_set else None, k) for f, some in all_keys.items() for k in some}
        # Where both files have an id and a pair_id, and one joins them, the other must agree.
        twins = find_column((_PAIR,), head), find_column((_PAIR,), rows[0].columns)
        joined = "id" in chosen or self.in_row_order
        self.twins = (str(twins[0]), str(twins[1])) if all(twins) and not joined else None
        if "sample" not in chosen and not self._numbers_votes(of["sample"]):
            of["sample"] = None
        self.samples = _numbers(row.values.get(of["sample"]) for row in self.rows) if of["sample"] else {}
        if not self.in_row_order:
            if "id" not in chosen:
                self._refuse_worse_ids()
            self._refuse_other_ids(all_rows, {k for _, k in self.known}, "id" in chosen, keys is not None)
        # The columns that hold winners, in the order in which their votes are given.
        named = {r.answer_columns for r in all_rows}
        self.answers = named.pop() if len(named) == 1 else None
        self.winners = [of["forward"], of["reversed"] or of["reversed_slots"]]
        columns = [c for c in dict.fromkeys(self.winners) if c]
        self.sides = Sides.of(
            (row.values.get(c) for row in table for c in columns),
            chosen,
            f"{path}: the winners in `{columns[0]}`",
            "--votes-map",
            zero_is_tie=columns[0].endswith("_result"),  # as PandaLM's files write it
            answers=self.answers,
        )
        self.label_sides = self._label_sides(chosen)
        self.cells: list[tuple[Any, Outcome]] = []
        self.strangers = 0
        self.second: tuple[str, bool] | None = None
        """The column of votes in the reversed order, and whether its cells name slots."""

    def votes(self) -> Iterator[Vote]:
        """The votes that fit the conditions, row by row."""
        of = self.of
        seen: dict[str, str] = {}
        per_column: dict[str, Counter[str | None]] = {}
        strays: dict[str, tuple[str, Any]] = {}
        for row in self.rows:
            values = row.values
            key = self._file(row), str(_cell(row, of["id"]))
            pair = self.pair_of.get(key)
            if pair is None:
                self.strangers += key not in self.known
                continue
            self._refuse_other_twin(row, pair)
            self._refuse_other_answers(row, pair)
            label = self.label_sides.outcome(values.get(str(of["label"]))) if of["label"] else None
            if label not in (pair.label, None):
                raise UserError(
                    f"{row.where}: the label of {pair.id} is {values.get(str(of['label']))} here and {pair.label} "
                    "among the labelled pairs: they are about different pairs; narrow with --where, or give the file "
                    "that fits"
                )
            judge = str(_cell(row, of["judge"])) if of["judge"] else file_names([self.called])[0]
            voice = str(_cell(row, of["voice"])) if of["voice"] else "recorded"
            who = {"judge": judge, "voice": voice}
            for c in self.there:
                self.there[c].add(who[c])
            if any(who[c] not in values for c, values in self.allowed.items()):
                continue
            sample = self.samples[_sample(_cell(row, of["sample"]))] if of["sample"] else 0
            for order, column, slots in _columns(row, of):
                cell = _cell(row, column)
                vote_id = f"{pair.id}|{judge}|{voice}|{order}" + (f"|{sample}" if sample else "")
                if vote_id in seen:
                    others = [c for c in self.head if c not in set(of.values())] + ([of["set"]] if of["set"] else [])
                    raise UserError(
                        f"{row.where}: a second vote of {judge}/{voice} on {pair.id} ({order}; the first: "
                        f"{seen[vote_id]}); narrow with --where COLUMN=VALUE "
                        f"({', '.join(map(str, others)) or 'no other column'}), or say what tells them apart: "
                        "--votes-map sample=COLUMN, voice=COLUMN or order=COLUMN"
                    )
                seen[vote_id] = row.where
                outcome = self.sides.outcome(cell)
                meant = _MIRROR[outcome or "abstain"] if slots else outcome or "abstain"
                self.cells.append((cell, meant))
                if order == "reversed":
                    self.second = column, slots
                if self.sides.is_stray(cell):
                    strays.setdefault(column, (row.where, cell))
                said = None if cell is None or not str(cell).strip() else str(cell).strip()
                per_column.setdefault(column, Counter())["a side" if outcome in ("first", "second") else said] += 1
                yield _vote(vote_id, pair.id, judge, voice, order, sample, cell, meant)
        for column, said_in in per_column.items():
            if "a side" in said_in and column in strays:
                where, cell = strays[column]
                raise UserError(
                    f"{where}: {column}: found {cell!r}, which is neither side ({self._names()}); say what it is: "
                    f"--votes-map tie_is={cell}, or none_is={cell} where it names no side"
                )
            if "a side" not in said_in and (set(said_in) != {None} or len(per_column) == 1):
                found = _listed([repr(word) for word, _ in said_in.most_common(3)])
                raise UserError(
                    f"{self.path}: no cell of `{column}` names a side; found {found}; say how they are called: "
                    "--votes-map first_is=NAME,second_is=NAME"
                )

    def _file(self, row: Any) -> str | None:
        """The labelled file that the row is about, where the rows say so."""
        return self.set_names[str(_cell(row, self.of["set"]))] if self.by_set else None

    def _names(self) -> str:
        """What the table's cells call the sides."""
        read = {str(cell).strip(): meant for cell, meant in self.cells if meant in ("first", "second")}
        return _listed(sorted(read))

    def _of_one_order(self, chosen: Mapping[str, str]) -> None:
        """All votes are of one order: those of the second name slots, unless the column says otherwise."""
        of = self.of
        of["order"] = None
        if self.order == "forward":
            of["forward"] = of["forward"] or of["reversed_slots"] or of["reversed"]
            of["reversed"] = of["reversed_slots"] = None
            return
        if "reversed" not in chosen and "reversed_slots" not in chosen:
            column = str(of["reversed_slots"] or of["reversed"] or of["forward"])
            mapped = column.endswith("_mapped")
            of["reversed"], of["reversed_slots"] = (column, None) if mapped else (None, column)
        of["forward"] = None

    def _number_rows(self, labelled: Sequence[Labelled], counts: Mapping[str, int]) -> None:
        """Gives votes without an id the number of their row, where there is one for each labelled row."""
        same = [c for c in (self.of[key] for key in ("set", "judge", "voice", "order", "sample")) if c]
        numbered: Counter[tuple[str, ...]] = Counter()
        rows = []
        for row in self.rows:
            asked = tuple(str(row.values.get(c)) for c in same)
            rows.append(row._replace(values={**row.values, _ROW: numbered[asked]}))
            numbered[asked] += 1

        def expected(asked: tuple[str, ...]) -> int | None:
            if self.by_set:
                return counts.get(self.set_names[asked[0]])
            return next(iter(counts.values())) if len(counts) == 1 else None

        fits = all(
            n == expected(asked)
            for asked, n in numbered.items()
            if not self.by_set or self.set_names[asked[0]] in counts
        )
        if not fits or any(r.number is None for r in labelled):
            found = ", ".join(map(str, sorted(set(numbered.values())))) or "none"
            there = ", ".join(f"{f} {n}" for f, n in counts.items()) or "unknown"
            raise UserError(
                f"{self.path}: which column is the id? It has {', '.join(self.head)}; say --votes-map id=COLUMN. "
                "Without one, votes are read in row order, and must be as many as the labelled rows: "
                f"{found} here, {there} there"
            )
        self.rows, self.of["id"] = rows, _ROW

    def _refuse_other_answers(self, row: Row, pair: Labelled) -> None:
        """Votes without an id that repeat the answers must be on these, the same way round."""
        if not self.in_row_order or pair.answer_columns is None:
            return
        a, b = (row.values.get(c) for c in pair.answer_columns)
        if not isinstance(a, str) or not isinstance(b, str) or (a, b) == (pair.first, pair.second):
            return
        if (b, a) == (pair.first, pair.second):
            if self.order == "reversed":
                return
            raise UserError(
                f"{row.where}: the answers are the other way round than on the labelled pair; give the votes of the "
                "other order as --votes-reversed FILE"
            )
        raise UserError(
            f"{row.where}: the answers are others than those of labelled row {pair.number}: the votes have no id, and "
            "are not in the labelled file's order; give both files an id (--votes-map id=COLUMN)"
        )

    def notes(self) -> tuple[str, ...]:
        """How the votes were read, after them: whether cells of the second order name sides or slots can't be seen."""
        in_order = (f"{self.path.name}: votes without an id, read in row order",) if self.in_row_order else ()
        return (*in_order, *self._order_notes())

    def _order_notes(self) -> tuple[str, ...]:
        column, slots = self.second or ("", False)
        if slots:
            return (f"second order read as naming slots, and turned round; --votes-map reversed={column} if not",)
        if column and not column.endswith("_mapped"):
            return (f"second order read as mapped back; --votes-map reversed_slots={column} if its cells name slots",)
        return ()

    def _numbers_votes(self, column: str | None) -> bool:
        """The column numbers the votes of one judge on one pair: it has no more values than there are such votes."""
        if column is None:
            return False
        same = [c for c in (self.of[key] for key in ("set", "id", "judge", "voice", "order")) if c]
        asked = Counter(tuple(str(row.values.get(c)) for c in same) for row in self.rows)
        most = max(asked.values(), default=0)
        return 1 < most >= len({_sample(row.values.get(column)) for row in self.rows})

    def _label_sides(self, chosen: Mapping[str, str]) -> Sides:
        """How the labels beside the votes are read; they are only compared, so what isn't clear means nothing."""
        if not self.of["label"]:
            return Sides({})
        cells = [row.values.get(self.of["label"]) for row in self.rows]
        if any(self.sides.outcome(c) for c in cells) and "first_is" in chosen:
            return self.sides
        try:
            return Sides.of(cells, {}, "", "", zero_is_tie=True, answers=self.answers)
        except UserError:
            return Sides({})

    def _refuse_worse_ids(self) -> None:
        """Many votes are on unknown pairs, and another column that may be an id knows more of them."""

        def unknown(column: str) -> int:
            return sum((self._file(row), str(row.values.get(column))) not in self.known for row in self.rows)

        column = str(self.of["id"])
        missed = unknown(column)
        if missed <= _MANY * len(self.rows):
            return
        free = [c for c in self.head if c not in self.of.values()]
        ids = [c for c in free if c.lower() in (*ID_COLUMNS, "pair", "item", "example") or c.lower().endswith("id")]
        best = min(ids, key=unknown, default=column)
        if unknown(best) < missed:
            raise UserError(
                f"{self.path}: {missed} of {len(self.rows)} votes are on pairs that are unknown by `{column}`, and "
                f"`{best}` fits better; say which is the pair's: --votes-map id={best} (or id={column})"
            )

    def _refuse_other_twin(self, row: Any, pair: Labelled) -> None:
        if self.twins is None:
            return
        theirs, mine = self.twins
        found, expected = str(row.values.get(theirs)), pair.columns.get(mine)
        if expected is not None and found != expected:
            raise UserError(
                f"{row.where}: `{theirs}` is {found} here, and {expected} on the labelled pair of the same "
                f"`{self.of['id']}`; say which is the pair's: --votes-map id={theirs} --map id={mine}, or --votes-map "
                f"id={self.of['id']}"
            )

    def _refuse_other_ids(
        self, rows: Sequence[Labelled], keys: Collection[str], is_chosen: bool, all_known: bool
    ) -> None:
        """Numbers of two columns may look alike and count differently, and so may row numbers, from 0 or from 1: of
        columns with other names, and of row numbers, all must be known."""
        own, column = {r.id_column for r in rows}, str(self.of["id"])
        numbers = own == {None} and (is_chosen or column.lower() in ROW_NUMBERS)
        if own == {column} or (is_chosen and not numbers) or (numbers and not all_known):
            return
        files = {r.file for r in rows}
        for row in self.rows:
            named = str(_cell(row, column))
            if (self.by_set and self._file(row) not in files) or named in keys:
                continue
            if numbers:
                raise UserError(
                    f"{row.where}: `{column}` is {named}, and the labelled file's rows are counted from 0 to "
                    f"{max(map(int, keys))}; give both files an id, or count from 0"
                )
            theirs = " or ".join(f"`{name}`" if name else "row number" for name in sorted(own, key=str))
            raise UserError(
                f"{row.where}: `{column}` {named} is no labelled pair's {theirs}; say which columns are the same ids "
                f"(--votes-map id={column}, --map id=COLUMN)"
            )


_WINNERS = ("forward", "reversed", "reversed_slots")


def _id_column(head: Mapping[str, Any], rows: Sequence[Labelled]) -> str | None:
    """The column that names a vote's pair. `id`, `index` and `row` may be the vote's own number, so `pair_id` comes
    first, where it isn't another column of the labelled pairs; then what the labelled pairs call it."""
    own = {r.id_column.lower() for r in rows if r.id_column}
    names = [*(own if len(own) == 1 else ()), *ID_COLUMNS]
    return find_column(names if find_column((_PAIR,), rows[0].columns) else [_PAIR, *names], head)


def _set_names(cells: Iterable[Any], files: Collection[str]) -> dict[str, str]:
    """What names a labelled file → that file's name: a cell may have its ending."""
    out = {}
    for said in {str(cell) for cell in cells}:
        short = file_names([Path(said)])[0] if said else said
        out[said] = said if said in files or short not in files else short
    return out


def _sample(cell: Any) -> str:
    return str(cell).strip().removesuffix(".0")


def _numbers(cells: Iterable[Any]) -> dict[str, int]:
    """Sample → its number: a whole number is its own, other names count in order of appearance."""
    names = list(dict.fromkeys(map(_sample, cells)))
    whole = all(name.isdecimal() for name in names)
    return {name: int(name) if whole else n for n, name in enumerate(names)}


def _keys(rows: Sequence[Labelled]) -> dict[str, set[str]]:
    out: dict[str, set[str]] = {}
    for r in rows:
        out.setdefault(r.file, set()).add(r.key)
    return out


def _cell(row: Any, column: str | None) -> Any:
    if column not in row.values:
        raise UserError(f"{row.where}: no `{column}`; write null where there is nothing")
    return row.values[column]


def _columns(row: Any, of: Mapping[str, str | None]) -> Iterator[tuple[_Order, str, bool]]:
    """(order, column, the cell names a slot of the reversed order) for each vote of a row."""
    second = of["reversed"] or of["reversed_slots"]
    slots = not of["reversed"] and of["reversed_slots"] is not None
    if of["order"]:
        said = str(_cell(row, of["order"])).strip().lower().removesuffix(".0")
        order = _ORDERS.get(said)
        if order is None:
            raise UserError(
                f"{row.where}: {of['order']}: found {said!r}, expected forward or reversed (or ab and ba, original and "
                "swapped, 0 and 1, false and true); --votes-map order=COLUMN names another column, order= none"
            )
        if order == "reversed":
            yield order, str(second or of["forward"]), slots
        else:
            yield order, str(of["forward"] or second), False
        return
    if of["forward"]:
        yield "forward", of["forward"], False
    if second:
        yield "reversed", second, slots


def _vote(
    vote_id: str, pair_id: str, judge: str, voice: str, order: _Order, sample: int, cell: Any, outcome: Outcome
) -> Vote:
    # Built without validation: every field is made here, and a table may have a million cells.
    ballot = Ballot.model_construct(
        id=vote_id, pair_id=pair_id, judge=judge, voice=voice, principles=(), order=order, sample_index=sample,
        constitution="", template=voice,
    )  # fmt: skip
    return Vote.model_construct(
        ballot=ballot,
        model=judge,
        outcome=outcome,
        abstain_reason="unparsed" if outcome == "abstain" else None,
        raw_reply="" if cell is None else str(cell),
        attempts=0,
        usage=_NO_USAGE,
    )
