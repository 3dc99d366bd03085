"""`rlaif review`: the same queue at a terminal, from a pipe, and for programs."""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rlaif.console import visible
from rlaif.records import Completion
from rlaif.review.labels import labels_path, read_labels
from rlaif.review.queue import Queue
from rlaif.rundir.store import RunDir
from tests.review.runs import reviewed
from tests.test_cli import rlaif  # noqa: F401  a fixture

ROOT = Path(__file__).resolve().parent.parent.parent
PATIENCE_S = 120.0

pytestmark = pytest.mark.slow


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return reviewed(tmp_path, iterations=2)


def piped(run: RunDir, keys: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "rlaif", "review", str(run.path), *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, input=keys, capture_output=True, text=True, check=False, env=environment)


def test_labels_from_a_pipe(run: RunDir) -> None:
    expected = [Queue(run).next("ann", f"{n}") for n in range(3)]
    for n in range(3):
        Queue(run).release("ann", f"{n}")
    done = piped(run, "1\n2 it is shorter\nx\nr\nboth are wrong\nt\n", "--author", "ann")
    assert done.returncode == 0, done.stderr
    labels = read_labels(run).labels
    assert [x.pair_id for x in labels] == [q.pair_id for q in expected if q]
    assert [x.reason for x in labels] == [None, "it is shorter", "both are wrong"]
    assert labels[0].outcome in ("first", "second")
    assert labels[2].outcome == "tie"
    assert {x.author for x in labels} == {"ann"}
    assert "'x' is no key: 1 or 2 the better one" in done.stderr
    last = done.stdout.splitlines()[-1]
    assert last == f"3 labelled by ann now; 3 in all, {Queue(run).counts().waiting} waiting"
    assert Queue(run).counts().claimed == 0


def test_the_screen_has_prompt_answers_and_rules_and_no_verdict(run: RunDir) -> None:
    question = Queue(run).next("ann")
    assert question
    Queue(run).release("ann")
    out = piped(run, "c\nq\n", "--author", "ann").stdout
    for shown in (*question.shown, question.messages[-1].content, "Rule 1.", "summary: Text 1."):
        assert shown in out
    assert out.index(question.shown[0]) < out.index(question.shown[1])
    assert not [word for word in ("judge", "agreement", "p(first)", "verdict", "uncertain") if word in out]
    assert not labels_path(run).exists()


def test_u_corrects_the_last_label_and_s_takes_it_back(run: RunDir) -> None:
    assert piped(run, "u\n1\nu\n2\nq\n", "--author", "ann").returncode == 0
    first, second = read_labels(run).labels
    assert first.pair_id == second.pair_id
    assert {first.outcome, second.outcome} == {"first", "second"}
    assert Queue(run).counts().labelled == 1
    before = Queue(run).counts().waiting
    done = piped(run, "t\nu\ns\nq\n", "--author", "ann")
    assert "correct your label (s takes it back)" in done.stdout
    assert Queue(run).counts().waiting == before
    assert [x.outcome for x in read_labels(run).labels][2:] == ["tie", "skip"]


def test_skipping_everything_ends(run: RunDir) -> None:
    sent = Queue(run).counts().sent
    done = piped(run, "s\n" * (sent + 5), "--author", "ann")
    assert done.returncode == 0
    assert "only pairs that you skipped are left" in done.stdout
    assert [x.outcome for x in read_labels(run).labels] == ["skip"] * sent


def test_labelling_everything_ends(run: RunDir) -> None:
    sent = Queue(run).counts().sent
    done = piped(run, "1\n" * (sent + 5), "--author", "ann")
    assert done.stdout.splitlines()[-1] == f"{sent} labelled by ann now; {sent} in all, 0 waiting"


def test_what_others_look_at_is_said(run: RunDir) -> None:
    sent = Queue(run).counts().sent
    Queue(run).next("bob")
    done = piped(run, "1\n" * sent, "--author", "ann")
    assert done.stdout.splitlines()[-1].endswith(f"{sent - 1} in all, 1 waiting, 1 of them shown to others")


def test_json_for_programs(rlaif, run: RunDir) -> None:  # noqa: F811
    before = sorted(run.path.rglob("*"))
    code, out, err = rlaif("review", str(run.path), "--json")
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert found == {"run": str(run.path), **Queue(run).counts().model_dump(), "problems": []}
    assert found["waiting"] == found["sent"] > 0
    assert sorted(run.path.rglob("*")) == before


def test_status_says_how_many_wait(rlaif, run: RunDir) -> None:  # noqa: F811
    waiting = Queue(run).counts().waiting
    assert f"{waiting} pairs wait for a person: rlaif review {run.path}" in rlaif("status", str(run.path))[1]
    assert json.loads(rlaif("status", str(run.path), "--json")[1])["waiting_for_review"] == waiting


def test_a_run_that_asks_nothing_says_which_setting_does(tmp_path: Path) -> None:
    plain = reviewed(tmp_path, iterations=1, filters={"min_kept_pairs": 1})
    done = piped(plain, "", "--author", "ann")
    assert done.returncode == 0
    assert "filters.review" in done.stdout
    assert len(done.stdout.splitlines()) == 1


