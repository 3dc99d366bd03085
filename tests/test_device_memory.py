"""Memory given back and taken again: the same tensors, bit by bit, wherever they are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlaif.device_memory import DeviceMemory, tensors_of

pytestmark = pytest.mark.slow

torch = pytest.importorskip("torch")


def held(*tensors: Any) -> int:
    """Bytes."""
    return sum(t.untyped_storage().nbytes() for t in tensors)


def test_resting_tensors_hold_nothing_and_wake_as_they_were() -> None:
    weight, count = torch.randn(5, 7), torch.tensor(3)
    view, half = weight[1:3].T, torch.randn(4).to(torch.bfloat16)
    before = [t.clone() for t in (weight, count, view, half)]
    memory = DeviceMemory(lambda: [weight, view, weight, count, half])
    memory.rest()
    assert held(weight, count, view, half) == 0
    assert weight.shape == (5, 7), "who looks at it alone sees no difference"
    memory.wake()
    assert all(torch.equal(a, b) for a, b in zip((weight, count, view, half), before, strict=True))
    view[0, 0] = 9.0
    assert weight[1, 0] == 9.0, "a view is one still"


def test_asking_twice_does_nothing_more() -> None:
    weight = torch.randn(4)
    before, memory = weight.clone(), DeviceMemory(lambda: [weight])
    memory.wake()
    memory.rest()
    memory.rest()
    memory.wake()
    memory.wake()
    assert torch.equal(weight, before)


def test_what_comes_later_rests_with_the_others() -> None:
    tensors = [torch.randn(2)]
    memory = DeviceMemory(lambda: tensors)
    memory.rest()
    memory.wake()
    tensors[:] = [torch.randn(3), torch.randn(4)]
    memory.rest()
    assert held(*tensors) == 0


def test_where_there_is_no_room_the_rest_wakes_later(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = [torch.randn(3) for _ in range(4)]
    before, memory = [t.clone() for t in tensors], DeviceMemory(lambda: tensors)
    memory.rest()
    with monkeypatch.context() as patch:
        patch.setattr(torch.UntypedStorage, "resize_", _room_for(2, torch.UntypedStorage.resize_))
        with pytest.raises(torch.OutOfMemoryError):
            memory.wake()
    assert sorted(held(t) for t in tensors) == [0, 0, 12, 12]
    memory.rest()
    assert held(*tensors) == 0, "also those that were awake already"
    memory.wake()
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))


def _room_for(count: int, resize: Callable[..., Any]) -> Callable[..., Any]:
    left = count

    def resize_(storage: Any, size: int) -> Any:
        nonlocal left
        if left == 0:
            raise torch.OutOfMemoryError("no room")
        left -= 1
        return resize(storage, size)

    return resize_


def test_of_a_model_parameters_gradients_and_buffers() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.BatchNorm1d(3))
    model(torch.randn(4, 3)).sum().backward()
    parameters = list(model.parameters())
    memory = DeviceMemory(lambda: tensors_of(model))
    expected = model.eval()(torch.ones(1, 3))
    memory.rest()
    assert held(*parameters, *(p.grad for p in parameters), *model.buffers()) == 0
    memory.wake()
    assert torch.equal(model(torch.ones(1, 3)), expected)


def test_what_maps_a_file_stays(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    save_file({"w": torch.arange(6.0)}, tmp_path / "w.safetensors")
    mapped = load_file(tmp_path / "w.safetensors")["w"]
    memory = DeviceMemory(lambda: [mapped])
    memory.rest()
    assert mapped.tolist() == [0, 1, 2, 3, 4, 5]
    memory.wake()
