"""fp32 to bf16, up or down at random so that the expectation is right (stochastic rounding: Gupta et al., arXiv
1502.02551; for updates below the grid: arXiv 2010.06192).

In: master weights, the run's seed, a tensor's name. Out: the same numbers on bf16's grid.

Base weights lie on the grid, and at usual learning rates most of them move by less than half a step of it. Rounding to
the nearest takes that back: at 1e-6, one hundredth of what was trained is left. The random threshold of a weight
follows from seed, name and place alone, on every device, and is the same at every step and export: two roundings
differ where the masters do, and nowhere else.
"""

from __future__ import annotations

import hashlib

import torch

_PART = 2**15
"""Weights that are rounded together on a CPU: what the arithmetic needs stays in its cache, and torch hands none of it
to a second thread, whose waiting costs a hundred times the arithmetic where other processes want the cores."""
_PART_GPU = 2**24


def on_grid(value: torch.Tensor, seed: int, name: str) -> torch.Tensor:
    """Those numbers on bf16's grid, still as fp32; what lies on it stays. Same value, seed and name: same result."""
    flat = value.detach().contiguous().view(-1)
    out = torch.empty_like(flat, dtype=torch.float32)
    key = hashlib.sha256(f"{seed}\0{name}".encode()).digest()
    first, second = (int.from_bytes(key[at : at + 4], "big", signed=True) for at in (0, 4))
    part = _PART if flat.device.type == "cpu" else _PART_GPU
    places = torch.arange(min(part, flat.numel()), dtype=torch.int32, device=flat.device)
    for start in range(0, flat.numel(), part):
        numbers = flat[start : start + part].float()
        bits = _random_bits(places[: len(numbers)] + _wrapped(first + start), second)
        # A bf16 number is the upper half of an fp32 one: adding 16 random bits and cutting the lower half off rounds
        # up with the probability that the lower half stands for.
        bits.add_(numbers.view(torch.int32)).bitwise_and_(-(1 << 16))
        out[start : start + part] = bits.view(torch.float32)
    return out.view(value.shape)


def round_stochastically(value: torch.Tensor, seed: int, name: str) -> torch.Tensor:
    """fp32 to bf16 on the CPU; see `on_grid`."""
    return on_grid(value, seed, name).to("cpu", torch.bfloat16)


def _random_bits(x: torch.Tensor, key: int) -> torch.Tensor:
    """16 random bits for each int32 counter, by the mixing of Wellons' `lowbias32`. Uses `x` up; products wrap."""
    t = torch.bitwise_right_shift(x, 16).bitwise_and_(0xFFFF)  # an int32 shifts its sign in
    x.bitwise_xor_(t).mul_(0x7FEB352D).add_(key)
    torch.bitwise_right_shift(x, 15, out=t).bitwise_and_(0x1FFFF)
    x.bitwise_xor_(t).mul_(_wrapped(0x846CA68B))
    return x.bitwise_right_shift_(16).bitwise_and_(0xFFFF)


def _wrapped(number: int) -> int:
    """As an int32 holds it."""
    return (number + (1 << 31)) % (1 << 32) - (1 << 31)
