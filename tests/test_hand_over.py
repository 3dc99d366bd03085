"""The whole hand-over, learner to sampler, on every architecture of the table: train, export, load, compare."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rlaif.config import parse_job
from rlaif.hand_over import check_hand_over, compare
from rlaif.weights import weights_gap
from rlaif.workers import Worker
from tests.architectures import ARCHITECTURES, MIXTURES, make_model
from tests.hand_over_makers import sampler


def rows_of(model: Path, engine: str, lora: bool = False, mode: Any = "inline", precision: str = "fp32") -> list[Any]:
    learner: dict[str, Any] = {"precision": "fp32"}
    if lora:
        learner["lora"] = {"r": 4, "alpha": 8}
    sampling = {"engine": engine, "precision": precision, "max_tokens": 8, "max_model_len": 256, "kv_cache_gib": 0.05}
    job = parse_job({"constitution": "none", "sampling": sampling, "learner": learner}, "test")
    return list(check_hand_over(model, job, mode=mode))


def check(rows: list[Any], limit: float = 1e-3) -> None:
    assert [row.weights for row in rows] == ["as given", "after an update", "as given again"]
    for row in rows:
        assert row.gap.typical < limit, f"{row.weights}: {row.gap}"
        assert row.holds
    assert rows[1].moved > 0.05, "so small a move would hide a load that does nothing"


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_transformers(name: str, tmp_path: Path) -> None:
    check(rows_of(make_model(name, tmp_path / "model"), "transformers"))


@pytest.mark.parametrize("name", [*MIXTURES, "llama-tied", "gpt2"])
def test_transformers_with_adapters(name: str, tmp_path: Path) -> None:
    check(rows_of(make_model(name, tmp_path / "model"), "transformers", lora=True))


def test_a_bf16_sampler_gets_close(tmp_path: Path) -> None:
    check(rows_of(make_model("llama-tied", tmp_path / "model"), "transformers", precision="bf16"), limit=0.1)


@pytest.fixture(scope="module")
def maker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    log = tmp_path_factory.mktemp("logs") / "maker.log"
    with Worker("maker", "tests.hand_over_makers:Maker", {}, log) as made:
        yield made


@pytest.mark.slow
@pytest.mark.vllm
@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
@pytest.mark.parametrize("name", [*ARCHITECTURES, *(f"{name} with adapters" for name in MIXTURES)])
def test_vllm(name: str, maker: Worker, tmp_path: Path) -> None:
    """Engines in one process: each starts in a second once vLLM is imported."""
    architecture, _, lora = name.partition(" ")
    trained = maker.call("make", name=architecture, folder=str(tmp_path), lora=bool(lora))
    model = tmp_path / "model"
    with sampler("vllm", model) as engine:
        check(list(compare(engine, model, trained, limit=0.02)))


def test_a_gap_is_the_mean_over_tokens_and_the_worst_of_them() -> None:
    gap = weights_gap([(-1.0, -2.0), (-3.0,)], [(-1.0, -2.5), (-3.25,)], "vllm fp32", "fp32")
    assert (gap.tokens, gap.mean, gap.worst) == (3, pytest.approx(0.25), pytest.approx(0.5))
    cancels = weights_gap([(-1.0, -2.0)], [(-1.5, -1.5)], "x", "y")
    assert (cancels.mean, cancels.typical) == (0, pytest.approx(0.5))
    assert not cancels.within(0.02)
    assert weights_gap([(math.nan, -1.0)], [(-1.0, -1.0)], "x", "y").mean == math.inf
    with pytest.raises(ValueError):
        weights_gap([(-1.0,)], [(-1.0, -2.0)], "x", "y")
    with pytest.raises(ValueError):
        weights_gap([], [], "x", "y")
