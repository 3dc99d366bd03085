"""The stages that hold old pairs against a new text: what is judged again, and what becomes of each.

They are there in an iteration where pairs may be replayed that were judged under another text than the one in force
and that it has made nothing of yet: at a change of text, and after it while pairs wait for `replay.rejudge`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from rlaif.judging.carried import Carried
from rlaif.judging.kinds import kind_of
from rlaif.judging.verdicts import JurorFit, aggregate, by_pair
from rlaif.learning.old_pairs import PairLog, held_against, shows_of, standing_by
from rlaif.learning.replay_set import UNDER_IT, UNKNOWN, Member, members
from rlaif.loop.asking import ballots_for, cast_owed, templates_for
from rlaif.loop.judging import Deciding, tell_interrupted
from rlaif.loop.running import Interrupted, Iteration, Running, candidates
from rlaif.records import Ballot, OldPair, OnChange, Pair, Preference, Side, Standing, Vote
from rlaif.rundir.store import read_record


class _Case(NamedTuple):
    """An old pair that a judge decided, and what its votes still say."""

    row: Preference
    """As it trained, or could have."""
    pair: Pair
    ballots: Sequence[Ballot]
    """What it is asked today."""
    carried: Carried
    asked: int = 0
    """Ballots that were cast for it now."""


def judge_old_pairs(run: Running, it: Iteration) -> list[OldPair]:
    """What the text in force makes of pairs that were judged under others; no rows where none is owed that."""
    if not it.dir.is_complete("old_pairs"):
        mixed = it.dir.is_complete("preferences")  # before a kill, by other settings: nothing here would train now
        owed = {} if mixed else _owed(run, it)
        if not owed:
            return []
        _judge(run, it, owed)
    rows = it.dir.read("old_pairs", OldPair)
    _tell(run, it, rows)
    return rows


def _owed(run: Running, it: Iteration) -> dict[str, Member]:
    """Pairs that could be replayed, and of which nobody knows yet what the text in force makes of them, or not by the
    job's `replay.on_change`."""
    if not run.job.replay.share or it.labels_as_stored:  # labels as stored: their judge isn't this job's
        return {}
    old = members(run.dir, it.k, it.constitution.hash, run.job.replay.max_age)
    return {i: m for i, m in old.items() if _is_open(m, run.job.replay.on_change)}


def _is_open(member: Member, on_change: OnChange) -> bool:
    if member.standing in (UNKNOWN, "waiting"):
        return True
    if member.standing == UNDER_IT or member.about is None:
        return False
    # The run goes on with another setting. What was judged again has all its answers, whatever the setting.
    answered = member.about.on_change == "rejudge" and member.about.decision is not None
    return member.about.on_change not in (None, on_change) and not answered


def _is_news(row: OldPair, owed: Member) -> bool:
    """A pair that waited before and waits still is none."""
    return row.standing != owed.standing or owed.about is None or row.on_change != owed.about.on_change


def _judge(run: Running, it: Iteration, owed: Mapping[str, Member]) -> None:
    rows = [m.row for m in owed.values() if m.row.source == "judge"]
    log = PairLog(run.dir, it.k, rows)
    jurors_file = it.dir.path / "jurors.json"
    jurors = read_record(jurors_file, JurorFit) if jurors_file.exists() else None
    cases = _cases(run, it, rows, log)
    if run.job.replay.on_change == "rejudge":
        cases = _Rejudging(run, it, log, jurors).answered(cases)

    def produce(_: list[OldPair]) -> Iterator[list[OldPair]]:
        deciding = Deciding(run, it, log.completions.values(), jurors)
        made = [_by_a_person(run, it, m.row) for m in owed.values() if m.row.source == "human"]
        made += [_by_the_judge(run, it, case, deciding) for case in cases]
        yield [row for row in made if _is_news(row, owed[row.pair_id])]

    it.rows("old_pairs", produce)


def _cases(run: Running, it: Iteration, rows: Sequence[Preference], log: PairLog) -> list[_Case]:
    pairs = [log.pairs[row.pair_id] for row in rows]
    shows = shows_of(run.dir, kind_of(run.job.judge), it.constitution, templates_for(run, it, "decide"))
    held = held_against(pairs, ballots_for(run, it, "decide", pairs), log.votes, shows)
    return [_Case(row, pair, *found) for row, pair, found in zip(rows, pairs, held, strict=True)]


