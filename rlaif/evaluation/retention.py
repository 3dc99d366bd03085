"""What of the base policy's abilities a policy still has, in numbers. Pure, no torch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from rlaif.intervals import ratio_interval, share, wilson
from rlaif.records import ProbeCounts, ProbeResult, Retention, TextScore, UnderText


def retention(
    base: Sequence[ProbeResult],
    now: Sequence[ProbeResult],
    base_texts: Sequence[TextScore],
    texts: Sequence[TextScore],
    earlier: Mapping[str, UnderText] | None = None,
) -> Retention:
    """A policy's probes and texts beside the base policy's.

    What the base policy failed tells nothing about forgetting, so the share is of what it passed. It errs downwards: of
    probes that a policy passes by luck, the base policy's lucky ones were picked. `gained` shows how much luck there
    is.

    Args:
        base, now: results on the same probes.
        base_texts, texts: scores of the same texts.
        earlier: by hash, what held-out answers won under texts that were in force before.
    """
    passed = {r.probe_id for r in base if r.passed}
    kinds = dict.fromkeys(r.kind for r in now)
    probes = _counts(now, passed)
    was, surprise = _surprise(base_texts), _surprise(texts)
    return Retention(
        probes=probes,
        kept_share=share(probes.kept, probes.base_passed),
        kept_interval=wilson(probes.kept, probes.base_passed) if probes.base_passed else None,
        by_kind={kind: _counts([r for r in now if r.kind == kind], passed) for kind in kinds},
        perplexity=None if surprise is None else math.exp(surprise),
        base_perplexity=None if was is None else math.exp(was),
        perplexity_ratio=None if surprise is None or was is None else math.exp(surprise - was),
        perplexity_ratio_interval=_ratio_interval(base_texts, texts),
        earlier=dict(earlier or {}),
    )


def _counts(results: Iterable[ProbeResult], base_passed: set[str]) -> ProbeCounts:
    mine = list(results)
    return ProbeCounts(
        probes=len(mine),
        base_passed=sum(r.probe_id in base_passed for r in mine),
        kept=sum(r.passed and r.probe_id in base_passed for r in mine),
        gained=sum(r.passed and r.probe_id not in base_passed for r in mine),
    )


def _surprise(texts: Sequence[TextScore]) -> float | None:
    """Mean -log p a token, nats; None without one."""
    tokens = sum(t.tokens for t in texts)
    return -math.fsum(t.logprob for t in texts) / tokens if tokens else None


def _ratio_interval(base: Sequence[TextScore], now: Sequence[TextScore]) -> tuple[float, float] | None:
    if len(now) < 2:
        return None
    was = {t.text_id: t.logprob for t in base}
    low, high = ratio_interval([was[t.text_id] - t.logprob for t in now], [t.tokens for t in now])
    return math.exp(low), math.exp(high)
