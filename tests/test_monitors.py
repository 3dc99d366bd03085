"""Metrics and alarms, against numbers worked out by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, get_args

import pytest

from rlaif.config import JurorMonitor, Monitors
from rlaif.constitutions.constitution import parse_constitution
from rlaif.errors import RlaifError
from rlaif.evaluation import answer_stats, evaluation_metrics
from rlaif.intervals import wilson
from rlaif.monitors import History, iteration_metrics, juror_agreement, learner_metrics, silent
from rlaif.monitors.alarms import KINDS
from rlaif.monitors.alarms import alarms as all_alarms
from rlaif.monitors.judges import juror
from rlaif.records import (
    Alarm,
    AlarmKind,
    Completion,
    Decision,
    Divergence,
    EvaluationMetrics,
    IterationMetrics,
    JudgedStats,
    Outcome,
    Pair,
    Plan,
    PolicyVersion,
    Quality,
    UpdateStep,
    Verdict,
)
from rlaif.rundir.store import read_record
from tests.judging.vote_makers import make_vote
from tests.stubs import text


def seen(metrics: IterationMetrics, evaluation: EvaluationMetrics | None = None, **more: Any) -> History:
    """A run of one iteration, and an evaluation of what it made."""
    made = [evaluation.model_copy(update={"updates": metrics.iteration + 1})] if evaluation else []
    return History([metrics], made, **more)


def alarms(monitors: Monitors, *args: Any, **more: Any) -> list[str]:
    """What the alarms say."""
    return [alarm.message for alarm in all_alarms(monitors, seen(*args, **more))]


def shifted(now: JudgedStats, calibrated: JudgedStats) -> list[str]:
    return alarms(watching(), measured(judged=now), calibrated=calibrated)


def watching(**kinds: dict[str, Any]) -> Monitors:
    """Limits of some kinds; answers may be short."""
    return Monitors.model_validate({"short_answers": {"action": "off"}, **kinds})


def completion(n: int, words: str, *, ended: bool = True, logprob: float | None = -4.0) -> Completion:
    return Completion(
        id=f"c{n}",
        prompt_id=f"p{n}",
        policy=PolicyVersion(iteration=1, digest="d"),
        index=0,
        seed=0,
        prompt_token_ids=(1,),
        token_ids=(1, 2),
        text=words,
        finish_reason="stop" if ended else "length",
        logprob=logprob,
    )


def decision(n: int, outcome: Outcome) -> Decision:
    verdict = Verdict(pair_id=f"x{n}", outcome=outcome, p_first=None, agreement=None, valid_votes=0)
    return Decision(pair_id=f"x{n}", status="dropped", reasons=("tie",), winner=None, verdict=verdict)


def quality(n: int, tokens: int = 2, logprob: float = -3.0) -> Quality:
    return Quality(completion_id=f"c{n}", tokens=tokens, logprob_per_token=logprob, relevance=n)


def measured(**changes: Any) -> IterationMetrics:
    """An iteration of one answer, without a pair."""
    policy = PolicyVersion(iteration=0, digest="d")
    plan = Plan(iteration=0, seed=0, constitution=RULES.ref, policy=policy, prompt_ids=("p0",), evaluate=False)
    return iteration_metrics(plan, [completion(0, "a")], [], [], [], [], [], 0, {}).model_copy(update=changes)


RULES = parse_constitution(text(1), "rules", 1, "test")


def _as_stored(read: Any, stored: Any) -> Any:
    """What was read, without what was added since."""
    if isinstance(stored, dict):
        return {key: _as_stored(read[key], value) for key, value in stored.items()}
    return read


@pytest.mark.parametrize("record", [IterationMetrics, EvaluationMetrics])
def test_numbers_of_a_stored_run_still_read(record: type[IterationMetrics | EvaluationMetrics]) -> None:
    folder = "iterations" if record is IterationMetrics else "evaluations"
    data = Path(__file__).parent / "data"
    files = [p for run in ("run_schema1", "run_schema2") for p in sorted((data / run / folder).glob("*/metrics.json"))]
    assert len(files) > 4
    for file in files:
        stored = json.loads(file.read_text())
        read = read_record(file, record).model_dump(mode="json")
        if "margin" in stored:
            margin = stored.pop("margin")
            assert read["learner_metrics"] == ({} if margin is None else {"margin": margin})
        assert _as_stored(read, stored) == stored


def test_numbers_of_the_learner_are_means_over_the_steps_that_have_them() -> None:
    def step(**metrics: float) -> UpdateStep:
        common = {"iteration": 0, "row_ids": ("a",), "loss": 0.5, "grad_norm": 1.0, "learning_rate": 1e-5}
        return UpdateStep.model_validate({"step": 1, "seconds": 0.0, "metrics": metrics} | common)

    assert learner_metrics([step(margin=0.1, reward=1.0), step(margin=0.3)]) == {
        "margin": pytest.approx(0.2), "reward": 1.0
    }  # fmt: skip
    assert learner_metrics([]) == {}


def test_numbers_that_are_none_are_named(tmp_path: Path) -> None:
    (tmp_path / "metrics.json").write_text('{"iteration": "one"}')
    with pytest.raises(RlaifError, match=r"metrics.json: not a IterationMetrics of schema 2 or older \(iteration: "):
        read_record(tmp_path / "metrics.json", IterationMetrics)


def test_what_is_counted_about_answers() -> None:
    answers = [completion(0, "one two three"), completion(1, "- a\n- b", ended=False)]
    answers.append(answers[0].model_copy(update={"id": "again", "index": 1}))
    stats = answer_stats(answers)
    assert stats.ended_share == pytest.approx(2 / 3)
    assert stats.distinct_share == pytest.approx(2 / 3)
    assert stats.list_share == pytest.approx(1 / 3)
    assert stats.mean_tokens == 2


def evaluated(answers: list[Completion], outcomes: list[Outcome]) -> EvaluationMetrics:
    """The first answers were judged so; further ones equal the base policy's, and nobody was asked."""
    pairs = [
        Pair(id=f"x{n}", prompt_id=c.prompt_id, first=c.id, second="base", method="against_base")
        for n, (c, _) in enumerate(zip(answers, outcomes, strict=False))
    ]
    decisions = [decision(n, outcome) for n, outcome in enumerate(outcomes)]
    base_answer = completion(0, "a b c").model_copy(update={"id": "base"})
    measured = [quality(n) for n in range(len(answers))]
    return evaluation_metrics(1, RULES, answers, measured, pairs, decisions, 0.5, base=[base_answer])


