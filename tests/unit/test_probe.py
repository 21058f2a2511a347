"""The probe on this machine, and over trees of files that say what a machine would."""

from __future__ import annotations

import errno
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from wiseflow_nb.records import SAMPLE_COLUMNS, Sample
from wiseflow_nb.resources import _files, _linux
from wiseflow_nb.resources._alerts import AlertEngine
from wiseflow_nb.resources._probe import LIMITS_SECONDS, Probe
from wiseflow_nb.resources._rules import AlertRule

linux = pytest.mark.skipif(sys.platform != "linux", reason="compares Linux' own files with psutil")
PID = 4_000_001
MIB = 1024 * 1024


def read(probe: Probe, at: float = 0.0) -> Sample:
    return probe.read(time_seconds=at, monotonic_seconds=at, interval_seconds=1.0, gap=False)


@linux
def test_the_fast_path_and_the_portable_path_agree() -> None:
    fast, portable = Probe(os.getpid()), Probe(os.getpid(), portable=True)
    one, other = read(fast), read(portable)
    for name in ("memory_limit_bytes", "cpu_limit_cores", "system_memory_total_bytes", "filesystem_size_bytes"):
        assert getattr(one, name) == getattr(other, name)
    for name in ("process_count", "process_threads"):
        assert getattr(one, name) == getattr(other, name)
    for name in ("process_memory_rss_bytes", "system_memory_available_bytes", "disk_read_bytes_total"):
        assert getattr(one, name) == pytest.approx(getattr(other, name), rel=0.1, abs=1e6)
    fast.close()


def test_children_are_counted_and_their_time_stays_after_they_end() -> None:
    probe = Probe(os.getpid())
    code = "import sys, time\nt = time.process_time()\nwhile time.process_time() - t < 0.3: pass\nprint(1, flush=True)\nsys.stdin.read()"
    child = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert child.stdout.readline()
    with_child = read(probe)
    excluded = Probe(os.getpid(), exclude_pids=frozenset({child.pid}))
    assert with_child.process_count == read(excluded).process_count + 1
    child.communicate()
    after = read(probe)
    assert after.process_count == with_child.process_count - 1
    assert after.process_cpu_seconds_total >= with_child.process_cpu_seconds_total
    probe.close()
    excluded.close()


def test_the_first_reading_has_no_rate_and_a_lost_process_leaves_the_rest() -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    probe = Probe(child.pid)
    first = read(probe)
    assert first.cpu_utilization_ratio != first.cpu_utilization_ratio
    assert first.process_memory_rss_bytes > 0
    child.communicate(b"\n")
    later = [read(probe, at) for at in (1.0, 2.0)]
    assert later[0].process_count != later[0].process_count
    assert later[0].system_memory_total_bytes == first.system_memory_total_bytes
    events = probe.take_events()
    assert [event.kind for event in events].count("probe_failed") == len(events) > 0
    assert probe.take_events() == []
    probe.close()


@linux
def test_every_column_of_a_linux_machine_is_filled_but_those_of_an_unlimited_group() -> None:
    probe = Probe(os.getpid())
    read(probe)
    sample = read(probe, 1.0)
    missing = {name for name in SAMPLE_COLUMNS if math.isnan(getattr(sample, name))}
    assert {name for name in missing if not name.startswith(("container_", "pressure_", "system_cpu_"))} <= {
        "cpu_utilization_ratio",
        "disk_read_bytes_total",
        "disk_written_bytes_total",
        # In the watched process itself the sampler's memory is part of the process'.
        "recorder_memory_rss_bytes",
    }
    probe.close()


def test_the_portable_path_fills_what_every_system_has() -> None:
    probe = Probe(os.getpid(), portable=True)
    sample = read(probe)
    for name in (
        "memory_utilization_ratio",
        "process_memory_rss_bytes",
        "filesystem_utilization_ratio",
        "system_load1",
    ):
        assert getattr(sample, name) >= 0
    assert probe.take_events() == []
    assert probe.top_processes(1)[0][0] == os.getpid()
    probe.close()


# A machine made of files.


