"""How sure must the votes be before a label may train? A threshold with a promise, from labelled pairs. Pure.

In: verdicts on labelled pairs, and whether each names the labelled side. Out: a `Calibration`, whose threshold on a
score of label consistency keeps pairs such that P(accepted and population error > alpha) <= delta over the draw of the
labelled pairs. It is Learn then Test (arXiv 2110.01052) with fixed-sequence testing: thresholds are tried from the
strictest that keeps enough pairs to be able to pass, ceil(ln delta / ln(1 - alpha)), to looser ones. At each the
hypothesis "the error among kept pairs exceeds alpha" is rejected iff P(Bin(kept, alpha) <= errors) <= delta, which is
the exact (Clopper-Pearson) bound. The sequence starts at three tenths of the pairs that can be kept where these are
more: a start that doesn't look at the labels is as valid, and a handful of pairs fails by one unlucky label. The first
that is not rejected ends the sequence, and the loosest rejected one before it is the threshold; none is a correct
answer. A threshold keeps all pairs that score as much: ties are one step. Pairs without a winner, or that another rule
drops, are never kept.

With slices, each has a threshold and a promise of its own, about the questions that its own pairs were asked: delta is
the risk of one slice, not of all together. A slice is judged under one constitution.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any, Literal, NamedTuple

from pydantic import Field, ValidationError

from rlaif.config import Filters, Job
from rlaif.constitutions.checks import count_words
from rlaif.errors import UserError, first_problem
from rlaif.intervals import sigmoid
from rlaif.judging.verdicts import JurorFit
from rlaif.records import Ballot, Decision, FinishReason, JudgedStats, Pair, Record, Verdict, Vote, digest

CALIBRATION_SCHEMA = 1
EVERYTHING = "all"
"""The slice of a calibration without slices."""
FITTED_FROM = 100
"""Labelled pairs that a fitted map needs: it spends half of them on the map and its report."""
START_SHARE = 0.3
"""Of the pairs that can be kept, the share at which the sequence of thresholds starts."""
_ROUNDING = 1e-9
_BINS = 10
_CLIPPED = 60

ScoreKind = Literal["agreement", "margin", "fitted"]


_OF_POLICY = ("system_prompt", "chat_template_args", "thinking")
"""Settings of `policy` that change what a judge is shown, or what it judges."""


def asked_as(job: Job) -> dict[str, Any]:
    """How a job asks beyond what its ballots say, by dotted key; what is at its default is left out."""
    sections = (("policy", job.policy, _OF_POLICY), ("judge", job.judge, job.judge.asked_as))
    out = {}
    for prefix, section, names in sections:
        for name in names:
            field = type(section).model_fields.get(name)
            if field is not None and (value := getattr(section, name)) != field.get_default(call_default_factory=True):
                out[f"{prefix}.{name}"] = value
    return out


def ends_of(pair: Pair, cut: Collection[str]) -> tuple[FinishReason, FinishReason]:
    """How a sampled pair's answers ended; `cut` are the ids of completions that the length limit cut off."""
    return ("length" if pair.first in cut else "stop", "length" if pair.second in cut else "stop")


class Asked(NamedTuple):
    """How one pair is asked about, beyond its ballots."""

    facts: Mapping[str, Any] = {}
    """`asked_as` of the job."""
    ends: tuple[FinishReason | None, FinishReason | None] = (None, None)
    """How the pair's answers ended; None where nobody knows."""
    cut_off_counts: bool = False
    """As the judge's settings say."""

    @classmethod
    def by(cls, job: Job, ends: tuple[FinishReason | None, FinishReason | None] = (None, None)) -> Asked:
        """As a job's judge asks."""
        return cls(asked_as(job), ends, job.judge.cut_off_counts)


