"""What the `rlaif judge` commands share: options, the job, and its judge asked now."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rlaif.cli.beat import VoteCount
from rlaif.errors import BudgetSpent, JudgeUnavailable

if TYPE_CHECKING:
    from rlaif.config import Job
    from rlaif.constitutions.constitution import Constitution
    from rlaif.data.labelled import Labelled
    from rlaif.judging.calibration import Calibration
    from rlaif.judging.opened import Ask

DEFAULT_LABELLED = Path("prompts/judge_bench.jsonl")

Json = Annotated[bool, typer.Option("--json", help="Print JSON for programs instead of tables.")]


def job_of(job: Path | None, set_: list[str] | None) -> Job:
    """The job file, or the defaults, with the overrides."""
    from rlaif.config import apply_override, load_job, parse_job

    if job is not None:
        return load_job(job, set_)
    tree: dict[str, Any] = {"constitution": "assistant"}
    for override in set_ or []:
        apply_override(tree, override)
    return parse_job(tree, "--set")


def calibration_of(job: Job) -> Calibration | None:
    """The calibration that the job's filter is to use."""
    from rlaif.judging.calibration import read_calibration

    return read_calibration(Path(job.filters.calibration)) if job.filters.calibration else None


@lru_cache
def loader(directory: Path) -> Callable[[str], Constitution]:
    """Reads each constitution of the folder once."""
    from rlaif.constitutions.constitution import load_constitution

    return lru_cache(lambda reference: load_constitution(directory, reference))


@contextmanager
def told_what_is_kept(job: Job) -> Iterator[None]:
    """A judge that stops in the middle says what of its work is kept: these commands write no votes."""
    try:
        yield
    except (BudgetSpent, JudgeUnavailable) as e:
        kept = "its replies are kept in judge.cache, and the same command goes on from there"
        lost = "without judge.cache its replies so far are lost"
        raise type(e)(f"{e}; this command saves no votes; {kept if getattr(job.judge, 'cache', None) else lost}") from e


def open_asked(
    job: Job, rows: Sequence[Labelled], directory: Path, calibration: Calibration | None = None
) -> tuple[Ask, VoteCount]:
    """The job's judge, for these rows' constitutions, and a count of its votes on them.

    Raises:
        UserError: `calibration` is of other questions than these; nothing has been asked yet.
    """
    from rlaif.judging.calibration import Asked
    from rlaif.judging.filters import check_calibrated
    from rlaif.judging.kinds import kind_of
    from rlaif.judging.opened import open_with_ballots

    started = time.monotonic()
    # One row for each constitution and slice: their questions differ in the pair alone.
    some = {(r.constitution or job.constitution, r.slice): r for r in rows}
    texts = {name: loader(directory)(name) for name, _ in some if name is not None}
    opened = open_with_ballots(job, texts.values(), Path.cwd(), lambda message: print(message, file=sys.stderr))
    if calibration is not None:
        for (name, slice_name), row in some.items():
            if name is not None:
                ballots = opened.ballots([row.pair], texts[name])
                for ends in {(r.first_finish, r.second_finish) for r in rows}:
                    check_calibrated(ballots, calibration, job.filters, slice_name, Asked.by(job, ends))
    each = {name: len(opened.ballots([row.pair], texts[name])) for (name, _), row in some.items() if name is not None}
    names = (r.constitution or job.constitution for r in rows)
    total = sum(each[name] for name in names if name is not None)
    if model := kind_of(job.judge).local_model:  # it was loaded
        print(f"judge {model} ready after {time.monotonic() - started:.1f} s", file=sys.stderr)
    return opened.ask, VoteCount(total)
