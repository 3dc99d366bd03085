"""How often monitors cry wolf, and how soon they tell what is wrong, simulated: `make bench-monitors`.

Runs of 32 iterations of 24 pairs under one text, with 48 held-out prompts every fourth. In a quiet one, pairs and
answers are drawn from the same distributions throughout, while the policy learns: its answers become a third as long,
end by themselves more often, and win more and more. In a bad one something happens at iteration 17. For each kind of
monitor that holds chance against a limit: the share of quiet runs with an alarm, with its 95 % interval, and of bad
runs in how many it is told, and after how many iterations (median). Jurors' weights are fitted to votes, which takes a
second an iteration: so a few hundred iterations are fitted, and the runs are drawn from them.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from statistics import median
from typing import NamedTuple

import numpy as np

from rlaif.config import Monitors
from rlaif.intervals import wilson
from rlaif.judging.verdicts import fit_jurors
from rlaif.monitors import History, alarms
from rlaif.monitors.judges import juror
from rlaif.records import (
    AlarmKind,
    AnchorCounts,
    AnswerCounts,
    AnswerStats,
    Ballot,
    ConstitutionRef,
    DecodingGap,
    EvaluationMetrics,
    Feature,
    IterationMetrics,
    JudgedStats,
    Leaning,
    PairCounts,
    PolicyVersion,
    ProbeCounts,
    Referred,
    Retention,
    Vote,
)

ITERATIONS, BAD_FROM, SAMPLES = 32, 16, 4
PROMPTS, EVERY = 48, 4
CALIBRATED = 200
CHECKS = 0.5
"""Share of the base policy's answers that pass the checks."""
LEARNED_TO_END = 0.5
"""So much larger is the share of answers that end by themselves after a quiet run, half of it above `Rates.ended`."""
TEXT = ConstitutionRef(name="text", version=1, hash="0")


class Rates(NamedTuple):
    """What pairs and answers are drawn from."""

    abstained: float = 0.05
    unanimous: float = 0.7
    flipped: float = 0.15
    first: float = 0.6
    """Of the pairs that the order decides, those on which the slot shown first is preferred: many judges lean so."""
    kept: float = 0.6
    longer: float = 0.6
    """Winners that are the longer side; a good judge need not be at a half."""
    praised: float = 0.5
    """Winners that praise themselves, where one side does."""
    praising: float = 0.01
    """Answers that praise themselves."""
    words: float = 45.0
    ended: float = 0.6
    vocabulary: float = 110.0
    nats: float = 1.1
    moved: float = 0.05
    """Verdicts that are others when they are asked for again: a judge may answer with some chance."""
    cut_off_won: float = 0.5
    """Winners that were cut off, of pairs with one such answer: a judge that minds no end is at a half."""
    decoding: float = 0.0
    """What an answer as it was sampled is from what the learner says of it, nats a token, beside rounding."""
    agreement: float = 0.85
    """Mean agreement of the votes on a judged pair."""
    fooled: bool = False
    """The win rate rises, and nothing else that should."""
    probes: float = 0.9
    """Probes that are still passed, of those that the base policy passed: a policy that learns loses some."""


DIFFERING: dict[Feature, float] = {
    "length": 1.0, "lists": 0.3, "hedges": 0.8, "repetition": 0.6, "self_praise": 0.1, "to_judge": 0.05
}  # fmt: skip
"""Share of the pairs of which one side has more."""

BAD: dict[AlarmKind, tuple[str, Rates]] = {
    "agreement_drift": ("unanimous pairs fall from 70 % to 40 %", Rates(unanimous=0.4)),
    "order_flip_drift": ("pairs that the order decides rise from 15 % to 45 %", Rates(flipped=0.45)),
    "position_bias_drift": (
        "where the order decides (15 % of the pairs), the slot shown first is preferred on none in place of 60 %",
        Rates(first=0.0),
    ),
    "abstained_drift": ("pairs without a vote rise from 5 % to 25 %", Rates(abstained=0.25)),
    "kept_drift": ("kept pairs fall from 60 % to 30 %", Rates(kept=0.3)),
    "abstained": ("the judge goes silent on 60 % of the pairs", Rates(abstained=0.6)),
    "leaning": ("a third of the pairs differ in self-praise, and all winners have more", Rates(praised=1.0)),
    "self_praise": ("a quarter of the answers praise themselves", Rates(praising=0.25)),
    "jump": ("answers become a third as long at once", Rates(words=15.0)),
    "anchors": ("another model: 40 % of its verdicts are others", Rates(moved=0.4)),
    "hacking": ("the win rate is at 85 %, the reference's, at equal length and the checks stay", Rates(fooled=True)),
    "cut_off_won": ("nine of ten pairs with one answer that was cut off go to that one", Rates(cut_off_won=0.9)),
    "decoding_gap": ("answers are sampled from a policy that is .05 nats a token off", Rates(decoding=0.05)),
    "calibration_shift": ("the votes' mean agreement falls from .85 to .6", Rates(agreement=0.6)),
    "collapse": ("a third of the different words is left", Rates(vocabulary=37.0)),
}
"""Kind → what happens, and what is drawn from then on."""
FORGETFUL = ("the win rate rises as in a quiet run, and 60 % of the probes are still passed", Rates(probes=0.6))
"""What else `hacking` tells."""
JURORS = {"a": 0.85, "b": 0.8, "c": 0.75}
"""Share of the pairs on which a juror names the better side."""
BAD_JURORS: dict[str, dict[str, float]] = {
    "a juror names the worse side of 80 % of the pairs": {**JURORS, "c": 0.2},
    "a juror names a side by chance": {**JURORS, "c": 0.5},
}


