"""`rlaif doctor --deep MODEL` and `--job JOB`: the hand-over check as a table."""

from __future__ import annotations

import json
from typing import Any

import typer

from rlaif.config import Job, apply_override, parse_job
from rlaif.errors import UserError

_GAP = ("monitors.weights_gap.", "monitors.max_weights_gap")
"""How a job names the limit, and how older ones did."""


def check(what: str | Job, overrides: list[str], as_json: bool) -> None:
    """Prints a row for each load; exit code 1 when sampler and learner disagree after one.

    Args:
        what: a model, with a job's defaults and `overrides`, or a job that has its overrides.
    """
    from rich.table import Table

    from rlaif import models
    from rlaif.console import inert, stdout_console
    from rlaif.loop.deep_check import check_hand_over
    from rlaif.loop.model_checks import check_policy

    job = what if isinstance(what, Job) else _job_of(what, overrides)
    model = job.policy.model
    folder = models.resolve_policy(
        model, job.policy.adapter, progress=lambda message, share: typer.echo(message, err=True)
    )
    check_policy(folder, job)
    rows = []
    for row in check_hand_over(folder, job, note=lambda message: typer.echo(message, err=True)):
        rows.append(row)
    if as_json:
        typer.echo(json.dumps([row.model_dump() for row in rows], indent=1))
    else:
        title = inert(f"{model}: {rows[0].gap.sampler}")
        table = Table(
            "weights",
            "gap, nats a token",
            "typical",
            "worst",
            "moved",
            "exported",
            "",
            title=title,
        )
        for row in rows:
            table.add_row(
                row.weights,
                f"{row.gap.mean:.5f}",
                f"{row.gap.typical:.5f}",
                f"{row.gap.worst:.4f}",
                f"{row.moved:.3f}",
                row.gap.exported,
                "[green]ok[/]" if row.holds else "[red]another model[/]",
            )
        stdout_console().print(table)
    if not all(row.holds for row in rows):
        typer.echo(
            "sampler and learner hold different policies after a load that is not ok; try "
            "--set sampling.engine=transformers, and report the model's config.json",
            err=True,
        )
        raise typer.Exit(1)


def _job_of(model: str, overrides: list[str]) -> Job:
    tree: dict[str, Any] = {"constitution": "none", "policy": {"model": model}}
    for override in overrides:
        if not override.startswith(("sampling.", "learner.", "placement.", "devices.", *_GAP, "seed=")):
            raise UserError(
                f"--set {override}: with --deep, only settings of sampling, learner and placement, "
                "monitors.weights_gap.limit and seed count"
            )
        apply_override(tree, override)
    return parse_job(tree, "doctor --deep")
