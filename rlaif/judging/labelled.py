"""Pairs whose better side is known, from other people's files as they are.

In: JSON (a list of objects), JSONL or CSV files, and where the columns have unusual names a column map. Out: a
`LabelledSet`: the pairs with a label, and how many rows have none. A row labelled a tie, without a label, or on which
its annotators disagree, has no better side: it is left out and counted. Answers may be message lists; what both share
is the prompt.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import Field

from rlaif.errors import UserError
from rlaif.judging.sides import NAME_KEYS, Cell, Sides, count_cells
from rlaif.records import FinishReason, Message, Outcome, Pair, Record, Side

Split = Literal["dev", "test"]
Exclusion = Literal["tie", "disputed", "unlabelled"]

ROW_NUMBERS = ("row", "idx", "index")
"""Columns that may count the rows of a file without ids."""
_QUESTION = "question_id"
ID_COLUMNS = ("id", "pair_id", *ROW_NUMBERS, _QUESTION)
"""What labelled pairs and votes on them call a pair: the first of these that is a column."""
_COLUMNS: dict[str, tuple[str, ...]] = {
    "id": ID_COLUMNS,
    "prompt": ("prompt", "instruction", "question", "input"),
    "label": ("label", "winner", "preference"),
    "slice": ("slice", "subset", "principle", "category"),
}
_ANSWERS = (
    ("first", "second"),
    ("output_1", "output_2"),
    ("response1", "response2"),
    ("response_1", "response_2"),
    ("answer_1", "answer_2"),
    ("answer1", "answer2"),
    ("output_a", "output_b"),
    ("response_a", "response_b"),
    ("answer_a", "answer_b"),
    ("chosen", "rejected"),
    ("conversation_a", "conversation_b"),
)
_ONE_HOT: tuple[tuple[str, Outcome], ...] = (
    ("winner_model_a", "first"), ("winner_model_b", "second"), ("winner_tie", "tie")
)  # fmt: skip
"""Chatbot Arena: a column for each outcome, 1 in one of them."""
FILE = "file"
"""As a column of slices: each file is one, whatever its columns."""
_ANNOTATOR = re.compile(r"annotator_?\d+")
_MAP_KEYS = (*_COLUMNS, "first", "second", *NAME_KEYS)


class Labelled(Record):
    """A pair whose better side is known."""

    id: str
    """Unique over all files that are read together."""
    key: str
    """What a table of recorded votes calls the row: its id, or its index in the file."""
    id_column: str | None = None
    """The column that `key` is from; None where it is the row's index."""
    answer_columns: tuple[str, str] | None = None
    """The columns that `first` and `second` are from: a vote may call the sides so."""
    file: str
    """The file's name without its ending."""
    slice: str
    prompt: str
    first: str
    second: str
    label: Side
    constitution: str | None = None
    """`name@version` of the text that the pair is judged under, where the file says so."""
    split: Split | None = None
    """`test` is for the number that is reported, never for tuning."""
    number: int | None = None
    """Its row in the file, from 0."""
    messages: tuple[Message, ...] = ()
    """The prompt as a chat, where the file has one; its last message is the user's."""
    first_finish: FinishReason | None = None
    """How the answer ended, where the file says so: `length` is cut off."""
    second_finish: FinishReason | None = None
    columns: dict[str, str] = Field(default_factory=dict)
    """The row's other short columns, for `--where` and `--by`."""

    @property
    def pair(self) -> Pair:
        """The pair as a judge gets it, in the file's order."""
        return Pair(
            id=self.id, prompt_id=self.id, first=f"{self.id}-first", second=f"{self.id}-second", method="labelled"
        )

    @property
    def texts(self) -> dict[str, str]:
        """Completion id → text."""
        return {self.pair.first: self.first, self.pair.second: self.second}

    def end(self, side: Side) -> FinishReason | None:
        """How one of the answers ended; None where nobody knows."""
        return self.first_finish if side == "first" else self.second_finish

    @property
    def ends(self) -> dict[str, FinishReason | None]:
        """Completion id → how it ended."""
        return {self.pair.first: self.first_finish, self.pair.second: self.second_finish}

    @property
    def longer(self) -> Side | None:
        """The side with more characters; None when they are even."""
        difference = len(self.first) - len(self.second)
        return "first" if difference > 0 else "second" if difference < 0 else None


