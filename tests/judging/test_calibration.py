"""Calibration keeps its promise on judges whose error curve is known, and refuses what was not calibrated."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom, binomtest

from rlaif.config import Filters
from rlaif.errors import UserError
from rlaif.judging.calibration import (
    EVERYTHING,
    Calibration,
    FittedMap,
    Threshold,
    calibrate_scores,
    expected_calibration_error,
    first_pairs,
    learn_threshold,
    least_pairs,
    panels_of,
    parse_calibration,
    passes,
    score_of,
)
from rlaif.judging.filters import decide, trusted
from rlaif.judging.verdicts import aggregate, fit_jurors
from rlaif.records import Verdict
from tests.judging.vote_makers import PAIR, make_vote

ALPHA = DELTA = 0.1
DRAWS = 1000
SIZES = (30, 100, 300, 1000)

# Error among pairs of each level of agreement, surest first, and how many pairs have it.
CURVES = {
    "one_level_just_too_bad": ([0.105], [1.0]),
    "flat_just_too_bad": ([0.11] * 6, [0.3, 0.2, 0.2, 0.1, 0.1, 0.1]),
    "good_only_when_sure": ([0.02, 0.08, 0.2, 0.3, 0.45], [0.4, 0.2, 0.15, 0.15, 0.1]),
    "sure_and_wrong": ([0.3, 0.02, 0.02, 0.3], [0.2, 0.3, 0.2, 0.3]),
    "crosses_at_the_last_step": ([0.05, 0.05, 0.35], [0.5, 0.3, 0.2]),
    "flat_many_levels": ([0.101] * 60, [1 / 60] * 60),
    "many_levels": (list(np.linspace(0.0, 0.3, 60)), [1 / 60] * 60),
}


def draw(curve, n, rng):
    """Scores [n] and errors [n] of a judge with that curve; some pairs are ties and never kept."""
    errors, shares = curve
    level = rng.choice(len(errors), size=n, p=shares)
    wrong = rng.random(n) < np.asarray(errors)[level]
    scores = np.where(rng.random(n) < 0.05, -np.inf, 1 - level / len(errors))
    return scores, wrong


def population_error(curve, threshold):
    errors, shares = (np.asarray(x) for x in curve)
    kept = 1 - np.arange(len(errors)) / len(errors) >= threshold
    return float((errors * shares)[kept].sum() / shares[kept].sum())


@pytest.mark.parametrize("name", CURVES)
@pytest.mark.parametrize("n", SIZES)
def test_the_promise(name, n):
    rng = np.random.default_rng(n)
    found = [learn_threshold(*draw(CURVES[name], n, rng), ALPHA, DELTA) for _ in range(DRAWS)]
    broken = sum(f.accepted and population_error(CURVES[name], f.threshold) > ALPHA for f in found)
    assert binomtest(broken, DRAWS, DELTA, alternative="greater").pvalue >= 0.001


def test_the_test_of_the_promise_can_fail():
    """Without a test, "the loosest threshold with at most alpha observed" breaks it often enough to be seen."""
    rng = np.random.default_rng(0)
    curve = CURVES["one_level_just_too_bad"]
    broken = 0
    for _ in range(DRAWS):
        scores, wrong = draw(curve, 100, rng)
        broken += wrong[scores > -np.inf].mean() <= ALPHA
    assert binomtest(broken, DRAWS, DELTA, alternative="greater").pvalue < 0.001


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("error", [0.0, 0.02, 0.05])
def test_power_on_one_level_is_that_of_the_exact_test(n, error):
    allowed = max((k for k in range(n) if binom.cdf(k, n, ALPHA) <= DELTA), default=-1)
    power = float(binom.cdf(allowed, n, error))
    rng = np.random.default_rng(n)
    accepted = sum(learn_threshold(np.ones(n), rng.random(n) < error, ALPHA, DELTA).accepted for _ in range(DRAWS))
    assert binomtest(accepted, DRAWS, power).pvalue >= 0.001 if 0 < power < 1 else accepted == power * DRAWS


@pytest.mark.parametrize(("n", "at_least"), [(30, 0.5), (100, 0.9), (300, 0.99), (1000, 0.99)])
def test_a_judge_that_is_good_enough_is_accepted(n, at_least):
    curve = ([0.01, 0.03, 0.08, 0.2], [0.6, 0.2, 0.1, 0.1])
    rng = np.random.default_rng(n)
    found = [learn_threshold(*draw(curve, n, rng), ALPHA, DELTA) for _ in range(DRAWS)]
    assert sum(f.accepted for f in found) / DRAWS >= at_least
    if n == 1000:  # and most of what could be kept is kept
        assert np.mean([f.kept / n for f in found if f.accepted]) > 0.8


def by_hand(scores, wrong, alpha, delta, start=0.3):
    """The definition, one threshold after another."""
    threshold = None
    eligible = sum(s > -math.inf for s in scores)
    for t in sorted({s for s in scores if s > -math.inf}, reverse=True):
        kept = [w for s, w in zip(scores, wrong, strict=True) if s >= t]
        if len(kept) < max(math.ceil(math.log(delta) / math.log(1 - alpha)), math.ceil(round(eligible * start, 9))):
            continue
        if binom.cdf(sum(kept), len(kept), alpha) > delta:
            break
        threshold = t
    return threshold


@given(
    st.lists(st.tuples(st.sampled_from([-math.inf, 0.5, 0.6, 0.75, 0.9, 1.0]), st.integers(0, 9)), max_size=120),
    st.sampled_from([0.05, 0.1, 0.2]),
    st.sampled_from([0.05, 0.1, 0.3]),
)
def test_it_is_fixed_sequence_testing(pairs, alpha, delta):
    scores, wrong = [s for s, _ in pairs], [e == 0 for _, e in pairs]
    found = learn_threshold(scores, wrong, alpha, delta)
    assert found.threshold == by_hand(scores, wrong, alpha, delta)
    assert found.accepted == (found.threshold is not None)
    if found.accepted:
        assert found.kept == sum(s >= found.threshold for s in scores)
        assert found.error_bound <= alpha + 1e-9


def test_twenty_two_right_ones_are_the_least_that_pass():
    assert least_pairs(0.1, 0.1) == 22
    assert learn_threshold([1.0] * 22, [False] * 22, 0.1, 0.1).accepted
    assert not learn_threshold([1.0] * 21, [False] * 21, 0.1, 0.1).accepted
    nothing = learn_threshold([], [], 0.1, 0.1)
    assert (nothing.accepted, nothing.kept, nothing.error_bound) == (False, 0, 1.0)


def test_equal_scores_are_one_step():
    # Seen one by one, the 22 right ones would pass before the wrong ones are met.
    found = learn_threshold([1.0] * 40, [False] * 22 + [True] * 18, 0.1, 0.1)
    assert (found.accepted, found.kept, found.errors) == (False, 40, 18)


def test_the_first_failure_ends_the_sequence():
    scores = [1.0] * 30 + [0.9] * 70
    found = learn_threshold(scores, [True] * 10 + [False] * 90, 0.1, 0.1)
    assert (found.accepted, found.kept, found.errors) == (False, 30, 10)


def test_a_few_unlucky_pairs_at_the_top_end_nothing():
    """The sequence starts at three tenths of the pairs that can be kept, whatever their labels."""
    assert [first_pairs(n, 0.1, 0.1) for n in (0, 73, 74, 300)] == [22, 22, 23, 90]
    scores, wrong = list(np.arange(300)[::-1]), [n in (3, 8, 15) for n in range(300)]
    found = learn_threshold(scores, wrong, 0.1, 0.1)
    assert (found.accepted, found.kept) == (True, 300)
    assert not learn_threshold(scores[:30], wrong[:30], 0.1, 0.1).accepted


@pytest.mark.slow
def test_a_later_start_keeps_more_of_a_score_with_many_levels():
    rng = np.random.default_rng(0)
    curve = (list(np.linspace(0.0, 0.16, 60)), [1 / 60] * 60)
    drawn = [draw(curve, 200, rng) for _ in range(300)]
    later = np.mean([f.kept * f.accepted for f in (learn_threshold(*d, 0.1, 0.1) for d in drawn)])
    earlier = []
    for scores, wrong in drawn:
        t = by_hand(scores, wrong, 0.1, 0.1, start=0.0)
        earlier.append(0 if t is None else (scores >= t).sum())
    assert later > 1.1 * np.mean(earlier)


def test_nonsense_is_refused():
    with pytest.raises(ValueError, match="alpha"):
        learn_threshold([1.0], [False], 0.0, 0.1)
    with pytest.raises(ValueError, match="NaN"):
        learn_threshold([math.nan], [False], 0.1, 0.1)


def verdict(agreement=1.0, p_first=1.0, outcome="first"):
    return Verdict(pair_id="p", outcome=outcome, p_first=p_first, agreement=agreement, valid_votes=2)


def test_ties_and_abstentions_never_score():
    for kind in ("agreement", "margin"):
        assert score_of(verdict(0.0, 0.5, "tie"), kind) == -math.inf
        assert score_of(verdict(None, None, "abstain"), kind) == -math.inf
    assert score_of(verdict(0.75, 0.7), "agreement") == 0.75
    assert score_of(verdict(0.75, 0.3, "second"), "margin") == pytest.approx(0.4)
    threshold = Threshold(accepted=True, threshold=-1e9, pairs=1, kept=1, errors=0, error_bound=0.1)
    assert not passes(verdict(0.0, 0.5, "tie"), threshold, "agreement")
    assert passes(verdict(), threshold, "agreement")


def test_rounding_does_not_part_equal_scores():
    assert score_of(verdict(0.1 + 0.2), "agreement") == score_of(verdict(0.3), "agreement")


def simulated(n, rng):
    """Verdicts whose margin tells what their agreement doesn't."""
    margins = rng.random(n)
    wrong = rng.random(n) < 0.5 * (1 - margins) ** 2
    return [verdict(1.0, 0.5 + m / 2) for m in margins], wrong.tolist()


