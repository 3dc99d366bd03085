"""What a run did, from its directory alone: status, the final table, the picture, answers before and after."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

from rlaif.console import inert, stdout_console
from rlaif.errors import UserError
from rlaif.records import Completion, ConstitutionRef, EvaluationMetrics, Event, IterationMetrics, Plan, Prompt, Record
from rlaif.review.queue import Queue
from rlaif.rundir.stages import NAMES
from rlaif.rundir.store import RunDir, read_record, read_rows, replacing, write_json

SHOWN_PROMPTS = 3


class Status(Record):
    """Where a run stands."""

    run: str
    iterations_done: int
    iterations: int
    current_iteration: int | None
    """The first that isn't done, from 0."""
    current_stage: str | None
    constitution: ConstitutionRef | None
    """Of the newest plan."""
    last_event: Event | None
    alarms: tuple[Event, ...]
    waiting_for_review: int


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


def status_of(run: RunDir) -> Status:
    """Where a run stands, also while it is being written."""
    done = [k for k in run.iterations() if (run.iteration(k).path / "metrics.json").exists()]
    current = next((k for k in run.iterations() if k not in done), None)
    events = run.events()
    text = None
    if run.iterations():
        plan = run.iteration(run.iterations()[-1]).path / "plan.json"
        text = read_record(plan, Plan).constitution if plan.exists() else None
    stage = None
    if current is not None:
        here = run.iteration(current)
        stage = next((s for s in NAMES if not here.is_complete(s)), "evaluate")
    return Status(
        run=str(run.path),
        iterations_done=len(done),
        iterations=run.header["job"]["iterations"],
        current_iteration=current,
        current_stage=stage,
        constitution=text,
        last_event=events[-1] if events else None,
        alarms=tuple(e for e in events if e.kind == "alarm"),
        waiting_for_review=Queue(run).waiting(),
    )


def status_table(run: RunDir) -> None:
    """Prints where a run stands."""
    status = status_of(run)
    console = stdout_console()
    console.print(f"[bold]{inert(status.run)}[/]  {status.iterations_done} of {status.iterations} iterations done")
    if status.current_iteration is not None:
        console.print(f"iteration {status.current_iteration + 1} is at stage {status.current_stage}")
    if status.constitution:
        console.print(f"text in force: {status.constitution} ({status.constitution.hash})")
    if event := status.last_event:
        console.print(f"last event: {event.kind} at {event.time}: {inert(event.message)}")
    for alarm in status.alarms:
        where = "" if alarm.iteration is None else f" in iteration {alarm.iteration + 1}"
        console.print(f"[red]alarm[/]{where}: {inert(alarm.message)}")
    if status.waiting_for_review:
        console.print(f"{status.waiting_for_review} pairs wait for a person: rlaif review {inert(status.run)}")
    if status.iterations_done < status.iterations:
        console.print(f"go on with: rlaif run {inert(status.run)}")


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
    draw(summary, run.path / "summary.png")
    return summary


def final_tables(run: RunDir, summary: Summary) -> None:
    """Prints the run: iterations, held-out evaluations, answers."""
    from rich.table import Table

    console = stdout_console()
    table = Table(title="iterations", title_justify="left")
    for column in (
        "iteration",
        "text",
        "pairs",
        "kept",
        "dropped",
        "loss",
        "words",
        "ended",
        "gap",
        "decoded",
        "seconds by stage",
    ):
        table.add_column(column, justify="left" if column in ("text", "dropped", "seconds by stage") else "right")
    for m in summary.iterations:
        seconds = {s: m.seconds[s] for s in ("completions", "scores", "votes", "updates")}
        table.add_row(
            str(m.iteration + 1),
            str(m.constitution),
            str(m.pairs),
            "-" if m.kept_share is None else f"{m.kept_share:.0%}",
            ", ".join(f"{r} {n}" for r, n in [*sorted(m.dropped_by_first_reason.items()), *_sent(m)]),
            "-" if m.loss is None else f"{m.loss:.3f}",
            f"{m.sampled.mean_words:.1f}",
            f"{m.sampled.ended_share:.0%}",
            "-" if m.weights_gap is None else f"{m.weights_gap.mean:.4f}",
            "-" if m.decoding_gap is None else f"{m.decoding_gap.mean:.4f}",
            "  ".join(
                f"{name} {seconds[stage]:.0f}"
                for name, stage in (
                    ("sample", "completions"),
                    ("score", "scores"),
                    ("judge", "votes"),
                    ("update", "updates"),
                )
            ),
        )
    console.print(table)
    table = Table(title="held-out answers, against the base policy's", title_justify="left")
    columns = (
        "after",
        "text",
        "win rate",
        "95%",
        "words",
        "lists",
        "ended",
        "KL/token",
        "relevance",
        "base logp",
        "seconds",
        "checks",
    )
    for column in columns:
        table.add_column(column, justify="left" if column in ("text", "checks") else "right")
    for e in summary.evaluations:
        base = e.updates == 0
        low, high = e.win_interval or (0, 1)
        table.add_row(
            "base" if base else str(e.updates),
            "" if base else str(e.constitution),
            "" if base else "-" if e.win_rate is None else f"{e.win_rate:.2f}",
            "" if base else "-" if e.win_rate is None else f"{low:.2f}-{high:.2f}",
            f"{e.mean_words:.1f}",
            f"{e.list_share:.0%}",
            f"{e.ended_share:.0%}",
            "-" if e.kl_per_token is None else f"{e.kl_per_token:.3f}",
            f"{e.relevance:.2f}",
            f"{e.base_logprob_per_token:.2f}",
            f"{e.seconds:.0f}",
            ", ".join(f"{name} {share:.0%}" for name, share in e.checks.items()),
        )
    console.print(table)
    for e in summary.evaluations:
        if e.updates and (line := kl_line(e)):
            console.print(f"after {e.updates}: {line}")
        if e.abstained:
            some = f"{e.abstained} of {e.answers} answers"
            console.print(f"after {e.updates}: the judge abstained on {some}; the win rate leaves them out")
    for row in summary.answers:
        console.print(f"\n[bold]{inert(row.prompt)}[/]")
        for updates, answer in row.answers.items():
            label = "base" if updates == 0 else f"after {updates}"
            console.print(f"  [dim]{label}:[/] {inert(' '.join((answer or '').split()))}")
    console.print(f"\npicture: {run.path / 'summary.png'}   the same for programs: {run.path / 'summary.json'}")


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


