"""``map`` with a bound: no result is lost, whatever the caller's iterables do."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from wiseflow_nb.errors import PoolClosedError
from wiseflow_nb.tasks import TaskManager
from wiseflow_nb.testing import Stage


def breaking(count: int) -> Iterator[int]:
    yield from range(count)
    raise LookupError("no more input")


@pytest.mark.parametrize("count", [0, 1, 3, 5])
def test_what_the_input_raises_comes_after_every_result(count: int) -> None:
    with TaskManager() as tasks:
        results = tasks.map(abs, breaking(count), outstanding=3)
        taken = [next(results) for _ in range(count)]
        assert taken == list(range(count))
        with pytest.raises(LookupError, match="no more input"):
            next(results)
        assert list(results) == []


def test_what_the_input_raises_comes_after_every_awaited_result() -> None:
    taken = []

    async def main() -> None:
        async for value in tasks.map(abs, breaking(4), outstanding=3):
            taken.append(value)

    with TaskManager() as tasks, pytest.raises(LookupError, match="no more input"):
        tasks.submit(main).result(20)
    assert taken == [0, 1, 2, 3]


def test_an_interrupt_in_the_input_loses_no_result() -> None:
    class Interrupted:
        count = 0

        def __iter__(self) -> Iterator[int]:
            return self

        def __next__(self) -> int:
            self.count += 1
            if self.count == 3:
                raise KeyboardInterrupt
            if self.count > 5:
                raise StopIteration
            return self.count

    with TaskManager() as tasks:
        results = tasks.map(abs, Interrupted(), outstanding=2)
        with pytest.raises(KeyboardInterrupt):
            next(results)
        assert list(results) == [1, 2, 4, 5]


def test_a_wait_that_ends_early_keeps_the_place(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = Stage()
    with TaskManager(**stage.parts) as tasks:
        results = tasks.map(abs, [-1, -2], outstanding=1)
        head = results._ahead[0]
        with monkeypatch.context() as patch:
            patch.setattr(head, "_wait", lambda timeout: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                next(results)
        stage.run()
        assert next(results) == 1
        stage.run()
        assert list(results) == [2]


def test_a_manager_that_was_shut_down_is_told_after_the_results() -> None:
    tasks = TaskManager()
    results = tasks.map(abs, range(9), outstanding=2)
    tasks.shutdown()
    assert [next(results), next(results)] == [0, 1]
    with pytest.raises(PoolClosedError):
        next(results)
    assert list(results) == []
