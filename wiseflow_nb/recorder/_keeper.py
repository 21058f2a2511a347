"""The recorder's writer: takes batches and samples, commits, watches the commands table."""

from __future__ import annotations

import contextlib
import json
import queue
import sqlite3
from collections.abc import Callable
from typing import Any

from wiseflow_nb.clock import Clock
from wiseflow_nb.errors import UsageError
from wiseflow_nb.recorder._link import Link
from wiseflow_nb.recorder.protocol import RecorderConfig, settings_from
from wiseflow_nb.records import AlertTransition, EventRecord, Sample, to_json_dict
from wiseflow_nb.resources._sampler import Sampler
from wiseflow_nb.store.commands import STALE_AFTER_SECONDS, validate
from wiseflow_nb.store.writer import StoreWriter

COMMIT_SECONDS = 0.25
COMMAND_POLL_SECONDS = 0.1
HEARTBEAT_SECONDS = 2.0
BLOCK_SECONDS = 5.0
FORGET_SECONDS = 600.0
RETRY_SECONDS = 1.0
#: What may wait for a store that fails, before the oldest is given up and counted.
WAITING_LIMIT = 100_000
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
        self.sampler: Sampler | None = None
        self._waiting: list[list[Any]] = []
        self._local: list[Callable[[], None]] = []
        self._acks: list[dict[str, Any]] = []
        self._applied = int(writer.get_meta("batch_seq") or 0) if config.resume else 0
        self._applied_written = self._applied
        self._failing = False
        self._data_version = -1
        self._end_reason: str | None = None
        self._more_to_forget = False
        self.lost_rows = 0

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
        while True:
            now = clock.monotonic()
            if now >= due["heartbeat"]:
                due["heartbeat"] = now + HEARTBEAT_SECONDS
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

    def finish(self, crashed: bool) -> None:
        """Take what the sampler still said, write the end mark, commit."""
        self._drain(0.0)
        now = self._clock.time()
        self._local.append(lambda: self._writer.resolve_alerts(now))
        self._local.append(self._writer.close_tiers)
        self._local.append(lambda: self._writer.meta("heartbeat", now))
        self._local.append(lambda: self._writer.meta("ended_seconds", now))
        self._local.append(lambda: self._writer.meta("end_reason", self._end_reason or "the kernel vanished"))
        if crashed:
            self._local.append(lambda: self._writer.meta("crashed", True))
        for _ in range(20):
            if self._flush():
                break

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
        elif kind == "_alert":
            self._local.append(lambda: self._writer.alert(message["alert"]))
        elif kind == "_event":
            self._waiting.append(["event", to_json_dict(message["event"])])
        elif kind == "batch":
            if message["seq"] > self._applied:
                self._applied = message["seq"]
                self._waiting.extend(message["rows"])
                if len(self._waiting) > WAITING_LIMIT:
                    self.lost_rows += len(self._waiting) - WAITING_LIMIT
                    del self._waiting[: len(self._waiting) - WAITING_LIMIT]
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
            ok, text = self._own_verb(message["verb"], message["arguments"])
            self._link.send({"t": "answer", "id": message["id"], "ok": ok, "message": text})
        elif kind == "answer":
            self._answer(int(message["id"]), bool(message["ok"]), str(message["message"]))
            self._flush()
        elif kind == "sync":
            self._local.append(lambda: self._writer.write_blocks(partial=True))
            self._flush()
            self._link.send({"t": "synced", "id": message["id"]})
        elif kind == "end":
            self._end_reason = str(message.get("reason", ""))

    def _forget(self) -> None:
        # A little at each commit, so that none takes long.
        self._more_to_forget = self._writer.forget_samples(self._clock.time(), self._config.tier_retention_seconds)

    def _flush(self) -> bool:
        """Write and commit what waits; on failure keep it, say so once, and return False."""
        writer = self._writer
        try:
            if writer.full_blocks:
                writer.write_blocks(partial=False)
            if self._waiting:
                writer.apply(self._waiting)
            for write in self._local:
                write()
            if self._applied != self._applied_written:
                writer.meta("batch_seq", self._applied)
            writer.commit()
        except sqlite3.Error as error:
            self._failed(error)
            return False
        self._applied_written = self._applied
        self._waiting, self._local = [], []
        for ack in self._acks[-1:]:
            self._link.send(ack)
        self._acks = []
        if self._failing:
            self._failing = False
            self.on_event(EventRecord(self._clock.time(), "store_recovered", "recording to the session's file again"))
        return True

    def _failed(self, error: sqlite3.Error) -> None:
        # A full disk can have ended the transaction by itself; the commands are read again.
        with contextlib.suppress(sqlite3.Error):
            self._writer.rollback()
        self._data_version = -1
        if len(self._local) > WAITING_LIMIT:
            self.lost_rows += len(self._local) - WAITING_LIMIT
            del self._local[: len(self._local) - WAITING_LIMIT]
        if not self._failing:
            self._failing = True
            event = EventRecord(self._clock.time(), "store_failed", f"the session's file cannot be written: {error}")
            self.on_event(event)

    def _poll_commands(self) -> None:
        try:
            version = self._writer.data_version()
            if version == self._data_version:
                return
            self._data_version = version
            commands = self._writer.new_commands()
            now = self._clock.time()
            for number, created, who, verb, text in commands:
                self._one_command(number, created, who, verb, text, now)
            self._writer.commit()
        except sqlite3.Error as error:
            self._failed(error)

    def _one_command(self, number: int, created: float, who: str, verb: str, text: str, now: float) -> None:
        if not isinstance(created, (int, float)) or abs(now - created) > STALE_AFTER_SECONDS:
            self._answer(number, False, f"refused: older than {STALE_AFTER_SECONDS:g} s when it was read")
            return
        try:
            arguments = validate(str(verb), json.loads(text))
        except (UsageError, ValueError, TypeError, RecursionError) as error:
            # Anybody who can write the file can write anything: a row is refused, never fatal.
            self._answer(number, False, f"refused: {str(error)[:500]}")
            return
        if verb in ("watch", "acknowledge", "silence"):
            ok, text = self._own_verb(verb, arguments)
            if ok:
                self._answer(number, ok, text)
                return
            # An alert of a rule that runs in the kernel.
        self._writer.take_command(number)
        self._link.send({"t": "command", "id": number, "verb": verb, "arguments": arguments, "who": who})

    def _answer(self, number: int, ok: bool, message: str) -> None:
        self._writer.answer_command(number, ok, message, self._clock.time())

    def _own_verb(self, verb: str, arguments: dict[str, Any]) -> tuple[bool, str]:
        sampler = self.sampler
        assert sampler is not None
        if verb == "watch":
            sampler.watch(float(arguments["seconds"]))
            return True, "watching"
        alert_id = str(arguments["alert_id"])
        if verb == "acknowledge":
            if not sampler.acknowledge(alert_id):
                return False, f"no open alert {alert_id!r}"
            self._local.append(lambda: self._writer.mark_alert(alert_id, acknowledged=True))
            text = f"alert {alert_id} was acknowledged"
            self.on_event(EventRecord(self._clock.time(), "acknowledged", text, {"alert_id": alert_id}))
            return True, "acknowledged"
        until = self._clock.time() + float(arguments["seconds"])
        if not sampler.silence(alert_id, until):
            return False, f"no open alert {alert_id!r}"
        self._local.append(lambda: self._writer.mark_alert(alert_id, silenced_until=until))
        return True, f"silenced for {arguments['seconds']:g} s"
