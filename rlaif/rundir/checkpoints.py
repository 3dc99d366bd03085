"""What a run can go on from: the policy that an iteration made, and the learner's state behind it.

In: a run directory. Out: which of them are on the disk, and which are to stay there. A checkpoint after n iterations is
that of the last update among them: an iteration whose update was skipped has none of its own. A run without an update
goes on from the base policy, which needs no file.
"""

from __future__ import annotations

import json
from bisect import bisect_left
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from rlaif import config
from rlaif.rundir.store import RunDir, read_json

_NEW_OPTIMIZER = "new_optimizer.json"


class Checkpoint(NamedTuple):
    """What is there to go on from after so many iterations."""

    iterations: int
    updated: int | None
    """The last of them that made a policy, from 0; None when none did."""
    policy: bool
    """Its weights are on the disk."""
    state: bool
    """So is the learner's state, or what stands for it (`new_optimizer`)."""


def policy_dir(run: RunDir, iteration: int) -> Path:
    """The policy that an iteration made."""
    return run.iteration(iteration).path / "policy"


def state_dir(run: RunDir, iteration: int) -> Path:
    """The learner's state after an iteration."""
    return run.path / "learner" / f"{iteration:04d}"


def checkpoints(run: RunDir) -> list[Checkpoint]:
    """What is there after one iteration, after two, and so on, to the last that is done.

    Raises:
        RlaifError: the meta file of an update is gone or damaged.
    """
    found, updated = [], None
    for k in run.done():
        if run.iteration(k).policy_made() is not None:
            updated = k
        policy = updated is None or policy_dir(run, updated).is_dir()
        state = updated is None or state_dir(run, updated).is_dir()
        found.append(Checkpoint(k + 1, updated, policy, state))
    return found


Keep = Literal["all", "evaluated"] | config.Checkpoints | None
"""`keep_checkpoints` of a job."""


class Kept(NamedTuple):
    """The updates whose policy, and whose learner's state, stay on the disk; by iteration, from 0."""

    policies: frozenset[int]
    states: frozenset[int]


def kept(keep: Keep, iterations: int, evaluated: Collection[int], updated: Sequence[int]) -> Kept:
    """What stays after so many iterations.

    Args:
        keep: the job's choice.
        iterations: that are done.
        evaluated: after how many iterations held-out answers were asked for.
        updated: the iterations that made a policy, in order.
    """

    def of(numbers: Iterable[int]) -> frozenset[int]:
        """The updates behind the policies after so many iterations each."""
        found = (bisect_left(updated, n) for n in numbers)
        return frozenset(updated[at - 1] for at in found if at)

    newest = of([iterations])
    if keep is None:
        return Kept(of(evaluated) | newest, newest)
    if keep == "all":
        stay = frozenset(updated)
    elif keep == "evaluated":
        stay = of(evaluated)
    elif keep.last is not None:
        stay = of(range(iterations + 1 - keep.last, iterations + 1))
    else:
        stay = of(range(0, iterations + 1, keep.every or 1))
    return Kept(stay | newest, stay | newest)


def updates(run: RunDir) -> list[int]:
    """The iterations that made a policy, of those that are done.

    Raises:
        RlaifError: the meta file of an update is gone or damaged.
    """
    return [k for k in run.done() if run.iteration(k).policy_made() is not None]


def superfluous(run: RunDir, keep: Keep, iterations: int) -> Kept:
    """What is on the disk after so many iterations and doesn't stay."""
    updated = [k for k in range(iterations) if run.iteration(k).policy_made() is not None]
    stay = kept(keep, iterations, [e for e in run.evaluations() if e <= iterations], updated)
    policies = frozenset(k for k in updated if policy_dir(run, k).exists())
    states = frozenset(k for k in updated if state_dir(run, k).exists())
    return Kept(policies - stay.policies, states - stay.states)


def write_new_optimizer(state: Path, global_step: int) -> None:
    """Instead of a learner's state: that a new optimizer goes on from the policy, counting its steps from here."""
    state.mkdir(parents=True)
    (state / _NEW_OPTIMIZER).write_text(json.dumps({"global_step": global_step}) + "\n")


def new_optimizer(state: Path) -> int | None:
    """Steps that were taken before a new optimizer went on; None where the state is a learner's own."""
    path = state / _NEW_OPTIMIZER
    return int(read_json(path)["global_step"]) if path.exists() else None
