"""An evaluation of the base policy is made once, by whichever run comes first."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from rlaif.loop import Loop
from rlaif.loop.base_cache import KEPT, BaseCache, follows_from, sources
from rlaif.records import TextScore
from rlaif.rundir.store import RunDir
from tests.conftest import project_job
from tests.stubs import Quiet, stub_job, stub_loop

pytestmark = pytest.mark.slow

STAGES = ("completions", "quality", "probe_completions", "texts")
EVAL = {"every": 2, "prompts": 3, "retention": True}


def a_run(root: Path, name: str, asked: list[str], **about: Any) -> RunDir:
    """A run of stubs that shares `root/cache`; `asked` gets what workers stream until the base policy is evaluated."""
    loop: Loop = stub_loop(root, stub_job(iterations=2, schedule={0: "rules@1"}, eval=EVAL), name=name)
    loop.base_cache = BaseCache(root / "cache", {"seed": 7, **about}, lambda _: asked.append("note"))

    def spied(way: Callable[..., Any]) -> Callable[..., Any]:
        def ask(method: str, **kwargs: Any) -> Any:
            if not (loop.dir.evaluation(0).path / "metrics.json").exists():
                asked.append(method)
            return way(method, **kwargs)

        return ask

    for worker in {loop.sampler, loop.judge}:
        worker.stream = spied(worker.stream)  # type: ignore[method-assign]
    loop.run()
    return loop.dir


def lines(run: RunDir, stage: str, updates: int = 0) -> str:
    return (run.evaluation(updates).path / f"{stage}.jsonl").read_text()


@pytest.fixture
def first(tmp_path: Path) -> RunDir:
    return a_run(tmp_path, "first", [])


def test_a_second_run_takes_what_the_first_one_made(first: RunDir, tmp_path: Path) -> None:
    asked: list[str] = []
    second = a_run(tmp_path, "second", asked)
    assert asked == ["note"], "told once, and nobody was asked"
    for stage in STAGES:
        assert lines(second, stage) == lines(first, stage)
        meta, its = second.evaluation(0).meta(stage), first.evaluation(0).meta(stage)
        assert (tmp_path / "cache" / f"{meta['from_cache']}.jsonl").exists()
        assert meta["sha256"] == its["sha256"]
        assert "from_cache" not in its
    assert second.evaluation(0).meta("completions")["weights_gap"], "both are compared all the same"
    assert lines(second, "probe_results") == lines(first, "probe_results")
    shutil.rmtree(tmp_path / "cache")
    outcome = [(run.evaluation(0).path / "metrics.json").read_text() for run in (first, second)]
    numbers = [{k: v for k, v in json.loads(o).items() if k != "seconds"} for o in outcome]
    assert numbers[0] == numbers[1]


def test_what_was_trained_is_always_evaluated(first: RunDir, tmp_path: Path) -> None:
    second = a_run(tmp_path, "second", [])
    assert "from_cache" not in second.evaluation(2).meta("completions")
    assert len(list((tmp_path / "cache").glob("*.jsonl"))) == len(STAGES)


def test_another_run_s_settings_are_another_entry(first: RunDir, tmp_path: Path) -> None:
    asked: list[str] = []
    other = a_run(tmp_path, "other", asked, sampling="another engine")
    assert "sample" in asked
    assert "note" not in asked
    assert "from_cache" not in other.evaluation(0).meta("completions")


def _torn(text: str) -> str:
    return text[: len(text) // 2]


def _changed(text: str) -> str:
    head, _, rest = text.partition("\n")
    return head + "\n" + rest.replace("answer 0", "answer 1", 1)


def _of_another(text: str) -> str:
    head, _, rest = text.partition("\n")
    told = json.loads(head)
    told["follows_from"]["seed"] = 8
    return json.dumps(told) + "\n" + rest


@pytest.mark.parametrize("harm", [_torn, _changed, _of_another, lambda _: "not ours\n", lambda _: "[]\n", lambda _: ""])
def test_an_entry_that_is_not_whole_or_not_this_is_made_anew(
    harm: Callable[[str], str], first: RunDir, tmp_path: Path
) -> None:
    before = {}
    for entry in (tmp_path / "cache").glob("*.jsonl"):
        before[entry] = entry.read_text()
        if '"stage": "completions"' in before[entry]:
            entry.write_text(harm(before[entry]))
    asked: list[str] = []
    second = a_run(tmp_path, "second", asked)
    assert "sample" in asked
    assert lines(second, "completions") == lines(first, "completions")
    assert "from_cache" not in second.evaluation(0).meta("completions")
    assert {entry: entry.read_text() for entry in before} == before, "mended"


def scores(value: float) -> Callable[[], Iterator[list[TextScore]]]:
    return lambda: iter([[TextScore(text_id="a", tokens=3, logprob=value)]])


def test_what_rows_follow_from_is_their_name(tmp_path: Path) -> None:
    def given(value: float, stage: str = "texts", about: Any = 1, base: Any = 1) -> float:
        cache = BaseCache(tmp_path, {"base": base}, lambda _: None)
        [[row]] = cache.rows(stage, TextScore, {"about": about}, scores(value))
        return row.logprob

    assert given(-1.0) == -1.0
    assert given(-2.0) == -1.0
    assert [given(-3.0, about=2), given(-4.0, base=2), given(-5.0, stage="others")] == [-3.0, -4.0, -5.0]


def test_what_is_read_of_the_policy_s_folder_counts(tmp_path: Path) -> None:
    """The same weights end elsewhere, or know another window; what nobody reads is nothing to them."""
    (tmp_path / "model.safetensors").write_bytes(b"weights")

    def found(name: str, content: str) -> dict[str, Any]:
        (tmp_path / name).write_text(content)
        return follows_from(stub_job(), tmp_path, {"policy": "w"}, {"rlaif": "1", "revision": content})

    before = found("config.json", "{}")
    assert found("README.md", "a card") == before, "nor is a revision anything"
    seen = [before]
    for name, content in (("config.json", '{"rope_theta": 1}'), ("generation_config.json", '{"eos_token_id": 2}')):
        seen.append(found(name, content))
        assert seen[-1] not in seen[:-1], name


def test_code_counts_as_it_is_committed_or_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "rlaif" / "__pycache__").mkdir(parents=True)
    monkeypatch.setattr("rlaif.__file__", str(tmp_path / "rlaif" / "__init__.py"))
    code = tmp_path / "rlaif" / "code.py"
    code.write_text("one")
    before = sources()
    (tmp_path / "rlaif" / "__pycache__" / "code.pyc").write_text("compiled")
    assert sources() == before
    code.write_text("two")
    assert sources() != before


def test_rows_that_were_not_all_made_are_not_kept(tmp_path: Path) -> None:
    def fails() -> Iterator[list[TextScore]]:
        yield from scores(-1.0)()
        raise RuntimeError("killed")

    cache = BaseCache(tmp_path, {}, lambda _: None)
    with pytest.raises(RuntimeError):
        list(cache.rows("texts", TextScore, {}, fails))
    assert not list(tmp_path.iterdir())


def test_a_folder_that_takes_no_entry_costs_no_run(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    cache = BaseCache(tmp_path / "file", {}, lambda _: None)
    assert len(list(cache.rows("texts", TextScore, {}, scores(-1.0)))) == 1
    assert cache.noted("texts") == {}


def test_the_oldest_entries_go(tmp_path: Path) -> None:
    for n in range(KEPT + 3):
        list(BaseCache(tmp_path, {"n": n}, lambda _: None).rows("texts", TextScore, {}, scores(-1.0)))
    assert len(list(tmp_path.glob("*.jsonl"))) == KEPT


def test_a_job_s_own_runs_share_it(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another rate is no other base policy; another seed or temperature is; and the job may not want it."""
    pytest.importorskip("trl")
    from rlaif.loop.launch import execute

    monkeypatch.setenv("RLAIF_CACHE", str(tmp_path / "cache"))

    def taken(name: str, **changes: Any) -> bool:
        tree: dict[str, Any] = {
            "iterations": 1,
            "schedule": {0: "rules@1"},
            "eval": {"every": 1, "prompts": 2, "kl_prompts": 0, "cache": True},
        }
        for key, value in changes.items():
            tree[key] = {**tree.get(key, {}), **value} if isinstance(value, dict) else value
        job = project_job(tmp_path, tiny_model, **tree)
        run = execute(job, tmp_path / "runs" / name, tmp_path, Quiet())
        return "from_cache" in run.evaluation(0).meta("completions")

    assert not taken("off", eval={"cache": False})
    assert not (tmp_path / "cache" / "evaluations").exists()
    assert not taken("first")
    assert taken("rate", learner={"learning_rate": 2e-3})
    assert not taken("seed", seed=1)
    assert not taken("temperature", eval={"temperature": 0.3})
