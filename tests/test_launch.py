"""A start that got nowhere leaves nothing that a corrected one would use, and is refused before it costs anything."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rlaif.config import load_job
from rlaif.errors import RunInterrupted, UserError, WorkerError
from rlaif.loop import launch
from rlaif.records import Completion, Prompt
from rlaif.rundir.store import RunDir, read_rows
from tests.conftest import make_project, project_job
from tests.stubs import Quiet, text

ROOT = Path(__file__).resolve().parent.parent


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
        width = 1

        def __init__(self, mode: str, name: str, *_: Any) -> None:
            self.name = name
            calls.append(f"start {name}")

        def poll(self, timeout_s: float) -> bool:
            return True

        def ready(self) -> None:
            calls.append(f"ready {self.name}")

        def call(self, method: str, **_: Any) -> list[Any]:
            assert (self.name, method) == ("sampler", "problems")
            return []

        def tell(self, method: str) -> None:
            assert method == "rest"
            calls.append(f"rest {self.name}")

        def close(self) -> None: ...

    monkeypatch.setattr(launch, "Loop", NoLoop)
    monkeypatch.setattr(launch, "start_worker", NoWorker)
    monkeypatch.setattr(launch, "gpu_names", list)
    return calls


def test_the_code_of_a_checkout_is_known_by_its_revision() -> None:
    git = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
    done = subprocess.run(git, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip("no git checkout; there the header of a run would name the revision")
    assert launch.revision() == done.stdout.strip()


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


# Every prompt is rendered and measured before one is sampled.


def refusal(root: Path, *settings: str) -> str:
    with pytest.raises(UserError) as refused:
        launch.execute(load_job(root / "tiny.yaml", list(settings)), root / "run", root, Quiet())
    assert not (root / "run/run.json").exists()
    assert "\n" not in str(refused.value)
    return str(refused.value)


class Noted(Quiet):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, message: str) -> None:
        self.notes.append(message)


@pytest.fixture
def long_prompts(tmp_path: Path, tiny_model: Path) -> Path:
    """The tiny project, with prompts of 400 words in both files."""
    make_project(tmp_path, tiny_model, iterations=1)
    for name, at in (("train", 5), ("held_out", 2)):
        rows = (tmp_path / f"{name}.jsonl").read_text().splitlines()
        rows.insert(at, json.dumps({"id": f"long_{name}", "prompt": f"w{at} " * 400}))
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows) + "\n")
    return tmp_path


def test_a_prompt_that_leaves_no_room_is_named_at_the_start(long_prompts: Path) -> None:
    said = refusal(long_prompts)
    found = "a prompt of 401 tokens and an answer of up to 12 need 413"
    assert said.startswith(f"{long_prompts / 'train.jsonl'}:6: {found}")
    assert "sampling.max_model_len is 64; raise it" in said
    assert said.endswith("prompts.too_long=drop (1 more like it)")


def test_prompts_that_leave_no_room_are_dropped_where_the_job_says_so(long_prompts: Path) -> None:
    progress = Noted()
    job = load_job(long_prompts / "tiny.yaml", ["prompts.too_long=drop"])
    run = launch.execute(job, long_prompts / "run", long_prompts, progress)
    places = [f"{long_prompts / 'train.jsonl'}:6", f"{long_prompts / 'held_out.jsonl'}:3"]
    assert f"2 prompts are too long and left out: {', '.join(places)}" in progress.notes
    for name, count in (("train", 12), ("held_out", 4)):
        prompts = read_rows(run.path / f"prompts/{name}.jsonl", Prompt)
        assert len(prompts) == count
        assert f"long_{name}" not in {p.id for p in prompts}


def test_too_few_prompts_that_fit_are_said_at_the_start(tmp_path: Path, tiny_model: Path) -> None:
    make_project(tmp_path, tiny_model)
    for name, shown in (
        ("train", "prompts.per_iteration: needs 6 prompts, and 0 of train.jsonl aren't too long"),
        ("held_out", "prompts.held_out: needs 1 prompts, and 0 of held_out.jsonl aren't too long"),
    ):
        kept = (tmp_path / f"{name}.jsonl").read_text()
        rows = [{"id": f"x{name}{i}", "prompt": f"w{i + 3} " * 80} for i in range(8)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
        assert shown in refusal(tmp_path, "prompts.too_long=drop")
        (tmp_path / f"{name}.jsonl").write_text(kept)


def test_a_prompt_that_the_template_cant_show_is_named_at_the_start(tmp_path: Path, tiny_model: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    make_project(tmp_path, model)
    parts = "{% for m in messages %}{% for part in m['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }} "
    parts += "{% endif %}{% endfor %}{% endfor %}w1"
    for template, said in (
        ("{% for m in messages %}w5 {% endfor %}w1", ":1: the policy's chat template leaves the user's message"),
        ("{{ raise_exception('no chats') }}", ":1: the policy's chat template refuses the roles user (no chats)"),
        ("{% for m in messages %}{{ m['content'][:20] }} {% endfor %}w1", ":3: the policy's chat template renders"),
    ):
        (model / "chat_template.jinja").write_text(template)
        rows = (tmp_path / "train.jsonl").read_text().splitlines()
        rows[2] = json.dumps({"id": "words", "prompt": "w3 w4 w5 w6 w7 w8 w9 w10 w11"})
        (tmp_path / "train.jsonl").write_text("\n".join(rows) + "\n")
        assert f"{tmp_path / 'train.jsonl'}{said}" in refusal(tmp_path, "prompts.too_long=drop")
    (model / "chat_template.jinja").write_text(parts)
    run = launch.execute(load_job(tmp_path / "tiny.yaml", ["iterations=1"]), tmp_path / "run", tmp_path, Quiet())
    asked = {c.prompt_id: c.prompt_token_ids for c in run.iteration(0).read("completions", Completion)}
    assert len(set(asked.values())) == len(asked) == 6


def test_each_role_runs_where_the_job_places_it(
    tmp_path: Path, only_start, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    places: dict[str, Any] = {}
    no_worker = launch.start_worker

    def noted(kind: str, name: str, *more: Any) -> Any:
        places[name] = kind, more[-1]
        return no_worker(kind, name, *more)

    monkeypatch.setattr(launch, "start_worker", noted)
    monkeypatch.setattr(launch, "gpu_names", lambda: ["one", "two"])
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    make_project(tmp_path, tiny_model)
    where = {"judge": {"worker": "inline"}, "learner": {"devices": [0]}}
    start(tmp_path, workers="process", placement=where)
    assert places == {
        "sampler": ("process", {"CUDA_VISIBLE_DEVICES": "1"}),
        "learner": ("process", {"CUDA_VISIBLE_DEVICES": "0"}),
        "judge": ("inline", None),
    }


@pytest.mark.parametrize(
    ("more", "left"), [({}, ["1", "2", "3"]), ({"learner": {"processes": 2}}, ["0", "1", "2", "3"])]
)
def test_a_cluster_of_this_machine_gets_the_gpus_that_the_loops_roles_leave(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch, more: dict[str, Any], left: list[str]
) -> None:
    given: list[list[str]] = []

    def no_cluster(settings: Any, logs: Path, gpus: list[str]) -> None:
        given.append(gpus)
        raise UserError("no cluster here")

    monkeypatch.setattr(launch, "RayCluster", no_cluster)
    monkeypatch.setattr(launch, "gpu_names", lambda: ["H100"] * 4)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    cluster = {"sampler": {"replicas": 2}, "judge": {"replicas": 1}, **more}
    job = project_job(tmp_path, tiny_model, workers="process", cluster=cluster)
    with pytest.raises(UserError, match="no cluster here"):
        launch.execute(job, tmp_path / "run", tmp_path, Quiet())
    assert given == [left]


def test_a_gpu_that_is_not_there_is_refused_before_anything(tmp_path: Path, only_start, tiny_model: Path) -> None:
    make_project(tmp_path, tiny_model)
    job = load_job(tmp_path / "tiny.yaml", ["placement.judge.devices=[0]"])
    with pytest.raises(UserError, match=r"placement\.judge\.devices: no GPU 0; this process can use none"):
        launch.execute(job, tmp_path / "run", tmp_path, Quiet())
    assert not (tmp_path / "run").exists()


def test_vllm_loads_alone_on_a_gpu(
    tmp_path: Path, only_start: list[str], tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "gpu_names", lambda: ["one"])
    make_project(tmp_path, tiny_model)
    start(tmp_path, **{"sampling.engine": "vllm"})
    assert only_start == [
        "start sampler", "ready sampler", "start learner", "start judge", "ready learner", "ready judge",
    ]  # fmt: skip


def test_roles_that_share_a_gpu_load_one_after_the_other(
    tmp_path: Path, only_start: list[str], tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "gpu_names", lambda: ["one"])
    make_project(tmp_path, tiny_model)
    start(tmp_path, device="shared")
    assert only_start == [
        f"{what} {name}" for name in ("sampler", "learner", "judge") for what in ("start", "ready", "rest")
    ]  # fmt: skip


def test_without_a_gpu_nobody_takes_turns_and_it_is_said(
    tmp_path: Path, only_start: list[str], tiny_model: Path
) -> None:
    make_project(tmp_path, tiny_model)
    progress = Quiet()
    job = load_job(tmp_path / "tiny.yaml", ["device=shared"])
    with pytest.raises(RunInterrupted):
        launch.execute(job, tmp_path / "run", tmp_path, progress)
    assert not any(call.startswith("rest") for call in only_start)
    assert "device: shared has no effect here, since there is no GPU" in progress.notes


def test_a_class_without_rest_keeps_its_memory_and_it_is_said(
    tmp_path: Path, only_start: list[str], tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "gpu_names", lambda: ["one"])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    make_project(tmp_path, tiny_model)
    for rests in (False, True):
        methods = ["sample", "load", "logprobs", *(["rest", "wake"] if rests else [])]
        name = f"engine_{rests}".lower()
        body = "\n".join(f"    def {method}(self, *_): ..." for method in methods)
        (tmp_path / f"{name}.py").write_text(f"class Engine:\n{body}\n")
        only_start.clear()
        progress = Quiet()
        job = load_job(tmp_path / "tiny.yaml", ["device=shared", f"sampling.engine={name}:Engine"])
        with pytest.raises(RunInterrupted):
            launch.execute(job, tmp_path / name, tmp_path, progress)
        assert ("rest sampler" in only_start) == rests
        assert any("has no `rest` and `wake`" in note for note in progress.notes) == (not rests)


def test_code_that_was_corrected_before_anything_was_sampled_is_the_runs(
    tmp_path: Path, tiny_model: Path, only_start: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    make_project(tmp_path, tiny_model)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    found = []
    for body in ("return 'no'", "return None"):
        (tmp_path / "strict.py").write_text(f"def rule(verdict, filters):\n    {body}\n")
        run = start(tmp_path, **{"filters.rules": ["strict:rule"]})
        run.iteration(0).path.mkdir(parents=True, exist_ok=True)
        (run.iteration(0).path / "plan.json").write_text("{}")
        found.append(run.header["own_code"]["strict:rule"])
        sys.modules.pop("strict", None)
    assert found[0] != found[1] == hashlib.sha256((tmp_path / "strict.py").read_bytes()).hexdigest()
