"""Where each role runs, and which GPUs it sees. Pure.

In: the GPUs that this process may use, and the job. Out: for each role the kind of its worker, and the value of
`CUDA_VISIBLE_DEVICES` that it starts with. Without that every worker would see every GPU: TRL's trainers refuse to
train where they see several, and sampler and judge would crowd on the first.

With one GPU all roles share it. With more, the sampler takes the first `sampling.tensor_parallel_size`, the learner the
next one, or as many as it has processes, the judge the one after; where they run out, the learner shares the last and
the judge the first. A judge whose servers we start (`judge.serve`) takes for them as many as they span, and shares none
of these unless all take turns (`device: shared`).

What works elsewhere takes none: roles on a cluster, and a sampler whose servers somebody else started. Whoever measures
does so here in any case. Where its judge is on a cluster it shares the learner's GPU: there is room for one more copy
of the policy, frozen, and a GPU of its own would be one less for the cluster. (Untried on several GPUs: checked by its
table alone.)
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import NamedTuple, get_args

from rlaif.config import ChatSettings, Job, PlacedRole, Serve, WorkerKind
from rlaif.errors import UserError


class Placed(NamedTuple):
    """Where one role runs."""

    worker: WorkerKind
    gpus: tuple[str, ...] = ()
    """Those it sees, as CUDA names them; none: whatever this process sees."""

    @property
    def environment(self) -> dict[str, str] | None:
        """What its process starts with beside ours."""
        return {"CUDA_VISIBLE_DEVICES": ",".join(self.gpus)} if self.gpus else None

    def __str__(self) -> str:
        return self.worker + (f" on GPU {', '.join(self.gpus)}" if self.gpus else "")


def usable_gpus(count: int, environment: Mapping[str, str] = os.environ) -> list[str]:
    """Names of the GPUs that this process may use, as CUDA takes them: numbers or UUIDs.

    Args:
        count: GPUs of the machine.
        environment: `CUDA_VISIBLE_DEVICES` there narrows them, as CUDA reads it: up to the first that isn't there.
    """
    given = environment.get("CUDA_VISIBLE_DEVICES")
    if given is None:
        return [str(i) for i in range(count)]
    usable = []
    for name in (part.strip() for part in given.split(",")):
        if not name or name == "-1" or (name.isdigit() and int(name) >= count):
            break
        usable.append(name)
    return usable


def place(job: Job, gpus: Sequence[str], learners: int = 1) -> dict[str, Placed]:
    """The place of each role. `measurer` says how sane answers are, and goes with the judge, as a `reference` judge
    does; `servers` are those that we start for a judge. `learners` are the learner's processes: on this machine each
    sees the GPUs of all of them, and takes its own.

    Raises:
        UserError: the job names a GPU that isn't there, or spans more than there are, or names one for a worker that
            can't be kept to it.
    """
    kinds: dict[str, WorkerKind] = {}
    asked: dict[str, list[int] | None] = {}
    for role in get_args(PlacedRole):
        of = job.placement.get(role)
        kinds[role] = (of and of.worker) or job.workers
        asked[role] = of.devices if of else None
    takes = _takes(job, learners)
    _check(job, gpus, kinds, asked, takes)
    shared = job.device == "shared"
    numbers = _shared_out(asked, takes, shared, len(gpus)) if len(gpus) > 1 else {}

    def placed(role: str, kind: WorkerKind) -> Placed:
        return Placed(kind, tuple(gpus[n] for n in numbers.get(role, ())) if kind == "process" else ())

    places = {role: placed(role, kind) for role, kind in kinds.items()}
    places["measurer"] = places["reference"] = placed("measurer", kinds["judge"])
    if isinstance(job.eval.reference_judge, ChatSettings):  # it only waits
        places["reference"] = Placed(kinds["judge"])
    if serve := served(job):
        theirs = placed("servers", "process").gpus if numbers else tuple(gpus)
        spread(serve, theirs, len(gpus))  # are there enough?
        places["servers"] = Placed("process", theirs)
    return places


def left_over(places: Mapping[str, Placed], roles: Iterable[str], gpus: Sequence[str]) -> list[str]:
    """Of the `gpus` of this machine those that a cluster may have: which none of the `roles` of a job takes."""
    taken = {gpu for role in roles for gpu in places[role].gpus}
    return [gpu for gpu in gpus if gpu not in taken]


def served(job: Job) -> Serve | None:
    """How the servers of a job's judge are started; None where they aren't ours."""
    return job.judge.serve if isinstance(job.judge, ChatSettings) else None


def spread(serve: Serve, gpus: Sequence[str], there: int) -> list[tuple[str, ...]]:
    """For each server the GPUs that it sees, of those that are theirs; `there` are all that this process may use, and
    without any the servers compute on the CPU.

    Raises:
        UserError: there are too few.
    """
    each = serve.tensor_parallel_size
    if there and len(gpus) < serve.replicas * each:
        raise UserError(
            f"judge.serve: replicas: {serve.replicas} with tensor_parallel_size: {each} need {serve.replicas * each} "
            f"GPUs of their own, and of {there} {len(gpus)} {'is' if len(gpus) == 1 else 'are'} left for them; ask for "
            "fewer, or name some (placement.judge.devices)"
        )
    return [tuple(gpus[n * each : (n + 1) * each]) for n in range(serve.replicas)]


def apart(one: Collection[str], other: Collection[str]) -> bool:
    """Whether two roles have no GPU in common, by those that each sees; who has none named sees all."""
    return bool(one and other and not {*one} & {*other})


def _takes(job: Job, learners: int) -> dict[str, int]:
    """How many of this machine's GPUs each role takes; none, where it works elsewhere."""
    cluster, serve = job.cluster, served(job)
    return {
        "sampler": 0 if cluster and cluster.sampler else job.sampling.spans,
        "learner": 0 if cluster and cluster.learner else learners,
        "judge": 0 if cluster and cluster.judge else 1,
        "servers": serve.replicas * serve.tensor_parallel_size if serve else 0,
    }


