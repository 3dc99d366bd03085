"""Sampling from vLLM's servers: those that the job names, or those that this engine starts.

In: `SampleRequest`s and folders of weights that the servers can read. Out: `Sample`s as they finish. A prompt's answers
are all sampled by one server, and which one follows from the prompt's place alone (`SampleRequest.place`). What the
servers do beside vLLM's own is in `vllm_compat` (`TakesWeights`). That every server holds the weights that it was given
is asked when answers have come and before anybody is given them: one that was started again, or that somebody else
gives weights, holds others, and what is handed out may be on the disk a moment later.
"""

from __future__ import annotations

import itertools
import json
import os
import queue
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from rlaif import config, models
from rlaif.config import Serve
from rlaif.errors import RlaifError, UserError
from rlaif.hardware import gpu_names
from rlaif.records import TokenSequence
from rlaif.sampling import Sample, SampleRequest
from rlaif.sampling.endings import Endings
from rlaif.sampling.requests import check_length
from rlaif.sampling.vllm_compat import EXTENSION, MIDDLEWARE, NUCLEUS, check_taken, refuse
from rlaif.serving.servers import Servers
from rlaif.workers.placement import spread, usable_gpus

T = TypeVar("T")
MAX_SEQUENCES = 256
"""Of one server."""
MODEL = "policy"
"""What the servers call it."""
_ANSWER_S = 3600.0
"""No answer takes so long; a server that is gone cuts the connection."""
FREE_S, POLL_S = 20.0, 0.2
"""How long answers that nobody waits for any more may hold a server's prefix cache: it gives them up at its next step.
And how often it is asked."""


