"""The decision browser's addresses: a query string becomes a filter, and a filter an address to paste into a ticket.

The names are those of `rlaif audit RUN list`; iterations count from 1, as people's tables do.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar, get_args
from urllib.parse import urlencode

from pydantic import Field, ValidationError

from rlaif.audit.pairs import Page, PairFilter, Sort, Status
from rlaif.records import DropReason, Record

R = TypeVar("R", bound=Record)

PAGE_ROWS = 50
FILTERS = tuple(PairFilter.model_fields)
CHOICES: dict[str, tuple[str, ...]] = {
    "status": get_args(Status),
    "reason": get_args(DropReason),
    "sort": get_args(Sort),
}


def understood(record: type[R], values: dict[str, Any]) -> tuple[R, list[str]]:
    """What a tree of an address's values asks for, and one line for each value that can't be understood."""
    problems: list[str] = []
    while True:
        try:
            return record.model_validate(values), problems
        except ValidationError as e:
            error = e.errors()[0]
            at: Any = values
            for name in error["loc"]:  # its end may be what pydantic calls the member of a union
                if not isinstance(at[name], dict):
                    break
                at = at[name]
            problems.append(f"{name}={at.pop(name)}: {error['msg'][0].lower()}{error['msg'][1:]}; it is left out")


class Asked(Record):
    """What a list's address asks for."""

    filter: PairFilter = PairFilter()
    sort: Sort = "log"
    descending: bool = False
    offset: int = Field(0, ge=0)
    limit: int = Field(PAGE_ROWS, ge=1, le=500)

    @classmethod
    def parse(cls, query: Mapping[str, str]) -> tuple[Asked, list[str]]:
        """What a query string asks for, and one line for each part of it that can't be understood."""
        given = {name: value.strip() for name, value in query.items() if value.strip()}
        values: dict[str, Any] = {name: value for name, value in given.items() if name not in FILTERS}
        values["filter"] = {name: value for name, value in given.items() if name in FILTERS}
        asked, problems = understood(cls, values)
        wanted = asked.filter
        if wanted.iteration is not None and not wanted.evaluation:
            asked = asked.model_copy(update={"filter": wanted.model_copy(update={"iteration": wanted.iteration - 1})})
        return asked, problems

    @property
    def values(self) -> dict[str, str]:
        """The shortest query that asks for this."""
        shown = self.filter.model_dump(exclude_defaults=True)
        if self.filter.iteration is not None and not self.filter.evaluation:
            shown["iteration"] = self.filter.iteration + 1
        shown |= self.model_dump(exclude_defaults=True, exclude={"filter"})
        return {k: {True: "yes", False: "no"}[v] if isinstance(v, bool) else f"{v}" for k, v in shown.items()}

    def address(self, **changes: Any) -> str:
        """The address of this list, or of one that differs in order or place."""
        values = self.model_copy(update=changes).values
        return "/pairs" + (f"?{urlencode(values)}" if values else "")

    def pages(self, found: Page) -> dict[str, str]:
        """Addresses of the first, previous, next and last page, where there are such."""
        last = max(found.total - 1, 0) // self.limit * self.limit
        places = {"first": 0, "previous": self.offset - self.limit, "next": self.offset + self.limit, "last": last}
        return {
            name: self.address(offset=place)
            for name, place in places.items()
            if 0 <= place <= last and place != self.offset and (name != "previous" or self.offset > 0)
        }
