"""The one place where a verb becomes an action: a validated command in, one answer out."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from wiseflow_nb.clock import Clock
from wiseflow_nb.config import Settings, canonical_name, is_secret
from wiseflow_nb.errors import WiseflowError
from wiseflow_nb.records import CommandResult, Priority, TaskRecord
from wiseflow_nb.store.commands import refuse_secrets

#: What ``shutdown`` gives the tasks to end, in seconds.
SHUTDOWN_SECONDS = 30.0


class CommandedTask(Protocol):
    """What it needs of a task."""

    @property
    def id(self) -> str: ...


class CommandedTasks(Protocol):
    """What it needs of the task manager."""

    @property
    def paused(self) -> bool: ...

    def get(self, task_id: str) -> TaskRecord | None: ...

    def cancel(self, task_id: str, reason: str = "cancelled") -> bool: ...

    def retry(self, task_id: str) -> CommandedTask: ...

    def reprioritise(self, task_id: str, priority: Priority) -> bool: ...

    def pause(self) -> None: ...

    def resume(self) -> None: ...

    def shutdown(self, mode: str = "drain", timeout: float | None = None) -> None: ...


class CommandedMonitor(Protocol):
    """What it needs of the monitor."""

    def acknowledge(self, alert_id: str) -> bool: ...

    def silence(self, alert_id: str, seconds: float) -> bool: ...


class CommandedRecorder(Protocol):
    """What it needs of the line to the recorder."""

    def request(self, verb: str, arguments: dict[str, Any], timeout: float = 2.0) -> CommandResult: ...

    def put(self, table: str, record: Any) -> None: ...

    def put_meta(self, key: str, encoded_value: str) -> None: ...


class Verbs:
    """Carries out the verbs of a session.

    Parameters
    ----------
    configure
        ``configure(changes, who)`` changes settings, all or none, and returns the new ones.
    not_idle
        Called when a person asked for something.
    acknowledged
        Called with the id of an alert that somebody has seen.
    event
        ``event(kind, message, **data)`` records and publishes.
    """

    def __init__(
        self,
        *,
        tasks: CommandedTasks,
        monitor: CommandedMonitor,
        recorder: CommandedRecorder,
        clock: Clock,
        configure: Callable[[Mapping[str, Any], str], Settings],
        not_idle: Callable[[], None],
        acknowledged: Callable[[str], None],
        event: Callable[..., None],
    ) -> None:
        self._tasks, self._monitor, self._recorder, self._clock = tasks, monitor, recorder, clock
        self._configure, self._not_idle, self._acknowledged, self._event = configure, not_idle, acknowledged, event

    def perform(self, verb: str, arguments: dict[str, Any], who: str, *, relayed: bool = False) -> CommandResult:
        """Carry out a validated verb and answer in one line.

        ``relayed`` says that it came by way of the recorder, which cannot be asked meanwhile.
        """
        try:
            if verb == "watch":
                return self._recorder.request(verb, arguments)
            self._not_idle()
            if verb in ("acknowledge", "silence"):
                return self._alert_verb(verb, arguments, relayed)
            result = self._task_verb(verb, arguments, who, relayed)
        except (WiseflowError, ValueError, TypeError, KeyError) as error:
            return CommandResult(False, str(error))
        if verb in ("pause", "resume"):
            self._recorder.put_meta("paused", json.dumps(self._tasks.paused))
        if verb != "configure":
            self._event("command", f"{verb}: {result.message} (by {who})", verb=verb, ok=result.ok, who=who)
        return result

    def _task_verb(self, verb: str, arguments: dict[str, Any], who: str, relayed: bool) -> CommandResult:
        tasks = self._tasks
        task_id = str(arguments.get("task_id", ""))
        record = tasks.get(task_id) if task_id else None
        if task_id and record is None:
            return CommandResult(False, f"no task {task_id!r}")
        match verb:
            case "cancel":
                asked = record is not None and not record.state.terminal and tasks.cancel(task_id)
                return CommandResult(asked, f"{task_id} was asked to stop" if asked else f"{task_id} is already over")
            case "retry":
                return CommandResult(True, f"{task_id} runs again as {tasks.retry(task_id).id}")
            case "reprioritise":
                priority = Priority.parse(arguments["priority"])
                tasks.reprioritise(task_id, priority)
                return CommandResult(True, f"{task_id} is now {priority.name.lower()}")
            case "pause":
                tasks.pause()
                return CommandResult(True, "paused: no new task starts")
            case "resume":
                tasks.resume()
                return CommandResult(True, "resumed")
            case "resize":
                low, high = int(arguments["min_workers"]), int(arguments["max_workers"])
                self._configure({"min_thread_workers": low, "max_thread_workers": high}, who)
                return CommandResult(True, f"the pool has {low} to {high} workers")
            case "configure":
                if relayed:
                    refuse_secrets(arguments["changes"])
                changed = self._configure(arguments["changes"], who)
                keys = [canonical_name(name) for name in arguments["changes"]]
                names = ", ".join(
                    f"{key.upper()}={'(hidden)' if is_secret(key) else getattr(changed, key)}" for key in keys
                )
                return CommandResult(True, f"set {names}")
            case "shutdown":
                mode = str(arguments["mode"])
                # Off this thread: it may listen to the recorder, and must go on doing so.
                threading.Thread(
                    target=tasks.shutdown,
                    args=(mode,),
                    kwargs={"timeout": SHUTDOWN_SECONDS},
                    name="wiseflow-shutdown",
                    daemon=True,
                ).start()
                return CommandResult(True, f"shutting down the tasks ({mode})")
        return CommandResult(False, f"unknown command {verb!r}")

    def _alert_verb(self, verb: str, arguments: dict[str, Any], relayed: bool) -> CommandResult:
        alert_id = str(arguments["alert_id"])
        mark: dict[str, Any] = {"alert_id": alert_id, "acknowledged": 0, "silenced_until": 0.0}
        if verb == "acknowledge" and self._monitor.acknowledge(alert_id):
            self._acknowledged(alert_id)
            self._recorder.put("mark", mark | {"acknowledged": 1})
            self._event("acknowledged", f"alert {alert_id} was acknowledged", alert_id=alert_id)
            return CommandResult(True, "acknowledged")
        if verb == "silence" and self._monitor.silence(alert_id, seconds := float(arguments["seconds"])):
            self._recorder.put("mark", mark | {"silenced_until": self._clock.time() + seconds})
            return CommandResult(True, f"silenced for {seconds:g} s")
        if relayed:
            # The recorder knew no such alert, so it might have been one that is judged here.
            return CommandResult(False, f"no open alert {alert_id!r}")
        return self._recorder.request(verb, arguments)
