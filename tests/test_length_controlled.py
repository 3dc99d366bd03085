"""The length-controlled win rate, against known answers and an independent fit."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.optimize import minimize

from rlaif.evaluation.length_controlled import PRIOR_SD, Judged, LengthControlled, length_controlled


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def drawn(seed: int, n: int, theta: float, phi: float, longer_by: float, spread: float = 30) -> list[Judged]:
    """Verdicts as the model has them: answers are longer by so many words in the mean, and length counts `phi`."""
    rng = np.random.default_rng(seed)
    words = np.round(rng.normal(longer_by, spread, n))
    won = rng.random(n) < sigmoid(theta + phi * np.tanh(words / spread))
    return [Judged(f"p{i}", float(w), int(d)) for i, (w, d) in enumerate(zip(won, words, strict=True))]


def raw(answers: list[Judged]) -> float:
    return float(np.mean([a.won for a in answers]))


def told(answers: list[Judged]) -> tuple[float, float, float]:
    """The rate and its interval."""
    found = length_controlled(answers)
    assert found.unknown is None
    assert found.win_rate is not None
    assert found.interval is not None
    assert 0 < found.interval[0] < found.win_rate < found.interval[1] < 1
    return found.win_rate, *found.interval


def test_wins_by_length_alone_are_no_wins_at_equal_length() -> None:
    answers = [Judged(f"p{i}", float(d > 0), d) for i, d in enumerate(range(-39, 162, 2))]
    assert raw(answers) > 0.79
    rate, low, high = told(answers)
    assert abs(rate - 0.5) < 0.1
    assert low < 0.5 < high


def test_verdicts_that_length_has_no_part_in_stay_as_they_are() -> None:
    # Of each length, three of four are won: the model fits with no effect of length, and only then.
    answers = [Judged(f"p{d}-{k}", float(k > 0), d) for d in range(-10, 50, 3) for k in range(4)]
    rate, low, high = told(answers)
    assert rate == pytest.approx(0.75, abs=1e-9)
    assert low > 0.5
    assert high < 0.95


def test_wins_against_length_count_for_more() -> None:
    """Shorter answers, of a judge that likes length: the raw rate is too low."""
    answers = drawn(1, 300, theta=1.0, phi=2.0, longer_by=-20)
    assert told(answers)[0] > raw(answers) + 0.1


@pytest.mark.parametrize(
    ("theta", "phi", "longer_by"), [(0.0, 0.0, 0.0), (0.0, 3.0, 20.0), (1.0, 0.0, 20.0), (0.5, -2.0, -20.0)]
)
def test_the_interval_holds_the_truth_as_often_as_it_says(theta: float, phi: float, longer_by: float) -> None:
    truth, held = 1 / (1 + math.exp(-theta)), []
    for seed in range(200):
        found = length_controlled(drawn(seed, 40, theta, phi, longer_by))
        if found.interval:
            held.append(found.interval[0] <= truth <= found.interval[1])
    assert len(held) > 150
    assert np.mean(held) >= 0.93


@pytest.mark.parametrize("seed", range(20))
def test_the_fit_is_that_of_another_optimizer(seed: int) -> None:
    rng = np.random.default_rng(seed)
    n = int(rng.integers(10, 60))
    words = np.round(rng.normal(rng.normal(0, 60), 30, n))
    words[:10] = np.repeat([20, -20], 5)  # enough each way
    won = (words + rng.normal(0, 10 * (seed % 4), n) > 0) * 1.0
    won[:3] = 0.0, 0.5, 1.0
    length = np.tanh(words / words.std(ddof=1))

    def loss(at: np.ndarray) -> float:
        x = at[0] + at[1] * length
        return float(np.sum(np.logaddexp(0, x) - won * x) + (at[1] / PRIOR_SD) ** 2 / 2)

    best = minimize(loss, np.zeros(2), method="Nelder-Mead", options={"xatol": 1e-9, "fatol": 1e-12, "maxiter": 5000})
    rate, low, high = told([Judged(f"p{i}", w, int(d)) for i, (w, d) in enumerate(zip(won, words, strict=True))])
    assert rate == pytest.approx(float(sigmoid(best.x)[0]), abs=1e-5)

    step = 1e-3  # the variance, by differences of the loss
    curvature = np.array([
        [(loss(best.x + a + b) - loss(best.x + a - b) - loss(best.x - a + b) + loss(best.x - a - b)) / (4 * step**2)
         for b in step * np.eye(2)]
        for a in step * np.eye(2)
    ])  # fmt: skip
    logits = [math.log(end / (1 - end)) for end in (low, high)]
    from scipy.stats import t

    half = t.ppf(0.975, n - 2) * math.sqrt(np.linalg.inv(curvature)[0, 0])
    assert (logits[1] - logits[0]) / 2 == pytest.approx(half, rel=1e-2)


def test_separation_stays_finite() -> None:
    """The longer answer always wins, and lengths lie far apart."""
    answers = [Judged(f"p{i}", float(i > 4), 1000 if i > 4 else -1000) for i in range(30)]
    _, low, high = told(answers)
    assert low < 0.5 < high


@pytest.mark.parametrize("way", [1, -1])
def test_lengths_on_one_side_alone_leave_it_open(way: int) -> None:
    answers = drawn(2, 64, theta=1.0, phi=0.0, longer_by=200 * way)
    assert length_controlled(answers).unknown == "no_overlap"


@pytest.mark.parametrize(("longer_by", "least", "most"), [(30, 150, 200), (40, 50, 120), (60, 0, 5), (90, 0, 0)])
def test_a_judge_that_likes_length_alone_is_not_taken_to_like_the_policy(longer_by: int, least: int, most: int) -> None:
    """Where answers of the base policy's length are few the fit returns to the raw rate: .60 at 60 words, .85 at 90."""
    drawings = [drawn(seed, 48, theta=0.0, phi=3.0, longer_by=longer_by) for seed in range(200)]
    rates = [r for answers in drawings if (r := length_controlled(answers).win_rate) is not None]
    assert least <= len(rates) <= most
    assert not least or np.mean(rates) == pytest.approx(0.5, abs=0.05)


