"""`rlaif audit RUN replay-set`: which old pairs may train again, and why not the others."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

from rlaif.cli.audit_common import Json, counts, print_json, run_of
from rlaif.console import Listing, counted, inert, stdout_console

if TYPE_CHECKING:
    from rlaif.audit.replay_set import ReplaySet


def replay_set(ctx: typer.Context, json_: Json = False) -> None:
    """The pairs of earlier iterations by text and age: how many may train again now, and why not the others."""
    from rlaif.audit.replay_set import replay_set as ask

    found = ask(run_of(ctx))
    if json_:
        print_json(found)
    else:
        _show(found)


def _show(found: ReplaySet) -> None:
    console = stdout_console()
    text = inert(str(found.constitution)) if found.constitution else "no text"
    console.print(
        f"[bold]{inert(found.run)}[/]: iteration {found.iteration + 1} could replay {found.may_train} of {found.pairs} "
        f"kept pairs under {text} (replay.share {found.share:g}, max_age {found.max_age}, on_change {found.on_change})"
    )
    if not found.share:
        console.print("note: this job replays none; it would with replay.share above 0")
    if found.iteration >= found.planned:
        console.print(f"note: the job ends after {counted(found.planned, 'iteration')}")
    if found.may_differ:
        console.print(f"note: another text may be in force then: {inert(found.may_differ)}")
    if not found.groups:
        return
    table = Listing(
        "judged under", "iteration", "age", "pairs", "human", "votes", "may train", "standing", "why not",
        right=("iteration", "age", "pairs", "human", "votes", "may train"), spare=("human", "votes", "age"),
    )  # fmt: skip
    for g in found.groups:
        table.add(
            g.constitution, str(g.mixed_in + 1), str(g.age), str(g.pairs), str(g.human), str(g.votes),
            str(g.may_train), counts(g.standing), counts(g.why_not),
        )  # fmt: skip
    table.print(console)