def test_no_run_and_damaged_labels_are_one_line(rlaif, run: RunDir, tmp_path: Path) -> None:  # noqa: F811
    code, _, err = rlaif("review", str(tmp_path / "nowhere"))
    assert code == 2
    assert err.splitlines() == [
        f"rlaif: {tmp_path}/nowhere: no such run; `rlaif runs` lists those in runs/, `rlaif run JOB` makes one"
    ]
    labels_path(run).parent.mkdir()
    labels_path(run).write_text("{}\n")
    done = piped(run, "1\n", "--author", "ann")
    assert done.returncode == 0
    assert done.stderr.startswith(f"rlaif: {labels_path(run)}:1: not a label")
    assert len(read_labels(run).labels) == 1


def test_a_candidate_cant_steer_the_terminal(tmp_path: Path) -> None:
    run = reviewed(tmp_path, iterations=1)
    question = Queue(run).next("ann")
    assert question
    k = question.iteration
    path = run.iteration(k).path / "completions.jsonl"
    rows = run.iteration(k).read("completions", Completion)
    nasty = "\x1b[2J\x1b]0;title\x07[bold]:smile:[/] \u202eturned\r\nline two\ttab"
    path.write_text("".join(c.model_copy(update={"text": nasty}).model_dump_json() + "\n" for c in rows))
    out = piped(run, "q\n", "--author", "ann").stdout
    assert not {"\x1b", "\x07", "\u202e", "\r"} & set(out)
    assert "[bold]:smile:[/]" in out
    assert "line two" in out


def test_what_is_visible() -> None:
    assert visible("a\tb\nc\r\nd é 👩‍🚀") == "a\tb\nc\nd é 👩‍🚀"
    assert (
        visible("\x1b[31m\x9b\x00") == "\N{REPLACEMENT CHARACTER}[31m\N{REPLACEMENT CHARACTER}\N{REPLACEMENT CHARACTER}"
    )


# A real terminal.


class Terminal:
    """`rlaif review` on a pty."""

    def __init__(self, run: RunDir, author: str):
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            os.environ["PYTHONPATH"] = str(ROOT)
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # who runs the tests in the background ignores it
            os.execv(sys.executable, [sys.executable, "-m", "rlaif", "review", str(run.path), "--author", author])
        self.text = ""

    def expect(self, what: str) -> None:
        """Reads until this was shown since the last call."""
        deadline = time.monotonic() + PATIENCE_S
        while what not in self.text:
            assert time.monotonic() < deadline, self.text
            if select.select([self.fd], [], [], 0.5)[0]:
                try:
                    self.text += os.read(self.fd, 65536).decode(errors="replace")
                except OSError:
                    assert what in self.text, self.text
                    break
        self.text = self.text.partition(what)[2]

    def press(self, keys: str) -> None:
        os.write(self.fd, keys.encode())

    def exit_code(self) -> int:
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


def test_one_key_is_enough_on_a_terminal(run: RunDir) -> None:
    terminal = Terminal(run, "ann")
    terminal.expect("q quit")
    terminal.press("r")
    terminal.expect("reason: ")
    terminal.press("clearer\n")
    terminal.press("1")
    terminal.expect("the first shown")
    terminal.expect("q quit")
    terminal.press("\x1b[A")  # an arrow
    terminal.expect("is no key")
    terminal.press("u")
    terminal.expect("correct your label")
    terminal.expect("q quit")
    terminal.press("2")
    terminal.expect("the second shown")
    terminal.expect("q quit")
    terminal.press("q")
    terminal.expect("1 labelled by ann now")
    assert terminal.exit_code() == 0
    first, second = read_labels(run).labels
    assert (first.pair_id, first.reason, second.reason) == (second.pair_id, "clearer", None)
    assert first.outcome != second.outcome


def test_ctrl_c_gives_the_pair_back(run: RunDir) -> None:
    terminal = Terminal(run, "ann")
    terminal.expect("q quit")
    assert Queue(run).counts().claimed == 1
    terminal.press("\x03")
    assert terminal.exit_code() == 130
    assert Queue(run).counts().claimed == 0


def test_what_cannot_be_shown_is_said_once_and_the_rest_is_asked(rlaif, run: RunDir) -> None:  # noqa: F811
    question = Queue(run).next("ann")
    assert question is not None
    Queue(run).release("ann")
    path = run.iteration(question.iteration).path / "completions.jsonl"
    path.unlink()
    (run.iteration(0).path / "updates.meta.json").write_text("{}")
    done = piped(run, "1\n1\n", "--author", "ann")
    assert done.returncode == 0, done.stderr
    assert len(read_labels(run).labels) == 2
    assert {x.iteration for x in read_labels(run).labels} == {0}
    assert len(done.stderr.splitlines()) == 2
    assert f"rlaif: {path}: No such file or directory; its pair is left out" in done.stderr.splitlines()
    code, out, _ = rlaif("review", str(run.path), "--json")
    assert code == 0
    assert "updates.meta.json: not the meta file of a stage" in json.loads(out)["problems"][0]
