"""`rlaif judge`: how far can a judge be trusted (`bench`), and from which agreement on (`calibrate`)?"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rlaif.cli.judge_attack import attack
from rlaif.cli.judge_common import Json, calibration_of
from rlaif.cli.judge_options import JudgeOptions, PairOptions, RecordedOptions, RiskOptions
from rlaif.cli.judge_votes import PairsWithVotes, pairs_with_votes
from rlaif.cli.options import InSections, with_options
from rlaif.console import inert, stdout_console
from rlaif.errors import UserError

if TYPE_CHECKING:
    from rlaif.judging.calibration import Calibration
    from rlaif.judging.verdicts import JurorFit
    from rlaif.trust.bench import Judged, JurorCheck, Promise, Slice, SplitTrial

app = typer.Typer(help="Measure a judge on labelled pairs.", no_args_is_help=True, rich_markup_mode=None)
app.command()(attack)


@app.command(cls=InSections)
@with_options
def bench(
    pairs: PairOptions,
    recorded: RecordedOptions,
    judge: JudgeOptions,
    risk: RiskOptions,
    splits: Annotated[
        int, typer.Option(min=0, help="Calibrate on a random half and measure on the other, so many times.")
    ] = 0,
    picture: Annotated[
        Path | None, typer.Option(help="Draw risk against coverage into this .png or .svg file.")
    ] = None,
    json_: Json = False,
) -> None:
    """Accuracy of a judge, or of recorded votes, on labelled pairs: by slice, before and after each filter."""
    from rlaif.trust import report

    if picture is not None:
        report.check_picture(picture)
    found = pairs_with_votes(pairs, recorded, judge, calibrated=True)
    calibration = calibration_of(found.job)
    uncalibrated = found.uncalibrated(calibration)
    measured = _measure(found, calibration, risk, splits, sliced=pairs.by is not None)
    if picture is not None:
        report.draw_risk_coverage(measured.slices, picture, risk.alpha)
    if json_:
        whose = {"votes": recorded.named} if recorded.votes else found.job.judge.model_dump(mode="json")
        typer.echo(json.dumps({"judge": whose, **_for_programs(found, measured)}, indent=1))
        return
    files = ", ".join(dict.fromkeys(r.file for r in found.rows))
    title = f"{recorded.named or found.job.judge.model} on {files}"
    _print(measured, title, [*found.lines(), *uncalibrated, *report.promise_lines(measured.promises)], risk)


@dataclass
class _Measured:
    """All that the labels say, of every judge."""

    slices: list[Slice]
    pairs: list[tuple[str, Judged]]
    jurors: dict[str, JurorFit | None]
    checks: list[JurorCheck]
    promises: list[Promise]
    trials: list[SplitTrial]


def _measure(
    found: PairsWithVotes, calibration: Calibration | None, risk: RiskOptions, splits: int, *, sliced: bool
) -> _Measured:
    from rlaif.trust import bench as judge_bench

    out = _Measured([], [], {}, [], [], [])
    for judge, votes in found.by_judge.items():
        judged, fit = found.judged(votes, calibration)
        out.jurors[judge] = fit
        out.slices += judge_bench.slices(judge, judged, found.job.judge)
        out.pairs += [(judge, j) for j in judged]
        if calibration is not None:
            out.promises += judge_bench.promises(judge, judged, calibration, lambda j: j.kept)
        if fit is not None:
            out.checks += judge_bench.check_jurors(judge, judged, fit)
        if splits:
            out.trials += judge_bench.split_trials(
                judge, judged, splits, risk.alpha, risk.delta, risk.kind, risk.seed, sliced, found.redecide
            )
    return out


def _for_programs(found: PairsWithVotes, measured: _Measured) -> dict[str, Any]:
    return {
        "filters": found.job.filters.model_dump(mode="json"),
        "labelled_digest": found.labelled.digest,
        "left_out": found.left_out,
        "unvoted": found.unvoted,
        "notes": found.notes,
        "labels": [c.model_dump(mode="json") for c in found.labelled.labels],
        "cells": [c.model_dump(mode="json") for c in found.recorded.cells] if found.recorded else [],
        "slices": [s.model_dump(mode="json") for s in measured.slices],
        "splits": [t.model_dump(mode="json") for t in measured.trials],
        "jurors": {judge: fit.model_dump(mode="json") for judge, fit in measured.jurors.items() if fit},
        "juror_checks": [c.model_dump(mode="json") | {"contradicted": c.contradicted} for c in measured.checks],
        "promises": [p.model_dump(mode="json") | {"broken": p.broken} for p in measured.promises],
        "pairs": [
            {"judge": judge, "id": j.row.id, "slice": j.row.slice, "label": j.row.label, "correct": j.correct,
             **j.decision.model_dump(mode="json")}
            for judge, j in measured.pairs
        ],
    }  # fmt: skip


def _print(measured: _Measured, title: str, lines: list[str], risk: RiskOptions) -> None:
    from rlaif.trust import report

    console = stdout_console()
    for table in report.tables(measured.slices, title):
        console.print(table)
    for judge, fit in measured.jurors.items():
        if fit:
            lines += report.juror_lines(judge, fit, [c for c in measured.checks if c.judge == judge])
    for line in lines:
        console.print(inert(line))
    if measured.trials:
        console.print(report.trial_table(measured.trials, risk.alpha, risk.delta))


@app.command(cls=InSections)
@with_options
def calibrate(
    to: Annotated[Path, typer.Option(help="The calibration file to write; a job names it as filters.calibration.")],
    pairs: PairOptions,
    recorded: RecordedOptions,
    judge: JudgeOptions,
    risk: RiskOptions,
    json_: Json = False,
) -> None:
    """Find the threshold whose error among kept pairs is at most alpha, with probability 1 - delta.

    The promise is about pairs like the labelled ones. With --by, each slice has a threshold and a promise of its own.
    """
    from rlaif.judging.calibration import asked_as
    from rlaif.rundir.store import replacing
    from rlaif.trust import bench as judge_bench
    from rlaif.trust import report

    _check_target(to)
    found = pairs_with_votes(pairs, recorded, judge, calibrated=False)
    if len(found.by_judge) > 1:
        names = ", ".join(found.by_judge)
        raise UserError(
            f"{recorded.named}: votes of several judges ({names}); choose one (--where judge=NAME), or add --jury"
        )
    ((_, votes),) = found.by_judge.items()
    judged, _ = found.judged(votes)
    calibration = judge_bench.calibrate(
        judged,
        found.job.filters,
        risk.alpha,
        risk.delta,
        risk.kind,
        sliced=pairs.by is not None,
        judge_kind=found.kind,
        labelled=[path.name for path in pairs.files],
        labelled_digest=found.labelled.digest,
        made=datetime.now(UTC).isoformat(timespec="seconds"),
        seed=risk.seed,
        redecide=found.redecide,
        facts=asked_as(found.job),
    )
    said = _about(found, calibration, judged)
    said += report.promise_lines(found.promises_of_earlier(votes))
    with replacing(to) as temporary:
        temporary.write_text(calibration.model_dump_json(indent=1) + "\n", encoding="utf-8")
    if json_:
        typer.echo(calibration.model_dump_json(indent=1))
        return
    for line in [*report.calibration_lines(calibration), *said, *found.lines()]:
        typer.echo(line)
    print(f"wrote {to}" + ("" if calibration.accepted else ": a filter with it keeps nothing"), file=sys.stderr)


def _check_target(to: Path) -> None:
    """That the file can be written is known before an hour of votes."""
    if not to.parent.is_dir():
        raise UserError(f"--to {to}: there is no folder {to.parent}; make it first")
    if to.is_dir():
        raise UserError(f"--to {to}: this is a folder; name a file in it")
    temporary = to.with_name(to.name + ".partial")
    try:
        temporary.touch()
        temporary.unlink()
    except OSError as e:
        raise UserError(f"--to {to}: can't write to the folder {to.parent} ({e.strerror}); name another place") from e


def _about(found: PairsWithVotes, calibration: Calibration, judged: list[Judged]) -> list[str]:
    """What to know of a calibration beside its thresholds."""
    from rlaif.trust import bench as judge_bench
    from rlaif.trust import report

    jurors = calibration.jurors
    again = found.redecide(judged, jurors) if found.redecide and jurors else judged
    lines = report.ends_lines(calibration, found.job.judge.cut_off_counts and found.recorded is None)
    lines += report.mix_lines(judge_bench.promises("", again, calibration, lambda j: judge_bench.keeps(j, calibration)))
    if jurors:
        lines += report.juror_lines("jury", jurors, judge_bench.check_jurors("", again, jurors))
    return lines
