"""A start that got nowhere leaves nothing that a corrected one would use, and is refused before it costs anything."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from rlaif import launch
from rlaif.config import load_job
from rlaif.errors import RunInterrupted, UserError, WorkerError
from rlaif.records import Prompt
from rlaif.store import RunDir, read_rows
from tests.conftest import make_project, project_job
from tests.stubs import Quiet, text


class NoLoop:
    """Stands for the loop where only the start matters."""

    def __init__(self, *_: Any, **settings: Any) -> None:
        self.settings = settings

    def run(self) -> None:
        raise KeyboardInterrupt


@pytest.fixture
def only_start(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """No loop and no workers; the calls that the start makes to workers."""
    calls: list[str] = []

    class NoWorker:
        def __init__(self, mode: str, name: str, *_: Any) -> None:
            self.name = name
            calls.append(f"start {name}")

        def poll(self, timeout_s: float) -> bool:
            return True

        def ready(self) -> None:
            calls.append(f"ready {self.name}")

        def close(self) -> None: ...

    monkeypatch.setattr(launch, "Loop", NoLoop)
    monkeypatch.setattr(launch, "start_worker", NoWorker)
    monkeypatch.setattr(launch, "gpu_names", list)
    return calls


def start(root: Path, **changes: Any) -> RunDir:
    """Starts the tiny project's job, as far as `NoLoop`."""
    from rlaif.errors import RunInterrupted

    job = load_job(root / "tiny.yaml", [f"{key}={json.dumps(value)}" for key, value in changes.items()])
    with pytest.raises(RunInterrupted):
        launch.execute(job, root / "run", root, Quiet())
    return RunDir(root / "run")


@pytest.mark.parametrize("wrong", [{"policy.model": "./nope"}, {"filters.calibration": "nope.json"}])
def test_a_corrected_job_uses_nothing_of_a_failed_start(
    tmp_path: Path, tiny_model: Path, only_start: list[str], wrong: dict[str, str]
) -> None:
    make_project(tmp_path, tiny_model)
    job = load_job(tmp_path / "tiny.yaml", [f"{key}={value}" for key, value in wrong.items()])
    with pytest.raises(UserError, match="nope"):
        launch.execute(job, tmp_path / "run", tmp_path, Quiet())
    assert only_start == []
    assert not (tmp_path / "run/run.json").exists()

    (tmp_path / "constitutions/rules/v1.yaml").write_text(text(5))
    rows = [{"id": f"other{i}", "prompt": f"w{i + 3} w9"} for i in range(8)]
    (tmp_path / "other.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    run = start(tmp_path, **{"prompts.train": "other.jsonl"})
    assert {p.id for p in read_rows(run.path / "prompts/train.jsonl", Prompt)} == {r["id"] for r in rows}
    pins = json.loads((run.path / "constitutions/pins.json").read_text())
    assert (run.path / "constitutions" / pins["rules@1"] / "source.yaml").read_text() == text(5)
    assert {p.name for p in (run.path / "constitutions").iterdir()} == {"pins.json", *pins.values()}
    assert run.header["job"]["prompts"]["train"] == "other.jsonl"


def test_a_job_may_change_until_something_is_sampled(tmp_path: Path, tiny_model: Path, only_start: list[str]) -> None:
    make_project(tmp_path, tiny_model)
    run = start(tmp_path)
    run.iteration(0).path.mkdir(parents=True)
    (run.iteration(0).path / "plan.json").write_text("{}")
    for _ in range(2):  # another job whose start fails is no reason to refuse the next one
        with pytest.raises(UserError, match="nope"):
            launch.execute(load_job(tmp_path / "tiny.yaml", ["policy.model=./nope"]), run.path, tmp_path, Quiet())
    run = start(tmp_path, seed=3)
    assert run.header["job"]["seed"] == 3
    assert [e.kind for e in run.events()] == ["started", "stopped"]
    assert not (run.iteration(0).path / "plan.json").exists()

    run.evaluation(0).path.mkdir(parents=True)
    (run.evaluation(0).path / "completions.jsonl").write_text("{}\n")
    with pytest.raises(UserError, match=r"seed \(3 -> 4\)"):
        launch.execute(load_job(tmp_path / "tiny.yaml", ["seed=4"]), run.path, tmp_path, Quiet())


def test_a_folder_that_is_no_run_is_left_alone(tmp_path: Path, tiny_model: Path) -> None:
    job = project_job(tmp_path, tiny_model)
    before = sorted(p for p in tmp_path.rglob("*"))
    with pytest.raises(UserError, match=r"holds `constitutions` but no run\.json"):
        launch.execute(job, tmp_path, tmp_path, Quiet())
    assert sorted(p for p in tmp_path.rglob("*") if p.name != ".lock") == before


def test_a_start_says_which_workers_load_and_when_each_is_ready(tmp_path: Path, only_start, tiny_model: Path) -> None:
    make_project(tmp_path, tiny_model)
    progress = Quiet()
    with pytest.raises(RunInterrupted):
        launch.execute(load_job(tmp_path / "tiny.yaml"), tmp_path / "run", tmp_path, progress)
    said = [re.sub(r"\d\.\d", "N", note) for note in progress.notes if "load" in note or "ready" in note]
    assert said == [
        "loading sampler, learner, judge; a line when each is ready",
        f"sampler ready after N s: {tiny_model} in transformers; waiting for learner, judge",
        f"learner ready after N s: {tiny_model} and its dpo trainer; waiting for judge",
        f"judge ready after N s: {tiny_model} (likelihood)",
    ]


def test_workers_load_together_and_are_ready_before_there_is_a_run(
    tmp_path: Path, tiny_model: Path, only_start: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    make_project(tmp_path, tiny_model)
    start(tmp_path)
    names = ["sampler", "learner", "judge"]
    assert only_start[:6] == [*(f"start {n}" for n in names), *(f"ready {n}" for n in names)]
    only_start.clear()
    monkeypatch.setattr(launch, "gpu_names", lambda: ["A100"])
    start(tmp_path, **{"sampling.engine": "vllm"})
    assert only_start[:3] == ["start sampler", "ready sampler", "start learner"]


def test_a_setting_that_the_learner_refuses_is_found_before_anything_is_sampled(
    tmp_path: Path, tiny_model: Path
) -> None:
    pytest.importorskip("trl")
    make_project(tmp_path, tiny_model)
    job = load_job(tmp_path / "tiny.yaml", ["learner.args.weigth_decay=0.1"])
    with pytest.raises((UserError, WorkerError), match="did you mean `weight_decay`"):
        launch.execute(job, tmp_path / "run", tmp_path, Quiet())
    assert not (tmp_path / "run/run.json").exists()
    assert not (tmp_path / "run/evaluations").exists()
