"""Whether `rlaif run --dry-run --cluster` tells the truth: runs that were predicted before they ran.

    python -m benchmarks.simulation [--models] [--anew] [--latency 0.2] [--iterations 4] [--only CASE ...] [--json]

One run is measured: the loop as it is, a judge behind HTTP whose replies take a while (log-normal), a sampler whose
answers share so many tokens a second, and a learner; both wait instead of computing, so that a machine that is busy
with something else measures nearly the same, the more so the longer the latency. With `--models` tiny random ones
compute, in `rlaif run` as it is. From the run's log come the rates; other runs, with other numbers of prompts, answers,
pairs, requests under way, requests a minute, some of them streamed or overlapped, are predicted with them, and then
run. None may be off by more than 15 %.

What is predicted is the time of an iteration, without the start of the models. With `--models` on a machine that is
busy all of it is noise: look at its load first.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import multiprocessing
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

from rlaif.config import Job, parse_job
from rlaif.loop import Loop
from rlaif.loop.in_force import InForce
from rlaif.records import Completion, IterationMetrics, Preference, UpdateStep
from rlaif.rundir.store import RunDir, write_json
from rlaif.simulation import Setup, read_cluster, work_of
from rlaif.simulation.simulate import simulate
from rlaif.workers.inline import InlineWorker
from rlaif.workers.weights import WeightsRef
from rlaif.workers.worker import Worker
from tests.judging.fault_server import _QUOTE as QUOTE
from tests.stubs import BASE_DIGEST, StubLearner, StubSampler, fraction, stub_prompts, write_base, write_texts

ROOT = Path(__file__).resolve().parents[1]
SPREAD = 1.5
TARGET = 0.15

MEASURED: dict[str, Any] = {
    "constitution": "rules@1",
    "prompts": {"train": "train.jsonl", "held_out": "held_out.jsonl", "per_iteration": 24},
    "sampling": {"engine": "transformers", "completions_per_prompt": 4, "max_tokens": 128, "max_model_len": 256},
    "pairing": {"method": "all", "max_pairs_per_prompt": 3},
    "judge": {"kind": "chat", "model": "m", "api_key_env": None, "cache": None, "concurrency": 8},
    "filters": {"min_kept_pairs": 1, "min_agreement": 0.5, "guards": False, "cut_off": "keep"},
    "learner": {"precision": "fp32", "learning_rate": 1e-5, "warmup_steps": 0, "batch_size": 8},
    "eval": {"every": 2, "prompts": 12, "kl_prompts": 4},
    "pipeline": {"stream": False},  # so that its log tells each stage's own time
    "workers": "inline",
}
CASES: dict[str, dict[str, Any]] = {
    "again": {"seed": 1},
    "wider": {"judge": {"concurrency": 24}},
    "narrower": {"judge": {"concurrency": 4}},
    "more prompts": {"prompts": {"per_iteration": 72}},
    "more answers": {"sampling": {"completions_per_prompt": 8}, "pairing": {"max_pairs_per_prompt": 6}},
    "fewer pairs": {"pairing": {"max_pairs_per_prompt": 1}, "prompts": {"per_iteration": 48}},
    "a limit": {"judge": {"concurrency": 16, "requests_per_minute": 600}},
    "streamed": {"pipeline": {"stream": True}},
    "streamed, more answers": {
        "pipeline": {"stream": True},
        "sampling": {"completions_per_prompt": 8},
        "pairing": {"max_pairs_per_prompt": 6},
    },
    "overlapped": {"pipeline": {"stream": True, "staleness": 1}, "judge": {"concurrency": 4}},
}


SAMPLED, TRAINED = 300.0, 600.0
"""Tokens in the time of one of the judge's replies, where sampler and learner wait instead of computing."""


class WaitingSampler(StubSampler):
    """Answers as the stub's, of 8 to 120 tokens, that are decoded together and share the tokens of a second; a prompt's
    are handed on when all of them are there."""

    def __init__(self, latency_s: float):
        super().__init__()
        self._tokens_per_s = SAMPLED / latency_s

    def sample(self, *args: Any, **kwargs: Any) -> Iterator[list[Completion]]:
        """Each prompt's answers when the last of them is decoded."""
        groups = [[self._longer(c) for c in group] for group in super().sample(*args, **kwargs)]
        lengths = sorted(len(c.token_ids) for group in groups for c in group)
        ends, now, before = {}, 0.0, 0
        for rank, length in enumerate(lengths):
            now += (length - before) * (len(lengths) - rank) / self._tokens_per_s
            ends[length], before = now, length
        started = time.monotonic()
        for group in sorted(groups, key=lambda group: max(len(c.token_ids) for c in group)):
            time.sleep(max(0.0, started + ends[max(len(c.token_ids) for c in group)] - time.monotonic()))
            yield group

    def _longer(self, c: Completion) -> Completion:
        ids = tuple(range(3, 11 + int(112 * fraction("length", c.text))))
        return c.model_copy(update={"token_ids": ids, "logprob": None})


