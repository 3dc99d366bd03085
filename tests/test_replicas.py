"""Several workers as one: every row once, whoever is late, dies, or is started again."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from rlaif.errors import RunPaused, UserError, WorkerDied, WorkerError
from rlaif.loop import Loop
from rlaif.records import IterationMetrics
from rlaif.workers.feed import Feed
from rlaif.workers.inline import InlineWorker
from rlaif.workers.process import ProcessWorker
from rlaif.workers.replicas import Replicas
from rlaif.workers.weights import WeightsRef
from rlaif.workers.worker import TOGETHER, Piece, Worker
from tests.conftest import until
from tests.kill_driver import casts, durable_ballots
from tests.stubs import Quiet, stub_job, stub_loop
from tests.test_resume import outcome


class Squares:
    """What the tests run in replicas: squares of numbers, under what it was told; notes what it is asked."""

    def __init__(self, asked: str, delay_s: float = 0.0, seed: int = 0) -> None:
        self._asked, self._delay_s, self._draw = Path(asked), delay_s, random.Random(seed)
        self.offset = 0

    def load(self, offset: int) -> None:
        self.offset = offset

    def holds(self) -> int:
        return self.offset

    def pid(self) -> int:
        return os.getpid()

    def squares(self, numbers: list[int]) -> Iterator[list[tuple[int, int]]]:
        if -1 in numbers:
            raise UserError("numbers.jsonl:3: no number")
        for n in numbers:
            with self._asked.open("a") as f:
                f.write(f"{n}\n")
            time.sleep(self._delay_s * self._draw.random())
            yield [(n, n * n + self.offset)]


class Mortal(InlineWorker):
    """A worker without a process that dies all the same, before the item whose number is given."""

    dies_at: int | None = None
    delays: random.Random | None = None

    def stream(self, method: str, feed: Feed | None = None, **kwargs: Any) -> Iterator[Any]:
        for n, item in enumerate(super().stream(method, feed, **kwargs)):
            if self.delays:
                time.sleep(self.delays.random() / 200)
            if n == self.dies_at:
                raise WorkerDied(f"{self.name} worker died (unplugged)")
            yield item

    def call(self, method: str, **kwargs: Any) -> Any:
        if self.dies_at == 0:
            raise WorkerDied(f"{self.name} worker died (unplugged)")
        return super().call(method, **kwargs)


FACTORY = f"{__name__}:Squares"


def owed(numbers: Sequence[int]) -> Piece:
    """The squares of these, as far as they aren't there."""

    def piece(rows: Sequence[tuple[int, int]]) -> dict[str, Any] | None:
        have = {n for n, _ in rows}
        left = [n for n in numbers if n not in have]
        return {"numbers": left} if left else None

    return piece


def in_pieces(count: int, size: int) -> list[Piece]:
    return [owed(range(n, min(n + size, count))) for n in range(0, count, size)]


class Cluster:
    """Starts replicas; `fate` says of the n-th start of all when it dies, `room` how many may be started again."""

    def __init__(self, tmp_path: Path, fate: dict[int, int] | None = None, room: int = 99, delay_s: float = 0.0):
        self.asked, self.started = tmp_path / "asked.log", 0
        self._fate, self.room, self._delay_s = fate or {}, room, delay_s
        self.refused = 0
        self.gate = threading.Event()
        self.gate.set()
        """Cleared, whoever is started waits."""

    def start(self, number: int) -> Worker:
        self.gate.wait(20)
        if self.started >= self.room:
            self.refused += 1
            raise WorkerError(f"squares {number + 1}: no room")
        mortal = Mortal(f"squares {number + 1}", FACTORY, {"asked": str(self.asked), "delay_s": self._delay_s,
                                                            "seed": number})  # fmt: skip
        mortal.dies_at = self._fate.get(self.started)
        self.started += 1
        return mortal

    def replicas(self, count: int, max_restarts: int = 9) -> tuple[Replicas, list[str]]:
        told: list[str] = []
        return Replicas("squares", self.start, count, max_restarts, told.append), told

    def counts(self) -> Counter[int]:
        return Counter(map(int, self.asked.read_text().split()))


