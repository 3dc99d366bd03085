"""Who is asked what: which voices select, decide and evaluate, and the ballots for a set of pairs. Pure.

The three uses never mix: a voice that selected a pair never votes on it, and a held-out contrast
(`use: evaluate`) neither selects nor decides, so that what measures the policy has not trained it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from rlaif.constitution import Constitution, Principle, Use
from rlaif.records import Ballot, Pair, digest

Role = Literal["decide", "evaluate"]

GUARD_MEASURES = ("relevance", "fluency")
"""What a likelihood judge measures for a guard that has no contrast of its own."""


def selecting_voices(constitution: Constitution) -> list[str]:
    """Ids of the voices that score single completions to choose pairs."""
    return _electing(constitution, "select")


def deciding_voices(constitution: Constitution) -> list[str]:
    """Ids of the voices that vote on pairs for training, guards left out."""
    return _electing(constitution, "decide")


def evaluating_voices(constitution: Constitution) -> list[str]:
    """Ids of the held-out voices that only measure."""
    return _electing(constitution, "evaluate")


def guard_voices(constitution: Constitution) -> list[str]:
    """Ids of the voices that can veto: a guard's deciding contrasts, or its measures when it has none."""
    return [voice for p in constitution.principles for voice, _ in _guard_voices(p)]


def make_ballots(
    pairs: Iterable[Pair],
    constitution: Constitution,
    judge_name: str,
    role: Role = "decide",
    seed: int = 0,
) -> list[Ballot]:
    """Ballots for a judge without slots: one per pair and voice, pair by pair.

    `decide` asks the deciding voices (without any that selected the pair) and the guards; `evaluate` asks the
    held-out voices only. An id is the digest of everything that could change the answer, so a vote is found
    again iff the question is the same. `judge_name` should therefore name the exact weights.
    """
    voices: list[tuple[str, str, bool, str]] = [
        (v.id, v.principle, False, v.hash) for v in constitution.voices(role) if not v.guard
    ]
    if role == "decide":
        voices += [(v, p.id, True, template) for p in constitution.principles for v, template in _guard_voices(p)]
    ballots = []
    for pair in pairs:
        for voice, principle, guard, template in voices:
            if voice in pair.selected_by:
                continue
            content = {
                "pair_id": pair.id,
                "judge": judge_name,
                "voice": voice,
                "principles": [principle],
                "guard": guard,
                "order": "none",
                "sample_index": 0,
                "seed": seed,
                "constitution": constitution.hash,
                "template": template,
            }
            identity = digest({**content, "first": pair.first, "second": pair.second})
            ballots.append(Ballot.model_validate({"id": identity, **content}))
    return ballots


def _electing(constitution: Constitution, use: Use) -> list[str]:
    return [v.id for v in constitution.voices(use) if not v.guard]


def _guard_voices(principle: Principle) -> list[tuple[str, str]]:
    """(voice id, hash of what it shows) for a guard principle; empty for one that elects."""
    if not principle.guard:
        return []
    contrasts = [(v.id, v.hash) for v in principle.voices if v.use == "decide"]
    return contrasts or [(f"{principle.id}/{m}", digest(["guard", m])) for m in GUARD_MEASURES]
