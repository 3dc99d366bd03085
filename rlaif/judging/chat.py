"""The chat judge: ballots in, votes out, from any OpenAI-compatible server.

In: ballots (`make_chat_ballots`), pairs, candidates and a constitution. Out: votes in chunks, in the order in which
they were answered. Every ballot ends as a vote, which may be a typed abstention, or is still owed when `cast` raises:

- `BudgetSpent`: the budget is used up; what was under way is answered and yielded first.
- `JudgeUnavailable`: too many ballots in a row failed for good, were left without a word, or were rejected as a short
  question is too. Their abstentions are held back, and owed again.
- `UserError`: the key, the model, the address or the request itself is wrong.

Ballots are taken from their iterable when there is room, so memory does not grow with their number.
"""

from __future__ import annotations

import asyncio
import gc
import os
import re
from collections import defaultdict, deque
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from rlaif.config import ChatSettings, Juror
from rlaif.constitutions.constitution import Constitution
from rlaif.constitutions.templates import Template, render
from rlaif.errors import BudgetSpent, JudgeUnavailable, UserError
from rlaif.judging.ballots import juror_names, request_parameters
from rlaif.judging.cache import ReplyCache, reply_key
from rlaif.judging.candidates import Candidate, MoreBallots
from rlaif.judging.kinds import MOST_EXCUSED
from rlaif.judging.outcomes import said_in_reply
from rlaif.judging.parsing import Reply
from rlaif.judging.servers import Address, Pace, server_name
from rlaif.judging.spending import Spent, Wasted
from rlaif.judging.transport import Answer, CallFailed, OpenAIServer, Server, merge_system, shown_urls
from rlaif.records import Ballot, Message, Pair, Usage, Vote, digest
from rlaif.rundir.store import append_line
from rlaif.serving.servers import Servers
from rlaif.workers.feed import Feed

# What a server says of a question that it can't take for its length, or won't for what it holds.
_OF_THE_QUESTION = re.compile(
    r"context|too long|too large|too many tokens|maximum.{0,40}(?:length|tokens)|reduce the|HTTP 413|cuts long"
    r"|flagged|moderat|content.policy|safety",
    re.I,
)
_CHUNK_S = 0.02
"""Replies that come within this time are one chunk: one write to the cache, and one by whoever keeps the votes."""

Connect = Callable[[Juror, ChatSettings, asyncio.Semaphore, Sequence[Address], float, Callable[[Usage], None]], Server]


def make(
    settings: ChatSettings,
    spent: Spent | None = None,
    wasted: Path | None = None,
    environment: Mapping[str, str] | None = None,
) -> ChatJudge:
    """Factory for a worker process. `spent` is what earlier processes of the run have used of the budget, `wasted`
    the run's file of answers that held no reply, `environment` what this process needs to reach servers of ours."""
    os.environ.update(environment or {})
    return ChatJudge(settings, spent, wasted=wasted)


