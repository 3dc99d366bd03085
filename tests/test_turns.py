"""Roles that share a device: who rests, who wakes, in which order; and that a run which takes turns is the same run."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rlaif.config import Job, OwnJudge, parse_job
from rlaif.errors import RlaifError, UserError
from rlaif.judging.kinds import kind_of
from rlaif.loop import Loop, launch
from rlaif.loop.streaming import streams
from rlaif.rundir.store import RunDir
from rlaif.sampling.role import SamplerRole
from rlaif.workers.feed import Feed
from rlaif.workers.inline import InlineWorker
from rlaif.workers.placement import Placed
from rlaif.workers.turns import WITHOUT_DEVICE, OfWorker, Turns
from rlaif.workers.worker import Piece, Worker
from tests.conftest import project_job
from tests.stubs import Quiet, stub_job, stub_loop
from tests.test_feeding import fed_loop
from tests.test_streaming import log_of
from tests.unmapped import unmap


class Device:
    """What was asked of roles, in order; and whether anybody worked who wasn't alone on it."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.awake: set[str] = set()

    def worked(self, role: str) -> None:
        assert self.awake == {role}, f"{role} works while {sorted(self.awake)} are awake"
        if self.said[-1:] != [f"{role} works"]:
            self.said.append(f"{role} works")


class Role:
    """Rests and wakes on a device; `fails` says at what."""

    def __init__(self, name: str, device: Device) -> None:
        self.name, self.device, self.fails = name, device, ""
        device.awake.add(name)

    def rest(self) -> None:
        self.device.said.append(f"{self.name} rests")
        if self.fails == "rest":
            raise RlaifError("it doesn't rest")
        self.device.awake.discard(self.name)

    def wake(self) -> None:
        self.device.said.append(f"{self.name} wakes")
        self.device.awake.add(self.name)
        if self.fails == "wake":
            raise RlaifError("no memory left")


class Works:
    """A worker's object."""

    def __init__(self, name: str, device: Device) -> None:
        self._name, self._device = name, device

    def work(self) -> str:
        self._device.worked(self._name)
        return self._name

    def items(self) -> Iterator[int]:
        for n in range(3):
            self._device.worked(self._name)
            yield n

    def computes_in(self) -> str:
        return "fp32"


def works(name: str, device: Device) -> Works:
    return Works(name, device)


@pytest.fixture
def device() -> Device:
    return Device()


def roles(device: Device, **gpus: str) -> tuple[Turns, dict[str, Role], dict[str, Worker]]:
    """Roles by name, each with the GPUs that it sees."""
    turns, made, workers = Turns(), {}, {}
    for name, mine in gpus.items():
        made[name] = Role(name, device)
        turns.join(name, made[name], mine.split())
        worker = InlineWorker(name, f"{__name__}:works", {"name": name, "device": device})
        workers[name] = turns.worker(name, worker)
    device.said.clear()
    return turns, made, workers


def test_whoever_joins_rests_before_the_next_is_built(device: Device) -> None:
    turns = Turns()
    for name in ("sampler", "learner"):
        role = Role(name, device)
        assert device.awake == {name}, "who was built before holds nothing"
        turns.join(name, role, ())
    assert device.said == ["sampler rests", "learner rests"]
    assert turns.roles == ["sampler", "learner"]


def test_the_others_rest_before_one_wakes_and_nobody_rests_for_nothing(device: Device) -> None:
    _, _, by = roles(device, sampler="", judge="", learner="")
    assert by["sampler"].call("work") == by["sampler"].call("work") == "sampler"
    assert list(by["judge"].stream("items")) == [0, 1, 2]
    by["judge"].tell("work")
    assert by["learner"].each("work") == ["learner"]
    assert device.said == [
        "sampler wakes", "sampler works",
        "sampler rests", "judge wakes", "judge works",
        "judge rests", "learner wakes", "learner works",
    ]  # fmt: skip


def test_a_piece_takes_the_turn_when_it_is_worked_on(device: Device) -> None:
    _, _, by = roles(device, sampler="", judge="")
    pieces: list[Piece] = [lambda done: {}, lambda done: None]
    chunks = by["judge"].spread("items", pieces)
    assert by["sampler"].call("work") == "sampler"
    assert list(chunks) == [0, 1, 2]
    assert device.said[-3:] == ["sampler rests", "judge wakes", "judge works"]


