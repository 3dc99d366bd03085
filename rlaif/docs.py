"""The tables in docs/*.md that say what the code's own docstrings say.

In: the field docstrings of the job, the records and the constitution. Out: Markdown, written between the markers
`<!-- generated: WHAT -->` and `<!-- /generated -->`; everything outside of them is written by hand.
`python -m rlaif.docs` brings the pages up to date, tests/test_docs.py fails when one isn't.
"""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
import itertools
import re
import sys
import textwrap
import types
import typing
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from rlaif.config import JUDGES, Job, Judge, MayChange, Monitor, Monitors, sections_in
from rlaif.errors import UserError

_BLOCK = re.compile(r"(<!-- generated: (?P<what>[\w ]+) -->\n).*?(<!-- /generated -->)", re.DOTALL)
_MODULES = (
    "rlaif.config",
    "rlaif.records",
    "rlaif.constitutions.constitution",
    "rlaif.constitutions.checks",
    "rlaif.rundir.heads",
    "rlaif.simulation.cluster",
)
_NAMES = {
    str: "text",
    int: "whole number",
    float: "number",
    bool: "`true`, `false`",
    type(None): "null",
    Any: "anything",
}
_BOUNDS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}


def render(page: str) -> str:
    """A page with its generated blocks made anew.

    A block holds `job` (every section of the job file), `table CLASS` (settings with their defaults) or
    `record CLASS` (the fields of a line in a run's files).

    Raises:
        UserError: a block asks for something else, or for a class that isn't there.
    """

    def block(match: re.Match[str]) -> str:
        kind, _, name = match["what"].partition(" ")
        if kind == "job":
            body = _job()
        elif kind == "table":
            body = _table(_model(name))
        elif kind == "record":
            body = _listing(_model(name))
        else:
            raise UserError(f"docs: `generated: {match['what']}`: expected job, table CLASS or record CLASS")
        return f"{match[1]}{body}\n{match[3]}"

    return _BLOCK.sub(block, page)


def _model(name: str) -> type[BaseModel]:
    for module in _MODULES:
        found = getattr(importlib.import_module(module), name, None)
        if isinstance(found, type) and issubclass(found, BaseModel):
            return found
    raise UserError(f"docs: no class `{name}` in {', '.join(_MODULES)}")


def _job() -> str:
    """Every section of the job, the job's own keys first."""
    sections: list[tuple[str, str, type[BaseModel], str]] = [("", "", Job, "")]
    parts = []
    for prefix, more, model, adjustable in sections:  # grows while it is read: a section can hold sections
        if prefix == "eval.reference_judge":  # as `judge`
            continue
        shown = model.model_fields.keys() - (Judge.model_fields.keys() - {"model"} if more else ())
        own = {k: f for k, f in model.model_fields.items() if k in shown and not (_sections(f) and not _optional(f))}
        sections += [
            (f"{prefix}.{k}".lstrip("."), more, section, _adjustable(f))
            for k, f in model.model_fields.items()
            for more, section in _sections(f)
            if k in shown
        ]
        about = f"`{prefix}`{more}\n\n{_first_paragraph(model)} {adjustable}".rstrip()
        title = f"## {about if prefix else 'The job itself'}"
        parts.append(f"{title}\n\n{_watched() if model is Monitors else _table(model, own)}")
    return "\n\n".join(parts)


def _sections(field: FieldInfo) -> list[tuple[str, type[BaseModel]]]:
    """The sections that a field, or a list or mapping in it, can hold, and what a title says of each; none for a plain
    value."""
    found = sections_in(field.annotation)
    if found and issubclass(found[0], Monitor):  # all in one table
        return []
    if typing.get_origin(field.annotation) in (list, dict):
        found = [s for a in typing.get_args(field.annotation) for s in sections_in(a)]
    if found and issubclass(found[0], Judge):  # what all have in common, then each kind's own
        return [("", Judge), *((f" with `kind: {kind}`", section) for kind, section in JUDGES.items())]
    return [("", found[0])] if found else []  # another one, for code of the user's own, has the same keys


def _optional(field: FieldInfo) -> bool:
    return type(None) in typing.get_args(field.annotation)


def _table(model: type[BaseModel], fields: dict[str, FieldInfo] | None = None) -> str:
    says = _docstrings(model)
    rows = ["| key | value | default | meaning |", "|---|---|---|---|"]
    for name, field in (model.model_fields if fields is None else fields).items():
        default = "required" if field.is_required() else f"`{_shown(field.get_default(call_default_factory=True))}`"
        meaning = f"{says.get(name, '')} {_adjustable(field)}".strip()
        cells = f"`{name}`", _type(field.annotation) + _bounds(field), default, meaning
        rows.append("| " + " | ".join(c.replace("|", "\\|") for c in cells) + " |")
    return "\n".join(rows)


