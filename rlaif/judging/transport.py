"""Requests to an OpenAI-compatible server: limits, retries, and what came back. The only module that imports openai.

In: the body of a chat completion. Out: a `Reply` as the server gave it, or one of three errors: `UserError` (key, model
or address), `CallFailed` (no reply after all attempts), both with one line that holds no key. Waits between attempts
are exponential with full jitter; a server's Retry-After is honoured by all requests to it, up to a minute.
"""

from __future__ import annotations

import asyncio
import email.utils
import json
import math
import os
import random
import re
import time
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, Protocol
from urllib.parse import urlsplit, urlunsplit

from rlaif.config import Judge, Juror
from rlaif.errors import UserError
from rlaif.judging.parsing import Reply, ReplyToken
from rlaif.records import Record, Usage

if TYPE_CHECKING:
    import httpx2
    from openai import AsyncOpenAI

MAX_RETRY_AFTER_S = 60.0
MAX_BACKOFF_S = 30.0
_RETRIED = (408, 409, 425, 429)
_DOWN = (429, 502, 503, 504)
_ERROR_CHARACTERS = 300
_CHARACTERS_PER_TOKEN = 4
# A verdict stands at the end of its reply; what comes before it needs no probabilities.
_TOKENS_KEPT = 16
# What openai's client tells of this machine: no server needs it, and each header is encoded anew for every request.
_NOT_SENT = tuple(
    f"X-Stainless-{name}"
    for name in (
        "Arch", "Async", "Lang", "OS", "Package-Version", "Read-Timeout", "Retry-Count", "Runtime", "Runtime-Version",
    )
)  # fmt: skip

FailureKind = Literal["down", "broken", "rejected"]
"""`down`: no answer, or "not now". `broken`: an answer that is none. `rejected`: the server refuses the request."""


class CallFailed(Exception):
    """A request without a reply, after all attempts."""

    def __init__(self, error: str, kind: FailureKind, attempts: int = 1):
        super().__init__(error)
        self.error = error
        self.kind = kind
        self.attempts = attempts


class _Transient(Exception):
    """An attempt that failed in a way that another may not."""

    def __init__(self, error: str, kind: FailureKind, retry_after_s: float | None = None):
        super().__init__(error)
        self.error = error
        self.kind = kind
        self.retry_after_s = retry_after_s


class Answer(Record):
    """A reply, and what it took to get it."""

    reply: Reply
    attempts: int
    latency_s: float
    """Of the attempt that succeeded."""


class Server(Protocol):
    """What a judge needs of a server."""

    async def ask(self, body: dict[str, Any]) -> Answer:
        """The reply to one chat completion."""
        ...

    async def close(self) -> None:
        """Closes the connections."""
        ...


class Pace:
    """So many a minute, evenly spaced: no burst can break the limit. `None` is no limit.

    Whoever waits should go on at once afterwards: those that queue behind it would go together.
    """

    def __init__(self, per_minute: int | None):
        self._interval_s = 60 / per_minute if per_minute else 0.0
        self._free_at = 0.0
        self._held_until = 0.0

    async def wait(self, amount: float = 1.0) -> None:
        """Returns when `amount` more may be used."""
        while (held_s := self._held_until - time.monotonic()) > 0:
            await asyncio.sleep(held_s)
        if self._interval_s:
            now = time.monotonic()
            start = max(now, self._free_at)
            self._free_at = start + amount * self._interval_s
            await asyncio.sleep(start - now)

    def correct(self, amount: float) -> None:
        """More (or less) was used than announced."""
        self._free_at += amount * self._interval_s

    def hold(self, seconds: float) -> None:
        """Nothing more may be used before so many seconds have gone by."""
        self._held_until = max(self._held_until, time.monotonic() + seconds)


