"""`rlaif audit RUN replay`: what would other filters, or today's parser, have decided?"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rlaif.cli.audit_common import run_of
from rlaif.console import Listing, inert, stdout_console

if TYPE_CHECKING:
    from rlaif.audit.replay import Change, Replay

_PREVIEW = 140
_OLD = ("pairs", "kept_before", "kept_after", "newly_kept", "newly_dropped", "reversed", "other_reasons")
_COUNTED = ("pairs", "kept_before", "kept_after", "newly_kept", "newly_dropped", "newly_reviewed", "reversed",
            "other_reasons")  # fmt: skip


def replay(
    ctx: typer.Context,
    filters: Annotated[
        Path | None, typer.Option(metavar="FILE", help="YAML with filter keys, or a job file with `filters`.")
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override: --set filters.min_agreement=0.8")
    ] = None,
    calibration: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A calibration file (`rlaif judge calibrate`).")
    ] = None,
    aggregate: Annotated[
        str | None, typer.Option(metavar="NAME", help="How votes become a verdict: mean, majority or dawid_skene.")
    ] = None,
    parser: Annotated[
        bool, typer.Option("--parser", help="Read the raw replies (or the scores) again as this rlaif reads them.")
    ] = False,
    json_: Annotated[bool, typer.Option("--json", help="Print JSON for programs.")] = False,
) -> None:
    """Decide the run's pairs again from their recorded votes, and show what changes. Writes nothing, asks no model.

    Keys that nobody names stay as the run has them; without any, the run's own decisions come out. What a later text
    made of pairs that were judged under an earlier one is decided again too, and counted apart.
    """
    from rlaif.audit.replay import replay as run_replay
    from rlaif.audit.replay_settings import settings_of

    run = run_of(ctx)
    settings, changed = settings_of(run, Path.cwd(), filters, set_ or [], calibration, aggregate, parser)
    tty = sys.stderr.isatty()
    found = run_replay(
        run, settings, changed, lambda k: print(f"iteration {k + 1}", end="\r", file=sys.stderr) if tty else None
    )
    if json_:
        typer.echo(found.model_dump_json(indent=1))
    else:
        _show(found, parser)


def _show(found: Replay, parser: bool) -> None:
    console = stdout_console()
    pairs, votes = found.total("pairs"), found.votes
    console.print(f"replayed {pairs} pairs with {votes} votes of {inert(found.run)}; nothing is written")
    for key, (old, new) in found.settings.items():
        console.print(f"  {key}: {inert(str(old))} -> {inert(str(new))}")
    if parser:
        console.print(f"  {found.total('reparsed')} votes are read otherwise now")
    for note in found.notes:
        console.print(f"note: {inert(note)}")
    for problem in found.problems:
        console.print(f"[red]{inert(problem)}[/]{'' if problem.endswith('left out') else '; its pair is left out'}")
    numbers = ("iteration", "pairs", "kept", "would keep", "newly kept", "newly dropped", "to review", "reversed",
               "other reasons")  # fmt: skip
    spare = ("other reasons", "to review", "pairs")
    table = Listing(numbers[0], "constitution", *numbers[1:], "", right=numbers[1:], spare=spare)
    for i in found.iterations:
        update = "" if i.updated == i.would_update else "no update any more" if i.updated else "now an update"
        table.add(str(i.iteration + 1), i.constitution, *(str(getattr(i, name)) for name in _COUNTED), update)
    table.end_section()
    table.add("all", "", *(str(found.total(name)) for name in _COUNTED), "")
    table.print(console)
    if found.old_pairs:
        of_old = (*numbers[1:6], *numbers[7:])
        old = Listing("earlier pairs in iteration", "constitution", *of_old, right=of_old, spare=spare)
        for o in found.old_pairs:
            old.add(str(o.iteration + 1), o.constitution, *(str(getattr(o, name)) for name in _OLD))
        old.print(console)
    reasons = Listing("before", "after", "pairs", right=("pairs",))
    for t in found.transitions:
        reasons.add(t.before, t.after if t.after != t.before else "the same", str(t.pairs))
    reasons.print(console)
    changed = any(getattr(o, name) for o in found.old_pairs for name in _OLD[3:])
    if not changed and not any(found.total(name) for name in _COUNTED[3:]):
        console.print("every decision is as it was made")
    for change in found.examples:
        _example(console, change)


def _example(console: Any, change: Change) -> None:
    before, after = change.before, change.after
    console.print(
        f"\n[bold]{change.kind.replace('_', ' ')}[/] {inert(change.pair_id)}  iteration {change.iteration + 1}  "
        f"{_said(before)} -> {_said(after)}"
    )
    for name, text in (("prompt", change.prompt), ("first", change.first), ("second", change.second)):
        if text is not None:
            one_line = " ".join(text.split())
            console.print(f"  {name:>6}: {inert(one_line[:_PREVIEW])}{'…' if len(one_line) > _PREVIEW else ''}")


def _said(decision: Any) -> str:
    verdict = decision.verdict
    numbers = "" if verdict.p_first is None else f" (p(first) {verdict.p_first:.2f}, agreement {verdict.agreement:.2f})"
    word = f"kept, {decision.winner}" if decision.winner else f"{decision.status}: {', '.join(decision.reasons)}"
    return f"{word}{numbers}"
