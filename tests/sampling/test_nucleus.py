"""The fast nucleus is the sorted one."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from rlaif.sampling import nucleus  # noqa: E402


def by_sorting(row: torch.Tensor, top_p: float) -> set[int]:
    """The definition: the likeliest tokens, until their probability reaches top_p."""
    p, order = row.double().softmax(dim=0).sort(descending=True)
    before = p.cumsum(dim=0) - p
    return set(order[before < top_p].tolist()) if top_p < 1 else set(range(len(row)))


@pytest.mark.parametrize("sharpness", [0.3, 2.0, 8.0])
@pytest.mark.parametrize("first_look", [2, 16, 256])
def test_same_tokens_as_by_sorting(sharpness: float, first_look: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nucleus, "FIRST_LOOK", first_look)
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(40, 200, generator=generator) * sharpness
    top_p = torch.tensor([0.95, 0.5, 1.0, 0.01, 0.999] * 8)
    expected = [by_sorting(row, float(p)) for row, p in zip(logits, top_p, strict=True)]
    before = logits.clone()
    kept = nucleus.keep_nucleus(logits, top_p)
    assert [set(row.isfinite().nonzero().squeeze(1).tolist()) for row in kept] == expected
    assert torch.equal(kept[kept.isfinite()], before[kept.isfinite()])
    assert all(len(e) >= 1 for e in expected)


def test_rows_without_a_nucleus_are_left_alone() -> None:
    logits = torch.randn(3, 50)
    assert torch.equal(nucleus.keep_nucleus(logits.clone(), torch.ones(3)), logits)


def test_an_empty_batch() -> None:
    assert nucleus.keep_nucleus(torch.zeros(0, 50), torch.zeros(0)).shape == (0, 50)