def test_a_pair_without_a_winner_is_half_a_win() -> None:
    m = evaluated([completion(n, "a b") for n in range(4)], ["first", "second", "tie"])
    assert (m.wins, m.losses, m.undecided, m.abstained) == (1, 1, 2, 0)
    assert m.win_rate == 0.5
    assert m.relevance == 1.5
    assert m.checks == {"wish": 1.0}


def test_an_abstention_is_no_half_a_win() -> None:
    m = evaluated([completion(n, "a") for n in range(4)], ["first", "abstain", "abstain", "first"])
    assert (m.wins, m.losses, m.undecided, m.abstained) == (2, 0, 0, 2)
    assert m.win_rate == 1.0
    assert m.win_interval == wilson(2, 2)


@pytest.mark.parametrize("equal_to_base", [0, 2])
def test_a_dead_judge_measures_nothing(equal_to_base: int) -> None:
    m = evaluated([completion(n, "a") for n in range(2 + equal_to_base)], ["abstain", "abstain"])
    assert (m.win_rate, m.win_interval, m.abstained) == (None, None, 2)
    (said,) = alarms(watching(), measured(), m)
    assert said.startswith("the judge abstained on 2 of ")
    assert alarms(watching(abstained={"limit": 1}), measured(), m) == []


def test_a_policy_that_answers_as_the_base_does_is_neither_better_nor_worse() -> None:
    m = evaluated([completion(n, "a") for n in range(3)], [])
    assert (m.win_rate, m.undecided, m.abstained) == (0.5, 3, 0)


def test_half_wins_are_not_rounded() -> None:
    m = evaluated([completion(n, "a") for n in range(5)], ["first", "first", "tie", "second", "second"])
    assert m.win_rate == 0.5
    assert m.win_interval is not None
    assert sum(m.win_interval) == pytest.approx(1.0)


def test_answers_to_one_prompt_are_one_draw() -> None:
    answers = [completion(n, "a").model_copy(update={"prompt_id": f"p{n // 4}", "index": n % 4}) for n in range(8)]
    m = evaluated(answers, ["first", "first", "first", "abstain", "second", "second", "first", "first"])
    assert m.win_rate == 0.75
    assert m.win_interval == wilson(1.5, 2)


