"""What the stages share: the run on its way (`Running`), and what one iteration has so far (`Iteration`)."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from rlaif.config import Job
from rlaif.constitutions.constitution import Constitution
from rlaif.data.prompts import held_out_id
from rlaif.evaluation.probes import Probe
from rlaif.evaluation.texts import FixedText
from rlaif.judging.ballots import Role
from rlaif.judging.calibration import Calibration
from rlaif.judging.candidates import Candidate
from rlaif.judging.kinds import JudgeKind
from rlaif.loop.base_cache import BaseCache, R
from rlaif.loop.hand_over import HandOver
from rlaif.loop.in_force import InForce
from rlaif.records import (
    Alarm,
    AnchorCounts,
    Completion,
    Decision,
    IterationMetrics,
    OldPair,
    Pair,
    Plan,
    PlanSource,
    Prompt,
    Score,
    Side,
    TrainingRow,
    UnderText,
    UpdateStep,
    Vote,
)
from rlaif.rundir.stages import EVALUATION, ITERATION, Stage
from rlaif.rundir.store import Held, RunDir, StageDir, StageWriter, WriterClosed
from rlaif.rundir.votes import Rank, Votes, VotesByPair
from rlaif.serving.servers import Servers
from rlaif.workers.weights import WeightsRef
from rlaif.workers.worker import Worker


class Progress(Protocol):
    """Where the loop says what it is doing."""

    def stage(self, iteration: int, name: str, total: int, unit: str, text: str) -> None: ...
    def advance(self, n: int) -> None: ...
    def iteration_done(self, iteration: int, metrics: IterationMetrics) -> None: ...
    def note(self, message: str) -> None: ...


class Interrupted(NamedTuple):
    """What an earlier attempt at judging left."""

    durable: int
    """Votes."""
    asked: Set[str]
    """Ballots without a vote that may have been asked for nothing, and perhaps some of other questions."""

    @classmethod
    def found(cls, done: Iterable[Vote], journal: Path) -> Interrupted:
        """As it is on the disk, before anything is asked; `done` are the durable votes."""
        asked = set(journal.read_text().split()) if journal.exists() else set()
        durable = 0
        for vote in done:
            durable += 1
            asked.discard(vote.ballot.id)
        return cls(durable, asked)


@dataclass
class Iteration:
    """One iteration, or one evaluation: what it follows, and what its stages have made so far."""

    plan: Plan
    dir: StageDir
    constitution: Constitution
    """In force; the one that its pairs were judged under, where a `source` gives them with their labels."""
    prompts: dict[str, Prompt]
    """By id; more than it asks for an iteration, just those asked for an evaluation."""
    role: Role = "decide"
    """`evaluate`: pairs are held against the base policy's answers, and only measure."""
    completions: list[Completion] = field(default_factory=list)
    """By prompt, then by sample; an evaluation's are followed by the base policy's."""
    scores: list[Score] = field(default_factory=list)
    pairs: list[Pair] = field(default_factory=list)
    votes: Votes = field(default_factory=Votes)
    """On its pairs; they stay on the disk."""
    labels: dict[str, Side] = field(default_factory=dict)
    """Of pairs that a data set labelled, and nobody voted on: by pair."""
    decisions: list[Decision] = field(default_factory=list)
    old_pairs: list[OldPair] = field(default_factory=list)
    """What its text made of pairs that were judged under others."""
    training: Sequence[TrainingRow] = ()
    """Rows that train, of the type that the learner takes."""
    steps: list[UpdateStep] = field(default_factory=list)
    at_change: UnderText | None = None
    """What held-out answers win under its text, where that is a new one."""
    anchors: AnchorCounts | None = None
    """What became of verdicts when their pairs were asked about again; None where none were."""
    begun: dict[str, StageWriter[Any]] = field(default_factory=dict)
    """Stages that are being written, by name; some before their turn (`streaming`)."""
    stopped: bool = False
    """Nothing more of it is written from here."""
    interrupted: Interrupted | None = None
    """What an earlier attempt at its judging left, where that isn't on the disk any more as it was."""
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    @property
    def k(self) -> int:
        """The iteration's number, from 0; of an evaluation, that whose plan it follows."""
        return self.plan.iteration

    @property
    def source(self) -> PlanSource:
        """Where its pairs are from, in a run with a `source`."""
        assert self.plan.source is not None, "in a run with a source"
        return self.plan.source

    @property
    def labels_as_stored(self) -> bool:
        """Its pairs have been judged before."""
        return self.plan.labels_as_stored

    def rows(
        self,
        stage: str,
        produce: Callable[[list[Any]], Iterable[list[Any]]],
        before_commit: Callable[[], dict[str, Any]] | None = None,
    ) -> list[Any]:
        """The stage's rows: read when complete, else produced; see `StageDir.rows`."""
        record = self._stage(stage).record
        if self.dir.is_complete(stage):
            return self.dir.read(stage, record)
        writer, inputs = self.begun.get(stage) or self.begin(stage), self._inputs(stage)
        return self.dir.rows(stage, record, produce, inputs=inputs, before_commit=before_commit, writer=writer)

    def cast(
        self,
        rank: Rank | None,
        produce: Callable[[VotesByPair], Iterable[list[Vote]]],
        before_commit: Callable[[], dict[str, Any]],
    ) -> Votes:
        """The votes on its pairs, ordered by `rank`; what isn't there is produced, as by `rows`."""
        if self.dir.is_complete("votes"):
            held = self._votes_by_pair(rank)
            self.dir.note_each("votes", Vote, held)
        else:
            writer = self.begun.get("votes") or self.begin_votes(rank)
            held = writer.held
            writer.fill(lambda: produce(held), self._inputs("votes"), before_commit)
        return Votes(held, [p.id for p in self.pairs])

    def begin(self, stage: str, held: Held[Any] | None = None) -> StageWriter[Any]:
        """Begins a stage, perhaps before its turn; `rows` goes on with it, or `cast` with votes. `held` as in
        `StageDir.writer`."""
        of = self._stage(stage)
        with self._lock:
            if self.stopped:
                raise WriterClosed(stage)
            self.begun[stage] = self.dir.writer(of.name, of.record, resumable=self._resumable(of), held=held)
            return self.begun[stage]

    def begin_votes(self, rank: Rank | None) -> StageWriter[Vote]:
        """Begins the stage of the votes, which `cast` goes on with."""
        return self.begin("votes", self._votes_by_pair(rank))

    def _stage(self, name: str) -> Stage:
        return next(s for s in self._stages if s.name == name)

    def _inputs(self, stage: str) -> list[str]:
        """Stages that its rows are made from; of those that only some iterations have, the ones that are there."""
        found = self._stage(stage).inputs
        return [name for name in found if not self._stage(name).optional or self.dir.is_complete(name)]

    def _votes_by_pair(self, rank: Rank | None) -> VotesByPair:
        return VotesByPair(lambda: self.dir.file("votes"), rank)

    def stop(self) -> None:
        """From now on no thread writes more of it; one that tries ends with `WriterClosed`."""
        with self._lock:
            self.stopped = True
            for writer in self.begun.values():
                writer.close()

    def judged_meanwhile(self) -> dict[str, Any]:
        """For the meta file of the completions: how many votes are there before all of them are."""
        return {"votes": self.begun["votes"].count()} if "votes" in self.begun else {}

    @property
    def _stages(self) -> tuple[Stage, ...]:
        return ITERATION if self.role == "decide" else EVALUATION

    def _resumable(self, of: Stage) -> bool:
        """Whether its durable rows stay when it is begun again."""
        later = self._stages[self._stages.index(of) + 1 :]
        return of.resumable or (of.spoken_of and any(self.dir.is_begun(s.name) for s in later))


