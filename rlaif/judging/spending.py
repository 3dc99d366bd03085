"""What a judge behind a server has cost: calls, tokens and, by the job's price table, money. Pure."""

from __future__ import annotations

from collections.abc import Iterable

from rlaif.config import Judge, Juror
from rlaif.judging.ballots import juror_names
from rlaif.records import Record, Usage, Vote


class Spent(Record):
    """What a judge has cost so far."""

    calls: int = 0
    tokens: int = 0
    money: float = 0.0
    estimated: bool = False
    """Some of the tokens, and so of the money, are a guess: a server reports no usage."""
    answered: frozenset[str] = frozenset()
    """Jurors, as ballots name them, that an earlier process had a reply of: their settings are right."""

    def plus(self, usage: Usage, juror: Juror, settings: Judge) -> Spent:
        """With one more answered call."""
        price = settings.prices.get(juror.model)
        money = 0.0
        if price is not None:
            money = (usage.prompt_tokens * price.prompt + usage.completion_tokens * price.completion) / 1e6
        tokens = usage.prompt_tokens + usage.completion_tokens
        more = {"calls": self.calls + 1, "tokens": self.tokens + tokens, "money": self.money + money}
        return self.model_copy(update={**more, "estimated": self.estimated or usage.estimated})

    def __str__(self) -> str:
        guess = ", in part estimated: the server reports no usage" if self.estimated else ""
        return f"{self.calls} calls, {self.tokens} tokens, {self.money:.4g} money{guess}"


class Wasted(Record):
    """A server's answer that held no reply, and was paid for. No vote tells of it."""

    judge: str
    """Juror, as ballots name it."""
    usage: Usage


def spent_on(votes: Iterable[Vote], settings: Judge, wasted: Iterable[Wasted] = ()) -> Spent:
    """What votes and wasted answers cost: those of an earlier process count against the budget of this one."""
    jurors = dict(zip(juror_names(settings.jurors), settings.jurors, strict=True))
    spent = Spent()
    answered = set()
    for vote in votes:
        if vote.abstain_reason != "infra_error" and vote.ballot.judge in jurors:
            answered.add(vote.ballot.judge)
            if not vote.cached:
                spent = spent.plus(vote.usage, jurors[vote.ballot.judge], settings)
    for answer in wasted:
        if answer.judge in jurors:
            spent = spent.plus(answer.usage, jurors[answer.judge], settings)
    return spent.model_copy(update={"answered": frozenset(answered)})
