"""The policy's weights on their way out: LoRA merged, names as the untrained model has them, precision as wanted.

In: a model in training (fp32 masters, perhaps with LoRA layers). Out: a state dict that `from_pretrained` and vLLM
load as the same policy. Nothing here changes the masters.

Why rounding needs care. Base weights lie on the bf16 grid, and at usual learning rates most of them move by less than
half a step of it. Rounding to the nearest takes that back: at 1e-6, one hundredth of what was trained arrives. Where
the sampler computes in fp32 it therefore gets fp32. Where it computes in bf16, weights are rounded up or down at
random, with the probability that makes the expectation right (stochastic rounding: Gupta et al., arXiv 1502.02551; for
updates below the grid: arXiv 2010.06192). The random threshold of a weight follows from the run's seed and the tensor's
name alone: two exports differ where the policy does, and nowhere else.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from typing import Any, Literal

import torch
from torch import nn

from rlaif.errors import UserError

_PART = 2**24
"""Numbers that are rounded together: a whole embedding's random bits would take as much memory as the embedding."""


def plain_names(model: nn.Module) -> set[str]:
    """The names of the state that `merged` gives; the untrained model's own, or nobody can load the export."""
    return {_plain(key) for key in model.state_dict() if ".lora_" not in key}


def check_mergeable(model: nn.Module) -> None:
    """Refuses LoRA on a weight that stands in two places: merged, they would differ, and a reader would take one.

    Raises:
        UserError: an adapter sits on an embedding or an output layer that are tied.
    """
    tied: dict[int, list[str]] = {}
    for key, value in model.state_dict().items():
        if value.numel():
            tied.setdefault(value.data_ptr(), []).append(_plain(key))
    twice = {name for names in tied.values() if len(names) > 1 for name in names}
    if both := sorted(twice & _adapted(model).keys()):
        raise UserError(
            f"learner.lora.target_modules: `{both[0]}` is tied to another layer, and an adapter on one of them "
            "can't be merged; leave it out"
        )


@torch.no_grad()
def merged(model: nn.Module) -> dict[str, torch.Tensor]:
    """The state of a model with LoRA layers as that of a plain one. The masters are not touched: merging them and
    taking the adapter out again would leave rounding behind."""
    adapters = _adapted(model)
    state = {}
    for key, value in model.state_dict().items():
        if ".lora_" in key:
            continue
        name = _plain(key)
        for layer in adapters.get(name, ()):
            # On the CPU, one by one: together they would be as large as the model, beside it.
            value = (value + layer.get_delta_weight("default").to(value.dtype)).cpu()
        state[name] = value
    return state


def kept_in_fp32(model: nn.Module) -> set[str]:
    """Names of what stays in fp32 in a bf16 model: buffers, and what its class names (biases that choose experts)."""
    named = {*(getattr(model, "_keep_in_fp32_modules_strict", None) or ())}
    named |= {*(getattr(model, "_keep_in_fp32_modules", None) or ())}
    buffers = {_plain(name) for name, _ in model.named_buffers()}
    return buffers | {_plain(name) for name in model.state_dict() if named & set(name.split("."))}


def in_precision(
    state: dict[str, torch.Tensor], precision: Literal["bf16", "fp32"], seed: int, as_it_is: Collection[str] = ()
) -> dict[str, torch.Tensor]:
    """The state in that precision, on the CPU; bf16 by stochastic rounding. Tied tensors stay one tensor, and what
    `as_it_is` names keeps its precision."""
    if precision == "fp32":
        return state
    copies: dict[int, torch.Tensor] = {}
    for name, value in state.items():
        if value.data_ptr() not in copies:
            rounds = value.is_floating_point() and name not in as_it_is
            copies[value.data_ptr()] = round_stochastically(value, seed, name) if rounds else value
    return {name: copies[value.data_ptr()] for name, value in state.items()}


def round_stochastically(value: torch.Tensor, seed: int, name: str) -> torch.Tensor:
    """fp32 to bf16, up or down at random so that the expectation is `value`; what lies on the grid stays.

    A bf16 number is the upper half of an fp32 one: adding 16 random bits and cutting the lower half off rounds up with
    the probability that the lower half stands for. Same value, seed and name: same result.
    """
    key = hashlib.sha256(f"{seed}\0{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(key[:8], "big") >> 1)
    flat = value.detach().to("cpu", torch.float32).contiguous().view(-1)
    out = torch.empty(flat.shape, dtype=torch.bfloat16)
    for start in range(0, flat.numel(), _PART):
        part = flat[start : start + _PART]
        bits = torch.randint(0, 1 << 16, part.shape, generator=generator, dtype=torch.int32)
        bits += part.view(torch.int32)
        out[start : start + _PART] = (bits & -(1 << 16)).view(torch.float32).to(torch.bfloat16)
    return out.view(value.shape)


def _plain(key: str) -> str:
    """A parameter's name without the wrappers around its layer: an expert layer has one for each of its parameters."""
    return key.replace(".base_layer", "")


def _adapted(model: nn.Module) -> dict[str, list[Any]]:
    """Names of the weights that have an adapter, with the layers that hold it."""
    found: dict[str, list[Any]] = {}
    for name, module in model.named_modules():
        if hasattr(module, "get_delta_weight"):
            leaf = getattr(module, "parameter_name", "weight")  # peft's wrapper for a bare parameter names it
            found.setdefault(f"{_plain(name)}.{leaf}", []).append(module)
    return found
