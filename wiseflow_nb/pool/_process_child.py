"""The worker process: takes one call at a time from a pipe, runs it, sends back what came of it.

It is started as a fresh interpreter (never a fork of a kernel full of threads) and runs nothing of
the user's but the calls: the user's main script is not imported. Its main thread runs the calls; one
further thread hears the cancels and notices the kernel's end.
"""

from __future__ import annotations

import contextlib
import faulthandler
import functools
import os
import pickle
import signal
import sys
import threading
import time
import traceback
from types import CoroutineType, FrameType
from typing import Any

from wiseflow_nb.context import CancelToken, TaskContext, enter_task, leave_task
from wiseflow_nb.errors import TaskCancelledError, TaskError, UsageError
from wiseflow_nb.pool._process_wire import BLOCK, PREFIX, culprit, dumps, frame, unread

with contextlib.suppress(ImportError):  # where it is missing there are no process tasks
    import resource

#: How often a worker without word from its kernel looks whether that is still its parent, in seconds.
PARENT_CHECK_SECONDS = 1.0
#: How often a worker with a call at hand looks whether the kernel has taken in what the last one printed.
HEARD_SECONDS = 0.0002


class Meter:
    """CPU time and peak memory of this process, from one call's beginning to its end."""

    def __init__(self) -> None:
        self._status = self._statm = self._reset = -1
        with contextlib.suppress(OSError):
            self._status = os.open("/proc/self/status", os.O_RDONLY | os.O_CLOEXEC)
            self._statm = os.open("/proc/self/statm", os.O_RDONLY | os.O_CLOEXEC)
            self._reset = os.open("/proc/self/clear_refs", os.O_WRONLY | os.O_CLOEXEC)
        self._page = os.sysconf("SC_PAGE_SIZE") if self._reset >= 0 else 0
        #: Page faults when they were last counted.
        self._faults = -1
        #: Resident bytes when the high-water mark was last reset; -1 if it was not.
        self._resident = -1
        #: CPU time at the start: of this process, and of the children that had been waited for.
        self._cpu = self._children = 0.0

    def begin(self) -> None:
        """Count CPU time from here, and let the high-water mark of resident memory begin anew."""
        self._cpu = time.process_time()
        self._children = _children_seconds()
        if self._reset >= 0:
            try:
                os.pwrite(self._reset, b"5", 0)  # Linux: 5 into clear_refs
                self._resident = int(os.pread(self._statm, 128, 0).split(None, 2)[1]) * self._page
            except (OSError, ValueError, IndexError):
                self._resident = -1

    def start(self) -> None:
        """Leave out the CPU time that this process has spent since ``begin``."""
        self._cpu = time.process_time()

    def cpu_seconds(self) -> float:
        """CPU time since the start, of all threads and of the children that were waited for."""
        return time.process_time() - self._cpu + _children_seconds() - self._children

    def peak_bytes(self) -> float:
        """The most resident memory since ``begin``; NaN where the system does not tell.

        No page becomes resident without a fault: where there was none since they were counted
        before, the most was at the beginning, and the long text that tells the high-water mark need
        not be made.
        """
        if self._resident >= 0:
            before, self._faults = self._faults, _page_faults()
            if self._faults == before:
                return float(self._resident)
            with contextlib.suppress(OSError, ValueError, IndexError):
                # Not ru_maxrss: across fork and exec that begins with the parent's own peak.
                text = os.pread(self._status, 4096, 0)
                return float(text.split(b"VmHWM:", 1)[1].split(None, 1)[0]) * 1024.0
        return float("nan")

    def close(self) -> None:
        """In a forked child these files would tell of the parent."""
        for fd in (self._status, self._statm, self._reset):
            if fd >= 0:
                os.close(fd)
        self._status = self._statm = self._reset = self._resident = -1


def _page_faults() -> int:
    if sys.platform == "win32":
        return 0
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_minflt + used.ru_majflt


