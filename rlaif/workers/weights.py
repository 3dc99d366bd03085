"""Weights by reference: what the learner and the sampler hand each other, in whichever process they are, and how their
files get to a machine that doesn't see them.

Such a machine keeps some folders in `$RLAIF_CACHE/weights`, each under the digests of its weights and of what is read
with them (a model may get another chat template, and keep its weights): written beside it, checked, then renamed.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any

from filelock import FileLock
from pydantic import AfterValidator

from rlaif.errors import UserError, WorkerError
from rlaif.models import cache_root, digest_of, files_of, weight_files
from rlaif.records import Record

KEPT = 4
"""Folders that a machine keeps, those that were used last: a policy and its judge, and one of each on its way."""
PART = 256 * 2**20
"""Bytes of a file that travel at once."""

FileParts = list[tuple[str, list[Any]]]
"""Name of a file, and what stands for its parts, in order."""


class WeightsRef(Record):
    """Whose weights, and where they are. Plain, and picklable."""

    digest: str
    """Of the policy, as in `PolicyVersion`: sha256 of its exported weights, first 16 hex digits. A learner's state has
    that of the policy which it exports."""
    path: Annotated[Path, AfterValidator(Path.absolute)]
    """A folder that every worker can read, or has sent to it: an exported policy, or a learner's state. Absolute, since
    who reads it may work in another directory."""

    files: str | None = None
    """What is read of the folder beside its weights (`models.files_of`), where the reference leaves for a machine that
    may hold another one; None: it was never asked. A policy is known by its weights alone."""

    @classmethod
    def of(cls, folder: Path) -> WeightsRef:
        """A model's folder on this machine."""
        return cls(digest=digest_of(folder), path=folder).whole()

    def whole(self) -> WeightsRef:
        """The same, with what else is read of its folder; as it is where this machine doesn't see that."""
        if self.files is not None or not self.path.is_dir():
            return self
        return self.model_copy(update={"files": files_of(self.path)})

    @property
    def name(self) -> str:
        """What its folder is kept under elsewhere."""
        return self.digest if self.files is None else f"{self.digest}-{self.files}"

    def is_in(self, folder: Path) -> bool:
        """Whether a folder holds just this."""
        if self.files is not None and not (folder.is_dir() and files_of(folder) == self.files):
            return False
        return bool(weight_files(folder)) and digest_of(folder) == self.digest

    def folder(self) -> Path:
        """Where to read a policy from.

        Raises:
            UserError: there is nothing.
        """
        if not self.path.is_dir():
            raise UserError(f"{self.path}: the policy's weights are gone; restore them, or start a new run")
        return self.path


class WeightsMissing(Exception):
    """This machine has no folder with these weights."""

    def __init__(self, ref: WeightsRef):
        super().__init__(f"{ref.path}: no weights {ref.digest} on this machine")
        self.ref = ref


def seen_here(ref: WeightsRef) -> WeightsRef:
    """A reference to the same folder on this machine: where the path leads, if that is it, or what was kept.

    Raises:
        WeightsMissing: neither is there.
    """
    for folder in (ref.path, _kept(ref)):
        if ref.is_in(folder):
            if folder != ref.path:
                os.utime(folder)  # used last
            return ref.model_copy(update={"path": folder})
    raise WeightsMissing(ref)


def parts_of(folder: Path) -> Iterator[tuple[str, Iterator[bytes]]]:
    """A folder's files, by their names in it, in parts."""
    for file in sorted(f for f in folder.rglob("*") if f.is_file()):
        yield str(file.relative_to(folder)), _read(file)


def _read(file: Path) -> Iterator[bytes]:
    with file.open("rb") as f:
        while part := f.read(PART):
            yield part


def keep(ref: WeightsRef, files: Iterable[tuple[str, list[Any]]], get: Callable[[Any], bytes]) -> Path:
    """Writes a folder's files where this machine keeps such. Of several that want to, one does.

    Args:
        files: As `FileParts`.
        get: A part, by what stands for it.

    Raises:
        WorkerError: what arrived isn't what was sent.
    """
    folder = _kept(ref)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.parent / ".lock"):
        if ref.is_in(folder):
            return folder
        shutil.rmtree(folder, ignore_errors=True)  # changed by hand, it would be asked for again and again
        for left in folder.parent.glob(".partial-*"):  # whoever wrote it was killed: it had the lock
            shutil.rmtree(left, ignore_errors=True)
        partial = Path(tempfile.mkdtemp(prefix=".partial-", dir=folder.parent))
        try:
            for name, parts in files:
                to = partial / name
                to.parent.mkdir(parents=True, exist_ok=True)
                with to.open("wb") as f:
                    for part in parts:
                        f.write(get(part))
            if not ref.is_in(partial):
                found = WeightsRef.of(partial)
                raise WorkerError(f"weights {ref.name} arrived as {found.name}: damaged on their way")
            os.replace(partial, folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        _forget(folder.parent)
    return folder


def _kept(ref: WeightsRef) -> Path:
    return cache_root() / "weights" / ref.name


def _forget(folder: Path) -> None:
    """Removes all but the folders that were used last. Files that somebody has open stay readable."""
    found = [(f.stat().st_mtime, f) for f in folder.iterdir() if f.is_dir() and not f.name.startswith(".")]
    for _, old in sorted(found)[:-KEPT]:
        shutil.rmtree(old, ignore_errors=True)
