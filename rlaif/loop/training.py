"""The stages that train: the mix of rows, and the update.

Which rows are mixed the learner says (`row_type`). To add a type: a stage for its rows in `rlaif/rundir/stages.py`, a
function here that makes them, and a line in `MIXES`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from rlaif import config
from rlaif.errors import UserError
from rlaif.learning import kind_of
from rlaif.learning.mixing import labelled, preferences_of, read_now, replayed
from rlaif.learning.replay_index import update_index
from rlaif.loop.running import Iteration, Running
from rlaif.records import Alarm, Preference, TrainingRow, UpdateStep
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
        run.hand_over.learner_moves()
        total = -(-len(it.training) // run.job.learner.batch_size) * run.job.learner.epochs
        run.progress.stage(it.k, "update", total, "steps", str(it.constitution.ref))
        for step in run.learner.stream("update", rows=it.training, iteration=it.k):
            run.progress.advance(1)
            yield [step]

    def commit() -> dict[str, Any]:
        return {"skipped": True} if skip else {"skipped": False, **run.hand_over.commit(it.k, it.dir.path / "policy")}

    steps = it.rows("updates", produce, before_commit=commit)
    if skip:
        kept = "kept or labelled" if any(row.source == "human" for row in it.training) else "kept"
        message = f"{fresh} {kept} pairs, fewer than filters.min_kept_pairs={least}: no update"
        run.tell_once("skipped_update", message, it.k, kept=fresh)
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