def _children_seconds() -> float:
    if sys.platform == "win32":  # it has no counter of the children's time
        return 0.0
    spent = resource.getrusage(resource.RUSAGE_CHILDREN)
    return spent.ru_utime + spent.ru_stime


class Worker:
    """Serves the calls that come down one pipe until it ends.

    A call is taken out of the pipe in the moment in which it begins. One that the kernel has put
    there ahead of its turn it may take out again until then; whoever of the two reads it has it.
    """

    def __init__(self, tasks: int, control: int, lifeline: int, results: int) -> None:
        self._tasks, self._control, self._lifeline, self._results = tasks, control, lifeline, results
        #: The pipe of the output, whatever a task makes of descriptor 1.
        self._output = os.dup(1)
        self._send_lock = threading.Lock()
        self._meter = Meter()
        self._pid, self._parent = os.getpid(), os.getppid()
        self._thread = threading.get_ident()
        #: Guards what the listening thread shares with the main one.
        self._lock = threading.Lock()
        self._serial = 0
        self._token = CancelToken()
        #: The last word about a stop, which may come before the call that it is about.
        self._asked = (0, "")
        #: The call that failed last: what was handed ahead behind it is not run, the kernel cleans up first.
        self._failed = 0
        #: Whether the last call's output had not all been taken in when it ended.
        self._printed = False
        # Read by the signal handler on the main thread; plain flags, since a handler must take no lock.
        self._in_code = self._sending = self._stop_due = False

    def main(self) -> None:
        """Serve until the kernel closes the pipe."""
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, self._on_term)
        faulthandler.enable(file=2)
        die_with_parent(self._lifeline)
        os.register_at_fork(after_in_child=self._forked)
        threading.Thread(target=self._listen, name="wiseflow-control", daemon=True).start()
        while (taken := self._take()) is not None:
            (serial, task_id, name, attempt, setup, after), call = taken
            if after and after == self._failed:
                self._failed = serial
                continue
            self._failed = 0
            if setup is not None:
                sys.path[:] = setup[1]
                with contextlib.suppress(OSError):
                    os.chdir(setup[0])
            token = CancelToken()
            with self._lock:
                self._serial, self._token = serial, token
                if self._asked[0] == serial:
                    token.cancel(self._asked[1])
            progress = functools.partial(self._progress, serial)
            self._serve(serial, TaskContext(task_id, name, attempt, token, progress), call)

    def _take(self) -> tuple[tuple[Any, ...], bytes | memoryview] | None:
        """Wait for the next call and take it; None when the kernel has closed the pipe."""
        if self._printed:
            self._wait_until_heard()
        data = os.read(self._tasks, BLOCK)
        while len(data) < BLOCK:  # the first piece of a large one
            more = os.read(self._tasks, BLOCK - len(data))
            if not more:
                return None
            data += more
        head, body = PREFIX.unpack_from(data)
        start = PREFIX.size + head
        end = start + body
        if end <= BLOCK:
            return pickle.loads(data[PREFIX.size : start]), data[start:end]
        whole = bytearray(end)
        whole[:BLOCK] = data
        left = memoryview(whole)[BLOCK:]
        while left:
            count = os.readv(self._tasks, [left])
            if not count:
                return None
            left = left[count:]
        return pickle.loads(memoryview(whole)[PREFIX.size : start]), memoryview(whole)[start:]

    def _wait_until_heard(self) -> None:
        """Begin nothing as long as the last call's output could be taken for the next one's."""
        import select

        poll = select.poll()
        poll.register(self._tasks, select.POLLIN)
        while unread(self._output):
            # As long as nobody drives this worker, nobody takes it in either.
            if not poll.poll()[0][1] & select.POLLIN:
                return  # the end
            time.sleep(HEARD_SECONDS)

    # -- one call ----------------------------------------------------------------------------

    def _progress(self, serial: int, fraction: float, text: str) -> None:
        self._send(("progress", serial, fraction, text))

    def _serve(self, serial: int, context: TaskContext, call: bytes | memoryview) -> None:
        name = context.name
        value, error, cpu_seconds = self._call(context, call)
        peak = self._meter.peak_bytes()
        cancelled = context.cancelled
        failures: tuple[str, ...] = ()
        if error is not None or cancelled:
            handlers = context.take_cleanups()
            if handlers:
                self._send(("stopped", serial))
                failures = _clean_up(context, handlers)
        ok, body, text = True, b"", ""
        if error is None:
            try:
                body = dumps(value)
            except Exception as refused:  # noqa: BLE001  user's __reduce__: the task fails, the worker goes on
                error = UsageError(
                    f"{culprit(f'the result of {name!r}', value)} cannot be sent back from its process: {refused}; "
                    "return plain data, or use kind='thread'"
                )
        if error is not None:
            self._failed = serial
            ok, (body, text) = False, _pack_error(name, error)
        value = error = None
        _flush(sys.stdout)
        _flush(sys.stderr)
        self._printed = unread(self._output) > 0
        told = (cancelled, failures, text, self._printed) if cancelled or failures or text or self._printed else ()
        self._send(("result", serial, ok, cpu_seconds, peak, *told), body)

    def _call(self, context: TaskContext, call: bytes | memoryview) -> tuple[Any, BaseException | None, float]:
        value, error = None, None
        entered = enter_task(context)
        self._meter.begin()
        try:
            fn, args, kwargs = _load_call(context.name, call)
            self._meter.start()
            self._in_code = True
            value = fn(*args, **kwargs)
            if isinstance(value, CoroutineType):
                import asyncio

                value = asyncio.run(value)
            self._in_code = False
        except BaseException as caught:  # noqa: BLE001  user code: sent to the kernel
            self._in_code = False
            error = caught
        self._stop_due = False
        cpu_seconds = self._meter.cpu_seconds()
        leave_task(entered)
        return value, error, cpu_seconds

    def _on_term(self, number: int, at: FrameType | None) -> None:
        # The kernel sends this to code that did not look at its token, shortly before it kills.
        if os.getpid() != self._pid:
            # Sent to a child of the task's own in the moment of its fork.
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGTERM)
        elif self._sending:
            self._stop_due = True  # half a frame must not be left in the pipe
        elif self._in_code:
            self._in_code = False  # once: what unwinds is not interrupted again
            raise TaskCancelledError(f"the task was asked to stop: {self._token.reason or 'terminated'}")

    def _send(self, header: tuple[Any, ...], body: bytes = b"") -> None:
        data: bytes | memoryview = frame(header, body)
        mine = threading.get_ident() == self._thread
        with self._send_lock:
            self._sending = self._sending or mine
            try:
                while (written := os.write(self._results, data)) < len(data):
                    data = memoryview(data)[written:]
            except OSError:
                os._exit(0)  # nobody listens any more
            finally:
                self._sending = self._sending and not mine
        if mine and self._stop_due:
            self._stop_due = False
            self._on_term(signal.SIGTERM, None)

    # -- beside the calls --------------------------------------------------------------------

    def _listen(self) -> None:
        import select

        while True:
            ready, _, _ = select.select([self._control], [], [], PARENT_CHECK_SECONDS)
            if not ready:
                if os.getppid() != self._parent:
                    end_with_group()
                continue
            # Each message is far below PIPE_BUF, and so is read as it was written.
            prefix = os.read(self._control, PREFIX.size)
            if len(prefix) < PREFIX.size:
                end_with_group()
            head, _ = PREFIX.unpack(prefix)
            serial, reason = pickle.loads(os.read(self._control, head))
            with self._lock:
                self._asked = (serial, reason)
                if serial == self._serial:
                    self._token.cancel(reason)

    def _forked(self) -> None:
        # A child of the task's own. It must die of a SIGTERM as usual (multiprocessing ends its workers
        # so), and an end of a pipe held here would hide this worker's death.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        self._meter.close()
        for fd in (self._tasks, self._control, self._lifeline, self._results, self._output):
            with contextlib.suppress(OSError):
                os.close(fd)


