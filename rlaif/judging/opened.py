"""The job's judge, opened in this process: for commands that ask it outside of a run.

In: a job and the texts that will be asked about. Out: an `Ask`, which makes the ballots that a run would make and
casts them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from rlaif.config import Job
from rlaif.constitutions.constitution import Constitution
from rlaif.constitutions.templates import Template, load_template, template_names
from rlaif.judging.ballots import asked_by, ballots_for
from rlaif.judging.candidates import Candidate
from rlaif.records import Ballot, Pair, Vote

Ask = Callable[[Sequence[Pair], Sequence[Candidate], Constitution], Iterator[list[Vote]]]
"""Votes on pairs under a constitution, in chunks."""


class Opened(NamedTuple):
    """A judge that can be asked, and what it would be asked: whose id a vote has, that vote needn't be cast again."""

    ask: Ask
    ballots: Callable[[Sequence[Pair], Constitution], list[Ballot]]


def open_with_ballots(job: Job, texts: Iterable[Constitution], base_dir: Path, note: Callable[[str], None]) -> Opened:
    """Opens the job's judge; `texts` are those that it will be asked about, `note` is told what takes time.

    Raises:
        UserError: the judge can't be asked (a model, a template or a key is missing), or a text doesn't serve it.
    """
    texts = [asked_by(job.judge, text) for text in texts]
    return _chat(job, texts, base_dir) if job.judge.kind == "chat" else _likelihood(job, note)


def _chat(job: Job, texts: Iterable[Constitution], base_dir: Path) -> Opened:
    from rlaif.judging.chat import ChatJudge

    settings = job.judge
    names = dict.fromkeys(name for text in texts for name in template_names(settings, text, "decide"))
    templates = {name: load_template(base_dir / settings.templates_dir, name) for name in names}
    judge = ChatJudge(settings)

    def mine(text: Constitution) -> list[Template]:
        return [templates[name] for name in template_names(settings, text, "decide")]

    def ballots(pairs: Sequence[Pair], text: Constitution) -> list[Ballot]:
        return ballots_for(settings, pairs, text, seed=job.seed, templates=mine(text))

    def ask(pairs: Sequence[Pair], candidates: Sequence[Candidate], text: Constitution) -> Iterator[list[Vote]]:
        yield from judge.cast(ballots(pairs, text), pairs, candidates, text, mine(text))

    return Opened(ask, ballots)


def _likelihood(job: Job, note: Callable[[str], None]) -> Opened:
    from rlaif import models
    from rlaif.judging.cache import LikelihoodCache
    from rlaif.judging.likelihood import LikelihoodJudge

    path = models.resolve(job.judge.model, progress=lambda message, share: note(message))
    judge = LikelihoodJudge(str(path), job.judge)
    weights = models.digest_of(path)
    if job.judge.cache:
        # The configuration, too: it says how the weights are to be multiplied.
        config = hashlib.sha256((path / "config.json").read_bytes()).hexdigest()
        judge.remember(LikelihoodCache(job.judge.cache), f"{weights} {config}")
    name = f"{job.judge.kind}:{weights}"

    def ballots(pairs: Sequence[Pair], text: Constitution) -> list[Ballot]:
        return ballots_for(job.judge, pairs, asked_by(job.judge, text), seed=job.seed, name=name)

    def ask(pairs: Sequence[Pair], candidates: Sequence[Candidate], text: Constitution) -> Iterator[list[Vote]]:
        yield from judge.cast(ballots(pairs, text), pairs, candidates, asked_by(job.judge, text))

    return Opened(ask, ballots)
