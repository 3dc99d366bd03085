"""What vLLM doesn't document and we need: an engine that one can step, the nucleus, and new weights for it; see
`rlaif.reached`.

In: a `vllm.LLM`, in whose process this runs; with `tensor_parallel_size` above 1 its workers have processes of their
own, and are reached by the names of `TakesWeights`' methods alone. Only this module and `rlaif.sampling.vllm` import
vllm.

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
import os
import secrets
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from rlaif.errors import RlaifError, UserError
from rlaif.reached import Reached

_OLD = "the sampler goes on with old weights, in part"
_NUCLEUS = "no top-p on the CPU"
_REFUSED = "every model is refused on the CPU"
_LAYERS = "vllm.model_executor.layers"
_RELOAD = "vllm.model_executor.model_loader.reload"
_CACHE = "vllm.entrypoints.serve.dev.cache.api_router"
_SLEEP = "vllm.entrypoints.serve.dev.sleep.api_router"

REACHED = (
    Reached("vllm.platforms", "current_platform", "the sampler doesn't know what it runs on"),
    Reached("vllm.sampling_params", "RequestOutputKind", "stop strings are not looked for"),
    Reached("vllm", "LLM.llm_engine", "the sampler has no engine to step"),
    Reached("vllm.v1.sample.logits_processor", "LogitsProcessor", _NUCLEUS),
    Reached("vllm.v1.sample.logits_processor", "BatchUpdate", _NUCLEUS),
    Reached("vllm.v1.sample.logits_processor.builtin", "process_dict_updates", _NUCLEUS),
    Reached("vllm", "LLM.collective_rpc", _OLD),
    Reached("vllm.v1.worker.gpu_worker", "Worker.get_model", "the sampler takes no new weights"),
    Reached("vllm.v1.worker.worker_base", "WorkerWrapperBase.init_worker", _OLD, says="worker_extension_cls"),
    Reached("vllm.entrypoints.serve.dev.rpc.api_router", "collective_rpc", "a server takes no new weights"),
    Reached(_CACHE, "reset_prefix_cache", "a server takes no new weights", says='"success"'),
    Reached("vllm", "LLM.reset_prefix_cache", "prompts are remembered under old weights", says="-> bool"),
    Reached(_SLEEP, "", "servers can't share a GPU in turns", says='"/sleep"'),
    Reached(_SLEEP, "", "servers can't share a GPU in turns", says='"/wake_up"'),
    Reached("vllm.v1.worker.gpu_worker", "Worker.reload_weights", _OLD),
    Reached("vllm.v1.worker.gpu_model_runner", "GPUModelRunner.reload_weights", _OLD, says="weights_path"),
    Reached(f"{_RELOAD}.inplace", "", "weights that a folder lacks are not noticed", says="not loaded from checkpoint"),
    Reached(f"{_LAYERS}.utils", "dispatch_cpu_unquantized_gemm", _OLD, says="layer.cpu_linear ="),
    Reached(f"{_LAYERS}.linear", "LinearBase.quant_method", _OLD),
    Reached(f"{_LAYERS}.linear", "UnquantizedLinearMethod", _REFUSED),
    Reached(f"{_LAYERS}.vocab_parallel_embedding", "UnquantizedEmbeddingMethod", _REFUSED),
    Reached(f"{_LAYERS}.fused_moe.unquantized_fused_moe_method", "UnquantizedFusedMoEMethod", _OLD, says="moe_kernel"),
)

EXTENSION, NUCLEUS, MIDDLEWARE = (
    "rlaif.sampling.vllm_compat.TakesWeights",
    "rlaif.sampling.vllm_compat:Nucleus",
    "rlaif.sampling.vllm_compat.only_with_key",
)
"""What vLLM imports by name, in whichever process it needs it."""

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
    refuse(", ".join(sorted({str(unknown) for unknown in llm.collective_rpc("rlaif_check") if unknown})))


def refuse(unknown: str) -> None:
    """Refuses a model with layers in these forms; with none, it doesn't.

    Raises:
        UserError: there are some.
    """
    if unknown:
        raise UserError(
            f"sampling.engine: vLLM on the CPU is not known to take new weights for this model ({unknown}); set "
            "sampling.engine: transformers"
        )


def reload_weights(llm: Any, path: str) -> None:
    """Takes the weights of a folder and drops what was cached under the old ones.

    Raises:
        RlaifError: the folder lacks some of the model's weights, of which vLLM itself only warns; or as
            `forget_prompts`.
    """
    check_taken(path, llm.collective_rpc("rlaif_take", kwargs={"path": path}))
    forget_prompts(llm)


def check_taken(path: str, said: Iterable[object]) -> None:
    """Looks at what workers answered to `rlaif_take`.

    Raises:
        RlaifError: the folder lacks some of the model's weights.
    """
    if lost := next(filter(None, said), None):
        raise RlaifError(f"{path}: not all weights reached the sampler ({lost})")


def forget_prompts(llm: Any) -> None:
    """Empties the prefix cache. vLLM keeps all of it while a request holds some, and says so by what it returns. Nobody
    else asks this engine, so waiting would change nothing.

    Raises:
        RlaifError: it is kept: keys and values of older weights would be read with the new ones.
    """
    if not llm.reset_prefix_cache():
        raise RlaifError(
            "vLLM: the prefix cache can't be emptied, since a request of an earlier batch still holds some of it; the "
            "same command goes on, with an engine that is started anew"
        )


class TakesWeights:
    """What workers can do beside vLLM's own (`worker_extension_cls`): vLLM adds this class to theirs, and calls its
    methods by name, also those of other processes. Their names must be new there."""

    get_model: Any
    """Of vLLM's worker, as what follows."""
    reload_weights: Any
    rlaif_weights = ""

    def rlaif_check(self) -> str:
        """Why this model would go on sampling from old weights; empty when it wouldn't."""
        return ", ".join(_unknown(list(self.get_model().modules()))) if on_cpu() else ""

    def rlaif_take(self, path: str) -> str:
        """Takes the weights of a folder. Returns which it lacks; an exception would lose its type between processes."""
        self.rlaif_weights = f"{path}, in part"  # what it says it holds, should the rest not come
        if not (lost := take(list(self.get_model().modules()), lambda: self.reload_weights(weights_path=path))):
            self.rlaif_weights = path
        return lost

    def rlaif_held(self) -> str:
        """The folder whose weights it took last; empty for those that it was started with."""
        return self.rlaif_weights


