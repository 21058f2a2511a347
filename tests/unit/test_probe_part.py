"""One part of a probe: told once, tried later and later, and read less often when it is dear."""

from __future__ import annotations

import itertools
import math
import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wiseflow_nb.config import Settings
from wiseflow_nb.doctor import _reading
from wiseflow_nb.resources import ResourceMonitor, _disk
from wiseflow_nb.resources._disk import Disks, absolute_paths, split_paths
from wiseflow_nb.resources._part import (
    CHEAP_SECONDS,
    LONGEST_BACKOFF_SECONDS,
    LONGEST_SECONDS,
    RUNNING,
    SHARE,
    Part,
)
from wiseflow_nb.resources._patience import Patience
from wiseflow_nb.resources._probe import Probe


class Bench:
    """A timer that only work moves, and a part whose work takes what it is told."""

    def __init__(self, columns: tuple[str, ...] = ("process_open_fds", "disk_read_bytes_total"), **options: float):
        self.spent = 0.0
        self.cost = 0.0
        self.reads: list[float] = []
        self.told: list[str] = []
        self.now = 0.0
        self.error: Exception | None = None
        self.part = Part("work", columns, self.read, **options)

    def read(self) -> tuple[float, ...]:
        self.spent += self.cost
        self.reads.append(self.now)
        if self.error is not None:
            raise self.error
        return (float(len(self.reads)),) * len(self.part.columns)

    def at(self, now: float) -> tuple[float, ...]:
        self.now = now
        return tuple(self.part.values(now, lambda kind, message: self.told.append(kind), lambda: self.spent))


def test_a_cheap_part_is_read_each_time() -> None:
    bench = Bench()
    bench.cost = 0.9 * CHEAP_SECONDS
    for at in range(100):
        assert bench.at(at / 10) == (at + 1, at + 1)
    assert bench.told == []


def test_a_dear_part_is_read_less_often_and_its_counters_are_unknown_between() -> None:
    bench = Bench()
    bench.cost = 0.05
    rows = [bench.at(float(at)) for at in range(100)]
    # So often that it takes its share of the time.
    assert sum(bench.cost for at in bench.reads if at >= RUNNING) <= (100 - RUNNING) * SHARE + bench.cost
    assert bench.told == ["probe_slowed"]
    between = [row for at, row in enumerate(rows) if float(at) not in bench.reads]
    assert between
    assert all(row[0] >= 1 and math.isnan(row[1]) for row in between)
    bench.cost = 0.0
    # Cheap again, it is read each time again.
    start = bench.part.due
    assert [bench.at(start + at)[1] for at in range(3)] == [len(bench.reads) - 2 + at for at in range(3)]
    bench.cost = 0.05
    for at in range(RUNNING + 1):
        bench.at(start + 10 + at)
    assert bench.told == ["probe_slowed"] * 2


def test_one_interruption_makes_nothing_dear() -> None:
    bench = Bench()
    for at in range(60):
        bench.cost = 1.0 if at % RUNNING == 0 else 0.0
        bench.at(float(at))
    assert len(bench.reads) == 60
    assert bench.told == []


def test_a_seldom_part_repeats_its_gauge_and_slows_with_its_cost() -> None:
    bench = Bench(columns=("process_memory_pss_bytes",), every=30.0)
    assert [bench.at(float(at)) for at in range(30)] == [(1.0,)] * 30
    bench.cost = 1.0
    assert bench.at(30.0) == (2.0,)
    assert bench.at(30.0 + 1.0 / SHARE - 0.1) == (2.0,)
    bench.cost = 1e9
    assert bench.at(30.0 + 1.0 / SHARE) == (3.0,)
    assert bench.at(30.0 + 1.0 / SHARE + LONGEST_SECONDS) == (4.0,)
    assert bench.told == []


def test_a_failure_is_told_once_and_tried_later_and_later() -> None:
    bench = Bench()
    assert bench.at(0.0)[0] == 1.0
    bench.error = OSError(5, "Input/output error")
    for at in range(1, 601):
        assert all(math.isnan(value) for value in bench.at(float(at)))
    assert bench.told == ["probe_failed"]
    tries = [at for at in bench.reads if at > 0]
    pauses = [later - earlier for earlier, later in itertools.pairwise(tries)]
    assert pauses[:6] == [1.0, 2.0, 4.0, 8.0, 16.0, 32.0]
    assert set(pauses[6:]) == {LONGEST_BACKOFF_SECONDS}
    bench.error = None
    assert bench.at(700.0)[0] > 1
    assert bench.at(701.0)[0] > 1
    assert bench.told == ["probe_failed", "probe_recovered"]


