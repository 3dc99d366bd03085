"""Counts and rates of which the outcome can be reckoned by hand."""

from __future__ import annotations

from typing import Any

from rlaif.simulation import Setup, Work


def work(**changes: Any) -> Work:
    """Six iterations of eight prompts, two answers and one ballot each, and no evaluation."""
    counts: dict[str, Any] = {
        "iterations": 6,
        "prompts": 8,
        "answers": 2,
        "scores": 0,
        "ballots": 8,
        "pairs": 8,
        "epochs": 1,
        "held_out": 0,
        "held_out_ballots": 0,
        "evaluated": (),
        "max_tokens": 100,
        **changes,
    }
    return Work(**counts)


def setup(
    *, sampler: Any = (), judge: Any = (), learner: Any = (), pipeline: Any = None, cluster: Any = (), **rates: Any
) -> Setup:
    """One of each: an answer of 100 tokens takes 1 s, a ballot 2 s, an update 4 s."""
    tree = {
        "sampler": {"tokens_per_s": 100, "at_once": 1, **dict(sampler)},
        "judge": {"latency_s": 2, "at_once": 1, **dict(judge)},
        "learner": {"tokens_per_s": 400, **dict(learner)},
        "answers": {"tokens": 100, "prompt_tokens": 0},
        **rates,
    }
    return Setup.model_validate({"cluster": dict(cluster), "pipeline": pipeline, "rates": tree})
