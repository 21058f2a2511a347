"""The composition root: a session opens all parts, joins them, and closes them in order."""

from __future__ import annotations

import atexit
import collections
import contextlib
import functools
import json
import logging
import os
import socket
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wiseflow_nb.clock import SYSTEM_CLOCK, Clock
from wiseflow_nb.config import Settings, canonical_name, is_secret, load_settings
from wiseflow_nb.context import current_task
from wiseflow_nb.errors import ConfigurationError, UsageError
from wiseflow_nb.events import EventBus
from wiseflow_nb.forks import tell_no_more, tell_of_forks
from wiseflow_nb.governor import Governor
from wiseflow_nb.pool import ThreadPoolManager
from wiseflow_nb.recorder.client import RecorderClient
from wiseflow_nb.recorder.protocol import RecorderConfig, RecorderSettings
from wiseflow_nb.records import (
    AlertTransition,
    CellRecord,
    CommandResult,
    EventRecord,
    HasRecord,
    PoolStatus,
    Sample,
    SessionInfo,
    SessionState,
    TaskRecord,
    TaskState,
    TaskTransition,
    to_json_dict,
    valid_record,
    valid_text,
)
from wiseflow_nb.resources._disk import absolute_paths
from wiseflow_nb.resources.monitor import ResourceMonitor
from wiseflow_nb.store.finding import all_sessions, find_session
from wiseflow_nb.store.identity import identify
from wiseflow_nb.store.paths import RING_NAME, in_memory, new_session_id, private_directory, sessions_root
from wiseflow_nb.tasks import TaskManager, memory_gauges
from wiseflow_nb.verbs import Verbs
from wiseflow_nb.view import LocalView, StoreView, wiseflow_version
from wiseflow_nb.view._by_view import ByView

if TYPE_CHECKING:
    import pandas as pd

logger = logging.getLogger("wiseflow_nb.session")
KEPT_CELLS = 1000
_COMPLETED = TaskState.COMPLETED
_ALIVE = tuple(state for state in TaskState if not state.terminal)
FIXED_SETTINGS = frozenset({"state_dir", "recorder_enabled", "retention_days", "retention_mb"})