class Panel(Record):
    """Which questions a pair's votes answered: what a threshold was found for."""

    hash: str
    judges: tuple[str, ...]
    templates: tuple[str, ...]
    constitutions: tuple[str, ...]
    parameters: tuple[str, ...]
    votes: int
    """Votes a pair, abstentions included."""
    asked_as: dict[str, Any] = Field(default_factory=dict)
    """How else they were asked: setting → value, those at their defaults left out (system prompt, ...)."""

    @classmethod
    def of(cls, ballots: Sequence[Ballot], facts: Mapping[str, Any] | None = None) -> Panel:
        """The panel of one pair's ballots, asked as `asked_as` says. Seeds and the pair itself don't count."""
        questions = sorted(_question(b) for b in ballots)
        return cls(
            hash=digest([questions, facts] if facts else questions),
            asked_as=dict(facts or {}),
            judges=tuple(sorted({b.judge for b in ballots})),
            templates=tuple(sorted({b.template for b in ballots})),
            constitutions=tuple(sorted({b.constitution for b in ballots})),
            parameters=tuple(sorted({b.parameters for b in ballots})),
            votes=len(ballots),
        )


class FittedMap(Record):
    """A logistic map (Platt 1999) from agreement and margin to P(the verdict is right)."""

    intercept: float
    agreement: float
    margin: float
    fitted_on: int
    """Labelled pairs that it was fitted on; none of them tested the threshold."""
    reported_on: int
    """Labelled pairs behind the next two, of neither of the other parts."""
    ece: float
    """Expected calibration error, ten bins of equal width."""
    brier: float
    """Mean squared error of the probability."""

    def __call__(self, agreement: float, margin: float) -> float:
        return sigmoid(self.intercept + self.agreement * agreement + self.margin * margin)


class Threshold(Record):
    """What one slice's labelled pairs allow."""

    accepted: bool
    threshold: float | None
    """Pairs that score at least this are kept; None when the judge can't be used on this slice."""
    pairs: int
    """Labelled pairs that tested it."""
    kept: int
    """Of them kept; when none was accepted, at the threshold where the test failed (0: never enough to test)."""
    errors: int
    """Of the kept ones labelled otherwise."""
    error_bound: float
    """Clopper-Pearson upper bound of the error among kept pairs, at level 1 - delta."""
    map: FittedMap | None = None
    panels: tuple[str, ...] = ()
    """Hashes of the panels that its pairs were asked; empty in older files."""


