"""A process that labels a run's queue: `python -m tests.review.labeller RUN AUTHOR TORN_AT`.

With `turns` in place of a number it takes a line of its input before each step: ask, answer, ask, ...
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

from rlaif.review import labels
from rlaif.review.queue import Queue
from rlaif.rundir.store import RunDir


def main(run: Path, author: str, torn_at: int) -> None:
    """Labels until nothing waits; a line for each label that is stored. Killed half-way through write `torn_at`."""
    real, writes = os.write, 0

    def torn(fd: int, data: bytes) -> int:
        nonlocal writes
        writes += 1
        if writes == torn_at:
            real(fd, data[: len(data) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        return real(fd, data)

    labels.os.write = torn  # type: ignore[attr-defined]
    queue = Queue(RunDir.open(run))
    while (question := queue.next(author)) is not None:
        queue.answer(question.pair_id, "1", author, "a reason")
        real(1, f"{question.pair_id}\n".encode())


def in_turns(run: Path, author: str) -> None:
    """Prints the pair that it was asked about, or `-`."""
    queue = Queue(RunDir.open(run))
    while sys.stdin.readline():
        question = queue.next(author)
        print(question.pair_id if question else "-", flush=True)
        if sys.stdin.readline() and question:
            queue.answer(question.pair_id, "2", author)
        print("answered", flush=True)


if __name__ == "__main__":
    if sys.argv[3] == "turns":
        in_turns(Path(sys.argv[1]), sys.argv[2])
    else:
        main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
