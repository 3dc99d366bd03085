"""Workers: the sampler, the judge and the learner, each in a process of its own behind a narrow message interface.

In: `"module:callable"` that builds an object in the child, and the keyword arguments for it. Out: its methods, called
by name with plain records and paths. A crash in a worker is one line in the loop (`WorkerError`), its output goes to
a log file, and it never outlives the process that started it.

The protocol is pickled tuples over a socket: the parent sends `(id, method, kwargs, stream)`, the child answers
`(id, kind, value)` with kind `ok`, `item`, `end`, `user_error` or `error`. One call at a time; an answer to a call that
was given up is recognised by its id and thrown away.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
import queue
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal, Protocol, Self

from rlaif.errors import RlaifError, UserError, WorkerError, needs_extra

_START = 0  # the id of the answer to construction
CLOSE_GRACE_S = 15.0  # a tracker may have something to upload
_POLL_S = 1.0


class WorkerLike(Protocol):
    """What the loop knows of a worker, whichever process it is in."""

    name: str

    def ready(self) -> None:
        """Waits until the object is built. Raises what building it raised."""

    def call(self, method: str, **kwargs: Any) -> Any:
        """Calls a method and waits for its result."""

    def stream(self, method: str, **kwargs: Any) -> Iterator[Any]:
        """Calls a method that returns an iterator; its items arrive one by one."""

    def close(self) -> None:
        """Ends the worker. Closing twice does nothing."""


def start_worker(
    mode: Literal["process", "inline"],
    name: str,
    factory: str,
    kwargs: dict[str, Any],
    log_path: Path,
    env: Mapping[str, str] | None = None,
) -> Worker | InlineWorker:
    """A worker of the kind that the job's `workers` names."""
    if mode == "process":
        return Worker(name, factory, kwargs, log_path, env)
    return InlineWorker(name, factory, kwargs, log_path, env)


