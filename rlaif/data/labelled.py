"""Pairs whose better side is known, from other people's files as they are.

In: JSON, JSONL or CSV files (`tables`), and where the columns have unusual names a column map. Out: a
`LabelledSet`: the pairs with a label, and how many rows have none. A row labelled a tie, without a label, or on which
its annotators disagree, has no better side: it is left out and counted. Answers may be message lists, or transcripts
in one string; what both share is the prompt.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from rlaif.data.prompts import chat_in, rows_of
from rlaif.data.sides import NAME_KEYS, Cell, Sides, count_cells
from rlaif.data.tables import Row, columns_of, file_names, read_table, with_paths
from rlaif.errors import UserError
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
    "system": ("system_prompt", "system_message"),
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
_ANNOTATOR = re.compile(r"(annotator|rater|annotation|label|preference|winner)[_ ]?\d+", re.IGNORECASE)
_TURN = re.compile(r"(?:\A\s*|\n\n)(Human|User|Assistant|AI|System): ?")
"""How hh-rlhf writes a chat in one string: `\\n\\nHuman: …\\n\\nAssistant: …`."""
_ROLES: dict[str, Literal["system", "user", "assistant"]] = {
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "ai", "gpt", "bot", "model"), "assistant"),
    "system": "system",
}
_ENDS: dict[str, FinishReason] = {
    **dict.fromkeys(
        ("stop", "ended", "eos", "eos_token", "end_turn", "end_of_turn", "stop_sequence", "complete", "finished"),
        "stop",
    ),
    **dict.fromkeys(
        ("length", "cut_off", "max_tokens", "max_new_tokens", "max_length", "model_length", "truncated", "incomplete"),
        "length",
    ),
}
_FINISH = ("first_finish", "second_finish")
_MAP_KEYS = (*_COLUMNS, "first", "second", *_FINISH, *NAME_KEYS)


_OTHER_ENDS = ", ".join(name for name in _ENDS if name not in ("stop", "length"))
Annotators = Literal["unanimous", "majority"]


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
    """The file's name without its ending; with folders where another one is called the same."""
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
    counts: dict[str, int] = Field(default_factory=dict)
    """File → its rows, those left out included: what votes without an id must be as many as."""


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


