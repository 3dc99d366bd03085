"""Whether servers answer as the engine inside does: `python -m benchmarks.servers`.

    python -m benchmarks.servers [--prompts 24] [--servers 2] [--threads 1]

In: the shipped prompts, four completions of 64 tokens for each, the same seeds. Out: how many samples and tokens are
equal, how far log-probabilities are apart, and how long it took, first with vLLM's engine in the worker and then with
servers that the worker starts (`sampling.engine: server`). All in fp32, each engine with as many threads. Beside wall
time stands processor time, since a busy machine stretches the former.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import psutil

from rlaif.config import Sampling
from rlaif.data.prompts import load_prompts
from rlaif.models import resolve
from rlaif.records import Completion, PolicyVersion, Prompt, TokenSequence
from rlaif.workers.process import ProcessWorker

MODEL = "embedded:smollm2-135m-instruct"
PROMPTS = "prompts/everyday.jsonl"
ROOT = Path(__file__).resolve().parents[1]
COMPLETIONS = 4
SETTINGS: dict[str, Any] = {"max_tokens": 64, "max_model_len": 512, "precision": "fp32"}


class Sampled(NamedTuple):
    """What an engine made of the prompts."""

    completions: dict[str, Completion]
    """By id."""
    start_s: float
    wall_s: float
    """Of the sampling alone, as the next."""
    processor_s: float


class Alike(NamedTuple):
    """Two engines' answers to the same requests, compared."""

    equal: float
    """Share of samples with the same tokens."""
    before: float
    """Share of the first engine's tokens that stand before the first difference."""
    mean_apart: float
    """Mean of |log p - log p| of a token, in nats: that of each equal sample, by its tokens."""
    most_apart: float
    """The largest of them."""


def alike(wanted: dict[str, Completion], found: dict[str, Completion]) -> Alike:
    """Holds one engine's answers, by id, against another's."""
    pairs = [(w, found[name]) for name, w in wanted.items()]
    same = [(w, f) for w, f in pairs if w.token_ids == f.token_ids]
    both = [(w.logprob, f.logprob, len(w.token_ids)) for w, f in same]
    apart = [abs(x - y) / tokens for x, y, tokens in both if x is not None and y is not None]  # sampled ones have it
    before = sum(in_common(w.token_ids, f.token_ids) for w, f in pairs)
    return Alike(
        equal=len(same) / len(pairs),
        before=before / sum(len(w.token_ids) for w, _ in pairs),
        mean_apart=mean(apart) if apart else float("nan"),
        most_apart=max(apart, default=float("nan")),
    )


def in_common(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two answers begin with alike."""
    return next((n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def sampled(worker: ProcessWorker, prompts: list[Prompt]) -> Sampled:
    """Starts an engine and asks it."""
    started = time.monotonic()
    worker.ready()
    start_s = time.monotonic() - started
    began, busy = time.monotonic(), processor_s(worker.pid)
    asked: dict[str, Any] = {
        "seed": 0,
        "iteration": 0,
        "prefix": "0000",
        "policy": PolicyVersion(iteration=0, digest=""),
    }
    chunks = worker.stream("sample", prompts=prompts, completions_per_prompt=COMPLETIONS, **asked)
    found = {c.id: c for chunk in chunks for c in chunk}
    return Sampled(found, start_s, time.monotonic() - began, processor_s(worker.pid) - busy)


def processor_s(pid: int) -> float:
    """What a process and all that it started have used so far."""
    me = psutil.Process(pid)
    times = [p.cpu_times() for p in (me, *me.children(recursive=True))]
    return sum(t.user + t.system for t in times)


def engine(model: Path, logs: Path, threads: int, **settings: Any) -> ProcessWorker:
    """A sampler as a run has it, but for its number of threads."""
    name = settings.get("engine", "vllm")
    kwargs = {"model_path": str(model), "settings": Sampling.model_validate(SETTINGS | settings), "logs": logs}
    few = {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    return ProcessWorker("sampler", "rlaif.sampling.role:make", kwargs, logs / f"{name}.log", few)


def main(arguments: list[str] | None = None) -> None:
    """Prints the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--servers", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args(arguments)
    model, prompts = resolve(MODEL), load_prompts(PROMPTS, ROOT)[: given.prompts]
    with tempfile.TemporaryDirectory(prefix="rlaif-servers-") as logs:
        with engine(model, Path(logs), given.threads) as worker:
            inside = sampled(worker, prompts)
            texts = [
                TokenSequence(prompt_token_ids=c.prompt_token_ids, token_ids=c.token_ids)
                for c in inside.completions.values()
            ]
            read = worker.call("logprobs", sequences=texts)
        with engine(model, Path(logs), given.threads, engine="server", replicas=given.servers) as worker:
            servers = sampled(worker, prompts)
            read_there = worker.call("logprobs", sequences=texts)
    found = alike(inside.completions, servers.completions)
    apart = [abs(x - y) for a, b in zip(read, read_there, strict=True) for x, y in zip(a, b, strict=True)]
    tokens = sum(len(c.token_ids) for c in inside.completions.values())
    print(f"{len(inside.completions)} samples, {tokens} tokens of the engine inside")
    print(f"equal samples                        {found.equal:.3f}")
    print(f"tokens before the first that differs {found.before:.3f}")
    print(f"log p of equal samples, by token     {found.mean_apart:.1e} nats apart, at most {found.most_apart:.1e}")
    print(f"log p of the same texts, by token    {mean(apart):.1e} nats apart, at most {max(apart):.1e}")
    for name, it in (("inside", inside), (f"{given.servers} servers", servers)):
        took = f"sampled in {it.wall_s:.1f} s ({it.processor_s:.1f} s of processor)"
        print(f"{name:10} started in {it.start_s:.0f} s, {took}")


if __name__ == "__main__":
    main()
