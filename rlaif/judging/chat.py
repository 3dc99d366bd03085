"""The chat judge: ballots in, votes out, from any OpenAI-compatible server.

In: ballots (`make_chat_ballots`), pairs, candidates and a constitution. Out: votes in chunks, in the order in which
they were answered. Every ballot ends as a vote, which may be a typed abstention, or is still owed when `cast` raises:

- `BudgetSpent`: the budget is used up; what was under way is answered and yielded first.
- `JudgeUnavailable`: too many ballots in a row failed for good, or were rejected. Their abstentions are held back, and
  owed again.
- `UserError`: the key, the model, the address or the request itself is wrong.

Ballots are taken from their iterable when there is room, so memory does not grow with their number.
"""

from __future__ import annotations

import asyncio
import gc
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from rlaif.config import Judge, Juror
from rlaif.constitution import Constitution
from rlaif.errors import BudgetSpent, JudgeUnavailable, UserError
from rlaif.judging.ballots import juror_names, request_parameters
from rlaif.judging.cache import ReplyCache, reply_key
from rlaif.judging.candidates import Candidate
from rlaif.judging.parsing import Reply, label_mass, outcome, parse
from rlaif.judging.spending import Spent, Wasted
from rlaif.judging.templates import Template, render
from rlaif.judging.transport import CallFailed, OpenAIServer, Pace, Server, shown_url
from rlaif.records import Ballot, Message, Pair, Usage, Vote, digest
from rlaif.store import append_line

_CHUNK_S = 0.02
"""Replies that come within this time are one chunk: one write to the cache, and one by whoever keeps the votes."""

Connect = Callable[[Juror, Judge, asyncio.Semaphore, Pace, Pace, float, Callable[[Usage], None]], Server]


def make(settings: Judge, spent: Spent | None = None, wasted: Path | None = None) -> ChatJudge:
    """Factory for a worker process. `spent` is what earlier processes of the run have used of the budget, `wasted`
    the run's file of answers that held no reply."""
    return ChatJudge(settings, spent, wasted=wasted)


class ChatJudge:
    """Asks one or more models behind servers. `spent` grows with every answered call."""

    def __init__(
        self,
        settings: Judge,
        spent: Spent | None = None,
        connect: Connect = OpenAIServer,
        backoff_s: float = 0.5,
        wasted: Path | None = None,
    ):
        """`connect` makes a juror's server; `backoff_s` is the longest first wait before another attempt; `wasted` is
        a file that gets a line (`Wasted`) for every answer without a reply.

        `spent` also says which jurors have answered: their failed ballots are votes, however few are left.

        Raises:
            UserError: a key is missing, an address is none, a price is missing, or the cache can't be written.
        """
        for juror in settings.jurors:
            if settings.budget.money is not None and juror.model not in settings.prices:
                raise UserError(f"judge.prices: no price for `{juror.model}`, and judge.budget.money needs one")
        self.settings = settings
        self.spent = spent or Spent()
        self._standing: dict[str, _Standing] = defaultdict(_Standing)
        """By juror, over all casts."""
        for name in self.spent.answered:
            self._standing[name].answers = True
        self._jurors = dict(zip(juror_names(settings.jurors), settings.jurors, strict=True))
        self._connect = connect
        self._backoff_s = backoff_s
        self._wasted = wasted
        self._paces: dict[str, tuple[Pace, Pace]] = {}
        """By address: requests and tokens a minute, over all casts."""
        self._servers(asyncio.Semaphore(), lambda name, usage: None)  # a missing key is found before any call
        _spare_the_collector()
        self._cache = ReplyCache(settings.cache) if settings.cache else None

    def cast(
        self,
        ballots: Iterable[Ballot],
        pairs: Sequence[Pair],
        candidates: Sequence[Candidate],
        constitution: Constitution,
        templates: Sequence[Template],
        journal: Path | None = None,
    ) -> Iterator[list[Vote]]:
        """Votes on the given ballots, in chunks: write each before asking for the next.

        `journal` is a file that gets the id of every ballot before a server is asked: those without a vote may have
        been asked for nothing when the process is killed.

        A generator that is closed early leaves the ballots under way unanswered: they are owed again.

        Raises:
            BudgetSpent, JudgeUnavailable, UserError: see the module; all votes before it were yielded.
            ValueError: a ballot about another constitution, template or juror than this judge's.
        """
        questions = _Questions(
            {p.id: p for p in pairs},
            {c.completion_id: c for c in candidates},
            constitution,
            constitution.hash,
            {t.hash: t for t in templates},
        )
        with asyncio.Runner() as runner, _lines(journal) as asked:
            casting = _Casting(self, iter(ballots), questions, asked)
            runner.run(casting.start())
            try:
                while (chunk := runner.run(casting.next_chunk())) is not None:
                    if chunk:
                        yield chunk
            finally:
                runner.run(casting.stop())

    def close(self) -> None:
        """Closes the cache."""
        if self._cache is not None:
            self._cache.close()

    def _servers(self, slots: asyncio.Semaphore, wasted: Callable[[str, Usage], None]) -> dict[str, Server]:
        """A server for each juror; jurors at one address share its limits."""
        for juror in self._jurors.values():
            limits = Pace(self.settings.requests_per_minute), Pace(self.settings.tokens_per_minute)
            self._paces.setdefault(shown_url(juror), limits)
        return {
            name: self._connect(
                juror, self.settings, slots, *self._paces[shown_url(juror)], self._backoff_s, partial(wasted, name)
            )
            for name, juror in self._jurors.items()
        }


