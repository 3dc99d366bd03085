"""The default learner: TRL's `DPOTrainer` on the token ids that were sampled.

Direct Preference Optimization (arXiv:2305.18290), online because the pairs are this iteration's own samples
(arXiv:2402.04792). TRL tokenises text and closes every completion with an end token; here it is given token ids, so
a completion that the length limit cut off has none.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from transformers import PreTrainedModel
from trl import DPOConfig, DPOTrainer

from rlaif.errors import UserError
from rlaif.learning.base import Row
from rlaif.learning.pairwise import PairwiseLearner
from rlaif.learning.scoring import score_completions_only
from rlaif.learning.trl_compat import (
    GivenTokens,
    NoReference,
    TrlConfig,
    add_fused_lm_head,
    needs_squared_probabilities,
    on_its_device,
    reference_logps,
)

COMPARED, APART = 4, 1e-4
"""Rows whose reference is scored here although others have done so, at least, and how far both may be apart, in nats a
token."""
LOSSES = (
    *("sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired"),
    *("apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm"),
)
"""TRL 1.16's; TRL itself checks the name only when the first step is on its way."""


class _TokenDPOTrainer(GivenTokens, DPOTrainer):
    """`DPOTrainer` that is given token ids, and reference log-probabilities with each batch."""


class DpoLearner(PairwiseLearner):
    """`learner.kind: dpo`."""

    config_class = DPOConfig
    _known: Mapping[str, float] = MappingProxyType({})
    """The reference's log p by completion, as others computed it."""
    _compared = 0
    """Rows of this update over which it was compared with our own."""

    def _defaults(self) -> dict[str, Any]:
        named = self.settings.loss_type
        for loss in [named] if isinstance(named, str) else named or [""]:
            if loss not in LOSSES:
                raise UserError(f"learner.loss_type: TRL has no `{loss}`; known: {', '.join(LOSSES)}")
        # A sequence is as long as it was sampled: truncation is the sampler's.
        # Nor does a mixture's balancing loss join the preference loss unasked; without experts it would be no number.
        return {"max_length": None, "precompute_ref_log_probs": True, "router_aux_loss_coef": 0.0}

    def _make_trainer(self, policy: PreTrainedModel, args: TrlConfig, peft_config: Any) -> DPOTrainer:
        # The trainer insists on a dataset; steps are fed one by one.
        placeholder = Dataset.from_list([{"prompt_ids": [0], "chosen_ids": [0], "rejected_ids": [0]}])
        return _TokenDPOTrainer(
            model=policy,
            ref_model=NoReference(policy.config),  # `_reference` says which it is
            args=args,
            train_dataset=placeholder,
            processing_class=self.tokenizer,
            peft_config=peft_config,
        )

    def _adapt(self, model: PreTrainedModel) -> None:
        is_policy = model is self.policy
        if self.trainer.args.device.type == "cpu":
            weighted = is_policy and needs_squared_probabilities(self.trainer)
            score_completions_only(model, metrics=is_policy, sum_sq_probs=weighted)
        elif not is_policy:  # the policy has it from TRL
            add_fused_lm_head(model)

    def use_reference(self, logprobs: Mapping[str, float]) -> None:
        """Takes the untrained policy's log p of completions, by id, from who has computed them in fp32: in the next
        update, in place of a pass of its own, if its own over the first rows says the same.

        Not with `ld_alpha` (LD-DPO), under which a reference is no plain sum: what lies beyond the shorter side counts
        less, which rows with sides of equal length don't show."""
        sums = self.trainer.args.ld_alpha is None
        self._known = logprobs if sums and self._precision == "fp32" else {}
        self._compared = 0

    def _score_references(self, steps: list[list[Row]]) -> None:
        super()._score_references(steps)
        self._known = {}

    def _score_part(self, model: nn.Module, part: list[Row]) -> None:
        are_known = all(i in self._known for row in part for i in row["completion_ids"])
        if are_known and self._compared >= COMPARED:
            for row in part:
                row["ref_chosen_logps"], row["ref_rejected_logps"] = (self._known[i] for i in row["completion_ids"])
            return
        super()._score_part(model, part)
        if are_known:
            self._compare(part)

    def _score_reference(self, model: nn.Module, rows: list[Row]) -> None:
        chosen, rejected = reference_logps(self.trainer, model, self._batch(rows))
        for row, c, r in zip(rows, chosen.tolist(), rejected.tolist(), strict=True):
            row["ref_chosen_logps"], row["ref_rejected_logps"] = c, r

    def _compare(self, rows: list[Row]) -> None:
        """Whether rows that were scored here are as others say; else nothing of theirs is taken."""
        self._compared += len(rows)
        sides = [
            (row[f"ref_{side}_logps"], self._known[i], len(row[f"{side}_ids"]))
            for row in rows
            for side, i in zip(("chosen", "rejected"), row["completion_ids"], strict=True)
        ]
        apart = max(abs(ours - theirs) / max(tokens, 1) for ours, theirs, tokens in sides)
        if not apart <= APART:
            self._known = {}
            self.notes.append(
                f"the judge's log-probabilities of the untrained policy are {apart:.2g} nats a token from this "
                "learner's: it computes them itself, which is slower"
            )

    def _batch(self, rows: list[Row]) -> dict[str, torch.Tensor]:
        return on_its_device(self.trainer, rows)
