"""The stages that train: the mix of rows, and the update."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rlaif.learning.mixing import labelled, preferences_of, read_now, replayed
from rlaif.loop.running import Iteration, Running
from rlaif.records import Alarm, Preference, UpdateStep
from rlaif.review.labels import labels_noted


def mix(run: Running, it: Iteration) -> list[Preference]:
    """What trains: kept pairs and labelled ones, and replayed pairs after them."""
    labels: dict[str, Any] = {}

    def produce(_: list[Preference]) -> Iterator[list[Preference]]:
        now = read_now(run.dir)
        human, joined = labelled(run.dir, now, it.k, it.prompts, it.text)
        fresh = human + preferences_of(it.k, it.prompts, it.completions, it.pairs, it.decisions, it.text)
        labels.update(joined)
        yield fresh + replayed(run.dir, now, it.k, fresh, run.job.replay, run.job.seed, it.text)

    rows = it.rows("preferences", produce, before_commit=lambda: {"labels": labels} if labels else {})
    _tell_labels(run, it.k)
    return rows


def update(run: Running, it: Iteration) -> list[UpdateStep]:
    """Optimizer steps on what was mixed; none where too little was kept. Commits the next policy."""
    fresh = sum(p.source != "replay" for p in it.preferences)
    least = run.job.filters.min_kept_pairs
    skip = fresh < least

    def produce(_: list[UpdateStep]) -> Iterator[list[UpdateStep]]:
        if skip:
            return
        run.hand_over.load_learner(it.k)
        run.hand_over.learner_moves()
        total = -(-len(it.preferences) // run.job.learner.batch_size) * run.job.learner.epochs
        run.progress.stage(it.k, "update", total, "steps", str(it.text.ref))
        for step in run.learner.stream("update", preferences=it.preferences, iteration=it.k):
            run.progress.advance(1)
            yield [step]

    def commit() -> dict[str, Any]:
        return {"skipped": True} if skip else {"skipped": False, **run.hand_over.commit(it.k, it.dir.path / "policy")}

    steps = it.rows("updates", produce, before_commit=commit)
    if skip:
        kept = "kept or labelled" if any(p.source == "human" for p in it.preferences) else "kept"
        message = f"{fresh} {kept} pairs, fewer than filters.min_kept_pairs={least}: no update"
        run.tell_once("skipped_update", message, it.k, kept=fresh)
    else:
        run.hand_over.prune_states(it.k)
    return steps


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
