"""A run that goes on from an earlier state of another one: a branch.

In: a run, and how many of its iterations are to be the past. Out: a run directory that holds them and what a resumed
run needs, and nothing of what came after. Files that never change are hard links of the parent's, or copies on a file
system without such links. Files that grow are copied up to where they stood then. So the parent's chain of heads is the
beginning of the branch's own, and every command reads the parent's iterations as the branch's past.
"""

from __future__ import annotations

import errno
import itertools
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

from pydantic import ValidationError

from rlaif.config import Job, changed_keys, may_change, of_run, parse_job
from rlaif.constitutions.constitution import load_constitution
from rlaif.errors import UserError
from rlaif.judging.kinds import kind_of
from rlaif.judging.spending import REFERENCE_WASTED, WASTED, Wasted, wasted_by
from rlaif.own_code import load
from rlaif.records import Event, HumanLabel, Parent, Record, UpdateStep, Vote, digest, stored
from rlaif.review.labels import review_lock
from rlaif.rundir.checkpoints import Checkpoint, checkpoints, policy_dir, state_dir, write_new_optimizer
from rlaif.rundir.heads import EVENTS, LABELS, Head, heads_up_to, write_head
from rlaif.rundir.heads import FILE as HEADS
from rlaif.rundir.stages import REFERENCE_VOTES, VOTES
from rlaif.rundir.store import RunDir, disk_errors, make_folder, read_grown, rolling_back, write_json

R = TypeVar("R", bound=Record)

MAY_BRANCH = (
    "constitution",
    "schedule",
    "prompts.per_iteration",
    "source",
    "sampling.completions_per_prompt",
    "pairing",
    "replay",
    "learner.beta",
    "learner.loss_type",
    "learner.batch_size",
    "learner.epochs",
    "learner.reference",
)
"""What a branch may change beside what any run may (`Adjustable`): settings by which iterations to come are made, and
nobody reads the past or measures against it."""

_CARRIED = ("job_changed", "schema_raised", "branched", "rolled_back")
"""Events that say what became of run.json: a branch goes on with the parent's job as it is now."""

_NO_LINKS = (errno.EXDEV, errno.EPERM, errno.EACCES, errno.EMLINK, errno.ENOTSUP, errno.ENOSYS)
"""What a file system says that can't link, or not these two files."""


def branch(run: RunDir, at: int, name: str, overrides: Sequence[str] = (), new_optimizer: bool = False) -> RunDir:
    """Makes a run beside another one, with the other's first iterations as its past. The other one may be at work.

    Args:
        run: the parent.
        at: so many iterations.
        name: of the new run's folder.
        overrides: settings that are to be others from there on, as `a.b=value`.
        new_optimizer: go on from the policy alone, for where the learner's state isn't kept.

    Raises:
        UserError: there is no such state to go on from, a setting may not change, or there is a run of that name.
    """
    if name in ("", ".", "..") or Path(name).name != name:
        raise UserError(f"--name {name}: a run's name is one folder's, without `/`; it lies beside {run.path}")
    where = _beside(run, name)
    if where.exists():
        raise UserError(f"--name {name}: {where} is there already; take another name")
    job, changed = _job(run, overrides)
    start = _start(run, at, new_optimizer)
    if job.iterations < at:
        raise UserError(f"--set iterations={job.iterations}: the branch has {at} behind it; give at least that many")
    _check_there(job, run, where)
    if job.name is not None:
        job = job.model_copy(update={"name": name})
    partial = _beside(run, f"{name}.partial")
    try:
        _build(partial, run, start, job, _name(run), "branched", changed)
        os.rename(partial, where)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return RunDir(where)