class LabelledSet(Record):
    """The labelled pairs of some files."""

    rows: tuple[Labelled, ...]
    excluded: dict[Exclusion, int]
    """Rows without a better side."""
    digest: str
    """sha256 (first 16 digits) of the files' bytes."""
    labels: tuple[Cell, ...] = ()
    """How the label cells were read."""
    notes: tuple[str, ...] = ()
    """What else a reader should know of how the files were read, one line each."""
    keys: dict[str, frozenset[str]] = Field(default_factory=dict)
    """File → the keys of all its rows, those left out included: what a recorded vote may be about."""


class _Row(NamedTuple):
    where: str
    """File and line, for errors."""
    number: int
    """From 0."""
    values: Mapping[str, Any]


def parse_columns(text: str, option: str, allowed: Sequence[str]) -> dict[str, str]:
    """`key=column,key=column` as a mapping.

    Raises:
        UserError: not of that form, or a key that isn't allowed; `option` names it.
    """
    out = {}
    for part in text.split(","):
        key, equals, value = part.partition("=")
        key = key.strip()
        if not equals or key not in allowed:
            raise UserError(f"{option} {part}: expected KEY=COLUMN,...; keys: {', '.join(allowed)}")
        out[key] = value.strip()
    return out


def parse_map(text: str | None) -> dict[str, str]:
    """The column map of labelled files; `first_is`, `second_is` and `tie_is` say what the label column calls them."""
    return parse_columns(text, "--map", _MAP_KEYS) if text else {}


def file_digest(paths: Sequence[Path]) -> str:
    """sha256 (first 16 digits) over the files' bytes, in this order."""
    h = hashlib.sha256()
    for path in paths:
        h.update(hashlib.sha256(path.read_bytes()).digest())
    return h.hexdigest()[:16]


