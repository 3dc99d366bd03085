"""Fetching public data, from a repository on this machine in the place of the real one."""

from __future__ import annotations

import importlib.util
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.public_data import folder, needs

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def script() -> Any:
    spec = importlib.util.spec_from_file_location("public_data_script", ROOT / "scripts" / "public_data.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def commit(repository: Path, files: dict[str, str]) -> str:
    """A repository that holds these files; its commit."""

    def git(*arguments: str) -> str:
        own = ("-c", "user.name=a", "-c", "user.email=a@b.c")
        done = subprocess.run(["git", "-C", repository, *own, *arguments], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    for path, text in files.items():
        (repository / path).parent.mkdir(parents=True, exist_ok=True)
        (repository / path).write_text(text)
    git("init", "--quiet")
    git("add", "--all")
    git("commit", "--quiet", "--message", "all")
    return git("rev-parse", "HEAD")


def verdict(ab: str | None, ba: str | None) -> dict[str, Any]:
    return {"swap = False": {"winner": ab}, "swap = True": {"winner": ba}}


def test_verdicts_of_all_judges_go_into_one_table(script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    natural = "Dataset/LLMBar/Natural"
    rows = [
        {"label": 1, "results": [verdict("1", "2")]},
        {"label": 2, "results": [["what the judge asked itself"], verdict(None, "2")]},
    ]
    files = {"LICENSE": "MIT", f"{natural}/dataset.json": "[]"}
    files[f"{natural}/evaluators/GPT-4/Vanilla/result.json"] = json.dumps(rows)
    files[f"{natural}/evaluators/GPT-4/Vanilla/statistics.json"] = "{}"
    files["Dataset/CaseStudy/evaluators/GPT-4/Vanilla/result.json"] = json.dumps(rows)
    origin = script.Origin("nowhere", commit(tmp_path / "theirs", files), {"natural.json": f"{natural}/dataset.json"})
    monkeypatch.setattr(script, "ORIGINS", {"llmbar": origin})

    written = script.fetch("llmbar", tmp_path / "data", str(tmp_path / "theirs"))
    assert [p.relative_to(tmp_path).as_posix() for p in written] == [
        "data/llmbar/natural.json",
        "data/llmbar/recorded_verdicts.csv",
    ]
    assert written[1].read_text().splitlines() == [
        "subset,row,judge,strategy,label,winner_ab,winner_ba_mapped",
        "natural,0,GPT-4,Vanilla,1,1,2",
        "natural,1,GPT-4,Vanilla,2,,2",
    ]


def test_what_can_not_be_fetched_is_one_line(script: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as e:
        script.main(["pandalm", "--to", str(tmp_path), "--source", str(tmp_path / "nowhere")])
    assert e.value.code == 1
    assert "it needs git, and https://github.com/WeOpenML/PandaLM" in capfd.readouterr().err
    assert not (tmp_path / "pandalm").exists()


@needs("llmbar", "the script names each file that the docs' commands and the tests read")
def test_every_file_has_an_origin(script: Any) -> None:
    here = {p.name for p in folder("llmbar").iterdir()}
    assert here == {*script.ORIGINS["llmbar"].files, "recorded_verdicts.csv"}
