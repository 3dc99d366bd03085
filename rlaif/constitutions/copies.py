"""A run's own copies of the texts, wordings and templates that it used: `constitutions/<hash>/` in its folder.

In: a run and a digest. Out: what was in force then, whatever is on disk now. `rlaif.loop.in_force` writes them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from rlaif.constitutions.constitution import Constitution
from rlaif.constitutions.derived import FILE as DERIVED_FILE
from rlaif.constitutions.derived import Wordings
from rlaif.records import ConstitutionRef
from rlaif.rundir.store import RunDir, read_json, read_record

CONSTITUTION_FILE = "constitution.json"
"""What the parsed text is called in its folder."""
PINS_FILE = "constitutions/pins.json"
"""What a run's references to texts and templates were pinned to at its start."""


def constitution_copy(run: RunDir, digest: str) -> Constitution:
    """The run's copy of a text, under the name that it was first used by.

    Raises:
        FileNotFoundError: it is gone.
        RlaifError: it is damaged.
    """
    return read_record(run.path / "constitutions" / digest / CONSTITUTION_FILE, Constitution)


def pinned_text(run: RunDir, reference: str) -> ConstitutionRef | None:
    """The text that a job's reference, `rules` or `rules@2`, was pinned to in a run; None where it is none yet."""
    path = run.path / PINS_FILE
    known: dict[str, str] = read_json(path) if path.exists() else {}
    if (named := known.get(reference)) is None:
        return None
    if named in known:  # without a version it is pinned to one with, and that one to its text
        reference, named = named, known[named]
    ref = constitution_copy(run, named).ref
    name, _, version = reference.partition("@")
    return ref.model_copy(update={"name": name, "version": int(version)}) if version else ref


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
