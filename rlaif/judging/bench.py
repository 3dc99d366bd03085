"""The judge against labelled pairs: how often is it right, before and after the filter, and on how many?

In: rows of a labelled JSONL file (prompts/judge_bench.jsonl), a judge and the job's filters. Out: one `Slice` per
principle and one for all. A pair is judged exactly as in a run: the deciding voices and the guards vote, the
votes are aggregated, the filter decides. A verdict that names no side counts as wrong.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

from pydantic import Field, ValidationError
from scipy.stats import binomtest

from rlaif.config import Filters
from rlaif.constitution import Constitution
from rlaif.errors import UserError
from rlaif.judging.ballots import make_ballots
from rlaif.judging.candidates import Candidate
from rlaif.judging.filters import decide
from rlaif.judging.verdicts import aggregate
from rlaif.records import Ballot, Decision, DropReason, FinishReason, Message, Pair, Record, Side, Vote

_SENTENCE_ENDS = tuple(".!?\"')”")


class Labelled(Record):
    """A pair whose better side is known."""

    id: str
    principle: str
    constitution: str
    """`name@version` of the text that the pair is judged under."""
    prompt: str
    first: str
    second: str
    label: Side
    split: Literal["dev", "test"]
    """`test` is for the number that is reported, never for tuning."""
    source: str

    def candidate(self, side: Side) -> Candidate:
        """One of the answers. The file has no finish reason: an answer that ends as a sentence ended by itself."""
        text = self.first if side == "first" else self.second
        finish: FinishReason = "stop" if text.rstrip().endswith(_SENTENCE_ENDS) else "length"
        return Candidate(
            completion_id=f"{self.id}-{side}",
            prompt_id=self.id,
            messages=(Message(role="user", content=self.prompt),),
            finish_reason=finish,
            text=text,
        )

    @property
    def pair(self) -> Pair:
        """The pair as a judge gets it, in the file's order."""
        return Pair(
            id=self.id, prompt_id=self.id, first=f"{self.id}-first", second=f"{self.id}-second", method="labelled"
        )


class Judged(Record):
    """A labelled pair and the filter's decision on it."""

    row: Labelled
    decision: Decision

    @property
    def correct(self) -> bool:
        """The votes name the labelled side, whatever the filter says."""
        return self.decision.verdict.outcome == self.row.label

    @property
    def kept(self) -> bool:
        """The filter kept the pair."""
        return self.decision.status == "kept"


class Slice(Record):
    """Accuracy on a set of labelled pairs, with Wilson 95 % intervals."""

    name: str
    pairs: int
    correct: int
    kept: int
    kept_correct: int
    accuracy: float | None
    accuracy_interval: tuple[float, float]
    coverage: float | None
    kept_accuracy: float | None
    kept_accuracy_interval: tuple[float, float]
    reasons: dict[DropReason, int] = Field(default_factory=dict)
    """How many pairs each rule spoke against."""


class Caster(Protocol):
    """What the bench needs of a judge."""

    def cast(
        self,
        ballots: Sequence[Ballot],
        pairs: Sequence[Pair],
        candidates: Sequence[Candidate],
        constitution: Constitution,
    ) -> Iterator[list[Vote]]:
        """Votes on the ballots, in chunks."""
        ...


