"""`rlaif audit RUN list | show | flips | disagree`: pairs, and one of them in full."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from rlaif.cli.audit_common import (
    Iteration,
    Json,
    Limit,
    Offset,
    TextName,
    from_zero,
    number,
    opened,
    print_json,
    print_total,
    short,
)
from rlaif.errors import RlaifError, UserError

if TYPE_CHECKING:
    from rich.console import Console

    from rlaif.audit.pair import PairDetail
    from rlaif.audit.pairs import Page, PairFilter
    from rlaif.console import Listing


def list_(
    ctx: typer.Context,
    iteration: Iteration = None,
    constitution: TextName = None,
    status: Annotated[Literal["kept", "dropped", "review"] | None, typer.Option(help="The filter's word.")] = None,
    reason: Annotated[str | None, typer.Option(help="A rule that spoke against the pair.")] = None,
    principle: Annotated[str | None, typer.Option(help="A principle that some vote is about.")] = None,
    judge: Annotated[str | None, typer.Option(help="A judge that voted (a part of its name).")] = None,
    min_agreement: Annotated[float | None, typer.Option(help="Least agreement.")] = None,
    max_agreement: Annotated[float | None, typer.Option(help="Most agreement.")] = None,
    flipped: Annotated[
        bool | None, typer.Option("--flipped/--not-flipped", help="The order changed a voice's answer.")
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
    pair_filter = _filter(
        iteration=iteration if evaluation else from_zero(iteration),
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
    _list(ctx, pair_filter, sort, descending, limit, offset, json_)


def _filter(**fields: Any) -> PairFilter:
    from pydantic import ValidationError

    from rlaif.audit.pairs import PairFilter

    try:
        return PairFilter.model_validate(fields)
    except ValidationError as e:
        error = e.errors()[0]
        raise UserError(f"--{str(error['loc'][0]).replace('_', '-')}: {error['msg']} (found {error['input']!r})") from e


def _list(
    ctx: typer.Context, pair_filter: PairFilter, sort: Any, descending: bool, limit: int, offset: int, json_: bool
) -> None:
    from rlaif.audit.pairs import list_pairs, unknown_values

    with opened(ctx) as index:
        page = list_pairs(index, pair_filter, sort, descending, limit, offset)
        _warn([*page.problems, *([] if page.total else unknown_values(index, pair_filter))])
    if json_:
        print_json(page)
    else:
        _print_page(page)


def _warn(lines: Iterable[str]) -> None:
    for line in lines:
        typer.echo(f"rlaif: {line}", err=True)


def _print_page(page: Page) -> None:
    from rlaif.console import Listing, stdout_console

    table = Listing(
        "pair", "iter.", "text", "prompt", "decision", "verdict", "agree", "p(first)", "votes",
        right=("iter.", "agree", "p(first)", "votes"), spare=("votes", "p(first)", "text", "agree"),
    )  # fmt: skip
    for r in page.rows:
        table.add(
            r.pair_id,
            f"eval {r.iteration}" if r.evaluation else str(r.iteration + 1),
            r.constitution or "-",
            short(r.prompt),
            f"{r.status or 'undecided'} {' '.join(r.reasons)}".strip(),
            f"{r.outcome or '-'}{' (flip)' if r.order_flip else ''}",
            number(r.agreement),
            number(r.p_first),
            f"{r.valid_votes}" + (f"+{r.abstentions} abst." if r.abstentions else ""),
        )
    if page.rows:
        table.print(stdout_console())
    print_total(page.total, page.offset, len(page.rows))


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
        asked = {}
        for v in found.votes if questions else ():
            try:
                asked[v.ballot.id] = question_of(index.run, found, v.ballot.id)
            except (RlaifError, OSError) as e:
                asked[v.ballot.id] = f"question can't be shown: {e}"
    _warn(found.problems)
    if json_:
        import json

        values = found.model_dump(mode="json") | ({"questions": asked} if questions else {})
        typer.echo(json.dumps(values, indent=1, ensure_ascii=False))
    else:
        _print_pair(found, asked)


def _print_pair(found: PairDetail, asked: dict[str, str]) -> None:
    from rlaif.console import inert, stdout_console

    console = stdout_console()
    row = found.row
    where = f"evaluation after {row.iteration}" if row.evaluation else f"iteration {row.iteration + 1}"
    text = f"{found.constitution} ({found.constitution.hash})" if found.constitution else "text unknown"
    by = "labelled by the data set that it is from" if _by_data(found) else f"judged under {text}"
    judged = inert(f"{by}, paired by {found.pair.method}")
    console.print(f"[bold]pair {inert(row.pair_id)}[/]  {where}, {judged}")
    for m in found.prompt_messages:
        console.print(f"[dim]{m.role}:[/] {inert(m.content)}", soft_wrap=True)
    _print_completions(console, found)
    _votes(found).print(console)
    for ballot_id, question in asked.items():
        console.print(f"\n[bold]question of ballot {inert(ballot_id)}[/]")
        console.print(inert(question), soft_wrap=True)
    _print_decision(console, found)
    for label in found.labels:
        because = f": {label.reason}" if label.reason else ""
        console.print(inert(f"label: {label.outcome} by {label.author} at {label.time}{because}"))
    _print_training(console, found)
    if found.vote_lines:
        console.print(inert(f"votes: {found.vote_lines[0]} to line {found.vote_lines[-1].rpartition(':')[2]}"))


def _print_completions(console: Console, found: PairDetail) -> None:
    """Side by side; one below the other when piped."""
    from rlaif.console import inert, piped

    sides = []
    for name, completion in (("first", found.first), ("second", found.second)):
        ended = "not in the log" if completion is None else completion.finish_reason
        mark = " (chosen)" if found.row.winner == name else ""
        text = "-" if completion is None else completion.text
        sides.append((f"{name}{mark}: {getattr(found.pair, name)}, {ended}", text))
    if piped():
        for heading, text in sides:
            console.print(f"[bold]{inert(heading)}[/]\n{inert(text)}", soft_wrap=True)
    else:
        console.print(_side_by_side(sides))


def _votes(found: PairDetail) -> Listing:
    from rlaif.console import Listing

    votes = Listing("ballot", "judge", "voice", "shown", "outcome", "p(first)", "raw reply",
                    right=("p(first)",), title="votes")  # fmt: skip
    for v in found.votes:
        b = v.ballot
        votes.add(
            b.id,
            f"{b.judge} ({v.model}{f' at {v.server}' if v.server else ''})",
            f"{b.voice}{f' #{b.sample_index}' if b.sample_index else ''}{' guard' if b.guard else ''}",
            {"forward": "first, second", "reversed": "second, first"}.get(b.order, "no slots"),
            f"{v.outcome}{f' ({v.abstain_reason})' if v.abstain_reason else ''}",
            number(v.p_first, 3),
            v.raw_reply or v.error or "",
        )
    return votes


def _by_data(found: PairDetail) -> bool:
    """Its label is a data set's: nobody voted."""
    return found.decision is not None and found.decision.source == "data"


