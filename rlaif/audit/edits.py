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

import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from pydantic import ValidationError

from rlaif.audit.replay import pair_named, stage_rows
from rlaif.config import Job
from rlaif.constitutions.constitution import Constitution, Principle, diff
from rlaif.errors import RlaifError, UserError
from rlaif.intervals import wilson
from rlaif.judging.candidates import Candidate
from rlaif.judging.filters import decide
from rlaif.judging.opened import Opened
from rlaif.judging.verdicts import aggregate, by_pair, jurors_for
from rlaif.records import Completion, ConstitutionRef, Pair, Prompt, Record, Verdict, Vote, stored
from rlaif.rundir.store import RunDir, read_rows

EXAMPLES = 10
FEW_PARTS = 4
"""An edit of more parts is taken apart by a reading judge only when asked for: each part costs up to two texts."""
TAKEN_APART = 50
"""Turned pairs that a reading judge is asked about, part by part."""
OWN_FIELDS = "(the text's own fields)"

Verdicts = dict[str, Verdict]


class Part(Record):
    """One part of the edit, and the turned verdicts that it explains."""

    part: str
    """A principle's id, or the text's own fields."""
    kind: Literal["added", "removed", "changed"]
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


class _Sampled(NamedTuple):
    pair: Pair
    iteration: int
    constitution: str


class _Sample(NamedTuple):
    rows: list[_Sampled]
    candidates: list[Candidate]
    votes: dict[str, list[Vote]]

    @property
    def pairs(self) -> list[Pair]:
        return [row.pair for row in self.rows]


def effect_of(
    run: RunDir,
    before: Constitution,
    after: Constitution,
    job: Job,
    run_job: Job,
    judge: Opened,
    sample: int = 200,
    seed: int = 0,
    take_apart: bool | None = None,
    progress: Callable[[int, str], None] = lambda votes, text: None,
) -> Effect:
    """Asks the judge about a sample of the run's pairs under the new text, and compares.

    `job` is what the judge was opened from, `run_job` the run's own; `take_apart` asks a reading judge about each part
    of the edit (None: when they are few); `progress` is told the votes that came, and under which text.

    Raises:
        UserError: the texts are the same, or the run has no complete pairs or no copy of its prompts.
    """
    parts = _parts(before, after)
    if not parts:
        raise UserError(f"{before.ref} and {after.ref} say the same ({before.hash}): there is nothing to ask")
    asking = _Asking(judge, job, _draw(run, sample, seed), progress)
    notes: list[str] = []
    known, known_after = (asking.stored(text) for text in (before, after))
    old_votes, new_votes = (
        stored | asking.votes(text, [p for p in asking.sample.pairs if p.id not in stored])
        for text, stored in ((before, known), (after, known_after))
    )
    old, new = asking.verdicts(before, old_votes), asking.verdicts(after, new_votes)
    both = [p.id for p in asking.sample.pairs if p.id in old and p.id in new]
    decided = [i for i in both if _sides(old[i], new[i])]
    turned = [i for i in decided if old[i].outcome != new[i].outcome]
    notes += _repeated([(old_votes[i], new_votes[i]) for i in both if (i in known) != (i in known_after)])
    apart = turned
    alone: dict[str, set[str]] = {}
    needed: dict[str, set[str]] = {}
    per_principle = job.judge.kind == "likelihood"
    if per_principle:

        def mixed(text: Constitution, applied: set[str], ids: Sequence[str]) -> Verdicts:
            votes = {
                i: [v for v in old_votes[i] if v.ballot.principles[0] not in applied]
                + [v for v in new_votes[i] if v.ballot.principles[0] in applied]
                for i in ids
            }
            return asking.verdicts(text, votes)
    else:

        def mixed(text: Constitution, applied: set[str], ids: Sequence[str]) -> Verdicts:
            pairs = [p for p in asking.sample.pairs if p.id in set(ids)]
            return asking.verdicts(text, asking.votes(text, pairs))

        apart = turned[:TAKEN_APART]
        if len(parts) == 1:
            apart = turned  # nothing to ask: the edit is its only part
        elif take_apart is False or (take_apart is None and len(parts) > FEW_PARTS):
            notes.append(f"the edit has {len(parts)} parts, which weren't asked about one by one; --take-apart does")
            apart = []
    if apart:
        alone, needed = _explain(before, after, parts, apart, old, mixed)
    explained = [
        Part(
            part=name,
            kind=kind,
            alone=len(alone[name]) if name in alone else None,
            needed=len(needed[name]) if name in needed else None,
        )
        for name, kind in parts.items()
    ]
    explained.sort(key=lambda p: (-(p.alone or 0), -(p.needed or 0)))
    texts = {c.completion_id: c for c in asking.sample.candidates}
    plain = {i: c.text for i, c in texts.items()}
    pairs = {row.pair.id: row for row in asking.sample.rows}
    if run_job.filters.calibration:
        notes.append("kept pairs are counted without the run's calibration: it is about the old text")
    cut = {i for i, c in texts.items() if c.cut_off}

    def kept(verdicts: Verdicts) -> int:
        made = (decide(v, pairs[i].pair, run_job.filters, plain, cut=cut) for i, v in verdicts.items())
        return sum(d.status == "kept" for d in made)

    return Effect(
        run=str(run.path),
        before=before.ref,
        after=after.ref,
        judges=tuple(sorted({v.ballot.judge for votes in new_votes.values() for v in votes})),
        seed=seed,
        pairs=len(pairs),
        stored=len(known),
        stored_after=len(known_after),
        asked=asking.asked,
        compared=len(decided),
        turned=len(turned),
        share=len(turned) / len(decided) if decided else None,
        interval=wilson(len(turned), len(decided)),
        undecided=len(both) - len(decided),
        kept_before=kept(old),
        kept_after=kept(new),
        parts=tuple(explained),
        taken_apart=len(apart),
        only_together=sum(not any(i in ids for ids in alone.values()) for i in apart),
        examples=tuple(
            Turned(
                pair_id=i,
                iteration=pairs[i].iteration,
                prompt=texts[pairs[i].pair.first].messages[-1].content,
                first=plain[pairs[i].pair.first],
                second=plain[pairs[i].pair.second],
                before=old[i],
                after=new[i],
                alone=tuple(n for n in alone if i in alone[n]),
                needed=tuple(n for n in needed if i in needed[n]),
            )
            for i in turned[:EXAMPLES]
        ),
        notes=tuple(notes),
    )


