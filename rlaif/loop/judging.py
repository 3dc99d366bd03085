"""The stages that judge: scores of single completions, pairs of them, votes on pairs, decisions."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from rlaif.constitutions.templates import Template
from rlaif.errors import RlaifError
from rlaif.judging.ballots import Role, rounds, settled
from rlaif.judging.calibration import EVERYTHING, Asked, ends_of
from rlaif.judging.filters import check_calibrated, decide_label, decide_votes, to_review
from rlaif.judging.kinds import kind_of
from rlaif.judging.verdicts import JurorFit, by_pair, jurors_for
from rlaif.loop.pairing import make_pairs, pairs_of_a_prompt
from rlaif.loop.running import Interrupted, Iteration, Running, candidates
from rlaif.records import Ballot, BaseLogprob, Completion, Decision, Pair, Score, TokenSequence, Vote
from rlaif.rundir.store import write_json
from rlaif.workers.worker import Piece

P = TypeVar("P", Completion, Pair)


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


def score(run: Running, it: Iteration) -> list[Score]:
    """Every completion by every selecting voice, where pairs are chosen by scores."""

    def produce(done: list[Score]) -> Iterator[list[Score]]:
        scoring = Scoring(run, it, done)
        owed = scoring.owed(it.completions)
        if not owed:
            return
        run.progress.stage(it.k, "score", len(owed), "scores", str(it.constitution.ref))
        yield from run.advancing(scoring.scores(in_pieces(run, it, it.completions)))

    return it.rows("scores", produce)


class Scoring:
    """Scores of an iteration's completions, by the selecting voices; none where pairs aren't chosen by scores."""

    def __init__(self, run: Running, it: Iteration, done: Iterable[Score]):
        self._run, self._it = run, it
        select = run.job.pairing.method == "best_worst"
        self._voices = kind_of(run.job.judge).selecting(it.constitution) if select else []
        self._done: dict[str, dict[str, Score]] = {}
        self._keep(done)

    def of(self, completions: Iterable[Completion]) -> list[Score]:
        """What some completions have."""
        return [score for c in completions for score in self._done.get(c.id, {}).values()]

    def owed(self, completions: Iterable[Completion]) -> set[tuple[str, str]]:
        """Completion and voice of the scores that aren't there."""
        return {(c.id, v) for c in completions for v in self._voices if v not in self._done.get(c.id, ())}

    def scores(self, pieces: Iterable[Sequence[Completion]]) -> Iterator[list[Score]]:
        """Those of some pieces that aren't there."""
        for chunk in self._run.judge.spread("score", map(self._piece, pieces)):
            new = [s for s in chunk if s.voice not in self._done.get(s.completion_id, ())]
            yield new
            self._keep(new)

    def _piece(self, completions: Sequence[Completion]) -> Piece:
        def asked(done: Sequence[Score]) -> dict[str, Any] | None:
            """All of a piece or nothing: a part would be batched otherwise."""
            if self.owed(completions) <= {(s.completion_id, s.voice) for s in done}:
                return None
            sides = candidates(completions, self._it.prompts)
            return {"candidates": sides, "constitution": self._it.constitution, "voices": self._voices}

        return asked

    def _keep(self, scores: Iterable[Score]) -> None:
        for score in scores:
            self._done.setdefault(score.completion_id, {})[score.voice] = score


def pair(run: Running, it: Iteration) -> list[Pair]:
    """Which completions are compared."""
    return it.rows("pairs", lambda _: [paired(run, it, it.completions, it.scores)])


def paired(run: Running, it: Iteration, completions: Sequence[Completion], scores: Iterable[Score]) -> list[Pair]:
    """The pairs of some prompts, of which all completions and scores are there. They follow from these alone."""
    pairing, seed = run.job.pairing, run.job.seed * 1_000_003 + it.k
    return make_pairs(completions, pairing.method, pairing.max_pairs_per_prompt, seed, scores)


