"""The servers of one model, while this process lives: started, waited for, watched, ended.

Each has a keeper, a process of its own (`keeper`), and a port that the kernel chose. The port is held here from the
start, so nobody else gets it before the server listens there, or while it is started again: its address stays.
"""

from __future__ import annotations

import os
import secrets
import socket
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from rlaif.config import Precision, Serve
from rlaif.errors import RlaifError
from rlaif.serving import vllm
from rlaif.serving.keeper import DIRECT, MAX_RESTARTS, STOP_S
from rlaif.workers.child import kill_group
from rlaif.workers.feed import Feed
from rlaif.workers.process import ProcessWorker, last_line

KEY_VARIABLE = "RLAIF_SERVED_KEY"
"""Where a worker finds the key of servers that we started. In no file: it is made anew for every process."""
_TURN_S = 600.0
"""Longest wait until a server rests or is awake: its weights go once through the machine's bus."""
SILENCE_S = 30.0
"""While a server loads, so often its log's last line is passed on."""


class Servers:
    """As many servers as the job says. Can be waited for as a worker can (`wait_until_ready`)."""

    def __init__(self, role: str, replicas: int):
        """Has addresses and a key; nothing is started yet. `role` is whose they are, for messages."""
        self.name = f"{role} servers"
        self.width = replicas
        self.role = role
        self.key = secrets.token_urlsafe(32)
        self._ports, self._held = zip(*(_port() for _ in range(replicas)), strict=True)
        self._keepers: list[ProcessWorker] = []
        self._ready: set[int] = set()
        self._over = [Feed() for _ in range(replicas)]
        self._watching: list[threading.Thread] = []
        self._told: Callable[[str], None] = print
        self._said = time.monotonic()

    @property
    def urls(self) -> list[str]:
        """Their addresses, up to and including `/v1`."""
        return [f"http://{vllm.HOST}:{port}/v1" for port in self._ports]

    @property
    def environment(self) -> dict[str, str]:
        """What reaches them: the key, and that no proxy leads there."""
        return {KEY_VARIABLE: self.key} | _past_proxies(os.environ)

    def start(
        self,
        serve: Serve,
        model: Path,
        called: str,
        precision: Precision,
        gpus: Sequence[Sequence[str]],
        logs: Path,
        told: Callable[[str], None],
        takes_weights: bool = False,
        rests: bool = False,
    ) -> None:
        """Starts them; returns at once.

        Args:
            serve: How.
            model: Folder of its model.
            called: The name that requests give.
            precision: What it computes in.
            gpus: For each server those it sees; none: whatever we see.
            logs: Folder of their logs.
            told: Is given a line when one of them ends, is started again, or takes long to load; from any thread.
            takes_weights: Whoever has the key may give them other weights. One that ends then stays out: started
                again it would hold those that it began with.
            rests: They will be asked to (`rest`). One that ends stays out as well: started again it would take memory
                that is another's meanwhile.
        """
        self._told, self._said = told, time.monotonic()
        for number, (port, mine) in enumerate(zip(self._ports, gpus, strict=True)):
            log = logs / f"{self.role}-server-{number}.log"
            kwargs = {
                "what": self._named(number),
                "command": vllm.command(serve, model, called, port, precision, rests),
                "environment": vllm.environment(self.key, mine, takes_weights or rests),
                "health": f"http://{vllm.HOST}:{port}{vllm.HEALTH}",
                "log": log,
                "start_timeout_s": serve.start_timeout_s,
                "restarts": 0 if takes_weights or rests else MAX_RESTARTS,
                "setting": "judge.serve.start_timeout_s" if self.role == "judge" else "",
            }
            self._keepers.append(
                ProcessWorker(f"{self.role}-server-{number}", "rlaif.serving.keeper:Keeper", kwargs, log)
            )

    def poll(self, timeout_s: float) -> bool:
        """Whether all of them answer, after at most about so many seconds.

        Raises:
            UserError: one can't be started.
        """
        waiting = [n for n in range(len(self._keepers)) if n not in self._ready]
        for number in waiting:
            if self._keepers[number].poll(timeout_s / len(waiting)):
                self._keepers[number].ready()
                self._ready.add(number)
        if len(self._ready) == self.width:
            return True
        if time.monotonic() - self._said > SILENCE_S:
            self._said = time.monotonic()
            for number in sorted({*waiting} - self._ready):
                log = self._keepers[number].log_path
                self._told(f"{self._named(number)} is loading: {last_line(log) or f'nothing in {log} yet'}")
        return False

    def ready(self) -> None:
        """Waits until all of them answer, and watches over them from then on.

        Raises:
            UserError: one can't be started.
        """
        while not self.poll(1.0):
            pass
        if not self._watching:
            numbers = range(self.width)
            self._watching = [threading.Thread(target=self._watch, args=(n,), daemon=True) for n in numbers]
            for thread in self._watching:
                thread.start()

    def rest(self) -> None:
        """Each gives back what it holds of its GPUs; weights wait in RAM. Nobody may be asking them. One that has ended
        holds nothing, and was told of.

        Raises:
            RlaifError: one doesn't.
        """
        self._each_at(vllm.SLEEP)

    def wake(self) -> None:
        """Each takes it again. Raises as `rest`."""
        self._each_at(vllm.WAKE)

    def close(self) -> None:
        """Ends them all, at the same time. Closing twice does nothing."""
        for over in self._over:
            over.end()
        for thread in self._watching:
            thread.join(2 * STOP_S)
        for keeper in self._keepers:
            keeper.close()
        for held in self._held:
            held.close()

    def _each_at(self, path: str) -> None:
        """Asks each for something, one after the other."""
        for number, port in enumerate(self._ports):
            request = urllib.request.Request(
                f"http://{vllm.HOST}:{port}{path}", headers={"Authorization": f"Bearer {self.key}"}, method="POST"
            )
            try:
                with DIRECT.open(request, timeout=_TURN_S):
                    pass
            except OSError as e:
                if isinstance(getattr(e, "reason", e), ConnectionRefusedError):
                    continue
                raise RlaifError(
                    f"{self._named(number)}: {path} failed ({e}); its log is {self._keepers[number].log_path}. The "
                    "same command goes on"
                ) from e

    def _named(self, number: int) -> str:
        return f"{self.role} server {number}"

    def _watch(self, number: int) -> None:
        keeper = self._keepers[number]
        try:
            for message in keeper.stream("watch", feed=self._over[number]):
                self._told(f"{self._named(number)} {message}")
        except RlaifError as e:
            kill_group(keeper.pid)  # a keeper that was killed leaves its server behind
            self._told(f"{self._named(number)} is left out from here on: {e}")


def _port() -> tuple[int, socket.socket]:
    """A port that the kernel chose, and what holds it. On Linux two sockets may share a port as long as one of them
    alone listens, if both say so as vLLM's does; elsewhere nobody could listen at a port that is held."""
    held = socket.socket()
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    held.bind((vllm.HOST, 0))
    port = held.getsockname()[1]
    if sys.platform != "linux":
        held.close()
    return port, held


def _past_proxies(here: Mapping[str, str]) -> dict[str, str]:
    """Variables by which no proxy is asked for a server of this machine."""
    direct = here.get("no_proxy") or here.get("NO_PROXY") or ""
    if direct == "*":
        return {}
    direct = ",".join(filter(None, [direct, vllm.HOST]))
    return {"no_proxy": direct, "NO_PROXY": direct}