def test_a_fitted_map_is_tested_on_other_pairs():
    rng = np.random.default_rng(1)
    verdicts, wrong = simulated(1000, rng)
    found = calibrate_scores(verdicts, [True] * 1000, wrong, 0.1, 0.1, "fitted")
    assert found.accepted
    assert (found.pairs, found.map.fitted_on, found.map.reported_on) == (500, 250, 250)
    assert found.map.margin > 1
    assert found.map.ece < 0.15
    assert 0 < found.map.brier < 0.25
    # Agreement is the same for all: as a score it can only keep everything.
    assert not calibrate_scores(verdicts, [True] * 1000, wrong, 0.1, 0.1, "agreement").accepted


MARGINS = (np.arange(500) + 0.5) / 500
OF_MARGIN = [Verdict(pair_id="p", outcome="first", p_first=0.5 + m / 2, agreement=1.0, valid_votes=2) for m in MARGINS]


@pytest.mark.slow
@pytest.mark.parametrize("n", [100, 200])
def test_a_fitted_map_keeps_the_promise(n):
    rng = np.random.default_rng(n)
    errors = 0.5 * (1 - MARGINS) ** 2  # [margins]
    broken = 0
    for seed in range(DRAWS):
        drawn = rng.integers(len(MARGINS), size=n)
        wrong = rng.random(n) < errors[drawn]
        found = calibrate_scores([OF_MARGIN[i] for i in drawn], [True] * n, wrong, ALPHA, DELTA, "fitted", seed)
        if found.accepted:
            kept = np.array([passes(v, found, "fitted") for v in OF_MARGIN])
            broken += errors[kept].mean() > ALPHA
    assert binomtest(broken, DRAWS, DELTA, alternative="greater").pvalue >= 0.001


