"""Samplers on vLLM, one after another in one process: importing vLLM takes most of an engine's start."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

from rlaif.config import Sampling
from rlaif.sampling import Sample, SampleRequest


class Engines:
    """A worker's object: the sampler that was started last."""

    def __init__(self) -> None:
        self._sampler: Any = None

    def start(self, model_path: str, settings: Sampling) -> None:
        """Lets go of the sampler that there is, and starts one."""
        from rlaif.sampling.vllm import Sampler

        self._sampler = None
        gc.collect()  # its memory, before another takes some
        self._sampler = Sampler(model_path, settings)

    def sample(self, requests: list[SampleRequest]) -> Iterator[list[Sample]]:
        """The sampler's own."""
        return self._sampler.sample(requests)

    def load(self, policy_path: str) -> None:
        """The sampler's own."""
        self._sampler.load(policy_path)

    def rest(self) -> None:
        """The sampler's own."""
        self._sampler.rest()

    def wake(self) -> None:
        """The sampler's own."""
        self._sampler.wake()