def die_with_parent(lifeline: int) -> None:
    """Have the system kill this process group the moment the kernel is gone, whatever runs here.

    Nothing is ever written into the lifeline: the only thing that can happen to it is its end, when
    the kernel that holds the other end dies. Linux can signal that, to a whole group, with a signal
    of choice (fcntl(2): F_SETOWN, F_SETSIG, O_ASYNC). A thread that waits for the end would wait for
    the GIL as well, which one long call into C does not give. Not PR_SET_PDEATHSIG: that fires when
    the *thread* ends that started this process. Elsewhere the listening thread has to do.
    """
    try:
        import fcntl

        fcntl.fcntl(lifeline, fcntl.F_SETOWN, -os.getpgrp())
        fcntl.fcntl(lifeline, fcntl.F_SETSIG, signal.SIGKILL)
        fcntl.fcntl(lifeline, fcntl.F_SETFL, fcntl.fcntl(lifeline, fcntl.F_GETFL) | os.O_ASYNC)
    except (ImportError, AttributeError, OSError):
        return


def end_with_group() -> None:
    """End this process and what it started, at once."""
    with contextlib.suppress(OSError):
        os.killpg(0, signal.SIGKILL)
    os._exit(1)


def _load_call(name: str, call: bytes | memoryview) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    try:
        fn, args, kwargs = pickle.loads(call)
    except Exception as error:
        raise UsageError(
            f"the call of {name!r} cannot be rebuilt in its process: {type(error).__name__}: {error}; "
            "what it names must be importable there"
        ) from error
    return fn, args, kwargs