JURORS = {"a": 0.8, "b": 0.75, "c": 0.7, "d": 0.55}


def jury_votes(pair, truth, right):
    """One vote of each juror, right or wrong."""
    other = {"first": "second", "second": "first"}[truth]
    votes = [
        make_vote(truth if ok else other, f"{pair}{name}", voice="v") for name, ok in zip(JURORS, right, strict=True)
    ]
    return [
        v.model_copy(update={"ballot": v.ballot.model_copy(update={"pair_id": pair, "judge": name})})
        for name, v in zip(JURORS, votes, strict=True)
    ]


@pytest.mark.nightly
def test_a_jury_whose_weights_are_fitted_on_the_same_pairs_keeps_the_promise():
    """The fit sees no label, but the votes of the pairs that test the threshold."""
    rng = np.random.default_rng(3)
    draws, n = 40, 80
    patterns = list(itertools.product((True, False), repeat=len(JURORS)))
    chance = [math.prod(p if ok else 1 - p for p, ok in zip(JURORS.values(), one, strict=True)) for one in patterns]
    broken = accepted = 0
    for _ in range(draws):
        truths = [("first", "second")[i] for i in rng.integers(2, size=n)]
        cast = [jury_votes(f"p{i}", t, rng.random(len(JURORS)) < list(JURORS.values())) for i, t in enumerate(truths)]
        fit = fit_jurors([v for votes in cast for v in votes])
        verdicts = [aggregate(votes, None, "dawid_skene", fit.weights) for votes in cast]
        wrong = [v.outcome != t for v, t in zip(verdicts, truths, strict=True)]
        found = calibrate_scores(verdicts, [True] * n, wrong, ALPHA, DELTA)
        if found.accepted:
            accepted += 1
            kept = errors = 0.0
            for one, p in zip(patterns, chance, strict=True):
                verdict = aggregate(jury_votes("p", "first", one), None, "dawid_skene", fit.weights)
                if passes(verdict, found, "agreement"):
                    kept += p
                    errors += p * (verdict.outcome == "second")
            broken += errors / kept > ALPHA
    assert accepted > 0
    assert binomtest(broken, draws, DELTA, alternative="greater").pvalue >= 0.001


