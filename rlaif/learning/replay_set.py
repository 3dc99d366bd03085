"""The replay set: pairs of earlier iterations, and what the text in force makes of each.

In: a run's log. Out: `Member`s, one for each pair that an iteration had fresh in its mix, whoever decided it. Whether
one may train again follows from rows that are in the log (`Preference`, `OldPair`): nothing is judged here.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal, NamedTuple

from rlaif.config import Replay
from rlaif.records import OldPair, Preference
from rlaif.review.labels import LabelLog, in_force, labels_of
from rlaif.rundir.store import RunDir

if TYPE_CHECKING:
    from rlaif.learning.replay_index import IndexRow

UNDER_IT: Literal["valid"] = "valid"
"""Of a pair that was judged under the text asked about."""
UNKNOWN: Literal["unknown"] = "unknown"
"""Of one of which nobody knows yet what that text makes of it."""
TRAINS = (UNDER_IT, "kept", "turned", "stale")
"""How a pair may stand to train."""


_LEAST_WEIGHT = 1e-300
"""A weight that is 0 by rounding."""


def standing_of(row: Preference | IndexRow, about: OldPair | None, constitution: str) -> str:
    """How a pair stands under the text of this hash; `about` is the newest that this text made of it."""
    if row.constitution == constitution or row.source == "data":  # a data set's label is under no text
        return UNDER_IT
    # Else it is about the pair as it was before a person labelled it anew.
    same = about is not None and (about.before, about.source) == (row.constitution, row.source)
    return about.standing if about is not None and same else UNKNOWN


class Member(NamedTuple):
    """A pair of the replay set."""

    row: Preference
    """As the newest iteration had it that trained on it fresh, or could have."""
    mixed_in: int
    """That iteration."""
    about: OldPair | None
    """The newest that the text asked about made of it."""
    standing: str
    """How it stands under that text (`standing_of`)."""
    relabelled: bool
    """A person said so, and says something else by now, or nothing."""

    def as_trained(self) -> Preference | None:
        """As it may train under the text asked about; None where it may not."""
        if self.relabelled or self.standing not in TRAINS:
            return None
        if self.about is None or self.about.decision is None or self.standing == UNDER_IT:
            return self.row
        row = self.row.swap() if self.standing == "turned" else self.row
        decision = self.about.decision
        p_first, agreement = decision.verdict.p_first, decision.verdict.agreement
        p_chosen = p_first if p_first is None or decision.winner == "first" else 1 - p_first
        judged = {"constitution": self.about.constitution, "p_chosen": p_chosen, "agreement": agreement}
        return row.model_copy(update=judged)


def members(
    run: RunDir, k: int, constitution: str, max_age: int | None = None, log: LabelLog | None = None
) -> dict[str, Member]:
    """Pair id → member, as iteration k finds the set under the text of this hash; of the `max_age` iterations before
    it, or of all. Without `log` nobody has labelled anything anew."""
    oldest = 0 if max_age is None else max(0, k - max_age)
    about = newest_about(run, constitution, range(oldest, k + 1))
    out: dict[str, Member] = {}
    for i in range(oldest, k):
        fresh = [row for row in run.iteration(i).read("preferences", Preference) if row.source != "replay"]
        anew = relabelled(run, i, log)
        for row in fresh:
            found = about.get(row.pair_id)
            standing = standing_of(row, found, constitution)
            out[row.pair_id] = Member(row, i, found, standing, row.pair_id in anew)
    return out


def newest_about(run: RunDir, constitution: str, iterations: Iterable[int]) -> dict[str, OldPair]:
    """Pair id → the newest that the text of this hash made of it, in these iterations."""
    out: dict[str, OldPair] = {}
    for i in iterations:
        here = run.iteration(i)
        if here.is_complete("old_pairs"):
            out |= {row.pair_id: row for row in here.read("old_pairs", OldPair) if row.constitution == constitution}
    return out


def relabelled(run: RunDir, i: int, log: LabelLog | None) -> set[str]:
    """Pairs that iteration i had as people labelled them, and that have another label in force, or none."""
    if log is None:
        return set()
    labels = in_force(log.labels)
    sides = labels_of(run.iteration(i))
    return {pair for pair, side in sides.items() if (label := labels.get(pair)) is None or label.outcome != side}


def distinct(old: Mapping[str, Member], fresh: Iterable[Preference]) -> dict[str, Member]:
    """The members that may train, without any that is fresh now, and of twins the newest.

    Twins are the same tokens under several pair ids: a source that starts over gives its pairs anew, and a policy may
    give the same two completions again. In one update they would count double, or even against each other.
    """
    taken = {_content(row) for row in fresh}
    out = {}
    for i, member in sorted(old.items(), key=lambda item: (item[1].mixed_in, item[0]), reverse=True):
        row = member.as_trained()
        if row is not None and (content := _content(row)) not in taken:
            taken.add(content)
            out[i] = member
    return out


def _content(row: Preference) -> tuple[tuple[int, ...], frozenset[tuple[int, ...]]]:
    """What a pair is, whatever it is called and whichever side was chosen."""
    return row.prompt_token_ids, frozenset((row.chosen_token_ids, row.rejected_token_ids))


def draw(
    old: Mapping[str, Member],
    wanted: int,
    settings: Replay,
    k: int,
    seed: int,
    distances: Mapping[str, float] = MappingProxyType({}),
) -> list[Preference]:
    """So many members that may train in iteration k, or all of them where they are fewer, in the order in which they
    were drawn. What is drawn follows from the log and the seed alone.

    `distances` says how far the policy has moved on a pair (`PolicyDistance.distance`). One that isn't in it has no
    log p of then, most often since another policy gave its answers: as near as the others it surely isn't, and counts
    as moved as far as the farthest of them.
    """
    rows = {i: row for i, m in old.items() if (row := m.as_trained()) is not None}
    farthest = max((distances[i] for i in rows if i in distances), default=0.0)
    weights = {i: weight_of(old[i], settings, k, distances.get(i, farthest)) for i in rows}
    keys = {i: _key(f"replay-{seed}-{k}-{i}", weight) for i, weight in weights.items()}
    drawn = sorted(rows, key=lambda i: (keys[i], i), reverse=True)[:wanted]
    return [rows[i].model_copy(update={"source": "replay"}) for i in drawn]


def weight_of(member: Member, settings: Replay, k: int, distance: float) -> float:
    """A member's weight in the draw of iteration k: its chance of being drawn first, against the others'."""
    weight = settings.stale_weight if member.standing == "stale" else 1.0
    if settings.half_life is not None:
        weight *= 0.5 ** ((k - member.mixed_in) / settings.half_life)
    if settings.half_distance is not None:
        weight *= 0.5 ** (distance / settings.half_distance)
    return weight


def _key(seed: str, weight: float) -> float:
    """log(u) / weight: the largest are a weighted sample without replacement (Efraimidis and Spirakis 2006)."""
    return math.log(1.0 - random.Random(seed).random()) / max(weight, _LEAST_WEIGHT)
