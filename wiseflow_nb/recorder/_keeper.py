"""The recorder's writer: takes batches and samples, commits, looks after the file and the commands table."""

from __future__ import annotations

import contextlib
import queue
import sqlite3
from collections.abc import Callable
from typing import Any

from wiseflow_nb.clock import Clock
from wiseflow_nb.errors import StoreError
from wiseflow_nb.recorder._desk import CommandDesk
from wiseflow_nb.recorder._end import GivenUp, write_what_fits
from wiseflow_nb.recorder._link import Link
from wiseflow_nb.recorder._retention import SteadyTime
from wiseflow_nb.recorder._rows import newest_rows
from wiseflow_nb.recorder.protocol import RecorderConfig, settings_from
from wiseflow_nb.records import AlertTransition, EventRecord, Sample, to_json_dict
from wiseflow_nb.resources._sampler import Sampler
from wiseflow_nb.store.trim import Trimmer
from wiseflow_nb.store.writer import StoreWriter

COMMIT_SECONDS = 0.25
COMMAND_POLL_SECONDS = 0.1
HEARTBEAT_SECONDS = 2.0
BLOCK_SECONDS = 5.0
FORGET_SECONDS = 600.0
RETRY_SECONDS = 1.0
TRIM_SECONDS = 60.0
TRIM_AGAIN_SECONDS = 0.25
#: The wall clock against the monotonic one: less than this is the drift that time servers correct.
SET_BACK_SECONDS = 2.0
#: What may wait for a store that fails, before the oldest is given up and counted.
WAITING_LIMIT = 100_000
WAITING_BLOCKS = 1000
#: So often the end mark is tried alone.
MARK_ATTEMPTS = 3
#: A killed kernel's pipe can be held open by a process it forked: this long without a message is its end.
DRAIN_SECONDS = 0.2
DRAIN_LIMIT_SECONDS = 1.5


