"""The stages that judge: scores of single completions, pairs of them, votes on pairs, decisions."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rlaif.errors import RlaifError
from rlaif.judging.calibration import EVERYTHING, Asked, ends_of
from rlaif.judging.filters import check_calibrated, decide_label, decide_votes, to_review
from rlaif.judging.kinds import kind_of
from rlaif.judging.verdicts import JurorFit, jurors_for
from rlaif.loop.asking import ANY_PAIR, Asking, ballots_for, in_pieces
from rlaif.loop.feeding import Feeding
from rlaif.loop.pairing import make_pairs
from rlaif.loop.running import Interrupted, Iteration, Running, candidates
from rlaif.records import Ballot, BaseLogprob, Completion, Decision, Pair, Score, Vote
from rlaif.rundir.store import write_json
from rlaif.rundir.votes import Votes, VotesByPair
from rlaif.workers.worker import Piece


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


def judge(run: Running, it: Iteration) -> Votes:
    """Every ballot's vote, by pair, each pair's in the order of its ballots."""
    asking = Asking(run, it)

    def produce(cast: VotesByPair) -> Iterator[list[Vote]]:
        found = it.interrupted or Interrupted.found(it.dir.each("votes", Vote), asking.journal)
        tell_interrupted(run, it.k, found, (b for _, mine in asking.by_pair(it.pairs) for b in mine), asking.journal)
        if owed := sum(asking.left(p, cast) for p in it.pairs):
            name = "judge" if it.role == "decide" else "evaluate"
            run.progress.stage(it.k, name, owed, "votes", str(it.constitution.ref))
            yield from run.advancing((_fed if asking.kind.fed else _piece_by_piece)(run, it, asking, cast))

    votes = it.cast(asking.rank, produce, before_commit=lambda: {"ballots": asking.count(it.pairs)})
    asking.journal.unlink(missing_ok=True)
    left = asking.count(it.pairs) - len(votes)
    if left and not asking.early_stop:
        raise RlaifError(f"the judge left {left} of {asking.count(it.pairs)} ballots unanswered")
    return votes


def _piece_by_piece(run: Running, it: Iteration, asking: Asking, cast: VotesByPair) -> Iterator[list[Vote]]:
    parts = zip(in_pieces(run, it, it.pairs), in_pieces(run, it, it.completions), strict=True)
    owed_of = (asking.piece(asking.owed(pairs, cast), pairs, completions) for pairs, completions in parts)
    yield from run.judge.spread("cast", owed_of)


def _fed(run: Running, it: Iteration, asking: Asking, cast: VotesByPair) -> Iterator[list[Vote]]:
    feeding = Feeding(run, it, asking, cast)
    feeding.add(it.pairs, it.completions)
    feeding.end()
    yield from feeding.votes()


def base_logprobs(run: Running, it: Iteration) -> None:
    """Keeps how likely the guards found each completion of a pair, where the judge's model is the untrained policy: a
    learner's reference computes just that. It comes with their votes, so a kill while they are cast changes none of it.
    """
    if run.measurer is not run.judge or it.dir.is_complete("base_logprobs"):
        return
    found: dict[str, float] = {}
    for p, votes in zip(it.pairs, it.votes.of_each(p.id for p in it.pairs), strict=True):
        # A vote that was taken over may be another judge's.
        for logprobs in (v.logprobs for v in votes if v.logprobs and v.ballot.judge == run.judge_name):
            for side, logprob in zip((p.first, p.second), logprobs, strict=True):
                found.setdefault(side, logprob)
    known = [
        BaseLogprob(completion_id=c.id, tokens=len(c.token_ids), logprob=found[c.id])
        for c in it.completions
        if c.id in found
    ]
    if known:
        it.rows("base_logprobs", lambda _: [known])


def decide(run: Running, it: Iteration) -> list[Decision]:
    """The filters' word on every pair."""

    def produce(_: list[Decision]) -> Iterator[list[Decision]]:
        deciding = Deciding(run, it, it.completions, _jurors(run, it))
        votes = it.votes.of_each(p.id for p in it.pairs)
        made = [deciding.decision(p, mine) for p, mine in zip(it.pairs, votes, strict=True)]
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
        ballots, asked = ballots_for(run, it, "decide", [ANY_PAIR]), Asked.by(run.job)
        check_calibrated(ballots, run.calibration, run.job.filters, asked=asked)
        # Whether an answer is cut off is known once it is sampled; an hour later is too late to say so.
        dropped = run.calibration.cut_off_dropped(asked.cut_off_counts)
        if dropped and run.event_once("cut_off_uncalibrated", dropped, 0):
            run.progress.note(f"filters.calibration {run.job.filters.calibration}: {dropped}")


def tell_interrupted(run: Running, k: int, found: Interrupted, ballots: Iterable[Ballot], journal: Path) -> None:
    """Notes an earlier attempt at this judging, and which ballots it may have had asked for nothing. `ballots` are all
    that are to be answered; they are gone through only where there was one."""
    if found.durable or found.asked:
        total, again = 0, []
        for ballot in ballots:
            total += 1
            if ballot.id in found.asked:
                again.append(ballot.id)
        if found.durable or again:
            kind = kind_of(run.job.judge)
            durable = f"judging was interrupted with {found.durable} of {total} votes durable"
            data = {
                "durable": found.durable,
                "ballots": total,
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
