"""Human labels: how they are kept, which one counts, and which ones an update takes.

In: a run directory. Out: its `review/labels.jsonl`, one `HumanLabel` a line, appended under a lock and made durable
before `append` returns; no line is ever changed. A tail torn by a kill was never acknowledged: it is not read, and
cut off by the next append.
"""

from __future__ import annotations

import datetime
import hashlib
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from rlaif.errors import RlaifError
from rlaif.records import HumanLabel, Record, Side, stored
from rlaif.rundir.store import RunDir, StageDir, disk_errors

LOCK_TIMEOUT_S = 30.0
Joined = tuple[Side, str]
"""A label that an update took: the side that it chose, and the hash of the text that it was given under."""
REVIEW = re.compile(rb'"status":\s*"review"')
"""In the line of a decision that sent its pair to review."""


class LabelLog(Record):
    """The labels of a run at one moment."""

    labels: tuple[HumanLabel, ...]
    """In the order in which they were given."""
    problems: tuple[str, ...] = ()
    """One line for each damaged line of the file that was left out."""
    size: int = 0
    """Bytes that were read; later labels come after them."""
    sha256: str = hashlib.sha256().hexdigest()
    """Of these bytes: what somebody read can be found again, however much was appended since."""


def labels_path(run: RunDir) -> Path:
    """The run's labels.jsonl."""
    return run.path / "review" / "labels.jsonl"


@contextmanager
def review_lock(run: RunDir) -> Iterator[None]:
    """Holds the run's review folder, for a moment: reviewers and the page take turns. A killed holder lets go.

    Raises:
        RlaifError: somebody holds it for longer than any label takes.
    """
    from filelock import FileLock, Timeout  # brings asyncio: not for who only reads

    folder = run.path / "review"
    with disk_errors(folder):
        folder.mkdir(exist_ok=True)
        lock = FileLock(folder / ".lock")
        try:
            lock.acquire(timeout=LOCK_TIMEOUT_S)
        except Timeout as e:
            raise RlaifError(f"{folder}: another process has held the labels for {LOCK_TIMEOUT_S:.0f} s; end it") from e
    try:
        yield
    finally:
        lock.release()


def read_labels(run: RunDir, size: int | None = None) -> LabelLog:
    """All labels of a run, or those among its first `size` bytes; damaged lines are left out and named.

    Needs no lock: lines appear whole or last.
    """
    path = labels_path(run)
    content = path.read_bytes()[:size] if path.exists() else b""
    labels, problems = [], []
    lines = content.split(b"\n")
    for number, line in enumerate(lines, 1):
        try:
            if line.strip():
                labels.append(stored(HumanLabel, line))
        except ValidationError as e:
            if number == len(lines):
                content = content[: len(content) - len(line)]
            else:
                problem = e.errors()[0]
                where = ".".join(map(str, problem["loc"])) or "line"
                problems.append(f"{path}:{number}: not a label ({where}: {problem['msg']}); it is left out")
    digest = hashlib.sha256(content).hexdigest()
    return LabelLog(labels=tuple(labels), problems=tuple(problems), size=len(content), sha256=digest)


def append(run: RunDir, label: HumanLabel) -> None:
    """Adds a label, durable when this returns. The caller holds `review_lock`.

    Raises:
        RlaifError: the disk is full; the file is as it was before.
    """
    path = labels_path(run)
    is_new = not path.exists()
    with disk_errors(path):
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            size = _mend(file)
            try:
                row = label.model_dump_json().encode() + b"\n"
                while row:
                    row = row[os.write(file, row) :]
                os.fsync(file)
            except OSError:
                os.ftruncate(file, size)
                raise
        finally:
            os.close(file)
        if is_new:
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)


