"""How a session ended, and why: each cause is a rule over the facts, with the figures that made it apply.

No rule guesses. A rule that does not apply gives nothing, and where none applies the answer says
that nothing in the record points anywhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

from wiseflow_nb.lines import moment, one_line
from wiseflow_nb.quantities import UNKNOWN, duration, percent, size
from wiseflow_nb.records import Sample
from wiseflow_nb.report._facts import Cause, Confidence, Facts, Growth, Shutdown
from wiseflow_nb.report._growth import growth_of

#: From here on memory counts as being at its limit, and a disk as full.
MEMORY_AT_LIMIT = 0.95
DISK_FULL = 0.995
DISK_FULL_BYTES = 4e6
#: A cause this long before the end is no longer about the end.
NEAR_SECONDS = 60.0
#: A machine that starts this soon after the last sign of life took the session with it.
REBOOT_SECONDS = 600.0
SUSPENDED_SECONDS = 30.0
#: A killed process with much memory is seen so much longer.
DYING_SECONDS = 2.0
#: Pauses of the sampler and of the clock below this are rounding.
CLOCK_SLACK_SECONDS = 2.0
_NO_SPACE = ("no space left", "disk is full", "database or disk is full", "errno 28")
_RANK = {Confidence.CERTAIN: 0, Confidence.LIKELY: 1, Confidence.POSSIBLE: 2, Confidence.UNKNOWN: 3}


def diagnose(facts: Facts) -> tuple[Cause, ...]:
    """Return the causes of a session's end, the likeliest first; never empty.

    A crash with no evidence gives one cause of kind ``vanished`` and confidence ``unknown``.

    Examples
    --------
    >>> from wiseflow_nb.records import SessionInfo, SessionState
    >>> info = SessionInfo("1", SessionState.CRASHED, "etl", "here", 7, 0.0)
    >>> (cause,) = diagnose(Facts(info, now_seconds=10.0, ended_mark_seconds=5.0))
    >>> cause.sentence
    'The kernel vanished; nothing in the record points to memory, CPU or disk.'
    """
    if facts.live:
        return (_live(facts),)
    if not facts.crashed:
        found = [cause for rule in (_idle, _commanded) if (cause := rule(facts)) is not None]
        return _ranked([*found, _ordered(facts)])
    grown = growth_of(facts)
    memory = _oom_kill(facts, grown) or _oom_kill_of_all(facts, grown) or _memory_at_limit(facts, grown)
    resource = [cause for cause in (memory, *(rule(facts) for rule in _CRASH_RULES)) if cause is not None]
    if not resource:
        resource.append(_vanished(facts))
    recorder = _recorder_too(facts)
    return _ranked([*resource, *([] if recorder is None else [recorder])])


def _ranked(causes: list[Cause]) -> tuple[Cause, ...]:
    return tuple(sorted(causes, key=lambda cause: _RANK[cause.confidence]))


# It did not crash.


def _live(facts: Facts) -> Cause:
    return Cause("live", "The session is live: nothing has ended.", Confidence.CERTAIN, _signs_of_life(facts))


def _signs_of_life(facts: Facts) -> tuple[str, ...]:
    if not math.isfinite(facts.heartbeat_seconds):
        return ()
    age = max(facts.now_seconds - facts.heartbeat_seconds, 0.0)
    return (f"the recorder's last heartbeat was {duration(age)} before this report",)


def _ordered(facts: Facts) -> Cause:
    reason = one_line(facts.end_reason, 200)
    evidence = [f"end mark written at {moment(facts.ended_mark_seconds)}" + (f", reason: {reason}" if reason else "")]
    return Cause(
        "ended", "It ended in order" + (f": {reason}." if reason else "."), Confidence.CERTAIN, tuple(evidence)
    )


def _idle(facts: Facts) -> Cause | None:
    told = [
        event
        for event in facts.events
        if event.kind == "idle_shutdown" and facts.end_seconds - event.time_seconds >= -CLOCK_SLACK_SECONDS
    ]
    by_reason = facts.end_reason.lower().startswith("idle")
    near = [event for event in told if facts.end_seconds - event.time_seconds <= NEAR_SECONDS]
    if not by_reason and not near:
        return None
    evidence = [f"{moment(event.time_seconds)}: {one_line(event.message, 200)}" for event in told[-1:]]
    if by_reason:
        evidence.insert(0, f"the end mark's reason is {one_line(facts.end_reason, 200)!r}")
    confidence = Confidence.CERTAIN if by_reason else Confidence.LIKELY
    return Cause("idle", "It was shut down because it was idle.", confidence, tuple(evidence))


def _last_shutdown(facts: Facts) -> Shutdown | None:
    for command in reversed(facts.shutdowns):
        if -CLOCK_SLACK_SECONDS <= facts.end_seconds - command.time_seconds <= NEAR_SECONDS:
            return command
    return None


def _commanded(facts: Facts) -> Cause | None:
    command, reason = _last_shutdown(facts), one_line(facts.end_reason, 200)
    by_reason = reason.lower().startswith(("shutdown", "shut down"))
    if command is None and not by_reason:
        return None
    evidence = [f"the end mark's reason is {reason!r}"] if by_reason else []
    evidence += [_told(facts, command)] if command is not None else []
    sentence = (
        f"It was shut down by a command of {one_line(command.who)}."
        if command is not None
        else "It was shut down by a command."
    )
    return Cause("command", sentence, Confidence.CERTAIN if by_reason else Confidence.POSSIBLE, tuple(evidence))


def _told(facts: Facts, command: Shutdown) -> str:
    before = max(facts.end_seconds - command.time_seconds, 0.0)
    return (
        f"command shutdown ({one_line(command.mode, 40)}) by {one_line(command.who)} at {moment(command.time_seconds)}, "
        f"{duration(before)} before the end"
    )


# It crashed.


def oom_rises(samples: tuple[Sample, ...]) -> Iterator[tuple[Sample, Sample]]:
    """Each (before, after) between which the container's OOM kill counter rose."""
    before: Sample | None = None
    for sample in samples:
        count = sample.container_memory_oom_kills_total
        if not math.isfinite(count):
            continue
        if before is not None and count > before.container_memory_oom_kills_total:
            yield before, sample
        before = sample


