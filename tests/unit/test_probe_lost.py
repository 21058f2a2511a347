"""Files that go away under the probe: NaN in their columns, one event, one more when they are back."""

from __future__ import annotations

import errno
import gc
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.unit.test_probe import MIB, PID, machine, probe_of, put, read, stat_line
from wiseflow_nb.records import SAMPLE_COLUMNS, Sample
from wiseflow_nb.resources import _files
from wiseflow_nb.resources._part import LONGEST_BACKOFF_SECONDS
from wiseflow_nb.resources._probe import LIMITS_SECONDS, Probe

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="compares Linux' own files with psutil")

#: The group's own pressure, as kernels since 4.20 keep it.
PRESSURE = "some avg10=0.00 avg60=0.00 avg300=0.00 total={}\nfull avg10=0.00 avg60=0.00 avg300=0.00 total=0\n"


def unknown(sample: Sample) -> set[str]:
    return {name for name in SAMPLE_COLUMNS if math.isnan(getattr(sample, name))}


def fails(path_part: str, code: int, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Let the kernel refuse to read some files; return what ends it."""
    names: dict[int, str] = {}
    real_open, real_read, on = os.open, _files.pread, [True]

    def opened(path: str, *more: object) -> int:
        fd = real_open(path, *more)  # type: ignore[arg-type]
        names[fd] = path
        return fd

    def refused(fd: int, size: int, offset: int) -> bytes:
        if on[0] and path_part in names.get(fd, ""):
            raise OSError(code, os.strerror(code))
        return real_read(fd, size, offset)

    monkeypatch.setattr(os, "open", opened)
    monkeypatch.setattr(_files, "pread", refused)
    return lambda: on.__setitem__(0, False)


@pytest.mark.parametrize("code", [errno.EIO, errno.EACCES, errno.EPERM, errno.ENODEV, errno.EMFILE])
@pytest.mark.parametrize(
    ("path_part", "columns"),
    [
        ("meminfo", {"system_memory_total_bytes", "system_memory_available_bytes", "system_swap_used_bytes"}),
        ("loadavg", {"system_load1"}),
        ("net/dev", {"network_receive_bytes_total", "network_transmit_bytes_total"}),
        ("vda/stat", {"disk_read_bytes_total", "disk_written_bytes_total"}),
        (
            "memory.current",
            {
                "container_memory_usage_bytes",
                "container_memory_oom_kills_total",
                "memory_working_set_bytes",
                "memory_available_bytes",
                "memory_utilization_ratio",
            },
        ),
        ("cpu.stat", {"container_cpu_seconds_total", "container_cpu_throttled_seconds_total"}),
        (
            f"{PID}/stat",
            {name for name in SAMPLE_COLUMNS if name.startswith("process_")},
        ),
    ],
)
def test_what_cannot_be_read_is_unknown_told_once_and_told_when_it_is_back(
    path_part: str, columns: set[str], code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = machine(tmp_path, **{f"proc/{PID}/smaps_rollup": "r\nPss: 4 kB\n"})
    healthy = probe_of(root)
    read(healthy)
    rates = {
        "cpu_utilization_ratio",
        "system_cpu_utilization_ratio",
        "system_cpu_iowait_ratio",
        "system_cpu_steal_ratio",
    }
    before = unknown(read(healthy)) - rates
    healthy.close()
    end = fails(path_part, code, monkeypatch)
    probe = probe_of(root)
    for at in range(100):
        assert (unknown(read(probe, float(at))) - rates) == before | columns
    (event,) = probe.take_events()
    assert event.kind == "probe_failed"
    assert os.strerror(code) in event.message
    end()
    for at in range(100, 100 + int(LONGEST_BACKOFF_SECONDS) + 1):
        sample = read(probe, float(at))
    assert unknown(sample) - rates == before
    assert [event.kind for event in probe.take_events()] == ["probe_recovered"]
    probe.close()


def test_a_file_that_is_removed_and_made_again(tmp_path: Path) -> None:
    probe = probe_of(machine(tmp_path))
    usage = tmp_path / "sys/fs/cgroup/pod/memory.stat"
    # As when a group is removed: what is kept open goes bad as well.
    assert read(probe).memory_working_set_bytes == 500 * MIB
    text = usage.read_text()
    usage.unlink()
    probe.close()
    for at in range(1, 10):
        sample = read(probe, float(at))
        assert math.isnan(sample.memory_working_set_bytes)
        assert sample.system_load1 == 0.5
        assert sample.container_cpu_seconds_total == 1.0
    usage.write_text(text)
    for at in range(10, 40):
        sample = read(probe, float(at))
    assert sample.memory_working_set_bytes == 500 * MIB
    assert [event.kind for event in probe.take_events()] == ["probe_failed", "probe_recovered"]
    probe.close()


def test_a_process_moved_to_another_group_is_followed(tmp_path: Path) -> None:
    probe = probe_of(machine(tmp_path))
    assert read(probe).memory_limit_bytes == 1000 * MIB
    put(
        tmp_path,
        **{
            f"proc/{PID}/cgroup": "0::/other\n",
            "sys/fs/cgroup/other/memory.max": f"{200 * MIB}\n",
            "sys/fs/cgroup/other/memory.current": f"{50 * MIB}\n",
            "sys/fs/cgroup/other/memory.stat": f"anon 1\ninactive_file {10 * MIB}\n",
            "sys/fs/cgroup/other/cpu.max": "100000 100000\n",
            "sys/fs/cgroup/other/cpu.stat": "usage_usec 7000000\n",
        },
    )
    # At the latest with the next look; at once where the old group is gone.
    sample = read(probe, LIMITS_SECONDS)
    assert (sample.memory_limit_bytes, sample.memory_working_set_bytes) == (200 * MIB, 40 * MIB)
    assert (sample.cpu_limit_cores, sample.container_cpu_seconds_total) == (1.0, 7.0)
    assert math.isnan(sample.cpu_utilization_ratio)
    assert probe.take_events() == []
    probe.close()


def test_a_process_that_ends_does_not_lead_its_last_reader_to_the_top_group(tmp_path: Path) -> None:
    """Version 1 tells of a process on its way out that it is in the top group: the counters there are others."""
    top, own = "sys/fs/cgroup/memory", "sys/fs/cgroup/memory/box"
    control = "oom_kill_disable 0\nunder_oom 0\noom_kill {}\n"
    root = machine(
        tmp_path,
        **{
            f"proc/{PID}/cgroup": "4:memory:/box\n",
            f"proc/{PID}/mountinfo": "30 23 0:26 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n",
            f"{own}/memory.limit_in_bytes": f"{300 * MIB}\n",
            f"{own}/memory.usage_in_bytes": f"{299 * MIB}\n",
            f"{own}/memory.stat": "total_inactive_file 0\n",
            f"{own}/memory.oom_control": control.format(0),
            f"{top}/memory.limit_in_bytes": "9223372036854771712\n",
            f"{top}/memory.usage_in_bytes": f"{900 * MIB}\n",
            f"{top}/memory.stat": "total_inactive_file 0\n",
        },
    )
    probe = probe_of(root)
    assert read(probe).container_memory_oom_kills_total == 0
    put(
        tmp_path,
        **{
            f"proc/{PID}/stat": stat_line(PID, state="R", flags=0x40010C),
            f"proc/{PID}/cgroup": "4:memory:/\n",
            f"{own}/memory.oom_control": control.format(1),
        },
    )
    assert read(probe, LIMITS_SECONDS + 1).container_memory_oom_kills_total == 1
    put(tmp_path, **{f"proc/{PID}/stat": stat_line(PID, state="Z", flags=0x40010C)})
    last = read(probe, LIMITS_SECONDS + 2)
    assert math.isnan(last.process_memory_rss_bytes)
    assert (last.container_memory_oom_kills_total, last.memory_limit_bytes) == (1, 300 * MIB)


def test_a_hidden_proc_is_no_end_of_the_process(tmp_path: Path) -> None:
    probe = probe_of(machine(tmp_path))
    assert read(probe).process_count == 1
    hidden = tmp_path / "hidden"
    (tmp_path / f"proc/{PID}").rename(hidden)
    probe._files.close()  # a mount over it takes what is opened from now on
    for at in range(1, 40):
        sample = read(probe, float(at))
        assert math.isnan(sample.process_count)
        assert math.isnan(sample.process_open_fds)
        # What bound it binds on, as far as anybody knows.
        assert sample.memory_limit_bytes == 1000 * MIB
        assert sample.memory_utilization_ratio == 0.5
    hidden.rename(tmp_path / f"proc/{PID}")
    for at in range(40, 120):
        sample = read(probe, float(at))
    assert sample.process_count == 1
    assert [event.kind for event in probe.take_events()] == ["probe_failed", "probe_recovered"]
    probe.close()


def test_behind_a_hidden_proc_another_process_is_not_taken_for_ours(tmp_path: Path) -> None:
    probe = probe_of(machine(tmp_path))
    read(probe)
    stat = tmp_path / f"proc/{PID}/stat"
    stat.unlink()
    probe._files.close()
    read(probe, 1.0)
    stat.write_text(stat_line(PID, start=99))
    assert math.isnan(read(probe, 5.0).process_count)
    assert next(event.message for event in probe.take_events()).startswith("processes cannot be read")
    assert probe.top_processes() == ()
    probe.close()


def test_an_unplugged_disk_is_no_failure(tmp_path: Path) -> None:
    more = {"sys/block/sdb/stat": "1 0 100 0 1 0 200 0 0 0 0\n"}
    probe = probe_of(machine(tmp_path, **more))
    assert read(probe).disk_read_bytes_total == 108 * 512
    (tmp_path / "sys/block/sdb/stat").unlink()
    (tmp_path / "sys/block/sdb").rmdir()
    probe._files.close()
    assert read(probe, 1.0).disk_read_bytes_total == 8 * 512
    assert probe.take_events() == []
    probe.close()


def test_many_disks_are_read_from_one_file(tmp_path: Path) -> None:
    lines = "".join(f"8 {n} sd{n} 1 0 {n} 0 1 0 {2 * n} 0 0 0 0\n" for n in range(9))
    blocks = {f"sys/block/sd{n}/stat": "" for n in range(9)}
    probe = probe_of(machine(tmp_path, **{"proc/diskstats": lines, **blocks}))
    sample = read(probe)
    assert (sample.disk_read_bytes_total, sample.disk_written_bytes_total) == (36 * 512, 72 * 512)
    probe.close()


def test_the_groups_own_pressure_is_taken_where_it_is_kept(tmp_path: Path) -> None:
    host = {f"proc/pressure/{name}": PRESSURE.format(9_000_000) for name in ("cpu", "memory", "io")}
    root = machine(tmp_path / "a", **host)
    probe = probe_of(root)
    assert read(probe).pressure_cpu_waiting_seconds_total == 9.0
    probe.close()
    own = {f"sys/fs/cgroup/pod/app/{name}.pressure": PRESSURE.format(2_500_000) for name in ("cpu", "memory", "io")}
    probe = probe_of(machine(tmp_path / "b", **host, **own))
    assert read(probe).pressure_io_waiting_seconds_total == 2.5
    probe.close()


def test_kills_in_all_groups_up_to_the_limit_are_counted_in_version_1(tmp_path: Path) -> None:
    mounts = "31 23 0:27 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"
    base = "sys/fs/cgroup/memory"
    more = {
        f"proc/{PID}/cgroup": "4:memory:/pod/app\n",
        f"proc/{PID}/mountinfo": mounts,
        f"{base}/memory.oom_control": "oom_kill 100\n",
        f"{base}/pod/memory.limit_in_bytes": f"{1000 * MIB}\n",
        f"{base}/pod/memory.usage_in_bytes": f"{600 * MIB}\n",
        f"{base}/pod/memory.stat": f"inactive_file 7\ntotal_inactive_file {100 * MIB}\n",
        f"{base}/pod/memory.oom_control": "oom_kill_disable 0\nunder_oom 0\noom_kill 1\n",
        f"{base}/pod/app/memory.limit_in_bytes": "9223372036854771712\n",
        f"{base}/pod/app/memory.oom_control": "oom_kill_disable 0\nunder_oom 0\noom_kill 3\n",
    }
    probe = probe_of(machine(tmp_path, **more))
    sample = read(probe)
    assert sample.memory_working_set_bytes == 500 * MIB
    # Not those of the machine's own group above the limit.
    assert sample.container_memory_oom_kills_total == 4
    probe.close()


def test_a_set_of_cpus_is_compared_with_the_groups_own_time(tmp_path: Path) -> None:
    more = {"sys/fs/cgroup/pod/app/cpu.max": "max 100000\n", "sys/fs/cgroup/pod/app/cpuset.cpus.effective": "0-1\n"}
    probe = probe_of(machine(tmp_path, **more))
    assert read(probe).cpu_limit_cores == 2
    assert probe.limits.cpu_source == "cpuset"
    put(tmp_path, **{"sys/fs/cgroup/pod/app/cpu.stat": "usage_usec 2000000\n"})
    assert read(probe, 1.0).cpu_utilization_ratio == pytest.approx(0.5)
    # A reading without the counter has no rate; the next one compares over both.
    (tmp_path / "sys/fs/cgroup/pod/app/cpu.stat").write_text("nothing\n")
    assert math.isnan(read(probe, 2.0).cpu_utilization_ratio)
    put(tmp_path, **{"sys/fs/cgroup/pod/app/cpu.stat": "usage_usec 6000000\n"})
    assert read(probe, 3.0).cpu_utilization_ratio == pytest.approx(1.0)
    probe.close()


def test_hidden_process_numbers_do_not_hide_new_children(tmp_path: Path) -> None:
    """Where nobody tells the newest process, the tree is listed at each reading."""
    probe = probe_of(machine(tmp_path, **{"proc/loadavg": "0.5 0 0 1/1 0\n"}))
    assert read(probe).process_count == 1
    put(
        tmp_path,
        **{f"proc/{PID}/task/{PID}/children": "11 ", "proc/11/stat": stat_line(11), "proc/11/task/11/children": ""},
    )
    assert read(probe, 1.0).process_count == 2
    probe.close()


def test_where_nothing_was_started_the_tree_is_listed_now_and_then(tmp_path: Path) -> None:
    probe = probe_of(machine(tmp_path))
    assert read(probe).process_count == 1
    put(
        tmp_path,
        **{f"proc/{PID}/task/{PID}/children": "11 ", "proc/11/stat": stat_line(11), "proc/11/task/11/children": ""},
    )
    counts = [read(probe, float(at)).process_count for at in range(1, 12)]
    assert counts == sorted(counts)
    assert counts[-1] == 2
    put(tmp_path, **{"proc/loadavg": "0.5 0 0 1/1 12\n", f"proc/{PID}/task/{PID}/children": "11 12 "})
    put(tmp_path, **{"proc/12/stat": stat_line(12), "proc/12/task/12/children": ""})
    assert read(probe, 12.0).process_count == 3
    # One that got another parent is no longer ours.
    put(
        tmp_path, **{f"proc/{PID}/task/{PID}/children": "12 ", "proc/11/stat": stat_line(11).replace(" S 1 ", " S 77 ")}
    )
    assert read(probe, 13.0).process_count == 2
    probe.close()


def test_descriptors_stay_bounded_over_a_large_tree_and_are_given_back(tmp_path: Path) -> None:
    count = 3 * _files.KEPT
    pids = range(1000, 1000 + count)
    more = {f"proc/{PID}/task/{PID}/children": " ".join(map(str, pids))}
    for pid in pids:
        more |= {f"proc/{pid}/stat": stat_line(pid, pages=1), f"proc/{pid}/task/{pid}/children": ""}
    probe = probe_of(machine(tmp_path, **more))
    before = len(os.listdir("/proc/self/fd"))
    for at in range(3):
        put(tmp_path, **{"proc/loadavg": f"0.5 0 0 1/1 {5 + at}\n"})
        assert read(probe, float(at)).process_count == count + 1
        assert len(os.listdir("/proc/self/fd")) - before <= _files.KEPT
    put(tmp_path, **{"proc/loadavg": "0.5 0 0 1/1 50\n", f"proc/{PID}/task/{PID}/children": ""})
    assert read(probe, 4.0).process_count == 1
    assert len(probe._files) < 30
    probe.close()
    assert len(os.listdir("/proc/self/fd")) <= before


def test_a_probe_that_is_dropped_leaves_no_descriptor_open() -> None:
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        read(Probe(os.getpid()))
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) <= before


def test_children_that_come_and_go_leave_no_descriptor() -> None:
    probe = Probe(os.getpid())
    read(probe)
    kept = len(probe._files)
    for _ in range(30):
        child = subprocess.Popen([sys.executable, "-S", "-c", "input()"], stdin=subprocess.PIPE)
        assert read(probe).process_count >= 2
        child.communicate(b"\n")
        read(probe)
    assert len(probe._files) <= kept + 2
    probe.close()
