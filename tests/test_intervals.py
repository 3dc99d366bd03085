from __future__ import annotations

import pytest

from rlaif.intervals import wilson


def test_wilson_interval() -> None:
    # Wilson 1927, 8 of 10: (0.4902, 0.9433)
    assert wilson(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert wilson(0, 0) == (0.0, 1.0)
    assert wilson(0, 5)[0] == 0.0
