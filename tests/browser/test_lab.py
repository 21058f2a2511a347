"""The main job in a real JupyterLab: load, look, submit, step in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.servers import jupyter_lab

pytestmark = pytest.mark.browser

CELLS = [
    "%load_ext wiseflow_nb",
    "%wiseflow dashboard",
    """
import asyncio
from wiseflow_nb import current_session
tasks = current_session().tasks
def step(number, before=0):
    return number + before
chain = tasks.options(name="step 0").submit(step, 0)
for number in range(1, 9):
    chain = tasks.options(name=f"step {number}").submit(step, number, chain)
async def long_work():
    try:
        await asyncio.Event().wait()
    finally:
        stopped.append("stopped")
stopped = []
long_task = tasks.options(name="long work").submit(long_work)
print("chain result", chain.result(timeout=30))
""",
]


def test_a_person_submits_watches_cancels_and_moves_a_threshold(page: Any, tmp_path: Path) -> None:
    with jupyter_lab(tmp_path, CELLS) as url:
        page.goto(url)
        page.wait_for_function(
            """() => {
                const app = window.jupyterapp, widget = app && app.shell.currentWidget;
                const context = widget && widget.sessionContext;
                return context && context.isReady && context.session?.kernel?.status === 'idle';
            }""",
            timeout=90_000,
        )
        page.evaluate("() => window.jupyterapp.commands.execute('notebook:run-all-cells')")
        page.wait_for_selector("text=chain result 36", timeout=60_000)
        chart = page.locator('[data-testid="chart-cpu"]')
        chart.wait_for(timeout=60_000)
        row = page.locator('[data-testid="task-row"]')
        page.wait_for_function(
            """() => document.querySelectorAll('[data-testid="task-row"]').length === 10""", timeout=30_000
        )
        for number in range(9):
            done = page.locator(f'[data-testid="task-row"][data-name="step {number}"][data-state="completed"]')
            done.wait_for(timeout=30_000)
        long_row = page.locator('[data-testid="task-row"][data-name="long work"]')
        assert long_row.get_attribute("data-state") == "running"
        long_row.locator('[data-testid="cancel"]').click()
        page.locator('[data-testid="task-row"][data-name="long work"][data-state="cancelled"]').wait_for(timeout=30_000)
        assert row.count() == 10
        page.wait_for_selector('[data-testid="chart-cpu"][data-critical="90"]', timeout=30_000)
        field = page.locator('[data-testid="setting-cpu_threshold"]')
        field.fill("60")
        page.locator('[data-testid="settings-apply"]').click()
        page.wait_for_selector('[data-testid="chart-cpu"][data-critical="60"]', timeout=30_000)
        assert float(chart.get_attribute("data-warning")) == pytest.approx(48)
