"""How fast the loop is, beside TRL's stock trainer and two limits: `make bench`.

In: prompts, a model, a judge that costs nothing. Out: seconds by stage, tokens a second, ratios. Parts run one after
another, each in a process of its own, on the same prompts:

- `loop`: one whole iteration of `rlaif.loop.Loop` with its sampler and learner workers, as `rlaif run` does it: the
  last iteration's weights into vLLM, sampling, voting, deciding, update, state and weights written.
- `vllm`: the same requests straight to `vllm.LLM.generate`, the limit for sampling. Once more without top-p, which
  vLLM's CPU sampler pays for by sorting the vocabulary.
- `bare`: PyTorch on the token batches that the loop trained on, the limit for the update. Policy in fp32, under bf16
  autocast where the loop takes it, one forward without gradient (the reference), one forward and backward of the DPO
  loss; the vocabulary is projected for completion tokens only, as in the loop. No clipping, optimizer, metrics or
  records: Adam is timed apart.
- `trl`: TRL's stock `OnlineDPOTrainer` with transformers generation; its defaults but for a completion's length.
- `trl_tuned_fp32` and `trl_tuned_bf16`: the same without gradient checkpointing, with which generation has no KV cache,
  in fp32 and under bf16 autocast. The faster one is what somebody who knows TRL well would get.

Files are written twice: the loop's state and policy, and once more as many bytes in plain writes, the disk's limit.
Each part starts with one batch that is not counted.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

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
from rlaif.workers import WorkerLike

ROOT = Path(__file__).resolve().parents[1]
MODEL = "embedded:smollm2-135m-instruct"
BATCH = 8
MAX_TOKENS = 64
LEARNING_RATE = 5e-7
"""TRL's default for online DPO; too small to change a bf16 weight, so all parts sample from the same policy."""
AIM_TRL, AIM_SAMPLING, AIM_UPDATE = 3.0, 0.9, 0.7
"""At least."""
AIM_OUTSIDE = 0.05
"""At most."""


# What is measured.


class LoopTimes(Record):
    """One iteration of the loop. Seconds that the loop waited for a worker; `seconds` is the whole iteration."""

    seconds: float
    load_s: float
    sample_s: float
    judge_s: float
    reference_s: float
    steps_s: float
    """Forward, backward, clipping, Adam and metrics of all steps."""
    save_s: float
    disk_s: float
    """As many bytes written plainly, after the iteration; no part of it."""
    tokens: int
    """Completion tokens sampled."""
    pairs: int
    """Pairs trained on."""
    steps: int

    @property
    def arithmetic_s(self) -> float:
        """Sampling, reference and update steps."""
        return self.sample_s + self.reference_s + self.steps_s

    @property
    def rest_s(self) -> float:
        """Everything that no worker was asked for: the loop's own work, records and fsync."""
        return self.seconds - self.arithmetic_s - self.load_s - self.judge_s - self.save_s


