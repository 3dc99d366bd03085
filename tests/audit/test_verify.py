"""`rlaif audit RUN verify`: whatever is changed, cut or added afterwards is found, with file and line."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from rlaif.audit.verify import line_changes, verify
from rlaif.cli import app
from rlaif.errors import RlaifError, UserError
from rlaif.rundir.heads import read_heads, write_head
from rlaif.rundir.store import RunDir, write_json
from tests.stubs import BASE_DIGEST, Quiet, stub_job, stub_loop

pytestmark = pytest.mark.slow

STAGES = ("completions", "scores", "pairs", "votes", "decisions", "preferences")


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four iterations that nobody touched."""
    root = tmp_path_factory.mktemp("verify")
    job = stub_job()
    (root / "run").mkdir()
    header = {"schema_version": 1, "job": job.model_dump(mode="json"), "models": {"policy": BASE_DIGEST}}
    write_json(root / "run" / "run.json", header)
    stub_loop(root, job).run()
    RunDir(root / "run").event("finished", "4 iterations done", head=write_head(RunDir(root / "run")).name)
    return root / "run"


@pytest.fixture
def run(written: Path, tmp_path: Path) -> RunDir:
    """A copy to tamper with."""
    shutil.copytree(written, tmp_path / "run")
    return RunDir.open(tmp_path / "run")


def findings(run: RunDir, head: str | None = None) -> list[str]:
    return [str(f) for f in verify(run, head).findings]


def edit(path: Path, change: Callable[[list[bytes]], list[bytes]]) -> None:
    path.write_bytes(b"".join(change(path.read_bytes().splitlines(keepends=True))))


def test_a_run_that_nobody_touched_holds(written: Path) -> None:
    report = verify(RunDir.open(written))
    assert (report.findings, report.notes) == ((), ())
    assert report.heads == 4
    assert report.stages == len(list(written.glob("*/*/*.jsonl")))
    assert report.rows == sum(len(p.read_text().splitlines()) for p in written.glob("*/*/*.jsonl"))
    assert (report.texts, report.templates) == (2, 0)


@pytest.mark.parametrize(("schema", "templates"), [("run_schema1", 2), ("run_schema2", 4)])
def test_a_text_counts_once_whatever_files_it_has(schema: str, templates: int) -> None:
    run = RunDir.open(Path(__file__).resolve().parent.parent / "data" / schema)
    report = verify(run)
    assert (report.texts, report.templates) == (2, templates)
    told = CliRunner().invoke(app, ["audit", str(run.path), "verify"]).stdout
    assert f"2 texts, {templates} templates or wordings, " in " ".join(told.split())


@pytest.mark.parametrize("seed", range(12))
def test_a_changed_byte_is_found_with_its_line(run: RunDir, seed: int) -> None:
    draw = random.Random(seed)
    path = run.iteration(draw.choice((0, 2, 3))).path / f"{draw.choice(STAGES)}.jsonl"
    content = bytearray(path.read_bytes())
    at = draw.randrange(len(content) - 1)
    content[at] = content[at] ^ 1 if content[at] not in b"\n\x0b" else ord("x")
    line = bytes(content[:at]).count(b"\n") + 1
    path.write_bytes(content)
    (found,) = verify(run).findings
    assert (found.file, found.line) == (str(path.relative_to(run.path)), line)
    assert found.what == "was changed after it was written"


@pytest.mark.parametrize("seed", range(6))
def test_a_cut_line_is_found_where_it_stood(run: RunDir, seed: int) -> None:
    draw = random.Random(seed)
    path = run.iteration(0).path / f"{draw.choice(STAGES)}.jsonl"
    at = draw.randrange(len(path.read_text().splitlines()))
    edit(path, lambda rows: rows[:at] + rows[at + 1 :])
    assert findings(run) == [
        f"{path.relative_to(run.path)}:{at + 1}: the line was cut after it was written (it stood here)"
    ]


