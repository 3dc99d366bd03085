"""How fast the loop is, beside TRL's trainer and two limits: `make bench`.

In: prompts, a model, a judge whose preferences cost nothing. Out: seconds by stage, tokens a second, ratios. Parts run
one after another, each in a process of its own, on the same prompts:

- `loop`: one whole iteration of `rlaif.loop.Loop` with its sampler and learner workers, as `rlaif run` does it: the
  last iteration's weights into vLLM, sampling, voting, deciding, update, state and weights written. Guards are asked of
  the frozen base policy, as in any run with the likelihood judge. What they find is the update's reference, which
  therefore isn't computed again. Seconds of the judge are shown, and counted on no side: TRL's judge is free, too.
- `vllm`: the same requests straight to `vllm.LLM.generate`, the limit for sampling. Once more without top-p, which
  vLLM's CPU sampler pays for by sorting the vocabulary.
- `bare`: PyTorch on the token batches that the loop trained on, the limit for the update. Policy in fp32, under bf16
  autocast where the loop takes it, one forward without gradient (the reference), one forward and backward of the DPO
  loss; the vocabulary is projected for completion tokens only, as in the loop. No clipping, optimizer, metrics or
  records: Adam is timed apart.
- `trl_tuned_fp32` and `trl_tuned_bf16`: TRL's `OnlineDPOTrainer` with transformers generation and without gradient
  checkpointing, with which generation has no KV cache, in fp32 and under bf16 autocast. The faster one is what somebody
  who knows TRL well gets, and the peer that counts.
- `trl`: the same, stock: TRL's defaults but for a completion's length.

Peers compute in what the machine multiplies: TRL takes bf16 by itself, which is many times slower than fp32 where the
hardware has none. There stock TRL runs in fp32, and no part in bf16.

Files are written twice: the loop's state and policy, and once more as many bytes in plain writes, the disk's limit.
Each part starts with one batch that is not counted. A part that fails, or runs into `--limit`, costs its figures and
what is computed from them; the others are reported.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import Field

from rlaif.config import Job, Prompts, parse_job
from rlaif.errors import RlaifError, UserError
from rlaif.hardware import precision_here, torch_dtype
from rlaif.records import (
    Ballot,
    Completion,
    IterationMetrics,
    Pair,
    Preference,
    Prompt,
    Quality,
    Record,
    UpdateStep,
    Vote,
)
from rlaif.workers.feed import Feed
from rlaif.workers.worker import Worker

ROOT = Path(__file__).resolve().parents[1]
MODEL = "embedded:smollm2-135m-instruct"
BATCH = 8
MAX_TOKENS = 64
LEARNING_RATE = 5e-7
"""TRL's default for online DPO; too small to change a bf16 weight, so all parts sample from the same policy."""
AIM_TRL, AIM_TUNED, AIM_SAMPLING, AIM_UPDATE = 3.0, 1.6, 0.9, 1.2
"""At least."""
AIM_OUTSIDE = 0.05
"""At most."""
LIMIT_S = 900.0
"""For a part, its start included."""
BEAT_S = 20.0
"""How often a part at work is told of."""


# What is measured.


class LoopTimes(Record):
    """One iteration of the loop. Seconds that the loop waited for a worker; `seconds` is the whole iteration."""

    seconds: float
    load_s: float
    sample_s: float
    judge_s: float
    """The guards'; on no side of any ratio."""
    reference_s: float
    """What the update computed of it: some answers, held against the guards'."""
    steps_s: float
    """Forward, backward, clipping, Adam and metrics of all steps."""
    save_s: float
    disk_s: float
    """As many bytes written plainly, after the iteration; no part of it."""
    tokens: int
    """Completion tokens sampled."""
    checks_s: float = 0.0
    """Other questions to sampler and learner: whether both hold the same weights."""
    pairs: int
    """Pairs trained on."""
    steps: int

    @property
    def counted_s(self) -> float:
        """The iteration without its judge."""
        return self.seconds - self.judge_s

    @property
    def arithmetic_s(self) -> float:
        """Sampling, reference and update steps."""
        return self.sample_s + self.reference_s + self.steps_s

    @property
    def rest_s(self) -> float:
        """Everything that no worker was asked for: the loop's own work, records and fsync."""
        return self.counted_s - self.arithmetic_s - self.load_s - self.save_s - self.checks_s


