"""Runs the stub job, killing it at chosen writes, and says what was durable at each kill. Run by test_resume.py.

    python -m tests.kill_driver ROOT COUNT SEED [SOURCE REJUDGE | --pipeline JUDGE SETTINGS]

With SOURCE, a run's folder, the job trains on its pairs (`source`), judged again if REJUDGE is 1. With --pipeline the
judge is a likelihood or a chat judge (a stub either way), and SETTINGS a list of `pipeline` sections, in JSON: the
whole run has the first, the killed ones have the others, another one after each kill.

Every durable step of a run goes through a handful of calls (fsync, replace, write_text, rmtree, an event). Each is a
kill point before and after it; a kill before the fsync of a row file also tears its last line.
"""

from __future__ import annotations

import functools
import json
import os
import random
import re
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rlaif.loop import Loop
from rlaif.rundir.store import RunDir
from rlaif.workers.inline import InlineWorker
from tests.offline import offline_job, offline_loop
from tests.stubs import stub_job, stub_loop, write_base, write_texts

ROOT = Path(__file__).resolve().parent.parent


class Hooks:
    """Counts the calls that change the disk; kills this process at the n-th point."""

    def __init__(self, root: Path, kill_at: int | None) -> None:
        self.labels: list[str] = []
        self._root, self._kill_at = root, kill_at

    def install(self) -> None:
        self._wrap(os, "fsync", lambda fd: os.readlink(f"/proc/self/fd/{fd}"))
        self._wrap(os, "replace", lambda src, dst: dst)
        self._wrap(shutil, "rmtree", lambda path, *a, **k: path)
        self._wrap(Path, "write_text", lambda path, *a, **k: path)
        self._wrap(RunDir, "event", lambda run, kind, *a, **k: run.path / "events.jsonl")

    def _wrap(self, owner: Any, name: str, path_of: Callable[..., Any]) -> None:
        real = getattr(owner, name)

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            path = Path(path_of(*args, **kwargs))
            self._point(f"before {name}", path)
            result = real(*args, **kwargs)
            self._point(f"after {name}", path)
            return result

        setattr(owner, name, wrapped)

    def _point(self, what: str, path: Path) -> None:
        number = len(self.labels)
        self.labels.append(f"{path.relative_to(self._root)}: {what}")
        if number == self._kill_at:
            if what == "before fsync" and path.name.endswith(".jsonl.partial"):
                os.truncate(path, max(path.stat().st_size - 7, 0))
            os.kill(os.getpid(), signal.SIGKILL)


def in_child(action: Callable[[], None]) -> int:
    """Runs it in a fork; returns the exit code, negative for a signal."""
    if (pid := os.fork()) == 0:
        code = 1
        try:
            action()
            code = 0
        finally:
            sys.stderr.flush()
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def _loop(root: Path, attempt: int) -> Loop:
    if sys.argv[4:5] == ["--pipeline"]:
        return _pipeline_loop(root, attempt)
    if source := sys.argv[4:]:
        return offline_loop(root, offline_job(Path(source[0]), source[1] == "1"))
    return stub_loop(root, stub_job(replay={"share": 0.4, "on_change": "rejudge"}))


def _pipeline_loop(root: Path, attempt: int) -> Loop:
    """A whole run is attempt 0."""
    judge, settings = sys.argv[5], json.loads(sys.argv[6])
    pipeline = settings[0] if attempt == 0 else settings[1:][attempt % len(settings[1:])]
    # Anchors ask again what has a vote.
    changes: dict[str, Any] = {"pipeline": pipeline, "monitors": {"anchors": {"action": "off"}}}
    if judge == "chat":
        changes["judge"] = {"kind": "chat", "model": "m", "api_key_env": None}
        if not (root / "prompts").exists():
            shutil.copytree(ROOT / "prompts" / "judge", root / "prompts" / "judge")
    else:
        changes["judge"] = {"batch_tokens": 64}  # pieces of one prompt
    loop = stub_loop(root, stub_job(**changes))
    if judge == "chat":
        fed = InlineWorker("judge", "tests.stubs:StubFedJudge", {"casts": str(root / "casts.log")})
        loop.judge = loop.measurer = fed
    return loop


def run(root: Path, kill_at: int | None = None, attempt: int = 0) -> None:
    write_texts(root, 1, 2)
    write_base(root)
    os.fsync = lambda fd: None  # a killed process, unlike a machine without power, loses nothing that it wrote
    hooks = Hooks(root, kill_at)
    hooks.install()
    _loop(root, attempt).run()
    with (root.parent / "labels.json").open("w") as f:
        json.dump(hooks.labels, f)


def stage_of(label: str) -> str:
    """`run/iterations/0002/votes.jsonl.partial: before fsync` → `iterations/votes`."""
    path = Path(label.partition(":")[0])
    return f"{path.parts[1]}/{re.split(r'[.]', path.name)[0]}"


def choose(labels: list[str], count: int, seed: int, under: str = "") -> list[int]:
    """Points in every stage (torn lines among the votes), then anywhere; `under` a folder."""
    draw = random.Random(seed)
    by_stage: dict[str, list[int]] = {}
    there = [i for i, label in enumerate(labels) if label.startswith(under)]
    for i in there:
        label = labels[i]
        by_stage.setdefault(stage_of(label), []).append(i)
    chosen = []
    for points in by_stage.values():
        torn = [i for i in points if labels[i].endswith("votes.jsonl.partial: before fsync")]
        chosen.append(draw.choice(torn or points))
    rest = [i for i in there if i not in chosen]
    return sorted((chosen + draw.sample(rest, max(count - len(chosen), 0)))[:count])


def durable_ballots(root: Path) -> list[str]:
    """Ballots whose vote is a whole line on disk."""
    found = []
    for path in [*root.glob("run/*/*/*votes.jsonl"), *root.glob("run/*/*/*votes.jsonl.partial")]:
        whole = path.read_bytes()
        lines = whole[: whole.rfind(b"\n") + 1].splitlines()
        found += [json.loads(line)["ballot"]["id"] for line in lines]
    return found


def casts(root: Path) -> list[str]:
    path = root / "casts.log"
    return path.read_text().split() if path.exists() else []


def main(root: Path, count: int, seed: int) -> None:
    assert in_child(lambda: run(root / "whole")) == 0
    if sys.argv[4:5] == ["--pipeline"]:  # points of a run as those that are killed
        assert in_child(lambda: run(root / "again", attempt=1)) == 0
    labels: list[str] = json.loads((root / "labels.json").read_text())
    points = choose(labels, count, seed, "run/iterations/" if sys.argv[4:5] == ["--pipeline"] else "")
    kills = []
    for number, point in enumerate(points):
        here = root / f"kill{point:04d}"
        kill_ats = [point]
        if number % 3 == 0:  # and once more, on the way from there to the end
            kill_ats.append(random.Random(point).randrange(max((len(labels) - point) // 2, 1)))
        kill = {"label": labels[point], "stage": stage_of(labels[point]), "folder": here.name, "exits": [], "again": []}
        for attempt, kill_at in enumerate(kill_ats, 1):
            kill["exits"].append(in_child(functools.partial(run, here, kill_at, attempt)))
            durable, before = set(durable_ballots(here)), len(casts(here))
            kill.setdefault("durable", []).append((durable, before))
        kill["exits"].append(in_child(functools.partial(run, here, None, len(kill_ats) + 1)))
        everything = casts(here)
        for durable, before in kill.pop("durable"):
            kill["again"] += [b for b in everything[before:] if b in durable]
        kills.append(kill)
    print(json.dumps({"stages": sorted({stage_of(x) for x in labels}), "kills": kills}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
