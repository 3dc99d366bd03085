"""Workers: results, streams and every way of dying, with a small object instead of a model."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from rlaif.errors import UserError, WorkerError
from rlaif.workers.inline import InlineWorker
from rlaif.workers.process import ProcessWorker
from rlaif.workers.start import start_worker, wait_until_ready
from rlaif.workers.worker import TOGETHER, Worker

pytestmark = pytest.mark.slow


class Echo:
    """What the tests run in a worker."""

    def __init__(self, greeting: str = "hello", fail: str = "", delay_s: float = 0.0) -> None:
        time.sleep(delay_s)
        if fail == "user":
            raise UserError("jobs/x.yaml: no such model")
        if fail == "crash":
            raise ValueError("bad\nweights")
        if fail == "exit":
            print("OutOfCheese error: redo from start", flush=True)
            os._exit(7)
        self.greeting = greeting
        self.yielded = 0

    def greet(self, name: str) -> str:
        print(f"greeting {name}")
        return f"{self.greeting} {name}"

    def env(self, key: str) -> str | None:
        return os.environ.get(key)

    def count(self, n: int, fail_at: int = -1) -> Iterator[int]:
        for i in range(n):
            if i == fail_at:
                raise KeyError("lost")
            self.yielded += 1
            yield i

    def rows(self, n: int, fails: bool = False) -> Iterator[list[int]]:
        """One by one, as an engine finishes answers."""
        for i in range(n):
            yield [i]
        if fails:
            raise KeyError("lost")

    def how_many(self) -> int:
        return self.yielded

    def user_error(self) -> None:
        raise UserError("prompts.jsonl:3: not JSON")

    def crash(self) -> None:
        raise ZeroDivisionError("nought")

    def kill_self(self, sig: int) -> None:
        print("loading shards", flush=True)
        os.kill(os.getpid(), sig)

    def unpicklable(self) -> Any:
        return lambda: None

    def sleep(self, seconds: float) -> str:
        time.sleep(seconds)
        return "slept"

    def spawn_child(self) -> int:
        return subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]).pid


FACTORY = f"{__name__}:Echo"


@pytest.fixture(params=["process", "inline"])
def both(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Worker]:
    worker = start_worker(request.param, "echo", FACTORY, {"greeting": "hi"}, tmp_path / "echo.log")
    yield worker
    worker.close()


@pytest.fixture
def worker(tmp_path: Path) -> Iterator[ProcessWorker]:
    with ProcessWorker("echo", FACTORY, {}, tmp_path / "logs" / "echo.log", {"RLAIF_TEST_ENV": "set"}) as w:
        yield w


def _gone(pid: int, within_s: float = 5.0) -> bool:
    end = time.monotonic() + within_s
    while time.monotonic() < end:
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.05)
    return False


def test_call_and_stream(both: Worker) -> None:
    both.ready()
    assert both.call("greet", name="Ada") == "hi Ada"
    assert list(both.stream("count", n=3)) == [0, 1, 2]
    assert both.call("greet", name="Bob") == "hi Bob"


def test_each_is_told_when_it_is_ready_whatever_their_order(tmp_path: Path) -> None:
    told: list[tuple[str, list[str]]] = []
    seconds: list[float] = []

    def tell(name: str, after_s: float, waiting: list[str]) -> None:
        told.append((name, waiting))
        seconds.append(after_s)

    with (
        ProcessWorker("slow", FACTORY, {"delay_s": 1.5}, tmp_path / "slow.log") as slow,
        ProcessWorker("quick", FACTORY, {}, tmp_path / "quick.log") as quick,
        InlineWorker("here", FACTORY, {}) as here,
    ):
        wait_until_ready([slow, quick, here], tell)
        assert told[-1] == ("slow", [])
        assert {name for name, _ in told} == {"slow", "quick", "here"}
        assert all(set(waiting).isdisjoint({name}) for name, waiting in told)
        assert seconds == sorted(seconds)
        wait_until_ready([slow], tell)  # again: at once
    with (
        ProcessWorker("slow", FACTORY, {"delay_s": 60}, tmp_path / "slow.log") as slow,
        ProcessWorker("dies", FACTORY, {"fail": "exit"}, tmp_path / "dies.log") as dies,
    ):
        started = time.monotonic()
        with pytest.raises(WorkerError, match="dies worker died"):
            wait_until_ready([slow, dies], tell)
        assert time.monotonic() - started < 30, "one that died isn't told only after those that load"


def test_user_error_stays_one_and_the_worker_goes_on(both: Worker) -> None:
    with pytest.raises(UserError, match=r"prompts\.jsonl:3: not JSON"):
        both.call("user_error")
    assert both.call("greet", name="Ada") == "hi Ada"


def test_exception_becomes_one_line(both: Worker) -> None:
    with pytest.raises(WorkerError, match="echo worker failed: ZeroDivisionError: nought") as caught:
        both.call("crash")
    assert "\n" not in str(caught.value)
    assert both.call("greet", name="Ada") == "hi Ada"


def test_exception_in_a_stream_comes_after_its_items(both: Worker) -> None:
    seen = []
    with pytest.raises(WorkerError, match="KeyError"):
        for item in both.stream("count", n=5, fail_at=2):
            seen.append(item)
    assert seen == [0, 1]
    assert both.call("greet", name="Ada") == "hi Ada"


@pytest.mark.parametrize("fails", [False, True])
def test_rows_that_wait_come_at_once(worker: ProcessWorker, fails: bool) -> None:
    """Whoever takes them syncs a disk each time: who makes them mustn't wait for that."""
    taken: list[list[int]] = []

    def take() -> None:
        for chunk in worker.stream("rows", n=3 * TOGETHER, fails=fails):
            taken.append(chunk)
            time.sleep(0.05)

    if fails:
        with pytest.raises(WorkerError, match="lost"):
            take()
    else:
        take()
    assert [i for chunk in taken for i in chunk] == list(range(3 * TOGETHER))
    assert len(taken) < 12
    assert max(map(len, taken)) <= TOGETHER