class Calibration(Record):
    """The calibration file."""

    schema_version: int = CALIBRATION_SCHEMA
    made: str
    """UTC, ISO 8601."""
    alpha: float
    delta: float
    score: ScoreKind
    slices: dict[str, Threshold]
    """Slice → threshold; `all` alone when no slices were named."""
    judge_kind: str
    models: tuple[str, ...]
    """As the judges named themselves in their votes."""
    panels: tuple[Panel, ...]
    aggregate: Literal["mean", "majority", "dawid_skene"]
    jurors: JurorFit | None = None
    """The juror weights that were calibrated; a filter uses these, and fits no others."""
    min_votes: int
    max_abstention_share: float
    guards: bool
    cut_off: Literal["keep", "drop"] | None = None
    """As `filters.cut_off`; None in older files, which had no such rule."""
    labelled: tuple[str, ...]
    """Names of the labelled files."""
    labelled_digest: str
    judged: JudgedStats | None = None
    """What its labelled pairs look like, for a run's alarms; None in older files."""

    @property
    def accepted(self) -> bool:
        """Some slice can be used."""
        return any(t.accepted for t in self.slices.values())

    def threshold_for(self, slice_name: str) -> Threshold | None:
        """What decides a slice's pairs; None for a slice that was not calibrated."""
        return self.slices.get(EVERYTHING if set(self.slices) == {EVERYTHING} else slice_name)

    def keeps(self, verdict: Verdict, slice_name: str = EVERYTHING) -> bool:
        """The verdict scores enough for its slice; a slice that was not calibrated keeps nothing."""
        found = self.threshold_for(slice_name)
        return found is not None and passes(verdict, found, self.score)

    def unknown_slices(self, categories: Iterable[str]) -> set[str]:
        """Of some categories those of which nothing can be kept: not calibrated, or without a threshold."""
        return {c for c in categories if (found := self.threshold_for(c)) is None or not found.accepted}

    def mismatch(
        self, votes: Sequence[Vote], settings: Filters, slice_name: str | None = None, asked: Asked | None = None
    ) -> str | None:
        """What about a pair's votes, how they were asked, or the filter is not what was calibrated for its slice; None
        when all of it is. Without a slice: for any of them; without `asked`: nobody knows how."""
        difference = self.panel_mismatch([v.ballot for v in votes], settings, slice_name, asked)
        unknown = {v.model for v in votes if v.outcome != "abstain"} - set(self.models)
        if difference is None and unknown:
            return f"the judge's model is {_listed(tuple(sorted(unknown)))}, calibrated was {_listed(self.models)}"
        return difference

    def asked_mismatch(self, asked: Asked) -> str | None:
        """What of how a job asks is not as it was calibrated."""
        facts = self.panels[0].asked_as if self.panels else {}
        for key in sorted({*facts, *asked.facts}):
            if facts.get(key) != asked.facts.get(key):
                return f"{key} is {_clipped(asked.facts, key)}, calibrated was {_clipped(facts, key)}"
        return None

    def cut_off_mismatch(self, cut_off_counts: bool) -> str | None:
        """Whether cut-off answers count for the judge, and none did beside an ended one among the labelled pairs."""
        if self.judged is None or self.judged.one_cut_off or not cut_off_counts:
            return None
        return (
            "an answer that the length limit cut off pays judge.missing_eos_penalty, and no labelled pair had one "
            f"beside one that ended (of {self.judged.answers} answers is known how they ended); say how the labelled "
            "ones ended (--map first_finish=COLUMN,second_finish=COLUMN), or set judge.missing_eos_penalty: 0"
        )

    def cut_off_dropped(self, cut_off_counts: bool) -> str | None:
        """What becomes of a run's cut-off answers, where no label covers them: known before one is sampled."""
        why = self.cut_off_mismatch(cut_off_counts)
        return f"pairs with one answer that is cut off will be dropped (uncalibrated): {why}" if why else None

    def ends_mismatch(self, asked: Asked) -> str | None:
        """The same for one pair, by how its answers ended."""
        return self.cut_off_mismatch(asked.cut_off_counts) if set(asked.ends) == {"stop", "length"} else None

    def panel_mismatch(
        self, ballots: Sequence[Ballot], settings: Filters, slice_name: str | None = None, asked: Asked | None = None
    ) -> str | None:
        """The same of the questions alone, before anybody was asked."""
        for name in ("aggregate", "min_votes", "max_abstention_share", "guards", "cut_off"):
            calibrated, found = getattr(self, name), getattr(settings, name)
            if calibrated not in (found, None):
                return f"filters.{name} is {found}, calibrated was {calibrated}"
        facts = self.panels[0].asked_as if self.panels else {}
        if asked is not None:
            if why := self.asked_mismatch(asked):
                return why
            if why := self.ends_mismatch(asked):
                return why
        panel = Panel.of(ballots, facts)
        if panel.hash not in {p.hash for p in self.panels}:
            nearest = self.panels[0]
            for field, name in _PARTS:
                calibrated, found = getattr(nearest, field), getattr(panel, field)
                if calibrated != found and not any(getattr(p, field) == found for p in self.panels):
                    return f"{name} {_listed(found)}, calibrated was {_listed(calibrated)}"
            return "other voices, orders or samples than were calibrated"
        found = None if slice_name is None else self.threshold_for(slice_name)
        if found is not None and found.panels and panel.hash not in found.panels:
            names = [name for name, t in self.slices.items() if panel.hash in t.panels]
            return f"slice {slice_name} was calibrated on other questions (these are of {_listed(tuple(names))})"
        return None


