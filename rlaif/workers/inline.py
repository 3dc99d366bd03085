"""A worker in the caller's own process: what it is asked to do happens here."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Self

from rlaif.errors import UserError, WorkerError
from rlaif.workers.feed import Feed
from rlaif.workers.worker import Worker, built, one_line


class InlineWorker(Worker):
    """A `Worker` without a process. `env` is ignored: this process is already running."""

    def __init__(
        self,
        name: str,
        factory: str,
        kwargs: dict[str, Any],
        log_path: Path | None = None,
        env: Mapping[str, str] | None = None,
    ) -> None:
        self.name = name
        self.log_path = log_path
        self.made_from = (factory, kwargs)
        """What builds the object."""
        self.target: Any = None
        """The object that is called, once `ready` has built it."""
        self._closed = False

    def poll(self, timeout_s: float) -> bool:
        """As `ProcessWorker.poll`: building happens in `ready`."""
        return True

    def ready(self) -> None:
        """Builds the object, the first time."""
        if self.target is None:
            factory, kwargs = self.made_from
            with self._errors():
                self.target = built(factory, kwargs)

    def call(self, method: str, **kwargs: Any) -> Any:
        """As `ProcessWorker.call`."""
        self.ready()
        with self._errors():
            return getattr(self.target, method)(**kwargs)

    def stream(self, method: str, feed: Feed | None = None, **kwargs: Any) -> Iterator[Any]:
        """As `ProcessWorker.stream`."""
        self.ready()
        if feed is not None:
            kwargs["feed"] = feed
        try:
            with self._errors():
                items = iter(getattr(self.target, method)(**kwargs))
            while True:
                with self._errors():
                    try:
                        item = next(items)
                    except StopIteration:
                        return
                yield item
        finally:
            if feed is not None:
                feed.stop()

    def close(self) -> None:
        """As `ProcessWorker.close`."""
        if not self._closed and self.target is not None and hasattr(self.target, "close"):
            self.target.close()
        self._closed = True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except UserError:
            raise
        except Exception as e:
            raise WorkerError(f"{self.name} worker failed: {one_line(e)}") from e
