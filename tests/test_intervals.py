from __future__ import annotations

import pytest
from scipy.stats import binomtest

from rlaif.intervals import wilson


def test_wilson_interval() -> None:
    # Wilson 1927, 8 of 10: (0.4902, 0.9433)
    assert wilson(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert wilson(0, 0) == (0.0, 1.0)
    assert wilson(0, 5)[0] == 0.0
    assert wilson(5, 5)[1] == 1.0


@pytest.mark.parametrize(("successes", "n"), [(k, n) for n in (1, 7, 200) for k in {0, 1, n // 2, n}])
def test_whole_counts_are_as_scipy_has_them(successes: int, n: int) -> None:
    found = binomtest(successes, n).proportion_ci(0.95, "wilson")
    assert wilson(successes, n) == pytest.approx((found.low, found.high), abs=1e-12)


def test_half_a_win_is_half_a_win() -> None:
    low, high = wilson(12.5, 25)
    assert low + high == pytest.approx(1.0)
    assert wilson(12, 25)[0] < low < wilson(13, 25)[0]
