"""The dashboard without a browser: what it sends, when it is silent, and what clicks lead to."""

from __future__ import annotations

import gc
import sqlite3
import threading
import time
import weakref
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tests.browser.fake_view import FakeView
from wiseflow_nb.dashboard import Dashboard, _core
from wiseflow_nb.dashboard._attention import SILENCE_SECONDS, CellWatch, Inbox
from wiseflow_nb.dashboard._core import CHART_COLUMNS, Core, as_block
from wiseflow_nb.dashboard._widgets import plotly_gzip, plotly_version
from wiseflow_nb.errors import StoreError, UsageError
from wiseflow_nb.records import SessionState, TaskState
from wiseflow_nb.testing import FakeClock


class Page:
    """Records what each widget sends, and speaks as a page would."""

    def __init__(self, core: Core) -> None:
        self.core = core
        self.sent: list[tuple[str, dict[str, Any], list[bytes]]] = []
        for widget in core.widgets:
            widget.send = self._recorder(widget.name)  # type: ignore[method-assign]

    def _recorder(self, name: str) -> Any:
        def record(content: dict[str, Any], buffers: list[bytes] | None = None) -> None:
            self.sent.append((name, content, list(buffers or ())))

        return record

    def say(self, widget: str, **content: Any) -> None:
        target = next(item for item in self.core.widgets if item.name == widget)
        target._handle_custom_msg(content, [])

    def hello(self) -> None:
        for widget in self.core.widgets:
            self.say(widget.name, type="hello")

    def take(self, widget: str | None = None, kind: str | None = None) -> list[dict[str, Any]]:
        found = [
            content
            for name, content, _ in self.sent
            if (widget is None or name == widget) and (kind is None or content["type"] == kind)
        ]
        return found

    def clear(self) -> None:
        self.sent.clear()


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def view(clock: FakeClock) -> FakeView:
    return FakeView(60, now=clock.time)


@pytest.fixture
def core(view: FakeView, clock: FakeClock) -> Iterator[Core]:
    made = Core(view, clock)
    yield made
    made.close()
    for widget in made.widgets:
        widget.close()


@pytest.fixture
def page(core: Core) -> Page:
    return Page(core)


def open_page(page: Page) -> None:
    page.hello()
    page.core.tick()


def test_nothing_is_sent_before_a_page_speaks(core: Core, page: Page, view: FakeView) -> None:
    core.tick()
    assert page.sent == []
    assert view.watches == 0


def test_hello_is_answered_with_everything(page: Page, view: FakeView) -> None:
    open_page(page)
    parts = page.take("overview", "parts")[0]["parts"]
    assert {"session", "card:cpu", "card:memory", "card:disk", "card:tasks", "card:workers"} <= set(parts)
    rows = page.take("tasks", "rows")[0]
    assert rows["all"] is True
    assert len(rows["rows"]) == 60
    assert page.take("alerts", "parts")[0]["parts"]["live"] == 1
    assert page.take("settings", "parts")[0]["parts"]["values"]["cpu_threshold"] == 90.0
    history = next((content, buffers) for name, content, buffers in page.sent if content["type"] == "history")
    block = np.frombuffer(history[1][0], dtype="<f8").reshape(1 + len(CHART_COLUMNS), history[0]["n"])
    assert history[0]["n"] == pytest.approx(900, abs=2)
    assert np.all(np.diff(block[0]) > 0)
    assert view.watches == 1


def test_the_next_tick_sends_only_what_changed(page: Page, clock: FakeClock) -> None:
    open_page(page)
    page.clear()
    clock.advance(1.0)
    page.core.tick()
    rows = page.take("tasks", "rows")[0]
    assert "all" not in rows
    assert 1 <= len(rows["rows"]) <= 6
    appended = [(content, buffers) for _, content, buffers in page.sent if content["type"] == "append"]
    assert len(appended) == 1
    assert appended[0][0]["n"] == 1
    assert len(appended[0][1][0]) == 8 * (1 + len(CHART_COLUMNS))
    assert page.take("settings") == []
    assert "fields" not in str(page.sent)
    assert sum(len(str(content)) for _, content, _ in page.sent) < 3000


