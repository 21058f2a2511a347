"""One worker process as the kernel sees it: start it, give it a call, hear it, stop it, bury it.

Why not pebble or ``ProcessPoolExecutor``: a worker here needs a line of its own for progress, for
cancels and for its end, and must start without the user's main script being run again.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import select
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from wiseflow_nb.errors import UsageError, WorkerLostError
from wiseflow_nb.pool._process_stop import LOOK_SECONDS, StopPlan
from wiseflow_nb.pool._process_wire import BLOCK, FrameReader, block, frame, unread

#: What is kept of the output of one call, in bytes; the end is what tells most.
OUTPUT_KEPT = 8192
#: How long a worker that was told to end may take, in seconds.
END_SECONDS = 1.0
#: How long after its pipes a worker's process may end: on its way out it closes them first.
LAST_STEPS_SECONDS = 0.5
#: A call that is over this soon lets the next one be handed ahead, for as long, in seconds.
AHEAD_SECONDS = 0.001
#: How many calls are handed ahead to a worker at most.
AHEAD_CALLS = 8
#: A pipe's capacity; a larger buffer would be mapped and unmapped at each read.
_READ_BYTES = 1 << 16
_BOOT = (
    "import sys; sys.path.insert(0, sys.argv.pop(1)); "
    "from wiseflow_nb.pool._process_child import main; arguments, sys.argv[1:] = sys.argv[1:], []; "
    "main(arguments)"
)


class Ahead(Protocol):
    """A call that may be handed ahead; ``worker`` is who has it or is about to."""

    worker: WorkerProcess | None
    #: Whether it has been handed to that one.
    sent: bool


@dataclass(slots=True)
class Reply:
    """What came of one call; ``forced`` if the worker had to be killed, ``printed`` if output waits to be taken in."""

    ok: bool = False
    body: bytes = b""
    cpu_seconds: float = float("nan")
    peak_bytes: float = float("nan")
    cancelled: bool = False
    cleanup_failures: tuple[str, ...] = ()
    traceback: str = ""
    printed: bool = False
    output: str = ""
    forced: bool = False
    lost: str = ""
    begun: bool = True
    reusable: bool = False


class WorkerProcess:
    """A worker process and this end of its pipes. One thread at a time drives it; any may ``stop`` it.

    Raises
    ------
    WorkerLostError
        If the process cannot be started.
    """

    def __init__(self) -> None:
        self.idle_since = 0.0
        #: Whether its last call was over within ``AHEAD_SECONDS``.
        self.brisk = False
        #: The call that runs, and the last that was sent.
        self._serial = self._last = 0
        #: What was handed ahead and not taken back, guarded by the lock with the pipe's both ends. The lock is
        #: re-entrant: a finaliser that the collector runs at any step may cancel.
        self._ahead: list[tuple[Ahead, bytes]] = []
        self._pipe = threading.RLock()
        self._setup: tuple[str, list[str]] | None = None
        self._reader = FrameReader()
        self._tail = bytearray()
        self._lock = threading.Lock()
        self._buried = False
        self._reason = ""
        self._plan = StopPlan()
        self._unsent: bytes | memoryview = b""
        self._length = 0
        theirs: list[int] = []
        self._mine: list[int] = []
        try:
            for outward in (True, True, True, False, False):
                read, write = os.pipe()
                theirs.append(read if outward else write)
                self._mine.append(write if outward else read)
            self._tasks, self._control, _, self._results, self._output = self._mine
            self._back = _second_end(theirs[0])
            if self._back >= 0:
                self._mine.append(self._back)
            wake = os.pipe()
            self._mine += wake
            self._woken, self._wake = wake
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-c", _BOOT, _ROOT, *map(str, theirs[:4])],
                stdin=subprocess.DEVNULL,
                stdout=theirs[4],
                stderr=theirs[4],
                pass_fds=theirs[:4],
                # Jupyter interrupts the kernel's group; and a group of its own can be killed whole.
                start_new_session=True,
            )
        except (OSError, ValueError) as error:
            self._close_pipes()
            raise WorkerLostError(f"no worker process could be started: {error}; use kind='thread'") from error
        finally:
            for fd in theirs:
                os.close(fd)
        self.pid = self._process.pid
        for fd in (self._tasks, self._control, self._results, self._output, self._woken, self._wake):
            os.set_blocking(fd, False)
        self._poll = select.poll()
        for fd in (self._results, self._output, self._woken):
            self._poll.register(fd, select.POLLIN)
        _alive.add(self)
        _hook_fork()

    # -- one call ----------------------------------------------------------------------------

    def start(self, task_id: str, name: str, attempt: int, call: bytes) -> None:
        """Have a call run; ``wait`` tells what came of it."""
        known, directory, news = self._setup, _directory(), None
        if known is None or known[0] != directory or known[1] != sys.path:
            news = self._setup = (directory, list(sys.path))
        self._serial = self._last = self._last + 1
        self._unsent = data = block(frame((self._serial, task_id, name, attempt, news, 0), call))
        self._length = len(data)
        self._write()
        if self._unsent:
            self._poll.register(self._tasks, select.POLLOUT)

    def start_ahead(self, calls: Sequence[tuple[Ahead, str, str, bytes]]) -> int:
        """Put calls (who has them, task, name, pickle) where the worker finds them; return how many are there.

        The first that is for this worker no more, or too large, is left out with all that follow. A
        call that fails voids those behind it.
        """
        if self._back < 0 or self._unsent or self._length != BLOCK or self._setup != (_directory(), sys.path):
            return 0
        with self._pipe:
            pieces = []
            for ahead, task_id, name, call in calls:
                piece = block(frame((self._last + 1, task_id, name, 1, None, self._last), call))
                if len(piece) > BLOCK or ahead.worker is not self:
                    break
                # First noted, then written: whoever takes it back in between finds nothing to take back.
                self._last += 1
                ahead.sent = True
                self._ahead.append((ahead, piece))
                pieces.append(piece)
            if pieces:
                with contextlib.suppress(BrokenPipeError):
                    os.write(self._tasks, b"".join(pieces))  # the pipe has room for all that may be in it
            return len(pieces)

    def take_back(self, ahead: Ahead) -> None:
        """Undo ``start_ahead`` as far as the worker has not taken the calls, from any thread.

        What was taken back has no worker any more; what still has one has begun.
        """
        with self._pipe:
            if ahead.worker is not self:
                return
            if not ahead.sent:
                ahead.worker = None
                return
            sent, self._ahead = self._ahead, []
            data = (_read(self._back) or b"") if sent else b""
            back = min(len(data) // BLOCK, len(sent)) if data.endswith(sent[-1][1] if sent else b"") else 0
            for call, _ in sent[len(sent) - back :]:
                call.worker, call.sent = None, False
            self._last -= back
            data = data[: len(data) - back * BLOCK]
            if data:  # the worker has not even begun the call before
                os.write(self._tasks, data)

    def go_on(self, ahead: Ahead) -> None:
        """Let the call that was handed ahead be the one that ``wait`` is for; the one before has ended well."""
        with self._pipe:
            if self._ahead and self._ahead[0][0] is ahead:
                self._ahead.pop(0)
            self._serial += 1
            self._length = BLOCK

    def wait(self, on_progress: Callable[[float, str], None], left_alone: Callable[[], bool]) -> Reply:
        """Wait for the call that runs; return what came of it. Never raises for what the call does.

        ``left_alone()`` takes back what was handed ahead, if anything was. False tells that the
        worker has begun it: then the answer to this call is in the pipe, and the worker must not be
        stopped for it any more.
        """
        plan = self._plan = StopPlan()
        began = time.monotonic()
        late = past = False
        reply = self._take_in(b"", on_progress)  # it may have come with the last one
        while reply is None:
            seconds = LOOK_SECONDS
            if past:
                pass
            elif self._ahead and not late:
                seconds = began + AHEAD_SECONDS - time.monotonic()
                if seconds <= 0.0 or self._reason:
                    late = True
                    past = not left_alone()
                    continue
            elif plan.asked is not None:
                action, seconds = plan.due(time.monotonic())
                if action == "kill":
                    self.kill()
                    return self._end(Reply(forced=True, cancelled=True))
                if action == "interrupt":
                    plan.interrupted = True
                    with contextlib.suppress(OSError):
                        os.kill(self.pid, signal.SIGTERM)
            # A millisecond more: poll rounds down, and would come back a moment early.
            ready = self._poll.poll(seconds * 1000.0 + 1.0)
            if not ready and (late or not self._ahead) and self._dead():
                return self._end(self._lost())
            # Output is registered after the results and looked at before them: what was printed
            # before an answer was sent is taken in before the answer is.
            for fd, event in reversed(ready):
                if fd == self._results:
                    data = _read(fd)
                    if data is None:
                        left_alone()
                        return self._end(self._lost())
                    reply = self._take_in(data, on_progress)
                elif fd == self._output:
                    # The worker begins nothing as long as there is output to be taken in. If it has
                    # begun what was handed ahead all the same, this is that call's output.
                    past = past or not left_alone()
                    if past:
                        continue
                    if not self._drain_output() and event & (select.POLLHUP | select.POLLERR):
                        self._poll.unregister(fd)
                elif fd == self._tasks:
                    self._send_more()
                elif past or not left_alone():
                    past = True
                    self._forget_stop()
                else:
                    self._hear_stop()
        self.brisk = time.monotonic() - began < AHEAD_SECONDS
        if reply.printed and left_alone():
            self._drain_output()
        return self._end(reply)

    def _send_more(self) -> None:
        if not self._write() or not self._unsent:
            self._poll.unregister(self._tasks)

    def _write(self) -> bool:
        """Write as much as the pipe takes; return False if nobody will read it, which ``_hear`` will find too."""
        try:
            while left := self._unsent:
                written = os.write(self._tasks, left)
                self._unsent = b"" if written == len(left) else memoryview(left)[written:]
        except BlockingIOError:
            return True
        except OSError:
            return False
        return True

    def _take_in(self, data: bytes, on_progress: Callable[[float, str], None]) -> Reply | None:
        for header, body in self._reader.feed(data):
            what, serial, *rest = header
            if serial != self._serial:
                continue  # from a thread that an earlier call left behind
            if what == "progress":
                on_progress(*rest)
            elif what == "stopped":
                self._plan.stopped = time.monotonic()
            else:
                reply = Reply(rest[0], body, *rest[1:])
                # What was interrupted in the middle may have left anything half done.
                reply.reusable = not (self._plan.interrupted or self._unsent)
                return reply
        return None

    def _forget_stop(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.read(self._woken, 64)

    def _hear_stop(self) -> None:
        self._forget_stop()
        if self._reason and self._plan.asked is None:
            self._plan.asked = time.monotonic()
            with contextlib.suppress(OSError):
                # Far below PIPE_BUF: written whole or not at all.
                os.write(self._control, frame((self._serial, self._reason[:500])))

    def stop(self, reason: str) -> None:
        """Ask the call that runs to stop; from any thread, and without waiting."""
        with self._lock:
            if not self._buried and not self._reason:
                self._reason = reason or "cancelled"
                with contextlib.suppress(OSError):
                    os.write(self._wake, b"c")

    def _drain_output(self) -> bool:
        """Take in what the worker printed; return whether there was anything."""
        found = False
        while data := _read(self._output):
            found = True
            self._tail += data
            if len(self._tail) > 4 * OUTPUT_KEPT:
                del self._tail[:-OUTPUT_KEPT]
        return found

    def _end(self, reply: Reply) -> Reply:
        if self._tail:
            reply.output = bytes(self._tail[-OUTPUT_KEPT:]).decode("utf-8", "replace")
            self._tail.clear()
        return reply

    def rest(self) -> None:
        """Forget a stop that came too late; called when nobody can ``stop`` it any more."""
        with self._lock:
            if self._reason and not self._buried:
                self._forget_stop()
            self._reason = ""

    def _lost(self) -> Reply:
        # One that had served before and has read nothing of this call died while it was idle. A new
        # one that reads nothing cannot start at all: trying again would never end.
        begun = self._serial == 1 or unread(self._tasks) < self._length - len(self._unsent)
        ended = self._ended_within(LAST_STEPS_SECONDS)
        self.kill()
        code = self._process.returncode
        if not ended:
            told = "it closed its pipes while it still ran, and was killed for it; leave descriptors alone that are not yours"
        elif code is not None and code < 0:
            try:
                told = f"killed by {signal.Signals(-code).name}"
            except ValueError:
                told = f"killed by signal {-code}"
            if code == -signal.SIGKILL:
                told += " (by hand, or for want of memory)"
        else:
            told = f"exit code {code}"
        return Reply(lost=told, begun=begun)

    # -- life and death ----------------------------------------------------------------------

    def _dead(self) -> bool:
        # Not reaped here: as long as it is not, nobody else gets its number, and its group can be killed.
        try:
            return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
        except (AttributeError, ChildProcessError):
            return self._process.poll() is not None

    def _ended_within(self, seconds: float) -> bool:
        deadline = time.monotonic() + seconds
        while not self._dead():
            if time.monotonic() >= deadline:
                return False
            time.sleep(0.002)
        return True

    def strike(self) -> None:
        """Kill the process and everything that it started; from any thread. Whoever drives it buries it."""
        others = _descendants(self.pid)
        with self._lock:
            if self._buried:
                return  # its number may be another's by now
            with contextlib.suppress(OSError):
                os.killpg(self.pid, signal.SIGKILL)
            with contextlib.suppress(OSError):
                os.kill(self.pid, signal.SIGKILL)
            for process in others:
                with contextlib.suppress(Exception):  # gone already, or out of reach
                    process.kill()

    def kill(self) -> None:
        """Kill the process and everything that it started, and bury it; by whoever drives it."""
        if not self._buried:
            self.strike()
            self._bury()

    def ask_to_end(self) -> None:
        """Let an idle worker end by itself; ``end`` waits for that."""
        with self._lock, contextlib.suppress(OSError):
            if self._tasks in self._mine:
                self._mine.remove(self._tasks)
                os.close(self._tasks)

    def end(self, deadline: float) -> None:
        """Wait until an idle worker has ended, up to ``deadline`` (monotonic seconds), then kill it."""
        self.ask_to_end()
        self._ended_within(deadline - time.monotonic())
        self.kill()

    def _bury(self) -> None:
        try:
            self._process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            return  # in the middle of a system call that cannot be interrupted: it dies when that returns
        self._drain_output()
        with self._lock:
            self._buried = True
            self._close_pipes()
        _alive.discard(self)

    def _close_pipes(self) -> None:
        for fd in self._mine:
            with contextlib.suppress(OSError):
                os.close(fd)
        self._mine = []

    def _forget_in_child(self) -> None:
        """In a forked child of the kernel: these ends would hide the kernel's death from the worker."""
        self._close_pipes()
        self._buried = True
        self._process.returncode = 0

    def __repr__(self) -> str:
        return f"<WorkerProcess {self.pid}>"


