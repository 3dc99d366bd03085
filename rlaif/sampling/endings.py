"""When an answer ends, and what is its text: one rule for both engines.

An answer ends with a token that ends the model's turn, with a token of `sampling.stop`, or with the token that
completes a stop string; that token is its last and trains with it. Its text stops before: the end token or the stop
string is no part of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlaif import models
from rlaif.config import Sampling
from rlaif.errors import UserError
from rlaif.sampling import Sample


class Endings:
    """The stops of a model and of a job.

    Raises:
        UserError: a token id of `sampling.stop` that the tokenizer hasn't, or a model that names no end token.
    """

    def __init__(self, model_path: str, tokenizer: Any, settings: Sampling) -> None:
        self._tokenizer = tokenizer
        turn_end = models.turn_end(Path(model_path), tokenizer)
        self.written = turn_end.written
        """What ends an answer that wasn't sampled."""
        ids = set(turn_end.stops)
        strings = []
        for stop in settings.stop:
            if isinstance(stop, int):
                if stop >= len(tokenizer):
                    raise UserError(f"sampling.stop: {stop} is no token; the tokenizer has {len(tokenizer)}, from 0")
                ids.add(stop)
                continue
            if (token := tokenizer.get_added_vocab().get(stop)) is not None:
                ids.add(token)
            if token not in tokenizer.all_special_ids:  # a special token has no text that a string could be found in
                strings.append(stop)
        self.token_ids: frozenset[int] = frozenset(ids)
        self.strings: tuple[str, ...] = tuple(strings)
        self._tail = 16 + max((len(s.encode()) for s in strings), default=0)

    def ended(self, token_ids: Sequence[int]) -> bool:
        """Whether an answer ends with its newest token; to be asked after each."""
        if token_ids[-1] in self.token_ids:
            return True
        if not self.strings:
            return False
        # Its end first: a token has at least a byte, and an answer is long.
        tail = self._text(token_ids[-self._tail :])
        return any(s in tail for s in self.strings) and self.cut(whole := self._text(token_ids)) != whole

    def cut(self, text: str) -> str:
        """A text up to the first stop string in it."""
        return text[: min((at for s in self.strings if (at := text.find(s)) >= 0), default=len(text))]

    def body(self, token_ids: Sequence[int]) -> Sequence[int]:
        """An answer's tokens without the one that ended it."""
        return token_ids[:-1] if token_ids[-1] in self.token_ids else token_ids

    def sample(self, request_id: str, token_ids: Sequence[int], logprob: float) -> Sample:
        """An answer that ended, or that reached its length limit."""
        return Sample(
            id=request_id,
            token_ids=tuple(token_ids),
            text=self.cut(self._text(self.body(token_ids))),
            finish_reason="stop" if self.ended(token_ids) else "length",
            logprob=logprob,
        )

    def _text(self, token_ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(token_ids, skip_special_tokens=True))