class TrlTimes(Record):
    """The same prompts through TRL's trainer."""

    seconds: float
    sample_s: float
    tokens: int
    steps: int


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
    """All parts and what follows from them."""

    prompts: int
    cores: int
    busy: dict[str, float]
    """Load average (1 minute) before each part started: well above 0 means that others used the machine."""
    loop: LoopTimes
    vllm: VllmTimes
    bare: BareTimes
    trl: TrlTimes
    trl_tuned_fp32: TrlTimes
    trl_tuned_bf16: TrlTimes

    @property
    def tuned(self) -> TrlTimes:
        """TRL without gradient checkpointing, at its faster precision."""
        return max(self.trl_tuned_fp32, self.trl_tuned_bf16, key=lambda t: _rate(t.tokens, t.seconds))

    @property
    def ratio_to_trl(self) -> float:
        """Completion tokens a second of a whole iteration, over stock TRL's."""
        return _rate(self.loop.tokens, self.loop.seconds) / _rate(self.trl.tokens, self.trl.seconds)

    @property
    def ratio_to_tuned_trl(self) -> float:
        """The same, over tuned TRL's."""
        return _rate(self.loop.tokens, self.loop.seconds) / _rate(self.tuned.tokens, self.tuned.seconds)

    @property
    def sampling_vs_vllm(self) -> float:
        """Tokens a second, over vLLM's on the same requests."""
        return _rate(self.loop.tokens, self.loop.sample_s) / _rate(self.vllm.tokens, self.vllm.seconds)

    @property
    def sampling_vs_vllm_without_top_p(self) -> float:
        """Tokens a second with top-p, over vLLM's without: a limit that does less work than was asked for."""
        alone = _rate(self.vllm.tokens_without_top_p, self.vllm.seconds_without_top_p)
        return _rate(self.loop.tokens, self.loop.sample_s) / alone

    @property
    def update_vs_bare(self) -> float:
        """Seconds of bare forward and backward, over the update's (reference, steps, Adam, metrics)."""
        return (self.bare.reference_s + self.bare.forward_backward_s) / (self.loop.reference_s + self.loop.steps_s)

    @property
    def outside(self) -> float:
        """Share of the iteration that is not sampling, reference or steps: weights moved, records, the judge."""
        return 1 - self.loop.arithmetic_s / self.loop.seconds

    def ratios(self) -> dict[str, float]:
        """The figures by name, as `--json` prints them."""
        return {
            "ratio_to_trl_stock": self.ratio_to_trl,
            "ratio_to_trl_tuned": self.ratio_to_tuned_trl,
            "sampling_vs_vllm_alone": self.sampling_vs_vllm,
            "sampling_vs_vllm_without_top_p": self.sampling_vs_vllm_without_top_p,
            "update_vs_bare_pytorch": self.update_vs_bare,
            "outside_model_arithmetic": self.outside,
        }


