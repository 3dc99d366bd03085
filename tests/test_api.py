"""The Python entry: light to import, and every example in it runs."""

from __future__ import annotations

import doctest
import importlib.util
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import rlaif
from rlaif import api, models
from rlaif.errors import UserError
from tests.architectures import make_model
from tests.learning.conftest import make_preferences
from tests.stubs import stub_job, stub_loop
from tests.test_branch import go_on

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parent.parent
STORED = ROOT / "tests" / "data" / "run_schema1"


def load_example(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(f"example_{name}", ROOT / "examples" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def stored() -> Path:
    return STORED


def test_import_is_light_and_offers_what_it_names() -> None:
    code = (
        "import rlaif, sys; before = set(sys.modules);"
        "heavy = {'torch', 'transformers', 'vllm', 'trl', 'datasets', 'pandas', 'pydantic', 'yaml', 'duckdb'};"
        "print(sorted(heavy & before)); [getattr(rlaif, n) for n in rlaif.__all__]; print(sorted((heavy - {'pydantic', "
        "'yaml'}) & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[:2] == ["[]", "[]"]
    assert set(rlaif.__all__) <= set(dir(rlaif))
    with pytest.raises(AttributeError, match="no attribute 'jugde'"):
        _ = rlaif.jugde


@pytest.mark.parametrize("module", [rlaif, api])
def test_every_example_runs(module: Any, checkout: Path, stored: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a stored run in the place of the quickstart's; what would load a model is skipped here and tested below."""
    monkeypatch.chdir(checkout)
    run = checkout / "runs" / "quickstart"
    shutil.copytree(stored, run)
    header = json.loads((run / "run.json").read_text())
    header["job"]["policy"]["model"] = "embedded:smollm2-135m-instruct"
    (run / "run.json").write_text(json.dumps(header))
    found = doctest.testmod(module, optionflags=doctest.ELLIPSIS)
    assert found.failed == 0
    assert found.attempted > 0


def test_everything_offered_has_an_example() -> None:
    for name in ("load_constitution", "run", "open_run", "Run", "Judge"):
        assert ">>> " in (getattr(api, name).__doc__ or ""), name


def test_a_runs_rows(stored: Path) -> None:
    run = rlaif.open_run(stored)
    for rows in ("completions", "pairs", "votes", "decisions", "preferences", "steps"):
        stage = "updates" if rows == "steps" else rows
        lines = [line for k in range(4) for line in (stored / f"iterations/{k:04d}/{stage}.jsonl").open()]
        assert len(list(getattr(run, rows)())) == len(lines), rows
        assert len(run.frame(rows)) == len(lines)
        assert len(list(getattr(run, rows)(1))) == sum(1 for _ in (stored / f"iterations/0001/{stage}.jsonl").open())
    assert [m.iteration for m in run.iterations] == [0, 1, 2, 3]
    assert run.evaluations[0].updates == 0
    held_out = list(run.completions(held_out=True, iteration=0))
    assert len(held_out) == run.evaluations[0].answers
    votes = run.frame("votes")
    assert votes["ballot.voice"].notna().all()
    assert sorted(run.dataset("decisions")["pair_id"]) == sorted(d.pair_id for d in run.decisions())
    with pytest.raises(UserError, match="has no iteration 9"):
        list(run.votes(9))
    with pytest.raises(UserError, match="there are prompts, completions"):
        run.frame("vote")  # type: ignore[arg-type]


def test_a_branch_goes_on_from_an_earlier_state(tmp_path: Path) -> None:
    parent = rlaif.open_run(go_on(tmp_path, filters={"min_kept_pairs": 1}, keep_checkpoints="all").path)
    child = parent.branch("child", 2, ["replay.share=0.5"])
    assert child.path == tmp_path / "child"
    assert child.iterations == parent.iterations[:2]
    assert child.job.replay.share == 0.5 != parent.job.replay.share
    with pytest.raises(UserError, match="is there already"):
        parent.branch("child", 1)


def test_a_run_under_way_gives_what_is_complete(tmp_path: Path) -> None:
    job = stub_job()
    loop = stub_loop(tmp_path, job)
    loop.run()
    from rlaif.rundir.store import write_json

    write_json(loop.dir.path / "run.json", {"schema_version": 1, "job": job.model_dump(mode="json")})
    (loop.dir.path / "iterations/0001/votes.jsonl").unlink()
    run = rlaif.open_run(loop.dir.path)
    assert {v.ballot.pair_id for v in run.votes()} == {p.id for k in (0, 2, 3) for p in run.pairs(k)}
    assert not list(run.votes(1))


def test_a_job_needs_a_name() -> None:
    with pytest.raises(UserError, match="needs a name"):
        rlaif.run(rlaif.parse_job({"constitution": "assistant"}, "here"))


@pytest.mark.model
def test_a_judge_is_asked_in_one_call(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(checkout)
    judge = rlaif.Judge("assistant@1", filters={"min_agreement": 0.6})
    question, brief = "What is the capital of France?", "Paris is the capital of France."
    long = "Well, that is a good question. France is a country with a long history, and many things can be said. " * 3
    found = judge(question, brief, long)
    turned = judge(question, long, brief)
    assert (found.outcome, turned.outcome) == ("first", "second")
    assert found.p_first == pytest.approx(1 - (turned.p_first or 0), abs=1e-3)
    assert found.decision.winner in ("first", None)
    assert {v.outcome for v in found.votes} <= {"first", "second", "tie"}
    same = judge([{"role": "system", "content": "Be brief."}, {"role": "user", "content": question}], brief, brief)
    assert same.decision.reasons[0] == "identical"


def test_a_judge_of_a_tiny_model_and_a_text_from_a_file(
    tmp_path: Path, checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(checkout)
    model = make_model("llama-tied", tmp_path / "model")
    monkeypatch.setattr(models, "cache_root", lambda: tmp_path / "cache")
    judge = rlaif.Judge(checkout / "constitutions/assistant/v1.yaml", model=str(model), precision="fp32", cache=None)
    found = judge("one two", "three four", "five six seven", finish_reasons=("stop", "length"))
    assert found.outcome in ("first", "second", "tie")
    with pytest.raises(UserError, match=r"rlaif\.Judge: .*unknown key `judge\.tempersture`"):
        rlaif.Judge("assistant@1", tempersture=1)
    with pytest.raises(UserError, match="can't read the constitution"):
        rlaif.load_constitution("nothing.yaml")


def test_the_idea_on_one_page_trains(checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """examples/loop.py from top to bottom, on a tiny model; its DPO loss against the learner's formula."""
    from tests.learning.test_contract import by_hand

    loop = load_example("loop")
    monkeypatch.chdir(checkout)
    monkeypatch.setattr(models, "cache_root", lambda: tmp_path / "cache")
    model = make_model("llama-tied", tmp_path / "model")
    monkeypatch.setattr(loop, "MAX_TOKENS", 8)
    said: list[str] = []
    monkeypatch.setattr("builtins.print", lambda text, **_: said.append(text))
    loop.main(["--model", str(model), "--iterations", "2", "--prompts-per-iteration", "2"])
    assert len(said) == 2
    assert all(
        re.match(r"iteration \d: kept \d of 4 pairs, loss (\d\.\d+|nan); answers have \d+ words", s) for s in said
    )
    assert any("kept 0" not in s for s in said), "nothing was trained"

    import torch
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    policy = AutoModelForCausalLM.from_pretrained(make_model("llama-tied", tmp_path / "other", seed=1)).eval()
    a, b = (loop.Answer("q", [1, 5, 6], ids, "", True) for ids in ([7, 8, 2], [9, 10, 11, 2]))
    pair = make_preferences(1)[0].model_copy(
        update={"prompt_token_ids": (1, 5, 6), "chosen_token_ids": (7, 8, 2), "rejected_token_ids": (9, 10, 11, 2)}
    )
    expected, _ = by_hand(policy, base, [pair])
    before = policy.lm_head.weight.clone()
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-3)
    assert loop.dpo_step(policy, base, optimizer, [loop.Preference(a, b)]) == pytest.approx(expected.item(), abs=1e-5)
    assert not torch.equal(before, policy.lm_head.weight)


def test_the_example_stays_one_page() -> None:
    assert len((ROOT / "examples/loop.py").read_text().splitlines()) < 200


def test_the_cells_on_a_finished_run(
    checkout: Path, stored: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """examples/first_run.py on a stored run, in the place of the quickstart's."""
    monkeypatch.chdir(checkout)
    monkeypatch.setenv("MPLBACKEND", "agg")
    shutil.copytree(stored, checkout / "runs" / "quickstart")
    load_example("first_run")
    said = capsys.readouterr().out
    assert "1: under rules@1, kept " in said
    assert "Counter({'dropped': 12, 'kept': 8})" in said
    assert re.search(r"^pairwise +0\.\d+ +\d+$", said, re.MULTILINE)  # a voice, and how often it agrees
    assert len(re.findall(r"^step \d+ of iteration \d", said, re.MULTILINE)) == 5
    assert re.search(r"^after 4: \d+ words, .*, win rate 0\.\d\d", said, re.MULTILINE)
    assert "\nafter:  " in said
