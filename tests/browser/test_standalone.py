"""The standalone dashboard beside a kernel: it shows and steers that kernel's session, and sees it end."""

from __future__ import annotations

import os
import queue
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from jupyter_client.manager import KernelManager

from tests.servers import dashboard_server, status_of

pytestmark = [pytest.mark.browser, pytest.mark.kernel]

WORK = """
import asyncio, pathlib
%load_ext wiseflow_nb
from wiseflow_nb import current_session
tasks = current_session().tasks
marks = pathlib.Path({marks!r})
def note(word):
    with marks.open("a") as stream:
        stream.write(word + "\\n")
async def endless():
    try:
        while True:
            await asyncio.sleep(0.05)
    finally:
        note("stopped")
done = tasks.options(name="quick").submit(sum, [1, 2])
running = tasks.options(name="endless", cleanup=lambda: note("cleanup")).submit(endless)
done.result(timeout=20)
print("id", current_session().id)
"""


@pytest.fixture
def kernel(tmp_path: Path) -> Iterator[tuple[KernelManager, Any]]:
    manager = KernelManager()
    manager.start_kernel(env=dict(os.environ), cwd=str(tmp_path))
    client = manager.blocking_client()
    client.start_channels()
    client.wait_for_ready(60)
    yield manager, client
    client.stop_channels()
    if manager.is_alive():
        manager.shutdown_kernel(now=True)
    manager.cleanup_resources()


def run(client: Any, code: str) -> str:
    """Run a cell and return what it printed."""
    number = client.execute(code)
    text = ""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            message = client.get_iopub_msg(timeout=1)
        except queue.Empty:
            continue
        if message["parent_header"].get("msg_id") != number:
            continue
        if message["msg_type"] == "stream":
            text += message["content"]["text"]
        elif message["msg_type"] == "error":
            raise AssertionError("\n".join(message["content"]["traceback"]))
        elif message["msg_type"] == "status" and message["content"]["execution_state"] == "idle":
            return text
    raise AssertionError("the cell did not end in time")


def test_a_second_process_shows_and_steers_a_kernel(page: Any, tmp_path: Path, kernel: tuple[Any, Any]) -> None:
    manager, client = kernel
    marks = tmp_path / "marks.txt"
    number = run(client, WORK.format(marks=str(marks))).split("id ")[1].strip()
    requests: list[str] = []
    page.on("request", lambda request: requests.append(request.url))
    with dashboard_server(tmp_path) as url:
        assert status_of(url.split("?")[0]) != 200 or "login" in _final_url(url.split("?")[0])
        page.goto(url)
        page.locator('[data-testid="chart-cpu"]').wait_for(timeout=60_000)
        page.locator(f'option[value="{number}"]').first.wait_for(state="attached", timeout=30_000)
        page.locator('[data-testid="task-row"][data-name="quick"][data-state="completed"]').wait_for(timeout=30_000)
        row = page.locator('[data-testid="task-row"][data-name="endless"][data-state="running"]')
        row.wait_for(timeout=30_000)
        row.locator('[data-testid="cancel"]').click()
        page.locator('[data-testid="task-row"][data-name="endless"][data-state="cancelled"]').wait_for(timeout=30_000)
        assert marks.read_text().split() == ["stopped", "cleanup"]
        page.locator('[data-testid="setting-cpu_threshold"]').fill("55")
        page.locator('[data-testid="settings-apply"]').click()
        page.wait_for_selector('[data-testid="chart-cpu"][data-critical="55"]', timeout=30_000)
        assert "55.0" in run(client, "print(current_session().settings.cpu_threshold)")
        manager.shutdown_kernel()
        page.wait_for_selector("text=/\\bended\\b/i", timeout=30_000)
    outside = [item for item in requests if item.startswith("http") and "://127.0.0.1" not in item]
    assert outside == []


def _final_url(url: str) -> str:
    import urllib.request

    with urllib.request.urlopen(url, timeout=10) as answer:
        return str(answer.url)
