"""What `rlaif judge bench` and `calibrate` found, for people: tables, and the risk-coverage picture.

In: slices, trials, a calibration. Out: rich tables, and a PNG or SVG file.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlaif.console import inert
from rlaif.errors import UserError
from rlaif.judging.calibration import Calibration, least_pairs
from rlaif.judging.verdicts import LEAST_FIT, JurorFit
from rlaif.plotting import FORMATS, drawn
from rlaif.trust.bench import Cost, JurorCheck, Promise, Share, Slice, SplitTrial

_NUMBER_COLUMNS_FROM = 2
_TEXT_COLUMNS = ("after rule", "abstentions", "reason", "pair", "finish reason", "reply")
_REPLY_CHARACTERS = 160


def tables(results: Sequence[Slice], title: str) -> list[Any]:
    """The slices as rich tables: right and kept, rule by rule, voices, lengths and cost."""
    found = [
        _table(
            title,
            ("judge", "slice", "pairs", "votes right", "right", "95%", "kept", "95% ", "right when kept", "95%  "),
            [
                (s.judge, s.name, str(s.pairs), _share(s.vote_accuracy), *_both(s.verdict_accuracy), *_both(s.coverage),
                 *_both(s.kept_accuracy))
                for s in results
            ],
        ),
        _table(
            "rule by rule",
            ("judge", "slice", "after rule", "dropped", "kept", "right when kept", "95%"),
            [
                (s.judge, s.name, r.rule, str(r.dropped), _share(r.coverage), *_both(r.accuracy))
                for s in results
                for r in s.rules
            ],
        ),
        _table(
            "voices",
            ("judge", "slice", "order consistency", "95%", "first slot named", "95% ", "alpha", "95%  ",
             "abstentions"),
            [
                (s.judge, s.name, *_both(s.order_consistency), *_both(s.position_bias), _number(s.alpha),
                 _interval(s.alpha_interval),
                 " ".join(f"{reason}:{n}" for reason, n in sorted(s.abstentions.items())) or "-")
                for s in results
            ],
        ),
        _table(
            "abstentions: the first of each reason",
            ("judge", "slice", "reason", "votes", "pair", "finish reason", "reply"),
            [
                (s.judge, s.name, reason, str(s.abstentions.get(reason, 0)), f"{e.pair_id} {e.order}",
                 e.finish_reason or "-", _one_line(e.reply))
                for s in results
                for reason, e in sorted(s.examples.items())
            ],
        ),
        _table(
            "length and cost",
            ("judge", "slice", "longer is better", "equal", "judge names longer", "when kept", "calls", "tokens",
             "money", "seconds", "tokens a kept pair", "seconds a kept pair"),
            [
                (s.judge, s.name, _share(s.lengths.longer_is_better), str(s.lengths.equal),
                 _share(s.lengths.judge_names_longer), _share(s.lengths.judge_names_longer_kept),
                 _number(s.cost.calls, 0),
                 _number(_tokens(s.cost), 0), _number(s.cost.money, 4), _number(s.cost.seconds, 1),
                 _number(s.cost.tokens_per_kept_pair, 0),
                 _number(s.cost.seconds_per_kept_pair, 2))
                for s in results
            ],
        ),
    ]  # fmt: skip
    return [table for table in found if table.rows]


def trial_table(trials: Sequence[SplitTrial], alpha: float, delta: float) -> Any:
    """Calibrated on one half, measured on the other."""
    splits = trials[0].splits if trials else 0
    return _table(
        f"calibrated on a random half (alpha {alpha:g}, delta {delta:g}), measured on the other, {splits} splits",
        ("judge", "slice", "accepted", "95%", "kept, all splits", "kept when accepted", "error when kept",
         f"error over {alpha:g}", "95% ", "on the other half"),
        [
            (t.judge, t.name, *_both(t.accepted), _number(t.coverage), _number(t.coverage_when_accepted),
             _number(t.error), *_both(t.broken), _share(t.broken_other_half))
            for t in trials
        ],
    )  # fmt: skip


def calibration_lines(calibration: Calibration) -> list[str]:
    """One line a slice: the threshold and what stands behind it, or that the judge can't be used there."""
    a, d = calibration.alpha, calibration.delta
    out = []
    for name, t in calibration.slices.items():
        counted = f"{t.errors} wrong of {t.kept} kept ({t.pairs} pairs); error at most {t.error_bound:.3f}"
        if t.accepted:
            out.append(f"{name}: keep {calibration.score} >= {t.threshold:g}. {counted} at confidence {1 - d:g}")
        elif t.kept:
            out.append(f"{name}: this judge can't be used at alpha={a:g} on this slice. Strictest threshold: {counted}")
        else:
            out.append(
                f"{name}: this judge can't be used at alpha={a:g} on this slice. No threshold keeps the "
                f"{least_pairs(a, d)} pairs that a test needs ({t.pairs} pairs); label more"
            )
        if t.map:
            out.append(
                f"{name}: map fitted on {t.map.fitted_on} pairs; on {t.map.reported_on} others ECE "
                f"{t.map.ece:.3f}, Brier {t.map.brier:.3f}"
            )
    return out


def promise_lines(promises: Sequence[Promise]) -> list[str]:
    """One line for each set of pairs on which a calibration's promise can't be true."""
    return [
        f"{p.judge}, {p.name}: the calibration promised an error of at most {p.alpha:g} among kept pairs; it "
        f"{_found(p)}, which excludes it. These pairs are not like those that it was made from: calibrate on labels of "
        "pairs like these"
        for p in promises
        if p.broken
    ]


