"""vLLM's servers as a sampler, on the tiny model: the engine inside says the same."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest

from rlaif import config
from rlaif.records import TokenSequence
from rlaif.workers.process import ProcessWorker
from tests.sampling.test_vllm import make_requests, run

pytestmark = [
    pytest.mark.nightly,
    pytest.mark.vllm,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
    pytest.mark.timeout(1800),
]

SETTINGS = {"max_tokens": 24, "max_model_len": 64, "kv_cache_gib": 0.05, "precision": "fp32"}


@pytest.fixture(scope="module")
def inside(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ProcessWorker]:
    kwargs = {"model_path": str(tiny), "settings": config.Sampling.model_validate(SETTINGS)}
    log = tmp_path_factory.mktemp("inside") / "sampler.log"
    with ProcessWorker("sampler", "rlaif.sampling.vllm:Sampler", kwargs, log) as worker:
        worker.ready()
        yield worker


@pytest.fixture(scope="module")
def servers(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ProcessWorker]:
    logs = tmp_path_factory.mktemp("servers")
    settings = config.Sampling.model_validate(SETTINGS | {"engine": "server", "replicas": 1})
    kwargs = {"model_path": str(tiny), "settings": settings, "logs": logs}
    with ProcessWorker("sampler", "rlaif.sampling.server:Sampler", kwargs, logs / "sampler.log") as worker:
        worker.ready()
        yield worker


def test_samples_and_logprobs_are_those_of_the_engine_inside(
    inside: ProcessWorker, servers: ProcessWorker, tiny: Path, other_tiny: Path
) -> None:
    texts = [TokenSequence(prompt_token_ids=(3, 4 + i), token_ids=tuple(range(5, 20))) for i in range(8)]
    for policy in (None, other_tiny, tiny):
        if policy:
            for worker in (inside, servers):
                worker.call("load", policy_path=str(policy))
        for top_p in (1.0, 0.6):
            found, wanted = (run(w, make_requests(temperature=0.8, top_p=top_p)) for w in (servers, inside))
            assert found.keys() == wanted.keys()
            same = [name for name in wanted if found[name].token_ids == wanted[name].token_ids]
            # In another batch a logit has another last bit, and a draw near a boundary falls to its other side.
            assert len(same) >= 0.9 * len(wanted), f"{len(same)} of {len(wanted)} under {policy}"
            for name in same:
                assert found[name].logprob == pytest.approx(wanted[name].logprob, abs=1e-3)
        read = zip(servers.call("logprobs", sequences=texts), inside.call("logprobs", sequences=texts), strict=True)
        for found_one, wanted_one in read:
            assert found_one == pytest.approx(wanted_one, abs=1e-3)
