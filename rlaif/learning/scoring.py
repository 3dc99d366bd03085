"""Log-probabilities of completion tokens, at no more cost than they need.

TRL 1.16 asks the model for per-token log-probabilities (`model(..., labels=..., fused_lm_head=True)`). Its own
implementation is made for CUDA: elsewhere it projects *every* position to the vocabulary, prompt and padding
included, projects again in the backward pass, and multiplies in fp32. On a 2-core CPU that is more than half of an
update. The replacement below scores the completion positions alone, once, in the autocast's precision.
"""

from __future__ import annotations

import types
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from rlaif.learning.trl_compat import FusedCausalLMOutput


def score_completions_only(model: PreTrainedModel, metrics: bool = True, sum_sq_probs: bool = False) -> None:
    """Teaches `model` to answer `fused_lm_head=True` with a `FusedCausalLMOutput` over labelled positions.

    The model's own forward still does the work (logit scaling, soft-capping, routers), so any causal language model
    fits; without `fused_lm_head` it is unchanged. Call it once, before accelerate wraps the model.

    Args:
        model: a causal language model.
        metrics: also give what TRL logs beside the loss (entropy, mean logit, whether the token is the likeliest).
        sum_sq_probs: with the metrics, what TRL's `use_weighting` (WPO) needs.
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
        tokens = targets[scored]
        log_p, log_z = _TokenLogProbs.apply(output.logits, tokens)

        def spread(values: torch.Tensor) -> torch.Tensor:
            return values.new_zeros(scored.shape).masked_scatter(scored, values)

        extra = _statistics(output.logits.detach(), tokens, log_z, sum_sq_probs) if metrics else {}
        return FusedCausalLMOutput(
            log_probs=spread(log_p),
            label_mask=scored,
            aux_loss=getattr(output, "aux_loss", None),
            **{name: spread(values) for name, values in extra.items()},
        )

    model.forward = types.MethodType(forward, model)


def plainly(model: PreTrainedModel, root: nn.Module | None = None, **inputs: Any) -> Any:
    """A model's own forward pass: outside of autocast and of the scoring above, which both stand in the instance's
    `forward`, but with its hooks, which bring together a model that lies in shards. `root` is called in its place, if
    it is what holds the model."""
    ours = vars(model).pop("forward", None)
    try:
        return (root or model)(**inputs)
    finally:
        if ours is not None:
            model.forward = ours


_SLICE = 4 * 2**20
"""Logits looked at together (16 MiB in fp32): copies of all of them cost more in fresh memory than the arithmetic."""


def _slices(logits: torch.Tensor) -> Iterator[slice]:
    rows = max(1, _SLICE // logits.size(1))
    return (slice(start, start + rows) for start in range(0, logits.size(0), rows))


class _TokenLogProbs(torch.autograd.Function):
    """log p of one token a row, and the log-normaliser, in fp32: logits [n, vocabulary], tokens [n] -> [n], [n]."""

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        log_z = torch.cat([logits[rows].float().logsumexp(-1) for rows in _slices(logits)] or [logits.new_zeros(0)])
        ctx.save_for_backward(logits, tokens, log_z)
        ctx.mark_non_differentiable(log_z)
        return logits.gather(-1, tokens.unsqueeze(-1)).squeeze(-1).float() - log_z, log_z

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor, _: Any) -> tuple[torch.Tensor, None]:
        logits, tokens, log_z = ctx.saved_tensors
        out = torch.empty_like(logits)
        for rows in _slices(logits):  # d log p(token) / d logit_j = 1[j = token] - p_j
            g = grad[rows].unsqueeze(-1)
            part = logits[rows].float().sub_(log_z[rows].unsqueeze(-1)).exp_().mul_(-g)
            out[rows] = part.scatter_add_(-1, tokens[rows].unsqueeze(-1), g)
        return out, None


@torch.no_grad()
def _statistics(
    logits: torch.Tensor, tokens: torch.Tensor, log_z: torch.Tensor, sum_sq_probs: bool
) -> dict[str, torch.Tensor]:
    """TRL's metrics of each scored token; logits [n, vocabulary], the rest [n]."""
    found: dict[str, list[torch.Tensor]] = defaultdict(list)
    for rows in _slices(logits):
        part, z = logits[rows].float(), log_z[rows]
        p = (part - z.unsqueeze(-1)).exp_()
        found["entropy"].append(z - torch.linalg.vecdot(p, part))
        found["mean_logits"].append(part.mean(-1))
        found["is_top1"].append(part.argmax(-1) == tokens[rows])
        if sum_sq_probs:
            found["log_sum_sq_probs"].append(torch.linalg.vecdot(p, p).log())
    return {name: torch.cat(values) for name, values in found.items()}
