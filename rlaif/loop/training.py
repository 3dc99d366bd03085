"""The stages that train: the mix of rows, and the update.

Which rows are mixed the learner says (`row_type`). To add a type: a stage for its rows in `rlaif/rundir/stages.py`, a
function here that makes them, and a line in `MIXES`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from rlaif import config
from rlaif.errors import UserError
from rlaif.learning import KL_METRIC, kind_of, too_far
from rlaif.learning.mixing import labelled, preferences_of, read_now, replayed
from rlaif.learning.replay_index import update_index
from rlaif.learning.replay_set import members
from rlaif.loop.running import Iteration, Running
from rlaif.records import Alarm, BaseLogprob, Completion, PolicyDistance, Preference, TrainingRow, UpdateStep
from rlaif.review.labels import labels_noted

Mix = Callable[[Running, Iteration], Sequence[TrainingRow]]
"""Makes an iteration's training rows, as a stage."""


def mix(run: Running, it: Iteration) -> Sequence[TrainingRow]:
    """What trains: rows of the type that the job's learner takes."""
    return mix_for(run.job.learner)(run, it)


def mix_for(learner: config.Learner) -> Mix:
    """What makes the rows that a learner takes.

    Raises:
        UserError: nothing does.
    """
    wanted = kind_of(learner.kind).row_type
    if wanted not in MIXES:
        made = ", ".join(f"`{row_type.__name__}`" for row_type in MIXES)
        raise UserError(
            f"learner.kind: `{learner.kind}` trains on rows of type `{wanted.__name__}`, and the loop makes {made}; "
            "take another learner"
        )
    return MIXES[wanted]


def mix_preferences(run: Running, it: Iteration) -> list[Preference]:
    """Kept pairs and labelled ones, and replayed pairs after them."""
    _measure_distances(run, it)
    labels: dict[str, Any] = {}

    def produce(_: list[Preference]) -> Iterator[list[Preference]]:
        now = read_now(run.dir)
        human, joined = labelled(run.dir, now, it.k, it.prompts, it.constitution)
        fresh = human + preferences_of(it.k, it.prompts, it.completions, it.pairs, it.decisions, it.constitution)
        labels.update(joined)
        yield fresh + replayed(run.dir, now, it.k, fresh, run.job.replay, run.job.seed, it.constitution)

    rows = it.rows("preferences", produce, before_commit=lambda: {"labels": labels} if labels else {})
    update_index(run.dir, it.k)
    _tell_labels(run, it.k)
    return rows


MIXES: dict[type[TrainingRow], Mix] = {Preference: mix_preferences}
"""Type of row → what makes an iteration's."""


def update(run: Running, it: Iteration) -> list[UpdateStep]:
    """Optimizer steps on what was mixed; none where too little was kept. Commits the next policy."""
    fresh = sum(row.source != "replay" for row in it.training)
    least = run.job.filters.min_kept_pairs
    skip = fresh < least

    def produce(_: list[UpdateStep]) -> Iterator[list[UpdateStep]]:
        if skip:
            return
        run.hand_over.load_learner(it.k)
        if run.job.learner.reference == "at_change" and (reference := run.hand_over.reference_at_change(it.k)):
            run.learner.call("refer_to", policy=reference)
        if known := _reference_of(run, it):
            run.learner.call("use_reference", logprobs=known)
        run.hand_over.learner_moves()
        run.progress.stage(it.k, "update", steps_planned(run, it), "steps", str(it.constitution.ref))
        for step in run.learner.stream("update", rows=it.training, iteration=it.k):
            run.progress.advance(1)
            for note in step.notes:
                run.tell_once("learner", note, it.k)
            yield [step]

    def commit() -> dict[str, Any]:
        return {"skipped": True} if skip else {"skipped": False, **run.hand_over.commit(it.k, it.dir.path / "policy")}

    steps = it.rows("updates", produce, before_commit=commit)
    if skip:
        kept = "kept or labelled" if any(row.source == "human" for row in it.training) else "kept"
        message = f"{fresh} {kept} pairs, fewer than filters.min_kept_pairs={least}: no update"
        run.tell_once("skipped_update", message, it.k, kept=fresh)
    if (kl := stopped_at_kl(run, it, steps)) is not None:
        message = (
            f"the update stopped after step {len(steps)} of {steps_planned(run, it)}: KL from the policy that began "
            f"the iteration is {kl:.4f} nats a token, over learner.max_kl={run.job.learner.max_kl}"
        )
        run.tell_once("update_stopped", message, it.k, kl=kl, steps=len(steps), planned=steps_planned(run, it))
    return steps


