"""What an edit of a constitution would do to a run's verdicts, asked before anyone trains on it.

In: a run, the text before and after, and the run's judge. Out: an `Effect`: how many verdicts on a seeded sample of the
run's own pairs turn round, which of the edit's parts do it, and examples.

A verdict is the stored one where the pair was judged with exactly the questions that would be asked now (their ids
say so); elsewhere the judge is asked, under the old text too. A part of an edit is a principle that was
added, removed or changed, or the text's own fields. A part *alone* turns a verdict when the old text with only this
part edited turns it too; it is *needed* when the new text without this part doesn't. For the likelihood judge, whose
votes are each about one principle, both follow from the votes at hand. A judge that reads all rules in one question is
asked again with such texts, about the turned pairs only.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Literal, NamedTuple

from pydantic import ValidationError

from rlaif.audit.sample import Sample, draw
from rlaif.config import Filters, Job
from rlaif.constitutions.constitution import Constitution, Principle, diff
from rlaif.errors import UserError
from rlaif.intervals import share, wilson
from rlaif.judging.filters import decide
from rlaif.judging.kinds import kind_of
from rlaif.judging.opened import Opened
from rlaif.judging.verdicts import aggregate, by_pair, jurors_for
from rlaif.records import ConstitutionRef, Pair, Record, Verdict, Vote
from rlaif.rundir.store import RunDir

EXAMPLES = 10
FEW_PARTS = 4
"""An edit of more parts is taken apart by a reading judge only when asked for: each part costs up to two texts."""
TAKEN_APART = 50
"""Turned pairs that a reading judge is asked about, part by part."""
OWN_FIELDS = "(the text's own fields)"

Verdicts = dict[str, Verdict]
Change = Literal["added", "removed", "changed"]


class Edit(NamedTuple):
    """A text before and after."""

    before: Constitution
    after: Constitution

    @property
    def parts(self) -> dict[str, Change]:
        """The parts of the edit, and what happened to each."""
        return {c.principle or OWN_FIELDS: c.kind for c in diff(self.before, self.after)}

    def applied(self, parts: Collection[str]) -> Constitution | None:
        """The old text with some parts of the edit applied; None when that is no text (nothing would elect)."""
        before, after = self
        new = {p.id: p for p in after.principles}
        kept: list[Principle] = []
        for p in before.principles:
            if p.id not in parts:
                kept.append(p)
            elif p.id in new:
                kept.append(new[p.id])
        have = {p.id for p in before.principles}
        kept += [p for p in after.principles if p.id not in have and p.id in parts]
        own = after if OWN_FIELDS in parts else before
        order = {p.id: n for n, p in enumerate(own.principles)}
        kept.sort(key=lambda p: order.get(p.id, len(order)))
        content = {"summary": own.summary, "template": own.template, "principles": [p.model_dump() for p in kept]}
        try:
            return Constitution.model_validate({"name": before.name, "version": before.version, **content})
        except ValidationError:
            return None


class Options(NamedTuple):
    """How much is asked."""

    sample: int = 200
    """Pairs."""
    seed: int = 0
    take_apart: bool | None = None
    """Whether a reading judge is asked about each part of the edit; None: when they are few."""


_USUAL = Options()


class Part(Record):
    """One part of the edit, and the turned verdicts that it explains."""

    part: str
    """A principle's id, or the text's own fields."""
    kind: Change
    alone: int | None = None
    """Turned by this part alone; None when the old text can't be edited in this part alone, or nobody asked."""
    needed: int | None = None
    """Not turned by all other parts together; None as above."""


class Turned(Record):
    """A pair whose verdict turns round."""

    pair_id: str
    iteration: int
    prompt: str
    first: str
    second: str
    before: Verdict
    after: Verdict
    alone: tuple[str, ...]
    needed: tuple[str, ...]


class Effect(Record):
    """What the edit does to the sampled verdicts."""

    run: str
    before: ConstitutionRef
    after: ConstitutionRef
    judges: tuple[str, ...]
    seed: int
    pairs: int
    """Sampled."""
    stored: int
    """Of them with a stored verdict under the old text ..."""
    stored_after: int
    """... and under the new one, where the run went on with it; elsewhere the judge was asked."""
    asked: int
    """Votes that were cast for this."""
    compared: int
    """Pairs on which both texts name a side."""
    turned: int
    """Of the compared ones, those on which they name different sides."""
    share: float | None
    interval: tuple[float, float]
    """Wilson, 95 %: of this run's pairs, as they were sampled."""
    undecided: int
    """Pairs on which one of the texts, or both, name no side."""
    kept_before: int
    kept_after: int
    """By the run's filters, without its calibration."""
    parts: tuple[Part, ...]
    taken_apart: int
    """Turned pairs behind the counts of the parts."""
    only_together: int
    """Of them turned by no part alone."""
    examples: tuple[Turned, ...]
    notes: tuple[str, ...]


class _Answers(NamedTuple):
    """What the sample's votes say under one text."""

    stored: Collection[str]
    """Pairs whose votes are the run's own."""
    votes: dict[str, list[Vote]]
    verdicts: Verdicts


