"""The kernel's end: starts the recorder, hands it records, hears its alerts and commands.

The hot path is one append. A thread encodes and writes in batches; a batch stays here until the
recorder has committed it, so a recorder that dies is replaced and loses nothing that was handed in.
"""

from __future__ import annotations

import collections
import contextlib
import itertools
import logging
import os
import select
import sqlite3
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

from wiseflow_nb.clock import SYSTEM_CLOCK, Clock
from wiseflow_nb.errors import RecorderError, WiseflowError
from wiseflow_nb.recorder._child import child_environment, widen
from wiseflow_nb.recorder._end import mark_end
from wiseflow_nb.recorder._rows import batch_line
from wiseflow_nb.recorder._silence import Silence
from wiseflow_nb.recorder.protocol import RecorderConfig, RecorderSettings, decode, encode
from wiseflow_nb.records import (
    AlertTransition,
    CommandResult,
    EventRecord,
    Sample,
    TaskRecord,
    TaskTransition,
    from_json_dict,
    to_json_dict,
)
from wiseflow_nb.store.paths import LOG_NAME

logger = logging.getLogger("wiseflow_nb.recorder")
PENDING_LIMIT_BYTES = 8 * 1024 * 1024
PENDING_LIMIT_ROWS = 200_000
COALESCE_SECONDS = 0.05
#: A start that must be on record before user code runs is written through, unless this was just done.
WRITE_THROUGH_SECONDS = 0.001
READY_SECONDS = 15.0
#: More recorders than this within the window have ended: something here ends them, and it is given up.
MOST_RESTARTS = 3
RESTART_WINDOW_SECONDS = 60.0
_KEYED = {"cell": "cell_id", "meta": "key"}
_TROUBLES = frozenset({"store_failed", "store_deleted", "recorder_failed", "recorder_fallback", "rows_dropped"})
_MENDED = frozenset({"store_recovered", "store_remade"})

CommandHandler = Callable[[str, dict[str, Any], str], CommandResult]


