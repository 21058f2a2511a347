"""``%wiseflow`` and ``%%wiseflow``."""

from __future__ import annotations

import ast
import shlex
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from IPython.core.error import UsageError
from IPython.core.magic import Magics, line_cell_magic, magics_class
from IPython.core.magic_arguments import MagicArgumentParser

from wiseflow_nb.errors import WiseflowError
from wiseflow_nb.notebook._cellcode import CellCode
from wiseflow_nb.notebook._cells import CellMeter
from wiseflow_nb.notebook._extension import Extension, say
from wiseflow_nb.records import TaskRecord
from wiseflow_nb.text import cell_text, settings_text, status_text, tasks_text

if TYPE_CHECKING:
    from wiseflow_nb.session import Session

_CELL_VERBS = ("task", "track")


def _task_parser() -> Any:
    make: Any = MagicArgumentParser
    parser = make("%%wiseflow task", add_help=False)
    parser.add_argument("--name", default="")
    parser.add_argument("--priority", default="normal", choices=("low", "normal", "high", "critical"))
    parser.add_argument("--after", action="append", default=[])
    parser.add_argument("--retries", type=int, default=0)
    parser.add_argument("--timeout", type=float, default=None)
    parser.add_argument("--to", default="")
    return parser


def _by_age(records: Iterable[TaskRecord]) -> list[TaskRecord]:
    return sorted(records, key=lambda record: record.created_seconds)


