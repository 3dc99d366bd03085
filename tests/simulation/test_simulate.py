"""Runs whose course can be reckoned by hand, and queues whose formula is known."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import simpy

from rlaif.errors import UserError
from rlaif.simulation import simulate
from rlaif.simulation.cluster import Failures, Spread
from rlaif.simulation.outlook import outlook
from rlaif.simulation.stations import Outages, Station
from tests.simulation.makers import setup, work

run = simulate.simulate


def erlang_c(servers: int, load: float) -> float:
    """Chance that an arrival has to wait; `load` in Erlang."""
    rest = sum(load**n / math.factorial(n) for n in range(servers))
    all_busy = load**servers / math.factorial(servers) / (1 - load / servers)
    return all_busy / (rest + all_busy)


@pytest.mark.parametrize(("servers", "load"), [(1, 0.7), (4, 3.0), (16, 12.0)])
def test_a_station_is_the_queue_that_it_should_be(servers: int, load: float) -> None:
    """M/M/c: arrivals and service at random, the mean wait by Erlang's formula."""
    env, random, n = simpy.Environment(), np.random.default_rng(3), 60_000
    station = Station(env, servers, [Outages(None, random)])
    waits: list[float] = []

    def arrivals() -> Any:
        for gap, seconds in zip(random.exponential(1 / load, n), random.exponential(1.0, n), strict=True):
            yield env.timeout(gap)
            came = env.now
            station.submit(seconds, lambda came=came, seconds=seconds: waits.append(env.now - came - seconds))

    env.process(arrivals())
    env.run()
    drawn = station.busy_s / env.now
    assert drawn == pytest.approx(load, rel=0.02)
    assert np.mean(waits) == pytest.approx(erlang_c(servers, drawn) / (servers - drawn), rel=0.15)


def test_a_replica_that_fails_works_the_rest_of_the_time_and_loses_what_it_had() -> None:
    env, failures = simpy.Environment(), Failures(hours_between=0.5, restart_s=600)
    station = Station(env, 4, [Outages(failures, np.random.default_rng([1, i])) for i in range(2)])
    done: list[int] = []
    for i in range(40_000):
        station.submit(10.0, lambda i=i: done.append(i))
    env.run()
    up = 1800 / 2400 * (1 - 5 / 1800)  # half an item is lost at each failure
    assert env.now == pytest.approx(40_000 * 10 / 4 / up, rel=0.03)
    assert sorted(done) == list(range(40_000))


def test_in_sequence_an_iteration_is_a_sum() -> None:
    found = run(work(), setup(weights={"seconds": 3}, loop={"iteration_s": 5}, learner={"commit_s": 7}))
    assert np.diff(found.ends_s) == pytest.approx(3 + 8 * 2 * 1 + 8 * 2 + 5 + 4 + 7)
    assert found.ends_s[0] == pytest.approx(16 + 16 + 5 + 11), "the samplers begin with the base policy"
    in_all = {"weights": 15, "sampling": 96, "judging": 96, "loop": 30, "update": 66, "evaluation": 0}
    assert found.spent_s == pytest.approx(in_all)


def test_replicas_processes_and_slots_share_the_work() -> None:
    many = {"sampler": {"replicas": 4}, "judge": {"replicas": 2}, "learner": {"processes": 2}}
    found = run(work(), setup(sampler={"tokens_per_s": 200, "at_once": 2}, judge={"at_once": 4}, cluster=many))
    assert np.diff(found.ends_s) == pytest.approx(16 / 8 + 8 * 2 / 8 + 4 / 2)
    loads = setup(weights={"seconds": 3, "at_once": 2}, cluster=many)
    assert run(work(), loads).spent_s["weights"] == pytest.approx(5 * 2 * 3)


