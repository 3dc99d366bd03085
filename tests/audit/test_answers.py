"""Held-out answers over all evaluations: they say what metrics.json counts."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path

import pytest

from rlaif.audit.answers import answers_to, held_out_prompts, same_prompt
from rlaif.audit.index import Index
from rlaif.errors import UserError
from rlaif.records import Message
from rlaif.rundir.store import RunDir
from tests.audit.conftest import ALL_STORED
from tests.stubs import stub_job
from tests.view.runs import make_run

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def twice(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with two answers to each held-out prompt."""
    return make_run(tmp_path_factory.mktemp("twice"), stub_job(eval={"every": 2, "prompts": 3, "samples": 2}))


@pytest.mark.parametrize("which", [0, 1, "twice"])
def test_verdicts_and_checks_are_those_of_the_metrics(which: int | str, twice: Path) -> None:
    run = RunDir.open(twice if which == "twice" else ALL_STORED[int(which)])
    index = Index.open(run)
    lines = held_out_prompts(index).prompts
    every = [answers_to(index, run, line.prompt_id) for line in lines]
    samples = 2 if which == "twice" else 1
    for place, k in enumerate(run.evaluations()):
        metrics = json.loads((run.evaluation(k).path / "metrics.json").read_text())
        mine = [a for answers in every for a in answers.evaluated[place].answers]
        assert len(mine) == metrics["answers"] == 3 * samples
        counts = Counter(a.against_base for a in mine)
        assert counts["won"] == metrics["wins"]
        assert counts["lost"] == metrics["losses"]
        assert counts["undecided"] + counts["equal"] == metrics["undecided"]
        for name, share in metrics["checks"].items():
            passed = [not c.failed for a in mine for c in a.checks if c.principle == name]
            assert sum(passed) / len(passed) == pytest.approx(share)
        texts = {c["text"] for c in map(json.loads, (run.evaluation(k).path / "completions.jsonl").open())}
        assert {a.text for a in mine} == texts


@pytest.mark.parametrize("path", ALL_STORED)
def test_the_base_policy_is_first_and_a_change_of_text_is_said(path: Path) -> None:
    run = RunDir.open(path)
    found = held_out_prompts(Index.open(run))
    assert [e.updates for e in found.evaluations] == [0, 2, 4]
    assert [e.is_new for e in found.evaluations] == [False, False, True]
    assert len({e.constitution for e in found.evaluations}) == 2
    assert all(line.against_base[0] is None for line in found.prompts)
    assert all(line.against_base[2] for line in found.prompts)


def test_several_answers_are_in_order_and_one_word(twice: Path) -> None:
    run = RunDir.open(twice)
    index = Index.open(run)
    for line in held_out_prompts(index).prompts:
        answers = answers_to(index, run, line.prompt_id)
        assert answers.messages
        for word, evaluated in zip(line.against_base, answers.evaluated, strict=True):
            said = [a.against_base for a in evaluated.answers]
            if said == ["won", "won"]:
                assert word == "won"
            if set(said) == {"won", "lost"}:
                assert word == "undecided"
            ids = [a.pair_id for a in evaluated.answers if a.pair_id]
            assert ids == sorted(ids)


def test_search_looks_at_prompts_and_answers(twice: Path) -> None:
    run = RunDir.open(twice)
    index = Index.open(run)
    first = held_out_prompts(index).prompts[0]
    assert [p.prompt_id for p in held_out_prompts(index, first.prompt.upper()).prompts] == [first.prompt_id]
    number = answers_to(index, run, first.prompt_id).evaluated[1].answers[0].text.split()[1]
    assert [p.prompt_id for p in held_out_prompts(index, number).prompts] == [first.prompt_id]
    assert held_out_prompts(index, "nowhere to be found").prompts == ()


def test_a_prompt_is_known_again_under_another_name(twice: Path, tmp_path: Path) -> None:
    shutil.copytree(twice, tmp_path / "run")
    path = tmp_path / "run" / "prompts" / "held_out.jsonl"
    path.write_text(path.read_text().replace('"held1"', '"renamed"'))
    index = Index.open(RunDir.open(tmp_path / "run"))
    said = Message(role="user", content="question 1 of held")
    assert same_prompt(index, [said]) == "renamed"
    assert same_prompt(index, [said.model_copy(update={"content": "another"})]) is None


def test_what_is_gone_is_said(twice: Path, tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    shutil.copytree(twice, run.path)
    (run.path / "prompts" / "held_out.jsonl").unlink()
    gone = next((run.path / "constitutions").glob("*/constitution.json"))
    gone.unlink()
    index = Index.open(run)
    line = held_out_prompts(index).prompts[0]
    found = answers_to(index, run, line.prompt_id)
    assert line.prompt == line.prompt_id
    assert found.messages == ()
    assert [str(gone) in problem for problem in found.problems] == [True]
    assert sum(bool(a.checks) for e in found.evaluated for a in e.answers) > 0, "the other text's checks are there"
    with pytest.raises(UserError, match="no held-out prompt `nosuch`"):
        answers_to(index, run, "nosuch")