_PARTS = (
    ("judges", "the judge is"),
    ("constitutions", "the constitution is"),
    ("templates", "the template is"),
    ("parameters", "the judge's parameters are"),
    ("votes", "votes a pair are"),
)


def least_pairs(alpha: float, delta: float) -> int:
    """Kept pairs without which no threshold can pass: 22 at alpha = delta = 0.1."""
    return math.ceil(math.log(delta) / math.log1p(-alpha) - _ROUNDING)


def first_pairs(eligible: int, alpha: float, delta: float) -> int:
    """Kept pairs of the strictest threshold that is tried, of so many that can be kept at all."""
    return max(least_pairs(alpha, delta), math.ceil(START_SHARE * eligible - _ROUNDING))


def score_of(verdict: Verdict, kind: ScoreKind, fitted: FittedMap | None = None) -> float:
    """The score of label consistency, larger is surer; -inf for a verdict without a winner."""
    if verdict.outcome not in ("first", "second") or verdict.agreement is None or verdict.p_first is None:
        return -math.inf
    margin = abs(verdict.p_first - 0.5) * 2
    if kind == "fitted" and fitted is not None:
        value = fitted(verdict.agreement, margin)
    else:
        value = margin if kind == "margin" else verdict.agreement
    # Sums of the same votes in another order differ in the last bit, and ties have to be ties.
    return round(value, 9)


def passes(verdict: Verdict, threshold: Threshold, kind: ScoreKind) -> bool:
    """The verdict scores at least the threshold; never when there is none."""
    return threshold.threshold is not None and score_of(verdict, kind, threshold.map) >= threshold.threshold


def learn_threshold(scores: Any, errors: Any, alpha: float, delta: float) -> Threshold:
    """The loosest threshold that fixed-sequence testing accepts.

    Args:
        scores: [pairs]; -inf for a pair that is never kept.
        errors: [pairs], true where the verdict names the wrong side; not looked at where the score is -inf.
        alpha: largest error among kept pairs.
        delta: largest probability of accepting a larger one.

    Raises:
        ValueError: alpha or delta isn't inside (0, 1), or a score is NaN.
    """
    import numpy as np  # here, not above: `rlaif status` reads calibrations too, and numpy takes a while
    from scipy.special import bdtr, betaincinv

    if not (0 < alpha < 1 and 0 < delta < 1):
        raise ValueError(f"alpha and delta lie between 0 and 1, got {alpha} and {delta}")
    score = np.asarray(scores, dtype=float)
    if np.isnan(score).any():
        raise ValueError("a score is NaN")
    wrong = np.asarray(errors, dtype=bool)[score > -np.inf]
    pairs, score = len(score), score[score > -np.inf]
    by_score = np.argsort(-score, kind="stable")
    score, wrong_so_far = score[by_score], np.cumsum(wrong[by_score])
    # Ends of runs of equal scores: the pairs that a threshold keeps, for every threshold that exists.
    ends = np.flatnonzero(np.append(score[1:] != score[:-1], True)) if len(score) else np.array([], dtype=int)
    ends = ends[ends + 1 >= first_pairs(len(score), alpha, delta)]
    rejected = bdtr(wrong_so_far[ends], ends + 1, alpha) <= delta  # P(Bin(kept, alpha) <= errors)
    passed = len(ends) if rejected.all() else int(np.argmin(rejected))
    at = ends[max(passed - 1, 0)] if len(ends) else None
    kept, failed = (0, 0) if at is None else (int(at) + 1, int(wrong_so_far[at]))
    return Threshold(
        accepted=passed > 0,
        threshold=float(score[at]) if at is not None and passed > 0 else None,
        pairs=pairs,
        kept=kept,
        errors=failed,
        error_bound=1.0 if failed == kept else float(betaincinv(failed + 1, kept - failed, 1 - delta)),
    )


