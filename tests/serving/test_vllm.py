"""What vLLM's server is told, and what a job may say of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rlaif.config import Job, Serve, parse_job
from rlaif.errors import UserError
from rlaif.judging.ballots import juror_names
from rlaif.judging.kinds import kind_of
from rlaif.serving import vllm


def job(judge: dict[str, Any], **changes: Any) -> Job:
    return parse_job({"constitution": "rules", "judge": {"kind": "chat", **judge}, **changes}, "test")


def told(monkeypatch: pytest.MonkeyPatch, gpus: list[str], **args: Any) -> list[str]:
    monkeypatch.setattr(vllm, "gpu_names", lambda: gpus)
    monkeypatch.setattr(vllm, "cpu_has_bf16", lambda: False)
    serve = Serve(model="m", tensor_parallel_size=2, args=args)
    return vllm.command(serve, Path("/models/m"), "judge", 4711, "auto")


def test_the_options_are_those_of_the_job_and_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    given = {"max_model_len": 512, "enable-prefix-caching": False, "enforce_eager": True, "seed": None,
             "allowed_origins": ["a", "b"], "hf_overrides": {"x": 1}}  # fmt: skip
    options = told(monkeypatch, ["a GPU"], **given)
    assert options[:3] == list(vllm.PROGRAM)
    said = " ".join(options)
    assert "--model /models/m --served-model-name judge --host 127.0.0.1 --port 4711 --tensor-parallel-size 2" in said
    assert "--dtype auto" in said
    assert "--max-model-len 512 --no-enable-prefix-caching --enforce-eager --allowed-origins a b" in said
    assert options[-1] == '{"x": 1}'
    assert "--seed" not in options
    assert "kv-cache" not in said


def test_one_that_takes_turns_can_sleep_takes_most_and_asks_for_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm, "gpu_names", lambda: ["a GPU"])
    ours = "--middleware rlaif.sampling.vllm_compat.only_with_key"

    def options(rests: bool = True, **args: Any) -> str:
        return " ".join(vllm.command(Serve(model="m", args=args), Path("/m"), "judge", 4711, "auto", rests))

    assert f"--enable-sleep-mode --gpu-memory-utilization 0.8 {ours}" in options()
    assert "--gpu-memory-utilization 0.5" in options(gpu_memory_utilization=0.5)
    assert "sleep" not in options(rests=False)
    given = options(middleware="rlaif.sampling.vllm_compat.only_with_key")
    assert given.count(ours) == 1, "as of the policy's own servers"
    with pytest.raises(UserError, match=r"judge\.serve\.args: `middleware`"):
        options(middleware="mine.open_to_all")


def test_on_a_cpu_it_takes_no_more_than_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    said = " ".join(told(monkeypatch, []))
    assert "--dtype float32 --enforce-eager --kv-cache-memory-bytes 1073741824" in said
    assert "--dtype bfloat16" in " ".join(told(monkeypatch, [], dtype="bfloat16")), "a job's own word wins"


def test_the_environment_holds_the_key_and_what_a_server_sees() -> None:
    here = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "DO_NOT_TRACK": "0"}
    told = vllm.environment("secret", ["GPU-3f", "1"], here=here)
    assert told["VLLM_API_KEY"] == "secret"
    assert told["CUDA_VISIBLE_DEVICES"] == "GPU-3f,1"
    assert told["VLLM_ENABLE_V1_MULTIPROCESSING"] == "1", "a sampler in this process has set it for itself"
    assert "DO_NOT_TRACK" not in told, "what the user has set stays"
    assert told["VLLM_SERVER_DEV_MODE"] == "0", "whatever the user has set: it opens paths without a key"
    assert vllm.environment("secret", [], development=True)["VLLM_SERVER_DEV_MODE"] == "1"
    assert "CUDA_VISIBLE_DEVICES" not in vllm.environment("secret", [], here=here)


def test_a_job_needs_the_model_alone() -> None:
    judge = job({"serve": {"model": "embedded:smollm2-135m-instruct"}}).judge
    assert judge.model == "embedded:smollm2-135m-instruct"
    kind = kind_of(judge)
    kind.check()  # no key is missing
    assert kind.local_model == "embedded:smollm2-135m-instruct"
    named = job({"model": "small", "serve": {"model": "org/model"}}).judge
    assert juror_names(named.jurors) == ["chat:small"]
    assert juror_names(named.at(["http://127.0.0.1:4711/v1"], "KEY").jurors) == ["chat:small"], "no port is in a ballot"


def test_a_stored_job_is_read_again() -> None:
    stored = job({"serve": {"model": "org/model", "replicas": 2}})
    assert parse_job(stored.model_dump(mode="json"), "run.json") == stored


@pytest.mark.parametrize(
    ("judge", "said"),
    [
        ({"base_url": "http://127.0.0.1:8000/v1"}, "judge.base_url: judge.serve starts the servers"),
        ({"api_key_env": "KEY"}, "judge.api_key_env: judge.serve starts"),
        ({"headers": {"a": "B"}}, "judge.headers: judge.serve starts"),
        ({"serve": {"model": "m", "args": {"port": 8000}}}, "`port`: the run chooses"),
        ({"serve": {"model": "m", "args": {"api-key": "k"}}}, "`api_key`: the run chooses"),
        ({"serve": {"model": "m", "args": {"served-model-name": "k"}}}, "`served_model_name` follows"),
        ({"serve": {"model": "m", "args": {"hf_token": "k"}}}, "export HF_TOKEN"),
        ({"serve": {"replicas": 2}}, "judge.serve.model"),
    ],
)
def test_what_the_run_itself_says_is_refused(judge: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        job({"serve": {"model": "m"}} | judge)


def test_a_reference_judge_has_servers_of_its_own() -> None:
    reference = {"kind": "chat", "serve": {"model": "m"}}
    with pytest.raises(UserError, match=r"eval\.reference_judge\.serve"):
        job({"model": "m"}, eval={"reference_judge": reference})


def test_a_stored_reply_is_found_again_at_another_port() -> None:
    judge = job({"serve": {"model": "m"}}).judge
    cached = {judge.at([url], "KEY").cached_as(url) for url in ("http://127.0.0.1:1/v1", "http://127.0.0.1:2/v1")}
    assert len(cached) == 1
    other = job({"model": "m", "base_url": "http://127.0.0.1:1/v1"}).judge
    assert other.cached_as("http://127.0.0.1:1/v1") == "http://127.0.0.1:1/v1"
