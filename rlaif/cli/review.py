"""`rlaif review RUN`: pairs that the judge is unsure of, one at a time, and a person's word on each."""

from __future__ import annotations

import getpass
import json
import os
import select
import socket
import sys
import termios
import tty
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from rlaif.console import stdout_console, visible
from rlaif.errors import RlaifError, UserError

if TYPE_CHECKING:
    from rich.console import Console

    from rlaif.review.queue import Counts, Question, Queue, Shown

KEYS = "1 or 2 the better one, t tie, s skip, r reason, u correct the last, c whole text of the rules, q quit"


def review(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run directory, for example runs/quickstart.")],
    author: Annotated[str | None, typer.Option(help="Who labels; your user name by default.")] = None,
    json_: Annotated[
        bool, typer.Option("--json", help="Print where the queue stands, as JSON for programs, and ask nothing.")
    ] = False,
) -> None:
    """Label the pairs that wait for a person (filters.review), one at a time.

    You see the prompt, two answers in a random order and the rules; never what the judge said. A key labels the pair,
    and the next one is shown. Each label is stored at once and trains in the run's next iteration. Lines of keys can
    be piped in; what stands after a key is its reason.
    """
    from rlaif.review.queue import Queue
    from rlaif.rundir.store import RunDir

    queue = Queue(RunDir.open(run))
    if json_:
        counts = queue.counts()
        print(json.dumps({"run": str(run), **counts.model_dump(), "problems": queue.problems}))
        return
    reviewer = _Reviewer(queue, author or _user(), _Terminal() if sys.stdin.isatty() else _Pipe())
    reviewer.work()


class _Reviewer:
    """One person, and what they were shown and said since they started."""

    def __init__(self, queue: Queue, author: str, keys: _Pipe | _Terminal):
        self._queue, self._author, self._keys = queue, author, keys
        self._session = f"{socket.gethostname()}:{os.getpid()}"
        self._console: Console = stdout_console()
        self._last: str | None = None
        self._skipped: set[str] = set()
        self._given: set[str] = set()
        self._told: set[str] = set()
        self._counts = queue.counts()

    def work(self) -> None:
        """Asks until nobody answers, or nothing waits. Whatever ends it, the pair on the screen is given back."""
        self._tell()
        if not self._counts.sent:
            self._say("no pair was sent to review; filters.review in the job says which are (docs/review.md)")
            return
        try:
            with self._keys.mode() if isinstance(self._keys, _Terminal) else nullcontext():
                all_seen = self._ask_all()
        finally:
            with suppress(RlaifError):
                self._queue.release(self._author, self._session)
        self._counts = self._queue.counts()
        others = f", {self._counts.claimed} of them shown to others" if all_seen and self._counts.claimed else ""
        stale = f"; {self._counts.stale} labels are of another text" if self._counts.stale else ""
        self._say(
            f"{len(self._given)} labelled by {visible(self._author)} now; {self._counts.labelled} in all, "
            f"{self._counts.waiting} waiting{others}{stale}"
        )

    def _ask_all(self) -> bool:
        """Pair after pair; True when none is left for this reviewer, False when they leave."""
        while (question := self._next()) is not None:
            if question.pair_id in self._skipped:
                self._say("only pairs that you skipped are left")
                return True
            if not self._ask(question):
                return False
        return True

    def _next(self) -> Question | None:
        question = self._queue.next(self._author, self._session)
        self._tell()
        return question

    def _tell(self) -> None:
        """Says what couldn't be read, each thing once."""
        for problem in self._queue.problems:
            if problem not in self._told:
                self._told.add(problem)
                print(f"rlaif: {problem}", file=sys.stderr)

    def _ask(self, question: Question, correcting: bool = False) -> bool:
        """One pair, until it is answered; False when the reviewer leaves."""
        self._show(question, correcting)
        reason: str | None = None
        while True:
            key, rest = self._keys.key()
            if key == "q":
                return False
            if key == "r":
                reason = rest or self._keys.line("reason: ")
            elif key == "c":
                self._text(question.constitution_source)
            elif key == "u" and self._last and not correcting:
                if not self._ask(self._queue.question(self._last, self._author), correcting=True):
                    return False
                self._show(question)
            elif key in ("1", "2", "t", "s"):
                self._answer(question, cast("Shown", key), rest or reason)
                return True
            elif key:
                print(f"{visible(key)!r} is no key: {KEYS}", file=sys.stderr)

    def _answer(self, question: Question, key: Shown, reason: str | None) -> None:
        pair_id = question.pair_id
        self._queue.answer(pair_id, key, self._author, reason, constitution=question.constitution.hash)
        self._say({"1": "→ the first shown", "2": "→ the second shown", "t": "→ tie", "s": "→ skipped"}[key])
        if key == "s":
            self._skipped.add(pair_id)
            self._given.discard(pair_id)
        else:
            self._given.add(pair_id)
        self._last = pair_id

    def _show(self, question: Question, correcting: bool = False) -> None:
        from rich.rule import Rule
        from rich.text import Text

        self._keys.fresh()
        counts: Counts = self._queue.counts()
        constitution = question.constitution
        what = "correct your label (s takes it back)" if correcting else f"{counts.waiting} waiting"
        self._console.print(Rule(Text(f"{what}, {counts.labelled} labelled"), align="left"))
        if question.again and not correcting:
            self._say("you labelled this pair under another text: what do you say under this one?")
        self._say(f"rules: {constitution.ref}, {visible(constitution.summary)}")
        for principle in constitution.principles:
            self._text(f"- {principle.rule}")
        self._say("prompt")
        for message in question.messages:
            self._text(message.content if message.role == "user" else f"({message.role}) {message.content}")
        for name, answer, cut_off in zip(("1", "2"), question.shown, question.cut_off, strict=True):
            self._say(f"answer {name}{' (cut off by the length limit)' if cut_off else ''}")
            self._text(answer)
        self._say(KEYS)

    def _say(self, line: str) -> None:
        from rich.text import Text

        self._console.print(Text(line, style="bold" if not line.startswith("→") else ""))

    def _text(self, text: str) -> None:
        from rich.padding import Padding
        from rich.text import Text

        self._console.print(Padding(Text(visible(text)), (0, 0, 0, 2), expand=False))


