"""A run's decisions made again from its recorded votes: other filters, another aggregation, today's parser. No model.

In: a run directory, and settings that differ from its own. Out: a `Replay`: which pairs would newly be kept or
dropped, whose winner turns round, by reason and by iteration. Nothing is written. With the run's own settings every
decision comes out as it was made.

An iteration at a time, and in it a pair at a time: of a million votes only their places in the file are held.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar, get_args

import yaml
from pydantic import ValidationError

from rlaif.config import Filters, Job, apply_override, changed_keys, parse_job
from rlaif.constitutions.constitution import Constitution
from rlaif.constitutions.templates import Template, parse_template, template_names
from rlaif.errors import RlaifError, UserError, said
from rlaif.judging.ballots import ballots_for
from rlaif.judging.calibration import EVERYTHING, Asked, Calibration, ends_of, read_calibration
from rlaif.judging.filters import decide_votes, to_review
from rlaif.judging.outcomes import Said, said_by_guard, said_by_scores, said_in_reply, tolerances
from rlaif.judging.parsing import Reply
from rlaif.judging.verdicts import JurorFit, jurors_for
from rlaif.loop.in_force import derived_copy, template_sources
from rlaif.records import Ballot, Completion, Decision, Pair, Plan, Prompt, Record, VoiceKey, Vote, stored
from rlaif.review.labels import labels_of
from rlaif.rundir.store import RunDir, StageDir, read_record, read_rows

EXAMPLES = 10
_PAIR_ID = re.compile(rb'"pair_id":\s*"((?:[^"\\]|\\.)*)"')
_SCORES_ARE_ROUNDED = 1.1e-4
"""Of a difference of two recorded scores, in nats: each has four decimals."""
_REPARSED = ("judge.score_temperature", "judge.relevance_tolerance", "judge.fluency_tolerance", "judge.clamp")
"""Settings of the judge that say what a recorded reply or score means."""

Kind = Literal["newly_kept", "newly_dropped", "newly_reviewed", "reversed", "other_reasons"]
R = TypeVar("R", bound=Record)


class Settings(NamedTuple):
    """What a replay decides with."""

    job: Job
    """The run's, with what is to be different."""
    calibration: Calibration | None
    parser: bool
    """Read the replies, or the scores, again."""


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


class Replay(Record):
    """What other settings would have decided."""

    run: str
    settings: dict[str, tuple[Any, Any]]
    """Key → the run's value and the replay's, where they differ."""
    votes: int
    iterations: tuple[Replayed, ...]
    transitions: tuple[Transition, ...]
    examples: tuple[Change, ...]
    notes: tuple[str, ...]
    problems: tuple[str, ...]
    """Lines that can't be read, whose pairs are left out, and iterations that are."""

    def total(self, what: str) -> int:
        """The sum of one column over the iterations."""
        return sum(getattr(i, what) for i in self.iterations)


def settings_of(
    run: RunDir,
    base_dir: Path,
    filters: Path | None = None,
    overrides: Sequence[str] = (),
    calibration: Path | None = None,
    aggregate: str | None = None,
    parser: bool = False,
) -> tuple[Settings, dict[str, tuple[Any, Any]]]:
    """The settings of a replay, and what they change. What nobody names stays as the run has it.

    Raises:
        UserError: a file or a key can't be used, or a key isn't one that recorded votes can answer for.
    """
    own = run.job()
    tree = own.model_dump(mode="json")
    if filters is not None:
        tree["filters"] |= _filter_keys(filters)
    for override in overrides:
        apply_override(tree, override)
    if aggregate is not None:
        tree["filters"]["aggregate"] = aggregate
    if calibration is not None:
        tree["filters"]["calibration"] = str(calibration)
    job = parse_job(tree, str(filters) if filters else "--set")
    changed = changed_keys(own.model_dump(mode="json"), job.model_dump(mode="json"))
    for key in changed:
        if not key.startswith(("filters.", *_REPARSED)):
            raise UserError(f"--set {key}: recorded votes can't answer for it; filters.* and, with --parser, {_READ}")
        if not key.startswith("filters.") and not parser:
            raise UserError(f"--set {key}: it says how recorded scores and replies are read; add --parser")
    found = None
    if job.filters.calibration is not None:
        copy = run.path / "calibration.json"
        same = "filters.calibration" not in changed and calibration is None and copy.exists()
        found = read_calibration(copy if same else base_dir / job.filters.calibration)
    return Settings(job, found, parser), changed


_READ = ", ".join(_REPARSED)


