"""A model that computes, for as long as a `with` lasts, with the weights that its export in bf16 will have.

In: a model in training (fp32 masters, perhaps with LoRA layers). Out: its losses and gradients as the policy that
samples has them.

Mixed precision as trainers know it (autocast) rounds the masters to the nearest at every call, and adds a LoRA's
product to what a layer gives only after that was rounded. What moved by less than half a step of bf16's grid is not
seen: loss, margin and gradient belong to a policy that hardly moved, while another one samples. In here, weights lie
on the grid already, a LoRA merged into them, rounded as the export rounds them (`rounding`); autocast leaves such as
they are. Gradients go straight through the rounding: to the masters, or to the LoRA.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from rlaif.learning.export import adapted, kept_in_fp32, plain
from rlaif.learning.rounding import on_grid


class AsExported:
    """`with as_exported(): ...`. Inside it takes 4 bytes more for each weight in training, 2 for one under a LoRA."""

    def __init__(self, model: nn.Module, seed: int, adapters: bool = True) -> None:
        """`adapters=False` leaves a LoRA out: for the untrained policy, while its adapters are off."""
        self._seed = seed
        # An adapter on an embedding adds in fp32 as it is.
        found = {name: [x for x in on if "default" in x.lora_A] for name, on in adapted(model).items()}
        self._adapters = {name: on for name, on in found.items() if on} if adapters else {}
        as_it_is = kept_in_fp32(model)
        self._weights = {
            name: p
            for key, p in model.named_parameters()
            if ".lora_" not in key and (name := plain(key)) not in as_it_is and p.dtype == torch.float32
            # What is frozen and on the grid needs nothing.
            if p.requires_grad or name in self._adapters or not torch.equal(p.to(torch.bfloat16).float(), p)
        }  # fmt: skip
        self._masters: dict[str, torch.Tensor] = {}

    @contextmanager
    def __call__(self) -> Iterator[None]:
        assert not self._masters, "the masters would be lost"
        self._masters = {name: p.data for name, p in self._weights.items()}
        try:
            for name, p in self._weights.items():
                p.data = self._exported(name, p.data)
            with ExitStack() as undo:
                for layer in {id(x): x for on in self._adapters.values() for x in on}.values():
                    (_straight_through_parameter if _holds_a_parameter(layer) else _straight_through)(layer, undo)
                yield
        finally:
            for name, p in self._weights.items():
                p.data = self._masters[name]
            self._masters = {}

    @torch.no_grad()
    def _exported(self, name: str, value: torch.Tensor) -> torch.Tensor:
        on = self._adapters.get(name, [])
        for layer in on:
            value = value + layer.get_delta_weight("default").to(value.dtype)
        rounded = on_grid(value, self._seed, name)
        # A layer's own weight gets no gradient under a LoRA, so it may take half the memory.
        return rounded.to(torch.bfloat16) if on and not any(map(_holds_a_parameter, on)) else rounded


def _holds_a_parameter(layer: Any) -> bool:
    """peft's wrapper for a bare parameter (a stack of experts), not for a layer."""
    return hasattr(layer, "parameter_name")


def _straight_through(layer: Any, undo: ExitStack) -> None:
    """The layer's own weight has the LoRA's product in it already: what the LoRA adds is 0, its gradient stays. The
    input's gradient goes through that weight, so it must not go through the LoRA as well."""
    a, b = layer.lora_A["default"], layer.lora_B["default"]
    undo.callback(a.register_forward_pre_hook(lambda _, x: (x[0].detach(), *x[1:])).remove)
    undo.callback(b.register_forward_hook(lambda _, x, out: out - out.detach()).remove)


def _straight_through_parameter(layer: Any, undo: ExitStack) -> None:
    """The same, where peft adds the product to the weight: once as a matrix, once as its two factors."""
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
