"""What both learners share: one trainer a process, one optimizer state, one step count, whatever the iterations.

In: rows that train (token ids as sampled). Out: an `UpdateStep` per optimizer step, and on `save` a state folder and a
policy folder. TRL's trainer computes loss and gradients (`training_step`), keeps the metrics and serves callbacks and
trackers; the loop over steps is ours, because `Trainer.train()` starts its step count and schedule again on every
call, wraps the model again, and can't hand out a step while it runs.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import json
import math
import pickle
import random
import sys
import tempfile
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    ProgressCallback,
)
from transformers.utils.logging import disable_progress_bar

from rlaif import config
from rlaif.device_memory import DeviceMemory, tensors_of
from rlaif.errors import RlaifError, UserError
from rlaif.hardware import precision_here
from rlaif.learning import KL_METRIC, too_far
from rlaif.learning.as_exported import AsExported
from rlaif.learning.divergence import Asked, divergences, layers_in_fp32
from rlaif.learning.moved import Moved
from rlaif.learning.peers import Peers
from rlaif.learning.policy_state import check_mergeable, exported_state, plain_names
from rlaif.learning.scoring import plainly
from rlaif.learning.sharded import gathered, in_shards_again, placed_state, put, whole, whole_state
from rlaif.learning.trackers import open_trackers
from rlaif.learning.trl_compat import (
    TrlConfig,
    TrlTrainer,
    attach,
    check_as_launched,
    divide_losses_by,
    gather_by,
    go_on_after,
    in_shards,
    is_sharded,
    log_at,
    log_step,
    metric,
    on_one_gpu,
    set_learning_rate,
    start_counting,
    tell,
)
from rlaif.models import carry_over, digest_of, name_turn_ends, without_empty_quantisation
from rlaif.records import Completion, Divergence, TokenSequence, TrainingRow, UpdateStep
from rlaif.workers.weights import WeightsRef

Row = dict[str, Any]
"""A row as the trainer takes it: `row_id`, what `TrlLearner.row` makes of it, and the reference's log-probabilities in
whatever form the learner's loss wants, under names that begin with `ref_`."""

_SET_ELSEWHERE = {
    "learning_rate": "learner.learning_rate",
    "beta": "learner.beta",
    "loss_type": "learner.loss_type",
    "max_grad_norm": "learner.max_grad_norm",
    "num_train_epochs": "learner.epochs",
    "bf16": "learner.precision",
    "fp16": "learner.precision",
    "seed": "seed",
    "data_seed": "seed",
    "gradient_accumulation_steps": "learner.batch_size (args.per_device_train_batch_size is the part of it that "
    "goes through the model at once)",
    "max_length": "sampling.max_model_len",
    "max_new_tokens": "sampling.max_tokens",
    "temperature": "sampling.temperature",
    "top_p": "sampling.top_p",
    "use_vllm": "sampling.engine",
    "precompute_ref_log_probs": "nothing: they always are, once an update",
    "eval_strategy": "eval.every",
    "save_strategy": "nothing: every iteration is saved",
    "neftune_noise_alpha": "nothing: noise would stand in the log-probabilities that are compared",
}
_LOWER_THE_RATE = "Lower the rate: add --set learner.learning_rate=VALUE --allow-change to the command"
_ENDLESS_SCHEDULES = ("constant", "constant_with_warmup", "inverse_sqrt")