def api_key(juror: Juror) -> str | None:
    """The key from the juror's environment variable; None when it names none.

    Raises:
        UserError: the variable is not set, or holds what no header can hold.
    """
    if juror.api_key_env is None:
        return None
    if key := os.environ.get(juror.api_key_env, "").strip():
        if key.isascii() and key.isprintable():
            return key
        raise UserError(
            f"judge.api_key_env: the environment variable {juror.api_key_env} holds characters that no key has "
            "(typographic quotes, a line break?); export the key again"
        )
    raise UserError(
        f"judge.api_key_env: the environment variable {juror.api_key_env} is not set; export it with the key for "
        f"{shown_url(juror)}, or set judge.api_key_env: null for a server without keys"
    )


def check_address(juror: Juror) -> None:
    """Whether the juror can be asked at all, without asking.

    Raises:
        UserError: its key isn't set, or its address is none.
    """
    api_key(juror)
    parts = urlsplit(juror.base_url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UserError(f"judge.base_url: `{shown_url(juror)}` is no address; expected http(s)://HOST[:PORT]/v1")
    if "@" in parts.netloc or parts.query:  # the job, address included, is written into the run
        raise UserError(
            f"judge.base_url: {shown_url(juror)} comes with a user, a password or a query, and would be written into "
            "the run; put the secret into a variable and name it in judge.api_key_env"
        )


def shown_url(juror: Juror) -> str:
    """The juror's address without a user, a password or a query."""
    parts = urlsplit(juror.base_url)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


class OpenAIServer:
    """One juror's server. Belongs to the event loop that it is first used in."""

    def __init__(
        self,
        juror: Juror,
        settings: Judge,
        slots: AbstractAsyncContextManager[Any],
        requests: Pace,
        tokens: Pace,
        backoff_s: float,
        wasted: Callable[[Usage], None] = lambda usage: None,
    ):
        """`slots` bounds the requests under way; `requests` and `tokens` are the server's limits.

        `wasted` is told of every answer that holds no reply, with what it cost; an error that it raises ends the
        attempts.

        Raises:
            UserError: no key, or an address that is none.
        """
        from openai import AsyncOpenAI

        check_address(juror)
        self._key = api_key(juror)
        self._juror = juror
        self._settings = settings
        self._slots = slots
        self._requests = requests
        self._tokens = tokens
        self._backoff_s = backoff_s
        self._wasted = wasted
        # Retries are ours: they are counted, limited and recorded.
        self._connect = partial(
            AsyncOpenAI,
            api_key=self._key or "none",
            base_url=juror.base_url,
            max_retries=0,
            timeout=settings.timeout_s,
        )
        self._url = f"{juror.base_url.rstrip('/')}/chat/completions"
        self._made: AsyncOpenAI | None = None

    async def ask(self, body: dict[str, Any]) -> Answer:
        """The reply to one chat completion.

        Raises:
            CallFailed: no reply after all attempts, or the server rejects the request.
            UserError: the key, the model or the address is wrong.
        """
        attempt = 1
        while True:
            try:
                reply, latency_s = await self._attempt(body)
                return Answer(reply=reply, attempts=attempt, latency_s=latency_s)
            except _Transient as e:
                if attempt > self._settings.max_retries:
                    raise CallFailed(e.error, e.kind, attempt) from None
                wait_s = self._wait_s(attempt, e.retry_after_s)
            await asyncio.sleep(wait_s)
            attempt += 1

    def _wait_s(self, attempt: int, asked_s: float | None) -> float:
        """Before the next attempt: exponential with full jitter, or what the server asked for and a little jitter."""
        jitter = random.uniform(0, min(self._backoff_s * 2 ** (attempt - 1), MAX_BACKOFF_S))
        return jitter if asked_s is None else min(asked_s, MAX_RETRY_AFTER_S) + min(jitter, self._backoff_s)

    async def close(self) -> None:
        """Closes the connections."""
        if self._made is not None:
            await self._made.close()

    async def _attempt(self, body: dict[str, Any]) -> tuple[Reply, float]:
        answer = await self._post(body)
        try:
            reply = read_reply(answer.content, self._juror.model, self._scrub)
        except _Transient:
            self._wasted(read_usage(answer.content))
            raise
        latency_s = answer.elapsed.total_seconds()
        expected = _expected_tokens(
            (answer.history or [answer])[0].request
        )  # a redirected one holds its content no more
        used = reply.usage.prompt_tokens + reply.usage.completion_tokens
        if not used:  # a budget must hold with servers that don't count, too
            said = math.ceil(len(reply.content or reply.refusal or "") / _CHARACTERS_PER_TOKEN)
            guess = Usage(prompt_tokens=math.ceil(expected), completion_tokens=1 + said, estimated=True)
            return reply.model_copy(update={"usage": guess}), latency_s
        self._tokens.correct(used - expected)
        return reply, latency_s

    async def _post(self, body: dict[str, Any]) -> httpx2.Response:
        """The server's answer as it came; openai's own models would refuse, or invent, what a server leaves out."""
        import openai

        try:
            answer = await self._client().post(
                self._url,
                body=body,
                cast_to=openai.HttpxBinaryResponseContent,
                options={"headers": dict.fromkeys(_NOT_SENT, openai.omit)},
            )
        except openai.APIStatusError as e:
            raise self._status_error(e) from None
        except (openai.APITimeoutError, TimeoutError):
            raise _Transient(f"no reply within {self._settings.timeout_s:g} s", "down") from None
        except openai.APIConnectionError as e:
            cause = e.__cause__ or e
            raise _Transient(self._scrub(f"{type(cause).__name__}: {cause}"), "down") from None
        return answer.response

    def _client(self) -> AsyncOpenAI:
        """Over aiohttp, which takes two thirds of the time of openai's default at 64 requests under way."""
        if self._made is None:
            from openai import DefaultAioHttpClient

            server = self

            class Client(DefaultAioHttpClient):
                """Waits for its turn with a request that is ready to go: slots are for the server's time, not ours."""

                async def send(self, request: httpx2.Request, **how: Any) -> httpx2.Response:
                    async with server._slots:
                        await server._requests.wait()
                        await server._tokens.wait(_expected_tokens(request))
                        async with asyncio.timeout(server._settings.timeout_s):
                            answer = await super().send(request, **how)
                        if _asks_again(answer.status_code) and (asked_s := retry_after_s(answer.headers)) is not None:
                            server._requests.hold(min(asked_s, MAX_RETRY_AFTER_S))  # all of us, not this one alone
                        return answer

            self._made = self._connect(http_client=Client())
        return self._made

    def _status_error(self, error: Any) -> Exception:
        status, juror, url = error.status_code, self._juror, shown_url(self._juror)
        said = self._scrub(_message(error.body) or error.response.text)
        if status == 401:
            if juror.api_key_env is None:
                return UserError(
                    f"judge.api_key_env: {url} wants a key (HTTP {status}); name the variable that holds it"
                )
            return UserError(
                f"judge.api_key_env: {url} refused the key in {juror.api_key_env} (HTTP {status}) for model "
                f"`{juror.model}`; set it to a key of this server that may use this model"
            )
        if status == 404:
            return UserError(
                f"judge.model, judge.base_url: {url} has no model `{juror.model}`, or no chat completions at this "
                f"address (HTTP 404: {said}); check both, the address usually ends in /v1"
            )
        if _asks_again(status):
            kind: FailureKind = "down" if status in _DOWN else "broken"
            return _Transient(f"HTTP {status}: {said}", kind, retry_after_s(error.response.headers))
        if status == 402:  # nothing of the question: no credit
            return CallFailed(f"HTTP {status}: {said}", "down")
        hint = ""
        if status == 403:  # the key, or what is asked: which, other questions show
            hint = f" (key: {juror.api_key_env or 'none'}, judge.api_key_env; model `{juror.model}`)"
        elif re.search("response_format|json_schema", said):
            hint = " (judge.extra_body: {response_format: null} asks without a JSON schema)"
        return CallFailed(f"HTTP {status}: {said}{hint}", "rejected")

    def _scrub(self, text: str) -> str:
        """One line without the key, for logs and errors."""
        text = _clean(text)
        if self._key:
            text = text.replace(self._key, "[key]")
        text = re.sub(r"\b(sk-|Bearer\s+)[^\s\"']{6,}", r"\1[key]", text)
        line = " ".join(text.split())
        return line[:_ERROR_CHARACTERS] + ("…" if len(line) > _ERROR_CHARACTERS else "")


def _expected_tokens(request: httpx2.Request) -> float:
    """A guess, corrected by the server's own count: four bytes of the request a token, and the shortest of replies."""
    return len(request.content) / _CHARACTERS_PER_TOKEN + 1


def _asks_again(status: int) -> bool:
    """Whether another attempt may get a reply."""
    return status in _RETRIED or status >= 500


def retry_after_s(headers: Any) -> float | None:
    """Seconds that a server asks to wait: `Retry-After` as a number or an HTTP date; None when it doesn't say."""
    value = headers.get("retry-after")
    if value is None:
        return None
    try:
        seconds = float(value)
        return max(seconds, 0.0) if math.isfinite(seconds) else None
    except ValueError:
        pass
    try:
        return max(email.utils.parsedate_to_datetime(value).timestamp() - time.time(), 0.0)
    except ValueError:
        return None


def read_reply(content: bytes, model: str, scrub: Any = str) -> Reply:
    """A server's answer as a `Reply`. What a verdict needs must be there; the rest may be missing or odd.

    Raises:
        _Transient: it holds no reply.
    """
    try:
        tree = json.loads(content)
    except (ValueError, RecursionError):
        raise _Transient(scrub(f"not JSON: {content[:80].decode(errors='replace')!r}"), "broken") from None
    tree = tree if isinstance(tree, dict) else {}
    if tree.get("error"):
        raise _Transient(scrub(f"an error instead of a reply: {_message(tree) or tree['error']}"), "broken")
    choices = tree.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices else None
    message = choice.get("message") if isinstance(choice, dict) else None
    if not isinstance(choice, dict) or not isinstance(message, dict):
        raise _Transient("an answer without a choice", "broken")
    said = message.get("content")
    if isinstance(said, list):  # in parts, as some servers do
        said = "".join(str(part.get("text") or "") for part in said if isinstance(part, dict))
    if said is not None and not isinstance(said, str):
        raise _Transient("an answer whose content is not text", "broken")
    return Reply(
        content=None if said is None else _clean(said),
        refusal=_text(message.get("refusal")),
        finish_reason=_text(choice.get("finish_reason")),
        tokens=_reply_tokens(choice.get("logprobs")),
        usage=_usage(tree.get("usage")),
        model=_text(tree.get("model")) or model,
    )


def read_usage(content: bytes) -> Usage:
    """What an answer says that it cost, whatever else it holds."""
    try:
        return _usage(json.loads(content)["usage"])
    except (ValueError, TypeError, KeyError, RecursionError):
        return Usage()


def _reply_tokens(logprobs: Any) -> tuple[ReplyToken, ...]:
    try:
        return tuple(
            ReplyToken.model_validate(
                {
                    "token": _clean(at["token"]),
                    "top": [
                        {"token": _clean(t["token"]), "logprob": t["logprob"]} for t in at.get("top_logprobs") or ()
                    ],
                }
            )
            for at in logprobs["content"][-_TOKENS_KEPT:]
        )
    except (TypeError, KeyError, ValueError, AttributeError):
        return ()


def _usage(tree: Any) -> Usage:
    try:
        return Usage(
            prompt_tokens=_count(tree["prompt_tokens"]), completion_tokens=_count(tree.get("completion_tokens") or 0)
        )
    except (TypeError, KeyError, ValueError, AttributeError, OverflowError):
        return Usage()


def _count(value: Any) -> int:
    return max(math.ceil(float(value)), 0)


def _text(value: Any) -> str | None:
    return _clean(value) if isinstance(value, str) and value else None


def _clean(text: str) -> str:
    """Without lone surrogates, which JSON can hold and no file can."""
    return text if text.isascii() else text.encode(errors="replace").decode()


def _message(body: Any) -> str | None:
    """The sentence in an error's body, in the forms that servers use."""
    if isinstance(body, dict):
        inner = body.get("error")
        if isinstance(inner, dict):
            return _text(inner.get("message"))
        return _text(body.get("message")) or _text(inner) or _text(body.get("detail"))
    return _text(body)
