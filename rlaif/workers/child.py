"""The child of a `ProcessWorker`: `python -m rlaif.workers.child NAME FD`.

In: over the socket FD `(path, factory, kwargs)` first, then calls `(id, method, kwargs, how)`. A method of None is
about the call of that id: how `CANCEL` takes it back, how `ITEM` is one more item of its feed (`kwargs`; None is the
last). None alone ends the child. Out: answers `(id, kind, value)` with kind `ok`, `item`,
`end`, `user_error` or `error`. All of it is pickled. One call at a time, in the order in which they came. An answer to
a call that was given up is recognised by its id, and the parent throws it away. The end of the socket is the end of the
child.
"""

from __future__ import annotations

import contextlib
import functools
import os
import queue
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from rlaif.errors import UserError, needs_extra
from rlaif.workers.feed import Feed
from rlaif.workers.worker import built, one_line

START = 0
"""The id of the answer to construction."""
CALL, STREAM, FED, CANCEL, ITEM = "call", "stream", "fed", "cancel", "item"
"""How a message is meant: a call with one result, with a stream of them, with a stream and a feed; see above."""


def kill_group(pid: int) -> None:
    """Kills a process and all that it started, where each child leads a group of its own."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)


class _Child:
    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._calls: queue.SimpleQueue[tuple[int, str, dict[str, Any], str] | None] = queue.SimpleQueue()
        self._cancelled: set[int] = set()
        self._feeds: dict[int, Feed] = {}

    def run(self) -> None:
        path, factory, kwargs = self._connection.recv()
        sys.path[:] = path
        threading.Thread(target=self._listen, daemon=True).start()
        held: list[Any] = []
        if not self._guarded(START, lambda: held.append(built(factory, kwargs))):
            return
        self._connection.send((START, "ok", None))
        while (call := self._calls.get()) is not None:
            call_id, method, arguments, how = call
            run = self._call if how == CALL else self._stream
            self._guarded(call_id, functools.partial(run, call_id, held[0], method, arguments))
            if (feed := self._feeds.pop(call_id, None)) is not None:
                feed.stop()
        if hasattr(held[0], "close"):
            held[0].close()

    def _listen(self) -> None:
        """Reads what the parent sends. The end of the socket is the end of the parent: nothing is left to do here."""
        try:
            while (message := self._connection.recv()) is not None:
                call_id, method, given, how = message
                feed = self._feeds.get(call_id)  # none where the call has ended meanwhile
                if how == CANCEL:
                    self._cancelled.add(call_id)
                if how in (CANCEL, ITEM):
                    if feed is not None:
                        feed.end() if given is None else feed.put(given)
                else:
                    if how == FED:
                        given["feed"] = self._feeds[call_id] = Feed()
                    self._calls.put((call_id, method, given, how))
            self._calls.put(None)
            self._connection.poll(None)  # the parent closes its end last
        except (EOFError, OSError):
            print("--- the parent is gone", flush=True)
        kill_group(os.getpid())

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
            self._connection.send((call_id, "user_error", needed) if needed else (call_id, "error", one_line(e)))
        except Exception as e:  # the boundary: whatever it was, the parent hears of it
            traceback.print_exc()  # to the log
            self._connection.send((call_id, "error", one_line(e)))
        else:
            return True
        return False


def main(name: str, fd: int) -> None:
    """Serves the parent until it wants no more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _Child(Connection(fd)).run()
    print(f"--- {name} closed", flush=True)
    sys.stdout.flush()
    # Libraries' exit handlers (thread pools, engines) can hang or complain; everything that matters is on disk.
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
