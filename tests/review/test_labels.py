"""Labels are appended and never lost; which one counts, and which ones an update takes."""

from __future__ import annotations

import errno
import hashlib
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlaif.errors import RlaifError
from rlaif.records import HumanLabel
from rlaif.review import labels as log
from rlaif.review.labels import append, in_force, joining, labels_path, read_labels, review_lock
from rlaif.review.queue import Queue
from rlaif.rundir.store import RunDir
from tests.review.runs import reviewed

ROOT = Path(__file__).resolve().parent.parent.parent


def label(pair: str = "a", outcome: str = "first", author: str = "ann", iteration: int = 0, **more: Any) -> HumanLabel:
    values = {"pair_id": pair, "iteration": iteration, "outcome": outcome, "author": author, "time": "t", **more}
    return HumanLabel.model_validate(values)


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return RunDir(tmp_path)


def store(run: RunDir, *labels: HumanLabel) -> None:
    with review_lock(run):
        for x in labels:
            append(run, x)


def test_labels_come_back_in_the_order_in_which_they_were_given(run: RunDir) -> None:
    given = [label("a"), label("b", "tie", reason='says "so"\nin two lines'), label("a", "second")]
    store(run, *given)
    assert read_labels(run).labels == tuple(given)
    assert len(labels_path(run).read_text().splitlines()) == 3


def test_no_labels_yet(run: RunDir) -> None:
    assert read_labels(run).labels == ()
    assert read_labels(run).sha256 == hashlib.sha256(b"").hexdigest()


def test_a_torn_tail_is_not_read_and_the_next_label_follows_the_last_whole_one(run: RunDir) -> None:
    store(run, label("a"))
    whole = labels_path(run).read_bytes()
    labels_path(run).write_bytes(whole + whole[:20])
    found = read_labels(run)
    assert (found.labels, found.problems, found.size) == ((label("a"),), (), len(whole))
    assert found.sha256 == hashlib.sha256(whole).hexdigest()
    store(run, label("b"))
    assert read_labels(run).labels == (label("a"), label("b"))
    assert read_labels(run).problems == ()


def test_a_whole_label_without_its_line_end_is_kept(run: RunDir) -> None:
    store(run, label("a"), label("b"))
    labels_path(run).write_bytes(labels_path(run).read_bytes()[:-1])
    assert len(read_labels(run).labels) == 2
    store(run, label("c"))
    assert [x.pair_id for x in read_labels(run).labels] == ["a", "b", "c"]


def test_a_damaged_line_in_the_middle_is_named_and_the_others_are_read(run: RunDir) -> None:
    store(run, label("a"), label("b"), label("c"))
    lines = labels_path(run).read_text().splitlines(keepends=True)
    lines[1] = lines[1].replace("first", "fist")
    labels_path(run).write_text("".join(lines))
    found = read_labels(run)
    assert [x.pair_id for x in found.labels] == ["a", "c"]
    assert len(found.problems) == 1
    assert found.problems[0].startswith(f"{labels_path(run)}:2: not a label (outcome: ")


