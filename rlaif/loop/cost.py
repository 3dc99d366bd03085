"""`rlaif run --dry-run`: what a job would do and cost, before it does anything. No model is loaded.

Of a run that was begun, or a branch, what is left is counted. An iteration that is under way counts as a whole.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, get_args

import psutil
from rich.table import Table

from rlaif import models
from rlaif.config import ChatSettings, Job, Judge, PlacedRole, Precision, worth_knowing
from rlaif.console import counted, inert, stdout_console
from rlaif.constitutions.constitution import Constitution, load_constitution
from rlaif.constitutions.templates import Template, load_template, templates_in
from rlaif.data.prompts import check_enough, exclude_held_out, load_prompts, shipped_held_out
from rlaif.errors import UserError
from rlaif.evaluation.probes import Probe
from rlaif.evaluation.texts import shipped as fixed_texts
from rlaif.hardware import cpu_has_bf16, gpu_names
from rlaif.judging.ballots import Role
from rlaif.judging.calibration import Asked, Calibration, read_calibration
from rlaif.judging.carried import carry
from rlaif.judging.filters import check_asked
from rlaif.judging.kinds import kind_of
from rlaif.learning.launched import Launched, accelerate_file, launched
from rlaif.loop.anchors import is_due
from rlaif.loop.begun import Begun, begun, probes_asked
from rlaif.loop.model_checks import check_addresses, check_likelihood_judge, check_policy
from rlaif.loop.pairing import check_can_update, pairs_at_most
from rlaif.loop.retention import BASE_POLICY
from rlaif.loop.running import PairSource
from rlaif.loop.source import open_source
from rlaif.loop.streaming import streams
from rlaif.own_code import resolved
from rlaif.records import Ballot, Pair, Prompt, Vote
from rlaif.rundir.checkpoints import kept
from rlaif.rundir.store import RunDir
from rlaif.workers.placement import Placed, place, usable_gpus

PROMPT_TOKENS = 40
"""A rendered prompt with its chat template, tokens: typical for one-sentence questions."""
RATES = {
    "sample": {"bf16": 380.0, "fp32": 190.0},
    "score": {"bf16": 1100.0, "fp32": 440.0},
    "train": {"bf16": 230.0, "fp32": 90.0},
}
"""Tokens a second of 135M parameters on the reference machines: 2 cores, no GPU; with bf16 (AMX) and without (AVX2). In
bf16 on a processor that doesn't multiply it, a tenth of that. `make bench` shows yours."""
REFERENCE_PARAMETERS = 135e6
REFERENCE_WIDTH = 576
START_S = 45.0
PROCESS_GIB = 1.2
"""Of a worker, beside its weights."""
SERVER_GIB = 2.2
"""Of a server that we start, beside its weights: vLLM's process, and its cache on a CPU."""
GIB = 2**30


class _Read(NamedTuple):
    """What a job names, read and checked."""

    train: list[Prompt]
    held_out: list[Prompt]
    constitutions: dict[str, Constitution]
    """By how the job refers to them; as the judge is asked with them."""
    calibration: Calibration | None
    probes: Sequence[Probe]
    """Asked at every evaluation."""
    source: PairSource | None
    begun: Begun


class Counts(NamedTuple):
    """How much of what, over all iterations that are left; of pairs and ballots at most."""

    samples: int
    pairs: int
    scores: int
    ballots: int
    evaluations: int
    evaluated: tuple[int, ...]
    """After how many iterations each is, but for the base policy's; those that are done, too."""
    held_out_answers: int
    evaluation_ballots: int
    untempered: int
    """Answers that KL is measured on."""
    probed: int
    """Answers to probes."""
    anchors: tuple[int, ...]
    """Ballots that are cast a second time, by iteration."""
    reference_ballots: int
    """Of the reference judge."""
    rejudged_ballots: int
    """About old pairs, at changes of text (`replay.on_change: rejudge`)."""


