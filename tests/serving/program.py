"""A program in the place of vLLM's server: `python program.py --port N ... [--stub WAY] [--diary FILE]`.

It has a child, as vLLM has its engine, and judges by a digest of the question. In `--diary` it writes a line (JSON)
when it starts, with its process ids and the key that it was given, and the digest of every request that it answers.
Ways: `refuses` (ends before it answers), `silent` (listens, and is never well), `ends` (ends by itself once it was
asked how it is), `wide awake` (neither sleeps nor wakes when it is asked to).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

HERE = Path(__file__)


def command() -> list[str]:
    """What stands for vLLM's own."""
    return [sys.executable, str(HERE)]


def main() -> None:
    """Serves until it is told to end."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--served-model-name", required=True)
    parser.add_argument("--stub", default="")
    parser.add_argument("--diary")
    options, _ = parser.parse_known_args()
    engine = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    diary = open(options.diary, "a", buffering=1) if options.diary else None  # noqa: SIM115

    def write(**what: Any) -> None:
        if diary:
            diary.write(json.dumps(what) + "\n")

    key = os.environ["VLLM_API_KEY"]
    write(pid=os.getpid(), engine=engine.pid, key=key, port=options.port, gpus=os.environ.get("CUDA_VISIBLE_DEVICES"))
    if options.stub == "refuses":
        engine.kill()
        print("(Worker pid=1) ERROR 11-29 [core.py:953] ValueError: no such quantization `int0`")
        print("RuntimeError: Engine core initialization failed. See root cause above.\nbye")
        sys.exit(3)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None: ...

        def answer(self, status: int, tree: Any) -> None:
            content = json.dumps(tree).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def do_GET(self) -> None:
            if self.path == "/health":
                self.answer(503 if options.stub == "silent" else 200, {})
                if options.stub == "ends":
                    threading.Timer(0.3, os._exit, [1]).start()
            else:
                self.answer(200, {"data": [{"id": options.served_model_name, "root": "here", "created": time.time()}]})

        def do_POST(self) -> None:
            content = self.rfile.read(int(self.headers["Content-Length"] or 0))
            if self.headers["Authorization"] != f"Bearer {key}":
                self.answer(401, {"error": {"message": "Unauthorized"}})
                return
            if self.path in ("/sleep?level=1", "/wake_up"):
                write(turn=self.path, port=options.port)
                self.answer(500 if options.stub == "wide awake" else 200, {})
                return
            body = json.loads(content)
            asked = hashlib.sha256(json.dumps(body["messages"]).encode()).hexdigest()
            write(asked=asked, port=options.port)
            message = {"role": "assistant", "content": "AB"[int(asked, 16) % 2]}
            self.answer(200, {
                "model": options.served_model_name,
                "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
                "usage": {"prompt_tokens": 100, "completion_tokens": 1},
            })  # fmt: skip

    ThreadingHTTPServer(("127.0.0.1", options.port), Handler).serve_forever()


if __name__ == "__main__":
    main()
