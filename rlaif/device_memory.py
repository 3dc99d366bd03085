"""What tensors hold of a device's memory, given back and taken again (`device: shared`).

In: the tensors. Out: the same tensors: while they rest their storage is empty and its content is in RAM. Whoever refers
to them needn't know: tied weights stay one, a view stays a view, and an optimizer goes on with the parameters that it
was given. As FSDP frees parameters that it has gathered (arXiv:2304.11277).
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def tensors_of(model: Any) -> Iterator[torch.Tensor]:
    """A model's parameters, their gradients, and its buffers."""
    for parameter in model.parameters():
        yield parameter.data
        if parameter.grad is not None:
            yield parameter.grad
    yield from model.buffers()


class DeviceMemory:
    """What some tensors hold."""

    def __init__(self, tensors: Callable[[], Iterable[torch.Tensor]]):
        """`tensors` gives them; it is asked at every rest, since some come later (an optimizer's at its first step) and
        some are replaced."""
        self._tensors = tensors
        self._resting: list[tuple[torch.UntypedStorage, torch.UntypedStorage]] = []
        """Empty storages, and the content of each in RAM."""

    def rest(self) -> None:
        """Gives the memory back. What rests already stays as it is; so does what maps a file, which can't be
        emptied."""
        import torch

        for tensor in self._tensors():
            storage = _here(tensor).untyped_storage()
            if storage.nbytes() and storage.resizable():
                content = torch.UntypedStorage(storage.nbytes())
                content.copy_(storage)
                self._resting.append((storage, content))
                storage.resize_(0)
        _give_back()

    def wake(self) -> None:
        """Takes the memory again, with what was in it. Raises what the device raises where there is none: what is still
        resting then can be woken later."""
        while self._resting:
            storage, content = self._resting[-1]
            storage.resize_(content.nbytes())
            storage.copy_(content)
            self._resting.pop()


def _here(tensor: torch.Tensor) -> torch.Tensor:
    """What this process has of a tensor: of one in shards (`DTensor`) a part."""
    part: torch.Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return part


def _give_back() -> None:
    """To the device what PyTorch keeps for later, also of what only a cycle of references still holds."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
