"""How a job's learner is started: in how many processes, and with what in their environment. Imports no torch.

In: the job, and the file that `learner.accelerate` names. Out: a `Launched`. accelerate reads its file itself, in a
process of its own (`accelerate_compat`).
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from rlaif.config import Job
from rlaif.errors import RlaifError, UserError, to_install
from rlaif.workers.process import child_env

COPY = "accelerate.yaml"
"""What a run calls its copy of the file."""


class Launched(NamedTuple):
    """What the learner is started as."""

    processes: int = 1
    environment: Mapping[str, str] = {}
    """What each of them finds beside ours: accelerate's variables."""

    @property
    def sharded(self) -> bool:
        """Each process holds a part of the weights; else all of them."""
        return self.environment.get("ACCELERATE_USE_FSDP") == "true"


def accelerate_file(job: Job, base_dir: Path, run_dir: Path | None) -> Path | None:
    """What `learner.accelerate` names; where it is gone, the run's copy of it.

    Raises:
        UserError: there is neither.
    """
    if job.learner.accelerate is None:
        return None
    named = base_dir / job.learner.accelerate
    for file in (named, run_dir and run_dir / COPY):
        if file and file.is_file():
            return file
    raise UserError(f"learner.accelerate: no file {named}; `accelerate config --config_file {named}` writes one")


def launched(job: Job, file: Path | None) -> Launched:
    """How the job's learner is started; `file` is what it names in `learner.accelerate`, where that is.

    Raises:
        UserError: the file can't be used, or a step's pairs can't be shared out to so many processes.
    """
    share = job.cluster.learner if job.cluster else None
    found = Launched(share.processes if share else 1)
    if file is not None:
        found = _of_file(file, share.processes if share else None)
    if job.learner.batch_size % found.processes:
        near = -(-job.learner.batch_size // found.processes) * found.processes
        raise UserError(
            f"learner.batch_size: {job.learner.batch_size} pairs can't be shared out evenly to the learner's "
            f"{found.processes} processes; {near} could"
        )
    return found


def _of_file(file: Path, processes: int | None) -> Launched:
    if find_spec("accelerate") is None:  # a dry run needs nothing else of the extra
        raise UserError(f"learner.accelerate: {file} is accelerate's to read: `{to_install('train')}`")
    command = [sys.executable, "-m", "rlaif.learning.accelerate_compat", str(file)]
    command += [str(processes)] if processes else []
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=child_env(None))
    if done.returncode == 0:
        return Launched(**json.loads(done.stdout.splitlines()[-1]))
    why = (done.stderr.strip().splitlines() or ["no word"])[-1]
    if done.returncode == 2:
        raise UserError(f"learner.accelerate: {file}: {why}")
    raise RlaifError(f"learner.accelerate: {file}: reading it failed ({why})")
