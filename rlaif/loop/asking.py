"""What a judge is asked about an iteration's pairs, and in which pieces."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeVar

from rlaif.constitutions.templates import Template
from rlaif.errors import RlaifError
from rlaif.judging.ballots import Role
from rlaif.judging.candidates import Candidate
from rlaif.judging.kinds import kind_of
from rlaif.loop.pairing import pairs_of_a_prompt
from rlaif.loop.running import Iteration, Running, candidates
from rlaif.records import Ballot, Completion, Pair, Prompt, Vote
from rlaif.rundir.votes import VotesByPair
from rlaif.workers.worker import Piece, Worker

P = TypeVar("P", Completion, Pair)

ANY_PAIR = Pair(id="any", prompt_id="any", first="first", second="second", method="check")
_PAIRS_AT_ONCE = 64


def pieces(run: Running, it: Iteration) -> list[Sequence[str]]:
    """The iteration's prompts, in the plan's order, as many at a time as the judge is asked about in one call; all of
    an evaluation's."""
    ids = list(dict.fromkeys(it.plan.prompt_ids if it.role == "decide" else it.prompts))
    tokens = pairs_of_a_prompt(run.job) * run.job.sampling.max_tokens
    at_once = it.role == "decide" and kind_of(run.job.judge).prompts_at_once(tokens)
    size = at_once or max(len(ids), 1)
    return [ids[n : n + size] for n in range(0, len(ids), size)]


def in_pieces(run: Running, it: Iteration, rows: Iterable[P]) -> list[list[P]]:
    """Completions or pairs, by piece; each piece in their order."""
    ids = pieces(run, it)
    at = {i: n for n, piece in enumerate(ids) for i in piece}
    out: list[list[P]] = [[] for _ in ids]
    for row in rows:
        out[at[row.prompt_id]].append(row)
    return out


class Asking:
    """What an iteration's judge is asked, and how. Ballots are made when they are wanted: there may be millions."""

    def __init__(self, run: Running, it: Iteration):
        self._run, self._it = run, it
        self.kind = kind_of(run.job.judge)
        self.journal = it.dir.path / "votes.asked"
        # Held-out pairs count by their verdict, kept or not, so every vote on them counts.
        self.early_stop = self.kind.early_stop and it.role == "decide"
        self._templates = templates_for(run, it, it.role)
        prompts = [it.prompts[i] for i in it.plan.prompt_ids] if it.role == "decide" else []
        self.how: dict[str, Any] = {
            "constitution": it.constitution,
            **self.kind.cast_with(self._templates, self.journal, prompts),
        }
        """Arguments of `cast` that are the same for all of its calls."""
        any_pair = {b.question: b for b in self.ballots([ANY_PAIR])}
        # The same for all pairs, but that a voice which selected one has no word on it.
        self._ranks = {question: n for n, question in enumerate(any_pair)}
        self._voices = [b.voice for b in any_pair.values()]

    def ballots(self, pairs: Sequence[Pair]) -> list[Ballot]:
        """What it is asked about pairs, pair by pair."""
        run, it = self._run, self._it
        return self.kind.ballots(pairs, it.constitution, it.role, run.job.seed, run.judge_name, self._templates)

    def by_pair(self, pairs: Sequence[Pair]) -> Iterator[tuple[Pair, list[Ballot]]]:
        """The same, some pairs at a time, each with its ballots."""
        for n in range(0, len(pairs), _PAIRS_AT_ONCE):
            some = pairs[n : n + _PAIRS_AT_ONCE]
            of_pair: dict[str, list[Ballot]] = {p.id: [] for p in some}
            for ballot in self.ballots(some):
                of_pair[ballot.pair_id].append(ballot)
            yield from ((p, of_pair[p.id]) for p in some)

    def count(self, pairs: Iterable[Pair]) -> int:
        """How many ballots that are, without making them."""
        return sum(sum(voice not in p.selected_by for voice in self._voices) for p in pairs)

    def rank(self, vote: Vote) -> int | None:
        """Where the ballot that a vote answers stands among those on its pair: sums of the same votes in another order
        differ in the last bit. None where it is none of them, since the judge was another before a restart."""
        return self._ranks.get(vote.ballot.question)

    def owed(self, pairs: Sequence[Pair], votes: VotesByPair) -> list[Ballot]:
        """Those about pairs that no vote answers."""
        open_pairs = [p for p in pairs if self.left(p, votes)]
        return [b for p, mine in self.by_pair(open_pairs) for b in self.unanswered(mine, votes.ranks(p.id))]

    def left(self, pair: Pair, votes: VotesByPair) -> int:
        """How many of those about a pair no vote answers."""
        return self.count([pair]) - len(votes.ranks(pair.id))

    def unanswered(self, ballots: Iterable[Ballot], ranks: set[int]) -> list[Ballot]:
        """Ballots about one pair but those with these ranks."""
        return [b for b in ballots if self._ranks[b.question] not in ranks]

    def piece(self, owed: Sequence[Ballot], pairs: Sequence[Pair], completions: Iterable[Completion]) -> Piece:
        """The ballots that are owed about the pairs of one piece; `completions` are at least the sides."""
        sides = sides_of(pairs, completions, self._it.prompts)
        return to_cast(owed, pairs=pairs, candidates=sides, **self.how)


