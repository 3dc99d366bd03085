"""The real engine, in a worker, on a tiny random model: one engine for most tests here, one process for all."""

from __future__ import annotations

import importlib.util
import shutil
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
import pytest
import safetensors.torch as safetensors

from rlaif import config
from rlaif.errors import RlaifError, UserError
from rlaif.hardware import torch_dtype
from rlaif.models import load_tokenizer
from rlaif.records import TokenSequence
from rlaif.sampling import Sample, SampleRequest
from rlaif.sampling.endings import Endings
from rlaif.sampling.requests import seed_for
from rlaif.workers.process import ProcessWorker
from tests.sampling.conftest import END

pytestmark = [
    pytest.mark.slow,
    pytest.mark.vllm,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
]


def make_requests(count: int = 40, temperature: float = 1.0, top_p: float = 1.0) -> list[SampleRequest]:
    return [
        SampleRequest(
            id=f"r{i}",
            prompt_token_ids=tuple(range(3, 5 + i % 5)),
            seed=seed_for(0, 0, f"p{i}", 0),
            max_tokens=24,
            temperature=temperature,
            top_p=top_p,
        )
        for i in range(count)
    ]


def run(worker: ProcessWorker, requests: list[SampleRequest]) -> dict[str, Sample]:
    return {s.id: s for batch in worker.stream("sample", requests=requests) for s in batch}


@pytest.fixture(scope="module")
def worker(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ProcessWorker]:
    log = tmp_path_factory.mktemp("logs") / "sampler.log"
    with ProcessWorker("sampler", "tests.sampling.engines:Engines", {}, log) as w:
        start(w, tiny)
        yield w


@pytest.fixture
def bare(worker: ProcessWorker, tiny: Path) -> Iterator[ProcessWorker]:
    """The same process, for an engine of one's own; the others' is started again afterwards."""
    yield worker
    start(worker, tiny)


def start(worker: ProcessWorker, model: Path, **changes: Any) -> None:
    settings = config.Sampling(**{"max_tokens": 24, "max_model_len": 64, "kv_cache_gib": 0.05} | changes)
    worker.call("start", model_path=str(model), settings=settings)


@pytest.mark.slow
def test_answers_are_complete_and_repeat(worker: ProcessWorker) -> None:
    first = run(worker, make_requests())
    assert sorted(first) == sorted(r.id for r in make_requests())
    assert run(worker, make_requests()) == first
    assert {s.finish_reason for s in first.values()} == {"stop", "length"}
    for s in first.values():
        assert (s.token_ids[-1] == END) == (s.finish_reason == "stop")
        assert END not in s.token_ids[:-1]
        assert len(s.token_ids) == 24 or s.finish_reason == "stop"
        assert "w2 " not in f"{s.text} "
    reseeded = [r.model_copy(update={"seed": r.seed ^ 1}) for r in make_requests()]
    assert run(worker, reseeded) != first


