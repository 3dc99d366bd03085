"""What a run did, from its directory alone: status, the final table, the picture, answers before and after."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pydantic import Field

from rlaif.audit.disk import Disk, disk_of, in_words
from rlaif.audit.picture import draw
from rlaif.console import counted, inert, stdout_console
from rlaif.errors import UserError
from rlaif.records import (
    LENGTH_UNKNOWN,
    AgainstBase,
    Completion,
    ConstitutionRef,
    EvaluationMetrics,
    Event,
    IterationMetrics,
    Parent,
    Plan,
    Prompt,
    Record,
    Retention,
)
from rlaif.review.queue import Queue
from rlaif.rundir.stages import ITERATION
from rlaif.rundir.store import RunDir, StageDir, read_record, read_rows, write_json

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from rlaif.audit.overview import EvaluationRow

SHOWN_PROMPTS = 3
_NOT_SET = "not set"
"""What people read for null."""


class Status(Record):
    """Where a run stands."""

    run: str
    iterations_done: int
    iterations: int
    current_iteration: int | None
    """The first that isn't done, from 0."""
    current_stage: str | None
    """Of `rlaif.rundir.stages`, or `evaluate`; `old_pairs` while these are judged again, too. The first that isn't
    complete: where an iteration is streamed, those of `at_once` are under way beside it."""
    at_once: tuple[str, ...] = ()
    """Later stages of it that hold rows already."""
    ahead: dict[int, str] = Field(default_factory=dict)
    """Iterations after it that are sampled and judged meanwhile (`pipeline.staleness`) → the stage that each is at."""
    constitution: ConstitutionRef | None
    """Of the newest plan."""
    last_event: Event | None
    alarms: tuple[Event, ...]
    waiting_for_review: int
    parent: Parent | None = None
    """The run that it went on from, where it is a branch."""
    at_work: bool = False
    """Whether a process writes the run now."""
    disk: Disk | None = None
    """None where nobody asked for it."""

    @property
    def at(self) -> str | None:
        """Where the first iteration is that isn't done, in words; None where all are."""
        if self.current_iteration is None:
            return None
        beside = f", with {' and '.join(self.at_once)} under way" if self.at_once else ""
        here = f"iteration {self.current_iteration + 1} is at stage {self.current_stage}{beside}"
        return "; ".join([here, *(f"iteration {k + 1}, ahead, at {stage}" for k, stage in self.ahead.items())])


class HeldOut(Record):
    """A held-out prompt and its answers, by the updates behind them."""

    prompt: str
    answers: dict[int, str | None]


class Summary(Record):
    """What summary.json holds: every iteration and every evaluation in numbers, and some answers."""

    run: str
    iterations: tuple[IterationMetrics, ...]
    evaluations: tuple[EvaluationMetrics, ...]
    answers: tuple[HeldOut, ...]


def status_of(run: RunDir, disk: bool = False) -> Status:
    """Where a run stands, also while it is being written; with `disk`, what it takes there."""
    done = run.done()
    current = next((k for k in run.iterations() if k not in done), None)
    events = run.events()
    text = None
    if run.iterations():
        plan = run.iteration(run.iterations()[-1]).path / "plan.json"
        text = read_record(plan, Plan).in_force.constitution if plan.exists() else None
    stage: str | None = None
    at_once: tuple[str, ...] = ()
    if current is not None:
        here = run.iteration(current)
        stage = _stage_of(here)
        at_once = tuple(s.name for s in ITERATION if s.name != stage and here.has_begun_rows(s.name))
    return Status(
        run=str(run.path),
        iterations_done=len(done),
        iterations=run.header["job"]["iterations"],
        current_iteration=current,
        current_stage=stage,
        at_once=at_once,
        ahead={k: _stage_of(run.iteration(k)) for k in run.iterations() if current is not None and k > current},
        constitution=text,
        last_event=events[-1] if events else None,
        alarms=tuple(e for e in events if e.kind == "alarm"),
        waiting_for_review=Queue(run).waiting(),
        parent=run.parent,
        at_work=run.is_held(),
        disk=disk_of(run) if disk else None,
    )


