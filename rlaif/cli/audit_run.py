"""`rlaif audit RUN trace | compare | sql | export`, and the overview: views of a whole run."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

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
from rlaif.errors import UserError

if TYPE_CHECKING:
    from rlaif.audit.compare import Compared
    from rlaif.audit.index import Index
    from rlaif.audit.overview import EvaluationRow, Overview
    from rlaif.console import Listing


def print_overview(found: Overview) -> None:
    """The run on one screen; when piped, all of it."""
    from rich.text import Text

    from rlaif.console import piped, stdout_console

    console = stdout_console()
    if piped():
        for line in [*_about(found), None, *_results(found, console.width)]:
            if line is None:
                _iterations(found).print(console)
            else:
                console.print(line, soft_wrap=True)
        return

    def height(lines: list[str]) -> int:
        return sum(len(console.render_lines(Text.from_markup(line))) for line in lines)

    # One line stays for the shell's prompt.
    room = max(console.height, _LEAST_HEIGHT) - 1
    about, results = _about(found, _FEW), _results(found, console.width, _FEW)
    if height(about) + height(results) + _TABLE_LINES + _LEAST_ROWS > room:
        about, results = _about(found, 1), _results(found, console.width, 1)
    rows = max(room - height(about) - height(results) - _TABLE_LINES, _LEAST_ROWS)
    table = _iterations(found)
    if len(table.rows) > rows:
        table.rows = [("…",) * len(table.columns), *table.rows[-(rows - 1) :]]
    for line in about:
        console.print(line)
    console.print(table.table(console.width))
    for line in results:
        console.print(line)


_LEAST_HEIGHT = 24
_TABLE_LINES = 4
"""Of a table without rows: three of its head and one below."""
_LEAST_ROWS = 4
_FEW = 3
"""Texts, judges, evaluations and alarms that an overview on a terminal shows of many."""


def _about(found: Overview, most: int | None = None) -> list[str]:
    """What an overview says before the iterations, as rich's markup; of many texts and judges `most`."""
    from rlaif.console import counted, inert

    t = found.totals
    done = sum(r.done for r in found.iterations)
    texts = [f"{inert(c.constitution)} ({c.hash}) from iteration {c.iteration + 1}" for c in found.changes]
    kept = share(t.kept / t.decided if t.decided else None)
    lines = [
        f"[bold]{inert(found.run)}[/]  {done} of {found.iterations_planned or '?'} iterations done",
        *([f"goes on from {inert(p.run)} after {counted(p.iterations, 'iteration')}"] if (p := found.parent) else []),
        *([f"source: {inert(found.source)}"] if found.source else []),
        "texts: " + "  ".join(_last(texts, most, "earlier")),
        f"pairs {t.pairs}, kept {t.kept} ({kept}), dropped {t.dropped}"
        + (f" ({counts(t.reasons)})" if t.reasons else "")
        + (f", in review {t.review}" if t.review else ""),
        f"agreement {number(t.agreement)}, position bias {number(t.position_bias)}, order flips {t.order_flips}, "
        f"abstentions {sum(t.abstentions.values())} of {t.votes} votes"
        + (f" ({counts(t.abstentions)})" if t.abstentions else ""),
        f"trained on {t.preferences} preferences ({t.replayed} replayed, {t.human} human) in {t.steps} steps",
    ]
    costs = []
    for c in found.cost:
        money = "" if c.money is None else f", cost {c.money:.4f}"
        costs.append(
            f"judge {inert(c.judge)}: {c.votes} votes, {c.calls} calls, {c.cached} cached, "
            f"{c.prompt_tokens + c.completion_tokens} tokens{money}"
        )
    return [*lines, *_last(costs, most, "others")]


def _iterations(found: Overview) -> Listing:
    from rlaif.console import Listing

    reviewed = any(r.review for r in found.iterations)
    review = ["review"] if reviewed else []
    stale = ["stale"] if any(r.staleness for r in found.iterations) else []
    numbers = ("iteration", "stale", "pairs", "kept", "review", "agree", "slot 1", "abst.", "cached", "loss", "words")
    table = Listing(
        "iteration", "text", *stale, "pairs", "kept", "dropped", *review, "agree", "slot 1", "abst.", "cached", "loss",
        "words",
        right=numbers, one_line=True,
        spare=("cached", "abst.", "slot 1", "text", "words", "dropped", "review", "agree", "loss"),
    )  # fmt: skip
    for r in found.iterations:
        table.add(
            str(r.iteration + 1),
            r.constitution or "-",
            *(["-" if r.staleness is None else str(r.staleness)] if stale else []),
            str(r.pairs),
            share(r.kept / r.decided if r.decided else None),
            counts(r.reasons),
            *([str(r.review)] if reviewed else []),
            number(r.agreement),
            number(r.position_bias),
            str(r.abstentions),
            share(r.cached / r.votes if r.votes else None),
            "skipped" if r.skipped else number(r.loss, 3),
            number(r.mean_words, 1),
        )
    return table


