"""Which text is in force: followed, pinned, scheduled, broken."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlaif.errors import UserError
from rlaif.store import RunDir
from rlaif.texts import Texts
from tests.stubs import stub_job, text, write_texts


def texts(root: Path, **changes: object) -> Texts:
    return Texts(stub_job(**changes), RunDir(root / "run"), root)


def test_a_name_follows_the_newest_version_and_edits(tmp_path: Path) -> None:
    folder = write_texts(tmp_path, 1)
    t = texts(tmp_path, constitution="rules")
    first = t.in_force(0)
    (folder / "v10.yaml").write_text(text(10))
    tenth = t.in_force(1)
    (folder / "v10.yaml").write_text(text(11))
    edited = t.in_force(2)
    assert [c.version for c in (first, tenth, edited)] == [1, 10, 10]
    assert len({c.hash for c in (first, tenth, edited)}) == 3
    for c in (first, tenth, edited):
        assert t.load(c.hash) == c
    assert (tmp_path / "run/constitutions" / tenth.hash / "source.yaml").read_text() == text(10)


def test_a_comment_is_no_new_text(tmp_path: Path) -> None:
    folder = write_texts(tmp_path, 1)
    t = texts(tmp_path, constitution="rules")
    before = t.in_force(0)
    (folder / "v1.yaml").write_text("# a remark\n" + text(1))
    assert t.in_force(1).hash == before.hash


def test_a_pin_beats_newer_files_and_later_edits(tmp_path: Path) -> None:
    folder = write_texts(tmp_path, 1, 2)
    t = texts(tmp_path, constitution="rules@1")
    pinned = t.in_force(0)
    (folder / "v1.yaml").write_text(text(7))
    assert t.in_force(1) == pinned
    assert texts(tmp_path, constitution="rules@1").in_force(2) == pinned  # a resumed run
    assert len(list((tmp_path / "run/constitutions").glob("*/source.yaml"))) == 1  # only what is used


def test_a_schedule_needs_its_files_only_once(tmp_path: Path) -> None:
    folder = write_texts(tmp_path, 1, 2)
    before = [texts(tmp_path).in_force(k) for k in range(4)]
    assert [c.version for c in before] == [1, 1, 2, 2]
    for path in folder.iterdir():
        path.unlink()
    assert [texts(tmp_path).in_force(k) for k in range(4)] == before


def test_a_scheduled_text_is_checked_at_the_start(tmp_path: Path) -> None:
    write_texts(tmp_path, 1)
    with pytest.raises(UserError, match=r"v2\.yaml"):
        texts(tmp_path)


@pytest.mark.parametrize("broken", ["summary: [", "summary: 2024-13-45", "summary: x\nprinciples: []", None])
def test_a_broken_text_raises_one_alarm_and_the_last_good_one_stays(tmp_path: Path, broken: str | None) -> None:
    folder = write_texts(tmp_path, 1)
    notes: list[str] = []
    t = Texts(stub_job(constitution="rules"), RunDir(tmp_path / "run"), tmp_path, notes.append)
    good = t.in_force(0)
    path = folder / "v1.yaml"
    path.write_text(broken) if broken is not None else path.unlink()
    assert t.in_force(1) == t.in_force(2) == good
    path.write_text(text(2))
    assert t.in_force(3).hash != good.hash
    path.write_text("summary: [")
    t.in_force(4)
    alarms = [e.iteration for e in RunDir(tmp_path / "run").events() if e.kind == "alarm"]
    assert alarms == [1, 4]
    assert len(notes) == 2
    assert good.hash in notes[0]


def test_best_against_worst_needs_a_voice_that_selects(tmp_path: Path) -> None:
    folder = write_texts(tmp_path, 1)
    plain = "".join(line for line in text(1).splitlines(keepends=True) if "use: select" not in line)
    (folder / "v1.yaml").write_text(plain)
    with pytest.raises(UserError, match=r"rules@1: no contrast has `use: select`.*pairing\.method"):
        texts(tmp_path, constitution="rules")
    assert texts(tmp_path, constitution="rules", pairing={"method": "random"}).in_force(0).version == 1
