"""Learners: rows of the type that each declares in, one `UpdateStep` per optimizer step and new policy weights out.

`dpo` is TRL's `DPOTrainer`, `online_dpo` a thin adapter on TRL's experimental `OnlineDPOTrainer`; the contract
tests hold the second to the first. A learner may be several processes, each of which is called alike (`launched` says
how many, `peers` what is whose, `sharded` brings together what lies in parts). Nothing heavy is imported before
`make_learner` is called. To add a learner: a class with what `Learner` asks, and a line in `KINDS`; rows of a type that
nothing makes yet, a function in `rlaif/loop/training.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

from rlaif import config
from rlaif.errors import UserError
from rlaif.own_code import can_rest, load, of_learner
from rlaif.records import Completion, Divergence, Preference, TokenSequence, TrainingRow, UpdateStep
from rlaif.workers.weights import WeightsRef

RowT = TypeVar("RowT", bound=TrainingRow)


KL_METRIC = "kl"
"""Of a step, where `learner.max_kl` is set: KL from the policy that began the iteration, nats a token."""


def too_far(step: UpdateStep, max_kl: float | None) -> bool:
    """Whether an update ends with this step (`learner.max_kl`). What is no number is no reason to go on."""
    return max_kl is not None and not step.metrics.get(KL_METRIC, 0.0) <= max_kl


class Learner(Protocol[RowT]):
    """What the loop asks of a learner. One learner lives as long as its process and is reused by all iterations."""

    @property
    def row_type(self) -> type[RowT]:
        """What it trains on."""
        ...

    @property
    def global_step(self) -> int:
        """Optimizer steps taken since the untrained policy."""
        ...

    def update(self, rows: Sequence[RowT], iteration: int) -> Iterator[UpdateStep]:
        """Trains `learner.epochs` passes over `rows`, one record per optimizer step, as it happens.

        Raises:
            RlaifError: the loss or a gradient is not finite; the weights are still those of the last good step.
        """
        ...

    def refer_to(self, policy: WeightsRef) -> None:
        """The policy that `beta` pulls to from the next update on. Only asked where `learner.reference` is `at_change`,
        and before every update after the first change of text.

        Raises:
            UserError: its files are gone.
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

    def start(self, policy: WeightsRef, global_step: int) -> None:
        """Goes on from a policy with a new optimizer, after so many steps that were taken before
        (`rlaif branch --new-optimizer`).

        Raises:
            UserError: the folder holds no such policy, or this learner can't go on from one.
        """
        ...

    def close(self) -> list[str]:
        """Tells trackers and callbacks that training has ended; returns what `track` does. Closing twice does nothing
        more."""
        ...


class Kind(NamedTuple):
    """A kind of learner as it is known without importing it: torch, transformers and TRL take seconds."""

    where: str
    """`module:Class`."""
    row_type: type[TrainingRow]
    """The class's own."""
    takes_reference: bool = False
    """Whether it has `use_reference`: takes the reference's log-probabilities from whoever has them."""
    rests: bool = True
    """Whether it has `rest` and `wake`: gives back what it holds of a GPU, and takes it again (`device: shared`)."""


KINDS = {
    "dpo": Kind("rlaif.learning.dpo:DpoLearner", Preference, takes_reference=True),
    "online_dpo": Kind("rlaif.learning.online_dpo:OnlineDpoLearner", Preference),
}


def kind_of(name: str) -> Kind:
    """What `learner.kind` names.

    Raises:
        UserError: no learner is called that.
    """
    if ":" in name:  # the user's own; a class attribute says its rows
        code = load("learner.kind", name)
        return Kind(name, getattr(code.made, "row_type", Preference), rests=can_rest(code))
    if name not in KINDS:
        raise UserError(f"learner.kind: no learner is called {name!r}; there are {', '.join(f'`{k}`' for k in KINDS)}")
    return KINDS[name]


def make_learner(
    kind: str,
    model_path: str,
    settings: config.Learner,
    seed: int,
    output_dir: str | None = None,
    export_precision: config.Precision = "auto",
) -> Learner[Any]:
    """The learner that a job names.

    Args:
        kind: one of `KINDS`.
        model_path: folder of the *untrained* policy; it is also the base reference.
        settings: the job's `learner` section.
        seed: everything random follows from this.
        output_dir: where trackers and callbacks write; None gives them a folder that goes with the learner.
        export_precision: what the sampler computes in, and so what the policy is written in.

    Raises:
        UserError: an unknown kind, a setting that TRL doesn't know or refuses, or an unreadable folder.
    """
    module, _, name = kind_of(kind).where.partition(":")
    learner: Learner[Any] = getattr(import_module(module), name)(
        model_path, settings, seed, output_dir, export_precision
    )
    return learner


def make(
    model_path: str,
    settings: config.Learner,
    seed: int,
    output_dir: str | None = None,
    export_precision: config.Precision = "auto",
    sha256: str | None = None,
) -> Learner[Any]:
    """Factory for a worker process: the learner of the untrained policy. `sha256` is the digest that the loop knows of
    a learner of the user's own."""
    if isinstance(settings, config.OwnLearner):
        code, own = of_learner(settings, sha256)
        made: Learner[Any] = code.made(model_path, own, seed, output_dir, export_precision)
        return made
    return make_learner(
        settings.kind, model_path, settings, seed, output_dir=output_dir, export_precision=export_precision
    )
