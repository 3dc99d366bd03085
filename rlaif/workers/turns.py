"""Who has a device's memory: roles that share one take turns (`device: shared`).

In: roles, what each can be asked to give back (`Rests`), and the GPUs that it sees. Out: their workers as before, which
take the turn before they are called (`InTurn`): all others that share a GPU with the role rest first, then it wakes.
Nobody rests before another one's turn, so calls of one role in a row cost nothing, and a stage needn't know of any of
this. What a method computes without the device (`WITHOUT_DEVICE`) needs no turn.

A role may hold memory from when it is asked to wake until it has said that it rests. So one that failed on the way, or
whose call failed, is asked to rest before another works; and it counts as awake only when it has said so. Where resting
or waking fails, the call does, and with it the run; the same command starts anew. Untried on a GPU.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

from rlaif.workers.feed import Feed
from rlaif.workers.placement import apart
from rlaif.workers.worker import Piece, Worker

WITHOUT_DEVICE = frozenset(
    {
        *("computes_in", "problems", "answer_problems", "tokens_of", "sequences_of", "sequences_in"),
        *("exports_in", "track", "use_reference"),
    }
)
"""Methods of sampler and learner that need nothing of what rests. `close` isn't one: a tracker may save the policy."""


class Rests(Protocol):
    """What holds memory of a device: a worker's object, or servers. It is awake when it is made. Asking twice for the
    same does nothing more."""

    def rest(self) -> None:
        """Gives the memory back, and keeps what was in it elsewhere."""

    def wake(self) -> None:
        """Takes the memory again, with what was in it."""


class OfWorker:
    """The object of a worker, asked through it."""

    def __init__(self, worker: Worker):
        self._worker = worker

    def rest(self) -> None:
        self._worker.tell("rest")

    def wake(self) -> None:
        self._worker.tell("wake")


@dataclass
class _Role:
    rests: Rests
    gpus: Collection[str]
    """Those that it sees; none: whatever this process sees."""
    awake: bool = True
    """It has what it computes with."""
    holds: bool = True
    """It may have memory of a device: also where it failed on its way."""


class Turns:
    """Roles that take turns; one that hasn't joined takes no part. Not for use by several threads at once."""

    def __init__(self) -> None:
        self._roles: dict[str, _Role] = {}
        self._working: _Role | None = None

    def join(self, name: str, rests: Rests, gpus: Collection[str]) -> None:
        """One more role, which was just built. It rests at once, so that the next one finds room while it is built."""
        role = self._roles[name] = _Role(rests, gpus)
        self._rest(role)

    @property
    def roles(self) -> list[str]:
        """Those that have joined."""
        return list(self._roles)

    def worker(self, name: str, worker: Worker) -> Worker:
        """A role's worker; where the role has joined, one that takes the turn before it is called."""
        return InTurn(name, worker, self) if name in self._roles else worker

    @contextmanager
    def of(self, name: str) -> Iterator[None]:
        """A role is awake, and those that share a GPU with it rest, while the block lasts.

        Raises:
            RuntimeError: it is another's turn, which isn't over.
        """
        role, working = self._roles[name], self._working
        others = [other for other in self._roles.values() if other is not role and not apart(other.gpus, role.gpus)]
        if working is not None and working in others:
            raise RuntimeError(f"{name}: finish or close the open stream of the role that shares its device first")
        for other in others:
            if other.holds:
                self._rest(other)
        if not role.awake:
            role.holds = True
            role.rests.wake()
            role.awake = True
        self._working = role
        try:
            yield
        finally:
            self._working = working

    def _rest(self, role: _Role) -> None:
        role.awake = False
        role.rests.rest()
        role.holds = False


class InTurn(Worker):
    """A worker that takes its role's turn before it is called."""

    def __init__(self, role: str, worker: Worker, turns: Turns):
        self._role, self._worker, self._turns = role, worker, turns
        self.name = worker.name

    @property
    def width(self) -> int:
        return self._worker.width

    def poll(self, timeout_s: float) -> bool:
        return self._worker.poll(timeout_s)

    def ready(self) -> None:
        self._worker.ready()

    def call(self, method: str, **kwargs: Any) -> Any:
        with self._turn(method):
            return self._worker.call(method, **kwargs)

    def stream(self, method: str, feed: Feed | None = None, **kwargs: Any) -> Iterator[Any]:
        with self._turn(method):
            yield from self._worker.stream(method, feed=feed, **kwargs)

    def tell(self, method: str, **kwargs: Any) -> None:
        with self._turn(method):
            self._worker.tell(method, **kwargs)

    def each(self, method: str, **kwargs: Any) -> list[Any]:
        with self._turn(method):
            return self._worker.each(method, **kwargs)

    def spread(self, method: str, pieces: Iterable[Piece]) -> Iterator[list[Any]]:
        with self._turn(method):
            yield from self._worker.spread(method, pieces)

    def close(self) -> None:
        self._worker.close()

    def kill(self) -> None:
        self._worker.kill()

    def _turn(self, method: str) -> AbstractContextManager[None]:
        return nullcontext() if method in WITHOUT_DEVICE else self._turns.of(self._role)