def test_overlap_is_of_prompts_however_many_answers_each_has() -> None:
    def answers(shorter: int) -> list[Judged]:
        return [Judged(f"p{n}", float(k < 2), -9 if n < shorter else 9 + n) for n in range(30) for k in range(4)]

    assert length_controlled(answers(4)).unknown == "no_overlap"
    assert length_controlled(answers(5)).unknown is None


@pytest.mark.parametrize(
    ("answers", "unknown"),
    [
        ([], "few_prompts"),
        ([Judged(f"p{i % 9}", float(i % 2), i) for i in range(90)], "few_prompts"),
        ([Judged(f"p{i}", i % 2 / 1, i) for i in range(9)] + [Judged("q", 0.5, 0, asked=False)] * 9, "few_prompts"),
        ([Judged(f"p{i}", 1.0, i) for i in range(40)], "one_sided"),
        ([Judged(f"p{i}", 0.0, i) for i in range(40)], "one_sided"),
        ([Judged(f"p{i}", float(i % 2), 7) for i in range(40)], "same_length"),
    ],
)
def test_what_cant_be_told_is_not_told(answers: list[Judged], unknown: str) -> None:
    assert length_controlled(answers) == LengthControlled(None, None, unknown)  # type: ignore[arg-type]


def test_ties_are_half() -> None:
    rate, low, high = told([Judged(f"p{i}", 0.5, i - 20) for i in range(41)])
    assert rate == pytest.approx(0.5)
    assert low == pytest.approx(1 - high)
    won = [Judged(f"p{i}", (0.5, 1.0)[i % 2], i // 2 - 9) for i in range(40)]
    assert told(won)[0] == pytest.approx(0.75, abs=1e-6)


def test_sides_swapped_is_the_rate_turned_around() -> None:
    answers = drawn(3, 50, theta=0.7, phi=1.5, longer_by=20)
    rate, low, high = told(answers)
    swapped = told([Judged(a.prompt_id, 1 - a.won, -a.more_words) for a in answers])
    assert swapped == pytest.approx((1 - rate, 1 - high, 1 - low))


def test_answers_to_one_prompt_are_one_draw() -> None:
    answers = drawn(4, 50, theta=0.7, phi=1.5, longer_by=20)
    assert told([a for a in answers for _ in range(4)])[0] == pytest.approx(told(answers)[0], abs=0.01)
    wide, narrow = told(answers), told([a for a in answers for _ in range(4)])
    assert narrow[2] - narrow[1] == pytest.approx(wide[2] - wide[1], rel=0.02)


def test_equal_answers_are_half_a_win_and_no_evidence_about_length() -> None:
    judged = [Judged(f"p{d}-{k}", float(k > 0), d) for d in range(-10, 50, 3) for k in range(4)]
    equal = [Judged(f"q{i}", 0.5, 0, asked=False) for i in range(len(judged))]
    rate, low, high = told(judged + equal)
    assert rate == pytest.approx((0.75 + 0.5) / 2)
    alone = told(judged)
    assert high - low < alone[2] - alone[1]