def stat_line(
    pid: int, ticks: int = 0, threads: int = 1, pages: int = 100, start: int = 7, state: str = "S", flags: int = 0
) -> str:
    return f"{pid} (a (b) c) {state} 1 1 1 0 -1 {flags} 0 0 0 0 {ticks} 0 0 0 20 0 {threads} 0 {start} 1 {pages} 0 0\n"


def put(root: Path, **files: str) -> None:
    for path, text in files.items():
        target = root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)


def machine(root: Path, pid: int = PID, **more: str) -> str:
    """A host of 16 GiB and four CPUs on which ``pid`` is in the v2 group /pod/app."""
    cpus = "".join(f"cpu{number} 1 1 1 1 1 1 1 1 0 0\n" for number in range(4))
    put(
        root,
        **{
            "proc/self/statm": "10 5 1 1 0 1 0\n",
            "proc/self/net/dev": "a\nb\n",
            "sys/block/vda/stat": "1 0 8 0 1 0 16 0 0 0 0\n",
            "proc/meminfo": f"MemTotal: {16 * MIB} kB\nMemAvailable: {8 * MIB} kB\nSwapTotal: 0 kB\nSwapFree: 0 kB\n",
            "proc/stat": f"cpu 100 0 100 800 0 0 0 0 0 0\n{cpus}",
            "proc/loadavg": "0.5 0 0 1/1 1\n",
            "proc/diskstats": "254 0 vda 1 0 8 0 1 0 16 0 0 0 0\n254 1 vda1 1 0 8 0 1 0 16 0 0 0 0\n",
            "sys/block/vda/size": "1\n",
            f"proc/{pid}/net/dev": "a\nb\n lo: 9 0 0 0 0 0 0 0 9 0 0 0 0 0 0 0\neth0:5 0 0 0 0 0 0 0 6 0 0 0 0 0 0 0\n",
            f"proc/{pid}/stat": stat_line(pid),
            f"proc/{pid}/task/{pid}/children": "",
            f"proc/{pid}/fd/0": "",
            f"proc/{pid}/cgroup": "0::/pod/app\n",
            f"proc/{pid}/mountinfo": "30 23 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n",
            "sys/fs/cgroup/pod/memory.max": f"{1000 * MIB}\n",
            "sys/fs/cgroup/pod/memory.current": f"{600 * MIB}\n",
            "sys/fs/cgroup/pod/memory.stat": f"anon 1\ninactive_file {100 * MIB}\nactive_file 5\n",
            "sys/fs/cgroup/pod/memory.events": "oom 3\noom_kill 2\noom_group_kill 0\n",
            "sys/fs/cgroup/pod/cpu.max": "max 100000\n",
            "sys/fs/cgroup/pod/cpu.stat": "usage_usec 90000000\nthrottled_usec 0\n",
            "sys/fs/cgroup/pod/app/memory.max": "max\n",
            "sys/fs/cgroup/pod/app/memory.current": f"{50 * MIB}\n",
            "sys/fs/cgroup/pod/app/cpu.max": "150000 100000\n",
            "sys/fs/cgroup/pod/app/cpu.stat": "usage_usec 1000000\nthrottled_usec 500000\n",
            **more,
        },
    )
    return str(root)


def probe_of(root: str, **options: object) -> Probe:
    return Probe(PID, disk_path=root, root=root, environ={}, **options)


@linux
def test_usage_is_read_at_the_level_whose_limit_won(tmp_path: Path) -> None:
    probe = probe_of(machine(tmp_path))
    first = read(probe)
    assert first.memory_limit_bytes == 1000 * MIB
    assert first.memory_working_set_bytes == 500 * MIB
    assert first.memory_utilization_ratio == 0.5
    assert first.container_memory_oom_kills_total == 2
    assert (first.cpu_limit_cores, first.container_cpu_seconds_total) == (1.5, 1.0)
    assert first.container_cpu_throttled_seconds_total == 0.5
    assert math.isnan(first.cpu_utilization_ratio)
    put(tmp_path, **{"sys/fs/cgroup/pod/app/cpu.stat": "usage_usec 1750000\nthrottled_usec 500000\n"})
    put(tmp_path, **{"proc/stat": "cpu 150 0 100 850 0 0 0 0 0 0\n"})
    second = read(probe, 1.0)
    assert second.cpu_utilization_ratio == pytest.approx(0.5)
    assert second.system_cpu_utilization_ratio == pytest.approx(0.5)
    assert (second.disk_read_bytes_total, second.disk_written_bytes_total) == (8 * 512, 16 * 512)
    assert (second.network_receive_bytes_total, second.network_transmit_bytes_total) == (5, 6)
    assert probe.take_events() == []
    probe.close()