class RecorderClient:
    """Start, feed and hear one recorder.

    Parameters
    ----------
    config
        What to record and where.
    in_process
        Run the recorder on a thread of this process instead (by setting; also the fall-back).
    on_alert, on_event
        Called on the listening thread with each alert transition and event of the recorder.
    on_command
        Called on the listening thread with (verb, arguments, who); its result goes back.
    """

    def __init__(
        self,
        config: RecorderConfig,
        *,
        on_alert: Callable[[AlertTransition], None],
        on_event: Callable[[EventRecord], None],
        on_command: CommandHandler,
        in_process: bool = False,
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        self._config = config
        self._on_alert, self._on_event, self._on_command = on_alert, on_event, on_command
        self._clock = clock
        self._in_process = in_process
        self.limit_source = ""
        self.pid = 0
        self.dropped_rows = 0
        self.unwritable_rows = 0
        self.restarts = 0
        #: What is wrong with the recording now, for people; empty when all is well.
        self.trouble = ""
        self._silent_trouble = ""
        self._restarted: collections.deque[float] = collections.deque(maxlen=MOST_RESTARTS + 1)
        #: Clear while a recorder is being replaced.
        self._settled = threading.Event()
        self._settled.set()
        self._vanished = False
        self._silence = Silence()
        self._pending: collections.deque[tuple[str, Any]] = collections.deque(maxlen=PENDING_LIMIT_ROWS)
        self._wake = threading.Event()
        self._soon: Callable[[], None] | None = None
        self._flush_lock = threading.Lock()
        self._write_lock = threading.Lock()
        self._buffer = bytearray()
        self._unacked: collections.deque[tuple[int, bytes]] = collections.deque()
        self._unacked_bytes = 0
        self._seq = 0
        self._numbers = itertools.count(1)
        self._answers: dict[int, CommandResult | None] = {}
        self._answered = threading.Condition()
        self._ready = threading.Event()
        self._ended = threading.Event()
        self._stopping = False
        self._busy = False
        self._last_flush = -1.0
        self._fd = -1
        self._process: subprocess.Popen[bytes] | None = None
        self._threads: list[threading.Thread] = []

    @property
    def mode(self) -> str:
        """``process`` or ``thread``."""
        return "thread" if self._process is None else "process"

    def start(self) -> None:
        """Start the recorder and wait until it is ready.

        Raises
        ------
        RecorderError
            If it runs neither in a process nor on a thread.
        """
        _clients.add(self)
        _register_fork_hook()
        self._change()
        self._launch()
        flusher = threading.Thread(target=self._flush_loop, name="wiseflow-flush", daemon=True)
        flusher.start()
        self._threads.append(flusher)

    # The hot path and what it feeds.

    def put(self, table: str, record: Any) -> None:
        """Hand in a record (or a dict, or what gives a ``record`` when it is written) for a table; one append, never blocks."""
        self._pending.append((table, record))
        if not self._wake.is_set():
            self._wake.set()

    def put_meta(self, key: str, encoded_value: str) -> None:
        """Hand in one value (JSON text) of the meta table."""
        self.put("meta", {"key": key, "value": encoded_value})

    def write_through(self) -> None:
        """Push what waits into the pipe now, from this thread: something is about to start."""
        if self._clock.monotonic() - self._last_flush > WRITE_THROUGH_SECONDS:
            self.flush()

    def soon(self, change: Callable[[], None]) -> None:
        """Call this on the flushing thread, or before what is asked for sooner; only the last that was given.

        So many changes in a row are told once. Never by ``write_through``, whose caller may hold locks.
        """
        self._soon = change
        self._wake.set()

    def _change(self) -> None:
        change, self._soon = self._soon, None
        if change is not None:
            change()

    def flush(self) -> None:
        """Encode what waits and write as much of it as the pipe takes; never blocks."""
        if not self._flush_lock.acquire(blocking=False):
            # Another thread is at it, and may have passed ours by: the flushing thread comes again.
            self._wake.set()
            return
        try:
            self._encode_pending()
            self._last_flush = self._clock.monotonic()
        finally:
            self._flush_lock.release()
        self._pump()

    def _encode_pending(self) -> None:
        take = self._pending.popleft
        # Of a row only the newest state is worth writing; each transition is.
        tasks: dict[str, Any] = {}
        transitions: list[TaskTransition] = []
        rows: dict[Any, tuple[str, Any]] = {}
        for number in range(len(self._pending)):
            table, record = take()
            if table == "transition":
                transitions.append(record)
            elif table == "task":
                tasks[record.task_id] = record
            elif key := _KEYED.get(table):
                name = record[key] if isinstance(record, dict) else getattr(record, key)
                rows[(table, name)] = (table, record)
            else:
                rows[number] = (table, record)
        count = len(rows) + len(tasks) + len(transitions)
        if not count:
            return
        if self._unacked_bytes > PENDING_LIMIT_BYTES:
            self._dropped(count)
            return
        self._seq += 1
        # Of what changes often the record is made here, once a batch.
        records: list[TaskRecord] = [getattr(item, "record", item) for item in tasks.values()]
        line, unwritable = batch_line(self._seq, rows.values(), records, transitions)
        if unwritable:
            self._unwritable(unwritable)
        with self._write_lock:
            self._unacked.append((self._seq, line))
            self._unacked_bytes += len(line)
            self._buffer += line

    def _send(self, message: Mapping[str, Any]) -> None:
        with self._write_lock:
            self._buffer += encode(message)
        self._pump()

    def _pump(self) -> None:
        with self._write_lock:
            while self._buffer and self._fd >= 0:
                try:
                    written = os.write(self._fd, self._buffer[:65536])
                except BlockingIOError:
                    self._wake.set()
                    return
                except OSError:
                    return  # the listening thread sees the end and restarts
                del self._buffer[:written]

    def _flush_loop(self) -> None:
        while not self._ended.is_set():
            self._wake.wait(1.0)
            if self._wake.is_set():
                self._wake.clear()
                self._ended.wait(COALESCE_SECONDS)
                self._change()
                self.flush()
                if self._buffer and self._fd >= 0 and os.name == "posix":
                    with contextlib.suppress(OSError, ValueError):
                        select.select([], [self._fd], [], 0.2)

    # Requests.

    def set_busy(self, busy: bool) -> None:
        """Tell whether a cell or a task runs: the sampling follows."""
        if busy != self._busy:
            self._busy = busy
            self._send({"t": "busy", "value": busy})

    def configure(self, settings: RecorderSettings) -> None:
        """Send new settings."""
        self._config = replace(self._config, settings=settings)
        self._send({"t": "configure", "rev": settings.revision, "settings": to_json_dict(settings)})

    def request(self, verb: str, arguments: dict[str, Any], timeout: float = 2.0) -> CommandResult:
        """Ask the recorder itself for ``watch``, ``acknowledge`` or ``silence``."""
        self._change()
        number = next(self._numbers)
        return self._ask(number, {"t": "verb", "id": number, "verb": verb, "arguments": arguments}, timeout)

    def sync(self, timeout: float = 2.0) -> bool:
        """Wait until all that was handed in is committed; return whether that was so in time."""
        self._change()
        with self._flush_lock:
            self._encode_pending()
        number = next(self._numbers)
        return self._ask(number, {"t": "sync", "id": number}, timeout).ok

    def _ask(self, number: int, message: dict[str, Any], timeout: float) -> CommandResult:
        with self._answered:
            self._answers[number] = None
        self._send(message)
        with self._answered:
            self._answered.wait_for(lambda: self._answers[number] is not None or self._ended.is_set(), timeout)
            answer = self._answers.pop(number)
        return answer or CommandResult(False, "the recorder did not answer in time")

    def stop(self, reason: str = "", timeout: float = 5.0) -> bool:
        """End the session's record in order; return whether the recorder said that it did."""
        if self._stopping:
            return self._ended.is_set()
        self._change()
        with self._flush_lock:
            self._encode_pending()
        # One that is being replaced takes the end when it is there.
        self._settled.wait(READY_SECONDS)
        self._stopping = True
        self._send({"t": "end", "reason": reason})
        deadline = self._clock.monotonic() + timeout
        while self._buffer and self._clock.monotonic() < deadline and not self._ended.is_set():
            self._pump()
            self._ended.wait(0.01)
        in_order = self._ended.wait(max(0.0, deadline - self._clock.monotonic())) and not self._vanished
        self._ended.set()
        self._wake.set()
        self._close_pipe()
        if self._process is not None:
            try:
                self._process.wait(timeout if in_order else 0.5)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        if not in_order:
            mark_end(self._config.directory, list(self._unacked), reason, self._clock.time())
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(timeout)
        _clients.discard(self)
        return in_order

    def look(self, sample: Sample | None, interval: float) -> None:
        """Given the newest sample and the interval in force (seconds), tell once of a recorder that takes none any more."""
        if not self._ready.is_set() or not self._settled.is_set() or self._stopping:
            self._silence.pause()  # one that ended or is being replaced is told of elsewhere
            return
        newest = None if sample is None else sample.monotonic_seconds
        turn = self._silence.look(now=self._clock.monotonic(), newest=newest, interval=interval)
        if turn is not None:
            kind, text = self._silence.event(turn, self.pid)
            if turn and not self.trouble:
                self.trouble = self._silent_trouble = text
            elif not turn and self.trouble == self._silent_trouble:
                self.trouble = ""
            self._notice(kind, text)

    # Starting, hearing, restarting.

    def _launch(self) -> None:
        self._ready.clear()
        started = not self._in_process and self._launch_process()
        if started and not self._wait_ready():
            assert self._process is not None
            self._process.kill()
            self._process.wait()
            started = False
        if not started:
            if not self._in_process:
                self._in_process = True
                self._notice(
                    "recorder_fallback", "the recorder cannot run in a process of its own: it runs on a thread"
                )
            self._close_pipe()
            self._process = None
            self._launch_thread()
            if not self._ready.wait(READY_SECONDS):
                raise RecorderError(f"the recorder does not start; see {self._config.directory}/{LOG_NAME}")

    def _wait_ready(self) -> bool:
        deadline = self._clock.monotonic() + READY_SECONDS
        while not self._ready.wait(0.1):
            ended = self._process is not None and self._process.poll() is not None
            if ended or self._clock.monotonic() > deadline:
                return self._ready.is_set()
        return True

    def _launch_process(self) -> bool:
        config = replace(self._config, own_process=True)
        if not sys.executable:
            return False
        try:
            flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | getattr(os, "O_NOFOLLOW", 0)
            log = os.open(Path(config.directory) / LOG_NAME, flags, 0o600)
            try:
                if hasattr(os, "fchmod"):
                    os.fchmod(log, 0o600)
                self._process = subprocess.Popen(
                    [sys.executable, "-P", "-m", "wiseflow_nb.recorder"],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    start_new_session=True,
                    env=child_environment(),
                    bufsize=0,
                )
            finally:
                os.close(log)
        except (OSError, ValueError) as error:
            logger.warning("the recorder's process cannot be started: %s", error)
            return False
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        fd = os.dup(self._process.stdin.fileno())
        self._process.stdin.close()
        self._open_pipe(fd, config)
        self._listen(os.fdopen(os.dup(self._process.stdout.fileno()), "rb"), self._process)
        self._process.stdout.close()
        return True

    def _launch_thread(self) -> None:
        from wiseflow_nb.recorder.run import run

        config = replace(self._config, own_process=False)
        to_read, to_write = os.pipe()
        from_read, from_write = os.pipe()

        def record() -> None:
            with os.fdopen(to_read, "rb") as incoming, os.fdopen(from_write, "wb") as outgoing:
                incoming.readline()
                try:
                    run(config, incoming, outgoing, clock=self._clock)
                except (WiseflowError, sqlite3.Error):
                    logger.exception("the recorder's thread ended")

        thread = threading.Thread(target=record, name="wiseflow-recorder", daemon=True)
        self._open_pipe(to_write, config)
        thread.start()
        self._threads.append(thread)
        self._listen(os.fdopen(from_read, "rb"), None)

    def _open_pipe(self, fd: int, config: RecorderConfig) -> None:
        with contextlib.suppress(OSError, AttributeError):
            os.set_blocking(fd, False)
        widen(fd)
        with self._write_lock:
            self._fd = fd
            self._buffer = bytearray(encode({"t": "config", "config": to_json_dict(config)}))
            for _, line in self._unacked:
                self._buffer += line
            if self._busy:
                self._buffer += encode({"t": "busy", "value": True})
        self._pump()

    def _close_pipe(self) -> None:
        with self._write_lock:
            fd, self._fd = self._fd, -1
        if fd >= 0:
            with contextlib.suppress(OSError):
                os.close(fd)

    def _listen(self, stream: BinaryIO, process: subprocess.Popen[bytes] | None) -> None:
        thread = threading.Thread(target=self._hear, args=(stream, process), name="wiseflow-listen", daemon=True)
        thread.start()
        self._threads.append(thread)

    def _hear(self, stream: BinaryIO, process: subprocess.Popen[bytes] | None) -> None:
        with stream:
            for line in stream:
                try:
                    message = decode(line)
                except RecorderError:
                    logger.warning("a line from the recorder was not understood")
                    continue
                if message["t"] == "ended" and not self._stopping:
                    break  # it took this process for gone: another one goes on
                if message["t"] == "ended":
                    self._ended.set()
                    with self._answered:
                        self._answered.notify_all()
                    return
                try:
                    self._hear_one(message)
                except (WiseflowError, ValueError, TypeError, KeyError):
                    logger.exception("a message from the recorder was not understood")
        if self._ended.is_set() or not self._ready.is_set() or process is not self._process:
            return
        if self._stopping:
            # It ended without saying so: its end mark is written here, and what it had not committed.
            self._vanished = True
            self._ended.set()
        else:
            self._restart()

    def _hear_one(self, message: dict[str, Any]) -> None:
        kind = message["t"]
        if kind == "ack":
            with self._write_lock:
                while self._unacked and self._unacked[0][0] <= message["seq"]:
                    self._unacked_bytes -= len(self._unacked.popleft()[1])
        elif kind == "alert":
            self._on_alert(from_json_dict(AlertTransition, message["alert"]))
        elif kind == "event":
            event = from_json_dict(EventRecord, message["event"])
            self._note_trouble(event)
            self._on_event(event)
        elif kind == "command":
            result = self._on_command(message["verb"], message["arguments"], message["who"])
            # What the command changed is on record before its sender hears of it.
            self.flush()
            self._send({"t": "answer", "id": message["id"], "ok": result.ok, "message": result.message})
        elif kind in ("answer", "synced"):
            with self._answered:
                if message["id"] in self._answers:
                    ok = bool(message.get("ok", True))
                    self._answers[message["id"]] = CommandResult(ok, str(message.get("message", "")))
                    self._answered.notify_all()
        elif kind == "ready":
            self.pid = int(message["pid"])
            self.limit_source = str(message["limit_source"])
            self._ready.set()

    def _restart(self) -> None:
        self.restarts += 1
        now = self._clock.monotonic()
        self._restarted.append(now)
        recent = sum(now - moment < RESTART_WINDOW_SECONDS for moment in self._restarted)
        if recent > MOST_RESTARTS:
            self._ready.clear()
            self._notice("recorder_failed", "nothing is recorded any more: the recorder ended again and again")
            return
        self._settled.clear()
        self._close_pipe()
        how = ""
        if self._process is not None:
            code = self._process.wait()
            how = f" (signal {-code})" if code < 0 else f" (exit code {code})"
        self._config = replace(self._config, resume=True)
        self._in_process = self._in_process or recent > 1
        text = f"the recorder ended unexpectedly{how} and is started again; what it misses is told when it is back"
        self._notice("recorder_restarted", text)
        # On a thread of its own: launching waits for a message that this thread would have to hear.
        threading.Thread(target=self._relaunch, name="wiseflow-relaunch", daemon=True).start()

    def _relaunch(self) -> None:
        try:
            self._launch()
        except RecorderError as error:
            self._notice("recorder_failed", f"nothing is recorded any more: {error}")
        finally:
            self._settled.set()

    def _dropped(self, count: int) -> None:
        first = self.dropped_rows == 0
        self.dropped_rows += count
        if first:
            text = (
                "the recorder does not keep up, and the first rows were dropped: over "
                f"{PENDING_LIMIT_BYTES >> 20} MB wait for it"
            )
            # Not from here: a subscriber may hand in rows, and this thread holds the lock for that.
            threading.Thread(
                target=self._notice, args=("rows_dropped", text), name="wiseflow-notice", daemon=True
            ).start()

    def _unwritable(self, count: int) -> None:
        first = self.unwritable_rows == 0
        self.unwritable_rows += count
        if first:
            text = "a row holds what cannot be recorded, and was left out; further ones are counted only"
            threading.Thread(
                target=self._notice, args=("rows_unwritable", text), name="wiseflow-notice", daemon=True
            ).start()

    def _note_trouble(self, event: EventRecord) -> None:
        if event.kind in _TROUBLES:
            self.trouble = event.message
        elif event.kind in _MENDED:
            self.trouble = ""

    def _notice(self, kind: str, message: str) -> None:
        logger.warning("%s", message)
        event = EventRecord(self._clock.time(), kind, message)
        self._note_trouble(event)
        self.put("event", event)
        self._on_event(event)

    def _forget_in_child(self) -> None:
        """In a forked child: the pipe is the parent's, and would keep its end from being seen."""
        with contextlib.suppress(OSError):
            if self._fd >= 0:
                os.close(self._fd)
        self._fd = -1
        self._stopping = True
        self._ended.set()


_clients: weakref.WeakSet[RecorderClient] = weakref.WeakSet()
_hooked = False


def _register_fork_hook() -> None:
    global _hooked
    if not _hooked and hasattr(os, "register_at_fork"):
        _hooked = True
        os.register_at_fork(after_in_child=_forget_all)


def _forget_all() -> None:
    for client in list(_clients):
        client._forget_in_child()
