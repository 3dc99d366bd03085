"""Runs on Ray whose processes and machines are killed on the way: on a cluster of the run's own, and on three nodes."""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest

from rlaif.records import IterationMetrics, UpdateStep
from rlaif.rundir.store import RunDir
from tests.conftest import make_project, project_job, until
from tests.test_launched import ON_CPUS, write
from tests.test_ray import with_ray

pytestmark = [pytest.mark.nightly, pytest.mark.timeout(1800)]
ROOT = Path(__file__).resolve().parent.parent


class Killing:
    """A progress that kills a machine in each stage that it is told: one that has who works at it."""

    def __init__(self, cluster: Any, stages: list[tuple[int, str]]) -> None:
        self._cluster, self._left, self._now = cluster, list(stages), (-1, "")
        self.killed: list[tuple[int, str]] = []
        self.notes: list[str] = []
        self._kills = ThreadPoolExecutor(1)
        """A machine ends with the thread that made it, and a run that streams judges in threads that come and go."""

    def stage(self, iteration: int, name: str, total: int, unit: str, text: str) -> None:
        self._now = (iteration, name)

    def advance(self, n: int) -> None:
        if self._now in self._left:
            self._left.remove(self._now)
            self.killed.append(self._now)
            self._kills.submit(self._kill, WORKS_AT[self._now[1]]).result()

    def _kill(self, role: str) -> None:
        busy = nodes_of(role)
        doomed = next(node for node in self._cluster.list_all_nodes() if node.node_id in busy)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("signal.signal", lambda *_: None)  # Ray takes some, which the main thread alone may
            self._cluster.remove_node(doomed, allow_graceful=False)
            self._cluster.add_node(num_cpus=2, wait=False)

    def iteration_done(self, iteration: int, metrics: IterationMetrics) -> None: ...
    def note(self, message: str) -> None:
        self.notes.append(message)


class KillingALearner(Killing):
    """One that kills a learner's process on this machine."""

    def advance(self, n: int) -> None:
        if self._now in self._left:
            self._left.remove(self._now)
            children = psutil.Process().children(recursive=True)
            [learner] = [p for p in children if any(f.path.endswith("learner-2.log") for f in p.open_files())]
            learner.kill()


WORKS_AT = {
    "sample": "sampler",
    "score": "judge",
    "judge": "judge",
    "update": "learner",
    "held-out": "sampler",
    "sanity": "judge",
}


def nodes_of(role: str) -> set[str]:
    """Where a role's workers are."""
    from ray.util import placement_group_table

    groups = [g for g in placement_group_table().values() if g["name"] == role and g["state"] != "REMOVED"]
    return {node for group in groups for node in group["bundles_to_node_id"].values()}


STAGES = ("completions", "scores", "pairs", "votes", "decisions", "preferences")


def outcome(run: Path) -> dict[str, Any]:
    """What must not depend on where it was made: every decision and what it follows from, and the steps' rows."""
    found: dict[str, Any] = {}
    for path in sorted(run.glob("*/*/*.jsonl")):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        for row in rows:
            for timed in ("latency_s", "seconds", "cached", "logprob", "metrics", "grad_norm", "loss"):
                row.pop(timed, None)
        if path.stem in STAGES:
            found[f"{path.parent.name}/{path.stem}"] = sorted(json.dumps(row) for row in rows)
        elif path.stem == "updates":
            found[f"{path.parent.name}/{path.stem}"] = [row["row_ids"] for row in rows]
    return found


