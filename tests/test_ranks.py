"""Several processes that compute together, as one worker: one fails and all end, and nobody is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from rlaif.errors import UserError, WorkerDied, WorkerError
from rlaif.workers import ranks
from rlaif.workers.inline import InlineWorker
from rlaif.workers.ranks import Ranks, start_ranks
from rlaif.workers.weights import WeightsRef

ROOT = Path(__file__).resolve().parent.parent
FACTORY = f"{__name__}:Adds"


class Adds:
    """What the tests run in ranks: sums that each has a part in, and ways to fail."""

    def __init__(self, refuses: bool = False, fails_in: int | None = None) -> None:
        if refuses:
            raise UserError("learner.beta: too much")
        if self.rank == fails_in:
            raise MemoryError("no room")

    @property
    def rank(self) -> int:
        return int(os.environ["RANK"])

    def about(self) -> dict[str, str]:
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "OMP_NUM_THREADS", "GLOO_SOCKET_IFNAME")
        return {name: os.environ.get(name, "") for name in names}

    def added(self, number: int) -> float:
        import torch

        value = torch.tensor(float(number + self.rank))
        torch.distributed.all_reduce(value)
        return float(value)

    def several(self, count: int, fails_at: int | None = None) -> Iterator[float]:
        for n in range(count):
            if n == fails_at and self.rank == 1:
                raise ZeroDivisionError("nought")
            yield self.added(n)

    def folder_of(self, weights: WeightsRef) -> Path:
        return weights.path

    def refuse(self) -> None:
        raise UserError("rows.jsonl:3: no pair")

    def refuse_alone(self) -> None:
        if self.rank == 0:
            raise UserError("state: no space left on the disk")

    def die_alone(self) -> float:
        if self.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return self.added(0)

    def pids(self) -> list[int]:
        import torch

        found: list[Any] = [None] * int(os.environ["WORLD_SIZE"])
        torch.distributed.all_gather_object(found, os.getpid())
        return found


@pytest.fixture
def grace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "GRACE_S", 1.0)


@pytest.fixture
def two(tmp_path: Path, grace: None) -> Iterator[Ranks]:
    found = start_ranks("learner", FACTORY, {}, 2, tmp_path / "logs")
    yield found
    found.close()


def all_gone(pids: list[int]) -> bool:
    ends = time.monotonic() + 20
    while time.monotonic() < ends and any(psutil.pid_exists(pid) for pid in pids):
        time.sleep(0.05)
    return not any(psutil.pid_exists(pid) for pid in pids)


@pytest.mark.slow
def test_each_is_called_and_the_first_answers(two: Ranks, tmp_path: Path) -> None:
    two.ready()
    assert two.poll(0)
    about = two.call("about")
    assert [about[n] for n in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")] == ["0", "2", "0", "2"]
    assert about["GLOO_SOCKET_IFNAME"] == "lo", "nobody else is to reach what they say to each other"
    assert two.call("added", number=3) == 7
    assert list(two.stream("several", count=4)) == [1, 3, 5, 7]
    with pytest.raises(UserError, match=r"rows.jsonl:3"):
        two.call("refuse")
    assert two.call("added", number=1) == 3, "what all refuse ends none"
    listening = [
        c.laddr.ip for pid in two.call("pids") for c in psutil.Process(pid).net_connections() if c.status == "LISTEN"
    ]
    assert set(listening) <= {"127.0.0.1"}
    assert sorted(p.name for p in (tmp_path / "logs").iterdir()) == ["learner-2.log", "learner.log"]
    pids = two.call("pids")
    two.close()
    assert all_gone(pids)


@pytest.mark.slow
def test_one_that_fails_alone_ends_all(two: Ranks) -> None:
    pids = two.call("pids")
    items = two.stream("several", count=9, fails_at=2)
    assert [next(items), next(items)] == [1, 3]
    with pytest.raises(
        WorkerError, match=r"learner 2 worker failed: ZeroDivisionError: nought; its log is .*learner-2"
    ):
        list(items)
    with pytest.raises(WorkerDied, match=r"learner worker has ended: learner 2 worker failed: ZeroDivisionError"):
        two.call("added", number=1)
    assert all_gone(pids)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "error", "said"),
    [
        ("die_alone", WorkerDied, r"learner 2 worker died \(killed by SIGKILL"),
        ("refuse_alone", UserError, "no space left on the disk"),
    ],
)
def test_what_one_alone_ends_with_is_told(two: Ranks, method: str, error: type[Exception], said: str) -> None:
    pids = two.call("pids")
    with pytest.raises(error, match=said):
        two.call(method)
    assert all_gone(pids)


@pytest.mark.slow
def test_a_stream_that_is_given_up_ends_all(two: Ranks) -> None:
    pids = two.call("pids")
    items = two.stream("several", count=10**9)
    next(items)
    items.close()
    assert all_gone(pids)
    two.close()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kwargs", "error", "said"),
    [
        ({"refuses": True}, UserError, "learner.beta: too much"),
        ({"fails_in": 1}, WorkerError, "learner 2 worker failed: MemoryError: no room"),
    ],
)
def test_one_that_cannot_be_built_is_told(
    kwargs: dict[str, Any], error: type[Exception], said: str, tmp_path: Path, grace: None
) -> None:
    found = start_ranks("learner", FACTORY, kwargs, 2, tmp_path)
    while not found.poll(0.1):
        pass
    for _ in range(2):
        with pytest.raises(error, match=said):
            found.ready()
    found.close()


@pytest.mark.slow
def test_nobody_outlives_a_loop_that_is_killed(tmp_path: Path) -> None:
    code = f"""
from pathlib import Path
from tests.test_ranks import FACTORY
from rlaif.workers.ranks import start_ranks
two = start_ranks("learner", FACTORY, {{}}, 2, Path({str(tmp_path)!r}))
print(*two.call("pids"), flush=True)
list(two.stream("several", count=10**9))
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)])}
    with subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True) as loop:
        assert loop.stdout is not None
        pids = [int(pid) for pid in loop.stdout.readline().split()]
        loop.kill()
    assert len(pids) == 2
    assert all_gone(pids)


class Waits(InlineWorker):
    """Waits for its peer until it is killed."""

    killed = False

    def call(self, method: str, **kwargs: Any) -> Any:
        while not self.killed:
            time.sleep(0.01)
        raise WorkerDied("killed")

    def kill(self) -> None:
        self.killed = True


class Fails(InlineWorker):
    def call(self, method: str, **kwargs: Any) -> Any:
        raise WorkerError("learner 2 worker failed: it is full")


def test_who_waits_for_one_that_failed_is_ended(grace: None) -> None:
    closed: list[int] = []
    both = [Waits("learner", "builtins:dict", {}), Fails("learner 2", "builtins:dict", {})]
    together = Ranks("learner", both, lambda: closed.append(1))
    with pytest.raises(WorkerError, match="it is full"):
        together.call("x")
    assert closed
    with pytest.raises(WorkerDied, match=r"learner worker has ended: .*it is full"):
        together.call("x")