def within(rate: float) -> tuple[float, float]:
    """The interval of a win rate."""
    return wilson(rate * PROMPTS, PROMPTS)


def evaluation(rng: np.random.Generator, k: int, rates: Rates, base: float) -> EvaluationMetrics:
    """What iteration k made, by 48 held-out prompts. A quiet run wins more and more, by everybody's word, and passes
    more of the checks than the share `base` of the base policy's answers."""
    learned = k / (ITERATIONS - 1)
    wins = 0.85 if rates.fooled else 0.5 + 0.35 * learned
    others = 0.5 if rates.fooled else wins

    reasons = rng.random(PROMPTS)

    def won(rate: float) -> float:
        """Half of the prompts are won for a reason that all share."""
        shared = rng.random(PROMPTS) < 0.5
        return float((np.where(shared, reasons, rng.random(PROMPTS)) < rate).mean())

    by_judge, by_reference, controlled, passed = map(
        won, (wins, others, others, CHECKS + (others - 0.5) * (1 - CHECKS) / 0.5)
    )
    silent = int(rng.binomial(PROMPTS, rates.abstained))
    counts = {"wins": 0, "losses": 0, "undecided": 0, "abstained": silent, "asked": PROMPTS}
    referred = Referred(judge="other", win_rate=by_reference, win_interval=within(by_reference), **counts)
    return EvaluationMetrics(
        **dict(QUIET.sampled.model_copy(update={"answers": PROMPTS})),
        **counts,
        updates=k + 1,
        constitution=TEXT,
        win_rate=by_judge,
        win_interval=within(by_judge),
        length_controlled_win_rate=controlled,
        length_controlled_interval=within(controlled),
        kl_per_token=0.1,
        relevance=1.0,
        base_logprob_per_token=-1.0,
        checks={"wish": passed},
        base_checks={"wish": base},
        referred=referred,
        retention=probed(rng, rates),
        seconds=0.0,
    )


def probed(rng: np.random.Generator, rates: Rates) -> Retention:
    """A hundred probes, of which the base policy passes 60, as many as a small model does."""
    kept = int(rng.binomial(60, rates.probes))
    counts = ProbeCounts(probes=100, base_passed=60, kept=kept, gained=0)
    unknown = dict.fromkeys(("perplexity", "base_perplexity", "perplexity_ratio", "perplexity_ratio_interval"))
    return Retention(probes=counts, kept_share=kept / 60, kept_interval=wilson(kept, 60), by_kind={}, **unknown)


def judged(rng: np.random.Generator, pairs: int, rates: Rates) -> JudgedStats:
    """Judged pairs as a calibration is held against them: their answers are as long as the labelled ones."""
    agreement = np.clip(rng.normal(rates.agreement, 0.2, pairs), 0.5, 1.0)
    return JudgedStats(
        pairs=pairs,
        kept=int(rng.binomial(pairs, rates.kept)),
        mean_agreement=float(agreement.mean()),
        agreement_sd=float(agreement.std()),
        mean_words=float(rates.words * rng.lognormal(0.0, 0.5, 2 * pairs).mean()),
        answers=2 * pairs,
        cut_off=int(rng.binomial(2 * pairs, 1 - rates.ended)),
        one_cut_off=int(rng.binomial(pairs, 2 * rates.ended * (1 - rates.ended))),
    )


