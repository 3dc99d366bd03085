"""A folder of runs: the tree of its branches, some of them side by side, and their answers to one prompt.

Each run's own pages are those of `rlaif view RUN`, under `/runs/NAME`.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterable, Sequence
from http import HTTPStatus
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import quote

from fastapi import APIRouter, Depends, Request
from fastapi.responses import HTMLResponse, Response

from rlaif.audit.answers import Answers, HeldOutPrompts, answers_to, held_out_prompts, same_prompt
from rlaif.audit.curves import Curve, curve_of, settings_that_differ
from rlaif.audit.index import Index
from rlaif.audit.runs import runs_in
from rlaif.errors import UserError
from rlaif.review.queue import Queue
from rlaif.rundir.store import RunDir
from rlaif.view.answering import CHOICES, AnswersAsked, answers_table, near
from rlaif.view.pictures import STYLES, side_by_side
from rlaif.view.site import Site, as_page

TABS = (("runs", "/", "Runs"), ("answers", "/answers", "Answers"))
MOST_SETTINGS = 60

router = APIRouter()


class Folder:
    """A folder whose runs are shown."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._sites: dict[str, Site] = {}
        self._opening = threading.Lock()

    @property
    def name(self) -> str:
        """The folder's."""
        return self.path.resolve().name

    def of(self, run: str | None) -> Site:
        """The pages of one of its runs.

        Raises:
            UserError: there is no such run.
        """
        if run is None or run not in os.listdir(self.path):
            raise UserError(f"no run {run} in {self.path}")
        opened = RunDir.open(self.path / run)
        with self._opening:
            if run not in self._sites:
                self._sites[run] = Site(opened, Queue(opened), Index(opened), f"/runs/{quote(run, safe='')}", self.name)
            return self._sites[run]

    def page(self, template: str, code: int = 200, **values: Any) -> HTMLResponse:
        """A template in the folder's own frame."""
        frame = {"run_name": self.name, "folder": "", "base": "", "tabs": TABS, "waiting": 0}
        return as_page(template, code, **frame, **values)

    def error(self, code: int, message: str) -> HTMLResponse:
        """The page that says what went wrong."""
        return self.page("error.html", code, page="", heading=HTTPStatus(code).phrase, message=message)


async def _folder_of(request: Request) -> Folder:
    home: Folder = request.app.state.home
    return home


FolderOf = Annotated[Folder, Depends(_folder_of)]
"""A handler's parameter of this type is the folder that was asked."""


@router.get("/")
def runs(folder: FolderOf, request: Request) -> Response:
    """The tree of branches, and the chosen runs side by side."""
    rows = runs_in(folder.path)
    curves = {row.run: curve_of(RunDir(folder.path / row.run)) for row in rows if row.problem is None}
    chosen, notes = _chosen(curves.values(), request.query_params.getlist("run"))
    problems = [f"{row.run}: {row.problem}" for row in rows if row.problem]
    problems += [problem for curve in curves.values() for problem in curve.problems]
    headers = [RunDir(folder.path / curve.run).header for curve in chosen]
    differing = settings_that_differ(headers) if len(headers) > 1 else {}
    return folder.page(
        "runs.html",
        page="runs",
        rows=rows,
        curves=curves,
        styles={curve.run: n for n, curve in enumerate(chosen)},
        pictures=side_by_side(chosen),
        differing={k: [_short(v) for v in values] for k, values in list(differing.items())[:MOST_SETTINGS]},
        left_out=max(len(differing) - MOST_SETTINGS, 0),
        most=STYLES,
        problems=problems,
        notes=notes,
    )


@router.get("/answers")
def answers(folder: FolderOf, request: Request) -> Response:
    """The chosen runs' answers to one prompt of the first of them, a row each."""
    query = {name: value for name, value in request.query_params.items() if name != "run"}
    asked, notes = AnswersAsked.parse(query)
    curves = [curve_of(RunDir(folder.path / row.run)) for row in runs_in(folder.path) if row.problem is None]
    chosen, unknown = _chosen(curves, request.query_params.getlist("run"))
    asked = asked.model_copy(update={"run": tuple(curve.run for curve in chosen)})
    sites = [folder.of(curve.run) for curve in chosen]
    found, prompts, shown = HeldOutPrompts(evaluations=(), prompts=()), [], dict[str, Answers]()
    prompt_id = None
    if sites:
        with sites[0].fresh() as index:
            found = held_out_prompts(index, asked.text)
            prompts = [line for line in found.prompts if asked.shows(line)]
            prompt_id = asked.prompt or (prompts[0].prompt_id if prompts else None)
            if prompt_id is not None:
                shown[sites[0].name] = answers_to(index, sites[0].run, prompt_id)
    for site in sites[1:] if prompt_id is not None else []:
        with site.fresh() as index:
            here = same_prompt(index, shown[sites[0].name].messages)
            if here is None:
                notes.append(f"{site.name} has no answer to this prompt")
            else:
                shown[site.name] = answers_to(index, site.run, here)
    return folder.page(
        "answers.html",
        page="answers",
        asked=asked,
        choices=CHOICES,
        runs=[curve.run for curve in curves if curve.evaluations],
        evaluations=found.evaluations,
        lines=prompts,
        near=near(prompts, prompt_id),
        shown=shown[sites[0].name] if shown else None,
        table=answers_table(shown, asked.marked, {site.name: site.base for site in sites}) if shown else None,
        problems=[problem for one in shown.values() for problem in one.problems],
        notes=[*notes, *unknown],
    )


def _chosen(curves: Iterable[Curve], names: Sequence[str]) -> tuple[list[Curve], list[str]]:
    """The runs that an address names, or the first ones with an evaluation; and a line for each that can't be shown."""
    there = {curve.run: curve for curve in curves if curve.evaluations}
    unknown = [name for name in names if name not in there]
    notes = [f"run={name}: no such run with an evaluation here; it is left out" for name in unknown]
    wanted = [there[name] for name in dict.fromkeys(names) if name in there] or list(there.values())
    if len(wanted) > STYLES and names:
        notes.append(f"at most {STYLES} runs are shown side by side; the others are left out")
    return wanted[:STYLES], notes


def _short(value: Any) -> str:
    """A setting's value as people write it, in some forty characters."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 40 else text[:39] + "…"