def test_the_length_of_an_answer_is_in_words_against_the_base_policys() -> None:
    """The base policy's answers have three words; of one word are the losses, of five the wins."""
    won: list[Outcome] = ["second", "first", "first", "first"] * 5
    m = evaluated([completion(n, "a b c d e" if o == "first" else "a") for n, o in enumerate(won)], won)
    assert m.win_rate == 0.75
    assert m.length_controlled_win_rate is not None
    assert m.length_controlled_interval is not None
    assert m.length_controlled_win_rate < 0.7
    assert m.length_controlled_interval[0] < 0.5
    assert m.length_controlled_unknown is None
    same = evaluated([completion(n, "a b c d e") for n in range(20)], won)
    assert (same.length_controlled_win_rate, same.length_controlled_unknown) == (None, "same_length")


def test_an_abstention_says_nothing_about_length() -> None:
    won: list[Outcome] = ["second", "first", "first", "first"] * 5
    answers = [completion(n, "a " * (n % 7 + 1)) for n in range(40)]
    with_some = evaluated(answers, won + ["abstain"] * 20)
    assert with_some.length_controlled_win_rate == evaluated(answers[:20], won).length_controlled_win_rate
    assert with_some.abstained == 20


def test_the_base_policy_has_no_win_rate() -> None:
    m = evaluation_metrics(0, RULES, [completion(0, "a")], [quality(0)], [], None, 0.5)
    assert m.win_rate is None
    assert m.win_interval is None
    assert m.undecided == 0
    assert (m.length_controlled_win_rate, m.length_controlled_unknown) == (None, None)


def drifted(drift: list[tuple[str, int, float]] | None) -> EvaluationMetrics:
    """An evaluation with these divergences: prompt, tokens, nats."""
    rows = None
    if drift is not None:
        rows = [Divergence(completion_id=f"k{n}", prompt_id=p, tokens=t, kl=kl) for n, (p, t, kl) in enumerate(drift)]
    return evaluation_metrics(1, RULES, [completion(0, "a", logprob=-2.0)], [quality(0)], [], [], 0.5, rows)


def test_kl_is_of_a_token_and_of_an_answer() -> None:
    m = drifted([("a", 10, 1.0), ("b", 30, 2.0), ("c", 20, 0.6)])
    assert m.kl_per_token == pytest.approx(3.6 / 60)  # a long answer counts by its tokens
    assert m.kl_per_completion == pytest.approx(1.2)
    # Linearised by hand: deviations .4, .2, -.6 from the ratio; t with two degrees is 4.3027.
    half = 4.302653 * math.sqrt(3 / 2 * (0.4**2 + 0.2**2 + 0.6**2)) / 60
    assert m.kl_interval == pytest.approx((max(0.06 - half, 0), 0.06 + half), abs=1e-6)
    assert m.kl_answers == 3
    assert not m.kl_by_older_version


def test_answers_to_one_prompt_are_one_draw_of_kl_too() -> None:
    twice = drifted([("a", 10, 1.0), ("a", 10, 1.0), ("b", 30, 2.0), ("b", 30, 2.0)])
    once = drifted([("a", 10, 1.0), ("b", 30, 2.0)])
    assert twice.kl_interval == pytest.approx(once.kl_interval)
    assert twice.kl_per_completion == pytest.approx(once.kl_per_completion)


def test_kl_that_was_not_measured_is_none_and_the_base_policys_is_nothing() -> None:
    unknown, base, single = drifted(None), drifted([]), drifted([("a", 10, 1.0)])
    assert (unknown.kl_per_token, unknown.kl_answers) == (None, 0)
    assert (base.kl_per_token, base.kl_interval, base.kl_per_completion) == (0.0, (0.0, 0.0), 0.0)
    assert (single.kl_per_token, single.kl_interval) == (0.1, None)


def test_kl_of_an_older_version_is_known_as_such() -> None:
    stored = Path(__file__).parent / "data" / "run_schema1" / "evaluations"
    read = [read_record(f, EvaluationMetrics) for f in sorted(stored.glob("*/metrics.json"))]
    assert all(m.kl_by_older_version for m in read if m.kl_per_token is not None)
    assert any(m.kl_by_older_version for m in read)


