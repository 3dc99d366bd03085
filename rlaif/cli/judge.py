"""`rlaif judge`: how far can a judge be trusted (`bench`), and from which agreement on (`calibrate`)?"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

import typer

from rlaif.cli.judge_attack import attack
from rlaif.cli.judge_common import (
    DEFAULT_LABELLED,
    Dir,
    JobOption,
    Json,
    Set,
    calibration_of,
    job_of,
    loader,
    open_asked,
    told_what_is_kept,
)
from rlaif.console import stdout_console
from rlaif.errors import UserError

if TYPE_CHECKING:
    from rlaif.config import Job
    from rlaif.data.labelled import Labelled, LabelledSet
    from rlaif.data.recorded import Recorded
    from rlaif.judging.calibration import Calibration
    from rlaif.judging.verdicts import JurorFit
    from rlaif.records import Vote
    from rlaif.trust.bench import Judged, Promise, Redecide

_LEFT_OUT = {
    "tie": "labelled a tie",
    "disputed": "on which annotators disagree (only unanimous pairs have a better side; --annotators majority takes "
    "what more than half say)",
    "disputed by half": "on which no more than half of the annotators say the same",
    "without a vote": "labelled pairs without a vote",
}

app = typer.Typer(help="Measure a judge on labelled pairs.", no_args_is_help=True, rich_markup_mode=None)
app.command()(attack)

Files = Annotated[
    list[Path] | None, typer.Argument(help=f"Labelled pairs, JSON, JSONL, CSV or TSV; {DEFAULT_LABELLED} when absent.")
]
Map = Annotated[
    str | None,
    typer.Option("--map", metavar="KEY=COLUMN,...", help="Columns: id, prompt, first, second, label (several: a|b|c), "
                 "slice, first_finish and second_finish (how the answers ended); a field inside a column has a path: "
                 "label=results.0.winner. And what the label column calls the sides: first_is=0,second_is=1,tie_is=2, "
                 "none_is=3 for no label."),
]  # fmt: skip
AnnotatorsOption = Annotated[
    str, typer.Option("--annotators", help="Where several people labelled a pair: `unanimous`, or `majority`.")
]
By = Annotated[
    str | None, typer.Option("--by", metavar="COLUMN", help="The column that names slices; `file`: each file is one.")
]
SplitOption = Annotated[
    str | None, typer.Option(help="`dev` to tune on, `test` to report, `all`. `dev` where the file has splits.")
]
Where = Annotated[
    list[str] | None,
    typer.Option("--where", metavar="COLUMN=VALUE", help="Only these rows; a column given twice allows both values."),
]
Votes = Annotated[
    list[Path] | None,
    typer.Option("--votes", help="Recorded votes (CSV, JSON, JSONL, or a run's votes.jsonl) instead of a judge; may be "
                 "given several times. Without an id they are read in row order."),
]  # fmt: skip
VotesReversed = Annotated[
    Path | None,
    typer.Option("--votes-reversed", help="The same judge's votes with the answers shown the other way round, where "
                 "they are a file of their own. Its cells name slots, unless --votes-map says reversed=COLUMN."),
]  # fmt: skip
VotesMap = Annotated[
    str | None,
    typer.Option("--votes-map", metavar="KEY=COLUMN,...", help="Columns of --votes: id, set, judge, voice, label, "
                 "sample, order, forward, reversed, reversed_slots (the second order, not mapped back); and "
                 "what their cells call the sides: first_is=0,second_is=1,tie_is=2, none_is=3 for neither. A field "
                 "inside a column has a path: forward=results.0.winner."),
]  # fmt: skip
Jury = Annotated[bool, typer.Option("--jury", help="The judges of --votes vote together, instead of one by one.")]
Alpha = Annotated[float, typer.Option(help="Largest error among kept pairs.")]
Delta = Annotated[float, typer.Option(help="Largest probability of accepting a larger one.")]
Score = Annotated[
    str,
    typer.Option(help="What the threshold is on: `agreement`, `margin` of p(first), or `fitted` (100 pairs or more)."),
]
Seed = Annotated[int, typer.Option(help="Seed of random splits.")]


@dataclass(frozen=True)
class _Votes:
    """What both commands work on: labelled pairs and the votes of each judge on them."""

    job: Job
    labelled: LabelledSet
    rows: list[Labelled]
    by_judge: dict[str, list[Vote]]
    kind: str
    directory: Path
    recorded: Recorded | None = None
    annotators: str = "unanimous"

    @property
    def left_out(self) -> dict[str, int]:
        """What of the files is not in the report."""
        out: dict[str, int] = {str(why): n for why, n in self.labelled.excluded.items()}
        if self.annotators == "majority" and "disputed" in out:
            out["disputed by half"] = out.pop("disputed")
        if self.recorded is not None:
            out["without a vote"] = self.recorded.unvoted
            out["votes on unknown pairs"] = self.recorded.strangers
        return {why: n for why, n in out.items() if n}

    @property
    def notes(self) -> list[str]:
        """What else to know of how the files were read."""
        return [*self.labelled.notes, *(self.recorded.notes if self.recorded is not None else ())]

    def lines(self) -> list[str]:
        """How the files were read, and what was left out."""
        from rlaif.data.sides import cell_lines

        out = cell_lines(self.labelled.labels, "labels")
        if self.recorded is not None:
            out += cell_lines(self.recorded.cells, "recorded winners")
        out += self.notes
        if self.left_out:
            out.append("left out: " + ", ".join(f"{n} {_LEFT_OUT.get(why, why)}" for why, n in self.left_out.items()))
        out += [
            f"{judge}: no vote on {n} of {len(self.rows)} pairs; its figures are of the others"
            for judge, n in self.unvoted.items()
        ]
        return out

    @property
    def unvoted(self) -> dict[str, int]:
        """Judge → pairs that others voted on, and it did not."""
        voted = {judge: len({v.ballot.pair_id for v in votes}) for judge, votes in self.by_judge.items()}
        return {judge: missing for judge, n in voted.items() if (missing := len(self.rows) - n)}

    def judged(self, votes: list[Vote], calibration: Calibration | None = None) -> tuple[list[Judged], JurorFit | None]:
        """One judge's decisions, and its juror weights."""
        from rlaif.judging.calibration import Asked
        from rlaif.trust import bench

        weights = self._weights()
        jurors = bench.jurors_of(votes, self.job.filters, calibration)
        asked = Asked.by(self.job)
        return bench.decide_rows(self.rows, votes, self.job.filters, weights, calibration, jurors, asked), jurors

    @property
    def redecide(self) -> Redecide | None:
        """Decides pairs again with other juror weights, where the job's filter has such weights."""
        from rlaif.trust import bench

        if self.job.filters.aggregate != "dawid_skene":
            return None
        weights, filters = self._weights(), self.job.filters

        def again(judged: Sequence[Judged], jurors: JurorFit) -> list[Judged]:
            votes = [v for j in judged for v in j.votes]
            return bench.decide_rows([j.row for j in judged], votes, filters, weights, None, jurors)

        return again

    def _weights(self) -> Callable[[Labelled], dict[str, float]]:
        """A row's principle weights; recorded votes that name no principle have none."""
        load = loader(self.directory)
        default = self.job.constitution
        recorded = all(not v.ballot.principles for votes in self.by_judge.values() for v in votes)

        def weights(row: Labelled) -> dict[str, float]:
            reference = row.constitution or default
            return {} if recorded or reference is None else load(reference).weights

        return weights


