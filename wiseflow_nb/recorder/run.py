"""One recorder, start to end: the same function in a process of its own and on a thread."""

from __future__ import annotations

import contextlib
import math
import os
import sqlite3
import threading
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from wiseflow_nb.clock import SYSTEM_CLOCK, Clock
from wiseflow_nb.errors import RecorderError, StoreError
from wiseflow_nb.recorder._files import KeptRing, LastRoom
from wiseflow_nb.recorder._keeper import Keeper
from wiseflow_nb.recorder._link import Link
from wiseflow_nb.recorder._retention import Pruner
from wiseflow_nb.recorder.protocol import RecorderConfig
from wiseflow_nb.resources._probe import Probe
from wiseflow_nb.resources._sampler import Sampler
from wiseflow_nb.store.identity import identify
from wiseflow_nb.store.paths import DATABASE_NAME, RING_NAME
from wiseflow_nb.store.writer import StoreWriter


def run(
    config: RecorderConfig,
    incoming: BinaryIO,
    outgoing: BinaryIO,
    *,
    clock: Clock = SYSTEM_CLOCK,
    parent_alive: Callable[[], bool] = lambda: True,
) -> bool:
    """Record until the kernel says ``end`` or is gone; return whether it ended in order.

    Parameters
    ----------
    config
        Whom to record, and where.
    incoming, outgoing
        The pipes from and to the kernel; see ``protocol``.
    parent_alive
        Asked four times a second; a forked child can hold the pipe open after the kernel's death.

    Raises
    ------
    StoreError
        If the session's file cannot be opened at all.
    """
    directory = Path(config.directory)
    writer = StoreWriter(directory / DATABASE_NAME)
    room = LastRoom(directory)
    try:
        ring = KeptRing(directory / RING_NAME, resume=config.resume)
    except OSError as error:
        writer.close()
        raise StoreError(f"the ring in {directory} cannot be made: {error}") from error
    if ring.resumed_at is not None:
        # What the last recorder had not written yet: up to some seconds, which the ring alone has.
        for sample in ring.left_after(writer.last_sample_monotonic()):
            writer.sample(sample)
    room.take()
    own = frozenset({os.getpid()}) if config.own_process else frozenset()
    left = _left_by_others(writer, ring)
    probe = Probe(config.pid, config.settings.plan.disk_path, exclude_pids=own, left_seconds=left)
    link = Link(incoming, outgoing)
    keeper = Keeper(config, writer, link, clock, parent_alive)
    sampler = Sampler(
        probe,
        ring.append,
        config.settings.plan,
        clock,
        on_sample=keeper.on_sample,
        on_alert=keeper.on_alert,
        on_event=keeper.on_event,
        resumed=config.resume,
    )
    keeper.sampler = sampler
    keeper.silent_since = ring.resumed_at
    keeper.ring_in_place = ring.is_in_place
    keeper.remake_ring = ring.remake_soon
    keeper.free_room = room.release
    keeper.kill_files = lambda: probe.kill_files
    _write_start(writer, config, probe, clock, left)
    link.start()
    link.send({"t": "ready", "pid": os.getpid(), "limit_source": probe.limits.limit_source})
    outcome: list[bool] = []

    def keep() -> None:
        vanished = False
        try:
            outcome.append(keeper.run())
            vanished = not outcome[0]
        finally:
            if vanished:
                sampler.last_words()
            else:
                sampler.stop()

    thread = threading.Thread(target=keep, name="wiseflow-recorder-keep", daemon=True)
    thread.start()
    pruner = Pruner(
        directory.parent, config.session_id, config.retention_days * 86_400.0, config.retention_bytes, clock
    )
    pruner.start()
    sampled = False
    try:
        sampler.run()
        sampled = True
    finally:
        if not sampled:
            link.inbox.put(None)
        pruner.stop()
        thread.join(10.0)
        if sampled and outcome and keeper.finish(crashed=not outcome[0]):
            # Without the mark in the file the kernel, if it lives, writes it.
            link.send({"t": "ended"})
        # Else this recorder failed, not the kernel: no end mark, so that another one goes on.
        link.close()
        probe.close()
        ring.close()
        writer.close()
        room.release()
    if not outcome:
        raise RecorderError("the recorder's writing thread ended with an error")
    return outcome[0]


def _left_by_others(writer: StoreWriter, ring: KeptRing) -> float:
    """The CPU seconds of recorders that were replaced: the kernel, which waited for them, has taken them over."""
    left = 0.0
    if ring.resumed_at is not None:
        with contextlib.suppress(sqlite3.Error, ValueError, TypeError, KeyError):
            before = writer.get_meta("recorder_before")
            # On a thread its time was the kernel's own from the beginning.
            left = float(before["left_seconds"]) + (ring.resumed_cpu if before["own_process"] else 0.0)
    return left if math.isfinite(left) else 0.0


def _write_start(writer: StoreWriter, config: RecorderConfig, probe: Probe, clock: Clock, left: float) -> None:
    try:
        if config.resume:
            writer.meta("ended_seconds", None)
            writer.meta("crashed", False)
            # Those that nobody took yet are carried out.
            writer.give_up_commands(
                "the recorder was replaced before the answer came: it may have been done",
                clock.time(),
                taken_only=True,
            )
        else:
            writer.meta("started_seconds", config.started_seconds or clock.time())
        writer.meta("session_id", config.session_id)
        writer.meta("title", config.title)
        writer.meta("notice", config.notice)
        writer.meta("identity", dict(config.identity))
        writer.meta("limit_source", probe.limits.limit_source)
        writer.meta("probe_path", probe.path)
        writer.meta("settings", dict(config.settings.public))
        writer.meta("thresholds", dict(config.settings.plan.alerts.thresholds))
        writer.meta("recorder_pid", os.getpid())
        writer.meta("recorder", identify().to_dict())
        writer.meta("recorder_before", {"own_process": config.own_process, "left_seconds": left})
        writer.meta("heartbeat", clock.time())
        writer.commit()
    except sqlite3.Error as error:
        raise StoreError(f"the session's file in {config.directory} cannot be written: {error}") from error
