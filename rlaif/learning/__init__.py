"""Learners: preferences in, one `UpdateStep` per optimizer step and new policy weights out.

`dpo` is TRL's `DPOTrainer`, `online_dpo` a thin adapter on TRL's experimental `OnlineDPOTrainer`; the contract
tests hold the second to the first. Nothing heavy is imported before `make_learner` is called.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from rlaif import config
from rlaif.errors import UserError
from rlaif.records import Completion, Divergence, Preference, TokenSequence, UpdateStep
from rlaif.workers.weights import WeightsRef


class Learner(Protocol):
    """What the loop asks of a learner. One learner lives as long as its process and is reused by all iterations."""

    @property
    def global_step(self) -> int:
        """Optimizer steps taken since the untrained policy."""
        ...

    def update(self, preferences: list[Preference], iteration: int) -> Iterator[UpdateStep]:
        """Trains `learner.epochs` passes over `preferences`, one record per optimizer step, as it happens.

        Raises:
            RlaifError: the loss or a gradient is not finite; the weights are still those of the last good step.
        """
        ...

    def divergences(self, completions: list[Completion]) -> Iterator[list[Divergence]]:
        """How far the policy, as it is now, is from the untrained one over completions that it sampled itself at
        temperature 1 and top-p 1; in chunks, in an order of its own.

        Raises:
            RlaifError: the models' probabilities are not finite.
        """
        ...

    def save(self, state_dir: Path, policy_dir: Path) -> WeightsRef:
        """Writes everything needed to go on (`state_dir`) and the policy that will sample (`policy_dir`).

        Returns:
            The policy, where it was written.
        """
        ...

    def export(self, policy_dir: Path) -> WeightsRef:
        """Writes the policy alone, in `exports_in()`, and says where; the same weights give the same files."""
        ...

    def logprobs(self, sequences: list[TokenSequence]) -> list[tuple[float, ...]]:
        """log p of each completion token under the master weights, in nats; the sampler's own must equal it."""
        ...

    def track(self, values: dict[str, float | str], step: int) -> list[str]:
        """Gives the job's trackers (`learner.args.report_to`) numbers and marks beside the learner's own, at an
        optimizer step. A tracker that fails raises nothing.

        Returns:
            What went wrong with trackers since this was last called, one sentence for each, told once. Without values
            that is all it does.
        """
        ...

    def exports_in(self) -> str:
        """The precision that `save` and `export` write the policy in."""
        ...

    def load(self, state: WeightsRef) -> None:
        """Goes on from the state that `save` wrote.

        Raises:
            UserError: the folder holds no learner state, or one of another model.
        """
        ...

    def close(self) -> list[str]:
        """Tells trackers and callbacks that training has ended; returns what `track` does. Closing twice does nothing
        more."""
        ...


def make_learner(
    kind: str,
    model_path: str,
    settings: config.Learner,
    seed: int,
    output_dir: str | None = None,
    export_precision: config.Precision = "auto",
) -> Learner:
    """The learner that a job names.

    Args:
        kind: `dpo` or `online_dpo`.
        model_path: folder of the *untrained* policy; it is also the base reference.
        settings: the job's `learner` section.
        seed: everything random follows from this.
        output_dir: where trackers and callbacks write; None gives them a folder that goes with the learner.
        export_precision: what the sampler computes in, and so what the policy is written in.

    Raises:
        UserError: an unknown kind, a setting that TRL doesn't know or refuses, or an unreadable folder.
    """
    # TRL, torch and transformers take seconds to import: only the worker that trains pays for them.
    if kind == "dpo":
        from rlaif.learning.dpo import DpoLearner

        return DpoLearner(model_path, settings, seed, output_dir, export_precision)
    if kind == "online_dpo":
        from rlaif.learning.online_dpo import OnlineDpoLearner

        return OnlineDpoLearner(model_path, settings, seed, output_dir, export_precision)
    raise UserError(f"learner.kind: no learner is called {kind!r}; there are `dpo` and `online_dpo`")


def make(
    model_path: str,
    settings: config.Learner,
    seed: int,
    output_dir: str | None = None,
    export_precision: config.Precision = "auto",
) -> Learner:
    """Factory for a worker process: the learner of the untrained policy."""
    return make_learner(
        settings.kind, model_path, settings, seed, output_dir=output_dir, export_precision=export_precision
    )
