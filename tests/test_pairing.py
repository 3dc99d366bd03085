"""Pairs: two different texts of one prompt, chosen and ordered by a seed."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlaif.loop.pairing import make_pairs
from rlaif.records import Completion, PolicyVersion, Score


def completion(prompt, index, text, policy="w"):
    return Completion(
        id=f"{policy}-{prompt}-{index}",
        prompt_id=prompt,
        policy=PolicyVersion(iteration=0, digest=policy),
        index=index,
        seed=0,
        prompt_token_ids=(1,),
        token_ids=(2,),
        text=text,
        finish_reason="stop",
    )


def score(c, value, voice="v"):
    return Score(completion_id=c.id, prompt_id=c.prompt_id, voice=voice, value=value)


GROUPS = st.lists(st.lists(st.sampled_from(["a", "b", "c", " a ", "d"]), min_size=1, max_size=5), max_size=4)


@given(GROUPS, st.sampled_from(["random", "all", "best_worst"]), st.integers(1, 3), st.integers(0, 5), st.data())
def test_pairs_are_of_one_prompt_and_two_texts(groups, method, limit, seed, data):
    completions = [completion(f"p{i}", k, t) for i, texts in enumerate(groups) for k, t in enumerate(texts)]
    scores = [score(c, data.draw(st.integers(-2, 2))) for c in completions]
    pairs = make_pairs(completions, method, limit, seed, scores)
    by_id = {c.id: c for c in completions}
    value = {s.completion_id: s.value for s in scores}
    for p in pairs:
        first, second = by_id[p.first], by_id[p.second]
        assert first.prompt_id == second.prompt_id == p.prompt_id
        assert first.text.strip() != second.text.strip()
        if method == "best_worst":
            assert value[p.first] != value[p.second]
            assert p.selected_by == ("v",)
    assert len({p.id for p in pairs}) == len(pairs)
    per_prompt = [p.prompt_id for p in pairs]
    assert all(per_prompt.count(p) <= limit for p in per_prompt)
    assert pairs == make_pairs(list(reversed(completions)), method, limit, seed, scores) or len(groups) > 1


def test_best_worst_takes_the_extremes_by_mean_over_voices():
    c = [completion("p", i, t) for i, t in enumerate("abcd")]
    scores = [score(x, v) for x, v in zip(c, (3, 1, 2, 0), strict=True)]
    scores += [score(x, v, "w") for x, v in zip(c, (0, 0, 9, 0), strict=True)]
    (pair,) = make_pairs(c, "best_worst", 1, 0, scores)
    assert {pair.first, pair.second} == {c[2].id, c[3].id}
    assert pair.selected_by == ("v", "w")


def test_the_best_is_not_always_first():
    completions = [completion(f"p{i}", k, t) for i in range(40) for k, t in enumerate("ab")]
    scores = [score(c, c.index) for c in completions]
    pairs = make_pairs(completions, "best_worst", 1, 0, scores)
    best_first = sum(p.first.endswith("-1") for p in pairs)
    assert len(pairs) == 40
    assert 8 < best_first < 32


def test_a_completion_without_a_score_is_not_paired():
    c = [completion("p", i, t) for i, t in enumerate("abc")]
    (pair,) = make_pairs(c, "best_worst", 3, 0, [score(c[0], 1), score(c[2], 2)])
    assert {pair.first, pair.second} == {c[0].id, c[2].id}


def test_policies_are_not_mixed():
    assert make_pairs([completion("p", 0, "a", "old"), completion("p", 0, "b", "new")], "all", 9, 0) == []


def test_best_worst_needs_scores():
    with pytest.raises(ValueError, match="scores"):
        make_pairs([], "best_worst", 1, 0)
