"""Run directories for the pages: stub workers, and answers that try to be more than text."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rlaif.config import Job
from rlaif.records import Completion
from rlaif.rundir.store import write_json
from rlaif.workers.inline import InlineWorker
from tests.stubs import BASE_DIGEST, StubSampler, stub_job, stub_loop, stub_prompts

HOSTILE = (
    "<script>document.title = 'ran'; window.ran = 1</script>",
    "<img src=x onerror=\"window.ran = 1\"><svg onload='window.ran = 1'>",
    "</pre></section><a href='javascript:window.ran=1' id=ran>click</a>{{ 7 * 7 }}",
)


class HostileSampler(StubSampler):
    """Its answers hold markup and script."""

    def sample(self, *args: Any, **kwargs: Any) -> Iterator[list[Completion]]:
        for chunk in super().sample(*args, **kwargs):
            yield [c.model_copy(update={"text": HOSTILE[c.index % len(HOSTILE)] + c.text}) for c in chunk]


def reviewed_job(**changes: Any) -> Job:
    """A stub job that sends two pairs an iteration to people."""
    return stub_job(filters={"min_kept_pairs": 2, "review": {"top_uncertain": 2}}, **changes)


def make_run(root: Path, job: Job | None = None, hostile: bool = False) -> Path:
    """Runs, or goes on with, a stub job under `root`; returns the run directory, as complete as a real one."""
    job = job or stub_job()
    run = root / "run"
    loop = stub_loop(root, job)
    if hostile:
        loop.sampler = InlineWorker("sampler", "tests.view.runs:HostileSampler", {})
    loop.run()
    header = {
        "schema_version": 1,
        "rlaif": "0",
        "job": job.model_dump(mode="json"),
        "job_digest": "0" * 16,
        "models": {"policy": BASE_DIGEST, "judge": BASE_DIGEST},
        "packages": {"pydantic": "2"},
        "python": "3",
        "revision": None,
    }
    write_json(run / "run.json", header)
    (run / "prompts").mkdir(exist_ok=True)
    for name, count, prefix in (("train", 20, "train"), ("held_out", 4, "held")):
        rows = stub_prompts(count, prefix)
        (run / "prompts" / f"{name}.jsonl").write_text("".join(p.model_dump_json() + "\n" for p in rows))
    return run
