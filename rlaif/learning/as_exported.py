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

import torch
from torch import nn

from rlaif.learning.peft_compat import (
    adapted,
    holds_a_parameter,
    is_adapters,
    is_on_a_weight,
    plain,
    product,
    straight_through,
)
from rlaif.learning.policy_state import kept_in_fp32
from rlaif.learning.rounding import on_grid


class AsExported:
    """`with as_exported(): ...`. Inside it takes 4 bytes more for each weight in training, and for a frozen one off the
    grid; for one under a LoRA 2, in a stack of experts 4."""

    def __init__(self, model: nn.Module, seed: int, adapters: bool = True) -> None:
        """`adapters=False` leaves a LoRA out: for the untrained policy, while its adapters are off."""
        self._seed = seed
        found = {name: [x for x in on if is_on_a_weight(x)] for name, on in adapted(model).items()}
        as_it_is = kept_in_fp32(model)  # a LoRA on such a weight adds in fp32 as it is
        self._adapters = {n: on for n, on in found.items() if on and n not in as_it_is} if adapters else {}
        self._weights = {
            name: p
            for key, p in model.named_parameters()
            if not is_adapters(key) and (name := plain(key)) not in as_it_is and p.dtype == torch.float32
            # What is frozen and on the grid needs nothing.
            if p.requires_grad or name in self._adapters or not torch.equal(p.to(torch.bfloat16).float(), p)
        }  # fmt: skip
        self._masters: dict[str, torch.Tensor] = {}

    @property
    def names(self) -> tuple[str, ...]:
        """The weights that are others inside, as the untrained model names them."""
        return tuple(self._weights)

    @contextmanager
    def __call__(self) -> Iterator[None]:
        assert not self._masters, "the masters would be lost"
        self._masters = {name: p.data for name, p in self._weights.items()}
        try:
            for name, p in self._weights.items():
                p.data = self._exported(name, p.data)
            with ExitStack() as undo:
                for layer in {id(x): x for on in self._adapters.values() for x in on}.values():
                    straight_through(layer, undo)
                yield
        finally:
            for name, p in self._weights.items():
                p.data = self._masters[name]
            self._masters = {}

    @torch.no_grad()
    def _exported(self, name: str, value: torch.Tensor) -> torch.Tensor:
        on = self._adapters.get(name, [])
        for layer in on:
            value = value + product(layer).to(value.dtype)
        rounded = on_grid(value, self._seed, name)
        # A layer's own weight gets no gradient under a LoRA, so it may take half the memory.
        return rounded.to(torch.bfloat16) if on and not any(map(holds_a_parameter, on)) else rounded