def read_labelled(path: Path, split: Literal["dev", "test"] | None = None) -> list[Labelled]:
    """The labelled pairs of a file, or those of one split.

    Raises:
        UserError: the file can't be read, a row doesn't fit (with its line), or nothing is left.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"{path}: can't read the labelled pairs ({e})") from e
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            rows.append(Labelled.model_validate_json(line))
        except ValidationError as e:
            error = e.errors()[0]
            where = ".".join(str(p) for p in error["loc"]) or "row"
            raise UserError(f"{path}:{number}: {where}: {error['msg']}; prompts/README.md has the fields") from e
    duplicates = [id for id, n in Counter(r.id for r in rows).items() if n > 1]
    if duplicates:
        raise UserError(f"{path}: two rows have the id `{duplicates[0]}`; each needs its own")
    rows = [r for r in rows if split in (None, r.split)]
    if not rows:
        raise UserError(f"{path}: no labelled pairs" + (f" of split {split}" if split else ""))
    return rows


def judge_rows(
    rows: Sequence[Labelled],
    judge: Caster,
    load: Callable[[str], Constitution],
    filters: Filters,
    progress: Callable[[int], None] | None = None,
) -> list[Judged]:
    """Every row, judged under its constitution; `load` reads a constitution, `progress` gets numbers of new votes."""
    out: list[Judged] = []
    for reference in dict.fromkeys(r.constitution for r in rows):
        constitution = load(reference)
        mine = [r for r in rows if r.constitution == reference]
        pairs = [r.pair for r in mine]
        candidates = [r.candidate(side) for r in mine for side in ("first", "second")]
        texts = {c.completion_id: c.text for c in candidates}
        votes: dict[str, list[Vote]] = {p.id: [] for p in pairs}
        for chunk in judge.cast(make_ballots(pairs, constitution, "bench"), pairs, candidates, constitution):
            for vote in chunk:
                votes[vote.ballot.pair_id].append(vote)
            if progress:
                progress(len(chunk))
        out += [
            Judged(row=r, decision=decide(aggregate(votes[p.id], constitution.weights), p, filters, texts))
            for r, p in zip(mine, pairs, strict=True)
        ]
    return out


def slices(judged: Iterable[Judged]) -> list[Slice]:
    """One slice per principle, in order of appearance, then `all`."""
    rows = list(judged)
    names = dict.fromkeys(j.row.principle for j in rows)
    return [*(summarise(n, [j for j in rows if j.row.principle == n]) for n in names), summarise("all", rows)]


def summarise(name: str, judged: Sequence[Judged]) -> Slice:
    """Counts, shares and intervals of one set of judged pairs."""
    kept = [j for j in judged if j.kept]
    correct, kept_correct = sum(j.correct for j in judged), sum(j.correct for j in kept)
    return Slice(
        name=name,
        pairs=len(judged),
        correct=correct,
        kept=len(kept),
        kept_correct=kept_correct,
        accuracy=correct / len(judged) if judged else None,
        accuracy_interval=wilson(correct, len(judged)),
        coverage=len(kept) / len(judged) if judged else None,
        kept_accuracy=kept_correct / len(kept) if kept else None,
        kept_accuracy_interval=wilson(kept_correct, len(kept)),
        reasons=dict(Counter(reason for j in judged for reason in j.decision.reasons)),
    )


def wilson(successes: int, n: int) -> tuple[float, float]:
    """Wilson 95 % interval of a share (Wilson 1927); (0, 1) when nothing was counted."""
    if n == 0:
        return 0.0, 1.0
    interval = binomtest(successes, n).proportion_ci(0.95, "wilson")
    return float(interval.low), float(interval.high)


def table(results: Sequence[Slice], title: str) -> Any:
    """The slices as a rich table."""
    from rich.table import Table

    out = Table(title=title, title_justify="left")
    for heading in ("principle", "pairs", "right", "95%", "kept", "coverage", "right when kept", "95% ", "dropped by"):
        out.add_column(heading, justify="left" if heading in ("principle", "dropped by") else "right")
    for s in results:
        out.add_row(
            s.name,
            str(s.pairs),
            _share(s.accuracy),
            _interval(s.accuracy_interval),
            str(s.kept),
            _share(s.coverage),
            _share(s.kept_accuracy),
            _interval(s.kept_accuracy_interval),
            " ".join(f"{reason}:{n}" for reason, n in sorted(s.reasons.items())),
        )
    return out


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _interval(bounds: tuple[float, float]) -> str:
    return f"{bounds[0]:.2f}-{bounds[1]:.2f}"
