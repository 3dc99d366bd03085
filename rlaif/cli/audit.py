"""`rlaif audit RUN …`: every decision of a run, found, explained and checked, from its directory alone."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from typer.core import TyperGroup

from rlaif.errors import UserError
from rlaif.records import Record
from rlaif.store import RunDir

if TYPE_CHECKING:
    from rlaif.audit.compare import Compared
    from rlaif.audit.index import Index
    from rlaif.audit.overview import Overview
    from rlaif.audit.pair import PairDetail
    from rlaif.audit.pairs import Page, PairFilter


class RunFirst(TyperGroup):
    """`rlaif audit RUN COMMAND`; `rlaif audit COMMAND RUN`, as other tools have it, is understood too."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if len(args) > 1 and args[0] in self.commands and not args[1].startswith("-"):
            args = [args[1], args[0], *args[2:]]
        # A group takes its own options before its argument only: `RUN --json` is `--json RUN`.
        options = list(takewhile(lambda a: a in ("--json", "--help"), args[1:]))
        args = [*options, *args[:1], *args[1 + len(options) :]]
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=RunFirst,
    help="Ask a run's log: why was this pair kept, by which votes, under which text, into which checkpoint?",
    invoke_without_command=True,
    rich_markup_mode=None,
)

Json = Annotated[bool, typer.Option("--json", help="Print JSON for programs instead of a table.")]
Limit = Annotated[int, typer.Option(min=1, help="Most rows to print.")]
Offset = Annotated[int, typer.Option(min=0, help="Rows to leave out first.")]


@app.callback()
def overview(
    ctx: typer.Context,
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run directory, for example runs/quickstart.")],
    json_: Json = False,
) -> None:
    """Without a command: the run on one screen."""
    ctx.obj = RunDir.open(run)
    if ctx.invoked_subcommand is None:
        from rlaif.audit.overview import overview as ask

        with opened(ctx) as index:
            found = ask(index, index.run)
        if json_:
            print_json(found)
        else:
            _print_overview(found)


def run_of(ctx: typer.Context) -> RunDir:
    """The run that a subcommand is about."""
    run: RunDir = ctx.obj
    return run


@contextmanager
def opened(ctx: typer.Context, run: RunDir | None = None) -> Iterator[Index]:
    """The index of the run (or of another one), up to date; building it shows on stderr, and so do damaged lines."""
    from rlaif.audit.index import Index

    with Building() as building, Index.open(run or run_of(ctx), building.told) as index:
        building.close()
        for problem in index.problems:
            typer.echo(f"rlaif: {problem}", err=True)
        yield index


class Building:
    """Shows how far the index is: a line that moves on a terminal, few lines elsewhere, nothing when it is quick."""

    def __init__(self) -> None:
        self._terminal = sys.stderr.isatty()
        self._next = 0.0
        self._shown = False

    def __enter__(self) -> Building:
        import time

        self._clock = time.monotonic
        self._quiet_until = self._clock() + (0.5 if self._terminal else 2.0)
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def told(self, what: str, share: float) -> None:
        """A step of the index."""
        now = self._clock()
        if now < self._quiet_until:
            return
        if self._terminal:
            sys.stderr.write(f"\r\x1b[Kindexing {share:4.0%}  {what}")
        elif share >= self._next:
            sys.stderr.write(f"indexing {share:.0%}  {what}\n")
            self._next = share + 0.1
        sys.stderr.flush()
        self._shown = True

    def close(self) -> None:
        """Takes the moving line away."""
        if self._shown and self._terminal:
            sys.stderr.write("\r\x1b[K")
        self._shown = False


def print_json(record: Record) -> None:
    """Prints a record for programs."""
    typer.echo(record.model_dump_json(indent=1))


# Numbers as people read them.


def share(value: float | None) -> str:
    """A share in per cent."""
    return "-" if value is None else f"{value:.0%}"


def number(value: float | None, digits: int = 2) -> str:
    """A number; a dash when there is none."""
    return "-" if value is None else f"{value:.{digits}f}"


def counts(values: dict[str, int]) -> str:
    """Names with how often."""
    return ", ".join(f"{name} {n}" for name, n in values.items())


def _print_overview(found: Overview) -> None:
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


# Lists.