def squares(n: int, offset: int = 0) -> list[tuple[int, int]]:
    return [(i, i * i + offset) for i in range(n)]


@pytest.mark.parametrize("count", [1, 2, 5])
def test_every_row_is_made_once_by_however_many(tmp_path: Path, count: int) -> None:
    cluster = Cluster(tmp_path, delay_s=0.003)
    replicas, _ = cluster.replicas(count)
    rows = [row for chunk in replicas.spread("squares", in_pieces(40, 3)) for row in chunk]
    assert sorted(rows) == squares(40)
    assert set(cluster.counts().values()) == {1}
    if count > 1:
        assert rows != sorted(rows), "they work at the same time"


def test_one_worker_takes_pieces_too(tmp_path: Path) -> None:
    worker = InlineWorker("squares", FACTORY, {"asked": str(tmp_path / "asked.log")})
    worker.tell("load", offset=3)
    assert [row for chunk in worker.spread("squares", in_pieces(7, 3)) for row in chunk] == squares(7, 3)
    assert worker.each("holds") == [3]


@pytest.mark.parametrize("seed", range(6))
def test_what_a_dead_replica_owes_is_asked_of_another(tmp_path: Path, seed: int) -> None:
    draw = random.Random(seed)
    fate = {n: draw.randrange(6) for n in draw.sample(range(6), 4)}  # some of them started in the place of others
    cluster = Cluster(tmp_path, fate, delay_s=0.002)
    replicas, told = cluster.replicas(3)
    replicas.tell("load", offset=100)
    rows = [row for chunk in replicas.spread("squares", in_pieces(40, 8)) for row in chunk]
    assert sorted(rows) == squares(40, 100), "and another holds what the first was told"
    asked_again = sum(cluster.counts().values()) - 40
    assert asked_again <= len(told), "only what was on its way from the dead one"
    assert all("worker died (unplugged); another takes its place" in message for message in told)
    assert told


def test_after_so_many_restarts_the_run_pauses_and_nothing_that_was_made_is_lost(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path, dict.fromkeys(range(9), 2), delay_s=0.002)
    replicas, told = cluster.replicas(2, max_restarts=3)
    rows: list[Any] = []
    with pytest.raises(RunPaused, match=r"squares \d worker died \(unplugged\); cluster.max_restarts=3 is used up"):
        for chunk in replicas.spread("squares", in_pieces(40, 8)):
            rows += chunk
    assert len(told) == 3
    # Each of the four that died had one row on its way; one that lived on may have begun another.
    assert len(rows) == len(set(rows)) >= sum(cluster.counts().values()) - 5
    with pytest.raises(RunPaused):
        replicas.call("holds")


def test_one_without_room_is_done_without(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path, {0: 1, 1: 3}, room=2)
    replicas, told = cluster.replicas(2)
    rows: list[Any] = []
    with pytest.raises(RunPaused, match=r"squares \d: no room; no squares is left. The same command goes on"):
        for chunk in replicas.spread("squares", in_pieces(20, 4)):
            rows += chunk
    assert len(rows) == len(set(rows)) >= 3
    assert any("no room; squares goes on with 1 of 2" in message for message in told)


def test_one_that_was_lost_is_tried_again_and_is_told_what_the_others_were(tmp_path: Path) -> None:
    """A machine may be back. Meanwhile the work is cut for those that are left."""
    cluster = Cluster(tmp_path, {1: 1}, room=3)
    replicas, told = cluster.replicas(3)
    replicas.tell("load", offset=1)
    for _ in range(200):
        assert len([row for chunk in replicas.spread("squares", in_pieces(9, 3)) for row in chunk]) == 9
        if replicas.width == 2:
            break
        time.sleep(0.01)
    assert any("no room; squares goes on with 2 of 3" in message for message in told)
    replicas.tell("load", offset=2)
    until(lambda: cluster.refused == 2)
    assert replicas.width == 2
    cluster.room = 99
    replicas.tell("load", offset=3)
    until(lambda: replicas.width == 3)
    assert replicas.each("holds") == [3, 3, 3]
    assert told[-1].endswith("is back; squares goes on with 3 of 3")