_WIDE = 90


def _results(found: Overview, width: int, most: int | None = None) -> list[str]:
    """What an overview says after the iterations, as rich's markup; the last `most` evaluations and alarms."""
    from rlaif.audit.overview import mixed_line
    from rlaif.audit.summary import deciding_line, length_line, reference_line, retention_lines
    from rlaif.console import inert

    against = " against the base policy" if width >= _WIDE else ""
    evaluations = []
    for e in found.evaluations:
        if e.win_rate is not None and e.win_interval is not None:
            low, high = e.win_interval
            beside = (length_line(e), deciding_line(e), reference_line(e))
            evaluations.append(
                f"after {e.updates}: win rate {e.win_rate:.2f} ({low:.2f}-{high:.2f}){against}, "
                f"{number(e.mean_words, 1)} words, KL {_kl(e)} a token"
                + "".join(f"\nafter {e.updates}: {line}" for line in filter(None, beside))
                + "".join(f"\nafter {e.updates}: {inert(line)}" for line in retention_lines(e.retention))
            )
    alarms = _last([f"[red]alarm[/] {inert(alarm)}" for alarm in found.alarms], most, "earlier alarms")
    if found.events_missing:
        alarms = ["alarms unknown: events.jsonl is missing"]
    mixed = _last(
        [f"[red]mixed texts[/] {inert(mixed_line(m))}" for m in found.mixed], most, "earlier updates that mixed texts"
    )
    return [*_last(evaluations, most, "earlier evaluations"), *mixed, *(alarms or ["no alarms"])]


def _kl(e: EvaluationRow) -> str:
    """KL a token, with its interval, or with what it is in an older run."""
    if e.kl_by_older_version:
        return f"{number(e.kl_per_token, 3)} (older estimate)"
    if e.kl_interval is None:
        return number(e.kl_per_token, 3)
    return f"{number(e.kl_per_token, 3)} ({e.kl_interval[0]:.3f}-{e.kl_interval[1]:.3f})"


def _last(lines: list[str], most: int | None, what: str) -> list[str]:
    """The last ones, after a word on how many others there are."""
    if most is None or len(lines) <= most:
        return lines
    return [f"… {len(lines) - most} {what}", *lines[-most:]]


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
    from rlaif.audit.trace import trace as ask
    from rlaif.console import Listing, inert, stdout_console

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
    for why in found.unknown:
        console.print(inert(f"without what isn't known: {why}"), soft_wrap=True)
    for text in found.texts:
        if not text.hash:
            console.print(f"no text: {text.preferences} preferences with the label of a data set")
            continue
        console.print(
            inert(f"{text.name or 'unknown text'} ({text.hash}): {text.preferences} preferences; {text.file}")
        )
    numbers = ("iteration", "preferences", "judge", "replay", "human", "data", "votes", "agree", "steps")
    table = Listing(
        numbers[0], "judged under", *numbers[1:], "policy after",
        right=numbers, spare=("policy after", "data", "human", "agree"), title="what each iteration added",
    )  # fmt: skip
    for r in found.iterations:
        table.add(
            str(r.iteration + 1), r.constitution or "-", str(r.preferences), str(r.judged), str(r.replayed),
            str(r.human), str(r.data), str(r.votes), number(r.agreement), str(r.steps), r.policy_after or "-",
        )  # fmt: skip
    table.print(console)
    if not found.rows:
        return
    table = Listing(
        "in", "pair", "source", "judged under", "prompt", "chosen", "p", "agree", "steps", "votes",
        right=("in", "p", "agree"), spare=("chosen", "steps", "agree", "p", "votes"), title="preferences",
    )  # fmt: skip
    for p in found.rows:
        cast = [_votes_in(p.vote_lines, p.judged_in), *(_votes_in(r.vote_lines, r.iteration) for r in p.rejudged)]
        table.add(
            str(p.iteration + 1), p.pair_id, p.source, p.constitution or p.constitution_hash or "-",
            short(p.prompt, 40), p.chosen_id, number(p.p_chosen), number(p.agreement),
            ", ".join(map(str, p.steps)), ", ".join(cast),
        )  # fmt: skip
    table.print(console)
    print_total(found.preferences, offset, len(found.rows), "preferences")


def _votes_in(lines: tuple[int, ...], iteration: int) -> str:
    """How many votes an iteration cast on a pair, and where they begin."""
    where = f": line {lines[0]}" + (" …" if len(lines) > 1 else "") if lines else ""
    return f"{len(lines)} in {iteration + 1}{where}"