def with_cut_off(outcomes: str) -> IterationMetrics:
    """Each letter is a pair: `c` the cut-off side won, `e` the one that ended, `2` both were cut off, `0` none, `t` a
    tie with one cut-off side."""
    answers, pairs, decisions = [], [], []
    for n, kind in enumerate(outcomes):
        first, second = completion(2 * n, "a b"), completion(2 * n + 1, "c d")
        if kind in "ce2t":
            first = first.model_copy(update={"finish_reason": "length"})
        if kind == "2":
            second = second.model_copy(update={"finish_reason": "length"})
        answers += [first, second]
        pairs.append(Pair(id=f"x{n}", prompt_id="p", first=first.id, second=second.id, method="random"))
        decisions.append(decision(n, {"e": "second", "t": "tie"}.get(kind, "first")))  # type: ignore[arg-type]
    policy = PolicyVersion(iteration=1, digest="d")
    plan = Plan(iteration=0, seed=0, constitution=RULES.ref, policy=policy, prompt_ids=("p",), evaluate=False)
    return iteration_metrics(plan, answers, pairs, [], decisions, [], [], 0, {})


def test_winners_that_were_cut_off_are_counted_among_pairs_with_one_such_side() -> None:
    m = with_cut_off("cceee20t")
    assert (m.one_cut_off, m.cut_off_won) == (5, 2)
    none = with_cut_off("0")
    assert (none.one_cut_off, none.cut_off_won) == (0, 0)


@pytest.mark.parametrize(
    ("outcomes", "limits", "found"),
    [
        ("ccccccccccccc00000000", {}, ["the judge prefers answers that were cut off, in 13 of 13 pairs"]),
        ("cccccc0000", {}, []),  # in one of 32 iterations, six could be chance
        ("ccccccccccccc00000000", {"cut_off_won": 0.7}, []),
        ("eeeeee0000000000", {}, []),
        ("222220", {}, ["cut off 83% of the sampled answers, over 80%"]),
        ("222220", {"cut_off": 0.9}, []),
        ("22220", {}, []),
        ("ee222222222", {}, ["cut off 91%"]),
    ],
)
def test_alarms_about_answers_that_were_cut_off(outcomes: str, limits: dict[str, Any], found: list[str]) -> None:
    monitors = watching(**{kind: {"limit": limit} for kind, limit in limits.items()})
    said = alarms(monitors, with_cut_off(outcomes), None)
    assert len(said) == len(found)
    assert all(part in sentence for part, sentence in zip(found, said, strict=True))


@pytest.mark.parametrize(
    ("sampled", "kl", "limits", "found"),
    [
        ({}, 0.4, {}, []),
        ({}, 9.0, {}, ["KL from the base policy is 9.00"]),
        ({}, 9.0, {"kl": {"action": "off"}}, []),
        ({"mean_words": 5.9}, None, {}, ["5.9 words"]),
        ({"distinct_share": 0.4}, None, {}, ["40% of the sampled answers are distinct"]),
        ({}, 0.3, {"kl": {"limit": 0.2}}, ["KL from the base policy is 0.30"]),
        ({}, 0.1, {"kl": {"limit": 0.2}}, []),
        ({"mean_words": 1, "distinct_share": 0}, 1.0, {"kl": {"limit": 0.2}}, ["words", "distinct", "KL"]),
    ],
)
def test_alarms(sampled: dict[str, float], kl: float | None, limits: dict[str, Any], found: list[str]) -> None:
    monitors = Monitors.model_validate(limits)
    answers = answer_stats([completion(0, "a b")]).model_copy(update={"mean_words": 20.0, **sampled})
    metrics = measured(sampled=answers)
    evaluation = evaluation_metrics(0, RULES, [completion(0, "a b")], [quality(0)], [], None, 0.5)
    said = alarms(monitors, metrics, evaluation.model_copy(update={"kl_per_token": kl}))
    assert len(said) == len(found)
    assert all(part in sentence for part, sentence in zip(found, said, strict=True))
    assert alarms(monitors, metrics, None) == said[: len(sampled)]
    assert all_alarms(monitors, History([metrics], [evaluation])) == all_alarms(monitors, seen(metrics)), "not of it"


CALIBRATED = JudgedStats(
    pairs=200, kept=160, mean_agreement=0.95, agreement_sd=0.1, mean_words=40, answers=400, cut_off=20, one_cut_off=16
)


