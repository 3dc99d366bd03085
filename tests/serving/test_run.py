"""A run whose judge's servers it starts itself, with a small program in vLLM's place."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from rlaif.config import Job, load_job
from rlaif.errors import UserError
from rlaif.loop.launch import execute
from rlaif.records import Vote
from rlaif.rundir.store import RunDir
from rlaif.serving import vllm
from tests.conftest import make_project, rlaif_here, until
from tests.serving import program
from tests.serving.test_servers import Diary, running
from tests.stubs import Quiet

ROOT = Path(__file__).resolve().parents[2]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(autouse=True)
def _stub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm, "PROGRAM", program.command())


def project(root: Path, model: Path, **args: str) -> Job:
    """A job of one iteration, whose judge is two programs that keep a diary."""
    shutil.copytree(ROOT / "prompts" / "judge", root / "prompts" / "judge")
    serve = {"model": str(model), "replicas": 2, "args": {"diary": str(root / "diary"), **args}}
    judge = {"kind": "chat", "model": "tiny", "serve": serve, "concurrency": 2}
    return load_job(make_project(root, model, judge=judge, iterations=1, constitution="rules@1", replay={"share": 0.0}))


def votes_of(run: RunDir) -> list[Vote]:
    stages = [*map(run.iteration, run.iterations()), *map(run.evaluation, run.evaluations())]
    return [v for stage in stages for v in stage.durable("votes", Vote)]


def test_a_run_that_is_killed_goes_on_with_other_servers_and_asks_nothing_again(
    tmp_path: Path, tiny_model: Path
) -> None:
    project(tmp_path, tiny_model)
    diary, run = Diary(tmp_path / "diary"), RunDir(tmp_path / "run")
    code = (
        "from pathlib import Path; from rlaif.config import load_job; from rlaif.loop.launch import execute\n"
        "from rlaif.serving import vllm; from tests.serving import program; from tests.stubs import Quiet\n"
        "vllm.PROGRAM = program.command()\n"
        "here = Path.cwd(); execute(load_job(here / 'tiny.yaml'), here / 'run', here, Quiet())\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    try:
        until(lambda: process.poll() is not None or len(votes_of(run)) > 3, 250)
        assert process.poll() is None, process.stderr.read() if process.stderr else ""
    finally:
        process.kill()
        process.wait()
    until(lambda: not running(diary.processes), 5)

    before, asked, old = len(votes_of(run)), sum("asked" in line for line in diary.lines), diary.starts
    assert before < 60
    execute(load_job(tmp_path / "tiny.yaml"), run.path, tmp_path, Quiet())
    assert not running(diary.processes)
    new = diary.starts[len(old) :]
    assert len(old) == len(new) == 2
    assert {start["key"] for start in old}.isdisjoint(start["key"] for start in new)
    assert sum("asked" in line for line in diary.lines) - asked == len(votes_of(run)) - before
    assert {v.ballot.judge for v in votes_of(run)} == {"chat:tiny"}
    assert {v.server for v in votes_of(run)} <= {f"127.0.0.1:{start['port']}/v1" for start in diary.starts}
    [answered] = run.iterations_measured([0])[0].servers.values()
    assert {*answered} == {f"127.0.0.1:{start['port']}/v1" for start in new}
    assert "judge" in run.header["models"]
    for key in {start["key"] for start in diary.starts}:
        for path in run.path.rglob("*"):
            assert not path.is_file() or key.encode() not in path.read_bytes(), path


def test_a_start_that_fails_is_the_users_to_mend(tmp_path: Path, tiny_model: Path) -> None:
    job = project(tmp_path, tiny_model, stub="refuses")
    with pytest.raises(UserError, match=r"judge server . ended before it answered .*run/logs/judge-server-.\.log"):
        execute(job, tmp_path / "run", tmp_path, Quiet())
    assert not (tmp_path / "run" / "run.json").exists()
    until(lambda: not running(Diary(tmp_path / "diary").processes), 5)


def test_a_dry_run_names_them_and_starts_none(tmp_path: Path, tiny_model: Path) -> None:
    project(tmp_path, tiny_model)
    done = rlaif_here("run", "tiny.yaml", "--dry-run")
    assert "2 servers of vLLM's" in " ".join(done.stdout.split())
    plan = json.loads(rlaif_here("run", "tiny.yaml", "--dry-run", "--json").stdout)
    assert plan["judge_servers"]["replicas"] == 2
    assert not (tmp_path / "diary").exists()


def test_a_command_that_asks_the_judge_starts_them_for_itself(tmp_path: Path, tiny_model: Path) -> None:
    """In a process of its own: the servers go with it. What they said is found again, though others say it."""
    project(tmp_path, tiny_model)
    rows = [{"id": n, "prompt": f"q{n}", "first": "a", "second": "b", "label": 1 + n % 2} for n in range(4)]
    (tmp_path / "pairs.json").write_text(json.dumps(rows))
    code = (
        "import sys; from rlaif.serving import vllm; from tests.serving import program\n"
        "vllm.PROGRAM = program.command()\n"
        "from rlaif.cli import main\n"
        "sys.argv = ['rlaif', 'judge', 'bench', 'pairs.json', '--job', 'tiny.yaml', '--set', 'judge.cache=replies']\n"
        "main()\n"
    )
    diary, environment = Diary(tmp_path / "diary"), os.environ | {"TMPDIR": str(tmp_path)}
    for _ in range(2):
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert "starting 2 servers" in done.stderr
        assert sum("asked" in line for line in diary.lines) == 8
        assert not running(diary.processes)
    assert len({start["key"] for start in diary.starts}) == 2
