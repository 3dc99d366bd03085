"""New weights for a running vLLM engine, whole: what vLLM's own reload leaves behind on the CPU is packed again.

In: a `vllm.LLM` and a folder. The only module that touches what is private to vLLM. Checked against vLLM 0.31 and
0.32; `rlaif doctor --deep MODEL` and the loop's `weights_gap` compare the result with transformers.

`reload_weights` restores each layer, loads it, and runs its post-processing. Two things escape it on the CPU:

* Output layer and embedding keep a packed copy for the matrix product (`cpu_linear`). It is made when the weights are
  first loaded. A tied head loads nothing of its own, so it goes on multiplying with the old copy.
* A mixture of experts packs its weights only the first time. Later loads put unpacked weights where the kernel reads
  packed ones.

On a GPU neither exists: kernels read the parameters themselves.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rlaif.errors import RlaifError, UserError

_PACKED_ON_CPU = ("UnquantizedLinearMethod", "UnquantizedEmbeddingMethod", "UnquantizedFusedMoEMethod")
"""Ways of holding weights whose reload on the CPU was compared with transformers, layer by layer."""


def check_reloads(llm: Any, on_cpu: bool) -> None:
    """Refuses a model that would go on sampling from old weights, before anything is sampled.

    Raises:
        UserError: a layer holds its weights in a form that is not known to follow a reload.
    """
    if not on_cpu:
        return
    unknown = sorted({name for module in _modules(llm) if (name := _method(module)) not in (None, *_PACKED_ON_CPU)})
    if unknown:
        raise UserError(
            f"sampling.engine: vLLM on the CPU is not known to take new weights for this model ({', '.join(unknown)}); "
            "set sampling.engine: transformers"
        )


def reload_weights(llm: Any, path: str, on_cpu: bool) -> None:
    """Takes the weights of a folder and drops what was cached under the old ones.

    Raises:
        RlaifError: the folder lacks some of the model's weights; vLLM itself only warns.
    """
    if on_cpu:
        for module in _modules(llm):
            if _method(module) == "UnquantizedFusedMoEMethod":
                # With a kernel there, vLLM takes the load for an update that needs no packing.
                module.quant_method.moe_kernel = None
    with _warnings("vllm.model_executor.model_loader.reload") as said:
        llm.collective_rpc("reload_weights", kwargs={"weights_path": path})
    if lost := [line for line in said if "not loaded from checkpoint" in line]:
        raise RlaifError(f"{path}: not all weights reached the sampler ({lost[0][:300]})")
    if on_cpu:
        from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm

        for module in _modules(llm):
            if _method(module) == "UnquantizedEmbeddingMethod" and hasattr(module, "cpu_linear"):
                dispatch_cpu_unquantized_gemm(module, remove_weight=False)
    llm.reset_prefix_cache()


def _method(module: Any) -> str | None:
    """How a layer holds its weights, by vLLM's name for it; None for one without weights of its own."""
    method = getattr(module, "quant_method", None)
    if method is None or not any(True for _ in module.parameters(recurse=False)):
        return None
    return type(method).__name__


def _modules(llm: Any) -> list[Any]:
    """The layers of the engine in this process; on the CPU there is one."""
    modules: list[Any] = llm.apply_model(lambda model: list(model.modules()))[0]
    return modules


@contextmanager
def _warnings(logger_name: str) -> Iterator[list[str]]:
    """Collects what a logger and its children warn of, whatever the level shows."""
    said: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage())

    listener = Listener(level=logging.WARNING)
    # A child's record passes its parents' handlers whatever their level; the child's own level must let it out.
    loggers = [logging.getLogger(name) for name in logging.root.manager.loggerDict if name.startswith(logger_name)]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.addHandler(listener)
        logger.setLevel(logging.WARNING)
    try:
        yield said
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.removeHandler(listener)
            logger.setLevel(level)