def test_what_needs_no_device_disturbs_nobody(device: Device) -> None:
    _, _, by = roles(device, sampler="", learner="")
    by["learner"].call("work")
    assert by["sampler"].call("computes_in") == "fp32"
    assert device.said == ["learner wakes", "learner works"]


@pytest.mark.slow
def test_the_methods_without_a_device_are_methods() -> None:
    learning = pytest.importorskip("rlaif.learning.dpo")
    there = {name for of in (SamplerRole, learning.DpoLearner) for name in dir(of)}
    assert there >= WITHOUT_DEVICE


def test_roles_with_gpus_of_their_own_work_side_by_side(device: Device) -> None:
    turns, _, _ = roles(device, sampler="0 1", learner="1", judge="2", reference="")
    with turns.of("sampler"), turns.of("judge"):
        assert device.awake == {"sampler", "judge"}
    with turns.of("learner"):
        assert device.awake == {"learner", "judge"}, "GPU 1 is the sampler's, too"
    with turns.of("reference"):
        assert device.awake == {"reference"}, "it sees all of them"


def test_who_takes_no_part_is_called_as_ever(device: Device) -> None:
    turns, _, _ = roles(device, sampler="")
    worker = InlineWorker("judge", f"{__name__}:works", {"name": "judge", "device": device})
    assert turns.worker("judge", worker) is worker


def test_one_that_fails_to_wake_rests_before_another_works(device: Device) -> None:
    _, made, by = roles(device, sampler="", learner="")
    made["learner"].fails = "wake"
    with pytest.raises(RlaifError, match="no memory left"):
        by["learner"].call("work")
    by["sampler"].call("work")
    assert device.said == ["learner wakes", "learner rests", "sampler wakes", "sampler works"]


def test_one_that_failed_to_wake_is_woken_again_before_it_works(device: Device) -> None:
    _, made, by = roles(device, learner="")
    made["learner"].fails = "wake"
    with pytest.raises(RlaifError, match="no memory left"):
        by["learner"].call("work")
    made["learner"].fails = ""
    by["learner"].call("work")
    assert device.said == ["learner wakes", "learner wakes", "learner works"]


@pytest.mark.parametrize(
    ("servers", "sampler", "share"),
    [("", "0", True), ("2", "", True), ("1 2", "2", True), ("2", "0 1", False)],
)
def test_a_judges_servers_rest_only_for_who_sees_their_gpus(servers: str, sampler: str, share: bool) -> None:
    places = {
        name: Placed("process", tuple(gpus.split()))
        for name, gpus in (("servers", servers), ("sampler", sampler), ("reference", "9"))
    }
    assert launch.gpus_in_common(places, ["sampler", "reference"]) is share
    assert not launch.gpus_in_common(places, [])


def test_nobody_wakes_beside_one_that_doesnt_rest(device: Device) -> None:
    _, made, by = roles(device, sampler="", learner="")
    by["learner"].call("work")
    made["learner"].fails = "rest"
    with pytest.raises(RlaifError, match="it doesn't rest"):
        by["sampler"].call("work")
    assert device.awake == {"learner"}
    made["learner"].fails = ""
    by["sampler"].call("work")
    assert device.awake == {"sampler"}


def test_one_whose_call_fails_rests_before_another_works(device: Device) -> None:
    _, _, by = roles(device, sampler="", learner="")
    with pytest.raises(RlaifError, match="no attribute"):
        by["learner"].call("unknown")
    assert device.awake == {"learner"}
    by["sampler"].call("work")
    assert device.awake == {"sampler"}


def test_another_is_refused_while_a_stream_is_open(device: Device) -> None:
    _, _, by = roles(device, sampler="", learner="")
    stream = by["learner"].stream("items")
    next(stream)
    with pytest.raises(RuntimeError, match="close the open stream"):
        by["sampler"].call("work")
    assert device.awake == {"learner"}
    stream.close()
    by["sampler"].call("work")


# ---- a whole run