@pytest.mark.parametrize("seed", range(6))
def test_an_added_line_is_found(run: RunDir, seed: int) -> None:
    draw = random.Random(seed)
    path = run.iteration(2).path / f"{draw.choice(STAGES)}.jsonl"
    at = draw.randrange(len(path.read_text().splitlines()) + 1)
    edit(path, lambda rows: [*rows[:at], b'{"made": "up"}\n', *rows[at:]])
    assert findings(run) == [f"{path.relative_to(run.path)}:{at + 1}: the line was added after it was written"]


def test_several_changes_in_one_file_are_told_apart(run: RunDir) -> None:
    path = run.iteration(0).path / "votes.jsonl"
    edit(path, lambda rows: [rows[0], b"{}\n", *rows[2:5], *rows[6:], b"{}\n"])
    assert [(f.line, f.what.partition(" after")[0]) for f in verify(run).findings] == [
        (2, "was changed"),
        (6, "the line was cut"),
        (len(path.read_bytes().splitlines()), "the line was added"),
    ]


def test_a_lost_last_newline_is_found(run: RunDir) -> None:
    path = run.iteration(0).path / "pairs.jsonl"
    path.write_bytes(path.read_bytes()[:-1])
    assert findings(run) == ["iterations/0000/pairs.jsonl:6: was changed after it was written"]


def test_two_files_that_change_places_are_found(run: RunDir) -> None:
    a, b = (run.iteration(k).path / "decisions.jsonl" for k in (0, 3))
    one, other = a.read_bytes(), b.read_bytes()
    a.write_bytes(other)
    b.write_bytes(one)
    assert {f.file for f in verify(run).findings} == {
        "iterations/0000/decisions.jsonl",
        "iterations/0003/decisions.jsonl",
    }
    for path in (a, b):  # with their meta files, so that each fits its own
        meta = path.with_name("decisions.meta.json")
        meta.rename(meta.with_suffix(".was"))
    (a.with_name("decisions.meta.was")).rename(b.with_name("decisions.meta.json"))
    (b.with_name("decisions.meta.was")).rename(a.with_name("decisions.meta.json"))
    found = findings(run)
    assert (
        "iterations/0000/decisions.jsonl: isn't what preferences was made from: it was written anew, its meta file too"
        in found
    )
    assert any(f.startswith("iterations/0000/decisions.meta.json: was changed after heads.jsonl:1") for f in found)


def test_rows_that_were_rewritten_with_their_meta_file_are_found(run: RunDir) -> None:
    here = run.iteration(0)
    rows = (here.path / "votes.jsonl").read_bytes().splitlines(keepends=True)
    for name in ("votes.jsonl", "votes.meta.json"):
        (here.path / name).unlink()
    from rlaif.records import Vote

    here.rows("votes", Vote, lambda _: [[Vote.model_validate_json(r) for r in rows[:-1]]], inputs=["pairs"])
    assert findings(run) == [
        "iterations/0000/votes.meta.json: was changed after heads.jsonl:1 was written",
        "iterations/0000/votes.jsonl: isn't what decisions was made from: it was written anew, its meta file too",
    ]


@pytest.mark.parametrize("name", ["plan.json", "metrics.json", "votes.meta.json"])
def test_files_of_an_iteration_that_hold_no_rows_are_covered(run: RunDir, name: str) -> None:
    path = run.iteration(2).path / name
    path.write_text(path.read_text().replace("{\n", "{ \n", 1))
    assert findings(run) == [f"iterations/0002/{name}: was changed after heads.jsonl:3 was written"]


def test_events_are_only_appended(run: RunDir) -> None:
    path = run.path / "events.jsonl"
    run.event("resumed", "later")
    assert verify(run).holds
    edit(path, lambda rows: [rows[0].replace(b"2", b"3", 1), *rows[1:]])
    assert findings(run) == ["events.jsonl:1: was changed after it was written"]
    edit(path, lambda rows: rows[1:])
    assert findings(run) == ["events.jsonl:1: the line was cut after it was written (it stood here)"]