class _Tokens(NamedTuple):
    """About how many tokens are sampled, looked at and trained on."""

    sampled: float
    judged: float
    """By a judge that runs here."""
    measured: float
    """Sanity is measured here, whoever judges."""
    trained: float


class _Needed(NamedTuple):
    """Bytes, at the same time."""

    memory: float
    disk: float


def estimate(job: Job, base_dir: Path, run: RunDir | None = None, elsewhere: bool = False) -> dict[str, Any]:
    """Counts (exact) and time, memory, disk (rough, for the reference machine): of the whole job, or of what is left of
    a `run` that was begun. `elsewhere`: GPUs that this machine lacks are those of another one.

    Raises:
        UserError: a model, a prompt file or a text is missing or broken, or a GPU: a dry run finds it too.
    """
    job, own = resolved(job)
    learners = launched(job, accelerate_file(job, base_dir, run.path if run else None))
    check_addresses(job)
    gpus = usable_gpus(len(gpu_names()))
    named = 1 + max((n for role in job.placement.values() for n in role.devices or ()), default=-1)
    planned = [str(n) for n in range(named)] if elsewhere and named > len(gpus) else gpus
    places = place(job, planned, learners.processes)
    read = _read(job, base_dir, run)
    counts = _count(job, base_dir, read)
    tokens = _tokens(job, counts)
    fast = cpu_has_bf16() or bool(gpu_names())  # as `hardware.precision_here`, without torch
    needed = _needed(job, counts, fast, read.begun.checkpoint_bytes, learners)
    disk_free = shutil.disk_usage(base_dir).free
    return {
        "iterations": job.iterations,
        "iterations_done": None if run is None else read.begun.done,
        "constitutions": {str(k): str(read.constitutions[ref].ref) for k, ref in _schedule(job).items()},
        "source": str(job.source) if job.source else None,
        "train_prompts": len(read.train),
        "held_out_prompts": len(read.held_out),
        "samples": counts.samples,
        "pairs_at_most": counts.pairs,
        "scores": counts.scores,
        "ballots_at_most": counts.ballots,
        "judge": job.judge.kind,
        "judge_takes_own_time": kind_of(job.judge).own_time,
        "sampler_servers": _sampler_servers(job),
        "judge_servers": _served(job, places),
        "own_code": {code.name: {"file": str(code.file), "sha256": code.sha256} for code in own},
        "evaluations": counts.evaluations,
        "held_out_answers": counts.held_out_answers,
        "evaluation_ballots_at_most": counts.evaluation_ballots,
        "anchor_ballots_at_most": sum(counts.anchors),
        "reference_ballots_at_most": counts.reference_ballots,
        "rejudged_ballots_at_most": counts.rejudged_ballots,
        "probes": len(read.probes),
        "fixed_texts": len(fixed_texts()) if read.probes else 0,
        "replay": job.replay.model_dump(mode="json") if job.replay.share else None,
        "tokens": {
            "sampled": round(tokens.sampled),
            "judged": round(tokens.judged + tokens.measured),
            "trained": round(tokens.trained),
        },
        "minutes_on_reference_machine": round(_seconds(job, tokens, fast) / 60, 1),
        "placement": {role: _where(job, role, places[role], learners) for role in get_args(PlacedRole)},
        "learner_processes": learners.processes,
        "pipeline": {"stream": not read.source and streams(job, places), "staleness": job.pipeline.staleness},
        "memory_gib": round(needed.memory / GIB, 1),
        "memory_here_gib": round(psutil.virtual_memory().total / GIB, 1),
        "disk_gib": round(needed.disk / GIB, 1),
        "disk_free_gib": round(disk_free / GIB, 1),
        "warnings": _warnings(job, read.calibration, needed, disk_free) + _owed(job, learners, bool(gpus)),
        "parameters": parameters_of(job.policy.model),
    }