def render(report: Report) -> str:
    """The report as people read it."""
    loop, vllm, bare, trl, tuned = report.loop, report.vllm, report.bare, report.trl, report.tuned
    precision = "bf16" if tuned is report.trl_tuned_bf16 else "fp32"
    busy = ", ".join(f"{part} {load:.1f}" for part, load in report.busy.items())
    both = (trl, tuned)
    rows: list[tuple[Any, ...]] = [
        ("whole iteration", loop.seconds, *(t.seconds for t in both), None),
        ("  weights into the sampler", loop.load_s, None, None, None),
        ("  sampling", loop.sample_s, *(t.sample_s for t in both), vllm.seconds),
        ("  judge", loop.judge_s, None, None, None),
        ("  update: reference", loop.reference_s, None, None, bare.reference_s),
        ("  update: steps", loop.steps_s, *(t.seconds - t.sample_s for t in both), bare.forward_backward_s),
        ("  state and weights written", loop.save_s, None, None, loop.disk_s),
        ("  rest", loop.rest_s, None, None, None),
    ]
    rates: list[tuple[Any, ...]] = [
        ("completion tokens", loop.tokens, *(t.tokens for t in both), vllm.tokens),
        ("tokens/s, sampling", *(_rate(t.tokens, s) for t, s in (
            (loop, loop.sample_s), *((t, t.sample_s) for t in both), (vllm, vllm.seconds)))),
        ("tokens/s, whole iteration", *(_rate(t.tokens, t.seconds) for t in (loop, *both)), None),
    ]  # fmt: skip
    lines = [
        f"{report.prompts} prompts x 2 completions of at most {MAX_TOKENS} tokens, {loop.pairs} pairs in batches of "
        f"{BATCH}, {report.cores} cores; load average before each part: {busy}",
        "",
        f"{'seconds':28}{'this loop':>11}{'TRL stock':>11}{'TRL tuned':>11}{'limit':>11}",
        *(_row(name, values, ".2f") for name, *values in rows),
        "",
        *(_row(name, values, ".0f") for name, *values in rates),
        "",
        f"TRL stock: its defaults. TRL tuned: no gradient checkpointing, in {precision}, its faster precision here.",
        "TRL's steps include reference and Adam. Limits: vLLM alone for sampling, bare PyTorch forward and backward",
        f"for the update (clipping and Adam, {bare.adam_s:.2f} s bare, are not in it), plain writes for what is saved.",
        f"vLLM alone without top-p: {_rate(vllm.tokens_without_top_p, vllm.seconds_without_top_p):.0f} tokens/s "
        f"(this loop, with it: {report.sampling_vs_vllm_without_top_p:.2f} of that)",
        "",
        f"ratio to TRL stock: {report.ratio_to_trl:.2f}x" + _verdict(report.ratio_to_trl >= AIM_TRL, f">= {AIM_TRL:g}"),
        f"ratio to TRL tuned: {report.ratio_to_tuned_trl:.2f}x",
        f"sampling vs vLLM alone: {report.sampling_vs_vllm:.2f}"
        + _verdict(report.sampling_vs_vllm >= AIM_SAMPLING, f">= {AIM_SAMPLING:g}"),
        f"update vs bare PyTorch: {report.update_vs_bare:.2f}"
        + _verdict(report.update_vs_bare >= AIM_UPDATE, f">= {AIM_UPDATE:g}"),
        f"outside model arithmetic: {100 * report.outside:.1f} %"
        + _verdict(report.outside <= AIM_OUTSIDE, f"<= {100 * AIM_OUTSIDE:g} %"),
    ]
    return "\n".join(lines)


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
    """A judge worker that prefers by a hash of the text: consistent, and without a model."""

    def score(self, **_: Any) -> Iterator[list[Any]]:
        """Nothing: pairs are random here."""
        yield from ()

    def quality(self, candidates: list[Any], **_: Any) -> Iterator[list[Quality]]:
        """Zeros: the loop evaluates the base policy on one prompt before it starts, nobody reads the result."""
        yield [Quality(completion_id=c.completion_id, tokens=1, logprob_per_token=0, relevance=0) for c in candidates]

    def cast(self, ballots: list[Ballot], pairs: list[Pair], candidates: list[Any], **_: Any) -> Iterator[list[Vote]]:
        """All votes of a pair name the same side, guards included."""
        value = {c.completion_id: preference_of(c.text) for c in candidates}
        by_id = {p.id: p for p in pairs}
        votes = []
        for ballot in ballots:
            pair = by_id[ballot.pair_id]
            first = value[pair.first] > value[pair.second]
            outcome = "first" if first else "second"
            votes.append(Vote.model_validate({
                "ballot": ballot, "model": "hash", "outcome": outcome, "p_first": float(first), "raw_reply": outcome,
            }))  # fmt: skip
        yield votes


def make_judge() -> FreeJudge:
    """Factory for a worker process."""
    return FreeJudge()


# The parts. Each runs in its own process and prints one JSON object to a file.


class _Timed:
    """A worker, and how long its caller waited for each method."""

    def __init__(self, worker: WorkerLike, waited: dict[str, float]) -> None:
        self.name = worker.name
        self._worker = worker
        self._waited = waited

    def ready(self) -> None:
        self._worker.ready()

    def call(self, method: str, **kwargs: Any) -> Any:
        started = time.perf_counter()
        try:
            return self._worker.call(method, **kwargs)
        finally:
            self._waited[method] += time.perf_counter() - started

    def stream(self, method: str, **kwargs: Any) -> Iterator[Any]:
        items = self._worker.stream(method, **kwargs)
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
    """A `Progress` that prints what is noted."""

    def stage(self, iteration: int, name: str, total: int, unit: str, text: str) -> None: ...
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
            "learner": {"batch_size": BATCH, "learning_rate": LEARNING_RATE},
            "eval": {"every": 1000, "prompts": 1},
        },
        "benchmarks/loop.py",
    )


