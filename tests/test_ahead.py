"""Overlap: iterations are sampled and judged while an earlier one trains; which policy sampled the plan says."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rlaif.audit.summary import status_of
from rlaif.audit.verify import verify
from rlaif.config import Job
from rlaif.errors import RunPaused, UserError, WorkerError
from rlaif.loop import Loop
from rlaif.loop.loop import sampled_and_judged
from rlaif.loop.running import Iteration, Running
from rlaif.records import SCHEMA_VERSION, Completion, IterationMetrics, Plan, Vote
from rlaif.rundir.store import RunDir, StageDir, read_record, write_json
from rlaif.workers.inline import InlineWorker
from tests.conftest import until
from tests.stubs import BASE_DIGEST, Quiet, stub_job, stub_loop
from tests.test_resume import outcome
from tests.test_streaming import log_of

pytestmark = pytest.mark.slow


def stale_job(staleness: int, **changes: Any) -> Job:
    """No iteration is skipped, or a policy that is too old would look like the right one."""
    tree = {"iterations": 5, "filters": {"min_kept_pairs": 1}, "judge": {"batch_tokens": 64}, **changes}
    return stub_job(**tree, pipeline={"staleness": staleness, "stream": True})


def with_header(loop: Loop) -> Loop:
    """As `rlaif run` begins it."""
    loop.dir.path.mkdir(parents=True, exist_ok=True)
    header = {"schema_version": SCHEMA_VERSION, "job": loop.job.model_dump(mode="json")}
    write_json(loop.dir.path / "run.json", header | {"models": {"policy": BASE_DIGEST}})
    return loop


def plans(run: RunDir) -> list[Plan]:
    return [run.plan(k) for k in run.iterations()]


def in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing runs ahead; which policy samples is the same."""
    monkeypatch.setattr(Loop, "go_ahead", lambda self, k: None)


def metrics_of(run: RunDir) -> list[IterationMetrics]:
    found = [read_record(run.iteration(k).path / "metrics.json", IterationMetrics) for k in run.iterations()]
    return [m.model_copy(update={"seconds": {}, "wall_s": 0, "streamed_votes": None}) for m in found]


