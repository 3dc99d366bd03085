"""Held-out answers of a policy against the base policy's: sampled, measured, judged."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

from rlaif import evaluation
from rlaif.constitutions.constitution import Constitution
from rlaif.judging.candidates import Candidate
from rlaif.judging.kinds import kind_of
from rlaif.loop.hand_over import gap_of
from rlaif.loop.judging import decide, judge
from rlaif.loop.reference import deciding, referred
from rlaif.loop.retention import BASE_POLICY, against_base, retained
from rlaif.loop.running import Iteration, Running, candidates, in_order
from rlaif.loop.sampling import answers
from rlaif.monitors import tracking
from rlaif.records import (
    AgainstBase,
    Completion,
    Decision,
    Divergence,
    EvaluationMetrics,
    Plan,
    PolicyVersion,
    Prompt,
    Quality,
    Referred,
    Vote,
)
from rlaif.rundir.store import read_record, write_json


def evaluate(run: Running, updates: int, plan: Plan, constitution: Constitution) -> EvaluationMetrics:
    """Held-out answers of the policy after `updates` iterations, against the base policy's, under a plan's text."""
    here = run.dir.evaluation(updates)
    if (here.path / "metrics.json").exists():
        return read_record(here.path / "metrics.json", EvaluationMetrics)
    started = time.monotonic()
    prompts = run.held_out[: run.job.eval.prompts]
    it = Iteration(plan, here, constitution, {p.id: p for p in prompts}, role="evaluate")
    policy, _ = run.hand_over.policy_before(updates)
    judged = updates != BASE_POLICY and kind_of(run.job.judge).evaluates(constitution)

    def sample(_: list[Completion]) -> Iterator[list[Completion]]:
        run.hand_over.load_sampler(updates)
        shown = max(updates - 1, 0)
        run.progress.stage(shown, "held-out", len(prompts) * run.job.eval.samples, "answers", str(constitution.ref))
        how: dict[str, Any] = {name: getattr(run.job.eval, name) for name in ("samples", "temperature", "top_p")}
        asked = {"prompts": [p.model_dump(mode="json") for p in prompts], **how}
        make = partial(answers, run, prompts, policy, f"eval{updates:04d}", **how)
        yield from run.evaluated("completions", Completion, updates, asked, make)

    def sampled() -> dict[str, Any]:
        return run.hand_over.gap_noted() | run.from_cache("completions", updates)

    completions = in_order(it.rows("completions", sample, before_commit=sampled), it.prompts)

    def measure(_: list[Quality]) -> Iterator[list[Quality]]:
        run.progress.stage(max(updates - 1, 0), "sanity", len(completions), "answers", str(constitution.ref))
        asked = candidates(completions, it.prompts)
        about = {"answers": [c.model_dump(mode="json") for c in asked], "judge": run.job.judge.model_dump(mode="json")}

        def make() -> Iterator[list[Quality]]:
            yield from run.advancing(_measured(run, asked))

        yield from run.evaluated("quality", Quality, updates, about, make)

    quality = it.rows("quality", measure, before_commit=lambda: run.from_cache("quality", updates))
    drift = _drift(run, it, updates, policy, prompts[: run.job.eval.kl_prompts])
    decisions: list[Decision] | None = None
    base: list[Completion] = []
    by_deciding: AgainstBase | None = None
    second: Referred | None = None
    if updates != BASE_POLICY:
        base = in_order(run.dir.evaluation(BASE_POLICY).read("completions", Completion), it.prompts)
        it.completions = completions + base
        it.pairs = against_base(f"eval{updates:04d}", completions, base) if judged else []
        it.rows("pairs", lambda _: [it.pairs])
        it.votes = judge(run, it)
        it.decisions = decide(run, it)
        decisions = it.decisions if judged else None
        if run.job.eval.deciding_voices and judged:
            by_deciding = evaluation.by_deciding(completions, it.pairs, deciding(run, it))
        if run.referee and judged:
            second = evaluation.referred(run.referee.name, completions, it.pairs, referred(run, it))
    kept = retained(run, it, updates, policy, completions, base)
    seconds = round(time.monotonic() - started, 1)
    metrics = evaluation.evaluation_metrics(
        updates,
        constitution,
        completions,
        quality,
        it.pairs,
        decisions,
        seconds,
        drift,
        gap_of(here),
        base,
        kept,
        second,
        by_deciding,
    )
    write_json(here.path / "metrics.json", metrics.model_dump(mode="json"))
    more = [v for name in ("earlier_votes", "deciding_votes") if here.is_complete(name) for v in here.read(name, Vote)]
    values = tracking.of_evaluation(metrics, [*it.votes, *more], run.job.judge, run.text_number(it.k))
    run.track(max(updates - 1, 0), updates, values)
    return metrics


def _measured(run: Running, answers: list[Candidate]) -> Iterator[list[Quality]]:
    """How sane answers are; each once, though all of them are asked about in one piece: what one is compared with is
    drawn from the others."""
    asked, seen = {"candidates": answers, "seed": run.job.seed}, set[str]()

    def piece(done: Sequence[Quality]) -> dict[str, Any] | None:
        return asked if len(done) < len(answers) else None

    for chunk in run.measurer.spread("quality", [piece]):
        yield [q for q in chunk if q.completion_id not in seen]
        seen.update(q.completion_id for q in chunk)


def _drift(
    run: Running, it: Iteration, updates: int, policy: PolicyVersion, prompts: list[Prompt]
) -> list[Divergence] | None:
    """KL from the base policy, on answers as the policy itself gives them: at temperature 1 and top-p 1. None when
    the job doesn't want it; empty for the base policy itself, which needs no measuring."""
    if not prompts:
        return None
    if policy.digest == run.base.digest:
        return []
    shown, text = max(updates - 1, 0), str(it.constitution.ref)

    def sample(_: list[Completion]) -> Iterator[list[Completion]]:
        run.hand_over.load_sampler(updates)
        run.progress.stage(shown, "untempered", len(prompts), "answers", text)
        yield from answers(run, prompts, policy, f"kl{updates:04d}", temperature=1.0, top_p=1.0)

    sampled = it.rows("kl_completions", sample)

    def measure(_: list[Divergence]) -> Iterator[list[Divergence]]:
        run.hand_over.load_learner(updates)
        run.progress.stage(shown, "KL", len(sampled), "answers", text)
        completions = in_order(sampled, [p.id for p in prompts])
        yield from run.advancing(run.learner.stream("divergences", completions=completions))

    return it.rows("divergences", measure)
