"""Process workers: calls that run in processes of their own, one to a process, each in a thread's charge.

The thread that would have run the call (a pool's worker) drives a worker process instead: it sends
the call, hears progress, and stops the process when the task is asked to stop. So the bounds, the
order and the records are those of the threads, and there is no second scheduler.
"""

from __future__ import annotations

import atexit
import functools
import select
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from wiseflow_nb.context import RemoteRun, TaskContext, _current, current_task
from wiseflow_nb.errors import TaskCancelledError, UsageError, WorkerLostError
from wiseflow_nb.forks import tell_of_forks
from wiseflow_nb.pool._future import PoolFuture
from wiseflow_nb.pool._process_wire import call_culprit, dump_call
from wiseflow_nb.pool._process_worker import AHEAD_CALLS, END_SECONDS, Reply, WorkerProcess, load, strike_all

if TYPE_CHECKING:
    from wiseflow_nb.pool._crew import Crew, Worker

#: A worker process without work ends after this long, in seconds.
IDLE_SECONDS = 60.0
KINDS = ("thread", "process")
#: What is packed ahead of its turn: values of these types, and texts and bytes up to this length.
_PLAIN = frozenset({bool, int, float, complex, type(None)})
_TEXT_BOUND = 1024


def check_kind(kind: str) -> str:
    """Return the kind of a call if a pool has it.

    Raises
    ------
    UsageError
        If it is neither ``thread`` nor ``process``, or the system has no such processes.
    """
    if kind not in KINDS:
        raise UsageError(f"kind {kind!r} is unknown; give one of {', '.join(KINDS)}")
    if kind == "process" and not hasattr(select, "poll"):
        raise UsageError("kind='process' needs a POSIX system; use kind='thread' here")
    return kind


class RemoteTracebackError(Exception):
    """The traceback of an exception as it was in its worker process; the cause of the one raised here."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.text = text

    def __str__(self) -> str:
        return f'\n"""\n{self.text}"""'


class ProcessWorkers:
    """The worker processes of one pool: lent to one call at a time, kept warm, ended when idle.

    Parameters
    ----------
    idle_seconds
        How long a worker without work is kept; default ``IDLE_SECONDS``.

    Notes
    -----
    Nothing is started before the first call. There are never more workers than calls that run at
    once, and those are bounded by the pool's threads.
    """

    def __init__(self, idle_seconds: float = IDLE_SECONDS) -> None:
        self._idle_seconds = idle_seconds
        self._lock = threading.Lock()
        self._news = threading.Condition(self._lock)
        #: The warmest last.
        self._idle: list[WorkerProcess] = []
        self._busy: set[WorkerProcess] = set()
        self._reaper: threading.Thread | None = None
        self._closed = False
        tell_of_forks(self)

    def after_fork(self) -> None:
        """In a forked child: the workers are the parent's, and a thread that is not there may have held the lock."""
        self._lock = threading.Lock()
        self._news = threading.Condition(self._lock)
        self._idle, self._busy, self._reaper = [], set(), None

    def call(self, fn: Callable[..., Any]) -> ProcessCall:
        """Return a callable that runs ``fn`` in a worker process and returns, or raises, what it does."""
        return ProcessCall(self, fn)

    def pids(self) -> list[int]:
        """The process ids of the workers that are there, idle ones included."""
        with self._lock:
            return sorted(worker.pid for worker in (*self._idle, *self._busy))

    def lend(self) -> WorkerProcess:
        """Take an idle worker, or start one."""
        with self._lock:
            if self._idle:
                worker = self._idle.pop()
                self._busy.add(worker)
                return worker
        _hook_exit()
        worker = WorkerProcess()
        with self._lock:
            self._busy.add(worker)
        return worker

    def give_back(self, worker: WorkerProcess, *, reusable: bool) -> None:
        """Return a worker; one that is not to be used again is ended with all that it started."""
        with self._lock:
            self._busy.discard(worker)
            keep = reusable and not self._closed
            if keep:
                worker.idle_since = time.monotonic()
                self._idle.append(worker)
                if self._reaper is None:
                    self._reaper = threading.Thread(target=self._reap, name="wiseflow-reaper", daemon=True)
                    self._reaper.start()
        if not keep:
            if reusable:
                worker.end(time.monotonic() + END_SECONDS)
            worker.kill()

    def close(self) -> None:
        """End the idle workers; those that work end when their call does. May be called again."""
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
            self._news.notify_all()
        _end(idle)

    def release(self) -> None:
        """End the idle workers, a second at most; new ones start when there are calls again."""
        with self._lock:
            idle, self._idle = self._idle, []
            self._news.notify_all()
        _end(idle)

    def kill(self) -> None:
        """Kill every worker now; calls that run fail with ``WorkerLostError``."""
        self.close()
        with self._lock:
            busy = list(self._busy)
        for worker in busy:
            worker.strike()

    def _reap(self) -> None:
        while True:
            with self._lock:
                due = [item for item in self._idle if self._over(item)]
                if not due:
                    if not self._idle:
                        self._reaper = None
                        return
                    oldest = self._idle[0].idle_since
                    self._news.wait(max(0.01, oldest + self._idle_seconds - time.monotonic()))
                    continue
                self._idle = [item for item in self._idle if item not in due]
            _end(due)

    def _over(self, worker: WorkerProcess) -> bool:
        return time.monotonic() - worker.idle_since >= self._idle_seconds


