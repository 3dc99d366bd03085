"""A run's decisions made again from its recorded votes: other filters, another aggregation, today's parser. No model.

In: a run directory, and settings that differ from its own (`replay_settings`). Out: a `Replay`: which pairs would newly
be kept or dropped, whose winner turns round, by reason and by iteration. Nothing is written. With the run's own
settings every decision comes out as it was made.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain, zip_longest
from typing import Any, Literal, get_args

from rlaif.audit.replay_iteration import Iteration, Misfit, unreadable
from rlaif.audit.replay_old_pairs import decided_anew, old_decisions
from rlaif.audit.replay_settings import Settings
from rlaif.audit.rows import rows_or_problems, sound_rows
from rlaif.config import Job
from rlaif.errors import RlaifError, said
from rlaif.judging.kinds import kind_of
from rlaif.records import Completion, Decision, OldPair, Pair, Prompt, Record
from rlaif.review.labels import labels_of
from rlaif.rundir.store import RunDir, StageDir

EXAMPLES = 10
Kind = Literal["newly_kept", "newly_dropped", "newly_reviewed", "reversed", "other_reasons"]


class Change(Record):
    """A pair that would be decided otherwise."""

    iteration: int
    pair_id: str
    kind: Kind
    before: Decision
    after: Decision
    prompt: str | None = None
    """With the texts of both sides: in examples only."""
    first: str | None = None
    second: str | None = None


class Transition(Record):
    """How many pairs went from one outcome to another; a dropped pair counts under its first reason."""

    before: str
    after: str
    pairs: int


class Replayed(Record):
    """One iteration, before and after."""

    iteration: int
    constitution: str
    pairs: int
    kept_before: int
    kept_after: int
    newly_kept: int
    newly_dropped: int
    newly_reviewed: int
    """Sent to a person."""
    reversed: int
    """Kept both times, with the other side as winner."""
    other_reasons: int
    reparsed: int
    """Votes that the parser reads otherwise now."""
    updated: bool
    """It had enough pairs for an update, kept ones and those that people labelled ..."""
    would_update: bool
    """... and would have now, the same labels given. What later iterations would have sampled, no replay can tell."""


class ReplayedOld(Record):
    """What an iteration's text made of earlier pairs, before and after: those that it decided anew."""

    iteration: int
    constitution: str
    pairs: int
    kept_before: int
    kept_after: int
    newly_kept: int
    newly_dropped: int
    reversed: int
    other_reasons: int


class Replay(Record):
    """What other settings would have decided."""

    run: str
    settings: dict[str, tuple[Any, Any]]
    """Key → the run's value and the replay's, where they differ."""
    votes: int
    iterations: tuple[Replayed, ...]
    old_pairs: tuple[ReplayedOld, ...]
    """Of iterations that decided pairs of earlier ones anew, under a text that was new then."""
    transitions: tuple[Transition, ...]
    examples: tuple[Change, ...]
    notes: tuple[str, ...]
    problems: tuple[str, ...]
    """Lines that can't be read, whose pairs are left out, and iterations that are."""

    def total(self, what: str) -> int:
        """The sum of one column over the iterations."""
        return sum(getattr(i, what) for i in self.iterations)


def replay(
    run: RunDir,
    settings: Settings,
    changed: Mapping[str, tuple[Any, Any]] | None = None,
    progress: Callable[[int], None] = lambda iteration: None,
) -> Replay:
    """Decides every complete iteration again, and earlier pairs that it decided anew; `progress` is told each.

    Raises:
        UserError: the calibration isn't about this run's votes, and `filters.uncalibrated` says stop.
        RlaifError: a judge template is gone, and `settings.parser` needs it.
    """
    own = run.job()
    judge = kind_of(own.judge)
    iterations: list[Replayed] = []
    old_pairs: list[ReplayedOld] = []
    undecided = 0
    transitions: Counter[tuple[str, str]] = Counter()
    found: dict[Kind, list[Change]] = defaultdict(list)
    problems: list[str] = []
    votes = 0
    for k in run.iterations():
        here = run.iteration(k)
        if not here.is_complete("decisions"):
            continue
        if (problem := unreadable(run, k)) is not None:
            problems.append(f"{problem}; iteration {k + 1} is left out")
            continue
        progress(k)
        again = Iteration(run, k, settings)
        try:
            tally = _Tally.counting(k, again.decisions())
        except Misfit as e:
            problems.append(f"{e}; iteration {k + 1} is left out")
            continue
        transitions += tally.transitions
        for change in tally.changes:
            found[change.kind].append(change)
        votes += again.votes
        problems += again.problems
        try:
            if rows := decided_anew(again):
                if judge.unshown:
                    undecided += len(rows)
                else:
                    old_pairs.append(_old_pairs(again, rows))
        except (OSError, RlaifError) as e:
            problems.append(f"{said(e)}; the earlier pairs that iteration {k + 1} decided anew are left out")
        iterations.append(
            Replayed(
                iteration=k,
                constitution=str(again.plan.constitution),
                reparsed=again.reparsed,
                updated=_updated_in(here, tally.counts["kept_before"], own),
                would_update=_enough(here, tally.counts["kept_after"], settings.job),
                **{name: tally.counts[name] for name in ("pairs", "kept_before", "kept_after", *get_args(Kind))},
            )
        )
    examples = tuple(_with_texts(run, _in_turn(found), problems))
    notes = []
    if judge.early_stop:
        notes.append("judge.early_stop left ballots out that the run's own filters didn't need; others might have")
    if undecided:
        notes.append(
            f"old_pairs: {undecided} decisions on earlier pairs under a later text are left as they were made; what "
            f"{own.judge.kind} is asked is in its source, and a replay imports no code"
        )
    if own.filters.rules:
        named = ", ".join(own.filters.rules)
        notes.append(f"filters.rules: a replay imports no code, so what {named} said is taken as the log has it")
    if settings.parser and judge.note_on_reading:
        notes.append(judge.note_on_reading)
    return Replay(
        run=str(run.path),
        settings=dict(changed or {}),
        votes=votes,
        iterations=tuple(iterations),
        old_pairs=tuple(old_pairs),
        transitions=tuple(Transition(before=b, after=a, pairs=n) for (b, a), n in transitions.most_common()),
        examples=examples,
        notes=tuple(notes),
        problems=tuple(problems),
    )