def test_the_job_may_only_change_when_a_run_goes_on(run: RunDir) -> None:
    header = json.loads((run.path / "run.json").read_text())
    header["job"]["iterations"] = 9
    write_json(run.path / "run.json", header)
    assert findings(run) == ["run.json: was changed after heads.jsonl:4 was written, and no run went on since"]
    run.event("resumed", "9 iterations")
    assert findings(run) == []


def test_a_plan_that_names_another_policy_is_found(run: RunDir) -> None:
    path = run.iteration(2).path / "plan.json"
    plan = json.loads(path.read_text())
    plan["policy"]["digest"] = "another"
    write_json(path, plan)
    assert findings(run)[-1].startswith("iterations/0002/plan.json: names policy another, and iteration ")


def test_an_edited_text_is_found(run: RunDir) -> None:
    hash = json.loads((run.iteration(0).path / "plan.json").read_text())["constitution"]["hash"]
    copy = run.path / "constitutions" / hash / "constitution.json"
    copy.write_text(copy.read_text().replace("Rule 1.", "Rule 9."))
    changed = [f for f in verify(run).findings if f.file == f"constitutions/{hash}/constitution.json"]
    assert [f.what.partition(":")[0] for f in changed][1:] == ["was changed after it was written"]


def test_a_removed_tail_is_noticed_by_a_head_that_was_noted(run: RunDir) -> None:
    noted = [head for head in read_heads(run.path) if head is not None]
    assert verify(run, noted[-1].name).holds
    assert verify(run, noted[1].head).noted == "it is the head after iteration 2; 2 more follow"
    assert "noted after iteration 9" in str(verify(run, f"9:{noted[1].head}").noted)
    # The folder alone: the run itself tells.
    shutil.rmtree(run.iteration(3).path)
    told = findings(run)
    assert "iterations/0003: the folder is gone; heads.jsonl:4 covers it" in told
    # Everything that tells of it, as somebody careful would: only the noted head does.
    shutil.rmtree(run.path / "evaluations/0004")
    edit(run.path / "heads.jsonl", lambda rows: rows[:3])
    size = noted[2].growing["events.jsonl"].size
    events = run.path / "events.jsonl"
    events.write_bytes(events.read_bytes()[:size])
    assert findings(run) == []
    assert findings(run, noted[-1].name) == [
        "heads.jsonl: the noted head is after iteration 4, the newest here after iteration 3: a tail was removed, or "
        "the head is another run's"
    ]
    assert "its tail was removed, or it was written anew" in findings(run, noted[-1].head)[0]


def test_a_head_of_a_rewritten_history_is_none_of_the_runs(run: RunDir) -> None:
    noted = [head for head in read_heads(run.path) if head is not None]
    other = noted[1].model_copy(update={"files": noted[1].files | {"iterations/0001/plan.json": "0" * 64}})
    assert findings(run, f"2:{other.computed()}") == [
        "heads.jsonl: the noted head after iteration 2 is none of this run's: what is up to there was written anew"
    ]
    with pytest.raises(UserError, match="--head 12: not a head"):
        verify(run, "12")


def test_a_head_that_was_cut_or_changed_is_found(run: RunDir) -> None:
    edit(run.path / "heads.jsonl", lambda rows: [rows[0], *rows[2:]])
    assert any(f.startswith("heads.jsonl:2: the link") for f in findings(run))
    edit(run.path / "heads.jsonl", lambda rows: [rows[0].replace(b'"iteration":0', b'"iteration":1'), *rows[1:]])
    assert "heads.jsonl:1: the head doesn't follow from its line: it was changed" in findings(run)


def test_a_stage_that_was_slipped_in_is_found(run: RunDir) -> None:
    (run.iteration(2).path / "extra.jsonl").write_text("{}\n")
    assert findings(run) == [
        "iterations/0002/extra.jsonl: has no meta file: it was added, or its meta file was removed"
    ]