@cache
def _spare_the_collector() -> None:
    """Takes what is there now, openai's many classes above all, out of the garbage collector's rounds: looking through
    them again and again costs some per cent of a call (`make bench-judge`)."""
    gc.collect()
    gc.freeze()


def _lines(path: Path | None) -> AbstractContextManager[TextIO | None]:
    """A file that grows by lines, each handed to the system at once: it survives this process, if not the machine."""
    return nullcontext() if path is None else path.open("a", buffering=1)


class _Questions(NamedTuple):
    """What ballots are rendered from."""

    pairs: Mapping[str, Pair]
    candidates: Mapping[str, Candidate]
    constitution: Constitution
    constitution_hash: str
    """Computed once: it is compared with every ballot's."""
    templates: Mapping[str, Template]

    def template(self, ballot: Ballot) -> Template:
        """The template of a ballot."""
        if ballot.constitution != self.constitution_hash:
            raise ValueError(f"ballot {ballot.id} is about another constitution")
        if ballot.template not in self.templates:
            raise ValueError(f"ballot {ballot.id} is of another template")
        return self.templates[ballot.template]

    def messages(self, ballot: Ballot, template: Template) -> tuple[Message, ...]:
        """A ballot's question, rendered."""
        pair = self.pairs[ballot.pair_id]
        shown = pair.swap() if ballot.order == "reversed" else pair
        first, second = self.candidates[shown.first], self.candidates[shown.second]
        _, _, asked = ballot.voice.partition("/")
        principle = self.constitution.principle(asked) if asked else None
        return render(
            template,
            self.constitution,
            principle,
            first.messages,
            first.text,
            second.text,
            (first.cut_off, second.cut_off),
        )


class _Done(NamedTuple):
    """A ballot that was answered, or failed for good."""

    vote: Vote
    failure: CallFailed | None = None
    store: tuple[str, Reply] | None = None
    """What the cache doesn't hold yet."""

    @property
    def rejected(self) -> bool:
        """The server refused the request."""
        return self.failure is not None and self.failure.kind == "rejected"


@dataclass
class _Standing:
    """What is known of a juror."""

    answers: bool = False
    """It has replied, in this process or an earlier one: its settings are right."""
    failures: int = 0
    """Ballots that failed since its last reply, over all casts, but for rejected ones."""
    rejected: set[str] = field(default_factory=set)
    """Pairs with ballots that were rejected since its last reply. One that is too long is rejected in both orders, by
    every template and sample, which says as much as one rejection."""


@dataclass
class _Streak:
    """A juror's failures since its last reply: whether they are votes shows with the next one."""

    standing: _Standing
    held: list[_Done] = field(default_factory=list)


