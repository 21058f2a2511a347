"""The peak of memory that a worker tells is the system's high-water mark, however it was come by."""

from __future__ import annotations

import mmap
import sys
import time

import pytest

from wiseflow_nb.pool import _process_child
from wiseflow_nb.pool._process_child import Meter

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
SIZE = 64 << 20


@pytest.fixture
def readings(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """What the counter of page faults says, next first; then what it really says."""
    told: list[int] = []
    real = _process_child._page_faults
    monkeypatch.setattr(_process_child, "_page_faults", lambda: told.pop(0) if told else real())
    return told


def high_water_bytes() -> float:
    with open("/proc/self/status") as file:
        return next(float(line.split()[1]) * 1024.0 for line in file if line.startswith("VmHWM:"))


def touch(held: mmap.mmap) -> None:
    for start in range(0, SIZE, mmap.PAGESIZE):
        held[start] = 1


def touch_and_free() -> None:
    held = mmap.mmap(-1, SIZE)
    touch(held)
    held.close()


def burn(seconds: float) -> None:
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass


def test_without_a_page_fault_the_peak_is_what_was_resident_at_the_beginning(readings: list[int]) -> None:
    meter = Meter()
    readings += [7, 7, 7]
    for _ in range(3):
        meter.begin()
        assert meter.peak_bytes() == pytest.approx(high_water_bytes(), rel=0.05)
    meter.close()


def test_memory_that_was_given_back_without_a_page_fault_is_not_in_the_next_peak(readings: list[int]) -> None:
    meter = Meter()
    held = mmap.mmap(-1, SIZE)
    touch(held)
    readings += [7, 7, 7]
    meter.begin()
    meter.peak_bytes()
    meter.begin()
    before = meter.peak_bytes()
    held.close()
    meter.begin()
    assert meter.peak_bytes() <= before - 0.9 * SIZE
    meter.close()


def test_memory_that_was_touched_and_freed_is_in_the_peak_and_not_in_the_next_one() -> None:
    meter = Meter()
    touch_and_free()
    meter.begin()
    before = meter.peak_bytes()
    touch_and_free()
    assert meter.peak_bytes() >= before + 0.9 * SIZE
    meter.begin()
    assert meter.peak_bytes() < before + 0.5 * SIZE
    meter.close()


def test_memory_that_was_touched_and_freed_between_two_calls_is_in_the_peak_of_neither() -> None:
    meter = Meter()
    meter.begin()
    before = meter.peak_bytes()
    touch_and_free()
    meter.begin()
    assert meter.peak_bytes() < before + 0.5 * SIZE
    meter.close()


def test_where_the_mark_was_not_reset_or_the_files_are_closed_the_peak_is_unknown() -> None:
    meter = Meter()
    assert meter.peak_bytes() != meter.peak_bytes()
    meter.begin()
    assert meter.peak_bytes() > 0
    meter.close()
    assert meter.peak_bytes() != meter.peak_bytes()
    meter.begin()
    assert meter.peak_bytes() != meter.peak_bytes()


def test_cpu_time_counts_from_the_start_or_where_nothing_started_from_the_beginning() -> None:
    meter = Meter()
    meter.begin()
    burn(0.05)
    assert meter.cpu_seconds() >= 0.05 - 2e-6
    meter.begin()
    burn(0.05)
    began = time.process_time()
    meter.start()
    burn(0.01)
    counted = meter.cpu_seconds()
    assert 0.01 <= counted <= time.process_time() - began
    meter.close()
