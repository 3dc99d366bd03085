"""Log-probabilities of completion tokens, at no more cost than they need.

TRL 1.16 asks the model for per-token log-probabilities (`model(..., labels=..., fused_lm_head=True)`). Its own
implementation is made for CUDA: elsewhere it projects *every* position to the vocabulary, prompt and padding
included, projects again in the backward pass, and multiplies in fp32. On a 2-core CPU that is more than half of an
update. The replacement below scores the completion positions alone, once, in the autocast's precision.
"""

from __future__ import annotations

import types
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from trl.trainer.utils import FusedCausalLMOutput


def score_completions_only(model: PreTrainedModel, metrics: bool = True, sum_sq_probs: bool = False) -> None:
    """Teaches `model` to answer `fused_lm_head=True` with a `FusedCausalLMOutput` over labelled positions.

    The model's own forward still does the work (logit scaling, soft-capping, routers), so any causal language model
    fits; without `fused_lm_head` it is unchanged. Call it once, before accelerate wraps the model.

    Args:
        model: a causal language model.
        metrics: also give what TRL logs beside the loss (entropy, mean logit, whether the token is the likeliest).
        sum_sq_probs: also give what TRL's `use_weighting` (WPO) needs.
    """
    plain_forward = type(model).forward

    def forward(
        self: PreTrainedModel,
        *args: Any,
        fused_lm_head: bool = False,
        labels: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        if not fused_lm_head or labels is None:
            return plain_forward(self, *args, labels=labels, **kwargs)
        targets = labels[:, 1:]  # [batch, length - 1]: position t predicts token t + 1
        scored = targets != -100

        def keep_scored(_module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor]:
            return (inputs[0][:, :-1][scored],)  # [batch, length, hidden] -> [scored tokens, hidden]

        hook = self.get_output_embeddings().register_forward_pre_hook(keep_scored)
        try:
            output = plain_forward(self, *args, **kwargs)
        finally:
            hook.remove()
        logits = output.logits.float()  # [scored tokens, vocabulary]
        log_p = logits.log_softmax(-1)
        tokens = targets[scored]

        def spread(values: torch.Tensor) -> torch.Tensor:
            return values.new_zeros(scored.shape).masked_scatter(scored, values)

        extra: dict[str, torch.Tensor] = {}
        with torch.no_grad():
            if metrics:
                extra["entropy"] = spread(-(log_p.exp() * log_p).sum(-1))
                extra["mean_logits"] = spread(logits.mean(-1))
                extra["is_top1"] = spread(log_p.argmax(-1) == tokens)
            if sum_sq_probs:
                extra["log_sum_sq_probs"] = spread((2 * log_p).logsumexp(-1))
        return FusedCausalLMOutput(
            log_probs=spread(log_p.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)),
            label_mask=scored,
            aux_loss=getattr(output, "aux_loss", None),
            **extra,
        )

    model.forward = types.MethodType(forward, model)
