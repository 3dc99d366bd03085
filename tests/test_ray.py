"""Workers on Ray: a cluster of this machine alone, and a run on three nodes that are killed on the way.

Each cluster takes some 20 s to start; without the extra `ray` nothing of this runs, and one test says that nothing of
Ray is needed then.
"""

from __future__ import annotations

import importlib.util
import json
import os
import secrets
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from rlaif.config import Cluster, parse_job
from rlaif.errors import UserError, WorkerDied, WorkerError
from rlaif.records import IterationMetrics, UpdateStep
from rlaif.rundir.store import RunDir
from rlaif.workers.ray import PRIVATE, RayCluster, RayWorker
from rlaif.workers.replicas import Replicas
from rlaif.workers.weights import WeightsRef
from tests.conftest import project_job
from tests.test_launched import ON_CPUS, write
from tests.test_replicas import in_pieces

pytestmark = pytest.mark.slow
with_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs the extra `ray`")
ROOT = Path(__file__).resolve().parent.parent


def settings(**changes: Any) -> Cluster:
    return Cluster.model_validate({"sampler": {"replicas": 2}, **changes})


def test_nothing_of_ray_is_imported_without_a_cluster() -> None:
    code = "import sys, rlaif.cli, rlaif.loop.launch, rlaif.workers.ray; assert 'ray' not in sys.modules"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_without_the_extra_it_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match=r"cluster: this needs Ray .*(make setup|rlaif\[ray\])"):
        RayCluster(settings(), tmp_path)
    assert "RAY_AUTH_TOKEN" not in os.environ


@pytest.mark.parametrize(
    ("cluster", "said"),
    [
        ({}, "cluster: names no role"),
        ({"judge": {"replicas": 0}}, r"cluster\.judge\.replicas"),
        ({"learner": {"replicas": 2}}, r"unknown key `cluster\.learner\.replicas`"),
        ({"learner": {"gpus": 1}}, r"cluster\.learner\.processes"),
    ],
)
def test_what_makes_no_sense_is_refused(cluster: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        parse_job({"constitution": "rules", "cluster": cluster}, "test")


def test_a_sampler_that_spans_gpus_gets_them() -> None:
    job = {"constitution": "rules", "sampling": {"tensor_parallel_size": 2}}
    parse_job({**job, "cluster": {"sampler": {"replicas": 2}}}, "test")
    with pytest.raises(UserError, match=r"cluster\.sampler\.gpus: 1 for sampling\.tensor_parallel_size: 2"):
        parse_job({**job, "cluster": {"sampler": {"gpus": 1}}}, "test")


def test_a_judge_that_waits_is_not_shared_out() -> None:
    judge = {"kind": "chat", "model": "m", "base_url": "http://127.0.0.1:8000/v1"}
    job = {"constitution": "rules", "judge": judge, "pairing": {"method": "random"}}
    parse_job({**job, "cluster": {"sampler": {}}}, "test")
    with pytest.raises(UserError, match=r"cluster\.judge: a `chat` judge computes nothing"):
        parse_job({**job, "cluster": {"judge": {"replicas": 2}}}, "test")


@with_ray
def test_a_ray_that_was_imported_before_is_refused(tmp_path: Path) -> None:
    code = f"""
import ray
from pathlib import Path
from rlaif.config import Cluster
from rlaif.workers.ray import RayCluster
RayCluster(Cluster.model_validate({{"sampler": {{}}}}), Path({str(tmp_path)!r}))
"""
    environment = {name: value for name, value in os.environ.items() if name not in PRIVATE}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert "UserError: cluster.address: local: Ray was imported before" in done.stderr


class Reads:
    """Says what is in the folder that it is given."""

    def __init__(self, model_path: str) -> None:
        self._folder = Path(model_path)

    def load(self, weights: WeightsRef) -> None:
        self._folder = weights.folder()

    def holds(self) -> tuple[str, bytes]:
        return str(self._folder), (self._folder / "model.safetensors").read_bytes()

    def about(self) -> dict[str, str | int | None]:
        names = ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "RLAIF_CACHE")
        return {name: os.environ.get(name) for name in names} | {"nice": os.nice(0), "pid": os.getpid()}

    def user_error(self) -> None:
        raise UserError("prompts.jsonl:3: not JSON")

    def crash(self) -> None:
        raise ZeroDivisionError("nought")

    def unpicklable(self) -> Any:
        return threading.Lock()

    def count(self, n: int, fail_at: int, made: str) -> Iterator[int]:
        for i in range(n):
            if i == fail_at:
                raise KeyError("lost")
            with Path(made).open("a") as f:
                f.write(f"{i}\n")
            yield i

    def kill_self(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


def weights(folder: Path, content: bytes) -> WeightsRef:
    from rlaif.models import digest_of

    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(content)
    (folder / "config.json").write_text("{}")
    return WeightsRef(digest=digest_of(folder), path=folder)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[RayCluster, Path]]:
    """A cluster of this machine alone, with room for one more sampler than there are, and for a learner."""
    logs = tmp_path_factory.mktemp("run") / "logs"
    logs.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RLAIF_CACHE", str(tmp_path_factory.mktemp("cache")))
        before = signal.getsignal(signal.SIGTERM)
        with RayCluster(settings(learner={"processes": 2}), logs) as cluster:
            assert signal.getsignal(signal.SIGTERM) == before, "Ray has taken it"
            cluster.reserve("sampler", 2, cluster.gpus_each(1))
            yield cluster, logs
    assert list((logs / "ray").glob("*.log")), "Ray's own logs are the run's, too"
    assert "RAY_AUTH_TOKEN" not in os.environ