class ChatJudge:
    """Asks one or more models behind servers. `spent` grows with every answered call."""

    def __init__(
        self,
        settings: ChatSettings,
        spent: Spent | None = None,
        connect: Connect = OpenAIServer,
        backoff_s: float = 0.5,
        wasted: Path | None = None,
    ):
        """`connect` makes what asks a juror's servers; `backoff_s` is the longest first wait before another attempt;
        `wasted` is a file that gets a line (`Wasted`) for every answer without a reply.

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
        self.servers: Servers | None = None
        """Those that were started for this judge alone."""
        self._addresses: dict[str, Address] = {}
        """By server, as votes name it: its limits, and whether it is left out, over all casts."""
        self._identities: dict[str, dict[str, str | None]] = {}
        """By juror and server: what the server says of the model, asked once."""
        self._fingerprints: dict[str, set[str | None]] = defaultdict(set)
        """By juror: the `system_fingerprint`s of the replies so far, those from the cache apart."""
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
        fresh: bool = False,
        feed: Feed | None = None,
    ) -> Iterator[list[Vote]]:
        """Votes on the given ballots, in chunks: write each before asking for the next.

        With a `feed` more ballots are taken (`MoreBallots`) as they come, until it ends.

        `journal` is a file that gets the id of every ballot before a server is asked: those without a vote may have
        been asked for nothing when the process is killed. `fresh`: the servers are asked, whatever is in the cache, and
        what they say doesn't go there.

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
        with _runner() as run, _lines(journal) as asked:
            casting = _Casting(self, iter(ballots), questions, asked, fresh)
            try:
                run(casting.start(feed))
                while (chunk := run(casting.next_chunk())) is not None:
                    if chunk:
                        yield chunk
            finally:
                if feed is not None:
                    feed.stop()
                run(casting.stop())

    def close(self) -> None:
        """Closes the cache, and ends servers that were started for this judge."""
        if self._cache is not None:
            self._cache.close()
        if self.servers is not None:
            self.servers.close()

    def _servers(self, slots: asyncio.Semaphore, wasted: Callable[[str, Usage], None]) -> dict[str, Server]:
        """What asks each juror's servers; jurors at one address share its limits."""
        return {
            name: self._connect(
                juror, self.settings, slots, self._addresses_of(juror), self._backoff_s, partial(wasted, name)
            )
            for name, juror in self._jurors.items()
        }

    def _addresses_of(self, juror: Juror) -> list[Address]:
        found = []
        for url in juror.addresses:
            limits = Pace(self.settings.requests_per_minute), Pace(self.settings.tokens_per_minute)
            found.append(self._addresses.setdefault(server_name(url), Address(url, *limits)))
        return found


@cache
def _spare_the_collector() -> None:
    """Takes what is there now, openai's many classes above all, out of the garbage collector's rounds: looking through
    them again and again costs some per cent of a call (`make bench-judge`)."""
    gc.collect()
    gc.freeze()