class ProcessCall:
    """A function that runs in a worker process while the calling thread waits for it.

    What it cost is left in the context of the task it was called in (``remote``).

    While a call of a pool runs, the next one of the same function is handed ahead to the same worker,
    if all are busy and such calls are short: so a worker need not wait for the kernel between two.
    It stays queued, and whoever wants it (a thread that is free, a cancel) takes it back, until the
    worker begins it.
    """

    def __init__(self, workers: ProcessWorkers, fn: Callable[..., Any]) -> None:
        self._workers, self._fn = workers, fn
        self.__qualname__ = getattr(fn, "__qualname__", type(fn).__name__)
        #: The worker that was handed this call ahead of its turn, and the call as it was packed for it.
        self.worker: WorkerProcess | None = None
        self.sent = False
        self._packed = b""

    def __call__(self, /, *args: Any, **kwargs: Any) -> Any:
        work = _current.get()
        pooled = work if isinstance(work, PoolFuture) and work._fn is self else None
        context = current_task() or TaskContext("", self.__qualname__)
        if self.worker is None:
            context.check_cancelled()
        call = self._packed or _pack(context.name, self._fn, args, kwargs)
        self._packed = b""
        del args, kwargs
        try:
            worker, reply = self._run(context, pooled, call)
            while not reply.begun:  # a worker that had died while it was idle: nothing has run yet
                worker, reply = self._run(context, pooled, call)
        finally:
            del call  # an error's traceback would keep it
        context.remote = RemoteRun(
            source="unknown" if reply.lost or reply.forced else "process",
            cpu_seconds=reply.cpu_seconds,
            memory_peak_bytes=reply.peak_bytes,
            output_tail=reply.output,
            asked=reply.cancelled,
            forced=reply.forced,
            cleanup_failures=reply.cleanup_failures,
        )
        return _outcome(context, worker.pid, reply)

    def _run(self, context: TaskContext, work: PoolFuture[Any] | None, call: bytes) -> tuple[WorkerProcess, Reply]:
        worker, self.worker = self.worker, None
        if worker is None:
            worker = self._workers.lend()
            worker.start(context.task_id, context.name, context.attempt, call)
        me = None if work is None else work._crew.driver(work)
        reply = Reply()
        try:
            with context.token.telling(worker.stop):
                if work is None or me is None:
                    reply = worker.wait(context.progress, _nothing_ahead)
                else:
                    if worker.brisk and len(me.ahead) <= AHEAD_CALLS // 2 and not work._done_callbacks:
                        self._hand_ahead(work._crew, me, worker)
                    reply = worker.wait(context.progress, functools.partial(work._crew.take_back, me))
        finally:
            worker.rest()
            if work is None or me is None or not work._crew.go_on(me, well=reply.ok and reply.reusable):
                self._workers.give_back(worker, reusable=reply.reusable)
        return worker, reply

    def _hand_ahead(self, crew: Crew, me: Worker, worker: WorkerProcess) -> None:
        def fits(work: PoolFuture[Any]) -> bool:
            call = work._fn
            if type(call) is not ProcessCall or call._fn is not self._fn or call._workers is not self._workers:
                return False
            if not all(map(_is_plain, work._args)) or not all(map(_is_plain, (work._kwargs or {}).values())):
                return False  # packing it might take long, or run code of the user's
            call.worker = worker
            return True

        calls = []
        reserved = crew.reserve_ahead(me, AHEAD_CALLS - len(me.ahead), fits)
        for work in reserved:
            call, args, kwargs = work._fn, work._args, work._kwargs
            if type(call) is not ProcessCall:
                break  # taken back already, and over
            try:
                call._packed = call._packed or _pack(work._name, call._fn, args, kwargs or {})
            except UsageError:
                break  # it is told when its turn comes
            calls.append((call, f"p{work._number}", work._name, call._packed))
        sent = worker.start_ahead(calls) if calls else 0
        if sent < len(reserved):
            crew.give_up(me, reserved[sent:])

    @property
    def handed(self) -> bool:
        """Whether a worker has it that will begin it in its turn, or has begun it."""
        return self.worker is not None

    def take_back(self) -> bool:
        """Take back this call from the worker that it was handed ahead to; return whether that will not begin it."""
        worker = self.worker
        if worker is not None:
            worker.take_back(self)
        return self.worker is None

    def go_on(self, *, well: bool) -> None:
        """The call before has ended: this one's worker has begun it if that went well, and has not otherwise."""
        if self.worker is not None and well:
            self.worker.go_on(self)
        else:
            self.worker, self.sent = None, False