def _check(
    job: Job,
    gpus: Sequence[str],
    kinds: Mapping[str, WorkerKind],
    asked: Mapping[str, list[int] | None],
    takes: Mapping[str, int],
) -> None:
    span, learners = takes["sampler"], takes["learner"]
    if gpus and span > len(gpus):
        raise UserError(f"{_spans(job)}, but this process can use {len(gpus)} GPU{'s' * (len(gpus) != 1)}")
    for role, numbers in asked.items():
        if missing := [n for n in numbers or () if n >= len(gpus)]:
            raise UserError(
                f"placement.{role}.devices: no GPU {missing[0]}; this process can use {len(gpus) or 'none'}"
                + (", counted from 0" if gpus else "; leave `placement` out, or run it where there are GPUs")
                + (" (CUDA_VISIBLE_DEVICES narrows them)" if "CUDA_VISIBLE_DEVICES" in os.environ else "")
            )
        if numbers and kinds[role] == "inline":
            raise UserError(
                f"placement.{role}.devices: an inline worker sees every GPU that this process sees; give it "
                "`worker: process`, or leave `devices` out"
            )
        if numbers and not takes[role] and role != "judge":  # whose measurer is here
            raise UserError(
                f"placement.{role}.devices: the {role} is elsewhere (`cluster`, or `sampling.base_url`) and takes no "
                "GPU that this process sees; leave `devices` out"
            )
    if asked["sampler"] is not None and len(asked["sampler"]) != span:
        raise UserError(f"placement.sampler.devices: {len(asked['sampler'])} GPUs for {_spans(job)}; give as many")
    if learners <= 1:
        return
    if kinds["learner"] == "inline":
        raise UserError(
            f"learner.accelerate: an inline learner is one process, not {learners}; set "
            "placement.learner.worker=process"
        )
    named = asked["learner"]
    if gpus and len(gpus if named is None else named) < learners:
        has = f"{len(gpus)} GPUs to use" if named is None else f"{len(named)} GPUs in placement.learner.devices"
        raise UserError(f"learner.accelerate: {learners} processes take a GPU each, and there are {has}; give as many")


def _spans(job: Job) -> str:
    """How many GPUs the sampler takes, as the job says it."""
    replicas = f" times sampling.replicas: {job.sampling.replicas}" if job.sampling.replicas > 1 else ""
    return f"sampling.tensor_parallel_size: {job.sampling.tensor_parallel_size}{replicas}"


def _shared_out(
    asked: Mapping[str, list[int] | None], takes: Mapping[str, int], shared: bool, count: int
) -> dict[str, list[int]]:
    """Role → its GPUs, of at least two; those that the job gave to others come last. `shared`: roles take turns, so
    servers for which too few are left may have those of others, too."""
    every = range(count)
    named = {n for numbers in asked.values() for n in numbers or ()}
    sampler = asked["sampler"] or sorted(every, key=lambda n: (n in named, n))[: takes["sampler"]]
    free = [n for n in every if n not in sampler and n not in named]
    learners = takes["learner"]
    learner = asked["learner"] or (free[:learners] if len(free) >= learners else [*every][-learners:])
    free = [n for n in free if n not in learner]
    for_servers = free + [n for n in every if n not in free] if shared else free
    servers = (asked["judge"] or for_servers[: takes["servers"]]) if takes["servers"] else []
    free = [n for n in free if n not in servers]
    measurer = None if servers else asked["judge"]
    if not measurer:
        others = [*sampler, *learner, *servers]
        measurer = ([*free, *others] if takes["judge"] else [*learner, *free, *others])[:1]
    judge = measurer if takes["judge"] else []
    return {"sampler": sampler, "learner": learner, "judge": judge, "measurer": measurer, "servers": servers}