def test_too_few_pairs_for_a_map():
    verdicts, wrong = simulated(99, np.random.default_rng(0))
    with pytest.raises(UserError, match="needs 100 labelled pairs"):
        calibrate_scores(verdicts, [True] * 99, wrong, 0.1, 0.1, "fitted")


def test_a_map_of_a_faultless_judge_is_a_constant():
    verdicts = [verdict(0.6 + 0.4 * (n % 2)) for n in range(200)]
    found = calibrate_scores(verdicts, [True] * 200, [False] * 200, 0.1, 0.1, "fitted")
    assert found.accepted
    assert found.kept == 100
    assert found.map.ece == pytest.approx(1 - 51 / 52)  # a constant, by the rule of succession


def test_pairs_that_another_rule_drops_are_never_kept():
    found = calibrate_scores([verdict()] * 60, [True] * 30 + [False] * 30, [False] * 60, 0.1, 0.1)
    assert (found.pairs, found.kept) == (60, 30)


def test_expected_calibration_error():
    assert expected_calibration_error(np.array([0.9] * 10), np.array([True] * 9 + [False])) == pytest.approx(0)
    assert expected_calibration_error(np.array([0.9, 0.1]), np.array([False, True])) == pytest.approx(0.9)
    assert expected_calibration_error(np.array([]), np.array([])) == 0.0


FORWARD, REVERSED = (make_vote("first", n, voice="v", order=o) for n, o in enumerate(("forward", "reversed")))
VOTES = [FORWARD, REVERSED]
SETTINGS = Filters(calibration="c.json")
ACCEPTED = Threshold(accepted=True, threshold=0.75, pairs=50, kept=40, errors=0, error_bound=0.05)
REFUSED = Threshold(accepted=False, threshold=None, pairs=50, kept=40, errors=9, error_bound=0.3)


def calibration(slices=None, **more):
    return Calibration(
        made="2026-01-01T00:00:00+00:00", alpha=0.1, delta=0.1, score="agreement",
        slices=slices or {EVERYTHING: ACCEPTED}, judge_kind="chat", models=("m",), panels=panels_of({"p": VOTES}),
        aggregate="mean", min_votes=1, max_abstention_share=0.5, guards=True, labelled=("l.jsonl",),
        labelled_digest="d", **more,
    )  # fmt: skip


def changed(votes=VOTES, model=None, **ballot):
    out = [v.model_copy(update={"ballot": v.ballot.model_copy(update=ballot)}) for v in votes]
    return [v.model_copy(update={"model": model or v.model}) for v in out]


def test_the_same_questions_are_trusted():
    other_pair = changed(id="z", pair_id="q", seed=7)
    assert calibration().mismatch(other_pair, SETTINGS) is None
    assert trusted(aggregate(VOTES), VOTES, calibration(), SETTINGS)


@pytest.mark.parametrize(
    ("votes", "settings", "message"),
    [
        (changed(judge="k"), {}, "the judge is k, calibrated was j"),
        (changed(constitution="d"), {}, "the constitution is d, calibrated was c"),
        (changed(template="u"), {}, "the template is u, calibrated was t"),
        (changed(parameters="warm"), {}, "the judge's parameters are warm"),
        (changed(model="m-2026"), {}, "the judge's model is m-2026, calibrated was m"),
        ([FORWARD], {}, "votes a pair are 1, calibrated was 2"),
        (changed(voice="w"), {}, "other voices, orders or samples"),
        ([FORWARD, FORWARD], {}, "other voices, orders or samples"),
        (VOTES, {"min_votes": 2}, "filters.min_votes is 2, calibrated was 1"),
        (VOTES, {"aggregate": "majority"}, "filters.aggregate is majority, calibrated was mean"),
    ],
)
def test_anything_else_is_not(votes, settings, message):
    stop, drop = (Filters(calibration="c.json", uncalibrated=u, **settings) for u in ("stop", "drop"))
    with pytest.raises(UserError, match=f"filters.calibration c.json: {message}"):
        trusted(aggregate(votes), votes, calibration(), stop)
    assert trusted(aggregate(votes), votes, calibration(), drop) is False