def part_loop(work: Path, model: Path, prompts: list[Prompt]) -> LoopTimes:
    """One iteration of the loop, after a short one that is not counted."""
    from contextlib import ExitStack, closing

    from rlaif.loop import Loop
    from rlaif.models import digest_of
    from rlaif.store import RunDir
    from rlaif.texts import Texts
    from rlaif.workers import start_worker

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
                ("judge", "benchmarks.loop:make_judge", {}),
                ("learner", "rlaif.learning:make", {"model_path": str(model), "settings": job.learner, "seed": 0}),
            )
        }  # fmt: skip
        loop = Loop(
            warm_up,
            run,
            Texts(job, run, ROOT),
            train=prompts,
            held_out=prompts[:1],
            base_model=model,
            base_digest=digest_of(model),
            judge_name="hash",
            measurer=workers["judge"],
            progress=_Notes(),
            **workers,
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
    return LoopTimes(
        seconds=seconds,
        load_s=waited["load"],
        sample_s=waited["sample"],
        judge_s=waited["cast"],
        reference_s=waited["update"] - steps_s,
        steps_s=steps_s,
        save_s=waited["save"],
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
    from rlaif.sampling.vllm import ENVIRONMENT, MAX_SEQUENCES
    from rlaif.store import RunDir

    os.environ.update(ENVIRONMENT)
    from vllm import LLM, SamplingParams
    from vllm.platforms import current_platform

    settings = job_for(len(prompts)).sampling
    cpu = {"kv_cache_memory_bytes": int(settings.kv_cache_gib * 2**30), "block_size": 32, "enforce_eager": True}
    gpu = {"gpu_memory_utilization": settings.gpu_memory_utilization}
    llm = LLM(
        model=str(model),
        dtype=torch_dtype(settings.precision),
        max_model_len=settings.max_model_len,
        max_num_seqs=MAX_SEQUENCES,
        disable_log_stats=True,
        **(cpu if current_platform.is_cpu() else gpu),
    )
    completions = RunDir(work / "run").iteration(1).read("completions", Completion)

    def generate(some: list[Completion], top_p: float) -> tuple[float, int]:
        params = [
            SamplingParams(max_tokens=settings.max_tokens, temperature=settings.temperature, top_p=top_p, seed=c.seed)
            for c in some
        ]
        llm.reset_prefix_cache()
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

    from rlaif.store import RunDir

    here = RunDir(work / "run").iteration(1)
    by_id = {p.pair_id: p for p in here.read("preferences", Preference)}
    batches = [[by_id[i] for i in step.pair_ids] for step in here.read("updates", UpdateStep)]
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
        if number == 1:
            spent.clear()
        batch = batch_of(pairs)
        ref = timed("reference", partial(reference, batch))
        timed("forward_backward", partial(forward_backward, batch, ref))
        timed("adam", optimize)
    return BareTimes(reference_s=spent["reference"], forward_backward_s=spent["forward_backward"], adam_s=spent["adam"])


def part_trl(work: Path, model: Path, prompts: list[Prompt], **tuned: Any) -> TrlTimes:
    """TRL's online DPO, one epoch after a batch that is not counted; `tuned` are settings other than the defaults."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

    # By way of it, so that TRL doesn't import vLLM: 15 s, and threads that its trainer has no use for.
    from rlaif.learning import online_dpo

    stock: Any = online_dpo

    rows = [{"prompt": [m.model_dump() for m in p.messages]} for p in (*prompts[:BATCH], *prompts)]
    args = stock.OnlineDPOConfig(
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
        **tuned,
    )

    def reward(completions: list[Any], **_: Any) -> list[float]:
        return [int(preference_of(c[0]["content"])[:8], 16) / 2**32 for c in completions]

    trainer = stock.OnlineDPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
        reward_funcs=reward,
        args=args,
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(model),
    )
    generated: list[tuple[float, int]] = []
    ends: list[float] = []
    generate = trainer._generate

    def timed_generate(*a: Any, **kw: Any) -> Any:
        started = time.perf_counter()
        out = generate(*a, **kw)
        generated.append((time.perf_counter() - started, int(out[3].sum())))
        return out

    class Clock(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            ends.append(time.perf_counter())
            print(f"step {len(ends)}", flush=True)

    trainer._generate = timed_generate
    trainer.add_callback(Clock())
    trainer.train()
    return TrlTimes(
        seconds=ends[-1] - ends[0],
        sample_s=sum(s for s, _ in generated[1:]),
        tokens=sum(n for _, n in generated[1:]),
        steps=len(ends) - 1,
    )


PARTS: dict[str, Callable[[Path, Path, list[Prompt]], Record]] = {
    "loop": part_loop,
    "vllm": part_vllm,
    "bare": part_bare,
    "trl": part_trl,
    "trl_tuned_fp32": partial(part_trl, gradient_checkpointing=False, bf16=False),
    "trl_tuned_bf16": partial(part_trl, gradient_checkpointing=False, bf16=True),
}


# The command.


def measure(work: Path, model: Path, prompts: list[Prompt]) -> Report:
    """Runs all parts, one after another.

    Raises:
        RlaifError: a part failed; its log is named.
    """
    (work / "prompts.jsonl").write_text("".join(p.model_dump_json() + "\n" for p in prompts))
    results: dict[str, Any] = {}
    busy = {}
    for part in PARTS:
        print(f"measuring: {part}", file=sys.stderr, flush=True)
        busy[part] = os.getloadavg()[0]
        log = work / f"{part}.log"
        with log.open("w") as out:
            done = subprocess.run(
                [sys.executable, "-m", "benchmarks.loop", "--part", part, "--work", str(work), "--model", str(model)],
                cwd=ROOT, stdout=out, stderr=subprocess.STDOUT, check=False,
            )  # fmt: skip
        if done.returncode != 0:
            last = (log.read_text().strip().splitlines() or ["it wrote nothing"])[-1]
            raise RlaifError(f"the part `{part}` failed (exit code {done.returncode}): {last}; its log is {log}")
        results[part] = json.loads((work / f"{part}.json").read_text())
    cores = len(os.sched_getaffinity(0))
    return Report.model_validate({"prompts": len(prompts), "cores": cores, "busy": busy, **results})


def main(argv: list[str] | None = None) -> int:
    """`python -m benchmarks.loop`; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.loop", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="8 prompts instead of 32: does it run, not how fast")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    parser.add_argument("--work", type=Path, help="new folder for run and logs, kept (default: a temporary one)")
    parser.add_argument("--model", default=MODEL, help=f"model to measure (default {MODEL})")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    try:
        if options.part:
            return _main_part(options.part, options.work, Path(options.model))
        if options.work and options.work.exists() and any(options.work.iterdir()):
            raise UserError(f"{options.work}: not empty; a measurement starts from nothing, give --work a new folder")
        from rlaif.models import resolve
        from rlaif.prompts import load_prompts

        model = resolve(options.model, progress=lambda message, share: print(message, file=sys.stderr))
        prompts = load_prompts("prompts/everyday.jsonl", ROOT)[: BATCH if options.quick else 4 * BATCH]
        work = (options.work or Path(tempfile.mkdtemp(prefix="rlaif-bench-"))).resolve()
        work.mkdir(parents=True, exist_ok=True)
        report = measure(work, model, prompts)
        if not options.work:  # after a failure the logs stay
            shutil.rmtree(work)
    except RlaifError as e:
        print(f"error: {e}", file=sys.stderr)
        return e.exit_code
    print(json.dumps({**report.model_dump(), **report.ratios()}, indent=1) if options.json else render(report))
    return 0


def _main_part(part: str, work: Path, model: Path) -> int:
    from rlaif.store import read_rows

    result = PARTS[part](work, model, read_rows(work / "prompts.jsonl", Prompt))
    (work / f"{part}.json").write_text(result.model_dump_json() + "\n")
    sys.stdout.flush()
    os._exit(0)  # engines and thread pools can hang on their way out; everything that matters is written


if __name__ == "__main__":
    sys.exit(main())
