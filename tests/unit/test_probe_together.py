"""All of a reading at once gives what the parts give one by one, whatever happens to the files."""

from __future__ import annotations

import contextlib
import errno
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.test_probe import MIB, PID, machine, put, stat_line
from wiseflow_nb.records import SAMPLE_COLUMNS, Sample
from wiseflow_nb.resources import _disk, _files
from wiseflow_nb.resources._files import Batch, KeptFiles, Source
from wiseflow_nb.resources._probe import LIMITS_SECONDS, Probe

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="compares Linux' own files with psutil")

#: What is not of the machine: the process' own CPU time, which goes on between two readings.
_COLUMNS = [name for name in SAMPLE_COLUMNS if name != "recorder_cpu_seconds_total"]
_BREAKABLE = (
    "meminfo",
    "loadavg",
    "proc/stat",
    "net/dev",
    "vda/stat",
    "memory.stat",
    "cpu.stat",
    "statm",
    f"{PID}/stat",
)
_PRESSURE = "some avg10=0.00 avg60=0.00 avg300=0.00 total={}\nfull avg10=0.00 avg60=0.00 avg300=0.00 total=0\n"


class Machine:
    """A machine made of files, whose kernel can refuse to read some of them."""

    def __init__(self, root: Path) -> None:
        more = {f"proc/pressure/{name}": _PRESSURE.format(1) for name in ("cpu", "memory", "io")}
        self.root, self.path = root, machine(root, **more)
        self.broken: dict[str, int] = {}
        self.children: list[int] = []
        self.newest = 1
        self.names: dict[int, str] = {}
        self.real_open, self.real_read, self.real_stat = os.open, _files.pread, os.stat

    def probe(self) -> Probe:
        return Probe(PID, disk_path=self.path, root=self.path, environ={}, timer=lambda: 0.0)

    def open(self, path: str, *more: int) -> int:
        fd = self.real_open(path, *more)
        self.names[fd] = path
        return fd

    def pread(self, fd: int, size: int, offset: int) -> bytes:
        for part, code in self.broken.items():
            if part in self.names.get(fd, ""):
                raise OSError(code, os.strerror(code))
        return bytes(self.real_read(fd, size, offset))

    @contextlib.contextmanager
    def in_charge(self) -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "open", self.open)
            patch.setattr(_files, "pread", self.pread)
            patch.setattr(_disk, "space", lambda path, portable: (10.0, 4.0, 0.6))
            yield

    def happens(self, what: str, number: int) -> None:
        child = self.children[number % len(self.children)] if self.children else 0
        if what == "spend":
            put(self.root, **{f"proc/{PID}/stat": stat_line(PID, ticks=number, threads=1 + number % 3, pages=number)})
        elif what == "spend in a child" and child:
            put(self.root, **{f"proc/{child}/stat": stat_line(child, ticks=number, pages=number)})
        elif what == "start":
            self.newest += 1
            pid = 100 + self.newest
            self.children.append(pid)
            put(self.root, **{f"proc/{pid}/stat": stat_line(pid, ticks=1), f"proc/{pid}/task/{pid}/children": ""})
            self.tell()
        elif what == "end" and child:
            self.children.remove(child)
            self.broken[f"proc/{child}/"] = errno.ESRCH
            (self.root / f"proc/{child}/stat").unlink()
            self.tell()
        elif what == "another with its number" and child:
            put(self.root, **{f"proc/{child}/stat": stat_line(child, ticks=number, start=1000 + number)})
        elif what == "leave" and child:
            self.children.remove(child)
            put(self.root, **{f"proc/{child}/stat": stat_line(child, ticks=number).replace(" S 1 ", " S 77 ")})
            self.list_children()
        elif what == "all ends":
            put(self.root, **{f"proc/{PID}/stat": stat_line(PID, ticks=number, state="Z")})
        elif what == "limits move":
            put(self.root, **{"sys/fs/cgroup/pod/cpu.max": f"{('max', '50000')[number % 2]} 100000\n"})
        elif what == "somebody else starts":
            self.newest += 1
            self.tell()
        elif what == "break":
            self.broken[_BREAKABLE[number % len(_BREAKABLE)]] = errno.EIO
        elif what == "mend":
            self.broken = {part: code for part, code in self.broken.items() if code == errno.ESRCH}
        elif what == "nonsense":
            put(self.root, **{"proc/meminfo": "nonsense\n"})
        elif what == "sense":
            kilobytes = 1000 + number
            put(
                self.root,
                **{
                    "proc/meminfo": f"MemTotal: {16 * MIB} kB\nMemAvailable: {kilobytes} kB\nSwapTotal: 9 kB\nSwapFree: 1 kB\n"
                },
            )
        elif what == "machine works":
            put(
                self.root,
                **{
                    "proc/stat": f"cpu {100 + number} 0 100 {800 + number} {number} 0 0 0 0 0\n",
                    "sys/block/vda/stat": f"1 0 {number} 0 1 0 {2 * number} 0 0 0 0\n",
                    "sys/fs/cgroup/pod/memory.current": f"{600 * MIB + number}\n",
                    "sys/fs/cgroup/pod/app/cpu.stat": f"usage_usec {1000000 + number}\nthrottled_usec {number}\n",
                    "proc/pressure/cpu": _PRESSURE.format(number),
                },
            )

    def tell(self) -> None:
        put(self.root, **{"proc/loadavg": f"0.25 0 0 1/1 {self.newest}\n"})
        self.list_children()

    def list_children(self) -> None:
        put(self.root, **{f"proc/{PID}/task/{PID}/children": " ".join(map(str, self.children))})


