"""What a begun run has behind it, for who counts what is left: texts, pairs, evaluations. Only small files are read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from rlaif.config import Job
from rlaif.constitutions.constitution import Constitution
from rlaif.constitutions.copies import as_derived, constitution_copy
from rlaif.errors import UserError
from rlaif.evaluation.probes import Probe, probes_of
from rlaif.loop.retention import BASE_POLICY
from rlaif.loop.running import PairSource
from rlaif.records import Plan
from rlaif.rundir.checkpoints import policy_dir
from rlaif.rundir.store import RunDir, read_rows


class Begun(NamedTuple):
    """What is done of a run."""

    done: int
    """Iterations."""
    texts: tuple[Constitution, ...]
    """In force in each iteration that has a plan: those that are done, and perhaps the one that is under way."""
    pairs: tuple[int, ...]
    """Of each iteration that is done."""
    taken: int
    """How many of those took their pairs from the job's source."""
    evaluated: frozenset[int]
    """After how many iterations."""
    checkpoint_bytes: int
    """Policies and learner's states that are there."""


NOTHING = Begun(done=0, texts=(), pairs=(), taken=0, evaluated=frozenset(), checkpoint_bytes=0)


def begun(run: RunDir | None, source: PairSource | None) -> Begun:
    """What is done of a run; nothing, where there is none.

    Raises:
        UserError: its copy of a text is gone.
        RlaifError: a file is damaged.
    """
    if run is None:
        return NOTHING
    done = run.done()
    planned = [k for k in run.iterations() if (run.iteration(k).path / "plan.json").exists()]
    plans = [run.plan(k) for k in planned]
    checkpoints = [*(policy_dir(run, k) for k in run.iterations()), run.path / "learner"]
    return Begun(
        done=len(done),
        texts=tuple(_text(run, plan) for plan in plans),
        pairs=tuple(run.iteration(k).meta("pairs")["rows"] for k in done),
        taken=sum(plan.source is not None and source.gave(plan.source) for plan in plans[: len(done)]) if source else 0,
        evaluated=frozenset(u for u in run.evaluations() if (run.evaluation(u).path / "metrics.json").exists()),
        checkpoint_bytes=sum(f.stat().st_size for path in checkpoints for f in path.rglob("*") if f.is_file()),
    )


def _text(run: RunDir, plan: Plan) -> Constitution:
    text = plan.in_force.constitution
    try:
        return as_derived(run, constitution_copy(run, text.hash), plan.in_force.derived)
    except FileNotFoundError as e:
        raise UserError(f"{e.filename}: the run's copy of {text} is gone; restore it") from e


def probes_asked(job: Job, run: RunDir | None, base_dir: Path) -> Sequence[Probe]:
    """What is asked at every evaluation: of a begun run its own copy. One that began without can't have it later.

    Raises:
        UserError: the job's own probes can't be used.
    """
    copy = run.path / "prompts" / "probes.jsonl" if run else None
    if run is None or copy is None or not (run.evaluation(BASE_POLICY).path / "metrics.json").exists():
        return probes_of(job, base_dir)
    return read_rows(copy, Probe) if job.eval.retention and copy.exists() else ()
