"""The runs of a folder as a tree: which one went on from which, and where each stands.

In: a folder of run directories. Out: a `RunRow` for each, a branch after its parent. Only small files are read (plans,
metrics, events, heads), and sizes looked at.
"""

from __future__ import annotations

from pathlib import Path

from rlaif.audit.disk import size_of
from rlaif.errors import RlaifError, UserError
from rlaif.records import EvaluationMetrics, Record
from rlaif.rundir.heads import parent_folder
from rlaif.rundir.store import RunDir, read_record


class RunRow(Record):
    """A run in one line."""

    run: str
    """Its folder's name."""
    parent: str | None
    """The run of this folder that it went on from; None for one that began with the base policy, or whose parent isn't
    here."""
    at: int | None
    """How many iterations are its past, where it is a branch."""
    depth: int
    """Branches between it and a run without a parent here."""
    iterations_done: int
    iterations: int | None
    """That its job wants."""
    constitution: str | None
    """The newest that was in force."""
    updates: int | None
    """Iterations before the newest evaluation, from which the next four are; None without one."""
    win_rate: float | None
    win_interval: tuple[float, float] | None
    kl_per_token: float | None
    kept_share: float | None = None
    """Of the probes that the base policy passed; None where it isn't measured."""
    alarms: int
    bytes: int
    shared: int
    """Of these, in files that another run holds too."""
    problem: str | None = None
    """Why the rest isn't known."""


def runs_in(folder: Path) -> list[RunRow]:
    """The runs of a folder, by name, each followed by its branches.

    Raises:
        UserError: there is no such folder, or it is a run itself.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; name one that holds runs")
    if (folder / "run.json").exists():
        raise UserError(f"{folder}: is a run itself; name the folder that holds it, or `rlaif status {folder}`")
    found = {path.name: RunDir(path) for path in sorted(folder.iterdir()) if is_run(path)}
    parents = {name: _parent(run) for name, run in found.items()}
    rows: list[RunRow] = []

    def add(name: str, depth: int) -> None:
        rows.append(_row(found[name], parents[name], depth))
        for child in (c for c, parent in parents.items() if parent == name):
            add(child, depth + 1)

    for name, parent in parents.items():
        if parent is None:
            add(name, 0)
    return rows


def is_run(path: Path) -> bool:
    """Whether a folder is a run, and not one that is still being made."""
    return (path / "run.json").exists() and path.suffix not in (".partial", ".rolling-back")


def _parent(run: RunDir) -> str | None:
    try:
        folder = parent_folder(run)
    except (RlaifError, OSError):  # run.json is damaged, which `_row` says
        return None
    return folder.name if folder and is_run(folder) else None


def _row(run: RunDir, parent: str | None, depth: int) -> RunRow:
    whole, shared = size_of(run.path)
    row = RunRow(
        run=run.path.name,
        parent=parent,
        at=None,
        depth=depth,
        iterations_done=len(run.done()),
        iterations=None,
        constitution=None,
        updates=None,
        win_rate=None,
        win_interval=None,
        kl_per_token=None,
        alarms=sum(event.kind == "alarm" for event in run.events()),
        bytes=whole,
        shared=shared,
    )
    try:
        return row.model_copy(update=_stands(RunDir.open(run.path)))
    except RlaifError as e:
        return row.model_copy(update={"problem": str(e)})


def _stands(run: RunDir) -> dict[str, object]:
    """What a run's own files say of it."""
    plans = [k for k in run.iterations() if (run.iteration(k).path / "plan.json").exists()]
    paths = [run.evaluation(k).path / "metrics.json" for k in run.evaluations() if k]
    measured = [path for path in paths if path.exists()]
    newest = read_record(measured[-1], EvaluationMetrics) if measured else None
    return {
        "at": run.parent.iterations if run.parent else None,
        "iterations": run.header["job"].get("iterations"),
        "constitution": str(run.plan(plans[-1]).in_force.constitution) if plans else None,
        "updates": newest.updates if newest else None,
        "win_rate": newest.win_rate if newest else None,
        "win_interval": newest.win_interval if newest else None,
        "kl_per_token": newest.kl_per_token if newest else None,
        "kept_share": newest.retention.kept_share if newest and newest.retention else None,
    }