def _sampler_servers(job: Job) -> str | None:
    """The servers that sample, where some do."""
    if job.sampling.engine != "server":
        return None
    if given := len(job.sampling.addresses):
        return f"{counted(given, 'server')} of yours, which have to read the run's folder"
    return f"{counted(job.sampling.replicas, 'server')} of vLLM's, started and stopped by the run"


def _served(job: Job, places: Mapping[str, Placed]) -> dict[str, Any] | None:
    """The servers that the run would start for its judge."""
    if (serve := kind_of(job.judge).serve) is None:
        return None
    return {**serve.model_dump(mode="json"), "placement": str(places["servers"])}


def _workers(job: Job, role: str, learners: Launched) -> int:
    """How many processes do a role's work, wherever they are."""
    if role == "learner":
        return learners.processes
    share = job.cluster.of(role) if job.cluster else None
    return share.replicas if share else 1


def _cluster_of(job: Job, role: str) -> str | None:
    """The address of the cluster that a role is on; None: it is on the loop's machine alone."""
    if job.cluster is None or (job.cluster.learner if role == "learner" else job.cluster.of(role)) is None:
        return None
    return job.cluster.address


def _where(job: Job, role: str, placed: Placed, learners: Launched) -> str:
    """Where a role runs, and in how many processes."""
    workers, address = _workers(job, role, learners), _cluster_of(job, role)
    if address is None and workers == 1:
        return str(placed)
    several = counted(workers, "process", "processes")
    return f"{placed}, {several}" if address is None else f"{several} on the cluster ({address})"


def counts_of(job: Job, base_dir: Path) -> Counts:
    """How much of what a job does over all its iterations, from the first one on.

    Raises:
        UserError: as `estimate`.
    """
    job, _ = resolved(job)
    return _count(job, base_dir, _read(job, base_dir, None))


def _schedule(job: Job) -> dict[int, str]:
    return job.schedule or {0: job.constitution or ""}


def _read(job: Job, base_dir: Path, run: RunDir | None) -> _Read:
    """Reads everything that the job names and that is here, and checks it.

    Raises:
        UserError: it can't be used.
    """
    models.check_name(job.policy.model)
    if job.policy.adapter is not None:
        models.check_adapter_name(job.policy.adapter)
    source = open_source(job, base_dir, run)
    if (policy := _folder(job.policy.model)).is_dir():
        check_policy(policy, job)
        if source:
            source.check_tokenizer(models.tokenizer_identity(policy).model_dump())
    kind = kind_of(job.judge)
    if kind.local_model:
        models.check_name(kind.local_model)
    check_can_update(job, source)
    columns = job.prompts.columns
    held_out = load_prompts(job.prompts.held_out, base_dir, columns=columns, columns_required=False)
    if source:
        train = exclude_held_out(source.prompts, held_out)
        source.settle(train)
    else:
        train = exclude_held_out(load_prompts(job.prompts.train, base_dir, columns=columns), held_out)
        check_enough(train, job.prompts)
    calibration = read_calibration(base_dir / job.filters.calibration) if job.filters.calibration else None
    if calibration is not None:
        check_asked(calibration, job.filters, Asked.by(job))
    constitutions = {
        ref: kind.as_read(load_constitution(base_dir / job.constitutions_dir, ref)) for ref in _schedule(job).values()
    }
    if kind.local_model and kind.serve is None and (judge := _folder(kind.local_model)).is_dir():
        check_likelihood_judge(judge, job, constitutions.values())
    if job.pairing.method == "best_worst" and not source:
        for constitution in constitutions.values():
            kind.selecting(constitution)
    probes = probes_asked(job, run, base_dir)
    return _Read(train, held_out, constitutions, calibration, probes, source, begun(run, source))