def mix_lines(promises: Sequence[Promise]) -> list[str]:
    """The same of the labelled pairs that made the calibration: a promise about a mix doesn't hold on each part."""
    return [
        f"slice {p.name}: the error among kept pairs {_found(p)}, over alpha={p.alpha:g}; the promise is about all "
        "slices together (--by gives each its own)"
        for p in promises
        if p.broken
    ]


def ends_lines(calibration: Calibration, cut_off_counts: bool) -> list[str]:
    """How the labelled answers ended, where it is known, and what that means for a run."""
    seen = calibration.judged
    if seen is None or (not seen.answers and not cut_off_counts):
        return []
    known = f"{seen.answers} of {2 * seen.pairs} labelled answers say how they ended"
    if not seen.answers:
        return [f"{known}; a run drops pairs with one cut-off answer, which nothing is known of (--map "
                "first_finish=COLUMN,second_finish=COLUMN)"]  # fmt: skip
    return [f"{known}: {seen.cut_off} were cut off, {seen.one_cut_off} of them beside one that ended"]


def _found(p: Promise) -> str:
    return f"is {_share(p.error)} of {p.kept} here (95 % {p.error.low:.3f}-{p.error.high:.3f})"


def juror_lines(judge: str, fit: JurorFit, checks: Sequence[JurorCheck]) -> list[str]:
    """A jury's weights, what stands behind them, and where the labels contradict them."""
    of = "labels of" if fit.source == "labels" else "votes on"
    how = f"from the {of} {fit.pairs} pairs" if fit.fitted else f"all the same, not fitted ({_why_not(fit)})"
    out = [f"juror weights ({judge}): " + ", ".join(f"{j} {w:.2f}" for j, w in fit.weights.items()) + f"; {how}"]
    if checks:
        out.append("alone they are right on: " + ", ".join(f"{c.juror} {_share(c.right)}" for c in checks))
        out.append("with the verdict agree: " + ", ".join(f"{c.juror} {_share(c.agreement)}" for c in checks))
    for c in checks:
        if c.contradicted:
            out.append(
                f"the labels contradict the weight {c.weight:.2f} of {c.juror}, which alone is right on "
                f"{_share(c.right)} of {c.right.of} pairs (95 % {c.right.low:.2f}-{c.right.high:.2f}): without labels "
                "the fit can believe the wrong camp; `rlaif judge calibrate` learns the weights from labels, "
                "filters.aggregate: mean has none"
            )
    return out


def _why_not(fit: JurorFit) -> str:
    if fit.pairs < LEAST_FIT:
        return f"{fit.pairs} pairs, fewer than {LEAST_FIT}"
    if fit.source == "labels":
        return "no juror is right more often than not"
    return "no more jurors are believed than contrary" if fit.confusions else "fewer than three jurors"


def _tokens(cost: Cost) -> int | None:
    if cost.prompt_tokens is None or cost.completion_tokens is None:
        return None
    return cost.prompt_tokens + cost.completion_tokens


def check_picture(path: Path) -> str:
    """The format that the picture's name asks for.

    Raises:
        UserError: none that can be drawn.
    """
    ending = path.suffix.lower().removeprefix(".")
    if ending not in FORMATS:
        raise UserError(f"--picture {path}: the name must end in {' or '.join(f'.{f}' for f in FORMATS)}")
    return ending


def draw_risk_coverage(results: Sequence[Slice], path: Path, alpha: float | None = None) -> None:
    """The risk-coverage curves as a picture; a dashed line at alpha where one is given.

    Raises:
        UserError: the name has another ending than .png or .svg, or the file can't be written.
    """
    ending = check_picture(path)
    try:
        with drawn(path, ending, (7, 4.5), 150) as (axis,):
            _draw_curves(axis, results, alpha)
    except OSError as e:
        raise UserError(f"--picture {path}: can't write it ({e.strerror or e})") from e


def _draw_curves(axis: Any, results: Sequence[Slice], alpha: float | None) -> None:
    for s in results:
        # A mark at each threshold that exists: between two of them nothing can be kept.
        axis.step(
            [p.coverage for p in s.risk], [p.error for p in s.risk], "o-", ms=3, lw=1, where="pre",
            label=f"{s.judge}, {s.name}",
        )  # fmt: skip
    if alpha is not None:
        axis.axhline(alpha, color="grey", ls="--", lw=1, label=f"error {alpha:g}")
    axis.set(
        xlabel="coverage (kept pairs, by agreement)", ylabel="error among kept pairs", xlim=(0, 1.02), ylim=(0, None)
    )
    axis.legend()


def _table(title: str, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> Any:
    from rich.table import Table

    out = Table(title=inert(title), title_justify="left")
    for n, heading in enumerate(headings):
        text = n < _NUMBER_COLUMNS_FROM or heading in _TEXT_COLUMNS
        out.add_column(heading, justify="left" if text else "right")
    for row in rows:
        # A reply may hold what would be markup, [[A]], and so may the name of a judge or a slice.
        out.add_row(*map(inert, row))
    return out


def _one_line(reply: str) -> str:
    """A reply's end, where a verdict stands, with its line breaks shown."""
    shown = reply.strip().replace("\r", "").replace("\n", "\\n")
    shown = "".join(c if c.isprintable() else f"\\u{ord(c):04x}" for c in shown)
    return f"…{shown[-_REPLY_CHARACTERS:]}" if len(shown) > _REPLY_CHARACTERS else shown or "(nothing)"


def _both(share: Share) -> tuple[str, str]:
    return _share(share), f"{share.low:.2f}-{share.high:.2f}"


def _interval(interval: tuple[float, float] | None) -> str:
    return "-" if interval is None else f"{interval[0]:.2f}-{interval[1]:.2f}"


def _share(share: Share) -> str:
    return _number(share.share)


def _number(value: float | None, digits: int = 3) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
