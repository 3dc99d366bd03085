"""What monitors look at in an iteration's rows, as counts. Pure.

In: completions, pairs and decisions. Out: the fields of `metrics.json` that charts and leanings are made of.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from statistics import fmean, stdev

from rlaif.constitutions.checks import count_words, words_of
from rlaif.intervals import log_choose, share
from rlaif.monitors.features import FEATURES, Compared
from rlaif.records import AnswerCounts, Completion, Decision, Feature, Leaning, Pair, PairCounts

VOCABULARY_WORDS = 200


def answer_counts(completions: Sequence[Completion]) -> AnswerCounts:
    """What monitors of the policy look at."""
    of_prompt: dict[str, list[Completion]] = {}
    for c in completions:
        of_prompt.setdefault(c.prompt_id, []).append(c)
    scored = [c for c in completions if c.logprob is not None]
    return AnswerCounts(
        mean_words_error=_error([fmean(count_words(c.text) for c in its) for its in of_prompt.values()]),
        ended_error=_error([fmean(c.finish_reason == "stop" for c in its) for its in of_prompt.values()]),
        prompts=len(of_prompt),
        nats_per_token=share(-sum(c.logprob or 0.0 for c in scored), sum(len(c.token_ids) for c in scored)),
        vocabulary=vocabulary([c.text for c in completions]),
        self_praise=sum(FEATURES["self_praise"](c.text) > 0 for c in completions),
        to_judge=sum(FEATURES["to_judge"](c.text) > 0 for c in completions),
    )


def _error(values: Sequence[float]) -> float | None:
    """Standard error of a mean of values that were drawn independently."""
    return stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


def vocabulary(texts: Iterable[str], words: int = VOCABULARY_WORDS) -> float | None:
    """How many different words are in so many of some texts' words, drawn without replacement: the expected number, so
    that many texts and few can be compared (rarefaction, Hurlbert 1971). None where there are fewer words."""
    count = Counter(word.lower() for text in texts for word in words_of(text))
    every = count.total()
    if every < words:
        return None
    ways = log_choose(every, words)
    missed = (math.exp(log_choose(every - n, words) - ways) for n in count.values() if n <= every - words)
    return len(count) - math.fsum(missed)


def pair_counts(decisions: Sequence[Decision]) -> PairCounts:
    """What charts of the judge are made of. A pair that a data set labelled was put before no judge."""
    judged = [d for d in decisions if d.source == "votes"]
    verdicts = [d.verdict for d in judged]
    return PairCounts(
        pairs=len(verdicts),
        abstained=sum(v.outcome == "abstain" for v in verdicts),
        unanimous=sum(v.agreement is not None and v.agreement > 1 - 1e-9 for v in verdicts),
        flipped=sum(v.order_flip for v in verdicts),
        kept=sum(d.status == "kept" for d in judged),
        leans_first=sum(2 * v.slot_first > v.slot_votes for v in verdicts),
        leans_second=sum(2 * v.slot_first < v.slot_votes for v in verdicts),
    )


def leanings(
    completions: Sequence[Completion], pairs: Sequence[Pair], decisions: Sequence[Decision]
) -> dict[Feature, Leaning]:
    """Of the pairs that a judge's verdict keeps, how often the winner has more of a feature than the loser. What a data
    set labelled says nothing of a judge."""
    texts = {c.id: c.text for c in completions}
    winners = {d.pair_id: d.winner for d in decisions if d.status == "kept" and d.source == "votes"}
    won = [(p.first, p.second) if winners[p.id] == "first" else (p.second, p.first) for p in pairs if p.id in winners]
    out: dict[Feature, Leaning] = {}
    compared = Compared()
    for feature in FEATURES:
        both = [compared.of_both(feature, texts[winner], texts[loser]) for winner, loser in won]
        out[feature] = Leaning(more=sum(a > b for a, b in both), pairs=sum(a != b for a, b in both))
    return out