def read(probe: Probe, at: float, gap: bool = False) -> Sample:
    return probe.read(time_seconds=at, monotonic_seconds=at, interval_seconds=1.0, gap=gap)


def columns(sample: Sample) -> list[float | None]:
    found = [getattr(sample, name) for name in _COLUMNS]
    return [None if math.isnan(value) else value for value in found]


_STEPS = st.lists(
    st.tuples(
        st.sampled_from(
            [
                *("", "", "", "spend", "spend in a child", "start", "end", "another with its number"),
                *("somebody else starts", "break", "mend", "mend", "nonsense", "sense", "machine works"),
                *("machine works", "leave", "limits move"),
            ]
        ),
        st.integers(1, 10_000),
        st.sampled_from([1.0, 1.0, 1.0, 2.5, LIMITS_SECONDS]),
    ),
    min_size=4,
    max_size=40,
)


@settings(deadline=None, max_examples=150)
@given(_STEPS, st.booleans())
def test_the_same_as_part_by_part(steps: list[tuple[str, int, float]], ends: bool) -> None:
    if ends:
        steps = [*steps, ("all ends", 1, 1.0), ("", 1, 1.0), ("spend", 1, 1.0)]
    with tempfile.TemporaryDirectory() as directory:
        world = Machine(Path(directory))
        with world.in_charge():
            together, apart = world.probe(), world.probe()
            now = 0.0
            for what, number, pause in steps:
                world.happens(what, number)
                now += pause
                one = read(together, now)
                apart._together = None
                assert columns(one) == columns(read(apart, now))
            assert [(event.kind, event.message) for event in together.take_events()] == [
                (event.kind, event.message) for event in apart.take_events()
            ]
            together.close()
            apart.close()


def test_in_one_go_as_long_as_all_is_well_and_again_when_it_is(tmp_path: Path) -> None:
    world = Machine(tmp_path)
    with world.in_charge():
        probe = world.probe()
        read(probe, 0.0)
        plan = probe._together
        assert plan is not None
        world.happens("start", 0)
        assert read(probe, 1.0).process_count == 2
        assert read(probe, 2.0).process_count == 2
        assert probe._together is plan
        world.happens("break", 0)
        assert math.isnan(read(probe, 3.0).system_memory_total_bytes)
        assert probe._together is None
        world.happens("mend", 0)
        for at in range(4, 8):
            sample = read(probe, float(at))
        assert sample.system_memory_total_bytes > 0
        assert probe._together is not None
        probe.close()


def test_a_tree_of_more_processes_than_files_are_kept_is_listed_again(tmp_path: Path) -> None:
    world = Machine(tmp_path)
    with world.in_charge():
        probe = world.probe()
        world.happens("start", 0)
        assert [read(probe, float(at)).process_count for at in range(3)] == [2] * 3
        plan = probe._together
        assert plan is not None
        # No room for the last of the tree: all are read one by one from here on.
        probe._files._limit = len(plan._batch._sources) - 1
        probe._files.close()
        assert read(probe, 3.0).process_count == 2
        # Those that stood still are read again beside the new one.
        world.happens("start", 0)
        assert read(probe, 4.0).process_count == 3
        assert probe.take_events() == []
        probe.close()


