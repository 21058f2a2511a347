"""The command line: ``wiseflow dashboard | status | sessions | tasks | cancel | report | config | export | doctor``."""

from __future__ import annotations

import argparse
import json
import os
import sqlite3
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from wiseflow_nb.errors import ConfigurationError, SessionNotFoundError, UsageError, WiseflowError

if TYPE_CHECKING:
    from wiseflow_nb.config import Settings
    from wiseflow_nb.records import SessionInfo
    from wiseflow_nb.view import StoreView

#: Exit codes: the thing asked for could not be done; the question itself was wrong.
FAILED, MISUSED = 1, 2
LATEST = "latest"
#: So many ids are named where several tasks may be meant.
MOST_IDS = 20
_WORDS = ("history", "tasks", "alerts", "cells", "events", "commands")
_WHICH = "a session's id, the start of one, or `latest`"
_PAINT = {
    **dict.fromkeys(("live", "ok", "completed"), "32"),
    **dict.fromkeys(("warn", "warning", "cancelling", "retry_wait"), "33"),
    **dict.fromkeys(("crashed", "fail", "failed", "lost", "timed_out", "abandoned", "critical"), "31"),
    "running": "36",
}


class _Parser(argparse.ArgumentParser):
    """Wrong arguments are one line, not the usage and then the error."""

    def error(self, message: str) -> NoReturn:
        self.exit(MISUSED, f"wiseflow: {_flat(message)}; `{self.prog} --help` tells more\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return the exit code (0 done, 1 refused or failed, 2 wrong arguments or settings).

    Examples
    --------
    >>> main(["config", "--state-dir", "/nowhere", "--json"]) # doctest: +SKIP
    0
    """
    for stream in (sys.stdout, sys.stderr):
        # What a terminal's encoding lacks is shown escaped, never a traceback.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    arguments = _parser().parse_args(argv)
    run: Callable[[argparse.Namespace], int] = arguments.run
    try:
        code = run(arguments)
        sys.stdout.flush()
        return code
    except (UsageError, ConfigurationError, SessionNotFoundError) as error:
        return _complain(error, MISUSED)
    except BrokenPipeError:
        # The reader (head, less) has seen enough; the interpreter must not flush into it again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (WiseflowError, sqlite3.Error, OSError) as error:
        return _complain(error, FAILED)
    except KeyboardInterrupt:
        return 130


def _complain(error: Exception, code: int) -> int:
    print(f"wiseflow: {_flat(error)}", file=sys.stderr)
    return code


def _flat(text: object) -> str:
    from wiseflow_nb.lines import one_line

    return " ".join(one_line(str(text), 2000).split())


def _parser() -> argparse.ArgumentParser:
    from wiseflow_nb import __version__

    parser = _Parser(prog="wiseflow", description="Watch, bound and record the resources of heavy notebook work.")
    parser.add_argument("--version", action="version", version=f"wiseflow {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(
        name: str, run: Callable[[argparse.Namespace], int], help_text: str, *, reads: bool = False
    ) -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=help_text, description=help_text[0].upper() + help_text[1:] + ".")
        made.add_argument("--state-dir", metavar="DIR", help="where sessions are kept")
        if reads:
            made.add_argument("--json", action="store_true", help="print one JSON document")
        made.set_defaults(run=run)
        return made

    dashboard = command("dashboard", _dashboard, "serve the live dashboard in the browser")
    dashboard.add_argument("--port", type=int, help="port to listen on (default 5000)")
    dashboard.add_argument("--address", help="address to listen on (default 127.0.0.1)")
    token = dashboard.add_mutually_exclusive_group()
    token.add_argument("--token", help="the token that visitors need (default: a new one, printed in the URL)")
    token.add_argument("--no-token", action="store_true", help="let everybody on this machine in")
    dashboard.add_argument("--open", action="store_true", help="open the page in the browser")
    dashboard.add_argument("--base-url", default="/", metavar="PATH", help="path under which a proxy serves the page")

    status = command("status", _status, "show how the live sessions stand", reads=True)
    status.add_argument("session", nargs="?", help=f"{_WHICH} (default: every live one)")

    command("sessions", _sessions, "list the recorded sessions, live ones first", reads=True)

    tasks = command("tasks", _tasks, "list the tasks of a session", reads=True)
    tasks.add_argument("session", nargs="?", help=f"{_WHICH} (default: the newest live one)")
    tasks.add_argument(
        "--all", action="store_true", help="of thousands too (default: those not ended and those that changed last)"
    )

    cancel = command("cancel", _cancel, "cancel a task of a live session")
    cancel.add_argument("task", help="a task's id or name")
    cancel.add_argument("--session", help=f"{_WHICH} (default: the newest live one)")

    report = command("report", _report, "tell how a session ended, and what did it", reads=True)
    report.add_argument("session", nargs="?", help=f"{_WHICH} (default: the newest that is over)")
    report.add_argument("--html", type=Path, metavar="FILE", help="write it as one HTML page instead")

    command("config", _config, "show every setting with its value, unit and source", reads=True)

    export = command("export", _export, "write a session's tables to a directory, or one of them to a file")
    export.add_argument("session", help=_WHICH)
    export.add_argument("path", type=Path, help="directory (made if missing), or a file ending in .csv or .parquet")
    export.add_argument(
        "--what", type=_tables, metavar="TABLES", help=f"some of {','.join(_WORDS)} (default: all; to a file: history)"
    )
    export.add_argument("--format", choices=("csv", "parquet"), help="in a directory; default csv")

    command("doctor", _doctor, "check what wiseflow finds on this machine", reads=True)
    return parser


def _tables(text: str) -> tuple[str, ...]:
    words = tuple(dict.fromkeys(word.strip() for word in text.split(",") if word.strip()))
    unknown = [word for word in words if word not in _WORDS]
    if unknown or not words:
        raise argparse.ArgumentTypeError(f"{text[:80]!r} is not among {', '.join(_WORDS)} (several with commas)")
    return words


def _settings(arguments: argparse.Namespace, **more: Any) -> Settings:
    from wiseflow_nb.config import load_settings

    return load_settings({"state_dir": arguments.state_dir, **more})


# Where it is shown.


def _width() -> int:
    """Columns of the terminal; 0 where the output goes elsewhere and must stay whole."""
    import shutil

    return shutil.get_terminal_size().columns if sys.stdout.isatty() else 0


def _paint(cell: str) -> str:
    code = _PAINT.get(cell)
    if code is None or not sys.stdout.isatty() or os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb":
        return cell
    return f"\x1b[{code}m{cell}\x1b[0m"


def _print_json(value: Any) -> None:
    from wiseflow_nb.records import valid

    # ASCII: no terminal is driven by a name, and no encoding lacks a letter.
    print(json.dumps(valid(value), indent=2, allow_nan=False))


def _print_json_list(values: Iterable[Any]) -> None:
    """As ``_print_json`` of a list, one value at a time: of a million, all at once are gigabytes."""
    from wiseflow_nb.records import valid

    begin = "["
    for value in values:
        print(begin, json.dumps([valid(value)], indent=2, allow_nan=False)[2:-2], sep="\n", end="")
        begin = ","
    print("[]" if begin == "[" else "\n]")


# Which session is meant.


def _found(settings: Settings) -> list[SessionInfo]:
    from wiseflow_nb.session import sessions

    found = sessions(settings)
    if not found:
        from wiseflow_nb.store.finding import newer_text

        remedy = newer_text(settings.state_dir) or "%load_ext wiseflow_nb in a notebook starts one"
        raise SessionNotFoundError(f"no session is recorded; {remedy}")
    return found


def _named(text: str, settings: Settings) -> str:
    """The id that is meant by an id, the start of one, or ``latest``."""
    if text == LATEST:
        return max(_found(settings), key=lambda info: info.started_seconds).session_id
    from wiseflow_nb.session import sessions

    ids = [info.session_id for info in sessions(settings)]
    meant = [text] if text in ids else [name for name in ids if text and name.startswith(text)]
    if len(meant) > 1:
        shown = ", ".join(meant[:5]) + (", ..." if len(meant) > 5 else "")
        raise UsageError(f"{len(meant)} sessions begin with {text!r}: {shown}; give more of the id")
    # One that no list has (it may be damaged) says for itself what is wrong with it.
    return meant[0] if meant else text


def _open(text: str | None, settings: Settings) -> StoreView:
    from wiseflow_nb.session import open_session

    return open_session(_found(settings)[0].session_id if text is None else _named(text, settings), settings)


# The commands.


def _dashboard(arguments: argparse.Namespace) -> int:
    settings = _settings(
        arguments,
        dashboard_port=arguments.port,
        dashboard_address=arguments.address,
        dashboard_token=arguments.token,
    )
    from wiseflow_nb.dashboard.serve import serve

    serve(settings, no_token=arguments.no_token, open_browser=arguments.open, base_url=arguments.base_url)
    return 0


def _status(arguments: argparse.Namespace) -> int:
    from wiseflow_nb.lines import folded
    from wiseflow_nb.session import open_session, sessions
    from wiseflow_nb.text import status_dict, status_text

    settings = _settings(arguments)
    if arguments.session is not None:
        meant = [_named(arguments.session, settings)]
    else:
        meant = [info.session_id for info in sessions(settings) if info.state == "live"]
    shots = []
    for session_id in meant:
        view = open_session(session_id, settings)
        try:
            shots.append(view.snapshot())
        finally:
            view.close()
    if arguments.json:
        _print_json([status_dict(shot) for shot in shots])
    elif not shots:
        print("no live session; %load_ext wiseflow_nb in a notebook starts one, `wiseflow sessions` lists the ended")
    else:
        print(folded("\n\n".join(status_text(shot) for shot in shots), _width()))
    return 0


def _sessions(arguments: argparse.Namespace) -> int:
    from wiseflow_nb.records import to_json_dict
    from wiseflow_nb.session import sessions
    from wiseflow_nb.store.finding import newer_text
    from wiseflow_nb.text import sessions_text

    settings = _settings(arguments)
    found, newer = sessions(settings), newer_text(settings.state_dir)
    if arguments.json:
        _print_json([to_json_dict(info) for info in found])
    else:
        print(sessions_text(found, _width(), _paint))
    if newer:
        print(_flat(newer), file=sys.stderr if arguments.json else sys.stdout)
    return 0


def _tasks(arguments: argparse.Namespace) -> int:
    from wiseflow_nb.records import to_json_dict
    from wiseflow_nb.text import tasks_text

    view = _open(arguments.session, _settings(arguments))
    try:
        shot = None if arguments.all else view.snapshot()
        records = view.task_records() if shot is None else shot.tasks
    finally:
        view.close()
    found = sorted(records, key=lambda record: record.created_seconds)
    if arguments.json:
        _print_json_list(to_json_dict(record) for record in found)
    else:
        print(tasks_text(found, _width(), _paint))
    if shot is not None and shot.older_rev:
        total = sum(shot.task_counts.values())
        print(
            f"wiseflow: {len(found)} of {total} tasks, those that have not ended and those that changed last; "
            "--all lists all",
            file=sys.stderr,
        )
    return 0


def _cancel(arguments: argparse.Namespace) -> int:
    from wiseflow_nb.records import valid_text

    view = _open(arguments.session, _settings(arguments))
    try:
        task = valid_text(arguments.task)
        meant = [task] if view.task(task) is not None else view.unfinished_named(task)
        if not meant:
            raise UsageError(f"no task {arguments.task!r} to cancel; `wiseflow tasks` lists them")
        if len(meant) > 1:
            shown = ", ".join(meant[:MOST_IDS]) + (", ..." if len(meant) > MOST_IDS else "")
            raise UsageError(f"{len(meant)} tasks are named {arguments.task!r}: give one of the ids {shown}")
        result = view.cancel(meant[0])
    finally:
        view.close()
    if not result.ok:
        print(f"wiseflow: {_flat(result.message)}", file=sys.stderr)
        return FAILED
    print(_flat(result.message))
    return 0


def _report(arguments: argparse.Namespace) -> int:
    from wiseflow_nb.lines import folded
    from wiseflow_nb.report._text import report_text

    if arguments.json and arguments.html is not None:
        raise UsageError("--json and --html are two answers: give one of them")
    settings, meant = _settings(arguments), arguments.session
    if meant is None:
        found = _found(settings)
        over = [info for info in found if info.state != "live"]
        meant = (over or found)[0].session_id
    view = _open(meant, settings)
    try:
        report = view.report()
    finally:
        view.close()
    if arguments.html is not None:
        with _writing(arguments.html):
            arguments.html.write_text(report.to_html(), encoding="utf-8")
        print(arguments.html)
    elif arguments.json:
        _print_json(report.to_dict())
    else:
        print(folded(report_text(report, _width()), _width()))
    return 0


def _config(arguments: argparse.Namespace) -> int:
    from wiseflow_nb.config import is_secret, unit_of
    from wiseflow_nb.text import settings_text

    settings = _settings(arguments)
    if not arguments.json:
        print(settings_text(settings, _width()))
        return 0
    values = {
        name.upper(): {
            "value": None if is_secret(name) else value,
            "unit": unit_of(name),
            "source": settings.source(name),
        }
        for name, value in settings.model_dump().items()
    }
    _print_json(values)
    return 0


def _export(arguments: argparse.Namespace) -> int:
    from wiseflow_nb.frames import EXPORTS

    path: Path = arguments.path
    to_file = path.suffix in (".csv", ".parquet") and not path.is_dir()
    what = arguments.what or (("history",) if to_file else _WORDS)
    if to_file and len(what) > 1:
        raise UsageError(f"{path} is one file and {', '.join(what)} are {len(what)} tables; give a directory")
    if to_file and arguments.format not in (None, path.suffix[1:]):
        raise UsageError(f"--format {arguments.format} does not go with {path}; leave it out")
    view = _open(arguments.session, _settings(arguments))
    try:
        with _writing(path):
            if not to_file:
                path.mkdir(parents=True, exist_ok=True)
            for word in what:
                target = path if to_file else path / f"{EXPORTS[word]}.{arguments.format or 'csv'}"
                view.export(target, word)
                print(target)
    finally:
        view.close()
    return 0


class _writing:  # noqa: N801
    """A path that cannot be written to is the question's fault."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, OSError) and not isinstance(error, (BrokenPipeError, WiseflowError)):
            where = error.filename or self._path
            raise UsageError(f"{where}: {error.strerror or error}; choose another path") from None


def _doctor(arguments: argparse.Namespace) -> int:
    from wiseflow_nb.doctor import FAIL, OK, Check, check_all

    checks: list[Check] = []
    try:
        settings = _settings(arguments)
        checks.append(Check(OK, "settings", "valid; `wiseflow config` shows them"))
        checks.extend(check_all(settings))
        checks.append(_port(settings))
    except ConfigurationError as error:
        checks.append(Check(FAIL, "settings", str(error), "correct the setting"))
    if arguments.json:
        _print_json([{"state": c.state, "what": c.what, "found": c.found, "remedy": c.remedy} for c in checks])
    else:
        print("\n".join(_doctor_lines(checks)))
    return FAILED if any(check.state == FAIL for check in checks) else 0


def _port(settings: Settings) -> Any:
    from wiseflow_nb.dashboard.serve import check_port
    from wiseflow_nb.doctor import OK, WARN, Check
    from wiseflow_nb.errors import DashboardError

    try:
        check_port(settings.dashboard_address, settings.dashboard_port)
    except DashboardError as error:
        return Check(WARN, "dashboard", str(error), "choose another with --port, or see whether one runs already")
    return Check(OK, "dashboard", f"port {settings.dashboard_port} on {settings.dashboard_address} is free")


def _doctor_lines(checks: Iterable[Any]) -> Iterable[str]:
    import textwrap

    indent = " " * 20
    for check in checks:
        remedy = f" -> {_flat(check.remedy)}" if check.remedy else ""
        found = f"{_flat(check.found)}{remedy}"
        room = max(_width() - len(indent), 0)
        lines = textwrap.wrap(found, room) if room >= 20 else [found]
        yield f"{_paint(check.state)}{' ' * (4 - len(check.state))}  {check.what:12}  " + f"\n{indent}".join(lines)