class Sampler:
    """Servers with one policy's weights in them.

    Args:
        model_path: Folder with config, safetensors and tokenizer.
        settings: The job's `sampling` section.
        logs: Folder for the logs of servers that are started.
        rests: Those will be asked to rest.

    Raises:
        UserError: a server can't be started or reached, or doesn't take weights.
    """

    def __init__(
        self, model_path: str, settings: config.Sampling, logs: Path | None = None, rests: bool = False
    ) -> None:
        self._endings = Endings(model_path, models.load_tokenizer(model_path), settings)
        self._max_model_len = settings.max_model_len
        self._held = ""
        self._servers: Servers | None = None
        self._nucleus = False
        if settings.addresses:
            self._urls = [url.rstrip("/").removesuffix("/v1") for url in settings.addresses]
            self._key = _key(settings)
            self._opener = urllib.request.build_opener()
        else:
            self._servers = Servers("sampler", settings.replicas)
            self._urls = [url.removesuffix("/v1") for url in self._servers.urls]
            self._key = self._servers.key
            self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
            self._nucleus = not gpu_names()
            logs = logs or Path(tempfile.mkdtemp(prefix="rlaif-sampler-"))
            _start(self._servers, model_path, settings, logs, rests)
        self._pool = ThreadPoolExecutor(MAX_SEQUENCES * len(self._urls), "sampling")
        self._aside = ThreadPoolExecutor(len(self._urls), "servers")
        """For what doesn't wait until a batch's answers have had their turn."""
        refuse(next((unknown for _, unknown in self._rpc("rlaif_check") if unknown), ""))
        if self._servers is None:  # whatever they held before
            self.load(model_path)

    def sample(self, requests: list[SampleRequest]) -> Iterator[list[Sample]]:
        """Samples a batch; yields answers as they finish, in any order.

        Raises:
            UserError: a prompt leaves no room for `max_tokens` within `sampling.max_model_len`.
            RlaifError: a server is gone, holds other weights than it was given, or samples for somebody else.
        """
        for r in requests:
            check_length(r, self._max_model_len)
        self._check_weights()
        self._each(self._forget_prompts)  # as the engine inside does
        asked = [self._pool.submit(self._answer, self._urls[r.place % len(self._urls)], r) for r in requests]
        finished: queue.SimpleQueue[Future[Sample]] = queue.SimpleQueue()
        for answer in asked:
            answer.add_done_callback(finished.put)
        left = len(asked)
        try:
            while left:
                some = [finished.get()]
                while not finished.empty():
                    some.append(finished.get())
                left -= len(some)
                samples = [answer.result() for answer in some]
                self._check_weights()
                yield samples
        finally:
            for answer in asked:
                answer.cancel()

    def load(self, policy_path: str) -> None:
        """Takes the weights of another folder of the same architecture, which every server can read. What is cached
        goes before: who comes into the middle of somebody else's batch is refused, and leaves that one its weights.

        Raises:
            RlaifError: a server is gone, lacks weights, or samples for somebody else.
        """
        self._each(self._forget_prompts)
        check_taken(policy_path, (lost for _, lost in self._rpc("rlaif_take", path=policy_path)))
        self._held = policy_path

    def rest(self) -> None:
        """Servers that were started give back what they hold of their GPUs, and keep their weights in RAM."""
        if self._servers is not None:
            self._servers.rest()

    def wake(self) -> None:
        """They take it again."""
        if self._servers is not None:
            self._servers.wake()

    def logprobs(self, sequences: list[TokenSequence]) -> list[tuple[float, ...]]:
        """log p of each completion token under the weights that sample now, in nats."""
        found = list(self._pool.map(self._scored, sequences, itertools.cycle(self._urls)))
        self._check_weights()
        return found

    def close(self) -> None:
        """Ends the servers that were started."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._aside.shutdown(wait=False, cancel_futures=True)
        if self._servers is not None:
            self._servers.close()

    def _answer(self, url: str, request: SampleRequest) -> Sample:
        body = {
            "prompt": list(request.prompt_token_ids),
            "max_tokens": request.max_tokens,
            "temperature": request.temperature,
            "top_p": 1.0 if self._nucleus else request.top_p,
            "seed": request.seed,
            "logprobs": 0,  # of the sampled token alone
            "stop_token_ids": sorted(self._endings.token_ids),
            **({"vllm_xargs": {"nucleus": request.top_p}} if self._nucleus else {}),
        }
        choice = self._complete(url, body)
        token_ids, logprobs = choice["token_ids"], choice["logprobs"]["token_logprobs"]
        if choice["finish_reason"] not in ("stop", "length"):
            raise RlaifError(f"{url}: ended request {request.id} with {choice['finish_reason']!r}")
        length = len(token_ids)
        if self._endings.strings:  # sampled past them; as `rlaif.sampling.vllm` they are looked for at every token
            length = next((n for n in range(1, length) if self._endings.ended(token_ids[:n])), length)
        return self._endings.sample(request.id, token_ids[:length], sum(logprobs[:length]))

    def _scored(self, sequence: TokenSequence, url: str) -> tuple[float, ...]:
        body = {"prompt": list(sequence.all_ids), "max_tokens": 1, "temperature": 0.0, "prompt_logprobs": 0}
        by_token = self._complete(url, body)["prompt_logprobs"]
        start = len(sequence.prompt_token_ids)
        own = zip(sequence.all_ids[start:], by_token[start:], strict=True)
        return tuple(float(found[str(token)]["logprob"]) for token, found in own)

    def _complete(self, url: str, body: dict[str, Any]) -> dict[str, Any]:
        choice: dict[str, Any] = self._post(url, "/v1/completions", {"model": MODEL, "return_token_ids": True, **body})[
            "choices"
        ][0]
        return choice

    def _check_weights(self) -> None:
        """Raises an RlaifError where a server holds other weights than it was given."""
        for url, held in self._rpc("rlaif_held"):
            if held != self._held:
                raise RlaifError(
                    f"{url}: holds the weights of {held or 'its start'}, and was given {self._held or 'none'}; it was "
                    "started again, or somebody else gives it weights; the same command goes on"
                )

    def _forget_prompts(self, url: str) -> None:
        """Empties a server's prefix cache. Keys and values of older weights would else be read with the new ones.

        Raises:
            RlaifError: answers are under way there, whose keys and values vLLM keeps, and with them all others.
        """
        until = time.monotonic() + FREE_S
        while not self._post(url, "/reset_prefix_cache")["success"]:
            if time.monotonic() > until:
                raise RlaifError(
                    f"{url}: its prefix cache can't be emptied, since answers are under way there; one run at a time "
                    "can sample from a server. Once the other one has ended, the same command goes on"
                )
            time.sleep(POLL_S)

    def _rpc(self, method: str, **kwargs: str) -> list[tuple[str, str]]:
        """What each worker of each server says, and the server's address."""
        answers = self._each(lambda url: self._post(url, "/collective_rpc", {"method": method, "kwargs": kwargs}))
        return [
            (url, said or "") for url, answer in zip(self._urls, answers, strict=True) for said in answer["results"]
        ]

    def _each(self, ask: Callable[[str], T]) -> list[T]:
        """Something of every server, at the same time."""
        return list(self._aside.map(ask, self._urls))

    def _post(self, url: str, path: str, body: dict[str, Any] | None = None) -> Any:
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self._key}"} if self._key else {})
        request = urllib.request.Request(f"{url}{path}", json.dumps(body or {}).encode(), headers, method="POST")
        try:
            with self._opener.open(request, timeout=_ANSWER_S) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as e:
            said = " ".join(e.read().decode(errors="replace").split())[:300]
            raise _refused(url, path, e.code, said) from None
        except OSError as e:
            raise RlaifError(
                f"sampling: no answer from {url} ({e}); is the server there? the same command goes on"
            ) from e