def wait_until_ready(
    workers: Iterable[Worker | InlineWorker], told: Callable[[str, float, list[str]], None], poll_s: float = 0.1
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


class Worker:
    """A long-lived object in its own process.

    Starting returns at once, so that several workers can load while the loop does something else. Not for
    use by several threads at once.

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
        self._next_id = _START
        self._ready = False
        self._streaming = False
        log_path.parent.mkdir(parents=True, exist_ok=True)
        ours, theirs = socket.socketpair()
        with log_path.open("ab") as log:
            log.write(f"--- {name} started {time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime())}\n".encode())
            log.flush()
            self._log_start = log.tell()
            # A new interpreter rather than multiprocessing's spawn: that one runs the caller's __main__ again, and
            # can't redirect what is printed while it does. A new session: Ctrl-C in the terminal is the parent's.
            self._process = subprocess.Popen(
                [sys.executable, "-m", "rlaif.workers.process", name, str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
                env=_child_env(env),
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
            self._answer(_START)
            self._ready = True

    def call(self, method: str, **kwargs: Any) -> Any:
        """Calls a method in the child and returns its (picklable) result.

        Raises:
            UserError: the method raised it; the worker can still be used.
            WorkerError: the method raised anything else, or the process died.
        """
        return self._answer(self._send(method, kwargs, stream=False))[1]

    def stream(self, method: str, **kwargs: Any) -> Iterator[Any]:
        """Calls a generator method in the child; yields its items as they arrive.

        An iterator that is closed early stops the generator in the child after its next item.

        Raises:
            UserError, WorkerError: as in `call`.
        """
        call_id = self._send(method, kwargs, stream=True)
        self._streaming = True
        finished = False
        try:
            while True:
                try:
                    kind, value = self._answer(call_id)
                except RlaifError:
                    finished = True
                    raise
                if kind == "end":
                    finished = True
                    return
                yield value
        finally:
            self._streaming = False
            if not finished and self.alive:
                with contextlib.suppress(OSError):
                    self._connection.send((call_id, None, {}, False))  # cancels

    def close(self) -> None:
        """Ends the child: asked first, killed with everything it started if it doesn't go."""
        if self._connection.closed:
            return
        with contextlib.suppress(OSError):
            self._connection.send(None)
        try:
            self._process.wait(CLOSE_GRACE_S if self._ready else 0.2)
        except subprocess.TimeoutExpired:
            _kill_group(self._process.pid)
            self._process.wait()
        finally:
            self._connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _send(self, method: str, kwargs: dict[str, Any], stream: bool) -> int:
        if self._streaming:  # its items would be taken for stale answers and lost
            raise RuntimeError(f"{self.name}.{method}: finish or close the open stream of this worker first")
        self.ready()
        self._next_id += 1
        try:
            self._connection.send((self._next_id, method, kwargs, stream))
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

    def _died(self) -> WorkerError:
        try:
            code = self._process.wait(CLOSE_GRACE_S)
        except (subprocess.TimeoutExpired, ValueError):
            _kill_group(self._process.pid)
            return WorkerError(f"{self.name} worker closed its connection; its log is {self.log_path}")
        last = _last_line(self.log_path, self._log_start)
        return WorkerError(
            f"{self.name} worker died ({_reason(code)}); its log is {self.log_path}"
            + (f", last line: {last}" if last else "")
        )


class InlineWorker:
    """The same interface in the caller's process, for tests. `env` is ignored: the process is already running."""

    def __init__(
        self,
        name: str,
        factory: str,
        kwargs: dict[str, Any],
        log_path: Path | None = None,
        env: Mapping[str, str] | None = None,
    ) -> None:
        self.name = name
        self.log_path = log_path
        self._start = (factory, kwargs)
        self.target: Any = None
        """The object that is called, once `ready` has built it."""
        self._closed = False

    def poll(self, timeout_s: float) -> bool:
        """As `Worker.poll`: building happens in `ready`."""
        return True

    def ready(self) -> None:
        """Builds the object, the first time."""
        if self.target is None:
            factory, kwargs = self._start
            with self._errors():
                self.target = _factory(factory)(**kwargs)

    def call(self, method: str, **kwargs: Any) -> Any:
        """As `Worker.call`."""
        self.ready()
        with self._errors():
            return getattr(self.target, method)(**kwargs)

    def stream(self, method: str, **kwargs: Any) -> Iterator[Any]:
        """As `Worker.stream`."""
        self.ready()
        with self._errors():
            items = iter(getattr(self.target, method)(**kwargs))
        while True:
            with self._errors():
                try:
                    item = next(items)
                except StopIteration:
                    return
            yield item

    def close(self) -> None:
        """As `Worker.close`."""
        if not self._closed and self.target is not None and hasattr(self.target, "close"):
            self.target.close()
        self._closed = True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except UserError:
            raise
        except Exception as e:
            raise WorkerError(f"{self.name} worker failed: {_one_line(e)}") from e


def _child_env(extra: Mapping[str, str] | None) -> dict[str, str]:
    root = str(Path(__file__).parents[1])  # so that the child finds this very package, installed or not
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    quiet = {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1", "PYTHONFAULTHANDLER": "1"}
    return os.environ | quiet | dict(extra or {})


def _kill_group(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)


def _reason(code: int) -> str:
    if code == -signal.SIGKILL:
        return "killed by SIGKILL, perhaps because memory ran out"
    if code < 0:
        with contextlib.suppress(ValueError):
            return f"killed by {signal.Signals(-code).name}"
    return f"exit code {code}"


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    if len(text) > 400:
        text = text[:400] + " …"
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _last_line(log_path: Path, start: int) -> str:
    """The last line with words in it that this worker wrote; an exception's own line is preferred."""
    try:
        with log_path.open("rb") as log:
            log.seek(max(start, log.seek(0, os.SEEK_END) - 65536))
            lines = log.read().decode(errors="replace").replace("\r", "\n").splitlines()
    except OSError:
        return ""
    words = [line.strip() for line in lines if re.search(r"[A-Za-z]{3}", line)]
    errors = [line for line in words if re.match(r"(Fatal |[\w.]*(Error|Exception|Interrupt)\b)", line)]
    return next(iter((errors or words)[::-1]), "")[:300]


def _factory(name: str) -> Callable[..., Any]:
    module, _, attribute = name.partition(":")
    made: Callable[..., Any] = getattr(importlib.import_module(module), attribute)
    return made


# The child.


class _Child:
    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._calls: queue.SimpleQueue[tuple[int, str, dict[str, Any], bool] | None] = queue.SimpleQueue()
        self._cancelled: set[int] = set()

    def run(self) -> None:
        path, factory, kwargs = self._connection.recv()
        sys.path[:] = path
        threading.Thread(target=self._listen, daemon=True).start()
        built: list[Any] = []
        if not self._guarded(_START, lambda: built.append(_factory(factory)(**kwargs))):
            return
        self._connection.send((_START, "ok", None))
        while (call := self._calls.get()) is not None:
            call_id, method, arguments, stream = call
            run = self._stream if stream else self._call
            self._guarded(call_id, functools.partial(run, call_id, built[0], method, arguments))
        if hasattr(built[0], "close"):
            built[0].close()

    def _listen(self) -> None:
        """Reads what the parent sends. The end of the socket is the end of the parent: nothing is left to do here."""
        try:
            while (message := self._connection.recv()) is not None:
                if message[1] is None:
                    self._cancelled.add(message[0])
                else:
                    self._calls.put(message)
            self._calls.put(None)
            self._connection.poll(None)  # the parent closes its end last
        except (EOFError, OSError):
            print("--- the parent is gone", flush=True)
        _kill_group(os.getpid())

    def _call(self, call_id: int, target: Any, method: str, kwargs: dict[str, Any]) -> None:
        self._connection.send((call_id, "ok", getattr(target, method)(**kwargs)))

    def _stream(self, call_id: int, target: Any, method: str, kwargs: dict[str, Any]) -> None:
        items = iter(getattr(target, method)(**kwargs))
        for item in items:
            if call_id in self._cancelled:
                if hasattr(items, "close"):
                    items.close()
                return
            self._connection.send((call_id, "item", item))
        self._connection.send((call_id, "end", None))

    def _guarded(self, call_id: int, action: Callable[[], Any]) -> bool:
        try:
            action()
        except UserError as e:
            self._connection.send((call_id, "user_error", str(e)))
        except ImportError as e:
            needed = needs_extra(e)
            traceback.print_exc()
            self._connection.send((call_id, "user_error", needed) if needed else (call_id, "error", _one_line(e)))
        except Exception as e:  # the boundary: whatever it was, the parent hears of it
            traceback.print_exc()  # to the log
            self._connection.send((call_id, "error", _one_line(e)))
        else:
            return True
        return False


def _child_main(name: str, fd: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _Child(Connection(fd)).run()
    print(f"--- {name} closed", flush=True)
    sys.stdout.flush()
    # Libraries' exit handlers (thread pools, engines) can hang or complain; everything that matters is on disk.
    os._exit(0)


if __name__ == "__main__":
    _child_main(sys.argv[1], int(sys.argv[2]))
