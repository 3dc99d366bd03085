from __future__ import annotations

import pytest
from scipy.stats import binomtest, norm, t

from rlaif.intervals import SURE, ratio_interval, students_t, wilson


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


@pytest.mark.parametrize("degrees", [1, 2, 3, 5, 11, 15, 47])
def test_students_t_is_scipys(degrees: int) -> None:
    assert students_t(degrees) == pytest.approx(t.ppf(0.975, degrees), rel=2e-3)


@pytest.mark.parametrize("degrees", [5, 7, 11, 23, 47])
def test_so_it_is_where_only_what_is_sure_is_told(degrees: int) -> None:
    assert students_t(degrees, SURE) == pytest.approx(t.isf(norm.sf(SURE), degrees), rel=1e-2)


@pytest.mark.parametrize(("successes", "n"), [(0, 4), (1, 32), (8, 32), (60, 96)])
def test_wider_intervals_are_as_scipy_has_them(successes: int, n: int) -> None:
    found = binomtest(successes, n).proportion_ci(1 - 2 * norm.sf(SURE), "wilson")
    assert wilson(successes, n, SURE) == pytest.approx((found.low, found.high), abs=1e-9)


def test_a_ratio_of_equal_wholes_is_a_mean() -> None:
    low, high = ratio_interval([1.0, 2.0, 3.0, 6.0], [1] * 4)
    # mean 3, standard error sqrt(14 / 3) / 2, t with three degrees
    assert (low, high) == pytest.approx((3 - 3.1824 * 1.0801, 3 + 3.1824 * 1.0801), abs=0.01)


def test_a_ratio_of_what_goes_with_its_whole_is_sure() -> None:
    assert ratio_interval([1.0, 2.0, 5.0], [10, 20, 50]) == pytest.approx((0.1, 0.1))
    assert ratio_interval([1.0], [10]) == (float("-inf"), float("inf"))
