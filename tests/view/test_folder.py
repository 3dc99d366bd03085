"""`rlaif view` on a folder of runs: the tree, runs side by side, their answers, and each run's own pages.

`RLAIF_SCREENSHOTS=docs/images RLAIF_SCREENSHOT_FOLDER=runs pytest tests/view/test_folder.py -k screenshot` makes the
picture of the docs.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from rlaif.audit.curves import TextChange, curve_of
from rlaif.loop.branch import rollback
from rlaif.rundir.store import RunDir
from rlaif.view.pictures import BESIDE, LETTER, WIDTH, side_by_side
from tests.audit.conftest import STORED
from tests.stubs import stub_job
from tests.test_branch import keep
from tests.view.conftest import served, tab
from tests.view.runs import make_run, reviewed_job
from tests.view.test_pages import get

if TYPE_CHECKING:
    from playwright.sync_api import Browser

pytestmark = pytest.mark.slow


def edit_header(run: Path, **changes: object) -> None:
    header = json.loads((run / "run.json").read_text())
    header["job"] |= changes.pop("job", {})  # type: ignore[operator]
    (run / "run.json").write_text(json.dumps(header | changes))


@pytest.fixture(scope="module")
def folder(stub_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run, a branch of it that answered otherwise after it, one that sends pairs to people, and a broken one."""
    root = tmp_path_factory.mktemp("folder") / "runs"
    shutil.copytree(stub_run, root / "online")
    shutil.copytree(stub_run, root / "a branch")
    edit_header(root / "a branch", parent={"run": "online", "iterations": 2, "head": None}, job={"seed": 8})
    path = root / "a branch" / "evaluations" / "0004" / "completions.jsonl"
    path.write_text(path.read_text().replace("and a few more words", "and quite other words"))
    shutil.copytree(make_run(tmp_path_factory.mktemp("asks"), reviewed_job()), root / "asks")
    (root / "broken").mkdir()
    (root / "broken" / "run.json").write_text("{")
    return root


@pytest.fixture(scope="module")
def there(folder: Path) -> Iterator[str]:
    """Where the folder's pages are."""
    with served(folder) as url:
        yield url


def test_the_tree_leads_into_each_run(chromium: Browser, there: str) -> None:
    with tab(chromium) as t:
        t.page.goto(there)
        names = t.page.locator("tbody th.branch a").all_inner_texts()
        assert names == ["asks", "broken", "online", "a branch"]
        branch = t.page.locator("tbody tr", has=t.page.get_by_role("link", name="a branch", exact=True)).first
        assert "from online after 2" in branch.inner_text()
        assert "rules@1 → rules@2" in " ".join(branch.inner_text().split())
        assert "broken: " in t.page.locator(".notice").inner_text()
        t.page.get_by_role("link", name="a branch", exact=True).click()
        t.page.wait_for_url("**/runs/a%20branch/")
        assert t.page.locator("h1").inner_text() == "a branch"
        for name in ("Answers", "Decisions", "Constitutions", "Review", "Overview"):
            t.page.get_by_role("link", name=name, exact=True).first.click()
            t.page.wait_for_url(re.compile(r"/runs/a%20branch/"))
            assert t.page.locator(".top [aria-current]").inner_text() == name
        t.page.locator("svg a .mark-name").first.click()
        t.page.wait_for_url("**/runs/a%20branch/constitutions/*")
        assert "What changed from rules@1" in t.page.locator("main").inner_text()
        t.page.get_by_role("link", name="runs", exact=True).click()
        t.page.wait_for_url(f"{there}/")


