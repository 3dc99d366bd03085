"""Rates out of a run's log."""

from __future__ import annotations

import itertools
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlaif.config import ChatSettings
from rlaif.errors import UserError
from rlaif.records import Completion, Vote
from rlaif.rundir.store import RunDir, read_json, write_json
from rlaif.simulation import Setup, measured, read_cluster
from rlaif.simulation.measured import Timed, line, makespan, measure
from rlaif.simulation.simulate import simulate
from tests.judging.fault_server import FaultServer
from tests.simulation.makers import work
from tests.stubs import stub_job, stub_loop
from tests.test_loop_chat import chat_job, chat_loop, greater_number

STORED = Path(__file__).resolve().parent.parent / "data" / "run_schema2"


def test_a_line_says_what_is_there_whatever_the_size() -> None:
    few, many = [Timed(10, 5.0)] * 2, [Timed(100, 14.0), Timed(100, 90.0), Timed(100, 14.0)]
    assert line(many, few) == pytest.approx((4.0, 0.1)), "slow once doesn't count"
    assert line(many, few, []) == line(many, few)
    assert line([Timed(10, 1.0)], [Timed(100, 10.0)]) == pytest.approx((0.0, 0.1))
    assert line([Timed(100, 12.0)], [Timed(110, 13.2)]) == pytest.approx((0.0, 0.12)), "of one size"
    assert line([Timed(10, -1.0)], [Timed(100, -3.0)]) == (0.0, 0.0)


def test_slots_take_what_comes_next() -> None:
    assert makespan([3, 1, 1, 1, 4], 2) == 7
    assert makespan([1.0] * 8, 4) == 2
    assert makespan([0.5] * 4, 8, interval_s=2) == 6.5
    assert makespan([1.0] * 8, 4, own_s=0.5) == pytest.approx(1 + 8 * 0.5), "busy from the first reply on"
    assert makespan([1.0] * 3, 1, own_s=0.5) == pytest.approx(4.5)


def test_what_the_loop_takes_is_found_again() -> None:
    random = np.random.default_rng(0)

    def cast(n: int) -> measured.Judging:
        latencies = random.lognormal(-1.5, 0.4, n).tolist()
        votes = [Vote.model_construct(latency_s=s, attempts=1) for s in latencies]
        return measured.Judging(votes, 1.25 + makespan(latencies, 8, own_s=0.02), streamed=False)

    judge = ChatSettings(kind="chat", model="m", concurrency=8)
    kinds = [[cast(200) for _ in range(3)], [cast(20) for _ in range(2)]]
    assert measured.own_time(judge, kinds) == pytest.approx((1.25, 0.02), rel=0.01)
    slow_and_few = [kinds[0], [c._replace(seconds=c.seconds + 9) for c in kinds[1]]]
    start_s, ballot_s = measured.own_time(judge, slow_and_few)
    one = kinds[0][0]
    span = makespan((v.latency_s for v in one.votes), 8, own_s=ballot_s)
    assert start_s + span == pytest.approx(one.seconds, rel=0.05), "a run is made of the many"
    start_s, ballot_s = measured.own_time(judge, kinds[1:])
    assert (start_s > 1.25, ballot_s) == (True, 0.0), "one size alone doesn't tell what grows with it"


