"""Limits over trees of files: v1, v2, hybrid, nested, namespaced, unlimited."""

from __future__ import annotations

from pathlib import Path

import pytest

from wiseflow_nb.resources._limits import (
    bound,
    count_cpus,
    cpu_place,
    effective_limits,
    kill_files,
    memory_place,
    pressure_dir,
)

HOST = {"host_memory": 16e9, "host_cores": 8.0, "environ": {}}
V2_MOUNT = "30 23 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw"
V1_MOUNTS = (
    "31 23 0:27 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"
    "32 23 0:28 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct"
)


def tree(root: Path, cgroup: str, mountinfo: str, files: dict[str, str]) -> str:
    for path, text in {"proc/self/cgroup": cgroup, "proc/self/mountinfo": mountinfo, **files}.items():
        target = root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text + "\n")
    return str(root)


def test_version_2(tmp_path: Path) -> None:
    base = "sys/fs/cgroup/app"
    root = tree(tmp_path, "0::/app", V2_MOUNT, {f"{base}/memory.max": "536870912", f"{base}/cpu.max": "50000 100000"})
    limits = effective_limits(root=root, **HOST)
    assert (limits.memory_limit_bytes, limits.cpu_limit_cores) == (536870912, 0.5)
    assert limits.limit_source == "memory: cgroup2:/app, cpu: cgroup2:/app"


def test_an_ancestor_that_binds_tighter_wins_and_its_usage_is_read(tmp_path: Path) -> None:
    files = {
        "sys/fs/cgroup/pod/memory.max": "1000000",
        "sys/fs/cgroup/pod/app/memory.max": "9000000",
        "sys/fs/cgroup/pod/app/memory.low": "5",
        "sys/fs/cgroup/pod/app/memory.high": "10",
        "sys/fs/cgroup/pod/cpu.max": "max 100000",
        "sys/fs/cgroup/pod/app/cpu.max": "150000 100000",
    }
    found = bound(root=tree(tmp_path, "0::/pod/app", V2_MOUNT, files), **HOST)
    assert found.limits.memory_limit_bytes == 1000000
    assert found.limits.memory_source == "cgroup2:/pod"
    assert found.memory_dir.endswith("/sys/fs/cgroup/pod")
    assert (found.limits.cpu_limit_cores, found.limits.cpu_source) == (1.5, "cgroup2:/pod/app")


def test_version_1(tmp_path: Path) -> None:
    files = {
        "sys/fs/cgroup/memory/job/memory.limit_in_bytes": "268435456",
        "sys/fs/cgroup/cpu,cpuacct/job/cpu.cfs_quota_us": "200000",
        "sys/fs/cgroup/cpu,cpuacct/job/cpu.cfs_period_us": "100000",
        "sys/fs/cgroup/cpu,cpuacct/job/cpuacct.usage": "1",
    }
    found = bound(root=tree(tmp_path, "4:memory:/job\n2:cpu,cpuacct:/job", V1_MOUNTS, files), **HOST)
    assert (found.limits.memory_limit_bytes, found.limits.cpu_limit_cores) == (268435456, 2.0)
    assert found.limits.memory_source == "cgroup1:/job"
    assert found.cpuacct_dir.endswith("cpu,cpuacct/job")


def test_unlimited_is_the_host(tmp_path: Path) -> None:
    files = {
        "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712",
        "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "-1",
        "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000",
    }
    limits = effective_limits(root=tree(tmp_path, "4:memory:/\n2:cpu,cpuacct:/", V1_MOUNTS, files), **HOST)
    assert (limits.memory_limit_bytes, limits.cpu_limit_cores) == (16e9, 8.0)
    assert limits.limit_source == "memory: host, cpu: host"


def test_a_hybrid_machine_takes_each_controller_where_it_is(tmp_path: Path) -> None:
    mounts = V1_MOUNTS + "\n33 23 0:29 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw"
    files = {
        "sys/fs/cgroup/memory/a/memory.limit_in_bytes": "100000000",
        "sys/fs/cgroup/unified/b/cpu.max": "max 100000",
        "sys/fs/cgroup/cpu,cpuacct/c/cpu.cfs_quota_us": "25000",
        "sys/fs/cgroup/cpu,cpuacct/c/cpu.cfs_period_us": "100000",
    }
    limits = effective_limits(root=tree(tmp_path, "4:memory:/a\n2:cpu,cpuacct:/c\n0::/b", mounts, files), **HOST)
    assert (limits.memory_limit_bytes, limits.cpu_limit_cores) == (100000000, 0.25)


