"""Requests to an OpenAI-compatible server: limits, retries, and what came back. The only module that imports openai.

In: the body of a chat completion. Out: a finished `Reply` as the server gave it, or one of two errors: `UserError`
(key, model or address), `CallFailed` (no reply after all attempts), both with one line that holds no key. Waits between
attempts are exponential with full jitter; what a server asks to wait is honoured by all requests to it, up to a minute.
Of several servers of one model (`servers`) the least busy one is asked; what fails there is asked of another at once.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import random
import re
import socket
import ssl
import sys
import time
import urllib.request
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import urlsplit

from rlaif.config import ChatSettings, Juror
from rlaif.errors import UserError
from rlaif.judging.answers import (
    FailureKind,
    NoReply,
    asks_again,
    clean,
    message_in,
    read_reply,
    read_usage,
    retry_after_s,
    tree_of,
)
from rlaif.judging.parsing import Reply
from rlaif.judging.servers import MAX_RETRY_AFTER_S, Address, least_busy, others_left, shown_url, to_be_tried
from rlaif.records import Record, Usage

if TYPE_CHECKING:
    import httpx2
    from openai import AsyncOpenAI

MAX_BACKOFF_S = 30.0
_DOWN = (408, 425, 429, 498, 502, 503, 504, 507, 520, 521, 522, 523, 524, 529, 530)
_ERROR_CHARACTERS = 300
_CHARACTERS_PER_TOKEN = 4
# What openai's client tells of this machine: no server needs it, and each header is encoded anew for every request.
_NOT_SENT = tuple(
    f"X-Stainless-{name}"
    for name in (
        "Arch", "Async", "Lang", "OS", "Package-Version", "Read-Timeout", "Retry-Count", "Runtime", "Runtime-Version",
    )
)  # fmt: skip

_IDENTITY_S = 10.0
_IDENTITY = (
    "root",
    "max_model_len",
    "context_length",
    "max_context_length",
    "context_window",
    "created",
    "meta",
    "digest",
)
# A server that lets a prompt's beginning go says so in its count alone. Hardly a text has ten bytes a token; six are
# many, and tell of a cut when a prompt of half the length had as many tokens.
_BYTES_PER_TOKEN_AT_MOST = 10
_BYTES_PER_TOKEN_RARELY = 6
_TOKENS_MISSED = 500
_TOKENS_TO_COMPARE = 256

# What a server says that doesn't take a system message: "System role not supported", "Conversation roles must
# alternate", "Developer instruction is not enabled", "Input should be 'user' or 'assistant'".
_SYSTEM_REFUSED = re.compile(
    r"system.{0,40}\b(?:role|message|prompt|instruction)|(?:role|message|instruction)s?\b.{0,80}\b(?:system|assistant)\b"
    r"|support.{0,40}\bsystem\b|roles? must|developer (?:role|message|instruction)|'user' or 'assistant'|first message",
    re.I | re.S,
)
_HINTS = tuple(
    (re.compile(said, re.I), hint)
    for said, hint in (
        ("response_format|json_schema", "judge.extra_body: {response_format: null} asks without a JSON schema"),
        (
            "max_completion_tokens|['`\"]?max_tokens['`\"]? is not supported",
            "judge.extra_body: {max_completion_tokens: 4096} is sent instead of max_tokens; a model that thinks needs "
            "as many",
        ),
        ("could not finish the message|higher max_tokens", "a larger judge.max_tokens: a thought needs room"),
        ("top_logprobs", "judge.extra_body: {top_logprobs: 5}, or judge.logprobs: false"),
        ("log_?prob", "judge.logprobs: false"),
        ("temperature", "judge.extra_body: {temperature: null} leaves it out"),
        ("\\bseed\\b", "judge.extra_body: {seed: null} leaves it out"),
        ("system.{0,40}(?:role|message|prompt)|(?:role|message).{0,40}system|roles must alternate",
         "judge.system_role: merged"),
        ("api.version", "judge.query: {api-version: ...}"),
        ("HTTP request.{0,40}HTTPS|speaking plain HTTP", "judge.base_url: https://..."),
    )
)  # fmt: skip


# What a server says of a key under another status than 401: "API key not valid. Please pass a valid API key" (Gemini).
_KEY = r"(?:x-)?(?:api|access|subscription)[\s_-]?(?:key|token)"
_WRONG = r"(?:not valid|invalid|incorrect|expired|revoked|disabled|missing|wrong|unknown)"
_KEY_REFUSED = re.compile(
    rf"\b{_KEY}\b[^.]{{0,40}}?\b{_WRONG}\b|\b{_WRONG}\s(?:[\w-]+\s)?{_KEY}\b|\bvalid {_KEY}\b|\bno {_KEY}\b"
    r"|\bapi_?key_?(?:invalid|expired)\b|\binvalid_api_?key\b|\binvalid authentication\b",
    re.I,
)


class CallFailed(Exception):
    """A request without a reply, after all attempts."""

    def __init__(self, error: str, kind: FailureKind, attempts: int = 1):
        super().__init__(error)
        self.error = error
        self.kind = kind
        self.attempts = attempts


class _SystemRefused(Exception):
    """A request was rejected, perhaps for its system message."""

    def __init__(self, otherwise: Exception):
        super().__init__()
        self.otherwise = otherwise
        """What it is if that wasn't why."""