@pytest.mark.parametrize(
    ("now", "found"),
    [
        ({}, []),
        ({"kept": 16}, []),  # 67 % of 24, within chance and the limit
        ({"kept": 8}, ["pairs kept: 33%, 80% when calibrated"]),
        ({"pairs": 2, "kept": 1}, []),  # of two pairs, chance
        ({"mean_agreement": 0.7}, ["mean agreement: 0.70, 0.95 when calibrated"]),
        ({"mean_agreement": 0.7, "agreement_sd": 0.9}, []),
        ({"cut_off": 30}, ["answers cut off: 62%, 5% when calibrated"]),
        ({"mean_words": 85}, ["words an answer: 85, 40 when calibrated"]),
        ({"mean_words": 19}, ["words an answer: 19, 40 when calibrated"]),
        ({"kept": 2, "mean_words": 9}, ["pairs kept", "words an answer"]),
    ],
)
def test_pairs_unlike_the_calibrated_ones_raise_an_alarm(now: dict[str, Any], found: list[str]) -> None:
    stats = CALIBRATED.model_copy(update={"pairs": 24, "kept": 19, "answers": 48, "cut_off": 3, **now})
    said = shifted(stats, CALIBRATED)
    assert len(said) == len(found)
    assert all(part in sentence for part, sentence in zip(found, said, strict=True))
    quiet = watching(calibration_shift={"kept": 1, "agreement": 1, "cut_off": 1, "length_ratio": 10})
    metrics = measured(judged=stats)
    assert alarms(quiet, metrics, calibrated=CALIBRATED) == []
    assert alarms(watching(), metrics) == []  # without a calibration nothing was promised


def test_labelled_answers_of_unknown_end_count_as_ended() -> None:
    unknown = CALIBRATED.model_copy(update={"answers": 0, "cut_off": 0, "one_cut_off": 0})
    now = CALIBRATED.model_copy(update={"pairs": 24, "kept": 19, "answers": 48, "cut_off": 30})
    assert [s.rpartition(": answers")[2] for s in shifted(now, unknown)] == [" cut off: 62%, 0% when calibrated"]


def test_a_juror_that_weighs_nothing_without_a_label_raises_an_alarm() -> None:
    """Not for an iteration or two: with few pairs a fit without labels finds a good juror worthless now and then."""
    weighed = [
        measured(iteration=k, juror_weights={"a": 0.8, "b": b}, juror_agreement={"a": 0.9, "b": 0.2})
        for k, b in enumerate((0.0, 0.4, 0.0, 0.0, 0.4, 0.0, 0.0, 0.0))
    ]
    told = {k: list(juror(JurorMonitor(), History(weighed[: k + 1]))) for k in range(len(weighed))}
    assert [k for k, found in told.items() if found] == [3, 5, 6, 7]
    assert told[3][0].message == (
        "juror b weighed nothing in 3 of the last 4 iterations, and agrees with the verdict on 20% of the pairs; "
        "either it or the others are wrong (`rlaif judge calibrate` learns weights from labels)"
    )
    assert list(juror(JurorMonitor(), History(weighed, learned=True))) == []
    quiet = [silent(Monitors(), "juror", History(weighed[:n])) for n in (1, 2, 3, 5)]
    assert quiet == [False, False, True, True], "with one or two nothing could be told"


def test_how_often_a_juror_names_the_verdicts_side() -> None:
    votes = [
        make_vote(o, n, voice="v").model_copy(
            update={"ballot": make_vote(o, n, voice="v").ballot.model_copy(update={"pair_id": f"x{n % 3}", "judge": j})}
        )
        for n, (j, o) in enumerate(
            [
                *zip("aaa", ("first", "second", "tie"), strict=True),
                *zip("bbb", ("first", "first", "first"), strict=True),
            ]
        )
    ]
    decisions = [decision(0, "first"), decision(1, "second"), decision(2, "tie")]
    assert juror_agreement(votes, decisions) == {"a": 1.0, "b": 0.5}
    assert juror_agreement(votes[:3], decisions) == {}


def test_an_alarm_is_a_record_with_its_numbers() -> None:
    metrics = measured(sampled=answer_stats([completion(0, "a b")]))
    pausing = Monitors.model_validate({"short_answers": {"limit": 3, "action": "pause"}})
    (alarm,) = all_alarms(pausing, seen(metrics))
    assert (alarm.kind, alarm.measured, alarm.limit, alarm.action) == ("short_answers", 2.0, 3.0, "pause")
    assert alarm.iteration == metrics.iteration
    (warned,) = all_alarms(Monitors(), seen(metrics))
    assert warned == alarm.model_copy(update={"action": "warn", "limit": 6.0, "message": warned.message})
    assert all_alarms(watching(), seen(metrics)) == []


def test_an_alarm_of_an_older_run_still_reads() -> None:
    older = {"kind": "kl", "iteration": 1, "message": "KL", "measured": 0.6, "limit": 0.5, "action": "stop"}
    assert Alarm.model_validate(older).action == "pause"


def test_every_kind_of_monitor_has_settings_and_a_name() -> None:
    assert set(KINDS) == set(Monitors.model_fields) <= set(get_args(AlarmKind))