def _pack_error(name: str, error: BaseException) -> tuple[bytes, str]:
    """A pickle of the error that is known to load, and its traceback as text, without this module's frames."""
    shown = error.__traceback__
    while shown is not None and shown.tb_frame.f_code.co_filename == __file__:
        shown = shown.tb_next
    try:
        text = "".join(traceback.format_exception(type(error), error, shown))
    except Exception:  # noqa: BLE001  user's __str__
        text = f"{type(error).__name__} (its traceback could not be made)"
    try:
        body = dumps(error.with_traceback(None))
        if not isinstance(pickle.loads(body), BaseException):
            raise TypeError("it is rebuilt as something else")
    except Exception as refused:  # noqa: BLE001  user's __reduce__ or __init__
        kind = f"{type(error).__module__}.{type(error).__qualname__}"
        line = text.strip().splitlines()[-1]
        body = dumps(
            TaskError(
                f"{name!r} raised {kind}, which cannot be sent back from its process ({refused}): {line}; "
                "give all of its arguments to super().__init__"
            )
        )
    return body, text


def _clean_up(context: TaskContext, handlers: list[Any]) -> tuple[str, ...]:
    failures = []
    entered = enter_task(context)
    for handler, args, kwargs in handlers:
        try:
            outcome = handler(*args, **kwargs)
            if isinstance(outcome, CoroutineType):
                import asyncio

                asyncio.run(outcome)
        except BaseException as error:  # noqa: BLE001  user code: told to the kernel, masks nothing
            told = getattr(handler, "__qualname__", type(handler).__name__)
            failures.append(f"cleanup {told} failed: {type(error).__name__}: {error}")
            with contextlib.suppress(Exception):
                traceback.print_exc()
    leave_task(entered)
    return tuple(failures)


def _flush(stream: Any) -> None:
    try:
        stream.flush()
    except Exception:  # noqa: BLE001  user code may have put anything there, or closed it
        return


def main(arguments: list[str]) -> None:
    """Run a worker over the inherited pipes whose numbers are given."""
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            # By line: the tail of a worker that is killed is all that tells of its end.
            reconfigure(line_buffering=True, errors="backslashreplace")
    tasks, control, lifeline, results = (int(item) for item in arguments)
    for fd in (tasks, control, lifeline, results):
        os.set_inheritable(fd, False)
    Worker(tasks, control, lifeline, results).main()
