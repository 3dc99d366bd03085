"""A run's own copies of the texts, wordings and templates that it used: `constitutions/<hash>/` in its folder.

In: a run and a digest. Out: what was in force then, whatever is on disk now. `rlaif.loop.in_force` writes them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from rlaif.constitutions.constitution import Constitution
from rlaif.constitutions.derived import FILE as DERIVED_FILE
from rlaif.constitutions.derived import Wordings
from rlaif.rundir.store import RunDir, read_record

CONSTITUTION_FILE = "constitution.json"
"""What the parsed text is called in its folder."""


def constitution_copy(run: RunDir, digest: str) -> Constitution:
    """The run's copy of a text, under the name that it was first used by.

    Raises:
        FileNotFoundError: it is gone.
        RlaifError: it is damaged.
    """
    return read_record(run.path / "constitutions" / digest / CONSTITUTION_FILE, Constitution)


def derived_copy(run: RunDir, digest: str) -> Wordings:
    """The run's copy of the wordings by which it derived contrasts (`Plan.derived`).

    Raises:
        FileNotFoundError: it is gone.
    """
    return read_record(run.path / "constitutions" / digest / DERIVED_FILE, Wordings)


def as_derived(run: RunDir, constitution: Constitution, derived: Mapping[str, str]) -> Constitution:
    """A text with the voices that the plan says were derived (`Plan.derived`).

    Raises:
        FileNotFoundError: the copy of the wordings is gone.
    """
    return constitution.derived_by(next((derived_copy(run, digest) for digest in derived.values()), None))


def template_sources(folder: Path) -> dict[str, str]:
    """File name → text of a template's copy in a run, with what it includes; empty when it is gone."""
    return {f.relative_to(folder).as_posix(): f.read_text() for f in sorted(folder.rglob("*.jinja"))}