def _stage_of(here: StageDir) -> str:
    """The stage that an iteration is at. One that only some iterations have is named from its beginning on."""
    for stage in ITERATION:
        if here.is_complete(stage.name):
            continue
        # What is asked about old pairs has a file of its own, and is made for the next stage alone.
        if stage.name == "old_pairs" and here.is_complete("rejudged_votes"):
            return stage.name
        if not stage.optional or here.is_begun(stage.name):
            return "old_pairs" if stage.name == "rejudged_votes" else stage.name
    return "evaluate"


def status_table(run: RunDir) -> None:
    """Prints where a run stands."""
    status = status_of(run, disk=True)
    console = stdout_console()
    console.print(f"[bold]{inert(status.run)}[/]  {status.iterations_done} of {status.iterations} iterations done")
    if status.parent:
        console.print(f"goes on from {inert(status.parent.run)} after {counted(status.parent.iterations, 'iteration')}")
    if status.at:
        console.print(status.at)
    if status.constitution:
        console.print(f"text in force: {inert(str(status.constitution))} ({status.constitution.hash})")
    if event := status.last_event:
        console.print(f"last event: {event.kind} at {event.time}: {inert(event.message)}")
    for alarm in status.alarms:
        where = "" if alarm.iteration is None else f" in iteration {alarm.iteration + 1}"
        console.print(f"[red]alarm[/]{where}: {inert(alarm.message)}")
    if status.waiting_for_review:
        wait = "pair waits" if status.waiting_for_review == 1 else "pairs wait"
        console.print(f"{status.waiting_for_review} {wait} for a person: rlaif review {inert(status.run)}")
    if status.disk:
        _print_disk(console, status.disk, status.iterations)
    if status.at_work:
        console.print("a process is at work on it now; Ctrl-C there stops it, and nothing is lost")
    elif status.iterations_done < status.iterations:
        console.print(f"go on with: rlaif run {inert(status.run)}")


def _print_disk(console: Console, disk: Disk, iterations: int) -> None:
    """Prints what a run takes on the disk, and what its checkpoints would by choice."""
    shared = f", {in_words(disk.shared)} of it shared with other runs" if disk.shared else ""
    policies = counted(disk.policies, "policy", "policies")
    states = counted(disk.states, "learner's state")
    console.print(
        f"disk: {in_words(disk.bytes)}{shared}; {policies} {in_words(disk.policy_bytes)}, "
        f"{states} {in_words(disk.state_bytes)}"
    )
    if disk.costs:
        said = {cost.keep: _NOT_SET if cost.keep == "null" else cost.keep for cost in disk.costs}
        listed = ", ".join(f"{said[cost.keep]} {in_words(cost.bytes)}" for cost in disk.costs)
        after = counted(iterations, "iteration")
        console.print(f"checkpoints after {after}, by keep_checkpoints ({said[disk.keep]} here): {listed}")


def summarise(run: RunDir) -> Summary:
    """Every iteration's and every evaluation's metrics, one after another."""
    iterations = [p for k in run.iterations() if (p := run.iteration(k).path / "metrics.json").exists()]
    evaluations = [p for k in run.evaluations() if (p := run.evaluation(k).path / "metrics.json").exists()]
    return Summary(
        run=str(run.path),
        iterations=tuple(read_record(p, IterationMetrics) for p in iterations),
        evaluations=tuple(read_record(p, EvaluationMetrics) for p in evaluations),
        answers=held_out_answers(run),
    )


def held_out_answers(run: RunDir) -> tuple[HeldOut, ...]:
    """The first held-out prompts with their answers at every evaluation."""
    updates = [k for k in run.evaluations() if run.evaluation(k).is_complete("completions")]
    prompts = read_rows(run.path / "prompts" / "held_out.jsonl", Prompt)[:SHOWN_PROMPTS]
    answers = {
        k: {c.prompt_id: c.text for c in reversed(run.evaluation(k).read("completions", Completion))} for k in updates
    }
    shown = [p for p in prompts if any(p.id in answers[k] for k in updates)]  # eval.prompts may be fewer
    return tuple(HeldOut(prompt=p.text, answers={k: answers[k].get(p.id) for k in updates}) for p in shown)