@contextmanager
def _runner() -> Iterator[Callable[[Coroutine[Any, Any, Any]], Any]]:
    """Runs coroutines one after another on a loop of their own: in this thread, or in another one where this thread's
    loop runs already (a notebook)."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        with asyncio.Runner() as runner:
            yield runner.run
        return
    with ThreadPoolExecutor(1, "judge") as thread:
        runner = asyncio.Runner()
        try:
            yield lambda coroutine: thread.submit(runner.run, coroutine).result()
        finally:
            thread.submit(runner.close).result()


def _lines(path: Path | None) -> AbstractContextManager[TextIO | None]:
    """A file that grows by lines, each handed to the system at once: it survives this process, if not the machine."""
    return nullcontext() if path is None else path.open("a", buffering=1)


class _Questions(NamedTuple):
    """What ballots are rendered from."""

    pairs: dict[str, Pair]
    candidates: dict[str, Candidate]
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
        cut_off = (first.cut_off, second.cut_off)
        return self._rendered(ballot, template, first.messages, first.text, second.text, cut_off)

    def short(self, ballot: Ballot, template: Template) -> tuple[Message, ...]:
        """The same question about a pair that no server can find too long."""
        return self._rendered(ballot, template, (Message(role="user", content="What is one and one?"),), "Two.", "Ten.")

    def _rendered(
        self,
        ballot: Ballot,
        template: Template,
        prompt: tuple[Message, ...],
        first: str,
        second: str,
        cut_off: tuple[bool, bool] = (False, False),
    ) -> tuple[Message, ...]:
        _, _, asked = ballot.voice.partition("/")
        principle = self.constitution.principle(asked) if asked else None
        return render(template, self.constitution, principle, prompt, first, second, cut_off)


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
    excused: int = 0
    """Of those held, rejected ones that say nothing of the settings: a short question was answered after them."""
    probing: bool = False
    """A short question is under way."""


class _Casting:
    """One `cast` on its way: a fixed number of tasks take ballots from one iterator."""

    def __init__(
        self,
        judge: ChatJudge,
        ballots: Iterator[Ballot],
        questions: _Questions,
        asked: TextIO | None,
        fresh: bool = False,
    ):
        self.judge = judge
        self.cache = None if fresh else judge._cache
        self.ballots = ballots
        self.fed: deque[Ballot] = deque()
        """Taken after these."""
        self.feeding = False
        """More may come."""
        self.asked = asked
        self.questions = questions
        self.ready: list[_Done] = []
        self.streaks = {name: _Streak(judge._standing[name]) for name in judge._jurors}
        """By juror: one that is down must not hide behind another that answers."""
        self.error: Exception | None = None
        """Why no more ballots are taken."""
        self.under_way = 0
        self.tasks: list[asyncio.Task[None]] = []
        self.servers: dict[str, Server] = {}

    async def start(self, feed: Feed | None = None) -> None:
        """Starts the tasks. More than there are request slots, so that a wait before a retry leaves none empty.

        Raises:
            UserError: two servers of one list say that they have different models.
        """
        self.wake = asyncio.Event()
        self.more = asyncio.Event()
        """Set where a task that waits for a ballot should look again."""
        if feed is not None:
            self.feeding, here = True, asyncio.get_running_loop()
            feed.pour(lambda item: here.call_soon_threadsafe(self._feed, item))
        self.room = asyncio.Condition()
        self.turn = asyncio.Lock()
        self.servers = self.judge._servers(asyncio.Semaphore(self.judge.settings.concurrency), self._wasted)
        self.going = asyncio.Event()
        """Cleared while it is looked into whether there is a reason to stop: no more ballots are taken meanwhile."""
        self.going.set()
        self.told: dict[str, asyncio.Event] = {}
        """By juror: set when the first reply of this process is there, if one is asked for (`_of_this_model`)."""
        matters = self.cache is not None or any(len(j.addresses) > 1 for j in self.judge._jurors.values())
        if matters and self.judge.settings.fingerprint and not self.judge._identities:
            found = await asyncio.gather(*(server.identities() for server in self.servers.values()))
            self.judge._identities.update(zip(self.servers, found, strict=True))
        tasks = 2 * self.judge.settings.concurrency
        self.tasks = [asyncio.create_task(self._work()) for _ in range(tasks)]

    def _feed(self, item: MoreBallots | None) -> None:
        """More ballots, or the end of them."""
        if item is None:
            self.feeding = False
        else:
            self.questions.pairs.update((p.id, p) for p in item.pairs)
            self.questions.candidates.update((c.completion_id, c) for c in item.candidates)
            self.fed.extend(item.ballots)
        self.more.set()

    async def _next_ballot(self) -> Ballot | None:
        """The next one to answer; None when there are no more, or a reason to take none."""
        while True:
            if not self.going.is_set():
                await self.going.wait()
            if self.error is not None:
                return None
            if (ballot := next(self.ballots, None)) is not None:
                return ballot
            if self.fed:
                return self.fed.popleft()
            if not self.feeding:
                return None
            self.more.clear()
            await self.more.wait()

    def _give_up(self, error: Exception) -> None:
        """No more ballots are taken."""
        self.error = self.error or error
        self.more.set()

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

    async def _finish(self, done: _Done) -> None:
        """Sorts out whether a finished ballot is a vote already, or held back with its juror's other failures."""
        streak = self.streaks[done.vote.ballot.judge]
        standing = streak.standing
        if done.failure is None:
            standing.answers = True
        if done.vote.cached:  # says nothing about the server now
            self.ready.append(done)
        elif done.failure is None:
            self.ready += [*streak.held, done]
            streak.held, streak.excused, standing.failures = [], 0, 0
            standing.rejected.clear()
        else:
            streak.held.append(done)
            # Also those of earlier casts, or a judge that went down between small ones would never be found out.
            if done.rejected:
                standing.rejected.add(done.vote.ballot.pair_id)
            else:
                standing.failures += 1
            if self._too_many(streak) and not streak.probing:
                await self._look_into(streak)

    def _too_many(self, streak: _Streak) -> bool:
        """Whether a juror's failures since its last reply are a reason to stop."""
        standing = streak.standing
        failed = max(len(streak.held) - streak.excused, standing.failures)
        if standing.answers:
            failed = standing.failures + len(standing.rejected)
        return failed >= self.judge.settings.breaker_failures

    async def _look_into(self, streak: _Streak) -> None:
        """Stops, unless all failures are rejections of what was asked: then a short question is answered."""
        answered: bool | None = False
        if all(d.rejected for d in streak.held):
            streak.probing = True
            self.going.clear()
            try:
                answered = await self._answers_a_short_one(streak.held[-1].vote.ballot)
            finally:
                streak.probing = False
                self.going.set()
            if answered is None:
                answered = all(d.failure and _OF_THE_QUESTION.search(d.failure.error) for d in streak.held)
        if answered:
            streak.standing.rejected.clear()
            streak.excused = len(streak.held)
            if streak.standing.answers:  # they are votes, as a single one would be
                self.ready += streak.held
                streak.held, streak.excused = [], 0
            if streak.excused >= MOST_EXCUSED:
                self._give_up(self._unavailable(streak))
        elif streak.held and self._too_many(streak):
            self._give_up(self._unavailable(streak))

    async def _answers_a_short_one(self, ballot: Ballot) -> bool | None:
        """Whether a juror answers a ballot's question about a short pair; None when that isn't to be known. It costs a
        call that no vote tells of."""
        template = self.questions.template(ballot)
        body = self._body(ballot, template, self.questions.short(ballot, template))
        try:
            answer = await self._ask(ballot, body)
        except CallFailed as e:
            return False if e.kind == "rejected" else None
        self._wasted(ballot.judge, answer.reply.usage, counted=True)
        return True

    def _take(self) -> list[_Done]:
        """Votes that can be yielded, their replies stored."""
        out, self.ready = self.ready, []
        if self.cache is not None and (new := [d.store for d in out if d.store is not None]):
            self.cache.put(new)
        return out

    def _last(self) -> list[_Done]:
        """What is still held back when nothing more comes: votes, unless a juror never answered at all.

        Raises:
            JudgeUnavailable, UserError: it didn't.
        """
        for streak in self.streaks.values():
            # One that has answered may fail at this very ballot again and again: a vote, not a pause.
            silent = all(d.failure is not None and d.failure.kind == "empty" for d in streak.held)
            if streak.held and not streak.standing.answers and not silent:
                raise self._unavailable(streak)
        left = [d for streak in self.streaks.values() for d in streak.held]
        for streak in self.streaks.values():
            streak.held = []
        return left

    def _unavailable(self, streak: _Streak) -> Exception:
        """Why a row of failures ends the casting."""
        ballot, failure = streak.held[-1].vote.ballot, streak.held[-1].failure
        said = failure.error if failure else ""
        url = shown_urls(self.judge._jurors[ballot.judge])
        if all(d.rejected for d in streak.held):
            if streak.excused:
                return UserError(
                    f"judge: {url} rejected all {len(streak.held)} questions that it was asked (last: {said}), and not "
                    "for their settings: they are too long for it, or not allowed; give it a longer context, or name "
                    "another judge"
                )
            if not streak.standing.answers:
                return UserError(
                    f"judge: {url} rejects every request ({said}); mend the job: judge.model, judge.logprobs, "
                    "judge.extra_body"
                )
            return JudgeUnavailable(
                f"judge: {url} rejected every request about the last {len(streak.standing.rejected)} pairs (last: "
                f"{said}); run again when that is mended, or with a larger judge.breaker_failures if these "
                "questions can't be answered"
            )
        failed = max(streak.standing.failures, len(streak.held))
        kinds = {d.failure.kind for d in streak.held if d.failure}
        strange = not streak.standing.answers and kinds == {"broken"}
        what = "is down"
        if kinds <= {"broken", "unfinished", "empty"}:
            what = "gives no usable reply" if strange else "gives no finished reply"
        return JudgeUnavailable(
            f"judge: {url} {what}, {failed} ballots in a row failed after all attempts (last: {said}); "
            f"{'check judge.base_url, or ' if strange else ''}run again when it is back"
        )

    async def _work(self) -> None:
        """Answers ballots until none is left or there is a reason to stop."""
        try:
            while (ballot := await self._next_ballot()) is not None:
                done = await self._answer(ballot)
                await self._finish(done)
                self.wake.set()
                if done.vote.cached:
                    await asyncio.sleep(0)  # a run of cached replies must not keep the others waiting
        except Exception as e:
            self._give_up(e)
        finally:
            self.wake.set()

    async def _answer(self, ballot: Ballot) -> _Done:
        template = self.questions.template(ballot)
        juror = self.judge._jurors.get(ballot.judge)
        if juror is None:
            raise ValueError(f"ballot {ballot.id} is for {ballot.judge}, which is no juror of this judge")
        settings = self.judge.settings
        body = self._body(ballot, template, self.questions.messages(ballot, template))
        prompt_hash = digest(body["messages"])
        how: dict[str, Any] = {"cached": True, "attempts": 0}
        keys = self._keys(ballot, juror, body)
        stored, stored_at = self._stored(keys)
        if stored is not None and await self._of_this_model(ballot.judge, stored):
            how["fingerprint"] = self._named(ballot, stored, stored_at)
            return _Done(_vote(ballot, template, stored, prompt_hash, settings.clamp, how))
        vote, reply, failure, server = None, None, None, None
        attempts, usage = 0, None
        for asked in range(1 + settings.reask):
            if asked and "seed" in body and "seed" not in juror.extra_body:  # or it would say the same
                body = {**body, "seed": (ballot.seed + asked * 1_000_003) % 2**31}
            try:
                answer = await self._ask(ballot, body, journal=not asked)
            except CallFailed as e:
                failure = e
                if vote is not None:  # the reply before it is one, if an unreadable one
                    vote = vote.model_copy(update={"attempts": attempts + e.attempts})
                break
            except BudgetSpent:
                if vote is None:
                    raise
                break
            reply, attempts, usage = answer.reply, attempts + answer.attempts, _sum(usage, answer.reply.usage)
            server = answer.server
            how = {
                "attempts": attempts, "reasked": asked, "latency_s": round(answer.latency_s, 4),
                "fingerprint": self._named(ballot, reply, server), "server": server,
            }  # fmt: skip
            vote = _vote(ballot, template, reply, prompt_hash, settings.clamp, how, usage)
            if vote.abstain_reason not in ("empty", "unparsed"):
                break
        # One at a time, in the order of their answers: requests that wait for a slot go out in between.
        async with self.turn:
            await asyncio.sleep(0)
        if failure is not None and vote is None and stored is not None and not self.judge._fingerprints[ballot.judge]:
            how["fingerprint"] = self._named(ballot, stored, stored_at)  # nobody says that it is another model's
            return _Done(_vote(ballot, template, stored, prompt_hash, settings.clamp, how))
        if failure is not None and (vote is None or reply is None):
            failed = Vote(
                ballot=ballot, model=juror.model, outcome="abstain", abstain_reason="infra_error", raw_reply="",
                prompt_hash=prompt_hash, error=failure.error, attempts=failure.attempts,
            )  # fmt: skip
            return _Done(failed, failure=failure)
        assert vote is not None
        assert reply is not None
        if vote.abstain_reason == "empty":
            return _Done(vote, failure=CallFailed("an empty reply", "empty", vote.attempts))
        complete = vote.outcome != "abstain" or reply.ending == "finished"
        key = keys.get(server) if complete else None
        return _Done(vote, store=(key, reply) if key else None)

    def _keys(self, ballot: Ballot, juror: Juror, body: dict[str, Any]) -> dict[str | None, str]:
        """By server, in an order that isn't the job's: where the cache has its reply."""
        if self.cache is None:
            return {}
        identities, called = self.judge._identities.get(ballot.judge, {}), self.judge.settings.cached_as
        return {
            (name := server_name(url)): reply_key(
                called(url), body, ballot.seed, ballot.sample_index, juror.query, identities.get(name)
            )
            for url in sorted(juror.addresses)
        }

    def _stored(self, keys: Mapping[str | None, str]) -> tuple[Reply | None, str | None]:
        """The stored reply of one of the servers, and which one's it is."""
        for server, key in keys.items():
            if self.cache is not None and (reply := self.cache.get(key)) is not None:
                return reply, server
        return None, None

    def _body(self, ballot: Ballot, template: Template, messages: Sequence[Message]) -> dict[str, Any]:
        """The request that asks a ballot's juror these messages."""
        juror = self.judge._jurors[ballot.judge]
        said = [m.model_dump() for m in messages]
        if juror.system_role == "merged":
            said = merge_system(said)
        body = {**request_parameters(juror, template), "messages": said}
        if juror.temperature > 0 and "seed" not in juror.extra_body:
            body["seed"] = ballot.seed
        return body

    async def _ask(self, ballot: Ballot, body: dict[str, Any], journal: bool = False) -> Answer:
        """A finished reply, which the budget allowed and is counted against it.

        Raises:
            BudgetSpent, CallFailed, UserError: there is none.
        """
        try:
            await self._enter()
        except BudgetSpent:
            self._tell(ballot.judge)
            raise
        if journal and self.asked is not None:
            self.asked.write(f"{ballot.id}\n")
        try:
            answer = await self.servers[ballot.judge].ask(body)
            self.judge._fingerprints[ballot.judge].add(answer.reply.system_fingerprint)
            juror = self.judge._jurors[ballot.judge]
            self.judge.spent = self.judge.spent.plus(answer.reply.usage, juror, self.judge.settings)
            return answer
        finally:
            self._tell(ballot.judge)
            await self._leave()

    def _tell(self, name: str) -> None:
        """Lets those go on that wait for a juror's first reply."""
        if (told := self.told.get(name)) is not None:
            told.set()

    async def _of_this_model(self, name: str, stored: Reply) -> bool:
        """Whether a stored reply is of the model that answers now, as far as the server tells them apart.

        The first ballot whose stored reply has a fingerprint is asked again, and shows the present one.
        """
        if stored.system_fingerprint is None or not self.judge.settings.fingerprint:
            return True
        seen = self.judge._fingerprints[name]
        if not seen:
            if name not in self.told:
                self.told[name] = asyncio.Event()
                return False
            await self.told[name].wait()
        return stored.system_fingerprint in seen or not seen  # no reply, so nobody says that it is another model

    def _named(self, ballot: Ballot, reply: Reply, server: str | None) -> str | None:
        """What a server says of the model that gave a reply."""
        identity = self.judge._identities.get(ballot.judge, {}).get(server or "")
        if reply.system_fingerprint and identity:
            return f"{reply.system_fingerprint} {identity}"
        return reply.system_fingerprint or identity

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

    def _wasted(self, name: str, usage: Usage, counted: bool = False) -> None:
        """Counts an answer that no vote will tell of; its ballot needs one more call, unless it is `counted` already.

        Raises:
            BudgetSpent: there is none left for it.
        """
        if not counted:
            self.judge.spent = self.judge.spent.plus(usage, self.judge._jurors[name], self.judge.settings)
        if self.judge._wasted is not None:
            append_line(self.judge._wasted, Wasted(judge=name, usage=usage).model_dump_json())
        if not counted:
            self._check_budget(more=self.under_way - 1)

    def _check_budget(self, more: int = 0) -> None:
        spent = self.judge.spent
        for name, limit in self.judge.settings.budget:
            if limit is not None and getattr(spent, name) + (more if name == "calls" else 0) >= limit:
                raise BudgetSpent(
                    f"judge.budget.{name}={limit:g} is spent ({spent}); go on with --set judge.budget.{name}=MORE "
                    "(a run also needs --allow-change)"
                )


def _sum(a: Usage | None, b: Usage) -> Usage:
    """Both together."""
    if a is None:
        return b
    counts = {n: getattr(a, n) + getattr(b, n) for n in Usage.model_fields if n != "estimated"}
    return Usage(**counts, estimated=a.estimated or b.estimated)


def _vote(
    ballot: Ballot,
    template: Template,
    reply: Reply,
    prompt_hash: str,
    clamp: tuple[float, float] | None,
    how: Mapping[str, Any],
    usage: Usage | None = None,
) -> Vote:
    """The vote that a reply is; `how` it was got are further fields, `usage` is that of all replies to the ballot."""
    said = said_in_reply(reply, template, ballot.order, clamp)
    return Vote(
        ballot=ballot,
        model=reply.model,
        raw_reply=reply.content or reply.refusal or "",
        finish_reason=reply.finish_reason,
        prompt_hash=prompt_hash,
        usage=reply.usage if usage is None else usage,
        **said._asdict(),
        **how,
    )
