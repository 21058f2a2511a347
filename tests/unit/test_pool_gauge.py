"""The gauge of CPU time, against a thread whose every microsecond is known."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wiseflow_nb.pool import _gauge
from wiseflow_nb.pool._gauge import SHORT_SECONDS, STALE_SECONDS, CpuGauge


class Thread:
    """What stands in for the module's ``time``: a thread's two clocks, in whole microseconds."""

    def __init__(self) -> None:
        self.wall = self.cpu = 0
        self.readings = 0

    def monotonic(self) -> float:
        return self.wall / 1e6

    def thread_time(self) -> float:
        self.readings += 1
        return self.cpu / 1e6

    def run(self, on: int, off: int = 0) -> None:
        self.wall += on + off
        self.cpu += on


@pytest.fixture
def thread(monkeypatch):
    made = Thread()
    monkeypatch.setattr(_gauge, "time", made)
    return made


def test_short_steps_are_not_worth_a_reading_each(thread):
    gauge = CpuGauge()
    for _ in range(1_000):
        thread.run(10)
        assert gauge.step() == pytest.approx(10e-6)
    assert thread.readings < 1_000 * 10e-6 / STALE_SECONDS + 2


def test_a_long_step_is_told_apart_from_a_sleep(thread):
    gauge = CpuGauge()
    thread.run(2_000, 50_000)
    assert gauge.step() == pytest.approx(2e-3)
    thread.run(0, 70_000)
    assert gauge.step() == pytest.approx(0.0)


def test_what_ran_in_a_pause_is_not_counted(thread):
    gauge = CpuGauge()
    thread.run(9_000)
    gauge.start()
    thread.run(100, 900)
    assert gauge.step() == pytest.approx(100e-6)


@given(
    steps=st.lists(
        st.tuples(st.booleans(), *[st.integers(0, 2_000) | st.integers(0, 40) for _ in range(4)]),
        min_size=1,
        max_size=60,
    )
)
def test_the_figure_is_within_its_bounds(steps):
    thread = Thread()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_gauge, "time", thread)
        gauge = CpuGauge()
        for paused, gap_on, gap_off, on, off in steps:
            if paused:
                thread.run(gap_on, gap_off)
                gauge.start()
            thread.run(on, off)
            # Off the CPU for less than SHORT_SECONDS in all is what a short step may hide.
            figure = gauge.step() * 1e6
            assert figure >= on - 0.01
            assert figure <= on + off + 0.01
            assert figure <= on + max(STALE_SECONDS, SHORT_SECONDS) * 1e6 + 0.01
