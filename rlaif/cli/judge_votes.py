"""What `rlaif judge bench` and `calibrate` work on: labelled pairs, and votes on them, read or cast now."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast

from rlaif.cli.judge_common import calibration_of, loader, open_asked, told_what_is_kept
from rlaif.errors import UserError

if TYPE_CHECKING:
    from rlaif.cli.judge_options import JudgeOptions, PairOptions, RecordedOptions
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


@dataclass(frozen=True)
class PairsWithVotes:
    """Labelled pairs, and the votes of each judge on them."""

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

    def promises_of_earlier(self, votes: list[Vote]) -> list[Promise]:
        """What the calibration that the job has already promised, on these labels; nothing where it has none."""
        from rlaif.trust import bench

        name = self.job.filters.calibration
        if name is None or not Path(name).is_file():
            return []  # the job names the file that is being made
        earlier = calibration_of(self.job)
        filters = self.job.filters.model_copy(update={"uncalibrated": "drop"})
        dropping = replace(self, job=self.job.model_copy(update={"filters": filters}))
        judged, _ = dropping.judged(votes, earlier)
        return bench.promises(name, judged, earlier, lambda j: j.kept) if earlier else []

    def uncalibrated(self, calibration: Calibration | None) -> list[str]:
        """Which slices the job's calibration knows nothing of.

        Raises:
            UserError: it knows none of them, and would keep nothing.
        """
        if calibration is None:
            return []
        slices = dict.fromkeys(r.slice for r in self.rows)
        unknown = [s for s in slices if calibration.threshold_for(s) is None]
        if not unknown:
            return []
        what = f"{self.job.filters.calibration} has thresholds for {', '.join(calibration.slices)}; none for"
        if len(unknown) == len(slices):
            raise UserError(f"filters.calibration: {what} {', '.join(unknown)}; name the slices' column with --by")
        return [f"all pairs of {', '.join(unknown)} are dropped (uncalibrated): {what} them"]


def pairs_with_votes(
    pairs: PairOptions, recorded: RecordedOptions, judge: JudgeOptions, *, calibrated: bool
) -> PairsWithVotes:
    """Reads the pairs, and reads the votes on them or has the judge cast some.

    Args:
        calibrated: the job's calibration is to be used, not made.

    Raises:
        UserError: a file, a column, a setting or a text is missing or wrong; or the judge can't be asked.
    """
    from rlaif.data.labelled import parse_map, read_labelled
    from rlaif.data.recorded import parse_where

    job = judge.settings()
    conditions = parse_where(pairs.where or [])
    labelled = read_labelled(
        pairs.files,
        parse_map(pairs.map_),
        cast("Literal['dev', 'test', 'all'] | None", pairs.split),
        pairs.by,
        cast("Literal['unanimous', 'majority']", pairs.annotators),
        conditions,
    )
    made = (
        _read_votes(recorded, labelled, conditions, job, judge)
        if recorded.votes
        else _cast_votes(labelled, conditions, job, judge, calibrated)
    )
    return replace(made, annotators=pairs.annotators)


def _read_votes(
    options: RecordedOptions, labelled: LabelledSet, conditions: dict[str, set[str]], job: Job, judge: JudgeOptions
) -> PairsWithVotes:
    from rlaif.data.recorded import join_recorded, parse_votes_map, read_recorded
    from rlaif.trust.bench import by_judge

    files = options.votes or []
    columns = parse_votes_map(options.votes_map)
    recorded = join_recorded(
        [
            read_recorded(
                path, labelled.rows, columns, conditions, labelled.keys, labelled.counts, options.votes_reversed,
                len(files) > 1,
            )
            for path in files
        ],
        labelled.rows,
    )  # fmt: skip
    votes = by_judge(recorded.votes, options.jury)
    return PairsWithVotes(job, labelled, recorded.rows, votes, "recorded", judge.directory, recorded)


def _cast_votes(
    labelled: LabelledSet, conditions: dict[str, set[str]], job: Job, judge: JudgeOptions, calibrated: bool
) -> PairsWithVotes:
    from rlaif.data.recorded import narrow
    from rlaif.trust.bench import as_judged, cast_votes

    rows = as_judged(narrow(labelled.rows, conditions)[0], job.policy)
    ask, count = open_asked(job, rows, judge.directory, calibration_of(job) if calibrated else None)
    with told_what_is_kept(job), count.told():
        votes = cast_votes(rows, ask, loader(judge.directory), job.constitution, count, job.policy.system_prompt)
    return PairsWithVotes(job, labelled, rows, {job.judge.model: votes}, job.judge.kind, judge.directory)