def _oom_kill(facts: Facts, grown: tuple[Growth, ...]) -> Cause | None:
    alive, end = facts.last_alive, facts.end_seconds
    where = "container" if facts.info.limit_source.startswith("memory: cgroup") else "machine"
    for before, after in reversed(list(oom_rises(facts.samples))):
        if end - after.time_seconds > NEAR_SECONDS:
            return None
        at_death = alive is not None and _took_the_kernel(before, after, alive)
        kills = after.container_memory_oom_kills_total - before.container_memory_oom_kills_total
        line = (
            f"OOM kills counted: {before.container_memory_oom_kills_total:.0f} at {_clock(before)}"
            f"{_presence(before)}, {after.container_memory_oom_kills_total:.0f} at {_clock(after)}{_presence(after)}"
        )
        evidence = (line, *_memory_lines(facts), *growth_lines(grown))
        limit = f" (limit {size(alive.memory_limit_bytes)})" if alive is not None else ""
        named = f", while {grown[0].label} grew" if grown else ""
        if at_death:
            sentence = f"The OOM killer killed the kernel: the {where} was out of memory{limit}{named}."
            return Cause("oom", sentence, Confidence.CERTAIN, evidence)
        apart = duration(abs(end - after.time_seconds))
        when = "before" if after.time_seconds <= end else "after"
        sentence = (
            f"The OOM killer was at work {apart} {when} the kernel was last seen ({kills:.0f} killed){named}: "
            f"the {where} was out of memory."
        )
        return Cause("oom", sentence, Confidence.LIKELY, evidence)
    return None


