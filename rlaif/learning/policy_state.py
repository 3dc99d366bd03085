"""The policy's weights on their way out: LoRA merged, names as the untrained model has them, precision as wanted.

In: a model in training (fp32 masters, perhaps with LoRA layers, of several processes perhaps a part in each). Out: a
state dict that `from_pretrained` and vLLM load as the same policy. Nothing here changes the masters.

Where the sampler computes in fp32 it gets fp32. Where it computes in bf16, weights are rounded at random, since nearest
rounding would throw most of an update away (`rounding`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import nn

from rlaif import transformers_compat
from rlaif.errors import UserError
from rlaif.learning.peft_compat import adapted, is_adapters, plain, product
from rlaif.learning.rounding import round_stochastically
from rlaif.learning.sharded import whole


def plain_names(model: nn.Module) -> set[str]:
    """The names of the state that `merged` gives; the untrained model's own, or nobody can load the export."""
    return {plain(key) for key in model.state_dict() if not is_adapters(key)}


def check_mergeable(model: nn.Module) -> None:
    """Refuses LoRA on a weight that stands in two places: merged, they would differ, and a reader would take one.

    Raises:
        UserError: an adapter sits on an embedding or an output layer that are tied.
    """
    twice = {name for names, _ in _weights(model) if len(names) > 1 for name in names}
    if both := sorted(twice & adapted(model).keys()):
        raise UserError(
            f"learner.lora.target_modules: `{both[0]}` is tied to another layer, and an adapter on one of them "
            "can't be merged; leave it out"
        )


@torch.no_grad()
def exported_state(
    model: nn.Module, precision: Literal["bf16", "fp32"], seed: int, keeps: bool = True
) -> dict[str, torch.Tensor]:
    """The state of a model with LoRA layers as that of a plain one, whole, in that precision, on the CPU; bf16 by
    stochastic rounding, but for what `kept_in_fp32` names. Tied tensors stay one tensor. The masters are not touched:
    merging them and taking the adapter out again would leave rounding behind.

    Of a model in shards every process has to ask for it. One weight after the other is whole for a moment; `keeps`
    says whether this process gets them.
    """
    adapters, as_it_is = adapted(model), kept_in_fp32(model)

    def made(names: Sequence[str], held: torch.Tensor) -> torch.Tensor | None:
        value = _merged(held, [layer for name in names for layer in adapters.get(name, ())])
        if not keeps:
            return None
        rounds = precision == "bf16" and value.is_floating_point() and names[0] not in as_it_is
        return round_stochastically(value, seed, names[0]) if rounds else value.cpu()

    state: dict[str, torch.Tensor] = {}
    for names, held in _weights(model):
        if (value := made(names, held)) is not None:
            state |= dict.fromkeys(names, value)
    return state


def _merged(held: torch.Tensor, layers: Sequence[Any]) -> torch.Tensor:
    """A weight with what its LoRA adds, whole."""
    value = whole(held)
    for layer in layers:
        value = value + whole(product(layer)).to(value.dtype)
    return value


def _weights(model: nn.Module) -> list[tuple[list[str], torch.Tensor]]:
    """A model's weights without its adapters, each once, with all its names in the untrained model. Tied ones are one
    parameter; by their address they couldn't be told, since parts that are empty have none."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    found: dict[int, tuple[list[str], torch.Tensor]] = {}
    for key, value in model.state_dict().items():
        if not is_adapters(key):
            found.setdefault(id(parameters.get(key, value)), ([], value))[0].append(plain(key))
    return list(found.values())


def kept_in_fp32(model: nn.Module) -> set[str]:
    """Names of what stays in fp32 in a bf16 model: buffers, and what its class names (biases that choose experts)."""
    buffers = {plain(name) for name, _ in model.named_buffers()}
    return buffers | transformers_compat.kept_in_fp32(model, plain_names(model))
