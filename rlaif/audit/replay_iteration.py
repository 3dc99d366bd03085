"""One iteration of a run, decided again from its recorded votes.

In: a run, an iteration, `Settings`. Out: for each pair the decision as it was made, and as it would be made; what can't
be read is named in `problems`, and its pair left out.

A pair at a time: of a million votes only their places in the file are held.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from pydantic import ValidationError

from rlaif.audit.replay_settings import Settings
from rlaif.audit.rows import line_at, pair_named, rows_or_problems
from rlaif.constitutions.constitution import Constitution
from rlaif.constitutions.copies import as_derived, constitution_copy, template_sources
from rlaif.constitutions.templates import Template, parse_template
from rlaif.errors import RlaifError, said
from rlaif.judging.calibration import EVERYTHING, Asked, ends_of
from rlaif.judging.filters import decide_votes, to_review
from rlaif.judging.kinds import Place, kind_of
from rlaif.judging.verdicts import JurorFit, jurors_for
from rlaif.records import Ballot, Completion, Decision, Pair, Plan, Prompt, Record, Vote, stored
from rlaif.review.labels import labels_of
from rlaif.rundir.store import RunDir, read_rows

R = TypeVar("R", bound=Record)


class Misfit(RlaifError):
    """Two files of an iteration don't fit each other."""


class _End:
    """After the last line."""


_END = _End()


def unreadable(run: RunDir, k: int) -> str | None:
    """Why an iteration that has decided can't be decided again: what all of it needs is missing or damaged."""
    here = run.iteration(k)
    for stage in ("completions", "pairs", "votes"):
        if not here.is_complete(stage):
            return f"{here.path / stage}.jsonl: missing"
    try:
        _text(run, run.plan(k))
        if here.is_complete("preferences"):
            labels_of(here)
        if here.is_complete("updates"):
            here.policy_made()
    except (OSError, RlaifError) as e:
        return said(e)
    return None


def _text(run: RunDir, plan: Plan) -> Constitution:
    constitution = constitution_copy(run, plan.constitution.hash)
    try:
        return as_derived(run, constitution, plan.derived)
    except FileNotFoundError:  # `verify` says so; only the order in which votes are summed follows from it
        return constitution