@linux
def test_what_is_available_is_never_more_than_the_machine_has(tmp_path: Path) -> None:
    meminfo = f"MemTotal: {16 * MIB} kB\nMemAvailable: {200 * 1024} kB\nSwapTotal: 0 kB\nSwapFree: 0 kB\n"
    probe = probe_of(machine(tmp_path, **{"proc/meminfo": meminfo}))
    assert read(probe).memory_available_bytes == 200 * MIB
    probe.close()


@linux
@pytest.mark.parametrize("version", [1, 2])
def test_what_is_available_is_the_least_that_is_left_at_any_level_with_a_limit(tmp_path: Path, version: int) -> None:
    limit, usage, inactive = (
        ("memory.max", "memory.current", "inactive_file")
        if version == 2
        else ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    )
    none = "max" if version == 2 else str(2**63 - 4096)
    # Sister groups hold most of what the pod may have; the tightest limit is the process' own.
    levels = {"": (none, 9000, 0), "pod/": ("1000", 900, 40), "pod/app/": ("400", 60, 10), "pod/app/in/": (none, 50, 0)}
    files = {}
    for level, (allowed, used, spare) in levels.items():
        top = f"sys/fs/cgroup/{level}"
        files[top + limit] = f"{int(allowed) * MIB if len(allowed) < 5 and allowed != none else allowed}\n"
        files[top + usage] = f"{used * MIB}\n"
        files[top + "memory.stat"] = f"{inactive} {spare * MIB}\n"
    controller = "0:" if version == 2 else "3:memory"
    kind = "cgroup2 cgroup2 rw" if version == 2 else "cgroup cgroup rw,memory"
    files |= {
        f"proc/{PID}/cgroup": f"{controller}:/pod/app/in\n",
        f"proc/{PID}/mountinfo": f"30 23 0:26 / /sys/fs/cgroup rw - {kind}\n",
    }
    probe = probe_of(machine(tmp_path, **files))
    for at in range(3):  # one by one, then all together
        sample = read(probe, at)
        assert probe.limits.memory_source == f"cgroup{version}:/pod/app"
        assert (sample.memory_limit_bytes, sample.memory_working_set_bytes) == (400 * MIB, 50 * MIB)
        assert sample.memory_utilization_ratio == 0.125
        assert sample.memory_available_bytes == 140 * MIB
    put(tmp_path, **{f"sys/fs/cgroup/pod/{usage}": f"{1100 * MIB}\n"})
    assert read(probe, 3).memory_available_bytes == 0
    # Of levels without a limit of their own nothing is read.
    assert not any("/in/" in source.path for source in probe._container.memory_files)
    # Gone while we look on: what is left is that of the others.
    put(tmp_path, **{f"sys/fs/cgroup/pod/{limit}": f"{none}\n"})
    assert read(probe, LIMITS_SECONDS).memory_available_bytes == 350 * MIB
    assert probe.take_events() == []
    probe.close()


@linux
def test_no_rate_across_a_gap(tmp_path: Path) -> None:
    probe = probe_of(machine(tmp_path))
    read(probe)
    put(
        tmp_path,
        **{"sys/fs/cgroup/pod/app/cpu.stat": "usage_usec 9000000\n", "proc/stat": "cpu 900 0 100 850 0 0 0 0 0 0\n"},
    )
    late = probe.read(time_seconds=99.0, monotonic_seconds=99.0, interval_seconds=99.0, gap=True)
    assert late.gap == 1.0
    assert math.isnan(late.cpu_utilization_ratio)
    assert math.isnan(late.system_cpu_utilization_ratio)
    probe.close()