class Answer(Record):
    """A reply, and what it took to get it."""

    reply: Reply
    attempts: int
    latency_s: float
    """Of the attempt that succeeded."""
    server: str | None = None
    """Which server it is of, as votes name it."""


class Server(Protocol):
    """What a judge needs of a server."""

    async def ask(self, body: dict[str, Any]) -> Answer:
        """The reply to one chat completion."""
        ...

    async def identities(self) -> dict[str, str | None]:
        """By server, as votes name it: what it says of its model, whoever asks; None when it says nothing."""
        ...

    async def close(self) -> None:
        """Closes the connections."""
        ...


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
        f"{shown_urls(juror)}, or set judge.api_key_env: null for a server without keys"
    )


def check_address(juror: Juror) -> None:
    """Whether the juror can be asked at all, without asking.

    Raises:
        UserError: its key isn't set, or one of its addresses is none.
    """
    api_key(juror)
    header_values(juror)
    _trusted(juror)
    for url in juror.addresses:
        check_url(url)


def check_url(url: str, key: str = "judge.base_url", expected: str = "http(s)://HOST[:PORT]/v1") -> None:
    """Whether a server could be there; `key` is the job's setting that names it.

    Raises:
        UserError: it couldn't, or the address holds what must not be written into a run.
    """
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UserError(f"{key}: `{shown_url(url)}` is no address; expected {expected}")
    why = _host_fault(parts.hostname)
    if re.search(r"\s", url):
        why = "there is a space in it"
    elif parts.fragment:
        why = "a `#` is part of no server's address"
    if why:
        raise UserError(f"{key}: `{shown_url(url)}` is no address ({why}); expected {expected}")
    if "@" in parts.netloc or parts.query:  # the job, address included, is written into the run
        raise UserError(
            f"{key}: {shown_url(url)} comes with a user, a password or a query, and would be written into the run; put "
            "the secret into a variable and name it in api_key_env (a judge's also in headers), and what is none into "
            "judge.query"
        )
    if (proxy := _proxy(url)) is not None and (why := _host_fault(proxy.host)):
        raise UserError(
            f"{proxy.variable}: `{proxy.shown}` is no address ({why}); name a proxy that there is, or unset it"
        )


def _host_fault(host: str) -> str | None:
    """Why no host can have this name or number; None when one can."""
    if ":" in host:  # IPv6, which whoever took the address apart has read
        return None
    if re.fullmatch(r"\d+(?:\.\d+){3}", host):
        return None if all(int(part) < 256 for part in host.split(".")) else f"{host} is no IPv4 address"
    name = host
    if not host.isascii():
        import idna

        try:
            name = idna.encode(host).decode()
        except UnicodeError as e:
            return f"no host is called `{host}`: {e}"
    labels = name.removesuffix(".").split(".")
    if "" in labels:
        return "a dot at its beginning, or two in a row"
    if long := next((label for label in labels if len(label) > 63), None):
        return f"a part of a host's name has at most 63 characters, `{long[:20]}...` has {len(long)}"
    if len(name) > 253:
        return f"a host's name has at most 253 characters, this one {len(name)}"
    if odd := re.search(r"[^A-Za-z0-9_.-]", name):
        return f"no host's name holds `{odd[0]}`"
    return None


class _Proxy(Record):
    """The proxy that the environment names for an address."""

    variable: str
    host: str
    port: int

    @property
    def shown(self) -> str:
        """Where it is, without a user and a password."""
        return f"{self.host}:{self.port}"


