"""What is handed ahead stays queued until it begins; with calls that need no process."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from wiseflow_nb.pool._ahead import Ahead, begun
from wiseflow_nb.pool._deques import DequeQueue
from wiseflow_nb.records import Priority


class Call:
    """A call that is taken back as long as ``taken`` says that its worker has not taken it."""

    def __init__(self) -> None:
        self.handed = self.taken = False
        self.told: list[bool] = []

    def take_back(self) -> bool:
        if not self.taken:
            self.handed = False
        return not self.handed

    def go_on(self, *, well: bool) -> None:
        self.told.append(well)
        if not well:
            self.handed = False


class Work(SimpleNamespace):
    __hash__ = object.__hash__
    __eq__ = object.__eq__


class Desk:
    """A queue of four, and a worker that has handed two of them ahead."""

    def __init__(self, handed: int = 2) -> None:
        self.queue: DequeQueue[Any] = DequeQueue()
        self.works = [
            Work(_fn=Call(), _number=n, _priority=Priority.NORMAL, _queued_at=0.0, _stamp=0, _state="PENDING")
            for n in range(4)
        ]
        for work in self.works:
            self.queue.push(work)
        self.ahead = Ahead(self.queue)
        self.me = Owner()
        self.handed = self.hand(self.me, handed)

    def hand(self, me: Owner, most: int) -> list[Any]:
        def fits(work: Any) -> bool:
            work._fn.handed = True
            return True

        return self.ahead.reserve(me, most, fits)


class Owner:
    def __init__(self) -> None:
        self.ahead: list[Any] = []
        self.ahead_since = 0.0


@pytest.fixture
def desk() -> Desk:
    return Desk()


def test_what_is_handed_ahead_stays_queued_and_is_handed_to_nobody_else(desk: Desk) -> None:
    assert desk.handed == desk.works[:2] == desk.me.ahead
    assert (desk.queue.size, desk.ahead.unheld, begun([desk.me])) == (4, 2, 0)
    other = Owner()
    assert desk.hand(other, 5) == desk.works[2:]
    assert desk.hand(other, 5) == []


def test_nothing_is_handed_ahead_where_several_classes_wait(desk: Desk) -> None:
    desk.queue.reprioritise(desk.works[3], Priority.HIGH)
    assert desk.hand(Owner(), 5) == []


def test_work_that_its_worker_has_not_begun_is_taken_back_with_all_behind_it(desk: Desk) -> None:
    assert desk.ahead.take_back(desk.works[1])
    assert desk.me.ahead == []
    assert not desk.ahead.held
    assert desk.queue.size == 4
    assert desk.ahead.take_back(desk.works[1])


def test_work_that_has_begun_is_running_and_its_owner_s_next(desk: Desk) -> None:
    first, second = desk.handed
    first._fn.taken = True
    assert not desk.ahead.take_back(first)
    assert (first._state, second._state) == ("RUNNING", "PENDING")
    assert desk.me.ahead == [first]
    assert (desk.queue.size, begun([desk.me])) == (3, 1)
    assert not desk.ahead.take_back_from(desk.me)
    assert desk.ahead.go_on(desk.me, 7.0, well=True)
    assert (first._fn.told, desk.me.ahead_since) == ([True], 7.0)


def test_the_end_of_one_is_the_beginning_of_the_next(desk: Desk) -> None:
    first, second = desk.handed
    assert desk.ahead.go_on(desk.me, 7.0, well=True)
    assert (first._state, second._state, desk.queue.size) == ("RUNNING", "PENDING", 3)
    assert desk.me.ahead.pop(0) is first
    assert desk.ahead.take_back_from(desk.me)
    assert second._state == "PENDING"


def test_behind_one_that_failed_all_is_void_and_queued_as_it_was(desk: Desk) -> None:
    desk.handed[0]._fn.taken = True  # by a worker that will drop it
    assert not desk.ahead.go_on(desk.me, 7.0, well=False)
    assert desk.me.ahead == []
    assert [work._state for work in desk.works] == ["PENDING"] * 4
    assert desk.queue.size == 4
    assert desk.hand(Owner(), 5) == desk.works


def test_what_was_promised_to_run_is_run_though_it_is_void_and_holds_back_nothing(desk: Desk) -> None:
    first, second = desk.handed
    first._fn.taken = True
    assert not desk.ahead.take_back(first)
    first._fn.taken = False
    assert not desk.ahead.go_on(desk.me, 7.0, well=False)
    assert (desk.me.ahead, desk.me.ahead_since, first._fn.handed) == ([first], 0.0, False)
    assert desk.hand(desk.me, 5) == []
    assert desk.ahead.take_back_from(desk.me), "nothing runs in its stead: what runs now may be stopped"
    assert not desk.ahead.go_on(desk.me, 8.0, well=True)
    assert second._state == "PENDING"


def test_only_what_is_lower_is_taken_back(desk: Desk) -> None:
    desk.ahead.take_back_all(below=Priority.NORMAL)
    assert desk.me.ahead == desk.handed
    desk.ahead.take_back_all(below=Priority.HIGH)
    assert desk.me.ahead == []


def test_what_was_reserved_in_vain_is_let_go(desk: Desk) -> None:
    desk.ahead.give_up(desk.me, desk.handed[1:])
    assert desk.me.ahead == desk.handed[:1]
    desk.ahead.give_up(Owner(), desk.handed)
    assert desk.me.ahead == desk.handed[:1]


def test_a_finaliser_that_cancels_while_others_are_taken_back_harms_nothing(desk: Desk) -> None:
    first, second = desk.handed

    class Finalising(Call):
        def take_back(self) -> bool:
            back = super().take_back()
            if not self.told:
                self.told.append(True)
                assert desk.ahead.take_back(second)
                second._fn = None  # released, as cancelled work is
            return back

    first._fn = Finalising()
    assert desk.ahead.take_back_from(desk.me)
    assert (desk.me.ahead, desk.ahead.held) == ([], {})
