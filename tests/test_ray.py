"""Workers on Ray: a cluster of this machine alone. Runs are in test_ray_runs.py, since a process has one cluster.

Each cluster takes some 20 s to start; without the extra `ray` nothing of this runs, and one test says that nothing of
Ray is needed then.
"""

from __future__ import annotations

import importlib.util
import os
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
from rlaif.workers.ray import PRIVATE, RayCluster, RayWorker
from rlaif.workers.replicas import Replicas
from rlaif.workers.weights import WeightsRef
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


@pytest.mark.parametrize(
    ("sampling", "share", "said"),
    [
        ({"engine": "server"}, {"replicas": 2}, r"cluster\.sampler: not with `sampling\.engine: server`.*replicas"),
        (
            {"engine": "server", "base_url": "http://10.0.0.1:8000"},
            {"replicas": 1},
            r"cluster\.sampler: not with `sampling\.engine: server`.*base_url",
        ),
        ({"engine": "vllm"}, {"replicas": 2, "gpus": 0.5}, r"cluster\.sampler\.gpus: 0\.5, .*vLLM .*give 1, and fewer"),
    ],
)
def test_samplers_that_would_work_against_each_other_are_refused(
    sampling: dict[str, Any], share: dict[str, Any], said: str
) -> None:
    with pytest.raises(UserError, match=said):
        parse_job({"constitution": "rules", "sampling": sampling, "cluster": {"sampler": share}}, "test")


@pytest.mark.parametrize(
    ("sampling", "share"),
    [
        ({"engine": "server", "replicas": 2}, None),
        ({"engine": "vllm"}, {"gpus": 0}),
        ({"engine": "vllm"}, {"gpus": 2}),
        ({"engine": "transformers"}, {"replicas": 2, "gpus": 0.5}),
    ],
)
def test_others_are_not(sampling: dict[str, Any], share: dict[str, Any] | None) -> None:
    cluster = {"sampler": share} if share else {"judge": {"replicas": 2, "gpus": 0.5}}
    parse_job({"constitution": "rules", "sampling": sampling, "cluster": cluster}, "test")


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
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(content)
    (folder / "config.json").write_text("{}")
    return WeightsRef.of(folder)


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
def test_an_actor_that_cant_be_made_is_for_the_user_to_mend(alone: tuple[RayCluster, Path]) -> None:
    cluster, logs = alone
    (logs / "sampler-2.log").mkdir()
    worker = cluster.start("sampler", 1, "tests.test_ranks:Adds", {}, 0)
    said = rf"cluster\.sampler: no worker can be started on {os.uname().nodename} \(IsADirectoryError: .*\); mend that"
    with pytest.raises(UserError, match=said) as caught:
        worker.ready()
    assert "\n" not in str(caught.value)
    worker.close()
    (logs / "sampler-2.log").rmdir()


@with_ray
def test_a_store_without_room_is_one_line(
    alone: tuple[RayCluster, Path], reader: RayWorker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failures = importlib.import_module("ray").exceptions
    unseen = weights(tmp_path / "unseen", b"four")
    alone[0].in_store = {}
    for failure in (failures.ObjectStoreFullError, failures.OutOfDiskError):

        def no_room(part: bytes, failure: type[Exception] = failure) -> None:
            raise failure("Failed to put object of 9 bytes.")

        monkeypatch.setattr("ray.put", no_room)
        (tmp_path / "unseen/model.safetensors").write_bytes(b"of another machine")
        with pytest.raises(
            WorkerError, match=r"^sampler 1 worker: no room in .* \(Failed to put .* 9 bytes\.\); give"
        ) as e:
            reader.tell("load", weights=unseen)
        assert "\n" not in str(e.value)
        assert not isinstance(e.value, WorkerDied), "it would be started again, for nothing"
    monkeypatch.undo()
    assert reader.call("holds"), "it lives"


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
def test_weights_are_read_where_they_are_or_sent(
    alone: tuple[RayCluster, Path], reader: RayWorker, tmp_path: Path
) -> None:
    seen = weights(tmp_path / "seen", b"one")
    reader.tell("load", weights=seen)
    assert reader.call("holds") == (str(seen.path), b"one")
    # What another machine has under this path is something else.
    sent = weights(tmp_path / "sent", b"two")
    put = importlib.import_module("ray").put
    content = {"config.json": [b"{}"], "model.safetensors": [b"t", b"wo"]}
    parts = [(name, [put(part) for part in of_file]) for name, of_file in content.items()]
    alone[0].in_store = {sent.name: parts}
    (tmp_path / "sent/model.safetensors").write_bytes(b"of another machine")
    reader.tell("load", weights=sent)
    folder, read = reader.call("holds")
    assert read == b"two"
    assert Path(folder).name == sent.name
    reader.tell("load", weights=seen)
    alone[0].in_store = {}
    reader.tell("load", weights=sent)  # kept, nothing is sent
    assert reader.call("holds") == (folder, b"two")
    damaged = weights(tmp_path / "damaged", b"three")
    alone[0].in_store = {damaged.name: parts}
    (tmp_path / "damaged/model.safetensors").unlink()
    with pytest.raises(WorkerError, match=f"weights {damaged.name} arrived as {sent.name}: damaged"):
        reader.tell("load", weights=damaged)


@with_ray
def test_actors_that_die_are_replaced_where_there_is_room(
    alone: tuple[RayCluster, Path], reader: RayWorker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster, _ = alone
    told: list[str] = []
    asked = {"asked": str(tmp_path / "asked.log"), "delay_s": 0.02}
    with monkeypatch.context() as patch, pytest.raises(UserError, match=r"judge: no room for 1 replicas of 999 GPUs"):
        patch.setattr("rlaif.workers.ray.ROOM_S", 1.0)
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
