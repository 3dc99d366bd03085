"""What TRL and transformers' `Trainer` don't document and we need, to drive a trainer one step at a time; see
`rlaif.reached`.

In: a trainer of TRL's, or a class of it. Out: the same, prepared, told, asked. `Trainer.train()` does all of this by
itself, but starts its counts and its schedule anew at every call. TRL's minor version is pinned for what is here.
"""

from __future__ import annotations

import contextlib
import copy
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from accelerate.utils import fsdp2_prepare_model
from trl import import_utils
from trl.trainer.base_config import _BaseConfig
from trl.trainer.base_trainer import _BaseTrainer
from trl.trainer.utils import FusedCausalLMOutput as FusedCausalLMOutput
from trl.trainer.utils import add_fused_lm_head as add_fused_lm_head

from rlaif.errors import UserError
from rlaif.reached import Reached

TrlConfig = _BaseConfig
"""What the settings of TRL's trainers are."""
TrlTrainer = _BaseTrainer
"""What TRL's trainers are. What they ask of a model (`fused_lm_head=True`) is in `rlaif.learning.scoring`."""

_STEPS = "the learner takes no step"
_LOGS = "trackers and callbacks don't see TRL's numbers"
_ONLINE = "`learner.kind: online_dpo` doesn't train on completions that exist"
_FUSED = "`learner.kind: dpo` has no log-probabilities"
_TRAINER = "transformers.trainer"
_DPO, _ONLINE_DPO = "trl.trainer.dpo_trainer", "trl.experimental.online_dpo.online_dpo_trainer"

REACHED = (
    Reached("trl.trainer.base_config", "_BaseConfig", "no learner can be imported"),
    Reached("trl.trainer.base_trainer", "_BaseTrainer", "no learner can be imported"),
    Reached("trl.trainer.utils", "add_fused_lm_head", _FUSED, says="fused_lm_head"),
    Reached("trl.trainer.utils", "FusedCausalLMOutput", _FUSED, says="label_mask"),
    Reached(_DPO, "DPOTrainer", _FUSED, says="fused_lm_head=True"),
    Reached(_DPO, "DPOTrainer.compute_ref_log_probs", "references have no log-probabilities"),
    Reached(_DPO, "DPOTrainer._compute_loss", "chosen and rejected compute their prompt twice"),
    Reached(_DPO, "DPOTrainer.ref_model", "adapters are switched off in the middle of a step"),
    Reached(_DPO, "DPOTrainer", "in shards, a reference is loaded that nobody asks", says="self.ref_model = ref_model"),
    Reached(_DPO, "DPOTrainer._prepare_dataset", "TRL tokenises what is tokens already"),
    Reached(_DPO, "DPOTrainer._precompute_ref_logps", "TRL scores references of rows that don't exist yet"),
    Reached(_DPO, "DPOTrainer._metrics", "a step has no margin and no accuracy"),
    Reached(_DPO, "DPOTrainer.use_weighting", "WPO (`use_weighting`) lacks what it weights by"),
    Reached(_ONLINE_DPO, "OnlineDPOTrainer._generate", _ONLINE),
    Reached(_ONLINE_DPO, "OnlineDPOTrainer._forward", _ONLINE),
    Reached(_ONLINE_DPO, "OnlineDPOTrainer.ref_model", _ONLINE),
    Reached(_ONLINE_DPO, "OnlineDPOTrainer.stats", "a step of online_dpo has no margin and no accuracy"),
    Reached("trl.import_utils", "is_vllm_available", "online_dpo imports vLLM: 15 s, and threads that hold the cores"),
    Reached("trl.experimental", "", "online_dpo prints a warning", says="TRL_EXPERIMENTAL_SILENCE"),
    Reached(_TRAINER, "Trainer._prepare_inputs", _STEPS),
    Reached(_TRAINER, "Trainer.callback_handler", _STEPS),
    Reached(_TRAINER, "Trainer.current_gradient_accumulation_steps", _STEPS),
    Reached(_TRAINER, "Trainer._maybe_log_save_evaluate", _LOGS),
    Reached(_TRAINER, "Trainer._tr_loss", _LOGS),
    Reached(_TRAINER, "Trainer._total_loss_scalar", _LOGS),
    Reached(_TRAINER, "Trainer._globalstep_last_logged", _LOGS),
    Reached("transformers.trainer_callback", "TrainerState.compute_steps", _LOGS),
    Reached("transformers.trainer_callback", "TrainerState.init_training_references", _LOGS),
    Reached("transformers", "TrainingArguments._n_gpu", "with several GPUs in sight TRL refuses the learner"),
    Reached("transformers.integrations.integration_utils", "WandbCallback._wandb", "what W&B has not sent yet is lost"),
    Reached("transformers.integrations.integration_utils", "CometCallback._experiment", "Comet's rest is lost"),
    Reached("transformers.integrations.integration_utils", "SwanLabCallback._swanlab", "SwanLab's rest is lost"),
    Reached(
        "accelerate", "Accelerator.backward", "parts of a step count equally, whatever their size",
        says="self.gradient_accumulation_steps",
    ),
    Reached("accelerate.utils", "fsdp2_prepare_model", "a reference doesn't lie in shards"),
    Reached(_TRAINER, "Trainer.is_fsdp_enabled", "a learner doesn't know whether its model is in shards"),
    Reached("torch.optim.lr_scheduler", "LRScheduler._last_lr", "a changed learning rate is logged a step late"),
)  # fmt: skip


