"""Pairs whose better side is known, from other people's files as they are.

In: JSON (a list of objects), JSONL or CSV files, and where the columns have unusual names a column map. Out: a
`LabelledSet`: the pairs with a label, and how many rows have none. A row labelled a tie, or on which its annotators
disagree, has no better side: it is left out and counted.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import Field

from rlaif.errors import UserError
from rlaif.records import Outcome, Pair, Record, Side

Split = Literal["dev", "test"]
Exclusion = Literal["tie", "disputed"]

ROW_NUMBERS = ("row", "idx", "index")
"""Columns that may count the rows of a file without ids."""
ID_COLUMNS = ("id", "pair_id", *ROW_NUMBERS)
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
    ("output_a", "output_b"),
    ("response_a", "response_b"),
    ("answer_a", "answer_b"),
    ("chosen", "rejected"),
)
FILE = "file"
"""As a column of slices: each file is one, whatever its columns."""
_ANNOTATOR = re.compile(r"annotator_?\d+")
_MAP_KEYS = (*_COLUMNS, "first", "second", "first_is", "second_is")
_NAMES: dict[str, Outcome] = {
    **dict.fromkeys(("1", "first", "a", "model_a", "output_1", "response1", "response_1", "[[a]]", "a>b"), "first"),
    **dict.fromkeys(("2", "second", "b", "model_b", "output_2", "response2", "response_2", "[[b]]", "b>a"), "second"),
    **dict.fromkeys(("0", "tie", "tie (bothbad)", "both", "equal", "c", "[[c]]", "a=b"), "tie"),
}


class Labelled(Record):
    """A pair whose better side is known."""

    id: str
    """Unique over all files that are read together."""
    key: str
    """What a table of recorded votes calls the row: its id, or its index in the file."""
    id_column: str | None = None
    """The column that `key` is from; None where it is the row's index."""
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
    """The column map of labelled files; `first_is` and `second_is` say what the label column calls the sides."""
    return parse_columns(text, "--map", _MAP_KEYS) if text else {}


def outcome_of(value: Any) -> Outcome | None:
    """What a label or a recorded winner means: 1, A, first, model_a, ...; None when it means nothing."""
    # 1.0 is how a table writes 1 when a cell of the column is empty.
    return _NAMES.get(str(value).strip().lower().removesuffix(".0")) if value is not None else None


def file_digest(paths: Sequence[Path]) -> str:
    """sha256 (first 16 digits) over the files' bytes, in this order."""
    h = hashlib.sha256()
    for path in paths:
        h.update(hashlib.sha256(path.read_bytes()).digest())
    return h.hexdigest()[:16]


