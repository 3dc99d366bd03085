"""The stage that samples: fresh completions of the policy as it is now."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rlaif.loop.running import Iteration, Running, in_order
from rlaif.records import Completion


def sample(run: Running, it: Iteration) -> list[Completion]:
    """The completions of the plan's prompts, by prompt and then by sample."""
    settings = run.job.sampling
    prompts = [it.prompts[i] for i in it.plan.prompt_ids]
    sampled: list[Completion] = []

    def produce(_: list[Completion]) -> Iterator[list[Completion]]:
        run.hand_over.load_sampler(it.k)
        total = len(prompts) * settings.completions_per_prompt
        run.progress.stage(it.k, "sample", total, "answers", str(it.constitution.ref))
        for chunk in run.advancing(
            run.sampler.stream(
                "sample",
                prompts=prompts,
                completions_per_prompt=settings.completions_per_prompt,
                policy=it.plan.policy,
                seed=run.job.seed,
                iteration=it.k,
                prefix=f"{it.k:04d}",
            )
        ):
            sampled.extend(chunk)
            yield chunk

    def commit() -> dict[str, Any]:
        return run.hand_over.gap_noted() | run.hand_over.score_again(it.k, sampled)

    return in_order(it.rows("completions", produce, before_commit=commit), it.plan.prompt_ids)