@dataclass(frozen=True)
class Referee:
    """The reference judge (`eval.reference_judge`), at work."""

    kind: JudgeKind[Any]
    name: str
    """What ballots call it."""
    worker: Worker


class Taken(NamedTuple):
    """What a source gives an iteration, under the iteration's own ids."""

    completions: list[Completion]
    scores: list[Score]
    pairs: list[Pair]
    votes: list[Vote]


class PairSource(Protocol):
    """Where pairs come from in place of the policy: a run (`source_run`) or a data set (`source_data`)."""

    prompts: list[Prompt]
    """What its pairs are answers to."""
    asked_by: Job | None
    """The job whose judge cast the stored votes; None where nobody voted."""

    def pairs_in(self, position: int) -> int:
        """Pairs of the iteration at this place among those with a source, from 0; held-out ones not yet left out."""

    def check_tokenizer(self, found: Mapping[str, str | None]) -> None:
        """Whether its token ids, if it has any, are those of the policy's tokenizer (`models.tokenizer_identity`)."""

    def settle(self, train: Sequence[Prompt]) -> None:
        """Leaves out pairs whose prompts aren't among `train`: the run's copies of `prompts`, but the held-out ones."""

    def check_answers(self, sampler: Worker, note: Callable[[str], None]) -> None:
        """Whether its answers can train, before any does; `note` is told how many are left out."""

    def planned(self, plan: Plan, given: Sequence[PlanSource], run: RunDir) -> Plan:
        """The plan of an iteration, after what this source gave earlier ones; copies the texts that it names."""

    def gave(self, noted: PlanSource) -> bool:
        """Whether a plan took its pairs from it: the next one goes on after them. A branch may have another source."""

    def check(self, noted: PlanSource) -> None:
        """Whether it still is what a plan noted."""

    def labels(self, it: Iteration) -> dict[str, Side]:
        """Of an iteration's pairs that nobody voted on."""

    def take(self, it: Iteration, sampler: Worker) -> Taken:
        """What an iteration is given; `sampler` knows the policy's tokens."""


