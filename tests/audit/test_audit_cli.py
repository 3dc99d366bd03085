"""`rlaif audit` as people and programs call it; each command also in a process of its own, without heavy libraries."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.audit_run import write_run
from rlaif.rundir.store import RunDir
from tests.audit.conftest import STORED
from tests.conftest import rlaif_here
from tests.test_layers import main, without_heavy

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parent.parent.parent
PAIR = "a75b1dfe68c748c8"


def audit(*arguments: str, run: Path = STORED) -> subprocess.CompletedProcess[str]:
    return rlaif_here("audit", str(run), *arguments)


def complaints(done: subprocess.CompletedProcess[str]) -> list[str]:
    """What was written to stderr, without the progress of a slow machine."""
    return [line for line in done.stderr.splitlines() if not line.startswith("indexing")]


COMMANDS = [
    ((), "20, kept 8"),
    (("list", "--status", "kept"), "1-8 of 8 pairs"),
    (("show", PAIR, "--questions"), "BEGIN ANSWER A"),
    (("flips",), "second shown first"),
    (("disagree",), PAIR),
    (("trace", "3"), "9 preferences on 7 pairs in 5 steps"),
    (("compare", str(STORED)), "the same settings"),
    (("sql", "SELECT count(*) AS n FROM votes"), "208"),
]


@pytest.mark.parametrize(("arguments", "expected"), COMMANDS, ids=lambda c: c[0] if c and isinstance(c, tuple) else "")
def test_commands_without_heavy_libraries(arguments: tuple[str, ...], expected: str) -> None:
    done = without_heavy(main("audit", str(STORED), *arguments))
    assert done.returncode == 0, done.stderr
    assert expected in done.stdout
    assert "\x1b" not in done.stdout  # plain when piped
    as_json = without_heavy(main("audit", str(STORED), *arguments, "--json"))
    assert as_json.returncode == 0, as_json.stderr
    assert json.loads(as_json.stdout)


def test_the_overview_fits_a_screen() -> None:
    done = audit()
    lines = done.stdout.splitlines()
    assert len(lines) <= 40
    assert max(map(len, lines)) <= 160
    for word in ("rules@1", "rules@2", "order_flip 10", "position bias 0.58", "16 of 160 votes", "win rate", "cost"):
        assert word in done.stdout


def on_a_terminal(*arguments: str, columns: int, lines: int, run: Path = STORED) -> str:
    """What a terminal of a size is sent."""
    parent, child = pty.openpty()
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TERM": "xterm-256color"}
    environment |= {"COLUMNS": str(columns), "LINES": str(lines)}
    command = [sys.executable, "-m", "rlaif", "audit", str(run), *arguments]
    process = subprocess.Popen(command, env=environment, stdout=child, stderr=subprocess.DEVNULL)
    os.close(child)
    shown = b""
    while True:
        try:
            block = os.read(parent, 65536)
        except OSError:  # the other end is closed
            break
        if not block:
            break
        shown += block
    os.close(parent)
    assert process.wait() == 0
    return shown.decode()


def test_a_terminal_gets_a_rich_table_and_a_pipe_lines() -> None:
    query = ("sql", "SELECT * FROM votes LIMIT 2")
    shown = on_a_terminal(*query, columns=120, lines=40)
    assert "\x1b[1m" in shown
    assert "┏" in shown
    assert "…" not in shown
    head, *rows = (line.split("\t") for line in audit(*query).stdout.splitlines())
    assert [len(head)] * 2 == [len(row) for row in rows]
    values = json.loads(audit(*query, "--json").stdout)
    assert [row[head.index("ballot_id")] for row in rows] == [v["ballot_id"] for v in values]
    assert not any("┃" in line or "│" in line for line in audit("show", PAIR).stdout.splitlines())


@pytest.fixture(scope="module")
def long_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("long") / "run"
    write_run(path, pairs=100, iterations=50)
    return path


@pytest.mark.parametrize(("columns", "lines"), [(80, 24), (100, 30), (200, 60)])
def test_the_overview_of_a_long_run_fits_the_screen(long_run: Path, columns: int, lines: int) -> None:
    shown = on_a_terminal(columns=columns, lines=lines, run=long_run).splitlines()
    assert len(shown) < lines
    assert any("after 50" in line for line in shown)
    assert any(line.startswith("│        50 │") for line in shown)
    assert any(line.startswith("│         … │") for line in shown)
    assert ("┃ cached" in "".join(shown).replace("\x1b[0m", "").replace("\x1b[1m", "")) == (columns > 100)
    piped = audit(run=long_run).stdout
    assert len([line for line in piped.splitlines() if line.count("\t") == 10]) == 51


LONG = "x" * 299 + "."
CHINESE = "天地玄黄宇宙洪荒" * 20


@pytest.mark.parametrize("text", [LONG, CHINESE])
@pytest.mark.parametrize("columns", [60, 100, None])
def test_text_without_spaces_is_shown_whole(copy: RunDir, text: str, columns: int | None) -> None:
    here = copy.iteration(0).path
    for name, key in (("completions", "text"), ("votes", "raw_reply")):
        rows = [json.loads(line) for line in (here / f"{name}.jsonl").read_text().splitlines()]
        for row in rows:
            row[key] = text
        (here / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    if columns is None:
        shown = audit("show", PAIR, run=copy.path).stdout
        assert shown.count(text) == 10
    else:
        shown = on_a_terminal("show", PAIR, columns=columns, lines=30, run=copy.path)
    assert "…" not in shown
    # Two answers, eight votes.
    assert shown.count(text[0]) >= 10 * text.count(text[0])
    assert shown.count(text[-1]) >= 10 * text.count(text[-1])


def test_missing_events_are_no_word_on_alarms(copy: RunDir) -> None:
    assert "no alarms" in audit(run=copy.path).stdout or "alarm " in audit(run=copy.path).stdout
    (copy.path / "events.jsonl").unlink()
    shown = audit(run=copy.path).stdout
    assert "alarms unknown: events.jsonl is missing" in shown
    assert "no alarms" not in shown


def test_a_pair_of_a_skipped_update_was_not_trained_on() -> None:
    shown = audit("show", "b7ee58b2dd326274").stdout
    assert "mixed in iteration 4 as judge, first chosen: update skipped\nnever trained on" in shown
    assert "trained on 9 preferences (2 replayed, 0 human) in 5 steps" in audit().stdout


def test_iterations_are_counted_from_one_in_commands_and_from_zero_in_json() -> None:
    page = json.loads(audit("list", "--iteration", "1", "--json").stdout)
    assert {row["iteration"] for row in page["rows"]} == {0}
    assert page["total"] == 5


def test_help_documents_every_table_and_column() -> None:
    from rlaif.audit.tables import TABLES, all_columns

    shown = audit("sql", "--help").stdout
    for table in TABLES:
        assert f"{table.name}: {table.about}" in shown
        for column in all_columns(table):
            assert f"{column.name} {column.type}" in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("show", "nothing"), "no pair `nothing`"),
        (("list", "--reason", "bogus"), "--reason: "),
        (("list", "--iteration", "0"), "counts from 1"),
        (("trace", "77"), "no checkpoint `77`"),
        (("sql", "DELETE FROM votes"), "read-only"),
        (("sql", "SELECT x FROM votes"), "Binder Error"),
        (("compare", "nowhere"), "nowhere: no such run"),
        (("export", "--to", "x.csv"), ".parquet or .jsonl"),
    ],
)
def test_mistakes_are_one_line(arguments: tuple[str, ...], message: str) -> None:
    done = audit(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr
    assert len(complaints(done)) == 1


def test_a_folder_that_is_no_run_and_a_newer_schema(tmp_path: Path, copy: RunDir) -> None:
    (tmp_path / "empty").mkdir()
    for path, said in ((tmp_path, "this is a folder of runs"), (tmp_path / "empty", "not a run directory")):
        done = audit(run=path)
        assert (done.returncode, len(complaints(done))) == (2, 1)
        assert said in done.stderr
    header = json.loads((copy.path / "run.json").read_text())
    (copy.path / "run.json").write_text(json.dumps(header | {"schema_version": 99}))
    done = audit("list", run=copy.path)
    assert (done.returncode, len(complaints(done))) == (2, 1)
    assert "written with schema 99" in done.stderr


def test_damage_is_told_on_stderr_and_the_rest_is_shown(copy: RunDir) -> None:
    path = copy.iteration(1).path / "votes.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    lines[4] = b"damaged\n"
    path.write_bytes(b"".join(lines))
    done = audit("list", "--json", run=copy.path)
    assert done.returncode == 0
    assert f"{path}:5: not a line of votes" in done.stderr
    assert json.loads(done.stdout)["total"] == 20


def test_export_without_datasets_says_what_to_install(tmp_path: Path) -> None:
    done = without_heavy(main("audit", str(STORED), "export", "--to", str(tmp_path / "out.parquet")))
    assert done.returncode == 2
    assert complaints(done) == ["rlaif: export needs the `datasets` package: pip install datasets"]


def test_a_completion_cannot_steer_the_terminal(copy: RunDir) -> None:
    path = copy.iteration(0).path / "completions.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        row["text"] = "\x1b[2J\x9b2J[red]wiped[/red]\x07"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    done = audit("show", PAIR, run=copy.path)
    assert done.returncode == 0
    assert "\ufffd[2J" in done.stdout
    assert "[red]wiped[/red]\ufffd" in done.stdout
    assert not {"\x1b", "\x9b", "\x07"} & set(done.stdout)


def test_labels_are_shown_beside_the_verdict(copy: RunDir) -> None:
    (copy.path / "review").mkdir()
    labels = [{"pair_id": PAIR, "iteration": 0, "outcome": o, "author": "an", "time": "t", "reason": r}
              for o, r in (("skip", None), ("second", "[clearer]"))]  # fmt: skip
    (copy.path / "review/labels.jsonl").write_text("".join(json.dumps(x) + "\n" for x in labels) + '{"pair_id"')
    found = json.loads(audit("show", PAIR, "--json", run=copy.path).stdout)
    assert [x["outcome"] for x in found["labels"]] == ["skip", "second"]
    assert found["decision"]["verdict"]["outcome"] == "first"
    done = audit("show", PAIR, run=copy.path)
    assert "label: second by an at t: [clearer]" in done.stdout
    assert complaints(done) == []


def test_a_run_that_has_just_begun(copy: RunDir, tmp_path: Path) -> None:
    begun = tmp_path / "begun"
    begun.mkdir()
    (begun / "run.json").write_bytes((copy.path / "run.json").read_bytes())
    for arguments in ((), ("list",), ("flips",), ("sql", "SELECT count(*) FROM votes")):
        done = audit(*arguments, run=begun)
        assert done.returncode == 0, done.stderr
        assert complaints(done) == []
    assert "0 of 4 iterations done" in audit(run=begun).stdout


def test_sql_json_is_json() -> None:
    query = (
        "SELECT 1 AS n, 2 AS n, 'infinity'::DOUBLE AS i, [{'x': 'nan'::DOUBLE}] AS l, "
        "(SELECT metrics FROM iterations LIMIT 1) AS m"
    )

    def refuse(name: str) -> None:
        raise AssertionError(name)

    (row,) = json.loads(audit("sql", query, "--json").stdout, parse_constant=refuse)
    assert (row["n"], row["n_2"], row["i"], row["l"]) == (1, 2, None, [{"x": None}])
    assert row["m"]["iteration"] == 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--principle", "nope"), "principle nope: the run has answers"),
        (("--judge", "nope"), "judge nope: the run has chat:careful"),
        (("--constitution", "nope@9"), "constitution nope@9: the run has rules@1, rules@2"),
        (("--iteration", "99"), "iteration 99: the run has 4"),
    ],
)
def test_an_empty_list_says_what_there_is(arguments: tuple[str, ...], said: str) -> None:
    done = audit("list", *arguments)
    assert done.returncode == 0
    assert "0 pairs" in done.stdout
    assert said in done.stderr


def change(path: Path, key: str, value: object) -> None:
    """Gives the first row of a file another value, of whatever type."""
    lines = path.read_text().splitlines()
    lines[0] = json.dumps(json.loads(lines[0]) | {key: value})
    path.write_text("".join(line + "\n" for line in lines))


def test_a_vote_that_is_none_is_named_and_the_pair_shown(copy: RunDir) -> None:
    path = copy.iteration(0).path / "votes.jsonl"
    change(path, "outcome", "perhaps")
    done = audit("show", PAIR, run=copy.path)
    assert done.returncode == 0, done.stderr
    assert f"{path}:1: not a Vote" in done.stderr
    assert "decision: kept" in done.stdout
    assert f"votes: {path}:2 to line 8" in done.stdout


def test_a_decision_that_is_none_is_named_and_the_pair_shown(copy: RunDir) -> None:
    path = copy.iteration(0).path / "decisions.jsonl"
    change(path, "status", "perhaps")
    pair = json.loads(path.read_text().splitlines()[0])["pair_id"]
    done = audit("show", pair, run=copy.path)
    assert done.returncode == 0, done.stderr
    assert f"{path}:1: not a Decision" in done.stderr
    done = audit("list", "--iteration", "1", run=copy.path)
    assert done.returncode == 0, done.stderr
    assert f"{path}: the decision on pair {pair} is none" in done.stderr
    assert "1-5 of 5 pairs" in done.stdout


def test_without_the_text_the_questions_are_missing_and_the_rest_is_shown(copy: RunDir) -> None:
    for path in (copy.path / "constitutions").glob("*/constitution.json"):
        path.unlink()
    done = audit("show", PAIR, "--questions", run=copy.path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("question can't be shown") == 8
    assert "decision: kept" in done.stdout


def test_a_policy_that_is_not_known_is_never_none(copy: RunDir, tmp_path: Path) -> None:
    """Iteration 3 trained; without its updates.meta.json nobody knows into which policy."""
    meta = copy.iteration(2).path / "updates.meta.json"
    pair = json.loads((copy.iteration(2).path / "preferences.jsonl").read_text().splitlines()[0])["pair_id"]
    digest = json.loads(meta.read_text())["policy_digest"]
    meta.unlink()
    line = f"rlaif: {meta}: missing, though updates.jsonl is there"
    shown = audit("show", pair, run=copy.path)
    assert f"policy not known: {line.removeprefix('rlaif: ')}" in shown.stdout
    assert "never trained on" not in shown.stdout
    assert "no policy yet" not in shown.stdout
    assert complaints(shown) == [line]
    for asked in ("3", "4", str(copy.iteration(2).path / "policy"), digest):
        traced = audit("trace", asked, run=copy.path)
        assert traced.returncode != 0, asked
        assert traced.stdout == ""
        said = complaints(traced)
        assert said[0] == line
        assert len(said) == 2
        assert str(meta) in said[1]
    earlier = audit("trace", "2", run=copy.path)
    assert earlier.returncode == 0
    assert "after iteration 2: 7 preferences" in earlier.stdout
    exported = audit("export", "--to", str(tmp_path / "out.jsonl"), run=copy.path)
    assert complaints(exported)[0] == line


def test_a_lineage_says_what_it_does_not_know(copy: RunDir) -> None:
    meta = copy.iteration(1).path / "updates.meta.json"
    meta.write_text("{}")
    traced = audit("trace", "3", run=copy.path)
    assert traced.returncode == 0
    assert f"without what isn't known: {meta}: not the meta file of a stage" in traced.stdout
    assert len(json.loads(audit("trace", "3", "--json", run=copy.path).stdout)["unknown"]) == 1