def _watched() -> str:
    """The settings of all kinds of monitor in one table, after what they share."""
    head, rule, *shared = _table(Monitor).splitlines()
    rows = [row.replace("| `action` |", "| `KIND.action` |", 1) for row in shared]
    for kind, field in Monitors.model_fields.items():
        (section,) = sections_in(field.annotation)
        said = _first_paragraph(section).replace("|", "\\|")
        rows.append(f"| `{kind}` | a kind | `{section.model_fields['action'].default}` | {said} |")
        own = {name: f for name, f in section.model_fields.items() if name not in Monitor.model_fields}
        rows += [row.replace("| `", f"| `{kind}.", 1) for row in _table(section, own).splitlines()[2:]]
    return "\n".join([head, rule, *rows])


def _listing(model: type[BaseModel]) -> str:
    """The record and its fields as a code block, what is said about one above it."""
    says = _docstrings(model)
    lines = [f"# {line}" for line in textwrap.wrap(f"{model.__name__}: {_first_paragraph(model)}", 100)] + [""]
    for name, field in model.model_fields.items():
        lines += [f"# {line}" for line in textwrap.wrap(says.get(name, ""), 100)]
        kind = _type(field.annotation).replace("`, `", " | ").replace(" or ", " | ").replace("`", "")
        lines.append(f"{name}: {kind}")
    return "\n".join(["```text", *lines, "```"])


def _docstrings(model: type[BaseModel]) -> dict[str, str]:
    """Field → the text under it in the source, base classes included."""
    out: dict[str, str] = {}
    for cls in reversed(model.__mro__):
        if not issubclass(cls, BaseModel) or cls is BaseModel:
            continue
        for field, text in itertools.pairwise(_classes_of(cls.__module__)[cls.__name__].body):
            if (
                isinstance(field, ast.AnnAssign)
                and isinstance(field.target, ast.Name)
                and isinstance(text, ast.Expr)
                and isinstance(text.value, ast.Constant)
            ):
                out[field.target.id] = " ".join(str(text.value.value).split())
    return out


@functools.cache
def _classes_of(module: str) -> dict[str, ast.ClassDef]:
    """A module's classes by name, as its source has them."""
    source = inspect.getsource(importlib.import_module(module))
    return {node.name: node for node in ast.parse(source).body if isinstance(node, ast.ClassDef)}


def _first_paragraph(model: type[BaseModel]) -> str:
    return " ".join((inspect.getdoc(model) or "").split("\n\n")[0].split())


def _type(annotation: Any) -> str:
    """An annotation in words.

    Raises:
        UserError: there are none for it; a page must not hold Python's.
    """
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:  # what else it says is about how it is checked
        return _type(args[0])
    if origin is typing.Literal:
        return ", ".join(f"`{a}`" for a in args)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(dict.fromkeys(_type(a) for a in args))
    if origin in (list, tuple):
        items = _type(args[0])
        return f"list of {items}s" if items.endswith("number") else f"list of {items}"
    if origin is dict:
        return f"mapping of {_type(args[0])} to {_type(args[1])}"
    if isinstance(annotation, type) and issubclass(annotation, Judge):
        return "as `judge`"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation.__name__
    if annotation not in _NAMES:
        raise UserError(f"docs: no words for the type {annotation}; give it some in rlaif/docs.py")
    return _NAMES[annotation]


def _adjustable(field: FieldInfo) -> str:
    """Whether a run may go on with another value."""
    for mark in (m for m in field.metadata if isinstance(m, MayChange)):
        if mark.lists:
            return "*May change, one list for another.*"
        return f"*May change: {', '.join(f'`{k}`' for k in mark.keys)}.*" if mark.keys else "*May change.*"
    return ""


def _bounds(field: FieldInfo) -> str:
    limits = [f"{sign} {getattr(m, n):g}" for m in field.metadata for n, sign in _BOUNDS.items() if hasattr(m, n)]
    return f", {' and '.join(limits)}" if limits else ""


def _shown(value: Any) -> str:
    """A default as YAML would hold it, in one line."""
    if isinstance(value, tuple):
        value = list(value)
    if isinstance(value, BaseModel):
        return "{}"
    return yaml.safe_dump(value, default_flow_style=True, width=1000).removesuffix("\n").removesuffix("\n...")


def main(folder: Path = Path("docs")) -> int:
    """Rewrites the pages of a folder; says which ones changed."""
    for path in sorted(folder.glob("*.md")):
        before = path.read_text()
        after = render(before)
        if after != before:
            path.write_text(after)
            print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
