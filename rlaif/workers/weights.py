"""Weights by reference: what the learner and the sampler hand each other, in whichever process they are."""

from __future__ import annotations

from pathlib import Path

from rlaif.errors import UserError
from rlaif.records import Record


class WeightsRef(Record):
    """Whose weights, and where they are: a folder now, perhaps an object store once. Plain, and picklable."""

    digest: str
    """Of the policy, as in `PolicyVersion`: sha256 of its exported weights, first 16 hex digits. A learner's state has
    that of the policy which it exports."""
    path: Path
    """A folder that every worker can read: an exported policy, or a learner's state."""

    def folder(self) -> Path:
        """Where to read a policy from.

        Raises:
            UserError: there is nothing.
        """
        if not self.path.is_dir():
            raise UserError(f"{self.path}: the policy's weights are gone; restore them, or start a new run")
        return self.path
