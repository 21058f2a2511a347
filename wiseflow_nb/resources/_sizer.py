"""How many workers: the pure decision with its past, of a sample and the settings."""

from __future__ import annotations

from wiseflow_nb.config import Settings
from wiseflow_nb.records import Sample
from wiseflow_nb.sizing import SizingDecision, SizingInput, SizingPast, decide_workers


class Sizer:
    """Decides, and remembers what it decided."""

    def __init__(self) -> None:
        self._past = SizingPast()
        self._target = 0

    def decide(
        self, settings: Settings, sample: Sample, pending: int | None, workers: int | None, now: float
    ) -> SizingDecision:
        """Return the target and why; see ``ResourceMonitor.calculate_optimal_thread_count``."""
        low, high = settings.min_thread_workers, settings.max_thread_workers
        decision = decide_workers(
            SizingInput(
                cpu_limit_cores=sample.cpu_limit_cores,
                cpu_utilization_ratio=sample.cpu_utilization_ratio,
                memory_utilization_ratio=sample.memory_utilization_ratio,
                cpu_warning_ratio=settings.warning_ratio("cpu"),
                cpu_critical_ratio=settings.critical_ratio("cpu"),
                memory_warning_ratio=settings.warning_ratio("memory"),
                memory_critical_ratio=settings.critical_ratio("memory"),
                workers=workers if workers is not None else (self._target or low),
                pending=high if pending is None else pending,
                min_workers=low,
                max_workers=high,
                now_seconds=now,
            ),
            self._past,
        )
        self._past, self._target = decision.past, decision.target
        return decision
