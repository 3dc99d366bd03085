"""What a run contributes to a look at several."""

from __future__ import annotations

import json

import pytest

from rlaif.audit.curves import curve_of, settings_that_differ
from rlaif.rundir.store import RunDir


def test_a_stored_run_over_its_iterations(stored: RunDir) -> None:
    found = curve_of(stored)
    metrics = json.loads((stored.evaluation(4).path / "metrics.json").read_text())
    assert (found.run, found.problems) == (stored.path.name, ())
    assert [(c.iteration, c.constitution) for c in found.changes] == [(0, "rules@1"), (2, "rules@2")]
    assert [e.updates for e in found.evaluations] == [0, 2, 4]
    assert found.evaluations[-1].win_rate == metrics["win_rate"]


@pytest.mark.parametrize("part", ["evaluations/0004/metrics.json", "iterations/0001/plan.json"])
def test_a_damaged_part_is_said_and_the_rest_is_there(copy: RunDir, part: str) -> None:
    (copy.path / part).write_text('{"updates":')
    (copy.iteration(4).path).mkdir()  # begun just now: it has no plan yet
    found = curve_of(copy)
    assert [part in problem for problem in found.problems] == [True]
    assert [e.updates for e in found.evaluations][:2] == [0, 2]
    assert [c.iteration for c in found.changes] == [0, 2]


def test_settings_that_differ_are_each_runs_own() -> None:
    jobs = [
        {"name": "a", "seed": 1, "learner": {"beta": 0.1, "lr": 1}},
        {"name": "b", "seed": 1, "learner": {"beta": 0.2, "lr": 1}},
        {"name": "c", "seed": 2, "learner": {"beta": 0.1, "lr": 1}, "source": {"run": "a"}},
    ]
    assert settings_that_differ([{"job": job} for job in jobs]) == {
        "learner.beta": (0.1, 0.2, 0.1),
        "seed": (1, 1, 2),
        "source": (None, None, {"run": "a"}),
    }
