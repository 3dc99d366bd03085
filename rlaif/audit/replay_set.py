"""Which old pairs a run could train on again in its next iteration, and why not on the others.

In: a run directory. Out: a `ReplaySet`: the pairs by text and age, with the reasons. What a text made of pairs that
were judged under another is read from the log (`old_pairs`); no judge is asked, and no code of the user's imported.
"""

from __future__ import annotations

from collections import Counter

from rlaif.config import Job
from rlaif.constitutions.copies import pinned_text
from rlaif.learning.replay_index import IndexRow, index_rows
from rlaif.learning.replay_set import TRAINS, newest_about, relabelled, standing_of
from rlaif.records import ConstitutionRef, OnChange, Record
from rlaif.review.labels import read_labels
from rlaif.rundir.store import RunDir


class Group(Record):
    """Pairs of one text and one age."""

    constitution: str
    """name@version of the text that they were judged under; its hash where no plan has it."""
    hash: str
    mixed_in: int
    """The iteration that had them fresh, from 0."""
    age: int
    """Iterations from that one to the next."""
    pairs: int
    human: int
    """Of them, as people labelled them."""
    votes: int
    """Valid votes behind the judge's verdicts on them."""
    may_train: int
    standing: dict[str, int]
    """How many are what (`OldPair.standing`) under the set's text; `valid`: judged under that one; `unknown`:
    judged under another, and nobody has looked yet."""
    why_not: dict[str, int]
    """How many may not train for which reason."""


class ReplaySet(Record):
    """The replay set of a run."""

    run: str
    iteration: int
    """The next one, from 0, as it would find the set."""
    planned: int
    """So many iterations the job has: there may be no next one."""
    constitution: ConstitutionRef | None
    """The text that the pairs are held against: that of the next iteration, where the run directory tells it; else the
    newest, None before the first iteration."""
    may_differ: str | None = None
    """Why the next iteration may be under another text, and what the run directory says of it; None where it won't."""
    share: float
    max_age: int
    on_change: OnChange
    pairs: int
    may_train: int
    groups: tuple[Group, ...]
    """The newest first."""


def replay_set(run: RunDir) -> ReplaySet:
    """The pairs that the next iteration could replay under its text, and the others.

    Raises:
        RlaifError: a file that it is made from is damaged.
    """
    job = run.job()
    settings = job.replay
    mixed = [k for k in run.iterations() if run.iteration(k).is_complete("preferences")]
    planned = [k for k in run.iterations() if (run.iteration(k).path / "plan.json").exists()]
    names = {run.plan(k).constitution.hash: str(run.plan(k).constitution) for k in planned}
    k = mixed[-1] + 1 if mixed else 0
    newest = run.plan(planned[-1]).constitution if planned else None
    now, may_differ = (newest, None) if k in planned else _next_text(run, job, k, newest)
    names |= {now.hash: str(now)} if now else {}
    log = read_labels(run)
    anew = {i: relabelled(run, i, log) for i in mixed}
    rows = {row.pair_id: row for row in index_rows(run)}  # of a pair in several mixes the newest
    about = newest_about(run, now.hash, run.iterations()) if now else {}
    pairs: dict[tuple[int, str], list[tuple[IndexRow, str, str | None]]] = {}
    for row in rows.values():
        standing = standing_of(row, about.get(row.pair_id), now.hash if now else "")
        why = _why_not(row, standing, k, settings.max_age, row.pair_id in anew[row.mixed_in])
        pairs.setdefault((row.mixed_in, row.constitution), []).append((row, standing, why))
    groups = tuple(
        Group(
            constitution=names.get(text, text) or "no text",
            hash=text,
            mixed_in=i,
            age=k - i,
            pairs=len(mine),
            human=sum(row.source == "human" for row, _, _ in mine),
            votes=sum(row.votes for row, _, _ in mine),
            may_train=sum(why is None for _, _, why in mine),
            standing=dict(Counter(standing for _, standing, _ in mine).most_common()),
            why_not=dict(Counter(why for _, _, why in mine if why is not None).most_common()),
        )
        for (i, text), mine in sorted(pairs.items(), reverse=True)
    )
    return ReplaySet(
        run=str(run.path),
        iteration=k,
        planned=job.iterations,
        constitution=now,
        may_differ=may_differ,
        share=settings.share,
        max_age=settings.max_age,
        on_change=settings.on_change,
        pairs=len(rows),
        may_train=sum(g.may_train for g in groups),
        groups=groups,
    )


def _next_text(
    run: RunDir, job: Job, k: int, newest: ConstitutionRef | None
) -> tuple[ConstitutionRef | None, str | None]:
    """The text of iteration k, which has no plan yet; or the newest, and why another one may be in force then."""
    if job.source is not None and not job.source.rejudge:
        return newest, "its text is the one that its stored pairs were judged under"
    schedule = job.schedule or {0: job.constitution or ""}
    reference = schedule[max(i for i in schedule if i <= k)]
    if job.schedule is None and "@" not in reference:
        return newest, f"the job follows `{reference}`, which is read again then"
    if (pinned := pinned_text(run, reference)) is None:
        return newest, f"the job names {reference} for it, and the run has no copy of that yet"
    return pinned, None


def _why_not(row: IndexRow, standing: str, k: int, max_age: int, relabelled: bool) -> str | None:
    """Why a pair may not be replayed in iteration k; None where it may."""
    if relabelled:
        return "relabelled"
    if k - row.mixed_in > max_age:
        return "too_old"
    return None if standing in TRAINS else standing