@with_ray
def test_a_learner_of_two_actors_trains_as_one_process(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where one of them is killed, and the run makes itself another cluster."""
    from rlaif.loop.launch import execute

    monkeypatch.chdir(tmp_path)
    changes: dict[str, Any] = {"iterations": 2, "constitution": "rules@1", "workers": "inline"}
    told = {"one": Killing(None, []), "two": KillingALearner(None, [(0, "update")])}
    for name, cluster in (("one", None), ("two", {"learner": {"processes": 2}})):
        execute(project_job(tmp_path, tiny_model, **changes, cluster=cluster), Path(name), tmp_path, told[name])
    assert any("in 2 processes" in note for note in told["two"].notes)
    assert [note for note in told["two"].notes if "goes on from its log (restart 1 of 3)" in note], told["two"].notes
    assert RunDir(tmp_path / "two").iteration(1).read("updates", UpdateStep)
    # The second iteration samples from weights that differ in their last bits, and so may its answers.
    steps = [RunDir(tmp_path / run).iteration(0).read("updates", UpdateStep) for run in ("one", "two")]
    assert [s.row_ids for s in steps[1]] == [s.row_ids for s in steps[0]]
    assert [s.loss for s in steps[1]] == pytest.approx([s.loss for s in steps[0]], abs=1e-5)
    assert (tmp_path / "two/logs/learner-2.log").exists()


@with_ray
@pytest.mark.parametrize("stream", [False, True])
def test_a_run_on_three_nodes_decides_as_one_process(
    stream: bool, tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine that works is killed in each stage. Streamed, stages go on beside each other: in those that don't."""
    from ray.cluster_utils import Cluster as Nodes

    from rlaif.loop.launch import execute

    monkeypatch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))  # Ray was imported to want one (conftest)
    monkeypatch.setattr("rlaif.workers.ray.ROOM_S", 600.0)
    changes: dict[str, Any] = {"iterations": 2, "constitution": "rules@1", "workers": "process"}
    # A learner of two processes here as well: its sums are rounded otherwise than one process's, and the second
    # iteration samples from what they make. That they are one process's to 1e-5 is the test above, and another's.
    two = write(tmp_path, **ON_CPUS)
    alone = project_job(tmp_path, tiny_model, **changes, learner={"accelerate": two.name})
    execute(alone, tmp_path / "alone", tmp_path, Killing(None, []))
    nodes = Nodes(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    each = ("sample", "update") if stream else ("sample", "score", "judge", "update")
    stages = [*((k, stage) for k in range(2) for stage in each), (1, "held-out"), (1, "sanity")]
    try:
        for _ in range(3):
            nodes.add_node(num_cpus=2)
        roles = {"sampler": {"replicas": 2}, "judge": {"replicas": 2}, "learner": {"processes": 2}}
        progress = Killing(nodes, stages)
        cluster = {"address": nodes.address, **roles, "max_restarts": 9}
        shared = project_job(tmp_path, tiny_model, **changes, cluster=cluster, pipeline={"stream": stream})
        execute(shared, tmp_path / "shared", tmp_path, progress)
    finally:
        nodes.shutdown()
    assert progress.killed == stages
    run = RunDir(tmp_path / "shared")
    died = [e.message for e in run.events() if e.kind == "replica_died"]
    assert died, progress.notes
    assert all("takes its place" in message and "\n" not in message for message in died)
    again = [note for note in progress.notes if "goes on from its log" in note]
    assert len(again) >= 2, "the learner died in each update"
    assert outcome(tmp_path / "shared") == outcome(tmp_path / "alone")


@with_ray
def test_the_cluster_of_a_run_that_is_killed_ends(tmp_path: Path, tiny_model: Path) -> None:
    """Also what its agents hold, some of whom ask every few seconds only whether anybody is there."""
    cluster = {"sampler": {"replicas": 2}}
    make_project(tmp_path, tiny_model, constitution="rules@1", workers="process", cluster=cluster)
    command = [sys.executable, "-m", "rlaif", "run", "tiny.yaml", "--name", "killed"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    log = (tmp_path / "out").open("w")
    run = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=log, stderr=log)
    try:
        until(lambda: run.poll() is not None or "sampler ready" in (tmp_path / "out").read_text(), 600)
        started = psutil.Process(run.pid).children(recursive=True)
        assert any("raylet" in process.name() for process in started), (tmp_path / "out").read_text()
    finally:
        run.kill()
        run.wait()
    until(lambda: not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in started), 120)
