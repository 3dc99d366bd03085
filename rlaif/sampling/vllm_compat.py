"""What vLLM doesn't document and we need: an engine that one can step, the nucleus, and new weights for it; see
`rlaif.reached`.

In: a `vllm.LLM`, in whose process this runs. Only this module and `rlaif.sampling.vllm` import vllm.

New weights arrive whole: what vLLM's own reload leaves behind on the CPU is packed again. Checked against vLLM 0.31 and
0.32; `rlaif doctor --deep MODEL` and the loop's `weights_gap` compare the result with transformers. `reload_weights`
restores each layer, loads it, and runs its post-processing. Two things escape it on the CPU:

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
from rlaif.reached import Reached

_OLD = "the sampler goes on with old weights, in part"
_NUCLEUS = "no top-p on the CPU"
_REFUSED = "every model is refused on the CPU"
_LAYERS = "vllm.model_executor.layers"
_RELOAD = "vllm.model_executor.model_loader.reload"

REACHED = (
    Reached("vllm.platforms", "current_platform", "the sampler doesn't know what it runs on"),
    Reached("vllm.sampling_params", "RequestOutputKind", "stop strings are not looked for"),
    Reached("vllm", "LLM.llm_engine", "the sampler has no engine to step"),
    Reached("vllm.v1.sample.logits_processor", "LogitsProcessor", _NUCLEUS),
    Reached("vllm.v1.sample.logits_processor", "BatchUpdate", _NUCLEUS),
    Reached("vllm.v1.sample.logits_processor.builtin", "process_dict_updates", _NUCLEUS),
    Reached("vllm", "LLM.apply_model", _OLD),
    Reached("vllm", "LLM.collective_rpc", _OLD),
    Reached("vllm.v1.worker.gpu_worker", "Worker.reload_weights", _OLD),
    Reached("vllm.v1.worker.gpu_model_runner", "GPUModelRunner.reload_weights", _OLD, says="weights_path"),
    Reached(f"{_RELOAD}.inplace", "", "weights that a folder lacks are not noticed", says="not loaded from checkpoint"),
    Reached(f"{_LAYERS}.utils", "dispatch_cpu_unquantized_gemm", _OLD, says="layer.cpu_linear ="),
    Reached(f"{_LAYERS}.linear", "LinearBase.quant_method", _OLD),
    Reached(f"{_LAYERS}.linear", "UnquantizedLinearMethod", _REFUSED),
    Reached(f"{_LAYERS}.vocab_parallel_embedding", "UnquantizedEmbeddingMethod", _REFUSED),
    Reached(f"{_LAYERS}.fused_moe.unquantized_fused_moe_method", "UnquantizedFusedMoEMethod", _OLD, says="moe_kernel"),
)

_PACKED_ON_CPU = ("UnquantizedLinearMethod", "UnquantizedEmbeddingMethod", "UnquantizedFusedMoEMethod")
"""Ways of holding weights whose reload on the CPU was compared with transformers, layer by layer."""


def on_cpu() -> bool:
    """Whether the installed vLLM computes on the CPU (`vllm.platforms.current_platform`)."""
    from vllm.platforms import current_platform

    return bool(current_platform.is_cpu())


def output_kind(every_token: bool) -> Any:
    """What an engine hands out of an answer: all of it at every token, or once it is finished."""
    from vllm.sampling_params import RequestOutputKind

    return RequestOutputKind.CUMULATIVE if every_token else RequestOutputKind.FINAL_ONLY


def engine_of(llm: Any) -> Any:
    """The `LLMEngine` in an `LLM` (`llm_engine`), which takes requests and is stepped: `LLM.generate` hands out nothing
    before the last answer is finished."""
    return llm.llm_engine


def nucleus_processor() -> type[Any]:
    """Top-p as a vLLM logits processor, for the CPU, where vLLM's own sorts the vocabulary at every token. What a
    processor is, and `process_dict_updates`, stand in vLLM's engine (`vllm.v1`)."""
    import torch
    from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor
    from vllm.v1.sample.logits_processor.builtin import process_dict_updates

    from rlaif.sampling.nucleus import keep_nucleus

    class Nucleus(LogitsProcessor):
        def __init__(self, vllm_config: Any, device: Any, is_pin_memory: bool) -> None:
            self._by_row: dict[int, float] = {}
            self._top_p = torch.ones(0)

        def is_argmax_invariant(self) -> bool:
            return True  # so it is applied after temperature, and not to greedy rows

        def update_state(self, batch_update: BatchUpdate | None) -> None:
            process_dict_updates(
                self._by_row, batch_update, lambda params, _prompt, _output: (params.extra_args or {}).get("nucleus")
            )
            if batch_update is not None:
                self._top_p = torch.tensor([self._by_row.get(row, 1.0) for row in range(batch_update.batch_size)])

        def apply(self, logits: Any) -> Any:
            return keep_nucleus(logits, self._top_p[: len(logits)])

    return Nucleus


def check_reloads(llm: Any) -> None:
    """Refuses a model that would go on sampling from old weights, before anything is sampled.

    Raises:
        UserError: a layer holds its weights in a form that is not known to follow a reload.
    """
    if not on_cpu():
        return
    unknown = sorted({name for module in _modules(llm) if (name := _method(module)) not in (None, *_PACKED_ON_CPU)})
    if unknown:
        raise UserError(
            f"sampling.engine: vLLM on the CPU is not known to take new weights for this model ({', '.join(unknown)}); "
            "set sampling.engine: transformers"
        )


def reload_weights(llm: Any, path: str) -> None:
    """Takes the weights of a folder and drops what was cached under the old ones: the worker's `reload_weights`, and
    around it what it leaves behind.

    Raises:
        RlaifError: the folder lacks some of the model's weights; vLLM itself only warns.
    """
    cpu = on_cpu()
    if cpu:
        for module in _modules(llm):
            if _method(module) == "UnquantizedFusedMoEMethod":
                # With a kernel there, vLLM takes the load for an update that needs no packing.
                module.quant_method.moe_kernel = None
    with _warnings(_RELOAD) as said:
        llm.collective_rpc("reload_weights", kwargs={"weights_path": path})
    if lost := [line for line in said if "not loaded from checkpoint" in line]:
        raise RlaifError(f"{path}: not all weights reached the sampler ({lost[0][:300]})")
    if cpu:
        from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm

        for module in _modules(llm):
            if _method(module) == "UnquantizedEmbeddingMethod" and hasattr(module, "cpu_linear"):
                dispatch_cpu_unquantized_gemm(module, remove_weight=False)
    llm.reset_prefix_cache()


def _method(module: Any) -> str | None:
    """How a layer holds its weights, by the class of its `quant_method`; None for one without weights of its own."""
    method = getattr(module, "quant_method", None)
    if method is None or not any(True for _ in module.parameters(recurse=False)):
        return None
    return type(method).__name__


def _modules(llm: Any) -> list[Any]:
    """The layers of the engine in this process (`apply_model`); on the CPU there is one."""
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