def read_labelled(
    paths: Sequence[Path],
    columns: Mapping[str, str] | None = None,
    split: Split | Literal["all"] | None = None,
    by: str | None = None,
    annotators: Annotators = "unanimous",
    also: Iterable[str] = (),
) -> LabelledSet:
    """The labelled pairs of some files, or those of one split.

    `columns` maps id, prompt, first, second, label, slice and how the answers ended to the files' own names, or paths
    (`results.0.winner`); what it leaves out is found by the usual names. `by` names the column of slices (`file`: each
    file is one). Without one, a file is a slice. `split` None is `dev` for a file that has splits. Where several people
    labelled a pair, `annotators` says whether all who said something must say the same, or more than half. `also` are
    paths that a condition is on.

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
    counts: dict[str, int] = {}
    for path, name in zip(paths, file_names(paths), strict=True):
        table = read_table(path)
        if not table:
            raise UserError(f"{path}: no labelled pairs")
        labels = chosen.get("label", "").split("|")
        named = [column for key, column in chosen.items() if key not in NAME_KEYS and key != "label"]
        table = with_paths(table, [*named, *labels, *also])
        reader = _Reader(path, name, table, chosen, annotators, also, several=len(paths) > 1)
        keys[name], counts[name] = frozenset(map(reader.key, table)), len(table)
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
                    "needs its own (--map id=COLUMN, or id= for row numbers)"
                )
            where_of[labelled.id] = row.where
            rows.append(labelled)
        cells += reader.cells
        notes += reader.notes
    if not rows:
        left_out = f" ({excluded.total()} rows are ties, disputed or unlabelled)" if excluded else ""
        raise UserError(f"{paths[0]}: no labelled pairs" + (f" of split {split}" if split else "") + left_out)
    return LabelledSet(rows=tuple(rows), excluded=dict(excluded), digest=file_digest(paths), labels=count_cells(cells),
                       notes=tuple(notes), keys=keys, counts=counts)  # fmt: skip


def read_to_train(source: str, base_dir: Path, columns: Mapping[str, str] | None = None) -> LabelledSet:
    """The labelled pairs of a file or of `datasets:NAME[:SPLIT]`, to train on: every prompt can be asked, and every
    answer is one message. `columns` are as for `read_labelled`.

    Raises:
        UserError: it can't be read, a row doesn't fit (with its line), or nothing is left.
    """
    path, chosen = Path(source), dict(columns or {})
    if unknown := [key for key in chosen if key not in _MAP_KEYS]:
        raise UserError(
            f"source.columns.{unknown[0]}: no such key; `first` and `second` are the columns of the two answers, "
            f"`label` says which is better; keys: {', '.join(_MAP_KEYS)}"
        )
    placed = rows_of(source, base_dir, "file of pairs", _EXAMPLE)
    table = [Row(where, n, _with_chats(row, where)) for n, (where, row) in enumerate(placed)]
    table = [row for row in table if not all(map(_is_blank, row.values.values()))]  # as spreadsheets end a table
    if not table:
        raise UserError(f"{source}: no rows in it; a row looks like {_EXAMPLE}")
    labels = chosen.get("label", "").split("|")
    named = [column for key, column in chosen.items() if key not in NAME_KEYS and key != "label"]
    table = with_paths(table, [*named, *labels])
    reader = _Reader(path, path.name, table, chosen, "unanimous", (), several=False, to_train=True)
    read = [reader.read(row) for row in table if reader.split(row, None)]
    rows = [row for row in read if isinstance(row, Labelled)]
    excluded = Counter(row for row in read if not isinstance(row, Labelled))
    if twice := [i for i, count in Counter(row.id for row in rows).items() if count > 1]:
        raise UserError(
            f"{source}: two rows have the id `{twice[0]}`; each needs its own, or none (columns: {{id: ''}})"
        )
    if not rows:
        raise UserError(f"{source}: no labelled pairs ({excluded.total()} rows are ties, disputed or unlabelled)")
    return LabelledSet(
        rows=tuple(rows),
        excluded=dict(excluded),
        digest=_digest_of(table),
        labels=count_cells(reader.cells),
        notes=tuple(reader.notes),
    )


_EXAMPLE = '{"prompt": "How do I keep bread fresh?", "chosen": "In a linen bag.", "rejected": "In the fridge."}'


def _with_chats(row: Any, where: str) -> dict[str, Any]:
    """A row whose cells of text that hold a chat, as CSV files have it, hold messages."""
    if not isinstance(row, dict):
        raise UserError(f"{where}: expected an object, found {type(row).__name__}; a row looks like {_EXAMPLE}")
    chats = {k: chat_in(v, k, where) for k, v in row.items() if isinstance(v, str)}
    return row | {k: chat for k, chat in chats.items() if chat is not None}


def _digest_of(table: Sequence[Row]) -> str:
    """sha256 over the rows' content, whatever file they are in."""
    h = hashlib.sha256()
    for row in table:
        h.update(json.dumps(row.values, sort_keys=True, default=str).encode() + b"\n")
    return h.hexdigest()