@app.command()
def bench(
    labelled: Files = None,
    split: SplitOption = None,
    map_: Map = None,
    by: By = None,
    annotators: AnnotatorsOption = "unanimous",
    where: Where = None,
    votes: Votes = None,
    votes_reversed: VotesReversed = None,
    votes_map: VotesMap = None,
    jury: Jury = False,
    job: JobOption = None,
    set_: Set = None,
    directory: Dir = Path("constitutions"),
    splits: Annotated[
        int, typer.Option(min=0, help="Calibrate on a random half and measure on the other, so many times.")
    ] = 0,
    alpha: Alpha = 0.1,
    delta: Delta = 0.1,
    score: Score = "agreement",
    seed: Seed = 0,
    picture: Annotated[
        Path | None, typer.Option(help="Draw risk against coverage into this .png or .svg file.")
    ] = None,
    json_: Json = False,
) -> None:
    """Accuracy of a judge, or of recorded votes, on labelled pairs: by slice, before and after each filter."""
    from rlaif.trust import bench as judge_bench
    from rlaif.trust import report

    kind = _score_kind(score)
    _check_risk(alpha, delta)
    if picture is not None:
        report.check_picture(picture)
    found = _votes(labelled, split, map_, by, where, votes, votes_map, jury, job, set_, directory, True,
                   votes_reversed, annotators)  # fmt: skip
    calibration = calibration_of(found.job)
    uncalibrated = _uncalibrated(found, calibration)
    results, trials, pairs, jurors, checks, promised = [], [], [], {}, [], []
    for judge, mine in found.by_judge.items():
        judged, jurors[judge] = found.judged(mine, calibration)
        results += judge_bench.slices(judge, judged, found.job.judge)
        pairs += [(judge, j) for j in judged]
        if calibration is not None:
            promised += judge_bench.promises(judge, judged, calibration, lambda j: j.kept)
        if (fit := jurors[judge]) is not None:
            checks += judge_bench.check_jurors(judge, judged, fit)
        if splits:
            trials += judge_bench.split_trials(
                judge, judged, splits, alpha, delta, kind, seed, by is not None, found.redecide
            )
    if picture is not None:
        report.draw_risk_coverage(results, picture, alpha)
    if json_:
        typer.echo(
            json.dumps(
                {
                    "judge": found.job.judge.model_dump(mode="json") if not votes else {"votes": _named(votes)},
                    "filters": found.job.filters.model_dump(mode="json"),
                    "labelled_digest": found.labelled.digest,
                    "left_out": found.left_out,
                    "unvoted": found.unvoted,
                    "notes": found.notes,
                    "labels": [c.model_dump(mode="json") for c in found.labelled.labels],
                    "cells": [c.model_dump(mode="json") for c in found.recorded.cells] if found.recorded else [],
                    "slices": [s.model_dump(mode="json") for s in results],
                    "splits": [t.model_dump(mode="json") for t in trials],
                    "jurors": {judge: fit.model_dump(mode="json") for judge, fit in jurors.items() if fit},
                    "juror_checks": [c.model_dump(mode="json") | {"contradicted": c.contradicted} for c in checks],
                    "promises": [p.model_dump(mode="json") | {"broken": p.broken} for p in promised],
                    "pairs": [
                        {"judge": judge, "id": j.row.id, "slice": j.row.slice, "label": j.row.label,
                         "correct": j.correct, **j.decision.model_dump(mode="json")}
                        for judge, j in pairs
                    ],
                },
                indent=1,
            )
        )  # fmt: skip
        return
    console = stdout_console()
    title = (
        f"{_named(votes) if votes else found.job.judge.model} on {', '.join(dict.fromkeys(r.file for r in found.rows))}"
    )
    for table in report.tables(results, title):
        console.print(table)
    for line in [*found.lines(), *uncalibrated, *report.promise_lines(promised)]:
        console.print(line, markup=False, highlight=False)
    for judge, fit in jurors.items():
        if fit:
            its = [c for c in checks if c.judge == judge]
            for line in report.juror_lines(judge, fit, its):
                console.print(line, markup=False, highlight=False)
    if trials:
        console.print(report.trial_table(trials, alpha, delta))


