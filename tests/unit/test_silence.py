"""A recorder that is there and takes no samples: noticed at the looks of the kernel."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.unit.test_audit import Bench
from wiseflow_nb.recorder._silence import Silence
from wiseflow_nb.recorder.client import RecorderClient
from wiseflow_nb.records import CommandResult, EventRecord, Sample
from wiseflow_nb.session import Session
from wiseflow_nb.testing import FakeClock


@pytest.mark.parametrize(("interval", "told_at"), [(0.1, 6.0), (1.0, 6.0), (10.0, 32.0)])
def test_silence_counts_from_three_intervals_on_and_some_seconds(interval: float, told_at: float) -> None:
    silence = Silence()
    turns = {float(now): silence.look(now=float(now), newest=0.0, interval=interval) for now in range(0, 100, 2)}
    assert [now for now, turn in turns.items() if turn] == [told_at]
    assert silence.look(now=100.0, newest=99.0, interval=interval) is False
    assert silence.look(now=102.0, newest=99.0, interval=interval) is None


def test_where_the_kernel_stood_still_as_well_the_recorder_is_given_time() -> None:
    silence = Silence()
    silence.look(now=0.0, newest=0.0, interval=1.0)
    assert silence.look(now=3600.0, newest=0.0, interval=1.0) is None
    assert silence.look(now=3602.0, newest=3601.0, interval=1.0) is None


def test_an_interval_that_became_shorter_counts_from_the_next_sample_on() -> None:
    silence = Silence()
    silence.look(now=0.0, newest=0.0, interval=10.0)
    assert not any(silence.look(now=float(now), newest=0.0, interval=1.0) for now in range(1, 30))
    silence.look(now=30.0, newest=29.5, interval=1.0)
    assert [now for now in range(31, 40) if silence.look(now=float(now), newest=29.5, interval=1.0)] == [36]


def test_the_client_tells_it_once_each_way_and_not_of_one_that_is_being_replaced(tmp_path: Path) -> None:
    clock, events = FakeClock(), list[EventRecord]()
    with Session(state_dir=str(tmp_path), recorder_enabled=False) as session:
        config = session.recorder._config
    client = RecorderClient(
        config,
        on_alert=lambda alert: None,
        on_event=events.append,
        on_command=lambda verb, arguments, who: CommandResult(True),
        clock=clock,
    )

    def look(times: int, sample: Sample | None) -> list[str]:
        for _ in range(times):
            clock.advance(2.0)
            client.look(sample, 1.0)
        told = [event.kind for event in events]
        events.clear()
        return told

    first = Sample(1.0, 1.0)
    assert look(20, first) == []  # not started yet
    client._ready.set()
    assert look(20, first) == ["recorder_silent"]
    assert "hangs" in client.trouble
    assert [table for table, _ in client._outbox.pending] == ["event"]
    assert look(2, Sample(2.0, 2.0)) == ["recorder_heard"]
    assert client.trouble == ""
    client._settled.clear()
    assert look(20, Sample(2.0, 2.0)) == []


def test_every_look_of_the_governor_is_one_at_the_recorder() -> None:
    bench, looks = Bench(), list[bool]()
    bench.governor._look_at_recorder = looks.append
    bench.look()
    bench.cells = True
    bench.look(2.0)
    assert looks == [False, True]
