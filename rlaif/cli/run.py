"""`rlaif run | status | export | chat | doctor | models`: from a job file to a policy you can talk to."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rlaif.errors import UserError

if TYPE_CHECKING:
    from rlaif.config import Job

Json = Annotated[bool, typer.Option("--json", help="Print JSON for programs instead of a table.")]
RunPath = Annotated[Path, typer.Argument(metavar="RUN", help="A run directory, for example runs/quickstart.")]


def register(app: typer.Typer) -> None:
    """Adds this module's commands."""
    app.command()(run)
    app.command()(status)
    app.command()(export)
    app.command()(chat)
    app.command()(doctor)
    app.command()(models)


def run(
    job: Annotated[Path, typer.Argument(metavar="JOB", help="A job file, or a run directory to go on with.")],
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a setting: --set learner.beta=0.2")
    ] = None,
    name: Annotated[str | None, typer.Option(help="Name of the run directory; the job's name by default.")] = None,
    runs: Annotated[Path, typer.Option(help="Folder that holds the run directories.")] = Path("runs"),
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and its cost, run nothing.")] = False,
    cluster: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE|RUN",
            help="With --dry-run: simulate the job on a cluster's file, or at the speed of a run (docs/scale-plan.md).",
        ),
    ] = None,
    allow_change: Annotated[
        bool, typer.Option("--allow-change", help="Go on with a run although harmless settings changed.")
    ] = False,
    json_: Json = False,
) -> None:
    """Run a job, or go on with one that was stopped.

    A run that exists is continued at its first incomplete stage; nothing that was sampled, judged or
    trained is done twice. The same command starts and continues. A run directory with --name starts a new
    run from that run's job.
    """
    settings, where = _job_and_run(job, set_ or [], name, runs)
    if cluster is not None and not dry_run:
        raise UserError("--cluster: simulates, and runs nothing; give --dry-run with it")
    # After that: a mistake in the job is told at once.
    from rlaif.audit.summary import final_tables, write_summary
    from rlaif.cli.progress import make_progress
    from rlaif.loop.launch import execute

    if dry_run:
        _print_plan(settings, where, json_, allow_change, cluster)
        return
    with make_progress(settings.iterations) as progress:
        finished = execute(settings, where, Path.cwd(), progress, allow_change)
    summary = write_summary(finished)
    if json_:
        typer.echo(summary.model_dump_json(indent=1))
    else:
        final_tables(finished, summary)


def _job_and_run(job: Path, overrides: list[str], name: str | None, runs: Path) -> tuple[Job, Path]:
    from rlaif.config import load_job, of_run, parse_job
    from rlaif.rundir.store import RunDir, refuse_half_rolled_back

    refuse_half_rolled_back(job)
    if (job / "run.json").exists():
        tree = of_run(RunDir.open(job).header["job"], overrides)
        settings = parse_job(tree, str(job / "run.json"))
        if name is None:
            return settings, job
    else:
        settings = load_job(job, overrides)
    chosen = name or settings.name or job.stem
    if chosen in (".", "..") or Path(chosen).name != chosen:
        raise UserError(f"--name {chosen}: a run's name is one folder's, without `/`; --runs DIR says where it lies")
    return settings, runs / chosen


def _print_plan(job: Job, where: Path, as_json: bool, allow_change: bool, cluster: Path | None) -> None:
    from rlaif.cli.outlook import outlook_tables
    from rlaif.config import Columns
    from rlaif.loop.cost import estimate, table
    from rlaif.loop.launch import check_code, check_resume
    from rlaif.own_code import resolved
    from rlaif.rundir.store import RunDir

    job, code = resolved(job)
    check_code(RunDir(where), {own.name: own.sha256 for own in code})
    check_resume(RunDir(where), job, allow_change)
    copies = {name: (where / "prompts" / f"{name}.jsonl").resolve() for name in ("train", "held_out")}
    if all(path.exists() for path in copies.values()):  # it goes on from these, whatever became of the files
        prompts = job.prompts.model_copy(
            update={**{name: str(path) for name, path in copies.items()}, "columns": Columns()}
        )
        job = job.model_copy(update={"prompts": prompts})
    begun = RunDir.open(where) if (where / "run.json").exists() else None
    costs = estimate(job, Path.cwd(), begun, elsewhere=cluster is not None)
    found = None
    if cluster is not None:
        from rlaif.simulation import outlook, read_cluster, work_of

        found = outlook(work_of(job, Path.cwd()), read_cluster(cluster, job, costs["learner_processes"]))
    if as_json:
        simulated = {"simulated": found.model_dump(mode="json")} if found else {}
        typer.echo(json.dumps({"run": str(where), **costs, **simulated}, indent=1))
        return
    table(costs, where)
    if found:
        outlook_tables(found, str(cluster))