class Iteration:
    """One iteration, decided again."""

    def __init__(self, run: RunDir, k: int, settings: Settings):
        self.run, self.settings = run, settings
        self.number, self.here = k, run.iteration(k)
        self._judge = kind_of(settings.job.judge)
        self.plan = run.plan(k)
        folder = run.path / "constitutions"
        self.constitution = _text(run, self.plan)
        self.templates = {h: t for name, h in self.plan.templates.items() if (t := _template(folder / h, name))}
        if settings.parser and len(self.templates) < len(self.plan.templates):
            gone = next(h for h in self.plan.templates.values() if h not in self.templates)
            raise RlaifError(
                f"{folder / gone}: the judge template is gone, and --parser needs to know its replies' form"
            )
        self.problems: list[str] = []
        self.votes = self.reparsed = 0
        self._places = self._index()

    def decisions(self) -> Iterator[tuple[Decision, Decision]]:
        """(as it was made, as it would be made) of each pair, in the order of the pairs."""
        if self.settings.job.filters.review is None:
            yield from self._decided()
            return
        # Which pairs are least certain is known when all of an iteration are decided.
        both = list(self._decided())
        yield from zip(
            (was for was, _ in both), to_review([now for _, now in both], self.settings.job.filters), strict=True
        )

    def _decided(self) -> Iterator[tuple[Decision, Decision]]:
        texts, cut = self._completions()
        again = self.decider(texts, cut)
        self.votes = self.reparsed = 0
        before = self._sound("decisions", Decision)
        for pair, mine in self._pairs():
            was = next(before, _END)
            if pair is None or was is None:
                continue  # lines that stand for the same pair: one of them can't be read
            if isinstance(was, _End) or was.pair_id != pair.id:
                raise Misfit(
                    f"{self.here.path / 'decisions.jsonl'}: doesn't fit pairs.jsonl at pair {pair.id} "
                    "(`rlaif audit RUN verify` says what was changed)"
                )
            if was.source == "data":  # a data set's label: there is nothing to decide again
                yield was, was
                continue
            if mine == []:
                self._problem(f"{self.here.path / 'votes.jsonl'}: no vote on pair {pair.id}")
            if not mine or not {pair.first, pair.second} <= texts.keys():
                continue
            yield was, again(pair, mine, was)

    def decider(self, texts: Mapping[str, str], cut: Set[str]) -> Callable[[Pair, Sequence[Vote], Decision], Decision]:
        """How a pair is decided by its votes under the iteration's text, when a decision was made before. `texts` has
        what `identical` compares of its completions, `cut` those that the length limit cut off."""
        own, calibration = self.settings.job.filters.rules, self.settings.calibration
        filters = self.settings.job.filters.model_copy(update={"rules": ()})
        jurors, weights = self._jurors, self.constitution.weights
        sliced = calibration is not None and EVERYTHING not in calibration.slices
        categories = self._categories() if sliced else {}
        asked = Asked.by(self.settings.job) if calibration else None

        def decided(pair: Pair, votes: Sequence[Vote], was: Decision) -> Decision:
            slice_name = categories.get(pair.prompt_id) or EVERYTHING
            how = asked and asked._replace(ends=ends_of(pair, cut))
            now = decide_votes(pair, votes, filters, texts, weights, jurors, calibration, slice_name, cut, how)
            return _with_own_reasons(now, was, own)

        return decided

    def _categories(self) -> dict[str, str | None]:
        """Prompt → its category: the slice of a calibration."""
        return {p.id: p.category for p in read_rows(self.run.path / "prompts" / "train.jsonl", Prompt)}

    @functools.cached_property
    def _jurors(self) -> JurorFit | None:
        return self.juror_fit()

    def juror_fit(self) -> JurorFit | None:
        """What each juror's votes weigh, as the loop fits it."""
        method, calibration = self.settings.job.filters.aggregate, self.settings.calibration
        calibrated = calibration.jurors if calibration else None
        if method != "dawid_skene" or calibrated:
            return jurors_for(method, (), calibrated)
        # No more of a vote than the fit looks at: all of an iteration's are held here.
        named: Any = [
            _Named(_Juror(v.ballot.pair_id, v.ballot.judge, v.ballot.order, v.ballot.guard), v.outcome)
            for _, mine in self._pairs()
            for v in mine or ()
        ]
        return jurors_for(method, named)

    def _sound(self, stage: str, record: type[R]) -> Iterator[R | None]:
        """A stage's rows, one at a time; None for a line that can't be read."""
        path = self.here.path / f"{stage}.jsonl"
        for number, (row, problem) in enumerate(rows_or_problems(path, record), 1):
            if row is None:
                self._problem(f"{path}:{number}: not a {record.__name__} ({problem}); it was damaged")
            yield row

    def _pairs(self) -> Iterator[tuple[Pair | None, list[Vote] | None]]:
        """Each pair with its votes in the order in which they were asked for; None for what can't be read."""
        rank: dict[Place, int] | None = None
        path = self.here.path / "votes.jsonl"
        with path.open("rb") as f:
            for pair in self._sound("pairs", Pair):
                if pair is None:
                    yield None, None
                    continue
                mine: list[Vote] = []
                places = self._places.get(pair.id, [])
                for place in places:
                    f.seek(place)
                    try:
                        mine.append(self.read(stored(Vote, f.readline())))
                    except ValidationError as e:
                        self._problem(f"{path}:{line_at(path, place)}: not a Vote ({e.errors()[0]['msg']})")
                if len(mine) < len(places):
                    yield pair, None
                    continue
                if not mine:
                    yield pair, []
                    continue
                self.votes += len(mine)
                if rank is None:
                    rank = self._asked(pair, [v.ballot for v in mine])
                last = len(rank)
                yield pair, sorted(mine, key=lambda v: rank.get((v.ballot.voice_key, v.ballot.order), last))

    def _problem(self, problem: str) -> None:
        if problem not in self.problems:
            self.problems.append(problem)

    def _index(self) -> dict[str, list[int]]:
        """Pair → where its votes begin in the file."""
        places: dict[str, list[int]] = {}
        at = 0
        path = self.here.path / "votes.jsonl"
        with path.open("rb") as f:
            for number, line in enumerate(f, 1):
                if (pair := pair_named(line)) is not None:
                    places.setdefault(pair, []).append(at)
                elif line.strip():
                    self._problem(f"{path}:{number}: not a Vote (it names no pair)")
                at += len(line)
        return places

    def deciding_templates(self) -> list[Template]:
        """With which a pair is asked about, in order; those that are gone are left out."""
        by_name = {t.name: t for t in self.templates.values()}
        return [by_name[name] for name in self._judge.template_names(self.constitution, "decide") if name in by_name]

    def _asked(self, pair: Pair, ballots: Sequence[Ballot]) -> dict[Place, int]:
        """The order in which a pair's ballots are made."""
        any_pair = pair.model_copy(update={"selected_by": ()})
        return self._judge.places(any_pair, self.constitution, ballots[0].judge, self.deciding_templates(), ballots)

    def _completions(self) -> tuple[dict[str, str], set[str]]:
        """Completion → a digest of its text without the space around it: all that `identical` needs of it; and those
        that the length limit cut off."""
        texts: dict[str, str] = {}
        cut: set[str] = set()
        for c in self._sound("completions", Completion):
            if c is not None:
                texts[c.id] = text_digest(c)
                if c.cut_off:
                    cut.add(c.id)
        return texts, cut

    def read(self, vote: Vote) -> Vote:
        """The vote, with `parser` as its reply is read today."""
        if not self.settings.parser:
            return vote
        again = self._judge.read_again(vote, self.templates.get(vote.ballot.template))
        self.reparsed += again is not vote
        return again


def text_digest(completion: Completion) -> str:
    """All that `identical` needs of a completion's text: a digest of it without the space around it."""
    return hashlib.blake2b(completion.text.strip().encode(), digest_size=12).hexdigest()


class _Juror(NamedTuple):
    pair_id: str
    judge: str
    order: str
    guard: bool


class _Named(NamedTuple):
    ballot: _Juror
    outcome: str


def _with_own_reasons(now: Decision, was: Decision, rules: Sequence[str]) -> Decision:
    """A decision with what rules of the job's own said when it was made: a replay imports no code."""
    said = {rule: why for rule, why in was.said.items() if rule in rules}
    if not said:
        return now
    return now.model_copy(update={"status": "dropped", "winner": None, "reasons": (*now.reasons, *said), "said": said})


def _template(folder: Path, name: str) -> Template | None:
    """The run's copy of a template; None when it is gone."""
    sources = template_sources(folder)
    return parse_template(name, sources, str(folder)) if f"{name}.jinja" in sources else None
