"""What of a run the index has still to take in.

In: a run, and what the index has of each file. Out: what is owed, and files that must have been there and aren't. Only
names, sizes and times are looked at, so that a look for news is cheap.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from rlaif.audit.tables import EVALUATION_STAGES, ITERATION_STAGES
from rlaif.records import digest
from rlaif.rundir.stages import EVALUATION_NAMES, NAMES
from rlaif.rundir.store import RunDir, StageDir, meta_missing

Key = tuple[str, int, int]
"""A part of a table: its name, the iteration or -1, the evaluation or -1."""


class Source(NamedTuple):
    """A JSONL file of the run that one table takes in."""

    table: str
    iteration: int | None
    evaluation: int | None
    path: Path
    grows: bool
    """Rows may still be added to it."""

    @property
    def key(self) -> Key:
        """Which part of a table it is."""
        return self.table, _or_minus_one(self.iteration), _or_minus_one(self.evaluation)

    @property
    def meta(self) -> Path | None:
        """The meta file of a complete stage, where there is one."""
        path = self.path.with_name(f"{self.table}.meta.json")
        return path if not self.grows and path.exists() else None

    def meta_seen(self) -> str:
        """Size and time of the meta file."""
        if (meta := self.meta) is None:
            return ""
        status = meta.stat()
        return f"{status.st_size}:{status.st_mtime_ns}"


@dataclass(frozen=True)
class Taken:
    """What the index has of a source."""

    name: str
    size: int
    mtime_ns: int
    bytes: int
    """Whole lines that were taken in."""
    lines: int
    tail: str
    meta: str
    """Size and time of the stage's meta file."""


class Owed(NamedTuple):
    """What an update has to do."""

    sources: list[Source]
    """To be taken in."""
    gone: list[Key]
    """Parts whose file is gone."""
    small: bool
    """Plans, metrics or texts changed."""


def look(run: RunDir, taken: dict[Key, Taken], small: str) -> Owed | None:
    """What is owed to an index that has taken in these files, and saw small files of this digest; None: nothing."""
    found = sources(run)
    owed = []
    for source in found:
        try:
            status = source.path.stat()
        except FileNotFoundError:  # renamed just now; the next look finds it
            continue
        known = taken.get(source.key)
        now = (source.path.name, status.st_size, status.st_mtime_ns, source.meta_seen())
        if known is None or now != (known.name, known.size, known.mtime_ns, known.meta):
            owed.append(source)
    gone = sorted(set(taken) - {s.key for s in found})
    small_changed = small_digest(run) != small
    return Owed(owed, gone, small_changed) if owed or gone or small_changed else None


def sources(run: RunDir) -> list[Source]:
    """Every JSONL file of the run, in the order of the log."""
    found = [
        # Two files of one table: the number only tells them apart (column `held_out`).
        Source("prompts", 0, None, run.path / "prompts" / "train.jsonl", False),
        Source("prompts", 1, None, run.path / "prompts" / "held_out.jsonl", False),
        Source("probes", None, None, run.path / "prompts" / "probes.jsonl", False),
        Source("events", None, None, run.path / "events.jsonl", True),
        Source("labels", None, None, run.path / "review" / "labels.jsonl", True),
    ]
    found = [s for s in found if s.path.exists()]
    for k in run.iterations():
        found += _stages(run.iteration(k).path, ITERATION_STAGES, k, None)
    for k in run.evaluations():
        found += _stages(run.evaluation(k).path, EVALUATION_STAGES, None, k)
    return found


def file_of(here: StageDir, stage: str) -> Path | None:
    """The file of a stage, finished or not; None when it hasn't begun."""
    paths = (here.path / f"{stage}.jsonl", here.path / f"{stage}.jsonl.partial")
    return next((path for path in paths if path.exists()), None)


def small_digest(run: RunDir) -> str:
    """Names, sizes and times of the run's small files: plans, metrics and texts."""
    paths = [run.path / "run.json"]
    for k in run.iterations():
        paths += [run.iteration(k).path / n for n in ("plan.json", "metrics.json", "updates.meta.json")]
    paths += [run.evaluation(k).path / "metrics.json" for k in run.evaluations()]
    seen = []
    for path in [*paths, *sorted((run.path / "constitutions").glob("*/constitution.json"))]:
        with suppress(FileNotFoundError):
            status = path.stat()
            seen.append((str(path.relative_to(run.path)), status.st_size, status.st_mtime_ns, status.st_mode))
    return digest(seen)


def missing(run: RunDir, texts: Iterable[str]) -> list[str]:
    """Files that must have been there, one line each: what is made from them is. `texts` are the hashes of the texts
    that iterations were judged under."""
    out = []
    begun = any(run.iteration(k).is_complete(NAMES[0]) for k in run.iterations())
    for name, lost in (
        ("events.jsonl", "alarms, if there were any, can't be told"),
        ("prompts/train.jsonl", "no prompt's text can be shown or searched"),
    ):
        if begun and not (run.path / name).exists():
            out.append(f"{run.path / name}: missing; {lost}")
    for text in texts:
        copy = run.path / "constitutions" / text / "constitution.json"
        if not copy.exists():
            out.append(f"{copy}: missing, though iterations were judged under it")
    for k in run.iterations():
        out += _missing_in(run.iteration(k), NAMES, planned=True)
    for k in run.evaluations():
        stages = [name for name in EVALUATION_STAGES if name in EVALUATION_NAMES]
        out += _missing_in(run.evaluation(k), stages, planned=False)
    return out


def _missing_in(here: StageDir, stages: Sequence[str], planned: bool) -> list[str]:
    """What is missing before the last stage that is complete; `planned`: there must be a plan."""
    complete = [stage for stage in stages if here.is_complete(stage)]
    if not complete:
        return []
    though = f"missing, though {complete[-1]}.jsonl is there"
    before = stages[: stages.index(complete[-1])]
    plan = [here.path / "plan.json"] if planned else []
    lost = [path for path in plan if not path.exists()]
    lost += [here.path / f"{stage}.jsonl" for stage in before if stage not in complete]
    metas = [here.path / f"{stage}.meta.json" for stage in complete]
    return [*(f"{path}: {though}" for path in lost), *(meta_missing(meta) for meta in metas if not meta.exists())]


def _stages(folder: Path, stages: Sequence[str], iteration: int | None, evaluation: int | None) -> list[Source]:
    names = {e.name for e in os.scandir(folder)}
    found = []
    for stage in stages:
        if f"{stage}.jsonl" in names:
            found.append(Source(stage, iteration, evaluation, folder / f"{stage}.jsonl", False))
        elif f"{stage}.jsonl.partial" in names:
            found.append(Source(stage, iteration, evaluation, folder / f"{stage}.jsonl.partial", True))
    return found


def _or_minus_one(value: int | None) -> int:
    return -1 if value is None else value
