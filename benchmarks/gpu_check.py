"""Does everything that computes say the same on a GPU as on the CPU? `make gpu-check`, in under five minutes.

In: random models of a dozen architectures, made here; no network. Out: a table, and exit code 1 when something is off.
Two processes compute the same numbers, one that sees no GPU and one that does:

- the learner's contract: log-probabilities as given, the losses of two steps, log-probabilities after them, and a step
  after save, load and a rest (of both learners where the model is the Llama);
- the likelihood judge, after a rest: log-probabilities of answers, and a guard's relevance;
- the hand-over: train, export, load, compare, load the model again, compare, with the `transformers` sampler and, where
  vLLM is installed, with vLLM, in fp32 and in bf16; and what the sampler says before and after a rest.

A rest (`device: shared`) has to give a GPU's memory back.

Without a GPU both compute on the CPU: that shows that the check works, and nothing about GPUs.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rlaif.config import Learner, LikelihoodSettings
from rlaif.hardware import facts, gpu_names
from rlaif.judging.candidates import Candidate
from rlaif.records import Message, Preference, TokenSequence
from rlaif.workers.weights import WeightsRef

ROOT = Path(__file__).resolve().parents[1]
ON_VLLM = ("llama-tied", "qwen3-tied", "gemma3", "gpt2", "mixtral", "qwen3-moe")
"""Starting an engine on a GPU takes seconds: those that differ most in how they hold weights."""
KINDS = ("fp32", "bf16", "LoRA")
ON_GPU = {"gpu_memory_utilization": 0.1, "enforce_eager": True}
LIMITS = {"numbers": 2e-3, "fp32": 2e-3, "bf16": 0.1, "LoRA": 2e-3}
"""Nats a token (losses: nats): CPU against GPU in fp32, a sampler in fp32, a sampler in bf16."""


def numbers(folder: Path) -> dict[str, list[float]]:
    """What a learner and a judge make of a model, in fp32, wherever this process computes."""
    from rlaif.judging.likelihood import LikelihoodJudge
    from rlaif.learning import make_learner

    texts = [TokenSequence(prompt_token_ids=(5, 6, 7), token_ids=tuple(range(10 + i, 30 + i))) for i in range(4)]
    pairs = [
        Preference(
            pair_id=str(i), iteration=0, source="judge", constitution="0" * 16, prompt_id=str(i), chosen_id="c",
            rejected_id="r", prompt_token_ids=texts[i].prompt_token_ids, chosen_token_ids=texts[i].token_ids,
            rejected_token_ids=tuple(range(40 + i, 52 + i)), prompt="", chosen="", rejected="", p_chosen=None,
            agreement=None,
        )
        for i in range(4)
    ]  # fmt: skip
    out: dict[str, list[float]] = {}
    for kind in ("dpo", "online_dpo") if folder.name == "llama-tied" else ("dpo",):
        settings = Learner(kind=kind, precision="fp32", learning_rate=1e-3, warmup_steps=0, batch_size=2)
        with tempfile.TemporaryDirectory() as scratch:
            learner = make_learner(kind, str(folder), settings, seed=7, export_precision="fp32")
            out[f"{kind} as given"] = [v for row in learner.logprobs(texts) for v in row]
            out[f"{kind} losses"] = [step.loss for step in learner.update(pairs, 0)]
            made = learner.save(Path(scratch, "state"), Path(scratch, "policy"))
            again = make_learner(kind, str(folder), settings, seed=7)
            again.load(WeightsRef(digest=made.digest, path=Path(scratch, "state")))
            out[f"{kind} after"] = [v for row in again.logprobs(texts) for v in row]
            take_a_rest(again)
            out[f"{kind} goes on"] = [step.loss for step in again.update(pairs, 1)]
    judge = LikelihoodJudge(str(folder), LikelihoodSettings(precision="fp32"))
    take_a_rest(judge)
    answers = [
        Candidate(
            completion_id=str(i), prompt_id=str(i), messages=(Message(role="user", content=f"Question {i}?"),),
            text=f"An answer, number {i}.", finish_reason="stop",
        )
        for i in range(4)
    ]  # fmt: skip
    measured = [q for chunk in judge.quality(answers) for q in chunk]
    out["judge log p"] = [q.logprob_per_token for q in measured]
    out["judge relevance"] = [q.relevance for q in measured]
    return out


def take_a_rest(role: Any) -> None:
    """Gives its memory back, and takes it again.

    Raises:
        RuntimeError: nothing was given back.
    """
    import torch

    before = torch.cuda.memory_allocated() if torch.cuda.is_available() else 1
    role.rest()
    if (torch.cuda.memory_allocated() if torch.cuda.is_available() else 0) >= before:
        raise RuntimeError("a rest gave no memory back")
    role.wake()


def hand_overs(engine: str, trained: Path) -> dict[str, float]:
    """The largest `typical` gap of three loads, by what was trained (`tests/hand_over_makers.py`)."""
    from rlaif.loop.deep_check import Trained, compare
    from tests.hand_over_makers import sampler

    found: dict[str, float] = {}
    for kind in KINDS:
        made = Trained.model_validate_json((trained / kind / "trained.json").read_text())
        model = trained / kind / "model"
        try:
            with sampler(engine, model, "bf16" if kind == "bf16" else "fp32", rests=True, **ON_GPU) as worker:
                found[kind] = max(row.gap.typical for row in compare(worker, model, made, limit=0.02))
                before = worker.call("logprobs", sequences=list(made.texts))
                worker.call("rest")
                worker.call("wake")
                after = worker.call("logprobs", sequences=list(made.texts))
                rested = max(abs(a - b) for x, y in zip(before, after, strict=True) for a, b in zip(x, y, strict=True))
                found[kind] = max(found[kind], rested)
        except Exception as e:  # one that fails is a row, not the end of the table
            print(f"{engine} {trained.name} {kind}: {type(e).__name__}: {' '.join(str(e).split())[:300]}", flush=True)
            found[kind] = float("inf")
        gc.collect()  # vLLM's engine that sleeps wants to be the only one of its process
    return found


def child(part: str, names: list[str], out: Path, trained: Path) -> None:
    """Computes one part for each architecture; writes after each, so that a limit costs only what is missing."""
    from tests.architectures import make_model

    done: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for name in names:
            started = time.monotonic()
            try:
                if part == "numbers":
                    done[name] = numbers(make_model(name, Path(scratch) / name))
                else:
                    done[name] = hand_overs(part, trained / name)
            except Exception as e:
                done[name] = {"error": f"{type(e).__name__}: {e}"}
            out.write_text(json.dumps(done))
            print(f"{part} {name}: {time.monotonic() - started:.1f} s", flush=True)


def run_child(module: str, arguments: list[str], limit_s: float, gpu: bool = True) -> None:
    """A part in a process of its own, for at most so long; what the libraries say on stderr is theirs."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | ({} if gpu else {"CUDA_VISIBLE_DEVICES": ""})
    command = [sys.executable, "-m", module, *arguments]
    started = time.monotonic()
    try:
        done = subprocess.run(command, cwd=ROOT, env=environment, timeout=limit_s, stderr=subprocess.PIPE, check=False)
    except subprocess.TimeoutExpired:
        print(f"{' '.join(arguments[:2])}: stopped after {limit_s:.0f} s (--limit)", flush=True)
    else:
        said = done.stderr.decode(errors="replace").strip().splitlines()
        if done.returncode:
            print(f"{' '.join(arguments[:2])}: exit code {done.returncode}, {said[-1] if said else ''}", flush=True)
        print(f"{' '.join(arguments[:2])}: {time.monotonic() - started:.0f} s", flush=True)