@pytest.mark.parametrize(("at_most", "first_s"), [(None, 2), (1, 2), (4, 4), (12, 8), (16, 16), (99, 16)])
def test_answers_that_are_decoded_together_share_the_tokens_of_a_second(at_most: int | None, first_s: float) -> None:
    """Sampling takes as long in all; what is streamed comes later, and all at once in the end."""
    sampler = {"at_most": at_most}
    assert np.diff(run(work(), setup(sampler=sampler)).ends_s) == pytest.approx(16 + 16 + 4)
    found = run(work(), setup(sampler=sampler, judge={"latency_s": 2}, pipeline={"stream": True}))
    assert np.diff(found.ends_s) == pytest.approx(first_s + 8 * 2 + 4)


@pytest.mark.parametrize("latency_s", [0.5, 2.0, 6.0])
def test_streamed_the_slower_of_two_sets_the_pace(latency_s: float) -> None:
    """Two machines in a row, one group after another: the first has to pass one, the last waits for the other."""
    found = run(work(), setup(judge={"latency_s": latency_s}, pipeline={"stream": True}))
    sampled = 2.0
    assert np.diff(found.ends_s) == pytest.approx(sampled + 7 * max(sampled, latency_s) + latency_s + 4)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("staleness", [1, 3])
@pytest.mark.parametrize("update_s", [1.0, 16.0, 40.0, 90.0])
def test_ahead_the_longer_half_sets_the_pace(update_s: float, staleness: int, stream: bool) -> None:
    """One iteration is sampled and judged while another trains, however many may be ahead."""
    learner, pipeline = {"tokens_per_s": 1600 / update_s}, {"stream": stream, "staleness": staleness}
    found = run(work(iterations=20), setup(learner=learner, pipeline=pipeline))
    first_half = 16 + 2 if stream else 16 + 16
    assert np.diff(found.ends_s[9:]) == pytest.approx(max(first_half, update_s))
    assert found.iteration_s < run(work(iterations=20), setup(learner=learner)).iteration_s


def test_an_evaluation_waits_for_what_is_ahead() -> None:
    counts = work(iterations=12, held_out=8, evaluated=tuple(range(1, 13)))
    found = run(counts, setup(pipeline={"staleness": 1}))
    assert np.diff(found.ends_s[3:-1]) == pytest.approx(32 + 8), "nothing begins meanwhile"


def test_what_a_job_says_of_its_pipeline_holds_until_a_file_says_more() -> None:
    streamed, ahead = work(stream=True), work(stream=True, staleness=1)
    assert run(streamed, setup()).iteration_s == run(work(), setup(pipeline={"stream": True})).iteration_s
    assert run(ahead, setup()).iteration_s < run(streamed, setup()).iteration_s
    assert run(ahead, setup(pipeline={})).iteration_s == run(work(), setup()).iteration_s
    apart = {"sampler": {"gpus": 1}, "judge": {"gpus": 1}}
    assert run(work(), setup(cluster=apart)).iteration_s == run(streamed, setup()).iteration_s
    assert run(work(stream=False), setup(cluster=apart)).iteration_s == run(work(), setup()).iteration_s


def test_an_evaluation_samples_measures_and_asks() -> None:
    counts = work(held_out=4, held_out_ballots=6, evaluated=(3, 6))
    found = run(counts, setup(weights={"seconds": 3}, loop={"held_out_s": 0.5}))
    assert found.began_s == pytest.approx(4 + 2)
    lengths = np.diff([found.began_s, *found.ends_s])
    assert lengths[2] - lengths[0] == pytest.approx(3 + 3 + 4 + 2 + 12), (
        "the third loads its policy, and the next one's"
    )
    assert lengths[3] == pytest.approx(lengths[0]), "the evaluation had it loaded"


def test_anchors_are_asked_in_their_iteration_alone() -> None:
    found = run(work(anchors=(0, 0, 5, 0, 0, 0)), setup(judge={"start_s": 3}))
    assert np.diff(found.ends_s) == pytest.approx([39, 39 + 3 + 10, 39, 39, 39])