def _sent(metrics: IterationMetrics) -> list[tuple[str, int]]:
    """Pairs that went to review, where some did."""
    return [("to review", metrics.review)] if metrics.review else []


def draw(summary: Summary, path: Path) -> None:
    """The run in one picture: four panels over iterations, changes of text marked."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    iterations, evaluations = summary.iterations, summary.evaluations
    figure, axes = plt.subplots(2, 2, figsize=(10, 6.5), sharex=True, layout="constrained")
    x_iter = [m.iteration + 1 for m in iterations]
    x_eval = [e.updates for e in evaluations]

    words, wins, kept, sane = axes.flat
    # Sampled by the policy that the iteration started from, so one place to the left of its bars.
    words.plot(
        [m.iteration for m in iterations],
        [m.sampled.mean_words for m in iterations],
        "o-",
        alpha=0.4,
        label="sampled",
    )
    words.plot(x_eval, [e.mean_words for e in evaluations], "s-", label="held out")
    words.set(title="words an answer", ylim=(0, None))
    judged = [(e.updates, e.win_rate, e.win_interval) for e in evaluations if e.win_rate is not None and e.win_interval]
    middle = [rate for _, rate, _ in judged]
    errors = [[rate - low for _, rate, (low, _) in judged], [high - rate for _, rate, (_, high) in judged]]
    at = [updates for updates, _, _ in judged]
    wins.errorbar(at, middle, yerr=errors, fmt="s-", capsize=3, label="win rate (95 %)")
    wins.plot(x_eval, [e.ended_share for e in evaluations], "^--", label="ends by itself")
    wins.plot(x_eval, [e.list_share for e in evaluations], "v--", label="lists")
    wins.axhline(0.5, color="grey", linewidth=0.8)
    wins.set(title="held out: against the base policy", ylim=(0, 1))
    kept.bar(x_iter, [m.kept for m in iterations], label="kept")
    bottom = [float(m.kept) for m in iterations]
    for reason in sorted({r for m in iterations for r in m.dropped_by_first_reason}):
        counts = [m.dropped_by_first_reason.get(reason, 0) for m in iterations]
        kept.bar(x_iter, counts, bottom=bottom, label=reason, alpha=0.6)
        bottom = [b + c for b, c in zip(bottom, counts, strict=True)]
    if any(_sent(m) for m in iterations):
        kept.bar(x_iter, [m.review for m in iterations], bottom=bottom, label="to review", hatch="//", alpha=0.6)
    kept.set(title="pairs: kept, and dropped by reason", xlabel="iteration")
    sane.plot(x_eval, [e.relevance for e in evaluations], "o-", label="relevance (nat a token)")
    kl = [
        (e.updates, e.kl_per_token, e.kl_interval or (e.kl_per_token, e.kl_per_token))
        for e in evaluations
        if e.kl_per_token is not None and not e.kl_by_older_version
    ]
    errors = [[y - low for _, y, (low, _) in kl], [high - y for _, y, (_, high) in kl]]
    sane.errorbar(
        [x for x, _, _ in kl], [y for _, y, _ in kl], yerr=errors, fmt="s-", capsize=3, label="KL (nat a token, 95 %)"
    )
    surprise = [-e.base_logprob_per_token for e in evaluations]
    sane.plot(x_eval, surprise, "^-", label="-log p under base (nat a token)")
    sane.set(title="sanity on held-out answers", xlabel="iteration", ylim=(0, None))
    for before, after in pairwise(iterations):
        if before.constitution.hash != after.constitution.hash:
            for axis in axes.flat:
                axis.axvline(after.iteration + 0.5, color="crimson", linestyle=":")
            words.text(after.iteration + 0.55, 1, f"→ {after.constitution}", color="crimson", fontsize=8)
    for axis in axes.flat:
        axis.legend(fontsize=7)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
    plt.close(figure)
