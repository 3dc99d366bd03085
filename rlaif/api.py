"""What a notebook wants: run a job, read a run, ask a judge.

In: a job, a run directory, or a constitution with two answers. Out: records (rlaif/records.py), data frames, data sets.
A thin way into the modules that the commands use; `import rlaif` offers all of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from rlaif.config import Job, parse_job
from rlaif.constitutions.constitution import Constitution, parse_constitution
from rlaif.constitutions.constitution import load_constitution as load_by_name
from rlaif.errors import UserError, cant_read
from rlaif.judging.candidates import Candidate
from rlaif.judging.filters import decide_votes
from rlaif.judging.verdicts import jurors_for
from rlaif.records import (
    Completion,
    Decision,
    EvaluationMetrics,
    FinishReason,
    IterationMetrics,
    Message,
    Outcome,
    Pair,
    Preference,
    Prompt,
    Record,
    UpdateStep,
    Vote,
)
from rlaif.rundir.store import RunDir, StageDir, read_record, read_rows

if TYPE_CHECKING:
    import datasets
    import pandas

    from rlaif.loop import Progress

R = TypeVar("R", bound=Record)
Rows = Literal["prompts", "completions", "pairs", "votes", "decisions", "preferences", "steps"]


def load_constitution(name: str | Path, folder: str | Path = "constitutions") -> Constitution:
    """A text by name (`assistant` is the newest version, `assistant@2` that one), or by its file.

    Raises:
        UserError: there is no such text, or it doesn't parse.

    >>> import rlaif
    >>> constitution = rlaif.load_constitution("assistant@1")
    >>> print(constitution.ref, [p.id for p in constitution.principles][0])
    assistant@1 answers
    """
    path = Path(name)
    if path.suffix in (".yaml", ".yml"):
        try:
            return parse_constitution(path.read_text(encoding="utf-8"), path.parent.name or path.stem, 0, str(path))
        except (OSError, UnicodeDecodeError) as e:
            raise cant_read(path, "the constitution", e) from e
    return load_by_name(folder, str(name))


def run(
    job: Job | str | Path,
    name: str | None = None,
    *,
    runs: str | Path = "runs",
    base_dir: str | Path = ".",
    progress: Progress | None = None,
    allow_change: bool = False,
) -> Run:
    """Runs a job to its end, or goes on with its run; says how far it is on stderr, as the command does.

    Args:
        job: a job, or the path of its file.
        name: of the run directory; the job's name, or its file's, when absent.
        runs: folder that holds the run directories.
        base_dir: what the files that the job names are relative to.
        progress: where the loop says what it is doing instead.
        allow_change: go on although settings changed that may.

    Raises:
        UserError: the job, a text, a prompt file or a model can't be used, or the run has no name.
        RunInterrupted: Ctrl-C; the same call goes on.

    >>> import rlaif
    >>> job = rlaif.load_job("jobs/quickstart.yaml", ["iterations=1"])
    >>> finished = rlaif.run(job, "first")  # doctest: +SKIP
    """
    from rlaif.cli.progress import make_progress
    from rlaif.config import load_job
    from rlaif.loop.launch import execute

    chosen = name
    if not isinstance(job, Job):
        path = Path(job)
        job = load_job(path)
        chosen = chosen or job.name or path.stem
    chosen = chosen or job.name
    if not chosen:
        raise UserError("the run needs a name: rlaif.run(job, 'NAME'), or set `name` in the job")
    with make_progress(job.iterations) if progress is None else nullcontext(progress) as told:
        return Run(execute(job, Path(runs) / chosen, Path(base_dir), told, allow_change))


def open_run(path: str | Path) -> Run:
    """Opens a run, finished or under way, to read it.

    Raises:
        UserError: no run is there, or a newer rlaif wrote it.

    >>> import rlaif
    >>> rlaif.open_run("runs/quickstart").job.policy.model
    'embedded:smollm2-135m-instruct'
    """
    return Run(RunDir.open(Path(path)))


class Run:
    """A run's log. Rows come as records, in the order of the log, one iteration after the other.

    >>> import rlaif
    >>> run = rlaif.open_run("runs/quickstart")
    >>> vote = next(run.votes(iteration=0))
    >>> vote.outcome in ("first", "second", "tie", "abstain")
    True
    """

    def __init__(self, directory: RunDir) -> None:
        self._dir = directory

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r})"

    @property
    def path(self) -> Path:
        """The run directory."""
        return self._dir.path

    @property
    def job(self) -> Job:
        """The job, defaults included."""
        return self._dir.job()

    @property
    def iterations(self) -> list[IterationMetrics]:
        """The finished iterations in numbers.

        >>> import rlaif
        >>> rlaif.open_run("runs/quickstart").iterations[0].sampled.answers > 0
        True
        """
        paths = (self._dir.iteration(k).path / "metrics.json" for k in self._dir.iterations())
        return [read_record(p, IterationMetrics) for p in paths if p.exists()]

    @property
    def evaluations(self) -> list[EvaluationMetrics]:
        """The finished evaluations in numbers; the first is the base policy's.

        >>> import rlaif
        >>> rlaif.open_run("runs/quickstart").evaluations[0].updates
        0
        """
        paths = (self._dir.evaluation(k).path / "metrics.json" for k in self._dir.evaluations())
        return [read_record(p, EvaluationMetrics) for p in paths if p.exists()]

    def policy(self, updates: int | None = None) -> Path:
        """The folder of the policy after so many iterations; the newest one when absent.

        Raises:
            UserError: there is none, or its weights weren't kept.

        >>> import rlaif
        >>> rlaif.open_run("runs/quickstart").policy().name
        'policy'
        """
        from rlaif.export import policy_path

        return policy_path(self._dir, updates)[1]

    def branch(self, name: str, at: int, overrides: Sequence[str] = (), *, new_optimizer: bool = False) -> Run:
        """A run beside this one that goes on from here after `at` iterations, with other settings (docs/runs.md).

        Args:
            name: of the new run's folder.
            at: how many iterations of this run are its past.
            overrides: settings that are to be others from there on, as `a.b=value`.
            new_optimizer: go on from the policy alone, where the learner's state of then isn't kept.

        Raises:
            UserError: there is no such state, a setting may not change, or there is a run of that name.

        >>> import rlaif
        >>> warmer = rlaif.open_run("runs/quickstart").branch("warmer", 2, ["learner.beta=0.2"])  # doctest: +SKIP
        >>> rlaif.run(warmer.job, "warmer", runs=warmer.path.parent)  # doctest: +SKIP
        Run('runs/warmer')
        """
        from rlaif.loop.branch import branch

        return Run(branch(self._dir, at, name, overrides, new_optimizer))

    def prompts(self, held_out: bool = False) -> Iterator[Prompt]:
        """What the policy is asked: the prompts that train, or the held-out ones."""
        yield from read_rows(self.path / "prompts" / f"{'held_out' if held_out else 'train'}.jsonl", Prompt)

    def completions(self, iteration: int | None = None, held_out: bool = False) -> Iterator[Completion]:
        """Sampled answers; of one iteration (from 0), or of all. `held_out` gives those of the evaluations instead,
        then `iteration` is the number of updates before."""
        return self._rows("completions", Completion, iteration, held_out)

    def pairs(self, iteration: int | None = None, held_out: bool = False) -> Iterator[Pair]:
        """Pairs of completions that were judged."""
        return self._rows("pairs", Pair, iteration, held_out)

    def votes(self, iteration: int | None = None, held_out: bool = False) -> Iterator[Vote]:
        """Every answer of the judge."""
        return self._rows("votes", Vote, iteration, held_out)

    def decisions(self, iteration: int | None = None, held_out: bool = False) -> Iterator[Decision]:
        """Which pairs were kept, dropped or sent to review, and why."""
        return self._rows("decisions", Decision, iteration, held_out)

    def preferences(self, iteration: int | None = None) -> Iterator[Preference]:
        """What was trained on."""
        return self._rows("preferences", Preference, iteration)

    def steps(self, iteration: int | None = None) -> Iterator[UpdateStep]:
        """Optimizer steps."""
        return self._rows("updates", UpdateStep, iteration)

    def frame(self, rows: Rows, iteration: int | None = None, held_out: bool = False) -> pandas.DataFrame:
        """Those rows as a data frame, a column for each field; nested ones are named by their path (`ballot.voice`).

        Raises:
            UserError: pandas isn't installed.

        >>> import rlaif
        >>> votes = rlaif.open_run("runs/quickstart").frame("votes")
        >>> set(votes["outcome"]) <= {"first", "second", "tie", "abstain"}
        True
        """
        try:
            import pandas
        except ImportError as e:
            raise UserError("this needs pandas: pip install pandas") from e
        return pandas.json_normalize([row.model_dump() for row in self._called(rows, iteration, held_out)])

    def dataset(self, rows: Rows, iteration: int | None = None, held_out: bool = False) -> datasets.Dataset:
        """Those rows as a `datasets.Dataset`. For a set that TRL's trainers take as it is: `rlaif audit RUN export`.

        Raises:
            UserError: datasets isn't installed.

        >>> import rlaif
        >>> rlaif.open_run("runs/quickstart").dataset("decisions").column_names[:2]
        ['pair_id', 'status']
        """
        try:
            import datasets
        except ImportError as e:
            raise UserError("this needs datasets: pip install datasets") from e
        return datasets.Dataset.from_list([row.model_dump() for row in self._called(rows, iteration, held_out)])

    def _called(self, rows: Rows, iteration: int | None, held_out: bool) -> Iterator[Record]:
        if rows == "prompts":
            return self.prompts(held_out)
        if rows in ("preferences", "steps"):
            return self.preferences(iteration) if rows == "preferences" else self.steps(iteration)
        if rows not in ("completions", "pairs", "votes", "decisions"):
            raise UserError(f"{rows!r}: no rows are called so; there are {', '.join(Rows.__args__)}")  # type: ignore[attr-defined]
        found: Iterator[Record] = getattr(self, rows)(iteration, held_out)
        return found

    def _rows(self, stage: str, record: type[R], iteration: int | None, held_out: bool = False) -> Iterator[R]:
        numbers = self._dir.evaluations() if held_out else self._dir.iterations()
        folder = self._dir.evaluation if held_out else self._dir.iteration
        if iteration is not None and iteration not in numbers:
            raise UserError(f"{self.path}: has no {'evaluation' if held_out else 'iteration'} {iteration}")
        for number in numbers if iteration is None else [iteration]:
            here: StageDir = folder(number)
            if here.is_complete(stage):
                yield from here.read(stage, record)


class Opinion(Record):
    """What a judge says of two answers."""

    outcome: Outcome
    """`first` or `second` is better, or `tie`; `abstain`: no vote could be read."""
    p_first: float | None
    """How sure, from 0 (the second) to 1 (the first); None without a valid vote."""
    decision: Decision
    """What the job's filters would do with the pair, and why."""
    votes: tuple[Vote, ...]
    """Everything that was asked and answered."""


