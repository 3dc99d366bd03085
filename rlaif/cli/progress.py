"""Where the loop says what it is doing: a live line on a terminal, plain lines when piped. On stderr."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

from rlaif import loop
from rlaif.cli.beat import HEARTBEAT_S, heartbeat
from rlaif.console import inert
from rlaif.records import IterationMetrics


@contextmanager
def make_progress(iterations: int) -> Iterator[loop.Progress]:
    """The progress that fits stderr: live when it is a terminal."""
    console = Console(stderr=True, highlight=False)
    if not console.is_terminal:
        plain = PlainProgress(console, iterations, HEARTBEAT_S)
        with heartbeat(plain.beat, HEARTBEAT_S / 4):
            yield plain
        return
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bars:
        yield LiveProgress(bars, iterations)


class PlainProgress:
    """One line a stage and one an iteration, for logs; and one whenever nothing was said for a while."""

    def __init__(self, console: Console, iterations: int, silence_s: float = HEARTBEAT_S):
        self._console, self._iterations, self._silence_s = console, iterations, silence_s
        self._stage: tuple[str, int, str, int] | None = None
        self._done, self._started = 0, time.monotonic()
        self._said, self._note = time.monotonic(), "starting"
        self._lock = threading.RLock()  # `beat` comes from another thread

    def stage(self, iteration: int, name: str, total: int, unit: str, text: str) -> None:
        with self._lock:
            self._close_stage()
            self._stage, self._done, self._started = (name, total, unit, iteration), 0, time.monotonic()

    def advance(self, n: int) -> None:
        self._done += n

    def beat(self) -> None:
        """Says how far the stage is, or what was said last, when that is a while ago."""
        with self._lock:
            now = time.monotonic()
            if now - self._said < self._silence_s:
                return
            if self._stage is None:
                self._line(f"… {now - self._started:.0f} s since: {self._note}")
                return
            name, total, unit, iteration = self._stage
            where = f"iteration {iteration + 1}/{self._iterations}"
            self._line(f"{where}  {name}: {self._done} of {total} {unit}, {now - self._started:.0f} s")

    def _close_stage(self) -> None:
        if self._stage is None:
            return
        name, total, unit, iteration = self._stage
        seconds = time.monotonic() - self._started
        where = f"iteration {iteration + 1}/{self._iterations}"
        self._line(f"{where}  {name}: {self._done}/{total} {unit} in {seconds:.1f} s")
        self._stage = None

    def iteration_done(self, iteration: int, metrics: IterationMetrics) -> None:
        with self._lock:
            self._close_stage()
            self._tell(iteration_line(iteration, self._iterations, metrics))

    def note(self, message: str) -> None:
        with self._lock:
            self._close_stage()
            self._tell(message)

    def _tell(self, text: str) -> None:
        self._note, self._started = text, time.monotonic()
        self._line(text)

    def _line(self, text: str) -> None:
        self._said = time.monotonic()
        self._console.print(inert(text), soft_wrap=True)  # a log's line is never broken


class LiveProgress:
    """A bar for the stage at work, and a line above it for each finished iteration."""

    def __init__(self, bars: Progress, iterations: int):
        self._bars, self._iterations = bars, iterations
        self._task = bars.add_task("starting", total=None, rate="")
        self._kept = ""
        self._unit, self._done, self._started = "", 0, time.monotonic()

    def stage(self, iteration: int, name: str, total: int, unit: str, text: str) -> None:
        self._unit, self._done, self._started = unit, 0, time.monotonic()
        description = f"iteration {iteration + 1}/{self._iterations}  {name}  [dim]{inert(text)} {self._kept}[/]"
        self._bars.reset(self._task, total=total, description=description, rate="")

    def advance(self, n: int) -> None:
        self._done += n
        rate = self._done / max(time.monotonic() - self._started, 1e-6)
        self._bars.update(self._task, advance=n, rate=f"{rate:.1f} {self._unit}/s")

    def iteration_done(self, iteration: int, metrics: IterationMetrics) -> None:
        self._kept = f"kept {metrics.kept}/{metrics.pairs}"
        self._bars.console.print(inert(iteration_line(iteration, self._iterations, metrics)))

    def note(self, message: str) -> None:
        self._bars.console.print(inert(message))


def iteration_line(iteration: int, iterations: int, metrics: IterationMetrics) -> str:
    """One finished iteration in one line."""
    sampled = metrics.sampled
    dropped = ", ".join(f"{r} {n}" for r, n in sorted(metrics.dropped_by_first_reason.items()))
    review = f", {metrics.review} to review" if metrics.review else ""
    loss = "no update" if metrics.loss is None else f"loss {metrics.loss:.3f}"
    return (
        f"iteration {iteration + 1}/{iterations} done  {metrics.constitution}  "
        f"kept {metrics.kept}/{metrics.pairs}{f' (dropped: {dropped})' if dropped else ''}{review}  {loss}  "
        f"sampled {sampled.mean_words:.0f} words, {sampled.ended_share:.0%} ended  "
        f"{metrics.wall_s or sum(metrics.seconds.values()):.0f} s"
    )