@magics_class
class WiseflowMagics(Magics):
    """The magics of one shell."""

    def __init__(self, shell: Any, extension: Extension) -> None:
        super().__init__(shell)
        # The base class says that there may be none.
        self._shell: Any = shell
        self._extension = extension
        self._tasks: dict[str, Any] = {}
        self._count = 0
        self._line_verbs: dict[str, Callable[[list[str]], None]] = {
            "status": self._status,
            "dashboard": self._dashboard,
            "tasks": self._list,
            "config": self._config,
            "start": self._start,
            "stop": self._stop,
        }

    @line_cell_magic
    def wiseflow(self, line: str, cell: str | None = None) -> Any:
        """Watch and steer the session of this kernel.

        Lines::

            %wiseflow                          how the session stands
            %wiseflow dashboard                the live dashboard
            %wiseflow tasks                    every task
            %wiseflow config                   every setting, its value and source
            %wiseflow config cpu_threshold=80  change settings, all or none
            %wiseflow stop                     close the session (its record stays)
            %wiseflow start                    open one again

        Cells::

            %%wiseflow track
            prints what the cell cost

            %%wiseflow task --name etl --priority high --after load --retries 3 --timeout 60 --to job
            runs the cell on a worker thread and returns the Task at once

        ``--after NAME`` (repeatable) waits for a task by name or id; ``--to VARIABLE`` also binds the
        Task to a variable. The code sees the notebook's names as they were when it was submitted, then
        the names handed back by cells it comes ``--after``. It works on a copy: what it binds is not
        seen by the notebook but comes back as a dict from ``task.result()`` (names with a leading
        underscore are left out). Objects are shared, not copied.
        """
        try:
            words = shlex.split(line)
        except ValueError as error:
            raise UsageError(f"%wiseflow: {error}; close the quote") from None
        verbs = tuple(self._line_verbs) if cell is None else _CELL_VERBS
        verb = words[0] if words else ("status" if cell is None else "track")
        if verb not in verbs:
            sign = "%" if cell is None else "%%"
            raise UsageError(f"{sign}wiseflow has no {verb!r}; use one of {', '.join(verbs)}")
        if verb in {"status", "dashboard", "tasks", "start", "stop", "track"} and words[1:]:
            raise UsageError(f"wiseflow {verb} takes no arguments, got {' '.join(words[1:])!r}; remove them")
        if verb == "track":
            # Outside of the translation below: an error of the cell's own code passes as it is.
            return self._track(cell or "")
        try:
            if verb == "task":
                return self._task(words[1:], cell or "")
            return self._line_verbs[verb](words[1:])
        except WiseflowError as error:
            raise UsageError(str(error)) from None

    def _session(self) -> Session:
        session = self._extension.session
        if session is None:
            raise UsageError("no session is open in this kernel; %wiseflow start opens one")
        return session

    def _status(self, _words: list[str]) -> None:
        say(status_text(self._session().view.snapshot()))

    def _list(self, _words: list[str]) -> None:
        say(tasks_text(_by_age(self._session().view.task_records())))

    def _dashboard(self, _words: list[str]) -> None:
        from IPython import display as ipython_display

        from wiseflow_nb.dashboard import Dashboard

        dashboard = Dashboard(self._session())
        self._extension.dashboards.append(dashboard)
        show: Any = ipython_display.display
        show(dashboard.widget)

    def _config(self, words: list[str]) -> None:
        session = self._session()
        changes: dict[str, str] = {}
        for word in words:
            name, sign, value = word.partition("=")
            if not sign or not name:
                raise UsageError(f"%wiseflow config takes name=value, got {word!r}; for example cpu_threshold=80")
            changes[name] = value
        if not changes:
            say(settings_text(session.settings))
            return
        settings = session.configure(source="%wiseflow config", **changes)
        values = settings.public_values()
        say(", ".join(f"{name.upper()} = {values.get(name.lower(), '(hidden)')}" for name in changes))

    def _start(self, _words: list[str]) -> None:
        if self._extension.session is not None:
            raise UsageError(f"session {self._extension.session.id} is open already; %wiseflow shows it")
        say(f"wiseflow_nb: session {self._extension.start().id} is recording")

    def _stop(self, _words: list[str]) -> None:
        session = self._session()
        self._extension.stop("%wiseflow stop")
        self._tasks.clear()
        say(f'session {session.id} is closed; wiseflow_nb.open_session("{session.id}") reads its record')

    def _task(self, words: list[str], cell: str) -> Any:
        arguments = _task_parser().parse_args(words)
        if arguments.retries < 0:
            raise UsageError(f"--retries {arguments.retries} is less than 0; give 0 or more")
        if arguments.timeout is not None and not arguments.timeout > 0:
            raise UsageError(f"--timeout {arguments.timeout} is not more than 0; give seconds")
        if arguments.to and not arguments.to.isidentifier():
            raise UsageError(f"--to {arguments.to!r} is not a variable's name")
        session = self._session()
        self._count += 1
        name = arguments.name or f"cell-{self._count}"
        handed, ids = self._dependencies(session, arguments.after)
        code = CellCode(self._shell.transform_cell(cell), name, self._shell.user_ns)
        options: dict[str, Any] = {"name": name, "priority": arguments.priority}
        if ids:
            options["dependencies"] = ids
        if arguments.retries:
            from wiseflow_nb.tasks import Retry

            options["retry"] = Retry(arguments.retries)
        if arguments.timeout is not None:
            options["timeout"] = arguments.timeout
        task = session.tasks.options(**options).submit(code, *handed)
        self._tasks[name] = task
        if arguments.to:
            self._shell.user_ns[arguments.to] = task
        return task

    def _dependencies(self, session: Session, after: list[str]) -> tuple[list[Any], list[str]]:
        """Tasks whose results are merged in, and the ids of others that only have to complete first."""
        handed: list[Any] = []
        ids: list[str] = []
        records = None
        for wanted in after:
            if wanted in self._tasks:
                handed.append(self._tasks[wanted])
                continue
            if records is None:
                records = _by_age(session.view.task_records())
            found = [record.task_id for record in records if wanted in (record.task_id, record.name)]
            if not found:
                raise UsageError(f"--after {wanted!r} is no task of this session; %wiseflow tasks lists them")
            ids.append(found[-1])
        return handed, ids

    def _track(self, cell: str) -> Any:
        meter = CellMeter(self._session())
        source = self._shell.transform_cell(cell)
        filename = self._shell.compile.cache(source, self._shell.execution_count)
        tree = ast.parse(source, filename)
        last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
        names = self._shell.user_ns
        record = meter.begin(self._shell.execution_count, cell)
        ok, value = False, None
        try:
            exec(compile(tree, filename, "exec"), names)
            if isinstance(last, ast.Expr):
                value = eval(compile(ast.Expression(last.value), filename, "eval"), names)
            ok = True
        finally:
            say(cell_text(meter.end(record, ok)))
        # As in a plain cell, a semicolon after the last expression keeps it from being shown.
        return None if cell.rstrip().endswith(";") else value