class TrlTimes(Record):
    """The same prompts through TRL's trainer."""

    seconds: float
    sample_s: float
    tokens: int
    steps: int
    precision: str
    """What it computed in."""


class VllmTimes(Record):
    """The same requests straight to vLLM."""

    seconds: float
    tokens: int
    seconds_without_top_p: float
    tokens_without_top_p: int


class BareTimes(Record):
    """The same token batches in plain PyTorch."""

    reference_s: float
    forward_backward_s: float
    adam_s: float
    """Clipping and AdamW; no part of the limit."""


class Report(Record):
    """All parts and what follows from them. A part that isn't there is in `missing`, and so is why."""

    prompts: int
    cores: int
    busy: dict[str, float]
    """Load average (1 minute) before each part started: well above 0 means that others used the machine."""
    missing: dict[str, str] = Field(default_factory=dict)
    loop: LoopTimes | None = None
    vllm: VllmTimes | None = None
    bare: BareTimes | None = None
    trl_tuned_fp32: TrlTimes | None = None
    trl_tuned_bf16: TrlTimes | None = None
    trl: TrlTimes | None = None

    @property
    def tuned(self) -> TrlTimes | None:
        """TRL without gradient checkpointing, at its faster precision."""
        both = [t for t in (self.trl_tuned_fp32, self.trl_tuned_bf16) if t is not None]
        return max(both, key=lambda t: _rate(t.tokens, t.seconds), default=None)

    @property
    def ratio_to_tuned_trl(self) -> float | None:
        """Completion tokens a second of a whole iteration but for its judge, over tuned TRL's."""
        return self._ratio_to(self.tuned)

    @property
    def ratio_to_trl(self) -> float | None:
        """The same, over stock TRL's."""
        return self._ratio_to(self.trl)

    def _ratio_to(self, peer: TrlTimes | None) -> float | None:
        if self.loop is None or peer is None:
            return None
        return _rate(self.loop.tokens, self.loop.counted_s) / _rate(peer.tokens, peer.seconds)

    @property
    def sampling_vs_vllm(self) -> float | None:
        """Tokens a second, over vLLM's on the same requests."""
        if self.loop is None or self.vllm is None:
            return None
        return _rate(self.loop.tokens, self.loop.sample_s) / _rate(self.vllm.tokens, self.vllm.seconds)

    @property
    def sampling_vs_vllm_without_top_p(self) -> float | None:
        """Tokens a second with top-p, over vLLM's without: a limit that does less work than was asked for."""
        if self.loop is None or self.vllm is None:
            return None
        alone = _rate(self.vllm.tokens_without_top_p, self.vllm.seconds_without_top_p)
        return _rate(self.loop.tokens, self.loop.sample_s) / alone

    @property
    def update_vs_bare(self) -> float | None:
        """Seconds of bare forward and backward, over the update's (reference, steps, Adam, metrics)."""
        if self.loop is None or self.bare is None:
            return None
        return (self.bare.reference_s + self.bare.forward_backward_s) / (self.loop.reference_s + self.loop.steps_s)

    @property
    def outside(self) -> float | None:
        """Share of the iteration that is not sampling, reference or steps: weights moved and checked, records."""
        return None if self.loop is None else 1 - self.loop.arithmetic_s / self.loop.counted_s

    def ratios(self) -> dict[str, float | None]:
        """The figures by name, as `--json` prints them."""
        return {
            "ratio_to_trl_tuned": self.ratio_to_tuned_trl,
            "ratio_to_trl_stock": self.ratio_to_trl,
            "sampling_vs_vllm_alone": self.sampling_vs_vllm,
            "sampling_vs_vllm_without_top_p": self.sampling_vs_vllm_without_top_p,
            "update_vs_bare_pytorch": self.update_vs_bare,
            "outside_model_arithmetic": self.outside,
        }


