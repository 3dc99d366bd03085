"""Which text is in force: followed, pinned, scheduled, broken."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from rlaif.constitutions import constitution
from rlaif.errors import UserError
from rlaif.loop.in_force import InForce
from rlaif.rundir.store import RunDir, write_json
from tests.conftest import ROOT
from tests.stubs import stub_job, text, write_texts


def texts(root: Path, **changes: object) -> InForce:
    return InForce(stub_job(**changes), RunDir(root / "run"), root)


def test_a_name_follows_the_newest_version_and_edits(tmp_path: Path) -> None:
    folder = write_texts(tmp_path, 1)
    t = texts(tmp_path, constitution="rules")
    first = t.at(0)[0]
    (folder / "v10.yaml").write_text(text(10))
    tenth = t.at(1)[0]
    (folder / "v10.yaml").write_text(text(11))
    edited = t.at(2)[0]
    assert [c.version for c in (first, tenth, edited)] == [1, 10, 10]
    assert len({c.hash for c in (first, tenth, edited)}) == 3
    for c in (first, tenth, edited):
        assert t.load(c.ref) == c
    assert (tmp_path / "run/constitutions" / tenth.hash / "source.yaml").read_text() == text(10)


def test_a_comment_is_no_new_text(tmp_path: Path) -> None:
    folder = write_texts(tmp_path, 1)
    t = texts(tmp_path, constitution="rules")
    before = t.at(0)[0]
    (folder / "v1.yaml").write_text("# a remark\n" + text(1))
    assert t.at(1)[0].hash == before.hash


def test_a_pin_beats_newer_files_and_later_edits(tmp_path: Path) -> None:
    folder = write_texts(tmp_path, 1, 2)
    t = texts(tmp_path, constitution="rules@1")
    pinned = t.at(0)[0]
    (folder / "v1.yaml").write_text(text(7))
    assert t.at(1)[0] == pinned
    assert texts(tmp_path, constitution="rules@1").at(2)[0] == pinned  # a resumed run
    assert len(list((tmp_path / "run/constitutions").glob("*/source.yaml"))) == 1  # only what is used


def test_a_schedule_needs_its_files_only_once(tmp_path: Path) -> None:
    folder = write_texts(tmp_path, 1, 2)
    before = [texts(tmp_path).at(k)[0] for k in range(4)]
    assert [c.version for c in before] == [1, 1, 2, 2]
    for path in folder.iterdir():
        path.unlink()
    assert [texts(tmp_path).at(k)[0] for k in range(4)] == before


def test_a_scheduled_text_is_checked_at_the_start(tmp_path: Path) -> None:
    write_texts(tmp_path, 1)
    with pytest.raises(UserError, match=r"v2\.yaml"):
        texts(tmp_path)


def test_a_broken_template_raises_an_alarm_and_the_last_good_one_stays(tmp_path: Path) -> None:
    write_texts(tmp_path, 1)
    shutil.copytree(ROOT / "prompts" / "judge", tmp_path / "prompts" / "judge")
    path = tmp_path / "prompts" / "judge" / "pairwise.jinja"
    t = texts(tmp_path, constitution="rules", judge={"kind": "chat", "model": "m", "api_key_env": None},
              pairing={"method": "random"})  # fmt: skip
    good = t.at(0)
    assert good[1].keys() == {"pairwise", "pairwise_evaluate"}
    whole = path.read_text()
    path.write_text(whole.replace("_answers.jinja", "_nowhere.jinja"))
    assert t.at(1) == good
    assert [e.iteration for e in RunDir(tmp_path / "run").events() if e.kind == "alarm"] == [1]
    path.write_text(whole.replace("Which answer", "Say which answer"))
    assert t.at(2)[1] != good[1]


@pytest.mark.parametrize("broken", ["summary: [", "summary: 2024-13-45", "summary: x\nprinciples: []", None])
def test_a_broken_text_raises_one_alarm_and_the_last_good_one_stays(tmp_path: Path, broken: str | None) -> None:
    folder = write_texts(tmp_path, 1)
    notes: list[str] = []
    t = InForce(stub_job(constitution="rules"), RunDir(tmp_path / "run"), tmp_path, notes.append)
    good = t.at(0)[0]
    path = folder / "v1.yaml"
    path.write_text(broken) if broken is not None else path.unlink()
    assert t.at(1)[0] == t.at(2)[0] == good
    path.write_text(text(2))
    assert t.at(3)[0].hash != good.hash
    path.write_text("summary: [")
    t.at(4)[0]
    alarms = [e.iteration for e in RunDir(tmp_path / "run").events() if e.kind == "alarm"]
    assert alarms == [1, 4]
    assert len(notes) == 2
    assert good.hash in notes[0]


def test_best_against_worst_needs_a_voice_that_selects_or_a_rule_to_derive_one_from(tmp_path: Path) -> None:
    folder = write_texts(tmp_path, 1)
    plain = "".join(line for line in text(1).splitlines(keepends=True) if "use: select" not in line)
    (folder / "v1.yaml").write_text(plain)
    derived = texts(tmp_path, constitution="rules").at(0)[0]
    assert [v.id for v in derived.voices("select")] == ["wish/derived.2-select1"]
    (folder / "v1.yaml").write_text(plain.replace("Rule 1.", "1."))  # no word to derive one from
    with pytest.raises(UserError, match=r"rules@1: no contrast has `use: select`.*pairing\.method"):
        texts(tmp_path, constitution="rules")
    assert texts(tmp_path, constitution="rules", pairing={"method": "random"}).at(0)[0].version == 1


@pytest.mark.parametrize("reference", ["rules", "rules@1"])
def test_the_copy_is_what_was_parsed_even_if_an_editor_saves_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reference: str
) -> None:
    folder = write_texts(tmp_path, 1)
    parse = constitution.parse_constitution

    def saved_meanwhile(*arguments: Any) -> constitution.Constitution:
        (folder / "v1.yaml").write_text(text(9))
        return parse(*arguments)

    monkeypatch.setattr(constitution, "parse_constitution", saved_meanwhile)
    texts(tmp_path, constitution=reference)
    copies = {p.parent.name: p.read_text() for p in (tmp_path / "run/constitutions").glob("*/source.yaml")}
    assert {hash: parse(source, "rules", 1, "copy").hash for hash, source in copies.items()} == {h: h for h in copies}
    assert text(1) in copies.values()


def test_versions_that_say_the_same_keep_their_names(tmp_path: Path) -> None:
    folder = write_texts(tmp_path, 1)
    t = texts(tmp_path, constitution="rules")
    assert str(t.at(0)[0].ref) == "rules@1"
    (folder / "v3.yaml").write_text(text(1))
    third = t.at(1)[0]
    assert str(third.ref) == str(t.load(third.ref).ref) == "rules@3"
    for _ in range(2):  # and when the run goes on
        pinned = texts(tmp_path, schedule={0: "rules@1", 2: "rules@3", 4: "rules"})
        assert [str(pinned.at(k)[0].ref) for k in (0, 2, 4)] == ["rules@1", "rules@3", "rules@3"]
        (folder / "v4.yaml").write_text(text(4))  # too late for a pinned name


def test_pins_of_older_runs_stay_readable(tmp_path: Path) -> None:
    write_texts(tmp_path, 1)
    first = texts(tmp_path, constitution="rules@1").at(0)[0]
    write_json(tmp_path / "run/constitutions/pins.json", {"rules": first.hash, "rules@1": first.hash})
    assert texts(tmp_path, schedule={0: "rules", 2: "rules@1"}).at(0)[0] == first


CHAT: dict[str, Any] = {"judge": {"kind": "chat", "model": "m", "api_key_env": None}, "pairing": {"method": "random"}}


@pytest.mark.parametrize("reference", ["rules", "rules@1"])
def test_held_out_answers_are_measured_with_another_question(tmp_path: Path, reference: str) -> None:
    write_texts(tmp_path, 1)
    shutil.copytree(ROOT / "prompts" / "judge", tmp_path / "prompts" / "judge")
    notes: list[str] = []
    job = stub_job(constitution=reference, **CHAT)
    templates = InForce(job, RunDir(tmp_path / "run"), tmp_path, notes.append).at(0)[1]
    assert templates.keys() == {"pairwise", "pairwise_evaluate"}
    assert templates["pairwise"] != templates["pairwise_evaluate"]
    assert notes == []


def test_one_question_for_both_is_said_and_stays_so_in_a_pinned_run(tmp_path: Path) -> None:
    write_texts(tmp_path, 1)
    folder = tmp_path / "prompts" / "judge"
    shutil.copytree(ROOT / "prompts" / "judge", folder)
    (folder / "pairwise_evaluate.jinja").rename(folder / "elsewhere.txt")
    notes: list[str] = []
    job = stub_job(constitution="rules@1", **CHAT)
    assert InForce(job, RunDir(tmp_path / "run"), tmp_path, notes.append).at(0)[1].keys() == {"pairwise"}
    (said,) = notes
    assert "with the question that trains (template pairwise)" in said
    assert str(folder / "pairwise_evaluate.jinja") in said
    (folder / "elsewhere.txt").rename(folder / "pairwise_evaluate.jinja")  # as an update of rlaif does
    assert InForce(job, RunDir(tmp_path / "run"), tmp_path).at(1)[1].keys() == {"pairwise"}
    fresh = InForce(job, RunDir(tmp_path / "fresh"), tmp_path)
    assert fresh.at(0)[1].keys() == {"pairwise", "pairwise_evaluate"}