class Session(ByView):
    """Monitor, pool, task manager, recorder and view of one process, opened and closed together.

    Parameters
    ----------
    settings
        Default: ``load_settings(overrides)``.
    title
        What a person reads in lists of sessions; default: the program's or the directory's name.
    **overrides
        Settings by name, the strongest source.

    Raises
    ------
    ConfigurationError, UsageError
        If a setting is not allowed, or STATE_DIR is no directory's name; nothing was started.

    Examples
    --------
    >>> with Session(title="example") as session:
    ...     task = session.tasks.submit(sum, [1, 2, 3])
    ...     task.result(timeout=10)
    6
    """

    def __init__(
        self, settings: Settings | None = None, *, title: str = "", clock: Clock = SYSTEM_CLOCK, **overrides: Any
    ) -> None:
        base = load_settings(overrides) if settings is None else settings
        self._settings = base.replaced(overrides) if settings is not None and overrides else base
        self._clock = clock
        self._title = valid_text(title or Path.cwd().name or "session")
        self._revision = 0
        self._lock = threading.RLock()
        self._state = "new"
        self._started_seconds = clock.time()
        self.bus = EventBus()
        self.id = new_session_id(self._started_seconds)
        if "\0" in self._settings.state_dir:
            raise UsageError(f"STATE_DIR {self._settings.state_dir!r} holds a null character; name a directory")
        self._root, self._root_note = sessions_root(self._settings.state_dir, for_writing=True)
        self.directory = self._root / self.id
        self._acknowledged: set[str] = set()
        #: The tasks that have not ended: few among the many that have.
        self._unfinished: dict[str, HasRecord] = {}
        self._cells: collections.OrderedDict[str, CellRecord] = collections.OrderedDict()
        self._running_cells: set[str] = set()
        self.monitor = ResourceMonitor(
            self._settings, clock=clock, ring_path=str(self.directory / RING_NAME), bus=self.bus
        )
        self.monitor.after_callbacks = self._after_alert
        self.monitor.on_own_alert = functools.partial(self._put, "alert")
        self.monitor.on_own_event = functools.partial(self._put, "event")
        self.pool = ThreadPoolManager(settings=self._settings, clock=clock)
        room = memory_gauges(self.monitor, lambda: self._settings, clock)
        self.tasks = TaskManager(self.pool, settings=self._settings, clock=clock, on_move=self._task_changed, **room)
        self.monitor.add_rule(
            "task stalled",
            self._stalled,
            resource="tasks",
            warning=1,
            for_seconds=0,
            keep_seconds=0,
            phrase="stalled tasks: {value}",
        )
        self._recorder = RecorderClient(
            RecorderConfig(
                session_id=self.id,
                directory=str(self.directory),
                pid=os.getpid(),
                title=self._title,
                identity=identify().to_dict(),
                settings=self._recorder_settings(),
                retention_days=self._settings.retention_days,
                retention_bytes=int(self._settings.retention_mb * 1e6),
                notice=self._root_note,
                started_seconds=self._started_seconds,
            ),
            on_alert=self._alert,
            on_event=self._recorder_event,
            on_command=self._asked,
            in_process=not self._settings.recorder_enabled or in_memory(self._root),
            clock=clock,
        )
        # Only now is there a recorder to tell.
        self.monitor.on_rules_change = lambda: self._recorder.soon(self._tell_rules)
        self._governor = Governor(
            monitor=self.monitor,
            pool=self.pool,
            tasks=self.tasks,
            clock=clock,
            settings=lambda: self._settings,
            cells_running=lambda: bool(self._running_cells),
            tell_busy=self._recorder.set_busy,
            tell_pool=lambda status: self._recorder.put_meta("pool", json.dumps(to_json_dict(status))),
            tell_hold=lambda reason: self._recorder.put_meta("hold_reason", json.dumps(valid_text(reason))),
            tell_shutdown=lambda at: self._recorder.put_meta("shutdown_at", json.dumps(at if at == at else None)),
            event=self.event,
            look_at_recorder=self._look_at_recorder,
        )
        self._verbs = Verbs(
            tasks=self.tasks,
            monitor=self.monitor,
            recorder=self._recorder,
            clock=clock,
            configure=self._configure,
            not_idle=self._governor.not_idle,
            acknowledged=self._acknowledged.add,
            event=self.event,
        )
        self.view = LocalView(self)

    # Life.

    def start(self) -> Session:
        """Start the recorder and the monitor; a second call does nothing.

        Raises
        ------
        UsageError
            If the session was closed: make a new one.
        StoreError, RecorderError
            If nothing can be recorded at all.
        """
        with self._lock:
            if self._state == "open":
                return self
            if self._state != "new":
                what = "stayed with the parent process" if self._state == "left" else "was closed"
                raise UsageError(f"session {self.id} {what}; make a new Session")
            private_directory(self.directory)
            self._recorder.start()
            tell_of_forks(self)
            self.monitor.start()
            self._state = "open"
            self._governor.start()
            atexit.register(self._at_exit)
        self.event("session_started", f"session {self.id} started", recorder=self._recorder.mode)
        if self._root_note:
            self.event("state_dir_fallback", self._root_note)
            logger.warning("%s", self._root_note)
        return self

    def close(self, reason: str = "closed", *, timeout: float = 2.0) -> None:
        """Stop the work, then the monitor, then the record; a second call does nothing.

        Tasks that still run after ``timeout`` seconds are ABANDONED and read so.

        Raises
        ------
        UsageError
            If it is called inside a task, which would wait for itself; nothing was changed.
        """
        if current_task() is not None:
            raise UsageError("a session cannot be closed inside a task; close it outside, or use the shutdown command")
        self.tasks.refuse_inside("closing the session")
        if self._state == "left":
            return
        with self._lock:
            if self._state != "open":
                self._state = "closed"
                return
            self._state = "closed"
        self._governor.stop(timeout)
        # Whatever one step raises, those after it (read from the bottom up) still happen.
        with contextlib.ExitStack() as steps:
            steps.callback(tell_no_more, self)
            steps.callback(_forget, self)
            steps.callback(atexit.unregister, self._at_exit)
            steps.callback(self.view.close)
            steps.callback(self._recorder.stop, reason)
            steps.callback(self.monitor.stop)
            steps.callback(self.event, "session_closed", f"session {self.id} closed: {reason}")
            steps.callback(self._governor.tell_pool)
            steps.callback(self.pool.processes.kill)
            steps.callback(self.pool.shutdown, wait=False, cancel_futures=True)
            steps.callback(self.tasks.shutdown, "now", timeout=timeout)

    def __enter__(self) -> Session:
        return self.start()

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _at_exit(self) -> None:
        self.close("the process ended")

    def after_fork(self) -> None:
        """In a forked child: work, recorder and threads stayed with the parent, and the end is the parent's to tell."""
        global _current, _current_lock
        # Other threads may have held any lock at the fork, and none of them came along.
        self._lock = threading.RLock()
        self._state = "left"
        atexit.unregister(self._at_exit)
        self.bus.after_fork()
        self._governor.after_fork()
        # Kept, not dropped: its connection to the file would be closed, which takes locks.
        self._parents_view, self.view = self.view, LocalView(self)
        _current_lock = threading.Lock()
        if _current is self:
            _current = None

    def __repr__(self) -> str:
        return f"<Session {self.id} {self._state} {self._title!r}>"

    # What is known.

    @property
    def settings(self) -> Settings:
        """The settings in force."""
        return self._settings

    @property
    def recorder(self) -> RecorderClient:
        """This session's line to its recorder."""
        return self._recorder

    @property
    def info(self) -> SessionInfo:
        """Who this session is and how it stands."""
        ended = self._state == "closed"
        return SessionInfo(
            session_id=self.id,
            state=SessionState.ENDED if ended else SessionState.LIVE,
            title=self._title,
            host=socket.gethostname(),
            pid=os.getpid(),
            started_seconds=self._started_seconds,
            last_seen_seconds=self._clock.time(),
            limit_source=self._recorder.limit_source,
            path=str(self.directory),
            notice="; ".join(filter(None, [self._root_note, self._recorder.trouble])),
        )

    def audit(self) -> pd.DataFrame:
        """Look now for what leaks: one row a finding (kind, subject, message, value); none is good news.

        Cleanup handlers that failed or never ran, threads that were asked to stop and did not, more
        workers than allowed, processes left behind, descriptors and memory that only rise. The same
        look is made every ``AUDIT_INTERVAL`` in the background, and each new finding is an event.
        """
        from wiseflow_nb.frames import finding_frame

        return finding_frame(self._governor.audit())

    # Change.

    def configure(self, *, source: str = "argument", **changes: Any) -> Settings:
        """Change settings live: validated whole, all or nothing; return the new settings.

        Raises
        ------
        ConfigurationError
            If one is unknown or not allowed; nothing was changed.

        Examples
        --------
        >>> session.configure(cpu_threshold=80).cpu_threshold  # doctest: +SKIP
        80.0
        """
        return self._configure(changes, source)

    def _configure(self, changes: Mapping[str, Any], source: str) -> Settings:
        fixed = sorted({canonical_name(name, source) for name in changes} & FIXED_SETTINGS)
        if fixed:
            names = ", ".join(name.upper() for name in fixed)
            raise ConfigurationError(f"{names} cannot change while a session runs; set it before the session starts")
        if self._state == "left":
            raise UsageError(f"session {self.id} stayed with the parent process; start a Session of this one")
        with self._lock:
            settings = self._settings.replaced(changes, source)
            self._settings = settings
            self._revision += 1
            self.monitor.apply_settings(settings)
            self.pool.set_bounds(settings.min_thread_workers, settings.max_thread_workers)
            self.tasks.set_max_concurrent(settings.max_concurrent_tasks)
            self._recorder.configure(self._recorder_settings())
        keys = [canonical_name(name) for name in changes]
        shown = ", ".join(f"{key.upper()}={'(hidden)' if is_secret(key) else getattr(settings, key)}" for key in keys)
        self.event("configured", f"{shown} (by {source})", revision=self._revision, source=source)
        return settings

    def event(self, kind: str, message: str, **data: Any) -> None:
        """Record an event and tell the subscribers of ``session.bus``."""
        record = EventRecord(self._clock.time(), kind, valid_text(message), data)
        self._recorder.put("event", record)
        self.bus.publish(record)

    def cell_started(self, cell: CellRecord) -> None:
        """Record that a cell is about to run; it is on its way to the file before this returns."""
        self._running_cells.add(cell.cell_id)
        self._keep_cell(cell)
        self._recorder.set_busy(True)
        self._recorder.write_through()

    def cell_finished(self, cell: CellRecord) -> None:
        """Record how a cell ended."""
        self._running_cells.discard(cell.cell_id)
        self._keep_cell(cell)
        self._governor.not_idle()

    def _keep_cell(self, cell: CellRecord) -> None:
        cell = valid_record(cell)
        with self._lock:
            self._cells[cell.cell_id] = cell
            while len(self._cells) > KEPT_CELLS:
                self._cells.popitem(last=False)
        self._recorder.put("cell", cell)

    # What LocalView reads.

    def now(self) -> float:
        """Seconds since the epoch on this session's clock."""
        return self._clock.time()

    def latest(self) -> Sample | None:
        """The newest sample."""
        return self.monitor.latest()

    def task_rev(self) -> int:
        """The newest change of any task."""
        return self.tasks.rev

    def dropped_task_rev(self) -> int:
        """The last change of any task that only the file still has; 0 while there is none."""
        return self.tasks.dropped_rev

    def task_records(self, since_rev: int = 0) -> tuple[TaskRecord, ...]:
        """The tasks changed after ``since_rev``."""
        return self.tasks.records(since_rev)

    def unfinished_tasks(self) -> Sequence[TaskRecord]:
        """The tasks that have not ended."""
        return tuple(task.record for task in self._unfinished.copy().values())

    def task_record(self, task_id: str) -> TaskRecord | None:
        """One task."""
        return self.tasks.get(task_id)

    def task_counts(self) -> dict[str, int]:
        """How many tasks are in each state."""
        return dict(self.tasks.counts())

    def pool_status(self) -> PoolStatus:
        """The pool now."""
        return self.pool.status()

    def paused(self) -> bool:
        """Whether no new task starts."""
        return self.tasks.paused

    def hold_reason(self) -> str:
        """Why no task starts although some are ready; empty where nothing holds them."""
        return self.tasks.hold_reason

    def shutdown_at(self) -> float:
        """When the idle workers are going to be stopped (seconds since the epoch), or NaN."""
        return self._governor.shutdown_at

    def on_idle_stop_kernel(self, stop: Callable[[], None] | None) -> None:
        """Set what stops the kernel when AUTO_SHUTDOWN_KERNEL asks for it; None: nothing can."""
        self._governor.stop_kernel = stop

    def alert_transitions(self) -> Sequence[AlertTransition]:
        """The newest alert transitions, oldest first."""
        return self.monitor.transitions()

    def acknowledged(self) -> frozenset[str]:
        """The alerts that somebody has seen."""
        return frozenset(self._acknowledged)

    def cell_records(self) -> Sequence[CellRecord]:
        """The newest cells, oldest first."""
        with self._lock:
            return list(self._cells.values())

    def setting_values(self) -> dict[str, Any]:
        """Every setting but the secret ones."""
        return self._settings.public_values()

    def thresholds(self) -> dict[str, tuple[float, float]]:
        """(warning, critical) ratios of cpu, memory and disk."""
        return self._settings.thresholds()

    def sync(self, timeout: float = 2.0) -> bool:
        """Wait up to ``timeout`` seconds until what was recorded so far is committed to the file."""
        return self._state in ("new", "closed") or self._recorder.sync(timeout)

    def perform(self, verb: str, arguments: dict[str, Any], who: str) -> CommandResult:
        """Carry out a validated verb and answer in one line."""
        return self._asked(verb, arguments, who, relayed=False)

    def _asked(self, verb: str, arguments: dict[str, Any], who: str, *, relayed: bool = True) -> CommandResult:
        if self._state != "open":
            return CommandResult(False, "the session has ended: it takes no commands any more")
        return self._verbs.perform(verb, arguments, who, relayed=relayed)

    def log_command(self, row: Mapping[str, Any]) -> None:
        """Record a verb that was used in this process; those of others are on record already."""
        self._recorder.put("command", dict(row))

    # What the parts tell.

    def _task_changed(self, task: HasRecord, transition: TaskTransition | None) -> None:
        self._recorder.put("task", task)
        if transition is None:
            return
        self._recorder.put("transition", transition)
        state = transition.to_state
        if state is _COMPLETED or state not in _ALIVE:
            self._unfinished.pop(task.task_id, None)
        else:
            self._unfinished[task.task_id] = task
        if transition.to_state is TaskState.RUNNING:
            self._recorder.set_busy(True)
            self._recorder.write_through()
        self._governor.wake()

    def _stalled(self, sample: Sample) -> tuple[float, str]:
        found = self.tasks.stalled()
        return float(len(found)), "; ".join(f"{item.name!r} ({item.task_id}) {item.message}" for item in found[:3])

    def _alert(self, transition: AlertTransition) -> None:
        self.monitor.deliver(transition)

    def _put(self, table: str, record: Any) -> None:
        self._recorder.put(table, record)

    def _tell_rules(self) -> None:
        with self._lock:
            self._revision += 1
            self._recorder.configure(self._recorder_settings())

    def _recorder_event(self, event: EventRecord) -> None:
        if event.kind == "recorder_restarted":
            self.monitor.close_alerts("the recorder was replaced")
        if event.kind == "store_remade" and event.data.get("begun_anew"):
            # What this process still knows of is on record again.
            for task in self.tasks.records():
                self._recorder.put("task", task)
            for cell in self.cell_records():
                self._recorder.put("cell", cell)
        if event.kind == "acknowledged":
            self._acknowledged.add(str(event.data["alert_id"]))
            self.monitor.mark_acknowledged(str(event.data["alert_id"]))
        self.bus.publish(event)

    def _look_at_recorder(self, busy: bool) -> None:
        interval = self.monitor.plan().interval(busy=busy, watched=False)
        self._recorder.look(self.monitor.latest(), interval)

    def _after_alert(self, transition: AlertTransition) -> None:
        if transition.resource in ("cpu", "memory"):
            self._governor.size_pool()

    def _recorder_settings(self) -> RecorderSettings:
        settings = self._settings
        # The recorder's working directory is another.
        plan = replace(self.monitor.plan(self._revision), disk_path=absolute_paths(settings.disk_path))
        return RecorderSettings(plan, settings.public_values() | {"version": wiseflow_version()})


_current: Session | None = None
_current_lock = threading.Lock()


def current_session() -> Session | None:
    """Return the session of this process, or None before one was started."""
    return _current


def start_default(*, title: str = "", **overrides: Any) -> Session:
    """Return the session of this process, started if there was none."""
    global _current
    with _current_lock:
        if _current is None:
            _current = Session(title=title, **overrides).start()
        elif overrides:
            _current.configure(**overrides)
        return _current


def _forget(session: Session) -> None:
    global _current
    with _current_lock:
        if _current is session:
            _current = None


def sessions(settings: Settings | None = None) -> list[SessionInfo]:
    """Every session of this user that is still kept: live ones first, newest first."""
    settings = load_settings() if settings is None else settings
    return all_sessions(settings.state_dir, SYSTEM_CLOCK.time())


def open_session(session_id: str, settings: Settings | None = None) -> StoreView:
    """Return a view of a session, live or over: its history, tasks, alerts and cells as DataFrames.

    Raises
    ------
    SessionNotFoundError
        If there is none with that id.
    """
    settings = load_settings() if settings is None else settings
    return StoreView(find_session(settings.state_dir, session_id))
