"""A role that is several workers: what can be shared out is, what concerns all goes to each, and one that dies is
replaced.

In: how replica number n is started, and how many there are. Out: a `Worker`. Work is shared out in the pieces that the
caller cut (`Worker.spread`): each is one call of one replica, whichever is free, and rows come in whatever order they
are made. Where numbers depend on what is asked together, the caller cuts by the job alone, so that they are those of
one process; nothing here cuts anything.

A replica that dies is started anew while the others work on, is told what they were told, and what is left of its piece
goes to another. That it was started again is counted: after `max_restarts` times the run pauses. One for which there is
no room any more is done without, until there is: whenever the others are told something, it is tried again.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import Any, Literal

from rlaif.errors import RlaifError, RunPaused, WorkerDied, WorkerError
from rlaif.workers.feed import Feed
from rlaif.workers.worker import TOGETHER, Piece, Worker

_State = Literal["free", "busy", "starting", "lost"]
_POLL_S = 0.2
"""How often a thread looks whether anybody still wants what it has."""


class Replicas(Worker):
    """Several workers of one role, as one. May be used by several threads at once; each call takes one replica that is
    free, and waits until one is.

    Args:
        name: For messages: `sampler`, `judge`.
        start: Starts replica number n, from 0, and returns at once. It is called again for one that died.
        count: How many there are.
        max_restarts: How often one may be started again, over all of them.
        told: Is told of replicas that die, in one line; from any thread.
    """

    def __init__(
        self,
        name: str,
        start: Callable[[int], Worker],
        count: int,
        max_restarts: int = 0,
        told: Callable[[str], None] = lambda message: None,
    ) -> None:
        self.name = name
        self._start, self._told = start, told
        self.max_restarts, self._restarts = max_restarts, 0
        """Restarts of all of them together, at most; those so far."""
        self.workers = [start(n) for n in range(count)]
        """By number; another takes a dead one's place."""
        self._loading = list(range(count))
        """Those that were never ready."""
        self._states: list[_State] = ["starting"] * count
        self._news = threading.Condition()
        """Guards what is below and `_states`; told when a replica is free or lost."""
        self._held: dict[str, dict[str, Any]] = {}
        """What every replica was told last, by method."""
        self._version = 0
        self._tried = set[int]()
        """Lost ones that are being started again."""
        self._over: RlaifError | None = None
        """Why no replica can be asked any more."""
        self._closed = False

    @property
    def width(self) -> int:
        return max(1, len(self._states) - len(self._numbers("lost")))

    def poll(self, timeout_s: float) -> bool:
        """Whether all are built, or one has failed."""
        for number in list(self._loading):
            if not self.workers[number].poll(timeout_s / len(self._loading)):
                continue
            try:
                self.workers[number].ready()
            except RlaifError as e:
                self._over = e
                return True
            self._loading.remove(number)
            self._set(number, "free")
        return not self._loading

    def ready(self) -> None:
        """Waits until all are built, the first time. Raises what building one of them raised."""
        while not self.poll(_POLL_S):
            pass
        if self._over is not None:
            raise self._over

    def call(self, method: str, **kwargs: Any) -> Any:
        """Calls a method of one of them; of another, should that one die."""
        while True:
            with contextlib.suppress(WorkerDied), self._one() as worker:
                return worker.call(method, **kwargs)

    def stream(self, method: str, feed: Feed | None = None, **kwargs: Any) -> Generator[Any, None, None]:
        """Calls a method of one of them that returns an iterator. Nobody here knows what is left of it when that one
        dies: then it raises (`spread` goes on)."""
        with self._one() as worker:
            yield from worker.stream(method, feed, **kwargs)

    def tell(self, method: str, **kwargs: Any) -> None:
        """Calls a method of each, at the same time."""
        with self._news:
            self._held.pop(method, None)  # told again, it is told last
            self._held[method] = kwargs
            self._version += 1
            again = sorted(set(self._numbers("lost")) - self._tried)
            self._tried.update(again)
        for number in again:  # those who are told now don't wait for it
            self._in_background(self._try_again, number)
        self.each(method, **kwargs)

    def each(self, method: str, **kwargs: Any) -> list[Any]:
        """Calls a method of each, at the same time; the answers of those that live, at least one."""
        self.ready()
        while True:
            answers: dict[int, Any] = {}

            def ask(number: int, answers: dict[int, Any] = answers) -> None:
                with contextlib.suppress(WorkerDied), self._use(number) as worker:
                    answers[number] = worker.call(method, **kwargs)

            _at_once(ask, self._take_all())
            if answers:
                return [answers[number] for number in sorted(answers)]

    def spread(self, method: str, pieces: Iterable[Piece]) -> Iterator[list[Any]]:
        """Calls a method for each piece, on as many replicas as are free; chunks of rows as they come.

        What one piece fails with is raised when the rows that others have made by then were handed over: they are
        durable before anybody is asked again.
        """
        sharing = _Sharing(self, method, pieces)
        try:
            yield from sharing.chunks()
        finally:
            sharing.stop()

    def close(self) -> None:
        """Ends all of them, at the same time."""
        with self._news:
            self._closed = True
            self._news.notify_all()
        _at_once(lambda number: self.workers[number].close(), range(len(self.workers)))

    # ---- which replica is asked

    def _numbers(self, state: _State) -> list[int]:
        return [number for number, its in enumerate(self._states) if its == state]

    @contextlib.contextmanager
    def _one(self) -> Iterator[Worker]:
        """One that is free, as soon as one is."""
        self.ready()
        with self._use(self._take()) as worker:
            yield worker

    @contextlib.contextmanager
    def _use(self, number: int) -> Iterator[Worker]:
        """A replica that was taken. It is free afterwards, or replaced."""
        try:
            yield self.workers[number]
        except WorkerDied as e:
            self._put_another(number, e)
            raise
        except BaseException:
            self._set(number, "free")
            raise
        self._set(number, "free")

    def _set(self, number: int, state: _State) -> None:
        with self._news:
            self._states[number] = state
            self._news.notify_all()

    def _take(self) -> int:
        with self._news:
            while not (free := self._numbers("free")):
                self._wait()
            self._states[free[0]] = "busy"
            return free[0]

    def _take_all(self) -> list[int]:
        """All that live, when none is busy. Those that are starting are told what is to be told when they are there."""
        with self._news:
            while self._numbers("busy") or not (free := self._numbers("free")):
                self._wait()
            for number in free:
                self._states[number] = "busy"
            return free

    def _wait(self) -> None:
        if self._over is not None:
            raise self._over
        if self._closed:
            raise WorkerError(f"{self.name} is closed")
        self._news.wait(_POLL_S)

    # ---- when one dies

    def _put_another(self, number: int, why: WorkerDied) -> None:
        """Starts a replica again that died, in a thread of its own.

        Raises:
            RunPaused: that was done too often.
        """
        with self._news:
            if self._closed:
                return
            if self._restarts == self.max_restarts:
                self._states[number] = "lost"
                self._over = RunPaused(
                    f"{why}; cluster.max_restarts={self.max_restarts} is used up. The same command goes on"
                )
                self._news.notify_all()
                raise self._over from why
            self._restarts += 1
            self._states[number] = "starting"
            message = f"{why}; another takes its place (restart {self._restarts} of {self.max_restarts})"
        self._told(message)
        self._in_background(self._start_again, number)

    def _in_background(self, do: Callable[[int], None], number: int) -> None:
        threading.Thread(target=do, args=(number,), name=f"{self.name} {number}", daemon=True).start()

    def _start_again(self, number: int) -> None:
        try:
            self._take_its_place(number)
        except WorkerDied as e:
            with contextlib.suppress(RunPaused):  # it is told to whoever waits
                self._put_another(number, e)
        except Exception as e:  # whatever it was, others may be waiting for this one
            self._lose(number, e)

    def _try_again(self, number: int) -> None:
        """A machine may be back. It is lost until it is ready, so nobody waits for it."""
        try:
            self._take_its_place(number)
        except Exception:  # as before, which was told
            self.workers[number].close()
        else:
            if not self._closed:
                self._told(f"{self.name} {number + 1} is back; {self._how_many()}")
        finally:
            with self._news:
                self._tried.discard(number)

    def _take_its_place(self, number: int) -> None:
        """Starts a replica anew, and tells it what the others were told; then it is free."""
        self.workers[number].close()
        worker = self._start(number)
        with self._news:
            self.workers[number] = worker
        if self._closed:  # before it was there to be closed
            worker.close()
            return
        worker.ready()
        told = 0
        while not self._up_to_date(number, told):
            with self._news:
                told, held = self._version, list(self._held.items())
            for method, kwargs in held:
                worker.call(method, **kwargs)

    def _up_to_date(self, number: int, told: int) -> bool:
        """Whether it knows all that was told, and is free therefore."""
        with self._news:
            if told != self._version:
                return False
            self._states[number] = "free"
            self._news.notify_all()
            return True

    def _lose(self, number: int, why: Exception) -> None:
        with self._news:
            self._states[number] = "lost"
            left = len(self._states) - len(self._numbers("lost"))
            if not left and self._over is None:
                self._over = RunPaused(f"{why}; no {self.name} is left. The same command goes on")
            self._news.notify_all()
        if left and not self._closed:
            self._told(f"{why}; {self._how_many()}")

    def _how_many(self) -> str:
        return f"{self.name} goes on with {self.width} of {len(self._states)}"


