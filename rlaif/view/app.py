"""`rlaif view` as a web application: server-rendered, read-only but for the review, nothing fetched from anywhere else.

Candidates' text is the least trusted thing in a run. It is escaped by every template; should a template fail, the
Content-Security-Policy still runs no script but our own file.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from ipaddress import ip_address
from pathlib import Path

from fastapi import FastAPI, Request
from fastapi.responses import Response
from starlette.exceptions import HTTPException

from rlaif.audit.index import Index
from rlaif.errors import RlaifError, UserError
from rlaif.review.queue import Queue
from rlaif.rundir.store import RunDir
from rlaif.view import folder, pages, reviewing
from rlaif.view.folder import Folder
from rlaif.view.site import Home, Site

HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}
_log = logging.getLogger(__name__)


def is_loopback(host: str) -> bool:
    """Whether a host name or address is this machine's own."""
    try:
        return ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def make_app(run: RunDir, index: Index, host: str = "127.0.0.1") -> FastAPI:
    """The pages of one run.

    Args:
        host: where it will listen. On loopback, requests that name another host are refused: a page elsewhere could
            point its own name at this machine and read what we say.
    """
    app = _app(Site(run, Queue(run), index), host)
    for router in (pages.router, reviewing.router):
        app.include_router(router)
    return app


def make_folder_app(path: Path, host: str = "127.0.0.1") -> FastAPI:
    """The pages of a folder of runs, and under `/runs/NAME` those of each run; `host` as above."""
    app = _app(Folder(path), host)
    app.include_router(folder.router)
    for router in (pages.router, reviewing.router):
        app.include_router(router, prefix="/runs/{run}")
    return app


def _app(home: Home, host: str) -> FastAPI:
    # No generated API pages: they fetch their scripts from elsewhere.
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None)
    app.state.home = home
    _guard(app, home, host)
    _tell_errors(app, home)
    app.include_router(pages.files)
    return app


def _guard(app: FastAPI, home: Home, host: str) -> None:
    """Around every answer, an error's too: which names are answered to, and the headers."""

    @app.middleware("http")
    async def guard(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
        asked = request.url.hostname or ""
        if is_loopback(host) and not is_loopback(asked):
            response: Response = home.error(400, f"this server is on loopback and doesn't answer to the name {asked!r}")
        else:
            try:
                response = await call_next(request)
            except Exception:  # a fault of ours: the reader gets a page, the terminal the traceback
                _log.exception("%s", request.url.path)
                response = home.error(500, "this page failed; the terminal that runs `rlaif view` says why")
        response.headers.update(HEADERS)
        return response


def _tell_errors(app: FastAPI, home: Home) -> None:
    """What is raised on the way to a page becomes a page that says it."""

    @app.exception_handler(HTTPException)
    def http_error(request: Request, e: HTTPException) -> Response:
        return home.error(e.status_code, str(e.detail))

    @app.exception_handler(RlaifError)
    def our_error(request: Request, e: RlaifError) -> Response:
        return home.error(404 if isinstance(e, UserError) else 500, str(e))

    @app.exception_handler(OSError)
    def file_error(request: Request, e: OSError) -> Response:
        _log.error("%s: %s", request.url.path, e)
        return home.error(500, f"{e.filename or 'a file of the run'}: {e.strerror or e}")
