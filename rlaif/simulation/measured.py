"""How fast a run was, from its log: the rates that another one is simulated with.

In: a run's directory. Out: `rates` as a cluster's file has them. Nothing is measured anew: stages say their seconds,
votes how long they took, steps how long they did. What happens before the first row of a stage and after its last
(weights are loaded, connections opened) shows where stages of different sizes don't take time in proportion.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Sequence
from statistics import median
from typing import Any, NamedTuple

import numpy as np

from rlaif.config import ChatSettings, Job
from rlaif.errors import RlaifError, UserError
from rlaif.learning.launched import COPY, Launched, launched
from rlaif.loop.pairing import pairs_at_most
from rlaif.records import Completion, IterationMetrics, Preference, Score, UpdateStep, Vote
from rlaif.rundir.store import RunDir, StageDir

DECODED_AT_ONCE = {"vllm": 256, "server": 256, "transformers": 32}
"""Answers of one of its replicas, at most, by engine; one by an engine of the user's own, as far as anybody knows."""
SAMPLES = 2000
"""Measured numbers that are kept of a distribution."""


class Timed(NamedTuple):
    """A stage's size and its seconds."""

    amount: float
    seconds: float


def measure(run: RunDir) -> dict[str, Any]:
    """The rates of a run.

    Raises:
        UserError: it has no iteration that is done, or its pairs are those of a `source`.
    """
    done, job = run.done(), run.job()
    if not done:
        raise UserError(f"{run.path}: no iteration of this run is done, so there is nothing to measure; run one first")
    if job.source is not None:
        raise UserError(f"{run.path}: this run sampled nothing (source); measure one that did")
    iterations = [run.iteration(k) for k in done]
    evaluations = [run.evaluation(u) for u in run.evaluations() if (run.evaluation(u).path / "metrics.json").exists()]
    metrics = run.iterations_measured(done)
    answers = [it.read("completions", Completion) for it in iterations]
    held_out = [e.read("completions", Completion) for e in evaluations]
    sampler, weights = _sampler(job, _sampled(iterations, answers), _sampled(evaluations, held_out))
    judge, ballot_s = _judge(job, iterations, evaluations)
    return {
        "sampler": sampler,
        "judge": judge,
        "learner": _learner(job, iterations, launched(job, run.path / COPY if job.learner.accelerate else None)),
        "weights": weights,
        "loop": {
            "iteration_s": rest(run, metrics),
            "ballot_s": ballot_s,
            "held_out_s": _held_out(evaluations, held_out),
        },
        "answers": _answers(job, iterations, metrics, [c for some in answers for c in some]),
    }


def makespan(durations: Iterable[float], slots: int, interval_s: float = 0.0, own_s: float = 0.0) -> float:
    """Seconds until all are done, each taken by the slot that is free first, at most one begun an `interval_s`. After
    each there are `own_s` of one process that serves all slots, which its slot waits for."""
    coming, ends = iter(durations), list[float]()
    begin_at = now = 0.0

    def begin(at: float) -> None:
        nonlocal begin_at
        if (duration := next(coming, None)) is not None:
            start = max(at, begin_at)
            begin_at = start + interval_s
            heapq.heappush(ends, start + duration)

    for _ in range(slots):
        begin(0.0)
    while ends:
        now = max(now, heapq.heappop(ends)) + own_s
        begin(now)
    return now


def line(*kinds: Sequence[Timed]) -> tuple[float, float]:
    """Seconds that stages took whatever their size, and seconds for each unit of it; neither is negative. A kind counts
    by its medians: what was slow once, as the first of a process is, doesn't. Kinds of one size tell the second
    alone."""
    from scipy.optimize import nnls

    found = [Timed(median(p.amount for p in kind), median(p.seconds for p in kind)) for kind in kinds if kind]
    amounts = np.array([kind.amount for kind in found])
    seconds = np.array([max(kind.seconds, 0.0) for kind in found])
    if amounts.max() <= 1.2 * amounts.min():
        return 0.0, float(np.median(seconds / np.maximum(amounts, 1e-9)))
    (fixed, each), _ = nnls(np.stack([np.ones_like(amounts), amounts], axis=1), seconds)
    return float(fixed), float(each)


class _Sampled(NamedTuple):
    """What was sampled in one stage: tokens of each answer, and the stage's seconds."""

    tokens: list[int]
    seconds: float