def _oom_kill_of_all(facts: Facts, grown: tuple[Growth, ...]) -> Cause | None:
    """The recorder went as well, but the counter is still there: kills that came after the last sample."""
    alive = facts.last_alive
    before = alive.container_memory_oom_kills_total if alive is not None else math.nan
    if alive is None or not facts.oom_kills_now > before:
        return None
    full = max(alive.memory_working_set_bytes, _projected(facts, alive)) >= MEMORY_AT_LIMIT * alive.memory_limit_bytes
    named = f", while {grown[0].label} grew" if grown else ""
    kills = facts.oom_kills_now - before
    line = f"OOM kills counted: {before:.0f} at {_clock(alive)}{_presence(alive)}, {facts.oom_kills_now:.0f} as of this report"
    evidence = (line, *_memory_lines(facts), *growth_lines(grown))
    if full:
        sentence = (
            f"The OOM killer likely killed the kernel: the container was out of memory "
            f"(limit {size(alive.memory_limit_bytes)}){named}{'' if facts.recorder_lives else '; its recorder went with it'}."
        )
        return Cause("oom", sentence, Confidence.LIKELY, evidence)
    sentence = (
        f"The OOM killer has been at work since the kernel was last seen ({kills:.0f} killed){named}; "
        "memory was not at its limit then, so the kill may have come later."
    )
    return Cause("oom", sentence, Confidence.POSSIBLE, evidence)


def _took_the_kernel(before: Sample, after: Sample, alive: Sample) -> bool:
    """Whether the kill that was counted between two samples was the kernel's; ``alive`` is the last with it.

    A kill is counted just before its signal is sent. So one that is counted after the kernel had gone
    was of another process, and one that is counted in the kernel's last moments was the kernel's,
    unless a process of its tree went then.
    """
    if after.time_seconds > alive.time_seconds:
        return before.time_seconds <= alive.time_seconds
    dying = alive.time_seconds - after.time_seconds <= DYING_SECONDS
    return dying and not alive.process_count < before.process_count


def _presence(sample: Sample) -> str:
    return " (kernel there)" if sample.process_memory_rss_bytes > 0 else " (kernel gone)"


def _clock(sample: Sample) -> str:
    at = sample.time_seconds
    return f"{moment(at)[11:]}.{int(at % 1 * 10)}" if math.isfinite(at) else UNKNOWN


def _memory_at_limit(facts: Facts, grown: tuple[Growth, ...]) -> Cause | None:
    alive = facts.last_alive
    if alive is None:
        return None
    used, limit = alive.memory_working_set_bytes, alive.memory_limit_bytes
    ratio = used / limit if limit > 0 else math.nan
    counted = [item for item in facts.after_death if math.isfinite(item.container_memory_oom_kills_total)]
    flat = bool(counted) and math.isfinite(alive.container_memory_oom_kills_total)
    evidence = (*_memory_lines(facts), *growth_lines(grown), _oom_line(facts))
    if ratio >= MEMORY_AT_LIMIT:
        if flat:
            sentence = (
                "Memory was at its limit, but no OOM kill was counted: a killer outside of the container "
                "(a memory daemon, an eviction) leaves such a record."
            )
            return Cause("memory", sentence, Confidence.POSSIBLE, evidence)
        why = (
            "no kills are counted here"
            if facts.after_death or not math.isfinite(alive.container_memory_oom_kills_total)
            else "nothing of the session outlived it to see one counted"
        )
        named = f" while {grown[0].label} grew" if grown else ""
        sentence = f"It likely ran out of memory: {percent(ratio)} of the limit was in use{named}; {why}."
        return Cause("memory", sentence, Confidence.LIKELY, evidence)
    soon = _projected(facts, alive)
    if not flat and soon >= limit > 0:
        sentence = (
            f"It may have run out of memory: at the rate of the last samples {size(soon)} would have been in use "
            f"one interval later, and the limit is {size(limit)}."
        )
        return Cause("memory", sentence, Confidence.POSSIBLE, evidence)
    return None


