"""What judges said before, shared between runs and processes: replies of servers, likelihoods of frozen models.

In: the digest of everything that determines a reply. Out: the raw reply, which is parsed again on every use, so that a
better parser mends old verdicts too. A failed call is never stored, nor is a reply that is not finished. Of a frozen
model the likelihoods of an answer's tokens are stored, and votes are made of them again on every use, so that another
tolerance, penalty or filter can meet no old vote.
"""

from __future__ import annotations

import hashlib
import sqlite3
import sys
from array import array
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from rlaif.errors import UserError
from rlaif.judging.parsing import Reply
from rlaif.records import digest

_SIZE_LIMIT_BYTES = 8 * 2**30


def reply_key(
    base_url: str,
    body: dict[str, Any],
    seed: int,
    sample_index: int,
    query: dict[str, str] | None = None,
    model: str | None = None,
) -> str:
    """Digest of what determines a reply; `body` is the request: model, all parameters, the rendered messages. `model`
    is what the server says of the model behind that name."""
    content = {"base_url": base_url.rstrip("/"), "body": body, "seed": seed, "sample_index": sample_index}
    more = {"query": query, "server_model": model}
    return digest(content | {name: value for name, value in more.items() if value})


def likelihood_key(model: str, context: Sequence[int], answer: Sequence[int]) -> str:
    """Digest of what determines the likelihood of an answer's tokens after a context's; `model`: all that computes."""
    ids = array("q", [len(context), *context, *answer])
    return hashlib.sha256(f"{model}\0".encode() + ids.tobytes()).hexdigest()


class _Folder:
    """A folder of values. The library locks it between processes; the oldest go first when it is full."""

    def __init__(self, folder: Path | str):
        """Opens or creates the folder.

        Raises:
            UserError: it can't be written.
        """
        import diskcache

        self._path = Path(folder).expanduser()
        try:
            self._cache = diskcache.Cache(str(self._path), size_limit=_SIZE_LIMIT_BYTES)
        except (OSError, sqlite3.Error) as e:
            raise UserError(
                f"judge.cache: can't write to {self._path} ({e}); name another folder, or null for no cache"
            ) from e
        self._failed = False

    def _read(self, key: str) -> Any:
        """The stored value; None when there is none."""
        if self._failed:
            return None
        try:
            return self._cache.get(key, retry=True)
        except (OSError, sqlite3.Error) as e:
            self._fail(e)
            return None

    def _write(self, values: Iterable[tuple[str, Any]]) -> None:
        """Stores values, all in one transaction."""
        if self._failed:
            return
        try:
            with self._cache.transact(retry=True):
                for key, value in values:
                    self._cache.set(key, value, retry=True)
        except (OSError, sqlite3.Error) as e:
            self._fail(e)

    def _fail(self, e: Exception) -> None:
        """Goes on without: a vote that was paid for is worth more than the copy of its reply."""
        self._failed = True
        print(f"judge.cache: {self._path} failed ({e}); going on without it", file=sys.stderr)

    def close(self) -> None:
        """Closes the folder."""
        self._cache.close()


class ReplyCache(_Folder):
    """Replies of servers."""

    def get(self, key: str) -> Reply | None:
        """The stored reply; None when there is none, or it can't be read, or holds no reply."""
        try:
            reply = None if (value := self._read(key)) is None else Reply.model_validate_json(value)
        except ValidationError:
            return None
        # An older version stored outages too.
        return None if reply is None or reply.ending == "failed" or not (reply.content or reply.refusal) else reply

    def put(self, replies: Iterable[tuple[str, Reply]]) -> None:
        """Stores replies."""
        self._write((key, reply.model_dump_json()) for key, reply in replies)


class LikelihoodCache(_Folder):
    """Log-likelihoods of tokens, in nats, as fp32: what the model's softmax gives is stored to the last bit."""

    def get(self, key: str, tokens: int) -> tuple[float, ...] | None:
        """The stored log-likelihoods of so many tokens; None when there are none, or they can't be read."""
        value = self._read(key)
        if not isinstance(value, bytes) or len(value) != 4 * tokens:
            return None
        return tuple(array("f", value))

    def put(self, values: Iterable[tuple[str, Sequence[float]]]) -> None:
        """Stores log-likelihoods."""
        self._write((key, array("f", logps).tobytes()) for key, logps in values)