def _refused(url: str, path: str, status: int, said: str) -> RlaifError:
    if status == 401:
        return UserError(f"sampling.api_key_env: {url} refuses the key")
    if status == 404:
        return UserError(
            f"sampling.base_url: {url} has no {path}, or no model `{MODEL}`; start it as docs/scale.md says ({said})"
        )
    return RlaifError(f"sampling: {url}{path} says HTTP {status}: {said}")


def _key(settings: config.Sampling) -> str:
    """The key of servers that the job names."""
    if settings.api_key_env is None:
        return ""
    if key := os.environ.get(settings.api_key_env, "").strip():
        return key
    raise UserError(f"sampling.api_key_env: the environment variable {settings.api_key_env} is not set")


def _told(message: str) -> None:
    """Into the worker's log."""
    print(message, flush=True)


def _start(servers: Servers, model_path: str, settings: config.Sampling, logs: Path, rests: bool) -> None:
    """Starts servers that compute as the engine inside does, and waits for them."""
    args: dict[str, Any] = {
        "max_model_len": settings.max_model_len,
        "max_num_seqs": MAX_SEQUENCES,
        "seed": 0,
        "logprobs_mode": "raw_logprobs",  # before temperature and top-p
        "generation_config": "vllm",  # no defaults of the model's
        "worker_extension_cls": EXTENSION,
        "middleware": MIDDLEWARE,
    }
    if models.has_empty_quantisation(model_path):
        args["hf_overrides"] = {"quantization_config": None}
    usable = usable_gpus(len(gpu_names()))
    if usable:
        args |= {"gpu_memory_utilization": settings.gpu_memory_utilization, "enforce_eager": settings.enforce_eager}
    else:
        args |= {
            "kv_cache_memory_bytes": int(settings.kv_cache_gib * 2**30),
            "block_size": 32,
            "enforce_eager": True,
            "enable_chunked_prefill": False,
            "max_num_batched_tokens": max(4096, settings.max_model_len),
            "logits_processors": [NUCLEUS],
        }
    serve = Serve(
        model=model_path, replicas=settings.replicas, tensor_parallel_size=settings.tensor_parallel_size, args=args
    )
    gpus = spread(serve, usable, len(usable))
    try:
        servers.start(serve, Path(model_path), MODEL, settings.precision, gpus, logs, _told, True, rests)
        servers.ready()
    except BaseException:
        servers.close()
        raise
