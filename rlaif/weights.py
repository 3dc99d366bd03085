"""Is what samples what is trained? Fixed texts, scored by the sampler and by the learner. Pure.

In: log-probabilities of the same tokens from both. Out: a `WeightsGap`. The two share no code but the model's own
definition: an engine with its packed weights, caches and kernels on one side, the fp32 masters and a plain forward pass
on the other. What lies between them is everything that can go wrong on the way: merging, rounding, writing, names,
reloading.
"""

from __future__ import annotations

import math

from rlaif.records import WeightsGap

WRONG = 0.5
"""`typical`, in nats: far more than any rounding, far less than another model's weights."""


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
