"""Which GPUs each role sees. Pure.

In: the GPUs that this process may use, and the job. Out: for each role, the value of `CUDA_VISIBLE_DEVICES` that its
worker starts with. Without it every worker would see every GPU: TRL's trainers refuse to train where they see several,
and sampler and judge would crowd on the first.

With one GPU all roles share it. With more, the sampler takes the first `sampling.tensor_parallel_size`, the learner the
next one, the judge the one after; where they run out, the learner shares the last and the judge the first. (Untried on
real GPUs here: checked by its table alone.)
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

from rlaif.config import Devices, Job
from rlaif.errors import UserError


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


def place(job: Job, gpus: Sequence[str]) -> dict[str, str]:
    """Role → `CUDA_VISIBLE_DEVICES` of its worker; empty where there is nothing to divide.

    Raises:
        UserError: the job names a GPU that isn't there, or spans more than there are.
    """
    span = job.sampling.tensor_parallel_size
    if gpus and span > len(gpus):
        raise UserError(
            f"sampling.tensor_parallel_size: {span}, but this process can use {len(gpus)} GPU{'s' * (len(gpus) != 1)}"
        )
    asked = {role: getattr(job.devices, role) for role in Devices.model_fields}
    for role, numbers in asked.items():
        if missing := [n for n in numbers or () if n >= len(gpus)]:
            raise UserError(
                f"devices.{role}: no GPU {missing[0]}; this process can use {len(gpus)}, counted from 0"
                + (" (CUDA_VISIBLE_DEVICES narrows them)" if "CUDA_VISIBLE_DEVICES" in os.environ else "")
            )
    if asked["sampler"] is not None and len(asked["sampler"]) != span:
        raise UserError(
            f"devices.sampler: {len(asked['sampler'])} GPUs for sampling.tensor_parallel_size: {span}; give as many"
        )
    if len(gpus) < 2:
        return {}
    last = len(gpus) - 1
    named = {n for numbers in asked.values() for n in numbers or ()}
    # GPUs that the job gave to others come last.
    sampler = asked["sampler"] or sorted(range(len(gpus)), key=lambda n: (n in named, n))[:span]
    free = [n for n in range(len(gpus)) if n not in sampler and n not in named]
    learner = asked["learner"] or [free[0] if free else last]
    free = [n for n in free if n not in learner]
    judge = asked["judge"] or [free[0] if free else sampler[0]]
    numbers = {"sampler": sampler, "learner": learner, "judge": judge, "measurer": judge}
    return {role: ",".join(gpus[n] for n in mine) for role, mine in numbers.items()}