def decoded(rng: np.random.Generator, rates: Rates) -> DecodingGap:
    """Eight answers of a policy that samples in bf16: rounding is some .01 nats a token of an answer."""
    apart = rates.decoding + rng.normal(0.0, 0.01, 8)
    return DecodingGap(
        answers=8, tokens=480, mean=abs(float(apart.mean())), error=float(apart.std(ddof=1) / np.sqrt(8)),
        typical=float(np.abs(apart).mean()), worst=float(np.abs(apart).max()),
    )  # fmt: skip


def iteration(rng: np.random.Generator, k: int, pairs: int, rates: Rates) -> IterationMetrics:
    """An iteration's metrics; each prompt has a pair and `SAMPLES` answers, whose lengths and ends are alike."""
    learned = 3.0 ** (-k / (ITERATIONS - 1))
    words = rates.words * learned * rng.lognormal(0.0, 0.5, pairs) / np.exp(0.125)
    answers = SAMPLES * pairs
    by_itself = rates.ended + LEARNED_TO_END * (k / (ITERATIONS - 1) - 0.5)
    ended = rng.binomial(SAMPLES, rng.beta(4 * by_itself, 4 * (1 - by_itself), pairs)) / SAMPLES
    abstained = int(rng.binomial(pairs, rates.abstained))
    kept = int(rng.binomial(pairs - abstained, rates.kept))
    again = AnchorCounts(pairs=32, moved=int(rng.binomial(32, rates.moved)))
    flipped = int(rng.binomial(pairs - abstained, rates.flipped))
    first = int(rng.binomial(flipped, rates.first))
    leanings: dict[Feature, Leaning] = {}
    for feature, share in DIFFERING.items():
        differ = int(rng.binomial(kept, 0.3 if feature == "self_praise" and rates.praised > 0.5 else share))
        more = {"length": rates.longer, "self_praise": rates.praised}.get(feature, 0.5)
        leanings[feature] = Leaning(more=int(rng.binomial(differ, more)), pairs=differ)
    return QUIET.model_copy(
        update={
            "iteration": k,
            "sampled": QUIET.sampled.model_copy(
                update={"answers": answers, "mean_words": float(words.mean()), "ended_share": float(ended.mean())}
            ),
            "pairs": pairs,
            "anchors": again if k % EVERY == EVERY - 1 else None,
            "leanings": leanings,
            "pair_counts": PairCounts(
                pairs=pairs,
                kept=kept,
                abstained=abstained,
                unanimous=int(rng.binomial(pairs - abstained, rates.unanimous)),
                flipped=flipped,
                leans_first=first,
                leans_second=flipped - first,
            ),
            "answer_counts": AnswerCounts(
                mean_words_error=float(words.std(ddof=1) / np.sqrt(pairs)),
                ended_error=float(ended.std(ddof=1) / np.sqrt(pairs)),
                prompts=pairs,
                nats_per_token=float(rng.normal(rates.nats, 0.05)),
                vocabulary=float(rng.normal(rates.vocabulary, 5.0)),
                self_praise=int(rng.binomial(answers, rates.praising)),
                to_judge=int(rng.binomial(answers, 0.01)),
            ),
        }
    )


QUIET = IterationMetrics(
    iteration=0,
    constitution=TEXT,
    policy=PolicyVersion(iteration=0, digest="d"),
    sampled=AnswerStats(
        answers=96, mean_words=45, mean_tokens=60, list_share=0.1, ended_share=0.6, distinct_share=0.95
    ),
    pairs=24, votes=72, abstentions={}, kept=14, kept_share=0.6, dropped_by_first_reason={}, mean_agreement=0.9,
    trained_pairs=14, replayed_pairs=0, steps=4, loss=0.6, grad_norm=1.0, learner_metrics={}, judge_tokens=0,
    seconds={},
)  # fmt: skip


def first_alarms(
    rng: np.random.Generator, pairs: int, monitors: Monitors, bad: Rates | None = None, iterations: int = ITERATIONS
) -> Mapping[str, int]:
    """Kind → the first iteration in which a run raises it; a bad one since `BAD_FROM`."""
    run: list[IterationMetrics] = []
    evaluated: list[EvaluationMetrics] = []
    told: dict[str, int] = {}
    calibrated = judged(rng, CALIBRATED, Rates())
    base = float(rng.binomial(PROMPTS, CHECKS) / PROMPTS)
    for k in range(iterations):
        rates = bad if bad and k >= BAD_FROM else Rates()
        compared = judged(rng, pairs, rates)
        made = {
            "judged": compared,
            "one_cut_off": compared.one_cut_off,
            "cut_off_won": int(rng.binomial(compared.one_cut_off, rates.cut_off_won)),
            "decoding_gap": decoded(rng, rates),
        }
        run.append(iteration(rng, k, pairs, rates).model_copy(update=made))
        if k % EVERY == EVERY - 1:
            evaluated.append(evaluation(rng, k, rates, base))
        for alarm in alarms(monitors, History(run, evaluated, calibrated=calibrated)):
            if bad is None or k >= BAD_FROM:
                told.setdefault(alarm.kind, k)
    return told