async def only_with_key(request: Any, call_next: Any) -> Any:
    """A server's middleware (`--middleware`): vLLM itself asks for a key on some paths alone, and one that takes
    weights has others."""
    from starlette.responses import Response

    given, wanted = request.headers.get("authorization", ""), f"Bearer {os.environ['VLLM_API_KEY']}"
    if request.url.path != "/health" and not secrets.compare_digest(given.encode(), wanted.encode()):
        return Response(status_code=401)
    return await call_next(request)


def __getattr__(name: str) -> Any:
    """`Nucleus`, for who imports it by name: its base is vLLM's, which isn't imported before it is needed."""
    if name == "Nucleus":
        return nucleus_processor()
    raise AttributeError(name)


def take(modules: list[Any], reload: Callable[[], object]) -> str:
    """The worker's `reload_weights`, and around it what it leaves behind. `modules` are the layers of a worker in this
    process. Returns what vLLM warns of where the folder lacks some of the model's weights; empty where it has all."""
    cpu = on_cpu()
    if cpu:
        for module in modules:
            if _method(module) == "UnquantizedFusedMoEMethod":
                # With a kernel there, vLLM takes the load for an update that needs no packing.
                module.quant_method.moe_kernel = None
    with _warnings(_RELOAD) as said:
        reload()
    if lost := [line for line in said if "not loaded from checkpoint" in line]:
        return lost[0][:300]
    if cpu:
        from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm

        for module in modules:
            if _method(module) == "UnquantizedEmbeddingMethod" and hasattr(module, "cpu_linear"):
                dispatch_cpu_unquantized_gemm(module, remove_weight=False)
    return ""


def _unknown(modules: list[Any]) -> list[str]:
    """Forms in which layers hold weights that aren't known to follow a reload."""
    return sorted({name for module in modules if (name := _method(module)) not in (None, *_PACKED_ON_CPU)})


def _method(module: Any) -> str | None:
    """How a layer holds its weights, by the class of its `quant_method`; None for one without weights of its own."""
    method = getattr(module, "quant_method", None)
    if method is None or not any(True for _ in module.parameters(recurse=False)):
        return None
    return type(method).__name__


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