def _sampled(stages: Sequence[StageDir], answers: Sequence[list[Completion]]) -> list[_Sampled]:
    return [
        _Sampled([len(c.token_ids) for c in some], here.meta("completions")["seconds"])
        for here, some in zip(stages, answers, strict=True)
    ]


def servers(job: Job) -> dict[str, int]:
    """How many servers share a role's work, 0 without any; the first judge's of a jury."""
    judge = job.judge if isinstance(job.judge, ChatSettings) else None
    judges = 0 if judge is None else judge.serve.replicas if judge.serve else len(judge.addresses)
    samplers = max(job.sampling.replicas, len(job.sampling.addresses))
    return {"sampler": samplers if job.sampling.engine == "server" else 0, "judge": judges}


def _replicas(job: Job, role: str) -> int:
    """Of a role on a cluster, or its servers; 1 elsewhere."""
    share = job.cluster.of(role) if job.cluster else None
    return share.replicas if share else max(1, servers(job)[role])


def _sampler(job: Job, *kinds: list[_Sampled]) -> tuple[dict[str, Any], dict[str, float]]:
    """The rates of a replica, and how long weights take to it."""
    fixed, each = line(*([Timed(sum(some.tokens), some.seconds) for some in kind] for kind in kinds))
    largest = max((some.tokens for kind in kinds for some in kind), key=sum)
    replicas = _replicas(job, "sampler")
    most = DECODED_AT_ONCE.get(job.sampling.engine, 1)
    at_once = min(most, math.ceil(len(largest) / replicas))
    # Replicas of this speed, busy to the last answer's end, take as long as the stage did.
    slot_tokens_per_s = makespan(map(float, largest), at_once * replicas) / max(sum(largest) * each, 1e-9)
    found = {"tokens_per_s": slot_tokens_per_s * at_once, "at_once": at_once, "at_most": most}
    return found, {"seconds": fixed}


class Judging(NamedTuple):
    """A stage's votes and its seconds. Those of a streamed one aren't the judge's alone: it was open while completions
    came, whose meta file says how many votes were there before they all were."""

    votes: list[Vote]
    seconds: float
    streamed: bool


def _cast(stages: Sequence[StageDir]) -> list[Judging]:
    there = [(here, here.read("votes", Vote)) for here in stages if here.is_complete("votes")]
    return [
        Judging(votes, here.meta("votes")["seconds"], "votes" in here.meta("completions"))
        for here, votes in there
        if votes
    ]