def calibrate_scores(
    verdicts: Sequence[Verdict],
    eligible: Sequence[bool],
    errors: Sequence[bool],
    alpha: float,
    delta: float,
    kind: ScoreKind = "agreement",
    seed: int = 0,
) -> Threshold:
    """One slice's threshold. `eligible` is false where another rule drops the pair: it is then never kept.

    `fitted` splits the pairs (seeded) in three: the map, its report, the test of the threshold (half of the pairs).

    Raises:
        UserError: too few pairs for a fitted map.
    """
    if kind != "fitted":
        scores = [score_of(v, kind) if ok else -math.inf for v, ok in zip(verdicts, eligible, strict=True)]
        return learn_threshold(scores, errors, alpha, delta)
    if len(verdicts) < FITTED_FROM:
        raise UserError(
            f"--score fitted needs {FITTED_FROM} labelled pairs in each slice, here are {len(verdicts)}; label more, "
            "or take --score agreement"
        )
    import numpy as np

    order = np.random.default_rng(seed).permutation(len(verdicts))
    quarter = len(verdicts) // 4
    part = {"fit": order[:quarter], "report": order[quarter : 2 * quarter], "test": order[2 * quarter :]}
    fitted = _fit(verdicts, eligible, errors, part["fit"], part["report"])
    scores = [score_of(verdicts[i], kind, fitted) if eligible[i] else -math.inf for i in part["test"]]
    found = learn_threshold(scores, [errors[i] for i in part["test"]], alpha, delta)
    return found.model_copy(update={"map": fitted})


def _fit(
    verdicts: Sequence[Verdict], eligible: Sequence[bool], errors: Sequence[bool], fit: Any, report: Any
) -> FittedMap:
    import numpy as np
    from sklearn.linear_model import LogisticRegression

    def rows(part: Any) -> tuple[Any, Any]:
        use = [i for i in part if eligible[i] and score_of(verdicts[i], "agreement") > -math.inf]
        features = [(score_of(verdicts[i], "agreement"), score_of(verdicts[i], "margin")) for i in use]
        return np.array(features).reshape(-1, 2), np.array([not errors[i] for i in use], dtype=bool)  # [n, 2], [n]

    x, right = rows(fit)
    if len(set(right.tolist())) < 2:
        # Nothing to tell apart: everything was right, or wrong. A constant, by the rule of succession.
        share = (right.sum() + 1) / (len(right) + 2)
        weights = {"intercept": math.log(share / (1 - share)), "agreement": 0.0, "margin": 0.0}
    else:
        model = LogisticRegression().fit(x, right)
        weights = dict(zip(("agreement", "margin"), model.coef_[0].tolist(), strict=True))
        weights["intercept"] = float(model.intercept_[0])
    weights = {name: round(value, 9) for name, value in weights.items()}
    fitted = FittedMap(**weights, fitted_on=len(x), reported_on=0, ece=0.0, brier=0.0)
    x, right = rows(report)
    p = np.array([fitted(*row) for row in x])
    return fitted.model_copy(
        update={
            "reported_on": len(x),
            "ece": expected_calibration_error(p, right),
            "brier": float(np.mean((p - right) ** 2)) if len(x) else 0.0,
        }
    )


def expected_calibration_error(p: Any, right: Any) -> float:
    """Mean gap between probability [n] and share right [n], over ten bins of equal width, by their counts."""
    import numpy as np

    if len(p) == 0:
        return 0.0
    bins = np.minimum((np.asarray(p) * _BINS).astype(int), _BINS - 1)
    gaps = [abs(np.sum(p[bins == b]) - np.sum(right[bins == b])) for b in range(_BINS)]
    return float(sum(gaps) / len(p))


