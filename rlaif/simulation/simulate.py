"""A run as events: answers that are decoded, ballots that wait for a judge, updates, weights on their way.

In: a job's counts and what it is run on. Out: when its iterations ended, and how busy each role was. Everything random
is drawn with one seed, so that two setups differ by what is different about them. An iteration takes its course as in
`rlaif.loop`: sampled, scored, judged, each from the first prompt to the last or (`stream`) prompt by prompt; then the
update, and what is evaluated. With `staleness` N the next N iterations may be sampled and judged meanwhile, one after
the other; who else wants sampler or judge waits for those that were begun.

Large runs are thinned: one event stands for many answers or ballots, on as many times fewer slots.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from rlaif.errors import UserError
from rlaif.simulation.cluster import Failures, Setup, Spread
from rlaif.simulation.stations import Countdown, Outages, Station
from rlaif.simulation.work import Work

if TYPE_CHECKING:
    import simpy

EVENTS = 60_000
"""Answers and ballots of a run that are simulated one by one; a longer run is thinned."""
_LEAST_PROMPTS, _LEAST_SLOTS = 32, 8
"""What thinning leaves of an iteration, and of a role: enough for the shape of what happens."""
_HOPELESS = 5
"""What takes so many times as long as whoever does it goes without a failure is done once in e^5 attempts."""
STAGES = ("weights", "sampling", "judging", "loop", "update", "evaluation")
"""What the loop does, or waits for."""
PACE = "requests a minute"
_TOKENS_SHARE = 0.8
"""Of `sampling.max_tokens` that an answer has, where nobody measured it; as `rlaif.loop.cost` reckons."""

Process = Generator[Any, Any, None]


class Simulated(NamedTuple):
    """What became of a run."""

    began_s: float
    """The evaluation of the base policy was over, ..."""
    ends_s: list[float]
    """... and so was each iteration."""
    use: dict[str, float]
    """Role → share of its slots' time that it worked, from the start to the end."""
    spent_s: dict[str, float]
    """What the loop did or waited for, after the first evaluation → seconds, all iterations together. What went on
    meanwhile isn't in it."""

    @property
    def iteration_s(self) -> float:
        """Seconds from one iteration's end to the next one's, on average."""
        return (self.ends_s[-1] - self.began_s) / len(self.ends_s)


def simulate(work: Work, setup: Setup, seed: int = 0) -> Simulated:
    """A whole run.

    Raises:
        UserError: it would never end.
    """
    import simpy  # late: reading a cluster's file needs none of it

    return _Run(simpy.Environment(), work, setup, seed).simulated()


@dataclass
class _Marks:
    """When an iteration's sampling began, when the policy was there, when it was over."""

    began: float = 0.0
    loaded: float = 0.0
    end: float = 0.0


class _Role(NamedTuple):
    """A role's slots as they are simulated."""

    station: Station
    real_slots: int

    def seconds(self, seconds: Any, weight: float) -> Any:
        """Of one event that stands for `weight` items: the slots together work them off at the real speed."""
        return seconds * weight * self.station.slots / self.real_slots


