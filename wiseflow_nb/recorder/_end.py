"""The end of a record whose recorder could not write it."""

from __future__ import annotations

import contextlib
import logging
import sqlite3
from collections.abc import Sequence
from pathlib import Path

from wiseflow_nb.errors import RecorderError, WiseflowError
from wiseflow_nb.recorder._rows import rows_of
from wiseflow_nb.store.paths import DATABASE_NAME
from wiseflow_nb.store.writer import StoreWriter

logger = logging.getLogger("wiseflow_nb.recorder")


def mark_end(directory: str, unacknowledged: Sequence[tuple[int, bytes]], reason: str, now: float) -> None:
    """Write what was not acknowledged, and the end mark, in the place of a recorder that could not."""
    try:
        writer = StoreWriter(Path(directory) / DATABASE_NAME)
        applied = int(writer.get_meta("batch_seq") or 0)
        for number, line in unacknowledged:
            if number > applied:
                with contextlib.suppress(RecorderError):
                    writer.apply(rows_of(line))
                writer.meta("batch_seq", number)
        writer.resolve_alerts(now)
        writer.meta("ended_seconds", now)
        writer.meta("end_reason", f"{reason} (the recorder did not answer)")
        writer.close()
    except (WiseflowError, sqlite3.Error, OSError, ValueError, TypeError) as error:
        # Whatever the file is, closing a session raises nothing for it.
        logger.warning("the session's end could not be recorded: %s", error)
