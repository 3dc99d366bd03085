"""Prompts and seeds as samplers take them. Pure: a renderer comes in, nothing is loaded.

In: messages, a renderer, the run's seed. Out: token ids and a seed for each sample.
"""

from __future__ import annotations

import hashlib

from rlaif.errors import UserError
from rlaif.records import Prompt
from rlaif.rendering import Renderer
from rlaif.sampling import SampleRequest


def seed_for(run_seed: int, iteration: int, prompt_id: str, index: int) -> int:
    """The seed of one sample: the same on every machine, different for every argument; 31 bits."""
    key = f"{run_seed}\0{iteration}\0{prompt_id}\0{index}".encode()
    return int.from_bytes(hashlib.sha256(key).digest()[:4], "big") & 0x7FFF_FFFF


def render_prompt(renderer: Renderer, prompt: Prompt) -> tuple[int, ...]:
    """The token ids that the policy continues: the chat template, up to where the answer begins.

    Raises:
        UserError: the template refuses these messages (some models allow no system message), or leaves one out.
    """
    try:
        return renderer.ids(prompt.messages)
    except UserError as e:
        raise UserError(f"prompt {prompt.id}: {e}") from e


def needs_more_than(max_model_len: int, prompt_tokens: int, max_tokens: int) -> str | None:
    """What to say of a prompt that leaves no room for its answer; None of one that does."""
    needed = prompt_tokens + max_tokens
    if needed <= max_model_len:
        return None
    return (
        f"a prompt of {prompt_tokens} tokens and an answer of up to {max_tokens} need {needed}, "
        f"sampling.max_model_len is {max_model_len}"
    )


def check_length(request: SampleRequest, max_model_len: int) -> None:
    """Refuses a prompt that leaves no room for its answer; cutting it would change what was asked.

    Raises:
        UserError: with the setting to raise.
    """
    if too_long := needs_more_than(max_model_len, len(request.prompt_token_ids), request.max_tokens):
        raise UserError(f"{request.id}: {too_long}; raise it or drop the prompt")
