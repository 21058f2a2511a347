"""The frozen records that travel between the floors. No behaviour beyond reading and writing.

Units are base units throughout: seconds, bytes, cores, ratios of 0-1. NaN means "not available".
Times are seconds since the epoch, UTC.
"""

from __future__ import annotations

import enum
import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, NamedTuple, Protocol, TypeVar

NAN = math.nan
RecordT = TypeVar("RecordT")


class Priority(enum.IntEnum):
    """The four classes of work, lowest first."""

    LOW = 0
    NORMAL = 1
    HIGH = 2
    CRITICAL = 3

    @classmethod
    def parse(cls, value: Priority | str | int) -> Priority:
        """Return the priority named by a member, a name in any case, or a number 0-3.

        Raises
        ------
        ValueError
            If the value names no priority.

        Examples
        --------
        >>> Priority.parse("high") is Priority.HIGH
        True
        """
        if isinstance(value, str):
            member = cls.__members__.get(value.strip().upper())
            if member is not None:
                return member
        elif isinstance(value, int) and not isinstance(value, bool) and value in set(cls):
            return cls(value)
        raise ValueError(f"priority {value!r} is not one of low, normal, high, critical; give one of these names")


class TaskState(enum.StrEnum):
    """Where a task is in its life. The last seven are terminal."""

    WAITING = "waiting"
    PENDING = "pending"
    RUNNING = "running"
    RETRY_WAIT = "retry_wait"
    CANCELLING = "cancelling"
    COMPLETED = "completed"
    FAILED = "failed"
    TIMED_OUT = "timed_out"
    CANCELLED = "cancelled"
    SKIPPED = "skipped"
    ABANDONED = "abandoned"
    LOST = "lost"

    @property
    def terminal(self) -> bool:
        """Whether no further transition is possible."""
        return self in _TERMINAL


_TERMINAL = frozenset(
    {
        TaskState.COMPLETED,
        TaskState.FAILED,
        TaskState.TIMED_OUT,
        TaskState.CANCELLED,
        TaskState.SKIPPED,
        TaskState.ABANDONED,
        TaskState.LOST,
    }
)


class SessionState(enum.StrEnum):
    """What the heartbeat, the process and the end mark tell of a session."""

    LIVE = "live"
    ENDED = "ended"
    CRASHED = "crashed"


class Sample(NamedTuple):
    """One reading of the resources: the columns of ``history()``, in this order, all float64."""

    time_seconds: float = NAN
    monotonic_seconds: float = NAN
    interval_seconds: float = NAN
    gap: float = 0.0
    sample_duration_seconds: float = NAN
    cpu_limit_cores: float = NAN
    cpu_utilization_ratio: float = NAN
    memory_limit_bytes: float = NAN
    memory_working_set_bytes: float = NAN
    memory_available_bytes: float = NAN
    memory_utilization_ratio: float = NAN
    container_cpu_seconds_total: float = NAN
    container_cpu_throttled_seconds_total: float = NAN
    container_memory_usage_bytes: float = NAN
    container_memory_oom_kills_total: float = NAN
    system_cpu_utilization_ratio: float = NAN
    system_cpu_iowait_ratio: float = NAN
    system_cpu_steal_ratio: float = NAN
    system_memory_total_bytes: float = NAN
    system_memory_available_bytes: float = NAN
    system_swap_used_bytes: float = NAN
    system_load1: float = NAN
    pressure_cpu_waiting_seconds_total: float = NAN
    pressure_memory_waiting_seconds_total: float = NAN
    pressure_io_waiting_seconds_total: float = NAN
    filesystem_size_bytes: float = NAN
    filesystem_avail_bytes: float = NAN
    filesystem_utilization_ratio: float = NAN
    disk_read_bytes_total: float = NAN
    disk_written_bytes_total: float = NAN
    network_receive_bytes_total: float = NAN
    network_transmit_bytes_total: float = NAN
    process_cpu_seconds_total: float = NAN
    process_memory_rss_bytes: float = NAN
    process_memory_pss_bytes: float = NAN
    process_count: float = NAN
    process_threads: float = NAN
    process_open_fds: float = NAN
    recorder_cpu_seconds_total: float = NAN
    recorder_memory_rss_bytes: float = NAN
    settings_revision: float = 0.0


SAMPLE_COLUMNS: tuple[str, ...] = Sample._fields