@pytest.mark.parametrize("number", [1, 3, 5])
def test_an_evaluation_that_was_slipped_in_is_found(run: RunDir, number: int) -> None:
    shutil.copytree(run.evaluation(4).path, run.evaluation(number).path)
    (run.evaluation(number).path / "metrics.json").write_text('{"win_rate": 1.0}\n')
    what = "was added after iteration 4 was done: no line of heads.jsonl covers it"
    assert f"evaluations/{number:04d}/metrics.json: {what}" in findings(run)
    # One after the newest iteration may be under way, as long as another iteration is.
    run.iteration(4).path.mkdir()
    assert (findings(run) == []) == (number == 5)


def test_a_policy_whose_weights_are_others_is_found(run: RunDir) -> None:
    folder = run.iteration(3).path / "policy"
    (folder / "model.safetensors").write_bytes(b"other weights")
    assert verify(run).findings[0].file == "iterations/0003/policy"
    assert verify(run, weights=False).holds
    shutil.rmtree(folder)  # pruned
    assert verify(run).holds


def test_a_run_without_row_digests_and_heads_names_the_file(run: RunDir) -> None:
    (run.path / "heads.jsonl").unlink()
    events = run.path / "events.jsonl"
    edit(events, lambda rows: rows[:-1])
    for path in run.path.glob("*/*/*.meta.json"):
        meta = json.loads(path.read_text())
        del meta["row_digests"]
        write_json(path, meta)
    report = verify(run)
    assert report.holds
    assert len(report.notes) == 2
    edit(run.iteration(0).path / "votes.jsonl", lambda rows: rows[:-1])
    assert findings(run) == [
        "iterations/0000/votes.jsonl: was changed after it was written (23 rows, then 24; no digests of rows)"
    ]


def test_any_flipped_bit_of_any_covered_file_is_found(written: Path, tmp_path: Path) -> None:
    shutil.copytree(written, tmp_path / "run")
    files = [
        p
        for p in sorted((tmp_path / "run").rglob("*"))
        if p.is_file()
        and p.parent.name not in ("policy", "replay")
        and "learner" not in p.parts
        and p.name != "run.json"
    ]
    assert {"heads.jsonl", "events.jsonl", "plan.json", "votes.jsonl", "votes.meta.json"} < {p.name for p in files}
    grown = next(head.growing for head in reversed(read_heads(tmp_path / "run")) if head)
    draw = random.Random(3)
    for path in [*files, *draw.choices(files, k=30)]:
        whole = path.read_bytes()
        if not whole:
            continue
        name = str(path.relative_to(tmp_path / "run"))
        at = draw.randrange(grown[name].size if name in grown else len(whole))  # what grew after the head is in none
        path.write_bytes(whole[:at] + bytes([whole[at] ^ (1 << draw.randrange(8))]) + whole[at + 1 :])
        told = findings(RunDir(tmp_path / "run"))
        assert any(str(path.relative_to(tmp_path / "run")) in f for f in told), (path, at, whole[at : at + 1], told)
        path.write_bytes(whole)
    assert findings(RunDir(tmp_path / "run")) == []


class Stopping(Quiet):
    """Verifies the run at every stage that begins, and stops it in the third iteration."""

    def __init__(self, run: Path) -> None:
        super().__init__()
        self.run, self.reports = run, 0

    def stage(self, iteration: int, name: str, total: int, unit: str, text: str) -> None:
        assert verify(RunDir(self.run)).findings == (), (iteration, name)
        self.reports += 1
        if (iteration, name) == (2, "judge"):
            raise RlaifError("stop here")