@dataclass
class Running:
    """A run on its way: its job, its directory, its texts and prompts, its workers."""

    job: Job
    dir: RunDir
    in_force: InForce
    train: list[Prompt]
    held_out: list[Prompt]
    base: WeightsRef
    """The untrained policy."""
    judge_name: str
    """Kind and weights' digest: votes of other weights are other votes."""
    sampler: Worker
    judge: Worker
    learner: Worker
    measurer: Worker
    """Who says how sane an answer is: a likelihood judge on the base policy, often the judge itself."""
    progress: Progress
    code: dict[str, str] = field(default_factory=dict)
    """Code of the user's own that the job names, as plans hold it."""
    calibration: Calibration | None = None
    """In force for the whole run (`filters.calibration`)."""
    probes: Sequence[Probe] = ()
    """What is asked to see what is forgotten (`eval.retention`), ..."""
    fixed_texts: Sequence[FixedText] = ()
    """... and what is scored."""
    referee: Referee | None = None
    """Who compares held-out answers and never trains."""
    servers: Servers | None = None
    """The judge's, where the run started them (`judge.serve`)."""
    source: PairSource | None = None
    """Where pairs come from; None: from the policy."""
    stream: bool = False
    """The judge works while the policy samples (`pipeline.stream`, as it was made out)."""
    base_cache: BaseCache | None = None
    """Evaluations of the untrained policy that other runs made; None: it is always evaluated anew."""
    hand_over: HandOver = field(init=False)
    """Which policy sampler and learner hold."""

    def __post_init__(self) -> None:
        self.hand_over = HandOver(self)

    def evaluated(
        self,
        stage: str,
        record: type[R],
        updates: int,
        about: dict[str, Any],
        make: Callable[[], Iterator[list[R]]],
    ) -> Iterator[list[R]]:
        """A stage's rows in the evaluation after `updates` iterations, in chunks. Those of the one before the first may
        come from the cache: `about` is what they follow from, beside the run's policy and settings."""
        if self.base_cache is None or updates:
            return make()
        return self.base_cache.rows(stage, record, about, make)

    def from_cache(self, stage: str, updates: int) -> dict[str, Any]:
        """For the meta file of such a stage."""
        return {} if self.base_cache is None or updates else self.base_cache.noted(stage)

    def event_once(self, kind: str, message: str, k: int, /, **data: Any) -> bool:
        """Notes an event unless an earlier, interrupted attempt at this iteration did; whether it was new."""
        if any((e.kind, e.iteration, e.message) == (kind, k, message) for e in self.dir.events()):
            return False
        self.dir.event(kind, message, k, **data)
        return True

    def tell_once(self, kind: str, message: str, k: int, /, **data: Any) -> None:
        """`event_once`, and says it when it is new."""
        if self.event_once(kind, message, k, **data):
            self.progress.note(f"iteration {k + 1}: {message}")

    def raise_alarm(self, alarm: Alarm) -> bool:
        """Notes and tells an alarm, unless an earlier attempt at the iteration did; whether it was new."""
        data = alarm.model_dump(mode="json", exclude={"message", "iteration"})
        new = self.event_once("alarm", alarm.message, alarm.iteration, **data)
        if new:
            self.progress.note(f"alarm in iteration {alarm.iteration + 1}: {alarm.message}")
        return new

    def track(self, k: int, updates: int, values: dict[str, float | str]) -> None:
        """Gives trackers what is in a metrics.json that was just written, at the optimizer step after so many
        iterations. After, not before: a run that goes on never gives them twice. Tells which trackers failed."""
        made = (self.dir.iteration(i).read("updates", UpdateStep) for i in range(updates - 1, -1, -1))
        step = next((steps[-1].step for steps in made if steps), 0)
        for failed in self.learner.call("track", values=values, step=step):
            self.dir.event("tracker_failed", failed, k)
            self.progress.note(failed)

    def text_number(self, k: int) -> int:
        """The text of iteration k, counted through the run's different texts from 1."""
        hashes = [self.dir.plan(i).in_force.constitution.hash for i in range(k + 1)]
        return list(dict.fromkeys(hashes)).index(hashes[-1]) + 1

    def advancing(self, chunks: Iterator[list[Any]]) -> Iterator[list[Any]]:
        """The chunks, counted by the progress."""
        for chunk in chunks:
            yield chunk
            self.progress.advance(len(chunk))


def candidates(completions: Iterable[Completion], prompts: dict[str, Prompt]) -> list[Candidate]:
    """Completions as a judge needs them."""
    return [Candidate.of(c, prompts[c.prompt_id]) for c in completions]


def may_train(prompts: Iterable[Prompt], train: Iterable[Prompt]) -> dict[str, str]:
    """Id in a source → id among the prompts that train (`exclude_held_out`), of those that are there."""
    mine = {p.id for p in train}
    known = {p.id: (p.id, held_out_id(p)) for p in prompts}
    return {old: next(i for i in ids if i in mine) for old, ids in known.items() if mine & {*ids}}


def in_order(completions: list[Completion], prompt_ids: Iterable[str]) -> list[Completion]:
    """By prompt, then by sample: the order in which they finished must not decide anything."""
    rank = {p: i for i, p in enumerate(prompt_ids)}
    return sorted(completions, key=lambda c: (rank[c.prompt_id], c.index))