class _Asking:
    """The judge, asked about the sample under one text after another."""

    def __init__(self, judge: Opened, job: Job, sample: _Sample, progress: Callable[[int, str], None]):
        self.judge, self.job, self.sample, self.progress = judge, job, sample, progress
        self.asked = 0

    def stored(self, text: Constitution) -> dict[str, list[Vote]]:
        """Votes of the run that answer exactly what would be asked now."""
        found: dict[str, list[Vote]] = {}
        for row in self.sample.rows:
            votes = self.sample.votes.get(row.pair.id, [])
            if row.constitution == text.hash and votes:
                wanted = {b.id for b in self.judge.ballots([row.pair], text)}
                if wanted == {v.ballot.id for v in votes}:
                    found[row.pair.id] = votes
        return found

    def votes(self, text: Constitution, pairs: Sequence[Pair]) -> dict[str, list[Vote]]:
        """Votes on pairs under a text, asked now."""
        if not pairs:
            return {}
        sides = {i for p in pairs for i in (p.first, p.second)}
        candidates = [c for c in self.sample.candidates if c.completion_id in sides]
        votes: list[Vote] = []
        for chunk in self.judge.ask(pairs, candidates, text):
            votes += chunk
            self.asked += len(chunk)
            self.progress(len(chunk), str(text.ref))
        return by_pair(votes)

    def verdicts(self, text: Constitution, votes: Mapping[str, Sequence[Vote]]) -> Verdicts:
        """The verdicts of votes, as the run adds them up; jurors are fitted on these votes."""
        method = self.job.filters.aggregate
        jurors = jurors_for(method, [v for mine in votes.values() for v in mine])
        of_juror = jurors.weights if jurors else None
        return {i: aggregate(mine, text.weights, method, of_juror) for i, mine in votes.items() if mine}