def _print_decision(console: Console, found: PairDetail) -> None:
    """The verdict, the filter's word, and what each rule said."""
    from rlaif.console import inert

    if found.decision is None:
        console.print("the decision can't be read" if found.problems else "not decided yet")
        return
    decision, verdict = found.decision, found.decision.verdict
    sent_by = f" ({decision.review_rule})" if decision.review_rule else ""
    said = f"verdict: [bold]{verdict.outcome}[/], p(first) {number(verdict.p_first, 3)}, "
    said += f"agreement {number(verdict.agreement, 3)}"
    if _by_data(found):
        said = f"nobody voted: the data set that it is from calls {decision.winner or 'neither'} better"
    console.print(f"{said}; decision: [bold]{decision.status}[/]{sent_by}")
    for rule in found.rules:
        mark = "[green]passed[/]" if rule.passed else "[red]against[/]"
        console.print(f"  {mark}  {inert(f'{rule.name:13} {rule.sentence}')}")


def _print_training(console: Console, found: PairDetail) -> None:
    """Into which policies it went, and what later texts made of it."""
    from rlaif.console import inert

    for later in found.later:
        console.print(
            f"iteration {later.iteration + 1}, {inert(later.constitution)}: [bold]{later.standing}[/]; {later.carried} "
            f"votes carried over, {later.lost} lost, {later.asked} ballots cast anew"
        )
    for t in found.preferences:
        steps = f"step {', '.join(map(str, t.steps))}" if t.steps else "no step"
        what = f"iteration {t.iteration + 1} as {t.source}, {t.chosen} chosen"
        if t.policy_after:
            console.print(f"trained in {what}: {steps}, into policy {t.policy_after} (after {t.iteration + 1})")
        elif t.unknown:
            console.print(inert(f"mixed in {what}: {steps}; policy not known: {t.unknown}"), soft_wrap=True)
        else:
            console.print(f"mixed in {what}: {'update skipped' if t.skipped else 'no policy yet'}")
    if not any(t.policy_after or t.unknown for t in found.preferences):
        console.print("never trained on")


def _side_by_side(sides: list[tuple[str, str]]) -> Any:
    from rich.table import Table
    from rich.text import Text

    from rlaif.console import visible

    table = Table(show_lines=True, expand=True)
    for heading, _ in sides:
        table.add_column(Text(visible(heading)), ratio=1, overflow="fold")
    table.add_row(*(Text(visible(text)) for _, text in sides))
    return table


def flips(
    ctx: typer.Context,
    iteration: Iteration = None,
    constitution: TextName = None,
    limit: Limit = 50,
    offset: Offset = 0,
    json_: Json = False,
) -> None:
    """Pairs on which a voice gave another answer when the order changed."""
    _splits(ctx, {"flipped": True}, iteration, constitution, limit, offset, json_)


def disagree(
    ctx: typer.Context,
    iteration: Iteration = None,
    constitution: TextName = None,
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
    from rlaif.audit.pairs import splits, unknown_values
    from rlaif.console import Listing, piped, stdout_console

    pair_filter = _filter(iteration=from_zero(iteration), constitution=constitution, **wanted)
    with opened(ctx) as index:
        page = splits(index, pair_filter, limit, offset)
        _warn([] if page.total else unknown_values(index, pair_filter))
    if json_:
        print_json(page)
        return
    table = Listing("pair", "iter.", "prompt", "decision", "judge", "voice", "first shown first", "second shown first",
                    right=("iter.",))  # fmt: skip
    for split in page.rows:
        r = split.row
        start = [r.pair_id, str(r.iteration + 1), short(r.prompt, 40), r.status or "undecided"]
        for v in split.voices:
            voice = f"{v.voice}{f' #{v.sample_index}' if v.sample_index else ''}{' guard' if v.guard else ''}"
            forward = " ".join(v.forward or v.unordered) or "-"
            table.add(*start, v.judge, voice, forward, " ".join(v.reversed) or "-")
            if not piped():  # a program wants to know of every line which pair it is about
                start = [""] * 4
        table.end_section()
    if page.rows:
        table.print(stdout_console())
    print_total(page.total, page.offset, len(page.rows))