def _count(job: Job, base_dir: Path, read: _Read) -> Counts:
    source, behind = read.source, read.begun
    samples = 0 if source else job.prompts.per_iteration * job.sampling.completions_per_prompt
    left = range(behind.done, job.iterations)
    coming = [source.pairs_in(behind.taken + n) if source else pairs_at_most(job) for n in range(len(left))]
    pairs, texts = [*behind.pairs, *coming], _texts_of(job, read)
    judged = source is None or (job.source is not None and job.source.rejudge)
    held = min(job.eval.prompts, len(read.held_out)) * job.eval.samples
    ballots = scores = 0
    anchors = [0] * job.iterations
    for k in left:
        if judged and is_due(job, k):
            since = next((n for n in range(k) if texts[k - n - 1].hash != texts[k].hash), k)  # under the same text
            again = min(job.monitors.anchors.pairs, sum(pairs[k - since : k]))
            anchors[k] = again * _ballots_a_pair(job, texts[k], "decide", base_dir)
        if judged:
            ballots += pairs[k] * _ballots_a_pair(job, texts[k], "decide", base_dir)
        if samples and job.pairing.method == "best_worst":
            scores += samples * len(kind_of(job.judge).selecting(texts[k]))
    evaluated = [k + 1 for k in range(job.iterations) if _is_evaluated(job, k, texts)]
    eval_ballots = reference_ballots = 0
    owed = [k for k in evaluated if _is_owed(k, behind, texts)]
    for updates in owed:
        constitution = texts[updates - 1]
        eval_ballots += held * _ballots_a_pair(job, constitution, "evaluate", base_dir)
        if read.probes:  # asked about under each earlier text, too
            earlier = {c.hash: c for c in texts[:updates] if c.hash != constitution.hash}
            eval_ballots += held * sum(_ballots_a_pair(job, c, "evaluate", base_dir) for c in earlier.values())
        if job.eval.deciding_voices:
            eval_ballots += held * _ballots_a_pair(job, constitution, "decide", base_dir)
        if (reference := job.eval.reference_judge) is not None:
            asked = kind_of(reference).as_read(constitution)
            reference_ballots += held * _ballots_a_pair(job, asked, "evaluate", base_dir, reference)
    for k in left:  # the answers at a change, under the new text
        if k and texts[k - 1].hash != texts[k].hash:
            eval_ballots += held * _ballots_a_pair(job, texts[k], "evaluate", base_dir)
    evaluations = len(owed) + (BASE_POLICY not in behind.evaluated)
    return Counts(
        samples=samples * len(left),
        pairs=sum(coming),
        scores=scores,
        ballots=ballots,
        evaluations=evaluations,
        evaluated=tuple(evaluated),
        held_out_answers=held * evaluations,
        evaluation_ballots=eval_ballots,
        untempered=min(job.eval.kl_prompts, job.eval.prompts, len(read.held_out)) * len(owed),
        probed=len(read.probes) * evaluations,
        anchors=tuple(anchors),
        reference_ballots=reference_ballots,
        rejudged_ballots=_rejudged(job, base_dir, texts, pairs, behind.done) if judged else 0,
    )


def _texts_of(job: Job, read: _Read) -> list[Constitution]:
    """The text of each iteration: the one that was in force, and for those to come what the job names."""
    schedule, known = _schedule(job), read.begun.texts
    to_come = range(len(known), job.iterations)
    return [*known, *(read.constitutions[schedule[max(i for i in schedule if i <= k)]] for k in to_come)]


def _is_evaluated(job: Job, k: int, texts: Sequence[Constitution]) -> bool:
    """Whether there is an evaluation after iteration k."""
    last = k + 1 == job.iterations
    return last or (k + 1) % job.eval.every == 0 or texts[k + 1].hash != texts[k].hash


def _is_owed(updates: int, begun: Begun, texts: Sequence[Constitution]) -> bool:
    """Whether an evaluation is still to be made. That of a change of text is made by the iteration after it."""
    if updates in begun.evaluated or updates < begun.done:
        return False
    return updates > begun.done or (updates < len(texts) and texts[updates].hash != texts[updates - 1].hash)


