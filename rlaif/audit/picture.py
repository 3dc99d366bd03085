"""Pictures as files: a run's summary.png, and several runs over their iterations. Changes of text are marked."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from rlaif.audit.over_time import OverTime, measure_of
from rlaif.errors import UserError
from rlaif.plotting import FORMATS, Spread, draw_intervals, drawn
from rlaif.records import EvaluationMetrics, IterationMetrics
from rlaif.rundir.store import replacing

Iterations = Sequence[IterationMetrics]
Evaluations = Sequence[EvaluationMetrics]


def draw(iterations: Iterations, evaluations: Evaluations, path: Path) -> None:
    """Writes the picture."""
    with replacing(path) as temporary, drawn(temporary, "png", (10, 6.5), 110, (2, 2)) as panels:
        words, wins, kept, sane = panels
        _draw_words(words, iterations, evaluations)
        _draw_wins(wins, evaluations)
        _draw_kept(kept, iterations)
        _draw_sanity(sane, evaluations)
        for before, after in pairwise(iterations):
            if before.constitution.hash != after.constitution.hash:
                for axis in panels:
                    axis.axvline(after.iteration + 0.5, color="crimson", linestyle=":")
                words.text(after.iteration + 0.55, 1, f"→ {after.constitution}", color="crimson", fontsize=8)
        for axis in panels:
            axis.legend()


def _draw_words(axis: Any, iterations: Iterations, evaluations: Evaluations) -> None:
    # Sampled by the policy that the iteration started from, so one place to the left of its bars.
    sampled = [m.sampled.mean_words for m in iterations]
    axis.plot([m.iteration for m in iterations], sampled, "o-", alpha=0.4, label="sampled")
    axis.plot([e.updates for e in evaluations], [e.mean_words for e in evaluations], "s-", label="held out")
    axis.set(title="words an answer", ylim=(0, None))


def _draw_wins(axis: Any, evaluations: Evaluations) -> None:
    judged = [(e.updates, e.win_rate, e.win_interval) for e in evaluations if e.win_rate is not None and e.win_interval]
    draw_intervals(axis, judged, "win rate (95 %)")
    updates = [e.updates for e in evaluations]
    axis.plot(updates, [e.ended_share for e in evaluations], "^--", label="ends by itself")
    axis.plot(updates, [e.list_share for e in evaluations], "v--", label="lists")
    kept = [(e.updates, r.kept_share) for e in evaluations if (r := e.retention) and r.kept_share is not None]
    if kept:
        axis.plot([u for u, _ in kept], [k for _, k in kept], "d--", label="probes kept")
    axis.axhline(0.5, color="grey", linewidth=0.8)
    axis.set(title="held out: against the base policy", ylim=(0, 1))


def _draw_kept(axis: Any, iterations: Iterations) -> None:
    x = [m.iteration + 1 for m in iterations]
    axis.bar(x, [m.kept for m in iterations], label="kept")
    bottom = [float(m.kept) for m in iterations]
    for reason in sorted({r for m in iterations for r in m.dropped_by_first_reason}):
        counts = [m.dropped_by_first_reason.get(reason, 0) for m in iterations]
        axis.bar(x, counts, bottom=bottom, label=reason, alpha=0.6)
        bottom = [b + c for b, c in zip(bottom, counts, strict=True)]
    if any(m.review for m in iterations):
        axis.bar(x, [m.review for m in iterations], bottom=bottom, label="to review", hatch="//", alpha=0.6)
    axis.set(title="pairs: kept, and dropped by reason", xlabel="iteration")


def _draw_sanity(axis: Any, evaluations: Evaluations) -> None:
    updates = [e.updates for e in evaluations]
    axis.plot(updates, [e.relevance for e in evaluations], "o-", label="relevance (nat a token)")
    kl: list[Spread] = [
        (e.updates, e.kl_per_token, e.kl_interval or (e.kl_per_token, e.kl_per_token))
        for e in evaluations
        if e.kl_per_token is not None and not e.kl_by_older_version
    ]
    draw_intervals(axis, kl, "KL (nat a token, 95 %)")
    surprise = [-e.base_logprob_per_token for e in evaluations]
    axis.plot(updates, surprise, "^-", label="-log p under base (nat a token)")
    axis.set(title="sanity on held-out answers", xlabel="iteration", ylim=(0, None))


def draw_over_time(found: OverTime, path: Path) -> None:
    """Writes a panel for each measure: a line for each group's mean, a band between its lowest and its highest run.

    Raises:
        UserError: the file's name ends in no format that can be drawn.
    """
    file_format = path.suffix.removeprefix(".").lower()
    if file_format not in FORMATS:
        raise UserError(f"{path}: can't draw this; expected a name that ends in {' or '.join(FORMATS)}")
    rows = len(found.measures)
    texts: dict[int, list[str]] = {}
    for change in sorted({change for group in found.groups for change in group.changes}, key=lambda c: c.after):
        texts.setdefault(change.after, []).append(change.constitution)
    with replacing(path) as temporary, drawn(temporary, file_format, (8, 2.6 * rows), 110, (rows, 1)) as panels:
        for axis, name in zip(panels, found.measures, strict=True):
            for n, group in enumerate(found.groups):
                points = [(p.after, p.values[name]) for p in group.points if name in p.values]
                x = [after for after, _ in points]
                axis.plot(x, [s.mean for _, s in points], "o-", color=f"C{n}", label=group.name)
                if any(s.evaluations > 1 for _, s in points):
                    low, high = [s.low for _, s in points], [s.high for _, s in points]
                    axis.fill_between(x, low, high, color=f"C{n}", alpha=0.15, linewidth=0)
            for after in texts:
                axis.axvline(after, color="crimson", linestyle=":")
            axis.set(title=measure_of(name).says)
        for after, names in texts.items():
            where = panels[0].get_xaxis_transform()  # x in data, y as a share of the panel
            panels[0].text(after, 0.03, f" → {', '.join(names)}", color="crimson", fontsize=8, transform=where)
        panels[0].legend()
        panels[-1].set(xlabel="iterations" if found.axis == "start" else "iterations since the change of text")
