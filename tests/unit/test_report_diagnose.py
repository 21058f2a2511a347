"""The likeliest cause of a session's end: one row of facts for every rule, and for no evidence at all."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wiseflow_nb.records import (
    NAN,
    CellRecord,
    EventRecord,
    Sample,
    SessionInfo,
    SessionState,
    TaskRecord,
    TaskState,
)
from wiseflow_nb.report import Confidence, Facts, Shutdown, diagnose
from wiseflow_nb.report._growth import cell_label, growth, growth_of, spans
from wiseflow_nb.report._text import how_known

MB = 1e6
START = 1_700_000_000.0
#: When the kernel was last seen.
END = START + 100.0


def sample(at: float, rss: float = 100 * MB, *, used: float = 0.0, kills: float = 0.0, **more: float) -> Sample:
    used = used or rss
    values = {
        "monotonic_seconds": at - START,
        "interval_seconds": 1.0,
        "memory_limit_bytes": 1000 * MB,
        "memory_working_set_bytes": used,
        "memory_utilization_ratio": used / (1000 * MB),
        "process_memory_rss_bytes": rss,
        "container_memory_oom_kills_total": kills,
        "cpu_utilization_ratio": 0.3,
        "filesystem_size_bytes": 1e12,
        "filesystem_avail_bytes": 5e11,
        "filesystem_utilization_ratio": 0.5,
    }
    return Sample(time_seconds=at, **{**values, **more})


def alive(rss: float = 100 * MB, **more: float) -> tuple[Sample, ...]:
    """Ten seconds up to the end, at one second each."""
    return tuple(sample(END - back, rss, **more) for back in range(10, -1, -1))


def dead(kills: float = 0.0, seconds: int = 2) -> tuple[Sample, ...]:
    """What the recorder still saw when the kernel had gone."""
    return tuple(sample(END + after, NAN, used=20 * MB, kills=kills) for after in range(1, seconds + 1))


INFO = SessionInfo(
    "20260101-000000-abcdef",
    SessionState.CRASHED,
    "etl",
    "here",
    7,
    START,
    last_seen_seconds=END,
    limit_source="memory: cgroup2:/job, cpu: host",
)
CRASHED = Facts(
    INFO,
    now_seconds=END + 1000,
    ended_mark_seconds=END + 2,
    end_reason="the kernel vanished",
    heartbeat_seconds=END + 2,
    boot_id="b1",
    boot_id_now="b1",
    host_now="here",
    boot_seconds_now=START - 1e6,
    samples=alive() + dead(),
)
ENDED = replace(
    CRASHED,
    info=replace(INFO, state=SessionState.ENDED),
    ended_mark_seconds=END,
    end_reason="closed",
    samples=alive(),
)
UNMARKED = replace(CRASHED, ended_mark_seconds=NAN, end_reason="", heartbeat_seconds=END, samples=alive())
NO_SPACE = TaskRecord(
    "t9", "save", TaskState.FAILED, finished_seconds=END - 3, error="OSError: [Errno 28] No space left on device"
)
FULL = {"filesystem_avail_bytes": 0.0, "filesystem_utilization_ratio": 1.0}
IDLE = EventRecord(END - 1, "idle_shutdown", "idle: the workers were stopped")


def slept(seconds: float) -> tuple[Sample, ...]:
    """The last sample, then a pause in which the machine's clock stood still, then the kernel is gone."""
    after = sample(END + seconds, NAN, gap=1.0, interval_seconds=1.0)._replace(monotonic_seconds=END - START + 1)
    return (*alive(), after)


