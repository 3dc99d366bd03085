"""How far an update has moved the policy, while it is on its way: KL from the policy that began it.

In: completions that the update trains on, scored before its first step and again after one. Out: KL in nats a token.

Where completions were sampled by the policy that began the iteration, with r = p now / p then of a token, the mean of
(r - 1) - log r over their tokens estimates KL(then, now). Its expectation is
that of -log r, it is never negative, and it is far less noisy while r is near 1. J. Schulman, Approximating KL
Divergence, 2020 (http://joschu.net/blog/kl-approx.html), `k3`. What it leaves out: completions that were tempered, cut
to a nucleus and chosen to be compared are no plain draws; and the rows were just trained on, where a policy moves most.
Both let it come out larger than KL on fresh answers, which an evaluation measures.

Completions of others (a data set's, another run's) are no draws from that policy: there the same mean is no KL, but a
distance, which one token that became much likelier can carry alone, as r. Replayed completions, and those of a stale
policy (`pipeline.staleness`), were drawn from an earlier one: milder cases of that.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from rlaif.records import TokenSequence

Scores = Callable[[list[TokenSequence]], list[tuple[float, ...]]]
"""log p of each completion token under the weights as they are, nats."""


class Moved:
    """KL from the policy that began an update."""

    def __init__(self, score: Scores) -> None:
        self._score = score
        self._then: dict[TokenSequence, tuple[float, ...]] = {}

    def begin(self, sequences: Sequence[TokenSequence]) -> None:
        """The update begins: these are what it will train on."""
        asked = list(dict.fromkeys(sequences))
        self._then = dict(zip(asked, self._score(asked), strict=True))

    def kl(self, sequences: Sequence[TokenSequence]) -> float:
        """KL over the tokens of some of them, nats a token."""
        terms = [
            term(now - then)
            for sequence, scored in zip(sequences, self._score(list(sequences)), strict=True)
            for now, then in zip(scored, self._then[sequence], strict=True)
        ]
        return math.fsum(terms) / len(terms) if terms else 0.0


def term(log_ratio: float) -> float:
    """(r - 1) - log r of one token, where log r is given; infinite where r is too large for a float."""
    try:
        return math.expm1(log_ratio) - log_ratio
    except OverflowError:
        return math.inf
