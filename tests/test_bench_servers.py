"""The pure part of the benchmark of servers."""

from __future__ import annotations

import pytest

from benchmarks.servers import alike, in_common
from rlaif.records import Completion
from tests.conftest import answered


def answer(name: str, *token_ids: int, logprob: float = -1.0) -> Completion:
    return answered(name, token_ids, logprob)


def test_answers_are_compared_by_their_ids() -> None:
    wanted = {c.id: c for c in (answer("a", 1, 2, 3, 4), answer("b", 5, 6, logprob=-3.0), answer("c", 7, 8))}
    found = {c.id: c for c in (answer("c", 9, 8), answer("b", 5, 6, logprob=-3.5), answer("a", 1, 2, 4, 4))}
    both = alike(wanted, found)
    assert (both.equal, both.before) == (pytest.approx(1 / 3), pytest.approx(4 / 8))
    assert (both.mean_apart, both.most_apart) == (pytest.approx(0.25), pytest.approx(0.25))
    assert alike(wanted, wanted) == (1.0, 1.0, 0.0, 0.0)


@pytest.mark.parametrize(("a", "b", "n"), [((1, 2), (1, 2), 2), ((1, 2), (1,), 1), ((1,), (2,), 0), ((), (1,), 0)])
def test_tokens_before_the_first_other(a: tuple[int, ...], b: tuple[int, ...], n: int) -> None:
    assert in_common(a, b) == n