def render(report: Report) -> str:
    """The report as people read it, the ratio that counts first."""
    loop, vllm, bare, tuned, trl = report.loop, report.vllm, report.bare, report.tuned, report.trl
    busy = ", ".join(f"{part} {load:.1f}" for part, load in report.busy.items())

    def of(part: Any, value: Callable[[Any], float]) -> float | None:
        return None if part is None else value(part)

    both = (tuned, trl)
    rows: list[tuple[Any, ...]] = [
        ("iteration without judge", of(loop, lambda x: x.counted_s), *(of(t, lambda x: x.seconds) for t in both), None),
        ("  weights into the sampler", of(loop, lambda x: x.load_s), None, None, None),
        ("  sampling", *(of(x, lambda x: x.sample_s) for x in (loop, *both)), of(vllm, lambda x: x.seconds)),
        ("  update: reference", of(loop, lambda x: x.reference_s), None, None, of(bare, lambda x: x.reference_s)),
        ("  update: steps", of(loop, lambda x: x.steps_s), *(of(t, lambda x: x.seconds - x.sample_s) for t in both),
         of(bare, lambda x: x.forward_backward_s)),
        ("  state and weights written", of(loop, lambda x: x.save_s), None, None, of(loop, lambda x: x.disk_s)),
        ("  weights checked", of(loop, lambda x: x.checks_s), None, None, None),
        ("  rest", of(loop, lambda x: x.rest_s), None, None, None),
        ("judge: guards", of(loop, lambda x: x.judge_s), None, None, None),
    ]  # fmt: skip
    rates: list[tuple[Any, ...]] = [
        ("completion tokens", *(of(x, lambda x: x.tokens) for x in (loop, *both, vllm))),
        ("tokens/s, sampling", *(of(x, lambda x: _rate(x.tokens, x.sample_s)) for x in (loop, *both)),
         of(vllm, lambda x: _rate(x.tokens, x.seconds))),
        ("tokens/s, without judge", of(loop, lambda x: _rate(x.tokens, x.counted_s)),
         *(of(x, lambda x: _rate(x.tokens, x.seconds)) for x in both), None),
    ]  # fmt: skip
    pairs = f"{loop.pairs} pairs in batches of {BATCH}, " if loop else ""
    over_tuned = report.ratio_to_tuned_trl
    lines = [
        *_figure("ratio to TRL tuned", over_tuned, "{:.2f}x", (over_tuned or 0) >= AIM_TUNED, f">= {AIM_TUNED:g}"),
        f"{report.prompts} prompts x 2 completions of at most {MAX_TOKENS} tokens, {pairs}{report.cores} cores; load "
        f"average before each part: {busy}",
        "",
        f"{'seconds':28}{'this loop':>11}{'TRL tuned':>11}{'TRL stock':>11}{'limit':>11}",
        *(_row(name, values, ".2f") for name, *values in rows),
        "",
        *(_row(name, values, ".0f") for name, *values in rates),
        "",
    ]
    if tuned:
        other = "its faster precision here" if report.trl_tuned_fp32 and report.trl_tuned_bf16 else "the one measured"
        lines.append(f"TRL tuned: no gradient checkpointing, in {tuned.precision}, {other}.")
    if trl:
        asked = "" if trl.precision == "bf16" else ", but for bf16, which this machine doesn't multiply"
        lines.append(f"TRL stock: its defaults, in {trl.precision}{asked}; with gradient checkpointing it generates "
                     "without a cache.")  # fmt: skip
    lines.append(
        "TRL's steps include reference and Adam. Limits: vLLM alone for sampling, plain writes for what is saved."
    )
    if bare:
        lines.append("For the update, bare PyTorch forward and backward "
                     f"(clipping and Adam, {bare.adam_s:.2f} s bare, are not in it).")  # fmt: skip
    if vllm:
        beside = report.sampling_vs_vllm_without_top_p
        lines.append(
            f"vLLM alone without top-p: {_rate(vllm.tokens_without_top_p, vllm.seconds_without_top_p):.0f} tokens/s"
            + ("" if beside is None else f" (this loop, with it: {beside:.2f} of that)")
        )
    stock, sampling, update, outside = (
        report.ratio_to_trl, report.sampling_vs_vllm, report.update_vs_bare, report.outside
    )  # fmt: skip
    lines += [
        *(f"not measured: {part} ({why})" for part, why in report.missing.items()),
        "",
        *_figure("ratio to TRL stock", stock, "{:.2f}x", (stock or 0) >= AIM_TRL, f">= {AIM_TRL:g}"),
        *_figure("sampling vs vLLM alone", sampling, "{:.2f}", (sampling or 0) >= AIM_SAMPLING, f">= {AIM_SAMPLING:g}"),
        *_figure("update vs bare PyTorch", update, "{:.2f}", (update or 0) >= AIM_UPDATE, f">= {AIM_UPDATE:g}"),
        *_figure(
            "outside model arithmetic",
            None if outside is None else 100 * outside,
            "{:.1f} %",
            (outside or 0) <= AIM_OUTSIDE,
            f"<= {100 * AIM_OUTSIDE:g} %",
        ),
    ]
    return "\n".join(lines)


