"""The stage that samples: fresh completions of the policy as it is now."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from rlaif.loop.running import Iteration, Running, in_order
from rlaif.records import Completion, PolicyVersion, Prompt
from rlaif.workers.worker import Piece

EVAL_SEED_ITERATION = -1
"""Held-out answers are drawn with the same seeds at every evaluation, so that two differ by the policy only."""


Told = Callable[[list[Completion]], None]


def sample(run: Running, it: Iteration, told: Told = lambda completions: None) -> list[Completion]:
    """The completions of the plan's prompts, by prompt and then by sample; `told` hears of them once they are
    durable."""
    settings = run.job.sampling
    prompts = [it.prompts[i] for i in it.plan.prompt_ids]
    sampled: list[Completion] = []

    def produce(done: list[Completion]) -> Iterator[list[Completion]]:
        run.hand_over.load_sampler(it.k - it.plan.staleness, stale=it.plan.staleness > 0)
        sampled.extend(done)
        told(done)
        owed = len(prompts) * settings.completions_per_prompt - len(done)
        if not owed:
            return
        run.progress.stage(it.k, "sample", owed, "answers", str(it.constitution.ref))
        shares = _shares(
            run,
            prompts,
            done,
            completions_per_prompt=settings.completions_per_prompt,
            policy=it.plan.policy,
            iteration=it.k,
            prefix=f"{it.k:04d}",
        )
        for chunk in run.advancing(run.sampler.spread("sample", shares)):
            yield chunk
            sampled.extend(chunk)
            told(chunk)

    def commit() -> dict[str, Any]:
        return run.hand_over.gap_noted() | run.hand_over.score_again(it.plan, sampled) | it.judged_meanwhile()

    return in_order(it.rows("completions", produce, before_commit=commit), it.plan.prompt_ids)


def answers(
    run: Running,
    prompts: list[Prompt],
    policy: PolicyVersion,
    prefix: str,
    *,
    samples: int = 1,
    temperature: float | None = None,
    top_p: float | None = None,
) -> Iterator[list[Completion]]:
    """Answers that only measure, named `<prefix>-<prompt id>-<index>`; the sampler holds the policy already.
    `temperature` and `top_p` are those of `sampling` when absent."""
    shares = _shares(
        run,
        prompts,
        (),
        completions_per_prompt=samples,
        policy=policy,
        iteration=EVAL_SEED_ITERATION,
        prefix=prefix,
        temperature=temperature,
        top_p=top_p,
    )
    return run.advancing(run.sampler.spread("sample", shares))


def _shares(run: Running, prompts: Sequence[Prompt], done: Sequence[Completion], **how: Any) -> list[Piece]:
    """What is left to be sampled, in as many pieces as there are samplers: an engine wants all that it is to sample at
    once. Neighbours go to different ones: what is long often stands together. A piece names all of its prompts, since
    which server answers follows from a prompt's place among them."""

    def share(mine: Sequence[Prompt]) -> Piece:
        ids, wanted = {p.id for p in mine}, len(mine) * how["completions_per_prompt"]

        def asked(more: Sequence[Completion]) -> dict[str, Any] | None:
            have = frozenset(c.id for c in (*done, *more) if c.prompt_id in ids)
            return {"prompts": mine, "have": have, "seed": run.job.seed, **how} if len(have) < wanted else None

        return asked

    return [share(prompts[n :: run.sampler.width]) for n in range(run.sampler.width)]