@pytest.fixture(scope="module")
def reader(alone: tuple[RayCluster, Path]) -> Iterator[RayWorker]:
    cluster, logs = alone
    model = weights(logs.parent / "model", b"base")
    worker = cluster.start("sampler", 0, f"{__name__}:Reads", {"model_path": str(model.path)}, 0)
    worker.ready()
    yield worker
    worker.close()
    worker.close()


@with_ray
def test_it_listens_to_this_machine_alone(reader: RayWorker) -> None:
    listening = {
        str(c.laddr.ip).removeprefix("::ffff:")
        for child in psutil.Process().children(recursive=True)
        for c in child.net_connections("inet")
        if c.status == psutil.CONN_LISTEN
    }
    assert listening == {"127.0.0.1"}


@with_ray
def test_an_actor_is_a_process_like_ours(reader: RayWorker) -> None:
    about = reader.call("about")
    assert about["nice"] == os.nice(0), "Ray would let everything else go before"
    assert about["OMP_NUM_THREADS"] == os.environ.get("OMP_NUM_THREADS", str(os.cpu_count()))
    assert reader.log_path.read_text().startswith("--- sampler 1 started")


@with_ray
def test_errors_are_what_they_are_of_a_process(reader: RayWorker) -> None:
    with pytest.raises(UserError, match=r"^prompts\.jsonl:3: not JSON$"):
        reader.call("user_error")
    with pytest.raises(WorkerError, match="sampler 1 worker failed: ZeroDivisionError: nought; its log is") as caught:
        reader.call("crash")
    assert "\n" not in str(caught.value)
    assert not isinstance(caught.value, WorkerDied)
    assert "Traceback" in reader.log_path.read_text()
    with pytest.raises(WorkerError, match=r"sampler 1 worker failed: .*pickle"):
        reader.call("unpicklable")
    with pytest.raises(WorkerError, match="AttributeError"):
        reader.call("nothing")


