"""Lists on a terminal: words stay whole, and columns go where there is no room."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from rlaif.console import Listing


def shown(listing: Listing, width: int) -> str:
    console = Console(file=io.StringIO(), width=width, highlight=False, color_system=None)
    console.print(listing.table(width))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def runs(spare: tuple[str, ...] = ("size", "judged under")) -> Listing:
    listing = Listing("run", "iterations", "judged under", "prompt", "size", "", right=("size",), spare=spare)
    listing.add("online-rejudge-0", "12 of 12", "assistant@2", "Why is the sky blue in summer?", "2.3 GB", "")
    listing.add("  restart-1", "4 of 12", "assistant@2", "", "4.9 GB", "")
    return listing


@pytest.mark.parametrize("width", [50, 80, 120])
def test_no_word_is_cut(width: int) -> None:
    said = shown(runs(), width)
    assert all(whole in said for whole in ("online-rejudge-0", "  restart-1", "12 of 12", "iterations", "summer?"))
    assert max(map(len, said.splitlines())) <= width
    assert ("GB" in said) == (width > 70)
    assert ("assistant@2" in said) == (width > 55)
    assert "┃  ┃" not in said, "a column without a heading and without a cell is none"


def test_where_nothing_can_go_it_is_folded_and_nothing_is_lost() -> None:
    said = shown(runs(spare=()), 40)
    assert max(map(len, said.splitlines())) <= 40
    cells = [line.split("│") for line in said.splitlines() if "│" in line]
    assert "online-rejudge-0" in "".join(row[1].strip() for row in cells)


def test_headings_take_lines_only_where_they_must() -> None:
    assert "judged under" in shown(runs(), 120)
    listing = Listing("newly kept", "newly dropped", "to review")
    listing.add("1", "2", "3")
    assert "newly dropped" in shown(listing, 60)
    assert "newly dropped" not in shown(listing, 32)
    assert "dropped" in shown(listing, 32)


def test_rows_of_one_line_keep_to_it() -> None:
    listing = Listing("iteration", "slot 1", "dropped", spare=("dropped",), one_line=True)
    listing.add("1", "0.50", "guard 3, low_agreement 1")
    assert len(shown(listing, 60).splitlines()) == 5
    assert len(shown(listing, 40).splitlines()) == 5
    assert "guard" not in shown(listing, 40)
