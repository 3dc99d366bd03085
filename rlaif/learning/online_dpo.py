"""A thin adapter on TRL's experimental `OnlineDPOTrainer` (arXiv:2402.04792), for users who compare with it.

The trainer samples, judges, scores and updates in one method. The loop has already sampled and judged, so here
sampling hands out the completions, judging repeats the verdict (the first of each two was chosen), and the rest is
TRL's. The default, `dpo`, computes the same loss with more choice of losses; the contract tests hold them together.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from transformers import PreTrainedModel

from rlaif.errors import UserError
from rlaif.learning.base import Row, pad
from rlaif.learning.pairwise import PairwiseLearner
from rlaif.learning.trl_compat import FusedCausalLMOutput, GivenCompletions, TrlConfig, online_dpo

# The warning is in this file's first line; and sampling is not the trainer's job.
OnlineDPOConfig, OnlineDPOTrainer = online_dpo()

_Tokens = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]

_NO_EFFECT = {
    "missing_eos_penalty": "it would flip verdicts after the judge",
    "reward_weights": "the verdict is the only reward",
    "reward_model_path": "the verdict is the only reward",
}


class _GivenPairsTrainer(GivenCompletions, OnlineDPOTrainer):  # type: ignore[misc, valid-type]
    """`OnlineDPOTrainer` on completions and verdicts that exist: chosen in the first half, rejected in the second."""

    rows: list[Row]

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        self.rows = inputs["rows"]
        return super().training_step(model, {"prompt": [row["prompt"] for row in self.rows]}, num_items_in_batch)

    def sampled(self) -> _Tokens:
        """What exists, as if it had just been sampled."""
        return self.tokens(self.rows)

    def tokens(self, rows: list[Row]) -> _Tokens:
        """Prompt ids and mask [2 rows, longest prompt], padded left; completions likewise, padded right."""
        prompts = [row["prompt_ids"] for row in rows] * 2
        completions = [row["chosen_ids"] for row in rows] + [row["rejected_ids"] for row in rows]
        fill, device = self.processing_class.pad_token_id, self.args.device
        return (
            pad(prompts, fill, "left").to(device),
            pad([[1] * len(p) for p in prompts], 0, "left").to(device),
            pad(completions, fill, "right").to(device),
            pad([[1] * len(c) for c in completions], 0, "right").to(device),
        )

    def logps(
        self,
        model: nn.Module,
        prompt_ids: torch.Tensor,
        prompt_mask: torch.Tensor,
        completion_ids: torch.Tensor,
        completion_mask: torch.Tensor,
    ) -> torch.Tensor:
        """As TRL's, but the vocabulary is projected for completions only, and positions don't count padding."""
        mask = torch.cat((prompt_mask, completion_mask), dim=1)
        left = (1 - mask).argsort(dim=1, stable=True)  # all padding to the right
        ids = torch.cat((prompt_ids, completion_ids), dim=1).gather(1, left)
        scored = torch.cat((torch.zeros_like(prompt_mask), completion_mask), dim=1).gather(1, left)
        labels = ids.masked_fill(scored == 0, -100)
        width = int(mask.sum(1).max())
        log_probs = self.asked(partial(_log_probs, model))(
            input_ids=ids[:, :width], attention_mask=mask.gather(1, left)[:, :width], labels=labels[:, :width]
        ).log_probs  # [2 rows, width - 1]
        first = prompt_mask.sum(1, keepdim=True) - 1
        places = first + torch.arange(completion_ids.size(1), device=ids.device)
        return log_probs.gather(1, places.clamp(max=width - 2))

    def reference_logps(self) -> torch.Tensor:
        """As they were scored before the update."""
        logps = [row["ref_chosen"] for row in self.rows] + [row["ref_rejected"] for row in self.rows]
        return pad(logps, 0.0, "right").to(self.args.device)


def _log_probs(model: nn.Module, labels: torch.Tensor, **inputs: Any) -> FusedCausalLMOutput:
    """log p of each label, [rows, length - 1]; the vocabulary is projected from the first of them on."""
    targets = labels[:, 1:]
    scored = targets != -100
    length = targets.size(1) - int(scored.any(0).long().argmax())
    logits = model(**inputs, logits_to_keep=length + 1, use_cache=False).logits[:, :-1]  # [rows, length, vocabulary]
    kept = targets[:, -length:].clamp(min=0).unsqueeze(-1)
    found = logits.log_softmax(-1).gather(-1, kept).squeeze(-1)
    return FusedCausalLMOutput(
        log_probs=nn.functional.pad(found, (targets.size(1) - length, 0)).masked_fill(~scored, 0)
    )


def _verdict(prompts: list[str], **_: Any) -> list[float]:
    pairs = len(prompts) // 2
    return [1.0] * pairs + [0.0] * pairs


class OnlineDpoLearner(PairwiseLearner):
    """`learner.kind: online_dpo`."""

    config_class = OnlineDPOConfig

    def _defaults(self) -> dict[str, Any]:
        for name, why in _NO_EFFECT.items():
            if name in self.settings.args:
                raise UserError(f"learner.args.{name}: not with completions that are already judged ({why}); remove it")
        if self.settings.loss_type not in ("sigmoid", "ipo"):
            raise UserError(
                f"learner.loss_type: online_dpo has `sigmoid` and `ipo`, found `{self.settings.loss_type}`; "
                "set learner.kind=dpo for TRL's other losses"
            )
        return {}

    def _make_trainer(self, policy: PreTrainedModel, args: TrlConfig, peft_config: Any) -> _GivenPairsTrainer:
        return _GivenPairsTrainer(
            model=policy,
            # Stands for the log-probabilities that each row brings: without one, TRL would copy the policy.
            ref_model=nn.Identity(),
            reward_funcs=_verdict,
            args=args,
            train_dataset=Dataset.from_list([{"prompt": ""}]),  # the trainer insists; steps are fed one by one
            processing_class=self.tokenizer,
            peft_config=peft_config,
        )

    def _score_reference(self, model: nn.Module, rows: list[Row]) -> None:
        logps = self.trainer.logps(model, *self.trainer.tokens(rows)).tolist()
        for row, c, r in zip(rows, logps[: len(rows)], logps[len(rows) :], strict=True):
            row["ref_chosen"], row["ref_rejected"] = c[: len(row["chosen_ids"])], r[: len(row["rejected_ids"])]

    def _batch(self, rows: list[Row]) -> dict[str, Any]:
        return {"rows": rows}