def compare(
    ctx: typer.Context,
    other: Annotated[Path, typer.Argument(metavar="RUN2", help="Another run directory.")],
    limit: Annotated[int, typer.Option(min=0, help="Most pairs that were decided differently to list.")] = 10,
    json_: Json = False,
) -> None:
    """Two runs side by side: settings, texts, kept share, agreement, evaluations, pairs decided differently."""
    from rlaif.audit.compare import compare as ask
    from rlaif.rundir.store import RunDir

    with opened(ctx) as first, opened(ctx, RunDir.open(other)) as second:
        found = ask(first, second, limit)
    if json_:
        print_json(found)
    else:
        _print_compared(found)


def _print_compared(found: Compared) -> None:
    from rlaif.console import Listing, stdout_console

    console = stdout_console()
    table = Listing("", *found.runs)
    texts = (", ".join(f"{c.constitution} from iteration {c.iteration + 1}" for c in t) for t in found.texts)
    table.add("texts", *texts)
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
        table.add(name, *values)
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
        table.add(f"win rate after {updates}", *cells)
    kls = [{e.updates: e for e in evaluations if e.updates} for evaluations in found.evaluations]
    for updates in sorted({*kls[0], *kls[1]}):
        table.add(f"KL a token after {updates}", *(_kl(side[updates]) if updates in side else "-" for side in kls))
    table.print(console)
    if found.settings:
        table = Listing("setting", *found.runs, title="settings that differ")
        for s in found.settings:
            table.add(s.key, repr(s.first), repr(s.second))
        table.print(console)
    else:
        console.print("the same settings")
    console.print(
        f"{found.comparable} pairs of both runs have the same prompt and answers; {found.differing} of them were "
        f"decided differently, {found.reversed} the other way round"
    )
    if found.examples:
        table = Listing("prompt", "pair", "decision", "agree", "pair in the second", "decision", "agree")
        for d in found.examples:
            table.add(
                short(d.prompt, 40),
                d.first_pair, f"{d.first_status or '-'} {d.first_outcome or ''}", number(d.first_agreement),
                d.second_pair, f"{d.second_status or '-'} {d.second_outcome or ''}", number(d.second_agreement),
            )  # fmt: skip
        table.print(console)


class WithTables(TyperCommand):
    """A command whose help describes the tables; they are only read for it."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        from rlaif.audit.tables import describe

        # \b: these lines are not to be wrapped
        tables = "\n\n".join(f"\b\n{table}" for table in describe().split("\n\n"))
        self.help = f"{inspect.cleandoc(self.callback.__doc__ or '')}\n\n{tables}" if self.callback else tables
        super().format_help(ctx, formatter)


def sql(
    ctx: typer.Context,
    query: Annotated[str, typer.Argument(metavar="SQL", help="One SELECT, in quotes.")],
    limit: Annotated[int, typer.Option(min=1, help="Most rows to print.")] = 1000,
    json_: Json = False,
) -> None:
    """Ask the tables themselves, read-only, in DuckDB's SQL."""
    import json

    from rlaif.console import Listing, stdout_console

    with opened(ctx) as index:
        names, rows = index.ask(query, limit + 1)
        types = _types(index, query) if json_ else []
    more, rows = len(rows) > limit, rows[:limit]
    if json_:
        names = _different(names)
        kinds = dict(zip(names, types, strict=False))
        values = [{n: _as_json(v, kinds.get(n)) for n, v in zip(names, row, strict=True)} for row in rows]
        typer.echo(json.dumps(values, indent=1, ensure_ascii=False, default=str, allow_nan=False))
    else:
        table = Listing(*names)
        for row in rows:
            table.add(*("-" if v is None else str(v) for v in row))
        table.print(stdout_console())
    if more:
        typer.echo(f"rlaif: only the first {limit} rows; --limit gives more", err=True)


def _types(index: Index, query: str) -> list[str]:
    """DuckDB's types of a query's columns; empty when it can't say, as of an EXPLAIN."""
    try:
        names, rows = index.ask(f"DESCRIBE {query}", 10_000)
    except UserError:
        return []
    return [str(row[names.index("column_type")]) for row in rows]


def _different(names: list[str]) -> list[str]:
    """Column names, each once: a second `n` is `n_2`, as a JSON object holds a name once."""
    out: list[str] = []
    for name in names:
        place, known = 2, name
        while known in out or (known != name and known in names):
            known, place = f"{name}_{place}", place + 1
        out.append(known)
    return out


def _as_json(value: Any, kind: str | None = None) -> Any:
    """A value of DuckDB's as JSON has it: its JSON columns are values, not text; what is no number is null."""
    import json
    import math

    if kind == "JSON" and isinstance(value, str):
        value = json.loads(value)
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {str(k): _as_json(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_as_json(v) for v in value]
    return value


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
