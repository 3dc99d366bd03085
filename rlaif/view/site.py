"""What every page of `rlaif view` needs: the run, its index as it is now, and a page made of a template."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Annotated, Any

from fastapi import Depends, Request
from fastapi.responses import HTMLResponse

from rlaif.audit.index import Index
from rlaif.errors import RlaifError
from rlaif.review.queue import Queue
from rlaif.rundir.store import RunDir
from rlaif.view.html import render

REFRESH_MS = 3000


@dataclass
class Site:
    """One run, shown in a browser."""

    run: RunDir
    queue: Queue
    _index: Index
    secret: bytes = field(default_factory=lambda: secrets.token_bytes(32), repr=False)
    """Of this process: what a form's token follows from."""

    @contextmanager
    def fresh(self) -> Iterator[Index]:
        """The index with what the run wrote since; a page's questions see one state of it."""
        self._index.refresh()
        with self._index.session():
            yield self._index

    def page(self, template: str, code: int = 200, **values: Any) -> HTMLResponse:
        """A template with these values, and what the frame around each page shows."""
        name = self.run.path.resolve().name
        html = render(template, run_name=name, every_ms=REFRESH_MS, waiting=self._waiting(), **values)
        # A lone surrogate in a candidate's text can't be sent as it is.
        return HTMLResponse(html.encode("utf-8", "replace"), code)

    def error(self, code: int, message: str) -> HTMLResponse:
        """The page that says what went wrong."""
        return self.page("error.html", code, page="", heading=HTTPStatus(code).phrase, message=message)

    def _waiting(self) -> int:
        """Pairs that wait for a person, for the page's tab."""
        try:
            return self.queue.waiting()
        except (RlaifError, OSError):
            return 0


async def _site_of(request: Request) -> Site:
    site: Site = request.app.state.site
    return site


SiteOf = Annotated[Site, Depends(_site_of)]
"""A handler's parameter of this type is the site that was asked."""
