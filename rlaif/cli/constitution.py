"""`rlaif constitution list | show | check | diff | log`: the rules before they train anything, and in a run."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rlaif.cli.beat import VoteCount
from rlaif.console import counted, inert, stdout_console, visible
from rlaif.errors import UserError

if TYPE_CHECKING:
    from rlaif.audit.edits import Effect
    from rlaif.audit.text_log import Behaviour, Followed, Measured, OldPairs
    from rlaif.constitutions.constitution import Change, Constitution

app = typer.Typer(help="List, show, check and compare constitutions.", no_args_is_help=True, rich_markup_mode=None)

Directory = Annotated[Path, typer.Option("--dir", help="Folder that holds the constitutions.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for programs instead of a table.")]
Reference = Annotated[str, typer.Argument(metavar="NAME[@VERSION]", help="For example assistant@2.")]
DEFAULT = Path("constitutions")
_TEMPLATES = Path("prompts/judge")
_PREVIEW = 90


@app.command("list")
def list_(directory: Directory = DEFAULT, json_: Json = False) -> None:
    """All constitutions and their versions."""
    from rich.table import Table

    from rlaif.constitutions.constitution import list_constitutions

    found = list_constitutions(directory)
    if not found:
        raise _none_in(directory)
    if json_:
        typer.echo(json.dumps([{**c.ref.model_dump(), "summary": c.summary} for c in found], indent=1))
        return
    table = Table("constitution", "hash", "principles", "summary")
    for c in found:
        table.add_row(inert(str(c.ref)), c.hash, str(len(c.principles)), inert(c.summary))
    stdout_console().print(table)


@app.command()
def show(reference: Reference, directory: Directory = DEFAULT, json_: Json = False) -> None:
    """One constitution, principle by principle, with the contrasts that the likelihood judge derives from its rules."""
    from rlaif.constitutions.constitution import load_constitution
    from rlaif.constitutions.derived import NEWEST

    constitution = load_constitution(directory, reference)
    if json_:
        typer.echo(constitution.model_dump_json(indent=1))
        return
    console = stdout_console()
    console.print(f"[bold]{inert(str(constitution.ref))}[/] {constitution.hash}  {inert(constitution.summary)}")
    for p in constitution.principles:
        role = "guard" if p.guard else f"weight {p.weight:g}"
        console.print(f"\n[bold]{inert(p.id)}[/] ({role})\n  {inert(p.rule)}")
        if p.prefer:
            console.print(f"  prefer: {inert(p.prefer)}\n  avoid:  {inert(p.avoid or '')}")
        if p.check:
            console.print(f"  check:  {inert(str(p.check.model_dump(exclude_none=True)))}")
        for asked in p.paraphrases:
            console.print(
                f"  paraphrase ({asked.use})\n    prefer: {inert(asked.prefer)}\n    avoid:  {inert(asked.avoid)}"
            )
        for use in dict.fromkeys(example.use for example in p.examples):
            mine = [example for example in p.examples if example.use == use]
            console.print(f"  {len(mine)} examples ({use}), such as {inert(repr(mine[0].prompt))}")
            console.print(f"    better: {inert(_line(mine[0].better))}\n    worse:  {inert(_line(mine[0].worse))}")
        if p.opposite:
            console.print(f"  opposite: {inert(p.opposite)}")
        for voice in p.derived(NEWEST):
            sides = [" ".join(m.content for m in side) for side in (voice.prefer, voice.avoid)]
            console.print(
                f"  derived from the rule ({voice.use}, {inert(voice.id)})\n    prefer: {inert(sides[0])}\n"
                f"    avoid:  {inert(sides[1])}"
            )


@app.command()
def check(directory: Directory = DEFAULT, json_: Json = False) -> None:
    """Which judges each text of a folder serves, and what in it was probably not meant. Exit code 2 when one is broken,
    or a file is there that nothing reads."""
    from rlaif.constitutions.constitution import constitution_files, load_constitution, misnamed_files
    from rlaif.constitutions.templates import templates_in
    from rlaif.judging.services import services, warnings

    files = constitution_files(directory)
    if not files:
        raise _none_in(directory)
    templates = templates_in(_TEMPLATES) if _TEMPLATES.is_dir() else None
    wrong = [f"{path}: nothing reads it; a version is a file <name>/v<N>.yaml" for path in misnamed_files(directory)]
    found: list[dict[str, Any]] = []
    sound: list[str] = []
    for name, versions in files.items():
        for version, path in versions.items():
            try:
                constitution = load_constitution(directory, f"{name}@{version}")
                _check_template(constitution, path)
                served, odd = services(constitution, templates), warnings(constitution)
                found.append(
                    {**constitution.ref.model_dump(), "judges": [s.model_dump() for s in served], "warnings": odd}
                )
                sound.append(f"{constitution.ref} {constitution.hash} ok")
                if not json_:
                    typer.echo(str(constitution.ref))
                    for line in [*(s.line() for s in served), *(f"warning: {w}" for w in odd)]:
                        typer.echo(f"  {visible(line)}")
            except UserError as e:
                wrong.append(str(e))
    if json_:
        typer.echo(json.dumps(found, indent=1))
    else:
        print(*sound, sep="\n")
    for problem in wrong[:-1]:
        print(f"rlaif: {problem}", file=sys.stderr)
    if wrong:
        raise UserError(wrong[-1])


def _none_in(directory: Path) -> UserError:
    return UserError(
        f"{directory}: no constitution in it; each is a file {directory}/<name>/v<N>.yaml (`rlaif init DIR` writes the "
        "shipped ones)"
    )


def _check_template(constitution: Constitution, path: Path) -> None:
    from rlaif.constitutions.templates import load_template

    if _TEMPLATES.is_dir():
        try:
            load_template(_TEMPLATES, constitution.template)
        except UserError as e:
            raise UserError(f"{path}: {e}") from e


@app.command()
def diff(
    a: Reference,
    b: Reference,
    directory: Directory = DEFAULT,
    run: Annotated[
        Path | None, typer.Option(metavar="RUN", help="Ask this run's judge what the edit does to its verdicts.")
    ] = None,
    sample: Annotated[int, typer.Option(min=1, help="With --run: pairs to ask about.")] = 200,
    seed: Annotated[int, typer.Option(help="With --run: which pairs.")] = 0,
    job: Annotated[Path | None, typer.Option(help="With --run: take `judge` from this job file.")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="With --run: --set judge.base_url=…")
    ] = None,
    take_apart: Annotated[
        bool | None,
        typer.Option(
            "--take-apart/--whole",
            help="With --run and a judge that reads: ask about each part of the edit too. By default for few parts.",
        ),
    ] = None,
    json_: Json = False,
) -> None:
    """What changes between two texts, principle by principle; with --run also which verdicts it turns round."""
    from rlaif.constitutions.constitution import diff as diff_constitutions
    from rlaif.constitutions.constitution import load_constitution

    before, after = load_constitution(directory, a), load_constitution(directory, b)
    changes = diff_constitutions(before, after)
    effect = _effect(before, after, run, job, set_ or [], sample, seed, take_apart) if run else None
    if json_:
        listed = [c.model_dump() for c in changes]
        content = {"changes": listed, "effect": effect.model_dump(mode="json")} if effect else listed
        typer.echo(json.dumps(content, indent=1))
        return
    if not changes:
        stdout_console().print("no difference")
    _show_changes(changes)
    if effect:
        _show_effect(effect)


@app.command()
def log(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run directory, for example runs/quickstart.")],
    full: Annotated[bool, typer.Option("--full", help="Print examples, too.")] = False,
    json_: Json = False,
) -> None:
    """Which text was in force when in a run, what each change did to old pairs, and when held-out answers followed."""
    from rlaif.audit.text_log import text_log
    from rlaif.rundir.store import RunDir

    found = text_log(RunDir.open(run))
    for problem in found.problems:
        print(f"rlaif: {visible(problem)}", file=sys.stderr)
    if json_:
        typer.echo(found.model_dump_json(indent=1))
        return
    console = stdout_console()
    if not found.texts:
        console.print(f"{inert(found.run)}: no iteration has begun yet")
    for n, text in enumerate(found.texts):
        if n:
            console.print()
        several = text.until > text.since
        when = f"iterations {text.since + 1} to {text.until + 1}" if several else f"iteration {text.since + 1}"
        console.print(f"{when}: [bold]{inert(', '.join(text.names))}[/] {text.hash}")
        if (at_change := text.followed.at_change) is not None:
            console.print(f"at the change: {_measured(at_change)}")
        console.print(f"held-out answers: {_followed(text.followed)}")
        if text.followed.behaviour:
            console.print(f"they have {inert('; '.join(map(_behaviour, text.followed.behaviour)))}")
        if text.old_pairs:
            console.print(f"old pairs: {_old_pairs(text.old_pairs)}")
        _show_changes(text.changes or (), full)


def _old_pairs(found: OldPairs) -> str:
    counts = (
        (found.expired, "can't be replayed any more"),
        (found.unknown, "were judged under another text, and nobody asked what this one makes of them"),
        (found.valid_again, "of this text can again"),
        (found.kept, "can be replayed as they were"),
        (found.turned, "can be replayed with the other side chosen"),
        (found.stale, "can be replayed as they were judged, more rarely"),
        (found.dropped, "no longer kept by the filters"),
        (found.waiting, "wait to be judged again"),
    )
    (first, what), *others = [(n, what) for n, what in counts if n] or counts[:1]
    said = ", ".join([f"{first} kept pairs {what}", *(f"{n} {what}" for n, what in others)])
    asked = f"; {found.ballots} ballots were cast anew about {found.rejudged} of them" if found.ballots else ""
    unused = "; this job replays none (replay.share 0)" if not found.share else ""
    return f"{said} (within replay.max_age {found.max_age}){asked}{unused}"


def _followed(found: Followed) -> str:
    if found.newest is None:
        return "not measured under this text" if found.at_change is None else "not measured since"
    if found.first is None:
        return f"not yet; {_measured(found.newest)}"
    said = f"followed; {_measured(found.first)}"
    if found.not_after is not None:
        said += f", not yet after {found.not_after}"
    return said if found.newest == found.first else f"{said}; newest {_measured(found.newest)}"


def _measured(found: Measured) -> str:
    low, high = found.win_interval
    after = counted(found.iterations, "iteration")
    return f"win rate {found.win_rate:.2f} (95 % interval {low:.2f} to {high:.2f}) after {after} under it"


def _behaviour(found: Behaviour) -> str:
    passed = "".join(f", {share:.0%} pass the check of {principle}" for principle, share in found.checks.items())
    return f"{found.mean_words:.1f} words{passed} after {counted(found.iterations, 'iteration')}"


def _show_changes(changes: Sequence[Change], full: bool = True) -> None:
    console = stdout_console()
    for c in changes:
        field = f": {inert(c.field)}" if c.field else ""
        console.print(f"[bold]{inert(c.principle or 'constitution')}[/] {c.kind}{field}")
        for sign, colour, value in (("-", "red", c.before), ("+", "green", c.after)):
            for line in _lines(value if full else _without_examples(value)):
                console.print(f"  [{colour}]{sign}[/] {inert(line)}")


def _effect(
    before: Constitution,
    after: Constitution,
    where: Path,
    file: Path | None,
    overrides: list[str],
    sample: int,
    seed: int,
    take_apart: bool | None,
) -> Effect:
    from rlaif.audit.edits import Edit, Options, effect_of
    from rlaif.config import load_job, of_run, parse_job
    from rlaif.judging.opened import open_with_ballots
    from rlaif.rundir.store import RunDir

    run = RunDir.open(where)
    tree = run.job().model_dump(mode="json")
    if file is not None:
        tree["judge"] = load_job(file).judge.model_dump(mode="json")
    job = parse_job(of_run(tree, overrides), str(file or "--set"))
    judge = open_with_ballots(job, [before, after], Path.cwd(), lambda message: print(message, file=sys.stderr))
    count = VoteCount()
    with count.told():
        options = Options(sample, seed, take_apart)
        return effect_of(run, Edit(before, after), judge, job, options, lambda new, text: count(new))


def _show_effect(effect: Effect) -> None:
    from rich.table import Table

    console = stdout_console()
    stored = f"verdicts in the run: {effect.stored} under {effect.before}, {effect.stored_after} under {effect.after}"
    console.print(
        f"\n{effect.pairs} pairs of {inert(effect.run)} (seed {effect.seed}; {inert(stored)}), {effect.asked} votes "
        f"now by {inert(', '.join(effect.judges))}"
    )
    if effect.share is None:
        console.print("on no pair do both texts name a side: nothing to compare")
    else:
        low, high = effect.interval
        console.print(
            f"[bold]this edit turns {effect.share:.0%} of the verdicts[/] ({effect.turned} of {effect.compared}; 95 % "
            f"interval {low:.0%} to {high:.0%}); on {effect.undecided} pairs a text names no side"
        )
    console.print(f"the run's filters keep {effect.kept_before} of these pairs before, {effect.kept_after} after")
    for note in effect.notes:
        console.print(f"note: {inert(note)}")
    if effect.taken_apart:
        table = Table("part of the edit", "", "turns alone", "needed")
        for part in effect.parts:
            counts = [
                "can't stand alone" if n is None else f"{n} of {effect.taken_apart}" for n in (part.alone, part.needed)
            ]
            table.add_row(inert(part.part), part.kind, *counts)
        console.print(table)
        if effect.only_together:
            console.print(f"{effect.only_together} turn by no part alone")
    for turned in effect.examples:
        by = f"  by {', '.join(turned.alone)}" if turned.alone else ""
        console.print(f"\n[bold]{inert(turned.pair_id)}[/]  iteration {turned.iteration + 1}{inert(by)}")
        console.print(f"  prompt: {inert(_line(turned.prompt))}")
        sides = {"first": turned.first, "second": turned.second}
        for name, verdict in ((effect.before, turned.before), (effect.after, turned.after)):
            console.print(
                f"  {inert(str(name))}: {verdict.outcome} (p(first) {verdict.p_first:.2f}, agreement "
                f"{verdict.agreement:.2f})  {inert(_line(sides[verdict.outcome]))}"
            )


def _line(text: str) -> str:
    """A text's beginning on one line."""
    whole = " ".join(text.split())
    return whole if len(whole) <= _PREVIEW else whole[:_PREVIEW] + "…"


def _lines(value: Any) -> list[str]:
    """A value as YAML lines, the way a constitution file has it; empty parts are left out."""
    import yaml

    if (value := _stated(value)) is None:
        return []
    text = yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=120)
    return [line for line in text.splitlines() if line != "..."]


def _stated(value: Any) -> Any:
    """Without what a constitution file needn't say."""
    if isinstance(value, dict):
        return {k: stated for k, v in value.items() if (stated := _stated(v)) not in (None, [], (), {})}
    return [_stated(v) for v in value] if isinstance(value, list | tuple) else value


def _without_examples(value: Any) -> Any:
    """How many there are in their place."""
    if isinstance(value, dict):
        return {k: _without_examples(v) if k == "examples" else v for k, v in value.items()}
    is_listed = isinstance(value, list | tuple) and value and isinstance(value[0], dict)
    return f"{len(value)} (--full prints them)" if is_listed else value