def test_rows_that_wait_are_handed_over_at_once(tmp_path: Path) -> None:
    """Samplers must not stand still while the disk that keeps their answers is synced."""
    cluster = Cluster(tmp_path)
    replicas, _ = cluster.replicas(4)
    sizes = []
    for chunk in replicas.spread("squares", in_pieces(400, 100)):
        sizes.append(len(chunk))
        time.sleep(0.02)
    assert sum(sizes) == 400
    assert len(sizes) < 40
    assert max(sizes) <= TOGETHER


def test_who_starts_while_others_are_told_something_is_told_it_too(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path, {0: 1})
    replicas, _ = cluster.replicas(2)
    replicas.tell("load", offset=1)
    cluster.gate.clear()
    with pytest.raises(WorkerDied):
        list(replicas.stream("squares", numbers=[1, 2]))
    replicas.tell("load", offset=2)
    assert replicas.each("holds") == [2], "the other isn't there yet"
    cluster.gate.set()
    until(lambda: len(replicas.each("holds")) == 2)
    assert replicas.each("holds") == [2, 2]


def test_each_is_asked_and_those_that_die_of_it_are_left_out(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path, {1: 0})
    replicas, told = cluster.replicas(3)
    assert replicas.each("holds") == [0, 0]
    assert len(told) == 1
    until(lambda: replicas.each("holds") == [0, 0, 0])


def test_a_call_that_one_dies_of_is_made_of_another(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path, {0: 0, 1: 0})
    replicas, told = cluster.replicas(3)
    replicas.ready()
    cluster.gate.clear()
    assert [replicas.call("holds") for _ in range(4)] == [0, 0, 0, 0]
    assert len(told) == 2
    cluster.gate.set()


def test_an_error_of_one_piece_comes_after_the_rows_of_others(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path, delay_s=0.05)
    replicas, told = cluster.replicas(2)
    rows: list[Any] = []
    with pytest.raises(UserError, match=r"numbers.jsonl:3"):
        for chunk in replicas.spread("squares", [owed(range(5)), owed([-1]), owed(range(5, 9))]):
            rows += chunk
    assert dict(rows).keys() == cluster.counts().keys(), "what was asked arrived"
    assert not told
    assert replicas.call("holds") == 0


def test_who_stops_taking_rows_leaves_the_replicas_free(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path)
    replicas, _ = cluster.replicas(2)
    for _ in replicas.spread("squares", in_pieces(1000, 100)):
        break
    assert len(replicas.each("holds")) == 2
    assert sum(cluster.counts().values()) < 30


