"""Sampling with transformers alone, for machines without vLLM, and for tests: same requests, same seeds, slower.

In: `SampleRequest`s and a folder of weights. Out: `Sample`s, a batch at a time.

Every request has a random generator of its own, so its tokens depend on its seed and its batch, not on the order
in which others finish. Padding is masked, and rows that are done leave the batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, DynamicCache

from rlaif import config, models, transformers_compat
from rlaif.device_memory import DeviceMemory, tensors_of
from rlaif.errors import UserError
from rlaif.hardware import precision_here, torch_dtype
from rlaif.records import TokenSequence
from rlaif.sampling import Sample, SampleRequest
from rlaif.sampling.endings import Endings
from rlaif.sampling.nucleus import keep_nucleus
from rlaif.sampling.requests import check_length

BATCH = 32


class Sampler:
    """A transformers model with one policy's weights in it.

    Args:
        model_path: Folder with config, safetensors and tokenizer.
        settings: The job's `sampling` section.
    """

    def __init__(self, model_path: str, settings: config.Sampling) -> None:
        self._tokenizer = models.load_tokenizer(model_path)
        self._endings = Endings(model_path, self._tokenizer, settings)
        self._max_model_len = settings.max_model_len
        self._dtype = torch_dtype(precision_here(settings.precision))
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        self._memory = DeviceMemory(lambda: tensors_of(self._model))
        self.load(model_path)

    def load(self, policy_path: str) -> None:
        """Takes the weights of another folder.

        Raises:
            UserError: they are damaged.
        """
        try:
            self._model: Any = AutoModelForCausalLM.from_pretrained(
                policy_path,
                dtype=self._dtype,
                local_files_only=True,
                **models.without_empty_quantisation(policy_path),
            )
        except (OSError, ValueError, ImportError, SafetensorError) as e:
            raise UserError(f"{policy_path}: can't load these weights ({' '.join(str(e).split())})") from e
        self._model.to(self._device).eval()
        if not transformers_compat.rows_can_leave(self._model):
            raise UserError(
                f"sampling.engine: `transformers` can't sample from a {self._model.config.model_type}, whose layers "
                "keep a state instead of keys and values; set sampling.engine: vllm"
            )

    def rest(self) -> None:
        """Weights go to RAM. Until it wakes nothing can be computed."""
        self._memory.rest()

    def wake(self) -> None:
        """They come back."""
        self._memory.wake()

    @torch.inference_mode()
    def logprobs(self, sequences: list[TokenSequence]) -> list[tuple[float, ...]]:
        """log p of each completion token under the weights that sample now, in nats."""
        out = []
        for sequence in sequences:
            start = len(sequence.prompt_token_ids)
            ids = torch.tensor([sequence.all_ids], device=self._device)
            logits = self._model(input_ids=ids, use_cache=False).logits[0, start - 1 : -1].float()
            out.append(tuple(logits.log_softmax(-1).gather(-1, ids[0, start:, None])[:, 0].tolist()))
        return out

    def sample(self, requests: list[SampleRequest]) -> Iterator[list[Sample]]:
        """Samples a batch at a time, in the order of the requests' lengths; yields each batch.

        Raises:
            UserError: a prompt leaves no room for `max_tokens` within `sampling.max_model_len`.
        """
        for r in requests:
            check_length(r, self._max_model_len)
        by_length = sorted(requests, key=lambda r: len(r.prompt_token_ids))
        for start in range(0, len(by_length), BATCH):
            yield self._batch(by_length[start : start + BATCH])

    @torch.inference_mode()
    def _batch(self, requests: list[SampleRequest]) -> list[Sample]:
        generators = [torch.Generator().manual_seed(r.seed) for r in requests]
        sampled: list[list[int]] = [[] for _ in requests]
        logprobs = [0.0 for _ in requests]
        rows = list(range(len(requests)))  # the requests that still run, as rows of the tensors below
        width = max(len(r.prompt_token_ids) for r in requests)
        # Padded on the left: the newest token is the last column of every row. [rows, width]
        ids = torch.tensor([[0] * (width - len(r.prompt_token_ids)) + list(r.prompt_token_ids) for r in requests])
        mask = torch.tensor([[int(i >= width - len(r.prompt_token_ids)) for i in range(width)] for r in requests])
        ids, mask = ids.to(self._device), mask.to(self._device)
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
        cache = DynamicCache(config=self._model.config)
        while True:
            out = self._model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
            logits = out.logits[:, -1].float().cpu()  # [rows, vocabulary]
            raw = logits.log_softmax(dim=-1)
            staying = []
            for row, index in enumerate(rows):
                token = draw(logits[row], requests[index], generators[index])
                sampled[index].append(token)
                logprobs[index] += float(raw[row, token])
                if len(sampled[index]) < requests[index].max_tokens and not self._endings.ended(sampled[index]):
                    staying.append(row)
            if not staying:
                break
            if len(staying) < len(rows):
                keep = torch.tensor(staying, device=self._device)
                transformers_compat.keep_rows(cache, keep)
                mask, positions = mask[keep], positions[keep]
                rows = [rows[row] for row in staying]
            ids = torch.tensor([[sampled[index][-1]] for index in rows], device=self._device)
            mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)
            positions = positions[:, -1:] + 1
        return [self._endings.sample(r.id, ids, lp) for r, ids, lp in zip(requests, sampled, logprobs, strict=True)]


def draw(logits: torch.Tensor, request: SampleRequest, generator: torch.Generator) -> int:
    """One token from one row of logits [vocabulary]: temperature, then the nucleus."""
    if request.temperature == 0:
        return int(logits.argmax())
    tempered = (logits / request.temperature).unsqueeze(0)
    p = keep_nucleus(tempered, torch.tensor([request.top_p])).softmax(dim=-1)[0]
    return int(torch.multinomial(p, 1, generator=generator))
