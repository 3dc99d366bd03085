"""Tensors of which each process holds a part (FSDP2's `DTensor`), as whole ones and back.

In: parameters, gradients and optimizer states of a model that accelerate may have sharded. Out: the same, whole, on
every process; what is whole already is itself. Making one whole is a work of all processes: each has to ask for it.
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


def in_shards_again(model: nn.Module) -> None:
    """Lets each process hold no more than its part of a model, as its optimizer does. A pass without gradients leaves
    some parameters whole, and what is written into those is lost."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def address(value: torch.Tensor) -> int:
    """What tensors have in common that are one: an embedding and the head that is tied to it."""
    return (value.to_local() if isinstance(value, DTensor) else value).data_ptr()


@torch.no_grad()
def put(target: torch.Tensor, value: torch.Tensor) -> None:
    """Copies a whole tensor into one of which this process may hold a part."""
    target.copy_(_like(target, value) if isinstance(target, DTensor) else value)


def whole_state(state: Mapping[str, Any]) -> dict[str, Any]:
    """An optimizer's state dict with whole tensors."""
    moments = {
        number: {name: whole(v) if isinstance(v, torch.Tensor) else v for name, v in of.items()}
        for number, of in state["state"].items()
    }
    return {**state, "state": moments}


def sharded_state(state: Mapping[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """An optimizer's state dict with whole tensors, as its own parameters lie."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    numbers = [number for group in state["param_groups"] for number in group["params"]]
    moments = dict(state["state"])
    for number, parameter in zip(numbers, parameters, strict=True):
        if number in moments and isinstance(parameter, DTensor):
            of = moments[number].items()  # its moments have its shape, its count of steps has none
            moments[number] = {
                name: _like(parameter, v) if getattr(v, "shape", None) == parameter.shape else v for name, v in of
            }
    return {**state, "state": moments}


def _like(target: DTensor, value: torch.Tensor) -> DTensor:
    """A whole tensor, the same on each process, as `target` lies. Nothing is sent."""
    return distribute_tensor(value.to(target.device), target.device_mesh, target.placements, src_data_rank=None)
