"""`rlaif audit RUN trace | compare | sql | export`, and the overview: views of a whole run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rlaif.cli.audit_common import (
    Json,
    Offset,
    counts,
    from_zero,
    number,
    opened,
    print_json,
    print_total,
    share,
    short,
)
from rlaif.store import RunDir

if TYPE_CHECKING:
    from rlaif.audit.compare import Compared
    from rlaif.audit.overview import Overview


def print_overview(found: Overview) -> None:
    """The run on one screen."""
    from rich.table import Table

    from rlaif.console import inert, stdout_console

    console = stdout_console()
    t = found.totals
    done = sum(r.done for r in found.iterations)
    console.print(f"[bold]{inert(found.run)}[/]  {done} of {found.iterations_planned or '?'} iterations done")
    console.print(
        "texts: "
        + "  ".join(f"{inert(c.constitution)} ({c.hash}) from iteration {c.iteration + 1}" for c in found.changes)
    )
    kept = share(t.kept / t.decided if t.decided else None)
    console.print(
        f"pairs {t.pairs}, kept {t.kept} ({kept}), dropped {t.dropped}"
        + (f" ({counts(t.reasons)})" if t.reasons else "")
        + (f", in review {t.review}" if t.review else "")
    )
    console.print(
        f"agreement {number(t.agreement)}, position bias {number(t.position_bias)}, order flips {t.order_flips}, "
        f"abstentions {sum(t.abstentions.values())} of {t.votes} votes"
        + (f" ({counts(t.abstentions)})" if t.abstentions else "")
    )
    console.print(f"trained on {t.preferences} preferences ({t.replayed} replayed, {t.human} human) in {t.steps} steps")
    for c in found.cost:
        money = "" if c.money is None else f", cost {c.money:.4f}"
        console.print(
            f"judge {inert(c.judge)}: {c.votes} votes, {c.calls} calls, {c.cached} cached, "
            f"{c.prompt_tokens + c.completion_tokens} tokens{money}"
        )
    table = Table()
    for column in (
        "iteration", "text", "pairs", "kept", "dropped", "agree", "slot 1", "abst.", "cached", "loss", "words",
    ):  # fmt: skip
        table.add_column(column, justify="left" if column in ("text", "dropped") else "right")
    for r in _ends(found.iterations):
        if r is None:
            table.add_row(*["…"] * len(table.columns))
            continue
        table.add_row(
            str(r.iteration + 1),
            inert(r.constitution or "-"),
            str(r.pairs),
            share(r.kept / r.decided if r.decided else None),
            counts(r.reasons),
            number(r.agreement),
            number(r.position_bias),
            str(r.abstentions),
            share(r.cached / r.votes if r.votes else None),
            "skipped" if r.skipped else number(r.loss, 3),
            number(r.mean_words, 1),
        )
    console.print(table)
    for e in found.evaluations:
        if e.win_rate is not None and e.win_interval is not None:
            low, high = e.win_interval
            console.print(
                f"after {e.updates}: win rate {e.win_rate:.2f} ({low:.2f}-{high:.2f}) against the base policy, "
                f"{number(e.mean_words, 1)} words, KL {number(e.kl_per_token, 3)} a token"
            )
    for alarm in found.alarms[-5:]:
        console.print(f"[red]alarm[/] {inert(alarm)}")
    if not found.alarms:
        console.print("no alarms")


_FIRST_ROWS, _LAST_ROWS = 8, 8


def _ends(rows: tuple[Any, ...]) -> list[Any]:
    """The first and the last rows of a long table, None between them: an overview fits on a screen."""
    if len(rows) <= _FIRST_ROWS + _LAST_ROWS:
        return list(rows)
    return [*rows[:_FIRST_ROWS], None, *rows[-_LAST_ROWS:]]


def trace(
    ctx: typer.Context,
    checkpoint: Annotated[
        str, typer.Argument(metavar="CHECKPOINT", help="Policy after N iterations: N, its digest, or its folder.")
    ],
    limit: Annotated[int | None, typer.Option(min=0, help="Most preferences to list; 20, with --json all.")] = None,
    offset: Offset = 0,
    json_: Json = False,
) -> None:
    """Every preference that went into a policy, back to its votes and to the text that it was judged under."""
    from rich.table import Table

    from rlaif.audit.trace import trace as ask
    from rlaif.console import inert, stdout_console

    with opened(ctx) as index:
        found = ask(index, index.run, checkpoint, (None if json_ else 20) if limit is None else limit, offset)
    if json_:
        print_json(found)
        return
    console = stdout_console()
    skipped = f", no update in {', '.join(str(k + 1) for k in found.skipped)}" if found.skipped else ""
    console.print(
        f"[bold]policy {found.digest}[/], after iteration {found.after}: {found.preferences} preferences on "
        f"{found.pairs} pairs in {found.steps} steps{skipped}; from base policy {found.base_digest or '-'}"
    )
    for text in found.texts:
        console.print(
            inert(f"{text.name or 'unknown text'} ({text.hash}): {text.preferences} preferences; {text.file}")
        )
    table = Table(title="what each iteration added", title_justify="left")
    for column in ("iteration", "judged under", "preferences", "judge", "replay", "human", "votes", "agree", "steps"):
        table.add_column(column, justify="left" if column == "judged under" else "right")
    table.add_column("policy after")
    for r in found.iterations:
        table.add_row(
            str(r.iteration + 1), inert(r.constitution or "-"), str(r.preferences), str(r.judged), str(r.replayed),
            str(r.human), str(r.votes), number(r.agreement), str(r.steps), r.policy_after or "-",
        )  # fmt: skip
    console.print(table)
    if not found.rows:
        return
    table = Table(title="preferences", title_justify="left")
    for column in ("in", "pair", "source", "judged under", "prompt", "chosen", "p", "agree", "steps", "votes"):
        table.add_column(
            column, justify="right" if column in ("in", "p", "agree") else "left", no_wrap=column == "pair"
        )
    for p in found.rows:
        lines = f"{len(p.vote_lines)} in {p.judged_in + 1}"
        if p.vote_lines:
            lines += f": line {p.vote_lines[0]}" + (" …" if len(p.vote_lines) > 1 else "")
        table.add_row(
            str(p.iteration + 1), p.pair_id, p.source, inert(p.constitution or p.constitution_hash),
            inert(short(p.prompt, 40)), p.chosen_id, number(p.p_chosen), number(p.agreement),
            ", ".join(map(str, p.steps)), lines,
        )  # fmt: skip
    console.print(table)
    print_total(found.preferences, offset, len(found.rows), "preferences")


def compare(
    ctx: typer.Context,
    other: Annotated[Path, typer.Argument(metavar="RUN2", help="Another run directory.")],
    limit: Annotated[int, typer.Option(min=0, help="Most pairs that were decided differently to list.")] = 10,
    json_: Json = False,
) -> None:
    """Two runs side by side: settings, texts, kept share, agreement, evaluations, pairs decided differently."""
    from rlaif.audit.compare import compare as ask

    with opened(ctx) as first, opened(ctx, RunDir.open(other)) as second:
        found = ask(first, second, limit)
    if json_:
        print_json(found)
    else:
        _print_compared(found)


def _print_compared(found: Compared) -> None:
    from rich.table import Table

    from rlaif.console import inert, stdout_console

    console = stdout_console()
    table = Table("", *(inert(r) for r in found.runs))
    texts = (", ".join(f"{inert(c.constitution)} from iteration {c.iteration + 1}" for c in t) for t in found.texts)
    table.add_row("texts", *texts)
    lines: dict[str, list[str]] = {}
    for t in found.totals:
        for name, value in {
            "pairs": str(t.pairs),
            "kept": f"{t.kept} ({share(t.kept / t.decided if t.decided else None)})",
            "dropped": counts(t.reasons),
            "agreement": number(t.agreement),
            "position bias": number(t.position_bias),
            "order flips": str(t.order_flips),
            "abstentions": f"{sum(t.abstentions.values())} of {t.votes} votes",
            "trained on": f"{t.preferences} preferences in {t.steps} steps",
        }.items():
            lines.setdefault(name, []).append(value)
    for name, values in lines.items():
        table.add_row(name, *values)
    wins = [
        {e.updates: e for e in evaluations if e.win_rate is not None and e.win_interval is not None}
        for evaluations in found.evaluations
    ]
    for updates in sorted({*wins[0], *wins[1]}):
        cells = []
        for side in wins:
            e = side.get(updates)
            low, high = (e.win_interval or (0, 1)) if e else (0, 1)
            cells.append(f"{e.win_rate:.2f} ({low:.2f}-{high:.2f})" if e and e.win_rate is not None else "-")
        table.add_row(f"win rate after {updates}", *cells)
    console.print(table)
    if found.settings:
        table = Table("setting", *(inert(r) for r in found.runs), title="settings that differ", title_justify="left")
        for s in found.settings:
            table.add_row(inert(s.key), inert(repr(s.first)), inert(repr(s.second)))
        console.print(table)
    else:
        console.print("the same settings")
    console.print(
        f"{found.comparable} pairs of both runs have the same prompt and answers; {found.differing} of them were "
        f"decided differently, {found.reversed} the other way round"
    )
    if found.examples:
        table = Table("prompt", "pair", "decision", "agree", "pair in the second", "decision", "agree")
        for d in found.examples:
            table.add_row(
                inert(short(d.prompt, 40)),
                d.first_pair, f"{d.first_status or '-'} {d.first_outcome or ''}", number(d.first_agreement),
                d.second_pair, f"{d.second_status or '-'} {d.second_outcome or ''}", number(d.second_agreement),
            )  # fmt: skip
        console.print(table)


def tables_help() -> str:
    """The tables, for `rlaif audit RUN sql --help`."""
    from rlaif.audit.tables import describe

    # \b: these lines are not to be wrapped
    tables = "\n\n".join(f"\b\n{table}" for table in describe().split("\n\n"))
    return f"Ask the tables themselves, read-only, in DuckDB's SQL.\n\n{tables}"


def sql(
    ctx: typer.Context,
    query: Annotated[str, typer.Argument(metavar="SQL", help="One SELECT, in quotes.")],
    limit: Annotated[int, typer.Option(min=1, help="Most rows to print.")] = 1000,
    json_: Json = False,
) -> None:
    """See `tables_help`."""
    import json

    from rich.table import Table

    from rlaif.console import inert, stdout_console

    with opened(ctx) as index:
        found = index.ask(query, limit + 1)
    names, rows = found
    more, rows = len(rows) > limit, rows[:limit]
    if json_:
        values = [dict(zip(names, row, strict=True)) for row in rows]
        typer.echo(json.dumps(values, indent=1, ensure_ascii=False, default=str))
    else:
        table = Table(*(inert(n) for n in names))
        for row in rows:
            table.add_row(*("-" if v is None else inert(str(v)) for v in row))
        stdout_console().print(table)
    if more:
        typer.echo(f"rlaif: only the first {limit} rows; --limit gives more", err=True)


def export(
    ctx: typer.Context,
    to: Annotated[Path, typer.Option("--to", metavar="FILE", help="A new .parquet or .jsonl file.")],
    iteration: Annotated[int | None, typer.Option(help="Only this iteration, counted from 1 as in tables.")] = None,
    constitution: Annotated[
        str | None, typer.Option(help="Only pairs judged under it: name@version, or a hash (its beginning).")
    ] = None,
    json_: Json = False,
) -> None:
    """Write the preferences as a dataset for TRL, with columns that say where each row comes from."""
    import json

    from rlaif.audit.export import export_preferences

    with opened(ctx) as index:
        rows = export_preferences(index, to, from_zero(iteration), constitution)
    if json_:
        typer.echo(json.dumps({"file": str(to), "rows": rows}))
    else:
        typer.echo(f"{rows} preferences: {to}")