def read_table(path: Path) -> list[_Row]:
    """The rows of a JSON, JSONL or CSV file.

    Raises:
        UserError: the file can't be read, or a row isn't one (with its line).
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"{path}: can't read the file ({e})") from e
    if path.suffix == ".csv":
        csv.field_size_limit(2**31 - 1)  # an answer may be longer than csv's 128 KiB
        # Not splitlines(): it also breaks at characters that a cell may hold.
        lines = csv.DictReader(io.StringIO(text, newline=""), restkey="", restval=None)
        rows = []
        try:
            for number, values in enumerate(lines):
                where = f"{path}:{lines.line_num}"
                if "" in values or None in values.values():
                    raise UserError(f"{where}: the row has another number of columns than the first line")
                rows.append(_Row(where, number, values))
        except csv.Error as e:
            raise UserError(f"{path}:{lines.line_num}: not valid CSV ({e})") from e
        return rows
    if path.suffix == ".json":
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
    return [_Row(where, n, value) for n, (where, value) in enumerate(found)]


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
    for path in paths:
        table = read_table(path)
        if not table:
            raise UserError(f"{path}: no labelled pairs")
        reader = _Reader(path, table, chosen, several=len(paths) > 1)
        for row in table:
            if reader.split(row, split):
                labelled = reader.read(row)
                if isinstance(labelled, Labelled):
                    rows.append(labelled)
                else:
                    excluded[labelled] += 1
    duplicates = [id for id, n in Counter(r.id for r in rows).items() if n > 1]
    if duplicates:
        raise UserError(f"{paths[0]}: two rows have the id `{duplicates[0]}`; each needs its own")
    if not rows:
        left_out = f" ({excluded.total()} rows are ties or disputed)" if excluded else ""
        raise UserError(f"{paths[0]}: no labelled pairs" + (f" of split {split}" if split else "") + left_out)
    return LabelledSet(rows=tuple(rows), excluded=dict(excluded), digest=file_digest(paths))


class _Reader:
    """How one file's columns are read: settled once, from its first row."""

    def __init__(self, path: Path, table: Sequence[_Row], chosen: Mapping[str, str], several: bool):
        self.path = path
        self.several = several
        head = table[0].values
        for key, column in chosen.items():
            if key not in ("first_is", "second_is") and column not in head and (key, column) != ("slice", FILE):
                raise UserError(f"{path}: no column `{column}`; it has {', '.join(head)}")
        self.columns = {key: chosen.get(key) or find_column(names, head) for key, names in _COLUMNS.items()}
        if self.columns["slice"] == FILE:
            self.columns["slice"] = None
        found = ((find_column((a,), head), find_column((b,), head)) for a, b in _ANSWERS)
        first, second = next((both for both in found if all(both)), (None, None))
        self.first, self.second = chosen.get("first") or first, chosen.get("second") or second
        self.annotators = [] if "label" in chosen else [c for c in head if _ANNOTATOR.fullmatch(c)]
        self.chosen_is_first = "label" not in chosen and (self.first, self.second) == ("chosen", "rejected")
        # PandaLM, Alpaca: the task is the instruction, and the text that it is about.
        self.about = "input" if self.columns["prompt"] == "instruction" and "input" in head else None
        self.names = {
            chosen[key].lower(): side for key, side in (("first_is", "first"), ("second_is", "second")) if key in chosen
        }
        missing = [
            key
            for key, found in (
                ("prompt", self.columns["prompt"]),
                ("first", self.first),
                ("second", self.second),
                ("label", self.columns["label"] or self.annotators or self.chosen_is_first),
            )
            if not found
        ]
        if missing:
            raise UserError(
                f"{path}: which column is the {missing[0]}? It has {', '.join(head)}; say --map {missing[0]}=COLUMN"
            )
        # Another project's `split` (train, validation, ...) is a column like any other.
        self.has_splits = any(row.values.get("split") in ("dev", "test") for row in table)
        self._refuse_zero_and_one(table)

    def _refuse_zero_and_one(self, table: Sequence[_Row]) -> None:
        # 0 is a tie beside 1 and 2; alone with 1 it is somebody's first answer, and a guess would be half wrong.
        label = self.columns["label"]
        if not self.names and not self.annotators and not self.chosen_is_first:
            seen = {str(row.values.get(str(label))).strip().removesuffix(".0") for row in table}
            if "0" in seen and "2" not in seen and seen <= {"0", "1"}:
                raise UserError(
                    f"{self.path}: the labels in `{label}` are 0 and 1; say which is which, for example "
                    "--map first_is=0,second_is=1"
                )

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
        if label in ("tie", "disputed"):
            return label
        key = self._text(row, self.columns["id"]) if self.columns["id"] else str(row.number)
        prompt = self._text(row, self.columns["prompt"])
        if self.about and self._text(row, self.about):
            prompt = f"{prompt}\n\n{self._text(row, self.about)}"
        used = {*self.columns.values(), self.first, self.second, self.about}
        others = {c: str(v) for c, v in row.values.items() if isinstance(v, str | int | float) and c not in used}
        return Labelled(
            id=f"{self.path.stem}/{key}" if self.several else key,
            key=key,
            id_column=self.columns["id"],
            file=self.path.stem,
            slice=self._text(row, self.columns["slice"]) if self.columns["slice"] else self.path.stem,
            prompt=prompt,
            first=self._text(row, self.first),
            second=self._text(row, self.second),
            label=label,
            constitution=others.get("constitution"),
            split=row.values["split"] if self.has_splits else None,
            columns={
                **others,
                **{c: str(row.values[c]) for c in (self.columns["slice"], self.columns["id"]) if c is not None},
            },
        )

    def _label(self, row: _Row) -> Outcome | Literal["disputed"] | Any:
        if self.chosen_is_first:
            return "first"
        names = self.annotators or [str(self.columns["label"])]
        found = {self._side(row, name) for name in names}
        return found.pop() if len(found) == 1 else "disputed"

    def _side(self, row: _Row, column: str) -> Outcome:
        value = row.values.get(column)
        said = str(value).strip().lower()
        named = self.names.get(said) or self.names.get(said.removesuffix(".0"))
        if not self.names:
            named = outcome_of(value)
        if named is None:
            raise UserError(
                f"{row.where}: {column}: found {value!r}, expected 1, 2 or 0 (a tie), or first, second or tie; "
                "other names: --map first_is=NAME,second_is=NAME"
            )
        return named  # type: ignore[return-value]

    def _text(self, row: _Row, column: str | None) -> str:
        value = row.values.get(str(column))
        if not isinstance(value, str | int | float):
            raise UserError(f"{row.where}: {column}: expected text, found {type(value).__name__}")
        return str(value)


def find_column(names: Sequence[str], head: Mapping[str, Any]) -> str | None:
    """The first of the names that is a column, as the file writes it; upper and lower case are one."""
    columns = {column.lower(): column for column in head}
    return next((columns[n] for n in names if n in columns), None)
