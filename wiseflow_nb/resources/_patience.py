"""A call that may never return: made on a thread of its own, and waited for only so long."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from time import thread_time
from typing import Generic, NamedTuple, TypeVar

T = TypeVar("T")
#: A moment more, once it is over: where one long call held the interpreter, the answer may be there already.
GRACE_SECONDS = 0.1
#: With nothing to do for so long the thread ends.
IDLE_SECONDS = 30.0


class Patience(Generic[T]):
    """Call a function again and again, and raise if it does not return in time.

    There is one thread, from the first call on until ``close`` or a while after the last. While one call
    hangs no other is made. For one caller at a time.

    Parameters
    ----------
    name
        The thread's.
    function
        What is called.
    seconds
        How long it is waited for.

    Examples
    --------
    >>> patience = Patience("answer", lambda: 42, 5.0)
    >>> patience.ask()
    42
    >>> patience.close()
    """

    __slots__ = ("_answers", "_asked", "_function", "_hangs", "_lock", "_name", "_seconds", "_thread", "cpu_seconds")

    def __init__(self, name: str, function: Callable[[], T], seconds: float) -> None:
        self._name, self._function, self._seconds = name, function, seconds
        self._asked: queue.SimpleQueue[bool] = queue.SimpleQueue()
        self._answers: queue.SimpleQueue[_Answer[T]] = queue.SimpleQueue()
        self._hangs = False
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()  # over the thread
        #: CPU time of the calls that returned.
        self.cpu_seconds = 0.0

    def ask(self) -> T:
        """Return what the function returns, or raise what it raises.

        Raises
        ------
        TimeoutError
            If it does not return in time; at once, while an earlier call has not returned.
        """
        try:
            if self._hangs:
                # What comes so late is not the answer to this.
                self.cpu_seconds += self._answers.get_nowait().cpu_seconds
                self._hangs = False
            self._ask()
            answer = self._answer()
        except queue.Empty:
            self._hangs = True
            raise TimeoutError(f"no answer for {self._seconds:g} s: it hangs") from None
        self.cpu_seconds += answer.cpu_seconds
        if answer.error is not None:
            raise answer.error
        return answer.found[0]

    def close(self) -> None:
        """Let the thread end; one that hangs does so when its call returns."""
        with self._lock:
            thread = self._thread
            if thread is not None:
                self._asked.put(False)
        if thread is not None and not self._hangs:
            thread.join(self._seconds)

    def _ask(self) -> None:
        with self._lock:
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name=self._name, daemon=True)
                self._thread.start()
            self._asked.put(True)

    def _answer(self) -> _Answer[T]:
        try:
            return self._answers.get(timeout=self._seconds)
        except queue.Empty:
            return self._answers.get(timeout=GRACE_SECONDS)

    def _work(self) -> None:
        spent = thread_time()
        while self._goes_on():
            found: list[T] = []
            error: BaseException | None = None
            try:
                found.append(self._function())
            except BaseException as raised:  # noqa: BLE001  raised where it is waited for
                error = raised
            before, spent = spent, thread_time()
            self._answers.put(_Answer(found, error, spent - before))

    def _goes_on(self) -> bool:
        try:
            wanted = self._asked.get(timeout=IDLE_SECONDS)
        except queue.Empty:
            wanted = False
        with self._lock:
            # Asked for again, once it had been told to end.
            while not wanted and not self._asked.empty():
                wanted = self._asked.get()
            if not wanted:
                self._thread = None
        return wanted


class _Answer(NamedTuple, Generic[T]):
    found: list[T]
    error: BaseException | None
    cpu_seconds: float