def to_cast(owed: Sequence[Ballot], **how: Any) -> Piece:
    """What a judge is asked for votes on some ballots. `how` is the same however many of them are there: what a judge
    computes may depend on the other pairs of the call."""

    def asked(votes: Sequence[Vote]) -> dict[str, Any] | None:
        have = {v.ballot.id for v in votes}
        left = [b for b in owed if b.id not in have]
        return {"ballots": left, **how} if left else None

    return asked


def cast_owed(
    run: Running,
    it: Iteration,
    worker: Worker,
    stage: str,
    ballots: Iterable[Ballot],
    done: Iterable[Vote],
    sides: Sequence[Candidate],
    **how: Any,
) -> Iterator[list[Vote]]:
    """Votes on the ballots that no vote answers which is `done`, as they come; without a word where all are answered.
    `how` are the arguments of `cast` but ballots and candidates; `stage` is what progress calls it."""
    have = {v.ballot.id for v in done}
    if owed := [b for b in ballots if b.id not in have]:
        run.progress.stage(it.k, stage, len(owed), "votes", str(how["constitution"].ref))
        yield from run.advancing(worker.spread("cast", [to_cast(owed, candidates=sides, **how)]))


def all_answered(ballots: Sequence[Ballot], votes: Iterable[Vote], whose: str = "the judge") -> list[Vote]:
    """The votes on the ballots, in their order.

    Raises:
        RlaifError: one has none.
    """
    found = {v.ballot.id: v for v in votes}
    if missing := [b.id for b in ballots if b.id not in found]:
        raise RlaifError(f"{whose} left {len(missing)} of {len(ballots)} ballots unanswered, first {missing[0]}")
    return [found[b.id] for b in ballots]


def sides_of(pairs: Iterable[Pair], completions: Iterable[Completion], prompts: dict[str, Prompt]) -> list[Candidate]:
    """Of these completions, those that are compared in a pair, as a judge needs them."""
    wanted = {c for p in pairs for c in (p.first, p.second)}
    return candidates((c for c in completions if c.id in wanted), prompts)


def templates_for(run: Running, it: Iteration, role: Role) -> list[Template]:
    """The run's copies of the templates that a role is asked with."""
    names = kind_of(run.job.judge).template_names(it.constitution, role, it.plan.templates)
    return [run.in_force.load_template(name, it.plan.templates[name]) for name in names]


def ballots_for(run: Running, it: Iteration, role: Role, pairs: list[Pair]) -> list[Ballot]:
    """What a judge is asked about pairs under the iteration's text."""
    templates = templates_for(run, it, role)
    return kind_of(run.job.judge).ballots(pairs, it.constitution, role, run.job.seed, run.judge_name, templates)