def test_a_run_that_is_being_written_holds_at_every_stage(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    write_json(tmp_path / "run/run.json", {"schema_version": 1, "models": {"policy": BASE_DIGEST}})
    progress = Stopping(tmp_path / "run")
    with pytest.raises(RlaifError, match="stop here"):
        stub_loop(tmp_path, progress=progress).run()
    assert progress.reports > 10
    assert verify(RunDir(tmp_path / "run")).holds


def test_a_run_prints_its_head_after_each_iteration(tmp_path: Path) -> None:
    progress = Quiet()
    stub_loop(tmp_path, progress=progress).run()
    heads = [head.name for head in read_heads(tmp_path / "run") if head is not None]
    assert [note for note in progress.notes if note.startswith("head ")] == [f"head {name}" for name in heads]
    assert [name.partition(":")[0] for name in heads] == ["1", "2", "3", "4"]


def test_heads_go_on_where_a_run_was_killed_before_its_head(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    write_json(tmp_path / "run/run.json", {"schema_version": 1, "models": {"policy": BASE_DIGEST}})
    stub_loop(tmp_path, stub_job(iterations=2)).run()
    edit(tmp_path / "run/heads.jsonl", lambda rows: [rows[0], rows[1][:40]])  # torn
    stub_loop(tmp_path, stub_job(iterations=4)).run()
    run = RunDir(tmp_path / "run")
    assert verify(run).holds
    assert [h and h.iteration for h in read_heads(run.path)] == [0, None, 2, 3]  # the next one covers it too


def test_line_changes_say_what_happened() -> None:
    def changes(before: str, after: str) -> list[tuple[str, int, int]]:
        return line_changes([c.encode() for c in before], [c.encode() for c in after])

    assert changes("abcd", "abcd") == []
    assert changes("abcd", "aXcY") == [("changed", 1, 2), ("changed", 3, 4)]
    assert changes("abcdef", "abef") == [("cut", 2, 4)]
    assert changes("abcd", "abXcd") == [("added", 2, 3)]
    assert changes("", "a") == [("added", 0, 1)]
    assert changes("ab", "") == [("cut", 0, 2)]


def test_the_command(run: RunDir) -> None:
    head = read_heads(run.path)[-1]
    assert head is not None
    clean = CliRunner().invoke(app, ["audit", str(run.path), "verify", "--head", head.name])
    assert clean.exit_code == 0, clean.output
    assert "everything holds" in clean.output
    edit(run.iteration(0).path / "votes.jsonl", lambda rows: [rows[0], b"{}\n", *rows[2:]])
    for arguments in (["audit", str(run.path), "verify"], ["audit", "verify", str(run.path)]):
        found = CliRunner().invoke(app, arguments)
        assert found.exit_code == 1
        assert "iterations/0000/votes.jsonl:2: was changed" in found.output
    as_json = CliRunner().invoke(app, ["audit", str(run.path), "verify", "--json"])
    assert json.loads(as_json.output)["findings"][0]["line"] == 2


def test_a_partial_file_hides_no_changed_rows(run: RunDir) -> None:
    head = read_heads(run.path)[-1]
    assert head is not None
    here = run.iteration(1).path
    edit(here / "votes.jsonl", lambda rows: [rows[0], b"{}\n", *rows[2:]])
    (here / "votes.jsonl.partial").touch()
    assert findings(run, head.name) == [
        "iterations/0001/votes.jsonl.partial: stands beside the complete votes.jsonl: it was added",
        "iterations/0001/votes.jsonl:2: was changed after it was written",
    ]
    (here / "votes.jsonl").rename(here / "votes.jsonl.partial")
    assert findings(run, head.name) == ["iterations/0001/votes.jsonl: is gone; its meta file is there"]
    (run.path / "heads.jsonl").unlink()  # without heads, a later stage still tells that it was complete
    assert "iterations/0001/votes.jsonl: is gone, and decisions was made from it" in findings(run)


def test_a_job_that_may_have_been_written_anew_is_noted(run: RunDir) -> None:
    assert verify(run).notes == ()
    (run.path / "run.json").write_text((run.path / "run.json").read_text() + " ")
    run.event("resumed", "9 iterations")
    (note,) = verify(run).notes
    assert note.startswith("run.json is not what heads.jsonl:4 covers; a resume was noted since")


def test_an_unreadable_head_is_named_itself_and_accuses_nothing_else(run: RunDir) -> None:
    edit(run.path / "heads.jsonl", lambda rows: [*rows[:2], rows[2][:50] + b"\n", rows[3]])
    damaged = "can't be read: it was damaged after it was written, and what it covered isn't checked"
    assert findings(run) == [f"heads.jsonl:3: {damaged}"]
    (run.iteration(3).path / "metrics.json").write_text("{}\n")  # the line of the head after it is still right
    assert findings(run)[1:] == ["iterations/0003/metrics.json: was changed after heads.jsonl:4 was written"]


@pytest.mark.parametrize("line", [0, 3])
def test_the_first_and_the_last_head_unreadable(run: RunDir, line: int) -> None:
    edit(run.path / "heads.jsonl", lambda rows: [*rows[:line], b"{}\n", *rows[line + 1 :]])
    assert [f.partition(" it was")[0] for f in findings(run)] == [f"heads.jsonl:{line + 1}: can't be read:"]


def test_a_torn_last_head_is_noted(run: RunDir) -> None:
    path = run.path / "heads.jsonl"
    path.write_bytes(path.read_bytes()[:-9])
    assert [n.partition(",")[0] for n in verify(run).notes] == ["heads.jsonl:4 is a torn line"]


def test_a_text_that_nothing_names_is_noted(run: RunDir) -> None:
    (run.path / "constitutions" / "0123456789ab").mkdir()
    (note,) = verify(run).notes
    assert note.startswith("constitutions/0123456789ab is named by no plan and no head")


def test_labels_of_after_the_last_iteration_get_a_head(run: RunDir) -> None:
    before = read_heads(run.path)[-1]
    assert before is not None
    assert write_head(run) == before
    (run.path / "review").mkdir()
    (run.path / "review/labels.jsonl").write_text("{}\n")
    after = write_head(run)
    assert (after.previous, after.iteration) == (before.head, before.iteration)
    assert "review/labels.jsonl" in after.growing
    assert write_head(run) == after
    assert verify(run, before.name).noted == "it is the head after iteration 4; 1 more follow"
    (run.path / "review/labels.jsonl").write_text("[]\n")
    assert findings(run) == ["review/labels.jsonl:1: was changed after it was written"]


@pytest.mark.parametrize("damage", ["gone", "a folder", "{}", "no word of the policy"])
def test_a_damaged_meta_file_of_an_update_accuses_no_plan(run: RunDir, damage: str) -> None:
    (run.path / "heads.jsonl").unlink()
    edit(run.path / "events.jsonl", lambda rows: rows[:-1])
    k = next(k for k in (1, 2, 0) if not run.iteration(k).meta("updates")["skipped"])
    meta = run.iteration(k).path / "updates.meta.json"
    content = json.loads(meta.read_text())
    meta.unlink()
    if damage == "a folder":
        meta.mkdir()
    elif damage != "gone":
        write_json(meta, {k: v for k, v in content.items() if damage != "{}" and k != "policy_digest"})
    edit(run.iteration(3).path / "votes.jsonl", lambda rows: rows[:-1])
    expected = {
        "gone": "updates.jsonl: has no meta file: it was added, or its meta file was removed",
        "a folder": "updates.meta.json: can't be read (Is a directory)",
        "{}": "updates.meta.json: is no meta file any more (it holds no digest)",
        "no word of the policy": "updates.meta.json: doesn't say which policy was made; it was damaged after it was "
        "written",
    }[damage]
    found = findings(run)
    assert f"iterations/{k:04d}/{expected}" in found
    assert len(found) == 2, found  # and the cut line


def test_heads_that_events_tell_of_are_missed_when_their_file_is_gone(run: RunDir) -> None:
    (run.path / "heads.jsonl").unlink()
    (found,) = findings(run)
    assert found.startswith("events.jsonl:")
    assert "tells of head 4:" in found
