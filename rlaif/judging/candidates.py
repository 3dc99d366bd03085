"""A completion as every judge needs it, and what is asked about completions while others are sampled."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from rlaif.records import Ballot, Completion, FinishReason, Message, Pair, Prompt, Record


class Candidate(Record):
    """A completion with the prompt that it answers."""

    completion_id: str
    prompt_id: str
    messages: tuple[Message, ...]
    """The prompt as the policy saw it, system message included."""
    prompt_token_ids: tuple[int, ...] = ()
    """The same as the policy's tokens; empty where nobody knows."""
    token_ids: tuple[int, ...] | None = None
    """As sampled, what ended it included iff it ended by itself. When they are absent, or another model's (they
    don't decode to `text`), or hold more (a thought, a stop string), a likelihood judge's tokenizer reads `text`."""
    finish_reason: FinishReason | None
    """None: nobody knows. Then no end token is scored, and no missing one is held against it."""
    text: str

    @property
    def cut_off(self) -> bool:
        """The length limit is known to have ended it."""
        return self.finish_reason == "length"

    @classmethod
    def of(cls, completion: Completion, prompt: Prompt) -> Candidate:
        """A sampled completion with the prompt that it answers."""
        return cls(
            completion_id=completion.id,
            prompt_id=prompt.id,
            messages=prompt.messages,
            prompt_token_ids=completion.prompt_token_ids,
            token_ids=completion.token_ids,
            finish_reason=completion.finish_reason,
            text=completion.text,
        )


class MoreBallots(NamedTuple):
    """What a judge is fed while it answers others; pairs and candidates that it knows needn't be there again."""

    ballots: Sequence[Ballot]
    pairs: Sequence[Pair] = ()
    candidates: Sequence[Candidate] = ()
