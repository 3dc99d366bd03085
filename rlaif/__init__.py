"""rlaif: train a language model towards a written constitution, online.

From Python: load a job and run it, open a finished run, ask a judge. Nothing heavy is imported before it is used.

>>> import rlaif
>>> run = rlaif.open_run("runs/quickstart")
>>> sum(decision.status == "kept" for decision in run.decisions()) > 0
True
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rlaif.api import Judge, Opinion, Run, load_constitution, open_run, run
    from rlaif.config import Job, load_job, parse_job
    from rlaif.constitutions.constitution import Constitution, parse_constitution
    from rlaif.errors import RlaifError, UserError

__version__ = "0.1.0"

__all__ = [
    "Constitution",
    "Job",
    "Judge",
    "Opinion",
    "RlaifError",
    "Run",
    "UserError",
    "load_constitution",
    "load_job",
    "open_run",
    "parse_constitution",
    "parse_job",
    "run",
]

_HOME = {
    **dict.fromkeys(("Judge", "Opinion", "Run", "load_constitution", "open_run", "run"), "rlaif.api"),
    **dict.fromkeys(("Job", "load_job", "parse_job"), "rlaif.config"),
    **dict.fromkeys(("Constitution", "parse_constitution"), "rlaif.constitutions.constitution"),
    **dict.fromkeys(("RlaifError", "UserError"), "rlaif.errors"),
}


def __getattr__(name: str) -> Any:
    """Imports what is asked for, when it is asked for: `import rlaif` itself costs nothing."""
    if name not in _HOME:
        raise AttributeError(f"module 'rlaif' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
