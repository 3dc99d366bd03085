"""What peft doesn't document of its layers and we need, to merge a LoRA without touching the masters, and to train
through the merged weight; see `rlaif.reached`.

In: a model with LoRA layers, as `get_base_model()` gives it. Out: names as the untrained model has them, and what a
layer adds to them.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from rlaif.reached import Reached

_ADAPTER = "default"
"""The name that peft gives an adapter when nobody does."""

REACHED = (
    Reached("peft.tuners.lora.layer", "Linear.get_delta_weight", "a LoRA can't be merged into an export"),
    Reached("peft.tuners.lora.layer", "LoraLayer.lora_A", "a learner in bf16 doesn't train a LoRA"),
    Reached("peft.tuners.lora.layer", "LoraLayer.lora_B", "a learner in bf16 doesn't train a LoRA"),
    Reached("peft.tuners.lora.layer", "ParamWrapper.parameter_name", "a LoRA on experts is merged into no weight"),
    Reached("peft.tuners.lora.layer", "ParamWrapper.get_delta_weight", "a LoRA on experts can't be merged"),
    Reached(
        "peft.tuners.lora.layer",
        "ParamWrapper.get_delta_factors",
        "a learner in bf16 computes experts with their LoRA twice",
    ),
    Reached("peft.tuners.lora.layer", "LoraLayer.base_layer", "an export has peft's names, which nobody can load"),
)


def is_adapters(key: str) -> bool:
    """Whether a parameter belongs to a LoRA, by its name (`.lora_A`, `.lora_B` and others)."""
    return ".lora_" in key


def plain(key: str) -> str:
    """A parameter's name without the wrappers around its layer (`base_layer`): an expert layer has one for each of its
    parameters."""
    return key.replace(".base_layer", "")


def adapted(model: nn.Module) -> dict[str, list[Any]]:
    """Names of the weights that have a LoRA (as the untrained model has them), with the layers that hold it: those
    with `get_delta_weight`; a wrapper for a bare parameter says whose it is in `parameter_name`."""
    found: dict[str, list[Any]] = {}
    for name, module in model.named_modules():
        if hasattr(module, "get_delta_weight"):
            leaf = getattr(module, "parameter_name", "weight")
            found.setdefault(f"{plain(name)}.{leaf}", []).append(module)
    return found


def is_on_a_weight(layer: Any) -> bool:
    """Whether a layer's LoRA has two factors (`lora_A`); that of an embedding has others, and adds in fp32 as it is."""
    return _ADAPTER in layer.lora_A


def holds_a_parameter(layer: Any) -> bool:
    """peft's wrapper for a bare parameter (`ParamWrapper`: a stack of experts), not for a layer."""
    return hasattr(layer, "parameter_name")


def product(layer: Any) -> torch.Tensor:
    """What a layer's LoRA adds to its weight, in the weight's shape (`get_delta_weight`)."""
    delta: torch.Tensor = layer.get_delta_weight(_ADAPTER)
    return delta


def straight_through(layer: Any, undo: ExitStack) -> None:
    """Lets a LoRA add nothing and get its gradient all the same, until `undo`: for a layer whose own weight has the
    product in it already."""
    (_parameter_straight_through if holds_a_parameter(layer) else _layer_straight_through)(layer, undo)


def _layer_straight_through(layer: Any, undo: ExitStack) -> None:
    """The input's gradient goes through the layer's own weight, so it must not go through `lora_A` as well; what
    `lora_B` gives becomes 0 and keeps its gradient."""
    a, b = layer.lora_A[_ADAPTER], layer.lora_B[_ADAPTER]
    undo.callback(a.register_forward_pre_hook(lambda _, x: (x[0].detach(), *x[1:])).remove)
    undo.callback(b.register_forward_hook(lambda _, x, out: out - out.detach()).remove)


def _parameter_straight_through(layer: Any, undo: ExitStack) -> None:
    """The same, where peft adds the product to the weight: once as a matrix (`get_delta_weight`), once as its two
    factors (`get_delta_factors`)."""
    whole, factors = layer.get_delta_weight, layer.get_delta_factors

    def delta_weight(*args: Any, **kwargs: Any) -> torch.Tensor:
        delta = whole(*args, **kwargs)
        return delta - delta.detach()

    def delta_factors(*args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor, float]:
        left, right, scale = factors(*args, **kwargs)
        # [L L'] [R; -R'] = LR - L'R': 0, up to fp32's own rounding, with the gradients of LR
        return torch.cat((left, left.detach()), -1), torch.cat((right, -right.detach()), -2), scale

    layer.get_delta_weight, layer.get_delta_factors = delta_weight, delta_factors
    undo.callback(vars(layer).pop, "get_delta_weight")
    undo.callback(vars(layer).pop, "get_delta_factors")
