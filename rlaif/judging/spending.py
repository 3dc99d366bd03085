"""What a judge behind a server has cost: calls, tokens and, by the job's price table, money. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from rlaif.config import ChatSettings, Juror, Price
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

    def plus(self, usage: Usage, juror: Juror, settings: ChatSettings, calls: int = 1) -> Spent:
        """With so many more answered calls, which used this much together."""
        price = settings.prices.get(juror.model)
        money = 0.0 if price is None else cost(usage, price)
        tokens = usage.prompt_tokens + usage.completion_tokens
        more = {"calls": self.calls + calls, "tokens": self.tokens + tokens, "money": self.money + money}
        return self.model_copy(update={**more, "estimated": self.estimated or usage.estimated})

    def __str__(self) -> str:
        guess = ", in part estimated: the server reports no usage" if self.estimated else ""
        return f"{self.calls} calls, {self.tokens} tokens, {self.money:.4g} money{guess}"


def cost(usage: Usage, price: Price) -> float:
    """What tokens cost; thoughts and cached ones at their own price where they have one."""
    cached = min(usage.cached_tokens, usage.prompt_tokens)
    thought = min(usage.reasoning_tokens, usage.completion_tokens)
    of_cached = price.prompt if price.cached is None else price.cached
    of_thought = price.completion if price.reasoning is None else price.reasoning
    asked = (usage.prompt_tokens - cached) * price.prompt + cached * of_cached
    return (asked + (usage.completion_tokens - thought) * price.completion + thought * of_thought) / 1e6


WASTED = "judge_wasted.jsonl"
"""A run's file of what its judge was paid for and no vote of it tells of ..."""
REFERENCE_WASTED = "reference_wasted.jsonl"
"""... and of the reference judge."""


class Wasted(Record):
    """What was paid for, and no vote of the run tells of: a server's answer that held no reply, or a vote that a
    rollback set aside."""

    judge: str
    """Juror, as ballots name it."""
    usage: Usage
    calls: int = 1
    """Answered ones, which used this much together."""


def wasted_by(votes: Iterable[Vote]) -> Iterator[Wasted]:
    """What votes cost that are none of the run's any more; nothing where nobody was asked."""
    for vote in votes:
        if not vote.cached and vote.abstain_reason != "infra_error":
            yield Wasted(judge=vote.ballot.judge, usage=vote.usage, calls=1 + vote.reasked)


def spent_on(votes: Iterable[Vote], settings: ChatSettings, wasted: Iterable[Wasted] = ()) -> Spent:
    """What votes and wasted answers cost: those of an earlier process count against the budget of this one."""
    jurors = dict(zip(juror_names(settings.jurors), settings.jurors, strict=True))
    spent = Spent()
    answered = set()
    for vote in votes:
        if vote.abstain_reason != "infra_error" and vote.ballot.judge in jurors:
            if vote.abstain_reason != "empty":
                answered.add(vote.ballot.judge)
            if not vote.cached:
                spent = spent.plus(vote.usage, jurors[vote.ballot.judge], settings, 1 + vote.reasked)
    for answer in wasted:
        if answer.judge in jurors:
            spent = spent.plus(answer.usage, jurors[answer.judge], settings, answer.calls)
    return spent.model_copy(update={"answered": frozenset(answered)})
