"""The pages in a real headless Chromium."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.stubs import stub_job
from tests.view.conftest import served, tab
from tests.view.runs import make_run

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page


def wide(page: Page) -> int:
    """By how many pixels the page is wider than the window."""
    return page.evaluate("document.documentElement.scrollWidth - window.innerWidth")


def test_the_overview_shows_the_run(chromium: Browser, address: str) -> None:
    with tab(chromium) as t:
        t.page.goto(address)
        assert t.page.locator("h1").inner_text() == "run"
        assert "4 of 4 iterations done" in t.page.locator("main").inner_text()
        assert t.page.locator("figure.picture").count() == 9
        assert t.page.locator("#kept svg rect[class^=k-]").count() > 4
        assert t.page.locator("svg .mark-name").first.text_content() == "rules@2"
        assert t.page.locator("table caption").count() == 2
        assert any(url.endswith("/static/style.css") for url in t.requested)


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


def test_a_phone_scrolls_no_page_sideways(chromium: Browser, address: str) -> None:
    with tab(chromium, viewport={"width": 360, "height": 740}) as t:
        t.page.goto(address)
        assert wide(t.page) <= 0


def test_a_running_job_refreshes_itself(chromium: Browser, tmp_path: Path) -> None:
    run = make_run(tmp_path, stub_job(iterations=2))
    with served(run) as url, tab(chromium) as t:
        t.page.goto(url)
        assert "2 of 2 iterations" in t.page.locator("main").inner_text()
        make_run(tmp_path, stub_job(iterations=4))
        t.page.get_by_text("4 of 4 iterations").wait_for()
