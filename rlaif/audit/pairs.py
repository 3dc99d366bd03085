"""Lists of a run's pairs: which ones a filter lets through, and what every voice said. Nothing here prints.

Iterations count from 0 here, as in the files; people's tables count from 1.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal

from pydantic import ValidationError

from rlaif.audit.index import Index
from rlaif.errors import first_problem
from rlaif.records import (
    Outcome,
    Reason,
    Record,
    Side,
)

PREVIEW_CHARS = 160

Status = Literal["kept", "dropped", "review"]
Sort = Literal["log", "agreement", "margin", "length"]

_KEYS: dict[Sort, str] = {
    "log": "NULL",
    "agreement": "d.agreement",
    "margin": "abs(d.p_first - 0.5)",
    "length": "a.chars + b.chars",
}
"""What a list is sorted by; `log` by where pairs stand in the log."""


class PairFilter(Record):
    """Which pairs; a field that is None asks for nothing."""

    iteration: int | None = None
    """From 0; with `evaluation`, the number of updates before it."""
    constitution: str | None = None
    """Hash (or its beginning), or name@version."""
    status: Status | None = None
    reason: Reason | None = None
    principle: str | None = None
    """Some vote was asked about it."""
    judge: str | None = None
    """Some vote's judge has this in its name."""
    min_agreement: float | None = None
    max_agreement: float | None = None
    flipped: bool | None = None
    """A voice gave another answer when the order changed."""
    disagreeing: bool | None = None
    """Voices or judges name different sides."""
    text: str | None = None
    """In the prompt, earlier turns included, or in either completion, whatever the case."""
    evaluation: bool = False
    """Held-out pairs of evaluations instead of those of iterations."""


class PairRow(Record):
    """A pair in one line."""

    pair_id: str
    iteration: int
    """From 0; of an evaluation, the number of updates before it."""
    evaluation: bool = False
    constitution: str | None
    """name@version"""
    prompt: str
    status: Status | None
    """None while it is not decided."""
    reasons: tuple[Reason, ...]
    winner: Side | None
    """The side that trains; None unless the pair is kept."""
    outcome: Outcome | None
    """The verdict, kept or not."""
    agreement: float | None
    p_first: float | None
    order_flip: bool
    valid_votes: int
    abstentions: int
    first_preview: str
    second_preview: str


class Page(Record):
    """A part of a list."""

    total: int
    """Pairs that the filter lets through."""
    offset: int
    rows: tuple[PairRow, ...]
    problems: tuple[str, ...] = ()
    """Decisions of these rows that can't be read: their rows are shown without."""


def list_pairs(
    index: Index,
    pair_filter: PairFilter | None = None,
    sort: Sort = "log",
    descending: bool = False,
    limit: int = 50,
    offset: int = 0,
) -> Page:
    """A page of the pairs that a filter lets through."""
    where, parameters = _where(pair_filter or PairFilter())
    direction = "DESC" if descending else "ASC"
    order = f"iteration {direction}, evaluation {direction}, line {direction}"
    if sort != "log":
        order = f"key {direction} NULLS LAST, iteration, evaluation, line"
    joins = "".join(join for name, join in _JOINS.items() if f"{name}." in where + _KEYS[sort])
    base = f"FROM pairs p {joins} WHERE {where}"
    with index.session():
        # Narrow rows first; what a page shows is then looked up for its few pairs.
        found = index.rows(
            "WITH found AS MATERIALIZED "
            f"(SELECT p.pair_id, p.iteration, p.evaluation, p.line, {_KEYS[sort]} AS key {base}) "
            f"SELECT pair_id, (SELECT count(*) FROM found) AS total FROM found ORDER BY {order} LIMIT ? OFFSET ?",
            [*parameters, limit, offset],
        )
        if found or not offset:
            total = found[0]["total"] if found else 0
        else:
            total = index.rows(f"SELECT count(*) AS n {base}", parameters)[0]["n"]
        problems: list[str] = []
        rows = pair_rows(index, [r["pair_id"] for r in found], problems)
    return Page(total=total, offset=offset, rows=rows, problems=tuple(problems))


_JOINS = {
    "d": " LEFT JOIN decisions d ON d.pair_id = p.pair_id",
    "v": " LEFT JOIN panels v ON v.pair_id = p.pair_id",
    "a": " LEFT JOIN completions a ON a.completion_id = p.first",
    "b": " LEFT JOIN completions b ON b.completion_id = p.second",
}
COLUMNS = """p.pair_id, p.iteration, p.evaluation, p.line, p.prompt_id, p.first, p.second, d.status, d.reasons,
d.winner, d.outcome, d.agreement, d.p_first, d.order_flip, d.valid_votes, d.abstentions"""


