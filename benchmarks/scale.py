"""What many at once bring, and what the loop itself costs: `make bench-scale`.

    python -m benchmarks.scale [--parts streamed replicas latency memory] [--size 1.0] [--replicas 1 2 4 8 16]
                               [--profile] [--json]

Sampler, judge and learner are stubs that take a fixed time; the loop, its run directory and its fsyncs are as always.
So the ratios are the loop's, not this machine's arithmetic. Each part is a ratio within one run:

- `streamed`: one iteration and one stage after the other, against `pipeline: {stream: true, staleness: 1}`. The judge
  is the one for servers; its server is a process that answers after 200 ms (median, log-normal) and takes as long
  alone as sampling.
- `replicas`: 1, 2, 4, 8 and 16 samplers and judges in actors of a Ray cluster on this machine, beside what
  `--dry-run --cluster` says of them by the run of one.
- `latency`: 100,000 ballots that take 50 ms each, 64 at once, of a judge in a process of its own.
- `memory`: an iteration of 4,096 prompts × 8 completions and a million ballots that are answered at once; the peak of
  the loop's process, and where its seconds go.
"""

from __future__ import annotations

import argparse
import asyncio
import cProfile
import json
import math
import multiprocessing
import os
import pstats
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from benchmarks.simulation import MEASURED, SPREAD, TARGET, Clock, judge_server, make_job, make_project, stub_run
from rlaif.config import Cluster, Job, LikelihoodSettings
from rlaif.records import Ballot, Completion, Preference, Score, UpdateStep, Vote
from rlaif.rundir.stages import NAMES
from rlaif.rundir.store import RunDir
from rlaif.simulation import read_cluster, work_of
from rlaif.simulation.simulate import simulate
from rlaif.workers.feed import Feed
from rlaif.workers.inline import InlineWorker
from rlaif.workers.process import ProcessWorker
from rlaif.workers.replicas import Replicas
from rlaif.workers.worker import Worker
from tests.stubs import BASE_DIGEST, StubJudge, StubLearner, StubSampler, fraction

REPLICAS = (1, 2, 4, 8, 16)
STUBS = ("sampler", "judge", "learner")
LATENCY_S, SLOW_LATENCY_S, AT_ONCE = 0.05, 0.2, 64
BALLOTS_A_PAIR, PAIRS_A_PROMPT = 10, 25
CHUNK, GATHER_S = 256, 0.02
_TOKENS = tuple(range(1000, 1064))
_TEXT = "It is a number with a story, and the story is long. " * 6


class Row(NamedTuple):
    """A line of the table."""

    what: str
    value: float
    unit: str
    target: float | None = None
    at_most: bool = False
    """The target is a limit, not a goal."""

    @property
    def met(self) -> bool | None:
        """None without a target."""
        if self.target is None:
            return None
        return self.value <= self.target if self.at_most else self.value >= self.target


# ---- stubs of fixed rates


class PacedSampler(StubSampler):
    """A prompt's answers every so many seconds; each of everyday length."""

    def __init__(self, prompt_s: float = 0.0):
        super().__init__()
        self._prompt_s = prompt_s

    def sample(self, *args: Any, **kwargs: Any) -> Iterator[list[Completion]]:
        """A prompt's answers at a time."""
        due = time.monotonic()
        for group in super().sample(*args, **kwargs):
            due += self._prompt_s
            time.sleep(max(0.0, due - time.monotonic()))
            yield [
                c.model_copy(update={"token_ids": _TOKENS, "text": f"{c.text}. {_TEXT}", "logprob": None})
                for c in group
            ]

    def hold(self, digest: str) -> None:
        """As `load`, without weights."""
        self._digest = self._computes_with = digest


class TellsDigests(Replicas):
    """Replicas that are told which policy they hold, and get no weights: how those travel isn't measured here."""

    def tell(self, method: str, **kwargs: Any) -> None:
        """As `Replicas.tell`."""
        if method == "load":
            method, kwargs = "hold", {"digest": (kwargs["weights"].folder() / "weights.txt").read_text()}
        super().tell(method, **kwargs)


