"""vLLM's servers as a sampler, on the tiny model: the engine inside says the same, and a run survives a kill."""

from __future__ import annotations

import importlib.util
import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from rlaif import config
from rlaif.records import Completion, IterationMetrics, TokenSequence
from rlaif.rundir.store import RunDir, read_record
from rlaif.workers.process import ProcessWorker
from tests.conftest import killed_at, make_project, until
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


def servers_of(model: Path) -> list[int]:
    """Processes that serve a model."""
    found = [p.info for p in psutil.process_iter(["pid", "cmdline"])]
    return [p["pid"] for p in found if {"vllm.entrypoints.openai.api_server", str(model)} <= {*(p["cmdline"] or ())}]


def test_a_run_on_two_servers_is_killed_while_it_samples_and_goes_on(tiny: Path, tmp_path: Path) -> None:
    """As `rlaif run` does it: it starts the servers, samples, hands an update's weights to them and samples from those,
    and after the kill it starts others."""
    pytest.importorskip("trl")
    sampling = {**SETTINGS, "engine": "server", "replicas": 2}
    make_project(tmp_path, tiny, iterations=2, schedule={0: "rules@1"}, sampling=sampling, workers="process")
    # With iteration 1's first durable answers; the others are under way.
    program = killed_at("iterations/0001/completions.jsonl.partial")
    died = subprocess.run(
        [sys.executable, "-c", program, "run", "tiny.yaml"], cwd=tmp_path, capture_output=True, text=True
    )
    assert died.returncode == -signal.SIGKILL, died.stderr
    here = RunDir(tmp_path / "runs" / "tiny")
    partial = here.iteration(1).path / "completions.jsonl.partial"
    assert 0 < len(partial.read_text().splitlines()) < 24, "not in the middle of sampling"
    until(lambda: not servers_of(tiny), 120)  # gone with the run
    before = here.iteration(0).read("completions", Completion)
    done = subprocess.run(
        [sys.executable, "-m", "rlaif", "run", "tiny.yaml"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert servers_of(tiny) == []
    assert here.iteration(0).read("completions", Completion) == before
    plans = [here.plan(k) for k in range(2)]
    assert plans[0].policy.digest != plans[1].policy.digest
    for k, plan in enumerate(plans):
        completions = here.iteration(k).read("completions", Completion)
        assert {c.id for c in completions} == {f"{k:04d}-{p}-{i}" for p in plan.prompt_ids for i in range(4)}
        assert len(completions) == 24
        assert {c.policy for c in completions} == {plan.policy}
        metrics = read_record(here.iteration(k).path / "metrics.json", IterationMetrics)
        assert metrics.weights_gap is not None
        assert metrics.decoding_gap is not None
        assert metrics.decoding_gap.typical < 1e-4
        assert metrics.weights_gap.sampler == "server fp32"
        assert metrics.weights_gap.worst < 1e-4
    assert [json.loads(line)["kind"] for line in (here.path / "events.jsonl").open()].count("resumed") == 1
