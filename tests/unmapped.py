"""On a CPU loading a model only maps its file, and nothing of it could be given back."""

from __future__ import annotations

from typing import Any

import pytest


def unmap(patch: pytest.MonkeyPatch) -> None:
    """From here on models are read into memory of their own."""
    from transformers import AutoModelForCausalLM

    load = AutoModelForCausalLM.from_pretrained

    def copied(*args: Any, **kwargs: Any) -> Any:
        loaded = load(*args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.data = tensor.data.clone()
        return loaded

    patch.setattr(AutoModelForCausalLM, "from_pretrained", copied)
