"""What a run did, from its directory alone: status, the final table, the picture, answers before and after."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from rlaif.console import stdout_console
from rlaif.errors import UserError
from rlaif.records import Completion, Prompt
from rlaif.review.queue import Queue
from rlaif.store import RunDir, read_json, read_rows, write_json

STAGES = ("completions", "scores", "pairs", "votes", "decisions", "preferences", "updates")
SHOWN_PROMPTS = 3


def status_values(run: RunDir) -> dict[str, Any]:
    """Where a run stands, for programs."""
    job = run.header["job"]
    done = [k for k in run.iterations() if (run.iteration(k).path / "metrics.json").exists()]
    current = next((k for k in run.iterations() if k not in done), None)
    events = run.events()
    text = None
    if run.iterations():
        plan = run.iteration(run.iterations()[-1]).path / "plan.json"
        text = read_json(plan)["constitution"] if plan.exists() else None
    stage = None
    if current is not None:
        here = run.iteration(current)
        stage = next((s for s in STAGES if not here.is_complete(s)), "evaluate")
    return {
        "run": str(run.path),
        "iterations_done": len(done),
        "iterations": job["iterations"],
        "current_iteration": current,
        "current_stage": stage,
        "constitution": text,
        "last_event": events[-1].model_dump() if events else None,
        "alarms": [e.model_dump() for e in events if e.kind == "alarm"],
        "waiting_for_review": Queue(run).counts().waiting,
    }


def status_table(run: RunDir) -> None:
    """Prints where a run stands."""
    values = status_values(run)
    console = stdout_console()
    console.print(
        f"[bold]{escape(values['run'])}[/]  {values['iterations_done']} of {values['iterations']} iterations done"
    )
    if values["current_iteration"] is not None:
        console.print(f"iteration {values['current_iteration'] + 1} is at stage {values['current_stage']}")
    if values["constitution"]:
        text = values["constitution"]
        console.print(f"text in force: {text['name']}@{text['version']} ({text['hash']})")
    if values["last_event"]:
        event = values["last_event"]
        console.print(f"last event: {event['kind']} at {event['time']}: {escape(event['message'])}")
    for alarm in values["alarms"]:
        console.print(f"[red]alarm[/] in iteration {alarm['iteration']}: {escape(alarm['message'])}")
    if values["waiting_for_review"]:
        console.print(f"{values['waiting_for_review']} pairs wait for a person: rlaif review {escape(str(run.path))}")
    if values["iterations_done"] < values["iterations"]:
        console.print(f"go on with: rlaif run {values['run']}")


def summarise(run: RunDir) -> dict[str, Any]:
    """Every iteration's and every evaluation's metrics, one after another."""
    iterations = [read_json(p) for k in run.iterations() if (p := run.iteration(k).path / "metrics.json").exists()]
    evaluations = [read_json(p) for k in run.evaluations() if (p := run.evaluation(k).path / "metrics.json").exists()]
    return {"run": str(run.path), "iterations": iterations, "evaluations": evaluations, "answers": _answers(run)}


def _answers(run: RunDir) -> list[dict[str, Any]]:
    """The first held-out prompts with their answers at every evaluation."""
    updates = [k for k in run.evaluations() if run.evaluation(k).is_complete("completions")]
    prompts = read_rows(run.path / "prompts" / "held_out.jsonl", Prompt)[:SHOWN_PROMPTS]
    answers = {
        k: {c.prompt_id: c.text for c in reversed(run.evaluation(k).read("completions", Completion))} for k in updates
    }
    return [{"prompt": p.text, "answers": {k: answers[k].get(p.id) for k in updates}} for p in prompts]


def write_summary(run: RunDir) -> dict[str, Any]:
    """Writes summary.json and summary.png into the run, and returns what the JSON holds."""
    summary = summarise(run)
    if not summary["iterations"]:
        raise UserError(f"{run.path}: no iteration is finished yet; `rlaif status {run.path}` says where it stands")
    write_json(run.path / "summary.json", summary)
    draw(summary, run.path / "summary.png")
    return summary


def final_tables(run: RunDir, summary: dict[str, Any]) -> None:
    """Prints the run: iterations, held-out evaluations, answers."""
    console = stdout_console()
    table = Table(title="iterations", title_justify="left")
    for column in ("iteration", "text", "pairs", "kept", "dropped", "loss", "words", "ended", "seconds by stage"):
        table.add_column(column, justify="left" if column in ("text", "dropped", "seconds by stage") else "right")
    for m in summary["iterations"]:
        seconds = {s: m["seconds"][s] for s in ("completions", "scores", "votes", "updates")}
        table.add_row(
            str(m["iteration"] + 1),
            _text(m),
            str(m["pairs"]),
            "-" if m["kept_share"] is None else f"{m['kept_share']:.0%}",
            ", ".join(f"{r} {n}" for r, n in [*sorted(m["dropped_by_first_reason"].items()), *_sent(m)]),
            "-" if m["loss"] is None else f"{m['loss']:.3f}",
            f"{m['sampled']['mean_words']:.1f}",
            f"{m['sampled']['ended_share']:.0%}",
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
    for e in summary["evaluations"]:
        base = e["updates"] == 0
        low, high = e["win_interval"] or (0, 1)
        table.add_row(
            "base" if base else str(e["updates"]),
            "" if base else _text(e),
            "" if base else "-" if e["win_rate"] is None else f"{e['win_rate']:.2f}",
            "" if base else "-" if e["win_rate"] is None else f"{low:.2f}-{high:.2f}",
            f"{e['mean_words']:.1f}",
            f"{e['list_share']:.0%}",
            f"{e['ended_share']:.0%}",
            "-" if e["kl_per_token"] is None else f"{e['kl_per_token']:.3f}",
            f"{e['relevance']:.2f}",
            f"{e['base_logprob_per_token']:.2f}",
            f"{e['seconds']:.0f}" if "seconds" in e else "",
            ", ".join(f"{name} {share:.0%}" for name, share in e["checks"].items()),
        )
    console.print(table)
    for row in summary["answers"]:
        console.print(f"\n[bold]{escape(row['prompt'])}[/]")
        for updates, answer in row["answers"].items():
            label = "base" if int(updates) == 0 else f"after {updates}"
            console.print(f"  [dim]{label}:[/] {escape(' '.join((answer or '').split()))}")
    console.print(f"\npicture: {run.path / 'summary.png'}   the same for programs: {run.path / 'summary.json'}")


def _sent(metrics: dict[str, Any]) -> list[tuple[str, int]]:
    """Pairs that went to review, where some did."""
    return [("to review", metrics["review"])] if metrics.get("review") else []


def _text(metrics: dict[str, Any]) -> str:
    return f"{metrics['constitution']['name']}@{metrics['constitution']['version']}"


def draw(summary: dict[str, Any], path: Path) -> None:
    """The run in one picture: four panels over iterations, changes of text marked."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    iterations, evaluations = summary["iterations"], summary["evaluations"]
    figure, axes = plt.subplots(2, 2, figsize=(10, 6.5), sharex=True, layout="constrained")
    x_iter = [m["iteration"] + 1 for m in iterations]
    x_eval = [e["updates"] for e in evaluations]

    words, wins, kept, sane = axes.flat
    # Sampled by the policy that the iteration started from, so one place to the left of its bars.
    words.plot(
        [m["iteration"] for m in iterations],
        [m["sampled"]["mean_words"] for m in iterations],
        "o-",
        alpha=0.4,
        label="sampled",
    )
    words.plot(x_eval, [e["mean_words"] for e in evaluations], "s-", label="held out")
    words.set(title="words an answer", ylim=(0, None))
    judged = [e for e in evaluations if e["win_rate"] is not None]
    middle = [e["win_rate"] for e in judged]
    errors = [
        [m - e["win_interval"][0] for m, e in zip(middle, judged, strict=True)],
        [e["win_interval"][1] - m for m, e in zip(middle, judged, strict=True)],
    ]
    wins.errorbar([e["updates"] for e in judged], middle, yerr=errors, fmt="s-", capsize=3, label="win rate (95 %)")
    wins.plot(x_eval, [e["ended_share"] for e in evaluations], "^--", label="ends by itself")
    wins.plot(x_eval, [e["list_share"] for e in evaluations], "v--", label="lists")
    wins.axhline(0.5, color="grey", linewidth=0.8)
    wins.set(title="held out: against the base policy", ylim=(0, 1))
    kept.bar(x_iter, [m["kept"] for m in iterations], label="kept")
    bottom = [float(m["kept"]) for m in iterations]
    for reason in sorted({r for m in iterations for r in m["dropped_by_first_reason"]}):
        counts = [m["dropped_by_first_reason"].get(reason, 0) for m in iterations]
        kept.bar(x_iter, counts, bottom=bottom, label=reason, alpha=0.6)
        bottom = [b + c for b, c in zip(bottom, counts, strict=True)]
    if any(_sent(m) for m in iterations):
        kept.bar(
            x_iter, [m.get("review", 0) for m in iterations], bottom=bottom, label="to review", hatch="//", alpha=0.6
        )
    kept.set(title="pairs: kept, and dropped by reason", xlabel="iteration")
    sane.plot(x_eval, [e["relevance"] for e in evaluations], "o-", label="relevance (nat a token)")
    sane.plot(x_eval, [e["kl_per_token"] or 0 for e in evaluations], "s-", label="KL (nat a token)")
    surprise = [-e["base_logprob_per_token"] for e in evaluations]
    sane.plot(x_eval, surprise, "^-", label="-log p under base (nat a token)")
    sane.set(title="sanity on held-out answers", xlabel="iteration", ylim=(0, None))
    for before, after in pairwise(iterations):
        if before["constitution"]["hash"] != after["constitution"]["hash"]:
            for axis in axes.flat:
                axis.axvline(after["iteration"] + 0.5, color="crimson", linestyle=":")
            words.text(after["iteration"] + 0.55, 1, f"→ {_text(after)}", color="crimson", fontsize=8)
    for axis in axes.flat:
        axis.legend(fontsize=7)
    temporary = path.with_name(path.name + ".partial")
    figure.savefig(temporary, format="png", dpi=110)
    plt.close(figure)
    temporary.replace(path)
