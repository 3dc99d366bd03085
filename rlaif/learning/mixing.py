"""What an update trains on: pairs that people labelled, then this iteration's kept ones, then replayed ones.

In: decisions of this iteration, the run's labels, the preferences of earlier iterations. Out: `Preference` rows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rlaif.config import Replay
from rlaif.constitutions.constitution import Constitution
from rlaif.learning.replay_set import distinct, draw, members
from rlaif.records import Completion, Decision, Pair, PolicyDistance, Preference, Prompt, Side
from rlaif.review.labels import (
    REVIEW,
    LabelLog,
    in_force,
    joined_last,
    joining,
    labels_path,
    read_labels,
    review_lock,
)
from rlaif.rundir.store import RunDir


def preferences_of(
    k: int,
    prompts: Mapping[str, Prompt],
    completions: Sequence[Completion],
    pairs: Sequence[Pair],
    decisions: Sequence[Decision],
    constitution: Constitution,
) -> list[Preference]:
    """One row for each kept pair of iteration k: what training sees."""
    by_id = {c.id: c for c in completions}
    pair_of = {p.id: p for p in pairs}
    rows = []
    for decision in decisions:
        if decision.status != "kept" or decision.winner is None:
            continue
        pair = pair_of[decision.pair_id] if decision.winner == "first" else pair_of[decision.pair_id].swap()
        chosen, rejected = by_id[pair.first], by_id[pair.second]
        p_first = decision.verdict.p_first
        rows.append(
            Preference.model_construct(  # of what is valid already: a check would copy token ids, for each pair anew
                pair_id=pair.id,
                iteration=k,
                source="judge" if decision.source == "votes" else "data",
                constitution=constitution.hash if decision.source == "votes" else "",
                prompt_id=pair.prompt_id,
                chosen_id=chosen.id,
                rejected_id=rejected.id,
                prompt_token_ids=chosen.prompt_token_ids,
                chosen_token_ids=chosen.token_ids,
                rejected_token_ids=rejected.token_ids,
                prompt=prompts[pair.prompt_id].text,
                chosen=chosen.text,
                rejected=rejected.text,
                p_chosen=None if p_first is None else p_first if decision.winner == "first" else 1 - p_first,
                agreement=decision.verdict.agreement,
            )
        )
    return rows


def read_now(run: RunDir) -> LabelLog | None:
    """The labels of this moment; None where nobody labelled yet. Later ones are for the next update."""
    if not labels_path(run).exists():
        return None
    with review_lock(run):
        return read_labels(run)


def labelled(
    run: RunDir, log: LabelLog | None, k: int, prompts: Mapping[str, Prompt], constitution: Constitution
) -> tuple[list[Preference], dict[str, Any]]:
    """Pairs of earlier iterations as people labelled them, each once; and what the stage's meta file says about it.

    Their p(chosen) and agreement stay the judge's.
    """
    if log is None:
        return [], {}
    labels = in_force(log.labels)
    given_in = {x.iteration for x in labels.values()}
    plans = {i: run.plan(i) for i in range(k) if i in given_in}
    judged_under = {i: plan.constitution.hash for i, plan in plans.items()}
    joins, stale = joining(labels, joined_last(run, range(k)), judged_under, k, constitution.hash)
    rows: list[Preference] = []
    joined: dict[str, Side] = {}
    for i in sorted({x.iteration for x in joins}):
        here, sides = run.iteration(i), {x.pair_id: x.outcome for x in joins if x.iteration == i}
        decisions = [
            d.model_copy(update={"status": "kept", "winner": sides[d.pair_id]})
            for d in here.read("decisions", Decision, REVIEW)
            if d.pair_id in sides and d.status == "review"
        ]
        completions, pairs = here.read("completions", Completion), here.read("pairs", Pair)
        made = preferences_of(i, prompts, completions, pairs, decisions, constitution)
        rows += [p.model_copy(update={"source": "human"}) for p in made]
        joined |= {d.pair_id: d.winner for d in decisions if d.winner is not None}
    problems = [*log.problems]
    if unknown := [x.pair_id for x in joins if x.pair_id not in joined]:
        problems.append(f"{labels_path(run)}: no pair {', '.join(unknown)} was sent to review; its label is left out")
    # With size and digest an auditor finds the labels of that moment, whatever was appended since.
    said = {"size": log.size, "sha256": log.sha256, "joined": joined, "stale": len(stale), "problems": problems}
    return rows, said


def replayed(
    run: RunDir,
    log: LabelLog | None,
    k: int,
    fresh: Sequence[Preference],
    settings: Replay,
    seed: int,
    constitution: Constitution,
) -> list[Preference]:
    """Older pairs for this update: those that may train under the text in force, and none beside itself or its twin."""
    here = run.iteration(k)
    moved = here.read("policy_distances", PolicyDistance) if here.is_complete("policy_distances") else []
    wanted = at_most(settings.share, len(fresh))
    if not wanted:
        return []
    old = members(run, k, constitution.hash, settings.max_age, log or LabelLog(labels=()))
    return draw(distinct(old, fresh), wanted, settings, k, seed, {d.pair_id: d.distance for d in moved})


def at_most(share: float, fresh: int) -> int:
    """How many replayed pairs beside so many fresh ones are no more than a share of all."""
    return math.floor(fresh * share / (1 - share) + 1e-9)  # a quotient of floats may lack a bit to a whole number
