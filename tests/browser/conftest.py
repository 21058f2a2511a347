"""What every browser test shares: Chromium without a way out, and pages in fresh profiles."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest

CHROMIUM_FLAGS = (
    "--no-sandbox",
    "--headless",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE localhost, EXCLUDE 127.0.0.1",
)


def find_chromium() -> str | None:
    """The browser to drive: ``WISEFLOW_CHROMIUM``, else ``chromium`` on the path."""
    return os.environ.get("WISEFLOW_CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")


@pytest.fixture(scope="session")
def chromium_path() -> str:
    path = find_chromium()
    if path is None:
        if os.environ.get("WISEFLOW_REQUIRE_BROWSER") == "1":
            pytest.fail("Chromium is not installed, and WISEFLOW_REQUIRE_BROWSER=1 asks for it")
        pytest.skip("Chromium is not installed")
    return path


@pytest.fixture(scope="session")
def browser(chromium_path: str) -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=chromium_path, args=list(CHROMIUM_FLAGS))
        yield started
        started.close()


@pytest.fixture
def new_page(browser: Any) -> Iterator[Callable[..., Any]]:
    """Make pages in fresh profiles; each has ``foreign``, the requests that left loopback."""
    contexts = []

    def make(width: int = 1280, height: int = 980, **options: Any) -> Any:
        context = browser.new_context(viewport={"width": width, "height": height}, **options)
        contexts.append(context)
        page = context.new_page()
        page.foreign = []
        page.problems = []

        def look(request: Any) -> None:
            url = request.url
            if url.startswith(("http", "ws")) and "//127.0.0.1" not in url and "//localhost" not in url:
                page.foreign.append(url)

        page.on("request", look)
        page.on("pageerror", lambda error: page.problems.append(str(error)))
        return page

    yield make
    for context in contexts:
        context.close()


@pytest.fixture
def page(new_page: Callable[..., Any]) -> Any:
    return new_page()