def _rejudged(job: Job, base_dir: Path, texts: Sequence[Constitution], pairs: Sequence[int], done: int) -> int:
    """Ballots about old pairs at the changes of text to come, if every pair were kept: what the new text asks and the
    text that judged the pair didn't. Votes that a change in between had cast aren't known here."""
    if not job.replay.share or job.replay.on_change != "rejudge":
        return 0
    max_age, calls = job.replay.max_age, job.replay.rejudge.calls
    changes = [k for k in range(max(done, 1), job.iterations) if texts[k].hash != texts[k - 1].hash]
    owed_a_pair: dict[tuple[str, str], int] = {}
    total = 0
    for k, until in zip(changes, [*changes, job.iterations][1:], strict=True):
        owed = 0
        for i in range(max(0, k - max_age), k):
            texts_of = texts[i].hash, texts[k].hash
            if texts_of not in owed_a_pair:
                owed_a_pair[texts_of] = _owed_a_pair(job, base_dir, texts[i], texts[k])
            owed += pairs[i] * owed_a_pair[texts_of]
        # What a limit leaves waits for the next iterations under the same text, until the pairs are too old.
        total += owed if calls is None else min(owed, calls * min(until - k, max_age))
    return total


def _owed_a_pair(job: Job, base_dir: Path, before: Constitution, now: Constitution) -> int:
    """Ballots of a text that no vote under an earlier one answers."""
    if before.hash == now.hash:
        return 0
    judge, texts = kind_of(job.judge), {c.hash: c for c in (before, now)}
    votes = [
        Vote(ballot=b, model="plan", outcome="tie", raw_reply="") for b in _ballots(job, before, "decide", base_dir)
    ]
    templates = _templates(job.judge, now, "decide", base_dir)

    def shows(ballot: Ballot) -> str:
        return judge.shows(ballot, texts[ballot.constitution], templates)

    return len(carry(_ballots(job, now, "decide", base_dir), votes, shows).owed)


def _tokens(job: Job, counts: Counts) -> _Tokens:
    answer = job.sampling.max_tokens * 0.8
    return _Tokens(
        sampled=(counts.samples + counts.held_out_answers + counts.untempered + counts.probed) * answer,
        judged=kind_of(job.judge).tokens(counts.scores, _own_ballots(counts), answer),
        measured=(counts.held_out_answers + counts.untempered) * 2 * (answer + 40),
        # Replayed pairs come on top of the fresh ones.
        trained=counts.pairs / (1 - job.replay.share) * job.learner.epochs * 2 * (answer + PROMPT_TOKENS),
    )


def _own_ballots(counts: Counts) -> int:
    """All of the job's judge, but for anchors: one that runs here has none."""
    return counts.ballots + counts.rejudged_ballots + counts.evaluation_ballots


def _judge_parameters(job: Job) -> float:
    """Of the model that scores here: the judge's, or the policy's where the judge is behind a server."""
    return parameters_of(kind_of(job.judge).local_model or job.policy.model) or REFERENCE_PARAMETERS


def _seconds(job: Job, tokens: _Tokens, fast: bool) -> float:
    scale = (parameters_of(job.policy.model) or REFERENCE_PARAMETERS) / REFERENCE_PARAMETERS
    judge_scale = _judge_parameters(job) / REFERENCE_PARAMETERS
    return (
        START_S
        + scale * tokens.sampled / _rate("sample", job.sampling.precision, fast)
        + (scale * tokens.measured + judge_scale * tokens.judged) / _rate("score", job.judge.precision, fast)
        + scale * tokens.trained / _rate("train", job.learner.precision, fast)
    )