class _Pipe:
    """Keys as lines; what stands after a key is its reason."""

    def fresh(self) -> None:
        """Nothing to do: a line is for the pair that it comes to."""

    def key(self) -> tuple[str, str]:
        """A key and what stands after it; `q` at the end of the input."""
        line = sys.stdin.readline()
        key, _, rest = line.strip().partition(" ")
        return (key.lower(), rest.strip()) if line else ("q", "")

    def line(self, prompt: str) -> str:
        return sys.stdin.readline().strip()


class _Terminal:
    """Single keys, without Enter. The mode lasts between keys, so that none is lost; Ctrl-C stays what it is."""

    def __init__(self) -> None:
        self._fd = sys.stdin.fileno()
        self._before = termios.tcgetattr(self._fd)

    @contextmanager
    def mode(self) -> Iterator[None]:
        """Keys come one by one while this lasts."""
        tty.setcbreak(self._fd, termios.TCSADRAIN)
        try:
            yield
        finally:
            termios.tcsetattr(self._fd, termios.TCSADRAIN, self._before)

    def fresh(self) -> None:
        """Forgets keys that were pressed before a pair was shown: they can't be about it."""
        termios.tcflush(self._fd, termios.TCIFLUSH)

    def key(self) -> tuple[str, str]:
        """A key; `q` for Ctrl-D, or when the terminal is gone."""
        key = os.read(self._fd, 1)
        if key == b"\x1b" and select.select([self._fd], [], [], 0)[0]:
            key += os.read(self._fd, 16)  # an arrow or the like comes as one sequence, and is one key
        return ("q" if key in (b"", b"\x04") else key.decode(errors="replace").strip().lower()), ""

    def line(self, prompt: str) -> str:
        """A line, typed as lines are."""
        print(prompt, end="", file=sys.stderr, flush=True)
        termios.tcsetattr(self._fd, termios.TCSADRAIN, self._before)
        typed = b""
        try:
            while not typed.endswith(b"\n") and (more := os.read(self._fd, 1)):
                typed += more
            return typed.decode(errors="replace").strip()
        finally:
            tty.setcbreak(self._fd, termios.TCSADRAIN)


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError) as e:
        raise UserError("who labels? This machine doesn't say; give --author NAME") from e
