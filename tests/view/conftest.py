"""`rlaif view` as a process of its own, and a headless Chromium that looks at it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.view.runs import make_run, reviewed_job

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

ROOT = Path(__file__).resolve().parents[2]
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)


@contextmanager
def served(run: Path, *options: str) -> Iterator[str]:
    """The address of `rlaif view RUN`, without the last slash."""
    command = [sys.executable, "-m", "rlaif", "view", str(run), "--port", "0", *options]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(run.parent / "cache")}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        try:
            assert process.stdout is not None
            address = process.stdout.readline().strip()
            assert address.startswith("http://"), "the server didn't start; its error is above"
            yield address.rstrip("/")
        finally:
            process.terminate()


@pytest.fixture(scope="session")
def stub_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of stub workers; nobody writes to it."""
    return make_run(tmp_path_factory.mktemp("view"))


@pytest.fixture(scope="session")
def address(stub_run: Path) -> Iterator[str]:
    """Where the stub run's pages are."""
    with served(stub_run) as url:
        yield url


@pytest.fixture(scope="session")
def review_address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Where the pages of a run are that has pairs to review."""
    with served(make_run(tmp_path_factory.mktemp("review"), reviewed_job())) as url:
        yield url


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    """The browser."""
    if CHROMIUM is None:
        pytest.skip("Chromium isn't installed (Debian: apt-get install chromium)")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield browser
        browser.close()


@dataclass
class Tab:
    """A page, and what it asked the network for."""

    page: Page
    requested: list[str]
    errors: list[str]
    refused: list[str]
    """What the Content-Security-Policy refused."""


@contextmanager
def tab(browser: Browser, **options: Any) -> Iterator[Tab]:
    """A fresh tab; the request of another host fails the test."""
    context = browser.new_context(**options)
    page = context.new_page()
    page.set_default_timeout(15_000)
    seen = Tab(page, [], [], [])
    page.on("request", lambda request: seen.requested.append(request.url))
    page.on("pageerror", lambda error: seen.errors.append(str(error)))
    page.on("console", lambda m: seen.refused.append(m.text) if "Content Security Policy" in m.text else None)
    try:
        yield seen
        foreign = [url for url in seen.requested if not url.startswith(("http://127.0.0.1:", "data:"))]
        assert foreign == []
        assert seen.errors == []
        assert seen.refused == [], "our own pages keep to the policy"
    finally:
        context.close()