def _needed(job: Job, counts: Counts, fast: bool, there: int, learners: Launched) -> _Needed:
    """`there`: bytes of checkpoints that are on the disk already. Memory is this machine's: what is on a cluster
    elsewhere needs none of it."""
    samplers, judges, updating = (
        _workers(job, role, learners) if _cluster_of(job, role) in (None, "local") else 0
        for role in ("sampler", "judge", "learner")
    )
    weights = 2 * (parameters_of(job.policy.model) or REFERENCE_PARAMETERS)  # bf16
    trained_share = _trained_share(job)
    # fp32 weights, and for what is trained a gradient, Adam's two moments and the reference or what a step needs.
    learner = weights * (2 + (5.5 + _width(job.learner.precision, fast)) * trained_share)
    if learners.sharded and updating:
        # All hold one in parts; when it is saved, the first has Adam's moments or the policy whole beside it. At the
        # start each reads the whole model in fp32.
        saved = weights * max(4 * trained_share, _width(job.sampling.precision, fast))
        learner = max(learner + saved, 2 * weights * updating)
    else:
        learner *= updating
    samplers = job.sampling.replicas if job.sampling.engine == "server" else samplers
    frozen = samplers * (weights * _width(job.sampling.precision, fast) + job.sampling.kv_cache_gib * GIB)
    # The measurer on the base policy, and judges of their own where that isn't the same model.
    judge = kind_of(job.judge)
    another = 2 * _judge_parameters(job) * _width(job.judge.precision, fast)
    measurers = judges if judge.local_model == job.policy.model and judge.serve is None else 1
    frozen += measurers * weights * _width(job.judge.precision, fast)
    if judge.serve:
        frozen += judge.serve.replicas * (another + SERVER_GIB * GIB)
    elif judge.local_model not in (None, job.policy.model):
        frozen += judges * another
    stay = kept(job.keep_checkpoints, job.iterations, counts.evaluated, range(job.iterations))
    # fp32 weights and Adam's moments of what is trained; an old state goes when the next one is complete.
    states = weights * 6 * trained_share * min(job.iterations, len(stay.states) + 1)
    return _Needed(
        memory=frozen + learner + (samplers + judges + updating) * PROCESS_GIB * GIB,
        # A policy is exported in what the sampler computes in.
        disk=max(weights * _width(job.sampling.precision, fast) * (len(stay.policies) + 2) + states - there, 0),
    )


def _warnings(job: Job, calibration: Calibration | None, needed: _Needed, disk_free: int) -> list[str]:
    memory_free = psutil.virtual_memory().available
    warnings = [
        f"{name}: about {wanted / GIB:.1f} GiB needed, {free / GIB:.1f} free"
        for name, wanted, free in (("memory", needed.memory, memory_free), ("disk", needed.disk, disk_free))
        if wanted > free
    ]
    warnings += [
        f"schedule: {reference} after {k} iterations is never reached, the run ends at {job.iterations}"
        for k, reference in _schedule(job).items()
        if k >= job.iterations
    ]
    warnings += worth_knowing(job)
    named = [name for name in (job.policy.model, kind_of(job.judge).local_model) if name]
    if unknown := sorted({n for n in named if not n.startswith("embedded:") and parameters_of(n) is None}):
        warnings.append(
            f"{', '.join(unknown)}: of unknown size until it is fetched (rlaif models NAME); time, memory and disk are "
            "those of 135M parameters"
        )
    if job.source is None and (hint := shipped_held_out(job.prompts)):
        warnings.append(hint)
    # What the run will say of its calibration, whatever it samples.
    if calibration is not None and (dropped := calibration.cut_off_dropped(job.judge.cut_off_counts)):
        warnings.append(f"filters.calibration {job.filters.calibration}: {dropped}")
    return warnings


def _owed(job: Job, learners: Launched, has_gpus: bool) -> list[str]:
    """What the machine that runs it has to have, and this one hasn't."""
    serve = kind_of(job.judge).serve
    for_gpus = {
        "sampling.tensor_parallel_size": job.sampling.tensor_parallel_size > 1,
        "judge.serve.tensor_parallel_size": serve and serve.tensor_parallel_size > 1,
        "learner.accelerate (FSDP)": learners.sharded,
        "placement.*.devices": any(role.devices for role in job.placement.values()),
        "device": job.device,
        "cluster.*.gpus": job.cluster and job.cluster.address == "local" and job.cluster.wants_gpus,
    }
    named = [] if has_gpus else [name for name, wanted in for_gpus.items() if wanted]
    owed = [f"{', '.join(named)}: for GPUs, and this machine has none"] if named else []
    chat = [judge for judge in (job.judge, job.eval.reference_judge) if isinstance(judge, ChatSettings)]
    keys = [juror.api_key_env for judge in chat if not judge.serve for juror in judge.jurors]
    unset = {key for key in (*keys, job.sampling.api_key_env) if key and not os.environ.get(key)}
    return owed + [f"{key}: this environment variable isn't set; a run needs it" for key in sorted(unset)]


