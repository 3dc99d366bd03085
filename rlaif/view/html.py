"""Templates to HTML, for the page and for the report: everything is escaped, an unknown name is an error."""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from rlaif.audit.disk import in_words
from rlaif.records import LENGTH_UNKNOWN
from rlaif.view.pictures import percent

if TYPE_CHECKING:
    import jinja2

HERE = Path(__file__).resolve().parent
MISSING = "–"


@cache
def environment() -> jinja2.Environment:
    """The templates of `rlaif/view/templates`."""
    import jinja2

    made = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {
        "percent": lambda value: MISSING if value is None else percent(value),
        "number": number,
        "money": lambda value: MISSING if value is None else money(value),
        "count": lambda value: MISSING if value is None else f"{value:,}".replace(",", "\u202f"),
        "size": in_words,
        "path": lambda value: quote(str(value), safe=""),
        "words": lambda value: str(value) if ":" in str(value) else str(value).replace("_", " "),  # code has a name
        "log_place": lambda value: "/".join(str(value).rsplit("/", 2)[-2:]),
        "when": lambda value: str(value)[:16].replace("T", " ") + " UTC",
    }
    made.globals["length_unknown"] = LENGTH_UNKNOWN
    return made


def number(value: float | None, digits: int = 2) -> str:
    """A number with so many digits, a proper minus sign, and a dash for none."""
    return MISSING if value is None else f"{value:.{digits}f}".replace("-", "−")


def money(value: float) -> str:
    """A sum with two digits that say something: whole cents of more than one."""
    return f"{value:.2f}" if value >= 1 or value == 0 else f"{value:.{1 - math.floor(math.log10(value))}f}"


def render(template: str, **values: Any) -> str:
    """One page."""
    return environment().get_template(template).render(values)


def style() -> str:
    """The style sheet, for a page that carries it."""
    return (HERE / "static" / "style.css").read_text(encoding="utf-8")
