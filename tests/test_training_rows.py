"""Which rows train: the learner says their type, the loop makes them, and nobody imports a trainer to know."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import pytest

from rlaif import learning
from rlaif.errors import UserError
from rlaif.learning import KINDS, Kind, kind_of
from rlaif.loop import launch, training
from rlaif.records import Preference, Record
from tests.stubs import Quiet, stub_job


class Rewarded(Record):
    """A row of another type, as a learner from rewards would take."""

    row_id: str
    source: Literal["judge", "replay", "human"] = "judge"
    rewards: tuple[float, ...] = ()


@pytest.fixture
def takes_rewarded(monkeypatch: pytest.MonkeyPatch) -> None:
    """`learner.kind: dpo` stands for a learner that takes other rows."""
    monkeypatch.setitem(learning.KINDS, "dpo", Kind("no.module:Learner", Rewarded))


def test_every_kind_says_a_type_that_the_loop_makes() -> None:
    assert {kind_of(name).row_type for name in KINDS} == {Preference} == {*training.MIXES}
    with pytest.raises(UserError, match=r"learner\.kind: no learner is called 'ppo'; there are `dpo`, `online_dpo`"):
        kind_of("ppo")


@pytest.mark.usefixtures("takes_rewarded")
def test_rows_that_nothing_makes_are_refused_before_anything_begins(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"learner.kind: `dpo` trains on rows of type `Rewarded`, .* makes `Preference`"
    ):
        launch.execute(stub_job(), tmp_path / "run", tmp_path, Quiet())
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("takes_rewarded")
def test_the_mix_is_that_of_the_learners_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [Rewarded(row_id="a")]
    monkeypatch.setitem(training.MIXES, Rewarded, lambda run, it: rows)
    run: Any = type("Run", (), {"job": stub_job()})
    it: Any = None
    assert training.mix(run, it) is rows
