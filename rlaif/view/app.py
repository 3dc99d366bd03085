"""The pages of `rlaif view`: server-rendered, read-only but for the review, nothing fetched from anywhere else.

Candidates' text is the least trusted thing in a run. It is escaped by every template; should a template fail, the
Content-Security-Policy still runs no script but our own file.
"""

from __future__ import annotations

import difflib
import logging
import re
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from http import HTTPStatus
from ipaddress import ip_address
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, RedirectResponse, Response
from starlette.exceptions import HTTPException

from rlaif.audit.index import Index
from rlaif.audit.pair import PairDetail, question_of, show
from rlaif.audit.pairs import known_names, list_pairs
from rlaif.audit.summary import status_of
from rlaif.errors import RlaifError, UserError
from rlaif.judging.verdicts import flips
from rlaif.records import VoiceKey, Vote
from rlaif.review.queue import Queue
from rlaif.rundir.store import RunDir
from rlaif.view.browse import CHOICES, Asked
from rlaif.view.facts import read_facts, version_of
from rlaif.view.html import HERE, render
from rlaif.view.pictures import pictures
from rlaif.view.reviewing import add_review

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
_HASH = re.compile("[0-9a-f]{8,64}")


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
    # No generated API pages: they fetch their scripts from elsewhere.
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None)
    name = run.path.resolve().name
    queue = Queue(run)

    def page(template: str, code: int = 200, **values: Any) -> HTMLResponse:
        html = render(template, run_name=name, every_ms=REFRESH_MS, waiting=waiting(), **values)
        # A lone surrogate in a candidate's text can't be sent as it is.
        return HTMLResponse(html.encode("utf-8", "replace"), code)

    @contextmanager
    def fresh() -> Iterator[Index]:
        """The index with what the run wrote since; a page's questions see one state of it."""
        index.refresh()
        with index.session():
            yield index

    def waiting() -> int:
        """Pairs that wait for a person, for the page's tab."""
        try:
            return queue.waiting()
        except (RlaifError, OSError):
            return 0

    def error(code: int, message: str) -> HTMLResponse:
        return page("error.html", code, page="", heading=HTTPStatus(code).phrase, message=message)

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

    @app.exception_handler(OSError)
    def file_error(request: Request, e: OSError) -> Response:
        logging.getLogger(__name__).error("%s: %s", request.url.path, e)
        return error(500, f"{e.filename or 'a file of the run'}: {e.strerror or e}")

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
        with fresh():
            facts = read_facts(index, run)
        return page(
            "overview.html",
            page="overview",
            version=now,
            status=status_of(run),
            job=run.header["job"],
            facts=facts,
            pictures=pictures(facts),
        )

    @app.get("/pairs")
    def pairs(request: Request) -> Response:
        asked, problems = Asked.parse(request.query_params)
        if not problems and dict(request.query_params) != asked.values:
            return RedirectResponse(asked.address(), 303)
        with fresh():
            found = list_pairs(index, asked.filter, asked.sort, asked.descending, asked.limit, asked.offset)
            names = known_names(index)
        return page(
            "pairs.html",
            page="pairs",
            asked=asked,
            values=asked.values,
            choices=CHOICES | names,
            found=found,
            pages=asked.pages(found),
            problems=[*problems, *found.problems],
        )

    @app.get("/pairs/{pair_id:path}")
    def pair(pair_id: str) -> Response:
        with fresh():
            detail = show(index, run, pair_id)
        return page("pair.html", page="pairs", detail=detail, voices=votes_by_voice(detail))

    @app.get("/questions/{ballot_id}/{pair_id:path}")
    def question(ballot_id: str, pair_id: str) -> Response:
        with fresh():
            detail = show(index, run, pair_id)
        text = question_of(run, detail, ballot_id)
        vote = next(v for v in detail.votes if v.ballot.id.startswith(ballot_id))
        return page("question.html", page="pairs", detail=detail, vote=vote, text=text)

    @app.get("/constitutions")
    def constitutions() -> Response:
        with fresh():
            texts = _texts(index)
        return page("constitutions.html", page="constitutions", texts=texts)

    @app.get("/constitutions/{digest}")
    def constitution(digest: str) -> Response:
        folder = run.path / "constitutions" / digest
        if not _HASH.fullmatch(digest) or not folder.is_dir():
            raise UserError(f"no text {digest} in {run.path}/constitutions")
        with fresh():
            texts = _texts(index)
        place = next((i for i, t in enumerate(texts) if t["hash"] == digest), None)
        files = {
            p.relative_to(folder).as_posix(): p.read_text(errors="replace")  # an included one may lie in a folder
            for p in sorted(folder.rglob("*"))
            if p.suffix in (".yaml", ".jinja")
        }
        difference = ""
        if place:
            before = run.path / "constitutions" / texts[place - 1]["hash"] / "source.yaml"
            if before.exists() and "source.yaml" in files:
                difference = "\n".join(
                    difflib.unified_diff(
                        before.read_text(errors="replace").splitlines(), files["source.yaml"].splitlines(),
                        texts[place - 1]["name"], texts[place]["name"], lineterm="",
                    )
                )  # fmt: skip
        return page(
            "constitution.html",
            page="constitutions",
            text=None if place is None else texts[place],
            digest=digest,
            files=files,
            difference=difference,
            before=texts[place - 1] if place else None,
        )

    add_review(app, run, queue, page)
    return app


def votes_by_voice(detail: PairDetail) -> list[dict[str, Any]]:
    """Votes grouped by who was asked and how; both orders of a voice stand together."""
    groups: dict[tuple[bool, VoiceKey], list[tuple[Vote, str]]] = {}
    for vote, line in zip(detail.votes, detail.vote_lines, strict=True):
        groups.setdefault((vote.ballot.guard, vote.ballot.voice_key), []).append((vote, line))
    return [
        {
            "guard": guard,
            "judge": key.judge,
            "voice": key.voice,
            "principles": key.principles,
            "sample": key.sample_index,
            "votes": sorted(votes, key=lambda row: row[0].ballot.order),
            "flipped": flips(v for v, _ in votes),
        }
        for (guard, key), votes in sorted(groups.items(), key=lambda item: (item[0][0], *item[0][1][:2]))
    ]


def _texts(index: Index) -> list[dict[str, Any]]:
    """Every text in the order in which it first came into force."""
    return index.rows(
        "SELECT constitution AS hash, any_value(text_name) AS name, min(iteration) AS since, "
        "list(iteration ORDER BY iteration) AS iterations FROM iterations WHERE constitution IS NOT NULL "
        "GROUP BY constitution ORDER BY since"
    )
