"""What every page of `rlaif view` needs: the run, its index as it is now, and a page made of a template."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Annotated, Any, Protocol

from fastapi import Depends, Request
from fastapi.responses import HTMLResponse

from rlaif.audit.index import Index
from rlaif.errors import RlaifError
from rlaif.review.queue import Queue
from rlaif.rundir.store import RunDir
from rlaif.view.html import render

REFRESH_MS = 3000
TABS = (
    ("overview", "/", "Overview"),
    ("answers", "/answers", "Answers"),
    ("pairs", "/pairs", "Decisions"),
    ("constitutions", "/constitutions", "Constitutions"),
    ("review", "/review", "Review"),
)
"""Of a run's pages: a page's name, its address after `Site.base`, what people read."""


@dataclass
class Site:
    """One run, shown in a browser."""

    run: RunDir
    queue: Queue
    _index: Index
    base: str = ""
    """What the addresses of its pages begin with, where it is one of several runs."""
    folder: str = ""
    """The folder of runs that it is shown in."""
    secret: bytes = field(default_factory=lambda: secrets.token_bytes(32), repr=False)
    """Of this process: what a form's token follows from."""

    def of(self, run: str | None) -> Site:
        """Itself, where it is the only one."""
        return self

    @contextmanager
    def fresh(self) -> Iterator[Index]:
        """The index with what the run wrote since; a page's questions see one state of it."""
        self._index.refresh()
        with self._index.session():
            yield self._index

    def page(self, template: str, code: int = 200, **values: Any) -> HTMLResponse:
        """A template with these values, and what the frame around each page shows."""
        frame = {"run_name": self.name, "folder": self.folder, "base": self.base, "tabs": TABS}
        return as_page(template, code, waiting=self._waiting(), every_ms=REFRESH_MS, **frame, **values)

    def error(self, code: int, message: str) -> HTMLResponse:
        """The page that says what went wrong."""
        return self.page("error.html", code, page="", heading=HTTPStatus(code).phrase, message=message)

    @property
    def name(self) -> str:
        """The run's."""
        return self.run.path.resolve().name

    def _waiting(self) -> int:
        """Pairs that wait for a person, for the page's tab."""
        try:
            return self.queue.waiting()
        except (RlaifError, OSError):
            return 0


def as_page(template: str, code: int, **values: Any) -> HTMLResponse:
    """A template as an answer."""
    # A lone surrogate in a candidate's text can't be sent as it is.
    return HTMLResponse(render(template, **values).encode("utf-8", "replace"), code)


class Home(Protocol):
    """What an application shows: one run, or a folder of them."""

    def of(self, run: str | None) -> Site:
        """The pages of the run that an address names."""
        ...

    def error(self, code: int, message: str) -> HTMLResponse:
        """The page that says what went wrong."""
        ...


def _site_of(request: Request) -> Site:
    home: Home = request.app.state.home
    return home.of(request.path_params.get("run"))


SiteOf = Annotated[Site, Depends(_site_of)]
"""A handler's parameter of this type is the site that was asked."""