class _Casting:
    """One `cast` on its way: a fixed number of tasks take ballots from one iterator."""

    def __init__(self, judge: ChatJudge, ballots: Iterator[Ballot], questions: _Questions, asked: TextIO | None):
        self.judge = judge
        self.ballots = ballots
        self.asked = asked
        self.questions = questions
        self.ready: list[_Done] = []
        self.streaks = {name: _Streak(judge._standing[name]) for name in judge._jurors}
        """By juror: one that is down must not hide behind another that answers."""
        self.error: Exception | None = None
        """Why no more ballots are taken."""
        self.under_way = 0

    async def start(self) -> None:
        """Starts the tasks. More than there are request slots, so that a wait before a retry leaves none empty."""
        self.wake = asyncio.Event()
        self.room = asyncio.Condition()
        self.turn = asyncio.Lock()
        self.servers = self.judge._servers(asyncio.Semaphore(self.judge.settings.concurrency), self._wasted)
        tasks = 2 * self.judge.settings.concurrency
        self.tasks = [asyncio.create_task(self._work()) for _ in range(tasks)]

    async def next_chunk(self) -> list[Vote] | None:
        """The votes since the last call, at least one; None when all is done.

        Raises:
            BudgetSpent, JudgeUnavailable, UserError: after the last vote was returned.
        """
        while True:
            all_done = all(t.done() for t in self.tasks)
            if ready := self._take():
                return [d.vote for d in ready]
            # What is under way is still answered when the budget is spent; with any other error it is not.
            if self.error is not None and (all_done or not isinstance(self.error, BudgetSpent)):
                raise self.error
            if all_done:
                return [d.vote for d in self._last()] or None
            await self.wake.wait()
            await asyncio.sleep(_CHUNK_S)
            self.wake.clear()

    async def stop(self) -> None:
        """Ends what is still under way."""
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)
        for server in self.servers.values():
            await server.close()

    def _finish(self, done: _Done) -> None:
        """Sorts out whether a finished ballot is a vote already, or held back with its juror's other failures."""
        streak = self.streaks[done.vote.ballot.judge]
        standing = streak.standing
        if done.failure is None:
            standing.answers = True
        if done.vote.cached:  # says nothing about the server now
            self.ready.append(done)
        elif done.failure is None:
            self.ready += [*streak.held, done]
            streak.held, standing.failures = [], 0
            standing.rejected.clear()
        else:
            streak.held.append(done)
            # Also those of earlier casts, or a judge that went down between small ones would never be found out.
            if done.rejected:
                standing.rejected.add(done.vote.ballot.pair_id)
            else:
                standing.failures += 1
            failed = standing.failures + len(standing.rejected) if standing.answers else len(streak.held)
            if failed >= self.judge.settings.breaker_failures:
                self.error = self.error or self._unavailable(streak)

    def _take(self) -> list[_Done]:
        """Votes that can be yielded, their replies stored."""
        out, self.ready = self.ready, []
        if self.judge._cache is not None and (new := [d.store for d in out if d.store is not None]):
            self.judge._cache.put(new)
        return out

    def _last(self) -> list[_Done]:
        """What is still held back when nothing more comes: votes, unless a juror never answered at all.

        Raises:
            JudgeUnavailable, UserError: it didn't.
        """
        for streak in self.streaks.values():
            # One that has answered may fail at this very ballot again and again: a vote, not a pause.
            if streak.held and not streak.standing.answers:
                raise self._unavailable(streak)
        left = [d for streak in self.streaks.values() for d in streak.held]
        for streak in self.streaks.values():
            streak.held = []
        return left

    def _unavailable(self, streak: _Streak) -> Exception:
        """Why a row of failures ends the casting."""
        last = streak.held[-1].vote
        url = shown_url(self.judge._jurors[last.ballot.judge])
        if all(d.rejected for d in streak.held):
            if not streak.standing.answers:
                return UserError(
                    f"judge: {url} rejects every request ({last.error}); mend the job: judge.model, judge.logprobs, "
                    "judge.extra_body"
                )
            return JudgeUnavailable(
                f"judge: {url} rejected every request about the last {len(streak.standing.rejected)} pairs (last: "
                f"{last.error}); run again when that is mended, or with a larger judge.breaker_failures if these "
                "questions can't be answered"
            )
        failed = max(streak.standing.failures, len(streak.held))
        strange = not streak.standing.answers and all(d.failure and d.failure.kind == "broken" for d in streak.held)
        return JudgeUnavailable(
            f"judge: {url} {'gives no usable reply' if strange else 'is down'}, {failed} ballots in a row failed after "
            f"all attempts (last: {last.error}); "
            f"{'check judge.base_url, or ' if strange else ''}run again when it is back"
        )

    async def _work(self) -> None:
        """Answers ballots until none is left or there is a reason to stop."""
        try:
            while self.error is None and (ballot := next(self.ballots, None)) is not None:
                done = await self._answer(ballot)
                self._finish(done)
                self.wake.set()
                if done.vote.cached:
                    await asyncio.sleep(0)  # a run of cached replies must not keep the others waiting
        except Exception as e:
            self.error = self.error or e
        finally:
            self.wake.set()

    async def _answer(self, ballot: Ballot) -> _Done:
        template = self.questions.template(ballot)
        juror = self.judge._jurors.get(ballot.judge)
        if juror is None:
            raise ValueError(f"ballot {ballot.id} is for {ballot.judge}, which is no juror of this judge")
        messages = self.questions.messages(ballot, template)
        body = {**request_parameters(juror, template), "messages": [m.model_dump() for m in messages]}
        if juror.temperature > 0 and "seed" not in juror.extra_body:
            body["seed"] = ballot.seed
        prompt_hash = digest(body["messages"])
        key = reply_key(juror.base_url, body, ballot.seed, ballot.sample_index) if self.judge._cache else ""
        if self.judge._cache is not None and (stored := self.judge._cache.get(key)) is not None:
            how: dict[str, Any] = {"cached": True, "attempts": 0}
            return _Done(_vote(ballot, template, stored, prompt_hash, self.judge.settings.clamp, how))
        await self._enter()
        if self.asked is not None:
            self.asked.write(f"{ballot.id}\n")
        failure = None
        try:
            answer = await self.servers[ballot.judge].ask(body)
            self.judge.spent = self.judge.spent.plus(answer.reply.usage, juror, self.judge.settings)
        except CallFailed as e:
            failure = e
        finally:
            await self._leave()
        # One at a time, in the order of their answers: requests that wait for a slot go out in between.
        async with self.turn:
            await asyncio.sleep(0)
        if failure is not None:
            failed = Vote(
                ballot=ballot, model=juror.model, outcome="abstain", abstain_reason="infra_error", raw_reply="",
                prompt_hash=prompt_hash, error=failure.error, attempts=failure.attempts,
            )  # fmt: skip
            return _Done(failed, failure=failure)
        how = {"attempts": answer.attempts, "latency_s": round(answer.latency_s, 4)}
        vote = _vote(ballot, template, answer.reply, prompt_hash, self.judge.settings.clamp, how)
        return _Done(vote, store=(key, answer.reply) if key else None)

    async def _enter(self) -> None:
        """Returns when the budget allows one more call, those under way counted.

        Tokens and money are known afterwards only, so what is under way at their limit goes over it.

        Raises:
            BudgetSpent: it allows none.
        """
        calls = self.judge.settings.budget.calls
        async with self.room:
            self._check_budget()
            while calls is not None and self.judge.spent.calls + self.under_way >= calls:
                await self.room.wait()
                self._check_budget()
            self.under_way += 1

    async def _leave(self) -> None:
        async with self.room:
            self.under_way -= 1
            self.room.notify_all()

    def _wasted(self, name: str, usage: Usage) -> None:
        """Counts an answer without a reply; its ballot needs one more call.

        Raises:
            BudgetSpent: there is none left for it.
        """
        self.judge.spent = self.judge.spent.plus(usage, self.judge._jurors[name], self.judge.settings)
        if self.judge._wasted is not None:
            append_line(self.judge._wasted, Wasted(judge=name, usage=usage).model_dump_json())
        self._check_budget(more=self.under_way - 1)

    def _check_budget(self, more: int = 0) -> None:
        spent = self.judge.spent
        for name, limit in self.judge.settings.budget:
            if limit is not None and getattr(spent, name) + (more if name == "calls" else 0) >= limit:
                raise BudgetSpent(
                    f"judge.budget.{name}={limit:g} is spent ({spent}); go on with --set judge.budget.{name}=MORE "
                    "(a run also needs --allow-change)"
                )


def _vote(
    ballot: Ballot,
    template: Template,
    reply: Reply,
    prompt_hash: str,
    clamp: tuple[float, float] | None,
    how: Mapping[str, Any],
) -> Vote:
    """The vote that a reply is; `how` it was got are further fields."""
    parsed = parse(reply, template.verdict, template.pattern)
    found: dict[str, Any] = {"outcome": "abstain", "abstain_reason": parsed.abstain_reason}
    if parsed.shown is not None:
        found = {"outcome": outcome(parsed.shown, ballot.order)}
    # A tie has no side that the labels' masses could speak for.
    if parsed.shown in ("A", "B") and (mass := label_mass(reply.tokens, parsed.shown)) is not None:
        p_first = 1 - mass.p_first_shown if ballot.order == "reversed" else mass.p_first_shown
        if clamp is not None and template.verdict != "letter":
            p_first = min(max(p_first, clamp[0]), clamp[1])
        found |= {"p_first": p_first, "mass_neither": mass.neither}
    return Vote(
        ballot=ballot,
        model=reply.model,
        raw_reply=reply.content or reply.refusal or "",
        finish_reason=reply.finish_reason,
        prompt_hash=prompt_hash,
        usage=reply.usage,
        **found,
        **how,
    )
