"""The job's judge, opened in this process: for commands that ask it outside of a run.

In: a job and the texts that will be asked about. Out: an `Ask`, which makes the ballots that a run would make and
casts them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from rlaif.config import Job
from rlaif.constitution import Constitution
from rlaif.errors import UserError
from rlaif.judging.ballots import make_ballots, make_chat_ballots
from rlaif.judging.candidates import Candidate
from rlaif.judging.templates import load_template, template_names
from rlaif.records import Pair, Vote

Ask = Callable[[Sequence[Pair], Sequence[Candidate], Constitution], Iterator[list[Vote]]]
"""Votes on pairs under a constitution, in chunks."""


def open_judge(job: Job, texts: Iterable[Constitution], base_dir: Path, note: Callable[[str], None]) -> Ask:
    """Opens the job's judge; `texts` are those that it will be asked about, `note` is told what takes time.

    Raises:
        UserError: the judge can't be asked (a model, a template or a key is missing, or its votes are recorded).
    """
    if job.judge.kind == "recorded":
        raise UserError("judge.kind: recorded votes can't be asked; name a judge that answers (likelihood or chat)")
    return _chat(job, texts, base_dir) if job.judge.kind == "chat" else _likelihood(job, note)


def _chat(job: Job, texts: Iterable[Constitution], base_dir: Path) -> Ask:
    from rlaif.judging.chat import ChatJudge

    settings = job.judge
    names = dict.fromkeys(name for text in texts for name in template_names(settings, text, "decide"))
    templates = {name: load_template(base_dir / settings.templates_dir, name) for name in names}
    judge = ChatJudge(settings)

    def ask(pairs: Sequence[Pair], candidates: Sequence[Candidate], text: Constitution) -> Iterator[list[Vote]]:
        mine = [templates[name] for name in template_names(settings, text, "decide")]
        by_principle = settings.votes_per_principle
        ballots = make_chat_ballots(pairs, text, settings.jurors, mine, "decide", by_principle, job.seed)
        yield from judge.cast(ballots, pairs, candidates, text, mine)

    return ask


def _likelihood(job: Job, note: Callable[[str], None]) -> Ask:
    from rlaif import models
    from rlaif.judging.likelihood import LikelihoodJudge

    path = models.resolve(job.judge.model, progress=lambda message, share: note(message))
    judge = LikelihoodJudge(str(path), job.judge)
    name = f"{job.judge.kind}:{models.digest_of(path)}"

    def ask(pairs: Sequence[Pair], candidates: Sequence[Candidate], text: Constitution) -> Iterator[list[Vote]]:
        yield from judge.cast(make_ballots(pairs, text, name, "decide", job.seed), pairs, candidates, text)

    return ask