def test_what_a_first_picture_leaves_out_follows_in_pages(
    page: Page, view: FakeView, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_core, "PAGE_TASKS", 4)
    monkeypatch.setattr(_core, "PAGES_A_TICK", 2)
    monkeypatch.setattr(_core, "FILL_TASKS", 10)
    view.moving = False
    view.older = 30
    open_page(page)
    assert len(page.take("tasks", "rows")[0]["rows"]) == 30
    sent: list[list[Any]] = []
    for _ in range(5):
        page.clear()
        page.core.tick()
        sent.append([[row[0] for row in content["rows"]] for content in page.take("tasks", "rows")])
        assert all(content["older"] for content in page.take("tasks", "rows"))
    ids = [f"t{number:05d}" for number in range(29, -1, -1)]
    assert sent == [[ids[:4], ids[4:8]], [ids[8:12]], [], [], []]
    assert page.core.tasks._sent["older"] == "true"
    assert page.core.tasks._sent["total"] == "60"
    # Somebody asks for more, until there are none.
    for _ in range(3):
        page.clear()
        page.say("tasks", type="older")
        for _ in range(3):
            page.core.tick()
        sent.append([row[0] for content in page.take("tasks", "rows") for row in content["rows"]])
    assert sent[5:] == [ids[12:24], ids[24:], []]
    assert page.core.tasks._sent["older"] == "false"


def test_an_announced_shutdown_is_shown_until_somebody_calls_it_off(
    page: Page, view: FakeView, clock: FakeClock
) -> None:
    open_page(page)
    page.clear()
    view.shutdown_at = clock.time() + 300.0
    page.core.tick()
    assert page.take("overview", "parts")[0]["parts"]["shutdown"] == pytest.approx(view.shutdown_at)
    page.say("overview", type="verb", verb="resume", args=[], ask=1)
    page.core.tick()
    page.core.tick()
    assert [
        content["parts"]["shutdown"] for content in page.take("overview", "parts") if "shutdown" in content["parts"]
    ][-1] is None


def test_no_append_without_a_new_sample(page: Page) -> None:
    open_page(page)
    page.clear()
    page.core.tick()
    assert page.take("plot") == []


def test_silence_stops_the_pushing_and_a_ping_refreshes(page: Page, clock: FakeClock, view: FakeView) -> None:
    open_page(page)
    page.clear()
    clock.advance(SILENCE_SECONDS + 1)
    page.core.tick()
    assert page.sent == []
    page.say("overview", type="ping")
    assert page.core.inbox.wake.is_set()
    page.core.tick()
    assert page.take("plot", "history")
    assert page.take("tasks", "rows")[0]["all"] is True


def test_pings_keep_it_going_without_refreshing(page: Page, clock: FakeClock) -> None:
    open_page(page)
    for _ in range(10):
        clock.advance(2.0)
        page.say("overview", type="ping")
        assert not page.core.inbox.wake.is_set()
        page.clear()
        page.core.tick()
        assert page.take("plot", "append")
        assert not page.take("plot", "history")


def test_a_running_cell_hears_no_ping_and_goes_on(page: Page, clock: FakeClock) -> None:
    open_page(page)
    page.core.cells.running = True
    clock.advance(60)
    page.clear()
    page.core.tick()
    assert page.take("overview", "parts")
    page.core.cells.running = False
    clock.advance(SILENCE_SECONDS + 1)
    page.clear()
    page.core.tick()
    assert page.sent == []


def test_a_page_opened_under_a_long_cell_is_told_unasked(page: Page, clock: FakeClock) -> None:
    page.core.displayed = True
    page.core.cells.running = True
    page.core.tick()
    assert page.sent == []
    clock.advance(2)
    page.core.tick()
    assert page.take("plot", "history")
    assert page.take("plot", "plotly")
    page.clear()
    clock.advance(1)
    page.core.tick()
    assert not page.take("plot", "plotly")


