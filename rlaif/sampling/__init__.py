"""Samplers: how the policy answers. Records here; the engines are `sampling.vllm`, `sampling.transformers` and
`sampling.server`.

An engine is the module's `Sampler`, built in a worker with `model_path` and `settings`, and has two methods:
`sample(requests)` yields finished samples in lists as they finish, in any order, and `load(policy_path)` takes new
weights. `rest()` gives back what it holds of a GPU until `wake()` (`device: shared`). Nothing heavy is imported here.
"""

from __future__ import annotations

from rlaif.records import FinishReason, Prompt, Record


class SampleRequest(Record):
    """One answer to be sampled."""

    id: str
    prompt_token_ids: tuple[int, ...]
    seed: int
    """31 bits; the same request in the same batch on the same machine gives the same tokens."""
    max_tokens: int
    temperature: float
    """0 is greedy."""
    top_p: float
    place: int = 0
    """Its prompt's, among all those of its batch from 0, also where some of their answers are there already."""


class PromptProblem(Record):
    """Why a prompt can't be sampled."""

    prompt_id: str
    problem: str
    too_long: bool = False
    """It can be left out (`prompts.too_long: drop`); with another problem the model or the file is to be mended."""


class GivenAnswer(Record):
    """An answer that somebody else gave, to be put into the policy's tokens."""

    id: str
    prompt: Prompt
    text: str
    finish_reason: FinishReason


class Sample(Record):
    """One sampled answer."""

    id: str
    """Its request's."""
    token_ids: tuple[int, ...]
    """As sampled; what ended it is among them, last, iff `finish_reason` is stop: a token that ends a turn, one of
    `sampling.stop`, or the one that completes a stop string."""
    text: str
    """Without special tokens, up to the end token or the stop string."""
    finish_reason: FinishReason
    logprob: float
    """Sum over `token_ids` of log p under the policy, in nats, before temperature and top-p."""
