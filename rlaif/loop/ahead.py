"""Iterations that are sampled and judged while an earlier one trains (`pipeline.staleness`).

Which policy an iteration samples from its plan says, which is written before it may begin here; so the log doesn't
depend on who was faster. They are done one after the other, each in a thread of its own, with sampler and judge to
itself: whoever else wants one of these (evaluations, old pairs, anchors) waits until nothing is under way here
(`Later`). The learner is never asked.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Self

from rlaif.loop.running import Iteration, Progress
from rlaif.loop.streaming import LAST_CHUNK_S
from rlaif.records import IterationMetrics
from rlaif.workers.feed import Feed
from rlaif.workers.worker import Piece, Worker


class Ahead:
    """The iterations that are under way, or done and not taken yet. At the end of the block what is under way stops."""

    def __init__(self) -> None:
        self._jobs: dict[int, _Job] = {}

    def begin(self, it: Iteration, do: Callable[[], object], progress: Aside) -> None:
        """Does it after those that were begun before."""
        before = self._jobs[max(self._jobs)] if self._jobs else None
        self._jobs[it.k] = _Job(it, do, progress, before)

    def has(self, k: int) -> bool:
        """Whether an iteration was begun here."""
        return k in self._jobs

    def take(self, k: int) -> Iteration | None:
        """An iteration that was begun here, once it is sampled and judged; None of another one.

        Raises:
            Exception: what it failed with.
        """
        if (job := self._jobs.get(k)) is None:
            return None
        job.progress.show()
        job.thread.join()
        del self._jobs[k]
        if job.error is not None:
            raise job.error
        return job.it

    def wait(self) -> None:
        """Returns when nothing is under way."""
        for job in self._jobs.values():
            if job.thread.is_alive():
                job.progress.show()
            job.thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        for job in self._jobs.values():
            job.it.stop()
        end = time.monotonic() + LAST_CHUNK_S
        for job in self._jobs.values():
            job.thread.join(max(end - time.monotonic(), 0))


class _Job:
    def __init__(self, it: Iteration, do: Callable[[], object], progress: Aside, before: _Job | None):
        self.it, self.progress = it, progress
        self.error: BaseException | None = None
        self._do, self._before = do, before
        self.thread = threading.Thread(target=self._run, name=f"iteration {it.k}", daemon=True)
        self.thread.start()

    def _run(self) -> None:
        try:
            if self._before is not None:
                self._before.thread.join()
                if self._before.error is not None:  # raised before anybody asks for this one
                    return
            self._do()
        except BaseException as e:  # raised where it is taken
            self.error = e
        finally:
            self._before = None


class Later(Worker):
    """A worker that an iteration ahead may be using: who calls it here waits for that."""

    def __init__(self, worker: Worker, wait: Callable[[], None]):
        self._worker, self._wait = worker, wait
        self.name = worker.name

    @property
    def width(self) -> int:
        return self._worker.width

    def poll(self, timeout_s: float) -> bool:
        return self._worker.poll(timeout_s)

    def ready(self) -> None:
        self._wait()
        self._worker.ready()

    def call(self, method: str, **kwargs: Any) -> Any:
        self._wait()
        return self._worker.call(method, **kwargs)

    def stream(self, method: str, feed: Feed | None = None, **kwargs: Any) -> Iterator[Any]:
        self._wait()
        return self._worker.stream(method, feed=feed, **kwargs)

    def tell(self, method: str, **kwargs: Any) -> None:
        self._wait()
        self._worker.tell(method, **kwargs)

    def each(self, method: str, **kwargs: Any) -> list[Any]:
        self._wait()
        return self._worker.each(method, **kwargs)

    def spread(self, method: str, pieces: Iterable[Piece]) -> Iterator[list[Any]]:
        self._wait()
        return self._worker.spread(method, pieces)

    def close(self) -> None:
        self._worker.close()


class Aside:
    """The progress of an iteration ahead: silent but for notes, until somebody waits for it."""

    def __init__(self, progress: Progress):
        self._progress = progress
        self._stage: tuple[int, str, int, str, str] | None = None
        self._done = 0
        self._shown = False
        self._lock = threading.RLock()

    def show(self) -> None:
        """It is what the run waits for now."""
        with self._lock:
            self._shown = True
            if self._stage is not None:
                self._progress.stage(*self._stage)
                self._progress.advance(self._done)

    def stage(self, iteration: int, name: str, total: int, unit: str, text: str) -> None:
        with self._lock:
            self._stage, self._done = (iteration, name, total, unit, text), 0
            if self._shown:
                self._progress.stage(*self._stage)

    def advance(self, n: int) -> None:
        with self._lock:
            self._done += n
            if self._shown:
                self._progress.advance(n)

    def iteration_done(self, iteration: int, metrics: IterationMetrics) -> None:
        self._progress.iteration_done(iteration, metrics)

    def note(self, message: str) -> None:
        self._progress.note(message)
