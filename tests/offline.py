"""A stub run whose pairs come from another one (`source`), as a launch makes it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rlaif.config import Job
from rlaif.loop import Loop
from rlaif.loop.source import open_source
from tests.data.make_run import write_header
from tests.stubs import stub_job, stub_loop


def offline_job(run: Path, rejudge: bool = False, iterations: str | None = None, **changes: Any) -> Job:
    """The stub job on the stored pairs of a run."""
    return stub_job(source={"run": str(run), "iterations": iterations, "rejudge": rejudge}, **changes)


def offline_loop(root: Path, job: Job) -> Loop:
    """A stub loop over `root/run`, whose sampler is for held-out prompts."""
    loop = stub_loop(root, job)
    write_header(loop.dir.path, job)
    loop.source = open_source(job, root, loop.dir)
    if loop.source:
        loop.source.settle(loop.train)
    return loop