def pair_rows(index: Index, pair_ids: Sequence[str], problems: list[str]) -> tuple[PairRow, ...]:
    """The given pairs, in the given order; ids that aren't in the log are left out."""
    found = index.rows(
        f"SELECT {COLUMNS} FROM (SELECT * FROM pairs WHERE pair_id IN (SELECT unnest(?::VARCHAR[]))) p "
        "LEFT JOIN (SELECT * FROM decisions WHERE pair_id IN (SELECT unnest(?::VARCHAR[]))) d USING (pair_id)",
        [list(pair_ids), list(pair_ids)],
    )
    by_id = {r["pair_id"]: r for r in found}
    return as_rows(index, [by_id[i] for i in pair_ids if i in by_id], problems)


def _where(pair_filter: PairFilter) -> tuple[str, list[Any]]:
    """An SQL condition on pairs `p` and what `_JOINS` joins to them, and its parameters."""
    number = "evaluation" if pair_filter.evaluation else "iteration"
    conditions, parameters = [f"p.{number} IS NOT NULL"], list[Any]()

    def add(condition: str, *values: Any) -> None:
        conditions.append(condition)
        parameters.extend(values)

    if pair_filter.iteration is not None:
        add(f"p.{number} = ?", pair_filter.iteration)
    if pair_filter.constitution is not None:
        add(
            f"p.{number} IN (SELECT {number} FROM {number}s WHERE text_name = ? OR starts_with(constitution, ?))",
            pair_filter.constitution,
            pair_filter.constitution,
        )
    if pair_filter.status is not None:
        add("d.status = ?", pair_filter.status)
    if pair_filter.reason is not None:
        add("list_contains(d.reasons, ?)", pair_filter.reason)
    if pair_filter.principle is not None:
        add("list_contains(v.principles, ?)", pair_filter.principle)
    if pair_filter.judge is not None:
        add("contains(array_to_string(v.judges, chr(10)), ?)", pair_filter.judge)
    if pair_filter.min_agreement is not None:
        add("d.agreement >= ?", pair_filter.min_agreement)
    if pair_filter.max_agreement is not None:
        add("d.agreement <= ?", pair_filter.max_agreement)
    if pair_filter.flipped is not None:
        add("coalesce(d.order_flip, false) = ?", pair_filter.flipped)
    if pair_filter.disagreeing is not None:
        add("coalesce(v.disagreeing, false) = ?", pair_filter.disagreeing)
    if pair_filter.text is not None:
        # One look at the answers for both sides.
        add(
            "(p.prompt_id IN (SELECT prompt_id FROM (SELECT prompt_id, unnest(messages) AS m FROM prompts) "
            "WHERE contains(lower(m.content), ?)) OR p.pair_id IN ("
            "SELECT s.pair_id FROM (SELECT pair_id, unnest([first, second]) AS id FROM pairs) s "
            "JOIN completions c ON c.completion_id = s.id WHERE contains(lower(c.text), ?)))",
            pair_filter.text.lower(),
            pair_filter.text.lower(),
        )
    return " AND ".join(conditions), parameters


def as_rows(index: Index, found: Sequence[dict[str, Any]], problems: list[str]) -> tuple[PairRow, ...]:
    """Adds texts to rows of `COLUMNS`; a decision that is none is left out, and said in `problems`."""
    answers = _lookup(index, "completions", "completion_id", {i for r in found for i in (r["first"], r["second"])})
    prompts = _lookup(index, "prompts", "prompt_id", {r["prompt_id"] for r in found})
    names = _text_names(index)

    def row(r: dict[str, Any]) -> PairRow:
        return PairRow(
            pair_id=r["pair_id"],
            iteration=r["iteration"] if r["evaluation"] is None else r["evaluation"],
            evaluation=r["evaluation"] is not None,
            constitution=names.get((r["iteration"], r["evaluation"])),
            prompt=prompts.get(r["prompt_id"], r["prompt_id"]),
            status=r["status"],
            reasons=tuple(r["reasons"] or ()),
            winner=r["winner"],
            outcome=r["outcome"],
            agreement=r["agreement"],
            p_first=r["p_first"],
            order_flip=bool(r["order_flip"]),
            valid_votes=r["valid_votes"] or 0,
            abstentions=r["abstentions"] or 0,
            first_preview=_preview(answers.get(r["first"], "")),
            second_preview=_preview(answers.get(r["second"], "")),
        )

    rows = []
    for r in found:
        try:
            rows.append(row(r))
        except ValidationError as e:
            file = index.file_of("decisions", r)
            problems.append(f"{file}: the decision on pair {r['pair_id']} is none ({first_problem(e)})")
            rows.append(row(r | dict.fromkeys(_DECIDED)))
    return tuple(rows)


_DECIDED = ("status", "reasons", "winner", "outcome", "agreement", "p_first", "order_flip", "valid_votes",
            "abstentions")  # fmt: skip


def known_names(index: Index) -> dict[str, tuple[str, ...]]:
    """What the run has of texts, principles and judges, by the name of the filter's field."""

    def names(sql: str) -> tuple[str, ...]:
        return tuple(row["name"] for row in index.rows(sql) if row["name"])

    return {
        "constitution": names("SELECT DISTINCT text_name AS name FROM iterations ORDER BY name"),
        "principle": names("SELECT DISTINCT unnest(principles) AS name FROM panels ORDER BY name"),
        "judge": names("SELECT DISTINCT unnest(judges) AS name FROM panels ORDER BY name"),
    }