def rollback(path: Path, to: int, new_optimizer: bool = False) -> RunDir:
    """Lets a run go on from its own state after `to` iterations. As it was, it is kept beside it, a run of its own.

    A branch is made, and takes the run's place by two renames; one that was killed between them is finished.

    Returns:
        The run as it was.

    Raises:
        UserError: there is no such state, nothing came after it, or another process writes the run.
    """
    run = RunDir(path)
    if (half := rolling_back(path)).is_dir() and not path.exists():
        os.rename(half, path)
        if (parent := run.parent) is not None and parent.iterations == to:
            return RunDir(_beside(run, parent.run))
    run = RunDir.open(path)
    with run.lock(), review_lock(run):
        start = _start(run, to, new_optimizer)
        if run.iterations()[-1] < to and not new_optimizer:
            raise UserError(
                f"after {to}: nothing came after that in {path}; `rlaif run {path}` goes on from there, with more "
                "iterations where it is done (--set iterations=N --allow-change)"
            )
        number = next(n for n in itertools.count(1) if not _beside(run, _before(run, n)).exists())
        before, partial = _beside(run, _before(run, number)), half.with_name(f"{half.name}.partial")
        shutil.rmtree(half, ignore_errors=True)
        _build(partial, run, start, _job(run)[0], before.name, "rolled_back")
        os.rename(partial, half)  # from here on it is known to be whole
        os.rename(path, before)
        os.rename(half, path)
    return RunDir(before)


def _check_there(job: Job, run: RunDir, where: Path) -> None:
    """Whether the texts and the source that a branch names, and its parent didn't, are there: found an hour later, it
    could not be mended any more.

    Raises:
        UserError: they aren't, or can't be read.
    """
    from rlaif.loop.source import open_source

    before = run.job()
    known = {before.constitution, *(before.schedule or {}).values()}
    for reference in {job.constitution, *(job.schedule or {}).values()} - known - {None}:
        load_constitution(Path(job.constitutions_dir), str(reference))
    if job.source is not None and job.source != before.source:
        open_source(job, Path(), RunDir(where))


class _Start(NamedTuple):
    """Where a branch begins."""

    iterations: int
    updated: int | None
    """The last of them that made a policy; None when none did."""
    new_optimizer: int | None
    """Steps that were taken before a new optimizer goes on from that policy; None: the learner's state goes on."""


def _start(run: RunDir, at: int, new_optimizer: bool) -> _Start:
    """Looks whether there is something to go on from.

    Raises:
        UserError: there isn't; with the nearest state that there is.
    """
    kept = {found.iterations: found for found in checkpoints(run)}
    if at not in kept:
        done = f"has done {len(kept)} iterations; give one of 1 to {len(kept)}" if kept else "has done no iteration yet"
        raise UserError(f"after {at}: {run.path} {done}")
    found = kept[at]
    if found.updated is None:
        return _Start(at, None, None)
    if not found.policy or not (found.state or new_optimizer):
        what = "the learner's state" if found.policy else "the policy"
        raise UserError(
            f"after {at}: {run.path} no longer has {what} of then (keep_checkpoints); {_nearest([*kept.values()], at)}"
        )
    if not new_optimizer:
        return _Start(at, found.updated, None)
    learner = run.job().learner
    if ":" in learner.kind and not hasattr(load("learner.kind", learner.kind).made, "start"):
        raise UserError(f"--new-optimizer: {learner.kind} has no method `start`, which goes on from a policy alone")
    if learner.lora is not None:
        raise UserError(
            "--new-optimizer: learner.lora trains an adapter, which an exported policy has merged; start a new run "
            f"with policy.model={policy_dir(run, found.updated)}"
        )
    steps = run.iteration(found.updated).read("updates", UpdateStep)
    return _Start(at, found.updated, steps[-1].step if steps else 0)


def _nearest(kept: list[Checkpoint], at: int) -> str:
    """Where a run can be gone on from instead, in words."""
    near = sorted(kept, key=lambda found: (abs(found.iterations - at), found.iterations))
    whole = next((found.iterations for found in near if found.policy and found.state), None)
    policy = next((found.iterations for found in near if found.policy), None)
    ways = [f"the nearest that is kept whole is after {whole}"] if whole is not None else []
    if policy is not None and policy != whole:
        ways += [f"--new-optimizer goes on from the policy alone, after {policy}"]
    return ", ".join(ways) or "nothing is kept to go on from"