def test_one_that_got_another_parent_is_ours_no_longer(tmp_path: Path) -> None:
    world = Machine(tmp_path)
    with world.in_charge():
        probe = world.probe()
        world.happens("start", 0)
        # So long that nobody looks at the list of children.
        assert [read(probe, float(at)).process_count for at in range(5)] == [2] * 5
        world.happens("leave", 7)
        assert read(probe, 5.0).process_count == 1
        probe.close()


# Files that are read together.


def test_only_what_changed_is_parsed_and_what_failed_to_parse_fails_again(tmp_path: Path) -> None:
    parsed: list[bytes] = []

    def number(data: bytes) -> int:
        parsed.append(data)
        return int(data)

    put(tmp_path, a="1", b="2")
    files = KeptFiles()
    batch = Batch(files, [Source(str(tmp_path / name), number, 16) for name in "ab"])
    assert [list(batch.values()) for _ in range(3)] == [[1, 2]] * 3
    assert parsed == [b"1", b"2"]
    put(tmp_path, b="x")
    for _ in range(2):
        with pytest.raises(ValueError, match="invalid literal"):
            batch.values()
    put(tmp_path, b="3")
    assert batch.values() == [1, 3]
    assert parsed == [b"1", b"2", b"x", b"x", b"3"]
    files.close()


def test_a_number_of_a_descriptor_that_was_given_back_is_never_read(tmp_path: Path) -> None:
    put(tmp_path, a="1", b="2", c="other")
    files = KeptFiles()
    batch = Batch(files, [Source(str(tmp_path / name), bytes, 16) for name in "ab"])
    assert batch.values() == [b"1", b"2"]
    files.forget(str(tmp_path / "b"))
    # It takes the number that became free.
    assert files.read(str(tmp_path / "c"), 16) == b"other"
    assert batch.values() == [b"1", b"2"]
    files.close()
    assert batch.values() == [b"1", b"2"]
    (tmp_path / "a").unlink()
    files.close()
    with pytest.raises(FileNotFoundError):
        batch.values()
    files.close()


def test_more_files_than_are_kept_are_read_one_by_one(tmp_path: Path) -> None:
    names = [f"f{number}" for number in range(9)]
    put(tmp_path, **dict(zip(names, names, strict=True)))
    files = KeptFiles(limit=4)
    batch = Batch(files, [Source(str(tmp_path / name), bytes, 16, listing=name == "f8") for name in names])
    for _ in range(3):
        assert batch.values() == [name.encode() for name in names]
        assert len(files) == 4
    put(tmp_path, f8="new")
    assert batch.values()[-1] == b"new"
    files.close()


def test_a_long_listing_among_others_is_read_to_its_end(tmp_path: Path) -> None:
    text = "".join(f"line {number}\n" for number in range(20_000))
    put(tmp_path, a="1", long=text)
    files = KeptFiles()
    batch = Batch(files, [Source(str(tmp_path / "long"), bytes, listing=True), Source(str(tmp_path / "a"), bytes, 9)])
    assert batch.values() == [text.encode(), b"1"]
    # A change beyond the first page is seen.
    put(tmp_path, long=text + "more\n")
    assert batch.values() == [(text + "more\n").encode(), b"1"]
    files.close()


_FORK = """
import os
from wiseflow_nb.resources._probe import Probe
probe = Probe(os.getppid())
def memory():
    sample = probe.read(time_seconds=0.0, monotonic_seconds=0.0, interval_seconds=1.0, gap=False)
    return sample.recorder_memory_rss_bytes
ballast = bytearray(os.urandom(1024) * 65536)
for _ in range(3): parent = memory()
child = os.fork()
if child == 0:
    del ballast
    os._exit(0 if memory() < parent - 2**25 and memory() < parent - 2**25 else 1)
assert os.waitpid(child, 0)[1] == 0
assert memory() > parent - 2**25
"""


def test_after_a_fork_the_child_reads_its_own_files() -> None:
    subprocess.run([sys.executable, "-c", _FORK], check=True, timeout=60)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    count, real = [0], _files.pread

    def counting(fd: int, size: int, offset: int) -> bytes:
        count[0] += 1
        return bytes(real(fd, size, offset))

    monkeypatch.setattr(_files, "pread", counting)
    return lambda: count[0]


def test_each_file_is_read_once_a_reading(tmp_path: Path, calls: Callable[[], int]) -> None:
    probe = Probe(PID, disk_path=str(tmp_path), root=machine(tmp_path), environ={})
    for at in range(4):
        before = calls()
        read(probe, float(at))
    assert len(probe._files) - 1 <= calls() - before <= len(probe._files)
    probe.close()
