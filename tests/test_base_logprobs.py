"""What the judge computed of the untrained policy is the learner's reference."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rlaif.judging.likelihood import LikelihoodJudge
from rlaif.learning import KINDS, make_learner
from rlaif.learning.dpo import DpoLearner
from rlaif.loop.judging import base_logprobs
from rlaif.loop.launch import execute
from rlaif.records import BaseLogprob, Completion, Pair, Preference, UpdateStep, Vote
from rlaif.rundir.store import RunDir
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


@pytest.mark.parametrize("kept", [1, 4, 7])
def test_a_kill_while_judging_changes_no_bit(kept: int, tiny_model: Path, tmp_path: Path, took: list[bool]) -> None:
    """What is computed a second time may be computed among others, so it isn't."""
    job = project_job(tmp_path, tiny_model, **ONE, **GUARDS)
    whole = execute(job, tmp_path / "runs" / "whole", tmp_path, Quiet())
    with pytest.MonkeyPatch.context() as patch:
        killed_after(kept, patch)
        with pytest.raises(Killed):
            execute(job, tmp_path / "runs" / "killed", tmp_path, Quiet())
    killed = execute(job, tmp_path / "runs" / "killed", tmp_path, Quiet())
    assert any(e.kind == "judging_interrupted" for e in killed.events())
    assert rows_of(killed)[1] == rows_of(whole)[1] != []
    assert killed.iteration(0).policy_made() == whole.iteration(0).policy_made() is not None
    assert took == [True, True]


class Killed(BaseException):
    """In place of a signal."""


def killed_after(chunks: int, patch: pytest.MonkeyPatch) -> None:
    """The judge's process ends when it has given so many chunks of votes."""
    cast = LikelihoodJudge.cast

    def until_then(judge: LikelihoodJudge, *args: Any, **kwargs: Any) -> Iterator[list[Vote]]:
        for n, chunk in enumerate(cast(judge, *args, **kwargs)):
            if n == chunks:
                raise Killed
            yield chunk

    patch.setattr(LikelihoodJudge, "cast", until_then)
    patch.setattr("rlaif.judging.likelihood.KV_BATCHES", 0)  # a chunk is a pair


def test_votes_of_another_judge_are_no_reference(tmp_path: Path) -> None:
    """A run may take over votes that another model cast."""
    run: Any = stub_loop(tmp_path, stub_job(iterations=1))
    run.run()
    first = run.dir.iteration(0)
    votes = first.read("votes", Vote)
    pairs = first.read("pairs", Pair)
    some = [v.model_copy(update={"logprobs": (-1.0, -2.0)}) for v in votes if v.ballot.pair_id == pairs[0].id]
    other = [
        v.model_copy(update={"logprobs": (-3.0, -4.0), "ballot": v.ballot.model_copy(update={"judge": "other"})})
        for v in votes
        if v.ballot.pair_id == pairs[1].id
    ]
    it: Any = SimpleNamespace(dir=run.dir.iteration(1), pairs=pairs, completions=first.read("completions", Completion))
    it.votes = SimpleNamespace(of_each=lambda ids: ([v for v in (*some, *other) if v.ballot.pair_id == i] for i in ids))
    kept: list[BaseLogprob] = []
    it.rows = lambda stage, produce: kept.extend(row for chunk in produce([]) for row in chunk)
    base_logprobs(SimpleNamespace(judge=run.judge, measurer=run.judge, judge_name=run.judge_name), it)  # type: ignore[arg-type]
    assert {k.completion_id: k.logprob for k in kept} == {pairs[0].first: -1.0, pairs[0].second: -2.0}


def test_only_dpo_takes_it() -> None:
    assert [name for name, kind in KINDS.items() if kind.takes_reference] == ["dpo"]
