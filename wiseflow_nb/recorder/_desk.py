"""The recorder's command desk: reads the commands table, checks, acts or hands up, and answers."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

from wiseflow_nb.clock import Clock
from wiseflow_nb.errors import UsageError
from wiseflow_nb.recorder._link import Link
from wiseflow_nb.records import EventRecord
from wiseflow_nb.resources._sampler import Sampler
from wiseflow_nb.store.commands import MAX_ARGUMENT_BYTES, STALE_AFTER_SECONDS, masked, refuse_secrets, validate
from wiseflow_nb.store.writer import COMMANDS_AT_ONCE, StoreWriter


class CommandDesk:
    """Answer the commands that other processes insert into the session's file.

    Parameters
    ----------
    later
        Takes a write for the next commit.
    on_event
        Takes an event, for the kernel and for the file.
    """

    def __init__(
        self,
        writer: StoreWriter,
        link: Link,
        clock: Clock,
        later: Callable[[Callable[[], None]], None],
        on_event: Callable[[EventRecord], None],
    ) -> None:
        self._writer, self._link, self._clock = writer, link, clock
        self._later, self._on_event = later, on_event
        self._data_version = -1
        self._accepted: list[dict[str, Any]] = []
        self.sampler: Sampler | None = None

    def poll(self) -> None:
        """Take the commands that came since the last look; raises what SQLite raises, and looks again then."""
        version = self._writer.data_version()
        if version == self._data_version:
            return
        commands = self._writer.new_commands()
        now = self._clock.time()
        self._accepted = []
        for number, created, who, verb, text in commands:
            self._take(number, created, who, verb, text, now)
        self._writer.commit()
        # Handed up only now: what is read again after a failed commit must not be carried out twice.
        for command in self._accepted:
            self._link.send(command)
        # More than were taken at once are still there, and no further commit may tell of them.
        self._data_version = version if len(commands) < COMMANDS_AT_ONCE else -1

    def look_again(self) -> None:
        """What was read may not have been answered: read it again at the next poll."""
        self._data_version = -1

    def _take(self, number: int, created: float, who: str, verb: str, text: str, now: float) -> None:
        # Anybody who can write the file can write anything: a row is refused, never fatal.
        self._hide_secrets(number, text)
        if not isinstance(created, (int, float)) or not math.isfinite(created):
            self.answer(number, False, "refused: it does not say when it was asked")
            return
        if created - now > STALE_AFTER_SECONDS:
            self.answer(number, False, "refused: it is dated in the future; set the clock of who asks, and ask again")
            return
        if abs(now - created) > STALE_AFTER_SECONDS:
            self.answer(number, False, f"refused: older than {STALE_AFTER_SECONDS:g} s when it was read; ask again")
            return
        if len(text) > MAX_ARGUMENT_BYTES:
            self.answer(number, False, f"refused: the arguments are over {MAX_ARGUMENT_BYTES} bytes; send less")
            return
        try:
            arguments = validate(verb, _parsed(text))
            refuse_secrets(arguments.get("changes", {}))
        except (UsageError, RecursionError) as error:
            self.answer(number, False, f"refused: {str(error)[:500]}")
            return
        if verb in ("watch", "acknowledge", "silence"):
            ok, told = self.own_verb(verb, arguments)
            if ok:
                self.answer(number, ok, told)
                return
            # An alert of a rule that runs in the kernel.
        self._writer.take_command(number)
        self._accepted.append({"t": "command", "id": number, "verb": verb, "arguments": arguments, "who": who})

    def _hide_secrets(self, number: int, text: str) -> None:
        try:
            arguments = json.loads(text)
            shown = masked(arguments) if isinstance(arguments, dict) else arguments
            if shown != arguments:
                self._writer.hide_arguments(number, json.dumps(shown))
        except (ValueError, RecursionError):
            return  # no arguments at all: refused below

    def answer(self, number: int, ok: bool, message: str) -> None:
        """Write the answer to a command; the caller commits."""
        self._writer.answer_command(number, ok, message, self._clock.time())

    def own_verb(self, verb: str, arguments: dict[str, Any]) -> tuple[bool, str]:
        """Carry out one of the verbs that are the recorder's own: ``watch``, ``acknowledge``, ``silence``."""
        sampler = self.sampler
        assert sampler is not None
        if verb == "watch":
            sampler.watch(float(arguments["seconds"]))
            return True, "watching"
        alert_id = str(arguments["alert_id"])
        if verb == "acknowledge":
            if not sampler.acknowledge(alert_id):
                return False, f"no open alert {alert_id!r}"
            self._later(lambda: self._writer.mark_alert(alert_id, acknowledged=True))
            text = f"alert {alert_id} was acknowledged"
            self._on_event(EventRecord(self._clock.time(), "acknowledged", text, {"alert_id": alert_id}))
            return True, "acknowledged"
        until = self._clock.time() + float(arguments["seconds"])
        if not sampler.silence(alert_id, until):
            return False, f"no open alert {alert_id!r}"
        self._later(lambda: self._writer.mark_alert(alert_id, silenced_until=until))
        return True, f"silenced for {arguments['seconds']:g} s"


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise UsageError(f"the arguments are not JSON ({error})") from error