class PacedJudge(StubJudge):
    """Votes about a prompt's pairs after so many seconds."""

    def __init__(self, prompt_s: float = 0.0):
        super().__init__()
        self._prompt_s = prompt_s

    def cast(self, ballots: list[Ballot], *args: Any, **kwargs: Any) -> Iterator[list[Vote]]:
        """All votes on a prompt's pairs at once."""
        time.sleep(self._prompt_s)
        yield [vote for chunk in super().cast(ballots, *args, **kwargs) for vote in chunk]

    def score(self, *args: Any, **kwargs: Any) -> Iterator[list[Score]]:
        """A prompt's scores at once."""
        yield [score for chunk in super().score(*args, **kwargs) for score in chunk]


class PacedLearner(StubLearner):
    """An update of so many seconds, in steps of 64 rows."""

    def __init__(self, update_s: float = 0.0):
        super().__init__()
        self._update_s = update_s

    def update(self, rows: Sequence[Preference], iteration: int) -> Iterator[UpdateStep]:
        """All rows, in one step."""
        time.sleep(self._update_s)
        (step, *_) = super().update(rows[:2], iteration)
        yield step.model_copy(update={"row_ids": tuple(r.row_id for r in rows), "seconds": self._update_s})


class WaitingJudge:
    """A judge that is fed, as one for servers: `AT_ONCE` ballots are answered at the same time, each after a while."""

    def __init__(self, latency_s: float):
        self._latency_s = latency_s

    def cast(self, ballots: Sequence[Ballot], feed: Feed, **how: Any) -> Iterator[list[Vote]]:
        """Votes in chunks, as they come."""
        with asyncio.Runner() as runner:
            answering = runner.run(_Answering.begun(feed, self._latency_s))
            while chunk := runner.run(answering.chunk()):
                yield chunk


class _Answering:
    """One call of a `WaitingJudge`."""

    def __init__(self, latency_s: float):
        self._latency_s = latency_s
        self._owed: asyncio.Queue[Ballot | None] = asyncio.Queue()
        self._cast: asyncio.Queue[Vote | None] = asyncio.Queue()
        self._tasks: list[asyncio.Task[None]] = []

    @classmethod
    async def begun(cls, feed: Feed, latency_s: float) -> _Answering:
        self, here = cls(latency_s), asyncio.get_running_loop()
        feed.pour(lambda item: here.call_soon_threadsafe(self._take, item))
        self._tasks = [asyncio.create_task(self._answer()) for _ in range(AT_ONCE)]
        return self

    def _take(self, item: Any) -> None:
        for ballot in item.ballots if item else (None,) * AT_ONCE:
            self._owed.put_nowait(ballot)

    async def _answer(self) -> None:
        while (ballot := await self._owed.get()) is not None:
            if self._latency_s:
                await asyncio.sleep(self._latency_s)
            outcome = "first" if fraction(ballot.pair_id) < 0.5 else "second"
            self._cast.put_nowait(Vote(ballot=ballot, model="stub", outcome=outcome, raw_reply="A"))
        self._cast.put_nowait(None)

    async def chunk(self) -> list[Vote]:
        """The votes that there are, at least one; none at the end. Like the chat judge, it gathers them for a while."""
        votes: list[Vote] = []
        while self._tasks and not votes:
            await self._next_into(votes)
            if self._latency_s:
                await asyncio.sleep(GATHER_S)
            while not self._cast.empty() and len(votes) < CHUNK:
                await self._next_into(votes)
        return votes

    async def _next_into(self, votes: list[Vote]) -> None:
        if (vote := await self._cast.get()) is None:
            self._tasks.pop()
        else:
            votes.append(vote)


# ---- parts


