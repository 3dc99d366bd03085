"""Tensors of which each process holds a part (FSDP2's `DTensor`), as whole ones and back.

In: parameters, gradients and optimizer states of a model that accelerate may have sharded. Out: the same, whole; what
is whole already is itself. Making one whole is a work of all processes: each has to ask for it, also those that don't
keep it. Models are sharded because no process could hold all of one: of a whole model one tensor at a time is on a
device, and what is kept of it is in RAM.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor


def whole(value: torch.Tensor) -> torch.Tensor:
    """All of a tensor."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def gathered(tensors: Mapping[str, torch.Tensor], keeps: bool) -> dict[str, torch.Tensor]:
    """Whole tensors by name where this process keeps them, else none."""
    found = {name: _taken(value, keeps) for name, value in tensors.items()}
    return {name: value for name, value in found.items() if value is not None}


def _taken(value: torch.Tensor, keeps: bool) -> torch.Tensor | None:
    if not isinstance(value, DTensor):
        return value if keeps else None
    all_of_it = value.full_tensor()
    return all_of_it.cpu() if keeps else None


def in_shards_again(model: nn.Module) -> None:
    """Lets each process hold no more than its part of a model, as its optimizer does. A pass without gradients leaves
    some parameters whole, and what is written into those is lost."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


@torch.no_grad()
def put(target: torch.Tensor, value: torch.Tensor) -> None:
    """Copies a whole tensor into one of which this process may hold a part."""
    target.copy_(_like(target, value) if isinstance(target, DTensor) else value)


def whole_state(state: Mapping[str, Any], keeps: bool) -> dict[str, Any]:
    """An optimizer's state dict with whole tensors; a process that doesn't keep it gets None in place of each."""
    moments = {
        number: {name: _taken(v, keeps) if isinstance(v, torch.Tensor) else v for name, v in of.items()}
        for number, of in state["state"].items()
    }
    return {**state, "state": moments}


def placed_state(state: Mapping[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """An optimizer's state dict with whole tensors, as its own parameters lie; copies, so that the file may be let go
    that the whole ones are mapped from."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    numbers = [number for group in state["param_groups"] for number in group["params"]]
    moments = {
        number: {name: _placed(parameter, v) for name, v in state["state"][number].items()}
        for number, parameter in zip(numbers, parameters, strict=True)
        if number in state["state"]
    }
    return {**state, "state": moments}


def _placed(parameter: torch.Tensor, value: Any) -> Any:
    """What an optimizer keeps of a parameter: moments have its shape, a count of steps has none."""
    if not isinstance(value, torch.Tensor):
        return value
    if value.shape != parameter.shape:
        return value.clone()
    return _like(parameter, value) if isinstance(parameter, DTensor) else value.to(parameter.device, copy=True)


def _like(target: DTensor, value: torch.Tensor) -> DTensor:
    """A whole tensor, the same on each process, as `target` lies. Nothing is sent."""
    return distribute_tensor(value.to(target.device), target.device_mesh, target.placements, src_data_rank=None)