def _old_pairs(again: Iteration, rows: list[OldPair]) -> ReplayedOld:
    """Decides earlier pairs again, and counts."""
    tally = _Tally.counting(again.number, old_decisions(again, rows))
    names = [name for name in ReplayedOld.model_fields if name not in ("iteration", "constitution")]
    counts = {name: tally.counts[name] for name in names}
    return ReplayedOld(iteration=again.number, constitution=str(again.plan.constitution), **counts)


class _Tally:
    """Decisions of an iteration, before and after, counted."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.transitions: Counter[tuple[str, str]] = Counter()
        self.changes: list[Change] = []
        """The first of each kind, as examples."""

    @classmethod
    def counting(cls, iteration: int, decisions: Iterable[tuple[Decision, Decision]]) -> _Tally:
        """Of an iteration's decisions, before and after.

        Raises:
            Misfit: its files don't fit each other.
        """
        tally = cls()
        for before, after in decisions:
            tally._add(iteration, before, after)
        return tally

    def _add(self, iteration: int, before: Decision, after: Decision) -> None:
        self.counts["pairs"] += 1
        self.counts["kept_before"] += before.status == "kept"
        self.counts["kept_after"] += after.status == "kept"
        self.transitions[_label(before), _label(after)] += 1
        if (kind := _kind(before, after)) is None:
            return
        self.counts[kind] += 1
        if self.counts[kind] <= EXAMPLES:
            change = Change(iteration=iteration, pair_id=before.pair_id, kind=kind, before=before, after=after)
            self.changes.append(change)


def _updated_in(here: StageDir, kept: int, own: Job) -> bool:
    """Whether the iteration made an update; of one that isn't that far, whether it will."""
    return here.policy_made() is not None if here.is_complete("updates") else _enough(here, kept, own)


def _enough(here: StageDir, kept: int, job: Job) -> bool:
    """Whether so many kept pairs make an update, with those that people labelled."""
    labels = labels_of(here) if here.is_complete("preferences") else {}
    return kept + len(labels) >= job.filters.min_kept_pairs


def _label(decision: Decision) -> str:
    return decision.reasons[0] if decision.status == "dropped" and decision.reasons else decision.status


_BY_STATUS: dict[str, Kind] = {"kept": "newly_kept", "dropped": "newly_dropped", "review": "newly_reviewed"}


def _kind(before: Decision, after: Decision) -> Kind | None:
    if before.status != after.status:
        return _BY_STATUS[after.status]
    if before.winner != after.winner:
        return "reversed"
    return "other_reasons" if before.reasons != after.reasons else None


def _in_turn(found: Mapping[Kind, Sequence[Change]]) -> list[Change]:
    """Ten changes, the kinds in turn, those that train first; other reasons for a pair that stays dropped don't."""
    kinds: tuple[Kind, ...] = ("reversed", "newly_kept", "newly_dropped", "newly_reviewed")
    turns = zip_longest(*(found.get(kind, ()) for kind in kinds))
    return [change for change in chain.from_iterable(turns) if change is not None][:EXAMPLES]


def _with_texts(run: RunDir, changes: Sequence[Change], problems: list[str]) -> Iterator[Change]:
    """The changes with what was asked and answered; damaged prompts are added to `problems`."""
    wanted: dict[int, set[str]] = defaultdict(set)
    for change in changes:
        wanted[change.iteration].add(change.pair_id)
    pairs: dict[str, Pair] = {}
    answers: dict[str, str] = {}
    for k, ids in wanted.items():
        here = run.iteration(k).path
        mine = {p.id: p for p in sound_rows(here / "pairs.jsonl", Pair) if p.id in ids}
        pairs |= mine
        sides = {c for p in mine.values() for c in (p.first, p.second)}
        answers |= {c.id: c.text for c in sound_rows(here / "completions.jsonl", Completion) if c.id in sides}
    file = run.path / "prompts" / "train.jsonl"
    asked = {p.prompt_id for p in pairs.values()}
    prompts: dict[str, str] = {}
    if file.exists() and changes:
        for number, (prompt, problem) in enumerate(rows_or_problems(file, Prompt), 1):
            if prompt is None:
                problems.append(f"{file}:{number}: not a Prompt ({problem}); the prompt's text is left out")
            elif prompt.id in asked:
                prompts[prompt.id] = prompt.text
    for change in changes:
        pair = pairs[change.pair_id]
        shown = {"first": answers.get(pair.first), "second": answers.get(pair.second)}
        yield change.model_copy(update={"prompt": prompts.get(pair.prompt_id), **shown})