@with_ray
def test_a_stream_comes_row_by_row_and_ends_when_nobody_wants_more(reader: RayWorker, tmp_path: Path) -> None:
    assert list(reader.stream("count", n=3, fail_at=-1, made=str(tmp_path / "a"))) == [0, 1, 2]
    seen = []
    with pytest.raises(WorkerError, match="KeyError"):
        for item in reader.stream("count", n=5, fail_at=2, made=str(tmp_path / "b")):
            seen.append(item)
    assert seen == [0, 1]
    for item in reader.stream("count", n=1000, fail_at=-1, made=str(tmp_path / "c")):
        if item == 3:
            break
    assert list(reader.stream("count", n=1, fail_at=-1, made=str(tmp_path / "d"))) == [0]
    assert 4 <= len((tmp_path / "c").read_text().split()) < 10, "and not many more than were wanted are made"


@with_ray
def test_weights_are_read_where_they_are_or_sent(reader: RayWorker, tmp_path: Path) -> None:
    seen = weights(tmp_path / "seen", b"one")
    reader.tell("load", weights=seen)
    assert reader.call("holds") == (str(seen.path), b"one")
    # What another machine has under this path is something else.
    sent = weights(tmp_path / "sent", b"two")
    put = importlib.import_module("ray").put
    content = {"config.json": [b"{}"], "model.safetensors": [b"t", b"wo"]}
    parts = [(name, [put(part) for part in of_file]) for name, of_file in content.items()]
    reader._cluster.in_store = {sent.digest: parts}
    (tmp_path / "sent/model.safetensors").write_bytes(b"of another machine")
    reader.tell("load", weights=sent)
    folder, read = reader.call("holds")
    assert read == b"two"
    assert Path(folder).name == sent.digest
    reader.tell("load", weights=seen)
    reader._cluster.in_store = {}
    reader.tell("load", weights=sent)  # kept, nothing is sent
    assert reader.call("holds") == (folder, b"two")
    damaged = weights(tmp_path / "damaged", b"three")
    reader._cluster.in_store = {damaged.digest: parts}
    (tmp_path / "damaged/model.safetensors").unlink()
    with pytest.raises(WorkerError, match=f"weights {damaged.digest} arrived as {sent.digest}: damaged"):
        reader.tell("load", weights=damaged)


@with_ray
def test_actors_that_die_are_replaced_where_there_is_room(
    alone: tuple[RayCluster, Path], reader: RayWorker, tmp_path: Path
) -> None:
    cluster, _ = alone
    told: list[str] = []
    asked = {"asked": str(tmp_path / "asked.log"), "delay_s": 0.02}
    with pytest.raises(UserError, match=r"cluster.judge: no room for 1 replicas of 999 GPUs"):
        cluster.reserve("judge", 1, 999)
    replicas = Replicas(
        "sampler", lambda n: cluster.start("sampler", n + 1, "tests.test_replicas:Squares", asked, 0), 1, 2, told.append
    )
    replicas.tell("load", offset=3)
    [pid] = replicas.each("pid")
    rows: list[Any] = []
    for chunk in replicas.spread("squares", in_pieces(30, 10)):
        rows += chunk
        if len(rows) == 7:
            os.kill(pid, signal.SIGKILL)
    assert sorted(rows) == [(n, n * n + 3) for n in range(30)]
    assert len(told) == 1
    assert "sampler 2 worker died (" in told[0]
    assert "\n" not in told[0]
    replicas.close()


