"""Estimates of KL(policy, base) beside the truth, simulated: `python -m benchmarks.kl`.

Policies over a vocabulary of 200 whose next token depends on the last one; answers end by themselves or at 64 tokens.
Each policy is a base policy that drifted: towards noise (flatter), towards what it likes (sharper), or elsewhere. For
each way to estimate: its mean over many evaluations, its standard deviation, and how often the 95 % interval of
`rlaif.monitors` holds the truth, which is the exact mean over many more answers at temperature 1.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import numpy as np

from rlaif.intervals import ratio_interval

VOCABULARY, LENGTH, PROMPTS = 200, 64, 48
END = 0
Policy = np.ndarray
"""log p of the next token [last token, next token]."""


def normalised(logits: np.ndarray) -> Policy:
    """Logits as log-probabilities."""
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def policies(rng: np.random.Generator) -> Iterator[tuple[str, Policy, Policy]]:
    """Name, policy and base policy."""
    logits = 2.5 * rng.standard_normal((VOCABULARY, VOCABULARY))
    logits[:, END] = 1.5
    base = normalised(logits)
    yield "towards noise", normalised(0.8 * logits), base
    yield "sharper", normalised(1.25 * logits), base
    yield "elsewhere", normalised(logits + 0.5 * rng.standard_normal(logits.shape)), base
    yield "a little", normalised(logits + 0.1 * rng.standard_normal(logits.shape)), base


def drawn_from(policy: Policy, temperature: float, top_p: float) -> Policy:
    """What is sampled from at a temperature and a top-p."""
    p = np.exp(normalised(policy / temperature))
    order = np.argsort(-p, axis=-1)
    ranked = np.take_along_axis(p, order, -1)
    np.put_along_axis(p, order, np.where(ranked.cumsum(-1) - ranked >= top_p, 0.0, ranked), -1)
    with np.errstate(divide="ignore"):
        return np.log(p / p.sum(-1, keepdims=True))


def answers(policy: Policy, starts: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Last tokens, next tokens and which of them are part of the answer; each [answers, LENGTH]."""
    cumulated = np.exp(policy).cumsum(-1)
    last, alive = starts, np.ones(len(starts), bool)
    before, after, mask = [], [], []
    for _ in range(LENGTH):
        drawn = (rng.random((len(last), 1)) * cumulated[last, -1:] > cumulated[last]).sum(-1)
        before.append(last)
        after.append(drawn)
        mask.append(alive)
        last, alive = drawn, alive & (drawn != END)
    return np.stack(before, 1), np.stack(after, 1), np.stack(mask, 1)


def estimate(way: str, policy: Policy, base: Policy, found: tuple[np.ndarray, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Nats and tokens of each answer."""
    before, after, mask = found
    if way.startswith("exact"):
        nats = (np.exp(policy) * (policy - base)).sum(-1)[before]
    else:
        nats = policy[before, after] - base[before, after]
        if way.startswith("k3"):
            nats = np.exp(-nats) - 1 + nats
    return (nats * mask).sum(1), mask.sum(1)


WAYS = {
    "log-ratio, 0.7/0.9": (0.7, 0.9),
    "exact, 0.7/0.9": (0.7, 0.9),
    "log-ratio, 1/1": (1.0, 1.0),
    "k3, 1/1": (1.0, 1.0),
    "exact, 1/1": (1.0, 1.0),
}


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--evaluations", type=int, default=200)
    parser.add_argument("--prompts", type=int, default=PROMPTS)
    options = parser.parse_args()
    rng = np.random.default_rng(0)
    print(f"nats a token; {options.evaluations} evaluations of {options.prompts} answers")
    print(f"{'policy':<16}{'truth':>8}  {'estimate':<20}{'mean':>8}{'sd':>8}{'interval holds the truth':>26}")
    for name, policy, base in policies(rng):
        many = answers(policy, rng.integers(1, VOCABULARY, 20_000), rng)
        nats, tokens = estimate("exact", policy, base, many)
        truth = nats.sum() / tokens.sum()
        for way, (temperature, top_p) in WAYS.items():
            drawn = drawn_from(policy, temperature, top_p)
            values, held = [], 0
            for _ in range(options.evaluations):
                found = answers(drawn, rng.integers(1, VOCABULARY, options.prompts), rng)
                nats, tokens = estimate(way, policy, base, found)
                values.append(nats.sum() / tokens.sum())
                low, high = ratio_interval(nats.tolist(), tokens.tolist())
                held += low <= truth <= high
            print(
                f"{name:<16}{truth:>8.4f}  {way:<20}{np.mean(values):>8.4f}{np.std(values):>8.4f}"
                f"{held / options.evaluations:>26.2f}"
            )


if __name__ == "__main__":
    main()