def _computes(precision: Precision, fast: bool) -> str:
    """What a worker computes in, where bf16 is `fast` or not."""
    return ("bf16" if fast else "fp32") if precision == "auto" else precision


def _rate(work: str, precision: Precision, fast: bool) -> float:
    computes = _computes(precision, fast)
    return RATES[work][computes] / (10 if computes == "bf16" and not fast else 1)


def _width(precision: Precision, fast: bool) -> int:
    """Bytes of a weight, over those of bf16."""
    return 2 if _computes(precision, fast) == "fp32" else 1


def _ballots_a_pair(
    job: Job, constitution: Constitution, role: Role, base_dir: Path, asked: Judge | None = None
) -> int:
    """Questions to the job's judge, or to another one, about a pair; for a judge behind a server each is a request."""
    return len(_ballots(job, constitution, role, base_dir, asked))


def _ballots(
    job: Job, constitution: Constitution, role: Role, base_dir: Path, asked: Judge | None = None
) -> list[Ballot]:
    """What the job's judge, or another one, is asked about a pair."""
    pair = Pair(id="any", prompt_id="any", first="first", second="second", method="plan")
    settings = asked or job.judge
    templates = _templates(settings, constitution, role, base_dir)
    return kind_of(settings).ballots([pair], constitution, role, templates=templates)


def _templates(settings: Judge, constitution: Constitution, role: Role, base_dir: Path) -> list[Template]:
    judge = kind_of(settings)
    folder = base_dir / judge.templates_dir
    return [load_template(folder, name) for name in judge.template_names(constitution, role, templates_in(folder))]


def _trained_share(job: Job) -> float:
    """Trained parameters over the policy's: of an adapter about 2r/width, for r columns and rows each side of a square
    matrix."""
    if job.learner.lora is None:
        return 1.0
    try:
        config = json.loads((_folder(job.policy.model) / "config.json").read_text())
        width = int(config["hidden_size"])
    except (OSError, UserError, ValueError, KeyError, TypeError):
        width = REFERENCE_WIDTH
    return min(1.0, 2 * job.learner.lora.r / width)


def _folder(model: str) -> Path:
    if model.startswith("embedded:"):
        return models.embedded_path(model.removeprefix("embedded:"))
    return Path(model).expanduser()


def parameters_of(model: str) -> int | None:
    """Parameters of a model that is on this machine, from the size of its weights; None when it is not."""
    try:
        path = _folder(model)
        return sum(f.stat().st_size for f in models.weight_files(path)) // 2 or None
    except (OSError, UserError):
        return None


def _about_old_pairs(costs: dict[str, Any]) -> str:
    """Ballots at changes of text, in words. What one will take in tokens or money nobody knows before it is cast."""
    if not (old := costs["rejudged_ballots_at_most"]):
        return ""
    rejudge = costs["replay"]["rejudge"]
    limits = " or ".join(f"{rejudge[what]:g} {what}" for what in ("tokens", "money") if rejudge[what] is not None)
    fewer = f"; fewer where an iteration's {limits} (replay.rejudge) are spent before" if limits else ""
    return f", and {old} about old pairs (replay.on_change){fewer}"


