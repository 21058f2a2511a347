"""Samples on their way into blocks: the raw ones and the buckets of the upper tiers.

A block is one row of the table ``samples``: its tier, the times of its first and last sample on
both clocks, the number of its rows, and the rows as float64, little-endian. Raw blocks are written
over as they grow; blocks of the upper tiers are written once, when full. What is missing at their
end is in raw samples still: a reader rolls it up itself, and so does the next writer. Where a tier
ends is told by the monotonic clock: the other one may be set back, and then tells of nothing.
"""

from __future__ import annotations

import math
import sqlite3
import struct
from collections.abc import Sequence

from wiseflow_nb.records import SAMPLE_COLUMNS, TIER_SECONDS, Sample
from wiseflow_nb.store.tiers import BUCKET_WIDTH, WIDTH, BucketRow, Rollup

#: Rows in a full block of each tier: 10 min of 10 s (79 kB), 30 min of 60 s (39 kB). Both spans lie
#: within the hour that raw samples are kept for.
BLOCK_ROWS: tuple[int, ...] = (60, 60, 30)
#: Blocks that one call of ``forget`` deletes in each tier: half a megabyte in all, a millisecond.
FORGET_BLOCKS = 4

_SAMPLE = struct.Struct(f"<{WIDTH}d")
_BUCKET = struct.Struct(f"<{BUCKET_WIDTH}d")
# Where a bucket's row has the times of its first and its last sample.
_FIRST_TIME, _LAST_TIME = WIDTH, 2 * WIDTH
_MONOTONIC = SAMPLE_COLUMNS.index("monotonic_seconds")
_FIRST_MONOTONIC = WIDTH + _MONOTONIC


class _RawBlock:
    """Raw samples that share a row of the file, and which row that is once they are there."""

    def __init__(self) -> None:
        self.samples: list[Sample] = []
        self.number: int | None = None
        # Not committed yet: a rollback takes the row away, and another block may get its number.
        self.fresh = False