def test_an_unparsed_vote_is_still_of_the_calibrated_judge():
    votes = [FORWARD, make_vote("abstain", 1, voice="v", order="reversed").model_copy(update={"model": "alias"})]
    assert calibration().mismatch(votes, SETTINGS) is None


def test_each_slice_has_its_own_threshold():
    sliced = calibration({"easy": ACCEPTED, "hard": REFUSED})
    assert sliced.keeps(aggregate(VOTES), "easy")
    assert not sliced.keeps(aggregate(VOTES), "hard")
    assert not sliced.keeps(aggregate(VOTES), "never seen")
    assert calibration().keeps(aggregate(VOTES), "any")
    assert (sliced.threshold_for("hard"), sliced.threshold_for("never seen")) == (REFUSED, None)
    assert sliced.accepted
    assert not calibration({"hard": REFUSED}).accepted


def test_categories_of_which_nothing_is_kept_are_known():
    sliced = calibration({"easy": ACCEPTED, "hard": REFUSED})
    assert sliced.unknown_slices(["easy", "hard", "all", "easy"]) == {"hard", "all"}
    assert calibration().unknown_slices(["easy", "all"]) == set()


def test_a_slice_is_only_about_the_questions_that_its_pairs_were_asked():
    other = changed(constitution="d")
    panels = panels_of({"p": VOTES, "q": other})
    slices = {name: ACCEPTED.model_copy(update={"panels": (p.hash,)}) for name, p in zip("ab", panels, strict=True)}
    both = calibration(slices).model_copy(update={"panels": panels})
    drop = Filters(calibration="c.json", uncalibrated="drop")
    found = {(s, v is other): trusted(aggregate(v), v, both, drop, s) for s in "ab" for v in (VOTES, other)}
    assert found == {("a", False): True, ("a", True): False, ("b", False): False, ("b", True): True}
    with pytest.raises(UserError, match="slice a was calibrated on other questions"):
        trusted(aggregate(other), other, both, SETTINGS, "a")
    old = calibration({"a": ACCEPTED}).model_copy(update={"panels": panels})
    with pytest.raises(UserError, match=r"c.json: made over several constitutions by an older version"):
        parse_calibration(old.model_dump_json(), "c.json")


def test_the_threshold_takes_the_place_of_the_rules_on_consistency():
    votes = [
        *VOTES,
        make_vote("first", 2, voice="w", order="forward"),
        make_vote("tie", 3, voice="w", order="reversed"),
    ]
    mixed = aggregate(votes)
    texts = {"a": "one", "b": "two"}
    assert set(decide(mixed, PAIR, SETTINGS, texts).reasons) == {"order_flip", "low_agreement"}
    assert decide(mixed, PAIR, SETTINGS, texts, calibrated=True).winner == "first"
    below = decide(mixed, PAIR, SETTINGS, texts, calibrated=False)
    assert (below.status, below.reasons) == ("dropped", ("uncalibrated",))
    tie = aggregate([FORWARD, make_vote("second", 1, voice="v", order="reversed")])
    assert "tie" in decide(tie, PAIR, SETTINGS, texts, calibrated=True).reasons


def test_a_file_survives_the_round_trip():
    fitted = FittedMap(intercept=-1.5, agreement=2.25, margin=1.0, fitted_on=25, reported_on=25, ece=0.1, brier=0.2)
    one = calibration({EVERYTHING: ACCEPTED.model_copy(update={"map": fitted})})
    assert parse_calibration(one.model_dump_json(), "c.json") == one


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "c.json:1: not a calibration file"),
        ("[]", "schema version None, expected 1"),
        ('{"schema_version": 2}', "schema version 2, expected 1"),
        ('{"schema_version": 1}', "made: Field required"),
    ],
)
def test_another_file_is_refused(text, message):
    with pytest.raises(UserError, match=message):
        parse_calibration(text, "c.json")