@app.command("list")
def list_(
    ctx: typer.Context,
    iteration: Annotated[int | None, typer.Option(help="Iteration, counted from 1 as in tables.")] = None,
    constitution: Annotated[str | None, typer.Option(help="name@version, or a hash (its beginning).")] = None,
    status: Annotated[Literal["kept", "dropped", "review"] | None, typer.Option(help="The filter's word.")] = None,
    reason: Annotated[str | None, typer.Option(help="A rule that spoke against the pair.")] = None,
    principle: Annotated[str | None, typer.Option(help="A principle that some vote is about.")] = None,
    judge: Annotated[str | None, typer.Option(help="A judge that voted (a part of its name).")] = None,
    min_agreement: Annotated[float | None, typer.Option(help="Least agreement.")] = None,
    max_agreement: Annotated[float | None, typer.Option(help="Most agreement.")] = None,
    flipped: Annotated[
        bool | None, typer.Option("--flipped/--not-flipped", help="A voice changed sides with the order.")
    ] = None,
    disagreeing: Annotated[
        bool | None, typer.Option("--disagreeing/--agreeing", help="Voices or judges name different sides.")
    ] = None,
    text: Annotated[str | None, typer.Option(help="Text in the prompt or an answer, whatever the case.")] = None,
    evaluation: Annotated[
        bool, typer.Option("--evaluation", help="Held-out pairs; --iteration is then the number of updates.")
    ] = False,
    sort: Annotated[Literal["log", "agreement", "margin", "length"], typer.Option(help="Order of the rows.")] = "log",
    descending: Annotated[bool, typer.Option("--descending", help="Largest first.")] = False,
    limit: Limit = 50,
    offset: Offset = 0,
    json_: Json = False,
) -> None:
    """List pairs with their decisions."""
    filter = _filter(
        iteration=iteration if evaluation else _from_zero(iteration),
        constitution=constitution,
        status=status,
        reason=reason,
        principle=principle,
        judge=judge,
        min_agreement=min_agreement,
        max_agreement=max_agreement,
        flipped=flipped,
        disagreeing=disagreeing,
        text=text,
        evaluation=evaluation,
    )
    _list(ctx, filter, sort, descending, limit, offset, json_)


def _from_zero(iteration: int | None) -> int | None:
    """An iteration as files count it."""
    if iteration is not None and iteration < 1:
        raise UserError(f"--iteration {iteration}: it counts from 1, as tables do")
    return None if iteration is None else iteration - 1


def _filter(**fields: Any) -> PairFilter:
    from pydantic import ValidationError

    from rlaif.audit.pairs import PairFilter

    try:
        return PairFilter.model_validate(fields)
    except ValidationError as e:
        error = e.errors()[0]
        raise UserError(f"--{str(error['loc'][0]).replace('_', '-')}: {error['msg']} (found {error['input']!r})") from e


def _list(
    ctx: typer.Context, filter: PairFilter, sort: Any, descending: bool, limit: int, offset: int, json_: bool
) -> None:
    from rlaif.audit.pairs import list_pairs

    with opened(ctx) as index:
        page = list_pairs(index, filter, sort, descending, limit, offset)
    if json_:
        print_json(page)
    else:
        _print_page(page)


def _print_page(page: Page) -> None:
    from rich.table import Table

    from rlaif.console import inert, stdout_console

    console = stdout_console()
    table = Table()
    for column in ("pair", "iter.", "text", "prompt", "decision", "verdict", "agree", "p(first)", "votes"):
        table.add_column(column, justify="right" if column in ("iter.", "agree", "p(first)", "votes") else "left",
                         no_wrap=column in ("pair", "verdict"))  # fmt: skip
    for r in page.rows:
        table.add_row(
            r.pair_id,
            f"eval {r.iteration}" if r.evaluation else str(r.iteration + 1),
            inert(r.constitution or "-"),
            inert(_short(r.prompt)),
            f"{r.status or 'undecided'} {' '.join(r.reasons)}".strip(),
            f"{r.outcome or '-'}{' (flip)' if r.order_flip else ''}",
            number(r.agreement),
            number(r.p_first),
            f"{r.valid_votes}" + (f"+{r.abstentions} abst." if r.abstentions else ""),
        )
    if page.rows:
        console.print(table)
    _print_total(page.total, page.offset, len(page.rows))


def _short(text: str, most: int = 60) -> str:
    line = " ".join(text.split())
    return line if len(line) <= most else line[: most - 1] + "…"


# One pair.