def _filter_keys(path: Path) -> dict[str, Any]:
    """The filter keys of a YAML file: a job's `filters`, or the keys themselves."""
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"--filters {path}: can't read it ({getattr(e, 'strerror', None) or e})") from e
    except yaml.YAMLError as e:
        mark = getattr(e, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        raise UserError(f"--filters {where}: not valid YAML ({getattr(e, 'problem', e)})") from e
    if isinstance(tree, dict) and "filters" in tree:
        tree = tree["filters"]
    elif isinstance(tree, dict) and not set(tree) & set(Filters.model_fields) and set(tree) & set(Job.model_fields):
        raise UserError(
            f"--filters {path}: the job has no `filters` section, so it filters as by default; name the keys"
        )
    if not isinstance(tree, dict):
        raise UserError(f"--filters {path}: expected filter keys (min_agreement: 0.8), or a job with `filters`")
    return tree


def replay(
    run: RunDir,
    settings: Settings,
    changed: Mapping[str, tuple[Any, Any]] | None = None,
    progress: Callable[[int], None] = lambda iteration: None,
) -> Replay:
    """Decides every complete iteration again; `progress` is told each.

    Raises:
        UserError: the calibration isn't about this run's votes, and `filters.uncalibrated` says stop.
        RlaifError: a judge template is gone, and `settings.parser` needs it.
    """
    own = run.job()
    rows: list[Replayed] = []
    table: Counter[tuple[str, str]] = Counter()
    found: dict[Kind, list[Change]] = defaultdict(list)
    problems: list[str] = []
    votes = 0
    for k in run.iterations():
        if not run.iteration(k).is_complete("decisions"):
            continue
        if (problem := _unreadable(run, k)) is not None:
            problems.append(f"{problem}; iteration {k + 1} is left out")
            continue
        progress(k)
        again = Iteration(run, k, settings)
        counts: Counter[str] = Counter()
        mine: Counter[tuple[str, str]] = Counter()
        changes: list[Change] = []
        try:
            for before, after in again.decisions():
                counts["pairs"] += 1
                counts["kept_before"] += before.status == "kept"
                counts["kept_after"] += after.status == "kept"
                mine[_label(before), _label(after)] += 1
                if (kind := _kind(before, after)) is not None:
                    counts[kind] += 1
                    if len(found[kind]) + counts[kind] <= EXAMPLES:
                        changes.append(
                            Change(iteration=k, pair_id=before.pair_id, kind=kind, before=before, after=after)
                        )
        except _Misfit as e:
            problems.append(f"{e}; iteration {k + 1} is left out")
            continue
        table += mine
        for change in changes:
            found[change.kind].append(change)
        votes += again.votes
        problems += again.problems
        named = ("pairs", "kept_before", "kept_after", *get_args(Kind))
        rows.append(
            Replayed(
                iteration=k,
                constitution=str(again.plan.constitution),
                reparsed=again.reparsed,
                updated=_updated_in(run.iteration(k), counts["kept_before"], own),
                would_update=_enough(run.iteration(k), counts["kept_after"], settings.job),
                **{name: counts[name] for name in named},
            )
        )
    examples = tuple(_with_texts(run, _in_turn(found), problems))
    notes = []
    if own.judge.early_stop:
        notes.append("judge.early_stop left ballots out that the run's own filters didn't need; others might have")
    if settings.parser and own.judge.kind == "chat":
        notes.append("the log has no label probabilities: a vote that is read otherwise now keeps the p(first) it had")
    return Replay(
        run=str(run.path),
        settings=dict(changed or {}),
        votes=votes,
        iterations=tuple(rows),
        transitions=tuple(Transition(before=b, after=a, pairs=n) for (b, a), n in table.most_common()),
        examples=examples,
        notes=tuple(notes),
        problems=tuple(problems),
    )


class _Misfit(RlaifError):
    """Two files of an iteration don't fit each other."""


class _End:
    """After the last line."""


_END = _End()


def _unreadable(run: RunDir, k: int) -> str | None:
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
    text = read_record(run.path / "constitutions" / plan.constitution.hash / "constitution.json", Constitution)
    try:
        return text.derived_by(next((derived_copy(run, text_hash) for text_hash in plan.derived.values()), None))
    except FileNotFoundError:  # `verify` says so; only the order in which votes are summed follows from it
        return text


def _updated_in(here: StageDir, kept: int, own: Job) -> bool:
    """Whether the iteration made an update; of one that isn't that far, whether it will."""
    return here.policy_made() is not None if here.is_complete("updates") else _enough(here, kept, own)


def _enough(here: StageDir, kept: int, job: Job) -> bool:
    """Whether so many kept pairs make an update, with those that people labelled."""
    labels = labels_of(here) if here.is_complete("preferences") else {}
    return kept + len(labels) >= job.filters.min_kept_pairs


class Iteration:
    """One iteration, decided again."""

    def __init__(self, run: RunDir, k: int, settings: Settings):
        self.run, self.settings = run, settings
        self.here = run.iteration(k)
        self.plan = run.plan(k)
        folder = run.path / "constitutions"
        self.text = _text(run, self.plan)
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
        filters, calibration = self.settings.job.filters, self.settings.calibration
        jurors = self.juror_fit()
        texts, cut = self._completions()
        weights = self.text.weights
        sliced = calibration is not None and EVERYTHING not in calibration.slices
        categories = self._categories() if sliced else {}
        asked = Asked.by(self.settings.job) if calibration else None
        self.votes = self.reparsed = 0
        before = self._sound("decisions", Decision)
        for pair, mine in self._pairs():
            was = next(before, _END)
            if pair is None or was is None:
                continue  # lines that stand for the same pair: one of them can't be read
            if isinstance(was, _End) or was.pair_id != pair.id:
                raise _Misfit(
                    f"{self.here.path / 'decisions.jsonl'}: doesn't fit pairs.jsonl at pair {pair.id} "
                    "(`rlaif audit RUN verify` says what was changed)"
                )
            if mine is None or not {pair.first, pair.second} <= texts.keys():
                continue
            slice_name = categories.get(pair.prompt_id) or EVERYTHING
            if asked is not None:
                asked = asked._replace(ends=ends_of(pair, cut))
            yield was, decide_votes(pair, mine, filters, texts, weights, jurors, calibration, slice_name, cut, asked)

    def _categories(self) -> dict[str, str | None]:
        """Prompt → its category: the slice of a calibration."""
        return {p.id: p.category for p in read_rows(self.run.path / "prompts" / "train.jsonl", Prompt)}

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
        for number, (row, problem) in enumerate(_rows_or_problems(path, record), 1):
            if row is None:
                self._problem(f"{path}:{number}: not a {record.__name__} ({problem}); it was damaged")
            yield row

    def _pairs(self) -> Iterator[tuple[Pair | None, list[Vote] | None]]:
        """Each pair with its votes in the order in which they were asked for; None for what can't be read."""
        rank: dict[tuple[VoiceKey, str], int] | None = None
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
                        mine.append(self._read(stored(Vote, f.readline())))
                    except ValidationError as e:
                        self._problem(f"{path}:{_line_at(path, place)}: not a Vote ({e.errors()[0]['msg']})")
                if not places:
                    self._problem(f"{path}: no vote on pair {pair.id}")
                if not places or len(mine) < len(places):
                    yield pair, None
                    continue
                self.votes += len(mine)
                if rank is None:
                    rank = self._asked(pair, mine[0].ballot.judge)
                last = len(rank)
                yield pair, sorted(mine, key=lambda v: rank.get(_asked_as(v.ballot), last))

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

    def _asked(self, pair: Pair, judge: str) -> dict[tuple[VoiceKey, str], int]:
        """The order in which a pair's ballots are made; in another, sums of the same votes differ in the last bit."""
        any_pair, settings = pair.model_copy(update={"selected_by": ()}), self.settings.job.judge
        by_name = {t.name: t for t in self.templates.values()}
        names = template_names(settings, self.text, "decide") if settings.kind == "chat" else []
        templates = [by_name[name] for name in names if name in by_name]
        ballots = ballots_for(settings, [any_pair], self.text, name=judge, templates=templates)
        return {_asked_as(b): n for n, b in enumerate(ballots)}

    def _completions(self) -> tuple[dict[str, str], set[str]]:
        """Completion → a digest of its text without the space around it: all that `identical` needs of it; and those
        that the length limit cut off."""
        texts: dict[str, str] = {}
        cut: set[str] = set()
        for c in self._sound("completions", Completion):
            if c is not None:
                texts[c.id] = hashlib.blake2b(c.text.strip().encode(), digest_size=12).hexdigest()
                if c.cut_off:
                    cut.add(c.id)
        return texts, cut

    def _read(self, vote: Vote) -> Vote:
        """The vote, with `parser` as its reply is read today."""
        if not self.settings.parser or vote.abstain_reason == "infra_error":
            return vote
        template = self.templates.get(vote.ballot.template)
        again = _reread(vote, template, self.settings.job) if template else _rescored(vote, self.settings.job)
        self.reparsed += again is not vote
        return again


class _Juror(NamedTuple):
    pair_id: str
    judge: str
    order: str
    guard: bool


class _Named(NamedTuple):
    ballot: _Juror
    outcome: str


def _reread(vote: Vote, template: Template, job: Job) -> Vote:
    """A reply parsed again."""
    reply = Reply(content=vote.raw_reply, finish_reason=vote.finish_reason, model=vote.model)
    said = said_in_reply(reply, template, vote.ballot.order, job.judge.clamp, vote.p_first)
    if said.outcome == "abstain" and vote.abstain_reason == "refused":
        # A server that says by itself that it refused leaves no word of that in the reply's text.
        said = said._replace(abstain_reason="refused")
    return _updated(vote, said._replace(mass_neither=vote.mass_neither))


def _rescored(vote: Vote, job: Job) -> Vote:
    """A likelihood judge's vote made again from its scores; what their rounding can't tell stays as it was."""
    if vote.score_first is None or vote.score_second is None:
        return vote
    difference = vote.score_first - vote.score_second
    if vote.p_first is not None:
        said = said_by_scores(difference, job.judge.score_temperature)
        rounding = _SCORES_ARE_ROUNDED / job.judge.score_temperature
        near = said.p_first is not None and abs(said.p_first - vote.p_first) <= rounding
        return vote if near else _updated(vote, said)
    tolerance = tolerances(job.judge).get(vote.ballot.voice.rpartition("/")[2])
    if tolerance is None or abs(abs(difference) - tolerance) <= _SCORES_ARE_ROUNDED:
        return vote
    return _updated(vote, said_by_guard(difference, tolerance))


def _updated(vote: Vote, said: Said) -> Vote:
    """The vote itself unless something is different."""
    different = {name: value for name, value in said._asdict().items() if getattr(vote, name) != value}
    return vote.model_copy(update=different) if different else vote


def _asked_as(b: Ballot) -> tuple[VoiceKey, str]:
    return b.voice_key, b.order


def _template(folder: Path, name: str) -> Template | None:
    """The run's copy of a template; None when it is gone."""
    sources = template_sources(folder)
    return parse_template(name, sources, str(folder)) if f"{name}.jinja" in sources else None


def pair_named(line: bytes) -> str | None:
    """The pair that a line of votes.jsonl is about, without reading the rest of it."""
    match = _PAIR_ID.search(line)
    return match[1].decode("utf-8", "replace") if match else None


def stage_rows(here: StageDir, stage: str, record: type[R]) -> Iterator[R]:
    """A stage's rows, one at a time.

    Raises:
        RlaifError: a line is damaged.
    """
    return rows_of(here.path / f"{stage}.jsonl", record)


def rows_of(path: Path, record: type[R]) -> Iterator[R]:
    """A file's rows, one at a time.

    Raises:
        RlaifError: a line is damaged.
    """
    for number, (row, problem) in enumerate(_rows_or_problems(path, record), 1):
        if row is None:
            raise RlaifError(f"{path}:{number}: not a {record.__name__} ({problem}); it was damaged")
        yield row


def _rows_or_problems(path: Path, record: type[R]) -> Iterator[tuple[R | None, str]]:
    """Of each line the row, or None and why it is none."""
    with path.open("rb") as f:
        for line in f:
            try:
                yield stored(record, line), ""
            except ValidationError as e:
                yield None, e.errors()[0]["msg"]


def _sound_rows(here: StageDir, stage: str, record: type[R]) -> Iterator[R]:
    """A stage's rows without the damaged lines, which were named before."""
    return (row for row, _ in _rows_or_problems(here.path / f"{stage}.jsonl", record) if row is not None)


def _line_at(path: Path, place: int) -> int:
    with path.open("rb") as f:
        return f.read(place).count(b"\n") + 1


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
        mine = {p.id: p for p in _sound_rows(run.iteration(k), "pairs", Pair) if p.id in ids}
        pairs |= mine
        sides = {c for p in mine.values() for c in (p.first, p.second)}
        answers |= {c.id: c.text for c in _sound_rows(run.iteration(k), "completions", Completion) if c.id in sides}
    file = run.path / "prompts" / "train.jsonl"
    asked = {p.prompt_id for p in pairs.values()}
    prompts: dict[str, str] = {}
    if file.exists() and changes:
        for number, (prompt, problem) in enumerate(_rows_or_problems(file, Prompt), 1):
            if prompt is None:
                problems.append(f"{file}:{number}: not a Prompt ({problem}); the prompt's text is left out")
            elif prompt.id in asked:
                prompts[prompt.id] = prompt.text
    for change in changes:
        pair = pairs[change.pair_id]
        shown = {"first": answers.get(pair.first), "second": answers.get(pair.second)}
        yield change.model_copy(update={"prompt": prompts.get(pair.prompt_id), **shown})
