"""The pages in a real headless Chromium: what people see, click and press, and what must never run.

`RLAIF_SCREENSHOTS=docs/images RLAIF_SCREENSHOT_RUN=runs/NAME pytest tests/view/test_browser.py -k screenshot` makes the
pictures of the docs.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.stubs import stub_job
from tests.view.conftest import served, tab
from tests.view.runs import HOSTILE, make_run, reviewed_job

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

pytestmark = pytest.mark.slow


def wide(page: Page) -> int:
    """By how many pixels the page is wider than the window."""
    return page.evaluate("document.documentElement.scrollWidth - window.innerWidth")


def pair_links(page: Page) -> list[str]:
    """The addresses of the pairs in a list."""
    return page.locator("tbody th a").evaluate_all("links => links.map(a => a.getAttribute('href'))")


def main_text(page: Page) -> str:
    return page.locator("main").inner_text()


def test_the_overview_shows_the_run(chromium: Browser, address: str) -> None:
    with tab(chromium) as t:
        t.page.goto(address)
        assert t.page.locator("h1").inner_text() == "run"
        assert "4 of 4 iterations done" in main_text(t.page)
        assert t.page.locator("figure.picture").count() == 9
        assert t.page.locator("#kept svg rect[class^=k-]").count() > 4
        assert t.page.locator("svg .mark-name").first.text_content() == "rules@2"
        captions = t.page.locator("table caption").all_inner_texts()
        assert len(captions) == 3  # iterations, held-out answers, and the latter by principle
        assert any("principle" in c.lower() for c in captions)
        assert any(url.endswith("/static/style.css") for url in t.requested)


def test_filter_sort_and_page_by_clicking(chromium: Browser, address: str) -> None:
    with tab(chromium) as t:
        t.page.goto(f"{address}/pairs?limit=3")
        everything = pair_links(t.page)
        t.page.get_by_label("Status").select_option("dropped")
        t.page.get_by_label("Sort by").select_option("agreement")
        t.page.get_by_role("button", name="Filter").click()
        t.page.wait_for_url("**/pairs?*status=dropped*")
        assert "text=" not in t.page.url, "fields left empty don't belong in the address"
        first = pair_links(t.page)
        assert len(first) == 3
        assert set(t.page.locator("tbody .badge").all_inner_texts()) == {"dropped"}
        t.page.get_by_role("link", name="Next").first.click()
        t.page.wait_for_url("**offset=3**")
        second = pair_links(t.page)
        assert second
        assert not set(first) & set(second)
        stable, shown = t.page.url, main_text(t.page)
        t.page.get_by_role("link", name="Previous").first.click()
        t.page.wait_for_function("!location.search.includes('offset')")
        assert pair_links(t.page) == first
        t.page.get_by_role("link", name="Clear").click()
        t.page.wait_for_url("**/pairs")
        assert pair_links(t.page)[:3] == everything
        t.page.get_by_text("More filters").click()
        t.page.get_by_label("Pairs of").select_option(label="held-out evaluations")
        t.page.locator("select[name=descending]").select_option(label="descending")
        t.page.get_by_role("button", name="Filter").click()
        t.page.wait_for_url("**/pairs?evaluation=yes&descending=yes")
        held_out = pair_links(t.page)
        assert held_out
        assert all("/eval" in link for link in held_out)
    with tab(chromium) as other:
        other.page.goto(stable)
        assert other.page.url == stable
        assert main_text(other.page) == shown


def test_a_pair_says_why(chromium: Browser, address: str) -> None:
    with tab(chromium) as t:
        t.page.goto(f"{address}/pairs?status=kept")
        t.page.locator("tbody th a").first.click()
        t.page.get_by_role("heading", name="Why it was kept").wait_for()
        assert t.page.locator(".box.won").count() == 1
        assert "optimizer step" in main_text(t.page)
        assert t.page.locator("td pre").first.is_hidden()
        t.page.locator("td summary").first.click()
        assert t.page.locator("td pre").first.is_visible()
        t.page.get_by_role("link", name="Question").first.click()
        t.page.get_by_role("heading", name="What the judge was asked").wait_for()


def test_answers_in_columns_by_click_and_key(chromium: Browser, address: str) -> None:
    with tab(chromium) as t:
        t.page.goto(address)
        t.page.get_by_role("link", name="Answers", exact=True).click()
        t.page.wait_for_url("**/answers")
        assert t.page.locator(".answers thead th").all_inner_texts() == [
            "Base policy",
            "After 2 iterations",
            "After 4 iterations",
        ]
        prompts = t.page.locator(".prompts .preview").all_inner_texts()
        assert prompts == ["question 0 of held", "question 1 of held", "question 2 of held"]
        cells = t.page.locator(".answers td")
        assert "new text rules@2" in cells.nth(2).inner_text()
        assert "new text" not in cells.nth(1).inner_text()
        assert cells.nth(0).locator("mark").count() == 0, "nothing is before the base policy's answer"
        number = cells.nth(1).locator(".text").inner_text().split()[1]
        assert t.page.locator(".answers td:nth-child(2) mark").all_inner_texts() == [number.rstrip(",")]
        assert cells.nth(1).locator(".verdict").count() == 1
        assert "words" in cells.nth(1).inner_text()
        for key, asked in (("j", prompts[1]), ("j", prompts[2]), ("j", prompts[2]), ("k", prompts[1])):
            t.page.wait_for_load_state()  # the script is there
            t.page.keyboard.press(key)
            t.page.locator(".asked", has_text=asked).wait_for()
            assert t.page.locator(".prompts [aria-current]").inner_text().endswith(asked)
        t.page.keyboard.press("/")
        t.page.keyboard.type("2 of HELD j")
        t.page.keyboard.press("Backspace")
        t.page.keyboard.press("Backspace")
        t.page.keyboard.press("Enter")
        t.page.wait_for_url("**/answers?text=2+of+HELD*")
        assert t.page.locator(".prompts .preview").all_inner_texts() == [prompts[2]]
        t.page.get_by_label("New words marked").select_option("nothing")
        t.page.get_by_role("button", name="Show").click()
        t.page.wait_for_url("**marked=nothing*")
        assert t.page.locator("mark").count() == 0
        stable = t.page.url
        pair = t.page.locator(".answers td a:has(.verdict)").first
        said = pair.inner_text()
        pair.click()
        t.page.wait_for_url("**/pairs/eval*")
        won = {"better": "First", "worse": "Second"}.get(said.split()[1])
        assert won is None or f"{won} · " in t.page.locator(".sides").inner_text()
        t.page.goto(stable)
        assert t.page.locator(".asked").inner_text() == prompts[2]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_light_and_dark_have_contrast(chromium: Browser, address: str, scheme: str) -> None:
    with tab(chromium, color_scheme=scheme) as t:
        t.page.goto(address)
        page, ink = t.page.evaluate(
            "[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.querySelector('.soft')).color]"
        )
        brightness = {c: sum(map(int, c.removeprefix("rgb(").rstrip(")").split(","))) / 765 for c in (page, ink)}
        assert (brightness[page] > 0.5) == (scheme == "light")
        assert abs(brightness[page] - brightness[ink]) > 0.4


def test_a_phone_scrolls_no_page_sideways(chromium: Browser, review_address: str) -> None:
    with tab(chromium, viewport={"width": 360, "height": 740}) as t:
        t.page.goto(f"{review_address}/pairs")
        pair = pair_links(t.page)[0]
        t.page.goto(f"{review_address}/constitutions")
        text = t.page.locator("tbody th a").first.get_attribute("href")
        for path in ("/", "/answers", "/pairs", pair, "/constitutions", text, "/review", "/nothing"):
            t.page.goto(f"{review_address}{path}")
            assert wide(t.page) <= 0, path


def test_by_keyboard_alone(chromium: Browser, address: str) -> None:
    def tab_to(page: Page, name: str) -> None:
        for _ in range(60):
            page.keyboard.press("Tab")
            focused = page.evaluate("document.activeElement.innerText || document.activeElement.name || ''")
            if focused.strip() == name:
                outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
                assert outline != "none", f"the focus on {name} can't be seen"
                return
        raise AssertionError(f"{name} can't be reached with the Tab key")

    with tab(chromium) as t:
        t.page.goto(address)
        t.page.keyboard.press("Tab")
        assert t.page.evaluate("document.activeElement.innerText") == "Skip to the content"
        t.page.keyboard.press("Enter")
        assert t.page.evaluate("document.activeElement.id") == "content"
        t.page.goto(address)
        tab_to(t.page, "Decisions")
        t.page.keyboard.press("Enter")
        t.page.wait_for_url("**/pairs")
        tab_to(t.page, "text")
        t.page.keyboard.type("question 1 of")
        t.page.keyboard.press("Enter")
        t.page.wait_for_url("**/pairs?text=question+1+of")
        link = t.page.locator("tbody th a").first.inner_text()
        tab_to(t.page, link)
        t.page.keyboard.press("Enter")
        t.page.wait_for_url(f"**/pairs/{link}")


def test_candidates_text_stays_text(chromium: Browser, tmp_path: Path) -> None:
    run = make_run(tmp_path, reviewed_job(), hostile=True)
    with served(run) as url, tab(chromium) as t:
        t.page.goto(f"{url}/pairs")
        pair = pair_links(t.page)[0]
        t.page.goto(url + pair)
        question = t.page.get_by_role("link", name="Question").first.get_attribute("href")
        assert any(text in t.page.locator(".sides").inner_text() for text in HOSTILE)
        search = "/answers?text=%22%3E%3Cscript%3Ewindow.ran=1%3C%2Fscript%3E"
        unknown = "/pairs/%3Cscript%3Ewindow.ran=1%3C%2Fscript%3E"
        for path in ("/", "/answers", search, "/pairs", pair, question, "/review", unknown):
            t.page.goto(url + path)
            if path == "/review":
                name_reviewer(t.page, "<script>window.ran = 1</script>")
            assert t.page.evaluate("window.ran") is None, path
            assert t.page.title() != "ran"
            assert t.page.locator("img, #ran, main script, svg[onload]").count() == 0, path
        assert t.refused == []
        # Even markup that got into a page can't run anything.
        t.page.evaluate("document.body.insertAdjacentHTML('beforeend', '<img src=x onerror=\"window.ran = 1\">')")
        t.page.evaluate(
            "document.body.append(Object.assign(document.createElement('script'), {text: 'window.ran = 1'}))"
        )
        t.page.wait_for_timeout(200)
        assert t.page.evaluate("window.ran") is None
        assert t.refused, "the policy says what it refused"
        t.refused.clear()


def name_reviewer(page: Page, name: str) -> None:
    page.get_by_label("Your name").fill(name)
    page.get_by_role("button", name="Use this name").click()
    page.locator("form[data-review]").wait_for()


def labels_of(run: Path) -> list[dict[str, str]]:
    path = run / "review" / "labels.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_review_by_keys_is_blind_and_stored(chromium: Browser, tmp_path: Path) -> None:
    run = make_run(tmp_path, reviewed_job())
    with served(run) as url, tab(chromium) as t:
        t.page.goto(f"{url}/review")
        name_reviewer(t.page, "Ada Löve")
        text = main_text(t.page)
        assert "Rule " in text
        assert not any(word in text.lower() for word in ("agreement", "p(first)", "verdict", "kept", "guard"))
        pair = t.page.locator("input[name=pair]").get_attribute("value")
        shown = t.page.locator("section.box .text").all_inner_texts()
        t.page.get_by_label("Reason, if you like").focus()
        t.page.keyboard.type("1 says more")
        t.page.keyboard.press("Enter")
        t.page.wait_for_timeout(300)
        assert labels_of(run) == [], "a key typed into the reason is no label, nor is Enter"
        t.page.keyboard.press("Escape")
        t.page.keyboard.press("2")
        t.page.get_by_role("status").wait_for()
        (label,) = labels_of(run)
        assert (label["pair_id"], label["author"], label["reason"]) == (pair, "Ada Löve", "1 says more")
        assert t.page.locator("input[name=pair]").get_attribute("value") != pair

        t.page.get_by_role("link", name=str(pair)).click()
        chosen = t.page.locator(f"section[aria-label='{label['outcome'].capitalize()} completion'] .text").inner_text()
        assert chosen == shown[1]
        assert "Ada Löve" in main_text(t.page)

        t.page.goto(f"{url}/review?pair={pair}")
        t.page.locator("form[data-review]").wait_for()
        t.page.keyboard.press("t")
        t.page.get_by_role("status").wait_for()
        assert [(x["pair_id"], x["outcome"]) for x in labels_of(run)][1:] == [(pair, "tie")]


def test_no_page_shows_an_empty_box(chromium: Browser, review_address: str) -> None:
    empty = """() => [...document.querySelectorAll("main *")].filter(e => {
        const style = getComputedStyle(e), box = e.getBoundingClientRect();
        const drawn = parseFloat(style.borderTopWidth) > 0 && style.borderTopStyle !== "none";
        const control = e.matches("input, select, textarea, td, th");
        return drawn && box.width > 2 && box.height > 2 && !control && !e.closest("svg") && !e.textContent.trim()
            && !e.querySelector("svg, input, select, textarea");
    }).map(e => e.outerHTML.slice(0, 120))"""
    with tab(chromium) as t:
        t.page.goto(f"{review_address}/review")
        name_reviewer(t.page, "Ada")
        assert t.page.locator("[hidden]").count() > 0
        assert not any(
            t.page.locator("[hidden]").nth(i).is_visible() for i in range(t.page.locator("[hidden]").count())
        )
        t.page.goto(f"{review_address}/pairs")
        pair = pair_links(t.page)[0]
        for path in ("/", "/answers", "/pairs", pair, "/constitutions", "/review", "/nothing"):
            t.page.goto(f"{review_address}{path}")
            assert t.page.evaluate(empty) == [], path


def test_two_reviewers_get_different_pairs(chromium: Browser, review_address: str) -> None:
    with tab(chromium) as one, tab(chromium) as two:
        asked = []
        for t, name in ((one, "Ada"), (two, "Bo")):
            t.page.goto(f"{review_address}/review")
            name_reviewer(t.page, name)
            asked.append(t.page.locator("input[name=pair]").get_attribute("value"))
        assert asked[0] != asked[1]


def test_a_running_job_refreshes_itself(chromium: Browser, tmp_path: Path) -> None:
    run = make_run(tmp_path, stub_job(iterations=2))
    with served(run) as url, tab(chromium) as t:
        t.page.goto(url)
        assert "2 of 2 iterations" in main_text(t.page)
        bars = t.page.locator("#kept svg rect").count()
        make_run(tmp_path, stub_job(iterations=4))
        t.page.get_by_text("4 of 4 iterations").wait_for()
        assert t.page.locator("#kept svg rect").count() > bars


def test_screenshots(chromium: Browser, stub_run: Path, tmp_path: Path) -> None:
    run = Path(os.environ.get("RLAIF_SCREENSHOT_RUN", stub_run))
    folder = Path(os.environ.get("RLAIF_SCREENSHOTS", tmp_path))
    size = {"width": 1160, "height": 760}

    def shoot(page: Page, name: str, last: str) -> None:
        """The page down to an element."""
        page.locator(last).scroll_into_view_if_needed()
        bottom = page.locator(last).evaluate("e => e.getBoundingClientRect().bottom + scrollY")
        clip = {"x": 0, "y": 0, "width": size["width"], "height": bottom + 16}
        page.screenshot(path=folder / name, full_page=True, clip=clip)  # type: ignore[arg-type]
        assert 10_000 < (folder / name).stat().st_size < 250_000

    with served(run) as url, tab(chromium, viewport=size) as t:
        t.page.goto(url)
        shoot(t.page, "view-overview.png", "#kl")
        t.page.goto(f"{url}/pairs?status=kept&sort=length")
        t.page.goto(url + pair_links(t.page)[len(pair_links(t.page)) // 2])
        shoot(t.page, "view-pair.png", "[aria-label=Rules]")
        t.page.goto(f"{url}/answers")
        t.page.screenshot(path=folder / "view-answers.png")
        assert 10_000 < (folder / "view-answers.png").stat().st_size < 250_000


def test_screenshot_of_the_review(chromium: Browser, tmp_path: Path) -> None:
    given = os.environ.get("RLAIF_SCREENSHOT_REVIEW_RUN")
    run = Path(given) if given else make_run(tmp_path, reviewed_job())
    folder = Path(os.environ.get("RLAIF_SCREENSHOTS", tmp_path))
    with served(run) as url, tab(chromium, viewport={"width": 1160, "height": 800}) as t:
        t.page.goto(f"{url}/review")
        name_reviewer(t.page, "Ada")
        t.page.screenshot(path=folder / "view-review.png", full_page=True)
    assert 10_000 < (folder / "view-review.png").stat().st_size < 250_000