def status(run: RunPath, json_: Json = False) -> None:
    """Say where a run stands: iteration, stage, text in force, alarms, and what it takes on the disk."""
    from rlaif.audit.summary import status_of, status_table
    from rlaif.rundir.store import RunDir

    directory = RunDir.open(run)
    if json_:
        typer.echo(status_of(directory, disk=True).model_dump_json(indent=1))
    else:
        status_table(directory)


def export(
    run: RunPath,
    to: Annotated[Path, typer.Option("--to", metavar="DIR", help="A folder that does not exist yet.")],
    iteration: Annotated[
        int | None, typer.Option(help="Policy after so many iterations; the newest by default.")
    ] = None,
    adapter: Annotated[bool, typer.Option("--adapter", help="The LoRA alone, as peft loads it.")] = False,
) -> None:
    """Write a policy as plain transformers files, with a model card."""

    from rlaif.export import export_adapter, export_policy
    from rlaif.rundir.store import RunDir

    typer.echo(str((export_adapter if adapter else export_policy)(RunDir.open(run), to, iteration)))


def chat(
    run: RunPath,
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", help="Ask one question and exit.")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 128,
    temperature: Annotated[float, typer.Option(help="Sampling temperature, above 0.")] = 0.7,
    seed: Annotated[int, typer.Option(help="Seed of the samples.")] = 0,
) -> None:
    """Talk to the newest policy of a run, beside the base policy."""
    from rlaif.chat import conversation
    from rlaif.rundir.store import RunDir

    if not 0 < temperature < math.inf:
        raise UserError(f"--temperature {temperature}: expected a number above 0; 0.01 takes the likeliest words")
    conversation(RunDir.open(run), prompt, max_tokens, temperature, seed)


def doctor(
    deep: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="Check that what is trained of this model reaches what samples (minutes)."),
    ] = None,
    job: Annotated[
        Path | None,
        typer.Option(metavar="JOB", help="The same for the policy of a job (or a run), with all of its settings."),
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="With --deep or --job, a setting of the job.")
    ] = None,
    json_: Json = False,
) -> None:
    """Print what this machine has, what is missing, and the command that mends it.

    With --deep MODEL: load the model, train two steps, export, load that, load the model again; after each load
    sampler and learner score the same texts, and have to agree. Try it before a run on a model that nobody tried:
    rlaif doctor --deep ./my-model --set sampling.engine=transformers

    With --job JOB the same with what a job says: its model and adapter, engine, precision, LoRA, system prompt and chat
    template's arguments.
    """
    if deep is not None and job is not None:
        raise UserError("--deep MODEL or --job JOB, not both; a job names its model (policy.model)")
    if what := deep if job is None else _job_and_run(job, set_ or [], None, Path())[0]:
        from rlaif.cli.doctor_deep import check

        check(what, set_ or [], json_)
        return
    if set_:
        raise UserError("--set: takes effect with --deep MODEL or --job JOB alone")
    from rich.table import Table

    from rlaif.console import inert, stdout_console
    from rlaif.doctor import diagnose

    checks = diagnose()
    if json_:
        typer.echo(json.dumps([c.model_dump() for c in checks], indent=1))
    else:
        table = Table("", "check", "found", "mend")
        marks = {"ok": "[green]ok[/]", "missing": "[red]missing[/]", "warning": "[yellow]warning[/]"}
        for c in checks:
            table.add_row(marks[c.status], *(inert(cell) for cell in (c.name, c.found, c.mend or "")))
        stdout_console().print(table)
    if any(c.status == "missing" for c in checks):
        raise typer.Exit(1)


def models(name: Annotated[str, typer.Argument(help="For example embedded:smollm2-135m-instruct.")]) -> None:
    """Fetch or convert a model, and print the folder it is in."""
    from rlaif.models import resolve

    if not name:
        raise UserError("name a model, for example embedded:smollm2-135m-instruct")
    typer.echo(str(resolve(name, progress=lambda message, share: typer.echo(message, err=True))))
