"""Workers on a Ray cluster: this machine's own, made for the run, or one that is there. Nothing else imports Ray.

In: the job's `cluster` section. Out: a `RayCluster`, which starts workers (`RayWorker`) where there is room for them. A
replica is an actor in a bundle of its own of its role's placement group: its GPUs are of one machine, and replicas are
spread over machines as far as they go. Models and weights travel by reference (`weights`): a node that sees the folder
reads it there, to any other its files are sent once, through the object store.

Rows of a stream are pulled, some calls ahead: so what isn't wanted yet isn't made, a stream that is given up ends, and
it works through `ray://`, which knows no streaming generators.

A cluster that is made for the run listens on loopback alone, wants a token that only this process and its children
know, has no dashboard and sends nothing to anybody. What another cluster exposes is up to whoever started it
(docs/scale-ray.md).
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import secrets
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import rlaif
from rlaif import __version__
from rlaif.config import Cluster
from rlaif.errors import NoRoom, UserError, WorkerDied, WorkerError, first_line, needs_extra, to_install
from rlaif.workers.feed import Feed
from rlaif.workers.process import CLOSE_GRACE_S
from rlaif.workers.ranks import JOINED, LOOPBACK, Ranks, numbered
from rlaif.workers.weights import FileParts, WeightsMissing, WeightsRef, keep, parts_of, seen_here
from rlaif.workers.worker import Worker, built, one_line

ROOM_S = 120.0
"""How long is waited for room in a cluster: one that grows by itself may start a machine."""
_AHEAD = 2
"""Calls for rows that are under way: one returns while the next row is made."""
_POLL_S = 1.0

PRIVATE = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # all that this does is that every server listens on 127.0.0.1
    "RAY_AUTH_MODE": "token",
    "RAY_worker_niceness": "0",  # else whatever else this machine does goes before
}
"""What a cluster that is made for the run starts with."""
_TOKEN = secrets.token_hex(32)
"""Of all clusters that this process makes: Ray reads it once in the life of a process."""

Answer = tuple[str, Any]
"""`ok`, `item`, `end`, `user_error`, `error` or `missing`, and what belongs to it."""


class RayCluster:
    """A connection to a Ray cluster.

    Args:
        settings: The job's `cluster` section.
        logs: The run's folder of logs.
        gpus: This machine's that a cluster may use which is made for the run, as CUDA names them.

    Raises:
        UserError: Ray isn't installed, or the cluster can't be reached.
    """

    def __init__(self, settings: Cluster, logs: Path, gpus: Sequence[str] = ()) -> None:
        self._settings, self._logs = settings, logs
        self._groups: dict[str, Any] = {}
        self.in_store: dict[str, FileParts] = {}
        """What was put into the object store, by `WeightsRef.name`."""
        self._sending = threading.Lock()
        self._folder: Path | None = None
        """Where a cluster that is made for the run has its sockets and logs."""
        with contextlib.ExitStack() as stack:
            if settings.address == "local":
                _private_from_now_on()
                stack.enter_context(_environment({"RAY_AUTH_TOKEN": _TOKEN}))
                self._folder = Path(tempfile.mkdtemp(prefix="rlaif-"))
                stack.callback(self._keep_logs, self._folder)
            self._ray = _imported()
            with _own_sigterm():
                self._connect(gpus)
            logs.mkdir(parents=True, exist_ok=True)  # a machine that sees it sees the run
            stack.callback(self._ray.shutdown)
            self._closing = stack.pop_all()

    def _connect(self, gpus: Sequence[str]) -> None:
        how = {"log_to_driver": False, "logging_level": logging.ERROR, "namespace": f"rlaif-{secrets.token_hex(8)}"}
        if self._folder is not None:
            cpus = max(os.cpu_count() or 1, self._settings.asked)
            here = {"num_cpus": cpus, "num_gpus": len(gpus), "include_dashboard": False, "_temp_dir": str(self._folder)}
            with _environment({"CUDA_VISIBLE_DEVICES": ",".join(gpus)}):
                self._ray.init(address="local", **here, **how)
            if (ip := self._ray.util.get_node_ip_address()) != "127.0.0.1":
                self._ray.shutdown()
                raise UserError(
                    f"cluster.address: local: Ray would listen on {ip}; it was imported before, by code of your own. "
                    "Don't import it there, or start a cluster with `ray start`"
                )
            return
        try:
            self._ray.init(address=self._settings.address, **how)
        except (ConnectionError, RuntimeError, ValueError) as e:
            raise UserError(
                f"cluster.address: {self._settings.address}: no Ray cluster to be reached ({one_line(e)}); start one "
                "with `ray start --head`, or set cluster.address: local"
            ) from e

    def has(self, role: str) -> bool:
        """Whether the job puts replicas of a role here."""
        return self._settings.of(role) is not None

    def gpus_each(self, wanted: int) -> float:
        """GPUs of a replica that wants some, where the job doesn't say how many it gets."""
        return wanted if self._ray.cluster_resources().get("GPU") else 0

    def reserve(self, role: str, replicas: int, gpus: float, together: bool = False) -> None:
        """Room for a role's replicas, each on one machine; all of them on as few as there may be, if they are to be
        `together`.

        Raises:
            NoRoom: there is none.
        """
        bundle = {"CPU": 1.0, "GPU": float(gpus)} if gpus else {"CPU": 1.0}
        how = "PACK" if together else "SPREAD"
        group = self._ray.util.placement_group([bundle] * replicas, strategy=how, name=role)
        if not group.wait(ROOM_S):
            has = self._ray.cluster_resources()
            self._ray.util.remove_placement_group(group)
            what = "processes" if together else "replicas"
            raise NoRoom(
                f"cluster.{role}: no room for {replicas} {what} of {gpus:g} GPUs and a CPU each, every one on one "
                f"machine; the cluster has {has.get('GPU', 0):g} GPUs and {has.get('CPU', 0):g} CPUs in all"
            )
        self._groups[role] = group

    def start(self, role: str, number: int, factory: str, kwargs: dict[str, Any], gpus: float) -> RayWorker:
        """Replica `number` of a role, from 0, in the room that was reserved for it; returns at once."""
        actor = self._actor(role, number, gpus, {}, beside=1)
        return RayWorker(self, self._ray, actor, role, number, factory, kwargs)

    def start_ranks(
        self, role: str, count: int, factory: str, kwargs: dict[str, Any], gpus: float, variables: Mapping[str, str]
    ) -> Ranks:
        """A role's processes that compute together, in the room that was reserved for them. All read and write the
        run's folders under their own names.

        Args:
            variables: What each finds in its environment.

        Raises:
            UserError: a machine doesn't see the run.
        """
        on = self._ray.util.placement_group_table(self._groups[role])["bundles_to_node_id"]
        nodes = [on[number] for number in range(count)]
        alone = len({*nodes}) == 1
        actors = []
        for number, node in enumerate(nodes):
            here = nodes.count(node)
            mine = {
                **(LOOPBACK if alone else {}),
                **variables,
                **numbered(number, count, nodes[:number].count(node), here),
            }
            actors.append(self._actor(role, number, gpus, mine, beside=here))
        for number, sees in enumerate(self._of_all(role, [actor.sees.remote(self._logs) for actor in actors])):
            if not sees:
                raise UserError(
                    f"cluster.{role}: the machine of process {number + 1} doesn't see {self._logs}; put runs on a file "
                    "system that all of them share"
                )
        (meeting,) = self._of_all(role, [actors[0].meeting.remote(alone)])
        given = {"meeting": meeting, "factory": factory, **kwargs}
        made = [RayWorker(self, self._ray, actor, role, number, JOINED, given) for number, actor in enumerate(actors)]
        return Ranks(role, made)

    def _of_all(self, role: str, asked: list[Any]) -> list[Any]:
        """Answers of actors that are just being made, the first ones of their role.

        Raises:
            UserError: one can't be made there.
            WorkerDied: one isn't there in time.
        """
        answers = []
        for number, one in enumerate(asked):
            try:
                answers.append(self._ray.get(one, timeout=ROOM_S))
            except self._ray.exceptions.RayError as e:  # a GetTimeoutError is one
                raise self.died(role, number, e) from e
        return answers

    def named(self, role: str, number: int) -> tuple[str, Path]:
        """What messages call a replica, and its log."""
        return f"{role} {number + 1}", self._logs / f"{role}-{number + 1}.log"

    def died(self, role: str, number: int, e: Exception) -> UserError | WorkerDied:
        """What the end of an actor is to whoever called it. One that can't be made would fail there again and again:
        that is for the user to mend."""
        name, log = self.named(role, number)
        if not getattr(e, "actor_init_failed", False):
            return WorkerDied(f"{name} worker died ({_reason(e)}); {_where(log)}")
        return UserError(
            f"cluster.{role}: no worker can be started on {self._machine_of(role, number)} ({_last_line(e)}); mend "
            f"that there. It needs the loop's rlaif ({__version__}), Python and Ray"
        )

    def _machine_of(self, role: str, number: int) -> str:
        """The machine that has the room which was reserved for a replica."""
        node = self._ray.util.placement_group_table(self._groups[role])["bundles_to_node_id"][number]
        names = {of["NodeID"]: of["NodeManagerHostname"] for of in self._ray.nodes()}
        return str(names.get(node, node))

    def _actor(self, role: str, number: int, gpus: float, variables: Mapping[str, str], beside: int) -> Any:
        """`beside`: so many processes of the role share their machine's cores."""
        strategy = self._ray.util.scheduling_strategies.PlacementGroupSchedulingStrategy(
            placement_group=self._groups[role], placement_group_bundle_index=number
        )
        root = str(Path(rlaif.__file__).parents[1])  # so that the actor finds this very package, where it is there
        held = self._ray.remote(_Held).options(
            num_cpus=1,
            num_gpus=gpus,
            scheduling_strategy=strategy,
            runtime_env={"env_vars": {"PYTHONPATH": f"{root}:${{PYTHONPATH}}", **variables}},
        )
        threads = os.environ.get("OMP_NUM_THREADS")
        return held.remote(*self.named(role, number), [p for p in sys.path if p], __version__, threads, beside)

    def sent(self, ref: WeightsRef) -> FileParts:
        """A folder's files in the object store, put there once; for nodes that don't see it."""
        with self._sending:  # several replicas ask for the same at the same time
            if ref.name not in self.in_store:
                self.in_store.clear()  # whoever was promised those has them
                put = self._ray.put
                self.in_store[ref.name] = [(name, [put(part) for part in parts]) for name, parts in parts_of(ref.path)]
            return self.in_store[ref.name]

    def close(self) -> None:
        """Gives back what was reserved. A cluster that was made for the run ends, and leaves its logs in the run's."""
        for group in self._groups.values():
            with contextlib.suppress(Exception):  # a cluster that is gone has nothing to give back
                self._ray.util.remove_placement_group(group)
        self._groups.clear()
        self._closing.close()

    def _keep_logs(self, folder: Path) -> None:
        for logs in folder.glob("session_2*/logs"):
            shutil.copytree(logs, self._logs / "ray", dirs_exist_ok=True, ignore_dangling_symlinks=True)
        shutil.rmtree(folder, ignore_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class RayWorker(Worker):
    """A long-lived object in a Ray actor; `RayCluster.start` makes it."""

    def __init__(
        self, cluster: RayCluster, ray: Any, actor: Any, role: str, number: int, factory: str, kwargs: dict[str, Any]
    ) -> None:
        self.name, self.log_path = cluster.named(role, number)
        self._cluster, self._ray, self._actor = cluster, ray, actor
        self._died = functools.partial(cluster.died, role, number)
        self._begun = time.monotonic()
        self._placed = actor.node.remote()
        self._build = functools.partial(actor.build.remote, factory, _by_reference(_to_leave(kwargs)))
        self._built = self._build()
        self._ready = self._closed = False

    def poll(self, timeout_s: float) -> bool:
        """As `ProcessWorker.poll`."""
        return self._ready or self._is_there(self._built, timeout_s) or self._without_room()

    def ready(self) -> None:
        """As `ProcessWorker.ready`.

        Raises:
            WorkerError: also when the cluster has no room for it.
        """
        while not self.poll(_POLL_S):
            pass
        if not self._ready:
            if not self._is_there(self._built, 0):
                self.close()
                raise WorkerError(f"{self.name} worker: the cluster has no room for it")
            self._asked(self._build, self._built)
            self._ready = True

    def call(self, method: str, **kwargs: Any) -> Any:
        """As `ProcessWorker.call`."""
        self.ready()
        return self._asked(functools.partial(self._actor.call.remote, method, _to_leave(kwargs)))[1]

    def stream(self, method: str, feed: Feed | None = None, **kwargs: Any) -> Generator[Any, None, None]:
        """As `ProcessWorker.stream`, without a feed: a judge that is fed only waits, and needs no cluster."""
        if feed is not None:
            raise NotImplementedError(f"{self.name}.{method}: an actor takes no feed")
        self.ready()
        self._asked(functools.partial(self._actor.begin.remote, method, _to_leave(kwargs)))
        ahead = deque(self._actor.more.remote() for _ in range(_AHEAD))
        try:
            while (answer := self._answer(ahead.popleft))[0] != "end":
                ahead.append(self._actor.more.remote())
                yield answer[1]
        finally:
            with contextlib.suppress(Exception):  # one that is gone has nothing to end
                self._actor.end.remote()

    def close(self) -> None:
        """As `ProcessWorker.close`."""
        if self._closed:
            return
        self._closed = True
        if self._ready:
            with contextlib.suppress(Exception):  # one that is gone, or busy, is killed
                self._ray.get(self._actor.close.remote(), timeout=CLOSE_GRACE_S)
        with contextlib.suppress(Exception):  # a cluster that is gone has taken it along
            self._ray.kill(self._actor)

    def kill(self) -> None:
        """As `ProcessWorker.kill`."""
        self._ready = False
        self.close()

    def _is_there(self, answer: Any, timeout_s: float) -> bool:
        return bool(self._ray.wait([answer], timeout=timeout_s)[0])

    def _without_room(self) -> bool:
        return time.monotonic() - self._begun > ROOM_S and not self._is_there(self._placed, 0)

    def _asked(self, ask: Callable[[], Any], first: Any = None) -> Answer:
        """What a method of the actor answers; where weights are missing they are sent, and it is asked again. `first`
        is a first call that is under way."""
        answer = self._answer(ask if first is None else lambda: first)
        while answer[0] == "missing":
            self._answer(functools.partial(self._send, answer[1]))
            answer = self._answer(ask)
        return answer

    def _send(self, ref: WeightsRef) -> Any:
        return self._actor.receive.remote(ref, self._cluster.sent(ref))

    def _answer(self, ask: Callable[[], Any]) -> Answer:
        """What comes of a call that `ask` makes, or made."""
        failures = self._ray.exceptions
        try:
            kind, value = self._ray.get(ask())
        except failures.RayTaskError as e:  # past the actor's own guard: its result can't be pickled
            raise WorkerError(f"{self.name} worker failed: {one_line(e.cause or e)}; {_where(self.log_path)}") from e
        except (failures.ObjectStoreFullError, failures.OutOfDiskError) as e:
            raise WorkerError(
                f"{self.name} worker: no room in Ray's object store for what it is sent ({first_line(e)}); give Ray "
                "more (`ray start --object-store-memory`, or disk), or put runs and models where all machines see them"
            ) from e
        except failures.RayError as e:
            raise self._died(e) from e
        if kind == "user_error":
            raise UserError(value)
        if kind == "error":
            raise WorkerError(f"{self.name} worker failed: {value}; {_where(self.log_path)}")
        return kind, value


class _Held:
    """The object, in its actor."""

    def __init__(
        self, name: str, log_path: Path, path: list[str], version: str, threads: str | None, beside: int
    ) -> None:
        # Ray would give each a single thread, and sums would depend on that.
        os.environ["OMP_NUM_THREADS"] = threads or str(max(1, (os.cpu_count() or 1) // beside))
        if log_path.parent.is_dir():  # the run's, where this machine sees it
            _print_to(log_path)
        print(f"--- {name} started {time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime())}", flush=True)
        sys.path += [p for p in path if p not in sys.path]
        self._version = version
        self._object: Any = None
        self._items: Iterator[Any] | None = None
        self._sees_the_run = False
        self._meeting: Path | None = None

    def node(self) -> str:
        """Where it is."""
        return os.uname().nodename

    def sees(self, folder: Path) -> bool:
        """Whether a folder of the run is on this machine, too; then its weights are read where they are."""
        self._sees_the_run = folder.is_dir()
        return self._sees_the_run

    def meeting(self, on_one_machine: bool) -> str:
        """Where processes that compute together meet: in a folder that nobody else reads, or at a port of this
        machine."""
        if on_one_machine:
            self._meeting = Path(tempfile.mkdtemp(prefix="rlaif-"))
            return (self._meeting / "meeting").as_uri()
        import ray

        address = ray.util.get_node_ip_address()
        with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as found:
            found.bind((address, 0))
            return f"tcp://{address}:{found.getsockname()[1]}"

    def build(self, factory: str, kwargs: dict[str, Any]) -> Answer:
        """Builds the object."""
        if __version__ != self._version:
            has = f"{self.node()} has rlaif {__version__}, the loop {self._version}"
            return "user_error", f"cluster: {has}; install the same on both"

        def make() -> Answer:
            here = {name: str(v.path) if isinstance(v, WeightsRef) else v for name, v in _here(kwargs).items()}
            if factory == JOINED:
                _talk_where_ray_does()
            self._object = built(factory, here)
            return "ok", None

        return _guarded(make)

    def call(self, method: str, kwargs: dict[str, Any]) -> Answer:
        """Calls a method of the object."""
        return _guarded(lambda: ("ok", getattr(self._object, method)(**self._found(kwargs))))

    def begin(self, method: str, kwargs: dict[str, Any]) -> Answer:
        """Begins a stream."""

        def begin() -> Answer:
            self._items = iter(getattr(self._object, method)(**self._found(kwargs)))
            return "ok", None

        return _guarded(begin)

    def more(self) -> Answer:
        """The next item of the stream."""

        def more() -> Answer:
            if self._items is None:
                return "end", None
            try:
                return "item", next(self._items)
            except StopIteration:
                return "end", None

        return _guarded(more)

    def end(self) -> None:
        """The stream is given up, or at its end."""
        items, self._items = self._items, None
        if items is not None and hasattr(items, "close"):
            items.close()

    def _found(self, kwargs: Mapping[str, Any]) -> dict[str, Any]:
        return dict(kwargs) if self._sees_the_run else _here(kwargs)

    def receive(self, ref: WeightsRef, files: FileParts) -> Answer:
        """Files of a folder that this node doesn't see."""
        import ray

        return _guarded(lambda: ("ok", keep(ref, files, ray.get)))

    def close(self) -> None:
        """Lets the object end what it has begun."""
        if hasattr(self._object, "close"):
            self._object.close()
        if self._meeting is not None:
            shutil.rmtree(self._meeting, ignore_errors=True)
        print("--- closed", flush=True)


def _talk_where_ray_does() -> None:
    """gloo and NCCL take the network that this machine has Ray's address in; by its name, they might take another."""
    import psutil
    import ray

    mine = ray.util.get_node_ip_address()
    for name, addresses in psutil.net_if_addrs().items():
        if any(address.address == mine for address in addresses):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
            os.environ.setdefault("NCCL_SOCKET_IFNAME", name)


def _here(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments whose folders are on this machine.

    Raises:
        WeightsMissing: one isn't.
    """
    return {name: seen_here(value) if isinstance(value, WeightsRef) else value for name, value in kwargs.items()}


def _to_leave(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments that mean the same on another machine, and in any working directory."""

    def meant(value: Any) -> Any:
        if isinstance(value, WeightsRef):
            return value.whole()
        return value.absolute() if isinstance(value, Path) else value

    return {name: meant(value) for name, value in kwargs.items()}


def _by_reference(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of a factory whose model's folder may have to travel."""
    named = kwargs.get("model_path")
    if named is None or not Path(named).is_dir():
        return dict(kwargs)
    return {**kwargs, "model_path": WeightsRef.of(Path(named))}


def _guarded(action: Callable[[], Answer]) -> Answer:
    try:
        return action()
    except WeightsMissing as e:
        return "missing", e.ref
    except UserError as e:
        return "user_error", str(e)
    except ImportError as e:
        needed = needs_extra(e)
        traceback.print_exc()
        return ("user_error", needed) if needed else ("error", one_line(e))
    except Exception as e:  # the boundary: whatever it was, the loop hears of it
        traceback.print_exc()  # to the log
        return "error", one_line(e)


def _reason(e: Exception) -> str:
    """What Ray says of the death of an actor, in a few words."""
    said = [line.strip() for line in str(e).splitlines() if line.strip()]
    told = [
        line for line in said if line.startswith(("The actor died", "The actor is dead", "Worker exit", "The node"))
    ]
    return " ".join((told or said or [type(e).__name__])[0].split())[:200].rstrip(". ")


def _last_line(e: Exception) -> str:
    """The end of what was raised in an actor, which names it: before it stand Ray's words and a traceback."""
    return [line.strip() for line in str(e).splitlines() if line.strip()][-1][:300]


def _where(log: Path) -> str:
    return f"its log is {log}" if log.exists() else "its log is among Ray's on its machine"


def _print_to(log_path: Path) -> None:
    with log_path.open("ab") as log:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)


def _private_from_now_on() -> None:
    """Ray reads its environment when it is imported, so that it must be there before, and stays for later clusters.

    Raises:
        UserError: it was imported without it.
    """
    if "ray" in sys.modules and any(os.environ.get(name) != value for name, value in PRIVATE.items()):
        raise UserError(
            "cluster.address: local: Ray was imported before the cluster starts, by code of your own, and lets in "
            "whoever asks. Don't import it there, or start a cluster with `ray start`"
        )
    os.environ.update(PRIVATE)


def _imported() -> Any:
    try:
        import ray
        import ray.util.scheduling_strategies
    except ImportError as e:
        raise UserError(f"cluster: this needs Ray ({e}): `{to_install('ray')}`") from e
    return ray


@contextlib.contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """This process's environment with these, and what it starts meanwhile."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextlib.contextmanager
def _own_sigterm() -> Iterator[None]:
    """Ray takes SIGTERM for itself; it is the loop's."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):  # not in the main thread
            signal.signal(signal.SIGTERM, before)
