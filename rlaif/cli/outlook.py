"""The tables of a simulated run (`rlaif run JOB --dry-run --cluster FILE`)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.table import Table

from rlaif.console import inert, stdout_console

if TYPE_CHECKING:
    from rlaif.simulation import Outlook

ROLES = {"loop": "loop (one ballot, one row after another)"}
"""What tables call a role, where its name says too little."""


def outlook_tables(found: Outlook, where: str) -> None:
    """Prints what a run would take, how busy each role is, and what would change that."""
    console = stdout_console()
    title = inert(f"simulated on {where} (nothing was run)")
    whole = Table(title=title, title_justify="left", show_header=False)
    rows = {
        "an iteration": f"{_time(found.iteration_s)} on average, its share of the evaluations in it",
        "the run": f"{_time(found.hours * 3600)} after the models are loaded",
        "spent on": ", ".join(f"{stage} {_time(seconds)}" for stage, seconds in found.spent_s.items() if seconds),
        "bottleneck": found.bottleneck,
        "at best": f"{_time(max(found.work_s.values()))} an iteration, were all else done meanwhile",
        "GPUs": f"{found.gpus:g}",
        "cost": f"{found.cost:,.2f}, of it {found.judge_cost:,.2f} for ballots"
        if found.cost
        else "no prices are given",
    }
    for name, value in rows.items():
        whole.add_row(name, inert(value))
    console.print(whole)
    use = Table("role", "at work", "an iteration's work")
    for role, share in found.use.items():
        use.add_row(ROLES.get(role, role), f"{share:.0%}", _time(found.work_s[role]))
    console.print(use)
    changes = Table("with", "an iteration", "faster", "GPUs", "cost of the run")
    for change in found.changes:
        cost = f"{change.cost:,.2f}" if found.cost else "–"
        changes.add_row(change.change, _time(change.iteration_s), f"{change.faster:.2f} ×", f"{change.gpus:g}", cost)
    console.print(changes)
    for hint in found.hints:
        console.print(f"[yellow]hint[/] {inert(hint)}")


def _time(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.3g} min" if seconds < 7200 else f"{seconds / 3600:.3g} h"
