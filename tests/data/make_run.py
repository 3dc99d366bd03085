"""Makes a stored run, as `run_schema2/`: `python -m tests.data.make_run FOLDER`. See README.md beside it.

The stub loop with a chat judge that is a server on loopback: two jurors, two templates, both orders. Some of what
they say is position bias, a disagreement, a tie or no verdict at all, so that every query has something to find.
"""

from __future__ import annotations

import re
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from rlaif.config import Job
from rlaif.records import SCHEMA_VERSION, digest
from rlaif.rundir.store import write_json
from rlaif.workers.inline import InlineWorker
from tests.judging.fault_server import FaultServer
from tests.stubs import BASE_DIGEST, fraction, stub_job, stub_loop, stub_prompts

ROOT = Path(__file__).resolve().parent.parent.parent
_NUMBER = re.compile(r"answer (0\.\d+)")


def said(body: dict[str, Any]) -> str:
    """What a juror replies: mostly the slot with the greater number."""
    user = body["messages"][-1]["content"]
    reasoned = "Reason briefly" in user
    a, b = (_NUMBER.findall(part)[-1] for part in user.split("BEGIN ANSWER B "))
    pair = sorted([a, b])
    mood = fraction(pair, reasoned, body["model"])
    verdict = "A" if a > b else "B"
    if mood < 0.14:
        verdict = "A"  # the slot shown first, whatever is in it
    elif mood < 0.28 and body["model"] == "contrary":
        verdict = "B" if verdict == "A" else "A"
    elif mood > 0.92:
        return "I would rather not say which one is better."
    elif mood > 0.88:
        verdict = "tie" if reasoned else "C"
    if not reasoned:
        return verdict
    return f"Both answers keep to the rules. The numbers are {a} and {b}.\nVerdict: {verdict}"


def chat_job(url: str, **changes: Any) -> Job:
    """Four iterations: the second is skipped, the text changes before the third, the fourth replays."""
    juror = {"base_url": url, "api_key_env": None}
    judge = {
        "kind": "chat", "model": "careful", **juror, "cache": None, "max_retries": 0,
        "templates": ["pairwise", "pairwise_reasoned"], "jury": [{"model": "contrary", **juror}],
        "prices": {"careful": {"prompt": 0.4, "completion": 1.6}},
    }  # fmt: skip
    tree: dict[str, Any] = {
        "judge": judge,
        "iterations": 4,
        "prompts": {"per_iteration": 5},
        "filters": {"min_agreement": 0.75, "min_kept_pairs": 2},
        **changes,
    }
    return stub_job(**tree)


def make_run(root: Path, **changes: Any) -> Path:
    """A whole run in `root/run`, as `rlaif run` would leave it; returns its folder."""
    shutil.copytree(ROOT / "prompts" / "judge", root / "prompts" / "judge", dirs_exist_ok=True)
    run = root / "run"
    with FaultServer(say=said) as server:
        job = chat_job(server.url, **changes)
        loop = stub_loop(root, job)
        write_header(run, job)
        loop.judge = InlineWorker("judge", "rlaif.judging.chat:make", {"settings": job.judge, "spent": None})
        loop.dir.event("started", f"{job.iterations} iterations", seed=job.seed)
        loop.run()
        loop.dir.event("finished", f"{job.iterations} iterations done")
    return run


def write_header(run: Path, job: Job) -> None:
    """run.json and the prompts, which `rlaif.loop.launch` writes and the stub loop doesn't."""
    (run / "prompts").mkdir(parents=True, exist_ok=True)
    for name, prompts in (("train", stub_prompts(20, "train")), ("held_out", stub_prompts(4, "held"))):
        (run / "prompts" / f"{name}.jsonl").write_text("".join(p.model_dump_json() + "\n" for p in prompts))
    tree = job.model_dump(mode="json")
    header = {
        "schema_version": SCHEMA_VERSION,
        "rlaif": "0.1.0",
        "job": tree,
        "job_digest": digest(tree),
        "models": {"policy": BASE_DIGEST, "tokenizer": "stub", "chat_template": "stub"},
        "packages": {},
        "python": "3.11",
        "revision": None,
    }
    write_json(run / "run.json", header)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(make_run(Path(folder)), Path(sys.argv[1]), ignore=shutil.ignore_patterns("*.lock", ".lock"))