#: Columns that only grow; ``history(rates=True)`` adds their change per second.
COUNTER_COLUMNS: tuple[str, ...] = tuple(name for name in SAMPLE_COLUMNS if name.endswith("_total"))

#: Columns of which a bucket keeps the last value, not a mean: what counts up, and what only changes by a step.
LAST_COLUMNS: tuple[str, ...] = ("monotonic_seconds", *COUNTER_COLUMNS, "settings_revision")

#: Columns of which a bucket keeps mean, minimum and maximum.
GAUGE_COLUMNS: tuple[str, ...] = tuple(
    name for name in SAMPLE_COLUMNS if name not in {"time_seconds", "interval_seconds", "gap", *LAST_COLUMNS}
)

#: The tiers that samples are kept in, by their number: the seconds a row spans (0: one sample each) ...
TIER_SECONDS: tuple[float, ...] = (0.0, 10.0, 60.0)
TIER_NAMES: tuple[str, ...] = ("raw", "10s", "60s")
#: ... and for how many seconds. At one sample a second and 41 columns: 1.2 MB, 11.3 MB and 13.2 MB.
TIER_RETENTION_SECONDS: tuple[float, ...] = (3_600.0, 86_400.0, 604_800.0)


@dataclass(frozen=True, slots=True)
class Limits:
    """The effective limits of a process: the minimum of all that bind it, and which one won.

    ``MEM_LIMIT`` and ``CPU_LIMIT`` of the environment count only where no control group, cpuset or
    affinity binds, and where they are below what the host has.

    ``memory_limit_bytes`` is in bytes, ``cpu_limit_cores`` in (fractional) cores. A source is one
    of ``cgroup2:<path>``, ``cgroup1:<path>``, ``cpuset``, ``affinity``, ``environment:<NAME>``,
    ``host``.
    """

    memory_limit_bytes: float
    cpu_limit_cores: float
    memory_source: str
    cpu_source: str

    @property
    def limit_source(self) -> str:
        """Both sources in one phrase, for people."""
        return f"memory: {self.memory_source}, cpu: {self.cpu_source}"


class AlertState(enum.StrEnum):
    """The states of one alert rule on one resource."""

    UNKNOWN = "unknown"
    OK = "ok"
    PENDING = "pending"
    FIRING = "firing"
    RECOVERING = "recovering"


class Severity(enum.StrEnum):
    """How bad it is."""

    NONE = "none"
    WARNING = "warning"
    CRITICAL = "critical"


@dataclass(frozen=True, slots=True)
class AlertTransition:
    """One move of one alert. ``kind`` is what people are told: fired, escalated, de-escalated, repeated, resolved.

    ``alert_id`` stays the same from fired to resolved. ``value``, ``threshold`` and ``peak`` are in
    ``unit`` (``ratio``: shown in percent); the peak is the worst value so far. ``top_processes`` are
    (pid, name, rss bytes, cpu seconds). A silenced transition is recorded; nobody is called.
    """

    alert_id: str
    rule: str
    resource: str
    kind: str
    from_state: AlertState
    to_state: AlertState
    severity: Severity
    value: float
    threshold: float
    peak: float
    started_seconds: float
    time_seconds: float
    message: str
    top_processes: tuple[tuple[int, str, float, float], ...] = ()
    silenced: bool = False
    unit: str = "ratio"


@dataclass(frozen=True, slots=True)
class TaskRecord:
    """One row of the task table: what is known of a task at one moment.

    Durations are seconds; ``memory_peak_bytes`` is NaN where memory is not attributable. The
    ``*_source`` fields say how a figure was measured (``thread_time``, ``coroutine_steps``,
    ``process``, ``unknown``). ``rev`` grows with each change and orders deltas.
    """

    task_id: str
    name: str
    state: TaskState
    priority: Priority = Priority.NORMAL
    kind: str = "thread"
    attempt: int = 0
    max_attempts: int = 1
    created_seconds: float = NAN
    ready_seconds: float = NAN
    started_seconds: float = NAN
    finished_seconds: float = NAN
    queue_seconds: float = NAN
    wall_seconds: float = NAN
    cpu_seconds: float = NAN
    cpu_source: str = "unknown"
    memory_peak_bytes: float = NAN
    memory_source: str = "unknown"
    progress: float = NAN
    progress_text: str = ""
    reason: str = ""
    error: str = ""
    traceback: str = ""
    output_tail: str = ""
    dependencies: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
    retry_of: str = ""
    rev: int = 0

    @property
    def share_done(self) -> float:
        """The progress as screens show it, 0-1: what the task told last, and 1 once it completed; NaN if it told none.

        Examples
        --------
        >>> TaskRecord("t1", "etl", TaskState.COMPLETED, progress=0.98).share_done
        1.0
        """
        return 1.0 if self.state is TaskState.COMPLETED and self.progress == self.progress else self.progress