class _Rejudging:
    """Casts what nobody has answered yet about old pairs, as far as `replay.rejudge` goes."""

    def __init__(self, run: Running, it: Iteration, log: PairLog, jurors: JurorFit | None):
        self._run, self._it, self._log = run, it, log
        self._kind = kind_of(run.job.judge)
        self._limits = run.job.replay.rejudge
        self._jurors = jurors.weights if jurors else None

    def answered(self, cases: Sequence[_Case]) -> list[_Case]:
        """The cases with the votes that were cast now. What a limit leaves is owed still."""
        owed = sorted((case for case in cases if case.carried.owed), key=self._margin)
        if not owed:
            return list(cases)
        votes = by_pair(self._cast(owed))
        return [_with(case, votes[case.pair.id]) if case.pair.id in votes else case for case in cases]

    def _margin(self, case: _Case) -> tuple[float, int, str]:
        """A sort key: first the pair that the new answers turn most easily, among equals the newest."""
        weights, method = self._it.constitution.weights, self._run.job.filters.aggregate
        votes = case.carried.votes
        p_first = aggregate(votes, weights, method, self._jurors).p_first if votes else None
        margin = 0.0 if p_first is None else abs(p_first - 0.5)
        return round(margin, 9), -case.row.iteration, case.pair.id

    def _cast(self, owed: Sequence[_Case]) -> list[Vote]:
        run, it = self._run, self._it
        journal = it.dir.path / "rejudged_votes.asked"
        with_what: dict[str, Any] = {
            "constitution": it.constitution,
            **self._kind.cast_with(templates_for(run, it, "decide"), journal),
        }

        def produce(done: list[Vote]) -> Iterator[list[Vote]]:
            ballots = [b for case in owed for b in case.carried.owed]
            tell_interrupted(run, it.k, Interrupted.found(done, journal), ballots, journal)
            # Of all pairs, asked about or not: a likelihood judge takes other prompts from them.
            sides = candidates(self._log.completions.values(), it.prompts)
            votes = list(done)
            for part in self._parts(owed, votes):
                ballots = [b for case in part for b in case.carried.owed]
                with_what["pairs"] = [case.pair for case in part]
                for chunk in cast_owed(run, it, run.judge, "rejudge", ballots, list(votes), sides, **with_what):
                    votes += chunk
                    yield chunk

        votes: list[Vote] = it.rows("rejudged_votes", produce)
        journal.unlink(missing_ok=True)
        return votes

    def _parts(self, owed: Sequence[_Case], votes: Sequence[Vote]) -> Iterator[Sequence[_Case]]:
        """The pairs that the limits allow, some at a time; `votes` grows by theirs meanwhile."""
        left = list(owed)
        if self._limits.calls is not None:
            left = _first(left, self._limits.calls)
        spends: list[tuple[float, Callable[[Sequence[Vote]], float]]] = []
        if self._limits.tokens is not None:
            spends.append((self._limits.tokens, _tokens))
        if self._limits.money is not None:
            spends.append((self._limits.money, self._kind.money))
        while left:
            part = left
            for limit, spent in spends:
                if spent(votes) >= limit:
                    return
                # The first one in any case: a guess must not keep all of them waiting for ever.
                least = [] if votes else part[:1]
                each = self._each(votes, left, spent)
                part = part[:1] if each is None else _first(part, (limit - spent(votes)) / each) or least
            if not part:
                return
            left = left[len(part) :]
            yield part

    def _each(
        self, votes: Sequence[Vote], left: Sequence[_Case], spent: Callable[[Sequence[Vote]], float]
    ) -> float | None:
        """What a ballot costs, by the votes that were cast now or, before there are any, by the pairs' old ones; those
        from the cache say nothing. None where nobody knows."""
        old = [v for case in left for v in self._log.votes.get(case.pair.id, [])]
        for known in (votes, old):
            if paid := [v for v in known if not v.cached]:
                return spent(paid) / len(paid) or None
        return None


def _first(cases: list[_Case], ballots: float) -> list[_Case]:
    """As many of them, from the first on, as are owed no more than so many ballots together."""
    together = 0
    for n, case in enumerate(cases):
        together += len(case.carried.owed)
        if together > ballots:
            return cases[:n]
    return cases


def _tokens(votes: Sequence[Vote]) -> float:
    return sum(v.usage.prompt_tokens + v.usage.completion_tokens for v in votes if not v.cached)


def _with(case: _Case, new: Sequence[Vote]) -> _Case:
    """A case with votes that were cast now."""
    answers = {v.ballot.id: v for v in (*case.carried.votes, *new)}
    carried = case.carried._replace(
        votes=tuple(answers[b.id] for b in case.ballots if b.id in answers),
        owed=tuple(b for b in case.ballots if b.id not in answers),
    )
    return case._replace(carried=carried, asked=len(new))


def _by_a_person(run: Running, it: Iteration, row: Preference) -> OldPair:
    """A person's word is about the whole text that they had before them."""
    return OldPair(
        pair_id=row.pair_id,
        iteration=row.iteration,
        source="human",
        before=row.constitution,
        constitution=it.constitution.hash,
        standing="stale" if run.job.replay.on_change == "keep" else "expired",
        on_change=run.job.replay.on_change,
    )


def _by_the_judge(run: Running, it: Iteration, case: _Case, deciding: Deciding) -> OldPair:
    carried = case.carried
    standing: Standing | None = None
    if run.job.replay.on_change == "rejudge":
        standing = "waiting" if carried.owed else None
    elif carried.lost:
        standing = "stale" if run.job.replay.on_change == "keep" else "expired"
    if standing is None and not carried.votes:  # the new text asks nothing about it
        standing = "expired"
    decision = None
    if standing is None:
        decision = deciding.decision(case.pair, carried.votes)
        was: Side = "first" if case.row.chosen_id == case.pair.first else "second"
        standing = standing_by(decision, was)
    return OldPair(
        pair_id=case.pair.id,
        iteration=case.row.iteration,
        source="judge",
        before=case.row.constitution,
        constitution=it.constitution.hash,
        standing=standing,
        on_change=run.job.replay.on_change,
        carried=len(carried.votes) - case.asked,
        lost=len(carried.lost),
        asked=case.asked,
        decision=decision,
    )


def _tell(run: Running, it: Iteration, rows: Sequence[OldPair]) -> None:
    """Notes what became of old pairs."""
    found = Counter[str](row.standing for row in rows)
    asked = sum(row.asked for row in rows)
    said = ", ".join(f"{n} {standing}" for standing, n in found.items()) or "none"
    message = f"old pairs under {it.constitution.ref}: {said}" + (f"; {asked} ballots were cast anew" if asked else "")
    run.tell_once("old_pairs", message, it.k, on_change=run.job.replay.on_change, asked=asked, **found)