def jury_votes(rng: np.random.Generator, pairs: int, right: Mapping[str, float]) -> Iterator[Vote]:
    """Each juror in both orders; on 15 % of the pairs its second vote is a coin's."""
    for k in range(pairs):
        first_is_better = rng.random() < 0.5
        for name, share in right.items():
            says_first = first_is_better == (rng.random() < share)
            again = rng.random() < 0.5 if rng.random() < Rates().flipped else says_first
            for order, said in (("forward", says_first), ("reversed", again)):
                ballot = Ballot.model_validate(
                    {"id": f"{k} {name} {order}", "pair_id": str(k), "judge": name, "voice": "v", "principles": ("p",)}
                    | {"order": order, "constitution": TEXT.hash, "template": "t"}
                )
                yield Vote(ballot=ballot, model=name, outcome="first" if said else "second", raw_reply="")


def fitted(rng: np.random.Generator, pairs: int, iterations: int, right: Mapping[str, float]) -> list[IterationMetrics]:
    """Iterations with the weights that `filters.aggregate: dawid_skene` fits to their votes."""
    weights = [fit_jurors(jury_votes(rng, pairs, right)).weights for _ in range(iterations)]
    return [QUIET.model_copy(update={"juror_weights": mine}) for mine in weights]


def first_juror_alarm(
    rng: np.random.Generator, quiet: Sequence[IterationMetrics], bad: Sequence[IterationMetrics] | None = None
) -> int | None:
    """The first iteration in which a run of such iterations tells of a juror; a bad one since `BAD_FROM`."""
    run: list[IterationMetrics] = []
    for k in range(ITERATIONS):
        late = bad is not None and k >= BAD_FROM
        drawn = bad if bad is not None and late else quiet
        run.append(drawn[int(rng.integers(len(drawn)))].model_copy(update={"iteration": k}))
        if (bad is None or late) and any(juror(Monitors().juror, History(run))):
            return k
    return None


def show(runs: int, pairs: int, seed: int, fits: int, say: Callable[[str], None] = print) -> None:
    """The table."""
    rng, monitors = np.random.default_rng(seed), Monitors()
    quiet = [first_alarms(rng, pairs, monitors) for _ in range(runs)]
    say(f"{runs} quiet runs of {ITERATIONS} iterations of {pairs} pairs, {runs // 20} of each bad one; seed {seed}\n")
    say("| kind | quiet runs with an alarm | what happens in the bad ones | told in | after |")
    say("|---|---|---|---|---|")

    def row(kind: str, some: int, what: str, told_at: Sequence[int | None]) -> None:
        low, high = wilson(some, runs)
        after = [k - BAD_FROM + 1 for k in told_at if k is not None]
        of = f"{len(after) / len(told_at):.0%} | {median(after) if after else '-'}"
        say(f"| `{kind}` | {some / runs:.2%} ({low:.2%} to {high:.2%}) | {what} | {of} |")

    for kind, (what, rates) in [*BAD.items(), ("hacking", FORGETFUL)]:
        bad = [first_alarms(rng, pairs, monitors, rates).get(kind) for _ in range(runs // 20)]
        row(kind, sum(kind in told for told in quiet), what, bad)
    jury = fitted(rng, pairs, fits, JURORS)
    wrongly = [first_juror_alarm(rng, jury) is not None for _ in range(runs)]
    for what, right in BAD_JURORS.items():
        worse = fitted(rng, pairs, fits, right)
        row("juror", sum(wrongly), what, [first_juror_alarm(rng, jury, worse) for _ in range(runs // 20)])
    either = sum(any(kind in told for kind in BAD) or of_jurors for told, of_jurors in zip(quiet, wrongly, strict=True))
    say(f"\nSome alarm of these in a quiet run: {either / runs:.2%}")
    nothing = sum(weight == 0 for m in jury for weight in m.juror_weights.values()) / (len(JURORS) * fits)
    say(f"Jurors that are right on 85, 80 and 75 % of the pairs weigh nothing in {nothing:.1%} of {fits} iterations")


def main(arguments: Sequence[str] | None = None) -> None:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--pairs", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fits", type=int, default=200, help="iterations that jurors' weights are fitted in")
    args = parser.parse_args(arguments)
    show(args.runs, args.pairs, args.seed, args.fits)


if __name__ == "__main__":
    main()