def test_no_link_leaves_its_run(there: str) -> None:
    base = "/runs/a%20branch"
    _, _, pairs = get(f"{there}{base}/pairs")
    pair = re.findall(r'href="([^"]+/pairs/[^"?]+)"', pairs)[0]
    _, _, shown = get(there + pair)
    question = re.findall(r'href="([^"]+/questions/[^"]+)"', shown)[0]
    paths = [f"{base}{p}" for p in ("/", "/answers", "/pairs", "/constitutions", "/review")]
    for path in (*paths, pair, question):
        status, headers, text = get(there + path)
        assert status == 200, path
        assert "default-src 'none'" in headers["content-security-policy"]
        leads = set(re.findall(r'(?:href|action)="(/[^"]*)"', text)) - {"/", "/static/style.css", "/static/icon.svg"}
        assert leads
        assert not [to for to in leads if not to.startswith(f"{base}/")], path
    status, _, text = get(f"{there}{base}/pairs?status=kept&text=")
    assert status == 200, "brought into its shortest form, within the run"
    assert get(f"{there}{base}/version")[0] == 200


def test_chosen_runs_stand_side_by_side(chromium: Browser, there: str) -> None:
    with tab(chromium) as t:
        t.page.goto(there)
        assert t.page.locator("figure.picture").count() == 3
        t.page.get_by_label("Show asks").uncheck()
        t.page.get_by_role("button", name="Show side by side").click()
        t.page.wait_for_url("**/?run=online&run=a+branch")
        assert t.page.locator("#win-rate .legend li").all_inner_texts()[:2] == ["online", "a branch"]
        assert t.page.locator("#win-rate .mark").count() == 1, "both changed at once: one mark"
        differing = t.page.get_by_role("region", name="Settings that differ").inner_text()
        assert "seed" in differing
        assert "filters.review" not in differing
        t.page.get_by_role("button", name="Their answers").click()
        t.page.wait_for_url("**/answers?run=online&run=a+branch")
        rows = t.page.locator(".answers tbody tr")
        assert rows.locator("th").all_inner_texts() == ["online", "a branch"]
        cells = rows.nth(1).locator("td").all_inner_texts()
        assert [c == "as in online" for c in cells] == [True, True, False]
        assert "quite other" in cells[2]
        asked = t.page.locator(".asked").inner_text()
        t.page.wait_for_load_state()
        t.page.keyboard.press("j")
        t.page.locator(".asked", has_not_text=asked).wait_for()
        assert "run=online&run=a+branch" in t.page.url
        t.page.locator(".answers a:has(.verdict)").last.click()
        t.page.wait_for_url("**/runs/**/pairs/eval*")


def test_a_label_is_stored_in_its_own_run(chromium: Browser, there: str, folder: Path) -> None:
    with tab(chromium) as t:
        t.page.goto(f"{there}/runs/asks/review")
        t.page.get_by_label("Your name").fill("Ada")
        t.page.get_by_role("button", name="Use this name").click()
        t.page.locator("form[data-review]").wait_for()
        t.page.wait_for_load_state()
        t.page.keyboard.press("1")
        t.page.get_by_role("status").wait_for()
        assert t.page.url.startswith(f"{there}/runs/asks/review?stored=")
    assert (folder / "asks" / "review" / "labels.jsonl").exists()
    assert not (folder / "online" / "review" / "labels.jsonl").exists()


def test_a_phone_scrolls_no_page_sideways(chromium: Browser, there: str) -> None:
    with tab(chromium, viewport={"width": 360, "height": 740}) as t:
        for path in ("/", "/answers", "/runs/online/", "/runs/online/answers", "/runs/nothing/"):
            t.page.goto(there + path)
            assert t.page.evaluate("document.documentElement.scrollWidth - window.innerWidth") <= 0, path


def test_what_is_not_there_is_a_line(there: str) -> None:
    for path in ("/runs/nosuch/", "/runs/..%2Fonline/", "/runs/broken/", "/runs/online/pairs/nosuch"):
        status, _, text = get(there + path)
        assert status in (404, 500), path
        assert "Traceback" not in text
    _, _, text = get(f"{there}/?run=nosuch&run=online")
    assert "<li>run=nosuch: no such run" in text
    assert re.findall(r"Unreadable:</strong> ([\w.]*)", text) == ["broken"]
    status, _, text = get(f"{there}/answers?run=broken&run=asks&newest=best&colour=red")
    assert status == 200
    assert all(part in text for part in ("run=broken", "newest=best", "colour=red"))
    assert "Unreadable" not in text
    assert get(there, Host="rebound.example")[0] == 400


