"""The whole hand-over, learner to sampler, on every architecture of the table: train, export, load, compare."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rlaif.config import Job, parse_job
from rlaif.errors import RlaifError, UserError
from rlaif.loop.deep_check import CheckedLoad, check_hand_over, compare
from rlaif.loop.gaps import decoding_gap, to_score_again, weights_gap
from rlaif.records import Completion
from rlaif.workers.process import ProcessWorker
from tests.architectures import ARCHITECTURES, MIXTURES, each, make_model
from tests.conftest import answered, project_job
from tests.hand_over_makers import answers_of, sampler

pytestmark = pytest.mark.slow


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


@pytest.mark.parametrize("name", each(ARCHITECTURES))
def test_transformers(name: str, tmp_path: Path) -> None:
    check(rows_of(make_model(name, tmp_path / "model"), "transformers"))


@pytest.mark.parametrize("name", each([*MIXTURES, "llama-tied", "gpt2"]))
def test_transformers_with_adapters(name: str, tmp_path: Path) -> None:
    check(rows_of(make_model(name, tmp_path / "model"), "transformers", lora=True))


def test_a_bf16_sampler_gets_close(tmp_path: Path) -> None:
    check(rows_of(make_model("llama-tied", tmp_path / "model"), "transformers", precision="bf16"), limit=0.1)


def test_a_job_is_checked_as_it_would_be_run(tmp_path: Path) -> None:
    """A template that takes nothing without its argument, and a system message: `--job` gives it both."""
    model = make_model("llama-tied", tmp_path / "model")
    (model / "chat_template.jinja").write_text(
        "{% if mode is not defined or messages[0]['role'] != 'system' %}{{ raise_exception('bare') }}{% endif %}"
        "{% for m in messages %}<s>{{ mode }}{{ m['content'] }}</s>{% endfor %}<s>"
    )
    sampling = {"engine": "transformers", "precision": "fp32", "max_tokens": 8, "max_model_len": 256}
    tree: dict[str, Any] = {"constitution": "none", "sampling": sampling, "learner": {"precision": "fp32"}}
    with pytest.raises(RlaifError, match="bare"):
        list(check_hand_over(model, parse_job(tree, "test"), mode="inline"))
    tree["policy"] = {"model": str(model), "system_prompt": "Be kind.", "chat_template_args": {"mode": "x"}}
    check(list(check_hand_over(model, parse_job(tree, "test"), mode="inline")))


def test_the_command_takes_a_job_or_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from typer.testing import CliRunner

    from rlaif.cli import app

    model = make_model("llama-tied", tmp_path / "model")
    job = project_job(tmp_path, model, policy={"model": str(model), "system_prompt": "w1"}, sampling={"top_p": 0.5})
    asked = []

    def checked(folder: Path, job: Job, **_: Any) -> Iterator[CheckedLoad]:
        asked.append((folder, job))
        gap = weights_gap([(0.0,)], [(0.0,)], "x", "fp32")
        yield CheckedLoad(weights="as given", gap=gap, moved=0, holds=True)

    monkeypatch.setattr("rlaif.loop.deep_check.check_hand_over", checked)
    command = ["doctor", "--job", str(tmp_path / "tiny.yaml")]
    assert CliRunner().invoke(app, command).exit_code == 0
    assert CliRunner().invoke(app, [*command, "--set", "policy.system_prompt=w2"]).exit_code == 0
    assert asked[0] == (model, job)
    assert asked[1][1].policy.system_prompt == "w2"
    assert (
        CliRunner().invoke(app, ["doctor", "--deep", str(model), "--set", "sampling.max_model_len=99"]).exit_code == 0
    )
    assert asked[2][1].sampling.max_model_len == 99
    for wrong in ([*command, "--deep", str(model)], ["doctor", "--set", "seed=1"]):
        said = CliRunner().invoke(app, wrong)
        assert isinstance(said.exception, UserError)
        assert "--deep MODEL or --job JOB" in str(said.exception)
    assert len(asked) == 3


@pytest.fixture(scope="module")
def maker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ProcessWorker]:
    log = tmp_path_factory.mktemp("logs") / "maker.log"
    with ProcessWorker("maker", "tests.hand_over_makers:Maker", {}, log) as made:
        yield made


TONIGHT = {*ARCHITECTURES, *(f"{name} with adapters" for name in MIXTURES)} - {
    "llama-tied", "gpt2", "gemma3", "mixtral", "mixtral with adapters",
}  # fmt: skip
"""`make test` loads one model for each way in which vLLM takes weights: fused, transposed, with shifted norms, with
experts. vLLM looks at each architecture in a process of its own, which takes ten seconds the first time. That an export
is whole, `test_transformers` shows for every architecture."""


@pytest.mark.vllm
@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.nightly if name in TONIGHT else ())
        for name in [*ARCHITECTURES, *(f"{name} with adapters" for name in MIXTURES)]
    ],
)
def test_vllm(name: str, maker: ProcessWorker, tmp_path: Path) -> None:
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


SETTINGS = (
    {"max_tokens": 80, "temperature": 0.7, "top_p": 0.8},  # longer than gemma3's window of 32
    {"max_tokens": 40, "temperature": 0.05},
    {"max_tokens": 80, "temperature": 1.3, "top_p": 0.5, "stop": ["a", "e", 40]},
)


@pytest.mark.parametrize("name", each(ARCHITECTURES))
def test_answers_are_scored_as_they_were_decoded(name: str, maker: ProcessWorker, tmp_path: Path) -> None:
    """Whatever temperature and top-p: the raw log p is recorded."""
    gap = maker.call("decoded", name=name, folder=str(tmp_path), **SETTINGS[0])
    assert gap.answers == 8
    assert gap.tokens > 100
    assert gap.typical < 1e-4, gap


@pytest.mark.vllm
@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
@pytest.mark.parametrize("number", [1, 2])
def test_so_are_cold_and_stopped_ones(number: int, maker: ProcessWorker, tmp_path: Path) -> None:
    assert maker.call("decoded", name="llama-tied", folder=str(tmp_path), **SETTINGS[number]).typical < 1e-4


@pytest.mark.vllm
@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
@pytest.mark.parametrize("number", range(3))
def test_vllm_records_the_raw_log_p(number: int, maker: ProcessWorker, tmp_path: Path) -> None:
    model = maker.call("model", name="gemma3", folder=str(tmp_path))
    with sampler("vllm", Path(model), **SETTINGS[number]) as engine:
        answers = answers_of(engine)
    assert maker.call("gap", model=model, answers=answers).typical < 1e-3


def answer(name: str, tokens: int, logprob: float | None) -> Completion:
    return answered(name, (3,) * tokens, logprob)


def test_the_decoding_gap_by_hand() -> None:
    gap = decoding_gap([answer("a", 2, -1.0), answer("b", 3, -4.0)], [(-1.0, -1.0), (-1.0, -1.0, -1.0)])
    assert (gap.answers, gap.tokens) == (2, 5)  # off by 1 and by -1
    assert (gap.mean, gap.typical, gap.worst) == pytest.approx((0, 2 / 5, 1 / 2))
    assert gap.error == pytest.approx(2 / 5)  # sqrt(2 / 1 * (1 + 1)) / 5
    assert not gap.within(0.02), "errors that cancel are errors"
    assert gap.within(0.04)
    [one] = [decoding_gap([answer("a", 4, -1.0)], [(-0.5,) * 4])]
    assert (one.mean, one.error, one.typical, one.worst) == pytest.approx((0.25, 0, 0.25, 0.25))
    assert not one.within(0.2)
    for broken in (math.nan, -math.inf):
        assert decoding_gap([answer("a", 1, broken)], [(-1.0,)]).typical == math.inf
    for some, scored in (([], []), ([answer("a", 1, None)], [(-1.0,)]), ([answer("a", 1, -1.0)], [(-1.0, -1.0)])):
        with pytest.raises(ValueError):
            decoding_gap(some, scored)


def test_few_short_answers_in_bf16_raise_no_alarm() -> None:
    """One token each, 0.1 nats off by chance: their mean is over the limit more often than not."""
    off = (0.1, -0.05, 0.15, 0.02, -0.1, 0.12, 0.05, 0.0)
    gap = decoding_gap([answer(str(i), 1, -1.0 + d) for i, d in enumerate(off)], [(-1.0,)] * 8)
    assert gap.mean > 0.02
    assert gap.within(0.02)
    shifted = decoding_gap([answer(str(i), 1, -0.9 + d) for i, d in enumerate(off)], [(-1.0,)] * 8)
    assert not shifted.within(0.02)


def test_what_is_scored_again() -> None:
    every = [answer(f"{i:02d}", 1 + i % 7, -1.0) for i in range(40)] + [answer("none", 99, None), answer("empty", 0, 0)]
    some = to_score_again(every, seed=3)
    assert len({c.id for c in some}) == 8
    assert [len(c.token_ids) for c in some[:4]] == [7, 7, 7, 7]
    assert {len(c.token_ids) for c in some[4:]} != {7}
    assert to_score_again(every[::-1], seed=3) == some, "whatever the order in which they finished"
    assert to_score_again(every, seed=4) != some
    assert len(to_score_again(every[:3], seed=3)) == 3
    assert to_score_again(every[40:], seed=3) == []