class _Reader:
    """How one file's columns are read: settled once, from its first row."""

    def __init__(
        self,
        path: Path,
        name: str,
        table: Sequence[Row],
        chosen: Mapping[str, str],
        annotators: Annotators,
        also: Iterable[str],
        several: bool,
        to_train: bool = False,
    ):
        self.path, self.name = path, name
        self.several, self.to_train = several, to_train
        self.majority = annotators == "majority"
        self.also = tuple(also)
        self.notes: list[str] = []
        head = columns_of(table)
        labels = chosen.get("label", "").split("|") if chosen.get("label") not in head else [chosen["label"]]
        for key, column in [*((k, c) for k, c in chosen.items() if k != "label"), *(("label", c) for c in labels)]:
            if column and key not in NAME_KEYS and column not in head and (key, column) != ("slice", FILE):
                inner = "; a field inside one has a path, for example label=results.0.winner"
                nested = inner if any(isinstance(v, list | dict) for v in head.values()) else ""
                raise UserError(f"{path}: no column `{column}`; it has {', '.join(head)}{nested}")
        self.columns = {
            key: (chosen[key] or None) if key in chosen else find_column(names, head) for key, names in _COLUMNS.items()
        }
        if "id" not in chosen and self.columns["id"] and self.columns["id"].lower() == _QUESTION:
            # A question that several rows are about is no pair's name.
            asked = [str(row.values.get(self.columns["id"])) for row in table]
            self.columns["id"] = self.columns["id"] if len(set(asked)) == len(asked) else None
        if self.columns["system"] is None and "system" not in chosen and "system" in head:
            self.notes.append(f"{path.name}: `system` is not shown to a judge (--map system=system shows it)")
        if self.columns["slice"] == FILE:
            self.columns["slice"] = None
        found = ((find_column((a,), head), find_column((b,), head)) for a, b in _ANSWERS)
        first, second = next((both for both in found if all(both)), (None, None))
        self.first, self.second = chosen.get("first") or first, chosen.get("second") or second
        self.chosen_is_first = "label" not in chosen and (self.first, self.second) == ("chosen", "rejected")
        voters = labels if len(labels) > 1 else [c for c in head if _ANNOTATOR.fullmatch(c)]
        hot = [c for c, _ in _ONE_HOT[:2] if c in head]
        label = self.columns["label"]
        if len(labels) > 1:
            label = self.columns["label"] = None
        self.annotators = [] if label else voters
        self.one_hot = not label and len(hot) == 2
        if label and "label" not in chosen and not self.chosen_is_first and (voters or len(hot) == 2):
            others = ", ".join(voters or hot)
            self.notes.append(
                f"{path.name}: labels are from `{label}`, not from {others} (--map label=COLUMN names another column)"
            )
        self.finish = self._finish_columns(chosen, head)
        answers = [head.get(str(self.first)), head.get(str(self.second))]
        self.talks = isinstance(answers[0], list) or all(_is_transcript(a) for a in answers)
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
            how = f"set source.columns.{missing[0]}=COLUMN" if to_train else f"say --map {missing[0]}=COLUMN"
            raise UserError(f"{path}: which column is the {missing[0]}? It has {', '.join(head)}; {how}")
        # Another project's `split` (train, validation, ...) is a column like any other.
        self.has_splits = any(row.values.get("split") in ("dev", "test") for row in table)
        self.cells: list[tuple[Any, Outcome]] = []
        self.sides = Sides({})
        if not self.chosen_is_first and not self.one_hot:
            columns = self.annotators or [str(label)]
            self.sides = Sides.of(
                (cell for row in table for column in columns for cell in _cells(row.values.get(column))),
                chosen,
                f"{path}: the labels in `{columns[0]}`",
                "--map",
                zero_is_tie=bool(self.annotators),  # as PandaLM's annotators write it
                answers=(str(self.first), str(self.second)),
            )

    def key(self, row: Row) -> str:
        """What a table of votes calls the row."""
        return str(row.values.get(self.columns["id"])) if self.columns["id"] else str(row.number)

    def split(self, row: Row, wanted: Split | Literal["all"] | None) -> bool:
        """The row is of the wanted split."""
        if not self.has_splits:
            if wanted in ("dev", "test"):
                raise UserError(f"{row.where}: no column says which split it is of; leave --split {wanted} out")
            return True
        found = row.values.get("split")
        if found not in ("dev", "test"):
            raise UserError(f"{row.where}: split: found {found!r}, expected dev or test")
        return wanted == "all" or found == (wanted or "dev")

    def read(self, row: Row) -> Labelled | Exclusion:
        """The pair, or why it has no better side."""
        label = self._label(row)
        if label in ("tie", "disputed", "unlabelled"):
            return label
        key = self._text(row, self.columns["id"]) if self.columns["id"] else str(row.number)
        prompt, first, second, messages = self._texts(row)
        if self.about and not _is_blank(row.values.get(self.about)):
            prompt, messages = f"{prompt}\n\n{self._text(row, self.about)}", ()
        system = self.columns["system"]
        if system and not _is_blank(row.values.get(system)) and not (messages and messages[0].role == "system"):
            own = Message(role="system", content=self._text(row, system))
            messages = (own, *(messages or (Message(role="user", content=prompt),)))
        # A row without a category is of its file's slice.
        named = None if _is_blank(row.values.get(str(self.columns["slice"]))) else self.columns["slice"]
        used = {*self.columns.values(), self.first, self.second, self.about}
        others = {c: str(v) for c, v in row.values.items() if isinstance(v, str | int | float) and c not in used}
        others |= {c: str(row.values[c]) for c in self.also if isinstance(row.values.get(c), str | int | float)}
        return Labelled(
            id=f"{self.name}/{key}" if self.several else key,
            key=key,
            id_column=self.columns["id"],
            answer_columns=(str(self.first), str(self.second)),
            file=self.name,
            slice=self._text(row, named) if named else self.name,
            prompt=prompt,
            first=first,
            second=second,
            label=label,
            constitution=others.get("constitution"),
            split=row.values["split"] if self.has_splits else None,
            number=row.number,
            messages=messages,
            first_finish=self._end(row, self.finish[0]),
            second_finish=self._end(row, self.finish[1]),
            columns={
                **others,
                **{c: str(row.values[c]) for c in (named, self.columns["id"]) if c is not None},
            },
        )

    def _label(self, row: Row) -> Outcome | Exclusion:
        if self.chosen_is_first:
            return "first"
        if self.one_hot:
            return self._hot(row)
        names = self.annotators or [str(self.columns["label"])]
        cells = [(name, cell) for name in names for cell in _cells(row.values.get(name)) if not _is_blank(cell)]
        said = [side for name, cell in cells if (side := self._side(row, name, cell)) != "abstain"]
        if not said:
            return "unlabelled"
        side, most = Counter(said).most_common(1)[0]
        return side if most == len(said) or (self.majority and 2 * most > len(said)) else "disputed"

    def _side(self, row: Row, column: str, value: Any) -> Outcome:
        named = self.sides.outcome(value)
        if named is None:
            raise UserError(
                f"{row.where}: {column}: found {value!r}, expected 1, 2 or 0 (a tie), or first, second or tie; "
                "other names: --map first_is=NAME,second_is=NAME,tie_is=NAME, and none_is=NAME for no label"
            )
        self.cells.append((value, named))
        return named

    def _hot(self, row: Row) -> Outcome | Exclusion:
        if all(_is_blank(row.values.get(c)) for c, _ in _ONE_HOT):
            return "unlabelled"
        hot = [(c, side) for c, side in _ONE_HOT if str(row.values.get(c)).strip().lower() in ("1", "1.0", "true")]
        if len(hot) != 1:
            raise UserError(f"{row.where}: {len(hot)} of {', '.join(c for c, _ in _ONE_HOT)} are 1, expected one")
        self.cells.append(hot[0])
        return hot[0][1]

    def _texts(self, row: Row) -> tuple[str, str, str, tuple[Message, ...]]:
        """Prompt, first and second, and where the prompt is a chat its messages."""
        given = self.columns["prompt"]
        if not self.talks:
            prompt, chat = self._prompt(row), self._chat(row)
            if self.to_train and not chat and isinstance(row.values.get(str(given)), list):
                self._refuse_chat(row, str(given))
            return prompt, self._text(row, self.first), self._text(row, self.second), chat
        first, second = self._talk(row, self.first), self._talk(row, self.second)
        n = 0
        while n < min(len(first), len(second)) - 1 and first[n] == second[n]:
            n += 1
        if not n and not given:
            raise UserError(
                f"{row.where}: {self.first} and {self.second} share no first message to be the prompt; --map "
                "prompt=COLUMN names it"
            )
        prompt = _transcript(first[:n], "user") if n else self._prompt(row)
        messages = _messages(first[:n]) if n else self._chat(row)
        if self.to_train:
            if not messages and (n or isinstance(row.values.get(str(given)), list)):
                self._refuse_chat(row, str(self.first if n else given))
            for column, talk in ((self.first, first[n:]), (self.second, second[n:])):
                if len(talk) != 1 or _ROLES.get(talk[0][0]) != "assistant":
                    said = ", ".join(role for role, _ in talk) or "none"
                    raise UserError(
                        f"{row.where}: {column}: expected one message by the assistant after the prompt, found {said}"
                    )
        return prompt, _transcript(first[n:], "assistant"), _transcript(second[n:], "assistant"), messages

    @staticmethod
    def _refuse_chat(row: Row, column: str) -> None:
        raise UserError(
            f"{row.where}: {column}: the prompt's messages must be by system, user and assistant, and the last one by "
            "the user"
        )

    def _chat(self, row: Row) -> tuple[Message, ...]:
        column = self.columns["prompt"]
        return _messages(self._talk(row, column)) if isinstance(row.values.get(str(column)), list) else ()

    def _prompt(self, row: Row) -> str:
        column = self.columns["prompt"]
        if isinstance(row.values.get(str(column)), list):
            return _transcript(self._talk(row, column), "user")
        return self._text(row, column)

    def _talk(self, row: Row, column: str | None) -> list[tuple[str, str]]:
        """(role, content) of a message list."""
        value = row.values.get(str(column))
        if isinstance(value, str) and _is_transcript(value):
            parts = _TURN.split(value)[1:]
            return [
                (_ROLES[role.lower()], content.strip()) for role, content in zip(parts[::2], parts[1::2], strict=True)
            ]
        try:
            return [
                (_role(m["from"]), self._content(m["value"]))  # as ShareGPT has it
                if "from" in m
                else (_role(m["role"]), self._content(m["content"]))
                for m in value  # type: ignore[union-attr]
            ]
        except (TypeError, KeyError) as e:
            raise UserError(f"{row.where}: {column}: expected messages with role and content") from e

    def _finish_columns(self, chosen: Mapping[str, str], head: Mapping[str, Any]) -> tuple[str | None, str | None]:
        """The columns that say how the answers ended: those named, or those that go by the answers' names."""
        if given := [key for key in _FINISH if key in chosen]:
            if len(given) < len(_FINISH):
                raise UserError(f"--map {given[0]}={chosen[given[0]]}: say it of both answers ({', '.join(_FINISH)})")
            return chosen[_FINISH[0]], chosen[_FINISH[1]]
        names = (str(self.first), str(self.second))
        tails = [re.split(r"[_ ]|(?<=[a-z])(?=\d)", name)[-1] for name in names]
        for form in ("{0}_finish_reason", "{0}_finish", "finish_reason_{0}", "finish_{0}", "finish_reason_{1}",
                     "finish_reason{1}", "finish_{1}"):  # fmt: skip
            both = [find_column((form.format(n, t).lower(),), head) for n, t in zip(names, tails, strict=True)]
            if all(both):
                return both[0], both[1]
        return None, None

    def _end(self, row: Row, column: str | None) -> FinishReason | None:
        """How an answer ended, as its column says."""
        value = None if column is None else row.values.get(column)
        if _is_blank(value):
            return None
        end = _ENDS.get(str(value).strip().lower().replace("-", "_"))
        if end is None:
            raise UserError(f"{row.where}: {column}: found {value!r}, expected stop or length (or {_OTHER_ENDS})")
        return end

    @staticmethod
    def _content(content: Any) -> str:
        if not isinstance(content, str):
            raise TypeError(type(content))
        return content

    def _text(self, row: Row, column: str | None) -> str:
        value = row.values.get(str(column))
        if not isinstance(value, str | int | float):
            raise UserError(f"{row.where}: {column}: expected text, found {type(value).__name__}")
        return str(value)


def _cells(value: Any) -> list[Any]:
    """The labels in a cell: one, or a list of them."""
    return value if isinstance(value, list) else [value]


def _is_transcript(value: Any) -> bool:
    """A chat in one string: a question, and after it an answer."""
    if not isinstance(value, str):
        return False
    roles = [_ROLES[role.lower()] for role in _TURN.split(value)[1::2]]
    return roles[:1] in (["user"], ["system"]) and "assistant" in roles and _TURN.match(value) is not None


def _role(said: Any) -> str:
    """A role by its usual name, or as it is called."""
    return _ROLES.get(str(said).lower(), str(said))


def _messages(talk: Sequence[tuple[str, str]]) -> tuple[Message, ...]:
    """A prompt as messages, as a run shows them; none where it doesn't end with the user's, or has other roles."""
    roles = [_ROLES.get(role) for role, _ in talk]
    if not talk or None in roles or roles[-1] != "user":
        return ()
    return tuple(Message(role=r, content=content) for r, (_, content) in zip(roles, talk, strict=True) if r is not None)


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
