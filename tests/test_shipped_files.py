"""Every file that is shipped for users to edit loads, and fits the others."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlaif.config import load_job
from rlaif.constitutions.constitution import constitution_files, list_constitutions, load_constitution
from rlaif.data.prompts import FORMATS, load_prompts
from rlaif.judging.ballots import evaluating_voices, selecting_voices
from rlaif.loop.cost import estimate
from tests.conftest import shipped

# Not what is in the folders: you may have added files of your own, as docs/quickstart.md says.
JOBS = [p for p in shipped() if p.parent == Path("jobs") and p.suffix == ".yaml"]
TEXTS = [(p.parent.name, int(p.stem[1:])) for p in shipped() if p.parts[0] == "constitutions"]
PROMPTS = [p for p in shipped() if p.parent == Path("prompts") and p.suffix in FORMATS and "bench" not in p.name]


@pytest.fixture(autouse=True)
def _in_a_checkout(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(checkout)


def test_there_are_files_to_test() -> None:
    assert "quickstart" in {p.stem for p in JOBS}
    assert ("assistant", 2) in TEXTS
    assert len(PROMPTS) >= 2


@pytest.mark.slow
@pytest.mark.parametrize("path", JOBS, ids=lambda p: p.name)
def test_every_job_loads_and_can_be_planned(path: Path) -> None:
    job = load_job(path)
    costs = estimate(job, Path.cwd())  # reads its prompts and texts
    assert costs["train_prompts"] >= job.prompts.per_iteration
    assert costs["pairs_at_most"] > 0
    assert costs["evaluation_ballots_at_most"] > 0


@pytest.mark.parametrize(("name", "version"), TEXTS)
def test_every_constitution_loads_and_can_be_asked(name: str, version: int) -> None:
    constitution = load_constitution(Path("constitutions"), f"{name}@{version}")
    for voices in (selecting_voices, evaluating_voices):
        assert voices(constitution), f"{name}@{version} has no {voices.__name__}"
    assert [v for v in constitution.voices("decide") if not v.guard], f"{name}@{version} has nobody to decide"


def test_no_two_texts_are_the_same() -> None:
    texts = list_constitutions(Path("constitutions"))
    assert (
        sorted((n, v) for n, versions in constitution_files(Path("constitutions")).items() for v in versions) == TEXTS
    )
    assert len({t.hash for t in texts}) == len(texts) == len(TEXTS)


@pytest.mark.parametrize("path", PROMPTS, ids=lambda p: p.name)
def test_every_prompt_file_loads(path: Path) -> None:
    assert len(load_prompts(path.name, path.parent)) >= 60


def test_there_is_a_licence_for_the_prompts() -> None:
    assert Path("prompts/LICENSE") in shipped()
