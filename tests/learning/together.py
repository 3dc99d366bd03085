"""Learners to be called in one process or in several: what a test asks of both, and compares."""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel, TrainerCallback

from rlaif import config
from rlaif.learning import make_learner
from rlaif.learning.sharded import put, whole
from rlaif.records import Completion, Divergence, Preference, TokenSequence, UpdateStep
from rlaif.workers.weights import WeightsRef

Arrays = dict[str, Any]
"""By name, as NumPy's: torch would send tensors between processes by its shared memory."""


def _array(value: torch.Tensor) -> Any:
    return whole(value).detach().cpu().clone().numpy()


class BeforeTheStep(TrainerCallback):
    """Gradients of each step, whole, and what trackers are told of it."""

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        self.gradients: list[Arrays] = []
        self.logs: list[dict[str, float]] = []

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        trained = [(n, p) for n, p in self._trainer.model.named_parameters() if p.requires_grad]
        self.gradients.append({n: _array(p.grad) for n, p in trained})

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.logs.append({name: value for name, value in logs.items() if "time" not in name and "per_sec" not in name})


class Learners:
    """Builds learners one after the other, in processes that stay; `fsdp` as accelerate would on GPUs."""

    def __init__(self, fsdp: bool = False) -> None:
        torch.set_num_threads(1)
        self._made: Any = None
        if fsdp:
            _fsdp_without_gpus()

    def build(self, path: str, settings: config.Learner, export_precision: config.Precision = "fp32") -> None:
        torch.manual_seed(0)  # what a LoRA begins with
        self._made = make_learner(settings.kind, path, settings, 7, export_precision=export_precision)

    def loads(self, path: str, settings: config.Learner) -> int:
        """How often a model is read from its folder while a learner is built."""
        read, found = PreTrainedModel.from_pretrained, []

        def counted(cls: type[PreTrainedModel], *args: Any, **kwargs: Any) -> Any:
            found.append(cls)
            return read.__func__(cls, *args, **kwargs)

        with mock.patch.object(PreTrainedModel, "from_pretrained", classmethod(counted)):
            self.build(path, settings)
        return len(found)

    def disturb(self, seed: int = 1) -> None:
        """Makes the policy differ from its reference."""
        generator = torch.Generator().manual_seed(seed)
        for p in self._made.trained().values():
            put(p, whole(p) + 0.05 * torch.randn(p.shape, generator=generator))

    def train(self, pairs: list[Preference], iteration: int = 0) -> tuple[list[UpdateStep], list[Arrays], list[Any]]:
        """Steps, the gradients before each, and what trackers were told."""
        seen = BeforeTheStep(self._made.trainer)
        self._made.trainer.add_callback(seen)
        steps = list(self._made.update(pairs, iteration))
        self._made.trainer.remove_callback(seen)
        return steps, seen.gradients, seen.logs

    def without_a_share(self, pairs: list[Preference]) -> list[int]:
        """After each part of a step, how many parameters have no gradient that lies in shards as they do."""
        trainer, found = self._made.trainer, []
        step = trainer.training_step

        def counted(*args: Any) -> Any:
            loss = step(*args)
            found.append(sum(not isinstance(p.grad, DTensor) for p in trainer.model.parameters() if p.requires_grad))
            return loss

        trainer.training_step = counted
        list(self._made.update(pairs, 0))
        del trainer.training_step
        return found

    def update(self, rows: list[Preference], iteration: int) -> Iterator[UpdateStep]:
        yield from self._made.update(rows, iteration)

    def weights(self) -> Arrays:
        return {name: _array(p) for name, p in self._made.trained().items()}

    def moments(self) -> list[Any]:
        states = self._made.trainer.optimizer.state_dict()["state"].values()
        return [_array(s[name]) for s in states for name in ("exp_avg", "exp_avg_sq", "step")]

    def rest(self) -> int:
        """Bytes that weights and moments still hold of this process' memory, where it can be given back."""
        learner = self._made
        for p in learner.trainer.model.parameters():
            if not isinstance(p.data, DTensor):
                p.data = p.data.clone()  # TRL's trainer has them where a CPU can't give them back
        learner.rest()
        moments = [m for of in learner.trainer.optimizer.state.values() for m in of.values()]
        held = [*(p.data for p in learner.trainer.model.parameters()), *moments]
        return sum((t.to_local() if isinstance(t, DTensor) else t).untyped_storage().nbytes() for t in held)

    def wake(self) -> None:
        self._made.wake()

    def use_reference(self, logprobs: dict[str, float]) -> None:
        self._made.use_reference(logprobs)

    def logprobs(self, sequences: list[TokenSequence]) -> list[tuple[float, ...]]:
        found: list[tuple[float, ...]] = self._made.logprobs(sequences)
        return found

    def divergences(self, completions: list[Completion]) -> Iterator[list[Divergence]]:
        yield from self._made.divergences(completions)

    def refer_to(self, policy: WeightsRef) -> None:
        self._made.refer_to(policy)

    def save(self, to: Path) -> WeightsRef:
        made: WeightsRef = self._made.save(to / "state", to / "policy")
        return made

    def whole_while_saving(self, to: Path) -> list[int]:
        """Of each process, the most bytes of tensors that were brought together and lived at the same time."""
        bring_together, made, most = DTensor.full_tensor, list[weakref.ref[torch.Tensor]](), 0

        def counted(value: DTensor) -> torch.Tensor:
            nonlocal most
            found: torch.Tensor = bring_together(value)
            made.append(weakref.ref(found))
            most = max(most, sum(t.nbytes for alive in made if (t := alive()) is not None))
            return found

        with mock.patch.object(DTensor, "full_tensor", counted):
            self.save(to)
        sizes: list[int] = self._made.peers.gathered(most)
        return sizes

    def load(self, state: WeightsRef) -> None:
        self._made.load(state)

    def how(self) -> tuple[int, str, str]:
        """Processes, what accelerate makes of them, and what the trainer wraps."""
        trainer = self._made.trainer
        return self._made.peers.count, str(trainer.accelerator.distributed_type), type(trainer.model_wrapped).__name__

    def spoil(self) -> None:
        """Makes every logit of this process no number, if it is the last one."""
        if self._made.peers.rank == self._made.peers.count - 1:
            head = self._made.policy.get_output_embeddings()
            self._hook = head.register_forward_hook(lambda m, i, o: o * float("nan"))

    def unspoil(self) -> None:
        if hasattr(self, "_hook"):
            self._hook.remove()

    def stop_training(self) -> None:
        """As a callback of the last process would ask for it."""
        if self._made.peers.rank == self._made.peers.count - 1:
            self._made.trainer.control.should_training_stop = True


def _fsdp_without_gpus() -> None:
    """accelerate takes no FSDP on a CPU, although torch has it: what it looks at says that there are GPUs."""
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType

    plain = AcceleratorState.__init__

    def init(self: Any, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        plain(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
            self.fsdp_plugin = fsdp_plugin

    AcceleratorState.__init__ = init  # type: ignore[method-assign]
    os.environ |= {
        "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
        "FSDP_CPU_RAM_EFFICIENT_LOADING": "false", "FSDP_RESHARD_AFTER_FORWARD": "true",
    }  # fmt: skip