def write_summary(run: RunDir) -> Summary:
    """Writes summary.json and summary.png into the run, and returns what the JSON holds."""
    summary = summarise(run)
    if not summary.iterations:
        raise UserError(f"{run.path}: no iteration is finished yet; `rlaif status {run.path}` says where it stands")
    write_json(run.path / "summary.json", summary.model_dump(mode="json"))
    draw(summary.iterations, summary.evaluations, run.path / "summary.png")
    return summary


def final_tables(run: RunDir, summary: Summary) -> None:
    """Prints the run: iterations, held-out evaluations, answers."""
    console = stdout_console()
    console.print(_iterations(summary.iterations))
    console.print(_evaluations(summary.evaluations))
    for m in summary.iterations:
        if m.stopped_at_kl is not None:
            kl = f"{m.stopped_at_kl:.4f} nats a token"
            console.print(f"iteration {m.iteration + 1}: the update stopped after {m.steps} steps, at a KL of {kl}")
    for e in summary.evaluations:
        for by_others in filter(None, (length_line(e), deciding_line(e), reference_line(e))):
            console.print(f"after {e.updates}: {by_others}")
        if e.updates and (line := kl_line(e)):
            console.print(f"after {e.updates}: {line}")
        for line in retention_lines(e.retention) if e.updates else ():
            console.print(f"after {e.updates}: {inert(line)}")
        if e.abstained:
            some = f"{e.abstained} of {e.answers} answers"
            console.print(f"after {e.updates}: the judge abstained on {some}; the win rate leaves them out")
    for row in summary.answers:
        console.print(f"\n[bold]{inert(row.prompt)}[/]")
        for updates, answer in row.answers.items():
            label = "base" if updates == 0 else f"after {updates}"
            console.print(f"  [dim]{label}:[/] {inert(' '.join((answer or '').split()))}")
    picture, numbers = (inert(str(run.path / f"summary.{ending}")) for ending in ("png", "json"))
    console.print(f"\npicture: {picture}   the same for programs: {numbers}")


def _iterations(iterations: Sequence[IterationMetrics]) -> Table:
    """Every iteration's numbers, a row each."""
    table = _table(
        "iterations",
        ("iteration", "text", "pairs", "kept", "dropped", "loss", "words", "ended", "gap", "decoded",
         "seconds by stage"),
        ("text", "dropped", "seconds by stage"),
    )  # fmt: skip
    for m in iterations:
        stages = {"sample": "completions", "score": "scores", "judge": "votes", "update": "updates"}
        table.add_row(
            str(m.iteration + 1),
            inert(str(m.constitution)),
            str(m.pairs),
            "-" if m.kept_share is None else f"{m.kept_share:.0%}",
            ", ".join(f"{r} {n}" for r, n in [*sorted(m.dropped_by_first_reason.items()), *_sent(m)]),
            _number(m.loss, 3),
            f"{m.sampled.mean_words:.1f}",
            f"{m.sampled.ended_share:.0%}",
            _number(m.weights_gap.mean if m.weights_gap else None, 4),
            _number(m.decoding_gap.mean if m.decoding_gap else None, 4),
            "  ".join(
                [f"{name} {m.seconds[stage]:.0f}" for name, stage in stages.items()]
                + ([f"whole {m.wall_s:.0f}"] if m.wall_s is not None else [])
            ),
        )
    return table


def _evaluations(evaluations: Sequence[EvaluationMetrics]) -> Table:
    """Every evaluation's numbers, a row each; the base policy has no win rate against itself."""
    table = _table(
        "held-out answers, against the base policy's",
        ("after", "text", "win rate", "95%", "words", "lists", "ended", "KL/token", "relevance", "base logp", "seconds",
         "checks"),
        ("text", "checks"),
    )  # fmt: skip
    for e in evaluations:
        base = e.updates == 0
        low, high = e.win_interval or (0, 1)
        table.add_row(
            "base" if base else str(e.updates),
            "" if base else inert(str(e.constitution)),
            "" if base else _number(e.win_rate, 2),
            "" if base else "-" if e.win_rate is None else f"{low:.2f}-{high:.2f}",
            f"{e.mean_words:.1f}",
            f"{e.list_share:.0%}",
            f"{e.ended_share:.0%}",
            _number(e.kl_per_token, 3),
            f"{e.relevance:.2f}",
            f"{e.base_logprob_per_token:.2f}",
            f"{e.seconds:.0f}",
            inert(", ".join(f"{name} {share:.0%}" for name, share in e.checks.items())),
        )
    return table


