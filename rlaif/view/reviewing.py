"""The Review tab: one pair at a time, blind, and the form that stores a person's word on it.

A label changes what the model is trained on, so a page elsewhere must not be able to send the form: it carries a token
that follows from this browser's session and a secret of this process.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Callable
from typing import Any, cast
from urllib.parse import parse_qsl, quote, unquote

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, RedirectResponse, Response
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException

from rlaif.review.queue import Queue, Shown
from rlaif.rundir.store import RunDir

SESSION_COOKIE = "rlaif_session"
AUTHOR_COOKIE = "rlaif_author"
AUTHOR_CHARS = 80
MOST_BYTES = 64 * 1024
YEAR_S = 365 * 24 * 3600

MakePage = Callable[..., HTMLResponse]


def add_review(app: FastAPI, run: RunDir, queue: Queue, page: MakePage) -> None:
    """Adds the Review tab's addresses."""
    secret = secrets.token_bytes(32)

    def token_of(session: str) -> str:
        return hmac.new(secret, session.encode(), hashlib.sha256).hexdigest()

    def session_of(request: Request) -> str:
        return request.cookies.get(SESSION_COOKIE) or secrets.token_hex(16)

    def author_of(request: Request) -> str:
        return unquote(request.cookies.get(AUTHOR_COOKIE, "")).strip()[:AUTHOR_CHARS]

    async def form_of(request: Request) -> dict[str, str]:
        """The fields of a form that this server made for this browser."""
        body = b""
        async for part in request.stream():
            body += part
            if len(body) > MOST_BYTES:
                raise HTTPException(413, f"a form of more than {MOST_BYTES} bytes")
        form = dict(parse_qsl(body.decode("utf-8", "replace"), keep_blank_values=True))
        session = request.cookies.get(SESSION_COOKIE, "")
        if not session or not hmac.compare_digest(token_of(session).encode(), form.get("token", "").encode()):
            raise HTTPException(403, "this form is not of this session; open the Review tab again. Nothing was stored")
        return form

    def with_cookie(response: Response, name: str, value: str) -> Response:
        response.set_cookie(name, value, max_age=YEAR_S, httponly=True, samesite="strict")
        return response

    @app.get("/review")
    def review(request: Request) -> Response:
        session, author = session_of(request), author_of(request)
        query = request.query_params
        question = None
        if author:
            again = query.get("pair")
            question = queue.question(again, author) if again else queue.next(author, session)
        values: dict[str, Any] = {
            "author": author,
            "question": question,
            "again": bool(query.get("pair")),
            "stored": query.get("stored"),
            "counts": queue.counts(),
            "problems": queue.problems,
            "token": token_of(session),
            "asks": bool(run.header["job"].get("filters", {}).get("review")),
        }
        return with_cookie(page("review.html", page="review", **values), SESSION_COOKIE, session)

    @app.post("/review/author")
    async def set_author(request: Request) -> Response:
        form = await form_of(request)
        author = " ".join(form.get("author", "").split())[:AUTHOR_CHARS]
        old = author_of(request)
        if old and old != author:
            await run_in_threadpool(queue.release, old, session_of(request))
        return with_cookie(RedirectResponse("/review", 303), AUTHOR_COOKIE, quote(author))

    @app.post("/review")
    async def answer(request: Request) -> Response:
        form = await form_of(request)
        pair_id, author = form.get("pair", ""), author_of(request)
        shown = cast("Shown", form.get("answer", ""))
        await run_in_threadpool(queue.answer, pair_id, shown, author, form.get("reason"), session_of(request))
        return RedirectResponse(f"/review?stored={quote(pair_id, safe='')}", 303)
