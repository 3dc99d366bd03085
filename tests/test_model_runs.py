"""Whole runs on tiny models whose folders are as people have them, and the export of what was trained."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from rlaif.errors import RlaifError
from rlaif.export import export_policy
from rlaif.rundir.store import RunDir
from tests.conftest import project_job
from tests.stubs import Quiet

TEMPLATE = "{% for m in messages %}{{ m['content'] }} {% endfor %}w1"
GENERATION = {"temperature": 0.7, "top_p": 0.9, "do_sample": False, "eos_token_id": 2}


@pytest.fixture(scope="module", params=["list", "files"])
def finished(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> RunDir:
    """One iteration of a model with several chat templates, a processor, a generation config that can't be saved."""
    pytest.importorskip("trl")
    from rlaif.loop.launch import execute

    root = tmp_path_factory.mktemp("kinds")
    base = Path(shutil.copytree(tiny_model, root / "base"))
    (base / "generation_config.json").write_text(json.dumps(GENERATION))
    if request.param == "list":
        (base / "chat_template.jinja").unlink(missing_ok=True)
        tokenizer = json.loads((base / "tokenizer_config.json").read_text())
        tokenizer["chat_template"] = [{"name": n, "template": TEMPLATE} for n in ("default", "tool_use")]
        (base / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    else:
        (base / "additional_chat_templates").mkdir()
        (base / "additional_chat_templates" / "tool_use.jinja").write_text(TEMPLATE)
    for name in ("preprocessor_config.json", "processor_config.json", "LICENSE", "README.md"):
        (base / name).write_text("{}")
    job = project_job(root, base, iterations=1, schedule={0: "rules@1"}, eval={"every": 1, "prompts": 2})
    return execute(job, root / "runs" / "kinds", root, Quiet())


def test_a_run_ends_and_its_policy_is_whole(finished: RunDir, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    base = finished.path.parents[1] / "base"
    exported = export_policy(finished, tmp_path / "out")
    assert not (tmp_path / "out.partial").exists()
    for folder in (finished.iteration(0).path / "policy", exported):
        for name in ("preprocessor_config.json", "LICENSE", "tokenizer_config.json"):
            assert (folder / name).read_bytes() == (base / name).read_bytes()
        assert json.loads((folder / "generation_config.json").read_text()) == GENERATION
        assert GenerationConfig.from_pretrained(folder).to_dict() == GenerationConfig.from_pretrained(base).to_dict()
        assert set(AutoTokenizer.from_pretrained(folder).chat_template) >= {"default", "tool_use"}
        AutoModelForCausalLM.from_pretrained(folder)
    assert "Trained with rlaif" in (exported / "README.md").read_text()


def test_an_export_is_whole_or_not_at_all(finished: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = shutil.copy2

    def torn(source: Any, target: Any) -> Any:
        if Path(source).name == "tokenizer.json":
            raise OSError(28, "No space left on device")
        return real(source, target)

    monkeypatch.setattr(shutil, "copy2", torn)
    with pytest.raises(RlaifError, match="no space left"):
        export_policy(finished, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
