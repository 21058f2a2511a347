"""What must hold of any manager and any pool at any moment; the other tests call it at their ends."""

from __future__ import annotations

from wiseflow_nb.pool import ThreadPoolManager
from wiseflow_nb.records import TaskRecord, TaskState, TaskTransition
from wiseflow_nb.tasks import TaskManager
from wiseflow_nb.tasks._machine import BIRTH, LEGAL

Log = list[tuple[TaskRecord, TaskTransition | None]]


def check_manager(manager: TaskManager, log: Log | None = None) -> None:
    scheduler = manager._scheduler
    with scheduler.lock:
        ledger, slots = scheduler.ledger, scheduler.slots
        jobs = list(ledger.jobs.values())
        for state in TaskState:
            assert ledger.counts[state] == sum(job.state is state for job in jobs)
        records = ledger.since(0)
        revisions = [record.rev for record in records]
        assert revisions == sorted(set(revisions))
        assert len(records) == len(jobs)
        ready = slots.ready()
        assert len({job.number for job in ready}) == len(ready)
        assert {job.number for job in ready} == {job.number for job in jobs if job.state is TaskState.PENDING}
        assert slots.held == sum(job.holds for job in jobs)
        assert slots.threads_held == sum(job.holds for job in jobs if job.record.kind == "thread")
        assert slots.tickets >= 0
        for job in jobs:
            runs = job.state in (TaskState.RUNNING, TaskState.CANCELLING)
            assert (job.attempt is not None) == runs
            assert not job.holds or runs
            assert (job.state is TaskState.WAITING) == (job.remaining > 0 and not job.state.terminal)
            if job.state.terminal:
                assert not job.dependencies
                assert not job.dependents
            else:
                assert job.level >= job.options.priority
    if log is not None:
        check_log(log)


def check_log(log: Log) -> None:
    states: dict[str, TaskState] = {}
    moves = [transition for _, transition in log if transition is not None]
    assert [move.seq for move in moves] == list(range(1, len(moves) + 1))
    for record, move in log:
        if move is None:
            assert record.state is states[record.task_id]
            continue
        before = states.get(move.task_id)
        assert move.from_state == ("" if before is None else before.value)
        assert move.to_state in (BIRTH if before is None else LEGAL[before])
        assert record.state is move.to_state
        states[move.task_id] = move.to_state
    assert [record.rev for record, _ in log] == list(range(1, len(log) + 1))


def check_closed_manager(manager: TaskManager, log: Log | None = None) -> None:
    check_manager(manager, log)
    assert manager._scheduler.quiet.is_set()
    assert all(record.state.terminal for record in manager.records())
    assert manager._scheduler.slots.held == 0


def check_pool(pool: ThreadPoolManager) -> None:
    stats = pool.stats()
    finished = stats.completed + stats.failed + stats.cancelled
    assert stats.submitted == finished + stats.queued + stats.running
    assert 0 <= stats.cancelling <= stats.running
    status = pool.status()
    assert status.min_workers <= status.target <= status.max_workers
    assert status.busy <= status.workers


def check_closed_pool(pool: ThreadPoolManager) -> None:
    check_pool(pool)
    status = pool.status()
    assert (status.workers, status.busy, status.queued) == (0, 0, 0)


def test_a_used_manager_and_pool_hold_them() -> None:
    log: Log = []
    pool = ThreadPoolManager(max_workers=2)
    with pool, TaskManager(pool, on_change=lambda record, move: log.append((record, move))) as manager:
        first = manager.submit(pow, 2, 3)
        assert manager.submit(sum, [first, 1]).result(10) == 9
        check_manager(manager)
        check_pool(pool)
    check_closed_manager(manager, log)
    check_closed_pool(pool)