def _figure(name: str, value: float | None, form: str, met: bool = True, aim: str = "") -> list[str]:
    """A figure's line, with its aim where it has one; none when there is no figure."""
    if value is None:
        return []
    said = f"{name}: {form.format(value)}"
    return [said + (_verdict(met, aim) if aim else "")]


def _verdict(met: bool, aim: str) -> str:
    return f"   (aim {aim}{'' if met else ': missed'})"


def _row(name: str, values: list[float | None], form: str) -> str:
    return (f"{name:28}" + "".join(f"{'' if v is None else format(v, form):>11}" for v in values)).rstrip()


def _rate(tokens: int, seconds: float) -> float:
    return tokens / seconds


# The judge that costs nothing.


def preference_of(text: str) -> str:
    """What decides between two texts: the greater digest wins, whichever side it is on."""
    return hashlib.sha256(text.encode()).hexdigest()


class FreeJudge:
    """A judge worker that prefers by a hash of the text: consistent, and without a model. A likelihood judge that it is
    given is asked the guards' questions, and says how likely each answer is."""

    def __init__(self, guards: Any = None) -> None:
        self._guards = guards

    def score(self, **_: Any) -> Iterator[list[Any]]:
        """Nothing: pairs are random here."""
        yield from ()

    def quality(self, candidates: list[Any], **_: Any) -> Iterator[list[Quality]]:
        """Zeros: the loop evaluates the base policy on one prompt before it starts, nobody reads the result."""
        yield [Quality(completion_id=c.completion_id, tokens=1, logprob_per_token=0, relevance=0) for c in candidates]

    def cast(
        self, ballots: list[Ballot], pairs: list[Pair], candidates: list[Any], **given: Any
    ) -> Iterator[list[Vote]]:
        """All votes of a pair name the same side, guards included: every pair is kept."""
        value = {c.completion_id: preference_of(c.text) for c in candidates}
        first = {p.id: value[p.first] > value[p.second] for p in pairs}

        def said(ballot: Ballot) -> dict[str, Any]:
            outcome = "first" if first[ballot.pair_id] else "second"
            return {"outcome": outcome, "p_first": float(first[ballot.pair_id]), "raw_reply": outcome}

        guards = [b for b in ballots if b.guard] if self._guards else []
        free = [b for b in ballots if not (b.guard and self._guards)]
        yield [Vote.model_validate({"ballot": ballot, "model": "hash", **said(ballot)}) for ballot in free]
        if guards:
            for chunk in self._guards.cast(guards, pairs, candidates, **given):
                yield [vote.model_copy(update=said(vote.ballot)) for vote in chunk]


def make_judge(**guards: Any) -> FreeJudge:
    """Factory for a worker process; `guards` are the arguments of the likelihood judge."""
    from rlaif.judging import likelihood

    return FreeJudge(likelihood.make(**guards))


# The parts. Each runs in its own process and prints one JSON object to a file.


class _Timed(Worker):
    """A worker, and how long its caller waited for each method."""

    def __init__(self, worker: Worker, waited: dict[str, float]) -> None:
        self.name = worker.name
        self._worker = worker
        self._waited = waited

    def poll(self, timeout_s: float) -> bool:
        return self._worker.poll(timeout_s)

    def ready(self) -> None:
        self._worker.ready()

    def call(self, method: str, **kwargs: Any) -> Any:
        started = time.perf_counter()
        try:
            return self._worker.call(method, **kwargs)
        finally:
            self._waited[method] += time.perf_counter() - started

    def stream(self, method: str, feed: Feed | None = None, **kwargs: Any) -> Iterator[Any]:
        items = self._worker.stream(method, feed=feed, **kwargs)
        while True:
            started = time.perf_counter()
            item = next(items, None)
            self._waited[method] += time.perf_counter() - started
            if item is None:
                return
            yield item

    def close(self) -> None:
        self._worker.close()


class _Notes:
    """A `Progress` that prints stages and what is noted."""

    def stage(self, iteration: int, name: str, total: int, unit: str, text: str) -> None:
        print(f"{'warm-up' if iteration == 0 else 'measured iteration'}: {name}, {total} {unit}", flush=True)

    def advance(self, n: int) -> None: ...
    def iteration_done(self, iteration: int, metrics: IterationMetrics) -> None: ...
    def note(self, message: str) -> None:
        print(message, flush=True)


