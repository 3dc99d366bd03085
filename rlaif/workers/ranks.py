"""A role that is several processes which compute together (`torch.distributed`): each is called alike, at the same
time, and the first one answers.

In: the processes' workers, by number. Out: a `Worker`. One that fails while others go on leaves them waiting for it, or
knowing something else than it does: then all are ended, and whoever called hears of the one that failed first.

`start_ranks` starts them on this machine, as `torchrun` would: with `RANK`, `WORLD_SIZE` and so on. They meet in a
folder of their own, and talk over loopback. Unlike `torchrun`'s, each is a child of the loop and ends with it, whose
calls it has to hear.
"""

from __future__ import annotations

import os
import queue
import shutil
import sys
import tempfile
import threading
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from datetime import timedelta
from pathlib import Path
from typing import Any

from rlaif.errors import UserError, WorkerDied, WorkerError
from rlaif.workers.feed import Feed
from rlaif.workers.process import ProcessWorker
from rlaif.workers.worker import Worker, built

GRACE_S = 10.0
"""After one has failed: how long the others get to fail, too, or to end what they do."""
PATIENCE = timedelta(hours=2)
"""How long one waits for another. NCCL's ten minutes would end a learner whose first process writes a large state to a
slow disk. Who waits for one that failed is ended by the loop."""
JOINED = f"{__name__}:joined"
"""The factory of each process; it is given the object's own, and where to meet."""
LOOPBACK = dict.fromkeys(("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"), "lo0" if sys.platform == "darwin" else "lo")


