"""The options of `rlaif judge bench` and `calibrate`, in groups that both take: each group checks itself."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from rlaif.cli.judge_common import DEFAULT_LABELLED, job_of
from rlaif.errors import UserError

if TYPE_CHECKING:
    from rlaif.config import Job
    from rlaif.judging.calibration import ScoreKind

_PAIRS, _RECORDED, _JUDGE, _RISK = "Labelled pairs", "Recorded votes", "Judge and filters", "Calibration"


@dataclass(frozen=True)
class PairOptions:
    """Which labelled pairs, and how their files are read."""

    labelled: Annotated[
        list[Path] | None,
        typer.Argument(help=f"Labelled pairs, JSON, JSONL, CSV or TSV; {DEFAULT_LABELLED} when absent."),
    ] = None
    split: Annotated[
        str | None,
        typer.Option(
            help="`dev` to tune on, `test` to report, `all`. `dev` where the file has splits.", rich_help_panel=_PAIRS
        ),
    ] = None
    map_: Annotated[
        str | None,
        typer.Option(
            "--map",
            metavar="KEY=COLUMN,...",
            rich_help_panel=_PAIRS,
            help="Columns: id, prompt, first, second, label (several: a|b|c), "
            "slice, first_finish and second_finish (how the answers ended); a field inside a column has a "
            "path: label=results.0.winner. And what the label column calls the sides: "
            "first_is=0,second_is=1,tie_is=2, none_is=3 for no label.",
        ),
    ] = None
    by: Annotated[
        str | None,
        typer.Option(
            metavar="COLUMN", help="The column that names slices; `file`: each file is one.", rich_help_panel=_PAIRS
        ),
    ] = None
    annotators: Annotated[
        str,
        typer.Option(help="Where several people labelled a pair: `unanimous`, or `majority`.", rich_help_panel=_PAIRS),
    ] = "unanimous"
    where: Annotated[
        list[str] | None,
        typer.Option(
            metavar="COLUMN=VALUE",
            help="Only these rows; a column given twice allows both values.",
            rich_help_panel=_PAIRS,
        ),
    ] = None

    def __post_init__(self) -> None:
        if self.split not in (None, "dev", "test", "all"):
            raise UserError(f"--split {self.split}: expected dev, test or all")
        if self.annotators not in ("unanimous", "majority"):
            raise UserError(f"--annotators {self.annotators}: expected unanimous or majority")

    @property
    def files(self) -> list[Path]:
        """The files of labelled pairs."""
        return self.labelled or [DEFAULT_LABELLED]


@dataclass(frozen=True)
class RecordedOptions:
    """Votes that were cast elsewhere, instead of a judge."""

    votes: Annotated[
        list[Path] | None,
        typer.Option(
            help="Recorded votes (CSV, JSON, JSONL, or a run's votes.jsonl) instead of a judge; may be "
            "given several times. Without an id they are read in row order.",
            rich_help_panel=_RECORDED,
        ),
    ] = None
    votes_reversed: Annotated[
        Path | None,
        typer.Option(
            help="The same judge's votes with the answers shown the other way round, where "
            "they are a file of their own. Its cells name slots, unless --votes-map says reversed=COLUMN.",
            rich_help_panel=_RECORDED,
        ),
    ] = None
    votes_map: Annotated[
        str | None,
        typer.Option(
            metavar="KEY=COLUMN,...",
            rich_help_panel=_RECORDED,
            help="Columns of --votes: id, set, judge, voice, label, sample, order, forward, reversed, "
            "reversed_slots (the second order, not mapped back); and what their cells call the sides: "
            "first_is=0,second_is=1,tie_is=2, none_is=3 for neither. A field "
            "inside a column has a path: forward=results.0.winner.",
        ),
    ] = None
    jury: Annotated[
        bool,
        typer.Option(
            "--jury", help="The judges of --votes vote together, instead of one by one.", rich_help_panel=_RECORDED
        ),
    ] = False

    def __post_init__(self) -> None:
        if self.votes_reversed is not None and len(self.votes or ()) != 1:
            raise UserError("--votes-reversed: give the first order's votes as --votes, one file")

    @property
    def named(self) -> str:
        """The files, for people."""
        return ", ".join(map(str, self.votes or ()))


@dataclass(frozen=True)
class JudgeOptions:
    """The judge that is asked, and the filters that decide."""

    job: Annotated[
        Path | None, typer.Option(help="Take `judge` and `filters` from this job file.", rich_help_panel=_JUDGE)
    ] = None
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE", help="Override: --set filters.min_margin=0.1", rich_help_panel=_JUDGE
        ),
    ] = None
    directory: Annotated[
        Path, typer.Option("--dir", help="Folder that holds the constitutions.", rich_help_panel=_JUDGE)
    ] = Path("constitutions")

    def settings(self) -> Job:
        """The job that they describe."""
        return job_of(self.job, self.set_)


@dataclass(frozen=True)
class RiskOptions:
    """What a calibration promises, and on which score."""

    alpha: Annotated[float, typer.Option(help="Largest error among kept pairs.", rich_help_panel=_RISK)] = 0.1
    delta: Annotated[
        float, typer.Option(help="Largest probability of accepting a larger one.", rich_help_panel=_RISK)
    ] = 0.1
    score: Annotated[
        str,
        typer.Option(
            help="What the threshold is on: `agreement`, `margin` of p(first), or `fitted` (100 pairs or more).",
            rich_help_panel=_RISK,
        ),
    ] = "agreement"
    seed: Annotated[int, typer.Option(help="Seed of random splits.", rich_help_panel=_RISK)] = 0

    def __post_init__(self) -> None:
        if self.score not in ("agreement", "margin", "fitted"):
            raise UserError(f"--score {self.score}: expected agreement, margin or fitted")
        for name, value in (("alpha", self.alpha), ("delta", self.delta)):
            if not 0 < value < 1:
                raise UserError(f"--{name} {value:g}: expected a share between 0 and 1, for example 0.1")

    @property
    def kind(self) -> ScoreKind:
        """What the threshold is on."""
        return cast("ScoreKind", self.score)
