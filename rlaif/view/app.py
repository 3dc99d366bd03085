"""The pages of `rlaif view`: server-rendered, read-only but for the review, nothing fetched from anywhere else.

Candidates' text is the least trusted thing in a run. It is escaped by every template; should a template fail, the
Content-Security-Policy still runs no script but our own file.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from http import HTTPStatus
from ipaddress import ip_address
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response
from starlette.exceptions import HTTPException

from rlaif.errors import RlaifError, UserError
from rlaif.store import RunDir
from rlaif.summary import status_values
from rlaif.view.facts import Losses, read_numbers, totals, version_of
from rlaif.view.pictures import pictures
from rlaif.view.rendering import HERE, render

REFRESH_MS = 3000
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
STATIC = {"style.css": "text/css", "page.js": "text/javascript", "icon.svg": "image/svg+xml"}


def is_loopback(host: str) -> bool:
    """Whether a host name or address is this machine's own."""
    try:
        return ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def make_app(run: RunDir, host: str = "127.0.0.1") -> FastAPI:
    """The pages of one run.

    Args:
        host: where it will listen. On loopback, requests that name another host are refused: a page elsewhere could
            point its own name at this machine and read what we say.
    """
    # No generated API pages: they fetch their scripts from elsewhere.
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None)
    name = run.path.resolve().name
    losses = Losses(run)

    def page(template: str, code: int = 200, **values: Any) -> HTMLResponse:
        html = render(template, run_name=name, every_ms=REFRESH_MS, **values)
        # A lone surrogate in a candidate's text can't be sent as it is.
        return HTMLResponse(html.encode("utf-8", "replace"), code)

    def error(status: int, message: str) -> HTMLResponse:
        return page("error.html", status, page="", heading=HTTPStatus(status).phrase, message=message)

    @app.middleware("http")
    async def guard(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
        asked = request.url.hostname or ""
        if is_loopback(host) and not is_loopback(asked):
            response: Response = error(400, f"this server is on loopback and doesn't answer to the name {asked!r}")
        else:
            try:
                response = await call_next(request)
            except Exception:  # a fault of ours: the reader gets a page, the terminal the traceback
                logging.getLogger(__name__).exception("%s", request.url.path)
                response = error(500, "this page failed; the terminal that runs `rlaif view` says why")
        response.headers.update(HEADERS)
        return response

    @app.exception_handler(HTTPException)
    def http_error(request: Request, e: HTTPException) -> Response:
        return error(e.status_code, str(e.detail))

    @app.exception_handler(RlaifError)
    def our_error(request: Request, e: RlaifError) -> Response:
        return error(404 if isinstance(e, UserError) else 500, str(e))

    @app.get("/static/{file}")
    def static(file: str) -> Response:
        if file not in STATIC:
            raise HTTPException(404, f"no file {file}")
        return Response((HERE / "static" / file).read_bytes(), media_type=STATIC[file])

    @app.get("/version")
    def version() -> Response:
        return JSONResponse({"version": version_of(run)})

    @app.get("/")
    def overview() -> Response:
        # The version first: what is written while we read is news to the page that we make.
        now = version_of(run)
        numbers = read_numbers(run)
        return page(
            "overview.html",
            page="overview",
            version=now,
            status=status_values(run),
            job=run.header["job"],
            numbers=numbers,
            totals=totals(numbers.iterations),
            pictures=pictures(numbers.iterations, numbers.evaluations, losses.read()),
            problems=numbers.problems,
        )

    return app