def cpu(used_seconds: float, busy_ticks: int) -> dict[str, str]:
    """What the files say after so much: of the group, and of the host (of 1,000 ticks at the start)."""
    return {
        "sys/fs/cgroup/pod/app/cpu.stat": f"usage_usec {round(used_seconds * 1e6)}\nthrottled_usec 0\n",
        "proc/stat": f"cpu {busy_ticks} 0 100 {1000 - busy_ticks // 2} 0 0 0 0 0 0\n",
    }


@linux
def test_readings_in_between_take_nothing_from_the_rates_of_those_on_schedule(tmp_path: Path) -> None:
    root = machine(tmp_path, **cpu(1.0, 100))
    alone, polled = probe_of(root), probe_of(root)
    between = []
    for second in range(4):
        one, other = read(alone, second), read(polled, second)
        for name in ("cpu_utilization_ratio", "system_cpu_utilization_ratio"):
            assert getattr(one, name) == pytest.approx(getattr(other, name), nan_ok=True)
            assert second == 0 or getattr(other, name) > 0
        for tenth in range(1, 10):
            put(tmp_path, **cpu(1.0 + second + tenth / 10, 100 + second * 100 + tenth * 10))
            moment = second + tenth / 10
            between.append(polled.read_now(time_seconds=moment, monotonic_seconds=moment).cpu_utilization_ratio)
        put(tmp_path, **cpu(2.0 + second, 200 + second * 100))
    # One core of one and a half.
    assert between == pytest.approx([1 / 1.5] * 36)
    alone.close()
    polled.close()


@linux
def test_a_limit_that_moves_while_somebody_reads_in_between_makes_no_rate_of_two_counters(tmp_path: Path) -> None:
    probe = probe_of(machine(tmp_path))
    read(probe, 0.0)
    put(tmp_path, **{"sys/fs/cgroup/pod/cpu.max": "50000 100000\n"})
    moved = probe.read_now(time_seconds=0.0, monotonic_seconds=LIMITS_SECONDS)
    assert moved.container_cpu_seconds_total == 90.0
    assert math.isnan(moved.cpu_utilization_ratio)
    assert math.isnan(read(probe, LIMITS_SECONDS + 1.0).cpu_utilization_ratio)
    assert read(probe, LIMITS_SECONDS + 2.0).cpu_utilization_ratio == 0.0
    probe.close()


@linux
@pytest.mark.parametrize(
    ("environ", "cores", "least"), [({"CPU_LIMIT": "2"}, 2.0, 0.01), ({}, 1.5, 0.0)], ids=["of the tree", "of a group"]
)
def test_over_no_time_there_is_no_rate_and_the_next_goes_from_the_reading_before(
    tmp_path: Path, environ: dict[str, str], cores: float, least: float
) -> None:
    def at(moment: float) -> dict[str, str]:
        # One core, all the time; of a process in whole ticks.
        return {**cpu(1.0 + moment, 100), f"proc/{PID}/stat": stat_line(PID, int(moment * 100))}

    root = machine(tmp_path, **at(0.0))
    if environ:
        put(tmp_path, **{"sys/fs/cgroup/pod/cpu.max": "max 100000\n", "sys/fs/cgroup/pod/app/cpu.max": "max 100000\n"})
    probe = Probe(PID, disk_path=root, root=root, environ=environ)
    told = []
    for moment in (1.0, 1.0, 1.0 + least / 2, 1.5, 1.5, 2.0):
        put(tmp_path, **at(moment))
        told.append(probe.read_now(time_seconds=moment, monotonic_seconds=moment).cpu_utilization_ratio)
    one = 1.0 / cores
    assert told == pytest.approx([math.nan, math.nan, math.nan, one, math.nan, one], nan_ok=True)
    probe.close()


