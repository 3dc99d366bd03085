"""The pages over plain HTTP: headers, hosts, errors."""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from tests.view.conftest import ROOT, served


def get(url: str, **headers: str) -> tuple[int, dict[str, str], str]:
    """Status, headers and text of an answer."""
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=30) as answer:
            return answer.status, dict(answer.headers), answer.read().decode()
    except urllib.error.HTTPError as e:
        return e.code, dict(e.headers), e.read().decode()


@pytest.mark.parametrize("path", ["/", "/static/style.css", "/nothing", "/version"])
def test_every_answer_forbids_foreign_script(address: str, path: str) -> None:
    _, headers, _ = get(address + path)
    policy = headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "script-src 'self';" in policy
    assert "unsafe" not in policy
    assert headers["x-content-type-options"] == "nosniff"


def test_a_name_that_is_not_this_machine_is_refused(address: str) -> None:
    status, _, text = get(address, Host="rebound.example:8321")
    assert status == 400
    assert "loopback" in text
    assert get(address, Host="localhost:1234")[0] == 200


def test_unknown_pages_are_a_line(address: str) -> None:
    for path in ("/nothing", "/static/../app.py", "/static/app.py"):
        status, _, text = get(address + path)
        assert status == 404
        assert "Traceback" not in text


def test_no_generated_api_pages(address: str) -> None:
    assert [get(f"{address}/{p}")[0] for p in ("docs", "redoc", "openapi.json")] == [404] * 3


def test_a_damaged_file_is_named_and_the_rest_is_shown(stub_run: Path, tmp_path: Path) -> None:
    import shutil

    run = tmp_path / "run"
    shutil.copytree(stub_run, run)
    (run / "iterations/0001/metrics.json").write_text('{"iteration": 1,\n oops')
    with served(run) as url:
        status, _, text = get(url)
    assert status == 200
    assert "iterations/0001/metrics.json:2" in text
    assert "rules@2" in text


def test_a_version_changes_when_something_is_written(stub_run: Path, tmp_path: Path) -> None:
    from rlaif.store import RunDir
    from rlaif.view.facts import version_of

    import shutil  # isort: skip

    run = RunDir(tmp_path / "run")
    shutil.copytree(stub_run, run.path)
    first = version_of(run)
    assert version_of(run) == first
    run.event("resumed", "again")
    second = version_of(run)
    run.iteration(9).path.mkdir()
    third = version_of(run)
    (run.iteration(9).path / "votes.jsonl.partial").touch()
    assert len({first, second, third, version_of(run)}) == 4


def test_a_directory_that_is_no_run(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "rlaif", "view", str(tmp_path), "--port", "0"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "not a run directory" in done.stderr


def test_the_version_is_json(address: str) -> None:
    assert set(json.loads(get(f"{address}/version")[2])) == {"version"}
