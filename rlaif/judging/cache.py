"""Stored replies of judges behind servers, shared between runs and processes.

In: the digest of everything that determines a reply. Out: the raw reply, which is parsed again on every use, so that a
better parser mends old verdicts too. A failed call is never stored, nor is a reply that isn't finished.
"""

from __future__ import annotations

import sqlite3
import sys
from collections.abc import Iterable
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


class ReplyCache:
    """A folder of replies. The library locks it between processes; the oldest go first when it is full."""

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

    def get(self, key: str) -> Reply | None:
        """The stored reply; None when there is none, or it can't be read, or holds no reply."""
        if self._failed:
            return None
        try:
            value = self._cache.get(key, retry=True)
            reply = None if value is None else Reply.model_validate_json(value)
            # An older version stored outages too.
            return None if reply is None or reply.ending == "failed" or not (reply.content or reply.refusal) else reply
        except ValidationError:
            return None
        except (OSError, sqlite3.Error) as e:
            self._fail(e)
            return None

    def put(self, replies: Iterable[tuple[str, Reply]]) -> None:
        """Stores replies, all in one transaction."""
        if self._failed:
            return
        try:
            with self._cache.transact(retry=True):
                for key, reply in replies:
                    self._cache.set(key, reply.model_dump_json(), retry=True)
        except (OSError, sqlite3.Error) as e:
            self._fail(e)

    def _fail(self, e: Exception) -> None:
        """Goes on without: a vote that was paid for is worth more than the copy of its reply."""
        self._failed = True
        print(f"judge.cache: {self._path} failed ({e}); going on without it", file=sys.stderr)

    def close(self) -> None:
        """Closes the folder."""
        self._cache.close()
