"""Servers that we start, with a small program in vLLM's place: waited for, watched, gone with whoever started them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from rlaif.config import Serve
from rlaif.errors import RlaifError, UserError
from rlaif.serving import vllm
from rlaif.serving.servers import KEY_VARIABLE, Servers
from tests.conftest import until
from tests.serving import program

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def _stub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm, "PROGRAM", program.command())


class Diary:
    """What the programs wrote down."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.path.read_text().splitlines()] if self.path.exists() else []

    @property
    def starts(self) -> list[dict[str, Any]]:
        return [line for line in self.lines if "pid" in line]

    @property
    def processes(self) -> set[int]:
        """All that were started."""
        return {start[what] for start in self.starts for what in ("pid", "engine")}


def running(pids: set[int]) -> set[int]:
    found = {p.pid for p in psutil.process_iter(["status"]) if p.info["status"] != psutil.STATUS_ZOMBIE}
    return pids & found


def started(
    folder: Path,
    replicas: int = 1,
    told: Callable[[str], None] = print,
    start_timeout_s: float = 30.0,
    rests: bool = False,
    **args: Any,
) -> Servers:
    """Servers on their way; `args` are the program's."""
    servers = Servers("judge", replicas)
    args["diary"] = str(folder / "diary")
    serve = Serve(model="m", replicas=replicas, args=args, start_timeout_s=start_timeout_s)
    servers.start(serve, folder, "m", "auto", [()] * replicas, folder / "logs", told, rests=rests)
    return servers


@pytest.fixture
def told() -> list[str]:
    return []


def ask(url: str, key: str) -> int:
    body = json.dumps({"messages": [{"role": "user", "content": "hello"}]}).encode()
    request = urllib.request.Request(f"{url}/chat/completions", body, {"Authorization": f"Bearer {key}"})
    try:
        with urllib.request.urlopen(request, timeout=5) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as e:
        return e.code


def test_several_servers_answer_with_their_key_until_they_are_closed(tmp_path: Path) -> None:
    diary, servers = Diary(tmp_path / "diary"), started(tmp_path, replicas=2)
    try:
        servers.ready()
        assert len(set(servers.urls)) == 2
        assert [ask(url, servers.key) for url in servers.urls] == [200, 200]
        assert ask(servers.urls[0], "another") == 401
        assert {line["port"] for line in diary.lines if "asked" in line} == {start["port"] for start in diary.starts}
        assert servers.environment[KEY_VARIABLE] == servers.key
        assert running(diary.processes) == diary.processes
        assert not any(servers.key in " ".join(psutil.Process(pid).cmdline()) for pid in diary.processes)
    finally:
        servers.close()
    assert len(diary.processes) == 4
    assert not running(diary.processes)
    servers.close()
    for log in (tmp_path / "logs").iterdir():
        assert servers.key not in log.read_text()
    assert sorted(p.name for p in (tmp_path / "logs").iterdir()) == ["judge-server-0.log", "judge-server-1.log"]


def test_each_server_rests_and_wakes(tmp_path: Path) -> None:
    diary, servers = Diary(tmp_path / "diary"), started(tmp_path, replicas=2, rests=True)
    try:
        servers.ready()
        servers.rest()
        servers.wake()
        servers.wake()
        turns = [(line["turn"], line["port"]) for line in diary.lines if "turn" in line]
        ports = [start["port"] for start in diary.starts]
        for port in ports:
            assert [turn for turn, at in turns if at == port] == ["/sleep?level=1", "/wake_up", "/wake_up"]
    finally:
        servers.close()


def test_a_server_that_does_not_rest_is_told_of(tmp_path: Path) -> None:
    servers = started(tmp_path, rests=True, stub="wide awake")
    try:
        servers.ready()
        with pytest.raises(RlaifError, match=r"judge server 0: /sleep\?level=1 failed .*500.* its log is .*server-0"):
            servers.rest()
    finally:
        servers.close()


