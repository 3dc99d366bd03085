"""`rlaif review RUN`: pairs that the judge is unsure of, one at a time, and a person's word on each."""

from __future__ import annotations

import getpass
import json
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from rlaif.console import stdout_console, visible
from rlaif.errors import RlaifError, UserError
from rlaif.store import RunDir

if TYPE_CHECKING:
    from rich.console import Console

    from rlaif.review.queue import Counts, Question, Queue, Shown

KEYS = "1 or 2 the better one, t tie, s skip, r reason, u correct the last, c whole text of the rules, q quit"
_ENTER = ("\r", "\n")


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

    queue = Queue(RunDir.open(run))
    if json_:
        counts = queue.counts()
        print(json.dumps({"run": str(run), **counts.model_dump(), "problems": queue.problems}))
        return
    reviewer = _Reviewer(queue, author or _user())
    for problem in queue.problems:
        print(f"rlaif: {problem}", file=sys.stderr)
    with reviewer.session():
        reviewer.work()


class _Reviewer:
    """One person at a terminal, or a pipe of lines."""

    def __init__(self, queue: Queue, author: str):
        self._queue, self._author = queue, author
        self._session = f"{socket.gethostname()}:{os.getpid()}"
        self._console: Console = stdout_console()
        self._last: str | None = None
        self._skipped: set[str] = set()
        self._given: set[str] = set()
        self._counts = queue.counts()

    @contextmanager
    def session(self) -> Iterator[None]:
        """Whatever ends it, the pair on the screen is given back to the queue."""
        try:
            yield
        finally:
            with suppress(RlaifError):
                self._queue.release(self._author, self._session)

    def work(self) -> None:
        """Asks until nobody answers, or nothing waits."""
        if not self._counts.sent:
            self._say("no pair was sent to review; filters.review in the job says which are (docs/review.md)")
            return
        while (question := self._queue.next(self._author, self._session)) is not None:
            if question.pair_id in self._skipped:
                self._say("only pairs that you skipped are left")
                break
            if not self._ask(question):
                break
        self._counts = self._queue.counts()
        others = f", {self._counts.claimed} of them shown to others" if self._counts.claimed and not question else ""
        self._say(
            f"{len(self._given)} labelled by {visible(self._author)} now; {self._counts.labelled} in all, "
            f"{self._counts.waiting} waiting{others}"
        )

    def _ask(self, question: Question, correcting: bool = False) -> bool:
        """One pair, until it is answered; False when the reviewer leaves."""
        self._show(question, correcting)
        reason: str | None = None
        while True:
            key, rest = self._key()
            if key == "q":
                return False
            if key == "r":
                reason = rest or self._line("reason: ")
            elif key == "c":
                self._text(question.constitution_source)
            elif key == "u" and self._last and not correcting:
                if not self._ask(self._queue.question(self._last, self._author), correcting=True):
                    return False
                self._show(question)
            elif key in ("1", "2", "t", "s"):
                self._answer(question.pair_id, cast("Shown", key), rest or reason)
                return True
            elif key:
                print(f"{visible(key)!r} is no key: {KEYS}", file=sys.stderr)

    def _answer(self, pair_id: str, key: Shown, reason: str | None) -> None:
        self._queue.answer(pair_id, key, self._author, reason)
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

        counts: Counts = self._queue.counts()
        text = question.constitution
        what = "correct your label (s takes it back)" if correcting else f"{counts.waiting} waiting"
        self._console.print(Rule(Text(f"{what}, {counts.labelled} labelled"), align="left"))
        self._say(f"rules: {text.ref}, {visible(text.summary)}")
        for principle in text.principles:
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

    def _key(self) -> tuple[str, str]:
        """A key, and from a pipe what stands after it; `q` at the end of the input."""
        if sys.stdin.isatty():
            try:
                key = typer.getchar()
            except EOFError:
                return "q", ""
            return ("", "") if key in _ENTER else (key.lower(), "")
        line = sys.stdin.readline()
        key, _, rest = line.strip().partition(" ")
        return (key.lower(), rest.strip()) if line else ("q", "")

    def _line(self, prompt: str) -> str:
        if sys.stdin.isatty():
            print(prompt, end="", file=sys.stderr, flush=True)
        return sys.stdin.readline().strip()


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError) as e:
        raise UserError("who labels? This machine doesn't say; give --author NAME") from e
