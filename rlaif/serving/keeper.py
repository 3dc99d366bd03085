"""One server and the process that keeps it: a worker's object (`rlaif.workers.process`).

The server and all that it starts are in the process group of the worker, which ends when its socket does. So they go
with whoever asked for them, also when that one was killed, and no process has to be found by its name.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import threading
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import psutil

from rlaif.errors import UserError
from rlaif.workers.feed import Feed
from rlaif.workers.process import last_line

MAX_RESTARTS = 3
"""Of one server: what ends more often is no accident."""
STOP_S = 10.0
"""A server that is asked to end may take so long."""
_POLL_S = 0.25
_ANSWER_S = 5.0
_EXCEPTION = re.compile(r"^(?:\(.*\] )?([\w.]*(?:Error|Exception): .+)$", re.M)
"""Its own line, perhaps behind the prefix of a logger: `(Worker pid=1) ERROR 11-29 20:48:43 [core.py:953]`."""
DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))
"""No proxy leads to a server on this machine."""


class Keeper:
    """Starts a server and waits until it answers."""

    def __init__(
        self,
        what: str,
        command: Sequence[str],
        environment: Mapping[str, str],
        health: str,
        log: Path,
        start_timeout_s: float,
        restarts: int,
        setting: str = "",
    ):
        """
        Args:
            what: For messages: `judge server 0`.
            command: The program and its options.
            environment: Added to this process'.
            health: An address that answers once the server does.
            log: Where the output of this process goes, and so the server's.
            start_timeout_s: Longest wait for the first answer.
            restarts: How often it is started again, at most.
            setting: What the user calls `start_timeout_s`, if he can change it.

        Raises:
            UserError: it ended, or gave no answer in time.
        """
        self._command, self._environment, self._health = command, dict(environment), health
        self._log, self._start_timeout_s, self._restarts = log, start_timeout_s, restarts
        self._setting = f" ({setting})" if setting else ""
        self._process = self._started()
        if why := self._until_it_answers(threading.Event()):
            said = _cause(log, self._begins)
            self.close()
            raise UserError(f"{what} {why}; its log is {log}" + (f", which says: {said}" if said else ""))

    def watch(self, feed: Feed) -> Iterator[str]:
        """Until the feed ends: starts the server again when it has ended. Yields what became of it, in words. With the
        feed the server ends, too."""
        over = threading.Event()
        feed.pour(lambda item: over.set() if item is None else None)
        try:
            for number in range(1, self._restarts + 2):
                while not over.wait(_POLL_S) and self._process.poll() is None:
                    pass
                if over.is_set():
                    return
                ended = f"ended ({_code(self._process)}); its log is {self._log}"
                _kill_the_others()  # its engine may have outlived it
                if number > self._restarts:
                    break
                yield f"{ended}; it is started again ({number} of {self._restarts})"
                began, self._process = time.monotonic(), self._started()
                if self._until_it_answers(over) is None and not over.is_set():
                    yield f"answers again, after {time.monotonic() - began:.1f} s"
            yield f"{ended}; it was started again {self._restarts} times, and is left out from here on"
            over.wait()
        finally:
            self.close()

    def close(self) -> None:
        """Ends the server: asked first, killed with all that it started when it doesn't go."""
        if self._process.poll() is None:
            self._process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(STOP_S)
        _kill_the_others()
        self._process.wait()

    def _started(self) -> subprocess.Popen[bytes]:
        self._begins = self._log.stat().st_size
        return subprocess.Popen(self._command, stdin=subprocess.DEVNULL, env=os.environ | self._environment)

    def _until_it_answers(self, over: threading.Event) -> str | None:
        """Why it doesn't; None when it does, or nobody waits any more."""
        began = time.monotonic()
        while time.monotonic() - began < self._start_timeout_s:
            if self._process.poll() is not None:
                return f"ended before it answered ({_code(self._process)})"
            if self._answers() or over.wait(_POLL_S):
                return None
        self._process.kill()
        return f"gave no answer within {self._start_timeout_s:g} s{self._setting}"

    def _answers(self) -> bool:
        try:
            with DIRECT.open(self._health, timeout=_ANSWER_S) as answer:
                return bool(answer.status == 200)
        except OSError:  # urllib's errors are such
            return False


def _cause(log: Path, start: int) -> str:
    """What a log has to say, from a byte on, of why a server ended: the first exception with a message, since those
    after it tell of processes that missed the one that had it; else the last line."""
    with log.open("rb") as lines:
        lines.seek(start)
        found = _EXCEPTION.search(lines.read().decode(errors="replace"))
    return found[1][:300] if found else last_line(log, start)


def _code(process: subprocess.Popen[bytes]) -> str:
    code = process.wait()
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"


def _kill_the_others() -> None:
    """Kills whatever else is in this process' group, which is of its own making where it leads that group."""
    if os.getpgrp() != os.getpid():
        return
    for pid in psutil.pids():
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if pid != os.getpid() and os.getpgid(pid) == os.getpgrp():
                os.kill(pid, signal.SIGKILL)