def _projected(facts: Facts, alive: Sample) -> float:
    """The memory in use one interval after the last sample, had it gone on as in the last interval."""
    before = [item for item in facts.samples if item.time_seconds < alive.time_seconds]
    if not before or before[-1].gap or alive.gap:
        return math.nan
    return 2 * alive.memory_working_set_bytes - before[-1].memory_working_set_bytes


def _memory_lines(facts: Facts) -> tuple[str, ...]:
    alive = facts.last_alive
    if alive is None:
        return ()
    return (
        f"memory in use in the last sample with the kernel in it ({_clock(alive)}): "
        f"{size(alive.memory_working_set_bytes)} of {size(alive.memory_limit_bytes)} "
        f"({percent(alive.memory_utilization_ratio)}), of it the kernel's processes {size(alive.process_memory_rss_bytes)}",
    )


def growth_lines(grown: tuple[Growth, ...]) -> tuple[str, ...]:
    """What grew, in a line: how much, how fast, and how sure."""
    if not grown:
        return ()
    first = grown[0]
    line = (
        f"{first.label}: the kernel's memory grew by {size(first.grown_bytes)} in the {duration(first.seconds)} "
        f"that it ran ({size(first.grown_bytes / max(first.seconds, 1e-3))}/s)"
    )
    if first.alone:
        return (f"{line}; nothing else ran, so this is sure",)
    told = (
        f"{size(max(first.alone_bytes, 0.0))} of it while nothing else ran" if first.alone_bytes > 0 else "never alone"
    )
    return (f"{line}, {told}; not sure, since there ran as well: {', '.join(first.others)}",)


def _oom_line(facts: Facts) -> str:
    alive, after = facts.last_alive, facts.after_death
    count = alive.container_memory_oom_kills_total if alive is not None else math.nan
    if not math.isfinite(count):
        return "OOM kills counted: unknown, nothing counts them here"
    later = [item.container_memory_oom_kills_total for item in after]
    later = [item for item in later if math.isfinite(item)]
    if not later:
        return f"OOM kills counted: {count:.0f} in the last sample; there is none from after the kernel's end"
    return f"OOM kills counted: {count:.0f} before the kernel's end, {later[-1]:.0f} after it"


def _rebooted(facts: Facts) -> Cause | None:
    known = facts.boot_id and facts.boot_id_now and facts.host_now == facts.info.host
    if facts.marked or not known or facts.boot_id == facts.boot_id_now:
        return None
    last = _last_sign(facts)
    evidence = [f"boot id then {one_line(facts.boot_id, 40)}, now {one_line(facts.boot_id_now, 40)}"]
    between = facts.boot_seconds_now - last
    evidence.append(f"last sign of life {moment(last)}, machine started {moment(facts.boot_seconds_now)}")
    if -CLOCK_SLACK_SECONDS <= between <= REBOOT_SECONDS:
        sentence = "The machine was restarted: the session's kernel and its recorder ended with it."
        return Cause("reboot", sentence, Confidence.LIKELY, tuple(evidence))
    sentence = "The machine was restarted since then; whether that ended the session the record does not tell."
    return Cause("reboot", sentence, Confidence.POSSIBLE, tuple(evidence))


def _last_sign(facts: Facts) -> float:
    signs = [facts.heartbeat_seconds, *(sample.time_seconds for sample in facts.samples[-1:])]
    return max((sign for sign in signs if math.isfinite(sign)), default=facts.end_seconds)


def _suspended(facts: Facts) -> Cause | None:
    end = facts.end_seconds
    for before, after in zip(facts.samples, facts.samples[1:], strict=False):
        wall = after.time_seconds - before.time_seconds
        if not after.gap or wall < SUSPENDED_SECONDS or not -1 <= after.time_seconds - end <= NEAR_SECONDS:
            continue
        if before.time_seconds > end:
            continue
        ran = after.monotonic_seconds - before.monotonic_seconds
        slept = wall - ran
        evidence = [
            f"no sample between {moment(before.time_seconds)} and {moment(after.time_seconds)} ({duration(wall)})"
        ]
        if slept > CLOCK_SLACK_SECONDS:
            evidence.append(f"the machine's own clock stood still for {duration(slept)} of it")
        return Cause(
            "suspended",
            f"The machine stood still for {duration(wall)} and the kernel was gone when it went on.",
            Confidence.POSSIBLE,
            tuple(evidence),
        )
    return None