def _job(run: RunDir, overrides: Sequence[str] = ()) -> tuple[Job, str]:
    """The job of a branch, and what differs from the parent's, in words.

    Raises:
        UserError: an override isn't one, or changes what may not change.
    """
    source, tree = str(run.path / "run.json"), run.header["job"]
    before = parse_job(of_run(tree), source)
    job = parse_job(of_run(tree, overrides), "--set")
    changes = changed_keys(before.model_dump(mode="json"), job.model_dump(mode="json"))
    if refused := [key for key in changes if not may_change(key, before, job) and not may_branch(key)]:
        raise UserError(
            f"--set {refused[0]}: what {run.path} did so far was made or is measured by it; start a new run with it. A "
            f"branch may change {', '.join(MAY_BRANCH)}, and what docs/job.md marks with `May change`"
        )
    named = ", ".join(f"{key} ({old!r} -> {new!r})" for key, (old, new) in changes.items())
    return job, named


def may_branch(key: str) -> bool:
    """Whether a branch may change a dotted key that a run may not."""
    return any(f"{key}.".startswith(f"{allowed}.") for allowed in MAY_BRANCH)


def _build(to: Path, run: RunDir, start: _Start, job: Job, parent_name: str, kind: str, changed: str = "") -> None:
    """Writes the run directory of a branch. `parent_name` is the name that the run has, or will have."""
    shutil.rmtree(to, ignore_errors=True)
    make_folder(to)
    made, past = RunDir(to), _past(run, start.iterations)
    with disk_errors(to):
        try:
            for part in _parts(run, start, past):
                _share(run.path / part, to / part)
        except FileNotFoundError as e:
            raise UserError(f"{e.filename}: the run at work removed it just now; try again") from e
        # The parent may go on writing these: what texts were pinned to, and what a judge wasted, which counts as spent.
        if (pins := run.path / "constitutions" / "pins.json").exists():
            _write(to / "constitutions" / "pins.json", pins.read_bytes())
        for name in (WASTED, REFERENCE_WASTED):
            content = b"".join(line for _, line in _lines(run.path / name))
            if kind == "rolled_back":  # what was paid was paid, though what it was paid for is set aside
                content += b"".join(row.model_dump_json().encode() + b"\n" for row in _set_aside(run, made, name))
            if content:
                _write(to / name, content)
        for name, content in ((HEADS, past.lines), (EVENTS, _events(run, past)), (LABELS, _labels(run, past))):
            if content:
                _write(to / name, content)
        if start.new_optimizer is not None and start.updated is not None:
            write_new_optimizer(state_dir(made, start.updated), start.new_optimizer)
    found = checkpoints(made)[-1]
    if not (found.policy and found.state):
        raise UserError(f"{run.path}: the run at work removed the checkpoint just now; try again, or another iteration")
    parent = Parent(run=parent_name, iterations=start.iterations, head=past.head.name if past.head else None)
    dumped = job.model_dump(mode="json")
    header = run.header | {"job": dumped, "job_digest": digest(dumped), "parent": parent.model_dump(mode="json")}
    write_json(to / "run.json", header)
    more = [f"with {changed}"] if changed else []
    more += ["a new optimizer goes on from the policy"] if start.new_optimizer is not None else []
    message = "; ".join([f"goes on from {parent_name} after {start.iterations} iterations", *more])
    made.event(kind, message, **parent.model_dump(mode="json"), **({"changed": changed} if changed else {}))
    write_head(made, anew=True)  # from here on nobody changes what was written, unnoticed


def _set_aside(run: RunDir, made: RunDir, name: str) -> list[Wasted]:
    """What the votes of a run cost that are none of the one made from it, by the judge whose file this is."""
    job = run.job()
    judge, stages = (job.judge, VOTES) if name == WASTED else (job.eval.reference_judge, (REFERENCE_VOTES,))
    paid = kind_of(judge).priced() if judge else {}
    folders = [*map(run.iteration, run.iterations()), *map(run.evaluation, run.evaluations())]
    gone = [here.path for here in folders if not (made.path / here.path.relative_to(run.path)).exists()]
    files = [here / f"{stage}.jsonl{end}" for here in gone for stage in stages for end in ("", ".partial")]
    return [row for file in files for row in wasted_by(read_grown(file, Vote)) if row.judge in paid]