def read_table(path: Path) -> list[_Row]:
    """The rows of a JSON, JSONL, CSV or TSV file. Half a surrogate pair, which no other file can hold, is replaced.

    Raises:
        UserError: the file can't be read, or a row isn't one (with its line).
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as e:
        raise UserError(f"{path}: can't read the file ({e}); save it as UTF-8") from e
    except OSError as e:
        raise UserError(f"{path}: can't read the file ({e})") from e
    suffix = path.suffix.lower()
    if suffix in (".csv", ".tsv"):
        return list(_csv_rows(path, text, "\t" if suffix == ".tsv" else ","))
    if suffix == ".json":
        try:
            tree = json.loads(text)
        except json.JSONDecodeError as e:
            raise UserError(f"{path}:{e.lineno}: not valid JSON ({e.msg})") from e
        if not isinstance(tree, list):
            raise UserError(f"{path}: expected a list of rows, found {type(tree).__name__}")
        found = [(f"{path}: row {n}", value) for n, value in enumerate(tree)]
    else:
        found = list(_json_lines(path, text))
    for where, value in found:
        if not isinstance(value, dict):
            raise UserError(f"{where}: expected an object with named columns, found {type(value).__name__}")
    escaped = "\\ud" in text.lower()
    return [_Row(where, n, _whole(value) if escaped else value) for n, (where, value) in enumerate(found)]


def _csv_rows(path: Path, text: str, delimiter: str) -> Iterator[_Row]:
    csv.field_size_limit(2**31 - 1)  # an answer may be longer than csv's 128 KiB
    # Not splitlines(): it also breaks at characters that a cell may hold.
    # Spaces after commas are dropped only where the first line has them: a cell may begin with one.
    names = next(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter), [])
    spaced = any(name.startswith(" ") for name in names)
    lines = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=spaced)
    head = [name for name in lines.fieldnames or () if name]  # pandas writes its index without a name
    if len(head) == 1 and (";" in head[0] or "\t" in head[0]):
        raise UserError(f"{path}:1: one column, `{head[0]}`; separate columns by commas, or by tabs in a .tsv file")
    twice = [name for name, n in Counter(head).items() if n > 1]
    if twice:
        raise UserError(f"{path}:1: two columns are called `{twice[0]}`; rename one")
    try:
        for number, values in enumerate(lines):
            where = f"{path}:{lines.line_num}"
            values.pop("", None)
            extra = values.pop(None, [])
            if not any((cell or "").strip() for cell in (*values.values(), *extra)):
                continue  # as spreadsheets end a table
            if extra or None in values.values():
                raise UserError(f"{where}: the row has another number of columns than the first line")
            yield _Row(where, number, values)
    except csv.Error as e:
        raise UserError(f"{path}:{lines.line_num}: not valid CSV ({e})") from e


def _whole(value: Any) -> Any:
    """The value with U+FFFD for half surrogate pairs, in all its strings."""
    if isinstance(value, str):
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if isinstance(value, list):
        return [_whole(v) for v in value]
    if isinstance(value, dict):
        return {_whole(k): _whole(v) for k, v in value.items()}
    return value


def _json_lines(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                yield f"{path}:{number}", json.loads(line)
            except json.JSONDecodeError as e:
                raise UserError(f"{path}:{number}: not valid JSON ({e.msg})") from e


def read_labelled(
    paths: Sequence[Path],
    columns: Mapping[str, str] | None = None,
    split: Split | Literal["all"] | None = None,
    by: str | None = None,
) -> LabelledSet:
    """The labelled pairs of some files, or those of one split.

    `columns` maps id, prompt, first, second, label and slice to the files' own names; what it leaves out is found by
    the usual names. `by` names the column of slices (`file`: each file is one). Without one, a file is a slice.
    `split` None is `dev` for a file that has splits.

    Raises:
        UserError: a file can't be read, a row doesn't fit (with its line), or nothing is left.
    """
    chosen = dict(columns or {})
    if by is not None:
        chosen["slice"] = by
    rows: list[Labelled] = []
    excluded: Counter[Exclusion] = Counter()
    cells: list[tuple[Any, Outcome]] = []
    keys: dict[str, frozenset[str]] = {}
    notes: list[str] = []
    where_of: dict[str, str] = {}
    for path in paths:
        table = read_table(path)
        if not table:
            raise UserError(f"{path}: no labelled pairs")
        reader = _Reader(path, table, chosen, several=len(paths) > 1)
        keys[path.stem] = frozenset(map(reader.key, table))
        for row in table:
            if not reader.split(row, split):
                continue
            labelled = reader.read(row)
            if not isinstance(labelled, Labelled):
                excluded[labelled] += 1
                continue
            if labelled.id in where_of:
                raise UserError(
                    f"{row.where}: two rows have the id `{labelled.id}` (the first: {where_of[labelled.id]}); each "
                    "needs its own (--map id=COLUMN)"
                )
            where_of[labelled.id] = row.where
            rows.append(labelled)
        cells += reader.cells
        notes += reader.notes
    if not rows:
        left_out = f" ({excluded.total()} rows are ties, disputed or unlabelled)" if excluded else ""
        raise UserError(f"{paths[0]}: no labelled pairs" + (f" of split {split}" if split else "") + left_out)
    return LabelledSet(rows=tuple(rows), excluded=dict(excluded), digest=file_digest(paths), labels=count_cells(cells),
                       notes=tuple(notes), keys=keys)  # fmt: skip


class _Reader:
    """How one file's columns are read: settled once, from its first row."""

    def __init__(self, path: Path, table: Sequence[_Row], chosen: Mapping[str, str], several: bool):
        self.path = path
        self.several = several
        head = table[0].values
        for key, column in chosen.items():
            if key not in NAME_KEYS and column not in head and (key, column) != ("slice", FILE):
                raise UserError(f"{path}: no column `{column}`; it has {', '.join(head)}")
        self.columns = {key: chosen.get(key) or find_column(names, head) for key, names in _COLUMNS.items()}
        if "id" not in chosen and self.columns["id"] and self.columns["id"].lower() == _QUESTION:
            # A question that several rows are about is no pair's name.
            asked = [str(row.values.get(self.columns["id"])) for row in table]
            self.columns["id"] = self.columns["id"] if len(set(asked)) == len(asked) else None
        if self.columns["slice"] == FILE:
            self.columns["slice"] = None
        found = ((find_column((a,), head), find_column((b,), head)) for a, b in _ANSWERS)
        first, second = next((both for both in found if all(both)), (None, None))
        self.first, self.second = chosen.get("first") or first, chosen.get("second") or second
        self.chosen_is_first = "label" not in chosen and (self.first, self.second) == ("chosen", "rejected")
        annotators = [c for c in head if _ANNOTATOR.fullmatch(c)]
        hot = [c for c, _ in _ONE_HOT[:2] if c in head]
        label = self.columns["label"]
        self.annotators = [] if label else annotators
        self.one_hot = not label and len(hot) == 2
        self.notes: list[str] = []
        if label and "label" not in chosen and not self.chosen_is_first and (annotators or len(hot) == 2):
            others = ", ".join(annotators or hot)
            self.notes.append(
                f"{path.name}: labels are from `{label}`, not from {others} (--map label=COLUMN names another column)"
            )
        self.talks = self.first is not None and isinstance(head.get(self.first), list)
        # PandaLM, Alpaca: the task is the instruction, and the text that it is about.
        self.about = "input" if self.columns["prompt"] == "instruction" and "input" in head else None
        missing = [
            key
            for key, found in (
                ("prompt", self.columns["prompt"] or self.talks),
                ("first", self.first),
                ("second", self.second),
                ("label", label or self.annotators or self.chosen_is_first or self.one_hot),
            )
            if not found
        ]
        if missing:
            raise UserError(
                f"{path}: which column is the {missing[0]}? It has {', '.join(head)}; say --map {missing[0]}=COLUMN"
            )
        # Another project's `split` (train, validation, ...) is a column like any other.
        self.has_splits = any(row.values.get("split") in ("dev", "test") for row in table)
        self.cells: list[tuple[Any, Outcome]] = []
        self.sides = Sides({})
        if not self.chosen_is_first and not self.one_hot:
            columns = self.annotators or [str(label)]
            self.sides = Sides.of(
                (row.values.get(column) for row in table for column in columns),
                chosen,
                f"{path}: the labels in `{columns[0]}`",
                "--map",
                zero_is_tie=bool(self.annotators),  # as PandaLM's annotators write it
                answers=(str(self.first), str(self.second)),
            )

    def key(self, row: _Row) -> str:
        """What a table of votes calls the row."""
        return str(row.values.get(self.columns["id"])) if self.columns["id"] else str(row.number)

    def split(self, row: _Row, wanted: Split | Literal["all"] | None) -> bool:
        """The row is of the wanted split."""
        if not self.has_splits:
            if wanted in ("dev", "test"):
                raise UserError(f"{row.where}: no column says which split it is of; leave --split {wanted} out")
            return True
        found = row.values.get("split")
        if found not in ("dev", "test"):
            raise UserError(f"{row.where}: split: found {found!r}, expected dev or test")
        return wanted == "all" or found == (wanted or "dev")

    def read(self, row: _Row) -> Labelled | Exclusion:
        """The pair, or why it has no better side."""
        label = self._label(row)
        if label in ("tie", "disputed", "unlabelled"):
            return label
        key = self._text(row, self.columns["id"]) if self.columns["id"] else str(row.number)
        prompt, first, second = self._texts(row)
        if self.about and not _is_blank(row.values.get(self.about)):
            prompt = f"{prompt}\n\n{self._text(row, self.about)}"
        # A row without a category is of its file's slice.
        named = None if _is_blank(row.values.get(str(self.columns["slice"]))) else self.columns["slice"]
        used = {*self.columns.values(), self.first, self.second, self.about}
        others = {c: str(v) for c, v in row.values.items() if isinstance(v, str | int | float) and c not in used}
        return Labelled(
            id=f"{self.path.stem}/{key}" if self.several else key,
            key=key,
            id_column=self.columns["id"],
            answer_columns=(str(self.first), str(self.second)),
            file=self.path.stem,
            slice=self._text(row, named) if named else self.path.stem,
            prompt=prompt,
            first=first,
            second=second,
            label=label,
            constitution=others.get("constitution"),
            split=row.values["split"] if self.has_splits else None,
            columns={
                **others,
                **{c: str(row.values[c]) for c in (named, self.columns["id"]) if c is not None},
            },
        )

    def _label(self, row: _Row) -> Outcome | Exclusion:
        if self.chosen_is_first:
            return "first"
        if self.one_hot:
            return self._hot(row)
        names = self.annotators or [str(self.columns["label"])]
        found = {self._side(row, name) for name in names if not _is_blank(row.values.get(name))}
        if not found:
            return "unlabelled"
        return found.pop() if len(found) == 1 else "disputed"

    def _side(self, row: _Row, column: str) -> Outcome:
        value = row.values.get(column)
        named = self.sides.outcome(value)
        if named is None:
            raise UserError(
                f"{row.where}: {column}: found {value!r}, expected 1, 2 or 0 (a tie), or first, second or tie; "
                "other names: --map first_is=NAME,second_is=NAME,tie_is=NAME"
            )
        self.cells.append((value, named))
        return named

    def _hot(self, row: _Row) -> Outcome | Exclusion:
        if all(_is_blank(row.values.get(c)) for c, _ in _ONE_HOT):
            return "unlabelled"
        hot = [(c, side) for c, side in _ONE_HOT if str(row.values.get(c)).strip().lower() in ("1", "1.0", "true")]
        if len(hot) != 1:
            raise UserError(f"{row.where}: {len(hot)} of {', '.join(c for c, _ in _ONE_HOT)} are 1, expected one")
        self.cells.append(hot[0])
        return hot[0][1]

    def _texts(self, row: _Row) -> tuple[str, str, str]:
        """Prompt, first and second."""
        given = self.columns["prompt"]
        if not self.talks:
            return self._prompt(row), self._text(row, self.first), self._text(row, self.second)
        first, second = self._talk(row, self.first), self._talk(row, self.second)
        n = 0
        while n < min(len(first), len(second)) - 1 and first[n] == second[n]:
            n += 1
        if not n and not given:
            raise UserError(f"{row.where}: {self.first} and {self.second} share no first message to be the prompt")
        prompt = _transcript(first[:n], "user") if n else self._prompt(row)
        return prompt, _transcript(first[n:], "assistant"), _transcript(second[n:], "assistant")

    def _prompt(self, row: _Row) -> str:
        column = self.columns["prompt"]
        if isinstance(row.values.get(str(column)), list):
            return _transcript(self._talk(row, column), "user")
        return self._text(row, column)

    def _talk(self, row: _Row, column: str | None) -> list[tuple[str, str]]:
        """(role, content) of a message list."""
        value = row.values.get(str(column))
        try:
            return [(str(m["role"]), self._content(m["content"])) for m in value]  # type: ignore[union-attr]
        except (TypeError, KeyError) as e:
            raise UserError(f"{row.where}: {column}: expected messages with role and content") from e

    @staticmethod
    def _content(content: Any) -> str:
        if not isinstance(content, str):
            raise TypeError(type(content))
        return content

    def _text(self, row: _Row, column: str | None) -> str:
        value = row.values.get(str(column))
        if not isinstance(value, str | int | float):
            raise UserError(f"{row.where}: {column}: expected text, found {type(value).__name__}")
        return str(value)


def _is_blank(cell: Any) -> bool:
    """Nothing is in it: null, no text, or the not-a-number that a data frame writes."""
    return cell is None or not str(cell).strip() or (isinstance(cell, float) and math.isnan(cell))


def _transcript(talk: Sequence[tuple[str, str]], role: str) -> str:
    """The messages as one text; a single one of this role is its content."""
    if len(talk) == 1 and talk[0][0] == role:
        return talk[0][1]
    return "\n\n".join(f"{r.capitalize()}: {content}" for r, content in talk)


def find_column(names: Sequence[str], head: Mapping[str, Any]) -> str | None:
    """The first of the names that is a column, as the file writes it; upper and lower case are one."""
    columns = {column.lower(): column for column in head}
    return next((columns[n] for n in names if n in columns), None)