@linux
def test_a_dear_counter_is_read_seldom_and_its_ratio_and_its_alerts_go_on(tmp_path: Path) -> None:
    spent = [0.0]
    probe = probe_of(machine(tmp_path), timer=lambda: spent[0])
    counted = probe._group_cpu._read

    def dear() -> tuple[float, ...]:
        spent[0] += 0.015
        return tuple(counted())

    probe._group_cpu._read = dear
    engine = AlertEngine(
        [
            AlertRule("cpu high", "cpu", "cpu_utilization_ratio", 0.5, 0.9, for_seconds=5),
            AlertRule("cpu rate", "cpu", "container_cpu_seconds_per_second", 0.8, 2.0, for_seconds=5),
        ]
    )
    samples, told = [], []
    for at in range(30):
        put(tmp_path, **{"sys/fs/cgroup/pod/app/cpu.stat": f"usage_usec {at * 1_200_000}\nthrottled_usec 0\n"})
        samples.append(read(probe, float(at)))
        told += engine.observe(samples[-1], expected_interval=1.0)
    missing = [sample for sample in samples[5:] if math.isnan(sample.container_cpu_seconds_total)]
    assert len(missing) >= 10
    # 1.2 of 1.5 cores, at every sample: measured over the true time, repeated in between.
    assert [sample.cpu_utilization_ratio for sample in samples[5:]] == pytest.approx([0.8] * 25)
    assert [(item.rule, item.kind) for item in told] == [("cpu high", "fired"), ("cpu rate", "fired")]
    # What fails is unknown at once.
    probe._group_cpu._read = lambda: [].pop()
    later = [read(probe, at) for at in (30.0, 31.0, 32.0)]
    assert math.isnan(later[-1].cpu_utilization_ratio)
    probe.close()


@linux
def test_a_limit_that_moves_to_another_level_makes_no_rate_of_two_counters(tmp_path: Path) -> None:
    probe = probe_of(machine(tmp_path))
    read(probe, 0.0)
    read(probe, LIMITS_SECONDS - 1.0)
    put(tmp_path, **{"sys/fs/cgroup/pod/cpu.max": "50000 100000\n"})
    moved = read(probe, LIMITS_SECONDS)
    assert (moved.cpu_limit_cores, moved.container_cpu_seconds_total) == (0.5, 90.0)
    assert math.isnan(moved.cpu_utilization_ratio)
    assert probe.limits.cpu_source == "cgroup2:/pod"
    assert read(probe, LIMITS_SECONDS + 1.0).cpu_utilization_ratio == 0.0
    probe.close()


@linux
def test_without_a_limit_the_host_is_compared_and_the_own_group_shown(tmp_path: Path) -> None:
    none = {"sys/fs/cgroup/pod/memory.max": "max\n", "sys/fs/cgroup/pod/app/cpu.max": "max 100000\n"}
    app = {
        "sys/fs/cgroup/pod/app/memory.stat": "inactive_file 0\n",
        "sys/fs/cgroup/pod/app/memory.events": "oom_kill 0\n",
    }
    probe = probe_of(machine(tmp_path, **none, **app))
    sample = read(probe)
    assert probe.limits.limit_source == "memory: host, cpu: host"
    assert sample.memory_utilization_ratio == 0.5
    assert sample.memory_working_set_bytes == 8 * 1024 * MIB
    assert sample.container_memory_usage_bytes == 50 * MIB
    assert sample.container_cpu_seconds_total == 1.0
    probe.close()


@linux
def test_unknown_devices_are_not_zero_bytes(tmp_path: Path) -> None:
    root = machine(tmp_path)
    (tmp_path / "sys/block/vda/size").unlink()
    (tmp_path / "sys/block/vda/stat").unlink()
    (tmp_path / "sys/block/vda").rmdir()
    probe = probe_of(root)
    assert math.isnan(read(probe).disk_read_bytes_total)
    probe.close()


@linux
def test_another_process_with_the_same_number_is_not_ours(tmp_path: Path) -> None:
    probe = probe_of(machine(tmp_path))
    assert read(probe).process_count == 1
    put(tmp_path, **{f"proc/{PID}/stat": stat_line(PID, start=8)})
    samples = [read(probe, float(at)) for at in range(1, 6)]
    assert all(math.isnan(sample.process_memory_rss_bytes) for sample in samples)
    assert all(sample.memory_limit_bytes == 1000 * MIB for sample in samples)
    (event,) = probe.take_events()
    assert event.message == f"processes cannot be read: process {PID} has ended"
    probe.close()