class GivenTokens:
    """To be mixed in before `DPOTrainer`: rows are token ids and bring their reference's log-probabilities. It hides
    `_prepare_dataset`, which would tokenise, and `_precompute_ref_logps`, which would score once a trainer what is
    scored once an update. What it asks for log-probabilities, in `_compute_loss` and `compute_ref_log_probs`, is what
    `asked` gives in a model's place."""

    asked: Callable[[Any], Any] = staticmethod(lambda model: model)

    def _compute_loss(self, model: Any, inputs: Any, return_outputs: bool) -> Any:
        return super()._compute_loss(self.asked(model), inputs, return_outputs)  # type: ignore[misc]

    def compute_ref_log_probs(self, model: Any, inputs: Any) -> Any:
        return super().compute_ref_log_probs(self.asked(model), inputs)  # type: ignore[misc]

    def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        return dataset

    def _precompute_ref_logps(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        return dataset


class NoReference(torch.nn.Module):
    """Stands where a `DPOTrainer` wants the reference model, which its caller has. Without any, it would switch the
    policy's adapters off and on by itself, and load a copy of the policy where that is to lie in shards, although rows
    bring the reference's log-probabilities (`precompute_ref_log_probs`)."""

    def __init__(self, config: Any) -> None:
        """`config` is the policy's: `add_fused_lm_head` looks at that of every model."""
        super().__init__()
        self.config = config


class GivenCompletions:
    """To be mixed in before `OnlineDPOTrainer`, whose `training_step` samples, judges, scores and updates: in the place
    of its `_generate` and `_forward`, which it offers no other way around, these three are asked."""

    ref_model: Any
    asked: Callable[[Any], Any] = staticmethod(lambda model: model)
    """What is asked for log-probabilities in a model's place."""

    def sampled(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Prompt ids and mask, completion ids and mask; each [2 rows, longest]."""
        raise NotImplementedError

    def logps(
        self,
        model: torch.nn.Module,
        prompt_ids: torch.Tensor,
        prompt_mask: torch.Tensor,
        completion_ids: torch.Tensor,
        completion_mask: torch.Tensor,
    ) -> torch.Tensor:
        """log p of each completion token under the model, [2 rows, longest completion]."""
        raise NotImplementedError

    def reference_logps(self) -> torch.Tensor:
        """log p of each completion token under the reference, [2 rows, longest completion]."""
        raise NotImplementedError

    def _generate(self, model: Any, prompts: list[str], images: Any = None) -> tuple[Any, ...]:
        return *self.sampled(), None

    def _forward(
        self,
        model: Any,
        prompt_ids: Any,
        prompt_mask: Any,
        completion_ids: Any,
        completion_mask: Any,
        images: Any = None,
    ) -> torch.Tensor:
        if model is self.ref_model:
            return self.reference_logps()
        return self.logps(model, prompt_ids, prompt_mask, completion_ids, completion_mask)


def online_dpo() -> tuple[type[Any], type[Any]]:
    """`OnlineDPOConfig` and `OnlineDPOTrainer`, without a word about experiments, and without vLLM: TRL's modules ask
    `is_vllm_available` when they are imported, and import it then."""
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    with _without_vllm():
        from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer
    return OnlineDPOConfig, OnlineDPOTrainer


def load() -> None:
    """Imports TRL's trainers as the learners do, for `rlaif.reached`: the first import says whether vLLM joins."""
    online_dpo()


@contextlib.contextmanager
def _without_vllm() -> Iterator[None]:
    as_it_was = import_utils.is_vllm_available

    def not_here(min_version: str | None = None) -> bool:
        return False

    import_utils.is_vllm_available = not_here
    try:
        yield
    finally:
        import_utils.is_vllm_available = as_it_was


def time_sampling(trainer: Any, told: Callable[[float, int], None]) -> None:
    """Tells how long each sampling of an `OnlineDPOTrainer` took, in seconds, and how many tokens it gave: around its
    `_generate`, which is inside of its step."""
    generate = trainer._generate

    def timed(*args: Any, **kwargs: Any) -> Any:
        started = time.perf_counter()
        out = generate(*args, **kwargs)
        told(time.perf_counter() - started, int(out[3].sum()))
        return out

    trainer._generate = timed


def on_one_gpu(args: Any) -> None:
    """Lets a trainer take one GPU in a process that sees several: over more (`TrainingArguments._n_gpu`) it would
    spread a model, and TRL refuses to."""
    if args.n_gpu > 1:
        args._n_gpu = 1


def no_reference_model(trainer: Any) -> None:
    """Lets a `DPOTrainer` leave to its caller which model is the reference: without any `ref_model`, it would switch
    the policy's adapters off and on by itself."""
    trainer.ref_model = torch.nn.Identity()


def reference_logps(trainer: Any, model: Any, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """log p of a batch's chosen and rejected completions under a model, [rows] each, as a `DPOTrainer` computes it
    (`compute_ref_log_probs`)."""
    chosen, rejected = trainer.compute_ref_log_probs(model, batch)
    return chosen, rejected


def on_its_device(trainer: Any, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Rows as the trainer's collator makes a batch of them, where it computes (`_prepare_inputs`)."""
    batch: dict[str, torch.Tensor] = trainer._prepare_inputs(trainer.data_collator(rows))
    return batch


def needs_squared_probabilities(trainer: Any) -> bool:
    """Whether a `DPOTrainer` weights its pairs (WPO, `use_weighting`), for which it asks the model more."""
    return bool(trainer.use_weighting)


def metric(trainer: Any, name: str) -> list[float]:
    """The values of one of TRL's metrics since the last log, one a `training_step`: each trainer collects them under a
    name of its own."""
    collected = trainer.stats if hasattr(trainer, "stats") else trainer._metrics["train"]
    values: list[float] = collected[name]
    return values


def start_counting(trainer: Any, horizon: int, epochs: int) -> None:
    """Puts state and callbacks where `Trainer.train()` puts them between its schedule and its first step. `horizon` is
    the optimizer steps that the schedule knows."""
    trainer.state.compute_steps(trainer.args, horizon)
    trainer.state.init_training_references(trainer, horizon, epochs, None)
    trainer.current_gradient_accumulation_steps = 1
    trainer._tr_loss = torch.tensor(0.0)
    trainer._total_loss_scalar = 0.0
    trainer._globalstep_last_logged = 0
    for name in ("model", "optimizer", "lr_scheduler"):
        setattr(trainer.callback_handler, name, getattr(trainer, name))


def go_on_after(trainer: Any, step: int) -> None:
    """Sets the count of optimizer steps, and of those that were logged: a loss is logged as a mean since then."""
    trainer.state.global_step = trainer._globalstep_last_logged = step


def tell(trainer: Any, event: str, *more: Any) -> None:
    """Tells a trainer's callbacks of an event, by the name of its method in `TrainerCallback`; they may stop training
    (`trainer.control`)."""
    handler = trainer.callback_handler
    trainer.control = getattr(handler, event)(trainer.args, trainer.state, trainer.control, *more)


def divide_losses_by(trainer: Any, parts: float) -> None:
    """Lets accelerate divide a loss by this before it goes backward, as it does for steps that are made of equal parts;
    a share of a step may be any."""
    trainer.accelerator.gradient_accumulation_steps = parts


def gather_by(trainer: Any, gather: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Lets a trainer's metrics be made of what `gather` gives for each process' values [rows]. accelerate's own wants
    as many rows of each, and counts what fills up."""
    trainer.accelerator.gather = trainer.accelerator.gather_for_metrics = gather


def is_sharded(trainer: Any) -> bool:
    """Whether each process holds a part of the trainer's model (FSDP)."""
    return bool(trainer.is_fsdp_enabled)


def in_shards(trainer: Any, model: Any) -> Any:
    """A model that isn't trained, of which each process holds a part from here on."""
    return fsdp2_prepare_model(trainer.accelerator, model)


def check_as_launched(trainer: Any, precision: str) -> None:
    """Whether a trainer runs as accelerate's variables (`learner.accelerate`) say.

    Raises:
        UserError: it doesn't.
    """
    said = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if said not in ("no", precision):
        raise UserError(
            f"learner.accelerate: mixed_precision: {said}, and this learner computes in {precision}; set it to `no` "
            "there, and learner.precision in the job"
        )
    wants_fsdp = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    if wants_fsdp and not is_sharded(trainer):
        raise UserError(
            "learner.accelerate: accelerate has FSDP for GPUs alone; on a CPU take distributed_type: MULTI_CPU"
        )
    if wants_fsdp and precision != "fp32":
        raise UserError(
            f"learner.precision: {precision} with FSDP: its weights can't be rounded as the export rounds them; set "
            "learner.precision: fp32, or take distributed_type: MULTI_GPU"
        )


def log_step(trainer: Any, loss: float, grad_norm: float, learning_rate: float, started: float) -> None:
    """TRL's own logging of a step that was taken: what a TRL user's trackers and callbacks expect to see, under the
    names they know. `started` is the time of `time.perf_counter`."""
    trainer._tr_loss += loss
    epoch = trainer.state.epoch
    trainer._maybe_log_save_evaluate(
        trainer._tr_loss, grad_norm, trainer.model, None, epoch, None, started, learning_rate=learning_rate
    )


def set_learning_rate(trainer: Any, wanted: float) -> None:
    """Lets optimizer and schedule mean another rate from here on: a schedule keeps the rates that it began with
    (`base_lrs`) and the last that it gave (`_last_lr`)."""
    optimizer, scheduler = trainer.optimizer, trainer.lr_scheduler
    for group, before in zip(optimizer.param_groups, list(scheduler.base_lrs), strict=True):
        group["lr"] *= wanted / before
        group["initial_lr"] = wanted
    scheduler.base_lrs = [wanted] * len(optimizer.param_groups)
    scheduler._last_lr = [group["lr"] for group in optimizer.param_groups]


TRACKER_ENDS = (("_wandb", "finish"), ("_experiment", "end"), ("_swanlab", "finish"))
"""W&B, Comet and SwanLab upload the rest at the interpreter's exit, which a worker skips: attribute of the callback,
and what ends it."""


def tracker_classes(names: list[str]) -> list[Any]:
    """transformers' callback for each tracker.

    Raises:
        ValueError: transformers knows none of that name.
    """
    from transformers.integrations import get_reporting_integration_callbacks

    return list(get_reporting_integration_callbacks(names))


def attach(trainer: Any, callbacks: Sequence[Any], tokenizer: Any) -> None:
    """What a trainer does with callbacks when it is built. Not by its `add_callback`: that one warns of two of a
    class."""
    handler = trainer.callback_handler
    for callback in callbacks:
        handler.callbacks.append(callback)
        callback.on_init_end(
            trainer.args, trainer.state, trainer.control, model=handler.model, processing_class=tokenizer
        )


def log_at(trainer: Any, step: int, values: Mapping[str, Any]) -> None:
    """Gives callbacks values as the trainer's own log does, at a step of ours: this process may not have loaded the
    learner's state yet."""
    then = copy.copy(trainer.state)
    then.global_step = step
    trainer.control = trainer.callback_handler.on_log(trainer.args, then, trainer.control, dict(values))
