"""The end of a session whose recorder cannot write it: done in its place, by the kernel."""

from __future__ import annotations

import contextlib
import logging
import sqlite3
from collections.abc import Sequence
from pathlib import Path

from wiseflow_nb.clock import Clock
from wiseflow_nb.errors import RecorderError, WiseflowError
from wiseflow_nb.recorder._files import LastRoom
from wiseflow_nb.recorder._rows import rows_of
from wiseflow_nb.store.paths import DATABASE_NAME
from wiseflow_nb.store.writer import StoreWriter

logger = logging.getLogger("wiseflow_nb.recorder")


def mark_end(directory: str, unacked: Sequence[tuple[int, bytes]], reason: str, clock: Clock) -> None:
    """Write what was not acknowledged, and the end mark; without room for all of it, the mark alone.

    The recorder is no more: the room that it kept for its last words serves for these.
    """
    room = LastRoom(Path(directory))
    why: Exception | None = None
    for batches in (unacked, unacked, ()):
        try:
            _write(directory, batches, reason, clock)
            break
        except (WiseflowError, sqlite3.Error, OSError, ValueError, TypeError) as error:
            # Whatever the file is, closing a session raises nothing for it.
            why = error
            room.release()
    else:
        logger.warning("the session's end could not be recorded: %s", why)
    room.release()


def _write(directory: str, batches: Sequence[tuple[int, bytes]], reason: str, clock: Clock) -> None:
    writer = StoreWriter(Path(directory) / DATABASE_NAME)
    try:
        applied = int(writer.get_meta("batch_seq") or 0)
        for number, line in batches:
            if number > applied:
                with contextlib.suppress(RecorderError):
                    writer.apply(rows_of(line))
                writer.meta("batch_seq", number)
        writer.resolve_alerts(clock.time())
        writer.meta("ended_seconds", clock.time())
        writer.meta("end_reason", f"{reason} (the recorder did not answer)")
        writer.commit()
    except BaseException:
        with contextlib.suppress(sqlite3.Error):
            writer.rollback()
        writer.connection.close()
        raise
    writer.close()