def judge(run: Running, it: Iteration) -> list[Vote]:
    """Every ballot's vote, in the order of the ballots."""
    asking = Asking(run, it)
    ballots = asking.ballots(it.pairs)
    in_rounds = rounds(ballots) if asking.early_stop else [ballots]

    def produce(done: list[Vote]) -> Iterator[list[Vote]]:
        tell_interrupted(run, it.k, it.interrupted or Interrupted.found(done, asking.journal), ballots, asking.journal)
        votes = list(done)
        parts = list(zip(in_pieces(run, it, it.pairs), in_pieces(run, it, it.completions), strict=True))
        for number, this_round in enumerate(in_rounds):
            have = {v.ballot.id for v in votes}
            decided = _settled(run, it, votes, in_rounds, number) if number else set()
            owed = [b for b in this_round if b.id not in have and b.pair_id not in decided]
            if not owed:
                continue
            name = "judge" if it.role == "decide" else "evaluate"
            run.progress.stage(it.k, name, len(owed), "votes", str(it.constitution.ref))
            of_pair: dict[str, list[Ballot]] = {}
            for ballot in owed:
                of_pair.setdefault(ballot.pair_id, []).append(ballot)
            owed_of = (
                asking.piece([b for p in pairs for b in of_pair.get(p.id, ())], pairs, completions)
                for pairs, completions in parts
            )
            for chunk in run.advancing(run.judge.spread("cast", owed_of)):
                votes += chunk
                yield chunk

    votes = it.rows("votes", produce, before_commit=lambda: {"ballots": len(ballots)})
    asking.journal.unlink(missing_ok=True)
    return as_cast(votes, ballots, complete=not asking.early_stop)


class Asking:
    """What an iteration's judge is asked, and how."""

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

    def ballots(self, pairs: Sequence[Pair]) -> list[Ballot]:
        """What it is asked about pairs, pair by pair."""
        run, it = self._run, self._it
        return self.kind.ballots(pairs, it.constitution, it.role, run.job.seed, run.judge_name, self._templates)

    def piece(self, owed: Sequence[Ballot], pairs: Sequence[Pair], completions: Iterable[Completion]) -> Piece:
        """The ballots that are owed about the pairs of one piece; `completions` are at least the sides."""
        wanted = {c for p in pairs for c in (p.first, p.second)}
        sides = candidates((c for c in completions if c.id in wanted), self._it.prompts)
        return to_cast(owed, pairs=pairs, candidates=sides, **self.how)


def to_cast(owed: Sequence[Ballot], **how: Any) -> Piece:
    """What a judge is asked for votes on some ballots. `how` is the same however many of them are there: what a judge
    computes may depend on the other pairs of the call."""

    def asked(votes: Sequence[Vote]) -> dict[str, Any] | None:
        have = {v.ballot.id for v in votes}
        left = [b for b in owed if b.id not in have]
        return {"ballots": left, **how} if left else None

    return asked


def base_logprobs(run: Running, it: Iteration) -> None:
    """Keeps how likely the judge found each completion of a pair, where its model is the untrained policy: a learner's
    reference computes just that, and a judge forgets with its process."""
    if run.measurer is not run.judge or it.dir.is_complete("base_logprobs"):
        return
    wanted = {i for p in it.pairs for i in (p.first, p.second)}
    sides = [c for c in it.completions if c.id in wanted]
    sequences = [TokenSequence(prompt_token_ids=c.prompt_token_ids, token_ids=c.token_ids) for c in sides]
    logprobs: list[float | None] = run.judge.call("known_logprobs", sequences=sequences)
    known = [
        BaseLogprob(completion_id=c.id, tokens=len(c.token_ids), logprob=logprob)
        for c, logprob in zip(sides, logprobs, strict=True)
        if logprob is not None
    ]
    if known:
        it.rows("base_logprobs", lambda _: [known])


def decide(run: Running, it: Iteration) -> list[Decision]:
    """The filters' word on every pair."""
    of_pair = by_pair(it.votes)

    def produce(_: list[Decision]) -> Iterator[list[Decision]]:
        deciding = Deciding(run, it, it.completions, _jurors(run, it))
        made = [deciding.decision(p, of_pair.get(p.id, ())) for p in it.pairs]
        # Held-out pairs are never labelled: they only measure.
        yield to_review(made, run.job.filters) if it.role == "decide" else made

    return it.rows("decisions", produce)


class Deciding:
    """Decides pairs under an iteration's text, by the job's filters."""

    def __init__(self, run: Running, it: Iteration, completions: Iterable[Completion], jurors: JurorFit | None):
        """`completions` are at least those of the pairs."""
        sides = list(completions)
        self._texts = {c.id: c.text for c in sides}
        self._cut = {c.id for c in sides if c.cut_off}
        self._filters, self._it, self._jurors = run.job.filters, it, jurors
        # A calibration is a promise about pairs that train; held-out pairs only measure.
        self._calibration = run.calibration if it.role == "decide" else None
        asked_by = run.source.asked_by if run.source and it.labels_as_stored else run.job
        self._how = Asked.by(asked_by) if self._calibration and asked_by else None

    def decision(self, pair: Pair, votes: Sequence[Vote]) -> Decision:
        """The filters' word on a pair, by the votes on it, or by the label that a data set has for it."""
        if (label := self._it.labels.get(pair.id)) is not None:
            return decide_label(pair, label, self._texts)
        return decide_votes(
            pair,
            votes,
            self._filters,
            self._texts,
            self._it.constitution.weights,
            self._jurors,
            self._calibration,
            self._it.prompts[pair.prompt_id].category or EVERYTHING,
            self._cut,
            self._how and self._how._replace(ends=ends_of(pair, self._cut)),
        )