class WaitingLearner(StubLearner):
    """Steps as the stub's, that take a while."""

    def __init__(self, latency_s: float):
        super().__init__()
        self._tokens_per_s = TRAINED / latency_s

    def update(self, rows: Sequence[Preference], iteration: int) -> Iterator[UpdateStep]:
        """Each step when its tokens are through."""
        tokens = {row.pair_id: sum(len(s.all_ids) for s in row.sequences) for row in rows}
        for step in super().update(rows, iteration):
            seconds = sum(tokens[i] for i in step.row_ids) / self._tokens_per_s
            time.sleep(seconds)
            yield step.model_copy(update={"seconds": seconds})


def waiting_run(job: Job, path: Path, root: Path, clock: Clock, latency_s: float) -> None:
    """Runs a job with workers that wait; only its judge is asked for real."""

    def waiting(role: str) -> InlineWorker:
        return InlineWorker(role, f"benchmarks.simulation:Waiting{role.capitalize()}", {"latency_s": latency_s})

    judge = InlineWorker("judge", "rlaif.judging.chat:make", {"settings": job.judge, "spent": None})
    stub_run(job, path, root, clock, waiting("sampler"), judge, waiting("learner"))


def stub_run(
    job: Job, path: Path, root: Path, clock: Clock, sampler: Worker, judge: Worker, learner: Worker, prompts: int = 400
) -> RunDir:
    """Runs a job in a new directory with these workers: the loop and its log are as always."""
    run = RunDir(path)
    path.mkdir(parents=True)
    write_json(path / "run.json", {"schema_version": 2, "job": job.model_dump(mode="json")})
    write_base(root)
    Loop(
        job,
        run,
        InForce(job, run, root, clock.note),
        stub_prompts(prompts, "train"),
        stub_prompts(16, "held"),
        WeightsRef(digest=BASE_DIGEST, path=root / "base"),
        judge_name="benchmark",
        sampler=sampler,
        judge=judge,
        measurer=InlineWorker("measurer", "tests.stubs:StubJudge", {}),
        learner=learner,
        progress=clock,
        stream=job.pipeline.stream is True,
    ).run()
    return run


class Outcome(NamedTuple):
    """Seconds an iteration."""

    case: str
    predicted_s: float
    measured_s: float

    @property
    def error(self) -> float:
        """Over what was measured."""
        return self.predicted_s / self.measured_s - 1


class Clock:
    """A progress that notes when the first iteration began to sample, and when each ended."""

    def __init__(self) -> None:
        self.began = 0.0
        self.ends: list[float] = []

    def stage(self, iteration: int, name: str, total: int, unit: str, text: str) -> None:
        """The first iteration's sampling follows the evaluation of the base policy."""
        if name == "sample" and not self.began:
            self.began = time.monotonic()

    def advance(self, n: int) -> None:
        """Nothing to note."""

    def iteration_done(self, iteration: int, metrics: IterationMetrics) -> None:
        """An iteration's end."""
        self.ends.append(time.monotonic())

    def note(self, message: str) -> None:
        """Nothing to note."""

    @property
    def iteration_s(self) -> float:
        """Seconds an iteration took on average."""
        return (self.ends[-1] - self.began) / len(self.ends)


@contextmanager
def judge_server(latency_s: float) -> Iterator[str]:
    """The address of a judge in a process of its own, whose replies take a while: this in the median, log-normal."""
    spawn = multiprocessing.get_context("spawn")
    here, there = spawn.Pipe()
    server = spawn.Process(target=serve, args=(there, latency_s), daemon=True)
    server.start()
    try:
        yield f"http://127.0.0.1:{here.recv()}/v1"
    finally:
        server.terminate()
        server.join()