class HasRecord(Protocol):
    """What makes a task's newest record when it is asked for it."""

    task_id: str

    @property
    def record(self) -> TaskRecord: ...


@dataclass(frozen=True, slots=True)
class TaskTransition:
    """One move of one task, in order of ``seq`` within its session."""

    seq: int
    task_id: str
    attempt: int
    from_state: str
    to_state: TaskState
    time_seconds: float
    reason: str = ""


@dataclass(frozen=True, slots=True)
class CellRecord:
    """One execution of one notebook cell. ``cpu_seconds`` is that of the kernel's process tree."""

    cell_id: str
    number: int
    first_line: str
    started_seconds: float
    finished_seconds: float = NAN
    wall_seconds: float = NAN
    cpu_seconds: float = NAN
    rss_before_bytes: float = NAN
    rss_after_bytes: float = NAN
    rss_peak_bytes: float = NAN
    largest_gap_seconds: float = NAN
    status: str = "running"


@dataclass(frozen=True, slots=True)
class EventRecord:
    """Something worth knowing that happened: kind, one line for people, and its data."""

    time_seconds: float
    kind: str
    message: str
    data: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class PoolStatus:
    """The pool at one moment; ``reason`` says why ``target`` is what it is."""

    workers: int = 0
    busy: int = 0
    queued: int = 0
    min_workers: int = 0
    max_workers: int = 0
    target: int = 0
    reason: str = ""
    completed: int = 0
    failed: int = 0


@dataclass(frozen=True, slots=True)
class SessionInfo:
    """Who a session is and how it stands. ``last_seen_seconds`` is the newest heartbeat.

    ``notice`` says what about its recording is not as it should be; empty when all is well.
    """

    session_id: str
    state: SessionState
    title: str
    host: str
    pid: int
    started_seconds: float
    ended_seconds: float = NAN
    last_seen_seconds: float = NAN
    limit_source: str = ""
    path: str = ""
    notice: str = ""


@dataclass(frozen=True, slots=True)
class CommandResult:
    """The answer to a verb: whether it was done, and one line that says what happened."""

    ok: bool
    message: str


@dataclass(frozen=True, slots=True)
class AlertView:
    """One alert as a dashboard shows it, from fired to resolved."""

    alert_id: str
    rule: str
    resource: str
    severity: Severity
    state: AlertState
    value: float
    threshold: float
    peak: float
    started_seconds: float
    resolved_seconds: float
    message: str
    acknowledged: bool = False
    unit: str = "ratio"


def alert_view(item: AlertTransition, before: AlertView | None = None, *, acknowledged: bool = False) -> AlertView:
    """Return the alert as it stands after a transition; ``before`` is how it stood.

    A resolved alert keeps the severity that it had.
    """
    resolved = item.kind == "resolved"
    return AlertView(
        alert_id=item.alert_id,
        rule=item.rule,
        resource=item.resource,
        severity=before.severity if resolved and before is not None else item.severity,
        state=item.to_state,
        value=item.value,
        threshold=item.threshold,
        peak=item.peak,
        started_seconds=item.started_seconds,
        resolved_seconds=item.time_seconds if resolved else NAN,
        message=item.message,
        acknowledged=acknowledged,
        unit=item.unit,
    )


@dataclass(frozen=True, slots=True)
class Snapshot:
    """All that a dashboard draws, at one moment. ``tasks`` holds only rows newer than ``since_rev``.

    ``rev`` is what to ask with next. With ``reset`` they are a first picture, which takes the place of all
    that was known: of the tasks whose last change was at or before ``older_rev`` only those that have not
    ended; 0: all tasks. ``settings`` maps lower-case setting names to values;
    ``thresholds`` maps ``cpu|memory|disk`` to (warning, critical) ratios of 0-1.
    ``shutdown_at_seconds`` is when the idle workers are going to be stopped; NaN: they are not.
    ``hold_reason`` says why no task starts although some are ready.
    """

    info: SessionInfo
    time_seconds: float
    rev: int
    sample: Sample | None
    tasks: tuple[TaskRecord, ...]
    task_counts: Mapping[str, int]
    pool: PoolStatus
    alerts: tuple[AlertView, ...]
    cells: tuple[CellRecord, ...]
    settings: Mapping[str, Any]
    thresholds: Mapping[str, tuple[float, float]]
    paused: bool = False
    reset: bool = False
    shutdown_at_seconds: float = NAN
    hold_reason: str = ""
    older_rev: int = 0