class _Explained(NamedTuple):
    """Which parts of the edit turn which pairs; a part that can't be told, or wasn't asked about, is in neither."""

    alone: dict[str, set[str]]
    """Part → pairs that it turns alone."""
    needed: dict[str, set[str]]
    """Part → pairs that don't turn without it."""

    def part(self, name: str, kind: Change) -> Part:
        """A part of the edit with its counts."""
        alone, needed = self.alone.get(name), self.needed.get(name)
        return Part(
            part=name,
            kind=kind,
            alone=None if alone is None else len(alone),
            needed=None if needed is None else len(needed),
        )


def effect_of(
    run: RunDir,
    edit: Edit,
    judge: Opened,
    job: Job,
    options: Options = _USUAL,
    progress: Callable[[int, str], None] = lambda votes, text: None,
) -> Effect:
    """Asks the judge about a sample of the run's pairs under the new text, and compares.

    `job` is what the judge was opened from: the run's own, or one with another judge; `progress` is told the votes that
    came, and under which text.

    Raises:
        UserError: the texts are the same, or the run has no complete pairs or no copy of its prompts.
    """
    before, after = edit
    changes = edit.parts
    if not changes:
        raise UserError(f"{before.ref} and {after.ref} say the same ({before.hash}): there is nothing to ask")
    asking = _Asking(judge, job, draw(run, options.sample, options.seed), progress)
    rows = asking.sample.rows
    old, new = asking.about(before), asking.about(after)
    both = [i for i in rows if i in old.verdicts and i in new.verdicts]
    decided = [i for i in both if _sides(old.verdicts[i], new.verdicts[i])]
    turned = [i for i in decided if old.verdicts[i].outcome != new.verdicts[i].outcome]
    notes = _repeated([(old.votes[i], new.votes[i]) for i in both if (i in old.stored) != (i in new.stored)])
    per_principle = kind_of(job.judge).per_principle
    apart = turned
    # An edit of one part is its only part: there is nothing to ask.
    if not per_principle and len(changes) > 1:
        apart = turned[:TAKEN_APART]
        if options.take_apart is False or (options.take_apart is None and len(changes) > FEW_PARTS):
            notes.append(f"the edit has {len(changes)} parts, which weren't asked about one by one; --take-apart does")
            apart = []
    mixed = asking.mixing(old, new) if per_principle else asking.again
    explained = _explain(edit, apart, old.verdicts, mixed) if apart else _Explained({}, {})
    parts = [explained.part(name, kind) for name, kind in changes.items()]
    filters = run.job().filters
    if filters.calibration:
        notes.append("kept pairs are counted without the run's calibration: it is about the old text")
    return Effect(
        run=str(run.path),
        before=before.ref,
        after=after.ref,
        judges=tuple(sorted({v.ballot.judge for votes in new.votes.values() for v in votes})),
        seed=options.seed,
        pairs=len(rows),
        stored=len(old.stored),
        stored_after=len(new.stored),
        asked=asking.asked,
        compared=len(decided),
        turned=len(turned),
        share=share(len(turned), len(decided)),
        interval=wilson(len(turned), len(decided)),
        undecided=len(both) - len(decided),
        kept_before=_kept(asking.sample, old.verdicts, filters),
        kept_after=_kept(asking.sample, new.verdicts, filters),
        parts=tuple(sorted(parts, key=lambda p: (-(p.alone or 0), -(p.needed or 0)))),
        taken_apart=len(apart),
        only_together=sum(not any(i in ids for ids in explained.alone.values()) for i in apart),
        examples=tuple(_example(asking.sample, i, old, new, explained) for i in turned[:EXAMPLES]),
        notes=tuple(notes),
    )


def _kept(sample: Sample, verdicts: Verdicts, filters: Filters) -> int:
    """How many of the pairs the filters keep."""
    texts = {i: c.text for i, c in sample.candidates.items()}
    cut = {i for i, c in sample.candidates.items() if c.cut_off}
    decisions = (decide(v, sample.rows[i].pair, filters, texts, cut=cut) for i, v in verdicts.items())
    return sum(d.status == "kept" for d in decisions)


def _example(sample: Sample, pair_id: str, old: _Answers, new: _Answers, explained: _Explained) -> Turned:
    pair, iteration, _ = sample.rows[pair_id]
    first, second = sample.candidates[pair.first], sample.candidates[pair.second]
    return Turned(
        pair_id=pair_id,
        iteration=iteration,
        prompt=first.messages[-1].content,
        first=first.text,
        second=second.text,
        before=old.verdicts[pair_id],
        after=new.verdicts[pair_id],
        alone=tuple(name for name, ids in explained.alone.items() if pair_id in ids),
        needed=tuple(name for name, ids in explained.needed.items() if pair_id in ids),
    )


Mixed = Callable[[Constitution, set[str], Sequence[str]], Verdicts]
"""Verdicts on pairs under the old text with some parts of the edit applied: that text, the parts, the pairs."""