def check_calibration(run: Running, it: Iteration) -> None:
    """Before anything is sampled: what any pair would be asked must be what was calibrated.

    Raises:
        UserError: it isn't, and `filters.uncalibrated` says stop.
    """
    if run.calibration and not it.labels_as_stored:
        any_pair = Pair(id="any", prompt_id="any", first="first", second="second", method="check")
        ballots, asked = ballots_for(run, it, "decide", [any_pair]), Asked.by(run.job)
        check_calibrated(ballots, run.calibration, run.job.filters, asked=asked)
        # Whether an answer is cut off is known once it is sampled; an hour later is too late to say so.
        dropped = run.calibration.cut_off_dropped(asked.cut_off_counts)
        if dropped and run.event_once("cut_off_uncalibrated", dropped, 0):
            run.progress.note(f"filters.calibration {run.job.filters.calibration}: {dropped}")


def templates_for(run: Running, it: Iteration, role: Role) -> list[Template]:
    """The run's copies of the templates that a role is asked with."""
    names = kind_of(run.job.judge).template_names(it.constitution, role, it.plan.templates)
    return [run.in_force.load_template(name, it.plan.templates[name]) for name in names]


def ballots_for(run: Running, it: Iteration, role: Role, pairs: list[Pair]) -> list[Ballot]:
    """What a judge is asked about pairs under the iteration's text."""
    templates = templates_for(run, it, role)
    return kind_of(run.job.judge).ballots(pairs, it.constitution, role, run.job.seed, run.judge_name, templates)


def _settled(run: Running, it: Iteration, votes: list[Vote], in_rounds: list[list[Ballot]], number: int) -> set[str]:
    """Pairs that round `number` can leave out, by the votes of the rounds before it."""
    earlier = {b.id for ballots in in_rounds[:number] for b in ballots}
    of_pair = by_pair([v for v in votes if v.ballot.id in earlier])
    left: dict[str, list[Ballot]] = {}
    for ballot in (b for ballots in in_rounds[number:] for b in ballots):
        left.setdefault(ballot.pair_id, []).append(ballot)
    filters, weights = run.job.filters, it.constitution.weights
    return {p for p, mine in of_pair.items() if settled(mine, left.get(p, []), filters, weights)}


def tell_interrupted(run: Running, k: int, found: Interrupted, ballots: list[Ballot], journal: Path) -> None:
    """Notes an earlier attempt at this judging, and which ballots it may have had asked for nothing."""
    again = [b.id for b in ballots if b.id in found.asked]
    if found.durable or again:
        kind = kind_of(run.job.judge)
        durable = f"judging was interrupted with {found.durable} of {len(ballots)} votes durable"
        data = {
            "durable": found.durable,
            "ballots": len(ballots),
            "in_flight_at_most": kind.under_way,
            "asked_again": again,
        }
        run.dir.event("judging_interrupted", f"{durable}; {kind.again(len(again))}", k, **data)
    journal.unlink(missing_ok=True)


def _jurors(run: Running, it: Iteration) -> JurorFit | None:
    """What each juror's votes weigh; written beside the decisions that follow from it."""
    calibrated = run.calibration.jurors if run.calibration else None
    fit = jurors_for(run.job.filters.aggregate, it.votes, calibrated)
    if fit is not None:
        write_json(it.dir.path / "jurors.json", fit.model_dump(mode="json"))
    return fit


def as_cast(votes: list[Vote], ballots: list[Ballot], complete: bool) -> list[Vote]:
    """Votes in the order of their ballots, whatever order they arrived in; `complete` when none may be left out."""
    by_ballot = {v.ballot.id: v for v in votes}
    if complete and (missing := [b for b in ballots if b.id not in by_ballot]):
        raise RlaifError(f"the judge left {len(missing)} of {len(ballots)} ballots unanswered, first {missing[0].id}")
    return [by_ballot[b.id] for b in ballots if b.id in by_ballot]
