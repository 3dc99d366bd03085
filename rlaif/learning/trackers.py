"""The trackers that a job names (`learner.args.report_to`): transformers' own callbacks, none of which can stop a run.

In: their names, then whatever the trainer tells its callbacks. Out: `failed`, one sentence for each tracker that went
wrong. A tracker is a convenience: the run's own files hold everything that it is given.
"""

from __future__ import annotations

import re
import traceback
from collections.abc import Callable
from functools import partial
from typing import Any

from transformers.integrations import get_reporting_integration_callbacks

from rlaif.learning.trl_compat import TRACKER_ENDS

_TAKE_TEXT = frozenset({"tensorboard", "trackio", "wandb"})
"""Trackers whose callback passes on text among the numbers. The others warn about it, or drop it."""
_MOST_FAILURES = 3


class Tracker:
    """A tracker's callback, for a trainer: what it raises is written to the log and told once."""

    def __init__(self, name: str, make: Callable[[], Any]) -> None:
        self.name = name
        self.failed: str | None = None
        """What went wrong first."""
        self._failures = 0
        """In a row."""
        self._callback: Any = None
        self._callback = self._try("can't be opened", make)

    def __getattr__(self, event: str) -> Callable[..., Any]:
        if not event.startswith("on_"):
            raise AttributeError(event)
        return partial(self._tell, event)

    def _tell(self, event: str, *args: Any, **kwargs: Any) -> Any:
        """Passes one of the trainer's events on, and back what the callback wants of the trainer."""
        if self._callback is None or self._failures >= _MOST_FAILURES:
            return None
        if "logs" in kwargs and self.name not in _TAKE_TEXT:
            kwargs["logs"] = {name: value for name, value in kwargs["logs"].items() if not isinstance(value, str)}
        before = self._failures
        result = self._try(f"{event} failed", lambda: getattr(self._callback, event)(*args, **kwargs))
        if event == "on_log" and self._failures == before:
            self._failures = 0
        return result

    def end(self) -> None:
        """After `on_train_end`: sends what is still to be sent."""
        for attribute, method in TRACKER_ENDS:
            if (held := getattr(self._callback, attribute, None)) is not None:
                self._try(f"{method} failed", getattr(held, method))

    def _try(self, what: str, action: Callable[[], Any]) -> Any:
        try:
            return action()
        except (Exception, SystemExit) as e:  # a library that exits, at a missing key for one, ends no run either
            self._failures += 1
            if self.failed is None:
                traceback.print_exc()  # to the worker's log
                why = re.sub(r"//[^/@\s]+@", "//", " ".join(str(e).split()))[:300]  # an address can hold a password
                self.failed = (
                    f"tracker {self.name} {what} ({type(e).__name__}: {why}); the run goes on without it, or with gaps "
                    "in it. What it would have got is in the run directory"
                )
            return None


def open_trackers(names: list[str]) -> list[Tracker]:
    """The trackers of these names.

    Raises:
        ValueError: transformers knows none of that name.
    """
    names = list(dict.fromkeys(names))
    return [Tracker(name, make) for name, make in zip(names, get_reporting_integration_callbacks(names), strict=True)]
