"""How vLLM's OpenAI-compatible server is started: its options and its environment. Imports no vLLM.

The module is started rather than `vllm serve`: with the CPU build that command fails ("No package metadata was found
for vllm"), and both builds have the module. The key goes by the environment: options are seen by every user of the
machine, and are written to the server's log.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rlaif.config import SHARED_UTILIZATION, Precision, Serve
from rlaif.errors import UserError
from rlaif.hardware import cpu_has_bf16, gpu_names

PROGRAM: Sequence[str] = (sys.executable, "-m", "vllm.entrypoints.openai.api_server")
HOST = "127.0.0.1"
HEALTH = "/health"
"""Answers when the model can be asked, without a key."""

_ENVIRONMENT = {
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # servers and workers take turns on the same cores
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",  # models are folders by now
}
"""A value that is already in the environment wins."""
_FORCED = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
"""Whatever the environment says: a sampler in this process sets it for itself."""
_CPU = {"enforce_eager": True, "kv_cache_memory_bytes": 2**30}
"""Compiling needs a C++ compiler and a minute; and vLLM would take half the memory."""

_RESTS = {
    "enable_sleep_mode": True,
    "gpu_memory_utilization": SHARED_UTILIZATION,
    "middleware": "rlaif.sampling.vllm_compat.only_with_key",
}
"""The paths by which it is asked are for development, and need no key of themselves."""
SLEEP, WAKE = "/sleep?level=1", "/wake_up"
"""Paths. At level 1 weights go to RAM; at 2 they would be forgotten, and nobody loads a judge's again."""


def command(serve: Serve, model: Path, called: str, port: int, precision: Precision, rests: bool = False) -> list[str]:
    """The program and its options. `model` is the folder of `serve.model`, `called` the name that requests give;
    `rests`: it will be asked to give its GPU's memory back for a while.

    Raises:
        UserError: an option leaves no room for one of ours.
    """
    mine = {
        "model": str(model),
        "served_model_name": called,
        "host": HOST,
        "port": port,
        "tensor_parallel_size": serve.tensor_parallel_size,
        "uvicorn_log_level": "warning",  # else a line for each of a million ballots
        "disable_log_stats": True,  # else one every ten seconds
        **_of_hardware(precision),
        **(_RESTS if rests else {}),
    }
    given = {key.replace("-", "_"): value for key, value in serve.args.items()}
    if rests and given.get("middleware", _RESTS["middleware"]) != _RESTS["middleware"]:
        raise UserError("judge.serve.args: `middleware`: `device: shared` needs it to ask for the key; remove it")
    return [*PROGRAM, *_options(mine | given)]


def environment(
    key: str, gpus: Sequence[str], development: bool = False, here: Mapping[str, str] = os.environ
) -> dict[str, str]:
    """What a server starts with beside ours.

    Args:
        key: What it wants of whoever asks.
        gpus: Those it sees; none: whatever we see.
        development: It has vLLM's paths for development, which need no key of themselves.
        here: Our own environment.
    """
    mine = {name: value for name, value in _ENVIRONMENT.items() if name not in here}
    seen = {"CUDA_VISIBLE_DEVICES": ",".join(gpus)} if gpus else {}
    return {**mine, **_FORCED, **seen, "VLLM_API_KEY": key, "VLLM_SERVER_DEV_MODE": str(int(development))}


def _of_hardware(precision: Precision) -> dict[str, Any]:
    """On a GPU vLLM's own choices are good ones; on a CPU it would take bf16 where that is slow."""
    cpu = not gpu_names()
    if precision == "auto":
        kind = ("bfloat16" if cpu_has_bf16() else "float32") if cpu else "auto"
    else:
        kind = {"bf16": "bfloat16", "fp32": "float32"}[precision]
    return {"dtype": kind, **(_CPU if cpu else {})}


def _options(settings: Mapping[str, Any]) -> Iterator[str]:
    """Settings as a command line has them."""
    for key, value in settings.items():
        option = key.replace("_", "-")
        if isinstance(value, bool):
            yield f"--{option}" if value else f"--no-{option}"
        elif isinstance(value, list):
            yield from (f"--{option}", *map(str, value))
        elif value is not None:
            yield from (f"--{option}", json.dumps(value) if isinstance(value, dict) else str(value))
