"""The kernel's end: starts the recorder, hands it records, hears its alerts and commands.

The hot path is one append. A thread encodes and writes in batches; a batch stays here until the
recorder has committed it, so a recorder that dies is replaced and loses nothing that was handed in.
"""

from __future__ import annotations

import itertools
import logging
import math
import subprocess
import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from wiseflow_nb.clock import SYSTEM_CLOCK, Clock
from wiseflow_nb.errors import RecorderError, WiseflowError
from wiseflow_nb.forks import tell_no_more, tell_of_forks
from wiseflow_nb.recorder._end import mark_end
from wiseflow_nb.recorder._launch import PASSING, Started, start_process, start_thread
from wiseflow_nb.recorder._outbox import Outbox
from wiseflow_nb.recorder._restarts import Restarts
from wiseflow_nb.recorder._silence import Silence
from wiseflow_nb.recorder._wire import Wire
from wiseflow_nb.recorder.protocol import RecorderConfig, RecorderSettings, decode, encode
from wiseflow_nb.records import (
    AlertTransition,
    CommandResult,
    EventRecord,
    Sample,
    from_json_dict,
    to_json_dict,
)
from wiseflow_nb.store.paths import DATABASE_NAME, LOG_NAME, in_memory, private_directory

logger = logging.getLogger("wiseflow_nb.recorder")
COALESCE_SECONDS = 0.05
#: A start that must be on record before user code runs is written through, unless this was just done.
WRITE_THROUGH_SECONDS = 0.001
READY_SECONDS = 15.0
#: How long the end waits at most for a recorder that takes what waits.
DRAIN_SECONDS = 30.0
#: What an event says about the recording as a whole, and by which one it is over.
_TROUBLES = {
    "store_failed": "store_recovered",
    "store_deleted": "store_remade",
    "recorder_silent": "recorder_heard",
    "recorder_failed": "recorder_recovered",
    "recorder_fallback": "recorder_process",
}
#: What the recorder tells of its file that is logged here.
_LOGGED = {"store_failed", "store_deleted", "store_lost"}

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
        self.restarts = 0
        self._wire = Wire()
        self._outbox = Outbox(self._wire, clock, self._publish)
        #: Hand in a record (or a dict, or what gives a ``record`` when it is written) for a table; one append, never blocks.
        self.put: Callable[[str, Any], None] = self._outbox.put
        self._troubles: dict[str, str] = {}
        self._restarts = Restarts()
        #: Clear while a recorder is being replaced.
        self._settled = threading.Event()
        self._settled.set()
        #: When to try again to replace it, where no thread was to be had for that (monotonic seconds).
        self._replace_at = math.inf
        self._vanished = False
        self._silence = Silence()
        self._soon: Callable[[], None] | None = None
        self._numbers = itertools.count(1)
        self._answers: dict[int, CommandResult | None] = {}
        self._answered = threading.Condition()
        self._ready = threading.Event()
        self._ended = threading.Event()
        self._closing = threading.Event()
        #: Held to decide whether a recorder that ends now is replaced, or was asked to.
        self._turn = threading.Lock()
        self._stopping = False
        self._busy = False
        self._started: Started | None = None
        self._flusher: threading.Thread | None = None
        #: Those that were started.
        self._threads: list[threading.Thread] = []

    @property
    def mode(self) -> str:
        """``process`` or ``thread``."""
        return "thread" if self._started is None or self._started.process is None else "process"

    @property
    def trouble(self) -> str:
        """What is wrong with the recording now, for people; empty when all is well."""
        return "; ".join(filter(None, (*self._troubles.copy().values(), self._outbox.trouble)))

    @property
    def dropped_rows(self) -> int:
        """How many rows were given up, as the recorder did not keep up."""
        return self._outbox.dropped_rows

    @property
    def unwritable_rows(self) -> int:
        """How many rows were left out, as they cannot be recorded."""
        return self._outbox.unwritable_rows

    def start(self) -> None:
        """Start the recorder and wait until it is ready.

        Raises
        ------
        RecorderError
            If it runs neither in a process nor on a thread.
        """
        tell_of_forks(self)
        self._change()
        self._flusher = threading.Thread(target=self._flush_loop, name="wiseflow-flush", daemon=True)
        try:
            # Before there is a recorder, for which it would be missing.
            self._flusher.start()
            failure = self._launch()
        except RuntimeError as error:
            failure = str(error)
        if failure:
            self._flusher = None  # it ends with its next look
            self._outbox.ring()
            tell_no_more(self)
            raise RecorderError(f"the recorder does not start: {failure}")
        self._threads.append(self._flusher)

    # What is handed in.

    def put_meta(self, key: str, encoded_value: str) -> None:
        """Hand in one value (JSON text) of the meta table."""
        self.put("meta", {"key": key, "value": encoded_value})

    def write_through(self) -> None:
        """Push what waits into the pipe now, from this thread: something is about to start."""
        outbox = self._outbox
        # Where more waits than fits, it waits with the rest.
        if self._clock.monotonic() - outbox.made_seconds > WRITE_THROUGH_SECONDS and not outbox.crowded:
            self.flush()

    def soon(self, change: Callable[[], None]) -> None:
        """Call this on the flushing thread, or before what is asked for sooner; only the last that was given.

        So many changes in a row are told once. Never by ``write_through``, whose caller may hold locks.
        """
        self._soon = change
        self._outbox.ring()

    def _change(self) -> None:
        change, self._soon = self._soon, None
        if change is not None:
            change()

    def flush(self) -> None:
        """Encode what waits and write as much of it as the pipe takes; never blocks."""
        if self._outbox.try_to_make():
            self._pump()

    def _pump(self) -> None:
        self._wire.pump()
        if self._wire.waits:
            self._outbox.ring()

    def _flush_loop(self) -> None:
        while not self._ended.is_set() and self._flusher is threading.current_thread():
            if self._outbox.wait(1.0):
                self._ended.wait(COALESCE_SECONDS)
                self._change()
                self.flush()
                if self._wire.waits:
                    self._wire.wait(0.2)
            self._outbox.publish_late()
            self._replace_late()

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
        """Wait until all that was handed in, but what was dropped and counted, is committed.

        Return whether that was so within ``timeout`` seconds. Of each task its last state is committed then,
        unless more of them waited at once than are kept (``dropped_rows`` counts those too).
        """
        self._change()
        deadline = self._clock.monotonic() + timeout
        # One that is being replaced would take the question with it.
        if not self._drain(timeout) or not self._settled.wait(max(0.0, deadline - self._clock.monotonic())):
            return False
        number = next(self._numbers)
        left = max(0.0, deadline - self._clock.monotonic())
        return self._ask(number, {"t": "sync", "id": number}, left).ok

    def _drain(self, timeout: float) -> bool:
        """Wait until all that was handed in is on its way to the recorder; return whether that was so in time."""
        deadline = self._clock.monotonic() + timeout
        while True:
            done = self._outbox.make()
            self._pump()
            left = deadline - self._clock.monotonic()
            if done or left <= 0 or self._ended.is_set():
                return done
            with self._answered:
                self._answered.wait(min(left, COALESCE_SECONDS))

    def _send(self, message: Mapping[str, Any]) -> bool:
        sent = self._wire.send(encode(message))
        if self._wire.waits:
            self._outbox.ring()
        return sent

    def _ask(self, number: int, message: dict[str, Any], timeout: float) -> CommandResult:
        with self._answered:
            self._answers[number] = None
        sent = self._send(message)
        with self._answered:
            if sent:
                self._answered.wait_for(lambda: self._answers[number] is not None or self._ended.is_set(), timeout)
            answer = self._answers.pop(number)
        if not sent:
            return CommandResult(False, "there is no recorder at present; try again")
        return answer or CommandResult(False, "the recorder did not answer in time")

    def stop(self, reason: str = "", timeout: float = 5.0) -> bool:
        """End the session's record in order; return whether the recorder said that it did."""
        if self._stopping:
            return self._ended.is_set()
        self._change()
        self._outbox.make()
        # One that is being replaced takes the end when it is there; one that cannot start is tried no more.
        self._closing.set()
        self._replace_late()
        self._settled.wait(2 * READY_SECONDS)
        # As long as it takes what waits, it is given the time for it.
        give_up, acked = self._clock.monotonic() + DRAIN_SECONDS, -1
        while self._wire.is_open and acked != self._wire.acked and self._clock.monotonic() < give_up:
            acked = self._wire.acked
            if self._drain(timeout):
                break
        self._outbox.make(everything=True)
        self._settled.wait(2 * READY_SECONDS)
        with self._turn:
            self._stopping = True
        in_order = self._send({"t": "end", "reason": reason})
        deadline = self._clock.monotonic() + timeout
        while self._wire.waits and self._clock.monotonic() < deadline and not self._ended.is_set():
            self._pump()
            self._ended.wait(0.01)
        in_order = in_order and self._ended.wait(max(0.0, deadline - self._clock.monotonic())) and not self._vanished
        self._ended.set()
        self._outbox.ring()
        self._outbox.publish_late()
        self._outbox.close()
        self._wire.close()
        if self._started is not None and self._started.process is not None:
            try:
                self._started.process.wait(timeout if in_order else 0.5)
            except subprocess.TimeoutExpired:
                self._started.end()
        if not in_order:
            mark_end(self._config.directory, self._wire.unacked(), reason, self._clock)
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(timeout)
        tell_no_more(self)
        return in_order

    def look(self, sample: Sample | None, interval: float) -> None:
        """Given the newest sample and the interval in force (seconds), tell once of a recorder that takes none any more."""
        if not self._ready.is_set() or not self._settled.is_set() or self._stopping:
            self._silence.pause()  # one that ended or is being replaced is told of elsewhere
            return
        newest = None if sample is None else sample.monotonic_seconds
        turn = self._silence.look(now=self._clock.monotonic(), newest=newest, interval=interval)
        if turn is not None:
            self._notice(*self._silence.event(turn, self.pid))

    # Starting, hearing, restarting.

    def _launch(self) -> str:
        """Start a recorder and wait for its first word; return why it cannot run, empty where it does."""
        try:
            return self._try_to_launch()
        except (OSError, RuntimeError, WiseflowError) as error:  # no descriptors, threads or directory
            return str(error)

    def _try_to_launch(self) -> str:
        if self.restarts:
            self._begin_anew_if_gone()
        if not self._in_process:
            started, why, passes = self._launch_process()
            # What a process cannot write, a thread cannot either. And what passes is waited for where a recorder
            # is to be replaced; a session begins at once.
            if not why or (started is not None and started.failure) or (passes and self.restarts):
                return why
            if "recorder_fallback" not in self._troubles:
                text = f"the recorder cannot run in a process of its own ({why}): it runs on a thread"
                self._notice("recorder_fallback", text)
        started = start_thread(self._clock)
        if self._is_ready(started):
            return ""
        return started.failure or f"it ended without a word, or said none in {READY_SECONDS:g} s; see {LOG_NAME}"

    def _launch_process(self) -> tuple[Started | None, str, bool]:
        """Return what was started, why it does not run in a process (empty: it does), and whether that may pass."""
        try:
            started = start_process(self._config.directory)
        except OSError as error:
            logger.warning("the recorder's process cannot be started: %s", error)
            return None, str(error), error.errno in PASSING
        if self._is_ready(started):
            if "recorder_fallback" in self._troubles:
                self._notice("recorder_process", "the recorder runs in a process of its own again")
            return started, "", False
        why = started.failure or f"no word came{started.how_it_ended()}; see {LOG_NAME}"
        return started, why, started.was_killed

    def _begin_anew_if_gone(self) -> None:
        """The directory may have been deleted, and no recorder lives that would have put it back."""
        directory = Path(self._config.directory)
        if in_memory(directory) or (directory / DATABASE_NAME).exists():
            return
        private_directory(directory)
        if self._config.resume:
            self._config = replace(self._config, resume=False)
            text = "the session's directory was deleted with its file while no recorder ran: a new file was begun"
            self._notice("store_remade", text, begun_anew=True)

    def _is_ready(self, started: Started) -> bool:
        self._started = started
        self._ready.clear()
        hearing = threading.Thread(target=self._hear, args=(started,), name="wiseflow-listen", daemon=True)
        try:
            # Before it is told anything: one that is not heard must not record.
            hearing.start()
        except RuntimeError:
            started.abandon()
            raise
        self._wire.open(started.to_write, lambda: self._greeting(own_process=started.process is not None))
        self._threads = [thread for thread in self._threads if thread.is_alive()]
        self._threads += [thread for thread in (started.thread, hearing) if thread is not None]
        started.wait(READY_SECONDS)
        if started.ready:
            self._restarts.up(self._clock.monotonic())
            return True
        self._wire.close()
        started.end()
        return False

    def _greeting(self, *, own_process: bool) -> bytes:
        config = replace(self._config, own_process=own_process)
        return encode({"t": "config", "config": to_json_dict(config)}) + encode({"t": "busy", "value": self._busy})

    def _hear(self, started: Started) -> None:
        with started.to_hear as stream:
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
                    self._hear_one(started, message)
                except (WiseflowError, ValueError, TypeError, KeyError):
                    logger.exception("a message from the recorder was not understood")
        started.first_word.set()
        if self._ended.is_set() or not started.ready or started is not self._started:
            return
        with self._turn:
            goes_on = not self._stopping
            if goes_on:
                self._settled.clear()
        if goes_on:
            self._replace(started)
        else:
            # It ended without saying so: its end mark is written here, and what it had not committed.
            self._vanished = True
            self._ended.set()

    def _hear_one(self, started: Started, message: dict[str, Any]) -> None:
        kind = message["t"]
        if kind == "ack":
            number = int(message["seq"])
            self._wire.acknowledged(number)
            self._outbox.acknowledged(number)
            if "recorder_failed" in self._troubles:
                self._notice("recorder_recovered", "recording again")
            with self._answered:
                self._answered.notify_all()
        elif kind == "alert":
            self._on_alert(from_json_dict(AlertTransition, message["alert"]))
        elif kind == "event":
            event = from_json_dict(EventRecord, message["event"])
            self._note_trouble(event)
            if event.kind in _LOGGED:
                # The recorder's own process has no log that people see.
                logger.warning("%s", event.message)
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
            started.ready = True
            # It has opened the file, or would not be there.
            for trouble in ("store_failed", "store_deleted"):
                self._troubles.pop(trouble, None)
            self._ready.set()
            started.first_word.set()
        elif kind == "failed":
            started.failure = str(message["message"])
            started.first_word.set()

    def _replace(self, started: Started) -> None:
        """The recorder has ended: start another one, on a thread, as launching waits for what this one would hear."""
        self.restarts += 1
        self._ready.clear()
        self._wire.close()
        how = started.how_it_ended()
        self._restarts.ended(self._clock.monotonic())
        self._config = replace(self._config, resume=True)
        if self._restarts.delay:
            self._fail(f"the recorder ended again and again{how}")
        else:
            text = f"the recorder ended unexpectedly{how} and is started again; what it misses is told when it is back"
            self._notice("recorder_restarted", text)
        self._start_relaunch()

    def _start_relaunch(self) -> None:
        try:
            threading.Thread(target=self._relaunch, name="wiseflow-relaunch", daemon=True).start()
        except RuntimeError as error:  # no more threads: the one that flushes tries again
            self._restarts.failed()
            self._fail(str(error))
            with self._turn:
                if self._closing.is_set():
                    self._settled.set()
                else:
                    self._replace_at = self._clock.monotonic() + self._restarts.delay

    def _replace_late(self) -> None:
        """Try again what no thread was to be had for, when it is time; not at all where the session ends."""
        with self._turn:
            if self._replace_at == math.inf:
                return
            closing = self._closing.is_set()
            if not closing and self._clock.monotonic() < self._replace_at:
                return
            self._replace_at = math.inf
            if closing:
                self._settled.set()
                return
        self._start_relaunch()

    def _relaunch(self) -> None:
        try:
            while not (self._restarts.delay and self._clock.wait(self._closing, self._restarts.delay)):
                if not (failure := self._launch()):
                    return
                self._restarts.failed()
                self._fail(failure)
        finally:
            self._settled.set()

    def _fail(self, why: str) -> None:
        if "recorder_failed" not in self._troubles:
            self._notice("recorder_failed", f"nothing is recorded at present: {why}; it is tried again and again")

    def _note_trouble(self, event: EventRecord) -> None:
        if event.kind in _TROUBLES:
            self._troubles[event.kind] = event.message
        for trouble, over in _TROUBLES.items():
            if event.kind == over:
                self._troubles.pop(trouble, None)

    def _notice(self, kind: str, message: str, **data: Any) -> None:
        event = EventRecord(self._clock.time(), kind, message, data)
        self._note_trouble(event)
        self.put("event", event)
        self._publish(event)

    def _publish(self, event: EventRecord) -> None:
        logger.warning("%s", event.message)
        self._on_event(event)

    def after_fork(self) -> None:
        """In a forked child: the recorder is the parent's."""
        self._wire.forget()
        self._outbox.forget()
        self._soon, self._threads, self._flusher = None, [], None
        self._troubles = {"left": "the recorder stayed with the parent process"}
        self._answers, self._answered, self._turn = {}, threading.Condition(), threading.Lock()
        self._settled, self._ready = threading.Event(), threading.Event()
        self._ended, self._closing = threading.Event(), threading.Event()
        for event in (self._settled, self._ended, self._closing):
            event.set()
        self._stopping, self._replace_at = True, math.inf
