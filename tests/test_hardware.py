"""What `auto` means follows from what the processor says of itself."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlaif import hardware

X86 = "processor : 0\nmodel name : Some CPU @ 2GHz\nflags : fpu avx2 {flags}\n\nprocessor : 1\n"
ARM = "processor : 0\nBogoMIPS : 50\nFeatures : fp asimd {flags}\n"


@pytest.mark.parametrize(
    ("text", "bf16"),
    [
        (X86.format(flags="avx512f"), False),
        (X86.format(flags="avx512f avx512_bf16"), True),
        (X86.format(flags="amx_bf16"), True),
        (ARM.format(flags=""), False),
        (ARM.format(flags="i8mm bf16"), True),
        ("", False),
    ],
)
def test_bf16_where_the_processor_multiplies_it(
    text: str, bf16: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("a GPU computes here")
    (tmp_path / "cpuinfo").write_text(text)
    monkeypatch.setattr(hardware, "CPUINFO", tmp_path / "cpuinfo")
    assert hardware.cpu_has_bf16() == bf16
    assert hardware.precision_here("auto") == ("bf16" if bf16 else "fp32")
    assert hardware.torch_dtype("auto") == (torch.bfloat16 if bf16 else torch.float32)


def test_a_wish_is_taken_as_it_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(hardware, "CPUINFO", tmp_path / "nothing")
    assert hardware.precision_here("bf16") == "bf16"
    assert hardware.precision_here("fp32") == "fp32"


def test_the_machine_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text(X86.format(flags="avx512_bf16"))
    monkeypatch.setattr(hardware, "CPUINFO", tmp_path / "cpuinfo")
    assert hardware.facts() | {"gpus": []} == {"cpu": "Some CPU @ 2GHz", "cpu_bf16": True, "gpus": []}
    monkeypatch.setattr(hardware, "CPUINFO", tmp_path / "nothing")
    assert hardware.cpu_name() == "unknown"
