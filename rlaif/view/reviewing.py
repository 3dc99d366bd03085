"""The Review tab: one pair at a time, blind, and the form that stores a person's word on it.

A label changes what the model is trained on, so a page elsewhere must not be able to send the form: it carries a token
that follows from this browser's session and a secret of this process.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from typing import Any, cast
from urllib.parse import parse_qsl, quote, unquote

from fastapi import APIRouter, Request
from fastapi.responses import RedirectResponse, Response
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException

from rlaif.review.queue import Shown
from rlaif.view.site import Site, SiteOf

SESSION_COOKIE = "rlaif_session"
AUTHOR_COOKIE = "rlaif_author"
AUTHOR_CHARS = 80
MOST_BYTES = 64 * 1024
YEAR_S = 365 * 24 * 3600

router = APIRouter()


@router.get("/review")
def review(site: SiteOf, request: Request) -> Response:
    """The next pair that waits for this person, or the one that the address names."""
    session, author = _session_of(request), _author_of(request)
    query, queue = request.query_params, site.queue
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
        "token": _token_of(site, session),
        "asks": bool(site.run.header["job"].get("filters", {}).get("review")),
    }
    return _with_cookie(site.page("review.html", page="review", **values), SESSION_COOKIE, session)


@router.post("/review/author")
async def set_author(site: SiteOf, request: Request) -> Response:
    """Stores who labels in this browser; what was lent to the name before is free again."""
    form = await _form_of(site, request)
    author = " ".join(form.get("author", "").split())[:AUTHOR_CHARS]
    old = _author_of(request)
    if old and old != author:
        await run_in_threadpool(site.queue.release, old, _session_of(request))
    return _with_cookie(RedirectResponse(f"{site.base}/review", 303), AUTHOR_COOKIE, quote(author))


@router.post("/review")
async def answer(site: SiteOf, request: Request) -> Response:
    """Stores a label, and shows the next pair."""
    form = await _form_of(site, request)
    pair_id, author = form.get("pair", ""), _author_of(request)
    shown = cast("Shown", form.get("answer", ""))
    given = (pair_id, shown, author, form.get("reason"), _session_of(request), form.get("constitution"))
    await run_in_threadpool(site.queue.answer, *given)
    return RedirectResponse(f"{site.base}/review?stored={quote(pair_id, safe='')}", 303)


def _token_of(site: Site, session: str) -> str:
    return hmac.new(site.secret, session.encode(), hashlib.sha256).hexdigest()


def _session_of(request: Request) -> str:
    return request.cookies.get(SESSION_COOKIE) or secrets.token_hex(16)


def _author_of(request: Request) -> str:
    return unquote(request.cookies.get(AUTHOR_COOKIE, "")).strip()[:AUTHOR_CHARS]


async def _form_of(site: Site, request: Request) -> dict[str, str]:
    """The fields of a form that this server made for this browser.

    Raises:
        HTTPException: it is too long, or its token isn't of this browser's session.
    """
    body = b""
    async for part in request.stream():
        body += part
        if len(body) > MOST_BYTES:
            raise HTTPException(413, f"a form of more than {MOST_BYTES} bytes")
    form = dict(parse_qsl(body.decode("utf-8", "replace"), keep_blank_values=True))
    session = request.cookies.get(SESSION_COOKIE, "")
    token = _token_of(site, session)
    if not session or not hmac.compare_digest(token.encode(), form.get("token", "").encode()):
        raise HTTPException(403, "this form is not of this session; open the Review tab again. Nothing was stored")
    return form


def _with_cookie(response: Response, name: str, value: str) -> Response:
    response.set_cookie(name, value, max_age=YEAR_S, httponly=True, samesite="strict")
    return response