def _proxy(url: str) -> _Proxy | None:
    """The proxy that requests to an address go through; None without one."""
    parts = urlsplit(url)
    proxies = urllib.request.getproxies_environment()
    found = proxies.get(parts.scheme) or proxies.get("all")
    if not found or not parts.hostname or urllib.request.proxy_bypass(parts.hostname):
        return None
    wanted = f"{parts.scheme if proxies.get(parts.scheme) else 'all'}_proxy"
    variable = next(
        (name for name in os.environ if name.lower() == wanted and os.environ[name] == found), wanted.upper()
    )
    try:
        proxy = urlsplit(found if "://" in found else f"http://{found}")
        port = proxy.port or (443 if proxy.scheme == "https" else 80)
    except ValueError:  # the client says so
        return None
    return _Proxy(variable=variable, host=proxy.hostname, port=port) if proxy.hostname else None


def header_values(juror: Juror) -> dict[str, str]:
    """The juror's further headers, with their values.

    Raises:
        UserError: a variable is not set, or holds what no header can hold; a name that is none.
    """
    values = {}
    for name, variable in juror.headers.items():
        if not re.fullmatch(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+", name):
            raise UserError(f"judge.headers: `{name}` is no header's name; for example {{api-key: VARIABLE}}")
        value = os.environ.get(variable, "").strip()
        if not value:
            raise UserError(
                f"judge.headers: the environment variable {variable} is not set; export it with the value of {name} "
                "(a header names the variable that holds its value, never the value)"
            )
        if not (value.isascii() and value.isprintable()):
            raise UserError(f"judge.headers: the environment variable {variable} holds characters that no header has")
        values[name] = value
    return values


def _trusted(juror: Juror) -> ssl.SSLContext | None:
    """The certificates to trust; None for the client's own choice.

    Raises:
        UserError: a file of certificates can't be used.
    """
    for name, how in (("SSL_CERT_FILE", "cafile"), ("SSL_CERT_DIR", "capath")):
        if path := os.environ.get(name):
            try:
                if how == "capath":
                    os.listdir(path)
                else:
                    ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(path)
            except (OSError, ValueError) as e:
                raise UserError(
                    f"{name}: the environment variable names {path}, which can't be used ({e}); unset it, or name "
                    f"{'PEM certificates' if how == 'cafile' else 'a folder of them'}"
                ) from None
    if juror.ca_file is None:
        return None
    try:
        context = ssl.create_default_context()
        context.load_verify_locations(os.path.expanduser(juror.ca_file))
    except (OSError, ValueError) as e:
        raise UserError(
            f"judge.ca_file: {juror.ca_file} can't be used ({e}); name a file of PEM certificates"
        ) from None
    return context


@contextmanager
def _without_openai_settings(juror: Juror) -> Iterator[None]:
    """Within it, openai's client is made without what the environment sets for OpenAI, unless it is asked there."""
    hosts = (urlsplit(url).hostname or "" for url in juror.addresses)
    theirs = all(f".{host}".endswith(".openai.com") for host in hosts)
    names = [] if theirs else [n for n in os.environ if n.startswith("OPENAI_")]
    kept = {name: os.environ.pop(name) for name in names}
    try:
        yield
    finally:
        os.environ.update(kept)


def merge_system(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages with the system's put before the user's first."""
    system = [str(m["content"]) for m in messages if m["role"] == "system"]
    others = [m for m in messages if m["role"] != "system"]
    at = next((n for n, m in enumerate(others) if m["role"] == "user"), None)
    if not system or at is None:
        return messages
    first = {**others[at], "content": "\n\n".join([*system, str(others[at]["content"])])}
    return [*others[:at], first, *others[at + 1 :]]


def shown_urls(juror: Juror) -> str:
    """The juror's addresses without a user, a password or a query."""
    return ", ".join(map(shown_url, juror.addresses))


@dataclass
class _Attempt:
    """A request to one server, while it is chosen and asked."""

    failed: frozenset[Address] = frozenset()
    """Not to be chosen."""
    at: Address | None = None
    """The server that is asked; None until it is chosen, when there is a slot for the request."""
    spell: int = 0
    """Of the server, when it was chosen."""

    def choose(self, at: Address) -> None:
        """This is the server that is asked."""
        self.at, self.spell = at, at.spell


_ATTEMPT: ContextVar[_Attempt] = ContextVar("attempt")
"""Of this task: openai's client hands a request on to ours without a word about whose it is."""


class OpenAIServer:
    """One juror's server, or its servers. Belongs to the event loop that it is first used in."""

    def __init__(
        self,
        juror: Juror,
        settings: ChatSettings,
        slots: AbstractAsyncContextManager[Any],
        addresses: Sequence[Address],
        backoff_s: float,
        wasted: Callable[[Usage], None] = lambda usage: None,
    ):
        """`slots` bounds the requests under way; `addresses` are the juror's servers, in the order of the job.

        `wasted` is told of every answer that holds no reply, with what it cost; an error that it raises ends the
        attempts.

        Raises:
            UserError: no key, or an address that is none.
        """
        from openai import AsyncOpenAI

        check_address(juror)
        self._key = api_key(juror)
        self._headers = header_values(juror)
        self._juror = juror
        self._settings = settings
        self._slots = slots
        self._addresses = addresses
        self._backoff_s = backoff_s
        self._wasted = wasted
        # Retries are ours: they are counted, limited and recorded.
        self._connect = partial(
            AsyncOpenAI,
            api_key=self._key or "none",
            base_url=juror.addresses[0],
            max_retries=0,
            timeout=settings.timeout_s,
            default_headers=self._headers,
            default_query=juror.query,
        )
        self._left_out = self._not_sent()
        self._merges = False
        """A server takes no system message: none gets one, so that the question doesn't depend on who is asked."""
        self._counted: dict[int, int] = defaultdict(int)
        """Most tokens that were counted in prompts of about a length (bytes, by steps of a tenth)."""
        self._spoken: set[Address] = set()
        """Whatever they said, these servers have spoken HTTP."""
        self._made: AsyncOpenAI | None = None

    @property
    def _several(self) -> bool:
        return len(self._addresses) > 1

    async def ask(self, body: dict[str, Any]) -> Answer:
        """The reply to one chat completion.

        Raises:
            CallFailed: no reply after all attempts, or the server rejects the request.
            UserError: the key, the model or the address is wrong, or two servers have different models.
        """
        attempt, tries = 1, 1
        failed: dict[Address, NoReply] = {}
        """Of this try: servers that gave no reply. It is over when there is nobody else to ask at once."""
        while True:
            to = _Attempt(frozenset(failed))
            try:
                return await self._ask_one(body, to, attempt)
            except NoReply as e:
                failure = e
            assert to.at is not None
            failed[to.at] = failure
            self._leave_out(to, failure)
            over = not others_left(self._addresses, failed)
            if failure.kind == "rejected" or (over and tries > self._settings.max_retries):
                raise CallFailed(failure.error, failure.kind, attempt) from None
            if failure.retry_after_s is not None:
                to.at.requests.hold(min(failure.retry_after_s, MAX_RETRY_AFTER_S))
            if over:
                asked = [e.retry_after_s for e in failed.values() if e.retry_after_s is not None]
                await asyncio.sleep(self._wait_s(tries, min(asked) if len(asked) == len(failed) else None))
                tries += 1
                failed.clear()
            attempt += 1

    async def _ask_one(self, body: dict[str, Any], to: _Attempt, attempt: int) -> Answer:
        """The reply of one server.

        Raises:
            NoReply: none, another attempt may get one.
            CallFailed, UserError: as `ask`.
        """
        with ExitStack() as trying:
            if (back := to_be_tried(self._addresses, to.failed)) is not None:
                to.choose(back)
                if back.is_due:
                    trying.enter_context(back.tried_again())
                await self._check_again(to)
            if self._merges:
                body = {**body, "messages": merge_system(body["messages"])}
            try:
                reply, latency_s = await self._attempt(body, to)
            except _SystemRefused as e:
                merged = {**body, "messages": merge_system(body["messages"])}
                try:
                    reply, latency_s = await self._attempt(merged, to)
                except (CallFailed, NoReply, _SystemRefused):  # it wasn't why
                    raise e.otherwise from None
                self._merges = True
                attempt += 1
        assert to.at is not None
        if to.at.answered(to.spell) and self._several:
            print(f"judge: {to.at.name} is back", file=sys.stderr)
        return Answer(reply=reply, attempts=attempt, latency_s=latency_s, server=to.at.name)

    def _leave_out(self, to: _Attempt, failure: NoReply) -> None:
        """Keeps requests from a server that is down, where there are others; an answer that is no reply may be the
        question's fault."""
        if failure.kind not in ("down", "broken") or to.at is None:
            return
        if to.at.failed(to.spell, 2 * self._backoff_s, failure.retry_after_s) and self._several:
            print(f"judge: {to.at.name} is left out for now ({failure.error})", file=sys.stderr)

    async def identities(self) -> dict[str, str | None]:
        """By server: what its list of models says of this one, in one line; None when it says nothing.

        Raises:
            UserError: two servers say different things.
        """
        found = await asyncio.gather(*(self._listing_at_start(at) for at in self._addresses))
        out: dict[str, str | None] = {}
        for at, known in zip(self._addresses, found, strict=True):
            self._compare(at, known)
            line = json.dumps({"id": self._juror.model, **known}, sort_keys=True)
            out[at.name] = self._scrub(line) if known else None
        return out

    async def _listing_at_start(self, at: Address) -> dict[str, Any]:
        """As `_listing`; one that isn't there is left out from the start."""
        to = _Attempt()
        to.choose(at)
        try:
            return await self._listing(to)
        except NoReply as e:
            self._leave_out(to, e)
            return {}

    async def _check_again(self, to: _Attempt) -> None:
        """Before a server that was left out is asked: is it there, and is its model still that of the others?

        Raises:
            NoReply: it isn't there.
            UserError: another model answers.
        """
        if self._several and self._settings.fingerprint and to.at is not None:
            self._compare(to.at, await self._listing(to))

    def _compare(self, at: Address, known: dict[str, Any]) -> None:
        """Keeps what a server says of its model, if the others, and it itself, say the same.

        Raises:
            UserError: they don't.
        """
        model = self._juror.model
        for other in self._addresses:
            said = other.listed.get(model, {})
            for name in sorted((said.keys() & known.keys()) - {"created"}):
                if said[name] != known[name]:
                    values = self._scrub(f"{json.dumps(said[name])} and {json.dumps(known[name])}")
                    where = f"{shown_url(other.url)} and {shown_url(at.url)} list"
                    where = f"{shown_url(at.url)} lists first one and then" if other is at else where
                    raise UserError(
                        f"judge.base_url: {where} another model as `{model}` ({name}: {values}); let all servers of "
                        "the list serve the same one, make the other a juror of its own (judge.jury), or, if they are "
                        "the same, set judge.fingerprint: false"
                    )
        at.listed[model] = known

    async def _listing(self, to: _Attempt) -> dict[str, Any]:
        """What a server's list of models says of this one; nothing from many servers.

        Raises:
            NoReply: no connection to it.
        """
        import openai

        assert to.at is not None
        for wait_s in (0.2, 1.0, None):
            _ATTEMPT.set(to)
            try:
                answer = await self._client().get(
                    f"{to.at.url}/models",
                    cast_to=openai.HttpxBinaryResponseContent,
                    options={"headers": self._left_out, "timeout": _IDENTITY_S},
                )
                return self._listed(tree_of(answer.response.content))
            except openai.APIStatusError as e:
                if not asks_again(e.status_code):
                    return {}
            except (openai.APIConnectionError, TimeoutError) as e:
                raise self._no_connection(e, to.at, _IDENTITY_S) from None
            except Exception:  # an answer that many servers don't give: no reason to stop
                return {}
            if wait_s is not None:
                await asyncio.sleep(wait_s)
        return {}

    def _listed(self, tree: Any) -> dict[str, Any]:
        """What a list of models says of this juror's."""
        rows = (tree.get("data") or tree.get("models")) if isinstance(tree, dict) else tree
        names = {self._juror.model, f"models/{self._juror.model}"}
        for row in rows if isinstance(rows, list) else ():
            if isinstance(row, dict) and names & {str(row.get(key)) for key in ("id", "name", "model")}:
                known = {name: row[name] for name in _IDENTITY if row.get(name) is not None}
                # Some give the time of the answer.
                if isinstance(at := known.get("created"), int | float) and abs(time.time() - at) < 86_400:
                    del known["created"]
                return known
        return {}

    def _wait_s(self, attempt: int, asked_s: float | None) -> float:
        """Before the next attempt: exponential with full jitter, or what the server asked for and a little jitter."""
        jitter = random.uniform(0, min(self._backoff_s * 2 ** (attempt - 1), MAX_BACKOFF_S))
        return jitter if asked_s is None else min(asked_s, MAX_RETRY_AFTER_S) + min(jitter, self._backoff_s)

    async def close(self) -> None:
        """Closes the connections."""
        if self._made is not None:
            await self._made.close()

    async def _attempt(self, body: dict[str, Any], to: _Attempt) -> tuple[Reply, float]:
        answer = await self._post(body, to)
        assert to.at is not None
        # A redirected one holds its content no more.
        expected = _expected_tokens((answer.history or [answer])[0].request)
        try:
            reply = read_reply(answer.content, self._juror.model, self._scrub)
            self.check_whole(reply.usage.prompt_tokens, (expected - 1) * _CHARACTERS_PER_TOKEN)
        except NoReply as e:
            self._wasted(read_usage(answer.content))
            if e.retry_after_s is None:
                e.retry_after_s = retry_after_s(answer.headers)
            failed: Exception = e
            if e.status is not None and not asks_again(e.status):
                failed = self._refused(to.at, e.status, f"error {e.status} under HTTP 200", e.said)
            raise self._unless_for_system(failed, body, e.status, e.said) from None
        latency_s = answer.elapsed.total_seconds()
        used = reply.usage.prompt_tokens + reply.usage.completion_tokens
        if not used:  # a budget must hold with servers that don't count, too
            said = math.ceil(len(reply.content or reply.refusal or "") / _CHARACTERS_PER_TOKEN)
            guess = Usage(prompt_tokens=math.ceil(expected), completion_tokens=1 + said, estimated=True)
            return reply.model_copy(update={"usage": guess}), latency_s
        to.at.tokens.correct(used - expected)
        return reply, latency_s

    def check_whole(self, counted: int, sent: float) -> None:
        """Whether the server can have read all that was sent, by its own count.

        Raises:
            NoReply: it can't.
        """
        if not counted or sent < 1:
            return
        cut = sent / _BYTES_PER_TOKEN_AT_MOST - counted > _TOKENS_MISSED
        if counted >= _TOKENS_TO_COMPARE:
            step = math.log(sent, 1.1)
            if sent > _BYTES_PER_TOKEN_RARELY * counted:
                half = math.log(sent / 2, 1.1) - 1
                cut = cut or any(n <= half and most >= counted for n, most in self._counted.items())
            if not cut:
                self._counted[int(step)] = max(self._counted[int(step)], counted)
        if cut:
            raise NoReply(
                f"the server read {counted} tokens of a prompt of {sent:.0f} bytes: it cuts long prompts off without a "
                "word; give it a longer context (Ollama: num_ctx)",
                "rejected",
            )

    def _not_sent(self) -> dict[str, Any]:
        """Headers of openai's client that no server needs; nor is a key that there is none of."""
        import openai

        own = "authorization" in map(str.lower, self._headers)
        return dict.fromkeys(_NOT_SENT if self._key or own else (*_NOT_SENT, "Authorization"), openai.omit)

    async def _post(self, body: dict[str, Any], to: _Attempt) -> httpx2.Response:
        """The server's answer as it came; openai's own models would refuse, or invent, what a server leaves out."""
        import openai

        _ATTEMPT.set(to)
        try:
            answer = await self._client().post(
                _completions(to.at or self._addresses[0]),
                body=body,
                cast_to=openai.HttpxBinaryResponseContent,
                options={"headers": self._left_out},
            )
        except openai.APIStatusError as e:
            assert to.at is not None
            self._spoken.add(to.at)
            failed = self._status_error(e, to.at)
            raise self._unless_for_system(failed, body, e.status_code, message_in(e.body) or "") from None
        except (openai.APIConnectionError, TimeoutError) as e:
            raise self._no_connection(e, to.at or self._addresses[0], self._settings.timeout_s) from None
        assert to.at is not None
        self._spoken.add(to.at)
        return answer.response

    def _no_connection(self, error: Exception, at: Address, timeout_s: float) -> NoReply:
        """Why a server gave no answer at all."""
        fault = connection_fault(error, at.url, at in self._spoken)
        if fault is None:
            through = f" through the proxy {proxy.shown} ({proxy.variable})" if (proxy := _proxy(at.url)) else ""
            fault = f"no reply within {timeout_s:g} s{through}"
        return NoReply(self._scrub(fault), "down")

    def _client(self) -> AsyncOpenAI:
        """Over aiohttp, which takes two thirds of the time of openai's default at 64 requests under way."""
        if self._made is None:
            from openai import DefaultAioHttpClient

            server = self

            class Client(DefaultAioHttpClient):
                """Waits for its turn with a request that is ready to go: slots are for the server's time, not ours.
                Only then is it chosen who is asked."""

                async def send(self, request: httpx2.Request, **how: Any) -> httpx2.Response:
                    to = _ATTEMPT.get()
                    async with server._slots:
                        if (at := to.at) is None:
                            to.choose(at := least_busy(server._addresses, to.failed))
                            if at is not server._addresses[0]:
                                _send_to(request, at)
                        with at.asked():
                            await at.requests.wait()
                            await at.tokens.wait(_expected_tokens(request))
                            async with asyncio.timeout(server._settings.timeout_s):
                                answer = await super().send(request, **how)
                            if asks_again(answer.status_code):
                                asked_s = retry_after_s(answer.headers, tree_of(answer.content))
                                if asked_s is not None:  # all of us, not this one alone
                                    at.requests.hold(min(asked_s, MAX_RETRY_AFTER_S))
                        return answer

            trusted = _trusted(self._juror)
            try:
                http_client = Client() if trusted is None else Client(verify=trusted)
            except (ValueError, ImportError) as e:
                raise UserError(
                    f"the proxy of HTTP_PROXY, HTTPS_PROXY or ALL_PROXY can't be used ({self._scrub(str(e))}); name an "
                    "http:// proxy, or unset it"
                ) from None
            with _without_openai_settings(self._juror):
                self._made = self._connect(http_client=http_client)
        return self._made

    def _unless_for_system(self, failed: Exception, body: dict[str, Any], status: int | None, said: str) -> Exception:
        """A failure, marked where it may be about the system's message."""
        asked = any(m["role"] == "system" for m in body["messages"])
        may_be = asked and status in (400, 422, 500, None) and _SYSTEM_REFUSED.search(said)
        return _SystemRefused(failed) if may_be else failed

    def _status_error(self, error: Any, at: Address) -> Exception:
        status = error.status_code
        said = self._scrub(message_in(error.body) or error.response.text)
        if asks_again(status):
            # A sentence in an error's own form comes from a judge's server, a page from anywhere.
            kind: FailureKind = "down" if status in _DOWN or message_in(tree_of(error.response.content)) else "broken"
            return NoReply(
                f"HTTP {status}: {said}", kind, retry_after_s(error.response.headers, tree_of(error.response.content))
            )
        if status == 407 and (proxy := _proxy(at.url)) is not None:
            return CallFailed(f"the proxy {proxy.shown} wants a user and a password ({proxy.variable})", "down")
        return self._refused(at, status, f"HTTP {status}", said)

    def _refused(self, at: Address, status: int, named: str, said: str) -> Exception:
        """What comes of a request that another attempt doesn't help, with the setting that may."""
        juror, url = self._juror, shown_url(at.url)
        if status == 401 or (status in (400, 403, 422) and _KEY_REFUSED.search(said)):
            if juror.api_key_env is None and not juror.headers:
                return UserError(f"judge.api_key_env: {url} wants a key ({named}); name the variable that holds it")
            return UserError(
                f"judge.api_key_env: {url} refused the key in {juror.api_key_env or ', '.join(juror.headers.values())} "
                f"({named}{'' if status == 401 else f': {said}'}) for model `{juror.model}`; set it to a key of "
                "this server that may use this model"
            )
        if status == 404:
            return UserError(
                f"judge.model, judge.base_url: {url} has no model `{juror.model}`, or no chat completions at this "
                f"address ({named}: {said}); check both, the address usually ends in /v1"
            )
        if status == 402:  # nothing of the question: no credit
            return CallFailed(f"{named}: {said}", "down")
        hint = next((f" ({hint})" for found, hint in _HINTS if found.search(said)), "")
        if status == 403:  # the key, or what is asked: which, other questions show
            key = f"key: {juror.api_key_env or 'none'}, judge.api_key_env; model `{juror.model}`"
            hint = f" ({key})" if not hint else f"{hint[:-1]}; {key})"
        return CallFailed(f"{named}: {said}{hint}", "rejected")

    def _scrub(self, text: str) -> str:
        """One line without the key, for logs and errors."""
        text = clean(text)
        if self._key:
            text = text.replace(self._key, "[key]")
        for value in self._headers.values():
            text = text.replace(value, "[header]")
        text = re.sub(r"\b(sk-|Bearer\s+)[^\s\"']{6,}", r"\1[key]", text)
        line = " ".join(text.split())
        return line[:_ERROR_CHARACTERS] + ("…" if len(line) > _ERROR_CHARACTERS else "")


def _completions(at: Address) -> str:
    return f"{at.url}/chat/completions"


def _send_to(request: httpx2.Request, at: Address) -> None:
    """Sends a request that is ready to go to another server than it was made for."""
    import httpx2

    request.url = httpx2.URL(_completions(at)).copy_with(query=request.url.query)
    request.headers["Host"] = request.url.netloc.decode("ascii")


def _expected_tokens(request: httpx2.Request) -> float:
    """A guess, corrected by the server's own count: four bytes of the request a token, and the shortest of replies."""
    return len(request.content) / _CHARACTERS_PER_TOKEN + 1


# Of OpenSSL: what is wrong with a certificate for whoever asks, and nothing to trust would change.
_NOT_YET, _EXPIRED, _OTHER_HOST = (9,), (10,), (62, 63, 64)
_ISSUER_UNKNOWN = (2, 18, 19, 20, 21, 24, 27)


def _certificate_fault(code: int, reason: str, place: str) -> str:
    if code in _OTHER_HOST:
        return f"the certificate of {place} is for another host ({reason}); give judge.base_url the host that it is for"
    if code in _EXPIRED:
        return f"the certificate of {place} has expired; the server needs a new one (or is this machine's clock wrong?)"
    if code in _NOT_YET:
        return f"the certificate of {place} isn't valid yet ({reason}); is this machine's clock right?"
    if code in _ISSUER_UNKNOWN:
        return f"the certificate of {place} isn't trusted ({reason}); name a CA of your own in judge.ca_file"
    return f"the certificate of {place} can't be used ({reason}); whoever runs the server needs another"


def connection_fault(error: BaseException, url: str, answered: bool = True) -> str | None:
    """Why there was no connection to a server, or none any more; None when it just took too long. `answered`: it has
    spoken HTTP before."""
    import aiohttp

    parts = urlsplit(url)
    place = parts.netloc.rpartition("@")[2]
    host = parts.hostname
    chain: list[BaseException] = [error]
    for e in chain:  # grows on its way
        chain += [c for c in (e.__cause__, e.__context__, getattr(e, "os_error", None)) if c and c not in chain]
    last = next((str(e) for e in reversed(chain) if str(e)), "")

    def has(*kinds: type[BaseException]) -> BaseException | None:
        return next((e for e in chain if isinstance(e, kinds)), None)

    proxy = _proxy(url)
    through = f" through the proxy {proxy.shown} ({proxy.variable})" if proxy else ""
    tried = has(aiohttp.ClientConnectorError, aiohttp.ClientConnectorCertificateError)
    at = (str(getattr(tried, "host", None)), getattr(tried, "port", None))
    # aiohttp has a class of its own for a proxy that refuses, none for one that isn't known.
    of_proxy = has(aiohttp.ClientProxyConnectionError, aiohttp.ClientHttpProxyError)
    if of_proxy is None and proxy is not None and at == (proxy.host, proxy.port):
        of_proxy = tried
    if of_proxy is not None:
        name = proxy.variable if proxy else "HTTPS_PROXY" if parts.scheme == "https" else "HTTP_PROXY"
        return f"the proxy can't be used ({of_proxy}); mend or unset {name}, or name {host} in NO_PROXY"
    if tried is not None and at[0] != host and at[1]:  # a redirect led there
        host, place = at[0], f"{at[0]}:{at[1]}"
    if has(ssl.SSLCertVerificationError):
        # aiohttp's own class is one without what was verified.
        found = next((e for e in chain if hasattr(e, "verify_code")), None)
        return _certificate_fault(getattr(found, "verify_code", 0), getattr(found, "verify_message", last), place)
    if has(ssl.SSLError, aiohttp.ClientConnectorSSLError):
        # aiohttp's own class is an SSLError without a reason.
        reason = next((str(why) for e in chain if (why := getattr(e, "reason", None))), last)
        return f"{place} speaks no TLS that we do ({reason}); is judge.base_url an http:// address?"
    if has(socket.gaierror):
        return f"no host `{host}` is known ({has(socket.gaierror)}); check judge.base_url, or the network"
    if has(ConnectionRefusedError) or re.search(r"errno (?:111|61)\b|refused", last, re.I):
        return f"connection refused: nothing listens at {place}; start the server, or check judge.base_url"
    if cut := has(ConnectionResetError, BrokenPipeError, aiohttp.ServerDisconnectedError, aiohttp.ClientPayloadError):
        hint = "; if the server speaks TLS, judge.base_url begins with https://"
        hint = "" if answered or proxy or parts.scheme == "https" else hint
        return f"the connection was cut ({cut}){through}{hint}"
    if has(TimeoutError, aiohttp.ServerTimeoutError):
        return f"no connection to {place} in time" if has(aiohttp.ConnectionTimeoutError) else None
    if other := has(aiohttp.ClientError, OSError):
        return f"no connection to {place} ({type(other).__name__}: {other})"
    return (
        None
        if "timed out" in last.lower() or "timeout" in type(error).__name__.lower()
        else f"{type(error).__name__}: {last}"
    )
