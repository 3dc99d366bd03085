"""Whatever a folder, a text, a judge or a slice is called: a rich console prints the name, and obeys none of it."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from rlaif import cli
from rlaif.audit.summary import final_tables, write_summary
from rlaif.rundir.store import RunDir
from tests.conftest import make_project
from tests.stubs import write_texts

pytestmark = pytest.mark.slow

STORED = Path(__file__).parent / "data" / "run_schema1"
ODD = "[bold]x"
"""rich would swallow the first half of it."""

Command = Callable[..., str]


@pytest.fixture
def printed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Command:
    """Runs a command that ends well; what it prints, in one line without spaces: a name may be broken anywhere."""
    monkeypatch.setenv("RLAIF_CACHE", str(tmp_path / "cache"))

    def run(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["rlaif", *arguments])
        with pytest.raises(SystemExit) as e:
            cli.main()
            sys.exit(0)
        out = capsys.readouterr()
        assert not e.value.code, out.err
        return "".join(out.out.split())

    return run


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A stored run in a folder with an odd name."""
    shutil.copytree(STORED, tmp_path / ODD)
    return tmp_path / ODD


@pytest.mark.parametrize(
    "arguments",
    [("status",), ("audit",), ("audit", "verify"), ("audit", "replay"), ("audit", "compare", ODD)],
    ids=" ".join,
)
def test_a_runs_folder(printed: Command, run: Path, arguments: tuple[str, ...]) -> None:
    command, *more = arguments
    assert ODD in printed(command, ODD, *more)


def test_a_runs_folder_after_its_end(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    opened = RunDir.open(run)
    final_tables(opened, write_summary(opened))
    assert f"{ODD}/summary.png" in "".join(capsys.readouterr().out.split())


def test_a_dry_runs_folder(printed: Command, tmp_path: Path) -> None:
    make_project(tmp_path, "no-such/model-on-the-hub")
    assert f"planofruns/{ODD}" in printed("run", "tiny.yaml", "--dry-run", "--name", ODD)


def test_a_texts_folder_and_its_principles(printed: Command, tmp_path: Path) -> None:
    folder = write_texts(tmp_path, 1, 2)
    folder.rename(folder.with_name(ODD))
    assert f"{ODD}@1" in printed("constitution", "list")


def test_a_judge_and_a_slice(printed: Command, tmp_path: Path) -> None:
    rows = [
        {"id": n, "prompt": "q", "first": "a", "second": "b", "label": 1 + n % 2, "topic": f"{ODD}{n % 2}"}
        for n in range(4)
    ]
    (tmp_path / f"{ODD}.json").write_text(json.dumps(rows))
    votes = ["id,judge,forward", *(f"{n},{ODD}y,{1 + n % 2}" for n in range(4))]
    (tmp_path / "votes.csv").write_text("\n".join(votes) + "\n")
    out = printed("judge", "bench", f"{ODD}.json", "--by", "topic", "--votes", "votes.csv")
    for name in (f"votes.csvon{ODD}", f"{ODD}y", f"{ODD}0", f"{ODD}1"):
        assert name in out
