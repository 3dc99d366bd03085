"""Runs whose filter sends pairs to review, made by the stub loop, and their labels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rlaif.config import Job
from rlaif.loop import Loop
from rlaif.records import HumanLabel
from rlaif.review.queue import Queue, Shown, shown_swapped
from rlaif.rundir.store import RunDir, write_json
from tests.stubs import stub_job, stub_loop


def review_job(**changes: Any) -> Job:
    """One text; of the six pairs of an iteration, those that the voices split on and the two least certain others."""
    tree: dict[str, Any] = {
        **({} if "schedule" in changes else {"constitution": "rules@1"}),
        "filters": {"min_kept_pairs": 1, "review": {"below_agreement": 0.9, "top_uncertain": 2}},
        "replay": {"share": 0.0},
        **changes,
    }
    return stub_job(**tree)


def loop_of(root: Path, job: Job) -> Loop:
    """A stub loop over `root/run`, whose directory has what a launched run has."""
    loop = stub_loop(root, job)
    folder = loop.dir.path / "prompts"
    folder.mkdir(parents=True, exist_ok=True)
    for name, prompts in (("train", loop.train), ("held_out", loop.held_out)):
        (folder / f"{name}.jsonl").write_text("".join(p.model_dump_json() + "\n" for p in prompts))
    write_json(loop.dir.path / "run.json", {"schema_version": 1, "job": job.model_dump(mode="json"), "models": {}})
    return loop


def reviewed(root: Path, **changes: Any) -> RunDir:
    """A run that is done, with pairs in review."""
    loop = loop_of(root, review_job(**changes))
    loop.run()
    return RunDir.open(loop.dir.path)


def key_for(pair_id: str, author: str, outcome: str) -> Shown:
    """The key with which an author says `first` or `second`: which one it is depends on the order shown."""
    return "1" if (outcome == "first") != shown_swapped(pair_id, author) else "2"


def give(run: RunDir, pair_id: str, outcome: str, author: str = "ann") -> HumanLabel:
    """Labels a pair as the queue does."""
    return Queue(run).answer(pair_id, key_for(pair_id, author, outcome), author)
