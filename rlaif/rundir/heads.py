"""One digest over everything complete so far: heads, a hash chain with a link an iteration, in `heads.jsonl`.

A head is made when an iteration is done. It holds the digest of every file that is complete by then and that no head
before it holds (a stage's rows through its meta file), how long the files were that only grow, and the head before
it. Its own digest is over all of that, so a head that somebody noted elsewhere stands for the whole run up to there.
What it does not prove is in docs/audit.md.
"""

from __future__ import annotations

import glob
import hashlib
import io
import os
import re
from pathlib import Path

from pydantic import ValidationError

from rlaif.errors import UserError
from rlaif.records import Record, digest, stored
from rlaif.rundir.store import RunDir, append_line, file_digest, row_digests

FILE = "heads.jsonl"
DIGITS = 32
EVENTS = "events.jsonl"
LABELS = "review/labels.jsonl"
GROWING = (EVENTS, LABELS)
"""Files whose lines are appended, and never changed."""
CHANGING = ("run.json", "constitutions/pins.json")
"""Files that a resumed run may write anew (another number of iterations); each head says what they were."""

_COVERED = (
    "prompts/*.jsonl",
    "calibration.json",
    "constitutions/*/*",
    "iterations/*/*.json",
    "evaluations/*/*.json",
)
_LEAST_DIGITS = 12


class Grown(Record):
    """How much of a file that only grows a head covers."""

    size: int
    """Bytes, whole lines."""
    sha256: str
    """Of so many bytes."""
    row_digests: str
    """Of the lines since the head before, as in a meta file."""


class Head(Record):
    """One line of heads.jsonl."""

    head: str
    """Digest of the other fields, 32 hex digits."""
    previous: str | None
    """The head before it; null for the first."""
    iteration: int
    """The newest that is done."""
    files: dict[str, str]
    """File in the run → sha256, for what is complete and in no head before."""
    growing: dict[str, Grown]
    changing: dict[str, str]
    """File → sha256 at that time."""

    @property
    def name(self) -> str:
        """As it is printed and noted: iterations done, and the digest."""
        return f"{self.iteration + 1}:{self.head}"

    def computed(self) -> str:
        """The digest that follows from the other fields."""
        return digest(self.model_dump(mode="json", exclude={"head"}), DIGITS)


def write_head(run: RunDir, anew: bool = False) -> Head:
    """The head of what is done, appended to heads.jsonl unless the newest one says the same; `anew`: in any case.

    Raises:
        UserError: no iteration is done.
    """
    before = [head for head in read_heads(run.path) if head is not None]
    newest = before[-1] if before else None
    known = {name for head in before for name in head.files}
    done = run.done()
    if not done:
        raise UserError(f"{run.path}: no iteration is done, so there is no head yet")
    files = {name: file_digest(run.path / name) for name in complete_files(run.path, done[-1]) if name not in known}
    if newest and not anew and not files and not _labelled_since(run.path, newest):
        return newest
    since = {name: grown.size for name, grown in newest.growing.items()} if newest else {}
    head = Head(
        head="",
        previous=newest.head if newest else None,
        iteration=done[-1],
        files=files,
        growing={n: _grown(run.path / n, since.get(n, 0)) for n in GROWING if (run.path / n).exists()},
        changing={n: file_digest(run.path / n) for n in CHANGING if (run.path / n).exists()},
    )
    head = head.model_copy(update={"head": head.computed()})
    append_line(run.path / FILE, head.model_dump_json())
    return head


def complete_files(run: Path, iteration: int) -> list[str]:
    """The files that never change again once an iteration is done, in order; rows stand behind their meta files."""
    names = []
    for pattern in _COVERED:
        for path in sorted(run.glob(pattern)):
            of_iteration = path.parent.parent.name == "iterations"
            if of_iteration and path.parent.name.isdigit() and int(path.parent.name) > iteration:
                continue  # being written
            if path.is_file() and str(path.relative_to(run)) not in CHANGING:
                names.append(str(path.relative_to(run)))
    return names


def read_heads(run: Path) -> list[Head | None]:
    """The lines of heads.jsonl; None for one that is no head (torn by a kill, or damaged), a torn last one left out."""
    path = run / FILE
    lines = path.read_bytes().split(b"\n") if path.exists() else [b""]
    heads: list[Head | None] = []
    for line in lines[:-1]:
        try:
            heads.append(stored(Head, line))
        except ValidationError:
            heads.append(None)
    return heads


def heads_up_to(run: Path, iteration: int) -> tuple[bytes, list[Head]]:
    """The lines of heads.jsonl up to the first head that was made when this iteration was done, and the heads in them.

    The last of them is of an earlier iteration where that one has none, since a kill came before it; there are none in
    a run that is older than heads.
    """
    found = read_heads(run)
    later = (n for n, head in enumerate(found) if head is not None and head.iteration >= iteration)
    end = next(later, len(found))
    if end < len(found) and (head := found[end]) is not None and head.iteration == iteration:
        end += 1
    lines = (run / FILE).read_bytes().split(b"\n")[:end] if found else []
    return b"".join(line + b"\n" for line in lines), [head for head in found[:end] if head is not None]


def parent_folder(run: RunDir) -> Path | None:
    """Where the run that a branch went on from is now: beside it, under its name, or, rolled back since, as what it was
    before. None where it isn't there, and for a run without a parent."""
    if (parent := run.parent) is None:
        return None
    here = Path(os.path.abspath(run.path)).parent
    for folder in (here / parent.run, *sorted(here.glob(f"{glob.escape(parent.run)}.before-rollback-*"))):
        known = {head.name for head in read_heads(folder) if head is not None}
        if folder.name != run.path.name and folder.is_dir() and (parent.head is None or parent.head in known):
            return folder
    return None


def ends_torn(run: Path) -> bool:
    """Whether heads.jsonl ends within a line."""
    path = run / FILE
    return path.exists() and path.read_bytes()[-1:] not in (b"", b"\n")


def parse_head(text: str) -> tuple[int | None, str]:
    """(iterations done, digest) of a head as it was noted: `16:3f2a…` or the digits alone, at least twelve of them.

    Raises:
        UserError: it is no head.
    """
    match = re.fullmatch(rf"(?:(\d+):)?([0-9a-f]{{{_LEAST_DIGITS},{DIGITS}}})", text.strip().lower())
    if match is None:
        raise UserError(f"--head {text}: not a head; expected what a run prints after each iteration, as 16:3f2a90…")
    return (int(match[1]) if match[1] else None), match[2]


def _labelled_since(run: Path, head: Head) -> bool:
    """Whether people gave labels that the head doesn't cover; events alone, as a head is told in, need no other one."""
    path, grown = run / LABELS, head.growing.get(LABELS)
    return path.exists() and _grown(path, 0).size > (grown.size if grown else 0)


def _grown(path: Path, since: int) -> Grown:
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    return Grown(
        size=len(whole),
        sha256=hashlib.sha256(whole).hexdigest(),
        row_digests=row_digests(io.BytesIO(whole[since:])),
    )