def test_pieces_may_come_late_and_from_several_threads(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path)
    replicas, _ = cluster.replicas(3)
    rows: list[Any] = []

    def late(first: int) -> Iterator[Piece]:
        for n in range(first, first + 5):
            time.sleep(0.01)
            yield owed([n])

    def take(first: int) -> None:
        rows.extend(row for chunk in replicas.spread("squares", late(first)) for row in chunk)

    threads = [threading.Thread(target=take, args=(first,)) for first in (0, 5, 10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert sorted(rows) == squares(15)


class Failing(InlineWorker):
    def ready(self) -> None:
        raise UserError("jobs/x.yaml: no such model")


def test_one_that_cant_be_built_is_told_as_it_is(tmp_path: Path) -> None:
    def start(number: int) -> Worker:
        return (Failing if number else InlineWorker)("squares", FACTORY, {"asked": str(tmp_path / "asked.log")})

    replicas = Replicas("squares", start, 2, max_restarts=5)
    assert replicas.poll(1.0)
    with pytest.raises(UserError, match="no such model"):
        replicas.ready()
    replicas.close()


# ---- a loop's workers


JOB: dict[str, Any] = {"judge": {"batch_tokens": 64}, "sampling": {"completions_per_prompt": 3, "max_tokens": 128}}
"""Two prompts a piece."""


def replicated(loop: Loop, role: str, seed: int, deaths: int) -> list[str]:
    """Puts three workers in the place of a stub loop's, of which so many die; what is told of them."""
    single, draw, told = getattr(loop, role), random.Random(f"{seed} {role}"), list[str]()
    fate = {n: draw.randrange(2) for n in draw.sample(range(4), deaths)}
    started = iter(range(99))

    def start(number: int) -> Worker:
        mortal = Mortal(f"{role} {number + 1}", *single.made_from)
        mortal.delays, mortal.dies_at = random.Random(seed + number), fate.get(next(started))
        return mortal

    setattr(loop, role, Replicas(role, start, 3, 9, told.append))
    return told


@pytest.mark.slow
@pytest.mark.parametrize(
    ("seed", "stream", "staleness"), [(0, False, 0), (1, False, 0), (2, True, 0), (3, True, 0), (4, True, 1)]
)
def test_a_run_of_replicas_that_die_decides_as_one_of_single_workers(
    tmp_path: Path, seed: int, stream: bool, staleness: int
) -> None:
    stub_loop(tmp_path / "one", stub_job(**JOB, pipeline={"stream": False, "staleness": staleness})).run()
    loop = stub_loop(tmp_path / "many", stub_job(**JOB, pipeline={"stream": stream, "staleness": staleness}))
    told = [replicated(loop, role, seed, deaths=2) for role in ("sampler", "judge")]
    loop.measurer = loop.judge
    loop.run()
    assert all(told), "some died"
    assert outcome(tmp_path / "many" / "run") == outcome(tmp_path / "one" / "run")
    asked = Counter((tmp_path / "many/casts.log").read_text().split())
    again = sum(asked.values()) - len(asked)
    assert again <= 3 * len(told[1]), "the stub casts three at a time: those that were on their way are lost"
    assert asked.keys() == {*(tmp_path / "one/casts.log").read_text().split()}


@pytest.mark.parametrize("staleness", [0, 1])
def test_who_takes_the_place_of_one_that_died_can_read_what_it_held(tmp_path: Path, staleness: int) -> None:
    """Whenever that is: an iteration's end removes checkpoints, and the next policy may be long in coming."""
    held: list[WeightsRef] = []
    ends: list[bool] = []

    class Watching(Quiet):
        def iteration_done(self, iteration: int, metrics: IterationMetrics) -> None:
            ends.append(not held or held[-1].path.is_dir())

    class Tells(InlineWorker):
        def tell(self, method: str, **kwargs: Any) -> None:
            super().tell(method, **kwargs)
            held.append(kwargs["weights"])

    changes: dict[str, Any] = {"filters": {"min_kept_pairs": 1}, "eval": {"every": 9, "prompts": 3}}
    job = stub_job(**changes, constitution="rules@1", pipeline={"staleness": staleness})
    loop = stub_loop(tmp_path, job, progress=Watching())
    loop.sampler = Tells("sampler", *loop.sampler.made_from)  # type: ignore[attr-defined]
    loop.run()
    assert ends == [True] * 4
    assert len({ref.digest for ref in held}) == 4 - staleness
    assert sum(ref.path.is_dir() for ref in held) < len(held), "nothing was removed"


@pytest.mark.slow
def test_a_paused_run_goes_on_where_it_was(tmp_path: Path) -> None:
    stub_loop(tmp_path / "one", stub_job(**JOB)).run()
    loop = stub_loop(tmp_path / "many", stub_job(**JOB))
    replicated(loop, "judge", 5, deaths=4)
    assert isinstance(loop.judge, Replicas)
    loop.judge.max_restarts = 1
    loop.measurer = loop.judge
    with pytest.raises(RunPaused, match=r"cluster\.max_restarts=1 is used up"):
        loop.run()
    durable, before = {*durable_ballots(tmp_path / "many")}, len(casts(tmp_path / "many"))
    stub_loop(tmp_path / "many", stub_job(**JOB)).run()
    assert outcome(tmp_path / "many" / "run")["rows"] == outcome(tmp_path / "one" / "run")["rows"]
    assert not durable & {*casts(tmp_path / "many")[before:]}, "nobody is asked twice"


def test_one_that_takes_a_dead_ones_place_finds_the_copy_that_the_others_hold(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A policy that was written in fp32 reaches a sampler in bf16 as a copy."""
    stub_loop(tmp_path, stub_job(**JOB | {"iterations": 1})).run()
    monkeypatch.setattr("tests.stubs.StubSampler.computes_in", lambda self: "stub bf16")
    monkeypatch.setattr("tests.stubs.StubLearner.exports_in", lambda self: "bf16")
    loop = stub_loop(tmp_path, stub_job(**JOB | {"iterations": 2}))
    told = replicated(loop, "sampler", 0, deaths=2)
    loop.run()
    assert len(told) == 2
    assert all("another takes its place" in line for line in told), "and none is lost"
    assert [e.kind for e in loop.dir.events()].count("policy_rounded") == 1
    assert not list(loop.dir.path.glob("learner/*.partial"))


# ---- with processes


def processes(tmp_path: Path, count: int, delay_s: float = 0.0, max_restarts: int = 5) -> tuple[Replicas, list[str]]:
    told: list[str] = []

    def start(number: int) -> Worker:
        asked = {"asked": str(tmp_path / "asked.log"), "delay_s": delay_s, "seed": number}
        return ProcessWorker(f"squares {number + 1}", FACTORY, asked, tmp_path / f"squares-{number + 1}.log")

    return Replicas("squares", start, count, max_restarts, told.append), told


@pytest.mark.slow
def test_processes_that_are_killed_are_replaced(tmp_path: Path) -> None:
    replicas, told = processes(tmp_path, 2, delay_s=0.02)
    replicas.ready()
    replicas.tell("load", offset=7)
    first = replicas.each("pid")
    rows: list[Any] = []
    for chunk in replicas.spread("squares", in_pieces(60, 10)):
        rows += chunk
        if len(rows) in (5, 25):
            os.kill(first[len(rows) == 25], signal.SIGKILL)
    assert sorted(rows) == squares(60, 7)
    assert len(told) == 2
    assert all("killed by SIGKILL" in message and "squares-" in message for message in told)
    until(lambda: len(replicas.each("holds")) == 2)
    assert replicas.each("holds") == [7, 7]
    second = replicas.each("pid")
    assert not {*first} & {*second}
    replicas.close()
    replicas.close()
    assert not [pid for pid in second if Path(f"/proc/{pid}/stat").exists() and _state(pid) != "Z"]


def _state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


@pytest.mark.slow
def test_closing_while_they_work_ends_them(tmp_path: Path) -> None:
    replicas, told = processes(tmp_path, 2, delay_s=5)
    replicas.ready()
    rows = replicas.spread("squares", in_pieces(8, 2))
    ended: list[str] = []

    def take() -> None:
        with pytest.raises(WorkerError, match="squares is closed"):
            list(rows)
        ended.append("so it did")

    threading.Thread(target=take, daemon=True).start()
    until(lambda: (tmp_path / "asked.log").exists())
    pids = [worker.pid for worker in replicas.workers if isinstance(worker, ProcessWorker)]
    replicas.close()
    assert not [pid for pid in pids if Path(f"/proc/{pid}/stat").exists() and _state(pid) != "Z"]
    until(lambda: bool(ended))
    assert not told, "nobody is replaced who was to end"
