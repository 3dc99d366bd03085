"""What an iteration's text made of pairs that were judged under earlier ones, decided again from recorded votes.

In: an iteration on its way through a replay. Out: for each pair that it decided anew the decision as it was made, and
as it would be made, by the votes that were carried over and those that were cast then. A pair that had to wait or
expired has no decision, and none is made up.
"""

from __future__ import annotations

from collections.abc import Iterator

from rlaif.audit.replay_iteration import Iteration, text_digest
from rlaif.errors import RlaifError
from rlaif.judging.kinds import kind_of
from rlaif.judging.verdicts import by_pair
from rlaif.learning.old_pairs import PairLog, held_against, shows_of
from rlaif.records import Decision, OldPair


def decided_anew(again: Iteration) -> list[OldPair]:
    """What the iteration decided of earlier pairs.

    Raises:
        RlaifError: its file is damaged.
    """
    rows = again.here.read("old_pairs", OldPair) if again.here.is_complete("old_pairs") else []
    return [row for row in rows if row.decision is not None]


def old_decisions(again: Iteration, rows: list[OldPair]) -> Iterator[tuple[Decision, Decision]]:
    """(as it was made, as it would be made) of each of these pairs.

    Raises:
        RlaifError: what it takes is gone or damaged.
    """
    run, k, job = again.run, again.number, again.run.job()  # what was asked, whatever the replay reads out of it
    kind, templates = kind_of(job.judge), again.deciding_templates()
    log = PairLog(run, k, rows)
    if missing := next((row.pair_id for row in rows if row.pair_id not in log.votes.keys() & log.pairs.keys()), None):
        raise RlaifError(f"{again.here.path / 'old_pairs.jsonl'}: pair {missing}, or every vote on it, is gone")
    new = by_pair(log.rejudged(run, k))
    votes = {row.pair_id: [*log.votes[row.pair_id], *new.get(row.pair_id, ())] for row in rows}
    pairs = [log.pairs[row.pair_id] for row in rows]
    name = next((mine[-1].ballot.judge for mine in votes.values()), "")
    ballots = kind.ballots(pairs, again.constitution, "decide", job.seed, name, templates)
    held = held_against(pairs, ballots, votes, shows_of(run, kind, again.constitution, templates))
    texts = {c.id: text_digest(c) for c in log.completions.values()}
    decide = again.decider(texts, {c.id for c in log.completions.values() if c.cut_off})
    for row, pair, (_, found) in zip(rows, pairs, held, strict=True):
        assert row.decision is not None, "decided anew"
        yield row.decision, decide(pair, [again.read(v) for v in found.votes], row.decision)