@pytest.fixture(scope="module")
def judged_run(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    root = tmp_path_factory.mktemp("measured")
    with FaultServer(say=greater_number, latency_s=0.1) as server:
        loop = chat_loop(
            root, chat_job(server, {"concurrency": 4}, prompts={"per_iteration": 8}, pipeline={"stream": False})
        )
        loop.run()
    write_json(loop.dir.path / "run.json", {"schema_version": 2, "job": loop.job.model_dump(mode="json")})
    return loop.dir


@pytest.mark.slow
def test_what_a_run_says_of_itself(judged_run: RunDir) -> None:
    rates = measure(judged_run)
    Setup.model_validate({"rates": rates})
    answers = [c for k in range(3) for c in judged_run.iteration(k).read("completions", Completion)]
    assert sorted(rates["answers"]["tokens"]["samples"]) == sorted(len(c.token_ids) for c in answers)
    metrics = judged_run.iterations_measured(range(3))
    assert rates["answers"]["kept"] == sum(m.trained_pairs for m in metrics) / (3 * 8)
    assert rates["answers"]["asked"] == pytest.approx(sum(m.votes for m in metrics) / (3 * 8 * 2))
    assert all(0.1 <= s < 5 for s in rates["judge"]["latency_s"]["samples"])
    assert (rates["judge"]["prompt_tokens"], rates["judge"]["completion_tokens"]) == (100, 2)


@pytest.mark.slow
def test_a_run_is_as_long_as_its_rates_say(judged_run: RunDir, tmp_path: Path) -> None:
    """The stages' seconds are made up: those of this machine are as it is busy."""
    copy = RunDir(tmp_path / "run")
    shutil.copytree(judged_run.path, copy.path)
    took = []
    for here in [*map(copy.iteration, range(3)), copy.evaluation(2), copy.evaluation(3)]:
        latencies = [v.latency_s for v in here.read("votes", Vote)]
        took.append(2.0 + makespan(latencies, 4, own_s=0.05))
        write_json(here.path / "votes.meta.json", here.meta("votes") | {"seconds": took[-1]})
    rates = measure(copy)
    assert (rates["judge"]["start_s"], rates["loop"]["ballot_s"]) == pytest.approx((2.0, 0.05), rel=0.02)
    counts = work(iterations=30, prompts=8, answers=3, ballots=16, pairs=8, judges_at_once=4, max_tokens=64)
    found = simulate(counts, Setup.model_validate({"rates": rates}))
    assert found.spent_s["judging"] / 30 == pytest.approx(sum(took[:3]) / 3, rel=0.2)


@pytest.mark.slow
def test_what_a_streamed_iteration_says_of_its_votes_is_not_their_own_time(judged_run: RunDir, tmp_path: Path) -> None:
    """They are open while completions come: their seconds hold those of the sampler."""
    copy = RunDir(tmp_path / "run")
    shutil.copytree(judged_run.path, copy.path)
    before = measure(copy)["judge"]["start_s"], measure(copy)["loop"]["ballot_s"]
    for k in range(3):
        here = copy.iteration(k)
        for stage, extra in (("completions", {"votes": 5}), ("votes", {"seconds": 900.0})):
            write_json(here.path / f"{stage}.meta.json", here.meta(stage) | extra)
    after = measure(copy)["judge"]["start_s"], measure(copy)["loop"]["ballot_s"]
    assert sum(after) < 5
    assert sum(before) < 5


@pytest.mark.slow
def test_a_judge_without_a_server_answers_one_after_another(tmp_path: Path) -> None:
    loop = stub_loop(tmp_path, stub_job())
    loop.run()
    write_json(loop.dir.path / "run.json", {"schema_version": 2, "job": loop.job.model_dump(mode="json")})
    for k, stage in itertools.product(range(4), ("scores", "votes")):
        here = loop.dir.iteration(k)
        each = 0.5 if stage == "scores" else 2.0
        write_json(here.path / f"{stage}.meta.json", here.meta(stage) | {"seconds": each * here.meta(stage)["rows"]})
    for updates in (0, 2, 4):
        if (here := loop.dir.evaluation(updates)).is_complete("votes"):
            write_json(
                here.path / "votes.meta.json", here.meta("votes") | {"seconds": 2.0 * here.meta("votes")["rows"]}
            )
    rates = measure(loop.dir)
    assert rates["judge"] == pytest.approx({"latency_s": 2.0, "start_s": 0.0, "score_s": 0.5}, abs=1e-6)
    assert Setup.model_validate({"rates": rates}).rates.judge.at_once is None
    header = read_json(loop.dir.path / "run.json")
    header["job"] |= {"cluster": {"judge": {"replicas": 3}}}
    write_json(loop.dir.path / "run.json", header)
    assert measure(RunDir.open(loop.dir.path))["judge"] == pytest.approx(
        {"latency_s": 6.0, "start_s": 0.0, "score_s": 1.5}, abs=1e-6
    )


@pytest.mark.parametrize(
    "several",
    [
        {"cluster": {"sampler": {"replicas": 2}, "learner": {"processes": 2}}},
        {"sampling": {"engine": "server", "replicas": 2}, "cluster": {"learner": {"processes": 2}}},
        {
            "sampling": {"engine": "server", "base_url": ["http://a/v1", "http://b/v1"]},
            "cluster": {"learner": {"processes": 2}},
        },
    ],
)
def test_rates_are_those_of_one_of_several_workers(tmp_path: Path, several: dict[str, Any]) -> None:
    """Or a run on two of each, simulated on two of each, would take half its time."""
    shutil.copytree(STORED, tmp_path / "run")
    path = tmp_path / "run" / "run.json"
    header = read_json(path)
    header["job"] |= {section: {**(header["job"].get(section) or {}), **given} for section, given in several.items()}
    write_json(path, header)
    one, two = read_cluster(STORED), read_cluster(path.parent, RunDir.open(path.parent).job(), 2)
    assert two.rates.learner.tokens_per_s == pytest.approx(one.rates.learner.tokens_per_s / 2)
    assert two.rates.sampler.tokens_per_s == pytest.approx(one.rates.sampler.tokens_per_s / 2, rel=0.1)
    assert two.rates.sampler.at_once == math.ceil(one.rates.sampler.at_once / 2)
    found = [simulate(work(prompts=64, pairs=64, stream=False), setup) for setup in (one, two)]
    assert found[1].iteration_s == pytest.approx(found[0].iteration_s, rel=0.05)


def test_a_run_without_an_iteration_says_nothing(tmp_path: Path) -> None:
    shutil.copytree(STORED, tmp_path / "run")
    for path in (tmp_path / "run").glob("iterations/*/metrics.json"):
        path.unlink()
    with pytest.raises(UserError, match="no iteration of this run is done"):
        measure(RunDir.open(tmp_path / "run"))


def test_what_no_stage_tells_of_is_known_where_nothing_overlapped() -> None:
    run = RunDir.open(STORED)
    (one,) = run.iterations_measured([2])
    assert not run.plan(2).evaluate
    stages = sum(one.seconds.values())
    assert measured.rest(run, [one.model_copy(update={"wall_s": stages + 2})]) == pytest.approx(2)
    assert measured.rest(run, [one.model_copy(update={"wall_s": None})]) == 0
    for overlapped in ({"streamed_votes": 3}, {"staleness": 1}):
        assert measured.rest(run, [one.model_copy(update={"wall_s": stages + 2, **overlapped})]) == 0