def _disk_full(facts: Facts) -> Cause | None:
    end = facts.end_seconds
    evidence = []
    alive = facts.last_alive
    if alive is not None and (
        alive.filesystem_utilization_ratio >= DISK_FULL or alive.filesystem_avail_bytes <= DISK_FULL_BYTES
    ):
        evidence.append(
            f"the watched file system had {size(alive.filesystem_avail_bytes)} left of "
            f"{size(alive.filesystem_size_bytes)} in the last sample"
        )
    said = [
        f"{moment(event.time_seconds)}: {one_line(event.message, 200)}"
        for event in facts.events
        if _says_full(event.message) and end - event.time_seconds <= NEAR_SECONDS
    ]
    said += [
        f"task {one_line(task.name)!r} failed: {one_line(task.error, 200)}"
        for task in facts.tasks
        if _says_full(task.error) and end - task.finished_seconds <= NEAR_SECONDS
    ]
    both = bool(evidence and said)
    evidence += said[-3:]
    if not evidence:
        return None
    sentence = "The disk was full when the kernel vanished."
    return Cause("disk", sentence, Confidence.LIKELY if both else Confidence.POSSIBLE, tuple(evidence))


def _says_full(text: str) -> bool:
    lowered = text[:2000].lower()
    return any(phrase in lowered for phrase in _NO_SPACE)


def _asked(facts: Facts) -> Cause | None:
    command = _last_shutdown(facts)
    if command is None:
        return None
    sentence = f"It vanished after {one_line(command.who)} had asked it to shut down."
    return Cause("command", sentence, Confidence.POSSIBLE, (_told(facts, command),))


def _recorder_too(facts: Facts) -> Cause | None:
    """No end mark: whatever took the kernel took the recorder as well, or came from where it is not seen."""
    if facts.marked or facts.recorder_lives:
        return None  # one that lives took no part in it; how it stands is told with how the end is known
    last = _last_sign(facts)
    evidence = [f"no end mark; last sign of life at {moment(last)}"]
    if facts.recorder_on_thread:
        evidence.append("the recorder ran on a thread of the kernel, so the record ends with it")
        return Cause(
            "recorder",
            "The record ends with the kernel: its recorder ran inside it.",
            Confidence.CERTAIN,
            tuple(evidence),
        )
    if facts.host_now != facts.info.host:
        evidence.append(
            f"recorded on {one_line(facts.info.host)}, read on {one_line(facts.host_now)}: only the heartbeat tells"
        )
        sentence = (
            "The session's recorder fell silent too: its container or machine is gone, or cannot be seen from here."
        )
        return Cause("recorder", sentence, Confidence.POSSIBLE, tuple(evidence))
    sentence = "The session's recorder ended too, without an end mark: everything of the session was ended, not the kernel alone."
    return Cause("recorder", sentence, Confidence.LIKELY, tuple(evidence))


def _vanished(facts: Facts) -> Cause:
    alive = facts.last_alive
    evidence: list[str] = []
    if alive is None:
        evidence.append("there is no sample of the last minutes")
    else:
        evidence.extend(_memory_lines(facts))
        evidence.append(_oom_line(facts))
        cpu, disk = alive.cpu_utilization_ratio, alive.filesystem_utilization_ratio
        evidence.append(f"CPU {percent(cpu)} of what it may use, disk {percent(disk)} full in the same sample")
        evidence.append("a kill from outside, a crash in native code and os._exit all leave such a record")
    return Cause(
        "vanished",
        "The kernel vanished; nothing in the record points to memory, CPU or disk.",
        Confidence.UNKNOWN,
        tuple(line for line in evidence if line and line != UNKNOWN),
    )


_CRASH_RULES: tuple[Callable[[Facts], Cause | None], ...] = (_rebooted, _suspended, _disk_full, _asked)
