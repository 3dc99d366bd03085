"""The policy's weights on their way out: LoRA merged, names as the untrained model has them, precision as wanted.

In: a model in training (fp32 masters, perhaps with LoRA layers). Out: a state dict that `from_pretrained` and vLLM
load as the same policy. Nothing here changes the masters.

Where the sampler computes in fp32 it gets fp32. Where it computes in bf16, weights are rounded at random, since nearest
rounding would throw most of an update away (`rounding`).
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal

import torch
from torch import nn

from rlaif import transformers_compat
from rlaif.errors import UserError
from rlaif.learning.peft_compat import adapted, is_adapters, plain, product
from rlaif.learning.rounding import round_stochastically
from rlaif.learning.sharded import address, whole


def plain_names(model: nn.Module) -> set[str]:
    """The names of the state that `merged` gives; the untrained model's own, or nobody can load the export."""
    return {plain(key) for key in model.state_dict() if not is_adapters(key)}


def check_mergeable(model: nn.Module) -> None:
    """Refuses LoRA on a weight that stands in two places: merged, they would differ, and a reader would take one.

    Raises:
        UserError: an adapter sits on an embedding or an output layer that are tied.
    """
    tied: dict[int, list[str]] = {}
    for key, value in model.state_dict().items():
        if value.numel():
            tied.setdefault(address(value), []).append(plain(key))
    twice = {name for names in tied.values() if len(names) > 1 for name in names}
    if both := sorted(twice & adapted(model).keys()):
        raise UserError(
            f"learner.lora.target_modules: `{both[0]}` is tied to another layer, and an adapter on one of them "
            "can't be merged; leave it out"
        )


@torch.no_grad()
def merged(model: nn.Module) -> dict[str, torch.Tensor]:
    """The state of a model with LoRA layers as that of a plain one, whole. The masters are not touched: merging them
    and taking the adapter out again would leave rounding behind."""
    adapters = adapted(model)
    state: dict[str, torch.Tensor] = {}
    made: dict[int, torch.Tensor] = {}
    for key, held in model.state_dict().items():
        if is_adapters(key):
            continue
        name = plain(key)
        value = made.setdefault(address(held), whole(held)) if held.numel() else held  # tied ones stay one
        for layer in adapters.get(name, ()):
            # On the CPU, one by one: together they would be as large as the model, beside it.
            value = (value + whole(product(layer)).to(value.dtype)).cpu()
        state[name] = value
    return state


def kept_in_fp32(model: nn.Module) -> set[str]:
    """Names of what stays in fp32 in a bf16 model: buffers, and what its class names (biases that choose experts)."""
    buffers = {plain(name) for name, _ in model.named_buffers()}
    return buffers | transformers_compat.kept_in_fp32(model, plain_names(model))


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
