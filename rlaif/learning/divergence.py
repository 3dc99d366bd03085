"""How far the policy went from the base policy: KL over the whole vocabulary at every place of sampled completions.

In: completions that the policy sampled at temperature 1 and top-p 1, and both models. Out: a `Divergence` for each.

KL(policy, base) is an expectation over the policy's own answers. Samples that are tempered or cut to a nucleus are not
its own: the mean of their log-ratios has the wrong sign for a policy that drifts towards noise. On its own answers
that mean is right but noisy; here each place's log-ratio is replaced by its expectation over the next token, which
both models' logits give. It has the same mean, no larger a variance (a tenth to a twentieth of the deviation in
`python -m benchmarks.kl`), and is never negative. Amini, Vieira and Cotterell, Better Estimation of the KL Divergence
Between Language Models, arXiv 2504.10637.
"""

from __future__ import annotations

import math
import types
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel

from rlaif.errors import RlaifError
from rlaif.learning.peers import ALONE, Peers
from rlaif.learning.scoring import plainly
from rlaif.records import Completion, Divergence

PLACES = 1024
"""Places whose logits are held at once, of both models: 1.2 GB with a vocabulary of 150,000."""
_SLICE = 4 * 2**20
"""Logits looked at together (16 MiB in fp32)."""


class Asked(NamedTuple):
    """A model as it is asked for logits: by its own plain forward pass, outside of autocast.

    Autocast rounds fp32 masters to bf16, to the nearest, at every call: what moved by less than half a step isn't seen,
    and KL came out at a fortieth to a fifth of what it was."""

    model: PreTrainedModel
    within: Callable[[], AbstractContextManager[Any]] = nullcontext
    """What it has to be called in (an adapter turned off, layers in fp32)."""
    root: nn.Module | None = None
    """What has to be called in its place (`scoring.plainly`)."""


@contextmanager
def layers_in_fp32(model: nn.Module) -> Iterator[None]:
    """Lets linear layers that hold bf16 compute in fp32, one layer's copy at a time."""
    halves = [m for m in model.modules() if isinstance(m, nn.Linear) and m.weight.dtype == torch.bfloat16]

    def forward(layer: nn.Linear, x: torch.Tensor) -> torch.Tensor:
        bias = None if layer.bias is None else layer.bias.float()
        return nn.functional.linear(x.float(), layer.weight.float(), bias)

    for layer in halves:
        layer.forward = types.MethodType(forward, layer)
    try:
        yield
    finally:
        for layer in halves:
            del layer.forward


def divergences(
    policy: Asked,
    base: Asked,
    completions: list[Completion],
    batch_size: int,
    device: torch.device,
    peers: Peers = ALONE,
) -> Iterator[list[Divergence]]:
    """Divergences, a batch at a time, completions of similar length together.

    Args:
        policy: the one that sampled.
        base: what it is compared with.
        completions: without an empty one: a sampled completion has at least its end token.
        batch_size: completions that go through a model at once, at most.
        device: where both models are.
        peers: who shares the batches; each yields what all found.

    Raises:
        RlaifError: a divergence is not finite.
    """
    owed = list(batches(completions, batch_size))
    for at in range(0, len(owed), peers.count):
        found = peers.shared(owed[at : at + peers.count], partial(_of_a_batch, policy, base, device))
        if not all(math.isfinite(d.kl) for chunk in found for d in chunk):
            raise RlaifError(
                "KL from the base policy is not finite: the policy's probabilities are no numbers any more"
            )
        yield [d for chunk in found for d in chunk]


def _of_a_batch(policy: Asked, base: Asked, device: torch.device, batch: list[Completion]) -> list[Divergence]:
    width = max(len(c.prompt_token_ids) + len(c.token_ids) for c in batch)
    ids = torch.zeros(len(batch), width, dtype=torch.long)
    mask, places = torch.zeros_like(ids), torch.zeros(len(batch), width, dtype=torch.bool)
    for row, c in enumerate(batch):
        prompt, end = len(c.prompt_token_ids), len(c.prompt_token_ids) + len(c.token_ids)
        ids[row, :end] = torch.tensor([*c.prompt_token_ids, *c.token_ids])
        mask[row, :end] = 1
        places[row, prompt - 1 : end - 1] = True  # position t predicts token t + 1
    ids, mask, places = ids.to(device), mask.to(device), places.to(device)
    with torch.no_grad():
        nats = (
            kl(_logits(policy, ids, mask, places), _logits(base, ids, mask, places))
            .double()
            .cpu()
            .split([len(c.token_ids) for c in batch])
        )
    return [
        Divergence(completion_id=c.id, prompt_id=c.prompt_id, tokens=len(c.token_ids), kl=float(n.sum()))
        for c, n in zip(batch, nats, strict=True)
    ]


def batches(completions: list[Completion], most: int) -> Iterator[list[Completion]]:
    """By length, so many at a time, and no more tokens than whose logits fit (one completion in any case)."""
    batch: list[Completion] = []
    for c in sorted(completions, key=lambda c: (len(c.prompt_token_ids) + len(c.token_ids), c.id)):
        if batch and (len(batch) == most or sum(len(b.token_ids) for b in (*batch, c)) > PLACES):
            yield batch
            batch = []
        batch.append(c)
    if batch:
        yield batch


def kl(policy: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
    """KL(policy, base) of each row of logits [n, vocabulary], in nats, fp32 [n]."""
    rows = max(1, _SLICE // policy.size(1))
    out = []
    for at in range(0, policy.size(0), rows):
        p, q = (logits[at : at + rows].float().log_softmax(-1) for logits in (policy, base))
        terms = p.exp() * (p - q)
        # A token that the policy never says adds nothing, also where the base never says it either.
        out.append(terms.masked_fill_(p == -torch.inf, 0.0).sum(-1).clamp_(min=0.0))
    return torch.cat(out)


def _logits(asked: Asked, ids: torch.Tensor, mask: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """The model's own logits [n, vocabulary] at the n places that `places` [batch, length] marks."""

    def keep(_module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor]:
        return (inputs[0][places],)  # [batch, length, hidden] -> [n, hidden]

    model = asked.model
    hook = model.get_output_embeddings().register_forward_pre_hook(keep)
    try:
        with asked.within():
            out = plainly(model, asked.root, input_ids=ids, attention_mask=mask, use_cache=False)
            logits: torch.Tensor = out.logits
    finally:
        hook.remove()
    return logits
