"""How fast the chat judge is, and how much memory it takes.

    python -m benchmarks.judge [--ballots 4000] [--memory 10000 100000 1000000] [--json]

Throughput: a server on loopback, in a process of its own, answers every request after 200 ms and refuses more than 64
at once. The ideal is latency x ballots / concurrency; the target is 1.15 x that. Memory: the same judge takes ballots
from a generator and asks a server that answers at once, in this process; the peak must not follow their number, and
stay under 1 GiB. Real HTTP, the reply cache and retries are as in a run.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import multiprocessing
import resource
import tempfile
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from rlaif.config import ChatSettings
from rlaif.constitutions.constitution import load_constitution
from rlaif.constitutions.templates import load_template
from rlaif.judging.ballots import make_chat_ballots
from rlaif.judging.candidates import Candidate
from rlaif.judging.chat import ChatJudge
from rlaif.judging.parsing import Reply
from rlaif.judging.transport import Answer
from rlaif.records import Ballot, Message, Pair, Usage

LATENCY_S = 0.2
CONCURRENCY = 64
TARGET_RATIO = 1.15
TARGET_GIB = 1.0
_TOP = [{"token": t, "logprob": -0.1 - i} for i, t in enumerate(["A", "B", *"CDEFGHIJKLMNOPQRST"])]
_REPLY = json.dumps(
    {
        "id": "x",
        "object": "chat.completion",
        "model": "m",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "A"},
                "finish_reason": "stop",
                "logprobs": {"content": [{"token": "A", "logprob": -0.1, "top_logprobs": _TOP}]},
            }
        ],
        "usage": {"prompt_tokens": 400, "completion_tokens": 1},
    }
).encode()


class _Connection(asyncio.Protocol):
    """Answers after the latency; more requests at once than allowed are turned away with a 429."""

    open = 0

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        self.received = b""

    def data_received(self, data: bytes) -> None:
        self.received += data
        head, found, rest = self.received.partition(b"\r\n\r\n")
        if not found:
            return
        if head.startswith(b"GET "):  # the list of models
            self.received = rest
            self._send(404, b"{}")
            return
        length = int(head.lower().split(b"content-length:")[1].split(b"\r\n")[0])
        if len(rest) < length:
            return
        self.received = rest[length:]
        if _Connection.open >= CONCURRENCY:
            self._send(429, b"{}")
            return
        _Connection.open += 1
        asyncio.get_running_loop().call_later(LATENCY_S, self._answer)

    def _answer(self) -> None:
        _Connection.open -= 1
        self._send(200, _REPLY)

    def _send(self, status: int, content: bytes) -> None:
        head = f"HTTP/1.1 {status} X\r\nContent-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
        self.transport.write(head.encode() + content)


def serve(port: Connection) -> None:
    """The server process; sends its port."""

    async def run() -> None:
        server = await asyncio.get_running_loop().create_server(_Connection, "127.0.0.1", 0, backlog=1024)
        port.send(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    asyncio.run(run())


class AtOnce:
    """A server in this process, without a network."""

    def __init__(self, *_: Any):
        """Takes what a real one takes."""

    async def ask(self, body: dict[str, Any]) -> Answer:
        """Always the same."""
        await asyncio.sleep(0)
        usage = Usage(prompt_tokens=400, completion_tokens=1)
        return Answer(reply=Reply(content="A", finish_reason="stop", usage=usage, model="m"), attempts=1, latency_s=0.0)

    async def identities(self) -> dict[str, str | None]:
        """Says nothing of itself."""
        return {}

    async def close(self) -> None:
        """Nothing to close."""


class Work:
    """Pairs of everyday length, and as many ballots on them as wanted."""

    def __init__(self, pairs: int):
        self.constitution = load_constitution("constitutions", "assistant@1")
        self.template = load_template("prompts/judge", "pairwise")
        self.pairs = [
            Pair(id=f"p{i}", prompt_id=f"x{i}", first=f"a{i}", second=f"b{i}", method="all") for i in range(pairs)
        ]
        self.candidates = [
            Candidate(
                completion_id=f"{side}{i}",
                prompt_id=f"x{i}",
                messages=(Message(role="user", content=f"Why is the number {i} interesting to some people?"),),
                finish_reason="stop",
                text=f"{side} {i}: " + "It is a number with a story, and the story is long. " * 8,
            )
            for i in range(pairs)
            for side in "ab"
        ]  # fmt: skip

    def ballots(self, settings: ChatSettings, n: int) -> Iterator[Ballot]:
        """The first `n` ballots on the pairs, which come again when they are used up."""
        pairs = itertools.cycle(self.pairs)
        return itertools.islice(make_chat_ballots(pairs, self.constitution, settings.jurors, [self.template]), n)

    def run(self, judge: ChatJudge, n: int) -> int:
        """Casts `n` ballots; the number of valid votes."""
        ballots = self.ballots(judge.settings, n)
        chunks = judge.cast(ballots, self.pairs, self.candidates, self.constitution, [self.template])
        return sum(vote.outcome != "abstain" for chunk in chunks for vote in chunk)


def throughput(ballots: int) -> dict[str, float]:
    """Seconds for real requests, beside the ideal."""
    work = Work(ballots // 2)
    here, there = multiprocessing.get_context("spawn").Pipe()
    server = multiprocessing.get_context("spawn").Process(target=serve, args=(there,), daemon=True)
    server.start()
    try:
        with tempfile.TemporaryDirectory() as cache:
            settings = ChatSettings(
                kind="chat", model="m", base_url=f"http://127.0.0.1:{here.recv()}/v1", api_key_env=None,
                concurrency=CONCURRENCY, cache=cache,
            )  # fmt: skip
            judge = ChatJudge(settings)
            started, cpu = time.perf_counter(), time.process_time()
            valid = work.run(judge, ballots)
            seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
            judge.close()
    finally:
        server.terminate()
        server.join()
    if valid != ballots:
        raise SystemExit(f"{ballots - valid} of {ballots} ballots have no valid vote")
    ideal = LATENCY_S * ballots / CONCURRENCY
    return {"ballots": ballots, "seconds": seconds, "ideal": ideal, "ratio": seconds / ideal, "cpu_seconds": cpu}


def memory(sizes: list[int]) -> list[dict[str, float]]:
    """Peak memory of this process after each number of ballots, from the smallest."""
    work = Work(100)
    settings = ChatSettings(kind="chat", model="m", base_url="http://127.0.0.1:1/v1", api_key_env=None, cache=None)
    out = []
    for size in sorted(sizes):
        started = time.perf_counter()
        work.run(ChatJudge(settings, connect=AtOnce), size)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        out.append({"ballots": size, "peak_gib": peak, "seconds": time.perf_counter() - started})
    return out


def main() -> None:
    """Prints both measurements."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--ballots", type=int, default=4000, help="requests of the throughput part; 0 leaves it out")
    parser.add_argument("--memory", type=int, nargs="*", default=[10_000, 100_000, 1_000_000], help="ballots")
    parser.add_argument("--json", action="store_true", help="JSON for programs")
    options = parser.parse_args()
    if not Path("prompts/judge").is_dir():
        raise SystemExit("run it from the repository's top folder")
    report: dict[str, Any] = {}
    if options.ballots:
        report["throughput"] = t = throughput(options.ballots)
        if not options.json:
            print(
                f"{t['ballots']} ballots, {LATENCY_S * 1000:g} ms, {CONCURRENCY} at once: {t['seconds']:.2f} s, ideal "
                f"{t['ideal']:.2f} s, ratio {t['ratio']:.3f} (target {TARGET_RATIO}), {t['cpu_seconds']:.1f} s CPU"
            )
    report["memory"] = memory(options.memory)
    for m in report["memory"] if not options.json else ():
        print(f"{m['ballots']:>9,} ballots: peak {m['peak_gib']:.3f} GiB (target {TARGET_GIB}), {m['seconds']:.1f} s")
    if options.json:
        print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
