"""Pairs that exist in place of fresh ones (`source`): the same iterations, filters, evaluation and log, offline.

In: the job's `source`, a run. Out: for each iteration what its plan notes of the source, and its completions, pairs and
votes, under ids of this run. Nothing is sampled, and with labels as stored nobody is asked. A source that isn't any
more what a plan noted is a user's mistake, and told before anything is taken.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from rlaif.config import Job, Source
from rlaif.data.prompts import held_out_id
from rlaif.errors import RlaifError, UserError
from rlaif.loop.in_force import copy_texts
from rlaif.loop.judging import judge
from rlaif.loop.pairing import pair_id
from rlaif.loop.running import Iteration, Running, in_order
from rlaif.records import Completion, InForce, Pair, Plan, PlanSource, Prompt, Score, Vote, digest
from rlaif.rundir.store import RunDir, file_digest, read_rows

_TAKEN = ("completions", "scores", "pairs", "votes")
"""Stages of a run that another one can take over."""


class Taken(NamedTuple):
    """What an iteration is given, under its own ids."""

    completions: list[Completion]
    scores: list[Score]
    pairs: list[Pair]
    votes: list[Vote]


class StoredPairs:
    """The stored pairs of another run.

    Raises:
        UserError: it is no run, or its iterations aren't judged as far as the job wants them.
    """

    def __init__(self, settings: Source, base_dir: Path, planned: Sequence[PlanSource] = ()):
        """`planned` are what the plans of this run note so far: a run that goes on takes the same iterations."""
        self.settings = settings
        self.path = str(settings.run)
        self._run = RunDir.open(base_dir / self.path)
        judged = [k for k in self._run.iterations() if self._run.iteration(k).is_complete("votes")]
        wanted = planned[0].iterations if planned else tuple(self.settings.wanted or judged)
        if not wanted or not {*wanted} <= {*judged}:
            has = f"{judged[0]}-{judged[-1]}" if judged else "none"
            asked = (
                f"source.iterations: {self.settings.iterations}" if self.settings.wanted else f"source.run: {self.path}"
            )
            raise UserError(
                f"{asked}: the judged iterations of {self.path} are {has}; name those of them that are to train"
            )
        self.iterations = wanted
        self.job = self._run.job()
        """That run's."""
        asked_in = {i for k in wanted for i in self._run.plan(k).prompt_ids}
        copies = read_rows(self._run.path / "prompts" / "train.jsonl", Prompt)
        self.prompts = [p for p in copies if p.id in asked_in]
        """What its pairs are answers to."""
        self._ids: Mapping[str, str] = {}

    @property
    def pairs_at_most(self) -> int:
        """Of one iteration."""
        return max(self._run.iteration(k).meta("pairs")["rows"] for k in self.iterations)

    def check_tokenizer(self, found: Mapping[str, str | None]) -> None:
        """Whether its token ids are this policy's; `found` is the policy's `models.tokenizer_identity`.

        Raises:
            UserError: they are another tokenizer's.
        """
        theirs = self._run.header.get("models", {}).get("tokenizer")
        if theirs is not None and theirs != found["tokenizer"]:
            raise UserError(
                f"source.run: {self.path} was sampled with another tokenizer ({theirs}; policy.model has "
                f"{found['tokenizer']}), so its token ids mean other text; train a policy with that run's tokenizer"
            )

    def settle(self, train: Sequence[Prompt]) -> None:
        """`train` are the run's own copies of `prompts`, without those that are held out: pairs of others never train.

        Raises:
            UserError: an iteration has none left.
        """
        mine = {p.id for p in train}
        known = {p.id: (p.id, held_out_id(p)) for p in self.prompts}
        self._ids = {old: next(i for i in ids if i in mine) for old, ids in known.items() if mine & {*ids}}
        for k in self.iterations:
            if not any(i in self._ids for i in self._run.plan(k).prompt_ids):
                raise UserError(
                    f"source.iterations: all prompts of iteration {k} of {self.path} are held out here; leave it out, "
                    "or give other prompts.held_out"
                )

    def planned(self, plan: Plan, position: int, run: RunDir) -> Plan:
        """The plan of the iteration at `position` among those with a source, from 0. Copies the texts that its pairs
        were judged under into `run`, where labels are as stored."""
        k = self.iterations[position % len(self.iterations)]
        theirs = self._run.plan(k)
        update = {"prompt_ids": tuple(self._ids[p] for p in theirs.prompt_ids if p in self._ids)}
        noted = PlanSource(
            path=self.path,
            iteration=k,
            iterations=self.iterations,
            sha256=self._digest(k),
            rejudged=self.settings.rejudge,
        )
        if self.settings.rejudge:
            return plan.model_copy(update={**update, "source": noted})
        copy_texts(self._run, theirs, run)
        here, there = (InForce(**{n: getattr(p, n) for n in InForce.model_fields}) for p in (plan, theirs))
        noted = noted.model_copy(update={"in_force": None if here == there else here})
        return plan.model_copy(update={**update, **dict(there), "source": noted})

    def check(self, noted: PlanSource) -> None:
        """Whether it is what a plan noted.

        Raises:
            UserError: it changed since.
        """
        if self._digest(_number(noted)) != noted.sha256:
            raise UserError(
                f"source.run: iteration {noted.iteration} of {self.path} isn't what it was when this run's plan was "
                "written; restore it, or start a new run with --name NAME"
            )

    def take(self, it: Iteration) -> Taken:
        """What iteration `it` is given: ids are as if it had been sampled here, so that no two iterations share one."""
        noted = it.source
        self.check(noted)
        here = self._run.iteration(_number(noted))
        completions: dict[str, Completion] = {}
        for c in here.read("completions", Completion):
            if (prompt := self._ids.get(c.prompt_id)) is not None:
                named = {"id": f"{it.k:04d}-{prompt}-{c.index}", "prompt_id": prompt}
                completions[c.id] = c.model_copy(update=named)
        pairs: dict[str, Pair] = {}
        for p in here.read("pairs", Pair):
            if p.first in completions:
                first, second = completions[p.first], completions[p.second]
                prompt = first.prompt_id
                named = {
                    "id": pair_id(prompt, first.id, second.id, p.method),
                    "prompt_id": prompt,
                    "first": first.id,
                    "second": second.id,
                }
                pairs[p.id] = p.model_copy(update=named)
        scores = [
            s.model_copy(update={"completion_id": scored.id, "prompt_id": scored.prompt_id})
            for s in here.read("scores", Score)
            if (scored := completions.get(s.completion_id)) is not None
        ]
        votes = []
        if not noted.rejudged:
            known = [v for v in here.read("votes", Vote) if v.ballot.pair_id in pairs]
            votes = [_taken_over(v, pairs[v.ballot.pair_id]) for v in known]
        return Taken([*completions.values()], scores, [*pairs.values()], votes)

    def _digest(self, k: int) -> str:
        """Of what an iteration has to be taken over.

        Raises:
            RlaifError: a file isn't as it was written.
        """
        here = self._run.iteration(k)
        found = {}
        for stage in _TAKEN:
            path = here.path / f"{stage}.jsonl"
            found[stage] = file_digest(path)
            if found[stage] != here.meta(stage)["sha256"]:
                raise RlaifError(
                    f"{path}: was changed after it was written (`rlaif audit {self.path} verify` says where); no pair "
                    "of it trains. Restore it"
                )
        if self.settings.rejudge:
            del found["votes"]
        return digest(found, 64)


