"""What `accelerate launch` makes of its config file, by accelerate's own code; see `rlaif.reached`.

In: such a file (`accelerate config` writes one), and how many processes there are, where the job says so. Out: how many
there are, and what is in each one's environment. `python -m rlaif.learning.accelerate_compat FILE [PROCESSES]` prints
both as JSON: a process of its own, since the loop imports no torch. Exit code 2: the file can't be used; the last line
says why.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import ComputeEnvironment
from accelerate.utils.launch import prepare_multi_gpu_env, prepare_simple_launcher_cmd_env
from yaml import YAMLError

from rlaif.errors import UserError
from rlaif.reached import Reached

_LAUNCH = "`learner.accelerate` can't be read"
REACHED = (
    Reached("accelerate.commands.launch", "launch_command_parser", _LAUNCH),
    Reached("accelerate.commands.launch", "_validate_launch_command", _LAUNCH),
    Reached("accelerate.utils.launch", "prepare_multi_gpu_env", _LAUNCH),
    Reached("accelerate.utils.launch", "prepare_simple_launcher_cmd_env", _LAUNCH),
)

_OURS = ("--num_machines", "1", "--machine_rank", "0", "--main_process_port", "0", "--gpu_ids", "all")
"""Where processes run and meet, and which GPUs they see, is the job's to say, whatever the file has of it."""
_TAKEN = ("ACCELERATE_", "FSDP_")
"""What the file's variables begin with; others (threads, ports) are ours to set."""
_REFUSED = {
    "use_deepspeed": "DeepSpeed keeps an optimizer's state in parts that no other number of processes reads; take "
    "FSDP2, which shards the same (distributed_type: FSDP, fsdp_version: 2)",
    "use_megatron_lm": "Megatron-LM has models of its own; take FSDP2",
    "tpu": "no TPUs; take GPUs",
    "use_parallelism_config": "`parallelism_config` gives several processes the same pairs; leave it out, all of them "
    "are data-parallel",
}


def launched(file: str, processes: int | None = None) -> dict[str, Any]:
    """How many processes, and their environment: what `accelerate launch` starts a script with.

    accelerate documents the command and not a function for it. What reads the file and joins it with arguments is
    `_validate_launch_command`, for arguments of `launch_command_parser`; `prepare_multi_gpu_env` turns the result into
    variables where GPUs or shards are asked for, `prepare_simple_launcher_cmd_env` where one process or CPUs are.

    Raises:
        UserError: accelerate can't read the file, or it asks for what this learner can't do.
    """
    given = ["--config_file", file, *_OURS, *(["--num_processes", str(processes)] if processes else [])]
    try:
        args, found, _ = _validate_launch_command(launch_command_parser().parse_args([*given, "rlaif"]))
        _check(args, found, processes)
        shards = args.use_fsdp or args.multi_gpu
        environment = prepare_multi_gpu_env(args) if shards else prepare_simple_launcher_cmd_env(args)[1]
    except (ValueError, TypeError, AttributeError, KeyError, OSError, YAMLError) as e:
        raise UserError(f"accelerate can't use it ({' '.join(str(e).split())})") from e
    mine = {k: v for k, v in environment.items() if k.startswith(_TAKEN) and os.environ.get(k) != v}
    if args.use_fsdp:  # otherwise all but the first process would begin with empty weights
        mine["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
    return {"processes": args.num_processes, "environment": mine}


def _check(args: Any, found: Any, processes: int | None) -> None:
    """Whether the learner can do what the file asks for: nothing of it is passed over in silence.

    Raises:
        UserError: it can't.
    """
    if found.compute_environment != ComputeEnvironment.LOCAL_MACHINE:
        raise UserError("it is for SageMaker; run `accelerate config` for `This machine`")
    for name, why in _REFUSED.items():
        if getattr(args, name, False):
            raise UserError(why)
    if args.use_fsdp and int(args.fsdp_version) != 2:
        raise UserError("FSDP of version 1; set fsdp_version: 2 (`accelerate to-fsdp2 --config_file FILE` converts it)")
    if found.num_processes == 0 or found.num_processes < -1:
        raise UserError(f"num_processes: {found.num_processes}; set 1 or more")
    if processes and found.num_processes not in (-1, processes):
        raise UserError(
            f"num_processes: {found.num_processes}, and cluster.learner.processes: {processes}; make them one"
        )


if __name__ == "__main__":
    try:
        print(json.dumps(launched(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else None)))
    except UserError as e:
        print(e, file=sys.stderr)
        sys.exit(2)