def test_the_library_is_sent_on_request(page: Page) -> None:
    page.say("plot", type="plotly")
    page.core.tick()
    message = next((content, buffers) for _, content, buffers in page.sent if content["type"] == "plotly")
    assert message[0]["version"] == plotly_version()
    assert message[1] == [plotly_gzip()]
    assert message[1][0][:2] == b"\x1f\x8b"


@pytest.mark.parametrize(
    ("widget", "verb", "args", "call"),
    [
        ("tasks", "cancel", ["t00001"], ("cancel", "t00001")),
        ("tasks", "retry", ["t00029"], ("retry", "t00029")),
        ("tasks", "reprioritise", ["t00010", "high"], ("reprioritise", "t00010", "high")),
        ("overview", "pause", [], ("pause",)),
        ("overview", "resume", [], ("resume",)),
        ("alerts", "acknowledge", ["a3"], ("acknowledge", "a3")),
        ("alerts", "silence", ["a3", 600], ("silence", "a3", 600.0)),
        ("settings", "configure", [{"cpu_threshold": 80}], ("configure", {"cpu_threshold": 80})),
    ],
)
def test_a_click_leads_to_its_verb_and_an_answer(
    page: Page, view: FakeView, widget: str, verb: str, args: list[Any], call: tuple[Any, ...]
) -> None:
    open_page(page)
    page.say(widget, type="verb", verb=verb, args=args, request=5)
    assert view.calls == [], "a callback only enqueues"
    page.core.tick()
    assert view.calls == [call]
    answer = page.take(widget, "result")[0]
    assert (answer["request"], answer["ok"]) == (5, True)
    assert answer["message"]


def test_a_changed_threshold_moves_the_bands(page: Page) -> None:
    open_page(page)
    assert page.take("plot", "parts")[0]["parts"]["bands"]["cpu"] == [72.0, 90.0]
    page.clear()
    page.say("settings", type="verb", verb="configure", args=[{"cpu_threshold": 50}], request=1)
    page.core.tick()
    assert page.take("plot", "parts")[0]["parts"]["bands"]["cpu"] == [40.0, 50.0]


@pytest.mark.parametrize(
    ("verb", "args"),
    [
        ("shutdown", []),
        ("close", []),
        ("configure", [{"dashboard_token": "x"}]),
        ("configure", [{"cpu_threshold": 900}]),
        ("configure", [5]),
        ("silence", ["a3", "soon"]),
    ],
)
def test_what_is_not_allowed_is_answered_and_not_done(page: Page, verb: str, args: list[Any]) -> None:
    open_page(page)
    page.say("settings", type="verb", verb=verb, args=args, request=1)
    page.core.tick()
    assert page.take("settings", "result")[0]["ok"] is False


def test_a_secret_is_refused_with_the_reason_and_the_remedy(page: Page) -> None:
    open_page(page)
    page.say("settings", type="verb", verb="configure", args=[{"dashboard_token": "sEcReT"}], request=1)
    page.core.tick()
    message = page.take("settings", "result")[0]["message"]
    assert "DASHBOARD_TOKEN is secret" in message
    assert "session.configure()" in message
    assert "sEcReT" not in message


def test_missing_arguments_are_answered(page: Page) -> None:
    open_page(page)
    page.say("tasks", type="verb", verb="cancel", args=[], request=1)
    page.core.tick()
    assert page.take("tasks", "result")[0]["ok"] is False


@pytest.mark.parametrize("state", [SessionState.ENDED, SessionState.CRASHED])
def test_a_session_that_is_over_takes_no_verb(clock: FakeClock, state: SessionState) -> None:
    view = FakeView(20, now=clock.time, state=state)
    core = Core(view, clock)
    page = Page(core)
    open_page(page)
    page.say("tasks", type="verb", verb="cancel", args=["t00001"], request=1)
    core.tick()
    assert view.calls == []
    assert "nothing can be changed" in page.take("tasks", "result")[0]["message"]
    assert page.take("tasks", "parts")[0]["parts"]["why"]
    assert page.take("plot", "history")[0]["end"] == pytest.approx(view.info.ended_seconds)


