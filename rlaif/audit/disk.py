"""What a run takes on the disk, and what it would take with another `keep_checkpoints`.

In: a run directory; only names and sizes are looked at. Out: a `Disk`. A file that another run shares, as a branch does
with its parent, is counted in both.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from rlaif.config import Checkpoints, Job
from rlaif.errors import RlaifError
from rlaif.records import Record
from rlaif.rundir.checkpoints import Keep, kept, policy_dir, updates
from rlaif.rundir.store import RunDir

_CHOICES: tuple[Keep, ...] = (None, "evaluated", Checkpoints(last=3), Checkpoints(every=4), "all")


class Cost(Record):
    """What a choice of `keep_checkpoints` takes when the job is done."""

    keep: str
    """As a job says it."""
    policies: int
    states: int
    """Learner's states."""
    bytes: int


class Disk(Record):
    """What a run takes on the disk."""

    bytes: int
    shared: int
    """Of these, in files that are another run's too, or somebody's: they are freed with the last one."""
    policies: int
    """So many exported policies ..."""
    policy_bytes: int
    """... and what they take together."""
    states: int
    """The same of the learner's states."""
    state_bytes: int
    keep: str
    """The run's own choice, as a job says it; `unknown` where run.json is damaged."""
    costs: tuple[Cost, ...]
    """Of the weights at the job's end, by choice; empty before a first update."""


def disk_of(run: RunDir) -> Disk:
    """What a run takes now, and at its job's end by choice."""
    of_policies = [path for k in run.iterations() if (path := policy_dir(run, k)).is_dir()]
    of_states = sorted(path for path in (run.path / "learner").glob("*") if path.name.isdigit())
    whole, shared = size_of(run.path)
    costs: list[Cost] = []
    keep = "unknown"
    try:
        job = run.job()
        keep = _said(job.keep_checkpoints)
        if of_policies and of_states:
            costs += _costs(run, job, size_of(of_policies[-1])[0], size_of(of_states[-1])[0])
    except RlaifError:  # a damaged file is told where it is needed; sizes can be told without
        pass
    return Disk(
        bytes=whole,
        shared=shared,
        policies=len(of_policies),
        policy_bytes=sum(size_of(path)[0] for path in of_policies),
        states=len(of_states),
        state_bytes=sum(size_of(path)[0] for path in of_states),
        keep=keep,
        costs=tuple(costs),
    )


def _costs(run: RunDir, job: Job, policy: int, state: int) -> Iterator[Cost]:
    """As if every update that is owed were made, and no text changed any more."""
    done, end = len(run.done()), job.iterations
    updated = [*updates(run), *range(done, end)]
    evaluated = {*run.evaluations(), end, *range(0, end + 1, job.eval.every)}
    choices = [*_CHOICES] if job.keep_checkpoints in _CHOICES else [job.keep_checkpoints, *_CHOICES]
    for choice in choices:
        stay = kept(choice, end, evaluated, updated)
        policies, states = len(stay.policies), len(stay.states)
        yield Cost(keep=_said(choice), policies=policies, states=states, bytes=policies * policy + states * state)


def _said(keep: Keep) -> str:
    if isinstance(keep, Checkpoints):
        return f"{{last: {keep.last}}}" if keep.last is not None else f"{{every: {keep.every}}}"
    return "null" if keep is None else keep


def size_of(folder: Path) -> tuple[int, int]:
    """(bytes of the files in a folder, of these in files with another name elsewhere)."""
    whole = shared = 0
    for path, _, names in os.walk(folder):
        for name in names:
            try:
                status = os.lstat(os.path.join(path, name))
            except FileNotFoundError:  # a run at work renames and removes
                continue
            whole += status.st_size
            shared += status.st_size if status.st_nlink > 1 else 0
    return whole, shared


def in_words(size: int) -> str:
    """Bytes for people, with two or three digits: `1.6 GB`."""
    number, unit = float(size), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if number < 1000:
            break
        number, unit = number / 1000, larger
    return f"{number:.0f} {unit}" if number >= 10 or unit == "B" else f"{number:.1f} {unit}"