@given(
    st.lists(st.tuples(st.floats(0.01, 20.0), st.floats(0.0, 2.0), st.booleans()), max_size=200),
    st.sampled_from([0.0, 30.0]),
)
def test_events_alternate_and_a_sample_never_waits_on_the_past(
    steps: list[tuple[float, float, bool]], every: float
) -> None:
    bench, now = Bench(every=every), 0.0
    for pause, cost, fails in steps:
        now += pause
        bench.cost, bench.error = cost, OSError("no") if fails else None
        row = bench.at(now)
        assert len(row) == 2
        if bench.reads[-1:] == [now] and not fails:
            assert row == (len(bench.reads),) * 2
        assert bench.part.due <= now + LONGEST_SECONDS
    broken = [kind for kind in bench.told if kind != "probe_slowed"]
    assert broken == ["probe_failed", "probe_recovered"] * (len(broken) // 2) + ["probe_failed"] * (len(broken) % 2)


# Several paths.


def test_paths_are_split_by_the_systems_separator(tmp_path: Path) -> None:
    assert split_paths("/data") == ("/data",)
    assert split_paths(os.pathsep.join(["/data", "", "/scratch", "/data"])) == ("/data", "/scratch")
    assert split_paths("") == split_paths(os.pathsep) == (".",)
    odd = tmp_path / f"a{os.pathsep}b"
    if os.pathsep == ":":
        odd.mkdir()
        assert split_paths(str(odd)) == (str(odd),)
        assert split_paths(f"/data:{odd}:/scratch") == ("/data", str(odd), "/scratch")


def test_paths_are_the_same_at_every_door(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / "home"
    (home / "data").mkdir(parents=True)
    odd = tmp_path / f"a{os.pathsep}b"
    odd.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(home)
    for text, paths in (
        ("~", [str(home)]),
        (os.pathsep.join(["~/data", "data", ".", str(tmp_path)]), [str(home / "data"), str(home), str(tmp_path)]),
        (os.pathsep.join([f"../a{os.pathsep}b", "~/later"]), [str(odd), str(home / "later")]),
    ):
        assert [disk.path for disk in Disks(text, False).records()] == paths
        # In the recorder's directory it is the same still.
        joined = absolute_paths(text)
        with monkeypatch.context() as elsewhere:
            elsewhere.chdir("/")
            assert [disk.path for disk in Disks(joined, False).records()] == paths
        monitor = ResourceMonitor(Settings(disk_path=text))
        assert [disk.path for disk in monitor._probe._now().disks()] == paths
    monitor = ResourceMonitor(Settings(disk_path="~/data"))
    assert monitor.sample_now().filesystem_size_bytes > 0
    monkeypatch.chdir("/")
    assert monitor.sample_now().filesystem_size_bytes > 0
    found = list(_reading(Settings(disk_path=os.pathsep.join([str(odd), "~/data"]))))
    assert [check.state for check in found if "disk space" in check.found] == []
    lost = [check.found for check in _reading(Settings(disk_path=os.pathsep.join(["~/data", "/no/such"])))]
    assert any("disk space of /no/such" in text for text in lost)


def test_without_a_working_directory_the_rest_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    assert absolute_paths(".") == "."
    probe = Probe(os.getpid(), os.pathsep.join([".", str(tmp_path)]))
    assert read(probe, 0.0)[0] > 0
    probe.close()


@pytest.fixture
def spaces(monkeypatch: pytest.MonkeyPatch) -> dict[str, tuple[float, float, float] | None]:
    found: dict[str, tuple[float, float, float] | None] = {
        "/a": (100.0, 90.0, 0.1),
        "/b": (10.0, 1.0, 0.9),
        "/c": (50.0, 25.0, 0.5),
    }

    def space(path: str, portable: bool) -> tuple[float, float, float]:
        values = found[path]
        if values is None:
            raise FileNotFoundError(2, "No such file or directory", path)
        return values

    monkeypatch.setattr(_disk, "space", space)
    return found


def read(probe: Probe, at: float) -> tuple[float, float, float]:
    sample = probe.read(time_seconds=at, monotonic_seconds=at, interval_seconds=1.0, gap=False)
    return sample.filesystem_size_bytes, sample.filesystem_avail_bytes, sample.filesystem_utilization_ratio


@pytest.mark.parametrize("portable", [False, True], ids=["files", "psutil"])
def test_the_columns_are_those_of_the_fullest_and_a_lost_path_hides_no_other(
    spaces: dict[str, tuple[float, float, float] | None], portable: bool
) -> None:
    # On a loaded machine a look at every process can be dear, which would be told.
    probe = Probe(os.getpid(), os.pathsep.join(spaces), portable=portable, timer=lambda: 0.0)
    assert [disk.path for disk in probe.disks()] == ["/a", "/b", "/c"]
    assert all(math.isnan(disk.size_bytes) for disk in probe.disks())
    assert read(probe, 0.0) == (10.0, 1.0, 0.9)
    assert [disk.utilization_ratio for disk in probe.disks()] == [0.1, 0.9, 0.5]
    lost, spaces["/b"] = spaces["/b"], None
    for at in range(1, 20):
        assert read(probe, float(at)) == (50.0, 25.0, 0.5)
    assert math.isnan(probe.disks()[1].size_bytes)
    (event,) = probe.take_events()
    assert (event.kind, "/b" in event.message, event.time_seconds) == ("probe_failed", True, 1.0)
    spaces["/b"] = lost
    assert [read(probe, float(at)) for at in range(20, 90)][-1] == (10.0, 1.0, 0.9)
    assert [event.kind for event in probe.take_events()] == ["probe_recovered"]
    probe.disk_path = "/a"
    assert read(probe, 90.0) == (100.0, 90.0, 0.1)
    assert [disk.path for disk in probe.disks()] == ["/a"]
    probe.close()


def test_no_path_that_can_be_read_is_unknown(spaces: dict[str, tuple[float, float, float] | None]) -> None:
    for path in spaces:
        spaces[path] = None
    disks, told = Disks(os.pathsep.join(spaces), False), []
    values = disks.values(0.0, lambda kind, message: told.append(message), lambda: 0.0)
    assert all(math.isnan(value) for value in values)
    assert len(told) == 3


def test_a_probe_whose_disk_hangs_asks_it_seldom(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, clock = [], [0.0]

    def space(path: str, portable: bool) -> tuple[float, float, float]:
        asked.append(path)
        clock[0] += 2.0
        return 1.0, 1.0, 0.0

    monkeypatch.setattr(_disk, "space", space)
    timer: Callable[[], float] = lambda: clock[0]  # noqa: E731
    probe = Probe(os.getpid(), "/slow", timer=timer)
    for at in range(600):
        assert read(probe, float(at))[0] == 1.0
    # Once unseen as a whole, then three times running, then every 2.0 / SHARE seconds.
    assert len(asked) <= 1 + RUNNING + 600 * SHARE / 2.0 + 1
    assert [event.kind for event in probe.take_events()] == ["probe_slowed"]
    probe.close()


def test_a_file_system_that_hangs_costs_its_columns_one_event_and_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    answers, asked = threading.Event(), []
    answers.set()

    def space(path: str, portable: bool) -> tuple[float, float, float]:
        asked.append(path)
        assert answers.wait(60)
        return 1.0, 1.0, 0.0

    def threads() -> list[threading.Thread]:
        return [thread for thread in threading.enumerate() if thread.name == "wiseflow-disk"]

    monkeypatch.setattr(_disk, "space", space)
    probe = Probe(os.getpid(), "/far", patience=0.05, timer=lambda: 0.0)
    assert [read(probe, float(at)) for at in range(3)] == [(1.0, 1.0, 0.0)] * 3
    answers.clear()
    before = len(asked)
    for at in range(3, 300):
        sample = probe.read(time_seconds=at, monotonic_seconds=at, interval_seconds=1.0, gap=False)
        assert math.isnan(sample.filesystem_size_bytes)
        assert sample.process_memory_rss_bytes > 0
    assert len(asked) == before + 1
    assert len(threads()) == 1
    (event,) = probe.take_events()
    assert (event.kind, event.message) == (
        "probe_failed",
        "disk space of /far cannot be read: no answer for 0.05 s: it hangs",
    )
    answers.set()
    at = 300.0
    while (found := read(probe, at)) != (1.0, 1.0, 0.0):
        assert math.isnan(found[0])
        at += 60.0
    assert [event.kind for event in probe.take_events()] == ["probe_recovered"]
    (thread,) = threads()
    probe.close()
    thread.join(60)
    assert threads() == []
    # What is closed can be read again.
    assert read(probe, at + 1.0) == (1.0, 1.0, 0.0)
    probe.close()


def test_what_the_call_raises_is_raised_and_its_time_is_counted(tmp_path: Path) -> None:
    asked = Patience("asked", lambda: os.stat(tmp_path / "nothing"), 60.0)
    with pytest.raises(FileNotFoundError):
        asked.ask()
    with pytest.raises(FileNotFoundError):
        asked.ask()
    spent = Patience("spent", lambda: sum(range(300_000)), 60.0)
    spent.ask()
    assert spent.cpu_seconds > 0
    asked.close()
    spent.close()