class Ranks(Worker):
    """Several workers, one of which can do nothing without the others.

    Args:
        name: For messages.
        workers: By number, from 0.
        closed: Called when all have ended.
    """

    def __init__(self, name: str, workers: Sequence[Worker], closed: Callable[[], None] = lambda: None) -> None:
        self.name = name
        self.workers = workers
        self._closed = closed
        self._over: WorkerDied | None = None
        """Why none can be called any more."""
        self._unready: Exception | None = None
        """What building them failed with."""
        self._loading = threading.Thread(target=self._load, name=f"{name} loading", daemon=True)
        self._loading.start()

    def poll(self, timeout_s: float) -> bool:
        """Whether all are built, or one has failed."""
        self._loading.join(timeout_s)
        return not self._loading.is_alive()

    def ready(self) -> None:
        """Waits until all are built. Raises what building the first that failed raised; the others are ended."""
        self._loading.join()
        if self._unready is not None:
            raise self._unready

    def call(self, method: str, **kwargs: Any) -> Any:
        """Calls a method of each; what the first one answers.

        Raises:
            UserError, WorkerError: as of one worker; a `WorkerDied` where they can't be called any more.
        """
        self.ready()
        return self._together(lambda worker: worker.call(method, **kwargs))[0]

    def stream(self, method: str, feed: Feed | None = None, **kwargs: Any) -> Generator[Any, None, None]:
        """Calls a generator method of each; the first one's items as they arrive. Given up early, all are ended: each
        may be at another item."""
        if feed is not None:
            raise NotImplementedError(f"{self.name}.{method}: what computes together takes no feed")
        self.ready()
        items: queue.SimpleQueue[Any] = queue.SimpleQueue()
        end = object()

        def one_of_them(worker: Worker) -> None:
            for item in worker.stream(method, **kwargs):
                if worker is self.workers[0]:
                    items.put(item)

        def listen() -> None:
            try:
                self._together(one_of_them)
            except BaseException as e:  # raised where the items are taken
                items.put(e)
            items.put(end)

        listening = threading.Thread(target=listen, name=f"{self.name} {method}", daemon=True)
        listening.start()
        finished = False
        try:
            while (item := items.get()) is not end:
                if isinstance(item, BaseException):
                    finished = True
                    raise item
                yield item
            finished = True
        finally:
            if not finished:
                self._end(WorkerDied(f"{self.name}.{method} was given up"))
            listening.join()

    def close(self) -> None:
        """Ends all, at the same time."""
        self._each(lambda worker: worker.close())

    def kill(self) -> None:
        """Ends all at once."""
        self._each(lambda worker: worker.kill())

    def _each(self, do: Callable[[Worker], None]) -> None:
        threads = [threading.Thread(target=do, args=(worker,), daemon=True) for worker in self.workers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self._closed()

    def _load(self) -> None:
        try:
            self._together(lambda worker: worker.ready())
        except Exception as e:  # `ready` raises it
            self._unready = e

    def _together(self, do: Callable[[Worker], Any]) -> list[Any]:
        """Does it with each at the same time; the answers, by number."""
        if self._over is not None:
            raise self._over
        with ThreadPoolExecutor(len(self.workers), self.name) as pool:
            calls = [pool.submit(do, worker) for worker in self.workers]
            try:
                wait(calls, return_when=FIRST_EXCEPTION)
                failed = any(call.done() and call.exception() for call in calls)
                wait(calls, GRACE_S if failed else None)
            except BaseException:  # Ctrl-C
                self._end(WorkerDied(f"{self.name} was given up"))
                raise
            failures = [e for call in calls if call.done() and (e := call.exception()) is not None]
            if not failures:
                return [call.result() for call in calls]
            first = _told_of(failures)
            # What all refuse, each before it did anything, leaves them as they were.
            if len(failures) < len(calls) or isinstance(first, WorkerDied):
                self._end(WorkerDied(f"{self.name} worker has ended: {first}"))
            raise first

    def _end(self, why: WorkerDied) -> None:
        self._over = why
        self.kill()


def _told_of(failures: Sequence[BaseException]) -> BaseException:
    """The failure that the others follow from: who loses a peer fails at once, too."""
    return min(failures, key=lambda e: (not isinstance(e, WorkerDied), not isinstance(e, UserError)))


def start_ranks(
    name: str, factory: str, kwargs: dict[str, Any], count: int, logs: Path, env: Mapping[str, str] | None = None
) -> Ranks:
    """So many processes on this machine. The first one's log is `NAME.log`, the others' `NAME-2.log` and so on."""
    folder = Path(tempfile.mkdtemp(prefix="rlaif-"))
    meeting = (folder / "meeting").as_uri()
    threads = os.environ.get("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))
    workers = [
        ProcessWorker(
            name if number == 0 else f"{name} {number + 1}",
            JOINED,
            {"meeting": meeting, "factory": factory, **kwargs},
            logs / f"{name if number == 0 else f'{name}-{number + 1}'}.log",
            {**LOOPBACK, "OMP_NUM_THREADS": threads, **(env or {}), **numbered(number, count, number, count)},
        )
        for number in range(count)
    ]
    return Ranks(name, workers, lambda: shutil.rmtree(folder, ignore_errors=True))


def numbered(rank: int, count: int, here: int, count_here: int) -> dict[str, str]:
    """What `torchrun` tells a process in its environment: its number among all, and among those of its machine."""
    numbers = {"RANK": rank, "WORLD_SIZE": count, "LOCAL_RANK": here, "LOCAL_WORLD_SIZE": count_here}
    return {name: str(number) for name, number in numbers.items()}


def joined(meeting: str, factory: str, **kwargs: Any) -> Any:
    """The object that `factory` builds from the rest, once its process has met the others.

    Args:
        meeting: Where: an `init_method` of `torch.distributed`.
        factory: `"module:callable"`.
        kwargs: What that is called with.
    """
    import torch
    from torch import distributed

    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
        backend = "cpu:gloo,cuda:nccl"
    try:
        distributed.init_process_group(
            backend,
            init_method=meeting,
            rank=int(os.environ["RANK"]),
            world_size=int(os.environ["WORLD_SIZE"]),
            timeout=PATIENCE,
        )
    except RuntimeError as e:
        raise WorkerError(f"the processes don't find each other at {meeting} ({e})") from e
    return built(factory, kwargs)
