"""The stored pairs of a run, as another run's `source` (`rlaif.loop.source`).

In: the run's directory. Out: its completions, pairs and votes, under ids of the run that takes them, and copies of the
texts that they were judged under.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from rlaif.config import Job, Source
from rlaif.errors import RlaifError, UserError
from rlaif.loop.in_force import copy_texts
from rlaif.loop.pairing import pair_id
from rlaif.loop.running import Iteration, Taken, may_train
from rlaif.records import Completion, Pair, Plan, PlanSource, PlanTexts, Prompt, Score, Side, Vote, digest
from rlaif.rundir.store import RunDir, file_digest, read_rows
from rlaif.workers.worker import Worker

_TAKEN = ("completions", "scores", "pairs", "votes")
"""Stages of a run that another one can take over."""
_TAKEN_ONCE = "base_logprobs"
"""One more that earlier versions took where it was there; the digests in their plans cover it."""


class StoredPairs:
    """The stored pairs of another run.

    Raises:
        UserError: it is no run, or its iterations aren't judged as far as the job wants them.
    """

    def __init__(self, settings: Source, base_dir: Path, planned: Sequence[PlanSource] = ()):
        """`planned` are what the plans of this run note so far: where the job names no iterations, a run that goes on
        takes the same ones. A branch whose job names none any more takes all, as any job does."""
        self.settings = settings
        self.path = str(settings.run)
        self._run = RunDir.open(base_dir / self.path)
        judged = [k for k in self._run.iterations() if self._run.iteration(k).is_complete("votes")]
        noted = next((p.iterations for p in reversed(planned) if p.path == self.path and not p.named), None)
        wanted = tuple(self.settings.wanted or noted or judged)
        if not wanted or not {*wanted} <= {*judged}:
            has = f"{judged[0]}-{judged[-1]}" if judged else "none"
            asked = (
                f"source.iterations: {self.settings.iterations}" if self.settings.wanted else f"source.run: {self.path}"
            )
            raise UserError(
                f"{asked}: the judged iterations of {self.path} are {has}; name those of them that are to train"
            )
        by_data = [k for k in wanted if (s := self._run.plan(k).source) and s.iteration is None and not s.rejudged]
        if by_data and not settings.rejudge:
            raise UserError(
                f"source.run: iteration {by_data[0]} of {self.path} has a data set's labels and no votes; name that "
                "(source.data), or set source.rejudge"
            )
        self.iterations = wanted
        self.asked_by: Job | None = self._run.job()
        asked_in = {i for k in wanted for i in self._run.plan(k).prompt_ids}
        copies = read_rows(self._run.path / "prompts" / "train.jsonl", Prompt)
        self.prompts = [p for p in copies if p.id in asked_in]
        """What its pairs are answers to."""
        self._ids: Mapping[str, str] = {}

    def pairs_in(self, position: int) -> int:
        """Of the iteration at this place, from 0; those of held-out prompts not yet left out."""
        rows: int = self._run.iteration(self._at(position)).meta("pairs")["rows"]
        return rows

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
        self._ids = may_train(self.prompts, train)
        for k in self.iterations:
            if not any(i in self._ids for i in self._run.plan(k).prompt_ids):
                raise UserError(
                    f"source.iterations: no prompt of iteration {k} of {self.path} is among those that train here, "
                    "most often since they are held out; leave it out, or give other prompts.held_out"
                )

    def planned(self, plan: Plan, given: Sequence[PlanSource], run: RunDir) -> Plan:
        """The plan of an iteration, after those that it gave before. Copies the texts that its pairs were judged under
        into `run`, where labels are as stored."""
        k = self._at(len(given))
        theirs = self._run.plan(k)
        update = {"prompt_ids": tuple(self._ids[p] for p in theirs.prompt_ids if p in self._ids)}
        noted = PlanSource(
            path=self.path,
            iteration=k,
            iterations=self.iterations,
            named=self.settings.wanted is not None,
            sha256=self._digest(k),
            rejudged=self.settings.rejudge,
        )
        if self.settings.rejudge:
            return plan.model_copy(update={**update, "source": noted})
        copy_texts(self._run, theirs, run)
        here, there = (PlanTexts(**{n: getattr(p, n) for n in PlanTexts.model_fields}) for p in (plan, theirs))
        noted = noted.model_copy(update={"in_force": None if here == there else here})
        return plan.model_copy(update={**update, **dict(there), "source": noted})

    def gave(self, noted: PlanSource) -> bool:
        """Whether a plan took its pairs from it."""
        return (noted.path, noted.iterations) == (self.path, self.iterations)

    def check(self, noted: PlanSource) -> None:
        """Whether it is what a plan noted.

        Raises:
            UserError: it changed since.
        """
        k = _number(noted)
        if noted.sha256 not in (self._digest(k), self._digest(k, _TAKEN_ONCE)):
            raise UserError(
                f"source.run: iteration {noted.iteration} of {self.path} isn't what it was when this run's plan was "
                "written; restore it, or start a new run with --name NAME"
            )

    def check_answers(self, sampler: Worker, note: Callable[[str], None]) -> None:
        """They were sampled: they are the policy's tokens."""

    def labels(self, it: Iteration) -> dict[str, Side]:
        """None: its labels are votes."""
        return {}

    def take(self, it: Iteration, sampler: Worker) -> Taken:
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

    def _at(self, position: int) -> int:
        return self.iterations[position % len(self.iterations)]

    def _digest(self, k: int, *more: str) -> str:
        """Of what an iteration has to be taken over, and of `more` stages where they are there.

        Raises:
            RlaifError: a file isn't as it was written.
        """
        here = self._run.iteration(k)
        found = {}
        for stage in (*_TAKEN, *filter(here.is_complete, more)):
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
