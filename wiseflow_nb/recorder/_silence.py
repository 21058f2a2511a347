"""Whether a recorder that is there still takes samples: judged by the kernel, at looks that it makes anyway."""

from __future__ import annotations

#: Silence shorter than this is never told, however short the interval is.
LEAST_SILENCE_SECONDS = 5.0
#: So many intervals without a sample are silence.
SILENT_INTERVALS = 3.0
#: What lies between two looks counts for so much at most: where all stood still, the kernel itself
#: included (a paused container), the recorder is given the time to come back.
MOST_BETWEEN_LOOKS = 3.0


class Silence:
    """Follow the newest sample from look to look; tell once that none comes, and once that one came.

    Examples
    --------
    >>> silence = Silence()
    >>> [silence.look(now=float(now), newest=0.0, interval=1.0) for now in (0, 2, 4, 6, 8)]
    [None, None, None, True, None]
    >>> silence.look(now=10.0, newest=9.5, interval=1.0), silence.look(now=11.0, newest=10.5, interval=1.0)
    (False, None)
    """

    def __init__(self) -> None:
        self._newest: float | None = None
        self._looked: float | None = None
        self._expected = 0.0
        self._told = False
        #: For how long no sample has come, as far as was looked (seconds).
        self.seconds = 0.0
        #: For how long none had come when the newest one came.
        self.lasted = 0.0

    def look(self, *, now: float, newest: float | None, interval: float) -> bool | None:
        """Look once; return True where silence begins to count, False where it is over, else None.

        Parameters
        ----------
        now
            Monotonic seconds.
        newest
            What tells the newest sample from others, its monotonic time; None before the first.
        interval
            Seconds between samples by the settings in force now.
        """
        before, self._looked = self._looked, now
        if newest != self._newest or before is None:
            self._newest, self._expected = newest, interval
            told, self._told = self._told, False
            self.lasted, self.seconds = self.seconds, 0.0
            return False if told else None
        # What was slow at the last sample may have been so until now.
        self._expected = max(self._expected, interval)
        self.seconds += min(now - before, MOST_BETWEEN_LOOKS)
        if not self._told and self.seconds > max(SILENT_INTERVALS * self._expected, LEAST_SILENCE_SECONDS):
            self._told = True
            return True
        return None

    def event(self, turn: bool, pid: int) -> tuple[str, str]:
        """The kind and the message of an event that tells what ``look`` returned."""
        if not turn:
            return "recorder_heard", f"the recorder takes samples again, after {self.lasted:.0f} s without any"
        text = f"the recorder (process {pid}) is there, but no sample has come for {self.seconds:.0f} s"
        return "recorder_silent", f"{text}: it hangs, or the machine is too busy for it"

    def pause(self) -> None:
        """Nobody is there who could take samples: what is not looked at does not count."""
        self._looked = None
