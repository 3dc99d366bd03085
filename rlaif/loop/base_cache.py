"""What an evaluation of the untrained policy made, kept between runs: its answers and scores depend on no run.

In: a stage's name, everything that its rows follow from, and who makes them. Out: the rows, made or as another run made
them. An entry is a file in the user's cache folder: a line that says what the rows follow from and their digest, then
the rows. One that is torn, changed, of another format or about something else counts as none, and is written anew. The
rows are copied into the run, which is whole without this.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

import rlaif
from rlaif import models
from rlaif.config import Job
from rlaif.errors import RlaifError
from rlaif.records import SCHEMA_VERSION, Record, digest
from rlaif.rundir.store import make_folder, replacing

R = TypeVar("R", bound=Record)

KEPT = 400
"""Entries in the folder; the oldest go. One of 48 answers takes some 100 kB."""


def follows_from(job: Job, policy: Path, digests: Mapping[str, Any], code: Mapping[str, Any]) -> dict[str, Any]:
    """What evaluations of the untrained policy follow from in any run. Whoever judges, the base policy measures; by
    which settings, each stage says.

    Args:
        policy: Its folder.
        digests: Of the run's models, as run.json has them.
        code: What runs, as run.json has it.
    """
    return {
        "models": {name: value for name, value in digests.items() if name not in ("judge", "reference_judge")},
        "files": models.files_of(policy),
        "policy": job.policy.model_dump(mode="json", exclude={"model", "adapter"}),
        "sampling": job.sampling.model_dump(mode="json"),
        "seed": job.seed,
        # A revision changes where no code does, and doesn't where code isn't committed; files are the policy's, above.
        "code": {name: value for name, value in code.items() if name not in ("revision", "model_files")}
        | {"sources": sources()},
    }


def sources() -> str:
    """sha256 of the files that this package runs from, 16 hex digits."""
    root, sha = Path(rlaif.__file__).parent, hashlib.sha256()
    for file in sorted(f for f in root.rglob("*") if f.is_file() and f.parent.name != "__pycache__"):
        sha.update(f"{file.relative_to(root)} {hashlib.sha256(file.read_bytes()).hexdigest()}\n".encode())
    return sha.hexdigest()[:16]


class BaseCache:
    """Rows of one run's untrained policy, from a folder that all runs share."""

    def __init__(self, folder: Path, about: dict[str, Any], note: Callable[[str], None]):
        """`about` is what all rows follow from (`follows_from`).
        `note` is told once when rows of another run are taken."""
        self._folder = folder
        self._about = {"schema": SCHEMA_VERSION, **about}
        self._note = note
        self._taken: dict[str, str] = {}

    def rows(
        self, stage: str, record: type[R], about: dict[str, Any], make: Callable[[], Iterator[list[R]]]
    ) -> Iterator[list[R]]:
        """A stage's rows, in chunks. `about` is what they follow from beside what all do, `make` makes them."""
        follows = {"stage": stage, **self._about, **about}
        path = self._folder / f"{digest(follows, digits=32)}.jsonl"
        found = _read(path, follows, record)
        if found is not None:
            if not self._taken:
                self._note(f"the base policy was evaluated before: taken from {self._folder} (eval.cache: false: anew)")
            self._taken[stage] = path.stem
            yield found
            return
        made: list[R] = []
        for chunk in make():
            made += chunk
            yield chunk
        self._write(path, follows, made)

    def noted(self, stage: str) -> dict[str, Any]:
        """For the meta file of a stage: the entry that its rows are from."""
        return {"from_cache": self._taken[stage]} if stage in self._taken else {}

    def _write(self, path: Path, follows: dict[str, Any], rows: list[Any]) -> None:
        body = b"".join(row.model_dump_json().encode() + b"\n" for row in rows)
        head = {"follows_from": follows, "sha256": hashlib.sha256(body).hexdigest()}
        with suppress(OSError, RlaifError):  # a run needs no cache
            make_folder(self._folder)
            with replacing(path) as temporary:
                temporary.write_bytes(json.dumps(head).encode() + b"\n" + body)
            for old in sorted(self._folder.glob("*.jsonl"), key=lambda p: p.stat().st_mtime)[:-KEPT]:
                old.unlink(missing_ok=True)


def _read(path: Path, follows: dict[str, Any], record: type[R]) -> list[R] | None:
    """The rows of an entry; None where there is none that is whole and about just this."""
    try:
        head, _, body = path.read_bytes().partition(b"\n")
        said = json.loads(head)
        if said["follows_from"] != json.loads(json.dumps(follows)):
            return None
        if said["sha256"] != hashlib.sha256(body).hexdigest():
            return None
        return [record.model_validate_json(line) for line in body.splitlines()]
    except (OSError, ValueError, KeyError, TypeError, ValidationError):
        return None