def job_for(prompts: int) -> Job:
    """The measured job: the defaults, but for what the work says. A third iteration that never runs keeps the
    evaluation after the last one out."""
    return parse_job(
        {
            "iterations": 3,
            "constitution": "assistant@1",
            "policy": {"model": MODEL},
            "prompts": {"per_iteration": prompts},
            "sampling": {"completions_per_prompt": 2, "max_tokens": MAX_TOKENS},
            "pairing": {"method": "random"},
            "filters": {"min_kept_pairs": 1},
            "learner": {"batch_size": BATCH, "learning_rate": LEARNING_RATE, "warmup_steps": 0},
            "eval": {"every": 1000, "prompts": 1},
        },
        "benchmarks/loop.py",
    )


def part_loop(work: Path, model: Path, prompts: list[Prompt]) -> LoopTimes:
    """One iteration of the loop, after a short one that is not counted."""
    from contextlib import ExitStack, closing

    from rlaif.loop import Loop
    from rlaif.loop.in_force import InForce
    from rlaif.models import digest_of
    from rlaif.rundir.store import RunDir
    from rlaif.workers.start import start_worker
    from rlaif.workers.weights import WeightsRef

    job = job_for(len(prompts))
    warm_up = job.model_copy(update={"prompts": Prompts(per_iteration=BATCH)})
    run = RunDir(work / "run")
    waited: dict[str, float] = defaultdict(float)
    with ExitStack() as stack:
        stack.enter_context(run.lock())
        workers = {
            name: _Timed(
                stack.enter_context(
                    closing(start_worker("process", name, factory, kwargs, run.path / "logs" / f"{name}.log"))
                ),
                waited,
            )
            for name, factory, kwargs in (
                ("sampler", "rlaif.sampling.role:make", {"model_path": str(model), "settings": job.sampling}),
                ("judge", "benchmarks.loop:make_judge", {"model_path": str(model), "settings": job.judge}),
                ("learner", "rlaif.learning:make", {"model_path": str(model), "settings": job.learner, "seed": 0}),
            )
        }  # fmt: skip
        loop = Loop(
            warm_up,
            run,
            InForce(job, run, ROOT),
            train=prompts,
            held_out=prompts[:1],
            base=WeightsRef(digest=digest_of(model), path=model),
            judge_name="hash",
            measurer=workers["judge"],
            progress=_Notes(),
            sampler=workers["sampler"],
            judge=workers["judge"],
            learner=workers["learner"],
        )
        loop.iterate(0)
        waited.clear()
        loop.job = job
        started = time.perf_counter()
        loop.iterate(1)
        seconds = time.perf_counter() - started
    here = run.iteration(1)
    written = [*(run.path / "learner" / "0001").iterdir(), *(here.path / "policy").iterdir()]
    disk_s = _plain_writes(work / "plain", sum(f.stat().st_size for f in written))
    steps = here.read("updates", UpdateStep)
    steps_s = sum(s.seconds for s in steps)
    of_stages = {"load", "sample", "cast", "update", "save"}
    return LoopTimes(
        seconds=seconds,
        load_s=waited["load"],
        sample_s=waited["sample"],
        judge_s=waited["cast"],
        reference_s=waited["update"] - steps_s,
        steps_s=steps_s,
        save_s=waited["save"],
        checks_s=sum(s for method, s in waited.items() if method not in of_stages),
        disk_s=disk_s,
        tokens=sum(len(c.token_ids) for c in here.read("completions", Completion)),
        pairs=len(here.read("preferences", Preference)),
        steps=len(steps),
    )


def _plain_writes(path: Path, size: int) -> float:
    """Seconds to write `size` bytes in blocks; the file is removed."""
    block = os.urandom(2**24)
    started = time.perf_counter()
    with path.open("wb") as f:
        for at in range(0, size, len(block)):
            f.write(block[: size - at])
    seconds = time.perf_counter() - started
    path.unlink()
    return seconds