def test_a_rollback_meanwhile_is_seen(tmp_path: Path) -> None:
    root = tmp_path / "runs"
    run = make_run(root, stub_job(filters={"min_kept_pairs": 1}))
    keep(RunDir(run), 1)

    def columns(name: str) -> list[str]:
        _, _, page = get(f"{url}/runs/{name}/answers")
        return re.findall(r"<th scope=\"col\">(Base policy|After \d)", page)

    with served(root) as url:
        assert columns("run") == ["Base policy", "After 2", "After 4"]
        rollback(run, 2)
        _, _, page = get(url)
        said = " ".join(re.sub("<[^>]*>", " ", page).split())
        assert "run.before-rollback-1 4 of 4" in said
        assert "└ run from run.before-rollback-1 after 2 2 of 4" in said
        assert columns("run") == ["Base policy", "After 2"]
        assert columns("run.before-rollback-1") == ["Base policy", "After 2", "After 4"]


def test_marks_say_which_text_in_which_run(folder: Path) -> None:
    online, branch = (curve_of(RunDir(folder / name)) for name in ("online", "a branch"))
    first, second = online.changes
    sooner = online.model_copy(update={"run": "c", "changes": (first, second.model_copy(update={"iteration": 1}))})
    found = {p.key: p for p in side_by_side([online, branch, sooner])}
    for picture in found.values():
        assert [m.says for m in picture.marks] == [
            "in force from here on: rules@2 in c",
            "in force from here on: rules@2 in online, a branch",
        ]
    # Each win rate breaks at its own run's change; intervals at one place stand apart.
    lines = found["win-rate"].lines
    assert [line.path.count("M") for line in lines] == [2, 2, 1]
    assert len({round(bar[0], 2) for line in lines for bar in line.bars}) == 6


def test_a_label_stands_within_its_picture(folder: Path) -> None:
    online = curve_of(RunDir(folder / "online"))
    named = [
        online.model_copy(
            update={
                "run": f"run {at}",
                "changes": (
                    online.changes[0],
                    TextChange(iteration=at, constitution=f"a-text-of-a-rather-long-name-{at}@{'1' * 30}", hash="c"),
                ),
            }
        )
        for at in range(4)
    ]
    marks = [mark for picture in side_by_side(named) for mark in picture.marks]
    assert {mark.end for mark in marks} == {False, True}
    for mark in marks:
        wide = BESIDE + LETTER * len(mark.label)
        assert 0 <= (mark.x - wide if mark.end else mark.x) < (mark.x if mark.end else mark.x + wide) <= WIDTH
        assert mark.label.endswith("…")
        assert "@111111111111111111111111111111 in run" in mark.says  # what is cut off is said


def test_screenshot_of_the_folder(chromium: Browser, folder: Path, tmp_path: Path) -> None:
    runs = Path(os.environ.get("RLAIF_SCREENSHOT_FOLDER", folder))
    picture = Path(os.environ.get("RLAIF_SCREENSHOTS", tmp_path)) / "view-runs.png"
    with served(runs) as url, tab(chromium, viewport={"width": 1260, "height": 800}) as t:
        t.page.goto(url)
        bottom = t.page.locator(".pictures").evaluate("e => e.getBoundingClientRect().bottom + scrollY")
        t.page.screenshot(path=picture, full_page=True, clip={"x": 0, "y": 0, "width": 1260, "height": bottom + 16})
    assert 10_000 < picture.stat().st_size < 150_000


def test_a_run_that_has_just_begun_stands_in_the_tree(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    for name in ("done", "begun"):
        shutil.copytree(STORED, runs / name)
    shutil.rmtree(runs / "begun" / "evaluations")
    with served(runs) as url:
        code, _, page = get(url)
    assert code == 200, page
    assert "begun" in page