def _is_plain(value: Any) -> bool:
    kind = type(value)
    return kind in _PLAIN or ((kind is str or kind is bytes) and len(value) <= _TEXT_BOUND)


def _nothing_ahead() -> bool:
    return True


def _pack(name: str, fn: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bytes:
    try:
        return dump_call(fn, args, kwargs)
    except Exception as error:  # user's __reduce__ may raise anything
        raise UsageError(
            f"{call_culprit(fn, args, kwargs)} of {name!r} cannot be sent to a process: {error}; "
            "give plain data, make it inside the function, or use kind='thread'"
        ) from error


def _outcome(context: TaskContext, pid: int, reply: Reply) -> Any:
    if reply.forced:
        raise TaskCancelledError(f"{context.name!r} was asked to stop ({context.token.reason}); its process was killed")
    if reply.lost:
        error = WorkerLostError(
            f"the worker process {pid} of {context.name!r} died: {reply.lost}; nothing else was lost, retry it"
        )
        if reply.output:
            error.add_note(f"its last output:\n{reply.output}")
        raise error
    value = load(context.name, reply)
    reply.body = b""
    if reply.ok:
        return value
    value.__cause__ = RemoteTracebackError(reply.traceback)
    raise value


def _end(workers: list[WorkerProcess]) -> None:
    deadline = time.monotonic() + END_SECONDS
    for worker in workers:
        worker.ask_to_end()
    for worker in workers:
        worker.end(deadline)


_hooked = False


def _hook_exit() -> None:
    # Runs after the pools have had their time at the interpreter's end; should it never run, the
    # workers see that the kernel is gone by themselves.
    global _hooked
    if not _hooked:
        _hooked = True
        atexit.register(strike_all)
