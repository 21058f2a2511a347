"""When a recorder that ended is started again."""

from __future__ import annotations

from wiseflow_nb.recorder._restarts import AT_ONCE, CALM_SECONDS, LONGEST_DELAY_SECONDS, Restarts


def test_one_that_ends_now_and_then_is_started_again_at_once_for_ever() -> None:
    restarts, now = Restarts(), 0.0
    for _ in range(20):
        restarts.up(now)
        now += CALM_SECONDS + 1
        restarts.ended(now)
        assert (restarts.count, restarts.delay) == (1, 0.0)


def test_one_that_ends_again_and_again_is_waited_for_ever_longer() -> None:
    restarts, delays = Restarts(), []
    for number in range(12):
        restarts.up(float(number))
        restarts.ended(number + 0.5)
        delays.append(restarts.delay)
    assert delays == [0.0] * AT_ONCE + [1.0, 2.0, 4.0, 8.0, 16.0] + [LONGEST_DELAY_SECONDS] * 4


def test_one_that_cannot_start_is_waited_for_from_the_first_time_on() -> None:
    restarts, delays = Restarts(), []
    restarts.up(0.0)
    restarts.ended(1000.0)
    for _ in range(7):
        restarts.failed()
        delays.append(restarts.delay)
    assert delays == [1.0, 2.0, 4.0, 8.0, 16.0, LONGEST_DELAY_SECONDS, LONGEST_DELAY_SECONDS]
    restarts.up(2000.0)
    restarts.ended(2000.0 + CALM_SECONDS + 1)
    assert restarts.delay == 0.0