@pytest.mark.parametrize("membership", ["/docker/abc", "/../..", "/elsewhere"])
def test_a_container_sees_its_own_group_at_the_top_of_the_mount(tmp_path: Path, membership: str) -> None:
    mount = "30 23 0:26 /docker/abc /sys/fs/cgroup ro - cgroup2 cgroup2 rw"
    root = tree(tmp_path, f"0::{membership}", mount, {"sys/fs/cgroup/memory.max": "4096000"})
    assert effective_limits(root=root, **HOST).memory_limit_bytes == 4096000


def test_cpuset_affinity_and_environment(tmp_path: Path) -> None:
    root = tree(tmp_path, "0::/app", V2_MOUNT, {"sys/fs/cgroup/app/cpuset.cpus.effective": "0-2,6"})
    assert effective_limits(root=root, **HOST).cpu_source == "cpuset"
    limits = effective_limits(root=root, affinity=1, **HOST)
    assert (limits.cpu_limit_cores, limits.cpu_source) == (1.0, "affinity")
    given = {"MEM_LIMIT": "2000000000", "CPU_LIMIT": "1.5"}
    limits = effective_limits(root=str(tmp_path / "none"), **{**HOST, "environ": given})
    assert (limits.memory_limit_bytes, limits.cpu_limit_cores) == (2e9, 1.5)
    assert limits.memory_source == "environment:MEM_LIMIT"
    assert count_cpus("") == 0


def test_a_limit_above_the_machine_is_none(tmp_path: Path) -> None:
    root = tree(tmp_path, "0::/app", V2_MOUNT, {"sys/fs/cgroup/app/memory.max": "99000000000000"})
    assert effective_limits(root=root, **HOST).memory_source == "host"


def test_a_limit_above_a_container_of_version_1_is_seen_in_its_statistics(tmp_path: Path) -> None:
    mount = "31 23 0:27 /docker/abc /sys/fs/cgroup/memory ro - cgroup cgroup rw,memory"
    files = {
        "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712",
        "sys/fs/cgroup/memory/memory.stat": "cache 1\nhierarchical_memory_limit 300000000\nhierarchical_memsw_limit 9",
    }
    found = bound(root=tree(tmp_path, "4:memory:/docker/abc", mount, files), **HOST)
    assert found.limits.memory_limit_bytes == 300000000
    assert found.limits.memory_source == "cgroup1:/"
    assert found.memory_dir.endswith("sys/fs/cgroup/memory")


def test_the_mount_that_shows_the_group_wins_over_one_that_does_not(tmp_path: Path) -> None:
    mounts = "29 23 0:26 /other /mnt/other rw - cgroup2 cgroup2 rw\n" + V2_MOUNT
    files = {"mnt/other/memory.max": "1", "sys/fs/cgroup/app/memory.max": "5000000"}
    assert effective_limits(root=tree(tmp_path, "0::/app", mounts, files), **HOST).memory_limit_bytes == 5000000


def test_a_cpuset_of_an_ancestor_holds_where_the_group_has_none(tmp_path: Path) -> None:
    files = {"sys/fs/cgroup/pod/cpuset.cpus.effective": "0-1", "sys/fs/cgroup/pod/app/memory.max": "max"}
    limits = effective_limits(root=tree(tmp_path, "0::/pod/app", V2_MOUNT, files), **HOST)
    assert (limits.cpu_limit_cores, limits.cpu_source) == (2.0, "cpuset")


def test_the_host_is_read_from_the_root_unless_given(tmp_path: Path) -> None:
    files = {"proc/meminfo": "MemTotal:  2048 kB", "proc/stat": "cpu 1 1\ncpu0 1 1\ncpu1 1 1\nintr 1"}
    limits = effective_limits(root=tree(tmp_path, "0::/", V2_MOUNT, files), environ={})
    assert (limits.memory_limit_bytes, limits.cpu_limit_cores) == (2048 * 1024, 2.0)


def test_nonsense_limits_nothing(tmp_path: Path) -> None:
    files = {
        "sys/fs/cgroup/app/memory.max": "many",
        "sys/fs/cgroup/app/cpu.max": "max",
        "sys/fs/cgroup/app/cpuset.cpus": "x",
    }
    given = {"MEM_LIMIT": "2G", "CPU_LIMIT": "-1"}
    root = tree(tmp_path, "0::/app", V2_MOUNT, files)
    assert effective_limits(root=root, **{**HOST, "environ": given}).limit_source == "memory: host, cpu: host"