class _Tier:
    """The open bucket, the open block and the full blocks of one upper tier."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.rollup = Rollup(TIER_SECONDS[number])
        self._block: list[BucketRow] = []
        self.unsaved: list[list[BucketRow]] = []

    def add(self, sample: Sequence[float]) -> None:
        self._take(self.rollup.add(sample))

    def close(self) -> None:
        """End the open bucket and the open block."""
        self._take(self.rollup.close())
        if self._block:
            self.unsaved.append(self._block)
            self._block = []

    def _take(self, row: BucketRow | None) -> None:
        if row is None:
            return
        if self._block and row[_FIRST_TIME] < self._block[-1][_LAST_TIME]:
            # The clock was set back; as with raw blocks.
            self.unsaved.append(self._block)
            self._block = []
        self._block.append(row)
        if len(self._block) >= BLOCK_ROWS[self.number]:
            self.unsaved.append(self._block)
            self._block = []


class SampleWriter:
    """Collect samples and write them through a connection whose transactions another one bounds.

    A new one goes on where the file ends: raw samples that an upper tier does not have in a block
    are rolled up again, each exactly once.
    """

    def __init__(self, db: sqlite3.Connection) -> None:
        self._db = db
        self._block = _RawBlock()
        # Full blocks that no commit has made durable yet, and how many the open transaction holds.
        self._unsaved: list[_RawBlock] = []
        self._tiers = tuple(_Tier(number) for number in range(1, len(TIER_SECONDS)))
        self._written: tuple[int, ...] = (0,) * len(TIER_SECONDS)
        for tier in self._tiers:
            self._replay(tier)

    def _replay(self, tier: _Tier) -> None:
        covered = self._covered(tier.number)
        rows = self._db.execute(
            "SELECT data FROM samples WHERE tier = 0 AND end_monotonic > ? AND length(data) = count * ? "
            "ORDER BY end_monotonic",
            (covered, _SAMPLE.size),
        )
        for (data,) in rows:
            for row in _SAMPLE.iter_unpack(data):
                if row[_MONOTONIC] > covered:
                    tier.add(row)

    def last_monotonic(self) -> float:
        """The monotonic time of the newest raw sample in the file, or -inf."""
        return self._covered(0)

    def _covered(self, number: int) -> float:
        """The monotonic time of the last sample that a tier has in a block."""
        (end,) = self._db.execute("SELECT max(end_monotonic) FROM samples WHERE tier = ?", (number,)).fetchone()
        return -math.inf if end is None else float(end)

    def add(self, sample: Sample) -> None:
        """Take one sample."""
        samples = self._block.samples
        if samples and sample.time_seconds < samples[-1].time_seconds:
            # The clock was set back: the times in a block only grow, or it would not be found by them.
            self._end_block()
        self._block.samples.append(sample)
        if len(self._block.samples) >= BLOCK_ROWS[0]:
            self._end_block()
        for tier in self._tiers:
            tier.add(sample)

    def _end_block(self) -> None:
        self._unsaved.append(self._block)
        self._block = _RawBlock()

    @property
    def full_blocks(self) -> int:
        """How many full blocks wait, in all tiers."""
        return len(self._unsaved) + sum(len(tier.unsaved) for tier in self._tiers)

    def has_blocks(self, partial: bool) -> bool:
        """Whether ``write`` would write anything."""
        return bool(self.full_blocks or (partial and self._block.samples))

    def write(self, partial: bool) -> None:
        """Write what is full and, on demand, the open raw block."""
        for block in self._unsaved[self._written[0] :]:
            self._write_raw(block)
        if partial and self._block.samples:
            self._write_raw(self._block)
        for tier, done in zip(self._tiers, self._written[1:], strict=True):
            for rows in tier.unsaved[done:]:
                first, last = rows[0], rows[-1]
                packed = b"".join(_BUCKET.pack(*row) for row in rows)
                self._insert(
                    tier.number,
                    (
                        first[_FIRST_TIME],
                        last[_LAST_TIME],
                        first[_FIRST_MONOTONIC],
                        last[_MONOTONIC],
                        len(rows),
                        packed,
                    ),
                )
        self._written = (len(self._unsaved), *(len(tier.unsaved) for tier in self._tiers))

    def _write_raw(self, block: _RawBlock) -> None:
        first, last = block.samples[0], block.samples[-1]
        data = b"".join(_SAMPLE.pack(*row) for row in block.samples)
        values = (
            first.time_seconds,
            last.time_seconds,
            first.monotonic_seconds,
            last.monotonic_seconds,
            len(block.samples),
            data,
        )
        if block.number is not None:
            changed = self._db.execute(
                "UPDATE samples SET start_seconds = ?, end_seconds = ?, start_monotonic = ?, end_monotonic = ?, "
                "count = ?, data = ? WHERE id = ?",
                (*values, block.number),
            )
            if changed.rowcount:
                return
        # By a number of its own, never by its times: a clock that was set back gives those twice.
        block.number, block.fresh = self._insert(0, values), True

    def _insert(self, tier: int, values: Sequence[object]) -> int | None:
        return self._db.execute(
            "INSERT INTO samples (tier, start_seconds, end_seconds, start_monotonic, end_monotonic, count, data) "
            "VALUES (?, ?, ?, ?, ?, ?, ?)",
            (tier, *values),
        ).lastrowid

    def close_buckets(self) -> None:
        """End the open buckets and blocks of the upper tiers; what comes after begins new ones."""
        for tier in self._tiers:
            tier.close()

    def give_up(self, most: int) -> int:
        """Keep ``most`` full blocks of each tier that wait, at most; return how many raw samples were given up."""
        for tier in self._tiers:
            del tier.unsaved[: max(0, len(tier.unsaved) - most)]
        over = self._unsaved[: max(0, len(self._unsaved) - most)]
        del self._unsaved[: len(over)]
        return sum(len(block.samples) for block in over)

    def go_on_in(self, db: sqlite3.Connection) -> None:
        """Write through another connection, to a file with the same content."""
        self._db = db

    def committed(self) -> None:
        """What was written is durable."""
        self._block.fresh = False
        del self._unsaved[: self._written[0]]
        for tier, done in zip(self._tiers, self._written[1:], strict=True):
            del tier.unsaved[:done]
        self._written = (0,) * len(self._written)

    def rolled_back(self) -> None:
        """What was written since the last commit is not in the file."""
        for block in (*self._unsaved, self._block):
            if block.fresh:
                block.number, block.fresh = None, False
        self._written = (0,) * len(self._written)

    def forget(self, now: float, retention: Sequence[float]) -> bool:
        """Delete the oldest blocks that are too old, a few in each tier; return whether more of them wait."""
        more = False
        covered = min(self._covered(tier.number) for tier in self._tiers)
        for number, seconds in enumerate(retention):
            # Raw ones only once the tiers above have them.
            bound = covered if number == 0 else math.inf
            oldest = self._db.execute(
                "SELECT id, coalesce(end_monotonic, -1e999) FROM samples WHERE tier = ? ORDER BY end_monotonic LIMIT ?",
                (number, FORGET_BLOCKS),
            ).fetchall()
            old = [block for block, end in oldest if end < now - seconds and end <= bound]
            for block in old:
                self._db.execute("DELETE FROM samples WHERE id = ?", (block,))
            more = more or len(old) == FORGET_BLOCKS
        return more