class _Asking:
    """The judge, asked about the sample under one text after another."""

    def __init__(self, judge: Opened, job: Job, sample: Sample, progress: Callable[[int, str], None]):
        self.judge, self.job, self.sample, self.progress = judge, job, sample, progress
        self.asked = 0

    def about(self, constitution: Constitution) -> _Answers:
        """What the sample's votes say under a text: stored ones where there are, others asked now."""
        stored = self._stored(constitution)
        votes = stored | self._votes(constitution, [p for p in self.sample.pairs if p.id not in stored])
        return _Answers(stored.keys(), votes, self._verdicts(constitution, votes))

    def again(self, constitution: Constitution, applied: set[str], ids: Sequence[str]) -> Verdicts:
        """`Mixed` of a judge that reads all rules at once: it is asked under that text."""
        pairs = [p for p in self.sample.pairs if p.id in set(ids)]
        return self._verdicts(constitution, self._votes(constitution, pairs))

    def mixing(self, old: _Answers, new: _Answers) -> Mixed:
        """`Mixed` of a judge whose votes are each about one principle: they are at hand."""

        def mixed(constitution: Constitution, applied: set[str], ids: Sequence[str]) -> Verdicts:
            votes = {
                i: [v for v in old.votes[i] if v.ballot.principles[0] not in applied]
                + [v for v in new.votes[i] if v.ballot.principles[0] in applied]
                for i in ids
            }
            return self._verdicts(constitution, votes)

        return mixed

    def _stored(self, constitution: Constitution) -> dict[str, list[Vote]]:
        """Votes of the run that answer exactly what would be asked now."""
        found: dict[str, list[Vote]] = {}
        for pair_id, row in self.sample.rows.items():
            votes = self.sample.votes.get(pair_id, [])
            if row.constitution == constitution.hash and votes:
                wanted = {b.id for b in self.judge.ballots([row.pair], constitution)}
                if wanted == {v.ballot.id for v in votes}:
                    found[pair_id] = votes
        return found

    def _votes(self, constitution: Constitution, pairs: Sequence[Pair]) -> dict[str, list[Vote]]:
        """Votes on pairs under a text, asked now."""
        if not pairs:
            return {}
        sides = {i for p in pairs for i in (p.first, p.second)}
        candidates = [c for i, c in self.sample.candidates.items() if i in sides]
        votes: list[Vote] = []
        for chunk in self.judge.ask(pairs, candidates, constitution):
            votes += chunk
            self.asked += len(chunk)
            self.progress(len(chunk), str(constitution.ref))
        return by_pair(votes)

    def _verdicts(self, constitution: Constitution, votes: Mapping[str, Sequence[Vote]]) -> Verdicts:
        """The verdicts of votes, as the run adds them up; jurors are fitted on these votes."""
        method = self.job.filters.aggregate
        jurors = jurors_for(method, [v for mine in votes.values() for v in mine])
        of_juror = jurors.weights if jurors else None
        return {i: aggregate(mine, constitution.weights, method, of_juror) for i, mine in votes.items() if mine}


def _explain(edit: Edit, turned: Sequence[str], old: Verdicts, mixed: Mixed) -> _Explained:
    """What each part does to the turned pairs."""
    parts = edit.parts
    names = set(parts)
    if len(names) == 1:
        return _Explained({name: set(turned) for name in names}, {name: set(turned) for name in names})
    done: dict[str, set[str]] = {}

    def turns(applied: set[str]) -> set[str] | None:
        constitution = edit.applied(applied)
        if constitution is None:
            return None
        if constitution.hash not in done:
            verdicts = mixed(constitution, applied, turned)
            done[constitution.hash] = {
                i for i, v in verdicts.items() if _sides(old[i], v) and v.outcome != old[i].outcome
            }
        return done[constitution.hash]

    explained = _Explained({}, {})
    for name in parts:
        if (by_it := turns({name})) is not None:
            explained.alone[name] = by_it
        if (without := turns(names - {name})) is not None:
            explained.needed[name] = set(turned) - without
    return explained


def _sides(*verdicts: Verdict) -> bool:
    return all(v.outcome in ("first", "second") for v in verdicts)


def _repeated(both: Sequence[tuple[Sequence[Vote], Sequence[Vote]]]) -> list[str]:
    """How often the judge says something else to the same question, once stored and once now: what varies by itself."""
    same = other = 0
    for before, after in both:
        again = {_question(v): v for v in after if not v.ballot.guard}
        for vote in before:
            if (now := again.get(_question(vote))) is not None and not vote.ballot.guard:
                same += 1
                other += now.outcome != vote.outcome
    if not same:
        return []
    return [f"of {same} votes on questions that are the same in both texts, {other} came out otherwise this time"]


def _question(vote: Vote) -> tuple[str, ...]:
    b = vote.ballot
    # A reading judge's template is the same whatever text it shows.
    text = b.constitution if b.order != "none" else ""
    return b.judge, b.voice, b.template, b.order, str(b.sample_index), text