def part_vllm(work: Path, model: Path, prompts: list[Prompt]) -> VllmTimes:
    """The loop's own requests, in the loop's order, through `LLM.generate`. Same engine settings as the sampler."""
    from rlaif.rundir.store import RunDir
    from rlaif.sampling.vllm import ENVIRONMENT, MAX_SEQUENCES
    from rlaif.sampling.vllm_compat import forget_prompts, on_cpu

    os.environ.update(ENVIRONMENT)
    from vllm import LLM, SamplingParams

    settings = job_for(len(prompts)).sampling
    cpu = {"kv_cache_memory_bytes": int(settings.kv_cache_gib * 2**30), "block_size": 32, "enforce_eager": True}
    gpu = {"gpu_memory_utilization": settings.gpu_memory_utilization}
    llm = LLM(
        model=str(model),
        dtype=torch_dtype(settings.precision),
        max_model_len=settings.max_model_len,
        max_num_seqs=MAX_SEQUENCES,
        disable_log_stats=True,
        **(cpu if on_cpu() else gpu),
    )
    completions = RunDir(work / "run").iteration(1).read("completions", Completion)

    def generate(some: list[Completion], top_p: float) -> tuple[float, int]:
        params = [
            SamplingParams(max_tokens=settings.max_tokens, temperature=settings.temperature, top_p=top_p, seed=c.seed)
            for c in some
        ]
        forget_prompts(llm)
        started = time.perf_counter()
        outputs = llm.generate([{"prompt_token_ids": list(c.prompt_token_ids)} for c in some], params, use_tqdm=False)
        return time.perf_counter() - started, sum(len(o.outputs[0].token_ids) for o in outputs)

    generate(completions[: 2 * BATCH], settings.top_p)
    seconds, tokens = generate(completions, settings.top_p)
    without_s, without = generate(completions, 1.0)
    return VllmTimes(seconds=seconds, tokens=tokens, seconds_without_top_p=without_s, tokens_without_top_p=without)


def part_bare(work: Path, model: Path, prompts: list[Prompt]) -> BareTimes:
    """Forward and backward on the batches that the loop's update took, in its order."""
    import torch
    from transformers import AutoModelForCausalLM

    from rlaif.rundir.store import RunDir

    here = RunDir(work / "run").iteration(1)
    by_id = {p.pair_id: p for p in here.read("preferences", Preference)}
    batches = [[by_id[i] for i in step.row_ids] for step in here.read("updates", UpdateStep)]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    policy = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).to(device).train()
    adam = torch.optim.AdamW(policy.parameters(), lr=LEARNING_RATE)
    beta = 0.1

    def batch_of(pairs: list[Preference]) -> tuple[Any, Any, Any]:
        rows = [(p.prompt_token_ids, p.chosen_token_ids) for p in pairs]
        rows += [(p.prompt_token_ids, p.rejected_token_ids) for p in pairs]
        longest = max(len(a) + len(b) for a, b in rows)
        ids = torch.zeros(len(rows), longest, dtype=torch.long)  # [2 x pairs, longest], padded on the right
        mask, scored = torch.zeros_like(ids), torch.zeros(len(rows), longest, dtype=torch.bool)
        for i, (prompt, answer) in enumerate(rows):
            end = len(prompt) + len(answer)
            ids[i, :end] = torch.tensor(prompt + answer)
            mask[i, :end] = 1
            scored[i, len(prompt) : end] = True
        return ids.to(device), mask.to(device), scored.to(device)

    def log_p(ids: Any, mask: Any, scored: Any) -> Any:
        with torch.autocast(device, dtype=torch.bfloat16, enabled=precision_here("auto") == "bf16"):
            hidden = policy.model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
            logits = policy.lm_head(hidden[:, :-1][scored[:, 1:]])  # [completion tokens, vocabulary]
        token = logits.float().log_softmax(-1).gather(-1, ids[scored].unsqueeze(-1)).squeeze(-1)
        row = scored.nonzero()[:, 0]
        return token.new_zeros(len(ids)).index_add(0, row, token)  # [2 x pairs]

    spent: dict[str, float] = defaultdict(float)

    def timed(name: str, action: Callable[[], Any]) -> Any:
        started = time.perf_counter()
        value = action()
        if device == "cuda":
            torch.cuda.synchronize()
        spent[name] += time.perf_counter() - started
        return value

    def reference(batch: tuple[Any, Any, Any]) -> Any:
        with torch.no_grad():
            return log_p(*batch)

    def forward_backward(batch: tuple[Any, Any, Any], ref: Any) -> None:
        chosen, rejected = (log_p(*batch) - ref).chunk(2)
        (-torch.nn.functional.logsigmoid(beta * (chosen - rejected)).mean()).backward()

    def optimize() -> None:
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        adam.step()
        adam.zero_grad()

    for number, pairs in enumerate([batches[0], *batches]):
        print(f"batch {number} of {len(batches)}", flush=True)
        if number == 1:
            spent.clear()
        batch = batch_of(pairs)
        ref = timed("reference", partial(reference, batch))
        timed("forward_backward", partial(forward_backward, batch, ref))
        timed("adam", optimize)
    return BareTimes(reference_s=spent["reference"], forward_backward_s=spent["forward_backward"], adam_s=spent["adam"])