def read(path: Path) -> dict[str, Any]:
    """What a part had written when it ended or was stopped."""
    return dict(json.loads(path.read_text())) if path.exists() else {}


def worst(a: dict[str, list[float]], b: dict[str, list[float]]) -> dict[str, float]:
    """The largest difference by what was computed."""
    return {key: max(abs(x - y) for x, y in zip(a[key], b[key], strict=True)) for key in a}


def main() -> int:
    """Prints the tables; 1 when a number is over its limit or missing."""
    from rich.console import Console
    from rich.table import Table

    from tests.architectures import ARCHITECTURES

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="architectures; all when absent")
    parser.add_argument("--limit", type=float, default=100.0, help="seconds for each part")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--trained", type=Path, default=Path(), help=argparse.SUPPRESS)
    args = parser.parse_args()
    names = args.names or list(ARCHITECTURES)
    if args.child:
        child(args.child, names, args.out, args.trained)
        return 0
    print(json.dumps(facts()), flush=True)
    if not gpu_names():
        print("no GPU here: both sides compute on the CPU, which shows that the check works and nothing about GPUs")
    engines = ["transformers"] + (["vllm"] if importlib.util.find_spec("vllm") else [])
    with tempfile.TemporaryDirectory(prefix="rlaif-gpu-check-") as scratch:
        here, this = Path(scratch), "benchmarks.gpu_check"
        for side, gpu in (("cpu", False), ("gpu", True)):
            print(f"numbers on the {side}", flush=True)
            run_child(this, ["--child", "numbers", "--out", f"{scratch}/{side}.json", *names], args.limit, gpu)
        print("training for the hand-overs", flush=True)
        run_child("tests.hand_over_makers", [scratch, *names], args.limit)
        for engine in engines:
            some = [n for n in names if engine != "vllm" or n in ON_VLLM]
            print(f"hand-overs to {engine}", flush=True)
            arguments = ["--child", engine, "--out", f"{scratch}/{engine}.json", "--trained", scratch, *some]
            run_child(this, arguments, args.limit)
        cpu_numbers, gpu_numbers = read(here / "cpu.json"), read(here / "gpu.json")
        over = {engine: read(here / f"{engine}.json") for engine in engines}
    bad = 0
    table = Table("architecture", "CPU against GPU", "worst of", *(f"{e}: fp32, bf16, LoRA" for e in engines), "")
    for name in names:
        cells, fine = [], True
        if name in cpu_numbers and name in gpu_numbers and "error" not in cpu_numbers[name] | gpu_numbers[name]:
            apart = worst(cpu_numbers[name], gpu_numbers[name])
            key = max(apart, key=lambda k: apart[k])
            fine &= apart[key] <= LIMITS["numbers"]
            cells += [f"{apart[key]:.5f}", key]
        else:
            fine = False
            cells += ["-", str((cpu_numbers.get(name) or gpu_numbers.get(name) or {}).get("error", "not reached"))[:60]]
        for engine in engines:
            if engine == "vllm" and name not in ON_VLLM:
                cells.append("")
                continue
            gaps = over[engine].get(name, {})
            fine &= set(gaps) == set(KINDS) and all(gap <= LIMITS[kind] for kind, gap in gaps.items())
            cells.append("  ".join(f"{gaps[kind]:.5f}" for kind in KINDS if kind in gaps) or "not reached")
        bad += not fine
        table.add_row(name, *cells, "ok" if fine else "OFF")
    Console(width=140).print(table)
    print(f"{len(names) - bad} of {len(names)} architectures agree; limits in nats: {LIMITS}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
