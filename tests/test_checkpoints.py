"""Which checkpoints stay, that what goes is told, and that what stays can be gone on from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rlaif.config import parse_job
from rlaif.errors import UserError
from rlaif.loop.branch import branch
from rlaif.rundir.checkpoints import checkpoints, kept
from rlaif.rundir.store import RunDir
from tests.stubs import stub_job, stub_loop, write_texts
from tests.test_branch import go_on, made

pytestmark = pytest.mark.slow


def on_disk(run: RunDir) -> tuple[list[int], list[int]]:
    """After how many iterations there is a policy, and a learner's state."""
    policies = [k + 1 for k in run.iterations() if (run.iteration(k).path / "policy").exists()]
    return policies, sorted(int(p.name) + 1 for p in (run.path / "learner").iterdir())


@pytest.mark.parametrize(
    ("keep", "policies", "states"),
    [
        (None, [2, 4], [4]),  # evaluated at the change of text, and at the end
        ("all", [1, 2, 3, 4], [1, 2, 3, 4]),
        ("evaluated", [2, 4], [2, 4]),
        ({"last": 2}, [3, 4], [3, 4]),
        ({"every": 3}, [3, 4], [3, 4]),
    ],
)
def test_what_stays(tmp_path: Path, keep: Any, policies: list[int], states: list[int]) -> None:
    run = go_on(tmp_path, filters={"min_kept_pairs": 1}, eval={"every": 9, "prompts": 3}, keep_checkpoints=keep)
    assert on_disk(run) == (policies, states)
    told = [e for e in run.events() if e.kind == "pruned"]
    for what, stayed in (("policies", policies), ("states", states)):
        gone = [k + 1 for e in told for k in e.data[what]]
        assert sorted(gone + stayed) == [1, 2, 3, 4]  # each is told once
    for found in checkpoints(run):
        assert (found.policy, found.state) == (found.iterations in policies, found.iterations in states)
        if found.policy and found.state:
            child = branch(run, found.iterations, f"child{found.iterations}")
            assert made(go_on(tmp_path, child.path.name)) == made(run)


def test_what_a_skipped_update_stands_for(tmp_path: Path) -> None:
    """The policy after the second iteration is that of the first: with the second, it is the first one's that stays."""
    run = go_on(tmp_path, keep_checkpoints={"every": 2})
    assert [k + 1 for k in run.iterations() if run.iteration(k).policy_made()] == [1, 3, 4]
    assert on_disk(run) == ([1, 4], [1, 4])
    child = branch(run, 2, "child")
    assert made(go_on(tmp_path, "child")) == made(run)
    assert child.parent is not None


def test_which_updates_stay_by_number() -> None:
    updated = [0, 2, 3, 5]
    for keep, stay in (("all", {0, 2, 3, 5}), ("evaluated", {0, 3, 5}), ({"last": 3}, {3, 5}), ({"every": 3}, {2, 5})):
        choice = stub_job(keep_checkpoints=keep).keep_checkpoints
        assert kept(choice, 6, [0, 2, 4], updated) == (stay, stay), keep
    assert kept(None, 6, [0, 2, 4], updated) == ({0, 3, 5}, {5})
    assert kept(None, 3, [], []) == (frozenset(), frozenset())


def at_change(root: Path, reference: str) -> RunDir:
    """Three texts; a checkpoint is kept after every third iteration."""
    write_texts(root, 1, 2, 3)
    return go_on(
        root, iterations=5, schedule={0: "rules@1", 1: "rules@2", 4: "rules@3"}, filters={"min_kept_pairs": 1},
        learner={"reference": reference}, eval={"every": 9, "prompts": 3}, keep_checkpoints={"every": 3},
    )  # fmt: skip


def test_what_a_kept_state_is_pulled_to_stays(tmp_path: Path) -> None:
    """Of another text than the one in force, too: a branch goes on under it."""
    run = at_change(tmp_path, "at_change")
    assert on_disk(run) == ([1, 3, 4, 5], [3, 5])
    branch(run, 3, "child")
    assert made(go_on(tmp_path, "child")) == made(run)


def test_a_reference_that_was_not_kept_is_told_before_anything_is_sampled(tmp_path: Path) -> None:
    run = at_change(tmp_path, "base")
    child = branch(run, 3, "child", ["learner.reference=at_change"])
    with pytest.raises(UserError, match=r"learner.reference=at_change: .*iterations/0000/policy\); restore it"):
        go_on(tmp_path, "child")
    assert not list(child.iteration(3).path.glob("completions*"))


def test_a_run_that_goes_on_with_another_choice_removes_what_is_too_much(tmp_path: Path) -> None:
    go_on(tmp_path, iterations=3, filters={"min_kept_pairs": 1}, keep_checkpoints="all")
    run = go_on(tmp_path, iterations=4, keep_checkpoints={"last": 1})
    assert on_disk(run) == ([4], [4])
    (told,) = [e for e in run.events() if e.kind == "pruned"]
    assert told.data == {"policies": [0, 1, 2], "states": [0, 1, 2]}
    assert told.message == "removed (keep_checkpoints): policies after 1, 2, 3; learner's states after 1, 2, 3"


def test_a_kill_while_it_removes_tells_it_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from rlaif.loop import hand_over

    job = stub_job(filters={"min_kept_pairs": 1}, iterations=2, eval={"every": 9, "prompts": 3})
    removed = []

    def killed(path: Path) -> None:
        removed.append(path)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(hand_over.shutil, "rmtree", lambda path, **how: None if how else killed(path))
        with pytest.raises(KeyboardInterrupt):
            stub_loop(tmp_path, job).run()
    run = RunDir(tmp_path / "run")
    assert len(removed) == 1
    assert removed[0].exists()
    assert not (run.iteration(1).path / "metrics.json").exists()
    stub_loop(tmp_path, job).run()
    assert on_disk(run) == ([2], [2])
    assert [e.kind for e in run.events()].count("pruned") == 1


@pytest.mark.parametrize("wrong", ["some", {"last": 0}, {"last": 1, "every": 2}, {"first": 1}, {}, 3, {"last": True}])
def test_no_other_choice(wrong: Any) -> None:
    with pytest.raises(UserError, match=r"keep_checkpoints: expected all, evaluated, {last: N} or {every: N}"):
        stub_job(keep_checkpoints=wrong)


@pytest.mark.parametrize("choice", [None, "all", {"last": 2}])
def test_a_choice_survives_run_json(choice: Any) -> None:
    job = stub_job(keep_checkpoints=choice)
    assert parse_job(json.loads(job.model_dump_json()), "run.json") == job
