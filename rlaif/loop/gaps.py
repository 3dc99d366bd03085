"""Is what samples what is trained? Fixed texts, scored by the sampler and by the learner; sampled answers, as they were
decoded and as the learner scores them. Pure.

In: log-probabilities of the same tokens from both. Out: a `WeightsGap` or a `DecodingGap`. The two share no code but
the model's own definition: an engine with its packed weights, caches and kernels on one side, the fp32 masters and a
plain forward pass on the other. What lies between them is everything that can go wrong on the way: merging, rounding,
writing, names, reloading.
"""

from __future__ import annotations

import math
import random

from rlaif.records import Completion, DecodingGap, WeightsGap

WRONG = 0.5
"""`typical`, in nats: far more than any rounding, far less than another model's weights."""

AGAIN = 8
"""Answers of an iteration that are scored again: a second's work."""


def weights_gap(
    sampler: list[tuple[float, ...]], learner: list[tuple[float, ...]], computes_in: str, exported: str
) -> WeightsGap:
    """How far two scorings of the same tokens are apart.

    Args:
        sampler: log p of each token, in nats, a row a text.
        learner: the same texts by the learner.
        computes_in: engine and precision of the sampler.
        exported: precision of the weights that it was given.

    Raises:
        ValueError: the rows are not of the same tokens, or there are none.
    """
    gaps = [a - b for x, y in zip(sampler, learner, strict=True) for a, b in zip(x, y, strict=True)]
    if not gaps:
        raise ValueError("no tokens to compare")
    # No number on either side is infinitely far; it must not vanish in a mean, nor cancel against another.
    known = [gap if math.isfinite(gap) else math.inf for gap in gaps]
    return WeightsGap(
        tokens=len(known),
        mean=abs(math.fsum(known)) / len(known),
        typical=math.fsum(map(abs, known)) / len(known),
        worst=max(map(abs, known)),
        sampler=computes_in,
        exported=exported,
    )


def to_score_again(completions: list[Completion], seed: int) -> list[Completion]:
    """`AGAIN` of the answers whose log p was recorded: the longest, where decoding has come furthest, and as many drawn
    from the others. They follow from answers and seed alone, not from the order in which they finished."""
    recorded = sorted(
        (c for c in completions if c.logprob is not None and c.token_ids), key=lambda c: (-len(c.token_ids), c.id)
    )
    long, others = recorded[: AGAIN // 2], recorded[AGAIN // 2 :]
    return long + random.Random(seed).sample(others, min(AGAIN - AGAIN // 2, len(others)))


def decoding_gap(completions: list[Completion], scored: list[tuple[float, ...]]) -> DecodingGap:
    """How far answers as they were decoded are from how the learner scores them.

    Args:
        completions: with the raw log p that was recorded.
        scored: log p of each token by the learner, in nats, a row an answer.

    Raises:
        ValueError: there are none, one has no recorded log p, or the rows are not of the same tokens.
    """
    if not completions:
        raise ValueError("no answers to compare")
    differences, lengths = [], []
    for c, logps in zip(completions, scored, strict=True):
        if c.logprob is None or len(logps) != len(c.token_ids):
            raise ValueError(f"{c.id}: no recorded log p, or not of {len(logps)} tokens")
        off = c.logprob - math.fsum(logps)
        differences.append(off if math.isfinite(off) else math.inf)  # as in `weights_gap`
        lengths.append(len(logps))
    n, tokens = len(lengths), sum(lengths)
    mean = math.fsum(differences) / tokens
    error = 0.0
    if n > 1 and math.isfinite(mean):
        residues = (d - mean * t for d, t in zip(differences, lengths, strict=True))
        error = math.sqrt(n / (n - 1) * math.fsum(r * r for r in residues)) / tokens
    return DecodingGap(
        answers=n,
        tokens=tokens,
        mean=abs(mean),
        error=error,
        typical=math.fsum(map(abs, differences)) / tokens,
        worst=max(abs(d) / t for d, t in zip(differences, lengths, strict=True)),
    )