@pytest.mark.parametrize("fails", ["write", "fsync"])
def test_a_full_disk_is_one_line_and_loses_nothing(run: RunDir, monkeypatch: pytest.MonkeyPatch, fails: str) -> None:
    store(run, label("a"))
    before = labels_path(run).read_bytes()
    real = os.write
    wrote: list[int] = []

    def short_write(fd: int, data: bytes) -> int:  # as a disk does: what fits is written, then nothing more
        if fails == "fsync":
            return real(fd, data)
        if wrote:
            raise OSError(errno.ENOSPC, "No space left on device")
        wrote.append(real(fd, data[:10]))
        return wrote[0]

    def no_fsync(fd: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(log.os, "write", short_write)
        if fails == "fsync":
            patch.setattr(log.os, "fsync", no_fsync)
        with pytest.raises(RlaifError, match=r"labels\.jsonl: no space left on the disk") as e:
            store(run, label("b"))
    assert "\n" not in str(e.value)
    assert labels_path(run).read_bytes() == before
    store(run, label("b"))
    assert read_labels(run).labels == (label("a"), label("b"))


# Which label counts.


def test_the_newest_counts() -> None:
    assert in_force([label("a", "first"), label("a", "second", "bob")])["a"].outcome == "second"
    assert in_force([label("a", "first"), label("a", "tie")])["a"].outcome == "tie"


def test_a_skip_takes_back_its_authors_own_label_only() -> None:
    assert in_force([label("a", "first"), label("a", "skip")]) == {}
    assert in_force([label("a", "first"), label("a", "skip", "bob")])["a"].author == "ann"
    twice = [label("a", "first"), label("a", "second", "bob"), label("a", "skip", "bob")]
    assert in_force(twice)["a"] == twice[0]
    assert in_force([label("a", "skip"), label("a", "second")])["a"].outcome == "second"


some_labels = st.lists(
    st.builds(
        label,
        st.sampled_from("ab"),
        st.sampled_from(["first", "second", "tie", "skip"]),
        st.sampled_from(["ann", "bob"]),
        st.integers(0, 3),
    ),
    max_size=8,
)


@given(some_labels)
def test_a_label_in_force_is_no_skip_and_its_author_said_nothing_since(labels: list[HumanLabel]) -> None:
    for pair, standing in in_force(labels).items():
        mine = [x for x in labels if x.pair_id == pair and x.author == standing.author]
        assert standing == mine[-1]
        assert standing.outcome != "skip"


# Which labels an update takes.


def test_what_joins_and_what_waits() -> None:
    given = {
        "old": label("old", iteration=0),
        "new": label("new", "second", iteration=1),
        "this": label("this", iteration=2),
        "tie": label("tie", "tie", iteration=1),
        "other_text": label("other_text", iteration=0),
        "joined": label("joined", iteration=1),
        "turned": label("turned", "second", iteration=1),
        "nowhere": label("nowhere", iteration=9),
    }
    given["other_text"] = given["other_text"].model_copy(update={"iteration": 3})
    texts = {0: "x", 1: "x", 2: "x", 3: "y"}
    joins, stale = joining(given, {"joined": ("first", "x"), "turned": ("first", "x")}, texts, 2, "x")
    assert [x.pair_id for x in joins] == ["old", "new", "turned"]
    assert stale == []
    joins, stale = joining(given, {"joined": ("first", "x"), "turned": ("first", "x")}, texts, 4, "x")
    assert [x.pair_id for x in joins] == ["old", "new", "turned", "this"]
    assert [x.pair_id for x in stale] == ["other_text"]


@given(some_labels, st.integers(0, 4))
def test_no_label_joins_twice(labels: list[HumanLabel], k: int) -> None:
    texts = dict.fromkeys(range(4), "x")
    joins, _ = joining(in_force(labels), {}, texts, k, "x")
    again, _ = joining(in_force(labels), {x.pair_id: (x.outcome, "x") for x in joins}, texts, k, "x")  # type: ignore[misc]
    assert again == []
    assert all(x.outcome in ("first", "second") and x.iteration < k for x in joins)


# Real processes.


def labeller(run: Path, author: str, torn_at: int | str = 0) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tests.review.labeller", str(run), author, str(torn_at)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_killed_reviewers_lose_no_label_and_double_none(tmp_path: Path) -> None:
    run = reviewed(tmp_path, prompts={"per_iteration": 10})
    sent = Queue(run).counts().sent
    assert sent >= 12
    acknowledged: list[str] = []
    # Twice half-way through a write, then at whatever the process is doing when its third label is told.
    for torn_at in (2, 3, 0, 0):
        process = labeller(run.path, "ann", torn_at)
        assert process.stdout is not None
        if torn_at:
            acknowledged += process.stdout.read().split()
        else:
            for line in process.stdout:
                acknowledged.append(line.strip())
                if len(acknowledged) % 3 == 0:
                    process.kill()
            process.kill()
        assert process.wait() == -signal.SIGKILL
        assert [x.pair_id for x in read_labels(run).labels][: len(acknowledged)] == acknowledged
        # One may be stored and not told: it was durable, and then the process died.
        if len(read_labels(run).labels) > len(acknowledged):
            acknowledged.append(read_labels(run).labels[-1].pair_id)
    last = labeller(run.path, "ann")
    out, _ = last.communicate()
    assert last.returncode == 0
    acknowledged += out.split()
    stored = [x.pair_id for x in read_labels(run).labels]
    assert stored == acknowledged
    assert len(stored) == len(set(stored)) == sent
    assert read_labels(run).problems == ()
    assert Queue(run).counts().waiting == 0


@pytest.mark.slow
def test_two_reviewers_at_once_get_different_pairs(tmp_path: Path) -> None:
    run = reviewed(tmp_path, iterations=2)
    sent = Queue(run).counts().sent
    processes = [labeller(run.path, author, "turns") for author in ("ann", "bob")]

    def step() -> list[str]:
        for p in processes:
            assert p.stdin is not None
            p.stdin.write("\n")
            p.stdin.flush()
        return [p.stdout.readline().strip() for p in processes if p.stdout is not None]

    told: list[list[str]] = []
    while not told or told[-1] != ["-", "-"]:
        told.append(step())
        assert step() == ["answered", "answered"]
    for p in processes:
        p.communicate()
    assert [p.returncode for p in processes] == [0, 0]
    shown = [pair for pairs in told for pair in pairs if pair != "-"]
    assert len(shown) == len(set(shown)) == sent > 4
    assert {x.pair_id: x.author for x in read_labels(run).labels} == {
        pair: author for pairs in told for pair, author in zip(pairs, ("ann", "bob"), strict=True) if pair != "-"
    }