def job_of(root: Path, url: str, iterations: int, judge: dict[str, Any], **changes: Any) -> Job:
    """A job of this benchmark: held-out answers are few, so that its iterations are what is measured."""
    evaluated = {"every": iterations, "prompts": 2, "kl_prompts": 0}
    return make_job(root, url, iterations, {"eval": evaluated, "judge": judge, **changes})


def in_process(role: str, logs: Path, factory: str, **kwargs: Any) -> ProcessWorker:
    """A worker in a process of its own, as in a run."""
    factory = factory if ":" in factory else f"benchmarks.scale:{factory}"
    worker = ProcessWorker(role, factory, kwargs, logs / f"{role}.log")
    worker.ready()  # or a stage would wait for its start
    return worker


def streamed(root: Path, size: float) -> list[Row]:
    """One thing after the other against streams and overlap."""
    concurrency, prompts = 8, max(int(72 * size), 8)
    reply_s = SLOW_LATENCY_S * math.exp(math.log(SPREAD) ** 2 / 2)
    sample_s = 3 * 2 * reply_s / concurrency  # three pairs in both orders: judging takes as long
    update_s = prompts * sample_s / 3
    took: dict[str, float] = {}
    stages: dict[str, float] = {}
    with judge_server(SLOW_LATENCY_S) as url:
        for name, pipeline in (
            ("sequence", {"stream": False}),
            ("overlapped", {"stream": True, "staleness": 1}),
        ):
            asked = {"per_iteration": prompts}
            job = job_of(root, url, 9, {"concurrency": concurrency}, prompts=asked, pipeline=pipeline)
            every = job.monitors.anchors.every
            clock, path = Clock(), root / "runs" / name
            logs = path.with_suffix(".logs")
            with (
                in_process("sampler", logs, "PacedSampler", prompt_s=sample_s) as sampler,
                in_process("judge", logs, "rlaif.judging.chat:make", settings=job.judge) as judge,
                in_process("learner", logs, "PacedLearner", update_s=update_s) as learner,
            ):
                run = stub_run(job, path, root, clock, sampler, judge, learner)
            # From one iteration that asks about anchors to the next: to ask, it waits for what was begun ahead. So
            # neither the first iterations count, beside which less runs, nor the last, which is evaluated.
            took[name] = (clock.ends[2 * every - 1] - clock.ends[every - 1]) / every
            if name == "sequence":
                stages = _stage_seconds(run, 1)
    longest = max(stages.values())
    return [
        *(Row(f"one after the other: {stage}", s, "s") for stage, s in stages.items() if s > 0.05),
        Row("one after the other: an iteration", took["sequence"], "s"),
        Row("streamed, staleness 1: an iteration", took["overlapped"], "s"),
        Row("the longest stage alone, which is ideal", longest, "s"),
        Row("streamed against one after the other", took["sequence"] / took["overlapped"], "x", 1.4),
        Row("of the ideal", longest / took["overlapped"], "", 0.9),
    ]