class NotHereError(Exception):
    """A part that this machine has no use for; says why."""


def peer_precision(wanted: str | None, here: str) -> str:
    """What a peer computes in: TRL's own choice is bf16, which is a choice only where the machine multiplies it.

    Raises:
        NotHereError: bf16 is wanted where fp32 is many times faster.
    """
    if wanted == "bf16" and here != "bf16":
        raise NotHereError("this machine doesn't multiply bf16")
    return wanted or here


def part_trl(work: Path, model: Path, prompts: list[Prompt], precision: str | None = None, **tuned: Any) -> TrlTimes:
    """TRL's online DPO, one epoch after a batch that is not counted; `tuned` are settings other than the defaults."""
    precision = peer_precision(precision, precision_here("auto"))
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

    from rlaif.learning.trl_compat import online_dpo, time_sampling

    stock_config, stock_trainer = online_dpo()
    rows = [{"prompt": [m.model_dump() for m in p.messages]} for p in (*prompts[:BATCH], *prompts)]
    args = stock_config(
        output_dir=str(work / "trl"),
        per_device_train_batch_size=BATCH,
        num_train_epochs=1,
        max_new_tokens=MAX_TOKENS,
        use_cpu=not torch.cuda.is_available(),
        learning_rate=LEARNING_RATE,
        train_sampling_strategy="sequential",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        bf16=precision == "bf16",
        **tuned,
    )

    def reward(completions: list[Any], **_: Any) -> list[float]:
        return [int(preference_of(c[0]["content"])[:8], 16) / 2**32 for c in completions]

    trainer = stock_trainer(
        model=AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
        reward_funcs=reward,
        args=args,
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(model),
    )
    generated: list[tuple[float, int]] = []
    ends: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            ends.append(time.perf_counter())
            print(f"step {len(ends)}", flush=True)

    time_sampling(trainer, lambda seconds, tokens: generated.append((seconds, tokens)))
    trainer.add_callback(Clock())
    trainer.train()
    return TrlTimes(
        seconds=ends[-1] - ends[0],
        sample_s=sum(s for s, _ in generated[1:]),
        tokens=sum(n for _, n in generated[1:]),
        steps=len(ends) - 1,
        precision=precision,
    )


PARTS: dict[str, Callable[[Path, Path, list[Prompt]], Record]] = {
    "loop": part_loop,
    "vllm": part_vllm,
    "bare": part_bare,
    "trl_tuned_fp32": partial(part_trl, precision="fp32", gradient_checkpointing=False),
    "trl_tuned_bf16": partial(part_trl, precision="bf16", gradient_checkpointing=False),
    "trl": part_trl,
}
"""In the order of measuring; the slowest comes last."""
AFTER_LOOP = ("vllm", "bare")
"""They take the loop's requests, and the batches that it trained on."""


# The command.


def measure(
    work: Path, model: Path, prompts: list[Prompt], parts: Sequence[str] = tuple(PARTS), limit_s: float = LIMIT_S
) -> Report:
    """Runs the parts, one after another; what a part that doesn't come to its end would have said is missing."""
    (work / "prompts.jsonl").write_text("".join(p.model_dump_json() + "\n" for p in prompts))
    results: dict[str, Any] = {}
    missing: dict[str, str] = {}
    busy = {}
    for part in parts:
        if part in AFTER_LOOP and "loop" not in results:
            missing[part] = "it works on what the loop sampled"
            continue
        busy[part] = os.getloadavg()[0]
        command = [sys.executable, "-m", "benchmarks.loop"]
        command += ["--part", part, "--work", str(work), "--model", str(model)]
        why = run_part(part, command, work / f"{part}.log", limit_s)
        result = json.loads((work / f"{part}.json").read_text()) if why is None else {}
        if why is None and "missing" not in result:
            results[part] = result
        else:
            missing[part] = why or result["missing"]
    cores = len(os.sched_getaffinity(0))
    return Report.model_validate({"prompts": len(prompts), "cores": cores, "busy": busy, "missing": missing, **results})