@app.command()
def show(
    ctx: typer.Context,
    pair: Annotated[str, typer.Argument(metavar="PAIR", help="A pair's id, or the beginning of it.")],
    questions: Annotated[bool, typer.Option("--questions", help="Also print each rendered question.")] = False,
    json_: Json = False,
) -> None:
    """Show one pair: answers side by side, every vote, rule by rule why it was kept, and where it trained."""
    from rlaif.audit.pair import question_of
    from rlaif.audit.pair import show as ask

    with opened(ctx) as index:
        found = ask(index, index.run, pair)
        asked = {v.ballot.id: question_of(index.run, found, v.ballot.id) for v in found.votes} if questions else {}
    if json_:
        import json

        values = found.model_dump(mode="json") | ({"questions": asked} if questions else {})
        typer.echo(json.dumps(values, indent=1, ensure_ascii=False))
    else:
        _print_pair(found, asked)


def _print_pair(found: PairDetail, asked: dict[str, str]) -> None:
    from rich.table import Table

    from rlaif.console import inert, stdout_console

    console = stdout_console()
    row = found.row
    where = f"evaluation after {row.iteration}" if row.evaluation else f"iteration {row.iteration + 1}"
    text = f"{found.constitution} ({found.constitution.hash})" if found.constitution else "text unknown"
    console.print(f"[bold]pair {row.pair_id}[/]  {where}, judged under {inert(text)}, paired by {found.pair.method}")
    for m in found.prompt_messages:
        console.print(f"[dim]{m.role}:[/] {inert(m.content)}", soft_wrap=True)
    sides = Table(show_lines=True, expand=True)
    for name, completion in (("first", found.first), ("second", found.second)):
        ended = "not in the log" if completion is None else completion.finish_reason
        mark = " (chosen)" if row.winner == name else ""
        sides.add_column(f"{name}{mark}: {getattr(found.pair, name)}, {ended}", ratio=1)
    sides.add_row(*(inert(c.text) if c else "-" for c in (found.first, found.second)))
    console.print(sides)

    votes = Table(title="votes", title_justify="left")
    for column in ("ballot", "judge", "voice", "shown", "outcome", "p(first)", "raw reply"):
        votes.add_column(column, justify="right" if column == "p(first)" else "left", no_wrap=column == "ballot")
    for v in found.votes:
        b = v.ballot
        votes.add_row(
            b.id,
            inert(f"{b.judge} ({v.model})"),
            inert(f"{b.voice}{f' #{b.sample_index}' if b.sample_index else ''}{' guard' if b.guard else ''}"),
            {"forward": "first, second", "reversed": "second, first"}.get(b.order, "no slots"),
            f"{v.outcome}{f' ({v.abstain_reason})' if v.abstain_reason else ''}",
            number(v.p_first, 3),
            inert(v.raw_reply or v.error or ""),
        )
    console.print(votes)
    for ballot_id, question in asked.items():
        console.print(f"\n[bold]question of ballot {ballot_id}[/]")
        console.print(inert(question), soft_wrap=True)

    if found.decision is None:
        console.print("not decided yet")
    else:
        verdict = found.decision.verdict
        sent_by = f" ({found.decision.review_rule})" if found.decision.review_rule else ""
        console.print(
            f"verdict: [bold]{verdict.outcome}[/], p(first) {number(verdict.p_first, 3)}, agreement "
            f"{number(verdict.agreement, 3)}; decision: [bold]{found.decision.status}[/]{sent_by}"
        )
        for rule in found.rules:
            mark = "[green]passed[/]" if rule.passed else "[red]against[/]"
            console.print(f"  {mark}  {rule.name:13} {inert(rule.sentence)}")
    for label in found.labels:
        because = f": {label.reason}" if label.reason else ""
        console.print(inert(f"label: {label.outcome} by {label.author} at {label.time}{because}"))
    for t in found.preferences:
        steps = f"step {', '.join(map(str, t.steps))}" if t.steps else "no step"
        what = f"iteration {t.iteration + 1} as {t.source}, {t.chosen} chosen"
        if t.policy_after:
            console.print(f"trained in {what}: {steps}, into policy {t.policy_after} (after {t.iteration + 1})")
        else:
            console.print(f"mixed in {what}: {'update skipped' if t.skipped else 'no policy yet'}")
    if not any(t.policy_after for t in found.preferences):
        console.print("never trained on")
    if found.vote_lines:
        console.print(inert(f"votes: {found.vote_lines[0]} to line {found.vote_lines[-1].rpartition(':')[2]}"))


# Votes that point to different sides.


