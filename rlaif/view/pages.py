"""The pages that only read: overview, held-out answers, decisions, one pair, one question, the texts; and the files
that they all load."""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, RedirectResponse, Response
from starlette.exceptions import HTTPException

from rlaif.audit.answers import Answers, answers_to, held_out_prompts
from rlaif.audit.index import Index
from rlaif.audit.pair import PairDetail, question_of, show
from rlaif.audit.pairs import known_names, list_pairs
from rlaif.audit.summary import status_of
from rlaif.audit.text_log import text_log
from rlaif.errors import RlaifError, UserError
from rlaif.judging.verdicts import flips
from rlaif.records import VoiceKey, Vote
from rlaif.rundir.store import RunDir
from rlaif.view.answering import CHOICES as CHOSEN
from rlaif.view.answering import AnswersAsked, answers_table, near
from rlaif.view.browse import CHOICES, Asked
from rlaif.view.facts import read_facts, version_of
from rlaif.view.html import HERE
from rlaif.view.pictures import pictures
from rlaif.view.site import SiteOf

STATIC = {"style.css": "text/css", "page.js": "text/javascript", "icon.svg": "image/svg+xml"}
_HASH = re.compile("[0-9a-f]{8,64}")

files = APIRouter()
"""What every page loads, whatever is shown."""
router = APIRouter()
"""A run's pages."""


@files.get("/static/{file}")
def static(file: str) -> Response:
    """The style sheet, the script and the icon."""
    if file not in STATIC:
        raise HTTPException(404, f"no file {file}")
    return Response((HERE / "static" / file).read_bytes(), media_type=STATIC[file])


@router.get("/version")
def version(site: SiteOf) -> Response:
    """What the open overview compares with its own, to know whether there is news."""
    return JSONResponse({"version": version_of(site.run)})


@router.get("/")
def overview(site: SiteOf) -> Response:
    """The run on one page: where it stands, its pictures."""
    # The version first: what is written while we read is news to the page that we make.
    now = version_of(site.run)
    with site.fresh() as index:
        facts = read_facts(index, site.run)
        before_after = _before_after(index, site.run)
    return site.page(
        "overview.html",
        page="overview",
        version=now,
        status=status_of(site.run),
        job=site.run.header["job"],
        facts=facts,
        pictures=pictures(facts),
        before_after=before_after,
        table=answers_table({site.name: before_after}, "base", {site.name: site.base}) if before_after else None,
    )


@router.get("/answers")
def answers(site: SiteOf, request: Request) -> Response:
    """A held-out prompt's answers over all evaluations; the first prompt's where the address names none."""
    asked, notes = AnswersAsked.parse(request.query_params)
    with site.fresh() as index:
        found = held_out_prompts(index, asked.text)
        lines = [line for line in found.prompts if asked.shows(line)]
        prompt_id = asked.prompt or (lines[0].prompt_id if lines else None)
        shown = answers_to(index, site.run, prompt_id) if prompt_id is not None else None
    return site.page(
        "answers.html",
        page="answers",
        asked=asked,
        choices=CHOSEN,
        evaluations=found.evaluations,
        lines=lines,
        near=near(lines, prompt_id),
        shown=shown,
        table=answers_table({site.name: shown}, asked.marked, {site.name: site.base}) if shown else None,
        problems=shown.problems if shown else (),
        notes=notes,
    )


@router.get("/pairs")
def pairs(site: SiteOf, request: Request) -> Response:
    """The decision browser. Its address is brought into its shortest form first, to paste into a ticket."""
    asked, problems = Asked.parse(request.query_params)
    if not problems and dict(request.query_params) != asked.values:
        return RedirectResponse(f"{site.base}{asked.address()}", 303)
    with site.fresh() as index:
        found = list_pairs(index, asked.filter, asked.sort, asked.descending, asked.limit, asked.offset)
        names = known_names(index)
    rules = site.run.header["job"].get("filters", {}).get("rules", ())
    return site.page(
        "pairs.html",
        page="pairs",
        asked=asked,
        values=asked.values,
        choices=CHOICES | names | {"reason": (*CHOICES["reason"], *rules)},
        found=found,
        pages=asked.pages(found),
        problems=[*problems, *found.problems],
    )


@router.get("/pairs/{pair_id:path}")
def pair(site: SiteOf, pair_id: str) -> Response:
    """One pair: both completions, every vote, the decision."""
    with site.fresh() as index:
        detail = show(index, site.run, pair_id)
    return site.page("pair.html", page="pairs", detail=detail, voices=votes_by_voice(detail))


@router.get("/questions/{ballot_id}/{pair_id:path}")
def question(site: SiteOf, ballot_id: str, pair_id: str) -> Response:
    """What the judge was asked, word by word, and what it said."""
    with site.fresh() as index:
        detail = show(index, site.run, pair_id)
    text = question_of(site.run, detail, ballot_id)
    vote = next(v for v in detail.votes if v.ballot.id.startswith(ballot_id))
    return site.page("question.html", page="pairs", detail=detail, vote=vote, text=text)


@router.get("/constitutions")
def constitutions(site: SiteOf) -> Response:
    """Every text that was in force: what each change was, what it did to old pairs, and whether answers followed."""
    with site.fresh() as index:
        texts = _texts(index)
    try:
        log = text_log(site.run)
        problems = log.problems
    except RlaifError as e:  # what is damaged is said, and the texts are there all the same
        log, problems = None, (str(e),)
    return site.page("constitutions.html", page="constitutions", texts=texts, log=log, problems=problems)


@router.get("/constitutions/{digest}")
def constitution(site: SiteOf, digest: str) -> Response:
    """One text with its templates, and how it differs from the one before."""
    folder = site.run.path / "constitutions" / digest
    if not _HASH.fullmatch(digest) or not folder.is_dir():
        raise UserError(f"no text {digest} in {site.run.path}/constitutions")
    with site.fresh() as index:
        texts = _texts(index)
    place = next((i for i, t in enumerate(texts) if t["hash"] == digest), None)
    text = None if place is None else texts[place]
    before = texts[place - 1] if place else None
    return site.page(
        "constitution.html",
        page="constitutions",
        text=text,
        digest=digest,
        files={
            p.relative_to(folder).as_posix(): p.read_text(errors="replace")  # an included one may lie in a folder
            for p in sorted(folder.rglob("*"))
            if p.suffix in (".yaml", ".jinja")
        },
        difference=_difference(site.run.path / "constitutions", before, text) if before and text else "",
        before=before,
    )


def _before_after(index: Index, run: RunDir) -> Answers | None:
    """The first held-out prompt with the base policy's answer and the newest one; None before there are both."""
    for line in held_out_prompts(index).prompts[:1]:
        found = answers_to(index, run, line.prompt_id)
        if len(found.evaluated) > 1:
            return found.model_copy(update={"evaluated": (found.evaluated[0], found.evaluated[-1])})
    return None


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


def _difference(folder: Path, before: dict[str, Any], after: dict[str, Any]) -> str:
    """The edit between two texts as a unified diff; nothing where one of them is not stored."""
    paths = [folder / text["hash"] / "source.yaml" for text in (before, after)]
    if not all(path.exists() for path in paths):
        return ""
    old, new = (path.read_text(errors="replace").splitlines() for path in paths)
    return "\n".join(difflib.unified_diff(old, new, before["name"], after["name"], lineterm=""))