CASES: dict[str, tuple[Facts, list[tuple[str, Confidence]], list[str]]] = {
    "live": (
        replace(CRASHED, info=replace(INFO, state=SessionState.LIVE), now_seconds=END, heartbeat_seconds=END - 1),
        [("live", Confidence.CERTAIN)],
        ["1.0 s before this report"],
    ),
    "ended in order": (ENDED, [("ended", Confidence.CERTAIN)], ["reason: closed"]),
    "ended though memory was full": (
        replace(ENDED, samples=(*alive(999 * MB, kills=0), sample(END, 10 * MB, kills=1))),
        [("ended", Confidence.CERTAIN)],
        [],
    ),
    "idle by its reason": (
        replace(ENDED, end_reason="idle for 1 h"),
        [("idle", Confidence.CERTAIN), ("ended", Confidence.CERTAIN)],
        ["'idle for 1 h'"],
    ),
    "idle by its event": (
        replace(ENDED, events=(IDLE,)),
        [("ended", Confidence.CERTAIN), ("idle", Confidence.LIKELY)],
        ["workers were stopped"],
    ),
    "idle long before": (
        replace(ENDED, events=(replace(IDLE, time_seconds=END - 200),)),
        [("ended", Confidence.CERTAIN)],
        [],
    ),
    "on command": (
        replace(ENDED, shutdowns=(Shutdown(END - 5, "ann@here (process 9)", "now"),)),
        [("ended", Confidence.CERTAIN), ("command", Confidence.POSSIBLE)],
        ["shutdown (now) by ann@here (process 9)", "5.0 s before the end"],
    ),
    "on command by its reason": (
        replace(ENDED, end_reason="shutdown (now)", shutdowns=(Shutdown(END - 5, "ann", "now"),)),
        [("command", Confidence.CERTAIN), ("ended", Confidence.CERTAIN)],
        ["'shutdown (now)'", "by ann"],
    ),
    "on command by its reason alone": (
        replace(ENDED, end_reason="shut down by ann"),
        [("command", Confidence.CERTAIN), ("ended", Confidence.CERTAIN)],
        ["'shut down by ann'"],
    ),
    "a command long before": (
        replace(ENDED, shutdowns=(Shutdown(END - 500, "ann", "now"),)),
        [("ended", Confidence.CERTAIN)],
        [],
    ),
    "oom killer": (
        replace(CRASHED, samples=alive(980 * MB) + dead(kills=1)),
        [("oom", Confidence.CERTAIN)],
        ["OOM kills counted: 0 at", "(kernel there), 1 at", "(kernel gone)", "980 MB of 1.0 GB (98 %)"],
    ),
    "oom killer, although the use was low a sample ago": (
        replace(CRASHED, samples=alive(200 * MB, kills=3) + dead(kills=4)),
        [("oom", Confidence.CERTAIN)],
        ["3 at", "4 at"],
    ),
    "oom killer a moment before": (
        replace(CRASHED, samples=(sample(END - 30), *alive(kills=2), *dead(kills=2))),
        [("oom", Confidence.LIKELY)],
        ["0 at", "2 at"],
    ),
    "oom killer long before": (
        replace(CRASHED, samples=(sample(END - 280), sample(END - 270, kills=1), *alive(kills=1), *dead(kills=1))),
        [("vanished", Confidence.UNKNOWN)],
        ["OOM kills counted: 1 before the kernel's end, 1 after it"],
    ),
    "oom killer, counted while the kernel was still going": (
        replace(CRASHED, samples=(*alive(process_count=3)[:-1], sample(END, kills=1, process_count=3), *dead(kills=1))),
        [("oom", Confidence.CERTAIN)],
        ["0 at", "1 at"],
    ),
    "oom killer, of a worker a moment before": (
        replace(CRASHED, samples=(*alive(process_count=3)[:-1], sample(END, kills=1, process_count=2), *dead(kills=1))),
        [("oom", Confidence.LIKELY)],
        ["0 at", "1 at"],
    ),
    "oom killer, of another process after the kernel had gone": (
        replace(CRASHED, samples=(*alive(), *dead(), sample(END + 3, NAN, kills=1))),
        [("oom", Confidence.LIKELY)],
        ["0 at", "1 at", "(kernel gone)"],
    ),
    "oom killer, but the kernel was never seen": (
        replace(CRASHED, samples=(sample(END - 1, NAN), sample(END, NAN, kills=1))),
        [("oom", Confidence.LIKELY)],
        ["0 at", "1 at"],
    ),
    "the counter was unreadable in between": (
        replace(CRASHED, samples=(*alive(), sample(END + 1, NAN, kills=NAN), sample(END + 2, NAN, kills=1))),
        [("oom", Confidence.CERTAIN)],
        [],
    ),
    "all of the container was killed at its limit": (
        replace(UNMARKED, samples=alive(990 * MB)),
        [("memory", Confidence.LIKELY), ("recorder", Confidence.LIKELY)],
        ["99 %", "there is none from after the kernel's end", "no end mark"],
    ),
    "all of the container was killed at its limit, and its counter is still there": (
        replace(UNMARKED, samples=alive(990 * MB), oom_kills_now=2.0),
        [("oom", Confidence.LIKELY), ("recorder", Confidence.LIKELY)],
        ["0 at", "2 as of this report"],
    ),
    "its counter is still there, and has not risen": (
        replace(UNMARKED, samples=alive(990 * MB), oom_kills_now=0.0),
        [("memory", Confidence.LIKELY), ("recorder", Confidence.LIKELY)],
        [],
    ),
    "kills since the end of all, far from the limit": (
        replace(UNMARKED, oom_kills_now=1.0),
        [("recorder", Confidence.LIKELY), ("oom", Confidence.POSSIBLE)],
        ["1 as of this report"],
    ),
    "at the limit where no kills are counted": (
        replace(CRASHED, samples=alive(990 * MB, kills=NAN) + dead(kills=NAN)),
        [("memory", Confidence.LIKELY)],
        ["nothing counts them here"],
    ),
    "at the limit, yet no kill was counted": (
        replace(CRASHED, samples=alive(990 * MB) + dead()),
        [("memory", Confidence.POSSIBLE)],
        ["0 before the kernel's end, 0 after it"],
    ),
    "on its way over the limit": (
        replace(UNMARKED, samples=(sample(END - 1, 300 * MB), sample(END, 800 * MB))),
        [("recorder", Confidence.LIKELY), ("memory", Confidence.POSSIBLE)],
        ["800 MB of 1.0 GB"],
    ),
    "on its way, but it was seen not to be killed": (
        replace(CRASHED, samples=(sample(END - 1, 300 * MB), sample(END, 800 * MB), *dead())),
        [("vanished", Confidence.UNKNOWN)],
        [],
    ),
    "no evidence": (
        CRASHED,
        [("vanished", Confidence.UNKNOWN)],
        ["100 MB of 1.0 GB (10 %)", "0 before the kernel's end, 0 after it", "CPU 30 %", "disk 50 %"],
    ),
    "no samples either": (
        replace(CRASHED, samples=()),
        [("vanished", Confidence.UNKNOWN)],
        ["there is no sample"],
    ),
    "the recorder died too": (
        UNMARKED,
        [("recorder", Confidence.LIKELY), ("vanished", Confidence.UNKNOWN)],
        ["no end mark"],
    ),
    "the recorder was a thread": (
        replace(UNMARKED, recorder_on_thread=True),
        [("recorder", Confidence.CERTAIN), ("vanished", Confidence.UNKNOWN)],
        ["on a thread of the kernel"],
    ),
    "seen from another host": (
        replace(UNMARKED, host_now="there", boot_id_now="b2", boot_seconds_now=END + 10),
        [("recorder", Confidence.POSSIBLE), ("vanished", Confidence.UNKNOWN)],
        ["recorded on here, read on there"],
    ),
    "rebooted": (
        replace(UNMARKED, boot_id_now="b2", boot_seconds_now=END + 40),
        [("reboot", Confidence.LIKELY), ("recorder", Confidence.LIKELY)],
        ["boot id then b1, now b2"],
    ),
    "rebooted much later": (
        replace(UNMARKED, boot_id_now="b2", boot_seconds_now=END + 90_000),
        [("recorder", Confidence.LIKELY), ("reboot", Confidence.POSSIBLE)],
        [],
    ),
    "rebooted after its end was seen": (
        replace(CRASHED, boot_id_now="b2", boot_seconds_now=END + 40),
        [("vanished", Confidence.UNKNOWN)],
        [],
    ),
    "suspended": (
        replace(CRASHED, samples=slept(50.0), ended_mark_seconds=END + 60),
        [("suspended", Confidence.POSSIBLE)],
        ["no sample between", "stood still for 49.0 s"],
    ),
    "disk full by the samples": (
        replace(CRASHED, samples=alive(**FULL) + dead()),
        [("disk", Confidence.POSSIBLE)],
        ["0 B left"],
    ),
    "disk full by an error": (
        replace(CRASHED, tasks=(NO_SPACE,)),
        [("disk", Confidence.POSSIBLE)],
        ["task 'save' failed"],
    ),
    "disk full by both": (
        replace(CRASHED, samples=alive(**FULL) + dead(), tasks=(NO_SPACE,)),
        [("disk", Confidence.LIKELY)],
        ["0 B left", "task 'save' failed"],
    ),
    "disk full by an event": (
        replace(CRASHED, events=(EventRecord(END - 9, "store_failed", "cannot be written: database or disk is full"),)),
        [("disk", Confidence.POSSIBLE)],
        ["database or disk is full"],
    ),
    "asked to shut down": (
        replace(CRASHED, shutdowns=(Shutdown(END - 2, "bob", "now"),)),
        [("command", Confidence.POSSIBLE)],
        ["by bob"],
    ),
    "memory and disk": (
        replace(CRASHED, samples=alive(980 * MB, **FULL) + dead(kills=1)),
        [("oom", Confidence.CERTAIN), ("disk", Confidence.POSSIBLE)],
        [],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_the_causes_of(name: str) -> None:
    facts, wanted, words = CASES[name]
    causes = diagnose(facts)
    assert [(cause.kind, cause.confidence) for cause in causes] == wanted
    evidence = "\n".join(line for cause in causes for line in cause.evidence)
    for word in words:
        assert word in evidence
    for cause in causes:
        assert cause.sentence.endswith(".")
        assert cause.evidence
        assert "nan" not in evidence


def test_a_recorder_that_still_runs_is_not_said_to_have_ended() -> None:
    assert "recorder" in [cause.kind for cause in diagnose(UNMARKED)]
    lives = replace(UNMARKED, recorder_lives=4711)
    assert "recorder" not in [cause.kind for cause in diagnose(lives)]
    assert any("its recorder (process 4711) still runs" in line for line in how_known(lives))
    assert not any("still runs" in line for line in how_known(UNMARKED))


def test_what_was_out_of_memory_is_what_the_limit_belongs_to() -> None:
    facts = replace(CRASHED, samples=alive(980 * MB) + dead(kills=1))
    assert "the container was out of memory (limit 1.0 GB)" in diagnose(facts)[0].sentence
    bare = replace(facts, info=replace(INFO, limit_source="memory: host, cpu: cgroup2:/job"))
    assert "the machine was out of memory (limit 1.0 GB)" in diagnose(bare)[0].sentence


def test_without_evidence_nothing_is_guessed() -> None:
    (cause,) = diagnose(CRASHED)
    assert cause.sentence == "The kernel vanished; nothing in the record points to memory, CPU or disk."


@given(
    st.lists(
        st.tuples(
            st.floats(0, 400) | st.just(NAN),
            st.floats(0, 2e9) | st.just(NAN),
            st.floats(0, 3) | st.just(NAN),
            st.booleans(),
        ),
        max_size=12,
    ),
    st.sampled_from(sorted(CASES)),
    st.floats(0, 3e9) | st.just(NAN),
)
def test_whatever_the_record_holds_there_is_an_answer(
    rows: list[tuple[float, float, float, bool]], name: str, heartbeat: float
) -> None:
    samples = tuple(
        sample(START + at if at == at else NAN, rss, kills=kills, gap=float(gap)) for at, rss, kills, gap in rows
    )
    facts = replace(CASES[name][0], samples=samples, heartbeat_seconds=heartbeat)
    causes = diagnose(facts)
    assert causes
    # An OOM kill is never named unless the counter rose.
    counts = [item.container_memory_oom_kills_total for item in samples]
    counts = [count for count in [*counts, facts.oom_kills_now] if count >= 0]
    if all(before >= after for before, after in itertools.pairwise(counts)):
        assert not [cause for cause in causes if cause.kind == "oom"]


# What grew.


def task(name: str, begin: float, end: float = NAN, **more: Any) -> TaskRecord:
    state = TaskState.COMPLETED if end == end else TaskState.RUNNING
    return TaskRecord(f"id-{name}", name, state, started_seconds=START + begin, finished_seconds=START + end, **more)


def ramp(pairs: list[tuple[float, float]]) -> tuple[Sample, ...]:
    return tuple(sample(START + at, rss * MB) for at, rss in pairs)


def test_the_task_that_ran_alone_is_sure() -> None:
    samples = ramp([(0, 100), (10, 100), (20, 400)])
    (first,) = growth(samples, spans([task("idle", 0, 10), task("grow", 10)], [], START + 20))
    assert first.label == "task 'grow' (id-grow)"
    assert first.grown_bytes == pytest.approx(300 * MB)
    assert first.alone
    assert first.others == ()


def test_of_two_at_once_the_one_that_came_with_the_growth_is_named_and_not_sure() -> None:
    samples = ramp([(0, 100), (10, 100), (20, 400)])
    first, second = growth(samples, spans([task("sleeper", 0), task("grow", 10)], [], START + 20))
    assert (first.key, second.key) == ("id-grow", "id-sleeper")
    assert not first.alone
    assert first.others == ("task 'sleeper' (id-sleeper)",)


def test_a_task_is_named_rather_than_the_cell_that_waits_for_it() -> None:
    samples = ramp([(0, 100), (20, 400)])
    cell = CellRecord("c1", 3, "job.result()", START + 0.0)
    first, second = growth(samples, spans([task("grow", 0.5)], [cell], START + 20))
    assert first.key == "id-grow"
    assert second.label == "cell [3] 'job.result()'"
    assert first.others == ("cell [3] 'job.result()'",)


def test_a_cell_that_grows_beside_a_sleeping_task_is_named() -> None:
    samples = ramp([(0, 100), (10, 100), (20, 400)])
    cell = CellRecord("c1", 3, "big = load()", START + 10)
    first, *_ = growth(samples, spans([task("sleeper", 0)], [cell], START + 20))
    assert first.label == cell_label(cell)


def test_a_start_between_two_samples_is_interpolated() -> None:
    samples = ramp([(0, 100), (10, 300)])
    (first,) = growth(samples, spans([task("late", 5)], [], START + 10))
    assert first.grown_bytes == pytest.approx(100 * MB)


@pytest.mark.parametrize("pairs", [[], [(0, 100)], [(0, 100), (10, 110)], [(0, 400), (10, 100)]])
def test_little_growth_or_few_samples_name_nobody(pairs: list[tuple[float, float]]) -> None:
    assert growth(ramp(pairs), spans([task("t", 0)], [], START + 10)) == ()


def test_the_cause_names_the_task_and_how_sure_that_is() -> None:
    rising = ramp([(98, 100), (99, 500), (100, 980)])
    facts = replace(CRASHED, samples=rising + dead(kills=1), tasks=(task("grow", 98),))
    (cause,) = diagnose(facts)
    assert "while task 'grow' (id-grow) grew" in cause.sentence
    assert "grew by 880 MB in the 2.0 s that it ran (440 MB/s); nothing else ran, so this is sure" in cause.evidence[-1]
    both = replace(facts, tasks=(task("grow", 98), task("other", 0)))
    (cause,) = diagnose(both)
    assert "not sure, since there ran as well: task 'other' (id-other)" in cause.evidence[-1]


WORK = st.lists(st.tuples(st.floats(0, 100), st.floats(0.01, 100)), max_size=8)


@given(WORK, st.lists(st.floats(1, 5000), min_size=2, max_size=20))
def test_growth_is_bounded_by_what_the_samples_saw(work: list[tuple[float, float]], sizes: list[float]) -> None:
    samples = ramp([(at * 5.0, value) for at, value in enumerate(sizes)])
    tasks = [task(str(number), begin, begin + long) for number, (begin, long) in enumerate(work)]
    found = growth(samples, spans(tasks, [], START + 100))
    for item in found:
        assert item.grown_bytes <= (max(sizes) - min(sizes)) * MB * (1 + 1e-9) + 1
        assert item.alone_bytes <= item.grown_bytes * (1 + 1e-9) + (max(sizes) - min(sizes)) * MB * len(sizes)
    assert len({item.key for item in found}) == len(found)
    if len(tasks) == 1 and found:
        assert found[0].alone
        assert found[0].alone_bytes == pytest.approx(found[0].grown_bytes)


def test_a_clock_that_was_set_back_does_no_harm() -> None:
    samples = ramp([(0, 100), (50, 200), (10, 300), (20, 400)])
    assert growth_of(replace(CRASHED, samples=samples, tasks=(task("t", 0),)))[0].grown_bytes >= 0