class _Past(NamedTuple):
    """What a run had noted when so many iterations were done."""

    iterations: int
    lines: bytes
    """Of heads.jsonl."""
    heads: list[Head]

    @property
    def head(self) -> Head | None:
        """The one of then; None in a run that is older than heads, or was killed before that one."""
        return next((head for head in self.heads if head.iteration == self.iterations - 1), None)

    def size(self, name: str) -> int:
        """Bytes of a file that grows; 0 where nobody noted it."""
        grown = self.head.growing.get(name) if self.head else None
        return grown.size if grown else 0


def _past(run: RunDir, iterations: int) -> _Past:
    return _Past(iterations, *heads_up_to(run.path, iterations - 1))


def _parts(run: RunDir, start: _Start, past: _Past) -> Iterator[str]:
    """Files and folders that never change again, and belong to the past."""
    yield from (name for name in ("prompts", "calibration.json", "accelerate.yaml") if (run.path / name).exists())
    copied = {Path(name).parts[1] for head in past.heads for name in head.files if name.startswith("constitutions/")}
    for text in sorted((run.path / "constitutions").glob("*/")):
        if text.name in copied or past.head is None:
            yield f"constitutions/{text.name}"
    yield from (f"iterations/{k:04d}" for k in range(start.iterations))
    last = run.plan(start.iterations - 1)
    for updates in run.evaluations():
        # Of the policy of then there may be one that the next iteration made, since its text was another.
        if updates < start.iterations or (updates == start.iterations and last.evaluate):
            yield f"evaluations/{updates:04d}"
    for state in sorted((run.path / "learner").glob("[0-9]*")):
        replaced = start.new_optimizer is not None and state.name == f"{start.updated:04d}"
        if state.name.isdigit() and int(state.name) < start.iterations and not replaced:
            yield f"learner/{state.name}"


def _events(run: RunDir, past: _Past) -> bytes:
    """The events of the past, and later ones that say what became of run.json."""
    known, of_then, content = {head.name for head in past.heads}, True, b""
    for start, line in _lines(run.path / EVENTS):
        event = _read(Event, line)
        if past.head is not None:
            of_then = start < past.size(EVENTS)
        elif event is not None:
            later = event.iteration is not None and event.iteration >= past.iterations
            of_then = of_then and not later and event.data.get("head") in (None, *known)
        if of_then or (event is not None and event.kind in _CARRIED):
            content += line
    return content


def _labels(run: RunDir, past: _Past) -> bytes:
    """Labels on pairs of the past, later ones too: no word of a person's is lost. A pair that the branch makes may have
    the name of one that its parent made later; labels on those stay behind."""
    content = b""
    for start, line in _lines(run.path / LABELS):
        label = _read(HumanLabel, line)
        if start < past.size(LABELS) or (label is not None and label.iteration < past.iterations):
            content += line
    return content


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """The whole lines of a file that grows, each with where it starts."""
    start = 0
    for line in path.open("rb") if path.exists() else ():
        if line.endswith(b"\n"):
            yield start, line
        start += len(line)


def _read(record: type[R], line: bytes) -> R | None:
    try:
        return stored(record, line)
    except ValidationError:
        return None


def _share(source: Path, to: Path) -> None:
    """Links a file, or every file of a folder; copies what can't be linked. What is being written is left out."""
    if source.is_dir():
        make_folder(to)
        for inner in sorted(source.iterdir()):
            if inner.suffix != ".partial":
                _share(inner, to / inner.name)
        return
    make_folder(to.parent)
    try:
        os.link(source.resolve(), to)
    except OSError as e:
        if e.errno not in _NO_LINKS:
            raise
        shutil.copy2(source, to)


def _write(path: Path, content: bytes) -> None:
    """A file of the branch's own, durable."""
    make_folder(path.parent)
    with path.open("wb") as f:
        f.write(content)
        f.flush()
        os.fsync(f.fileno())


def _name(run: RunDir) -> str:
    return Path(os.path.abspath(run.path)).name


def _before(run: RunDir, number: int) -> str:
    return f"{_name(run)}.before-rollback-{number}"


def _beside(run: RunDir, name: str) -> Path:
    """A folder beside a run's."""
    nameless = run.path.name in ("", "..")
    return (Path(os.path.abspath(run.path)) if nameless else run.path).parent / name