@with_ray
def test_processes_that_compute_together_are_actors(
    alone: tuple[RayCluster, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster, logs = alone
    monkeypatch.setattr("rlaif.workers.ranks.GRACE_S", 1.0)
    cluster.reserve("learner", 2, 0, together=True)
    two = cluster.start_ranks("learner", 2, "tests.test_ranks:Adds", {}, 0, {"ACCELERATE_MIXED_PRECISION": "no"})
    about = two.call("about")
    assert [about[n] for n in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")] == ["0", "2", "0", "2"]
    assert about["GLOO_SOCKET_IFNAME"] == "lo"
    assert about["OMP_NUM_THREADS"] == os.environ.get("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // 2)))
    assert two.call("added", number=3) == 7
    assert list(two.stream("several", count=3)) == [1, 3, 5]
    # A learner's state is read and written where the run has it.
    state = WeightsRef(digest="of the policy", path=logs)
    assert two.call("folder_of", weights=state) == logs
    with pytest.raises(UserError, match=r"rows.jsonl:3"):
        two.call("refuse")
    with pytest.raises(WorkerDied, match=r"learner 2 worker died \(.*its log is .*learner-2.log"):
        two.call("die_alone")
    with pytest.raises(WorkerDied, match="learner worker has ended"):
        two.call("added", number=1)


# ---- a run


class Killing:
    """A progress that kills a machine in each stage that it is told: one that has who works at it."""

    def __init__(self, cluster: Any, stages: list[tuple[int, str]]) -> None:
        self._cluster, self._left, self._now = cluster, list(stages), (-1, "")
        self.killed: list[tuple[int, str]] = []
        self.notes: list[str] = []

    def stage(self, iteration: int, name: str, total: int, unit: str, text: str) -> None:
        self._now = (iteration, name)

    def advance(self, n: int) -> None:
        if self._now in self._left:
            self._left.remove(self._now)
            self.killed.append(self._now)
            busy = nodes_of(WORKS_AT[self._now[1]])
            doomed = next(node for node in self._cluster.list_all_nodes() if node.node_id in busy)
            self._cluster.remove_node(doomed, allow_graceful=False)
            self._cluster.add_node(num_cpus=2, wait=False)

    def iteration_done(self, iteration: int, metrics: IterationMetrics) -> None: ...
    def note(self, message: str) -> None:
        self.notes.append(message)


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
@pytest.mark.nightly
@pytest.mark.timeout(1800)
def test_a_learner_of_two_actors_trains_as_one_process(tmp_path: Path, tiny_model: Path) -> None:
    from rlaif.loop.launch import execute

    changes: dict[str, Any] = {"iterations": 2, "constitution": "rules@1", "workers": "inline"}
    told = {"one": Killing(None, []), "two": Killing(None, [])}
    for name, cluster in (("one", None), ("two", {"learner": {"processes": 2}})):
        execute(project_job(tmp_path, tiny_model, **changes, cluster=cluster), tmp_path / name, tmp_path, told[name])
    assert any("in 2 processes" in note for note in told["two"].notes)
    assert RunDir(tmp_path / "two").iteration(1).read("updates", UpdateStep)
    # The second iteration samples from weights that differ in their last bits, and so may its answers.
    steps = [RunDir(tmp_path / run).iteration(0).read("updates", UpdateStep) for run in ("one", "two")]
    assert [s.row_ids for s in steps[1]] == [s.row_ids for s in steps[0]]
    assert [s.loss for s in steps[1]] == pytest.approx([s.loss for s in steps[0]], abs=1e-5)
    assert (tmp_path / "two/logs/learner-2.log").exists()


@with_ray
@pytest.mark.nightly
@pytest.mark.timeout(1800)
def test_a_run_on_three_nodes_decides_as_one_process(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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
    stages = [(k, stage) for k in range(2) for stage in ("sample", "score", "judge", "update")]
    try:
        for _ in range(3):
            nodes.add_node(num_cpus=2)
        roles = {"sampler": {"replicas": 2}, "judge": {"replicas": 2}, "learner": {"processes": 2}}
        progress = Killing(nodes, [*stages, (1, "held-out"), (1, "sanity")])
        shared = project_job(
            tmp_path, tiny_model, **changes, cluster={"address": nodes.address, **roles, "max_restarts": 9}
        )
        execute(shared, tmp_path / "shared", tmp_path, progress)
    finally:
        nodes.shutdown()
    assert len(progress.killed) == 10
    run = RunDir(tmp_path / "shared")
    died = [e.message for e in run.events() if e.kind == "replica_died"]
    assert died, progress.notes
    assert all("takes its place" in message and "\n" not in message for message in died)
    again = [note for note in progress.notes if "goes on from its log" in note]
    assert len(again) >= 2, "the learner died in each update"
    assert [e.kind for e in run.events()].count("resumed") == len(again)
    assert outcome(tmp_path / "shared") == outcome(tmp_path / "alone")
