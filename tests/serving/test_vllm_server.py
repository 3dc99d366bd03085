"""vLLM's own server, twice, with the embedded model on the CPU (or a GPU), started for a judge and gone with it."""

from __future__ import annotations

import os
from pathlib import Path

import psutil
import pytest

from rlaif.config import parse_job
from rlaif.constitutions.constitution import load_constitution
from rlaif.data.labelled import read_labelled
from rlaif.hardware import gpu_names
from rlaif.judging.kinds import kind_of
from rlaif.judging.opened import open_with_ballots
from rlaif.records import Vote
from rlaif.serving.servers import KEY_VARIABLE
from rlaif.trust.bench import cast_votes
from tests.conftest import until

ROOT = Path(__file__).resolve().parents[2]

pytestmark = [pytest.mark.nightly, pytest.mark.vllm, pytest.mark.model, pytest.mark.timeout(1800)]


def servers_running() -> list[psutil.Process]:
    """vLLM's processes below this one."""
    mine = psutil.Process().children(recursive=True)
    return [p for p in mine if p.status() != psutil.STATUS_ZOMBIE and "vllm" in " ".join(p.cmdline()).lower()]


def test_two_servers_share_the_ballots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("vllm")
    if len(gpu_names()) == 1:
        pytest.skip("two servers need two GPUs, or none")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    serve = {"model": "embedded:smollm2-135m-instruct", "replicas": 2, "args": {"max_model_len": 1024}}
    judge = {"kind": "chat", "model": "smollm2", "serve": serve, "cache": None, "templates": ["pairwise"]}
    job = parse_job({"constitution": "assistant@1", "judge": judge}, "test")
    rows = [r for r in read_labelled([ROOT / "prompts/judge_bench.jsonl"]).rows if r.constitution == "assistant@1"][:4]
    constitution = load_constitution(ROOT / "constitutions", "assistant@1")
    notes: list[str] = []

    opened = open_with_ballots(job, [constitution], ROOT, notes.append)
    assert len(servers_running()) >= 4, "each is two processes at least"
    votes: list[Vote] = cast_votes(rows, opened.ask, lambda reference: constitution)
    opened.close()
    until(lambda: not servers_running(), 60)
    logs = list(tmp_path.rglob("judge-server-*.log"))
    assert len(logs) == 2
    assert not any(os.environ[KEY_VARIABLE] in log.read_text() for log in logs)

    assert len(votes) == 2 * len(rows)
    assert all(v.abstain_reason != "infra_error" for v in votes), [v.error for v in votes]
    assert len({v.server for v in votes}) == 2
    assert {v.ballot.judge for v in votes} == {"chat:smollm2"}
    assert any(v.p_first is not None for v in votes), "no vote came with log-probabilities of its label"
    assert kind_of(job.judge).local_model == "embedded:smollm2-135m-instruct"
    assert any("starting 2 servers" in note for note in notes)
