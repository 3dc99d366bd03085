"""A judge that is fed: what is held doesn't grow with the ballots; and votes that stay on the disk."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rlaif.errors import RlaifError
from rlaif.judging.kinds import ChatKind
from rlaif.loop import Loop, judging
from rlaif.records import Ballot, Decision, Vote
from rlaif.rundir.store import StageDir
from rlaif.rundir.votes import Votes, VotesByPair
from rlaif.workers.inline import InlineWorker
from tests.judging.vote_makers import make_vote
from tests.stubs import StubFedJudge, stub_job, stub_loop
from tests.test_loop_chat import ROOT

OPEN_PAIRS = 16


def alive(record: type[Any]) -> int:
    return sum(type(o) is record for o in gc.get_objects())


def fed_loop(root: Path, **changes: Any) -> Loop:
    root.mkdir(exist_ok=True)
    (root / "prompts").symlink_to(ROOT / "prompts")
    judge = {"kind": "chat", "model": "m", "base_url": "http://127.0.0.1:1/v1", "api_key_env": None, "cache": None}
    tree = {"iterations": 1, "prompts": {"per_iteration": 20}, "eval": {"every": 1, "prompts": 1}, "judge": judge}
    loop = stub_loop(root, stub_job(**(tree | changes)))
    loop.judge = InlineWorker("judge", "tests.stubs:StubFedJudge", {})
    return loop


@pytest.mark.slow
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("early_stop", [False, True])
def test_ballots_and_votes_that_are_held_do_not_grow_with_their_number(
    stream: bool, early_stop: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of them were held at the same time once, 1.4 kB each."""
    monkeypatch.setattr(ChatKind, "open_pairs", OPEN_PAIRS)
    ballots: list[int] = []
    votes: list[int] = []
    cast, decide = StubFedJudge.cast, judging.decide_votes

    def watched(self: StubFedJudge, *args: Any, **kwargs: Any) -> Iterator[list[Vote]]:
        for n, chunk in enumerate(cast(self, *args, **kwargs)):
            if n % 16 == 0:
                ballots.append(alive(Ballot))
            yield chunk

    def decided(*args: Any, **kwargs: Any) -> Decision:
        if len(votes) < 3:
            votes.append(alive(Vote))
        return decide(*args, **kwargs)

    monkeypatch.setattr(StubFedJudge, "cast", watched)
    monkeypatch.setattr(judging, "decide_votes", decided)
    before = alive(Ballot), alive(Vote)
    answers = {"completions_per_prompt": 8}
    pairs = {"method": "all", "max_pairs_per_prompt": 28}
    loop = fed_loop(tmp_path / "many", sampling=answers, pairing=pairs, pipeline={"stream": stream})
    loop.job = loop.job.model_copy(update={"judge": loop.job.judge.model_copy(update={"early_stop": early_stop})})
    loop.run()
    assert loop.dir.iterations_measured([0])[0].votes == 20 * 28 * 2
    assert max(ballots) - before[0] <= 4 * OPEN_PAIRS * 2
    assert max(votes) - before[1] <= 4 * OPEN_PAIRS * 2


def test_a_judge_that_ends_before_it_is_told_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ChatKind, "open_pairs", OPEN_PAIRS)
    cast = StubFedJudge.cast
    monkeypatch.setattr(StubFedJudge, "cast", lambda *args, **kwargs: iter([next(cast(*args, **kwargs))]))
    loop = fed_loop(tmp_path / "run", pipeline={"stream": False})
    with pytest.raises(RlaifError, match=r"the judge ended with 37 ballots unanswered"):
        loop.run()
    assert not loop.dir.iteration(0).is_complete("votes")


def on_pair(pair_id: str, voice: str, reply: str) -> Vote:
    vote = make_vote("first", 0, voice=voice)
    ballot = vote.ballot.model_copy(update={"pair_id": pair_id})
    return vote.model_copy(update={"ballot": ballot, "raw_reply": reply})


def test_votes_are_read_by_pair_in_the_order_of_their_ballots(tmp_path: Path) -> None:
    ranks = {"a": 0, "b": 1}
    here = StageDir(tmp_path)
    held = VotesByPair(lambda: here.file("votes"), lambda vote: ranks.get(vote.ballot.voice))
    rows = [
        on_pair("x", "b", "1"), on_pair("y", "b", "2"), on_pair("x", "a", "3"), on_pair("x", "gone", "4"),
        on_pair("x", "b", "5"),
    ]  # fmt: skip
    with here.writer("votes", Vote, held=held) as writer:
        writer.add(rows[:2])
        assert [v.raw_reply for v in held.of("x")] == ["1"]
        writer.add(rows[2:])
        assert writer.count() == 5
    again = VotesByPair(lambda: here.file("votes"), lambda vote: ranks.get(vote.ballot.voice))
    with here.writer("votes", Vote, held=again) as writer:
        writer.complete([], {})
    for found in (held, again):
        assert (found.ranks("x"), found.ranks("y"), found.ranks("z")) == ({0, 1}, {1}, set())
        votes = Votes(found, ["y", "z", "x"])
        assert [v.raw_reply for v in votes] == ["2", "3", "5"], "of two answers to one ballot the later one"
        assert [len(mine) for mine in votes.of_each(["x", "z"])] == [2, 0]
        assert len(votes) == 3
    assert (list(Votes()), len(Votes()), list(Votes().of_each(["x"]))) == ([], 0, [[]])


def test_votes_without_a_rank_count_as_they_came(tmp_path: Path) -> None:
    here = StageDir(tmp_path)
    with here.writer("votes", Vote) as writer:
        writer.add([on_pair("x", "b", "1"), on_pair("x", "a", "2")])
        writer.complete([], {})
    held = VotesByPair(lambda: here.file("votes"))
    here.note_each("votes", Vote, held)
    assert [v.raw_reply for v in held.of("x")] == ["1", "2"]
