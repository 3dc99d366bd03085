"""Ways to estimate KL, on simulated policies whose KL is known."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.kl import VOCABULARY, WAYS, answers, drawn_from, estimate, policies


@pytest.mark.parametrize("which", range(4), ids=["towards noise", "sharper", "elsewhere", "a little"])
def test_only_answers_at_temperature_1_say_how_far_a_policy_went(which: int) -> None:
    rng = np.random.default_rng(1)
    name, policy, base = list(policies(rng))[which]
    found = {}
    for way, (temperature, top_p) in WAYS.items():
        nats, tokens = estimate(
            way, policy, base, answers(drawn_from(policy, temperature, top_p), rng.integers(1, VOCABULARY, 3000), rng)
        )
        found[way] = nats.sum() / tokens.sum()
    truth = found["exact, 1/1"]
    assert truth > 0
    assert found["log-ratio, 1/1"] == pytest.approx(truth, rel=0.1)
    assert found["k3, 1/1"] == pytest.approx(truth, rel=0.1)
    if name == "towards noise":
        assert found["log-ratio, 0.7/0.9"] < -truth
    if name == "sharper":
        assert found["log-ratio, 0.7/0.9"] > 2 * truth