def replicas(root: Path, size: float, numbers: Sequence[int] = REPLICAS) -> list[Row]:
    """Samplers, then judges, that take a fixed time for a prompt: so many of them, one first."""
    from rlaif.workers.ray import RayCluster

    prompts, prompt_s, most = max(int(96 * size), 16), 0.4, max(numbers)
    (root / "ray").mkdir()
    settings = Cluster.model_validate({"sampler": {"replicas": most}, "judge": {"replicas": most}})
    # One prompt a piece, as of a judge whose batches a single prompt fills.
    job = job_of(root, "", 1, {}, prompts={"per_iteration": prompts})
    job = job.model_copy(update={"judge": LikelihoodSettings(batch_tokens=64)})
    out = [Row("one of each, ideal", prompts * prompt_s, "s")]
    with RayCluster(settings, root / "ray") as cluster:
        for role, stage in (("sampler", "completions"), ("judge", "votes")):
            cluster.reserve(role, most, 0)
            factory, actors = f"benchmarks.scale:Paced{role.capitalize()}", list[Worker]()
            for n in range(most):
                actors.append(cluster.start(role, n, factory, {"prompt_s": prompt_s}, 0))
                actors[-1].ready()  # one after the other: two cores start sixteen processes
            took = {}
            for n in numbers:
                if role == "sampler":  # an earlier run has left it with another policy
                    for actor in actors[:n]:
                        actor.call("hold", digest=BASE_DIGEST)
                workers: dict[str, Worker] = {
                    r: InlineWorker(r, f"benchmarks.scale:Paced{r.capitalize()}", {}) for r in STUBS
                }
                workers[role] = TellsDigests(role, actors.__getitem__, n)
                clock, path = Clock(), root / "runs" / f"{role}{n}"
                run = stub_run(job, path, root, clock, workers["sampler"], workers["judge"], workers["learner"])
                took[n] = _stage_seconds(run, 0)[stage]
                efficiency = took[numbers[0]] * numbers[0] / n / took[n]
                setup = _setup(root, role, n, root / "runs" / f"{role}{numbers[0]}", prompt_s)
                expected = simulate(work_of(job, root), read_cluster(setup)).iteration_s
                off = abs(expected / clock.iteration_s - 1)
                out.append(Row(f"{n} {role}s", took[n], "s"))
                out.append(Row(f"{n} {role}s: efficiency", efficiency, "", {8: 0.9, 16: 0.8}.get(n)))
                out.append(Row(f"{n} {role}s: the iteration", clock.iteration_s, "s"))
                out.append(Row(f"{n} {role}s: its prediction is off by", off, "", TARGET, at_most=True))
            for actor in actors:
                actor.close()
    return out


def _setup(root: Path, role: str, number: int, measured: Path, prompt_s: float) -> Path:
    """A file for `--dry-run --cluster`: so many of a role, as fast as one was in a run. What no log tells is that the
    stub answers one prompt after the other."""
    answers = MEASURED["sampling"]["completions_per_prompt"]
    rates: dict[str, Any] = {"from": str(measured)}
    if role == "sampler":
        rates["sampler"] = {"tokens_per_s": answers * len(_TOKENS) / prompt_s, "at_once": answers}
    path = root / f"{role}{number}.yaml"
    path.write_text(yaml.safe_dump({"cluster": {role: {"replicas": number}}, "rates": rates}))
    return path


def latency(root: Path, size: float) -> list[Row]:
    """The loop with a judge that waits."""
    found = _judged(root, "latency", prompts=max(int(400 * size), 4), latency_s=LATENCY_S)
    ideal = LATENCY_S * found.ballots / AT_ONCE
    return [
        Row("ballots", found.ballots, ""),
        Row(f"{LATENCY_S * 1000:.0f} ms, {AT_ONCE} at once: ideal", ideal, "s"),
        Row("judging", found.seconds["votes"], "s"),
        Row("of the ideal's time", found.seconds["votes"] / ideal, "x", 1.05, at_most=True),
    ]


def memory(root: Path, size: float, profile: bool = False) -> list[Row]:
    """The loop with a judge that answers at once, in a process whose memory is its own."""
    spawn = multiprocessing.get_context("spawn")
    here, there = spawn.Pipe()
    child = spawn.Process(target=_measured_judging, args=(there, root, max(int(4096 * size), 4), profile))
    child.start()
    there.close()
    found: _Judged = here.recv()
    child.join()
    stages = {stage: s for stage, s in found.seconds.items() if s > 0.005 * found.wall_s}
    return [
        Row("ballots", found.ballots, ""),
        *(Row(f"stage {stage}", s, "s") for stage, s in stages.items()),
        Row("the iteration", found.wall_s, "s"),
        Row("CPU of the loop's process", found.cpu_s, "s"),
        Row("peak memory of the loop's process", found.peak_gib, "GiB", 1.0, at_most=True),
    ]


class _Judged(NamedTuple):
    """An iteration of many ballots."""

    ballots: int
    seconds: dict[str, float]
    wall_s: float
    cpu_s: float
    """Of this process, for the whole run."""
    peak_gib: float


