"""The chat judge against a real server: vLLM's own OpenAI-compatible one on loopback, real HTTP, log-probabilities."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from rlaif.config import parse_job
from rlaif.constitutions.constitution import load_constitution
from rlaif.data.labelled import read_labelled
from rlaif.judging.opened import open_with_ballots
from rlaif.judging.verdicts import aggregate, by_pair
from rlaif.trust.bench import cast_votes

ROOT = Path(__file__).resolve().parents[2]
START_S = 400

pytestmark = [pytest.mark.slow, pytest.mark.vllm, pytest.mark.model, pytest.mark.timeout(1200)]


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    pytest.importorskip("vllm")
    from rlaif import models
    from rlaif.hardware import torch_dtype
    from rlaif.sampling.vllm import ENVIRONMENT

    port, log = free_port(), tmp_path_factory.mktemp("server") / "server.log"
    model = models.resolve("embedded:smollm2-135m-instruct", progress=lambda message, share: None)
    environment = os.environ | ENVIRONMENT | {"VLLM_CPU_KVCACHE_SPACE": "1"}
    environment.pop("VLLM_ENABLE_V1_MULTIPROCESSING")
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--host", "127.0.0.1",
               "--port", str(port), "--served-model-name", "smollm2", "--max-model-len", "2048",
               "--enforce-eager", "--dtype", str(torch_dtype("auto")).removeprefix("torch.")]  # fmt: skip
    with log.open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=environment)
    try:
        deadline = time.monotonic() + START_S
        while True:
            if process.poll() is not None or time.monotonic() > deadline:
                pytest.fail(f"the server did not start: {log.read_text()[-2000:]}")
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2):
                    break
            except (urllib.error.URLError, OSError):
                time.sleep(1)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        process.wait(60)


def test_votes_of_a_real_server(server: str, tmp_path: Path) -> None:
    job = parse_job(
        {
            "constitution": "assistant@1",
            "judge": {"kind": "chat", "model": "smollm2", "base_url": server, "api_key_env": None,
                      "templates": ["pairwise", "pairwise_json"], "cache": str(tmp_path / "cache")},
        },
        "test",
    )  # fmt: skip
    rows = [r for r in read_labelled([ROOT / "prompts/judge_bench.jsonl"]).rows if r.constitution == "assistant@1"][:6]
    constitution = load_constitution(ROOT / "constitutions", "assistant@1")
    ask = open_with_ballots(job, [constitution], ROOT, lambda message: None).ask
    votes = cast_votes(rows, ask, lambda reference: constitution)

    assert len(votes) == len(rows) * 2 * 2  # both orders of two templates
    assert {v.model for v in votes} == {"smollm2"}
    assert all(v.usage.prompt_tokens > 100 for v in votes)
    assert all(v.abstain_reason != "infra_error" for v in votes), [v.error for v in votes]
    assert all((v.outcome == "abstain") == (v.abstain_reason is not None) for v in votes)
    # Structured output holds even a model of this size to the schema, unless its reasons have no end.
    schema = [v for v in votes if v.ballot.voice == "pairwise_json"]
    assert all(v.abstain_reason in (None, "truncated") for v in schema)
    told = [v for v in votes if v.p_first is not None]
    assert told, "no vote came with log-probabilities of its label"
    assert all(0 <= v.p_first <= 1 and 0 <= (v.mass_neither or 0) <= 1 for v in told if v.p_first is not None)
    assert len({aggregate(mine).pair_id for mine in by_pair(votes).values()}) == len(rows)

    again = cast_votes(
        rows, open_with_ballots(job, [constitution], ROOT, lambda message: None).ask, lambda reference: constitution
    )
    # A reply that was cut off isn't stored, and one is asked for again where the server gives a fingerprint.
    unfinished = sum(v.abstain_reason in ("truncated", "empty") for v in votes)
    assert sum(not v.cached for v in again) <= unfinished + any(v.fingerprint for v in votes)
    first = {v.ballot.id: v.outcome for v in votes}
    assert all(v.outcome == first[v.ballot.id] for v in again if v.cached)
