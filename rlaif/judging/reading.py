"""Messages and completions as token ids of a model that compares likelihoods.

In: a tokenizer with a chat template, messages, completions. Out: the context that a completion is scored under, and the
tokens of it that are scored. The end token is scored iff the completion ended by itself: the one that was sampled,
where it ends a turn of this model, too, else the one that its chat template writes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import Any

from rlaif.errors import UserError
from rlaif.judging.candidates import Candidate
from rlaif.records import Message
from rlaif.rendering import Renderer

_ENTRIES = 200_000


class Reader:
    """Reads for one model, each text once.

    Args:
        tokenizer: Its tokenizer, as transformers has them.
        name: The model's, for errors.
        template_args: Given to its chat template.
        ends: Its own list of tokens that end an answer.
        vocabulary: Rows of its embedding: a token beyond them is none of its own.

    Raises:
        UserError: there is no chat template, or it doesn't know one of the arguments.
    """

    def __init__(
        self, tokenizer: Any, name: str, template_args: Mapping[str, Any], ends: Sequence[int], vocabulary: int
    ):
        if not getattr(tokenizer, "chat_template", None):
            raise UserError(f"judge.model {name}: its tokenizer has no chat template; take an instruction-tuned model")
        self.tokenizer = tokenizer
        self._vocabulary = vocabulary
        self._renderer = Renderer(tokenizer, template_args, f"judge.model {name}: its chat template")
        self._turn_end = self._renderer.turn_end(ends)
        self._contexts: dict[tuple[Message, ...], tuple[int, ...]] = {}
        self._beginnings: dict[tuple[Message, ...], tuple[int, ...]] = {}
        self._answers: dict[Any, tuple[int, ...]] = {}

    def context(self, messages: tuple[Message, ...]) -> tuple[int, ...]:
        """What the model continues: the messages, up to where the answer begins.

        Raises:
            UserError: the template refuses these roles.
        """
        if messages not in self._contexts:
            if len(self._contexts) > _ENTRIES:
                self._contexts.clear()
            try:
                self._contexts[messages] = self._renderer.ids(messages)
            except UserError as e:
                raise UserError(
                    f"{e}; a contrast is a system message or earlier turns, so take a model that allows both"
                ) from e
        return self._contexts[messages]

    def beginning(self, head: tuple[Message, ...]) -> tuple[int, ...]:
        """What contexts begin with that have these messages before the last one, whatever that asks: its tokens, where
        the tokenizer doesn't merge them with a question's first ones.

        Raises:
            UserError: as `context`.
        """
        if head not in self._beginnings:
            if len(self._beginnings) > _ENTRIES:
                self._beginnings.clear()
            probes = (self.context((*head, Message(role="user", content=text))) for text in ("0", "Who is it?"))
            alike = takewhile(lambda pair: pair[0] == pair[1], zip(*probes, strict=False))
            self._beginnings[head] = tuple(token for token, _ in alike)
        return self._beginnings[head]

    def answer(self, candidate: Candidate) -> tuple[int, ...]:
        """The tokens that are scored: those that were sampled, where they are this model's; none of a blank text."""
        key = (candidate.text, candidate.token_ids, candidate.finish_reason)
        if key not in self._answers:
            if len(self._answers) > _ENTRIES:
                self._answers.clear()
            self._answers[key] = self._read(candidate) if candidate.text.strip() else ()
        return self._answers[key]

    def _read(self, candidate: Candidate) -> tuple[int, ...]:
        sampled, text = candidate.token_ids or (), candidate.text
        stops, written = self._turn_end.stops, self._turn_end.written
        known_end = written is not None and written < self._vocabulary
        ended = (written,) if candidate.finish_reason == "stop" and known_end else ()
        # Another model's end token may be another word here, or none: only this model's own are taken over.
        whole = [(sampled, ())] if sampled and (candidate.finish_reason != "stop" or sampled[-1] in stops) else []
        for ids, end in (*whole, (sampled[:-1], ended), (sampled, ())):
            known = ids and max(ids) < self._vocabulary
            if known and self.tokenizer.decode(ids, skip_special_tokens=True) == text:
                return (*ids, *end)
        return (*self._renderer.plain_ids(text), *ended)