def test_unknown_method_is_a_worker_error(both: Worker) -> None:
    with pytest.raises(WorkerError, match="AttributeError"):
        both.call("nothing")


@pytest.mark.parametrize("mode", ["process", "inline"])
def test_errors_while_building(mode: Any, tmp_path: Path) -> None:
    for fail, error, message in (
        ("user", UserError, "no such model"),
        ("crash", WorkerError, "ValueError: bad weights"),
    ):
        worker = start_worker(mode, "echo", FACTORY, {"fail": fail}, tmp_path / "echo.log")
        with pytest.raises(error, match=message):
            worker.ready()
        worker.close()


def test_starting_does_not_wait(tmp_path: Path) -> None:
    began = time.monotonic()
    with ProcessWorker("echo", FACTORY, {"delay_s": 1.0}, tmp_path / "echo.log") as worker:
        assert time.monotonic() - began < 0.5
        worker.ready()
        assert time.monotonic() - began > 1.0


def test_output_and_traceback_go_to_the_log(worker: ProcessWorker, capfd: pytest.CaptureFixture[str]) -> None:
    worker.call("greet", name="Ada")
    with pytest.raises(WorkerError):
        worker.call("crash")
    log = worker.log_path.read_text()
    assert "greeting Ada" in log
    assert "Traceback" in log
    assert capfd.readouterr() == ("", "")


def test_environment_is_set_in_the_child_only(worker: ProcessWorker) -> None:
    assert worker.call("env", key="RLAIF_TEST_ENV") == "set"
    assert "RLAIF_TEST_ENV" not in os.environ


@pytest.mark.parametrize(("sig", "reason"), [(signal.SIGKILL, "memory"), (signal.SIGSEGV, "SIGSEGV")])
def test_a_killed_worker_is_one_clear_line(worker: ProcessWorker, sig: int, reason: str) -> None:
    with pytest.raises(WorkerError) as caught:
        worker.call("kill_self", sig=int(sig))
    message = str(caught.value)
    assert message.startswith("echo worker died (killed by SIG")
    assert reason in message
    assert str(worker.log_path) in message
    assert "\n" not in message
    if sig == signal.SIGKILL:
        assert message.endswith("last line: loading shards")
    with pytest.raises(WorkerError, match="died"):
        worker.call("greet", name="Ada")


def test_death_while_building_names_the_last_line(tmp_path: Path) -> None:
    log = tmp_path / "echo.log"
    log.write_text("ValueError: from an earlier worker\n")
    with (
        ProcessWorker("echo", FACTORY, {"fail": "exit"}, log) as worker,
        pytest.raises(WorkerError, match=r"exit code 7.*OutOfCheese"),
    ):
        worker.ready()
    assert log.read_text().startswith("ValueError: from an earlier worker\n")