@pytest.mark.parametrize("staleness", [1, 2])
def test_overlapped_iterations_are_those_of_the_order(
    staleness: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ahead = stub_loop(tmp_path / "ahead", stale_job(staleness))
    ahead.run()
    in_order(monkeypatch)
    after = stub_loop(tmp_path / "after", stale_job(staleness))
    after.run()
    assert log_of(ahead.dir.path) == log_of(after.dir.path)
    assert metrics_of(ahead.dir) == metrics_of(after.dir)
    assert all(m.weights_gap is not None and m.decoding_gap is not None for m in metrics_of(ahead.dir))
    made = ["base-weights", *(ahead.dir.iteration(k).policy_made() for k in range(5))]
    for plan in plans(ahead.dir):
        assert plan.staleness == min(plan.iteration, staleness)
        assert plan.policy.digest == made[plan.iteration - plan.staleness]
        sampled = ahead.dir.iteration(plan.iteration).read("completions", Completion)
        assert {c.policy for c in sampled} == {plan.policy}


def test_without_staleness_it_is_the_sequence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = stub_loop(tmp_path / "plain", stub_job())
    plain.run()
    monkeypatch.setattr(threading, "Thread", None)
    zero = stub_loop(tmp_path / "zero", stub_job(pipeline={"staleness": 0}))
    zero.run()
    assert log_of(plain.dir.path) == log_of(zero.dir.path)
    assert metrics_of(plain.dir) == metrics_of(zero.dir)
    assert {p.staleness for p in plans(zero.dir)} == {0}
    assert "fixed_texts" not in zero.dir.iteration(0).meta("updates")


def before_update(loop: Loop, do: Any) -> None:
    """Something happens in the learner before it updates."""
    loop.learner.ready()
    target: Any = loop.learner.target  # type: ignore[attr-defined]
    update = target.update

    def late(rows: Any, iteration: int) -> Iterator[Any]:
        do(iteration)
        yield from update(rows, iteration)

    target.update = late


def voted(here: StageDir) -> bool:
    return here.is_complete("votes")


def test_the_next_iteration_is_judged_before_this_one_is_trained(tmp_path: Path) -> None:
    loop = with_header(stub_loop(tmp_path, stale_job(1)))
    said: list[str | None] = []

    def wait(k: int) -> None:
        if k < 4:
            until(lambda: voted(loop.dir.iteration(k + 1)), 120)
            said.append(status_of(loop.dir).at)

    before_update(loop, wait)
    loop.run()
    assert said[0] == "iteration 1 is at stage updates; iteration 2, ahead, at decisions"
    assert not [f.what for f in verify(loop.dir).findings]


def test_an_evaluation_waits_for_who_is_ahead(tmp_path: Path) -> None:
    """Two at once would be asked for answers of a policy that the sampler doesn't hold. What is waited for is shown."""
    shown: set[tuple[int, str]] = set()

    class Shows(Quiet):
        def stage(self, iteration: int, name: str, total: int, unit: str, text: str) -> None:
            shown.add((iteration, name))

    loop = stub_loop(tmp_path, stale_job(1, eval={"every": 1, "prompts": 3}), progress=Shows())
    loop.sampler.ready()
    target: Any = loop.sampler.target  # type: ignore[attr-defined]
    sample, inside = target.sample, Counter[str]()

    def alone(**kwargs: Any) -> Iterator[list[Completion]]:
        inside["now"] += 1
        inside["most"] = max(inside["most"], inside["now"])
        if kwargs["prefix"].isdecimal():  # an iteration, no evaluation
            until(lambda: (kwargs["iteration"], "sample") in shown, 20)
        yield from sample(**kwargs)
        inside["now"] -= 1

    target.sample = alone
    loop.run()
    assert inside["most"] == 1
    assert loop.dir.evaluations() == [0, 1, 2, 3, 4, 5]


def test_what_fails_ahead_is_told_at_its_turn_and_the_run_goes_on(tmp_path: Path) -> None:
    loop = stub_loop(tmp_path, stale_job(1))
    loop.judge.ready()
    target: Any = loop.judge.target  # type: ignore[attr-defined]
    cast = target.cast

    def failing(**kwargs: Any) -> Any:
        if any(c.completion_id.startswith("0002") for c in kwargs["candidates"]):
            raise RuntimeError("gone")
        return cast(**kwargs)

    target.cast = failing
    with pytest.raises(WorkerError, match="gone"):
        loop.run()
    assert loop.dir.done() == [0, 1]
    stub_loop(tmp_path, stale_job(1)).run()
    stub_loop(tmp_path / "whole", stale_job(1)).run()
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole" / "run")


def test_an_edit_counts_from_the_next_plan_that_is_written(tmp_path: Path) -> None:
    from tests.stubs import text

    loop = stub_loop(tmp_path, stale_job(1, constitution="rules"))
    (tmp_path / "constitutions" / "rules" / "v2.yaml").unlink()
    first = loop.dir.path / "iterations" / "0001" / "plan.json"

    def edit(k: int) -> None:
        if k == 0:
            until(first.exists, 120)
            (tmp_path / "constitutions" / "rules" / "v2.yaml").write_text(text(2))

    before_update(loop, edit)
    loop.run()
    assert [p.constitution.version for p in plans(loop.dir)] == [1, 1, 2, 2, 2]
    for k in range(5):
        asked = {v.ballot.constitution for v in loop.dir.iteration(k).read("votes", Vote)}
        assert asked == {loop.dir.plan(k).constitution.hash}


def test_a_pause_leaves_what_is_ahead(tmp_path: Path) -> None:
    job = stale_job(1, monitors={"kl": {"limit": 0, "action": "pause"}})
    paused_at = []
    while not (tmp_path / "run/iterations/0004/metrics.json").exists():
        try:
            stub_loop(tmp_path, job).run()
        except RunPaused:
            paused_at.append(len(RunDir(tmp_path / "run").done()))
    assert paused_at
    calm = stale_job(1, monitors={"kl": {"limit": 0}})
    stub_loop(tmp_path / "calm", calm).run()
    paused, whole = outcome(tmp_path / "run"), outcome(tmp_path / "calm" / "run")
    assert paused["rows"] == whole["rows"]
    assert paused["weights"] == whole["weights"]


def test_policies_that_are_sampled_from_later_stay(tmp_path: Path) -> None:
    """Also where a run goes on with more of it; what isn't kept any more is no reason to fail."""
    one_text = {"schedule": {0: "rules@1"}, "eval": {"every": 9, "prompts": 3}}
    stub_loop(tmp_path, stale_job(0, iterations=3, **one_text)).run()
    assert not (tmp_path / "run/iterations/0001/policy").exists()
    loop = with_header(stub_loop(tmp_path, stale_job(2, iterations=6, **one_text)))
    loop.run()
    assert [p.staleness for p in plans(loop.dir)] == [0, 0, 0, 0, 1, 2]
    assert not [f.what for f in verify(loop.dir).findings]


def test_a_source_has_nothing_to_be_stale(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"pipeline.staleness: a job with a `source` samples nothing"):
        stub_job(pipeline={"staleness": 1}, source={"run": "runs/a"})


def test_a_plan_that_names_another_policy_is_found(tmp_path: Path) -> None:
    loop = with_header(stub_loop(tmp_path, stale_job(1)))
    loop.run()
    path = loop.dir.iteration(3).path / "plan.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"staleness": 0}))
    assert [f.what for f in verify(loop.dir).findings if "names policy" in f.what]


# A run that was begun in fp32 and goes on in bf16: its older policies have to be rounded.


class Unplugged(Exception):
    pass


def unstreamed() -> Job:
    """An iteration in order is sampled in the main thread."""
    return stub_job(iterations=5, filters={"min_kept_pairs": 1}, pipeline={"staleness": 1, "stream": False})


def goes_on_in_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.stubs.StubSampler.computes_in", lambda self: "stub bf16")
    monkeypatch.setattr("tests.stubs.StubLearner.exports_in", lambda self: "bf16")


def learner_in_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two threads on one connection take each other's answers."""

    def guard(method: str) -> None:
        plain = getattr(InlineWorker, method)

        def guarded(self: InlineWorker, *args: Any, **kwargs: Any) -> Any:
            if self.name == "learner" and threading.current_thread() is not threading.main_thread():
                raise AssertionError(f"learner.{args[0]} from another thread")
            return plain(self, *args, **kwargs)

        monkeypatch.setattr(InlineWorker, method, guarded)

    guard("call")
    guard("stream")


def rounded(run: RunDir) -> list[tuple[int | None, str, bool]]:
    return [(e.iteration, e.data["policy"], "copy" in e.data) for e in run.events() if e.kind == "policy_rounded"]


def test_what_was_planned_in_fp32_asks_the_learner_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loop = stub_loop(tmp_path, unstreamed())
    planned = loop.dir.path / "iterations" / "0002" / "plan.json"

    def stop(k: int) -> None:
        if k == 1:
            until(planned.exists, 120)
            raise Unplugged

    before_update(loop, stop)
    monkeypatch.setattr("rlaif.loop.loop.sampled_and_judged", only_before(2))
    with pytest.raises(WorkerError, match="Unplugged"):
        loop.run()
    monkeypatch.undo()
    goes_on_in_bf16(monkeypatch)
    learner_in_one_thread(monkeypatch)
    again = stub_loop(tmp_path, unstreamed())
    again.run()
    run = again.dir
    assert rounded(run) == [(1, run.iteration(0).policy_made(), True)]
    sampled_as_planned(run)
    assert not list(run.path.glob("learner/*.partial"))
    stub_loop(tmp_path / "whole", unstreamed()).run()
    found, whole = outcome(tmp_path / "run"), outcome(tmp_path / "whole" / "run")
    assert (found["rows"], found["weights"]) == (whole["rows"], whole["weights"])


def test_a_policy_whose_state_is_gone_is_sampled_as_it_was_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The newest state alone is kept, and an iteration ahead may have sampled nothing yet."""
    loop = stub_loop(tmp_path, unstreamed())
    monkeypatch.setattr("rlaif.loop.loop.sampled_and_judged", only_before(2))
    with pytest.raises(Unplugged):
        loop.run()
    assert loop.dir.done() == [0, 1]
    monkeypatch.undo()
    goes_on_in_bf16(monkeypatch)
    learner_in_one_thread(monkeypatch)
    again = stub_loop(tmp_path, unstreamed())
    again.run()
    assert rounded(again.dir) == [(1, again.dir.iteration(0).policy_made(), False)]
    gap = metrics_of(again.dir)[2].weights_gap
    assert gap is not None
    assert (gap.exported, gap.sampler) == ("fp32", "stub bf16")
    assert [p.staleness for p in plans(again.dir)] == [0, 1, 1, 0, 1], "what isn't planned yet takes the newest"
    sampled_as_planned(again.dir)


def sampled_as_planned(run: RunDir) -> None:
    for plan in plans(run):
        assert {c.policy for c in run.iteration(plan.iteration).read("completions", Completion)} == {plan.policy}


def only_before(stop: int) -> Any:
    """Samples and judges no iteration from that one on."""

    def until(run: Running, it: Iteration) -> Iteration:
        if it.k >= stop:
            raise Unplugged
        return sampled_and_judged(run, it)

    return until


# Kills: at writes of every stage.


def killed(root: Path, judge: str, kills: int, settings: list[dict[str, Any]]) -> dict[str, Any]:
    """Runs below `root` that were killed and went on, and what the driver says of them."""
    arguments = [str(root), str(kills), "1", "--pipeline", judge, json.dumps(settings)]
    command = [sys.executable, "-m", "tests.kill_driver", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    said: dict[str, Any] = json.loads(done.stdout)
    assert len(said["kills"]) == kills
    return said


def assert_each_ends_as_the_unkilled_one(root: Path, said: dict[str, Any]) -> None:
    whole = root / "whole" / "run"
    expected, planned = log_of(whole), plans(RunDir(whole))
    for kill in said["kills"]:
        run = root / kill["folder"] / "run"
        assert kill["exits"][-1] == 0, kill
        assert log_of(run) == expected, kill["label"]
        assert plans(RunDir(run)) == planned, kill["label"]
        assert not list(run.rglob("*.partial")), kill["label"]
    assert {k["label"]: k["again"] for k in said["kills"] if k["again"]} == {}


@pytest.mark.parametrize("judge", ["chat", "likelihood"])
def test_killed_overlaps_end_as_the_unkilled_one_and_ask_nobody_twice(judge: str, tmp_path: Path) -> None:
    """They go on with another setting each time."""
    settings = [{"staleness": 1, "stream": stream} for stream in (False, True, False)]
    assert_each_ends_as_the_unkilled_one(tmp_path, killed(tmp_path, judge, 50, settings))


@pytest.mark.nightly
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("judge", ["chat", "likelihood"])
def test_a_hundred_kills_of_a_streamed_overlap(judge: str, tmp_path: Path) -> None:
    said = killed(tmp_path, judge, 100, [{"staleness": 1, "stream": True}] * 2)
    assert_each_ends_as_the_unkilled_one(tmp_path, said)
    assert sum(kill["exits"][0] == -signal.SIGKILL for kill in said["kills"]) >= 95  # few come after the end
    reached = {kill["stage"] for kill in said["kills"]}
    assert reached == {stage for stage in said["stages"] if stage.startswith("iterations/")}
