"""A thin adapter on TRL's experimental `OnlineDPOTrainer` (arXiv:2402.04792), for users who compare with it.

The trainer samples, judges, scores and updates in one method. The loop has already sampled and judged, so here
sampling hands out the completions, judging repeats the verdict (the first of each two was chosen), and the rest is
TRL's. The default, `dpo`, computes the same loss with more choice of losses; the contract tests hold them together.
"""

from __future__ import annotations

import os
from typing import Any
from unittest import mock

import torch
from datasets import Dataset
from torch import nn
from transformers import PreTrainedModel
from trl.trainer.base_config import _BaseConfig

from rlaif.errors import UserError
from rlaif.learning.base import TrlLearner, _Row, pad

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")  # the warning is in this file's first line
# TRL imports vLLM here when it is installed: 15 s, and threads that the trainer doesn't want. Sampling is not its job.
with mock.patch("trl.import_utils.is_vllm_available", return_value=False):
    from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer

_Tokens = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]

_NO_EFFECT = {
    "missing_eos_penalty": "it would flip verdicts after the judge",
    "reward_weights": "the verdict is the only reward",
    "reward_model_path": "the verdict is the only reward",
}


class _GivenPairsTrainer(OnlineDPOTrainer):
    """`OnlineDPOTrainer` on completions and verdicts that exist: chosen in the first half, rejected in the second."""

    rows: list[_Row]

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        self.rows = inputs["rows"]
        return super().training_step(model, {"prompt": [row["prompt"] for row in self.rows]}, num_items_in_batch)

    def _generate(self, model: nn.Module, prompts: list[str], images: Any = None) -> tuple[Any, ...]:
        return *self.tokens(self.rows), None

    def tokens(self, rows: list[_Row]) -> _Tokens:
        """Prompt ids and mask [2 rows, longest prompt], padded left; completions likewise, padded right."""
        prompts = [row["prompt_ids"] for row in rows] * 2
        completions = [row["chosen_ids"] for row in rows] + [row["rejected_ids"] for row in rows]
        fill, device = self._tokenizer.pad_token_id, self.args.device
        return (
            pad(prompts, fill, "left").to(device),
            pad([[1] * len(p) for p in prompts], 0, "left").to(device),
            pad(completions, fill, "right").to(device),
            pad([[1] * len(c) for c in completions], 0, "right").to(device),
        )

    def _forward(
        self,
        model: nn.Module,
        prompt_ids: torch.Tensor,
        prompt_mask: torch.Tensor,
        completion_ids: torch.Tensor,
        completion_mask: torch.Tensor,
        vision_inputs: Any = None,
    ) -> torch.Tensor:
        """log p of each completion token, [2 rows, longest completion]; TRL's, but the vocabulary is projected for
        completions only, positions don't count padding, and the reference is not asked again."""
        if model is self.ref_model:
            logps = [row["ref_chosen"] for row in self.rows] + [row["ref_rejected"] for row in self.rows]
            return pad(logps, 0.0, "right").to(self.args.device)
        mask = torch.cat((prompt_mask, completion_mask), dim=1)
        logits = model(
            input_ids=torch.cat((prompt_ids, completion_ids), dim=1),
            attention_mask=mask,
            position_ids=(mask.cumsum(1) - 1).clamp(min=0),
            logits_to_keep=completion_ids.size(1) + 1,
            use_cache=False,
        ).logits[:, :-1]  # [2 rows, longest completion, vocabulary]
        return logits.log_softmax(-1).gather(-1, completion_ids.unsqueeze(-1)).squeeze(-1)


def _verdict(prompts: list[str], **_: Any) -> list[float]:
    pairs = len(prompts) // 2
    return [1.0] * pairs + [0.0] * pairs


class OnlineDpoLearner(TrlLearner):
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

    def _make_trainer(self, policy: PreTrainedModel, args: _BaseConfig, peft_config: Any) -> OnlineDPOTrainer:
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

    def _score_reference(self, model: nn.Module, rows: list[_Row]) -> None:
        prompt_ids, prompt_mask, completion_ids, completion_mask = self.trainer.tokens(rows)
        logps = self.trainer._forward(model, prompt_ids, prompt_mask, completion_ids, completion_mask).tolist()
        for row, c, r in zip(rows, logps[: len(rows)], logps[len(rows) :], strict=True):
            row["ref_chosen"], row["ref_rejected"] = c[: len(row["chosen_ids"])], r[: len(row["rejected_ids"])]

    def _batch(self, rows: list[_Row]) -> dict[str, Any]:
        return {"rows": rows}

    def _metric(self, name: str) -> list[float]:
        return self.trainer.stats[name]
