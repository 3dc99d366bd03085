"""Which text of the rules is in force, and the run's own copy of every text that it used.

A job's `constitution: assistant` is read again before each iteration, so an edited file or a new version
takes effect in the next one. `schedule` and pins such as `assistant@2` are read once, at the start. A judge that
reads sees the text through templates; they are read, pinned and copied together with it. So are the wordings by which a
likelihood judge derives contrasts from the rules of a text that lacks some.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType

from rlaif.config import Job
from rlaif.constitutions.constitution import Constitution, load_with_source
from rlaif.constitutions.copies import (
    CONSTITUTION_FILE,
    PINS_FILE,
    as_derived,
    constitution_copy,
    derived_copy,
    pinned_text,
    template_sources,
)
from rlaif.constitutions.derived import FILE as DERIVED_FILE
from rlaif.constitutions.templates import Template, evaluating_name, load_template, parse_template
from rlaif.errors import RlaifError, UserError
from rlaif.judging.kinds import kind_of
from rlaif.records import ConstitutionRef, Plan
from rlaif.rundir.store import RunDir, disk_errors, read_json, replace_dir, write_json

_DERIVED_PIN = "derived wordings"
"""In pins.json; with a space, so that it is no text's name."""


class InForce:
    """Which constitution of a run is in force when, with the run's copies of all of them.

    Raises:
        UserError: at construction, when a text is missing or doesn't parse. Later a broken text leaves the
            last good one in force and raises an alarm in events.jsonl.
    """

    def __init__(self, job: Job, run: RunDir, base_dir: Path, note: Callable[[str], None] = lambda message: None):
        """Reads the texts; `note` is told alarms as they are raised."""
        self._directory = base_dir / job.constitutions_dir
        self._run = run
        self._note = note
        self._selects = job.pairing.method == "best_worst" and job.source is None
        self._follows = job.constitution if job.constitution and "@" not in job.constitution else None
        self._schedule = job.schedule or {0: job.constitution or ""}
        self._alarmed: str | None = None
        self._said = False
        self._judge = kind_of(job.judge)
        self._reference = kind_of(job.eval.reference_judge) if job.eval.reference_judge else None
        folders = {kind.templates_dir for kind in (self._judge, self._reference) if kind and kind.templates_dir}
        if len(folders) > 1:
            raise UserError(
                f"eval.reference_judge.templates_dir: the judge's is {self._judge.templates_dir}; give both the same"
            )
        self._templates_dir = base_dir / next(iter(folders), "")
        # A pinned text comes from the run's own copy once there is one; what is on disk no longer matters.
        constitutions = (
            [self._newest(self._follows)] if self._follows else list(map(self._pinned, self._schedule.values()))
        )
        checked = [(c, self._templates(c)) for c in constitutions]
        self._last_good = checked[0]

    def at(self, iteration: int) -> tuple[Constitution, dict[str, str]]:
        """The text for this iteration, and name → hash of the templates that show it (none for a judge that doesn't
        read); all copied into the run."""
        if not self._follows:
            start = max(i for i in self._schedule if i <= iteration)
            constitution = self._pinned(self._schedule[start])
            return constitution, self._templates(constitution)
        try:
            newest = self._newest(self._follows)
            self._last_good, self._alarmed = (newest, self._templates(newest)), None
        except UserError as e:
            if self._alarmed != str(e):
                self._alarmed = str(e)
                constitution, _ = self._last_good
                message = f"{e}; {constitution.ref} ({constitution.hash}) stays in force"
                self._run.event("alarm", message, iteration, kind="constitution", action="warn")
                self._note(f"alarm in iteration {iteration + 1}: {message}")
        return self._last_good

    def load(self, ref: ConstitutionRef, derived: Mapping[str, str] = MappingProxyType({})) -> Constitution:
        """The run's copy of a text, under the name that `ref` gives it: two versions may say the same. `derived` is
        the plan's."""
        constitution = constitution_copy(self._run, ref.hash).model_copy(
            update={"name": ref.name, "version": ref.version}
        )
        return as_derived(self._run, constitution, derived)

    def _templates(self, constitution: Constitution) -> dict[str, str]:
        deciding = self._judge.template_names(constitution, "decide")
        known = {other for name in deciding if self._is_known(other := evaluating_name(name), name)}
        evaluating = self._judge.template_names(constitution, "evaluate", known)
        if (same := [name for name in evaluating if name in deciding]) and not self._said:
            self._said = True
            self._note(
                f"judge: held-out answers are measured with the question that trains (template {', '.join(same)}); add "
                f"{self._templates_dir / evaluating_name(same[0])}.jinja, or set judge.evaluate_templates"
            )
        # Evaluating ones first: with a deciding one's pin there is its counterpart's, if there ever was one.
        names = [*evaluating, *self._templates_of_reference(constitution), *deciding]
        return {name: self._template(name) for name in dict.fromkeys(names)}

    def _templates_of_reference(self, constitution: Constitution) -> list[str]:
        """With which the reference judge is asked."""
        if not self._reference:
            return []
        deciding = self._reference.template_names(constitution, "decide")
        known = {other for name in deciding if self._is_known(other := evaluating_name(name), name)}
        return self._reference.template_names(constitution, "evaluate", known)

    def _is_known(self, name: str, deciding: str) -> bool:
        """Whether there is an evaluating template beside a deciding one: in the run where that one is pinned, so that a
        file that was added later changes no run, else on disk."""
        pins = self._pins()
        if not self._follows and f"template {deciding}" in pins:
            return f"template {name}" in pins
        return (self._templates_dir / f"{name}.jinja").is_file()

    def _pins(self) -> dict[str, str]:
        path = self._run.path / PINS_FILE
        known: dict[str, str] = read_json(path) if path.exists() else {}
        return known

    def load_template(self, name: str, digest: str) -> Template:
        """The run's copy of a template."""
        folder = self._run.path / "constitutions" / digest
        return parse_template(name, template_sources(folder), str(folder))

    def _template(self, name: str) -> str:
        """Hash of a template: the pinned one where texts are pinned, else the one on disk. Copies it into the run."""
        known = self._pins()
        key = f"template {name}"
        if not self._follows and key in known:
            return known[key]
        template = load_template(self._templates_dir, name)
        folder = self._run.path / "constitutions" / template.hash
        if not folder.exists():
            _copy(folder, {source.name: source.text.encode() for source in template.sources})
        if not self._follows:
            write_json(self._run.path / PINS_FILE, known | {key: template.hash})
        return template.hash

    def _pinned(self, reference: str) -> Constitution:
        known = self._pins()
        if reference not in known:
            newest = self._newest(reference)
            ref = newest.ref
            # A reference without a version is pinned to one with, and that one to its text.
            known |= {reference: str(ref), str(ref): ref.hash}
            if newest.wordings is not None:
                known.setdefault(f"{_DERIVED_PIN} {ref.hash}", newest.wordings.hash)
            write_json(self._run.path / PINS_FILE, known)
        pinned = pinned_text(self._run, reference)
        assert pinned is not None, "just now"
        constitution = constitution_copy(self._run, pinned.hash).model_copy(
            update={"name": pinned.name, "version": pinned.version}
        )
        # Without a pin the run is from before contrasts were derived, and goes on without; one without a text's name is
        # from before opposites were, which are a text's own.
        pin = known.get(f"{_DERIVED_PIN} {constitution.hash}", known.get(_DERIVED_PIN))
        pin = pin if self._judge.derives and constitution.derives else None
        return constitution.derived_by(derived_copy(self._run, pin) if pin else None)

    def _newest(self, reference: str) -> Constitution:
        constitution, source = load_with_source(self._directory, reference)
        constitution = self._judge.as_read(constitution)
        if self._selects:
            self._judge.selecting(constitution)
        if self._reference:
            self._reference.as_read(constitution)
        if constitution.wordings is not None:
            copy = self._run.path / "constitutions" / constitution.wordings.hash
            if not copy.exists():
                content = json.dumps(constitution.wordings.model_dump(mode="json"), indent=1, ensure_ascii=False) + "\n"
                _copy(copy, {DERIVED_FILE: content.encode()})
        folder = self._run.path / "constitutions" / constitution.hash
        if not (folder / CONSTITUTION_FILE).exists():
            content = json.dumps(constitution.model_dump(mode="json"), indent=1, ensure_ascii=False) + "\n"
            _copy(folder, {"source.yaml": source, CONSTITUTION_FILE: content.encode()})
        return constitution


def copy_texts(source: RunDir, plan: Plan, into: RunDir) -> None:
    """Copies a run's copies of what a plan of it names (text, templates, wordings) into another run.

    Raises:
        RlaifError: one of them is gone.
    """
    for name in (plan.constitution.hash, *plan.templates.values(), *plan.derived.values()):
        folder, copy = (run.path / "constitutions" / name for run in (source, into))
        if not folder.is_dir():
            raise RlaifError(f"{folder}: the run's copy of a text is gone; restore it")
        if not copy.exists():
            _copy(copy, {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()})


def _copy(folder: Path, files: Mapping[str, bytes]) -> None:
    """Writes a folder of the run, whole or not at all."""
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    with disk_errors(folder):
        for name, content in files.items():
            path = partial / name  # a template that is included may lie in a folder
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("wb") as f:
                f.write(content)
                f.flush()
                os.fsync(f.fileno())
        replace_dir(partial, folder)
