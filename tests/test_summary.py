"""What `rlaif status` and the model card say, from a stub run's directory."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rlaif.store import RunDir
from rlaif.summary import status_of, status_table
from tests.data.make_run import write_header
from tests.stubs import stub_job, stub_loop


def test_status_counts_iterations_from_one_for_people(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = stub_job(iterations=1, monitors={"min_mean_words": 99})
    stub_loop(tmp_path, job).run()
    write_header(tmp_path / "run", job)
    run = RunDir.open(tmp_path / "run")
    status_table(run)
    assert "alarm in iteration 1: sampled answers have" in " ".join(capsys.readouterr().out.split())
    said = json.loads(status_of(run).model_dump_json())
    assert (said["iterations_done"], said["alarms"][0]["iteration"]) == (1, 0)
    assert said["constitution"]["name"] == "rules"
