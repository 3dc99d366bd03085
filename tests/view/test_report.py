"""`rlaif report`: one file that needs nothing else, says what the log says, and calls weak numbers weak."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from rlaif.audit.index import Index
from rlaif.errors import UserError
from rlaif.loop.branch import branch
from rlaif.records import ConstitutionRef, Decision, HumanLabel, ProbeCounts, Retention, UnderText
from rlaif.rundir.store import RunDir
from rlaif.view.pictures import percent
from rlaif.view.report import EXAMPLES, Report, make_report, write_report
from tests.stubs import stub_job
from tests.test_layers import main, without_heavy
from tests.view.runs import HOSTILE, make_run, reviewed_job

pytestmark = pytest.mark.slow

if TYPE_CHECKING:
    from playwright.sync_api import Browser

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RLAIF_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def report(stub_run: Path) -> Report:
    return made(stub_run)


def made(run: Path) -> Report:
    opened = RunDir.open(run)
    return make_report(Index.open(opened), opened)


def written(run: Path, to: Path) -> str:
    opened = RunDir.open(run)
    index = Index.open(opened)
    return write_report(make_report(index, opened), to).read_text()


class Tags(HTMLParser):
    """Every element with its attributes, and all text."""

    def __init__(self, html: str):
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def test_it_needs_nothing_else_and_runs_nothing(tmp_path: Path) -> None:
    html = written(make_run(tmp_path, hostile=True), tmp_path / "report.html")
    found = Tags(html)
    assert not {"script", "link", "img", "iframe", "object", "form"} & {tag for tag, _ in found.elements}
    for tag, attributes in found.elements:
        for name, value in attributes.items():
            assert not name.startswith("on"), (tag, name)
            assert name not in ("src", "href"), (tag, name, value)
    assert not any(word in html.partition("</style>")[0] for word in ("@import", "url("))
    assert any(text in found.text for text in HOSTILE), "candidates' markup is shown as text"
    assert sum(tag == "figure" for tag, _ in found.elements) >= 6


def test_it_says_what_the_log_says(report: Report, stub_run: Path, tmp_path: Path) -> None:
    opened = RunDir.open(stub_run)
    decisions = [d for k in opened.iterations() for d in opened.iteration(k).read("decisions", Decision)]
    kept = {d.pair_id for d in decisions if d.status == "kept"}
    assert report.overview.totals.kept == len(kept)
    assert sum(report.dropped.values()) == len(decisions) - len(kept)
    assert {x.pair_id for x in report.kept_examples} <= kept
    assert not {x.pair_id for x in report.dropped_examples} & kept
    assert len(report.kept_examples) == min(EXAMPLES, len(kept))
    assert [t.name for t in report.texts] == ["rules@1", "rules@2"]
    assert [(p.use, p.prompts) for p in report.prompts] == [("training", 20), ("held out", 4)]
    text = Tags(written(stub_run, tmp_path / "report.html")).text
    assert "Rule 1." in text
    assert "Rule 2." in text
    assert all(x.pair_id in text for x in (*report.kept_examples, *report.dropped_examples))
    columns = report.answers[0].evaluated
    assert [e.evaluation.updates for e in columns] == [0, 2, 4]
    assert len(report.answers) == 3
    assert all(a.text in text for one in report.answers for e in one.evaluated for a in e.answers)
    assert "new text rules@2" in " ".join(text.split())


def test_it_says_what_a_change_did(report: Report, stub_run: Path, tmp_path: Path) -> None:
    html = written(stub_run, tmp_path / "report.html")
    assert report.log is not None
    first, second = report.log.texts
    assert (first.changes, second.since) == (None, 2)
    assert second.followed.at_change is not None
    text = " ".join(html.split())
    assert "The texts that were in force, in order" in text
    assert f"at the change: win rate {percent(second.followed.at_change.win_rate)}" in text
    assert second.old_pairs is not None
    assert f"{second.old_pairs.expired} expired" in text
    assert "/constitutions/" not in html, "a file leads to no page"
    assert report.parent is None
    shutil.copytree(stub_run, tmp_path / "run")
    made = branch(RunDir.open(tmp_path / "run"), 4, "another")
    assert "Its first 4 iterations are those of run, from which" in written(made.path, tmp_path / "branch.html")


def test_it_says_what_was_forgotten(stub_run: Path, tmp_path: Path) -> None:
    assert "Probes kept" not in written(stub_run, tmp_path / "without.html")
    shutil.copytree(stub_run, tmp_path / "run")
    path = RunDir(tmp_path / "run").evaluation(2).path / "metrics.json"
    metrics = json.loads(path.read_text())
    text = ConstitutionRef(name="before", version=7, hash="0" * 16)
    metrics["retention"] = Retention(
        probes=ProbeCounts(probes=9, base_passed=8, kept=6, gained=1),
        kept_share=0.75,
        kept_interval=(0.41, 0.93),
        by_kind={"fact": ProbeCounts(probes=9, base_passed=8, kept=6, gained=1)},
        perplexity=12.3,
        base_perplexity=10.0,
        perplexity_ratio=1.23,
        perplexity_ratio_interval=(1.1, 1.4),
        earlier={
            text.hash: UnderText(
                constitution=text, win_rate=0.3, win_interval=(0.2, 0.4), wins=1, losses=2, undecided=0, abstained=0
            )
        },
    ).model_dump(mode="json")
    path.write_text(json.dumps(metrics))
    html = written(tmp_path / "run", tmp_path / "with.html")
    assert "6 of 8 (41 % to 93 %)" in html
    assert "before@7 30 %" in html
    assert ">12.3<" in html
    assert "Probes kept, of those that the base policy passed" in html


def test_examples_are_drawn_by_the_seed(report: Report, stub_run: Path) -> None:
    ids = [x.pair_id for x in report.kept_examples]
    assert ids == [x.pair_id for x in made(stub_run).kept_examples]
    assert ids != sorted(ids)


def test_weak_numbers_are_called_weak(report: Report) -> None:
    said = " ".join(report.caveats)
    low, high = report.evaluations[-1].win_interval or (0, 1)
    assert ("No clear difference" in said) == (low <= 0.5 <= high)
    assert "not calibrated" in said
    assert "No person labelled" in said
    assert "by the judge that also made the training labels" in said
    assert "preferences were trained on" in said


def test_people_and_the_judge_are_compared(tmp_path: Path) -> None:
    run = make_run(tmp_path, reviewed_job())
    decisions = [(k, d) for k in range(4) for d in RunDir(run).iteration(k).read("decisions", Decision)]
    k, sent = next((k, d) for k, d in decisions if d.status == "review" and d.verdict.outcome != "tie")
    label = HumanLabel(pair_id=sent.pair_id, iteration=k, outcome=sent.verdict.outcome, author="Ada", time="2026-01-01")  # type: ignore[arg-type]
    (run / "review").mkdir(exist_ok=True)
    (run / "review" / "labels.jsonl").write_text(label.model_dump_json() + "\n")
    report = made(run)
    assert (report.human[0].labels, report.human[0].accuracy) == (1, 1.0)
    assert "Only 1 pairs have both" in " ".join(report.caveats)
    assert report.dropped["review"] > 0


def test_an_unfinished_run_says_so(tmp_path: Path) -> None:
    run = make_run(tmp_path, stub_job(iterations=2))
    header = json.loads((run / "run.json").read_text())
    header["job"]["iterations"] = 6
    (run / "run.json").write_text(json.dumps(header))
    assert made(run).caveats[0] == "The run is not finished: 2 of 6 iterations."


def test_a_run_without_an_iteration(stub_run: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_bytes((stub_run / "run.json").read_bytes())
    with pytest.raises(UserError, match="no iteration is finished yet"):
        made(tmp_path / "run")


def test_the_command(stub_run: Path, tmp_path: Path) -> None:
    def rlaif(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "rlaif", "report", str(stub_run), *words]
        return subprocess.run(command, env=os.environ, capture_output=True, text=True, check=False)

    done = rlaif("--to", str(tmp_path / "r.html"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(tmp_path / "r.html")
    assert (tmp_path / "r.html").read_text().startswith("<!doctype html>")
    assert json.loads(rlaif("--json").stdout)["run"] == "run"
    wrong = rlaif("--to", str(tmp_path / "no" / "r.html"))
    assert wrong.returncode == 2
    assert "make it first" in wrong.stderr


def test_without_heavy_libraries(stub_run: Path, tmp_path: Path) -> None:
    done = without_heavy(main("report", str(stub_run), "--to", str(tmp_path / "r.html")))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "r.html").exists()
    assert without_heavy("import rlaif.view.app").returncode == 0


def test_a_browser_asks_for_nothing_else(chromium: Browser, stub_run: Path, tmp_path: Path) -> None:
    written(stub_run, tmp_path / "report.html")
    page = chromium.new_page(viewport={"width": 360, "height": 740})
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto((tmp_path / "report.html").as_uri())
    assert len(asked) == 1
    assert page.evaluate("document.documentElement.scrollWidth - window.innerWidth") <= 0
    assert page.locator("figure svg").count() >= 6
    page.close()


@pytest.mark.parametrize("content", ["{", "{}"])
def test_damaged_copies_are_caveats(stub_run: Path, tmp_path: Path, content: str) -> None:
    run = tmp_path / "run"
    shutil.copytree(stub_run, run)
    text = next((run / "constitutions").glob("*/constitution.json"))
    for path in (text, run / "calibration.json"):
        path.write_text(content)
    report = made(run)
    for path in (text, run / "calibration.json"):
        assert sum(str(path) in caveat for caveat in report.caveats) == 1
    assert not any("was not calibrated" in caveat for caveat in report.caveats)
    assert report.calibration is None
    assert [t.hash for t in report.texts if t.constitution is None] == [text.parent.name]
    assert "damaged after it was written" in written(run, tmp_path / "report.html")
