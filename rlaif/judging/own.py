"""A judge of the user's own: what it is asked, and the worker that holds it (docs/extend.md).

In: a class that a job's `judge.kind` names. Out: ballots that hold the digests of its source and its settings, so that
votes of two versions never mix, and its votes, checked.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rlaif import own_code
from rlaif.config import OwnJudge
from rlaif.constitutions.constitution import Constitution
from rlaif.constitutions.templates import Template
from rlaif.errors import RlaifError, UserError
from rlaif.judging.ballots import Role, ballots_of
from rlaif.judging.kinds import Casts, Factory, JudgeKind, Place
from rlaif.records import Ballot, Order, Pair, Score, Vote, digest
from rlaif.serving.servers import Servers

_ORDERS = ("none", "forward", "reversed")


class OwnKind(JudgeKind[OwnJudge]):
    """A class of the user's own. It is imported when something is asked that only it can say."""

    @property
    def unshown(self) -> str:  # type: ignore[override]
        return f"What {self.settings.kind} makes of two answers is in its source, which isn't in the log."

    def _class(self) -> tuple[own_code.Code, OwnJudge]:
        return own_code.of_judge(self.settings)

    @property
    def rests(self) -> bool:  # type: ignore[override]
        return own_code.can_rest(self._class()[0])

    @property
    def _voice(self) -> str:
        return self.settings.kind.rpartition(":")[2]

    def selecting(self, constitution: Constitution) -> list[str]:
        code, _ = self._class()
        if not callable(getattr(code.made, "score", None)):
            raise UserError(f"pairing.method: {code.name} has no method `score`; set random or all")
        return [f"{self._voice}/score"]

    def ballots(
        self,
        pairs: Iterable[Pair],
        constitution: Constitution,
        role: Role = "decide",
        seed: int = 0,
        name: str = "",
        templates: Sequence[Template] = (),
    ) -> list[Ballot]:
        code, settings = self._class()
        asked = [(self._voice, tuple(p.id for p in constitution.principles), False)]
        if getattr(code.made, "per_principle", False):
            shown = [p for p in constitution.principles if role == "decide" or not p.guard]
            asked = [(f"{self._voice}/{p.id}", (p.id,), p.guard) for p in shown]
        orders: tuple[Order, ...] = ("none",)
        if getattr(code.made, "both_orders", False):
            orders = ("forward", "reversed")
        parameters = digest(settings.model_dump(mode="json", exclude={"precision"}))
        voices = [
            {
                "judge": name,
                "voice": voice,
                "principles": principles,
                "guard": guard,
                "sample_index": 0,
                "seed": seed,
                "constitution": constitution.hash,
                "template": code.sha256[: own_code.SHOWN_DIGITS],
                "parameters": parameters,
            }
            for voice, principles, guard in asked
        ]
        return list(ballots_of(pairs, voices, orders))

    def shows(self, ballot: Ballot, constitution: Constitution, templates: Sequence[Template]) -> str:
        """A class that votes by principle promises to look at that one alone; another may look at all of the text."""
        _, _, asked = ballot.voice.partition("/")
        if not asked:
            return constitution.hash
        return digest(constitution.principle(asked).model_dump(mode="json", exclude={"weight"}))

    def places(
        self, pair: Pair, constitution: Constitution, name: str, templates: Sequence[Template], seen: Sequence[Ballot]
    ) -> dict[Place, int]:
        """The order of `ballots`, from those that were made: nothing is imported."""
        at = {p.id: n for n, p in enumerate(constitution.principles)}
        in_order = sorted(seen, key=lambda b: (at.get(b.principles[0], 0), _ORDERS.index(b.order)))
        return {(b.voice_key, b.order): n for n, b in enumerate(in_order)}

    def prompts_at_once(self, tokens: int) -> int | None:
        code, _ = self._class()
        return getattr(code.made, "prompts_at_once", None)

    def name(self, digest: str | None) -> str:
        code, _ = self._class()
        return f"{code.name}:{code.sha256[: own_code.SHOWN_DIGITS]}"

    def worker(
        self, model: Path | None, votes: Iterable[Vote], wasted: Path, servers: Servers | None = None
    ) -> Factory:
        code, _ = self._class()
        return "rlaif.judging.own:make", {"settings": self.settings, "sha256": code.sha256}

    def open(self, note: Callable[[str], None]) -> tuple[Casts, str]:
        own_code.of_judge(self.settings, anew=True)
        return make(self.settings), self.name(None)


def make(settings: OwnJudge, sha256: str | None = None) -> Checked:
    """Factory for a worker process; `sha256` is the digest of the source that the loop knows."""
    code, own = own_code.of_judge(settings, sha256)
    return Checked(code.name, code.made(own))


class Checked:
    """A judge of the user's own, whose answers are looked at before anybody keeps them."""

    def __init__(self, name: str, judge: Any) -> None:
        self._name, self._judge = name, judge

    def cast(
        self, ballots: Sequence[Ballot], pairs: Sequence[Pair], candidates: Sequence[Any], constitution: Constitution
    ) -> Iterator[list[Vote]]:
        """Votes on the given ballots, in chunks.

        Raises:
            RlaifError: what the class yields are no votes on these ballots, one for each.
        """
        owed = {b.id: b for b in ballots}
        for chunk in self._judge.cast(ballots, pairs, candidates, constitution):
            for vote in self._list(chunk, Vote, "cast"):
                if owed.pop(vote.ballot.id, None) != vote.ballot:
                    raise RlaifError(f"{self._name}.cast: a vote on a ballot that isn't owed ({vote.ballot.id})")
                if why := _unsound(vote):
                    raise RlaifError(f"{self._name}.cast: ballot {vote.ballot.id}: {why}")
            yield list(chunk)
        if owed:  # before the stage counts as done
            raise RlaifError(f"{self._name}.cast: left {len(owed)} of {len(ballots)} ballots without a vote")

    def score(
        self, candidates: Sequence[Any], constitution: Constitution, voices: Sequence[str]
    ) -> Iterator[list[Score]]:
        """Scores of single completions, in chunks.

        Raises:
            RlaifError: what the class yields are none.
        """
        for chunk in self._judge.score(candidates, constitution, voices):
            scores = self._list(chunk, Score, "score")
            if wrong := [s for s in scores if not math.isfinite(s.value)]:
                raise RlaifError(f"{self._name}.score: {wrong[0].completion_id}: {wrong[0].value} is no score")
            yield scores

    def rest(self) -> None:
        """Gives back what it holds of a GPU; of a class that can (`OwnKind.rests`)."""
        self._judge.rest()

    def wake(self) -> None:
        """Takes it again."""
        self._judge.wake()

    def close(self) -> None:
        """Closes what it holds, where it has something to close."""
        if callable(close := getattr(self._judge, "close", None)):
            close()

    def _list(self, chunk: Any, record: type[Any], method: str) -> list[Any]:
        if not isinstance(chunk, list | tuple) or any(not isinstance(row, record) for row in chunk):
            raise RlaifError(f"{self._name}.{method}: expected lists of rlaif.records.{record.__name__}")
        return list(chunk)


def _unsound(vote: Vote) -> str | None:
    """What a vote says that can't be meant; a NaN would be counted now and read as nothing from the log."""
    if vote.p_first is not None and not 0 <= vote.p_first <= 1:
        return f"p_first is {vote.p_first}; expected a number from 0 to 1, or None"
    if (vote.outcome == "abstain") != (vote.abstain_reason is not None):
        return "an `abstain` has an abstain_reason, and nothing else has one"
    return None