def _judge(job: Job, iterations: Sequence[StageDir], evaluations: Sequence[StageDir]) -> tuple[dict[str, Any], float]:
    """The judge's rates, and seconds that a ballot takes the loop."""
    kinds, run = (_cast(iterations), _cast(evaluations)), iterations[0].path.parent.parent
    if not any(kinds):
        raise UserError(f"{run}: no votes in it, so the judge's speed isn't known")
    if not isinstance(job.judge, ChatSettings):
        fixed, each = line(*([Timed(len(c.votes), c.seconds) for c in kind] for kind in kinds))
        scored = [(s.meta("scores")["seconds"], s.read("scores", Score)) for s in iterations if s.is_complete("scores")]
        points = [Timed(len(scores), seconds) for seconds, scores in scored if scores]
        judges = _replicas(job, "judge")  # each of several takes so many times as long
        score_s = {"score_s": line(points)[1] * judges} if points else {}
        return {"latency_s": each * judges, "start_s": fixed, **score_s}, 0.0
    asked = [v for kind in kinds for c in kind for v in c.votes if v.attempts and v.abstain_reason != "infra_error"]
    if not asked:
        raise UserError(f"{run}: all votes came from the cache; measure a run that asked its judge")
    alone = [kind for stages in kinds if (kind := [c for c in stages if not c.streamed])]
    start_s, ballot_s = own_time(job.judge, alone)
    latencies = [v.latency_s for v in asked]
    return {
        "latency_s": {"samples": latencies[:: max(1, len(latencies) // SAMPLES)]},
        "start_s": start_s,
        "prompt_tokens": float(np.mean([v.usage.prompt_tokens for v in asked])),
        "completion_tokens": float(np.mean([v.usage.completion_tokens for v in asked])),
    }, ballot_s


def own_time(judge: ChatSettings, kinds: Sequence[Sequence[Judging]]) -> tuple[float, float]:
    """Seconds that the loop itself took, before a stage's first ballot and for each: what explains why stages took
    longer than their judge's replies. Two sizes tell both; one tells the first alone, in which the other is."""
    if not kinds:
        return 0.0, 0.0
    interval_s = 60 / judge.requests_per_minute if judge.requests_per_minute else 0.0

    def beyond(kind: Sequence[Judging], own_s: float) -> float:
        replies = [[v.latency_s for v in c.votes if v.attempts] for c in kind]
        spans = [makespan(some, judge.concurrency, interval_s, own_s) for some in replies]
        return median(c.seconds - span for c, span in zip(kind, spans, strict=True))

    few, *_, many = sorted([*kinds, *kinds], key=lambda kind: median(len(c.votes) for c in kind))
    low, high = 0.0, max(c.seconds / len(c.votes) for c in many)
    for _ in range(20):
        middle = (low + high) / 2
        too_much = beyond(many, middle) <= max(beyond(few, middle), 0.0)
        low, high = (low, middle) if too_much else (middle, high)
    # Where the small ones were the slow ones, for whatever reason, it is the large ones that a run is made of.
    return max(min(beyond(few, low), beyond(many, low)), 0.0), low


def _learner(job: Job, iterations: Sequence[StageDir], learners: Launched) -> dict[str, float]:
    """The rates of one of its processes."""
    tokens = steps_s = 0.0
    commits = []
    for it in iterations:
        steps = it.read("updates", UpdateStep)
        if not steps:
            continue
        rows = it.read("preferences", Preference)
        tokens += job.learner.epochs * sum(len(s.all_ids) for row in rows for s in row.sequences)
        took = sum(step.seconds for step in steps)
        steps_s += took
        commits.append(it.meta("updates")["seconds"] - took)
    if not commits:
        raise UserError(
            f"{iterations[0].path.parent.parent}: no update in it, so there is nothing to measure of the learner"
        )
    return {"tokens_per_s": tokens / max(steps_s, 1e-9) / learners.processes, "commit_s": max(median(commits), 0.0)}


def rest(run: RunDir, metrics: Sequence[IterationMetrics]) -> float:
    """Seconds of an iteration that no stage tells of; 0 where stages overlap, and in runs of before it was measured."""
    found = []
    for m in metrics:
        overlapped = m.streamed_votes is not None or m.staleness
        if m.wall_s is None or overlapped or m.iteration == 0 or run.plan(m.iteration).evaluate:
            continue  # evaluations lie within these
        found.append(m.wall_s - sum(m.seconds.values()))
    return max(median(found), 0.0) if found else 0.0


def _held_out(evaluations: Sequence[StageDir], held_out: Sequence[list[Completion]]) -> float:
    """Seconds a held-out answer, for all that is neither sampling nor judging."""
    found = []
    for here, answers in zip(evaluations, held_out, strict=True):
        metas = [path.name.removesuffix(".meta.json") for path in here.path.glob("*.meta.json")]
        other = sum(here.meta(name)["seconds"] for name in metas if name not in ("completions", "votes"))
        found.append(other / max(len(answers), 1))
    return median(found) if found else 0.0


def _answers(
    job: Job, iterations: Sequence[StageDir], metrics: Sequence[IterationMetrics], answers: Sequence[Completion]
) -> dict[str, Any]:
    pairs = pairs_at_most(job) * len(iterations)
    ballots = sum(it.meta("votes").get("ballots", m.votes) for it, m in zip(iterations, metrics, strict=True))
    requests = sum(v.attempts for it in iterations for v in it.read("votes", Vote))
    if not isinstance(job.judge, ChatSettings):
        requests = ballots
    if not answers or not ballots:
        raise RlaifError(f"{iterations[0].path}: no answers or no ballots in a run whose iterations are done")
    lengths = [float(len(c.token_ids)) for c in answers]
    return {
        "tokens": {"samples": lengths[:: max(1, len(lengths) // SAMPLES)]},
        "prompt_tokens": float(np.mean([len(c.prompt_token_ids) for c in answers])),
        "asked": requests / ballots * sum(m.pairs for m in metrics) / pairs,
        "kept": sum(m.trained_pairs for m in metrics) / pairs,
    }