def test_usage_of_an_unlimited_group_is_its_own_and_the_true_root_has_none(tmp_path: Path) -> None:
    files = {"sys/fs/cgroup/memory.current": "1", "sys/fs/cgroup/cpu.stat": "usage_usec 1"}
    at_root = bound(root=tree(tmp_path / "a", "0::/", V2_MOUNT, files), **HOST)
    assert (memory_place(at_root), cpu_place(at_root)) == ((0, ""), (0, "", ""))
    # With a namespace of its own a container is at the top of its mount, and has what only inner groups have.
    files["sys/fs/cgroup/cgroup.events"] = "populated 1"
    inside = bound(root=tree(tmp_path / "b", "0::/", V2_MOUNT, files), **HOST)
    assert (memory_place(inside)[0], cpu_place(inside)[0]) == (2, 2)


def test_a_cpuset_is_counted_at_its_own_level_or_not_at_all(tmp_path: Path) -> None:
    mounts = V1_MOUNTS + "\n34 23 0:30 / /sys/fs/cgroup/cpuset rw - cgroup cgroup rw,cpuset"
    files = {
        "sys/fs/cgroup/cpuset/job/cpuset.cpus": "0-1",
        "sys/fs/cgroup/cpu,cpuacct/job/cpuacct.usage": "1",
        "sys/fs/cgroup/cpu,cpuacct/job/cpu.stat": "throttled_time 0",
    }
    beside = bound(root=tree(tmp_path / "a", "3:cpuset:/job\n2:cpu,cpuacct:/job", mounts, files), **HOST)
    assert (beside.limits.cpu_source, beside.limits.cpu_limit_cores, beside.cpu_is_counted) == ("cpuset", 2.0, True)
    assert cpu_place(beside)[2].endswith("cpu,cpuacct/job")
    # A directory of that name is there, but the process is in another one.
    files["sys/fs/cgroup/cpu,cpuacct/else/cpuacct.usage"] = "1"
    apart = bound(root=tree(tmp_path / "b", "3:cpuset:/job\n2:cpu,cpuacct:/else", mounts, files), **HOST)
    assert (apart.limits.cpu_source, apart.cpu_is_counted) == ("cpuset", False)
    unified = {"sys/fs/cgroup/app/cpuset.cpus.effective": "0-2", "sys/fs/cgroup/app/cpu.stat": "usage_usec 1"}
    found = bound(root=tree(tmp_path / "c", "0::/app", V2_MOUNT, unified), **HOST)
    assert (found.cpu_is_counted, cpu_place(found)[1].endswith("/app")) == (True, True)
    narrower = bound(root=tree(tmp_path / "d", "0::/app", V2_MOUNT, unified), affinity=1, **HOST)
    assert (narrower.limits.cpu_source, narrower.cpu_is_counted) == ("affinity", False)


def test_a_container_of_version_1_at_the_top_of_its_mount_is_not_the_machine(tmp_path: Path) -> None:
    mount = "31 23 0:27 / /sys/fs/cgroup/memory ro - cgroup cgroup rw,memory"
    files = {
        "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712",
        "sys/fs/cgroup/memory/memory.usage_in_bytes": "5",
        "sys/fs/cgroup/memory/memory.oom_control": "oom_kill 0",
    }
    inside = bound(root=tree(tmp_path / "a", "4:memory:/", mount, files), **HOST)
    assert memory_place(inside)[0] == 1
    assert [Path(path).name for path in kill_files(inside)] == ["memory.oom_control"]
    files["sys/fs/cgroup/memory/release_agent"] = ""
    machine = bound(root=tree(tmp_path / "b", "4:memory:/", mount, files), **HOST)
    assert (memory_place(machine), kill_files(machine)) == ((0, ""), ())


def test_pressure_is_the_groups_own_where_it_is_kept(tmp_path: Path) -> None:
    files = {"sys/fs/cgroup/app/cpu.pressure": "some"}
    found = bound(root=tree(tmp_path / "a", "0::/app", V2_MOUNT, files), **HOST)
    assert pressure_dir(found).endswith("/app")
    # The machine's own group has such files too: they are the host's figures.
    top = {"sys/fs/cgroup/cpu.pressure": "some"}
    assert pressure_dir(bound(root=tree(tmp_path / "b", "0::/", V2_MOUNT, top), **HOST)) == ""