class OnDevice(Worker):
    """A worker whose calls need the device, but for those that are known not to."""

    def __init__(self, worker: Worker, role: str, device: Device) -> None:
        self._worker, self._role, self._device = worker, role, device
        self.name = worker.name

    def ready(self) -> None:
        self._worker.ready()

    def call(self, method: str, **kwargs: Any) -> Any:
        if method not in WITHOUT_DEVICE:
            self._device.worked(self._role)
        return self._worker.call(method, **kwargs)

    def stream(self, method: str, feed: Feed | None = None, **kwargs: Any) -> Iterator[Any]:
        for item in self._worker.stream(method, feed=feed, **kwargs):
            self._device.worked(self._role)
            yield item


def in_turns(loop: Loop, device: Device) -> Loop:
    """The loop with stub workers that take turns with a device."""
    turns = Turns()

    def taking(role: str, worker: Worker) -> Worker:
        turns.join(role, Role(role, device), ())
        return turns.worker(role, OnDevice(worker, role, device))

    loop.sampler, loop.learner = taking("sampler", loop.sampler), taking("learner", loop.learner)
    loop.judge = loop.measurer = taking("judge", loop.judge)
    if loop.referee:
        loop.referee = replace(loop.referee, worker=taking("reference", loop.referee.worker))
    return loop


def everything(**changes: Any) -> Job:
    """Whatever asks a worker: retention, a reference judge, old pairs judged again, a reference that changes."""
    return stub_job(
        **changes,
        eval={"every": 1, "prompts": 3, "retention": True, "reference_judge": {"kind": "likelihood"}},
        replay={"share": 0.4, "on_change": "rejudge", "half_distance": 0.1},
        learner={"reference": "at_change"},
        monitors={"anchors": {"every": 1}},
    )


@pytest.mark.slow
def test_a_run_that_takes_turns_is_the_run_that_doesnt(tmp_path: Path, device: Device) -> None:
    logs = []
    for name, shared in (("together", None), ("turns", "shared")):
        loop = stub_loop(tmp_path, everything(device=shared), name=name)
        (in_turns(loop, device) if shared else loop).run()
        logs.append(log_of(loop.dir.path))
    assert logs[0]["rows"], "or else nothing is compared"
    assert logs[0] == logs[1]
    assert {said.split()[0] for said in device.said if said.endswith("works")} == {
        "sampler", "judge", "reference", "learner",
    }  # fmt: skip


def test_an_iteration_in_turns(tmp_path: Path, device: Device) -> None:
    evaluated = {"every": 9, "prompts": 3, "kl_prompts": 0}
    job = stub_job(iterations=1, constitution="rules@1", eval=evaluated, device="shared")
    loop = in_turns(stub_loop(tmp_path, job), device)
    loop.run()
    worked = [said.removesuffix(" works") for said in device.said if said.endswith("works")]
    assert worked == [
        *("learner", "sampler", "judge"),  # the base policy: both compared, answers, their sanity
        *("sampler", "learner", "judge", "learner"),  # sampled, scored again, judged, trained and saved
        *("sampler", "judge"),  # loaded, compared with what the learner said when it was awake, answers; judged
    ]


def test_a_run_that_was_stopped_in_its_turn_goes_on(tmp_path: Path, device: Device) -> None:
    whole = stub_loop(tmp_path, name="whole")
    whole.run()
    with pytest.raises(RlaifError, match="the loss is nan"):
        in_turns(stub_loop(tmp_path, stub_job(device="shared"), nan_at=2), device).run()
    assert device.awake == {"learner"}
    again = Device()  # a new process: whoever loads has the memory first
    loop = in_turns(stub_loop(tmp_path, stub_job(device="shared")), again)
    loop.run()
    assert log_of(loop.dir.path) == log_of(whole.dir.path)


def test_a_sampler_that_keeps_old_weights_is_found_out_in_turns(tmp_path: Path, device: Device) -> None:
    loop = in_turns(stub_loop(tmp_path, stub_job(device="shared"), forgetful=True), device)
    with pytest.raises(RlaifError, match="doesn't hold the policy that is trained"):
        loop.run()


def test_a_judges_servers_take_its_turn(tmp_path: Path, device: Device) -> None:
    """The judge itself waits for them, and holds nothing."""
    logs = []
    for name in ("together", "turns"):
        loop = fed_loop(tmp_path / name, pipeline={"stream": False})
        if name == "turns":
            loop = in_turns(loop, device)
        loop.run()
        logs.append(log_of(loop.dir.path))
    assert logs[0] == logs[1]
    assert "judge works" in device.said


