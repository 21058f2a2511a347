"""What each cell costs: one ``CellRecord`` when it starts, the same one completed when it ends."""

from __future__ import annotations

import itertools
import logging
import math
import uuid
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from wiseflow_nb.clock import SYSTEM_CLOCK, Clock
from wiseflow_nb.errors import WiseflowError
from wiseflow_nb.records import NAN, CellRecord

if TYPE_CHECKING:
    from wiseflow_nb.session import Session

logger = logging.getLogger("wiseflow_nb.notebook")

#: Below this many seconds no sample of the recorder can fall inside the cell, so none is looked for.
_SHORT_SECONDS = 0.05


class CellMeter:
    """Measures one piece of code at a time: ``begin`` before it runs, ``end`` after it.

    CPU time and memory are those of the kernel's whole process tree. The peak is the highest of the
    readings before and after and of the samples taken meanwhile; the largest gap is the longest
    time without a sample.
    """

    def __init__(self, session: Session, clock: Clock = SYSTEM_CLOCK) -> None:
        self._session = session
        self._clock = clock
        self._started_monotonic = NAN
        self._cpu_before = NAN

    def begin(self, number: int, source: str) -> CellRecord:
        """Return the record of a cell that starts now."""
        self._cpu_before, rss = self._usage()
        self._started_monotonic = self._clock.monotonic()
        return CellRecord(
            cell_id=uuid.uuid4().hex[:12],
            number=number,
            first_line=first_line(source),
            started_seconds=self._clock.time(),
            rss_before_bytes=rss,
        )

    def end(self, record: CellRecord, ok: bool) -> CellRecord:
        """Return the record completed."""
        wall = self._clock.monotonic() - self._started_monotonic
        cpu, rss = self._usage()
        # A child that ends takes its CPU time out of the tree's sum; less than nothing is unknown.
        used = cpu - self._cpu_before
        peak, gap = self._between(record.started_seconds, wall)
        known = [value for value in (record.rss_before_bytes, rss, peak) if math.isfinite(value)]
        return replace(
            record,
            finished_seconds=record.started_seconds + wall,
            wall_seconds=wall,
            cpu_seconds=used if used >= 0 else NAN,
            rss_after_bytes=rss,
            rss_peak_bytes=max(known, default=NAN),
            largest_gap_seconds=gap,
            status="ok" if ok else "error",
        )

    def _usage(self) -> tuple[float, float]:
        try:
            sample = self._session.monitor.sample_now()
        except (OSError, WiseflowError):
            logger.debug("no reading around a cell", exc_info=True)
            return NAN, NAN
        return sample.process_cpu_seconds_total, sample.process_memory_rss_bytes

    def _between(self, started: float, wall: float) -> tuple[float, float]:
        if wall < _SHORT_SECONDS:
            return NAN, NAN
        times, columns = self._session.view.series(["process_memory_rss_bytes"], started)
        moments = [float(value) for value in times if started <= value <= started + wall]
        peak = max((float(value) for value in columns["process_memory_rss_bytes"] if math.isfinite(value)), default=NAN)
        if not moments:
            return peak, NAN
        edges = [started, *moments, started + wall]
        return peak, max(later - earlier for earlier, later in itertools.pairwise(edges))


class CellTracker:
    """Hooks a shell's cell events and tells the session of every cell. Never touches the cell itself."""

    def __init__(self, ipython: Any, session: Callable[[], Session | None], clock: Clock = SYSTEM_CLOCK) -> None:
        self._ipython = ipython
        self._session = session
        self._clock = clock
        self._running: list[tuple[Session, CellMeter, CellRecord] | None] = []
        self._hooked = False
        # Newer versions of IPython count a cell before this event, older ones after it has run.
        self._ahead = 0

    def hook(self) -> None:
        """Begin to listen; again does no harm."""
        if not self._hooked:
            self._ipython.events.register("pre_run_cell", self._before)
            self._ipython.events.register("post_run_cell", self._after)
            self._hooked = True

    def unhook(self) -> None:
        """Stop listening; again does no harm."""
        if self._hooked:
            self._ipython.events.unregister("pre_run_cell", self._before)
            self._ipython.events.unregister("post_run_cell", self._after)
            self._hooked = False
        self._running.clear()

    def finish_open(self) -> None:
        """Complete the records of cells that still run: their session is about to close."""
        for position, entry in enumerate(self._running):
            if entry is not None:
                self._running[position] = None
                self._finish(*entry, ok=True)

    def _before(self, info: Any) -> None:
        # Cells nest (a cell may call run_cell): every start pushes, every end pops, tracked or not.
        self._running.append(None)
        session = self._session()
        if session is None or getattr(info, "silent", False) or not session.settings.track_cells:
            return
        meter = CellMeter(session, self._clock)
        try:
            record = meter.begin(self._ipython.execution_count - self._ahead, info.raw_cell or "")
            session.cell_started(record)
        except WiseflowError:
            logger.warning("a cell's start was not recorded", exc_info=True)
            return
        self._running[-1] = (session, meter, record)

    def _after(self, result: Any) -> None:
        entry = self._running.pop() if self._running else None
        if entry is None:
            return
        session, meter, record = entry
        if session is not self._session():
            return
        number = result.execution_count
        if number is not None and number != record.number:
            self._ahead += record.number - number
            record = replace(record, number=number)
        self._finish(session, meter, record, ok=bool(result.success))

    @staticmethod
    def _finish(session: Session, meter: CellMeter, record: CellRecord, *, ok: bool) -> None:
        try:
            session.cell_finished(meter.end(record, ok))
        except WiseflowError:
            logger.warning("a cell's end was not recorded", exc_info=True)


def first_line(source: str, width: int = 80) -> str:
    """The first line with something on it, cut to ``width``.

    Examples
    --------
    >>> first_line("\\n  # load\\nx = 1")
    '# load'
    """
    line = next((text.strip() for text in source.splitlines() if text.strip()), "")
    return line if len(line) <= width else line[: width - 1] + "…"