@app.command()
def calibrate(
    to: Annotated[Path, typer.Option(help="The calibration file to write; a job names it as filters.calibration.")],
    labelled: Files = None,
    split: SplitOption = None,
    map_: Map = None,
    by: By = None,
    annotators: AnnotatorsOption = "unanimous",
    where: Where = None,
    votes: Votes = None,
    votes_reversed: VotesReversed = None,
    votes_map: VotesMap = None,
    jury: Jury = False,
    job: JobOption = None,
    set_: Set = None,
    directory: Dir = Path("constitutions"),
    alpha: Alpha = 0.1,
    delta: Delta = 0.1,
    score: Score = "agreement",
    seed: Seed = 0,
    json_: Json = False,
) -> None:
    """Find the threshold whose error among kept pairs is at most alpha, with probability 1 - delta.

    The promise is about pairs like the labelled ones. With --by, each slice has a threshold and a promise of its own.
    """
    from rlaif.judging.calibration import asked_as, cut_off_counts
    from rlaif.rundir.store import replacing
    from rlaif.trust import bench as judge_bench
    from rlaif.trust import report

    kind = _score_kind(score)
    _check_risk(alpha, delta)
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
    found = _votes(labelled, split, map_, by, where, votes, votes_map, jury, job, set_, directory, False,
                   votes_reversed, annotators)  # fmt: skip
    if len(found.by_judge) > 1:
        names = ", ".join(found.by_judge)
        raise UserError(
            f"{_named(votes or [])}: votes of several judges ({names}); choose one (--where judge=NAME), or add --jury"
        )
    ((_, mine),) = found.by_judge.items()
    judged, _ = found.judged(mine)
    calibration = judge_bench.calibrate(
        judged,
        found.job.filters,
        alpha,
        delta,
        kind,
        sliced=by is not None,
        judge_kind=found.kind,
        labelled=[path.name for path in _files(labelled)],
        labelled_digest=found.labelled.digest,
        made=datetime.now(UTC).isoformat(timespec="seconds"),
        seed=seed,
        redecide=found.redecide,
        facts=asked_as(found.job),
    )
    again = found.redecide(judged, calibration.jurors) if found.redecide and calibration.jurors else judged
    counts = cut_off_counts(found.job.judge) and not votes
    said = report.ends_lines(calibration, counts)
    said += report.mix_lines(judge_bench.promises("", again, calibration, lambda j: judge_bench.keeps(j, calibration)))
    if calibration.jurors:
        said += report.juror_lines("jury", calibration.jurors, judge_bench.check_jurors("", again, calibration.jurors))
    said += report.promise_lines(_of_earlier(found, mine))
    with replacing(to) as temporary:
        temporary.write_text(calibration.model_dump_json(indent=1) + "\n", encoding="utf-8")
    if json_:
        typer.echo(calibration.model_dump_json(indent=1))
        return
    for line in [*report.calibration_lines(calibration), *said, *found.lines()]:
        typer.echo(line)
    print(f"wrote {to}" + ("" if calibration.accepted else ": a filter with it keeps nothing"), file=sys.stderr)