def _judged(root: Path, name: str, prompts: int, latency_s: float) -> _Judged:
    """Eight answers to each prompt, 25 pairs of them, 10 ballots on each pair."""
    judge_of = {"samples": BALLOTS_A_PAIR // 2, "temperature": 1.0, "concurrency": AT_ONCE}
    job = job_of(
        root,
        "",
        1,
        judge_of,
        prompts={"per_iteration": prompts},
        sampling={"completions_per_prompt": 8},
        pairing={"max_pairs_per_prompt": PAIRS_A_PROMPT},
    )
    path, clock = root / "runs" / name, Clock()
    logs = path.with_suffix(".logs")
    with (
        in_process("sampler", logs, "PacedSampler") as sampler,
        in_process("judge", logs, "WaitingJudge", latency_s=latency_s) as judge,
        in_process("learner", logs, "PacedLearner") as learner,
    ):
        cpu = time.process_time()
        run = stub_run(job, path, root, clock, sampler, judge, learner, prompts=prompts)
        cpu = time.process_time() - cpu
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    metrics = run.iterations_measured([0])[0]
    assert metrics.wall_s is not None
    return _Judged(metrics.votes, _stage_seconds(run, 0), clock.ends[-1] - clock.began, cpu, peak)


def _measured_judging(back: Connection, root: Path, prompts: int, profile: bool) -> None:
    """In a process of its own."""
    os.chdir(root)
    profiler = cProfile.Profile()
    if profile:
        profiler.enable()
    found = _judged(root, "memory", prompts, latency_s=0.0)
    profiler.disable()
    if profile:
        pstats.Stats(profiler, stream=sys.stderr).sort_stats("tottime").print_stats(40)
    back.send(found)


def _stage_seconds(run: RunDir, k: int) -> dict[str, float]:
    here = run.iteration(k)
    return {name: here.meta(name)["seconds"] for name in NAMES}


PARTS: dict[str, Callable[..., list[Row]]] = {
    "streamed": streamed,
    "replicas": replicas,
    "latency": latency,
    "memory": memory,
}


def table(rows: Sequence[Row]) -> str:
    """Lines of one part."""
    lines = []
    for r in rows:
        said = f"{r.what:<44}{r.value:>12,.0f}" if r.value > 1000 else f"{r.what:<44}{r.value:>12.2f}"
        limit = "" if r.target is None else f"  {'at most' if r.at_most else 'at least'} {r.target:g}"
        lines.append(f"{said} {r.unit:<4}{limit}{'' if r.met is not False else '  MISSED'}".rstrip())
    return "\n".join(lines)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--parts", nargs="*", default=list(PARTS), choices=list(PARTS))
    parser.add_argument("--size", type=float, default=1.0, help="of each part, for a try: 0.1 is a tenth")
    parser.add_argument("--replicas", type=int, nargs="+", default=REPLICAS, help="how many, the fewest first")
    parser.add_argument("--profile", action="store_true", help="where the loop's time goes in `memory`, on stderr")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    report: dict[str, Any] = {"load_before": round(os.getloadavg()[0], 1), "parts": {}}
    missed = []
    for name in given.parts:
        with tempfile.TemporaryDirectory() as folder:
            root = Path(folder)
            make_project(root, models=False)
            os.chdir(root)
            more: dict[str, Any] = {"memory": {"profile": given.profile}, "replicas": {"numbers": given.replicas}}
            rows = PARTS[name](root, given.size, **more.get(name, {}))
            os.chdir(Path(__file__).parents[1])
        report["parts"][name] = [{**r._asdict(), "met": r.met} for r in rows]
        missed += [f"{name}: {r.what}" for r in rows if r.met is False]
        if not given.json:
            print(f"{name}\n{table(rows)}\n", flush=True)
    if given.json:
        print(json.dumps(report, indent=1))
    if missed:
        raise SystemExit("missed: " + "; ".join(missed))


if __name__ == "__main__":
    main()