def serve(port: Connection, latency_s: float) -> None:
    """The judge's process: prefers the longer answer, or the first as text, after a while; sends its port."""
    draw = random.Random(0)

    async def connection(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                if head.startswith(b"GET "):
                    send(writer, 404, {})
                    continue
                length = int(head.lower().split(b"content-length:")[1].split(b"\r\n")[0])
                body = json.loads(await reader.readexactly(length))
                await asyncio.sleep(latency_s * math.exp(math.log(SPREAD) * draw.gauss(0, 1)))
                message = {"role": "assistant", "content": preferred(body)}
                choice = {"index": 0, "message": message, "finish_reason": "stop"}
                usage = {"prompt_tokens": 300, "completion_tokens": 1}
                send(writer, 200, {"id": "x", "model": "m", "choices": [choice], "usage": usage})
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    def send(writer: asyncio.StreamWriter, status: int, tree: dict[str, Any]) -> None:
        content = json.dumps(tree).encode()
        head = f"HTTP/1.1 {status} X\r\nContent-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
        writer.write(head.encode() + content)

    async def run() -> None:
        server = await asyncio.start_server(connection, "127.0.0.1", 0, backlog=1024)
        port.send(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    asyncio.run(run())


def preferred(body: dict[str, Any]) -> str:
    """The slot of the longer answer; of two of one length, of the one that sorts first, whichever order is shown."""
    said = {m["slot"]: m["text"] for m in QUOTE.finditer(body["messages"][-1]["content"])}
    return max(said, key=lambda slot: (len(said[slot]), said[slot]))


def make_project(root: Path, models: bool) -> None:
    """Text, prompts and templates in a folder, and a model where one computes."""
    root.mkdir(parents=True, exist_ok=True)
    write_texts(root, 1)
    shutil.copytree(ROOT / "prompts" / "judge", root / "prompts" / "judge", dirs_exist_ok=True)
    for name, count, word in (("train", 400, 4), ("held_out", 16, 9)):
        rows = [
            {"id": f"{name}{i}", "prompt": f"w{3 + i % 50} w{3 + 7 * i % 50} w{3 + i // 50} w{word}"}
            for i in range(count)
        ]
        (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if models:
        from tests.sampling.conftest import make_model

        make_model(root / "model", seed=0)


def make_job(root: Path, url: str, iterations: int, changes: dict[str, Any]) -> Job:
    """The measured job with some settings changed."""
    model = root / "model"  # where workers wait there is none, and nobody looks for one on a hub
    tree = json.loads(json.dumps(MEASURED)) | {"iterations": iterations}
    tree["policy"] = {"model": str(model) if model.exists() else "nobody/waiting"}
    if not model.exists():  # `WaitingSampler` has all answers under way, as vLLM has
        tree["sampling"]["engine"] = "vllm"
    for key, value in changes.items():
        tree[key] = {**tree.get(key, {}), **value} if isinstance(value, dict) else value
    tree["judge"]["base_url"] = url
    return parse_job(tree, "benchmark")


def measured(job: Job, root: Path, name: str, given: argparse.Namespace) -> float:
    """Runs a job; seconds an iteration."""
    clock, path = Clock(), root / "runs" / name
    shutil.rmtree(path, ignore_errors=True)
    if given.models:
        from rlaif.loop.launch import execute

        execute(job, path, root, clock)
    else:
        waiting_run(job, path, root, clock, given.latency)
    return clock.iteration_s


def predicted(job: Job, root: Path, setup: Setup) -> float:
    """The same, simulated."""
    return simulate(work_of(job, root), setup).iteration_s


def compare(root: Path, url: str, given: argparse.Namespace) -> list[Outcome]:
    """Measures one run, predicts the others, then runs them."""
    make_project(root, given.models)
    os.chdir(root)

    def job(n: int, changes: dict[str, Any]) -> Job:
        return make_job(root, url, n, changes)

    def measure(name: str) -> tuple[Setup, Outcome]:
        found = measured(job(given.iterations, {}), root, name, given)
        setup = read_cluster(root / "runs" / name)
        return setup, Outcome(f"{name}, by its own rates", predicted(job(given.iterations, {}), root, setup), found)

    measured(job(1, {}), root, "warm-up", given)  # the first requests of a process import their client
    setup, own = measure("measured")
    out = [own]
    for case in given.only or CASES:
        if given.anew and len(out) > 1:
            setup, own = measure("measured")
            out.append(own)
        changed = job(given.iterations, CASES[case])
        before = predicted(changed, root, setup)
        name = case.replace(" ", "_").replace(",", "")
        out.append(Outcome(case, before, measured(changed, root, name, given)))
        print(f"load {os.getloadavg()[0]:.1f}; {out[-1]} {out[-1].error:+.1%}", file=sys.stderr)
    return out


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--models", action="store_true", help="tiny models that compute, in place of workers that wait")
    parser.add_argument("--latency", type=float, default=0.2, help="median of the judge's replies, seconds")
    parser.add_argument("--iterations", type=int, default=4)
    parser.add_argument("--only", nargs="*", default=[], choices=list(CASES), help="of the predicted runs")
    parser.add_argument("--runs", type=Path, help="folder to work in; a temporary one when absent")
    parser.add_argument("--anew", action="store_true", help="measure before each prediction: a load that changes")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    with judge_server(given.latency) as url, tempfile.TemporaryDirectory() as folder:
        outcomes = compare((given.runs or Path(folder)).resolve(), url, given)
        os.chdir(ROOT)
    if given.json:
        print(json.dumps([{**o._asdict(), "error": o.error} for o in outcomes], indent=1))
    else:
        print(f"{'run':<26}{'predicted':>11}{'measured':>11}{'off by':>9}")
        for o in outcomes:
            print(f"{o.case:<26}{o.predicted_s:>9.2f} s{o.measured_s:>9.2f} s{o.error:>+9.1%}")
    if any(abs(o.error) > TARGET for o in outcomes):
        raise SystemExit(f"a prediction is off by more than {TARGET:.0%}")


if __name__ == "__main__":
    main()
