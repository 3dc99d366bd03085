"""Alarms of whole runs: judges and policies that go wrong, and 20 that don't."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rlaif.constitutions.checks import count_words
from rlaif.errors import RunPaused
from rlaif.loop import Loop, alarms_owed
from rlaif.records import Completion, Event, Vote
from rlaif.rundir.store import write_json
from tests.stubs import fraction, stub_job, stub_loop

pytestmark = pytest.mark.slow


def loop_of(tmp_path: Path, **changes: Any) -> Loop:
    rules = {"schedule": {0: "rules@1"}, "iterations": 3, "prompts": {"per_iteration": 16}}
    return stub_loop(tmp_path, stub_job(**{**rules, **changes}))


def alarms(loop: Loop) -> list[Event]:
    return [e for e in loop.dir.events() if e.kind == "alarm"]


def says(loop: Loop, text: Any) -> None:
    """From here on the policy's answers are `text` of what it would have answered."""
    loop.sampler.ready()
    sampler = loop.sampler.target  # type: ignore[attr-defined]
    recorded = sampler._recorded

    def changed(**fields: Any) -> Completion:
        answer: Completion = recorded(**fields)
        return answer.model_copy(update={"text": text(answer)})

    sampler._recorded = changed


def votes(loop: Loop, change: Any) -> None:
    """From here on the judge's votes on two answers are other ones."""
    loop.judge.ready()
    judge = loop.judge.target  # type: ignore[attr-defined]
    cast = judge.vote
    judge.vote = lambda ballot, first, second: change(cast(ballot, first, second), first, second)


def silent(vote: Vote, first: str, second: str) -> Vote:
    return vote.model_copy(update={"outcome": "abstain", "abstain_reason": "empty", "p_first": None})


def test_a_judge_that_goes_silent(tmp_path: Path) -> None:
    """The run ends, and not without a word."""
    loop = loop_of(tmp_path)
    votes(loop, silent)
    loop.run()
    found = alarms(loop)
    assert [(e.iteration, e.data["kind"]) for e in found] == [(0, "abstained"), (1, "abstained"), (2, "abstained")]
    assert found[0].message == "16 of 16 pairs have no valid vote, over 20%"


def test_a_judge_that_likes_length(tmp_path: Path) -> None:
    """Under a text whose check asks for the opposite."""
    loop = loop_of(tmp_path, iterations=6)
    says(loop, lambda a: " ".join([a.text, *(f"x{n}" for n in range(int(9 * fraction(a.text))))]))

    def longer(vote: Vote, first: str, second: str) -> Vote:
        if vote.ballot.guard or count_words(first) == count_words(second):
            return vote
        wins = count_words(first) > count_words(second)
        return vote.model_copy(update={"outcome": "first" if wins else "second", "p_first": 0.9 if wins else 0.1})

    votes(loop, longer)
    loop.run()
    assert {e.data["kind"] for e in alarms(loop)} == {"leaning"}
    assert "the winner has more words than the loser" in alarms(loop)[0].message


def test_an_alarm_says_where_it_was_silent(tmp_path: Path) -> None:
    back = {"short_answers": {"limit": 2, "action": "rollback"}, "equal_answers": {"action": "off"}}
    loop = loop_of(tmp_path, monitors=back)
    loop.iterate(0)
    loop.iterate(1)
    says(loop, lambda a: "w")
    with pytest.raises(RunPaused, match=r"iteration 3: .*silent after iteration 2") as e:
        loop.run()
    assert e.value.back_to == 2

    loop = loop_of(tmp_path / "from the start", monitors=back)
    says(loop, lambda a: "w")
    with pytest.raises(RunPaused, match=r"iteration 1: .*no earlier iteration was silent"):
        loop.run()


def test_who_did_not_look_was_not_silent(tmp_path: Path) -> None:
    """KL is looked at where held-out answers are: a state in between may be beyond the limit, too."""
    how: dict[str, Any] = {"iterations": 6, "eval": {"every": 2, "prompts": 3}}
    loop = loop_of(tmp_path, **how)
    loop.run()
    low = loop.dir.evaluation(2).path / "metrics.json"
    for n, kl in ((2, 0.1), (4, 0.9), (6, 0.9)):
        path = low.parent.parent / f"{n:04d}" / "metrics.json"
        write_json(path, json.loads(path.read_text()) | {"kl_per_token": kl})
    (loop.dir.iteration(5).path / "metrics.json").unlink()
    with pytest.raises(RunPaused, match=r"iteration 6: .*silent after iteration 2"):
        loop_of(tmp_path, **how, monitors={"kl": {"limit": 0.5, "action": "rollback"}}).run()


def test_a_way_back_that_was_not_taken_is_taken_by_the_next_attempt(tmp_path: Path) -> None:
    """A kill, or a full disk, may come between the pause and the rollback; until then the alarm is in the log."""
    back = {"short_answers": {"limit": 2, "action": "rollback"}, "equal_answers": {"action": "off"}}
    loop = loop_of(tmp_path, monitors=back)
    loop.iterate(0)
    says(loop, lambda a: "w")
    for _ in range(3):
        with pytest.raises(RunPaused, match=r"iteration 2: .*silent after iteration 1") as e:
            loop.run()
        assert e.value.back_to == 1
        loop = loop_of(tmp_path, monitors=back)
        assert loop.dir.done() == [0, 1]
    other = loop_of(tmp_path, monitors=back | {"short_answers": {"limit": 2, "action": "warn"}})
    other.run()
    assert other.dir.done() == [0, 1, 2]