@pytest.mark.slow
def test_a_real_run_in_turns_is_the_run_that_doesnt_take_any(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Models that really give their memory back, on a CPU that is taken for a GPU."""
    unmap(monkeypatch)
    taken: list[str] = []
    turn = Turns.of

    def noted(turns: Turns, name: str) -> Any:
        taken.append(name)
        return turn(turns, name)

    monkeypatch.setattr(Turns, "of", noted)
    logs, notes = [], []
    for device in (None, "shared"):
        root = tmp_path / str(device)
        root.mkdir()
        monkeypatch.setattr(launch, "gpu_names", lambda device=device: ["one"] if device else [])
        progress = Quiet()
        job = project_job(root, tiny_model, iterations=2, constitution="rules@1", device=device)
        run = launch.execute(job, root / "run", root, progress)
        logs.append(log_of(run.path))
        notes.append(progress.notes)
        assert bool(taken) == bool(device)
    assert logs[0]["rows"], "or else nothing is compared"
    assert logs[0]["rows"] == logs[1]["rows"]
    digests = [RunDir(tmp_path / name / "run").iteration(1).policy_made() for name in ("None", "shared")]
    assert digests[0] == digests[1] is not None
    assert {"sampler", "learner", "judge"} <= {*taken}
    assert any("sampler, learner, judge take turns with the GPU's memory" in note for note in notes[1])


@pytest.mark.parametrize("rests", [False, True])
def test_a_judge_of_ones_own_takes_part_when_it_can_rest(
    rests: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    module = f"own_judge_{rests}".lower()
    methods = "    def rest(self): self.turn = 'rest'\n    def wake(self): self.turn = 'wake'\n" if rests else ""
    (tmp_path / f"{module}.py").write_text(
        "class Judge:\n    def __init__(self, settings): SEEN.append(self)\n    def cast(self, *_): ...\n"
        f"{methods}SEEN = []\n"
    )
    settings = job(judge={"kind": f"{module}:Judge"}).judge
    kind = kind_of(settings)
    assert kind.rests == rests
    if rests:
        assert isinstance(settings, OwnJudge)
        worker = InlineWorker("judge", *kind.worker(None, (), tmp_path))
        turns, turned = Turns(), []
        turns.join("judge", OfWorker(worker), ())
        [inside] = sys.modules[module].SEEN
        turned.append(inside.turn)
        with turns.of("judge"):
            turned.append(inside.turn)
        assert turned == ["rest", "wake"]


# ---- what a job may say


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"pipeline": {"staleness": 1}}, r"pipeline\.staleness: not with `device: shared`"),
        ({"pipeline": {"stream": True}}, r"pipeline\.stream: not with `device: shared`"),
        ({"cluster": {"sampler": {"replicas": 2}}}, r"cluster: not with `device: shared`"),
        ({"device": "own"}, r"device: .*'shared'"),
    ],
)
def test_what_works_at_the_same_time_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        job(**{"device": "shared"} | changes)


def job(**changes: Any) -> Job:
    return parse_job({"constitution": "rules", **changes}, "test")


REMOTE = {"kind": "chat", "model": "m", "api_key_env": None}
SERVED = {"kind": "chat", "serve": {"model": "m"}}


def test_who_takes_turns_is_not_streamed() -> None:
    apart = {name: Placed("process", (str(n),)) for n, name in enumerate(("sampler", "learner", "judge", "servers"))}
    for judge in ({}, SERVED):
        assert streams(job(judge=judge), apart)
        assert not streams(job(judge=judge, device="shared"), apart)
    with pytest.raises(UserError, match=r"pipeline\.stream"):
        job(judge=SERVED, device="shared", pipeline={"stream": True})
    assert streams(job(judge=REMOTE, device="shared"), apart), "a judge elsewhere has no turn to wait for"
    assert streams(job(judge=REMOTE, device="shared", pipeline={"stream": True}), apart)


def test_of_a_shared_device_each_may_take_most() -> None:
    assert job().sampling.gpu_memory_utilization == 0.4
    assert job(device="shared").sampling.gpu_memory_utilization == 0.8
    own = job(device="shared", sampling={"gpu_memory_utilization": 0.5, "max_tokens": 9}).sampling
    assert (own.gpu_memory_utilization, own.max_tokens) == (0.5, 9)
    stored = job(device="shared")
    assert parse_job(stored.model_dump(mode="json"), "run.json") == stored
