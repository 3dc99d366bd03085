"""Which completions are compared with which. Pure and seeded.

In: one iteration's completions, and for `best_worst` the selecting voices' scores. Out: pairs of two different
texts of one prompt from one policy version.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable, Sequence
from typing import Literal, Protocol

from rlaif.config import Job
from rlaif.errors import UserError
from rlaif.records import Completion, Pair, Score, digest

Method = Literal["random", "all", "best_worst"]


def make_pairs(
    completions: Sequence[Completion],
    method: Method,
    max_per_prompt: int,
    seed: int,
    scores: Iterable[Score] | None = None,
) -> list[Pair]:
    """Pairs for every prompt, in order of the prompts' first appearance.

    `random` draws pairs, `all` takes them in order of the samples, `best_worst` takes the highest mean score
    against the lowest, then the next. Which of the two comes first is drawn for every pair, so that no order
    carries the selection. Texts that are equal but for surrounding space are never paired.

    Raises:
        ValueError: `best_worst` without scores.
    """
    if method == "best_worst" and scores is None:
        raise ValueError("best_worst needs the selecting voices' scores")
    by_completion: dict[str, list[Score]] = {}
    for score in scores or ():
        by_completion.setdefault(score.completion_id, []).append(score)
    groups: dict[tuple[str, str], list[Completion]] = {}
    for c in completions:
        groups.setdefault((c.prompt_id, c.policy.digest), []).append(c)
    pairs: list[Pair] = []
    for (prompt_id, policy), group in groups.items():
        rng = random.Random(f"{seed}:{prompt_id}:{policy}")
        group = sorted(group, key=lambda c: (c.index, c.id))
        voices: tuple[str, ...] = ()
        if method == "best_worst":
            candidates = _best_worst(group, by_completion)
            voices = tuple(sorted({s.voice for c in group for s in by_completion.get(c.id, ())}))
        else:
            candidates = [(a, b) for a, b in itertools.combinations(group, 2) if not _identical(a, b)]
            if method == "random":
                rng.shuffle(candidates)
        for a, b in candidates[:max_per_prompt]:
            first, second = (a, b) if rng.random() < 0.5 else (b, a)
            pairs.append(
                Pair(
                    id=pair_id(prompt_id, first.id, second.id, method),
                    prompt_id=prompt_id,
                    first=first.id,
                    second=second.id,
                    method=method,
                    selected_by=voices,
                )
            )
    return pairs


def pair_id(prompt_id: str, first: str, second: str, method: str) -> str:
    """The id of a pair of completions, by their ids."""
    return digest([prompt_id, first, second, method])


def pairs_of_a_prompt(job: Job) -> int:
    """Pairs of a prompt of whose answers no two are the same."""
    answers, pairing = job.sampling.completions_per_prompt, job.pairing
    possible = answers // 2 if pairing.method == "best_worst" else answers * (answers - 1) // 2
    return min(pairing.max_pairs_per_prompt, possible)


def pairs_at_most(job: Job) -> int:
    """Pairs of an iteration in which no two answers are the same."""
    return job.prompts.per_iteration * pairs_of_a_prompt(job)


class Gives(Protocol):
    """A source of pairs, as far as it is counted here."""

    def pairs_in(self, position: int) -> int: ...


def check_can_update(job: Job, source: Gives | None = None) -> None:
    """Whether an iteration can have enough pairs for an update; `source` gives them, if the job has one.

    Raises:
        UserError: not even if every pair were kept.
    """
    if source is not None:
        given = max(source.pairs_in(position) for position in range(job.iterations))
        if given < job.filters.min_kept_pairs and job.filters.review is None:
            raise UserError(
                f"filters.min_kept_pairs={job.filters.min_kept_pairs}: no iteration of the source has more pairs than "
                f"{given}, so no update could ever happen; lower it"
            )
        return
    pairs = pairs_at_most(job)
    # People's labels of earlier iterations may join an update beside these.
    if pairs < job.filters.min_kept_pairs and job.filters.review is None:
        raise UserError(
            f"filters.min_kept_pairs={job.filters.min_kept_pairs}: an iteration has at most {pairs} pairs "
            "(prompts.per_iteration × pairs a prompt), so no update could ever happen; lower it, or take more prompts"
        )


def _best_worst(group: list[Completion], scores: dict[str, list[Score]]) -> list[tuple[Completion, Completion]]:
    # A completion that no voice scored has no rank, and an equal score no better side: neither is paired.
    mean = {c.id: sum(s.value for s in scores[c.id]) / len(scores[c.id]) for c in group if scores.get(c.id)}
    ranked = sorted((c for c in group if c.id in mean), key=lambda c: mean[c.id], reverse=True)
    out: list[tuple[Completion, Completion]] = []
    while len(ranked) > 1:
        best = ranked.pop(0)
        worst = next((c for c in reversed(ranked) if not _identical(best, c) and mean[c.id] < mean[best.id]), None)
        if worst is not None:
            ranked.remove(worst)
            out.append((best, worst))
    return out


def _identical(a: Completion, b: Completion) -> bool:
    return a.text.strip() == b.text.strip()