def load(name: str, reply: Reply) -> Any:
    """The value, or the error as an exception, that a reply carries.

    Raises
    ------
    UsageError
        If it cannot be rebuilt here.
    """
    try:
        return pickle.loads(reply.body)
    except Exception as error:
        what = "result" if reply.ok else "error"
        raise UsageError(
            f"the {what} of {name!r} cannot be rebuilt here: {type(error).__name__}: {error}; return plain data"
        ) from error


def _read(fd: int) -> bytes | None:
    """What is there to read; empty if nothing is yet, None at the end."""
    try:
        return os.read(fd, _READ_BYTES) or None
    except BlockingIOError:
        return b""
    except OSError:
        return None


def _directory() -> str:
    try:
        return os.getcwd()
    except OSError:  # removed under us; the worker stays where it is
        return ""


def _second_end(fd: int) -> int:
    """Another end to read a pipe by, which does not wait; -1 where there is none, and so nothing to hand ahead.

    It is opened anew: whether a read waits is a property that duplicates share, and the worker's does.
    """
    if sys.platform != "linux" or select.PIPE_BUF < BLOCK:
        return -1
    try:
        import fcntl

        room = fcntl.fcntl(fd, fcntl.F_GETPIPE_SZ) // max(BLOCK, os.sysconf("SC_PAGE_SIZE"))
        if room <= AHEAD_CALLS:
            return -1
        return os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return -1


def _descendants(pid: int) -> list[Any]:
    # The group is killed whole; this is for what left it.
    import psutil

    try:
        return list(psutil.Process(pid).children(recursive=True))
    except psutil.Error:
        return []


_ROOT = str(Path(__file__).resolve().parents[2])
_alive: weakref.WeakSet[WorkerProcess] = weakref.WeakSet()
_hooked = False


def _hook_fork() -> None:
    global _hooked
    if not _hooked:
        _hooked = True
        os.register_at_fork(after_in_child=_forget_all)


def _forget_all() -> None:
    for worker in list(_alive):
        worker._forget_in_child()
    _alive.clear()


def strike_all() -> None:
    """Kill every worker of this process."""
    for worker in list(_alive):
        worker.strike()
