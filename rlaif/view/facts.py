"""What the pages say about a run as a whole, from its `metrics.json` files: no row of a stage is read but the losses.

In: a run directory, also one that is being written. Out: plain numbers. What is damaged is named and left out.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlaif.errors import RlaifError
from rlaif.records import digest
from rlaif.store import RunDir, read_json

Metrics = dict[str, Any]


@dataclass
class Numbers:
    """The metrics of all finished iterations and evaluations, in order."""

    iterations: list[Metrics] = field(default_factory=list)
    evaluations: list[Metrics] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    """One line per file that can't be read."""


@dataclass(frozen=True)
class Totals:
    """A run in one row of numbers; None where nothing was measured."""

    pairs: int
    kept: int
    dropped: dict[str, int]
    votes: int
    abstentions: dict[str, int]
    mean_agreement: float | None
    position_bias: float | None
    order_flips: int | None
    calls: int | None
    cached: int | None
    tokens: int
    trained: int
    replayed: int
    steps: int
    seconds: float

    @property
    def kept_share(self) -> float | None:
        """Kept pairs among all that were decided on."""
        return self.kept / self.pairs if self.pairs else None


def read_numbers(run: RunDir) -> Numbers:
    """Every metrics.json that is there."""
    out = Numbers()
    for folders, rows in (
        ([run.iteration(k).path for k in run.iterations()], out.iterations),
        ([run.evaluation(k).path for k in run.evaluations()], out.evaluations),
    ):
        for folder in folders:
            try:
                rows.append(read_json(folder / "metrics.json"))
            except FileNotFoundError:
                continue  # not finished yet
            except (RlaifError, OSError, UnicodeDecodeError) as e:
                out.problems.append(str(e))
    return out


def totals(iterations: list[Metrics]) -> Totals:
    """Sums over iterations; means are weighted by pairs."""

    def add(key: str) -> int | None:
        known = [m[key] for m in iterations if key in m]
        return sum(known) if known else None

    dropped: Counter[str] = Counter()
    abstentions: Counter[str] = Counter()
    for m in iterations:
        dropped.update(m["dropped_by_first_reason"])
        abstentions.update(m["abstentions"])
    agreement = [(m["mean_agreement"], m["pairs"]) for m in iterations if m["mean_agreement"] is not None]
    bias = [(b, m["pairs"]) for m in iterations if (b := m.get("position_bias")) is not None]
    return Totals(
        pairs=add("pairs") or 0,
        kept=add("kept") or 0,
        dropped=dict(dropped.most_common()),
        votes=add("votes") or 0,
        abstentions=dict(abstentions.most_common()),
        mean_agreement=_weighted(agreement),
        position_bias=_weighted(bias),
        order_flips=add("order_flips"),
        calls=add("judge_calls"),
        cached=add("judge_cached"),
        tokens=add("judge_tokens") or 0,
        trained=add("trained_pairs") or 0,
        replayed=add("replayed_pairs") or 0,
        steps=add("steps") or 0,
        seconds=sum(sum(m["seconds"].values()) for m in iterations),
    )


def _weighted(rows: list[tuple[float, int]]) -> float | None:
    whole = sum(n for _, n in rows)
    return sum(value * n for value, n in rows) / whole if whole else None


class Losses:
    """The loss of every optimizer step; a finished stage is read once."""

    def __init__(self, run: RunDir) -> None:
        self._run = run
        self._known: dict[Path, list[tuple[int, float]]] = {}

    def read(self) -> list[tuple[int, float]]:
        """(iteration, loss) in the order of the steps; a line that can't be read is left out."""
        out = []
        for k in self._run.iterations():
            path = self._run.iteration(k).path / "updates.jsonl"
            if path not in self._known and path.exists():
                self._known[path] = _losses(path)
            out += self._known.get(path, [])
        return out


def _losses(path: Path) -> list[tuple[int, float]]:
    out = []
    for line in path.read_bytes().splitlines():
        try:
            row = json.loads(line)
            out.append((int(row["iteration"]), float(row["loss"])))
        except (ValueError, KeyError, TypeError):
            continue
    return out


def version_of(run: RunDir) -> str:
    """Another one when there is something new to see: a stage, an iteration, an event, a label."""
    folders = [run.iteration(k).path for k in run.iterations()[-1:]]
    folders += [run.evaluation(k).path for k in run.evaluations()[-1:]]
    names = [[str(f), *sorted(p.name for p in f.iterdir())] for f in folders]
    files = ("events.jsonl", "run.json", "review/labels.jsonl")
    return digest([names, [os.stat(p).st_size if (p := run.path / f).exists() else 0 for f in files]])