def table(costs: dict[str, Any], where: Path) -> None:
    """Prints the plan."""
    console = stdout_console()
    plan = Table(title=inert(f"plan of {where} (nothing was run)"), title_justify="left", show_header=False)
    texts = ", ".join(f"after {k}: {ref}" if int(k) else f"first {ref}" for k, ref in costs["constitutions"].items())
    tokens = costs["tokens"]
    done, replay = costs["iterations_done"], costs["replay"]
    rows = {
        "iterations": f"{costs['iterations']} ({texts})",
        **({"begun": _left(done, costs["iterations"])} if done is not None else {}),
        **({"source": costs["source"]} if costs["source"] else {}),
        "prompts": f"{costs['train_prompts']} to train on, {costs['held_out_prompts']} held out",
        "samples": f"{costs['samples']} answers, at most {costs['pairs_at_most']} pairs",
        "judging": f"{costs['scores']} scores, at most {costs['ballots_at_most']} ballots"
        + (f", and {again} of them again (monitors.anchors)" if (again := costs["anchor_ballots_at_most"]) else "")
        + _about_old_pairs(costs),
        "evaluation": f"{costs['evaluations']} times, {costs['held_out_answers']} answers, "
        f"at most {costs['evaluation_ballots_at_most']} ballots"
        + (f", and {second} of the reference judge" if (second := costs["reference_ballots_at_most"]) else ""),
        **({"forgetting": _forgetting(costs)} if costs["probes"] else {}),
        **({"replay": _replayed(replay)} if replay else {}),
        "tokens": f"about {tokens['sampled']:,} sampled, {tokens['judged']:,} judged, {tokens['trained']:,} trained on",
        "time": f"about {costs['minutes_on_reference_machine']} min on 2 cores like these, without a GPU, after set-up"
        + (", and the judge's own" if costs["judge_takes_own_time"] else ""),
        **({"sampler's servers": servers} if (servers := costs["sampler_servers"]) else {}),
        **({"judge's servers": _started(started)} if (started := costs["judge_servers"]) else {}),
        "placement": ", ".join(f"{role}: {where}" for role, where in costs["placement"].items()),
        **({"at once": at_once} if (at_once := _at_once(**costs["pipeline"])) else {}),
        "memory": f"about {costs['memory_gib']} GiB ({costs['memory_here_gib']} GiB here)",
        "disk": f"about {costs['disk_gib']} GiB{' more' if done else ''} ({costs['disk_free_gib']} GiB free)",
    }
    for name, own in costs["own_code"].items():
        rows[inert(f"your {name}")] = inert(f"{own['file']}, sha256 {own['sha256']}")
    for name, value in rows.items():
        plan.add_row(name, inert(value))
    console.print(plan)
    for warning in costs["warnings"]:
        console.print(f"[yellow]warning[/] {inert(warning)}")


def _started(serve: dict[str, Any]) -> str:
    return (
        f"{counted(serve['replicas'], 'server')} of vLLM's with {serve['model']}, started and stopped by the run "
        f"({serve['placement']})"
    )


def _left(done: int, iterations: int) -> str:
    left = max(iterations - done, 0)
    done_and_left = f"{done} of these {'is' if done == 1 else 'are'} done, {left} {'is' if left == 1 else 'are'} left"
    return f"{done_and_left}; what follows counts what is left"


def _forgetting(costs: dict[str, Any]) -> str:
    asked = f"{costs['probes']} probes and {costs['fixed_texts']} fixed texts' perplexity at each evaluation"
    return f"{asked}, and the win rate under each earlier text (eval.retention)"


def _at_once(stream: bool, staleness: int) -> str:
    judging = ["the judge works while the policy samples (pipeline.stream)"] * stream
    ahead = f"{counted(staleness, 'iteration')} sampled and judged before the update is done (pipeline.staleness)"
    return ", ".join([*judging, *[ahead] * bool(staleness)])


def _replayed(replay: dict[str, Any]) -> str:
    return (
        f"at most {replay['share']:.0%} of an update, pairs of the last {counted(replay['max_age'], 'iteration')}; "
        f"on a change of text: {replay['on_change']}"
    )