class Keeper:
    """Run until the kernel says ``end`` or is gone.

    Everything from the sampler and from the pipe comes through one inbox, in order, so that one
    thread owns the file.
    """

    def __init__(
        self,
        config: RecorderConfig,
        writer: StoreWriter,
        link: Link,
        clock: Clock,
        parent_alive: Callable[[], bool],
    ) -> None:
        self._config, self._writer, self._link, self._clock = config, writer, link, clock
        self._parent_alive = parent_alive
        self._desk = CommandDesk(writer, link, clock, lambda write: self._local.append(write), self.on_event)
        self._steady = SteadyTime(clock)
        self._trimmer = Trimmer(config.retention_days * 86_400.0, config.retention_bytes // 2)
        self._sampler: Sampler | None = None
        #: What came through the pipe: no more than the kernel keeps until it is acknowledged.
        self._waiting: list[list[Any]] = []
        #: Events and alerts of this process.
        self._events: list[list[Any]] = []
        self._local: list[Callable[[], None]] = []
        self._acks: list[dict[str, Any]] = []
        self._applied = int(writer.get_meta("batch_seq") or 0) if config.resume else 0
        self._applied_written = self._applied
        self._failing = False
        self._end_reason: str | None = None
        self._shift = clock.time() - clock.monotonic()
        self._deleted, self._remake_at = False, 0.0
        #: When the sample before a recorder's replacement was taken (epoch seconds), until the gap is told.
        self.silent_since: float | None = None
        #: Whether the ring is still there, and what has it made again with the next sample.
        self.ring_in_place: Callable[[], bool] = lambda: True
        self.remake_ring: Callable[[], None] = lambda: None
        self._ring_told = False
        #: Called where the end mark cannot be written: gives back what was kept for it.
        self.free_room: Callable[[], None] = lambda: None
        #: Where the OOM kills are counted that bear on the kernel.
        self.kill_files: Callable[[], tuple[str, ...]] = tuple
        self._kill_files: tuple[str, ...] = ()
        self._more_to_forget = False
        self.lost_rows = _whole(writer.get_meta("lost_rows")) if config.resume else 0
        #: Of how many tasks the last state was among them: only an end can lose any.
        self.lost_tasks = _whole(writer.get_meta("lost_tasks")) if config.resume else 0
        self.lost_samples = 0
        #: What came whole but fits no table.
        self.unwritable_rows = 0
        self._lost_told = self.lost_rows

    @property
    def sampler(self) -> Sampler | None:
        """Who samples; set before ``run``."""
        return self._sampler

    @sampler.setter
    def sampler(self, sampler: Sampler) -> None:
        self._sampler = self._desk.sampler = sampler

    # Called on the sampling thread: one append each.

    def on_sample(self, sample: Sample) -> None:
        self._link.inbox.put({"t": "_sample", "sample": sample})

    def on_alert(self, transition: AlertTransition) -> None:
        self._link.send({"t": "alert", "alert": to_json_dict(transition)})
        self._link.inbox.put({"t": "_alert", "alert": transition})

    def on_event(self, event: EventRecord) -> None:
        self._link.send({"t": "event", "event": to_json_dict(event)})
        self._link.inbox.put({"t": "_event", "event": event})

    def run(self) -> bool:
        """Return True if the session ended in order, False if the kernel vanished."""
        clock = self._clock
        now = clock.monotonic()
        due = {"commit": now, "poll": now, "heartbeat": now, "block": now + BLOCK_SECONDS, "forget": now + 60.0}
        due["trim"] = now + TRIM_SECONDS
        while True:
            now = clock.monotonic()
            if now >= due["heartbeat"]:
                due["heartbeat"] = now + HEARTBEAT_SECONDS
                self._look_at_clock()
                self._tell_kill_files()
                self._local.append(lambda: self._writer.meta("heartbeat", clock.time()))
            if now >= due["block"]:
                due["block"] = now + BLOCK_SECONDS
                self._local.append(lambda: self._writer.write_blocks(partial=True))
            if now >= due["forget"]:
                due["forget"] = now + FORGET_SECONDS
                self._local.append(self._forget)
            if now >= due["commit"]:
                if self._more_to_forget:
                    self._more_to_forget = False
                    self._local.append(self._forget)
                due["commit"] = now + (COMMIT_SECONDS if self._flush() else RETRY_SECONDS)
                if not self._parent_alive():
                    self._drain()
                    return False
            if now >= due["trim"]:
                due["trim"] = now + (TRIM_AGAIN_SECONDS if self._trim() else TRIM_SECONDS)
            if now >= due["poll"]:
                due["poll"] = now + COMMAND_POLL_SECONDS
                self._poll_commands()
            try:
                message = self._link.inbox.get(timeout=max(0.0, min(due.values()) - clock.monotonic()))
            except queue.Empty:
                continue
            if message is None:
                return False
            self._handle(message)
            if self._end_reason is not None:
                return True

    def finish(self, crashed: bool) -> bool:
        """Take what the sampler still said, write the end mark, commit; return whether the mark is in the file.

        Where not all that waits fits, in the room that was kept, the mark goes in alone, with the count
        of what was given up, and after it what fits.
        """
        self._tell_losses()
        self._drain(0.0)
        self._look_at_clock()
        now = self._clock.time()
        mark: dict[str, Any] = {"heartbeat": now, "ended_seconds": now}
        mark["end_reason"] = self._end_reason or "the kernel vanished"
        if crashed:
            mark["crashed"] = True
        before = list(self._local)
        self._local += [lambda: self._close(now), self._writer.close_tiers, lambda: self._write_metas(mark)]
        failed = self._failing
        if failed:
            self.free_room()
        for _ in range(1 if failed else 2):
            if self._flush():
                return True
            self.free_room()
        for _ in range(MARK_ATTEMPTS):
            try:
                self._mark_alone(mark | {"batch_seq": self._applied}, before, now)
                return True
            except sqlite3.Error as error:
                self._failed(error)
        return False

    def _mark_alone(self, mark: dict[str, Any], local: list[Callable[[], None]], now: float) -> None:
        known = GivenUp(self.lost_rows, self.lost_tasks)

        def rest() -> None:
            for write in local:
                write()
            self._writer.close_tiers()

        lost = write_what_fits(
            self._writer,
            mark,
            [*self._waiting, *self._events],
            self._clock,
            closing=lambda: self._close(now),
            rest=rest,
            before=known,
        )
        now_lost = GivenUp(lost.rows - known.rows, lost.tasks - known.tasks)
        if not now_lost.rows:
            return
        data = {"rows": lost.rows, "tasks": lost.tasks, "samples": 0}
        event = EventRecord(self._clock.time(), "store_lost", now_lost.text(), data)
        self._link.send({"t": "event", "event": to_json_dict(event)})
        with contextlib.suppress(sqlite3.Error):  # the counts are beside the mark
            self._writer.apply([["event", to_json_dict(event)]])
            self._writer.commit()

    def _close(self, now: float) -> None:
        self._writer.resolve_alerts(now)
        self._writer.give_up_commands("the session ended before it was carried out", now)

    def _write_metas(self, values: dict[str, Any]) -> None:
        for key, value in values.items():
            self._writer.meta(key, value)

    def _drain(self, patience: float = DRAIN_SECONDS) -> None:
        """Take what still comes: until the end, or until the pipe was silent for ``patience`` seconds."""
        silent_at = self._clock.monotonic() + patience
        stop_at = self._clock.monotonic() + DRAIN_LIMIT_SECONDS
        while True:
            now = self._clock.monotonic()
            try:
                message = self._link.inbox.get(timeout=max(0.0, min(silent_at, stop_at) - now))
            except queue.Empty:
                return
            if message is None:
                if patience:
                    return
                continue
            self._handle(message)
            # The sampler goes on meanwhile; only what comes through the pipe counts as a sign of life.
            if not message["t"].startswith("_") and patience:
                silent_at = self._clock.monotonic() + patience

    def _handle(self, message: dict[str, Any]) -> None:
        kind = message["t"]
        sampler = self.sampler
        assert sampler is not None
        if kind == "_sample":
            self._writer.sample(message["sample"])
            self._tell_silence(message["sample"])
        elif kind == "_alert":
            self._events.append(["alert", to_json_dict(message["alert"])])
        elif kind == "_event":
            self._events.append(["event", to_json_dict(message["event"])])
        elif kind == "batch":
            if message["seq"] > self._applied:
                self._applied = message["seq"]
                self._waiting.extend(message["rows"])
                self._tell_unwritable(message.get("torn", 0))
            self._acks.append({"t": "ack", "seq": message["seq"]})
        elif kind == "busy":
            sampler.set_busy(bool(message["value"]))
        elif kind == "configure":
            settings = settings_from(message["settings"])
            sampler.configure(settings.plan)
            self._local.append(lambda: self._writer.meta("settings", dict(settings.public)))
            self._local.append(lambda: self._writer.meta("thresholds", dict(settings.plan.alerts.thresholds)))
            self._link.send({"t": "configured", "rev": settings.revision})
        elif kind == "verb":
            ok, text = self._desk.own_verb(message["verb"], message["arguments"])
            self._link.send({"t": "answer", "id": message["id"], "ok": ok, "message": text})
        elif kind == "answer":
            number, ok, text = int(message["id"]), bool(message["ok"]), str(message["message"])
            self._local.append(lambda: self._desk.answer(number, ok, text))
            self._flush()
        elif kind == "sync":
            self._local.append(lambda: self._writer.write_blocks(partial=True))
            self._local.append(lambda: self._writer.meta("heartbeat", self._clock.time()))
            ok = self._flush()
            text = "" if ok else "the session's file cannot be written at present"
            self._link.send({"t": "synced", "id": message["id"], "ok": ok, "message": text})
        elif kind == "end":
            self._end_reason = str(message.get("reason", ""))

    def _forget(self) -> None:
        # A little at each commit, so that none takes long.
        self._more_to_forget = self._writer.forget_samples(self._clock.monotonic(), self._config.tier_retention_seconds)

    def _flush(self) -> bool:
        """Write and commit what waits; on failure keep it, say so once, and return False."""
        writer, left_out = self._writer, 0
        self._look_at_files()
        try:
            if writer.full_blocks:
                writer.write_blocks(partial=False)
            if self._waiting or self._events:
                left_out = writer.apply([*newest_rows(self._waiting), *self._events])
            for write in self._local:
                write()
            if self._applied != self._applied_written:
                writer.meta("batch_seq", self._applied)
            writer.commit()
        except sqlite3.Error as error:
            self._failed(error)
            return False
        self._applied_written = self._applied
        self._waiting, self._events, self._local = [], [], []
        self._tell_unwritable(left_out)
        for ack in self._acks[-1:]:
            self._link.send(ack)
        self._acks = []
        if self._failing:
            self._failing = False
            self._event("store_recovered", "recording to the session's file again")
            self._tell_losses()
        return True

    def _failed(self, error: sqlite3.Error) -> None:
        # A full disk can have ended the transaction by itself; the commands are read again.
        with contextlib.suppress(sqlite3.Error):
            self._writer.rollback()
        self._desk.look_again()
        self._bound(self._local)
        self._bound(self._events)
        self.lost_samples += self._writer.give_up_blocks(WAITING_BLOCKS)
        if not self._failing:
            self._failing = True
            event = EventRecord(self._clock.time(), "store_failed", f"the session's file cannot be written: {error}")
            self.on_event(event)

    def _bound(self, waiting: list[Any]) -> None:
        over = len(waiting) - WAITING_LIMIT
        if over > 0:
            self.lost_rows += over
            del waiting[:over]

    def _poll_commands(self) -> None:
        self._look_at_files()
        try:
            self._desk.poll()
        except sqlite3.Error as error:
            self._failed(error)

    # Looking after the file.

    def _tell_kill_files(self) -> None:
        """Leave on record where kills are counted: if this process is taken too, others can look there."""
        paths = self.kill_files()
        if paths and paths != self._kill_files:
            self._kill_files = paths
            self._local.append(lambda: self._writer.meta("kill_files", list(paths)))

    def _look_at_clock(self) -> None:
        """Whether the clock still runs on; it is told once."""
        shift = self._clock.time() - self._clock.monotonic()
        if shift < self._shift - SET_BACK_SECONDS:
            seconds = self._shift - shift
            text = (
                f"the clock was set back by {seconds:.0f} s: what was recorded before may seem later than what follows"
            )
            self._event("clock_set_back", text, seconds=seconds)
        self._shift = shift

    def _look_at_files(self) -> None:
        """Whether the file is still there, whole: asked before each write, and many times a second.

        Until a lost part is put back, what another process writes and what is written here harm each other.
        """
        self._look_at_ring()
        part = self._writer.lost_part()
        if not part:
            self._deleted = False
            return
        now = self._clock.monotonic()
        if self._deleted and now < self._remake_at:
            return
        try:
            self._writer.remake()
        except StoreError as error:
            self._remake_at = now + HEARTBEAT_SECONDS
            if not self._deleted:
                self._deleted = True
                text = f"{part} was deleted or replaced and what is recorded cannot be read by others: {error}"
                self._event("store_deleted", text)
            return
        self._deleted = False
        self._desk.look_again()
        text = f"{part} was deleted or replaced under the recorder; the session's file was put back, with all that was in it"
        self._event("store_remade", text)

    def _look_at_ring(self) -> None:
        if self.ring_in_place():
            self._ring_told = False
            return
        self.remake_ring()
        if not self._ring_told:
            self._ring_told = True
            text = (
                "the ring of samples was deleted or replaced under the recorder: it is made again with the next sample"
            )
            self._event("ring_remade", text)

    def _trim(self) -> bool:
        self._look_at_files()
        try:
            return not self._failing and self._trimmer.step(self._writer.connection, *self._steady.look())
        except sqlite3.Error as error:
            self._failed(error)
            return False

    def _tell_silence(self, sample: Sample) -> None:
        since, self.silent_since = self.silent_since, None
        if since is not None:
            seconds = sample.time_seconds - since
            text = f"the recorder was replaced: no samples for {seconds:.1f} s; what the kernel handed in meanwhile follows"
            self._event("recorder_resumed", text, from_seconds=since, to_seconds=sample.time_seconds)

    def _tell_losses(self) -> None:
        if (lost := self.lost_rows + self.lost_samples) != self._lost_told:
            self._lost_told = lost
            rows = self.lost_rows
            self._local.append(lambda: self._writer.meta("lost_rows", rows))
            text = (
                f"{self.lost_rows} rows and {self.lost_samples} samples were given up "
                "while the session's file could not be written"
            )
            self._event("store_lost", text, rows=self.lost_rows, samples=self.lost_samples)

    def _tell_unwritable(self, count: int) -> None:
        first = count and not self.unwritable_rows
        self.unwritable_rows += count
        if first:
            text = "a row was not what its table takes, and was left out; further ones are counted only"
            self._event("rows_unwritable", text, rows=count)

    def _event(self, kind: str, message: str, **data: Any) -> None:
        self.on_event(EventRecord(self._clock.time(), kind, message, data))


def _whole(value: Any) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else 0
