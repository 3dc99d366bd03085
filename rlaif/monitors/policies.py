"""Monitors of the policy itself: whether one is trained, sampled and evaluated, and how far it went. Pure."""

from __future__ import annotations

from collections.abc import Iterator

from rlaif.config import DecodingGapMonitor, KlMonitor, WeightsGapMonitor
from rlaif.monitors.history import Finding, History


def weights_gap(settings: WeightsGapMonitor, history: History) -> Iterator[Finding]:
    """Fixed texts, by the policy that samples and by the one that is trained."""
    limit, evaluated = settings.limit, history.evaluated
    for gap, of in (
        (history.now.weights_gap, "sampled"),
        (evaluated.weights_gap if evaluated else None, "evaluated"),
    ):
        if gap is not None and not gap.within(limit):
            message = (
                f"the policy that was {of} is {gap.mean:.3f} nats a token from the one that is trained "
                f"({gap.sampler}; typically {gap.typical:.3f}, at worst {gap.worst:.2f}), over "
                f"monitors.weights_gap.limit={limit:g}"
            )
            yield Finding(message, gap.mean, limit)


def decoding_gap(settings: DecodingGapMonitor, history: History) -> Iterator[Finding]:
    """Sampled answers, as they were decoded and as the policy that is trained scores them."""
    gap, limit = history.now.decoding_gap, settings.limit
    if gap is not None and not gap.within(limit):
        message = (
            f"answers as they were sampled are {gap.mean:.3f} nats a token from what the policy that is trained "
            f"says of them ({gap.answers} answers; typically {gap.typical:.3f}, at worst "
            f"{gap.worst:.2f}), over monitors.decoding_gap.limit={limit:g}"
        )
        yield Finding(message, gap.mean, limit)


def kl(settings: KlMonitor, history: History) -> Iterator[Finding]:
    """How far it is from the base policy."""
    measured = history.evaluated.kl_per_token if history.evaluated else None
    if measured is not None and measured > settings.limit:
        message = f"KL from the base policy is {measured:.2f} nats a token, over {settings.limit:g}"
        yield Finding(message, measured, settings.limit)