@linux
def test_the_tree_is_summed_and_what_is_excluded_goes_with_all_it_started(tmp_path: Path) -> None:
    tree = {
        f"proc/{PID}/task/{PID}/children": "11 12 ",
        "proc/11/task/11/children": "13 ",
        "proc/12/task/12/children": "",
    }
    tree["proc/13/task/13/children"] = ""
    tree |= {f"proc/{pid}/stat": stat_line(pid, ticks=_linux.CLOCK_TICKS, threads=2) for pid in (PID, 11, 12, 13)}
    tree["proc/11/smaps_rollup"] = "rollup\nRss: 8 kB\nPss:                   4 kB\n"
    root = machine(tmp_path, **tree)
    whole, part = probe_of(root), probe_of(root, exclude_pids=frozenset({11}))
    one, other = read(whole), read(part)
    assert (one.process_count, one.process_threads, one.process_cpu_seconds_total) == (4, 8, 4.0)
    assert one.process_memory_rss_bytes == 400 * _linux.PAGE_BYTES
    assert one.process_memory_pss_bytes == 4096
    assert (other.process_count, other.process_cpu_seconds_total) == (2, 2.0)
    whole.close()
    part.close()


@linux
def test_a_process_that_leaves_the_tree_with_its_time_makes_no_rate(tmp_path: Path) -> None:
    def files(second: int, children: str) -> dict[str, str]:
        return {
            f"proc/{PID}/task/{PID}/children": children,
            "proc/11/task/11/children": "",
            "proc/11/stat": stat_line(11, ticks=3 * _linux.CLOCK_TICKS),
            f"proc/{PID}/stat": stat_line(PID, ticks=second * _linux.CLOCK_TICKS),
            "proc/loadavg": f"0.5 0 0 1/1 {second}\n",
        }

    root = machine(tmp_path, **files(0, "11 "), **{"sys/fs/cgroup/pod/app/cpu.max": "max 100000\n"})
    probe = Probe(PID, disk_path=root, root=root, environ={"CPU_LIMIT": "2"})
    found = []
    for second, children in enumerate(("11 ", "11 ", "", "")):
        put(tmp_path, **files(second, children))
        found.append(read(probe, second).cpu_utilization_ratio)
    assert probe.limits.cpu_source == "environment:CPU_LIMIT"
    assert found == pytest.approx([math.nan, 0.5, math.nan, 0.5], nan_ok=True)
    probe.close()


@linux
def test_where_children_are_not_listed_psutil_finds_them(tmp_path: Path) -> None:
    root = machine(tmp_path, pid=os.getpid())
    (tmp_path / f"proc/{os.getpid()}/task/{os.getpid()}/children").unlink()
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    put(tmp_path, **{f"proc/{child.pid}/stat": stat_line(child.pid)})
    whole = Probe(os.getpid(), disk_path=root, root=root, environ={})
    part = Probe(os.getpid(), disk_path=root, root=root, environ={}, exclude_pids=frozenset({child.pid}))
    assert read(whole).process_count == read(part).process_count + 1
    assert whole.take_events() == []
    child.communicate(b"\n")
    whole.close()
    part.close()