def run_part(part: str, command: Sequence[str], log: Path, limit_s: float, beat_s: float = BEAT_S) -> str | None:
    """Runs a part, with a line on stderr when it starts, while it works and when it ends; why it didn't, else None."""
    started = time.monotonic()
    with log.open("w") as out:
        # A session of its own: at the limit, everything that it started goes with it.
        process = subprocess.Popen(command, cwd=ROOT, stdout=out, stderr=subprocess.STDOUT, start_new_session=True)
    _tell(f"measuring: {part}, {limit_s:.0f} s at most")
    try:
        while (code := _wait(process, min(beat_s, max(started + limit_s - time.monotonic(), 0)))) is None:
            seconds = time.monotonic() - started
            if seconds >= limit_s:
                _tell(f"{part}: stopped at its limit of {limit_s:.0f} s")
                return f"not done within {limit_s:.0f} s, at: {_last_line(log)}"
            _tell(f"{part}: {seconds:.0f} s, {_last_line(log)}")
    finally:
        if process.poll() is None:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if code != 0:
        _tell(f"{part}: failed")
        return f"failed with exit code {code}: {_last_line(log)}; its log is {log}"
    _tell(f"{part}: done in {time.monotonic() - started:.0f} s")
    return None


def _wait(process: subprocess.Popen[bytes], seconds: float) -> int | None:
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        return None


def _last_line(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1][:200] if lines else "it has written nothing"


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main(argv: list[str] | None = None) -> int:
    """`python -m benchmarks.loop`; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.loop", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="8 prompts instead of 32: does it run, not how fast")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    parser.add_argument("--work", type=Path, help="new folder for run and logs, kept (default: a temporary one)")
    parser.add_argument("--model", default=MODEL, help=f"model to measure (default {MODEL})")
    parser.add_argument("--parts", default=",".join(PARTS), metavar="PART,...", help="only these (default %(default)s)")
    parser.add_argument(
        "--limit", type=float, default=LIMIT_S, metavar="SECONDS", help="of a part (default %(default)g)"
    )
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    try:
        if options.part:
            return _main_part(options.part, options.work, Path(options.model))
        named = options.parts.split(",")
        if unknown := [p for p in named if p not in PARTS]:
            raise UserError(f"--parts {','.join(unknown)}: expected some of {', '.join(PARTS)}")
        parts = [p for p in PARTS if p in named]
        if "loop" not in parts and (after := [p for p in parts if p in AFTER_LOOP]):
            raise UserError(f"--parts: {', '.join(after)} works on what the loop sampled; name loop too")
        if options.limit <= 0:
            raise UserError(f"--limit {options.limit:g}: expected seconds above 0")
        if options.work and options.work.exists() and any(options.work.iterdir()):
            raise UserError(f"{options.work}: not empty; a measurement starts from nothing, give --work a new folder")
        from rlaif.data.prompts import load_prompts
        from rlaif.models import resolve

        model = resolve(options.model, progress=lambda message, share: print(message, file=sys.stderr))
        prompts = load_prompts("prompts/everyday.jsonl", ROOT)[: BATCH if options.quick else 4 * BATCH]
        work = (options.work or Path(tempfile.mkdtemp(prefix="rlaif-bench-"))).resolve()
        work.mkdir(parents=True, exist_ok=True)
        report = measure(work, model, prompts, parts, options.limit)
        failed = any(why.startswith("failed") for why in report.missing.values())
        if not options.work and not failed:  # after a failure the logs stay
            shutil.rmtree(work)
    except RlaifError as e:
        print(f"error: {e}", file=sys.stderr)
        return e.exit_code
    print(json.dumps({**report.model_dump(), **report.ratios()}, indent=1) if options.json else render(report))
    return 1 if failed else 0


def _main_part(part: str, work: Path, model: Path) -> int:
    from rlaif.rundir.store import read_rows

    try:
        said = PARTS[part](work, model, read_rows(work / "prompts.jsonl", Prompt)).model_dump_json()
    except NotHereError as e:
        said = json.dumps({"missing": str(e)})
    (work / f"{part}.json").write_text(said + "\n")
    sys.stdout.flush()
    os._exit(0)  # engines and thread pools can hang on their way out; everything that matters is written


if __name__ == "__main__":
    sys.exit(main())