class _Run:
    def __init__(self, env: simpy.Environment, work: Work, setup: Setup, seed: int):
        import simpy

        self.env, self.work, self.setup, self.rates, self._seed = env, work, setup, setup.rates, seed
        events = work.iterations * (work.prompts * work.answers + work.scores + work.ballots)
        least = min(work.prompts, _LEAST_PROMPTS)
        self.prompts = max(least, min(work.prompts, round(work.prompts * EVENTS / max(events, 1))))
        self.weight = work.prompts / self.prompts
        """Prompts that one stands for."""
        roles, rates = setup.cluster, setup.rates
        at_once = rates.judge.at_once or work.judges_at_once or 1
        answers = max(work.prompts * work.answers, work.held_out)
        self.sampler = self._role(self._decoded(answers), roles.sampler.replicas, rates.sampler.failures, 1)
        self.judge = self._role(at_once, roles.judge.replicas, rates.judge.failures, 2, work.judges_at_once)
        self.log = Station(env, 1, [Outages(None, self._random(3))])
        self._learner = self._outages(rates.learner.failures, roles.learner.processes, 4)
        self._learned_s = 0.0
        self._overlap = setup.overlap(work)
        self._turn = simpy.Resource(env)
        """With sampler and judge, for one iteration or evaluation at a time."""
        self._holds = 0
        """Updates behind the policy that the samplers hold."""
        self._judged = [env.event() for _ in range(work.iterations)]
        self._taken = [env.event() for _ in range(work.iterations)]
        """The loop goes on with an iteration that is judged: later ones may begin."""
        self._ended = [env.event() for _ in range(work.iterations)]
        self._sampled = [_Marks() for _ in range(work.iterations)]
        self.began_s, self.ends_s = 0.0, list[float]()
        self._spent_s = dict.fromkeys(STAGES, 0.0)

    def simulated(self) -> Simulated:
        slot = self.rates.sampler.tokens_per_s / self._decoded(self.work.prompts * self.work.answers)
        longest = min(self._tokens.mean, self.work.max_tokens) / slot
        self._check_done_ever("sampler", "an answer", longest, "a replica", "fewer failures, or faster samplers")
        seconds = self.rates.judge.latency_s.mean
        self._check_done_ever("judge", "a ballot", seconds, "a replica", "fewer failures, or faster judges")
        self.env.run(self.env.process(self._main()))
        end, judge = self.env.now, self.judge.station
        use = {
            "sampler": self.sampler.station.busy_s / (self.sampler.station.slots * end),
            "judge": judge.busy_s / (judge.slots * end),
            "learner": self._learned_s / end,
            "loop": self.log.busy_s / end,
        }
        if self.work.requests_per_minute:
            use[PACE] = judge.paused_s / end
        return Simulated(self.began_s, self.ends_s, use, dict(self._spent_s))

    # ---- the order of things, as in the loop

    def _main(self) -> Process:
        yield from self._evaluate(0)
        self.began_s = self.env.now
        for k in range(self.work.iterations):
            self.env.process(self._sample_and_judge(k))
        for k in range(self.work.iterations):
            yield from self._wait(k)
            yield from self._timed("loop", self._pause(self.rates.loop.iteration_s))
            yield from self._timed("update", self._update())
            if any(self.work.anchors[k : k + 1]):
                yield from self._timed("judging", self._ask(self._random(5, k), self.work.anchors[k]))
            if k + 1 in self.work.evaluated:
                yield from self._timed("evaluation", self._evaluate(k + 1))
            self._ended[k].succeed()
            self.ends_s.append(self.env.now)

    def _wait(self, k: int) -> Process:
        """Until an iteration is judged; what for, by how far it was meanwhile."""
        since = self.env.now
        yield self._judged[k]
        self._taken[k].succeed()
        marks = self._sampled[k]
        judging = self.env.now - max(since, marks.end)
        weights = max(0.0, marks.loaded - max(since, marks.began))
        self._spent_s["judging"] += judging
        self._spent_s["weights"] += weights
        self._spent_s["sampling"] += self.env.now - since - judging - weights

    def _timed(self, stage: str, process: Process) -> Process:
        since = self.env.now
        yield from process
        self._spent_s[stage] += self.env.now - since

    def _pause(self, seconds: float) -> Process:
        yield self.env.timeout(seconds)

    def _sample_and_judge(self, k: int) -> Process:
        import simpy

        staleness = self._overlap.staleness
        if k:
            yield self._taken[max(0, k - staleness)] if staleness else self._ended[k - 1]
        batches = [1] * self.prompts if self._overlap.stream else [self.prompts]
        sampled, marks = simpy.Store(self.env), self._sampled[k]
        left = iter(self._answers(self._random(6, k), self.prompts * self.work.answers, self.weight))
        with self._turn.request() as turn:
            yield turn
            marks.began = self.env.now
            yield from self._load(max(0, k - staleness))
            marks.loaded = self.env.now
            judged = self.env.process(self._judge(k, batches, sampled))
            all_sampled = self.env.event()
            groups = Countdown(len(batches), all_sampled.succeed)
            for n, prompts in enumerate(batches):

                def hand_on(n: int = n) -> None:
                    sampled.put(n)
                    groups()

                done = Countdown(prompts * self.work.answers, hand_on)
                for _ in range(prompts * self.work.answers):
                    self._work(self.sampler, next(left), done, self.weight)
            yield all_sampled
            marks.end = self.env.now
            yield judged
        self._judged[k].succeed()

    def _judge(self, k: int, batches: list[int], sampled: simpy.Store) -> Process:
        """Batches of prompts as they come, each scored before it is asked about."""
        work, random = self.work, self._random(7, k)
        scores = self._shares(work.scores / self.weight, batches)
        ballots = self._shares(work.ballots * self.rates.answers.asked / self.weight, batches)
        score_s = self._latencies(random, self.rates.judge.score_s or self.rates.judge.latency_s, sum(scores))
        ballot_s = self._latencies(random, self.rates.judge.latency_s, sum(ballots))
        started = False
        all_judged = self.env.event()
        done = Countdown(len(batches), all_judged.succeed)
        for _ in batches:
            n = yield sampled.get()
            if not started:
                yield self.env.timeout(self.rates.judge.start_s)
                started = True
            asked = [next(ballot_s) for _ in range(ballots[n])]

            def ask(asked: list[float] = asked) -> None:
                answered = Countdown(len(asked), done)
                for seconds in asked:
                    self._work(self.judge, seconds, answered, self.weight)

            scored = Countdown(scores[n], ask)
            for _ in range(scores[n]):
                self._work(self.judge, next(score_s), scored, self.weight)
        yield all_judged

    def _update(self) -> Process:
        rates, answers = self.rates.learner, self.rates.answers
        pair_tokens = 2 * (self._tokens.mean + answers.prompt_tokens)
        tokens = self.work.pairs * answers.kept * self.work.epochs * pair_tokens
        seconds = tokens / (rates.tokens_per_s * self.setup.cluster.learner.processes) + rates.commit_s
        n = self.setup.cluster.learner.processes
        step = "smaller updates, or fewer processes"
        self._check_done_ever("learner", "an update", seconds, f"one of {n} processes", step, n)
        while True:  # a process that dies takes the update with it: it starts again from what was committed
            fails, back = min(outages.after(self.env.now) for outages in self._learner)
            if self.env.now + seconds <= fails:
                break
            yield self.env.timeout(back - self.env.now)
        yield self.env.timeout(seconds)
        self._learned_s += seconds

    def _check_done_ever(self, role: str, what: str, seconds: float, who: str, step: str, together: int = 1) -> None:
        """Whether something that takes so long is done before whoever does it fails, `together` of them at once."""
        failures: Failures | None = getattr(self.rates, role).failures
        if failures and seconds * together > _HOPELESS * 3600 * failures.hours_between:
            raise UserError(
                f"rates.{role}.failures: {what} takes {seconds / 3600:.2g} h, and {who} fails every "
                f"{failures.hours_between / together:.2g} h, so it is hardly ever done; {step}"
            )

    def _evaluate(self, updates: int) -> Process:
        random, real = self._random(8, updates), self.work.held_out
        n = max(min(real, _LEAST_PROMPTS), round(real / self.weight))
        weight = real / max(n, 1)
        with self._turn.request() as turn:
            yield turn
            yield from self._load(updates)
            all_sampled = self.env.event()
            done = Countdown(n, all_sampled.succeed)
            for seconds in self._answers(random, n, weight):
                self._work(self.sampler, seconds, done, weight)
            yield all_sampled
        yield self.env.timeout(self.rates.loop.held_out_s * real)
        if updates and self.work.held_out_ballots:
            yield from self._ask(random, self.work.held_out_ballots * self.rates.answers.asked)

    def _ask(self, random: np.random.Generator, ballots: float) -> Process:
        """Ballots that the loop waits for."""
        with self._turn.request() as turn:
            yield turn
            yield self.env.timeout(self.rates.judge.start_s)
            n = max(1, round(ballots / self.weight))
            answered = self.env.event()
            done = Countdown(n, answered.succeed)
            for seconds in self._latencies(random, self.rates.judge.latency_s, n, ballots / n):
                self._work(self.judge, seconds, done, ballots / n)
            yield answered

    def _load(self, updates: int) -> Process:
        """The policy after so many updates, into every sampler that lacks it."""
        if self._holds == updates:
            return
        weights, replicas = self.rates.weights, self.setup.cluster.sampler.replicas
        yield self.env.timeout(weights.seconds * math.ceil(replicas / (weights.at_once or replicas)))
        self._holds = updates

    # ---- what takes time

    def _work(self, role: _Role, seconds: float, then: Callable[[], None], weight: float) -> None:
        """An item and its row in the log. A request isn't over before the loop has read its reply: until then nothing
        else is sent in its place."""
        row_s, ballot_s = weight * self.rates.loop.row_s, weight * self.rates.loop.ballot_s
        logged = (lambda: self.log.submit(row_s, then)) if row_s else then
        if role is self.sampler:
            role.station.submit(seconds, logged)
            return
        limit = self.work.requests_per_minute
        pause_s = 60 * weight / limit if limit else 0.0
        role.station.submit(seconds, logged, pause_s, lambda over: self.log.submit(ballot_s, over))

    def _answers(self, random: np.random.Generator, n: int, weight: float) -> list[float]:
        """Seconds that answers take to be decoded."""
        slot = self.rates.sampler.tokens_per_s / self._decoded(n * weight)
        tokens = np.minimum(self._tokens.draw(random, n), self.work.max_tokens)
        seconds: list[float] = self.sampler.seconds(tokens / slot, weight).tolist()
        return seconds

    def _decoded(self, answers: float) -> int:
        """Of so many, those that a sampler has under way at once. Where they are more than it can have, in rounds of
        one size: it isn't slower for a last one that is half empty, since others are under way meanwhile."""
        rates, mine = self.rates.sampler, math.ceil(answers / self.setup.cluster.sampler.replicas)
        if rates.at_most is None or not mine:
            return rates.at_once
        return max(rates.at_once, math.ceil(mine / math.ceil(mine / rates.at_most)))

    def _latencies(self, random: np.random.Generator, of: Spread, n: int, weight: float | None = None) -> Any:
        return iter(self.judge.seconds(of.draw(random, n), weight or self.weight).tolist())

    @property
    def _tokens(self) -> Spread:
        return self.rates.answers.tokens or Spread(median=_TOKENS_SHARE * self.work.max_tokens)

    def _shares(self, total: float, batches: list[int]) -> list[int]:
        """A total in whole numbers, by how many prompts a batch has."""
        edges = np.round(np.cumsum([0, *batches]) * total / sum(batches)).astype(int)
        shares: list[int] = np.diff(edges).tolist()
        return shares

    def _role(
        self, at_once: int, replicas: int, failures: Failures | None, number: int, at_most: int | None = None
    ) -> _Role:
        real = min(at_once * replicas, at_most or at_once * replicas)
        slots = max(min(real, _LEAST_SLOTS), round(real / self.weight))
        return _Role(Station(self.env, slots, self._outages(failures, min(replicas, slots), number)), real)

    def _outages(self, failures: Failures | None, replicas: int, number: int) -> list[Outages]:
        return [Outages(failures, self._random(number, replica)) for replica in range(replicas)]

    def _random(self, *what: int) -> np.random.Generator:
        return np.random.default_rng([self._seed, *what])
