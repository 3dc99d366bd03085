"""A project to work in: the constitutions, prompts and jobs that are shipped, and a README of what to edit.

In: a folder. Out: the files in it, what was written, and what was left alone. The files are those of the repository's
top-level folders. A wheel carries them inside the package (pyproject.toml says where); a clone has them beside it, with
its owner's edits, which a project gets, too.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping
from pathlib import Path

from rlaif.errors import SHIPPED, RlaifError, UserError, checkout
from rlaif.records import Record

FOLDERS = SHIPPED
README = "README.md"
_HERE = Path(__file__).resolve().parent
_PACKED = _HERE / "shipped"


class Written(Record):
    """What `write_project` did; files are named from the folder, sorted."""

    folder: str
    written: tuple[str, ...]
    left_alone: tuple[str, ...]
    """Were there before: nothing is overwritten, whether it differs or not."""
    clone: str | None
    """The clone whose files these are, edits included; None where the package carries its own."""


def shipped_files() -> dict[str, Path]:
    """Every file of a project, by its name in it, and where it is copied from.

    Raises:
        RlaifError: the installation lacks them.
    """
    root = _clone() or _PACKED
    found = {README: _HERE / "project_readme.md"}
    for path in (p for folder in FOLDERS for p in (root / folder).rglob("*")):
        name = path.relative_to(root)
        if path.is_file() and not any(part.startswith(".") for part in name.parts):
            found[name.as_posix()] = path
    if missing := [f for f in FOLDERS if not any(name.startswith(f"{f}/") for name in found)]:
        raise RlaifError(f"{_HERE}: {', '.join(missing)} are not in this installation; install rlaif again")
    return dict(sorted(found.items()))


def _clone() -> Path | None:
    """The clone whose files are copied; None where the package has its own."""
    return None if _PACKED.is_dir() else checkout()


def write_project(folder: Path) -> Written:
    """Writes what is shipped into a folder, which is made if it isn't there.

    Raises:
        UserError: the folder, or one in it, is a file or can't be written, or a file of the clone can't be used.
            Nothing is written where one is a file, or can't be used.
    """
    files = shipped_files()
    clone = _clone()
    if clone is not None:
        _refuse_broken(clone, files)
    places = {folder, *(folder / parent for name in files for parent in Path(name).parents)}
    for place in sorted((*folder.parents, *places)):
        if os.path.lexists(place) and not place.is_dir():
            raise UserError(f"{place}: not a folder, and a project needs one there; name another, or move it away")
    new = {name: _write(folder / name, source.read_bytes()) for name, source in files.items()}
    return Written(
        folder=str(folder),
        written=tuple(name for name, wrote in new.items() if wrote),
        left_alone=tuple(name for name, wrote in new.items() if not wrote),
        clone=None if clone is None else str(clone),
    )


def _refuse_broken(clone: Path, files: Mapping[str, Path]) -> None:
    """Whoever owns a clone may be in the middle of an edit of its texts and jobs.

    Raises:
        UserError: one of them can't be read; file, line, and how to get the shipped one back.
    """
    from rlaif.config import load_job
    from rlaif.constitutions.constitution import list_constitutions

    try:
        list_constitutions(clone / "constitutions")
        for job in (path for name, path in files.items() if Path(name).match("jobs/*.yaml")):
            load_job(job)
    except UserError as e:
        raise UserError(
            f"{e}. `rlaif init` copies the files of this clone: mend that one, or `git -C {shlex.quote(str(clone))} "
            "checkout -- FILE` brings the shipped one back"
        ) from e


def _write(target: Path, content: bytes) -> bool:
    """Writes a file that isn't there, and says so; one that is, or a link that leads nowhere, stays."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("xb") as file:
            try:
                file.write(content)
                file.flush()
            except BaseException:  # half a file would be left alone the next time
                target.unlink()
                raise
    except FileExistsError:
        return False
    except OSError as e:
        raise UserError(
            f"{target}: can't be written ({e.strerror}); make room or name a folder that you may write, and run "
            "`rlaif init` again: what is there already stays"
        ) from e
    return True
