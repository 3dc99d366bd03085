"""A chat server on loopback that fails on purpose: every kind of fault with its own probability, seeded.

It is a judge too: it prefers the longer answer, unless `say` decides. A request's fate depends on its content and on
how often it came before, not on the order of arrival.
"""

from __future__ import annotations

import asyncio
import email.utils
import json
import random
import re
import ssl
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

FAULTS = (
    "rate_limit", "error_500", "hang", "cut", "no_choices", "bad_json", "wrong_type", "truncated", "null_content",
    "slow",
)  # fmt: skip
USAGE = {"prompt_tokens": 100, "completion_tokens": 2}
_QUOTE = re.compile(r"BEGIN ANSWER (?P<slot>[AB]) (?P<code>\w+)\n(?P<text>.*?)\nEND ANSWER (?P=slot) (?P=code)", re.S)


def longer(body: dict[str, Any]) -> str:
    """The slot of the longer answer."""
    lengths = {m["slot"]: len(m["text"]) for m in _QUOTE.finditer(body["messages"][-1]["content"])}
    return "C" if lengths["A"] == lengths["B"] else max(lengths, key=lambda slot: lengths[slot])


class FaultServer:
    """`with FaultServer(...) as server:`; `server.url` is its base_url."""

    def __init__(
        self,
        share: float = 0.0,
        faults: tuple[str, ...] = FAULTS,
        latency_s: float = 0.0,
        say: Callable[[dict[str, Any]], str | None] = longer,
        status: int | Callable[[dict[str, Any]], int | None] | None = None,
        message: str = "no",
        seed: int = 0,
        only_first_attempt: bool = False,
        usage: dict[str, Any] | None = USAGE,
        retry_after: str | None = None,
        answer: Callable[[dict[str, Any], int], tuple[int, dict[str, str], Any] | None] | None = None,
        models: list[dict[str, Any]] | None = None,
        certificate: ssl.SSLContext | None = None,
        port: int = 0,
    ):
        """Each of `faults` has the probability `share`; `status` answers with that error, if it is one. `answer` gets a
        body and how often it came, and gives status, headers and JSON, or None for the usual; `models` is what GET
        /models lists; with a `certificate` the server speaks TLS; `port` is one that the kernel chooses when 0."""
        self.port = port
        self.answer, self.models, self.certificate = answer, models, certificate
        self.heads: list[str] = []
        """Of all requests: the first line and the headers, as they came."""
        self.share, self.faults, self.latency_s, self.say = share, faults, latency_s, say
        self.status, self.message, self.seed, self.only_first_attempt = status, message, seed, only_first_attempt
        self.usage = usage
        """What every reply says that it cost; None: nothing."""
        self.retry_after = retry_after
        """What `rate_limit` asks for; short times in both forms when None."""
        self.seen: Counter[str] = Counter()
        """Requests by content."""
        self.fates: Counter[str] = Counter()
        self.bodies: list[dict[str, Any]] = []
        self.keys: set[str] = set()
        self.headers: set[str] = set()
        """Names, in lower case."""
        self.redirect: str | None = None
        """Another server's base_url, to which everything is sent on."""
        self.open = self.most_open = 0
        self.times: list[float] = []

    @property
    def requests(self) -> int:
        """All requests so far."""
        return sum(self.seen.values())

    def __enter__(self) -> FaultServer:
        started = threading.Event()
        self.loop = asyncio.new_event_loop()

        def run() -> None:
            asyncio.set_event_loop(self.loop)
            server = self.loop.run_until_complete(
                asyncio.start_server(
                    self._connection, "127.0.0.1", self.port, backlog=1024, limit=2**22, ssl=self.certificate
                )
            )
            self.port = server.sockets[0].getsockname()[1]
            started.set()
            self.loop.run_forever()
            server.close()
            for task in asyncio.all_tasks(self.loop):
                task.cancel()
            self.loop.run_until_complete(asyncio.sleep(0.01))
            self.loop.close()

        self.thread = threading.Thread(target=run, daemon=True)
        self.thread.start()
        started.wait(5)
        self.url = f"http{'s' if self.certificate else ''}://127.0.0.1:{self.port}/v1"
        return self

    def __exit__(self, *_: object) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join(5)

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                self.heads.append(head.decode())
                if head.startswith(b"GET "):
                    await _send(writer, 200 if self.models else 404, json.dumps({"data": self.models}))
                    continue
                length = int(re.search(rb"content-length: (\d+)", head, re.I)[1])
                self.keys.update(k.decode() for k in re.findall(rb"authorization: Bearer (\S+)", head, re.I))
                self.headers.update(line.split(":")[0].lower() for line in head.decode().splitlines()[1:])
                content = (await reader.readexactly(length)).decode()
                self.open += 1
                self.most_open = max(self.most_open, self.open)
                try:
                    keep = await self._answer(content, writer)
                finally:
                    self.open -= 1
                if not keep:
                    break
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            pass
        finally:
            writer.close()

    def _fate(self, content: str) -> str:
        self.seen[content] += 1
        if self.only_first_attempt and self.seen[content] > 1:
            return "fine"
        draw = random.Random(f"{self.seed}:{self.seen[content]}:{content}").random()
        number = int(draw / self.share) if self.share else len(self.faults)
        return self.faults[number] if number < len(self.faults) else "fine"

    async def _answer(self, content: str, writer: asyncio.StreamWriter) -> bool:
        body = json.loads(content)
        self.bodies.append(body)
        self.times.append(time.monotonic())
        fate = self._fate(content)
        self.fates[fate] += 1
        if self.latency_s:
            await asyncio.sleep(self.latency_s)
        if self.redirect:
            await _send(writer, 307, "", headers=f"Location: {self.redirect}/chat/completions\r\n")
            return True
        if self.answer is not None and (made := self.answer(body, self.seen[content])) is not None:
            code, headers, tree = made
            lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
            await _send(writer, code, tree if isinstance(tree, str) else json.dumps(tree), headers=lines)
            return True
        status = self.status(body) if callable(self.status) else self.status
        if status is not None:
            await _send(writer, status, json.dumps({"error": {"message": self.message}}))
            return True
        match fate:
            case "hang":
                await asyncio.sleep(60)
                return False
            case "slow":
                await asyncio.sleep(0.02)
            case "rate_limit":
                soon = email.utils.formatdate(time.time(), usegmt=True)
                after = self.retry_after or ("0.05" if self.seen[content] % 2 else soon)
                await _send(writer, 429, '{"error": {"message": "slow down"}}', headers=f"Retry-After: {after}\r\n")
                return True
            case "error_500":
                await _send(writer, 500, "<html>oh no</html>", "text/html")
                return True
            case "no_choices":
                await _send(writer, 200, '{"model": "m", "choices": []}')
                return True
            case "bad_json":
                await _send(writer, 200, '{"choices": [{"message": {"content": "A')
                return True
            case "wrong_type":
                await _send(writer, 200, "<html>A</html>", "text/html")
                return True
        said, finish = self.say(body), "stop"
        if fate == "truncated":
            said, finish = "Let me think about", "length"
        if fate == "null_content":
            said = None
        reply = json.dumps(completion(body, said, finish) | {"usage": self.usage})
        if fate == "cut":
            writer.write(f"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {len(reply)}\r\n\r\n"
                         f"{reply[: len(reply) // 2]}".encode())  # fmt: skip
            await writer.drain()
            return False
        await _send(writer, 200, reply)
        return True


def completion(body: dict[str, Any], said: str | None, finish: str = "stop") -> dict[str, Any]:
    """A chat completion; with log-probabilities (0.75 on the letter that is said) where they were asked for."""
    choice: dict[str, Any] = {"index": 0, "message": {"role": "assistant", "content": said}, "finish_reason": finish}
    if body.get("logprobs") and said in ("A", "B"):
        other = "B" if said == "A" else "A"
        top = [{"token": said, "logprob": -0.28768207}, {"token": f" {other}", "logprob": -1.609438}]
        choice["logprobs"] = {"content": [{"token": said, "logprob": -0.28768207, "top_logprobs": top}]}
    return {"id": "x", "object": "chat.completion", "model": "m-1", "choices": [choice], "usage": USAGE}


async def _send(
    writer: asyncio.StreamWriter, status: int, text: str, kind: str = "application/json", headers: str = ""
) -> None:
    content = text.encode()
    head = f"HTTP/1.1 {status} X\r\nContent-Type: {kind}\r\nContent-Length: {len(content)}\r\n{headers}\r\n"
    writer.write(head.encode() + content)
    await writer.drain()