def test_a_limit_a_minute_holds_up_any_number_of_judges() -> None:
    counts = work(ballots=80, judges_at_once=64, requests_per_minute=60)
    found = run(counts, setup(judge={"at_once": 64}))
    assert np.diff(found.ends_s) == pytest.approx(16 + 79 + 2 + 4 + 0, abs=1.01)
    assert found.use["requests a minute"] == pytest.approx(80 / (found.iteration_s), rel=0.01)
    said = outlook(counts, setup(judge={"at_once": 64}))
    assert said.bottleneck == "judging (requests a minute)"


def test_the_loop_does_one_thing_after_another() -> None:
    counts, on = work(ballots=800), setup(judge={"at_once": 400}, loop={"row_s": 0.05, "ballot_s": 0.2})
    found = run(counts, on)
    assert np.diff(found.ends_s) == pytest.approx(16 + 0.05 + 2 + 800 * 0.25 + 4, rel=0.01)
    assert outlook(counts, on).bottleneck == "judging (loop)"


def test_scores_come_before_ballots() -> None:
    found = run(work(scores=16), setup(judge={"score_s": 0.5}))
    assert np.diff(found.ends_s) == pytest.approx(16 + 16 * 0.5 + 16 + 4)


@pytest.mark.parametrize("pipeline", [{}, {"stream": True}, {"stream": True, "staleness": 1}])
def test_a_large_run_is_thinned_and_takes_as_long(pipeline: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    counts = work(iterations=4, prompts=600, answers=4, ballots=1200, pairs=600, held_out=64, held_out_ballots=128,
                  evaluated=(2, 4), judges_at_once=48, requests_per_minute=9000)  # fmt: skip
    spread = {"latency_s": {"median": 2, "spread": 1.8}}
    on = setup(judge=spread, sampler={"at_once": 64, "tokens_per_s": 6400}, learner={"tokens_per_s": 4000},
               answers={"tokens": {"median": 60, "spread": 1.5}}, loop={"row_s": 0.001}, pipeline=pipeline)  # fmt: skip
    whole = run(counts, on)
    monkeypatch.setattr(simulate, "EVENTS", 2000)
    thinned = run(counts, on)
    assert thinned.iteration_s == pytest.approx(whole.iteration_s, rel=0.04)
    assert thinned.use == pytest.approx(whole.use, rel=0.06)


def test_an_update_whose_process_dies_starts_again() -> None:
    dying = {"failures": {"hours_between": 8 / 3600, "restart_s": 2}}
    found = run(work(iterations=400), setup(learner=dying))
    # Attempts of 4 s against failures every 8 s: each lost one took E[t | t < 4], and the restart.
    mean, update = 8.0, 4.0
    lost = math.exp(update / mean) - 1
    took = lost * (mean - update / lost + 2) + update
    assert found.spent_s["update"] / 400 == pytest.approx(took, rel=0.15)
    soon = {"failures": {"hours_between": 0.15 / 3600}}
    for role in ("sampler", "judge", "learner"):
        with pytest.raises(UserError, match=rf"rates.{role}.failures: .*hardly ever done"):
            run(work(), setup(**{role: soon}))


def test_more_of_what_holds_it_up_brings_most() -> None:
    said = outlook(work(), setup(judge={"latency_s": 10}))
    assert said.bottleneck == "judging"
    by_change = {change.change: change.faster for change in said.changes}
    assert max(by_change, key=lambda change: by_change[change]) == "one more judge"
    assert by_change["one more judge"] == pytest.approx(100 / 60)
    assert said.work_s["judge"] == pytest.approx(80)


def test_what_it_costs() -> None:
    many = {"sampler": {"gpus": 1}, "judge": {"replicas": 2, "gpus": 2}, "learner": {"processes": 3, "gpus": 1}}
    counts = work(iterations=9, prompt_price=2.0, completion_price=10.0, evaluated=(9,), held_out_ballots=8)
    on = setup(cluster=many, judge={"prompt_tokens": 1000, "completion_tokens": 50}, prices={"gpu_hour": 3, "hour": 1})
    said = outlook(counts, on)
    assert said.gpus == 1 + 4 + 3
    assert said.judge_cost == pytest.approx((9 * 8 + 8) * (1000 * 2 + 50 * 10) / 1e6)
    assert said.cost == pytest.approx(said.hours * (8 * 3 + 1) + said.judge_cost)
    equal = {"tokens": 100, "prompt_tokens": 0, "asked": 0.5}
    half = setup(cluster=many, judge={"prompt_tokens": 1000, "completion_tokens": 50}, answers=equal)
    assert outlook(counts, half).judge_cost == pytest.approx(said.judge_cost / 2), "of held-out pairs, too"


def test_a_limit_of_the_job_is_told() -> None:
    (hint,) = outlook(work(judges_at_once=16), setup(judge={"at_once": 32})).hints
    assert hint.startswith("judge.concurrency=16 sends fewer ballots at once than the judges could take (32)")
    assert not outlook(work(judges_at_once=64), setup(judge={"at_once": 32})).hints


def test_a_change_is_what_it_says() -> None:
    """What another setup is simulated as, is the setup that a file of these words describes."""
    counts = work(batch=6)
    for pipeline in ({"stream": False}, {"stream": True, "staleness": 1}):
        stale = pipeline.get("staleness", 0) + 1
        said = {c.change: c.iteration_s for c in outlook(counts, setup(pipeline=pipeline)).changes}
        expected = {f"pipeline.staleness: {stale}": {**pipeline, "staleness": stale}}
        if not pipeline["stream"]:
            expected["pipeline.stream: true"] = {"stream": True}
            expected[f"pipeline: {{stream: true, staleness: {stale}}}"] = {"stream": True, "staleness": stale}
        assert {name: said[name] for name in said if name.startswith("pipeline")} == {
            name: run(counts, setup(pipeline=how)).iteration_s for name, how in expected.items()
        }
    assert not any("pipeline" in c.change for c in outlook(work(in_turns=True), setup()).changes)


@pytest.mark.parametrize(("now", "batch", "more"), [(1, 2, 2), (2, 6, 3), (3, 8, 4), (4, 4, None), (1, 1, None)])
def test_more_learner_processes_share_a_step_evenly(now: int, batch: int, more: int | None) -> None:
    changes = outlook(work(batch=batch), setup(cluster={"learner": {"processes": now}})).changes
    found = [c.change for c in changes if "learner" in c.change]
    assert found == ([f"{more} learner processes"] if more else [])


def test_what_a_run_would_refuse_or_nobody_pays_for_is_told() -> None:
    (hint,) = outlook(work(batch=4), setup(cluster={"learner": {"processes": 3}})).hints
    assert hint.startswith("learner.batch_size=4 can't be shared out evenly to 3 processes")
    (hint,) = outlook(work(), setup(prices={"gpu_hour": 2.5})).hints
    assert hint.startswith("rates.prices.gpu_hour is given, and no role has GPUs")
    (hint,) = outlook(work(), setup(weights={"at_once": 2}, cluster={"sampler": {"replicas": 3}})).hints
    assert hint.startswith("rates.weights.at_once=2 of 3 samplers")


def test_a_spread_is_what_its_median_says() -> None:
    drawn = Spread(median=2, spread=1.5).draw(np.random.default_rng(0), 20_000)
    assert np.median(drawn) == pytest.approx(2, rel=0.02)
    assert np.mean((drawn > 2 / 1.5) & (drawn < 3)) == pytest.approx(0.683, abs=0.01)
    assert np.mean(drawn) == pytest.approx(Spread(median=2, spread=1.5).mean, rel=0.02)
    assert set(Spread(samples=(1, 4)).draw(np.random.default_rng(0), 50)) == {1.0, 4.0}
    assert np.ptp(Spread.model_validate(3).draw(np.random.default_rng(0), 9)) == 0
