"""What the judge computed of the untrained policy is the learner's reference."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rlaif.learning import KINDS, make_learner
from rlaif.learning.dpo import DpoLearner
from rlaif.loop.judging import base_logprobs
from rlaif.loop.launch import execute
from rlaif.records import BaseLogprob, Completion, Pair, Preference, TokenSequence, UpdateStep
from rlaif.rundir.store import RunDir
from rlaif.workers.inline import InlineWorker
from rlaif.workers.replicas import Replicas
from tests.conftest import project_job
from tests.sampling.conftest import make_model
from tests.stubs import Quiet, stub_job, stub_loop

pytest.importorskip("trl")
pytestmark = pytest.mark.slow
ONE: dict[str, Any] = {"iterations": 1, "schedule": {0: "rules@1"}, "eval": {"every": 1, "prompts": 1}}
GUARDS = {"filters": {"min_kept_pairs": 1, "min_agreement": 0.0, "guards": True}}


def rows_of(run: RunDir) -> tuple[list[Preference], list[BaseLogprob], list[UpdateStep]]:
    here = run.iteration(0)
    known = here.read("base_logprobs", BaseLogprob) if here.is_complete("base_logprobs") else []
    return here.read("preferences", Preference), known, here.read("updates", UpdateStep)


@pytest.fixture
def took(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Of each update, whether the learner was given something."""
    calls: list[bool] = []
    use = DpoLearner.use_reference

    def spied(learner: DpoLearner, logprobs: dict[str, float]) -> None:
        calls.append(bool(logprobs))
        use(learner, logprobs)

    monkeypatch.setattr(DpoLearner, "use_reference", spied)
    return calls


def test_the_judges_numbers_are_the_learners(tiny_model: Path, tmp_path: Path, took: list[bool]) -> None:
    job = project_job(tmp_path, tiny_model, **ONE, **GUARDS)
    run = execute(job, tmp_path / "runs" / "one", tmp_path, Quiet())
    rows, known, steps = rows_of(run)
    assert rows, "no pair was kept"
    assert {k.completion_id for k in known} >= {i for row in rows for i in (row.chosen_id, row.rejected_id)}
    own = make_learner("dpo", str(tiny_model), job.learner, seed=0)
    sequences = {i: s for r in rows for i, s in zip((r.chosen_id, r.rejected_id), r.sequences, strict=True)}
    wanted = dict(zip(sequences, own.logprobs(list(sequences.values())), strict=True))
    of = {k.completion_id: k for k in known}
    for i, logps in wanted.items():
        assert of[i].logprob == pytest.approx(sum(logps), abs=1e-3)
        assert of[i].tokens == len(logps)
    assert took == [True]
    assert not any(s.notes for s in steps)


@pytest.mark.parametrize("other", ["reference", "judge"])
def test_of_another_model_nothing_is_handed_over(
    other: str, tiny_model: Path, tmp_path: Path, took: list[bool]
) -> None:
    """A reference that is trained itself, or a judge of other weights."""
    judge = str(make_model(tmp_path / "judge", seed=1))
    changes = {"learner": {"reference": "previous"}} if other == "reference" else {"judge": {"model": judge}}
    job = project_job(tmp_path, tiny_model, **ONE, **GUARDS, **changes)
    _, known, steps = rows_of(execute(job, tmp_path / "runs" / "one", tmp_path, Quiet()))
    assert steps
    assert took == []
    assert bool(known) == (other == "reference")


class Knows:
    """A judge that was asked about every third completion, from its number on."""

    def __init__(self, number: int) -> None:
        self._number = number

    def known_logprobs(self, sequences: list[TokenSequence]) -> list[float | None]:
        return [-float(n) if n % 3 == self._number else None for n in range(len(sequences))]


def test_each_of_several_judges_is_asked_for_what_it_knows(tmp_path: Path) -> None:
    judges = Replicas("judge", lambda n: InlineWorker("judge", f"{__name__}:Knows", {"number": n}), 2)
    run: Any = stub_loop(tmp_path, stub_job(iterations=1))
    run.run()
    it: Any = SimpleNamespace(dir=run.dir.iteration(1), pairs=run.dir.iteration(0).read("pairs", Pair))
    it.completions = run.dir.iteration(0).read("completions", Completion)
    it.rows = lambda stage, produce: kept.extend(row for chunk in produce([]) for row in chunk)
    kept: list[BaseLogprob] = []
    base_logprobs(SimpleNamespace(judge=judges, measurer=judges), it)  # type: ignore[arg-type]
    wanted = {i for p in it.pairs for i in (p.first, p.second)}
    sides = [c.id for c in it.completions if c.id in wanted]
    assert {k.completion_id: k.logprob for k in kept} == {i: -float(n) for n, i in enumerate(sides) if n % 3 < 2}
    assert len(sides) > 3


def test_only_dpo_takes_it() -> None:
    assert [name for name, kind in KINDS.items() if kind.takes_reference] == ["dpo"]
