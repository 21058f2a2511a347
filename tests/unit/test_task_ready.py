"""The ready queue against a list that is sorted whenever something is taken."""

from __future__ import annotations

from types import SimpleNamespace

from hypothesis import given, settings
from hypothesis import strategies as st

from wiseflow_nb.pool._queue import aged
from wiseflow_nb.records import Priority
from wiseflow_nb.tasks._ready import SWEEP_ABOVE, ReadyQueue

levels = st.sampled_from(list(Priority))
#: What happens to the queue: a new task, one that was out before, a change of class, a cancel, a turn, time.
steps = st.lists(
    st.one_of(
        st.tuples(st.just("push"), levels | st.just(Priority.NORMAL), st.integers(0, 3)),
        st.tuples(st.just("again"), levels, st.integers(0, 9)),
        st.tuples(st.just("change"), levels, st.integers(0, 9)),
        st.tuples(st.just("discard"), st.none(), st.integers(0, 9)),
        st.tuples(st.just("pop"), st.none(), st.just(0)),
        st.tuples(st.just("wait"), st.none(), st.sampled_from([0, 1, 7, 29, 30, 31, 61, 200])),
    ),
    max_size=120,
)


def new(number, level, ready_at):
    return SimpleNamespace(number=number, level=level, ready_at=ready_at, place=-1, attempts=0)


@settings(max_examples=400, deadline=None)
@given(steps=steps)
def test_it_is_the_order_of_a_sorted_list(steps):
    queue, now, number = ReadyQueue(), 0.0, 0
    waiting, out, queued = [], [], []
    for what, level, size in steps:
        if what == "push":
            # Numbers are given before a task is ready: some become ready later than younger ones.
            number += 1
            waiting.append(new(number, level, now))
            while len(waiting) > size:
                job = waiting.pop(size)
                job.ready_at = now
                queue.push(job)
                queued.append(job)
        elif what == "again" and out:
            job = out.pop(size % len(out))
            job.level, job.ready_at, job.attempts = level, now, job.attempts + 1
            queue.push(job)
            queued.append(job)
        elif what == "change" and queued:
            job = queued[size % len(queued)]
            job.level = level
            queue.reprioritise(job, now)
        elif what == "discard" and queued:
            job = queued.pop(size % len(queued))
            queue.discard(job)
            queue.discard(job)
        elif what == "pop":
            first = min(queued, key=lambda job: (-aged(job.level, job.ready_at, now), job.number), default=None)
            head = queue.head(now)
            assert (head and head[2]) is first
            assert queue.pop(now) is first
            if first is not None:
                queued.remove(first)
                out.append(first)
        elif what == "wait":
            now += size
        assert queue.count == len(queued)
        assert sorted(job.number for job in queue.items()) == sorted(job.number for job in queued)
        queue.head(now)  # ages
        in_class = [sum(aged(job.level, job.ready_at, now) == item for job in queued) for item in Priority]
        assert [queue.in_class(item) for item in Priority] == in_class
    while queued:
        first = min(queued, key=lambda job: (-aged(job.level, job.ready_at, now), job.number))
        assert queue.pop(now) is first
        queued.remove(first)
    assert queue.pop(now) is None


def test_what_has_been_taken_is_let_go_of_before_it_would_have_climbed():
    queue, out = ReadyQueue(), 0
    for number in range(10_000, 0, -1):  # the younger first: each is late
        queue.push(new(number, Priority.NORMAL, 0.0))
        while queue.count > 10:
            assert queue.pop(0.0) is not None
            out += 1
    kept = [*queue._orderly[1], *queue._late[1], *queue._late_climbs]
    assert out > 9_000
    assert len(kept) < 4 * SWEEP_ABOVE