def read_calibration(path: Path) -> Calibration:
    """A calibration file.

    Raises:
        UserError: it can't be read, or is none.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        why = e.strerror if isinstance(e, OSError) else e
        raise UserError(f"filters.calibration {path}: can't read it ({why}); `rlaif judge calibrate` makes one") from e
    return parse_calibration(text, str(path))


def parse_calibration(text: str, source: str) -> Calibration:
    """A calibration file's text; `source` names it in errors.

    Raises:
        UserError: it isn't a calibration file, or one of a newer version.
    """
    try:
        tree = json.loads(text)
        version = tree.get("schema_version") if isinstance(tree, Mapping) else None
        if version != CALIBRATION_SCHEMA:
            raise UserError(
                f"{source}: schema version {version}, expected {CALIBRATION_SCHEMA}; make the file again with "
                "`rlaif judge calibrate`"
            )
        found = Calibration.model_validate(tree)
        if len({p.constitutions for p in found.panels}) > 1 and any(
            t.accepted and not t.panels for t in found.slices.values()
        ):
            raise UserError(
                f"{source}: made over several constitutions by an older version, which didn't note the slices' own; "
                "make the file again with `rlaif judge calibrate`"
            )
        return found
    except json.JSONDecodeError as e:
        raise UserError(
            f"{source}:{e.lineno}: not a calibration file ({e.msg}); `rlaif judge calibrate` makes one"
        ) from e
    except ValidationError as e:
        raise UserError(f"{source}: {first_problem(e)}; make the file again with `rlaif judge calibrate`") from e


def judged_stats(
    decided: Sequence[tuple[Pair, Decision]],
    texts: Mapping[str, str],
    ends: Mapping[str, FinishReason | None],
    kept: int | None = None,
) -> JudgedStats | None:
    """What judged pairs look like; None without one. `texts` and `ends` go by completion id; `kept` None counts the
    decisions that keep."""
    if not decided:
        return None
    agreements = [d.verdict.agreement for _, d in decided if d.verdict.agreement is not None]
    sides = [i for pair, _ in decided for i in (pair.first, pair.second)]
    known = [end for i in sides if (end := ends.get(i)) is not None]
    words = {i: count_words(texts[i]) for i in set(sides)}  # most are sides of several pairs
    return JudgedStats(
        pairs=len(decided),
        kept=sum(d.status == "kept" for _, d in decided) if kept is None else kept,
        mean_agreement=fmean(agreements) if agreements else None,
        agreement_sd=pstdev(agreements) if agreements else None,
        agreeing=len(agreements),
        mean_words=fmean(words[i] for i in sides),
        answers=len(known),
        cut_off=known.count("length"),
        one_cut_off=sum({ends.get(p.first), ends.get(p.second)} == {"stop", "length"} for p, _ in decided),
    )


def panels_of(votes_by_pair: Mapping[str, Sequence[Vote]], facts: Mapping[str, Any] | None = None) -> tuple[Panel, ...]:
    """The different panels of some pairs, asked as `asked_as` says, the most frequent first."""
    panels = [Panel.of([v.ballot for v in votes], facts) for votes in votes_by_pair.values()]
    by_hash = {p.hash: p for p in panels}
    count = {h: sum(p.hash == h for p in panels) for h in by_hash}
    return tuple(sorted(by_hash.values(), key=lambda p: -count[p.hash]))


def _question(b: Ballot) -> list[str | int | bool]:
    return [b.judge, b.voice, b.template, b.order, b.sample_index, b.guard, b.constitution, b.parameters,
            *b.principles]  # fmt: skip


def _clipped(facts: Mapping[str, Any], key: str) -> str:
    """A setting's value on one line."""
    if key not in facts:
        return "at its default"
    said = " ".join(str(facts[key]).split())
    return said if len(said) <= _CLIPPED else f"{said[:_CLIPPED]}…"


def _listed(values: Any) -> str:
    return ", ".join(map(str, values)) if isinstance(values, tuple) else str(values)