def test_logprobs_and_nucleus_are_the_models_own(worker: ProcessWorker, tiny: Path) -> None:
    """Against a plain forward pass: raw log-probabilities, and no token from outside the tempered nucleus."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny, dtype=torch_dtype("auto"))
    requests = {r.id: r for r in make_requests(temperature=0.8, top_p=0.6)}
    for s in run(worker, list(requests.values())).values():
        prompt = requests[s.id].prompt_token_ids
        with torch.no_grad():
            logits = model(torch.tensor([prompt + s.token_ids])).logits[0, len(prompt) - 1 : -1].float()
        chosen = logits.log_softmax(dim=-1)[range(len(s.token_ids)), list(s.token_ids)]
        assert s.logprob == pytest.approx(float(chosen.sum()), abs=0.1 + 0.02 * len(s.token_ids))  # for bf16
        p = (logits / 0.8).softmax(dim=-1)
        for row, token in zip(p, s.token_ids, strict=True):
            assert float(row[row > row[token]].sum()) < 0.6 + 0.03  # what is likelier doesn't fill the nucleus


def test_greedy_ignores_seeds(worker: ProcessWorker) -> None:
    greedy = make_requests(temperature=0.0)
    reseeded = [r.model_copy(update={"seed": r.seed ^ 1}) for r in greedy]
    assert run(worker, greedy) == run(worker, reseeded)


def test_new_weights_by_path_and_back(worker: ProcessWorker, tiny: Path, other_tiny: Path) -> None:
    before = run(worker, make_requests())
    worker.call("load", policy_path=str(other_tiny))
    changed = run(worker, make_requests())
    worker.call("load", policy_path=str(tiny))
    assert changed != before
    assert run(worker, make_requests()) == before


def test_after_a_rest_it_samples_from_the_weights_that_it_held(
    worker: ProcessWorker, tiny: Path, other_tiny: Path
) -> None:
    """On a CPU vLLM pauses and goes on; that memory comes and goes can be seen on a GPU alone."""
    worker.call("load", policy_path=str(other_tiny))
    before = run(worker, make_requests())
    for method in ("rest", "rest", "wake", "wake"):
        worker.call(method)
    assert run(worker, make_requests()) == before
    for method in ("rest", "wake"):
        worker.call(method)
    worker.call("load", policy_path=str(tiny))
    assert run(worker, make_requests()) != before


def test_a_batch_given_up_leaves_nothing_behind(worker: ProcessWorker) -> None:
    whole = run(worker, make_requests())
    stream = worker.stream("sample", requests=make_requests())
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    assert run(worker, make_requests()) == whole


def test_a_prompt_that_leaves_no_room_is_a_user_error(worker: ProcessWorker) -> None:
    long = make_requests(1)[0].model_copy(update={"prompt_token_ids": (3,) * 60})
    with pytest.raises(UserError, match="max_model_len is 64"):
        run(worker, [long])


def test_nothing_of_vllms_output_is_seen(worker: ProcessWorker, capfd: pytest.CaptureFixture[str]) -> None:
    run(worker, make_requests(2))
    assert capfd.readouterr() == ("", "")


@pytest.mark.slow
def test_stops_are_those_of_the_other_engine(bare: ProcessWorker, tiny: Path, tmp_path: Path) -> None:
    """Strings of one and of two tokens, a token id, the tokenizer's end token that the model's own list lacks."""
    from rlaif.sampling.transformers import Sampler

    folder = tmp_path / "model"
    shutil.copytree(tiny, folder)
    (folder / "generation_config.json").write_text('{"eos_token_id": 60}')
    requests = make_requests(60, temperature=1.0) + [
        r.model_copy(update={"id": f"greedy{r.id}", "temperature": 0.0, "prompt_token_ids": (3 + i, 4)})
        for i, r in enumerate(make_requests(40))
    ]
    plain = Sampler(str(folder), config.Sampling(engine="transformers", max_tokens=24, max_model_len=64))
    usual = run_inline(plain, requests)
    # What this model says: the pairs of words and the words that it says most.
    pairs = Counter(f"w{a} w{b}" for s in usual.values() for a, b in pairwise(s.token_ids))
    words = Counter(t for s in usual.values() for t in s.token_ids)
    stop = [*(p for p, _ in pairs.most_common(4)), f"w{words.most_common(9)[8][0]}", words.most_common(12)[11][0]]
    settings = config.Sampling(max_tokens=24, max_model_len=64, kv_cache_gib=0.05, precision="fp32", stop=stop)
    other = Sampler(str(folder), settings)
    wanted = run_inline(other, requests)
    bare.call("start", model_path=str(folder), settings=settings)
    found = run(bare, requests)
    endings = Endings(str(folder), load_tokenizer(folder), settings)
    assert endings.token_ids == {END, 60, stop[-1]}
    by_string = 0
    for s in (*found.values(), *wanted.values()):
        assert (s.finish_reason == "stop") == endings.ended(s.token_ids)
        assert not any(endings.ended(s.token_ids[:n]) for n in range(1, len(s.token_ids)))
        assert s.finish_reason == "stop" or len(s.token_ids) == 24
        assert not any(isinstance(x, str) and x in s.text for x in stop)
        assert s == endings.sample(s.id, s.token_ids, s.logprob)
        by_string += s.finish_reason == "stop" and s.token_ids[-1] not in endings.token_ids
    assert by_string > 20
    greedy = [r.id for r in requests if r.temperature == 0]
    for name in greedy:
        assert found[name].model_copy(update={"logprob": 0.0}) == wanted[name].model_copy(update={"logprob": 0.0})
        assert found[name].logprob == pytest.approx(wanted[name].logprob, abs=1e-3)
    assert {found[name].finish_reason for name in greedy} == {"stop", "length"}


def run_inline(sampler: Any, requests: list[SampleRequest]) -> dict[str, Sample]:
    return {s.id: s for batch in sampler.sample(requests) for s in batch}


@pytest.mark.slow
def test_prompts_that_fill_more_than_one_step(bare: ProcessWorker, tiny: Path) -> None:
    """More tokens than vLLM reads in a step: a request that is cut in two can't rewind its seed on the CPU."""
    start(bare, tiny, max_tokens=4, max_model_len=256, kv_cache_gib=0.2)
    requests = [
        SampleRequest(
            id=f"r{i}",
            prompt_token_ids=(3 + i % 50, 4 + i // 50, *(3 + (i * 7 + j) % 55 for j in range(199))),
            seed=i,
            max_tokens=4,
            temperature=1.0,
            top_p=1.0,
        )
        for i in range(96)
    ]
    assert len(run(bare, requests)) == 96


@pytest.mark.nightly  # where vLLM's AVX-512 build is loaded, the two wait for each other in a loop, on all cores
def test_two_processes_that_hold_a_model_together(tiny: Path, other_tiny: Path, tmp_path: Path) -> None:
    """`tensor_parallel_size` on GPUs is this, with other kernels: new weights reach both processes, a folder that lacks
    some is refused in one line, and none is left when the worker is gone. Against a plain forward pass."""
    sequences = [TokenSequence(prompt_token_ids=r.prompt_token_ids, token_ids=(7, 8, 9)) for r in make_requests(6)]
    lacking = tmp_path / "lacking"
    shutil.copytree(other_tiny, lacking)
    weights = safetensors.load_file(lacking / "model.safetensors")
    safetensors.save_file({k: v for k, v in weights.items() if "layers.1.mlp" not in k}, lacking / "model.safetensors")
    settings = config.Sampling(
        max_tokens=24, max_model_len=64, kv_cache_gib=0.05, precision="fp32", tensor_parallel_size=2
    )
    kwargs = {"model_path": str(tiny), "settings": settings}
    with ProcessWorker("sampler", "rlaif.sampling.vllm:Sampler", kwargs, tmp_path / "sampler.log") as both:
        assert both.call("logprobs", sequences=sequences) == [near(own) for own in scored(tiny, sequences)]
        both.call("load", policy_path=str(other_tiny))
        assert both.call("logprobs", sequences=sequences) == [near(own) for own in scored(other_tiny, sequences)]
        assert len(run(both, make_requests())) == 40
        processes = psutil.Process(both.pid).children(recursive=True)
        assert len(processes) >= 2
        with pytest.raises(RlaifError, match="lacking: not all weights reached the sampler"):
            both.call("load", policy_path=str(lacking))
    _, alive = psutil.wait_procs(processes, timeout=30)
    assert alive == []


def near(logprobs: tuple[float, ...]) -> Any:
    return pytest.approx(logprobs, abs=1e-4)


def scored(model: Path, sequences: list[TokenSequence]) -> list[tuple[float, ...]]:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    plain = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    out = []
    for s in sequences:
        with torch.no_grad():
            logprobs = plain(torch.tensor([s.all_ids])).logits[0].log_softmax(dim=-1)
        start = len(s.prompt_token_ids)
        out.append(tuple(float(logprobs[start - 1 + i, token]) for i, token in enumerate(s.token_ids)))
    return out