@app.command()
def flips(
    ctx: typer.Context,
    iteration: Annotated[int | None, typer.Option(help="Iteration, counted from 1 as in tables.")] = None,
    constitution: Annotated[str | None, typer.Option(help="name@version, or a hash (its beginning).")] = None,
    limit: Limit = 50,
    offset: Offset = 0,
    json_: Json = False,
) -> None:
    """Pairs on which a voice named another side when the order changed."""
    _splits(ctx, {"flipped": True}, iteration, constitution, limit, offset, json_)


@app.command()
def disagree(
    ctx: typer.Context,
    iteration: Annotated[int | None, typer.Option(help="Iteration, counted from 1 as in tables.")] = None,
    constitution: Annotated[str | None, typer.Option(help="name@version, or a hash (its beginning).")] = None,
    limit: Limit = 50,
    offset: Offset = 0,
    json_: Json = False,
) -> None:
    """Pairs on which voices or judges, each sure of itself in both orders, name different sides."""
    _splits(ctx, {"disagreeing": True}, iteration, constitution, limit, offset, json_)


def _splits(
    ctx: typer.Context,
    wanted: dict[str, bool],
    iteration: int | None,
    constitution: str | None,
    limit: int,
    offset: int,
    json_: bool,
) -> None:
    from rich.table import Table

    from rlaif.audit.pairs import splits
    from rlaif.console import inert, stdout_console

    filter = _filter(iteration=_from_zero(iteration), constitution=constitution, **wanted)
    with opened(ctx) as index:
        page = splits(index, filter, limit, offset)
    if json_:
        print_json(page)
        return
    table = Table()
    for column in ("pair", "iter.", "prompt", "decision", "judge", "voice", "first shown first", "second shown first"):
        table.add_column(column, justify="right" if column == "iter." else "left", no_wrap=column == "pair")
    for split in page.rows:
        r = split.row
        start = [r.pair_id, str(r.iteration + 1), inert(_short(r.prompt, 40)), r.status or "undecided"]
        for v in split.voices:
            voice = f"{v.voice}{f' #{v.sample_index}' if v.sample_index else ''}{' guard' if v.guard else ''}"
            forward = " ".join(v.forward or v.unordered) or "-"
            table.add_row(*start, inert(v.judge), inert(voice), forward, " ".join(v.reversed) or "-")
            start = [""] * 4
        table.add_section()
    console = stdout_console()
    if page.rows:
        console.print(table)
    _print_total(page.total, page.offset, len(page.rows))


def _print_total(total: int, offset: int, shown: int, what: str = "pairs") -> None:
    from rlaif.console import stdout_console

    last = offset + shown
    start = f"{offset + 1}-{last} of " if shown else ""
    stdout_console().print(f"{start}{total} {what}" + (f"; more with --offset {last}" if last < total else ""))


# A checkpoint's lineage, two runs, the tables themselves.


@app.command()
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
            inert(_short(p.prompt, 40)), p.chosen_id, number(p.p_chosen), number(p.agreement),
            ", ".join(map(str, p.steps)), lines,
        )  # fmt: skip
    console.print(table)
    _print_total(found.preferences, offset, len(found.rows), "preferences")


@app.command()
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
                inert(_short(d.prompt, 40)),
                d.first_pair, f"{d.first_status or '-'} {d.first_outcome or ''}", number(d.first_agreement),
                d.second_pair, f"{d.second_status or '-'} {d.second_outcome or ''}", number(d.second_agreement),
            )  # fmt: skip
        console.print(table)


def _tables_help() -> str:
    """The tables, for `rlaif audit RUN sql --help`."""
    from rlaif.audit.tables import describe

    # \b: these lines are not to be wrapped
    tables = "\n\n".join(f"\b\n{table}" for table in describe().split("\n\n"))
    return f"Ask the tables themselves, read-only, in DuckDB's SQL.\n\n{tables}"


@app.command(help=_tables_help(), context_settings={"max_content_width": 120})
def sql(
    ctx: typer.Context,
    query: Annotated[str, typer.Argument(metavar="SQL", help="One SELECT, in quotes.")],
    limit: Annotated[int, typer.Option(min=1, help="Most rows to print.")] = 1000,
    json_: Json = False,
) -> None:
    """See `_tables_help`."""
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


@app.command()
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
        rows = export_preferences(index, to, _from_zero(iteration), constitution)
    if json_:
        typer.echo(json.dumps({"file": str(to), "rows": rows}))
    else:
        typer.echo(f"{rows} preferences: {to}")


from rlaif.cli.audit_replay import replay  # noqa: E402
from rlaif.cli.audit_verify import verify  # noqa: E402

app.command()(verify)
app.command()(replay)