class Judge:
    """A judge that reads a constitution, opened once and asked as often as wanted.

    Args:
        constitution: a text, its name (`assistant@2`), or its file.
        folder: where texts are looked up by name.
        base_dir: what `templates_dir` is relative to.
        filters: settings of the job's `filters`.
        settings: settings of the job's `judge`; the embedded likelihood judge when there are none.

    Raises:
        UserError: a setting is wrong, the text can't be asked about by this judge, or a model, template or key is
            missing.

    >>> import rlaif
    >>> judge = rlaif.Judge("assistant@1")  # doctest: +SKIP
    >>> judge("What is the capital of France?", "Paris.", "Well, let me see. France is old ...").outcome
    ... # doctest: +SKIP
    'first'

    A judge behind a server:

    >>> judge = rlaif.Judge("assistant@1", kind="chat", model="qwen3", base_url="http://127.0.0.1:8000/v1",
    ...                     api_key_env=None)  # doctest: +SKIP
    """

    def __init__(
        self,
        constitution: Constitution | str | Path,
        *,
        folder: str | Path = "constitutions",
        base_dir: str | Path = ".",
        filters: Mapping[str, Any] | None = None,
        **settings: Any,
    ) -> None:
        from rlaif.judging.opened import open_with_ballots

        if not isinstance(constitution, Constitution):
            constitution = load_constitution(constitution, folder)
        self.constitution = constitution
        tree = {"constitution": "any", "judge": settings, "filters": dict(filters or {})}
        self._job = parse_job(tree, "rlaif.Judge")
        self._opened = open_with_ballots(self._job, [self.constitution], Path(base_dir), lambda message: None)

    def close(self) -> None:
        """Ends what was started for this judge (`serve`); else that ends with this process."""
        self._opened.close()

    def __call__(
        self,
        prompt: str | Sequence[Mapping[str, str]],
        first: str,
        second: str,
        *,
        finish_reasons: tuple[FinishReason | None, FinishReason | None] = (None, None),
    ) -> Opinion:
        """Which of two answers follows the constitution better?

        Args:
            prompt: what they answer: text, or chat messages (`role`, `content`).
            first, second: the answers.
            finish_reasons: how they ended, where it is known: `stop`, or `length` for one that was cut off.
        """
        chat = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        messages = tuple(Message.model_validate(dict(m)) for m in chat)
        texts = {"first": first, "second": second}
        candidates = [
            Candidate(completion_id=side, prompt_id="prompt", messages=messages, finish_reason=end, text=texts[side])
            for side, end in zip(texts, finish_reasons, strict=True)
        ]
        pair = Pair(id="pair", prompt_id="prompt", first="first", second="second", method="asked")
        votes = [vote for chunk in self._opened.ask([pair], candidates, self.constitution) for vote in chunk]
        filters = self._job.filters
        jurors = jurors_for(filters.aggregate, votes, None)
        cut = {side for side, end in zip(texts, finish_reasons, strict=True) if end == "length"}
        made = decide_votes(pair, votes, filters, texts, self.constitution.weights, jurors, cut=cut)
        return Opinion(outcome=made.verdict.outcome, p_first=made.verdict.p_first, decision=made, votes=tuple(votes))
