"""Two runs side by side: what was set differently, and what came out."""

from __future__ import annotations

from typing import Any

from rlaif.audit.curves import TextChange
from rlaif.audit.index import Index
from rlaif.audit.overview import EvaluationRow, Totals, overview
from rlaif.config import changed_keys
from rlaif.records import Outcome, Record
from rlaif.rundir.store import RunDir


class Setting(Record):
    """A setting that differs: of the job, the models or the packages."""

    key: str
    first: Any
    second: Any


class Differing(Record):
    """The same two answers to the same prompt, decided differently."""

    prompt: str
    first_pair: str
    """Its id in the first run."""
    second_pair: str
    first_iteration: int
    """From 0."""
    second_iteration: int
    first_status: str | None
    second_status: str | None
    first_outcome: Outcome | None
    """Of the two answers as the first run's pair has them."""
    second_outcome: Outcome | None
    """The same, turned round where the second run had them the other way."""
    first_agreement: float | None
    second_agreement: float | None


class Compared(Record):
    """Two runs side by side."""

    runs: tuple[str, str]
    settings: tuple[Setting, ...]
    texts: tuple[tuple[TextChange, ...], tuple[TextChange, ...]]
    totals: tuple[Totals, Totals]
    evaluations: tuple[tuple[EvaluationRow, ...], tuple[EvaluationRow, ...]]
    comparable: int
    """Pairs of both runs with the same prompt and the same two answers."""
    differing: int
    """Those whose status or verdict differs."""
    reversed: int
    """Those whose verdicts name opposite sides."""
    examples: tuple[Differing, ...]


def compare(first: Index, second: Index, limit: int = 10) -> Compared:
    """Two runs side by side, with at most `limit` examples of pairs that were decided differently."""
    a, b = overview(first, first.run), overview(second, second.run)
    comparable, differing, turned = _pairs(first, second)
    return Compared(
        runs=(a.run, b.run),
        settings=tuple(_settings(first.run, second.run)),
        texts=(a.changes, b.changes),
        totals=(a.totals, b.totals),
        evaluations=(a.evaluations, b.evaluations),
        comparable=comparable,
        differing=len(differing),
        reversed=turned,
        examples=tuple(differing[:limit]),
    )


def _settings(first: RunDir, second: RunDir) -> list[Setting]:
    a, b = first.header, second.header
    parts = {"": "job", "models.": "models", "packages.": "packages", "hardware.": "hardware"}
    found = []
    for prefix, part in parts.items():
        changes = changed_keys(a.get(part) or {}, b.get(part) or {})
        found += [Setting(key=f"{prefix}{k}", first=x, second=y) for k, (x, y) in changes.items() if k != "name"]
    for key in ("rlaif", "revision"):
        if a.get(key) != b.get(key):
            found.append(Setting(key=key, first=a.get(key), second=b.get(key)))
    return found


# Texts are compared by DuckDB's 64-bit hash, which depends on its version only; both indexes are of one.
_HASHED = """
SELECT p.pair_id, p.iteration, p.prompt_id, d.status, d.outcome, d.agreement,
    hash(coalesce(q.text, p.prompt_id), least(a.text, b.text), greatest(a.text, b.text)) AS key,
    a.text > b.text AS swapped
FROM pairs p LEFT JOIN decisions d USING (pair_id)
JOIN completions a ON a.completion_id = p.first JOIN completions b ON b.completion_id = p.second
LEFT JOIN (SELECT prompt_id, any_value(text) AS text FROM prompts GROUP BY ALL) q ON q.prompt_id = p.prompt_id
WHERE p.iteration IS NOT NULL ORDER BY p.iteration, p.line
"""
_TURNED: dict[str | None, Any] = {"first": "second", "second": "first"}


def _pairs(first: Index, second: Index) -> tuple[int, list[Differing], int]:
    """Comparable pairs, those that differ, and how many name opposite sides."""
    ours = {r["key"]: r for r in first.rows(_HASHED)}
    prompts: dict[str, str] = {r["prompt_id"]: r["text"] for r in first.rows("SELECT prompt_id, text FROM prompts")}
    comparable = turned = 0
    differing = []
    for r in second.rows(_HASHED):
        mine = ours.pop(r["key"], None)
        if mine is None:
            continue
        comparable += 1
        outcome = r["outcome"] if mine["swapped"] == r["swapped"] else _TURNED.get(r["outcome"], r["outcome"])
        if (mine["status"], mine["outcome"]) == (r["status"], outcome):
            continue
        turned += mine["outcome"] is not None and _TURNED.get(mine["outcome"]) == outcome
        differing.append(
            Differing(
                prompt=prompts.get(mine["prompt_id"], mine["prompt_id"]),
                first_pair=mine["pair_id"],
                second_pair=r["pair_id"],
                first_iteration=mine["iteration"],
                second_iteration=r["iteration"],
                first_status=mine["status"],
                second_status=r["status"],
                first_outcome=mine["outcome"],
                second_outcome=outcome,
                first_agreement=mine["agreement"],
                second_agreement=r["agreement"],
            )
        )
    return comparable, differing, turned