def _table(title: str, columns: Sequence[str], left: Sequence[str]) -> Table:
    """An empty table, numbers on the right of their columns."""
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column, justify="left" if column in left else "right")
    return table


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def length_line(e: EvaluationMetrics | EvaluationRow) -> str | None:
    """An evaluation's length-controlled win rate in words, or why there is none; None in runs without it."""
    if e.length_controlled_win_rate is not None and e.length_controlled_interval is not None:
        low, high = e.length_controlled_interval
        return f"win rate at equal length {e.length_controlled_win_rate:.2f} ({low:.2f}-{high:.2f})"
    if e.length_controlled_unknown is not None:
        return f"win rate at equal length unknown: {LENGTH_UNKNOWN[e.length_controlled_unknown]}"
    return None


def reference_line(e: EvaluationMetrics | EvaluationRow) -> str | None:
    """What the reference judge says of an evaluation, in words; None without one."""
    if e.referred is None:
        return None
    if e.referred.win_rate is None:
        return f"the reference judge {inert(e.referred.judge)} has no verdict on any answer"
    return _by("the reference judge", e.referred)


def deciding_line(e: EvaluationMetrics | EvaluationRow) -> str | None:
    """What the voices that decide which pairs train say of an evaluation, in words; None where they weren't asked."""
    return _by("the voices that train", e.deciding) if e.deciding else None


def _by(whom: str, said: AgainstBase) -> str:
    if said.win_rate is None or said.win_interval is None:
        return f"win rate by {whom} unknown: no verdict on any answer"
    low, high = said.win_interval
    return f"win rate by {whom} {said.win_rate:.2f} ({low:.2f}-{high:.2f})"


def kl_line(e: EvaluationMetrics) -> str | None:
    """An evaluation's KL with its intervals, in words; None where there is nothing to add to the number."""
    if e.kl_by_older_version:
        return "KL/token is the estimate of an older version, off by temperature and top-p, even in its sign"
    if e.kl_per_token is None or not e.kl_answers:
        return None

    def of(value: float | None, interval: tuple[float, float] | None, digits: int) -> str:
        within = f" ({interval[0]:.{digits}f}-{interval[1]:.{digits}f})" if interval else ""
        return f"{value:.{digits}f}{within}"

    return (
        f"KL from the base policy {of(e.kl_per_token, e.kl_interval, 3)} nats a token, "
        f"{of(e.kl_per_completion, e.kl_per_completion_interval, 2)} an answer (95%, {e.kl_answers} answers)"
    )


def retention_lines(found: Retention | None) -> list[str]:
    """What was kept of the base policy's abilities, in words; empty where it isn't measured."""
    if found is None:
        return []
    probes, within = found.probes, ""
    if found.kept_interval is not None:
        low, high = found.kept_interval
        within = f", {found.kept_share or 0:.0%} ({low:.0%}-{high:.0%})"
    by_kind = ", ".join(f"{kind} {n.kept}/{n.base_passed}" for kind, n in found.by_kind.items() if n.base_passed)
    lines = [
        f"probes kept: {probes.kept} of the {probes.base_passed} that the base policy passed{within}; "
        f"{probes.gained} of the others gained" + (f"\n  {by_kind}" if by_kind else "")
    ]
    if found.perplexity is not None and found.perplexity_ratio is not None:
        low, high = found.perplexity_ratio_interval or (found.perplexity_ratio,) * 2
        lines.append(
            f"perplexity of fixed texts {found.perplexity:.1f}, {found.perplexity_ratio:.3f} times the base policy's "
            f"({low:.3f}-{high:.3f})"
        )
    for earlier in found.earlier.values():
        if earlier.win_rate is None or earlier.win_interval is None:
            lines.append(f"win rate under {earlier.constitution} unknown: the judge abstained on all answers")
        else:
            low, high = earlier.win_interval
            lines.append(f"win rate under {earlier.constitution} {earlier.win_rate:.2f} ({low:.2f}-{high:.2f})")
    return lines


def _sent(metrics: IterationMetrics) -> list[tuple[str, int]]:
    """Pairs that went to review, where some did."""
    return [("to review", metrics.review)] if metrics.review else []