def _votes(
    labelled: list[Path] | None,
    split: str | None,
    map_: str | None,
    by: str | None,
    where: list[str] | None,
    votes: list[Path] | None,
    votes_map: str | None,
    jury: bool,
    job: Path | None,
    set_: list[str] | None,
    directory: Path,
    filtered: bool,
    votes_reversed: Path | None,
    annotators: str,
) -> _Votes:
    """`filtered`: the job's calibration is to be used, not made."""
    from rlaif.data.labelled import parse_map, read_labelled
    from rlaif.data.recorded import join_recorded, narrow, parse_votes_map, parse_where, read_recorded
    from rlaif.trust import bench as judge_bench

    if split not in (None, "dev", "test", "all"):
        raise UserError(f"--split {split}: expected dev, test or all")
    if annotators not in ("unanimous", "majority"):
        raise UserError(f"--annotators {annotators}: expected unanimous or majority")
    if votes_reversed is not None and len(votes or ()) != 1:
        raise UserError("--votes-reversed: give the first order's votes as --votes, one file")
    settings = job_of(job, set_)
    conditions = parse_where(where or [])
    found = read_labelled(
        _files(labelled),
        parse_map(map_),
        cast("Literal['dev', 'test', 'all'] | None", split),
        by,
        cast("Literal['unanimous', 'majority']", annotators),
        conditions,
    )
    if votes:
        columns = parse_votes_map(votes_map)
        recorded = join_recorded(
            [
                read_recorded(
                    path, found.rows, columns, conditions, found.keys, found.counts, votes_reversed, len(votes) > 1
                )
                for path in votes
            ],
            found.rows,
        )
        by_judge = judge_bench.by_judge(recorded.votes, jury)
        return _Votes(settings, found, recorded.rows, by_judge, "recorded", directory, recorded, annotators)
    rows = judge_bench.as_judged(narrow(found.rows, conditions)[0], settings.policy)
    ask, count = open_asked(settings, rows, directory, calibration_of(settings) if filtered else None)
    with told_what_is_kept(settings), count.told():
        cast_now = judge_bench.cast_votes(
            rows, ask, loader(directory), settings.constitution, count, settings.policy.system_prompt
        )
    return _Votes(settings, found, rows, {settings.judge.model: cast_now}, settings.judge.kind, directory,
                  annotators=annotators)  # fmt: skip


def _of_earlier(found: _Votes, votes: list[Vote]) -> list[Promise]:
    """What the calibration that the job has already promised, on these labels; nothing where it has none."""
    from rlaif.trust import bench as judge_bench

    name = found.job.filters.calibration
    if name is None or not Path(name).is_file():
        return []  # the job names the file that is being made
    earlier = calibration_of(found.job)
    filters = found.job.filters.model_copy(update={"uncalibrated": "drop"})
    dropping = replace(found, job=found.job.model_copy(update={"filters": filters}))
    judged, _ = dropping.judged(votes, earlier)
    return judge_bench.promises(name, judged, earlier, lambda j: j.kept) if earlier else []


def _uncalibrated(found: _Votes, calibration: Calibration | None) -> list[str]:
    """Which slices the job's calibration knows nothing of.

    Raises:
        UserError: it knows none of them, and would keep nothing.
    """
    if calibration is None:
        return []
    slices = dict.fromkeys(r.slice for r in found.rows)
    unknown = [s for s in slices if calibration.threshold_for(s) is None]
    if not unknown:
        return []
    what = f"{found.job.filters.calibration} has thresholds for {', '.join(calibration.slices)}; none for"
    if len(unknown) == len(slices):
        raise UserError(f"filters.calibration: {what} {', '.join(unknown)}; name the slices' column with --by")
    return [f"all pairs of {', '.join(unknown)} are dropped (uncalibrated): {what} them"]


def _named(votes: list[Path]) -> str:
    return ", ".join(map(str, votes))


def _files(labelled: list[Path] | None) -> list[Path]:
    return labelled or [DEFAULT_LABELLED]


def _score_kind(score: str) -> Any:
    if score not in ("agreement", "margin", "fitted"):
        raise UserError(f"--score {score}: expected agreement, margin or fitted")
    return score


def _check_risk(alpha: float, delta: float) -> None:
    for name, value in (("alpha", alpha), ("delta", delta)):
        if not 0 < value < 1:
            raise UserError(f"--{name} {value:g}: expected a share between 0 and 1, for example 0.1")
