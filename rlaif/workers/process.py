"""A worker in a process of its own: the parent's side; `child` is the other, and says what they tell each other.

A crash in the child is one line in the loop (`WorkerError`), its output goes to a log file, and it never outlives the
process that started it.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Self

import rlaif
from rlaif.errors import RlaifError, UserError, WorkerDied, WorkerError
from rlaif.workers.child import CALL, CANCEL, FED, ITEM, START, STREAM, kill_group
from rlaif.workers.feed import Feed
from rlaif.workers.worker import TOGETHER, Worker

CLOSE_GRACE_S = 15.0  # a tracker may have something to upload
_POLL_S = 1.0


class ProcessWorker(Worker):
    """A long-lived object in its own process.

    Args:
        name: For messages: `sampler`, `judge`, `learner`.
        factory: `"module:callable"`; called in the child with `kwargs`. If the result has `close()`, it is called
            at the end.
        kwargs: Picklable keyword arguments.
        log_path: The child's stdout and stderr are appended here.
        env: Added to the child's environment before anything is imported.
    """

    def __init__(
        self,
        name: str,
        factory: str,
        kwargs: dict[str, Any],
        log_path: Path,
        env: Mapping[str, str] | None = None,
    ) -> None:
        self.name = name
        self.log_path = log_path
        self._next_id = START
        self._ready = False
        self._streaming = False
        self._sending = threading.Lock()  # a feed's items come from other threads
        log_path.parent.mkdir(parents=True, exist_ok=True)
        ours, theirs = socket.socketpair()
        with log_path.open("ab") as log:
            log.write(f"--- {name} started {time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime())}\n".encode())
            log.flush()
            self._log_start = log.tell()
            # A new interpreter rather than multiprocessing's spawn: that one runs the caller's __main__ again, and
            # can't redirect what is printed while it does. A new session: Ctrl-C in the terminal is the parent's.
            self._process = subprocess.Popen(
                [sys.executable, "-m", "rlaif.workers.child", name, str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
                env=child_env(env),
            )
        theirs.close()
        self._connection = Connection(ours.detach())
        with contextlib.suppress(OSError):  # a child that died already is reported by ready()
            self._connection.send((list(filter(None, sys.path)), factory, kwargs))

    @property
    def pid(self) -> int:
        """Process id of the child."""
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether the child runs."""
        return self._process.poll() is None

    def poll(self, timeout_s: float) -> bool:
        """Whether `ready` has an answer, good or bad, after at most so many seconds."""
        return self._ready or self._connection.poll(timeout_s) or not self.alive

    def ready(self) -> None:
        """Waits until the object is built.

        Raises:
            UserError: the factory raised it.
            WorkerError: anything else went wrong.
        """
        if not self._ready:
            self._answer(START)
            self._ready = True

    def call(self, method: str, **kwargs: Any) -> Any:
        """Calls a method in the child and returns its (picklable) result.

        Raises:
            UserError: the method raised it; the worker can still be used.
            WorkerError: the method raised anything else; a `WorkerDied` when the process is gone.
        """
        return self._answer(self._send(method, kwargs, CALL))[1]

    def stream(self, method: str, feed: Feed | None = None, **kwargs: Any) -> Iterator[Any]:
        """Calls a generator method in the child; yields its items as they arrive. Lists of rows that have arrived by
        the time that somebody takes them come as one list.

        An iterator that is closed early stops the generator in the child after its next item. With a `feed` the method
        is given one, too, into which the items of this one go as they come.

        Raises:
            UserError, WorkerError: as in `call`.
        """
        call_id = self._send(method, kwargs, STREAM if feed is None else FED)
        self._streaming = True
        finished, rows = False, list[Any]()
        try:
            if feed is not None:
                feed.pour(lambda item: self._tell(call_id, item, ITEM))
            while True:
                try:
                    kind, value = self._answer(call_id)
                except RlaifError:
                    finished = True
                    if rows:
                        yield rows
                    raise
                finished = kind == "end"
                if not isinstance(value, list):
                    if rows:
                        yield rows
                        rows = []
                    if finished:
                        return
                    yield value
                    continue
                rows += value
                if len(rows) >= TOGETHER or not self._connection.poll(0):
                    yield rows
                    rows = []
        finally:
            if feed is not None:
                feed.stop()
            self._streaming = False
            if not finished and self.alive:
                self._tell(call_id, None, CANCEL)

    def close(self) -> None:
        """Ends the child: asked first, killed with everything it started if it doesn't go."""
        if self._connection.closed:
            return
        with self._sending, contextlib.suppress(OSError):
            self._connection.send(None)
        try:
            self._process.wait(CLOSE_GRACE_S if self._ready else 0.2)
        except subprocess.TimeoutExpired:
            kill_group(self._process.pid)
            self._process.wait()
        finally:
            self._connection.close()

    def kill(self) -> None:
        """Ends the child at once, with everything it started."""
        kill_group(self._process.pid)
        self.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _tell(self, call_id: int, given: Any, how: str) -> None:
        """About a call that is under way. A child that is gone is found out by who waits for its answers."""
        with self._sending, contextlib.suppress(OSError):
            self._connection.send((call_id, None, given, how))

    def _send(self, method: str, kwargs: dict[str, Any], how: str) -> int:
        if self._streaming:  # its items would be taken for stale answers and lost
            raise RuntimeError(f"{self.name}.{method}: finish or close the open stream of this worker first")
        self.ready()
        self._next_id += 1
        try:
            with self._sending:
                self._connection.send((self._next_id, method, kwargs, how))
        except OSError as e:
            raise self._died() from e
        return self._next_id

    def _answer(self, call_id: int) -> tuple[str, Any]:
        """Waits for the next answer to a call; answers to calls that were given up are dropped."""
        while True:
            try:
                while not self._connection.poll(_POLL_S):
                    if not self.alive and not self._connection.poll(0):  # its own children may hold the socket open
                        raise self._died()
                answered, kind, value = self._connection.recv()
            except (EOFError, OSError) as e:
                raise self._died() from e
            if answered != call_id:
                continue
            if kind == "user_error":
                raise UserError(value)
            if kind == "error":
                raise WorkerError(f"{self.name} worker failed: {value}; its log is {self.log_path}")
            return kind, value

    def _died(self) -> WorkerDied:
        try:
            code = self._process.wait(CLOSE_GRACE_S)
        except (subprocess.TimeoutExpired, ValueError):
            kill_group(self._process.pid)
            return WorkerDied(f"{self.name} worker closed its connection; its log is {self.log_path}")
        last = last_line(self.log_path, self._log_start)
        return WorkerDied(
            f"{self.name} worker died ({_reason(code)}); its log is {self.log_path}"
            + (f", last line: {last}" if last else "")
        )