def test_an_alarm_of_a_branchs_past_stops_it_not(tmp_path: Path) -> None:
    """Its parent paused there; whoever branches goes on from it all the same."""
    pausing = {"short_answers": {"limit": 99, "action": "pause"}}
    loop = loop_of(tmp_path, monitors=pausing)
    with pytest.raises(RunPaused):
        loop.run()
    kept = [e for e in loop.dir.events() if e.kind != "paused"]  # what a branch takes along: up to the head of then
    (loop.dir.path / "events.jsonl").write_text("".join(e.model_dump_json() + "\n" for e in kept))
    assert [a.kind for a in alarms_owed(loop.dir, loop.job)] == ["short_answers"]
    loop.dir.event("branched", "goes on from run after 1 iterations")
    assert alarms_owed(loop.dir, loop.job) == []


def test_the_way_back_leads_to_what_is_kept(tmp_path: Path) -> None:
    back = {"short_answers": {"limit": 2, "action": "rollback"}, "equal_answers": {"action": "off"}}
    for keep, goes_to, said in (
        ({"every": 2}, 2, "it was silent after iteration 2"),
        ({"last": 1}, None, "it was silent after iteration 3, but nothing is kept to go back to"),
    ):
        loop = loop_of(tmp_path / str(goes_to), monitors=back, keep_checkpoints=keep, iterations=5)
        for k in range(3):
            loop.iterate(k)
        says(loop, lambda a: f"w{int(9 * fraction(a.text))}")  # unlike ones, so that there is an update
        with pytest.raises(RunPaused, match=said) as e:
            loop.run()
        assert e.value.back_to == goes_to
    loop_of(tmp_path / "None", monitors=back, keep_checkpoints={"last": 1}, iterations=4).run()  # goes on from there


def test_of_several_alarms_the_run_goes_back_furthest(tmp_path: Path) -> None:
    kinds = {"short_answers": {"limit": 2, "action": "pause"}, "equal_answers": {"limit": 0.5, "action": "rollback"}}
    loop = loop_of(tmp_path, monitors=kinds)
    loop.iterate(0)
    says(loop, lambda a: "w")
    with pytest.raises(RunPaused, match=r"equal_answers.action=rollback\); it was silent after iteration 1"):
        loop.run()


def test_a_kill_before_a_pause_loses_no_pause(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Killed(BaseException): ...

    def kill(*args: Any) -> None:
        raise Killed

    pausing = {"short_answers": {"limit": 99, "action": "pause"}}
    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr("rlaif.loop.loop.write_head", kill)  # the iteration is done by then
        loop_of(tmp_path, monitors=pausing, eval={"every": 9, "prompts": 3}).run()
    loop = loop_of(tmp_path, monitors=pausing, eval={"every": 9, "prompts": 3})
    assert (loop.dir.done(), len(alarms(loop))) == ([0], 1)
    with pytest.raises(RunPaused, match="paused at an alarm in iteration 1"):
        loop.run()
    with pytest.raises(RunPaused, match="paused at an alarm in iteration 2"):  # it stops no later attempt
        loop_of(tmp_path, monitors=pausing, eval={"every": 9, "prompts": 3}).run()


def test_a_policy_that_collapses(tmp_path: Path) -> None:
    loop = loop_of(tmp_path)
    loop.iterate(0)
    says(loop, lambda a: "there you go again there you go again")
    loop.iterate(1)
    assert {e.data["kind"] for e in alarms(loop)} >= {"equal_answers"}
    loop = loop_of(tmp_path / "varied")
    says(loop, lambda a: " ".join(f"w{int(99 * fraction(a.text, n))}" for n in range(8)))
    loop.iterate(0)
    says(loop, lambda a: " ".join(f"w{int(9 * fraction(a.text, n))}" for n in range(8)))
    loop.iterate(1)
    assert [e.data["kind"] for e in alarms(loop)] == ["collapse"]
    assert "different words in 200 of the sampled answers' words" in alarms(loop)[0].message


def test_a_policy_that_praises_itself(tmp_path: Path) -> None:
    loop = loop_of(tmp_path)
    says(loop, lambda a: f"{a.text}. This answer is excellent." if fraction(a.text) < 0.5 else a.text)
    loop.iterate(0)
    assert "self_praise" in [e.data["kind"] for e in alarms(loop)]
    assert "sampled answers praise themselves" in alarms(loop)[0].message


def test_twenty_runs_in_which_nothing_is_wrong(tmp_path: Path) -> None:
    for seed in range(20):
        loop = loop_of(tmp_path / str(seed), seed=seed, iterations=6)
        loop.run()
        assert [e.message for e in alarms(loop)] == [], seed


def test_a_run_killed_between_its_alarm_and_its_pause_pauses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And goes on after it: the alarm was seen then."""
    pausing = {"monitors": {"abstained": {"action": "pause"}}}

    def interrupted(*_: Any) -> Any:
        raise KeyboardInterrupt

    for stops in (KeyboardInterrupt, RunPaused):
        loop = loop_of(tmp_path, **pausing)
        votes(loop, silent)
        with monkeypatch.context() as patch, pytest.raises(stops):
            if stops is KeyboardInterrupt:
                patch.setattr(loop.hand_over, "prune", interrupted)
            loop.run()
        assert [e.iteration for e in alarms(loop)] == [0]
    loop = loop_of(tmp_path, **pausing)
    with pytest.raises(RunPaused, match="in iteration 2"):
        votes(loop, silent)
        loop.run()