def _taken_over(vote: Vote, pair: Pair) -> Vote:
    """A stored vote, on the pair as it is called here. It costs this run nothing."""
    ballot = vote.ballot
    if ballot.pair_id != pair.id:
        ballot = ballot.model_copy(update={"id": digest([ballot.id, pair.id]), "pair_id": pair.id})
    return vote.model_copy(update={"ballot": ballot, "cached": True, "attempts": 0, "reasked": 0})


def _number(noted: PlanSource) -> int:
    """The iteration of the run that a plan takes its pairs from."""
    assert noted.iteration is not None, "of a run"
    return noted.iteration


def open_source(job: Job, base_dir: Path, run: RunDir) -> StoredPairs | None:
    """The job's source; None where its policy samples.

    Raises:
        UserError: it can't be used, or isn't any more what the run's last plan noted.
    """
    if job.source is None:
        return None
    plans = [run.plan(k) for k in run.iterations() if (run.iteration(k).path / "plan.json").exists()]
    noted = [plan.source for plan in plans if plan.source]
    source = StoredPairs(job.source, base_dir, noted)
    if noted and not (run.iteration(plans[-1].iteration).path / "metrics.json").exists():
        source.check(noted[-1])
    return source


def take_over(run: Running, it: Iteration, source: StoredPairs) -> None:
    """An iteration's completions, scores, pairs and votes: as they are stored, or with the votes that the judge casts
    now."""
    taken = functools.cache(lambda: source.take(it))  # only where a stage isn't complete
    it.completions = in_order(it.rows("completions", lambda _: [taken().completions]), it.plan.prompt_ids)
    it.scores = it.rows("scores", lambda done: [taken().scores[len(done) :]])
    it.pairs = it.rows("pairs", lambda _: [taken().pairs])
    if not it.labels_as_stored:
        it.votes = judge(run, it)
        return
    it.votes = it.rows(
        "votes",
        lambda done: [taken().votes[len(done) :]],
        before_commit=lambda: {"ballots": len(taken().votes)},
    )
