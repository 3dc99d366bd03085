"""Options as one object: each field is an option, a mistake in them is told, and help has a section for each group."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import pytest
import typer
from typer.testing import CliRunner

from rlaif.cli.options import InSections, with_options
from rlaif.errors import UserError


@dataclass(frozen=True)
class Size:
    """How large."""

    width: Annotated[int, typer.Option(rich_help_panel="Size", help="In metres.")]
    depth: Annotated[int, typer.Option(rich_help_panel="Size")] = 2

    def __post_init__(self) -> None:
        if self.width < self.depth:
            raise UserError(f"--width {self.width}: less than the depth")


app = typer.Typer(rich_markup_mode=None)


@app.command(cls=InSections)
@with_options
def build(
    name: Annotated[str, typer.Argument()], size: Size, loud: Annotated[bool, typer.Option("--loud")] = False
) -> None:
    """Build it."""
    typer.echo(f"{name} {size} {loud}")


def run(*arguments: str) -> str:
    done = CliRunner().invoke(app, arguments)
    if done.exception and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.output


def test_a_group_of_options_is_one_object() -> None:
    assert run("shed", "--width", "3") == "shed Size(width=3, depth=2) False\n"
    assert run("shed", "--loud", "--depth", "1", "--width", "9") == "shed Size(width=9, depth=1) True\n"
    assert "Missing option '--width'" in run("shed")


def test_a_group_checks_itself() -> None:
    with pytest.raises(UserError, match="--width 1: less than the depth"):
        run("shed", "--width", "1")


def test_help_has_a_section_for_each_group() -> None:
    lines = run("--help").splitlines()
    heads = [line for line in lines if line.endswith(":") and not line.startswith(" ")]
    assert heads == ["Arguments:", "Size:", "Options:"]
    assert "Build it." in run("--help")
    size, options = lines.index("Size:"), lines.index("Options:")
    assert "--width" in lines[size + 1]
    assert any("--loud" in line for line in lines[options:])