def unknown_values(index: Index, pair_filter: PairFilter) -> list[str]:
    """A line for each field that asks for what the run doesn't have, with what it has."""
    known = known_names(index)
    kind = "evaluation" if pair_filter.evaluation else "iteration"
    numbers = [r["n"] for r in index.rows(f"SELECT {kind} AS n FROM {kind}s ORDER BY n")]
    texts = index.rows("SELECT constitution AS hash, text_name AS name FROM iterations UNION "
                       "SELECT constitution, text_name FROM evaluations")  # fmt: skip
    out = []
    constitution = pair_filter.constitution
    if constitution is not None and not any(
        constitution == t["name"] or (t["hash"] or "").startswith(constitution) for t in texts
    ):
        out.append(f"constitution {constitution}: the run has {_listed(known['constitution'])}")
    if pair_filter.principle is not None and pair_filter.principle not in known["principle"]:
        out.append(f"principle {pair_filter.principle}: the run has {_listed(known['principle'])}")
    if pair_filter.judge is not None and not any(pair_filter.judge in name for name in known["judge"]):
        out.append(f"judge {pair_filter.judge}: the run has {_listed(known['judge'])}")
    if pair_filter.iteration is not None and pair_filter.iteration not in numbers:
        if pair_filter.evaluation:
            out.append(f"iteration {pair_filter.iteration}: there are evaluations after {_listed(map(str, numbers))}")
        else:
            out.append(f"iteration {pair_filter.iteration + 1}: the run has {len(numbers)}")
    return out


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names) or "none"


def _lookup(index: Index, table: str, key: str, ids: set[str]) -> dict[str, str]:
    if not ids:
        return {}
    rows = index.rows(f"SELECT {key} AS id, text FROM {table} WHERE {key} IN (SELECT unnest(?))", [sorted(ids)])
    return {r["id"]: r["text"] for r in rows}


def _text_names(index: Index) -> dict[tuple[int | None, int | None], str | None]:
    rows = index.rows(
        "SELECT iteration, NULL AS evaluation, text_name FROM iterations "
        "UNION ALL SELECT NULL, evaluation, text_name FROM evaluations"
    )
    return {(r["iteration"], r["evaluation"]): r["text_name"] for r in rows}


def _preview(text: str) -> str:
    """The beginning of a text, in one line."""
    line = " ".join(text[: 2 * PREVIEW_CHARS].split())
    return line if len(line) <= PREVIEW_CHARS and len(text) <= 2 * PREVIEW_CHARS else line[: PREVIEW_CHARS - 1] + "…"


class VoiceSides(Record):
    """What one voice said about a pair, order by order."""

    judge: str
    voice: str
    principles: tuple[str, ...]
    guard: bool
    sample_index: int
    forward: tuple[Outcome, ...]
    """With the first completion shown first."""
    reversed: tuple[Outcome, ...]
    unordered: tuple[Outcome, ...]
    """Of a judge without slots."""


class Split(Record):
    """A pair on which votes point to different sides."""

    row: PairRow
    voices: tuple[VoiceSides, ...]


class SplitPage(Record):
    """A part of a list of splits."""

    total: int
    offset: int
    rows: tuple[Split, ...]


def splits(index: Index, pair_filter: PairFilter, limit: int = 50, offset: int = 0) -> SplitPage:
    """A page of pairs with every voice's word on them; `pair_filter` says `flipped` or `disagreeing`."""
    page = list_pairs(index, pair_filter, limit=limit, offset=offset)
    voices = voice_sides(index, [r.pair_id for r in page.rows])
    rows = tuple(Split(row=r, voices=tuple(voices.get(r.pair_id, ()))) for r in page.rows)
    return SplitPage(total=page.total, offset=offset, rows=rows)


def voice_sides(index: Index, pair_ids: Sequence[str]) -> dict[str, list[VoiceSides]]:
    """Pair id → what each voice said, in the order in which they were asked."""
    found = index.rows(
        """SELECT pair_id, judge, voice, principles, guard, sample_index,
            list(outcome ORDER BY line) FILTER (shown = 'forward') AS forward,
            list(outcome ORDER BY line) FILTER (shown = 'reversed') AS reversed,
            list(outcome ORDER BY line) FILTER (shown = 'none') AS unordered
        FROM votes WHERE pair_id IN (SELECT unnest(?::VARCHAR[])) GROUP BY ALL ORDER BY min(line)""",
        [list(pair_ids)],
    )
    out: dict[str, list[VoiceSides]] = {}
    for r in found:
        lists = {k: tuple(r[k] or ()) for k in ("principles", "forward", "reversed", "unordered")}
        out.setdefault(r.pop("pair_id"), []).append(VoiceSides.model_validate(r | lists))
    return out
