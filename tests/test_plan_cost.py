"""The dry run's counts are those of the run."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlaif.config import load_job
from rlaif.errors import UserError
from rlaif.plan_cost import estimate

ROOT = Path(__file__).resolve().parent.parent


def test_a_calibration_that_is_not_there_is_found() -> None:
    job = load_job(ROOT / "jobs" / "quickstart.yaml", ["filters.calibration=nosuch.json"])
    with pytest.raises(UserError, match=r"nosuch\.json"):
        estimate(job, ROOT)


def test_a_judge_behind_a_server_is_asked_by_order_template_sample_and_juror() -> None:
    job = ROOT / "jobs" / "quickstart.yaml"
    chat = ["judge.kind=chat", "judge.model=m", "pairing.method=random"]
    more = [*chat, "judge.templates=[pairwise, pairwise_json]", "judge.jury=[{model: n}]"]
    embedded, one, many = (estimate(load_job(job, changes), ROOT) for changes in ([], chat, more))
    assert one["ballots_at_most"] == 2 * one["pairs_at_most"]
    assert many["ballots_at_most"] == 2 * 2 * 2 * many["pairs_at_most"]
    assert one["tokens"]["judged"] < embedded["tokens"]["judged"]
