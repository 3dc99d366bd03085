"""Starting workers of the kind that a job asks for, and waiting for them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

from rlaif.config import WorkerKind
from rlaif.workers.inline import InlineWorker
from rlaif.workers.process import ProcessWorker
from rlaif.workers.worker import Worker


class Starting(Protocol):
    """What can be waited for: a worker, or servers (`rlaif.serving`)."""

    name: str

    def poll(self, timeout_s: float) -> bool:
        """Whether `ready` has an answer, good or bad, after at most so many seconds."""

    def ready(self) -> None:
        """Waits until it can be used. Raises why it can't."""


def start_worker(
    kind: WorkerKind,
    name: str,
    factory: str,
    kwargs: dict[str, Any],
    log_path: Path,
    env: Mapping[str, str] | None = None,
) -> Worker:
    """A worker of that kind; its arguments are those of `ProcessWorker`."""
    if kind == "process":
        return ProcessWorker(name, factory, kwargs, log_path, env)
    return InlineWorker(name, factory, kwargs, log_path, env)


def wait_until_ready(
    workers: Iterable[Starting], told: Callable[[str, float, list[str]], None], poll_s: float = 0.1
) -> None:
    """Waits until all are built; the first that fails raises what it failed with.

    Args:
        told: Called for each as soon as it is built: its name, seconds since the call, and who is still awaited.
    """
    started = time.monotonic()
    waiting = list(workers)
    while waiting:
        for worker in list(waiting):
            if worker.poll(poll_s):
                worker.ready()
                waiting.remove(worker)
                told(worker.name, time.monotonic() - started, [w.name for w in waiting])
