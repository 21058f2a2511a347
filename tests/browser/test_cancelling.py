"""A running thread cannot be stopped: what its row says from the cancel until its code has returned."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.servers import voila

pytestmark = [pytest.mark.browser, pytest.mark.kernel]

SOURCE = """
import pathlib, time
from wiseflow_nb import Session
from wiseflow_nb.dashboard import Dashboard
session = Session(max_concurrent_tasks=1).start()
go, end = pathlib.Path({go!r}), time.monotonic() + 120
def deaf():
    while not go.exists() and time.monotonic() < end:
        time.sleep(0.02)
deaf_task = session.tasks.options(name="deaf").submit(deaf)
behind = session.tasks.options(name="behind").submit(int)
dashboard = Dashboard(session)
dashboard
"""


def test_a_thread_is_cancelling_until_it_returns_and_then_cancelled(page: Any, tmp_path: Path) -> None:
    go = tmp_path / "go"
    page.set_default_timeout(30_000)
    with voila(tmp_path, SOURCE.format(go=str(go))) as url:
        page.goto(url)
        row = page.locator('[data-testid="task-row"][data-name="deaf"]')
        behind = page.locator('[data-testid="task-row"][data-name="behind"]')
        page.locator('[data-testid="task-row"][data-name="deaf"][data-state="running"]').wait_for()
        assert row.locator(".wf-badge").inner_text().lower() == "running"
        row.locator('[data-testid="cancel"]').click()
        page.locator('[data-testid="task-row"][data-name="deaf"][data-state="cancelling"]').wait_for()
        assert row.locator(".wf-badge").inner_text().lower() == "cancelling"
        assert row.locator('[data-testid="cancel"]').is_disabled()
        # It goes on, and its time with it; the slot is its own until it returns.
        wall = row.locator(".wf-c-wall").text_content()
        page.wait_for_function(
            """(before) => document.querySelector('[data-name="deaf"] .wf-c-wall').textContent !== before""", arg=wall
        )
        assert row.get_attribute("data-state") == "cancelling"
        assert behind.get_attribute("data-state") == "pending"
        row.click()
        details = page.locator('[data-testid="task-details"]')
        details.locator('.wf-badge[data-state="cancelling"]').wait_for()
        go.touch()
        page.locator('[data-testid="task-row"][data-name="deaf"][data-state="cancelled"]').wait_for()
        assert row.locator(".wf-badge").inner_text().lower() == "cancelled"
        page.locator('[data-testid="task-row"][data-name="behind"][data-state="completed"]').wait_for()
        details.locator('.wf-badge[data-state="cancelled"]').wait_for()
        assert page.problems == []