@linux
def test_descriptors_that_may_not_be_listed_cost_only_their_column(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    probe, listdir = probe_of(machine(tmp_path)), os.listdir
    assert read(probe).process_open_fds == 1

    def refused(path: str) -> list[str]:
        if path.endswith("/fd"):
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return listdir(path)

    monkeypatch.setattr(os, "listdir", refused)
    sample = read(probe, 1.0)
    assert math.isnan(sample.process_open_fds)
    assert sample.process_count == 1
    assert [event.message.split(" cannot")[0] for event in probe.take_events()] == ["descriptors"]
    probe.close()


@linux
def test_a_failing_part_is_told_once_tried_later_and_told_when_it_works(tmp_path: Path) -> None:
    path = tmp_path / "data"
    path.mkdir()
    probe = Probe(PID, disk_path=str(path), root=machine(tmp_path), environ={})
    assert read(probe).filesystem_size_bytes > 0
    path.rmdir()
    for at in range(1, 20):
        sample = read(probe, float(at))
        assert math.isnan(sample.filesystem_size_bytes)
        assert sample.memory_utilization_ratio == 0.5
    assert [event.kind for event in probe.take_events()] == ["probe_failed"]
    path.mkdir()
    told = []
    for at in range(20, 60):
        sample = read(probe, float(at))
        told += [event.kind for event in probe.take_events()]
    assert told == ["probe_recovered"]
    assert sample.filesystem_size_bytes > 0
    probe.close()


@linux
def test_pressure_that_is_switched_off_is_no_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = _files.KeptFiles.parsed

    def switched_off(self: _files.KeptFiles, path: str, *more: object) -> object:
        if "/pressure/" in path:
            raise OSError(errno.EOPNOTSUPP, "Operation not supported", path)
        return real(self, path, *more)

    monkeypatch.setattr(_files.KeptFiles, "parsed", switched_off)
    probe = probe_of(machine(tmp_path, **{"proc/pressure/cpu": ""}))
    assert math.isnan(read(probe).pressure_cpu_waiting_seconds_total)
    assert probe.take_events() == []
    probe.close()


def test_names_that_begin_alike_are_told_apart() -> None:
    data = b"oom_kill_disable 0\nunder_oom 0\noom_kill 3"
    assert _linux.value_of(data, _linux.key("oom_kill")) == 3.0
    assert _linux.value_of(data, _linux.key("oom_kill_disable")) == 0.0
    assert math.isnan(_linux.value_of(data, _linux.key("absent")))
    assert math.isnan(_linux.value_of(b"", _linux.key("x")))
    assert _linux.proportional_bytes(b"rollup\nPss_Anon:  9 kB\nPss:  4 kB\n") == 4096
    assert _linux.proportional_bytes(b"") == 0.0


@linux
def test_a_long_listing_is_read_to_its_end(tmp_path: Path) -> None:
    text = "".join(f"line {number}\n" for number in range(20_000)).encode()
    (tmp_path / "long").write_bytes(text)
    for files in (_files.KeptFiles(), _files.KeptFiles(limit=0)):
        assert files.listing(str(tmp_path / "long"), bytes) == text
        assert files.read(str(tmp_path / "long"), 6) == b"line 0"
        # A listing of the kernel's gives one page a read.
        whole = Path("/proc/self/maps").read_text()
        assert len(whole) > 4096
        assert len(files.listing("/proc/self/maps", bytes).splitlines()) >= len(whole.splitlines()) - 3
        files.close()


def test_pressure_is_found_where_the_kernel_says_it_and_elsewhere() -> None:
    usual = b"some avg10=0.00 avg60=12.50 avg300=100.00 total=2500000\n"
    for data in (usual, usual + b"full avg10=0.00 avg60=0.00 avg300=0.00 total=7\n", b"some total=2500000\nfull"):
        assert _linux.pressure_seconds(data) == 2.5
    for data in (b"", b"full avg10=0.00 avg60=0.00 avg300=0.00 total=7\n", b"some avg10=0.00\n", usual[:44]):
        with pytest.raises(ValueError, match=r"pressure|subsection"):
            _linux.pressure_seconds(data)


_FORK = """
import os
from wiseflow_nb.resources._files import KeptFiles
files = KeptFiles()
assert int(files.read("/proc/self/stat").split()[0]) == os.getpid()
child = os.fork()
if child == 0:
    files.after_fork()
    os._exit(0 if int(files.read("/proc/self/stat").split()[0]) == os.getpid() else 1)
assert os.waitpid(child, 0)[1] == 0
"""


@linux
def test_after_a_fork_the_files_are_those_of_the_child() -> None:
    subprocess.run([sys.executable, "-c", _FORK], check=True, timeout=60)


_LIGHT = """
import sys
import wiseflow_nb.resources
from wiseflow_nb.resources import _alerts, _limits, _probe, _ring, _schedule
heavy = {"numpy", "pandas", "pydantic", "plotly", "ipywidgets"} & set(sys.modules)
assert not heavy, heavy
"""


def test_what_the_recorder_loads_is_light() -> None:
    subprocess.run([sys.executable, "-c", _LIGHT], check=True, timeout=60)
