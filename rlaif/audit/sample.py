"""A seeded sample of a run's pairs with all that a judge has to be shown, and the votes that the run has on them.

A line of votes that can't be read is left out: its pair is one without stored votes.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from pydantic import ValidationError

from rlaif.audit.rows import pair_named, rows_of
from rlaif.errors import RlaifError, UserError
from rlaif.judging.candidates import Candidate
from rlaif.judging.verdicts import by_pair
from rlaif.records import Completion, Pair, Prompt, Vote, stored
from rlaif.rundir.store import RunDir, read_rows


class Sampled(NamedTuple):
    """A sampled pair."""

    pair: Pair
    iteration: int
    constitution: str
    """Hash of the text that it was judged under."""


class Sample(NamedTuple):
    """Sampled pairs, and what belongs to them."""

    rows: dict[str, Sampled]
    """By pair id, in the order of the log."""
    candidates: dict[str, Candidate]
    """By completion id."""
    votes: dict[str, list[Vote]]
    """The run's own, by pair id."""

    @property
    def pairs(self) -> list[Pair]:
        """The pairs alone."""
        return [row.pair for row in self.rows.values()]


def draw(run: RunDir, wanted: int, seed: int) -> Sample:
    """Draws from all pairs that have been judged; all of them when `wanted` is more.

    Raises:
        UserError: there are none, or the run's copy of its prompts is gone.
        RlaifError: a line of the pairs or completions is damaged.
    """
    complete = [k for k in run.iterations() if all(run.iteration(k).is_complete(s) for s in ("pairs", "votes"))]
    counts = {k: run.iteration(k).meta("pairs")["rows"] for k in complete}
    total = sum(counts.values())
    if not total:
        raise UserError(f"{run.path}: no iteration has been judged yet; there are no pairs to ask about")
    file = run.path / "prompts" / "train.jsonl"
    if not file.exists():
        raise UserError(f"{file}: the run's copy of its prompts is gone, and the judge has to be shown them")
    chosen = set(random.Random(f"edit-{seed}").sample(range(total), min(wanted, total)))
    prompts = {p.id: p for p in read_rows(file, Prompt)}
    rows: dict[str, Sampled] = {}
    candidates: dict[str, Candidate] = {}
    votes: dict[str, list[Vote]] = {}
    at = 0
    for k in complete:
        here = run.iteration(k)
        if any(at <= i < at + counts[k] for i in chosen):
            text_hash = run.plan(k).constitution.hash
            mine = [p for n, p in enumerate(rows_of(here.path / "pairs.jsonl", Pair)) if at + n in chosen]
            rows |= {p.id: Sampled(p, k, text_hash) for p in mine}
            sides = {i for p in mine for i in (p.first, p.second)}
            candidates |= {
                c.id: Candidate.of(c, _prompt(prompts, c))
                for c in rows_of(here.path / "completions.jsonl", Completion)
                if c.id in sides
            }
            votes |= _votes(here.path / "votes.jsonl", {p.id for p in mine})
        at += counts[k]
    return Sample(rows, candidates, votes)


def _prompt(prompts: Mapping[str, Prompt], completion: Completion) -> Prompt:
    if completion.prompt_id not in prompts:
        raise RlaifError(f"prompts/train.jsonl: no prompt {completion.prompt_id}, which {completion.id} answers")
    return prompts[completion.prompt_id]


def _votes(path: Path, pairs: set[str]) -> dict[str, list[Vote]]:
    """The votes on some pairs."""
    found: list[Vote] = []
    with path.open("rb") as f:
        for line in f:
            if pair_named(line) in pairs:
                try:
                    found.append(stored(Vote, line))
                except ValidationError:
                    continue
    return by_pair(found)