@pytest.mark.parametrize(
    "error", [StoreError("no file"), OSError("gone"), sqlite3.OperationalError("locked"), ValueError("x")]
)
def test_a_view_that_raises_is_shown_and_the_loop_goes_on(
    page: Page, view: FakeView, clock: FakeClock, error: Exception
) -> None:
    open_page(page)
    page.clear()
    view.fail = error
    page.core.tick()
    assert str(error) in page.take("overview", "parts")[0]["parts"]["error"]
    view.fail = None
    page.clear()
    clock.advance(1)
    page.core.tick()
    assert page.take("overview", "parts")[0]["parts"]["error"] == ""


def test_sessions_that_cannot_be_listed_do_not_hide_this_one(
    page: Page, view: FakeView, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken() -> list[Any]:
        raise OSError("locked")

    monkeypatch.setattr(view, "sessions", broken)
    open_page(page)
    parts = page.take("overview", "parts")[0]["parts"]
    assert "locked" in parts["notice"]
    assert parts["error"] == ""
    assert page.take("plot", "history")


def test_an_error_at_the_first_hello_does_not_lose_the_history(page: Page, view: FakeView) -> None:
    view.fail = StoreError("not yet")
    open_page(page)
    view.fail = None
    page.core.tick()
    assert page.take("tasks", "rows")[0]["all"] is True
    assert page.take("plot", "history")


def test_choosing_a_session_opens_it_and_going_back_closes_it(page: Page, view: FakeView, clock: FakeClock) -> None:
    other = FakeView(10, session_id="nb-0001", state=SessionState.ENDED, now=clock.time)
    view.others["nb-0001"] = other
    open_page(page)
    page.clear()
    page.say("overview", type="open", id="nb-0001")
    page.core.tick()
    assert page.take("overview", "parts")[0]["parts"]["session"]["state"] == "ended"
    assert len(page.take("tasks", "rows")[0]["rows"]) == 10
    page.say("overview", type="open", id=view.info.session_id)
    page.clear()
    page.core.tick()
    assert page.take("overview", "parts")[0]["parts"]["session"]["id"] == view.info.session_id
    assert other.closed
    assert not view.closed


def test_the_range_brings_a_new_history(page: Page) -> None:
    open_page(page)
    page.clear()
    page.say("overview", type="range", seconds=3600)
    page.core.tick()
    history = page.take("plot", "history")[0]
    assert history["range"] == 3600
    page.clear()
    page.say("overview", type="range", seconds=10**9)
    page.core.tick()
    assert not page.take("plot", "history")


def test_after_the_clock_was_set_back_the_charts_go_on(page: Page, view: FakeView, clock: FakeClock) -> None:
    open_page(page)
    before = clock.time()
    taken = np.arange(before - 600.0, before)

    def series(columns: Any, since_seconds: float, max_points: int) -> Any:
        times = np.sort(np.concatenate((taken, np.arange(before - 300.0, clock.time() - 300.0))))
        times = times[times >= since_seconds]
        return times, {name: np.full(len(times), 0.5) for name in columns}

    view.series = series  # type: ignore[method-assign]
    clock._epoch -= 300.0
    page.clear()
    clock.advance(1.0)
    page.core.tick()
    # Once all, without what is later than now; then what comes, as ever.
    assert [content["type"] for content in page.take("plot") if "n" in content] == ["history"]
    page.clear()
    for _ in range(5):
        clock.advance(1.0)
        page.core.tick()
    assert [content["type"] for content in page.take("plot") if "n" in content] == ["append"] * 5


def test_paused_drawing_sends_no_figures_and_resuming_sends_all(page: Page, clock: FakeClock) -> None:
    open_page(page)
    page.say("overview", type="drawing", on=False)
    page.core.tick()
    page.clear()
    clock.advance(1)
    page.core.tick()
    assert not page.take("plot")
    assert not page.take("tasks")
    page.say("overview", type="drawing", on=True)
    page.core.tick()
    assert page.take("plot", "history")


def test_details_are_fetched_on_demand(page: Page) -> None:
    open_page(page)
    page.say("tasks", type="details", id="t00029")
    page.say("tasks", type="details", id="nowhere")
    page.core.tick()
    first, second = page.take("tasks", "details")
    assert "Traceback" in first["task"]["traceback"]
    assert second["task"] is None


def test_a_cancelled_task_travels_as_one_row(page: Page, view: FakeView) -> None:
    view.moving = False
    open_page(page)
    page.clear()
    page.say("tasks", type="verb", verb="cancel", args=["t00010"], request=1)
    page.core.tick()
    (rows,) = page.take("tasks", "rows")
    assert [row[0] for row in rows["rows"]] == ["t00010"]
    assert view.tasks["t00010"].state is TaskState.CANCELLED


def test_ten_thousand_tasks_travel_once_and_small(clock: FakeClock) -> None:
    core = Core(FakeView(10_000, now=clock.time), clock)
    page = Page(core)
    open_page(page)
    assert len(str(page.take("tasks", "rows")[0])) < 1_500_000
    page.clear()
    clock.advance(1)
    core.tick()
    assert len(str(page.take("tasks", "rows")[0])) < 2000


def test_gaps_keep_their_place_and_missing_columns_are_nan() -> None:
    block = as_block(np.array([np.nan, 1.0, np.nan, 5.0]), {"cpu_utilization_ratio": np.array([1.0, 0.1, np.nan, 0.5])})
    assert block[0].tolist() == [1.0, 1.001, 5.0]
    assert np.isnan(block[1][1])
    assert np.isnan(block[2]).all()


def test_the_inbox_is_bounded_and_keeps_the_newest(clock: FakeClock) -> None:
    inbox = Inbox(clock)
    for number in range(5000):
        inbox.put("tasks", {"type": "verb", "n": number})
    items = inbox.drain()
    assert len(items) == 1000
    assert items[-1][1]["n"] == 4999


def test_cells_are_watched_in_a_kernel_and_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    callbacks: dict[str, list[Any]] = {"pre_run_cell": [], "post_run_cell": []}
    events = SimpleNamespace(
        callbacks=callbacks,
        register=lambda name, hook: callbacks[name].append(hook),
        unregister=lambda name, hook: callbacks[name].remove(hook),
    )
    shell = SimpleNamespace(kernel=object(), events=events)
    monkeypatch.setitem(__import__("sys").modules, "IPython", SimpleNamespace(get_ipython=lambda: shell))
    watch = CellWatch()
    assert watch.running
    callbacks["post_run_cell"][0](None)
    assert not watch.running
    callbacks["pre_run_cell"][0](None)
    assert watch.running
    watch.close()
    assert callbacks == {"pre_run_cell": [], "post_run_cell": []}


def wait_until(condition: Any, seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_the_thread_serves_pages_and_ends_with_close(view: FakeView) -> None:
    dashboard = Dashboard(SimpleNamespace(view=view), interval=0.1)
    page = Page(dashboard._core)
    page.hello()
    wait_until(lambda: page.take("plot", "history"))
    assert dashboard.view is view
    assert repr(dashboard) == "<Dashboard open>"
    assert "application/vnd.jupyter.widget-view+json" in str(dashboard._repr_mimebundle_())
    dashboard.close()
    dashboard.close()
    assert not dashboard._thread.is_alive()
    assert dashboard.closed


def test_closing_the_widget_closes_the_dashboard(view: FakeView) -> None:
    dashboard = Dashboard(view, interval=0.1)
    dashboard.widget.close()
    wait_until(lambda: not dashboard._thread.is_alive())
    assert dashboard.closed


def test_a_closed_dashboard_is_forgotten(view: FakeView) -> None:
    dashboard = Dashboard(view, interval=0.1)
    gone = weakref.ref(dashboard)
    dashboard.close()
    del dashboard
    gc.collect()
    assert gone() is None
    assert not any(thread.name == "wiseflow-dashboard" for thread in threading.enumerate())


@pytest.mark.parametrize("thing", [None, 5, SimpleNamespace(view=None)])
def test_only_a_session_or_a_view_is_taken(thing: Any) -> None:
    with pytest.raises(UsageError, match="session or a view"):
        Dashboard(thing)


def test_too_short_an_interval_is_refused(view: FakeView) -> None:
    with pytest.raises(UsageError, match="interval"):
        Dashboard(view, interval=0)