def test_one_that_takes_turns_is_not_started_again(tmp_path: Path, told: list[str]) -> None:
    """It would take memory in another's turn. Who asks it to rest is not stopped by it: it holds nothing."""
    diary, servers = Diary(tmp_path / "diary"), started(tmp_path, told=told.append, rests=True, stub="ends")
    try:
        servers.ready()
        until(lambda: any("left out from here on" in line for line in told))
        servers.wake()
        servers.rest()
    finally:
        servers.close()
    assert len(diary.starts) == 1
    assert not [line for line in diary.lines if "turn" in line]


def test_no_proxy_is_asked_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "example.org")
    servers = Servers("judge", 1)
    assert servers.environment["no_proxy"] == "example.org,127.0.0.1"
    monkeypatch.setenv("no_proxy", "*")
    assert "no_proxy" not in servers.environment
    servers.close()


def test_one_that_does_not_start_names_its_log_and_what_it_said(tmp_path: Path) -> None:
    servers = started(tmp_path, stub="refuses")
    try:
        with pytest.raises(UserError) as e:
            servers.ready()
    finally:
        servers.close()
    log = tmp_path / "logs/judge-server-0.log"
    assert (
        f"judge server 0 ended before it answered (exit code 3); its log is {log}, which says: ValueError: no such"
        in str(e.value)
    )
    assert not running(Diary(tmp_path / "diary").processes)


def test_one_that_is_never_well_is_given_up(tmp_path: Path) -> None:
    servers = started(tmp_path, stub="silent", start_timeout_s=1.5)
    try:
        with pytest.raises(UserError, match=r"no answer within 1.5 s \(judge.serve.start_timeout_s\)"):
            servers.ready()
    finally:
        servers.close()
    assert not running(Diary(tmp_path / "diary").processes)


def test_one_that_dies_is_started_again_at_its_address(tmp_path: Path, told: list[str]) -> None:
    diary, servers = Diary(tmp_path / "diary"), started(tmp_path, told=told.append)
    try:
        servers.ready()
        [first] = diary.starts
        os.kill(first["pid"], signal.SIGKILL)
        until(lambda: len(told) == 2)
        assert "judge server 0 ended (SIGKILL)" in told[0]
        assert told[0].endswith("it is started again (1 of 3)")
        assert "answers again, after" in told[1]
        assert ask(servers.urls[0], servers.key) == 200
        assert not running({first["engine"]}), "what a dead server leaves behind holds memory, or a GPU"
        assert diary.starts[1]["port"] == first["port"]
    finally:
        servers.close()
    assert not running(diary.processes)


def test_one_that_dies_again_and_again_is_left_out(tmp_path: Path, told: list[str]) -> None:
    diary, servers = Diary(tmp_path / "diary"), started(tmp_path, told=told.append, stub="ends")
    try:
        servers.ready()
        until(lambda: told and told[-1].endswith("left out from here on"))
        assert len(diary.starts) == 4
        assert not running(diary.processes)
    finally:
        servers.close()


def test_a_keeper_that_is_killed_leaves_no_server(tmp_path: Path, told: list[str]) -> None:
    diary, servers = Diary(tmp_path / "diary"), started(tmp_path, told=told.append)
    try:
        servers.ready()
        os.kill(psutil.Process(diary.starts[0]["pid"]).ppid(), signal.SIGKILL)
        until(lambda: told)
        assert "judge server 0 is left out from here on" in told[0]
        until(lambda: not running(diary.processes))
    finally:
        servers.close()


def test_what_started_them_is_killed_and_takes_them_along(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path\n"
        "from rlaif.serving import vllm; from tests.serving import program, test_servers\n"
        "vllm.PROGRAM = program.command()\n"
        "test_servers.started(Path(sys.argv[1]), 2).ready(); print('ready', flush=True); time.sleep(600)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        diary = Diary(tmp_path / "diary")
        assert len(running(diary.processes)) == 4
    finally:
        process.kill()
        process.wait()
    until(lambda: not running(diary.processes), 5)


def test_a_long_start_is_told_of(tmp_path: Path, told: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlaif.serving.servers.SILENCE_S", 0.2)
    servers = started(tmp_path, told=told.append, stub="silent")
    try:
        until(lambda: servers.poll(0.1) or len(told) > 1)
        assert told[-1].startswith("judge server 0 is loading: ")
    finally:
        servers.close()