def test_unpicklable_result_is_an_error_not_a_hang(worker: ProcessWorker) -> None:
    with pytest.raises(WorkerError, match="pickle"):
        worker.call("unpicklable")
    assert worker.call("greet", name="Ada") == "hello Ada"


def test_a_stream_closed_early_stops_and_the_next_call_is_right(worker: ProcessWorker) -> None:
    items = worker.stream("count", n=10_000_000)
    assert [next(items), next(items)] == [0, 1]
    items.close()  # type: ignore[attr-defined]
    assert worker.call("greet", name="Ada") == "hello Ada"
    assert worker.call("how_many") < 10_000_000


def test_a_call_inside_an_open_stream_is_refused(worker: ProcessWorker) -> None:
    items = worker.stream("count", n=3)
    next(items)
    with pytest.raises(RuntimeError, match="stream"):
        worker.call("greet", name="Ada")
    assert list(items) == [1, 2]


def give_up(worker: ProcessWorker, sleeping_s: float) -> None:
    """Ctrl-C in a call: the child is still at it."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    worker.ready()
    old = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        with pytest.raises(KeyboardInterrupt):
            worker.call("sleep", seconds=sleeping_s)
    finally:
        signal.signal(signal.SIGALRM, old)


def test_a_call_given_up_does_not_answer_the_next(worker: ProcessWorker) -> None:
    give_up(worker, sleeping_s=0.6)
    assert worker.call("greet", name="Ada") == "hello Ada"


def test_close_ends_the_process_and_what_it_started(tmp_path: Path) -> None:
    worker = ProcessWorker("echo", FACTORY, {}, tmp_path / "echo.log")
    worker.ready()
    pid = worker.pid
    worker.close()
    worker.close()
    assert _gone(pid)
    assert not worker.alive


def test_close_while_busy_kills_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlaif.workers.process.CLOSE_GRACE_S", 0.2)
    worker = ProcessWorker("echo", FACTORY, {}, tmp_path / "echo.log")
    worker.ready()
    grandchild = worker.call("spawn_child")
    give_up(worker, sleeping_s=60)
    began = time.monotonic()
    worker.close()
    assert time.monotonic() - began < 3
    assert _gone(worker.pid)
    assert _gone(grandchild)


_PARENT = """
import signal, sys, time
# A shell that started the tests in the background has told them to ignore Ctrl-C; a user's terminal has not.
signal.signal(signal.SIGINT, signal.default_int_handler)
from rlaif.workers.process import ProcessWorker
worker = ProcessWorker("echo", {factory!r}, {{}}, __import__("pathlib").Path({log!r}))
worker.ready()
print(worker.pid, worker.call("spawn_child"), flush=True)
worker.call("sleep", seconds=60)
"""


def _parent(tmp_path: Path) -> tuple[subprocess.Popen[str], int, int]:
    code = _PARENT.format(factory=FACTORY, log=str(tmp_path / "echo.log"))
    env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    parent = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env
    )
    assert parent.stdout is not None
    pid, grandchild = map(int, parent.stdout.readline().split())
    return parent, pid, grandchild


def test_children_go_when_the_parent_is_killed(tmp_path: Path) -> None:
    parent, pid, grandchild = _parent(tmp_path)
    parent.kill()
    parent.communicate()
    assert _gone(pid)
    assert _gone(grandchild)


def test_ctrl_c_prints_no_traceback_of_a_child(tmp_path: Path) -> None:
    parent, pid, _ = _parent(tmp_path)
    os.kill(pid, signal.SIGINT)
    time.sleep(0.2)
    assert psutil.pid_exists(pid), "SIGINT is the parent's to handle"
    parent.send_signal(signal.SIGINT)
    _, errors = parent.communicate(timeout=10)
    assert "KeyboardInterrupt" in errors  # this parent doesn't handle it; a child's would name its own frames
    assert 'rlaif/workers/process.py", line' in errors
    assert "Traceback" not in (tmp_path / "echo.log").read_text()
    assert _gone(pid)


def test_inline_worker_closes_its_object_once(tmp_path: Path) -> None:
    closed = []
    worker = InlineWorker("echo", FACTORY, {})
    worker.ready()
    worker.target.close = lambda: closed.append(1)
    worker.close()
    worker.close()
    assert closed == [1]