def valid_text(text: str) -> str:
    """Return the text with a question mark for each lone surrogate: legal in a ``str``, and not in UTF-8.

    They come with the names of files that are not UTF-8, and a record, a page or a JSON file cannot hold them.

    Examples
    --------
    >>> valid_text("caf\\udce9"), valid_text("café")
    ('caf?', 'café')
    """
    return text if text.isascii() else text.encode("utf-8", "replace").decode("utf-8")


def text_of(value: object) -> str:
    """Return a plain ``str``, whatever is given: kin of ``str`` (as numpy's) become one, bytes are decoded.

    Examples
    --------
    >>> text_of(b"epoch"), text_of(3), text_of("epoch")
    ('epoch', '3', 'epoch')
    """
    if type(value) is str:
        return value
    try:
        # Named, as a ``__str__`` may give kin of ``str`` as well.
        return value.decode("utf-8", "replace") if isinstance(value, bytes) else str.__str__(str(value))
    except Exception:  # noqa: BLE001  the user's own __str__
        return f"<{type(value).__name__}>"


def valid(value: Any) -> Any:
    """Return plain values (of dicts, lists and tuples) with ``valid_text`` in the place of every text.

    Examples
    --------
    >>> valid({"names": ("a", "\\ud800")})
    {'names': ['a', '?']}
    """
    if isinstance(value, str):
        return valid_text(value)
    if isinstance(value, dict):
        return {valid(key): valid(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [valid(item) for item in value]
    return value


def valid_record(record: RecordT) -> RecordT:
    """Return a dataclass record whose texts are ``valid_text``: the very same one, if they are."""
    changed: dict[str, Any] = {}
    for name in _text_fields(type(record)):  # type: ignore[arg-type]
        value = getattr(record, name)
        if isinstance(value, str):
            if not value.isascii() and (text := valid_text(value)) != value:
                changed[name] = text
        elif value and (texts := tuple(map(valid_text, value))) != value:
            changed[name] = texts
    return replace(record, **changed) if changed else record  # type: ignore[type-var]


@functools.cache
def _text_fields(cls: type[Any]) -> tuple[str, ...]:
    return tuple(item.name for item in fields(cls) if item.type in ("str", "tuple[str, ...]"))


def to_json_dict(record: Any) -> dict[str, Any]:
    """Return a dataclass record as a dict that ``json`` can write: NaN and infinities become None."""
    return {key: _plain(value) for key, value in asdict(record).items()}


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


_ENUM_FIELDS: dict[str, type[enum.Enum]] = {
    "TaskState": TaskState,
    "Priority": Priority,
    "AlertState": AlertState,
    "Severity": Severity,
    "SessionState": SessionState,
}


def from_json_dict(cls: type[RecordT], data: Mapping[str, Any]) -> RecordT:
    """Return the record ``cls`` from what ``to_json_dict`` gave; unknown keys are left out.

    Raises
    ------
    ValueError, TypeError
        If a value does not fit its field.
    """
    values: dict[str, Any] = {}
    for name, read in _readers(cls):  # type: ignore[arg-type]
        if name in data:
            value = data[name]
            values[name] = value if read is None else read(value)
    return cls(**values)


@functools.cache
def _readers(cls: type[Any]) -> tuple[tuple[str, Callable[[Any], Any] | None], ...]:
    """How the value of each field is read back; None where it is what it was."""
    return tuple((item.name, _reader(str(item.type))) for item in fields(cls))


def _reader(kind: str) -> Callable[[Any], Any] | None:
    if kind == "float":
        return _number
    if kind in _ENUM_FIELDS:
        return _ENUM_FIELDS[kind]
    return _tuple if kind.startswith("tuple[") else None


def _number(value: Any) -> float:
    return NAN if value is None else float(value)


def _tuple(value: Any) -> tuple[Any, ...]:
    return tuple(tuple(part) if isinstance(part, list) else part for part in value)
