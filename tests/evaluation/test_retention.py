"""What was kept, in numbers: shares, perplexity and their intervals; and how much answers repeat."""

from __future__ import annotations

import json
import math
from itertools import combinations
from statistics import fmean

import numpy as np
import pytest

from rlaif.evaluation import retention
from rlaif.evaluation.answers import distinct_in, repeated_line_share
from rlaif.intervals import wilson
from rlaif.records import AnswerStats, ProbeResult, TextScore, stored


def results(passed: str, kinds: str = "") -> list[ProbeResult]:
    """A letter a probe: `1` passed, `0` not; `kinds` has a letter for each."""
    return [
        ProbeResult(probe_id=f"p{i}", kind=kinds[i] if kinds else "a", completion_id=f"c{i}", passed=letter == "1")
        for i, letter in enumerate(passed)
    ]


def scores(*nats: float, tokens: int = 10) -> list[TextScore]:
    return [TextScore(text_id=f"t{i}", tokens=tokens, logprob=-n) for i, n in enumerate(nats)]


def test_only_what_the_base_policy_passed_can_be_lost() -> None:
    found = retention(results("110100", "aaabbb"), results("101001", "aaabbb"), scores(20.0), scores(20.0))
    assert found.probes.model_dump() == {"probes": 6, "base_passed": 3, "kept": 1, "gained": 2}
    assert found.kept_share == pytest.approx(1 / 3)
    assert found.kept_interval == wilson(1, 3)
    assert found.by_kind["a"].model_dump() == {"probes": 3, "base_passed": 2, "kept": 1, "gained": 1}
    assert found.by_kind["b"].model_dump() == {"probes": 3, "base_passed": 1, "kept": 0, "gained": 1}


def test_a_base_policy_that_passes_nothing_has_nothing_to_lose() -> None:
    found = retention(results("00"), results("01"), scores(1.0), scores(1.0))
    assert (found.kept_share, found.kept_interval, found.probes.gained) == (None, None, 1)


def test_perplexity_is_by_token_over_all_texts() -> None:
    base = [TextScore(text_id="a", tokens=10, logprob=-20.0), TextScore(text_id="b", tokens=30, logprob=-30.0)]
    now = [TextScore(text_id="b", tokens=30, logprob=-36.0), TextScore(text_id="a", tokens=10, logprob=-22.0)]
    found = retention(results("1"), results("1"), base, now)
    assert found.base_perplexity == pytest.approx(math.exp(50 / 40))
    assert found.perplexity == pytest.approx(math.exp(58 / 40))
    assert found.perplexity_ratio == pytest.approx(math.exp(8 / 40))
    # Both texts lost 0.2 nats a token: nothing is uncertain.
    assert found.perplexity_ratio_interval == pytest.approx((math.exp(0.2), math.exp(0.2)))


def test_texts_that_move_apart_make_the_ratio_uncertain() -> None:
    base, now = scores(20, 20, 20, 20), scores(21, 19, 22, 18)
    found = retention(results("1"), results("1"), base, now)
    assert found.perplexity_ratio == pytest.approx(1)
    assert found.perplexity_ratio_interval is not None
    low, high = found.perplexity_ratio_interval
    assert low < 0.9 < 1.1 < high
    assert retention(results("1"), results("1"), scores(1.0), scores(2.0)).perplexity_ratio_interval is None


def test_no_text_no_perplexity() -> None:
    found = retention(results("1"), results("1"), [], [])
    assert (found.perplexity, found.perplexity_ratio, found.perplexity_ratio_interval) == (None, None, None)


def test_what_is_distinct_in_so_many_draws_is_that_of_all_samples() -> None:
    texts = ["a b a", "A b", "c"]
    words = ["a", "b", "a", "a", "b", "c"]
    for draws in range(1, 7):
        each = [len(set(drawn)) / draws for drawn in combinations(words, draws)]
        assert distinct_in(texts, 1, draws) == pytest.approx(fmean(each)), draws
    assert distinct_in(texts, 2, 3) == pytest.approx(2 / 3)
    assert distinct_in(texts, 2, 4) is None
    assert distinct_in([], 1) is None


@pytest.mark.parametrize("n", [1, 2])
def test_longer_answers_of_one_writer_are_as_distinct(n: int) -> None:
    """A writer that draws words by Zipf's law; plain distinct-2 falls by a third."""
    rng = np.random.default_rng(0)
    share = 1 / np.arange(1, 301)
    every = [f"w{k}" for k in range(300)]

    def answers(words: int) -> list[str]:
        return [" ".join(rng.choice(every, words, p=share / share.sum())) for _ in range(200)]

    short, long = (distinct_in(answers(words), n) for words in (10, 80))
    assert short is not None
    assert long == pytest.approx(short, abs=0.03)
    same_again = ["I am happy to help you with " + text for text in answers(10)]
    assert (distinct_in(same_again, n) or 1) < short - 0.05


def test_what_older_versions_counted_as_distinct_is_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    kept = dict.fromkeys(("mean_words", "mean_tokens", "list_share", "ended_share", "distinct_share"), 1.0) | {
        "answers": 2
    }
    old = kept | {"distinct_1": 0.4, "distinct_2": 0.8, "repeated_line_share": 0.1}
    for content in (old, json.dumps(old)):
        assert stored(AnswerStats, content) == AnswerStats(**kept, repeated_line_share=0.1)
    assert "newer rlaif" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "repeated"),
    [
        ("One line.\nAnother line.", 0.0),
        ("The same.\nThe same.\nthe  same!", 2 / 3),
        ("I like it. I like it. I do not.", 1 / 3),
        ("Version 1.5 is out. Version 1.6 is not.", 0.0),
        ("1. Wash it.\n2. Dry it.\n3. Fold it.\n\nOr:\n1. Iron it.\n2. Hang it.\n3. Wear it.", 0.0),
        ("(1) Wash it.\n(2) Dry it.\n\n(1) Iron it.\n(2) Hang it.", 0.0),
        ("1.\nWash it.\n1.\nDry it.", 0.0),
        ("1. Wash it.\n2. Wash it.\n3. Dry it.", 1 / 3),
        ("First 1. Wash it 2. Dry it. Then 1. Iron it 2. Hang it.", 0.0),
        ("Dr. Lee met Mr. Po. Dr. Ray met Mr. Ito, e.g. at home, i.e. here. J. Lo came, e.g. by bus, i.e. late.", 0.0),
        ("It was in 1999. It was hot. It was in 1999. It was cold.", 1 / 4),
        ("", None),
        ("...\n\n!", None),
        ("42", None),
    ],
)
def test_lines_and_sentences_that_stood_there_before(text: str, repeated: float | None) -> None:
    assert repeated_line_share([text]) == (None if repeated is None else pytest.approx(repeated))


def test_lines_of_two_answers_are_no_repetition() -> None:
    assert repeated_line_share(["Yes.", "Yes."]) == 0