def child_env(extra: Mapping[str, str] | None) -> dict[str, str]:
    """The environment of a Python process that finds this package, and `extra`."""
    root = str(Path(rlaif.__file__).parents[1])  # so that the child finds this very package, installed or not
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    quiet = {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1", "PYTHONFAULTHANDLER": "1"}
    return os.environ | quiet | dict(extra or {})


def _reason(code: int) -> str:
    if code == -signal.SIGKILL:
        return "killed by SIGKILL, perhaps because memory ran out"
    if code < 0:
        with contextlib.suppress(ValueError):
            return f"killed by {signal.Signals(-code).name}"
    return f"exit code {code}"


def last_line(log_path: Path, start: int = 0) -> str:
    """The last line with words in it of a log, from a byte on; an exception's own line is preferred."""
    try:
        with log_path.open("rb") as log:
            log.seek(max(start, log.seek(0, os.SEEK_END) - 65536))
            lines = log.read().decode(errors="replace").replace("\r", "\n").splitlines()
    except OSError:
        return ""
    words = [line.strip() for line in lines if re.search(r"[A-Za-z]{3}", line)]
    errors = [line for line in words if re.match(r"(Fatal |[\w.]*(Error|Exception|Interrupt)\b)", line)]
    return next(iter((errors or words)[::-1]), "")[:300]