class _Sharing:
    """Pieces of one kind of work on their way: a thread for each replica takes one after the other."""

    def __init__(self, replicas: Replicas, method: str, pieces: Iterable[Piece]):
        self._replicas, self._method = replicas, method
        self._pieces, self._taking = iter(pieces), threading.Lock()
        self._made: queue.Queue[Any] = queue.Queue(maxsize=TOGETHER)
        """Chunks of rows; for each thread that ends, what it failed with or None."""
        self._stop = threading.Event()
        """No more are to be made."""
        self._given_up = threading.Event()
        """Nobody takes those that are."""

    def chunks(self) -> Iterator[list[Any]]:
        """What is made, as it comes, and at once what waits; then what the first that failed failed with is raised."""
        working = len(self._replicas.workers)
        for _ in range(working):
            threading.Thread(target=self._work, name=f"{self._replicas.name} {self._method}", daemon=True).start()
        failed, rows = None, list[Any]()
        while working:
            made = self._made.get()
            if isinstance(made, list):
                rows += made
            else:
                working -= 1
                if made is not None:
                    self._stop.set()
                    failed = failed or made
            if rows and (len(rows) >= TOGETHER or not working or self._made.empty()):
                yield rows
                rows = []
        if failed is not None:
            raise failed

    def stop(self) -> None:
        """Nobody takes chunks any more: each thread ends after the one that it is at."""
        self._stop.set()
        self._given_up.set()

    def _work(self) -> None:
        failed: BaseException | None = None
        try:
            while not self._stop.is_set():
                with self._taking:
                    piece = next(self._pieces, None)
                if piece is None:
                    break
                self._do(piece)
        except BaseException as e:  # raised where the rows are taken
            failed = e
        self._put(failed)

    def _do(self, piece: Piece) -> None:
        """The rows of a piece, made by as many replicas as die over it."""
        rows: list[Any] = []
        while (asked := piece(rows)) is not None:
            with (
                contextlib.suppress(WorkerDied),
                contextlib.closing(self._replicas.stream(self._method, **asked)) as chunks,
            ):
                for chunk in chunks:
                    rows += chunk
                    self._put(list(chunk))
                    if self._stop.is_set():
                        return
                return

    def _put(self, made: list[Any] | BaseException | None) -> None:
        while not self._given_up.is_set():
            with contextlib.suppress(queue.Full):
                self._made.put(made, timeout=_POLL_S)
                return


def _at_once(do: Callable[[int], None], numbers: Iterable[int]) -> None:
    """Does it for each number in a thread of its own; raises what the first that failed failed with."""
    failed: list[BaseException] = []

    def guarded(number: int) -> None:
        try:
            do(number)
        except BaseException as e:  # raised below
            failed.append(e)

    threads = [threading.Thread(target=guarded, args=(number,), daemon=True) for number in numbers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        raise failed[0]
