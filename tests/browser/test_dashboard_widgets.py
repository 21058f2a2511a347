"""The dashboard's widgets in a real browser, over a fake session served by Voilà."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.servers import voila

from .fake_view import EVIL

pytestmark = [pytest.mark.browser, pytest.mark.kernel]

SOURCE = """
from fake_view import fake_family
from wiseflow_nb.dashboard import Dashboard
dashboard = Dashboard(fake_family({tasks}, log={log!r}, older={older}))
dashboard
"""
HERE = str(Path(__file__).parent)


@pytest.fixture(autouse=True)
def nothing_left_behind() -> None:
    """In place of the net for each test: here a page's kernel lives until the module's server is stopped."""


class Served:
    def __init__(self, url: str, log: Path) -> None:
        self.url = url
        self.log = log

    def calls(self) -> list[list[Any]]:
        return [json.loads(line) for line in self.log.read_text().splitlines()] if self.log.exists() else []

    def wait_for_call(self, *call: Any, seconds: float = 15.0) -> None:
        deadline = time.monotonic() + seconds
        while list(call) not in self.calls():
            assert time.monotonic() < deadline, self.calls()
            time.sleep(0.05)


def serve(folder: Path, tasks: int, theme: str = "light", older: int = 0) -> Iterator[Served]:
    log = folder / "calls.jsonl"
    with voila(folder, SOURCE.format(tasks=tasks, log=str(log), older=older), theme=theme, extra_path=HERE) as url:
        yield Served(url, log)


@pytest.fixture(scope="module")
def served(chromium_path: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    yield from serve(tmp_path_factory.mktemp("voila"), 400)


@pytest.fixture(scope="module")
def many(chromium_path: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    yield from serve(tmp_path_factory.mktemp("many"), 10_000, "dark")


@pytest.fixture(scope="module")
def long(chromium_path: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    yield from serve(tmp_path_factory.mktemp("long"), 21_500, older=21_000)


@pytest.fixture
def opened(served: Served, new_page: Callable[..., Any]) -> Any:
    return arrive(new_page(), served)


def arrive(page: Any, served: Served) -> Any:
    page.set_default_timeout(30_000)
    page.goto(served.url)
    page.wait_for_selector('[data-testid="chart-cpu"] .main-svg')
    page.wait_for_selector('[data-testid="task-row"]')
    return page


def points(page: Any, chart: str = "cpu") -> int:
    return int(page.get_attribute(f'[data-testid="chart-{chart}"]', "data-points"))


def test_it_draws_everything_and_nothing_leaves_the_machine(opened: Any) -> None:
    for chart in ("cpu", "memory", "disk", "io", "network"):
        opened.wait_for_selector(f'[data-testid="chart-{chart}"] .scatterlayer .trace')
        assert points(opened, chart) > 800
    assert opened.inner_text('[data-testid="card-cpu-value"]').endswith("%")
    assert opened.inner_text('[data-testid="session-state"]') == "live"
    assert "400 tasks" in opened.inner_text('[data-testid="task-count"]')
    assert opened.locator('[data-testid="alert"]').count() == 3
    assert opened.foreign == []
    assert opened.problems == []
    assert opened.locator(".plotlyjsicon, [data-title*='cloud' i]").count() == 0


def test_new_points_arrive_and_old_ones_fall_out(opened: Any) -> None:
    last = "() => { const x = document.querySelector('[data-testid=chart-cpu] .wf-plot').data[0].x; return [x[0], x[x.length - 1], x.length]; }"
    before = opened.evaluate(last)
    opened.wait_for_function(
        f"(before) => ({last})()[1] > before[1] + 2000 && ({last})()[0] > before[0]", arg=before, timeout=20_000
    )
    after = opened.evaluate(last)
    assert abs(after[2] - before[2]) < 30


def test_the_bands_move_when_a_threshold_changes(opened: Any, served: Served) -> None:
    chart = opened.locator('[data-testid="chart-cpu"]')
    assert (chart.get_attribute("data-warning"), chart.get_attribute("data-critical")) == ("72", "90")
    apply = opened.locator('[data-testid="settings-apply"]')
    assert apply.is_disabled()
    field = opened.locator('[data-testid="setting-cpu_threshold"]')
    field.fill("120")
    assert field.get_attribute("aria-invalid") == "true"
    assert apply.is_disabled()
    field.fill("50")
    apply.click()
    opened.wait_for_selector('[data-testid="chart-cpu"][data-critical="50"][data-warning="40"]')
    served.wait_for_call("configure", {"cpu_threshold": 50})
    shapes = opened.evaluate(
        "() => document.querySelector('[data-testid=chart-cpu] .wf-plot').layout.shapes.slice(0, 2).map((s) => [s.y0, s.y1])"
    )
    assert shapes == [[40, 50], [50, 100]]
    assert "CPU_THRESHOLD" in opened.inner_text('[data-testid="settings"] [data-testid="answer"]')
    opened.click('[data-testid="settings-reset"]')
    opened.wait_for_selector('[data-testid="chart-cpu"][data-critical="90"]')
    assert field.input_value() == "90"


def test_cancel_retry_and_priority_reach_the_session(opened: Any, served: Served) -> None:
    row = opened.locator('[data-task-id="t00010"]')
    row.locator('[data-testid="priority-up"]').click()
    opened.wait_for_function(
        "() => document.querySelector('[data-testid=tasks] [data-testid=answer]').textContent.includes('t00010')"
    )
    row.locator('[data-testid="cancel"]').click()
    served.wait_for_call("cancel", "t00010")
    opened.fill('[data-testid="task-filter"]', "t00010")
    opened.wait_for_selector('[data-task-id="t00010"][data-state="cancelled"]')
    assert row.locator('[data-testid="cancel"]').is_disabled()
    row.locator('[data-testid="retry"]').click()
    served.wait_for_call("retry", "t00010")


def test_names_are_text_and_never_markup(opened: Any) -> None:
    opened.fill('[data-testid="task-filter"]', "onerror")
    row = opened.locator('[data-testid="task-row"]')
    assert row.count() == 1
    assert row.get_attribute("data-name") == EVIL
    assert row.locator(".wf-c-name span").inner_text() == EVIL
    row.locator(".wf-c-name").click()
    opened.wait_for_selector('[data-testid="task-details"] .wf-terms')
    assert EVIL in opened.inner_text('[data-testid="task-details"]')
    assert opened.locator('[data-testid="tasks"] img').count() == 0
    assert opened.evaluate("() => window.hacked") is None


def test_the_table_is_reachable_by_keyboard(opened: Any) -> None:
    opened.locator('[data-testid="task-row"][tabindex="0"]').focus()
    opened.keyboard.press("ArrowDown")
    opened.keyboard.press("ArrowDown")
    focused = "() => document.activeElement.dataset.taskId"
    assert opened.evaluate(focused) == "t00002"
    opened.keyboard.press("Enter")
    opened.wait_for_selector('[data-testid="task-details"] .wf-terms')
    opened.keyboard.press("Tab")
    assert opened.evaluate("() => document.activeElement.dataset.testid") == "cancel"
    opened.keyboard.press("End")
    opened.wait_for_function(f"() => ({focused})() !== undefined && ({focused})() !== 't00002'")


def test_details_show_the_traceback(opened: Any) -> None:
    opened.select_option('[data-testid="task-state-filter"]', "problem")
    opened.locator('[data-testid="task-row"]').first.locator(".wf-c-name").click()
    opened.wait_for_selector('[data-testid="task-details"] pre')
    text = opened.inner_text('[data-testid="task-details"]')
    assert "Traceback (most recent call last)" in text
    assert "epoch 2" in text
    assert "null" not in text


def test_alert_buttons_reach_the_session(opened: Any, served: Served) -> None:
    alert = opened.locator('[data-alert-id="a3"]')
    alert.locator('[data-testid="silence"]').click()
    served.wait_for_call("silence", "a3", 600.0)
    alert.locator('[data-testid="acknowledge"]').click()
    served.wait_for_call("acknowledge", "a3")
    opened.wait_for_function("() => document.querySelector('[data-testid=acknowledge]').textContent === 'Acknowledged'")


def test_an_ended_session_is_read_only(opened: Any, served: Served) -> None:
    opened.select_option('[data-testid="session-chooser"]', "nb-0001")
    opened.wait_for_selector('[data-testid="session-state"][data-state="ended"]')
    opened.wait_for_function("() => document.querySelector('[data-testid=task-count]').textContent.startsWith('40 ')")
    assert "nothing can be changed" in opened.inner_text('[data-testid="banner"]')
    assert opened.locator('[data-testid="cancel"]:enabled, [data-testid="retry"]:enabled').count() == 0
    assert opened.locator('[data-testid="pause-tasks"]').is_disabled()
    assert opened.locator('[data-testid="setting-cpu_threshold"]').is_disabled()


def test_tasks_are_paused_and_resumed(opened: Any, served: Served) -> None:
    opened.click('[data-testid="pause-tasks"]')
    served.wait_for_call("pause")
    opened.wait_for_selector('[data-testid="pause-tasks"][aria-pressed="true"]')
    opened.click('[data-testid="pause-tasks"]')
    served.wait_for_call("resume")


@pytest.mark.parametrize("width", [1600, 1280, 900, 480])
def test_nothing_sticks_out_at_any_width(served: Served, new_page: Callable[..., Any], width: int) -> None:
    page = arrive(new_page(width, 1000), served)
    page.wait_for_timeout(500)
    wide = page.evaluate(
        """() => [...document.querySelectorAll('.wf-panel, .wf-header, .wf-rows .wf-row > *')].filter((node) => {
            const box = node.getBoundingClientRect(), root = node.closest('.wf-panel:not(.wf-card)') || document.querySelector('.wf-root');
            const outer = root === node ? document.querySelector('.wf-root').getBoundingClientRect() : root.getBoundingClientRect();
            return box.width && (box.right > outer.right + 1 || box.left < outer.left - 1);
        }).map((node) => node.className)"""
    )
    assert wide == []
    assert page.evaluate(
        "() => document.querySelector('.wf-root').scrollWidth <= document.querySelector('.wf-root').clientWidth"
    )


def test_the_plots_follow_the_theme(opened: Any) -> None:
    colour = "() => document.querySelector('[data-testid=chart-cpu] .wf-plot').data[0].line.color"
    before = opened.evaluate(colour)
    opened.evaluate("() => { document.body.setAttribute('data-jp-theme-light', 'false'); }")
    opened.wait_for_function(f"(before) => ({colour})() !== before", arg=before)


def test_without_a_theme_of_the_host_the_readers_scheme_decides(opened: Any) -> None:
    colour = "() => document.querySelector('[data-testid=chart-cpu] .wf-plot').data[0].line.color"
    before = opened.evaluate(colour)
    opened.evaluate("() => { document.body.removeAttribute('data-jp-theme-light'); document.body.className = ''; }")
    opened.emulate_media(color_scheme="dark")
    opened.wait_for_function(f"(before) => ({colour})() !== before", arg=before)


def test_ten_thousand_tasks_stay_usable(many: Served, new_page: Callable[..., Any]) -> None:
    page = arrive(new_page(), many)
    assert page.locator('[data-testid="task-row"]').count() < 60
    page.evaluate(
        "() => { const box = document.querySelector('[data-testid=task-scroller]'); box.scrollTop = box.scrollHeight; }"
    )
    page.wait_for_function(
        "() => document.querySelectorAll('[data-testid=task-row]')[0].getAttribute('aria-rowindex') > 9000"
    )
    started = time.monotonic()
    page.fill('[data-testid="task-filter"]', "#9999")
    page.wait_for_function("() => document.querySelectorAll('[data-testid=task-row]').length === 1")
    page.fill('[data-testid="task-filter"]', "")
    page.click('[data-testid="sort-wall"]')
    page.wait_for_selector('[role="columnheader"][aria-sort="descending"]')
    assert time.monotonic() - started < 15
    assert page.problems == []


def test_older_tasks_follow_and_more_of_them_when_asked_for(long: Served, new_page: Callable[..., Any]) -> None:
    page = arrive(new_page(), long)
    count = page.locator('[data-testid="task-count"]')
    more = page.locator('[data-testid="task-older"]')
    more.wait_for()
    # Five of the oldest still run, and tell of it.
    assert count.inner_text() == "20,505 of 21,500 tasks"
    more.click()
    page.wait_for_function("() => document.querySelector('[data-testid=task-count]').textContent === '21,500 tasks'")
    assert more.is_hidden()
    # The older of those that have ended stand below the newer.
    page.locator('[data-testid="task-filter"]').fill("t0900")
    names = page.locator('[data-testid="task-row"]').evaluate_all(
        "rows => rows.map((row) => [row.dataset.taskId, row.getAttribute('aria-rowindex')])"
    )
    names.sort(key=lambda pair: int(pair[1]))
    assert [name for name, _ in names] == [f"t0900{digit}" for digit in range(9, -1, -1)]
    assert page.problems == []


def test_a_second_page_gets_its_own_history(served: Served, new_page: Callable[..., Any]) -> None:
    for _ in range(2):
        assert points(arrive(new_page(), served)) > 800