class TrlLearner(ABC):
    """A TRL trainer driven one step at a time. Subclasses say which trainer, and how it takes a batch."""

    config_class: type[TrlConfig]
    """TRL's config; `learner.args` may set any of its fields that no other setting owns."""
    row_type: ClassVar[type[TrainingRow]]
    """What it trains on."""
    step_metrics: ClassVar[Mapping[str, str]]
    """What it measures of a step beside what every learner does: name in the log → TRL's name."""

    def __init__(
        self,
        model_path: str,
        settings: config.Learner,
        seed: int,
        output_dir: str | None = None,
        export_precision: config.Precision = "auto",
    ) -> None:
        """Loads the policy (fp32) and builds the trainer; see `rlaif.learning.make_learner`."""
        self.settings = settings
        self.seed = seed
        self.peers = Peers.here()
        self._counts = True
        """Whether what is being computed belongs to this process, not to another one that has a row less."""
        self._closed = False
        self._told: set[str] = set()
        """Trackers whose failure was told."""
        self.notes: list[str] = []
        """What there is to say of an update; told with its next step."""
        self._precision = precision_here(settings.precision)
        self._export_precision = precision_here(export_precision)
        disable_progress_bar()  # of transformers: progress is the loop's to show
        self._model_path = model_path
        # The trainer wants a folder of its own, even when it writes nothing there.
        self._scratch = tempfile.TemporaryDirectory(prefix="rlaif-learner-")
        self._output_dir = output_dir or self._scratch.name
        args = self._trainer_args()
        policy, self.tokenizer = _load(model_path)
        self._exported_config = copy.deepcopy(policy.config)  # before we and TRL write our own choices into it
        # Nothing here generates. transformers refuses to save some that it loads: the base's own file is carried over.
        self._generation_config, policy.generation_config = policy.generation_config, GenerationConfig()
        no_dropout(policy)
        names = set(policy.state_dict())
        reported, args.report_to = args.report_to, []  # the trainer's own would end a run that they fail in
        with _settings_errors():
            self._trackers = open_trackers(reported if self.peers.is_first else [])
            self.trainer = self._make_trainer(policy, args, _peft_config(settings.lora))
        args.report_to = reported
        check_as_launched(self.trainer, self._precision)
        if self.peers.count > 1:
            gather_by(self.trainer, lambda values: self.peers.values(values if self._counts else None))
        attach(self.trainer, self._trackers, self.tokenizer)
        self._check_export(names)
        self._adapt(self.policy)
        with _settings_errors():
            self._prepare(args)
        self._frozen: nn.Module | None = None
        """A copy of the reference policy, where no cheaper one exists. Read after the policy may have gone into shards:
        a whole model at a time is in RAM."""
        if settings.reference != "previous" and settings.lora is None:
            self._frozen = self._freeze(model_path)
        self._refers_to: str | None = None
        """Digest of the policy that `_frozen` is, by `refer_to`; None: the untrained one is referred to."""
        self._memory = DeviceMemory(self._held)
        self.policy_as_exported: Callable[[], AbstractContextManager[None]] = nullcontext
        """`with` it, the policy computes with the weights of its export; in fp32 those are the masters."""
        self.base_as_exported: Callable[[], AbstractContextManager[None]] = nullcontext
        """The same of the reference, where that isn't the policy before an update."""
        if self._precision == "bf16":
            self.policy_as_exported = AsExported(self.policy, seed)
            base = self.policy if self._frozen is None else self._unwrapped(self._frozen)
            self.base_as_exported = AsExported(base, seed, adapters=False)

    @abstractmethod
    def _defaults(self) -> dict[str, Any]:
        """Fields of `config_class` that this learner sets and `learner.args` may override."""

    @abstractmethod
    def _make_trainer(self, policy: PreTrainedModel, args: TrlConfig, peft_config: Any) -> TrlTrainer:
        """The trainer. It holds no reference model: references are scored once an update, see `_reference`."""

    @abstractmethod
    def row(self, given: Any) -> Row:
        """A row of its type as the trainer takes it, still without the reference's log-probabilities."""

    @abstractmethod
    def sequences(self, row: Row) -> list[TokenSequence]:
        """The completions that a row trains on."""

    @abstractmethod
    def _score_reference(self, model: nn.Module, rows: list[Row]) -> None:
        """Adds the reference's log-probabilities to each row; called without gradient."""

    @abstractmethod
    def _batch(self, rows: list[Row]) -> dict[str, Any]:
        """What the trainer's `training_step` takes."""

    # ---- training

    @property
    def global_step(self) -> int:
        """Optimizer steps taken since the untrained policy."""
        return int(self.trainer.state.global_step)

    def update(self, rows: Sequence[Any], iteration: int) -> Iterator[UpdateStep]:
        """One pass over `rows` an epoch, in a seeded order; yields after each optimizer step.

        A trainer callback that asks for training to stop ends the update, and all later ones. `learner.max_kl` ends it
        after the step that goes too far, whose metrics have its `kl`.

        Raises:
            RlaifError: the loss or a gradient is not finite, and the weights are still those of the last good step; or
                KL after one, which broke the policy. Nothing of this update is to be kept.
        """
        prepared = [self.row(given) for given in rows]
        self.look_at(prepared)
        self._score_references(self._steps(prepared, iteration, epoch=0))
        moved = Moved(self.logprobs) if self.settings.max_kl is not None else None
        if moved is not None:
            moved.begin([sequence for row in prepared for sequence in self.sequences(row)])
        trainer = self.trainer
        trainer.state.log_history.clear()  # trackers have seen it; a long run must not keep it
        for epoch in range(self.settings.epochs):
            steps = self._steps(prepared, iteration, epoch)
            for number, step in enumerate(steps, 1):
                if any(self.peers.gathered(trainer.control.should_training_stop)):
                    return
                trainer.state.epoch = iteration * self.settings.epochs + epoch + number / len(steps)
                taken = self._step(step, iteration)
                if moved is not None:
                    kl = moved.kl([sequence for row in step for sequence in self.sequences(row)])
                    self._refuse_broken(kl, step)
                    taken = taken.model_copy(update={"metrics": taken.metrics | {KL_METRIC: kl}})
                taken, self.notes = taken.model_copy(update={"notes": tuple(self.notes)}), []
                yield taken
                if too_far(taken, self.settings.max_kl):
                    return

    def look_at(self, rows: Sequence[Row]) -> None:  # noqa: B027 (nothing to look at is a good default)
        """Looks at an update's rows before anything is computed."""

    def _steps(self, rows: list[Row], iteration: int, epoch: int) -> list[list[Row]]:
        order = epoch_order(len(rows), self.seed, iteration, epoch)
        return _chunks([rows[i] for i in order], self.settings.batch_size)

    def _step(self, rows: list[Row], iteration: int) -> UpdateStep:
        trainer, started = self.trainer, time.perf_counter()
        args, state = trainer.args, trainer.state
        tell(trainer, "on_step_begin")
        parts = self._parts(rows)
        with self.policy_as_exported():
            losses = [self._part_of_a_step(part, rows, last=part is parts[-1]) for part in parts]
        loss = sum(self.peers.gathered(sum(losses)))
        shares = [len(part) / len(rows) for part in parts]
        measured = {
            name: _weighted(metric(trainer, theirs)[-len(parts) :], shares)
            for name, theirs in self.step_metrics.items()
        }
        grad_norm = float(whole(trainer.accelerator.clip_grad_norm_(trainer.model.parameters(), args.max_grad_norm)))
        learning_rate = float(trainer.lr_scheduler.get_last_lr()[0])
        self._refuse_not_finite(loss, grad_norm, rows)

        tell(trainer, "on_pre_optimizer_step")
        trainer.optimizer.step()
        tell(trainer, "on_optimizer_step")
        self._next_rate(state.global_step)
        trainer.model.zero_grad()
        state.global_step += 1
        tell(trainer, "on_step_end")
        log_step(trainer, loss, grad_norm, learning_rate, started)
        return UpdateStep(
            step=state.global_step,
            iteration=iteration,
            row_ids=tuple(row["row_id"] for row in rows),
            loss=loss,
            grad_norm=grad_norm,
            learning_rate=learning_rate,
            seconds=time.perf_counter() - started,
            metrics=measured,
        )

    def _next_rate(self, taken: int) -> None:
        """Moves the schedule on, after a step before which so many were taken. Its last value stays: a cosine would
        rise again."""
        if taken < self._horizon:
            self.trainer.lr_scheduler.step()

    def _parts(self, rows: list[Row]) -> list[list[Row]]:
        """A step's rows as they go through the model, of each part `per_device_train_batch_size` in each process."""
        return _chunks(rows, self.trainer.args.per_device_train_batch_size * self.peers.count)

    def _part_of_a_step(self, part: list[Row], rows: list[Row], last: bool) -> float:
        """Adds the gradient of this process's rows of a part; what they add to the loss of the step.

        Gradients become the mean over processes, and a process without a row takes part with one that counts nothing.
        """
        trainer, mine = self.trainer, self.peers.share(part)
        self._counts = bool(mine)
        share = len(mine) / len(rows)  # each counts by its share of the step's rows
        divide_losses_by(trainer, 1 / (share * self.peers.count) if mine else math.inf)
        # Shards add up part by part: what waited for the last one would be whole on each process.
        waits = nullcontext() if last or is_sharded(trainer) else trainer.accelerator.no_sync(trainer.model_wrapped)
        with waits:
            loss = float(trainer.training_step(trainer.model_wrapped, self._batch(mine or part[:1])))
        return loss * share if mine else 0.0

    def _refuse_not_finite(self, loss: float, grad_norm: float, rows: list[Row]) -> None:
        values = torch.tensor([loss, grad_norm])
        if bool(values.isfinite().all()):
            return
        self.trainer.model.zero_grad()
        what = f"the loss is {loss}" if not values[0].isfinite() else f"the gradient norm is {grad_norm}"
        raise RlaifError(
            f"update step {self.global_step + 1}: {what} (rows {', '.join(row['row_id'] for row in rows)}); the step "
            f"was not taken. {_LOWER_THE_RATE}"
        )

    def _refuse_broken(self, kl: float, rows: list[Row]) -> None:
        if not math.isfinite(kl):
            raise RlaifError(
                f"update step {self.global_step}: KL from the policy that began the iteration is {kl} (rows "
                f"{', '.join(row['row_id'] for row in rows)}): the step broke the policy, and nothing of this update "
                f"is kept. {_LOWER_THE_RATE}"
            )

    # ---- how far the policy went

    def divergences(self, completions: list[Completion]) -> Iterator[list[Divergence]]:
        """How far the master weights are from the untrained policy; see `Learner`."""
        policy = self.policy
        was_training = policy.training
        policy.eval()
        try:
            # As many rows at once as an update takes: chosen and rejected.
            batch = 2 * self.trainer.args.per_device_train_batch_size
            device = self.trainer.args.device
            yield from divergences(
                Asked(policy, root=self.root), self._untrained(), completions, batch, device, self.peers
            )
        finally:
            policy.train(was_training)

    def _untrained(self) -> Asked:
        """The base policy, whatever `reference` is."""
        if self.settings.lora is not None:
            return Asked(self.policy, self.trainer.model.disable_adapter, self.root)
        if self._frozen is None or self._refers_to is not None:  # no copy of it is kept: read once an evaluation
            base, _ = _load(self._model_path)
            return Asked(self._placed(base.requires_grad_(False).eval()))
        inner = self._unwrapped(self._frozen)
        return Asked(inner, partial(layers_in_fp32, inner))

    # ---- the reference policy

    def refer_to(self, policy: WeightsRef) -> None:
        """KL is measured against this policy from the next update on; see `Learner`."""
        if policy.digest == self._refers_to:
            return
        folder = str(policy.folder())
        if self._frozen is None:
            self._frozen = self._freeze(folder)
        else:  # in its place: accelerate would hold on to the one before
            given, frozen = _load(folder)[0].state_dict(), self._unwrapped(self._frozen)
            in_shards_again(frozen)
            for name, value in frozen.state_dict().items():
                put(value, given[name])
        self._refers_to = policy.digest
        if self._precision == "bf16":
            self.base_as_exported = AsExported(self._unwrapped(self._frozen), self.seed, adapters=False)

    def _score_references(self, steps: list[list[Row]]) -> None:
        """In the parts that training will take: bf16 rounds differently in another batch, and a policy that equals
        its reference would not start at a log-ratio of 0."""
        with torch.no_grad(), self._reference() as model:
            for part in (part for rows in steps for part in self._parts(rows)):
                self._score_part(model, part)

    def _score_part(self, model: nn.Module, part: list[Row]) -> None:
        """Each process scores its rows, and gets what the others found of theirs."""
        mine = self.peers.share(part)
        self._score_reference(model, mine or part[:1])
        found = [{name: value for name, value in row.items() if name.startswith("ref_")} for row in mine]
        for rank, scored in enumerate(self.peers.gathered(found)):
            for row, values in zip(self.peers.share(part, rank), scored, strict=True):
                row.update(values)

    @contextmanager
    def _reference(self) -> Iterator[nn.Module]:
        """The model that KL is measured against, before the update changes anything."""
        model, within = self.trainer.model_wrapped, self.policy_as_exported
        adapter_off: AbstractContextManager[Any] = nullcontext()
        if self.settings.reference != "previous":
            within = self.base_as_exported
            if self._frozen is not None:
                model = self._frozen
            else:
                adapter_off = self.trainer.model.disable_adapter()
        was_training = model.training
        model.eval()
        with adapter_off, within():
            yield model
        model.train(was_training)

    def _freeze(self, path: str) -> nn.Module:
        """A policy that only serves as the reference."""
        frozen, _ = _load(path)
        frozen.requires_grad_(False).eval()
        if self._precision == "bf16" and self.settings.reference == "base":
            # What autocast would do at every call, done once: same numbers as the policy's, half the memory. A
            # tied head stays fp32, since the embedding that it shares is not autocast; so does what is not on bf16's
            # grid, since KL is computed from these weights, too.
            embedding = frozen.get_input_embeddings().weight
            for module in frozen.modules():
                halves = isinstance(module, nn.Linear) and module.weight is not embedding
                if halves and all(torch.equal(p.to(torch.bfloat16).float(), p) for p in module.parameters()):
                    module.to(torch.bfloat16)
        self._adapt(frozen)
        if is_sharded(self.trainer):
            return self._placed(frozen)
        return self.trainer.accelerator.prepare_model(frozen, evaluation_mode=True)

    def _placed(self, model: PreTrainedModel) -> PreTrainedModel:
        """A frozen model where this learner computes: in shards, if its own lies so."""
        if is_sharded(self.trainer):
            return in_shards(self.trainer, model)
        return model.to(self.trainer.args.device)

    def _unwrapped(self, model: nn.Module) -> PreTrainedModel:
        """A model as transformers knows it, without accelerate around it."""
        plain: PreTrainedModel = self.trainer.accelerator.unwrap_model(model)
        return plain

    def _adapt(self, model: PreTrainedModel) -> None:  # noqa: B027 (nothing to prepare is a good default)
        """Prepares policy or reference for the trainer's way of calling it, before accelerate wraps it."""

    # ---- building

    def _trainer_args(self) -> TrlConfig:
        known = {f.name for f in dataclasses.fields(self.config_class) if f.init}
        for name in self.settings.args:
            if name in _SET_ELSEWHERE:
                raise UserError(f"learner.args.{name}: set in {_SET_ELSEWHERE[name]}; remove it from learner.args")
            if name not in known:
                near = difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.5)
                hint = f"did you mean `{near[0]}`?" if near else f"see the fields of TRL's {self.config_class.__name__}"
                raise UserError(f"learner.args.{name}: {self.config_class.__name__} has no such field; {hint}")
        settings = self.settings
        values = {
            "output_dir": self._output_dir,
            "learning_rate": settings.learning_rate,
            "beta": settings.beta,
            "loss_type": settings.loss_type,
            "max_grad_norm": settings.max_grad_norm,
            "per_device_train_batch_size": -(-settings.batch_size // self.peers.count),
            "ddp_broadcast_buffers": False,  # they are constants, and who is late must not hold up who scores
            "bf16": self._precision == "bf16",
            "use_cpu": not torch.cuda.is_available(),
            "seed": self.seed,
            "lr_scheduler_type": "constant_with_warmup",
            "warmup_steps": settings.warmup_steps,
            "logging_steps": 1,
            "report_to": "none",
            "disable_tqdm": True,
            "save_strategy": "no",
            # On by default in TRL: a second forward pass in exchange for memory. A job may ask for it.
            "gradient_checkpointing": False,
            **self._defaults(),
            **self._numbers(settings.args),
        }
        with _settings_errors():
            args = self.config_class(**values)
            on_one_gpu(args)
        for name, needs in (
            ("lr_scheduler_type", args.lr_scheduler_type not in _ENDLESS_SCHEDULES),
            ("warmup_steps", 0 < args.warmup_steps < 1),
        ):
            if needs and args.max_steps <= 0:
                raise UserError(
                    f"learner.args.{name}: `{_text(getattr(args, name))}` needs to know where training ends; set "
                    "learner.args.max_steps to about the optimizer steps of the whole run"
                )
        return args

    def _numbers(self, args: dict[str, Any]) -> dict[str, Any]:
        """YAML reads `1e-8` as text: what TRL's config wants as a number becomes one."""
        wanted = {f.name for f in dataclasses.fields(self.config_class) if f.type in (float, float | None, "float")}
        out = dict(args)
        for name in wanted & args.keys():
            if isinstance(args[name], str):
                try:
                    out[name] = float(args[name])
                except ValueError as e:
                    raise UserError(f"learner.args.{name}: expected a number, found {args[name]!r}") from e
        return out

    def _prepare(self, args: TrlConfig) -> None:
        """What `Trainer.train()` does before its first step, once."""
        trainer = self.trainer
        for callback in (PrinterCallback, ProgressCallback):
            trainer.remove_callback(callback)
        if args.gradient_checkpointing:  # DPOTrainer leaves it to `train()`
            trainer.model.gradient_checkpointing_enable(args.gradient_checkpointing_kwargs)
            if self.settings.lora is not None:
                trainer.model.enable_input_require_grads()
        trainer.create_optimizer()
        trainer.model_wrapped, trainer.optimizer = trainer.accelerator.prepare(trainer.model, trainer.optimizer)
        if is_sharded(trainer):  # the first pass has to go through the whole: it says which module holds the others
            probe_logits(trainer.model, training=False)
        horizon = args.max_steps if args.max_steps > 0 else sys.maxsize
        trainer.create_scheduler(num_training_steps=horizon)
        self._horizon = horizon
        start_counting(trainer, horizon, self.settings.epochs)
        trainer.state.max_steps = sys.maxsize  # the horizon is the schedule's; it ends no run
        trainer.model.zero_grad()
        self._untrained_state = copy.deepcopy((trainer.optimizer.state_dict(), trainer.lr_scheduler.state_dict()))
        tell(trainer, "on_train_begin")

    def close(self) -> list[str]:
        """Tells trackers and callbacks that training has ended; see `Learner`."""
        if not self._closed:
            self._closed = True
            tell(self.trainer, "on_train_end")
            for tracker in self._trackers:
                tracker.end()
            self._scratch.cleanup()
        return self._failed_trackers()

    def _failed_trackers(self) -> list[str]:
        """What went wrong with trackers and wasn't told yet."""
        new = [t.failed for t in self._trackers if t.failed is not None and t.name not in self._told]
        self._told |= {t.name for t in self._trackers if t.failed is not None}
        return new

    # ---- memory

    def rest(self) -> None:
        """Weights, the optimizer's state and the frozen reference go to RAM, bit by bit as they are. Until it wakes it
        can neither compute nor be saved."""
        self._memory.rest()

    def wake(self) -> None:
        """All of it comes back."""
        self._memory.wake()

    def _held(self) -> Iterator[torch.Tensor]:
        """What stays on its device between two calls."""
        for model in (self.trainer.model, self._frozen):
            if model is not None:
                in_shards_again(model)
                yield from tensors_of(model)
        for moments in self.trainer.optimizer.state.values():
            yield from (value for value in moments.values() if isinstance(value, torch.Tensor))

    # ---- the policy as it is

    def exports_in(self) -> str:
        """What `save` writes the policy in: `fp32`, or `bf16`, rounded at random."""
        return self._export_precision

    @torch.no_grad()
    def logprobs(self, sequences: list[TokenSequence]) -> list[tuple[float, ...]]:
        """log p of each completion token under the fp32 masters, in nats: what the sampler's must equal.

        Neither autocast nor padding nor our own scoring is in the way: the model's plain forward, row by row.
        """
        plain = self.policy
        was_training = plain.training
        plain.eval()

        def logps(sequence: TokenSequence) -> tuple[float, ...]:
            ids = torch.tensor([sequence.all_ids], device=self.trainer.args.device)
            logits = plainly(plain, self.root, input_ids=ids, use_cache=False).logits[0, :-1]  # [tokens, vocabulary]
            completion = logits[len(sequence.prompt_token_ids) - 1 :].float().log_softmax(-1)
            targets = ids[0, len(sequence.prompt_token_ids) :, None]
            return tuple(completion.gather(-1, targets)[:, 0].tolist())

        out = self.peers.shared(sequences, logps)
        plain.train(was_training)
        return out

    def track(self, values: dict[str, float | str], step: int) -> list[str]:
        """Gives trackers numbers beside TRL's own; see `Learner`."""
        if values:
            log_at(self.trainer, step, values)
        return self._failed_trackers()

    # ---- state

    def save(self, state_dir: Path, policy_dir: Path) -> WeightsRef:
        """Writes the learner's state (fp32 weights, optimizer, schedule, RNG, step), and the policy in the precision
        that it samples in.

        Both folders are made if missing; whoever calls decides when they become the run's (one rename). Of several
        processes the first writes, and what it writes is whole: any other number of them goes on from it.

        Returns:
            The policy, where it was written.

        Raises:
            UserError: the disk is full.
        """
        self._save_weights(state_dir)  # each is written before the next is gathered
        self._save_rest(state_dir)
        return self.export(policy_dir)

    def _save_weights(self, folder: Path) -> None:
        weights = gathered(self.trained(), keeps=self.peers.is_first)
        if self.peers.is_first:
            with _write_errors(folder):
                folder.mkdir(parents=True, exist_ok=True)
                save_file(weights, folder / "weights.safetensors")

    def _save_rest(self, folder: Path) -> None:
        state = {
            "global_step": self.global_step,
            "optimizer": whole_state(self.trainer.optimizer.state_dict(), keeps=self.peers.is_first),
            "scheduler": self.trainer.lr_scheduler.state_dict(),
            "rng": _rng_state(),
        }
        if self.peers.is_first:
            with _write_errors(folder), _no_checksums():
                torch.save(state, folder / "state.pt")

    def export(self, policy_dir: Path) -> WeightsRef:
        """Writes the policy alone, as `save` does."""
        with _write_errors(policy_dir):
            return WeightsRef(digest=self._export(policy_dir), path=policy_dir)  # that of the first process counts

    def load(self, state: WeightsRef) -> None:
        """Goes on from the state that `save` wrote; the next step is the one an uninterrupted run would take.

        Raises:
            UserError: no state there, or the state of another model or another kind of learner.
        """
        folder, trainer = state.path, self.trainer
        try:  # mapped, both: each process reads what it takes, tensor by tensor
            weights = load_file(folder / "weights.safetensors")
            rest = torch.load(folder / "state.pt", map_location="cpu", mmap=True, weights_only=True)
        except (OSError, ValueError, RuntimeError, EOFError, pickle.UnpicklingError, SafetensorError) as e:
            why = " ".join(str(e).split())
            raise UserError(
                f"{folder}: can't read the learner's state ({why}); restore it, or start a new run from a policy of "
                "this one (policy.model: RUN/iterations/.../policy)"
            ) from e
        mine = self.trained()
        differing = sorted(set(mine) ^ set(weights)) or [n for n in mine if mine[n].shape != weights[n].shape]
        if differing:
            raise UserError(f"{folder}: the state of another model (they differ in `{differing[0]}`); was it changed?")
        with torch.no_grad():
            for name, value in mine.items():
                put(value, weights[name])
        _set_rng_state(rest["rng"])
        trainer.optimizer.load_state_dict(placed_state(rest["optimizer"], trainer.optimizer))
        trainer.lr_scheduler.load_state_dict(rest["scheduler"])
        # A state brings its learning rate along; a job resumed with another one (`--allow-change`) means that one.
        set_learning_rate(trainer, self.settings.learning_rate)
        go_on_after(trainer, rest["global_step"])

    def start(self, policy: WeightsRef, global_step: int) -> None:
        """Goes on from an exported policy: its weights and a new optimizer; steps count on, and the schedule with them.

        Raises:
            UserError: the policy can't be read, or adapters are trained, which a policy has merged.
        """
        if self.settings.lora is not None:
            raise UserError("learner.lora: a policy has its adapter merged, and no new optimizer can go on from it")
        model, _ = _load(str(policy.folder()))
        theirs = model.state_dict()
        with torch.no_grad():
            for name, value in self.trained().items():
                put(value, theirs[name])
        optimizer, scheduler = copy.deepcopy(self._untrained_state)
        self.trainer.optimizer.load_state_dict(optimizer)
        self.trainer.lr_scheduler.load_state_dict(scheduler)
        with warnings.catch_warnings(action="ignore", category=UserWarning):  # that a new optimizer took no step yet
            for step in range(global_step):
                self._next_rate(step)
        go_on_after(self.trainer, global_step)

    def trained(self) -> dict[str, torch.Tensor]:
        """The parameters that training changes, by name, tied ones once; themselves, not copies, and of several
        processes perhaps a part in each."""
        in_shards_again(self.trainer.model)
        return {n: p.data for n, p in self.trainer.model.named_parameters() if p.requires_grad}

    @property
    def policy(self) -> PreTrainedModel:
        """The policy as transformers knows it: no accelerate, no peft around it, though its layers may hold a LoRA."""
        model = self.trainer.model
        return model if self.settings.lora is None else model.get_base_model()

    @property
    def root(self) -> nn.Module | None:
        """What has to be called in the policy's place: where it lies in shards, what brings together all of it."""
        return self.trainer.model if is_sharded(self.trainer) else None

    def _check_export(self, names: set[str]) -> None:
        """Whether what `save` will write is what a reader of the untrained model expects, before anything is sampled.

        Raises:
            UserError: the adapters can't be merged back into weights of the model's own names.
        """
        plain = self.policy
        check_mergeable(plain)
        if differing := sorted(plain_names(plain) ^ names):
            raise UserError(
                f"learner.lora: the merged policy would differ from the model in `{differing[0]}`, and nobody could "
                "load it; name other layers in learner.lora.target_modules, or train full weights"
            )

    def _export(self, folder: Path) -> str:
        plain = self.policy
        in_shards_again(self.trainer.model)
        state = exported_state(plain, self._export_precision, self.seed, keeps=self.peers.is_first)
        if not self.peers.is_first:
            return ""
        plain.save_pretrained(folder, state_dict=state)
        # save_pretrained writes the master weights' dtype and TRL's settings into config.json
        exported = copy.deepcopy(self._exported_config)
        exported.dtype = torch.bfloat16 if self._export_precision == "bf16" else torch.float32
        exported.save_pretrained(folder)
        if self._generation_config is not None:  # what a base without such a file has in its config.json
            self._generation_config.to_json_file(folder / "generation_config.json")
        carry_over(Path(self._model_path), folder)
        name_turn_ends(folder, self.tokenizer)
        return digest_of(folder)


@contextmanager
def _write_errors(folder: Path) -> Iterator[None]:
    """torch and safetensors tell a full disk each in its own way; torch's doesn't even name it.

    Raises:
        RlaifError: writing failed; what was complete before stays complete.
    """
    try:
        yield
    except (RuntimeError, OSError, SafetensorError) as e:
        signs = ("no space left", "quota exceeded", "inline_container")
        if any(sign in str(e).lower() for sign in signs):
            raise UserError(f"{folder}: no space left on the disk; free some and run the same command again") from e
        raise RlaifError(f"{folder}: can't write the learner's files ({' '.join(str(e).split())[:200]})") from e


@contextmanager
def _settings_errors() -> Iterator[None]:
    """What TRL and transformers raise at settings that they refuse, or whose package isn't there.

    Raises:
        UserError: with what they say.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (ValueError, NotImplementedError, TypeError, ImportError, RuntimeError) as e:
        raise UserError(f"learner: TRL refuses these settings: {' '.join(str(e).split())}") from e


def epoch_order(rows: int, seed: int, iteration: int, epoch: int) -> list[int]:
    """The order in which an epoch takes so many rows: a permutation that follows from the three numbers alone."""
    order = list(range(rows))
    random.Random(f"{seed}:{iteration}:{epoch}").shuffle(order)
    return order


def pad(rows: list[list[Any]], value: float, side: str) -> torch.Tensor:
    """Rows of several lengths (token ids, log-probabilities) as one tensor [rows, longest], filled up on one side."""
    longest = max(map(len, rows))
    fill = [[value] * (longest - len(row)) for row in rows]
    return torch.tensor([f + r if side == "left" else r + f for r, f in zip(rows, fill, strict=True)])


def _chunks(rows: list[Row], size: int) -> list[list[Row]]:
    return [rows[i : i + size] for i in range(0, len(rows), size)]


def _weighted(values: list[float], shares: list[float]) -> float:
    return sum(v * s for v, s in zip(values, shares, strict=True))


def _text(value: Any) -> str:
    return str(getattr(value, "value", value))


def _load(path: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    try:
        model, found = AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.float32, output_loading_info=True, **without_empty_quantisation(path)
        )
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError, ImportError, AssertionError, SafetensorError) as e:
        raise UserError(f"policy.model: can't load {path} ({' '.join(str(e).split())})") from e
    if missing := sorted(found["missing_keys"]):
        raise UserError(
            f"policy.model: {path} lacks {len(missing)} of the model's weights (`{missing[0]}`), which would be drawn "
            "at random; take a complete model"
        )
    whole = json.loads((Path(path) / "config.json").read_text()).get("model_type")
    if whole != model.config.model_type:
        raise UserError(
            f"policy.model: {path} is a `{whole}`, of which transformers trains the part `{model.config.model_type}` "
            "alone: what is exported would not be the same model; take one that is text only"
        )
    _choose_pad(tokenizer, model.get_input_embeddings().weight.size(0))
    return model, tokenizer


def _choose_pad(tokenizer: PreTrainedTokenizerBase, rows: int) -> None:
    """Padding is masked, so any row of the embedding will do: one is taken where a tokenizer names none, or one that
    the embedding doesn't have. The tokenizer's own files are exported as they are."""
    pad, end = tokenizer.pad_token_id, tokenizer.eos_token_id
    if pad is None or pad >= rows:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(end if end is not None and end < rows else 0)


def no_dropout(model: PreTrainedModel) -> None:
    """The log-probabilities that are compared must be those of the policy that samples. TRL turns `nn.Dropout` off;
    others keep theirs as a number, of a module (OPT's `dropout`, `layerdrop`) or of the configuration that a forward
    pass reads (Falcon), and routers of experts shake their input.

    Raises:
        UserError: the model still computes something else in training; every loss would be compared with noise.
    """
    in_use = probe_logits(model, training=False)
    named = (getattr(m, "config", None) for m in model.modules())
    configs = {id(c): c for c in named if isinstance(c, PreTrainedConfig)}
    owed = list(configs.values())
    while owed:
        inner = [c for c in vars(owed.pop()).values() if isinstance(c, PreTrainedConfig) and id(c) not in configs]
        configs |= {id(c): c for c in inner}
        owed += inner
    for holder in (*model.modules(), *configs.values()):
        all_of_it = "dropout" in type(holder).__name__.lower()
        for name, value in list(vars(holder).items()):
            if isinstance(value, float) and (all_of_it or "drop" in name or "jitter" in name):
                setattr(holder, name, 0.0)
    # Twice: what is random, and what only differs.
    off = max(float((probe_logits(model, training=True) - in_use).abs().max()) for _ in range(2))
    if not off <= 1e-4 * (1 + float(in_use.abs().max())):
        raise UserError(
            f"policy.model: {type(model).__name__} computes something else in training than in use (logits differ by "
            f"{off:.2g}): dropout or noise that has no number to set to 0; take another model"
        )


@torch.no_grad()
def probe_logits(model: PreTrainedModel, training: bool) -> torch.Tensor:
    """Logits of some tokens, [2, 32, vocabulary], in fp32."""
    ids = torch.arange(64, device=model.device).remainder(model.get_input_embeddings().weight.size(0)).view(2, 32)
    was_training = model.training
    with torch.random.fork_rng(devices=[]):
        logits: torch.Tensor = model.train(training)(input_ids=ids, use_cache=False).logits.float()
    model.train(was_training)
    return logits


def _peft_config(lora: config.Lora | None) -> Any:
    if lora is None:
        return None
    from peft import LoraConfig

    # Handed to the trainer, not applied here: TRL takes an already wrapped model's adapter for its reference.
    return LoraConfig(r=lora.r, lora_alpha=lora.alpha, target_modules=lora.target_modules, task_type="CAUSAL_LM")


@contextmanager
def _no_checksums() -> Iterator[None]:
    """torch's zip checksums cost more time than the writing; a torn file is never renamed into place."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(before)


def _rng_state() -> dict[str, torch.Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _set_rng_state(state: dict[str, torch.Tensor]) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