def _reference_of(run: Running, it: Iteration) -> dict[str, float]:
    """What the reference gives the rows' completions, by their id, as far as the judge found it when they were sampled
    (`base_logprobs`)."""
    learner = run.job.learner
    if learner.reference != "base" or not kind_of(learner.kind).takes_reference:
        return {}
    sampled = {row.iteration for row in it.training if isinstance(row, Preference)}
    found = (run.dir.iteration(k) for k in sorted(sampled))
    known = (d.read("base_logprobs", BaseLogprob) for d in found if d.is_complete("base_logprobs"))
    return {row.completion_id: row.logprob for rows in known for row in rows}


def steps_planned(run: Running, it: Iteration) -> int:
    """Optimizer steps that an update takes when nothing stops it."""
    return -(-len(it.training) // run.job.learner.batch_size) * run.job.learner.epochs


def stopped_at_kl(run: Running, it: Iteration, steps: Sequence[UpdateStep]) -> float | None:
    """KL at which an update stopped before its last step (`learner.max_kl`); None where it took all of them."""
    if steps and len(steps) < steps_planned(run, it) and too_far(steps[-1], run.job.learner.max_kl):
        return steps[-1].metrics[KL_METRIC]
    return None


def _measure_distances(run: Running, it: Iteration) -> None:
    """How far the policy has moved on the pairs that may be replayed, where that says how likely one is drawn."""
    settings = run.job.replay
    if not settings.share or settings.half_distance is None or it.dir.is_complete("preferences"):
        return
    found = members(run.dir, it.k, it.constitution.hash, settings.max_age)
    rows = [row for m in found.values() if (row := m.as_trained()) is not None]
    then: dict[str, float] = {}
    for i in sorted({row.iteration for row in rows}):
        sampled = run.dir.iteration(i).read("completions", Completion)
        then |= {c.id: c.logprob for c in sampled if c.logprob is not None}
    rows = [row for row in rows if {row.chosen_id, row.rejected_id} <= then.keys()]
    if not rows:
        return

    def produce(done: list[PolicyDistance]) -> Iterator[list[PolicyDistance]]:
        have = {d.pair_id for d in done}
        owed = [row for row in rows if row.pair_id not in have]
        run.hand_over.load_learner(it.k)
        run.progress.stage(it.k, "distance", len(owed), "pairs", str(it.constitution.ref))
        for n in range(0, len(owed), _SCORED_AT_ONCE):
            chunk = owed[n : n + _SCORED_AT_ONCE]
            sequences = [sequence for row in chunk for sequence in row.sequences]
            now = iter([sum(logps) for logps in run.learner.call("logprobs", sequences=sequences)])
            yield [_distance(row, then, (next(now), next(now))) for row in chunk]
            run.progress.advance(len(chunk))

    it.rows("policy_distances", produce)


_SCORED_AT_ONCE = 16
"""Pairs: a kill loses the work on no more."""


def _distance(row: Preference, then: Mapping[str, float], now: tuple[float, float]) -> PolicyDistance:
    """`now` is log p of the chosen and of the rejected completion."""
    tokens = len(row.chosen_token_ids) + len(row.rejected_token_ids)
    moved = abs(now[0] - then[row.chosen_id]) + abs(now[1] - then[row.rejected_id])
    return PolicyDistance(pair_id=row.pair_id, tokens=tokens, distance=moved / max(tokens, 1))


def _tell_labels(run: Running, k: int) -> None:
    """Notes which labels joined an update, how many can't yet, and what couldn't be read of them."""
    found = labels_noted(run.dir.iteration(k))
    before = labels_noted(run.dir.iteration(k - 1)) if k else {}
    for problem in found.get("problems", []):
        run.raise_alarm(Alarm(kind="labels", iteration=k, message=problem))
    if joined := found.get("joined"):
        message = f"{len(joined)} pairs join the update as people labelled them"
        run.tell_once("labels_joined", message, k, pairs=joined)
    if (stale := found.get("stale")) and stale != before.get("stale"):
        message = f"{stale} human labels wait: their pairs were judged under another text than the one in force"
        run.tell_once("labels_stale", message, k, labels=stale)
