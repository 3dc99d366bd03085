"""Prompts and seeds as samplers take them. Pure: a tokenizer comes in, nothing is loaded.

In: messages, a tokenizer, the run's seed. Out: token ids and a seed for each sample.
"""

from __future__ import annotations

import hashlib
from typing import Any, Protocol

from rlaif.errors import UserError
from rlaif.records import Prompt
from rlaif.sampling import SampleRequest


class ChatTokenizer(Protocol):
    """The part of a tokenizer that rendering needs."""

    def apply_chat_template(self, conversation: Any, *, tokenize: bool, add_generation_prompt: bool) -> Any:
        """As in transformers."""

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """As in transformers."""


def seed_for(run_seed: int, iteration: int, prompt_id: str, index: int) -> int:
    """The seed of one sample: the same on every machine, different for every argument; 31 bits."""
    key = f"{run_seed}\0{iteration}\0{prompt_id}\0{index}".encode()
    return int.from_bytes(hashlib.sha256(key).digest()[:4], "big") & 0x7FFF_FFFF


def prompt_text(tokenizer: ChatTokenizer, prompt: Prompt) -> str:
    """The text that the policy continues: the chat template, up to where the answer begins.

    Raises:
        UserError: the template refuses these messages (some models allow no system message).
    """
    conversation = [m.model_dump() for m in prompt.messages]
    try:
        text = tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
    except Exception as e:  # templates raise what they like
        roles = ", ".join(m["role"] for m in conversation)
        raise UserError(f"prompt {prompt.id}: the policy's chat template refuses the roles {roles} ({e})") from e
    return str(text)


def render_prompt(tokenizer: ChatTokenizer, prompt: Prompt) -> tuple[int, ...]:
    """`prompt_text` as token ids. The template writes the special tokens itself, so none are added."""
    return tuple(tokenizer.encode(prompt_text(tokenizer, prompt), add_special_tokens=False))


def check_length(request: SampleRequest, max_model_len: int) -> None:
    """Refuses a prompt that leaves no room for its answer; cutting it would change what was asked.

    Raises:
        UserError: with the setting to raise.
    """
    needed = len(request.prompt_token_ids) + request.max_tokens
    if needed > max_model_len:
        raise UserError(
            f"{request.id}: a prompt of {len(request.prompt_token_ids)} tokens and an answer of up to "
            f"{request.max_tokens} need {needed}, sampling.max_model_len is {max_model_len}; "
            "raise it or drop the prompt"
        )