def _explain(
    before: Constitution,
    after: Constitution,
    parts: Mapping[str, str],
    turned: Sequence[str],
    old: Verdicts,
    mixed: Callable[[Constitution, set[str], Sequence[str]], Verdicts],
) -> tuple[dict[str, set[str]], dict[str, set[str]]]:
    """(part → pairs that it turns alone, part → pairs that don't turn without it)."""
    alone: dict[str, set[str]] = {}
    needed: dict[str, set[str]] = {}
    if len(parts) == 1:
        return {name: set(turned) for name in parts}, {name: set(turned) for name in parts}
    done: dict[str, set[str]] = {}

    def turns(applied: set[str]) -> set[str] | None:
        text = edited(before, after, applied)
        if text is None:
            return None
        if text.hash not in done:
            verdicts = mixed(text, applied, turned)
            done[text.hash] = {i for i, v in verdicts.items() if _sides(old[i], v) and v.outcome != old[i].outcome}
        return done[text.hash]

    for name in parts:
        if (by_it := turns({name})) is not None:
            alone[name] = by_it
        if (without := turns(set(parts) - {name})) is not None:
            needed[name] = set(turned) - without
    return alone, needed


def edited(before: Constitution, after: Constitution, applied: set[str]) -> Constitution | None:
    """The old text with some parts of the edit applied; None when that is no text (nothing would elect)."""
    new = {p.id: p for p in after.principles}
    kept: list[Principle] = []
    for p in before.principles:
        if p.id not in applied:
            kept.append(p)
        elif p.id in new:
            kept.append(new[p.id])
    have = {p.id for p in before.principles}
    kept += [p for p in after.principles if p.id not in have and p.id in applied]
    own = after if OWN_FIELDS in applied else before
    order = {p.id: n for n, p in enumerate(own.principles)}
    kept.sort(key=lambda p: order.get(p.id, len(order)))
    content = {"summary": own.summary, "template": own.template, "principles": [p.model_dump() for p in kept]}
    try:
        return Constitution.model_validate({"name": before.name, "version": before.version, **content})
    except ValidationError:
        return None


def _parts(before: Constitution, after: Constitution) -> dict[str, Literal["added", "removed", "changed"]]:
    """The parts of an edit, and what happened to each."""
    return {c.principle or OWN_FIELDS: c.kind for c in diff(before, after)}


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


def _draw(run: RunDir, wanted: int, seed: int) -> _Sample:
    """A seeded sample of the run's pairs, with their completions, prompts and votes."""
    complete = [k for k in run.iterations() if all(run.iteration(k).is_complete(s) for s in ("pairs", "votes"))]
    counts = {k: run.iteration(k).meta("pairs")["rows"] for k in complete}
    total = sum(counts.values())
    if not total:
        raise UserError(f"{run.path}: no iteration has been judged yet; there are no pairs to ask about")
    file = run.path / "prompts" / "train.jsonl"
    if not file.exists():
        raise UserError(f"{file}: the run's copy of its prompts is gone, and the judge has to be shown them")
    chosen = set(random.Random(f"edit-{seed}").sample(range(total), min(wanted, total)))
    prompts = {p.id: p for p in read_rows(file, Prompt)}
    rows: list[_Sampled] = []
    candidates: list[Candidate] = []
    votes: dict[str, list[Vote]] = {}
    at = 0
    for k in complete:
        here = run.iteration(k)
        if any(at <= i < at + counts[k] for i in chosen):
            text_hash = run.plan(k).constitution.hash
            mine = [p for n, p in enumerate(stage_rows(here, "pairs", Pair)) if at + n in chosen]
            rows += [_Sampled(p, k, text_hash) for p in mine]
            sides = {i for p in mine for i in (p.first, p.second)}
            candidates += [
                Candidate.of(c, _prompt(prompts, c))
                for c in stage_rows(here, "completions", Completion)
                if c.id in sides
            ]
            votes |= _votes(here.path / "votes.jsonl", {p.id for p in mine})
        at += counts[k]
    return _Sample(rows, candidates, votes)


def _prompt(prompts: Mapping[str, Prompt], completion: Completion) -> Prompt:
    if completion.prompt_id not in prompts:
        raise RlaifError(f"prompts/train.jsonl: no prompt {completion.prompt_id}, which {completion.id} answers")
    return prompts[completion.prompt_id]


def _votes(path: Path, pairs: set[str]) -> dict[str, list[Vote]]:
    """The votes on some pairs; a line that can't be read is left out, and its pair then asked about again."""
    found: list[Vote] = []
    with path.open("rb") as f:
        for line in f:
            if pair_named(line) in pairs:
                try:
                    found.append(stored(Vote, line))
                except ValidationError:
                    continue
    return by_pair(found)