def _mend(file: int) -> int:
    """Ends a torn tail: a whole label gets its line end, anything else is cut off. Returns the file's size."""
    size = os.fstat(file).st_size
    content = os.pread(file, size, 0)
    tail = content[content.rfind(b"\n") + 1 :]
    if not tail:
        return size
    try:
        stored(HumanLabel, tail)
        os.write(file, b"\n")
        return size + 1
    except ValidationError:
        os.ftruncate(file, size - len(tail))
        return size - len(tail)


def now() -> str:
    """UTC, ISO 8601, to the millisecond: a label's time."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")


def in_force(labels: Iterable[HumanLabel]) -> dict[str, HumanLabel]:
    """Pair id → the label that counts: the newest. A skip takes back its author's own label, nobody else's."""
    by_author: dict[str, dict[str, HumanLabel]] = {}
    for label in labels:
        mine = by_author.setdefault(label.pair_id, {})
        mine.pop(label.author, None)  # to the end: a dict keeps the order of insertion
        mine[label.author] = label
    newest = {pair: [m for m in mine.values() if m.outcome != "skip"] for pair, mine in by_author.items()}
    return {pair: given[-1] for pair, given in newest.items() if given}


def joining(
    labels: Mapping[str, HumanLabel],
    joined: Mapping[str, Joined],
    texts: Mapping[int, str],
    iteration: int,
    text: str,
) -> tuple[list[HumanLabel], list[HumanLabel]]:
    """(labels that join an update, labels that are stale for it).

    `labels` are those in force, `joined` says how an update took a pair last, `texts` maps iteration to its
    constitution's hash, `text` is the one in force in `iteration`. A label joins once, after the iteration that its
    pair is from, and again when it names the other side since, or was given under another text. Stale is one that was
    given under another text than the one in force: it waits until that is in force again. Ties never train.
    """
    owed = [
        label
        for label in labels.values()
        if label.outcome in ("first", "second")
        and label.iteration < iteration
        and label.iteration in texts
        and joined.get(label.pair_id) != (label.outcome, given_under(label, texts))
    ]
    owed.sort(key=lambda label: (label.iteration, label.pair_id))
    current = {x.pair_id for x in owed if given_under(x, texts) == text}
    return [x for x in owed if x.pair_id in current], [x for x in owed if x.pair_id not in current]


def given_under(label: HumanLabel, texts: Mapping[int, str]) -> str:
    """Hash of the text that a label was given under; `texts` maps its pair's iteration to its text's."""
    return label.constitution or texts[label.iteration]


def joined_last(run: RunDir, iterations: Iterable[int], told: Callable[[str], None] | None = None) -> dict[str, Joined]:
    """Pair id → how an update of these iterations took it last as a person labelled it.

    An iteration whose update was skipped trained on nothing: its labels are still owed. `told` gets a line for each
    iteration whose meta files are damaged, which is left out.

    Raises:
        RlaifError: a meta file is gone or damaged, and nobody is `told`.
    """
    out: dict[str, Joined] = {}
    for k in iterations:
        here = run.iteration(k)
        try:
            if here.is_complete("updates") and here.policy_made() is not None and (sides := labels_of(here)):
                text = run.plan(k).constitution.hash
                out |= {pair: (side, text) for pair, side in sides.items()}
        except RlaifError as e:
            if told is None:
                raise
            told(f"{e}; which labels joined iteration {k + 1} isn't known")
    return out


def labels_of(here: StageDir) -> dict[str, Side]:
    """Pair id → side of the labels among an iteration's preferences.

    Raises:
        RlaifError: the meta file that says it is gone or damaged.
    """
    found: dict[str, Side] = labels_noted(here).get("joined", {})
    return found


def labels_noted(here: StageDir) -> dict[str, Any]:
    """What an iteration's preferences note of the labels that were there: size, sha256, joined, stale, problems.

    Raises:
        RlaifError: the meta file that says it is gone or damaged.
    """
    found = here.meta("preferences").get("labels", {})
    if not isinstance(found, dict) or not isinstance(found.get("joined", {}), dict):
        raise RlaifError(f"{here.path / 'preferences.meta.json'}: its labels are none; it was damaged")
    return found
