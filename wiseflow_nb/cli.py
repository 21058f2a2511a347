"""The command line: ``wiseflow dashboard | status | sessions | tasks | cancel | config | export | doctor``."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wiseflow_nb.errors import CommandError, DashboardError, SessionNotFoundError, UsageError, WiseflowError

if TYPE_CHECKING:
    from wiseflow_nb.config import Settings
    from wiseflow_nb.view import SessionView

#: Exit codes: the thing asked for could not be done; the question itself was wrong.
FAILED, MISUSED = 1, 2
_FRAMES = ("history", "task_history", "alert_history", "cell_history", "events")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return the exit code (0 done, 1 could not be done, 2 wrong arguments or settings).

    Examples
    --------
    >>> main(["config", "--state-dir", "/nowhere", "--json"]) # doctest: +SKIP
    0
    """
    arguments = _parser().parse_args(argv)
    run: Callable[[argparse.Namespace], int] = arguments.run
    try:
        return run(arguments)
    except (DashboardError, CommandError) as error:
        return _complain(error, FAILED)
    except WiseflowError as error:
        return _complain(error, MISUSED)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader (head, less) has seen enough; the interpreter must not flush into it again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _complain(error: Exception, code: int) -> int:
    print(f"wiseflow: {' '.join(str(error).split())}", file=sys.stderr)
    return code


def _parser() -> argparse.ArgumentParser:
    from wiseflow_nb import __version__

    parser = argparse.ArgumentParser(
        prog="wiseflow", description="Watch, bound and record the resources of heavy notebook work."
    )
    parser.add_argument("--version", action="version", version=f"wiseflow {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, run: Callable[[argparse.Namespace], int], help_text: str) -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=help_text, description=help_text[0].upper() + help_text[1:] + ".")
        made.add_argument("--state-dir", metavar="DIR", help="where sessions are kept")
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

    command("status", _status, "show how the live sessions stand")

    sessions = command("sessions", _sessions, "list the recorded sessions, live ones first")
    sessions.add_argument("--json", action="store_true", help="print JSON")

    tasks = command("tasks", _tasks, "list the tasks of a session")
    tasks.add_argument("session", nargs="?", help="a session's id (default: the newest live one)")
    tasks.add_argument("--json", action="store_true", help="print JSON")

    cancel = command("cancel", _cancel, "cancel a task of a live session")
    cancel.add_argument("task", help="a task's id or name")
    cancel.add_argument("--session", help="a session's id (default: the newest live one)")

    config = command("config", _config, "show every setting with its value, unit and source")
    config.add_argument("--json", action="store_true", help="print JSON")

    export = command("export", _export, "write a session's histories to a directory")
    export.add_argument("session", help="a session's id")
    export.add_argument("path", type=Path, help="directory to write to (made if missing)")
    export.add_argument("--format", choices=("csv", "parquet"), default="csv", help="default csv")

    command("doctor", _doctor, "check what wiseflow finds on this machine")
    return parser


def _settings(arguments: argparse.Namespace, **more: Any) -> Settings:
    from wiseflow_nb.config import load_settings

    return load_settings({"state_dir": arguments.state_dir, **more})


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
    from wiseflow_nb.session import open_session, sessions
    from wiseflow_nb.text import status_text

    settings = _settings(arguments)
    live = [info for info in sessions(settings) if info.state == "live"]
    if not live:
        print("no live session; %load_ext wiseflow_nb in a notebook starts one, `wiseflow sessions` lists the ended")
    for number, info in enumerate(live):
        view = open_session(info.session_id, settings)
        try:
            print("\n" * bool(number) + status_text(view.snapshot()))
        finally:
            view.close()
    return 0


def _sessions(arguments: argparse.Namespace) -> int:
    from wiseflow_nb.records import to_json_dict
    from wiseflow_nb.session import sessions
    from wiseflow_nb.text import sessions_text

    found = sessions(_settings(arguments))
    print(_json([to_json_dict(info) for info in found]) if arguments.json else sessions_text(found))
    return 0


def _tasks(arguments: argparse.Namespace) -> int:
    from wiseflow_nb.records import to_json_dict
    from wiseflow_nb.text import tasks_text

    view = _open(arguments.session, _settings(arguments))
    try:
        found = sorted(view.snapshot().tasks, key=lambda record: record.created_seconds)
    finally:
        view.close()
    print(_json([to_json_dict(record) for record in found]) if arguments.json else tasks_text(found))
    return 0


def _cancel(arguments: argparse.Namespace) -> int:
    view = _open(arguments.session, _settings(arguments))
    try:
        named = [
            record
            for record in view.snapshot().tasks
            if arguments.task == record.task_id or (arguments.task == record.name and not record.state.terminal)
        ]
        if not named:
            raise UsageError(f"no task {arguments.task!r} to cancel; `wiseflow tasks` lists them")
        if len(named) > 1:
            ids = ", ".join(record.task_id for record in named)
            raise UsageError(f"{len(named)} tasks are named {arguments.task!r}: give one of the ids {ids}")
        result = view.cancel(named[0].task_id)
    finally:
        view.close()
    if not result.ok:
        raise CommandError(result.message)
    print(result.message)
    return 0


def _config(arguments: argparse.Namespace) -> int:
    from wiseflow_nb.config import is_secret, unit_of
    from wiseflow_nb.text import settings_text

    settings = _settings(arguments)
    if not arguments.json:
        print(settings_text(settings))
        return 0
    values = {
        name.upper(): {
            "value": None if is_secret(name) else value,
            "unit": unit_of(name),
            "source": settings.source(name),
        }
        for name, value in settings.model_dump().items()
    }
    print(_json(values))
    return 0


def _export(arguments: argparse.Namespace) -> int:
    view = _open(arguments.session, _settings(arguments))
    try:
        try:
            arguments.path.mkdir(parents=True, exist_ok=True)
            for name in _FRAMES:
                frame = getattr(view, name)()
                target = arguments.path / f"{name}.{arguments.format}"
                if arguments.format == "csv":
                    frame.to_csv(target)
                else:
                    # Parquet keeps the attributes as JSON, and not all of theirs are.
                    frame.attrs = {}
                    frame.to_parquet(target)
                print(f"{target}: {len(frame)} rows")
        except OSError as error:
            raise UsageError(f"{error.filename or arguments.path}: {error.strerror}; choose another path") from None
        except ImportError:
            raise UsageError('Parquet needs pyarrow: pip install "wiseflow-nb[parquet]", or use --format csv') from None
    finally:
        view.close()
    return 0


def _open(session_id: str | None, settings: Settings) -> SessionView:
    from wiseflow_nb.session import open_session, sessions

    if session_id is None:
        found = sessions(settings)
        if not found:
            raise SessionNotFoundError("no session is recorded; %load_ext wiseflow_nb in a notebook starts one")
        session_id = found[0].session_id
    return open_session(session_id, settings)


def _doctor(arguments: argparse.Namespace) -> int:
    import platform
    from importlib.metadata import PackageNotFoundError, version

    from wiseflow_nb import __version__
    from wiseflow_nb.dashboard.serve import check_port
    from wiseflow_nb.lines import table
    from wiseflow_nb.store.paths import file_system_of, sessions_root

    rows: list[tuple[str, str, str]] = [
        ("ok", "wiseflow_nb", f"{__version__} on Python {platform.python_version()}, {platform.platform(terse=True)}")
    ]
    try:
        settings = _settings(arguments)
        rows.append(("ok", "settings", "valid; `wiseflow config` shows them"))
    except WiseflowError as error:
        rows.append(("bad", "settings", str(error)))
        print(table(["", "what", "found"], rows))
        return FAILED
    rows.extend(_limit_rows())
    try:
        root, why = sessions_root(settings.state_dir)
        kind = file_system_of(root)
        rows.append(("note" if why else "ok", "sessions", f"{root}" + (f" ({kind})" if kind else "")))
        if why:
            rows.append(("note", "", why))
    except WiseflowError as error:
        rows.append(("bad", "sessions", str(error)))
    try:
        check_port(settings.dashboard_address, settings.dashboard_port)
        rows.append(("ok", "dashboard", f"port {settings.dashboard_port} on {settings.dashboard_address} is free"))
    except DashboardError as error:
        rows.append(("note", "dashboard", str(error)))
    for name in ("voila", "ipywidgets", "anywidget", "plotly", "pandas", "psutil", "ipykernel", "jupyterlab"):
        try:
            rows.append(("ok", name, version(name)))
        except PackageNotFoundError:
            rows.append(("note", name, "not installed here"))
    for state, what, found in rows:
        print(f"{state:4}  {what:12}  {' '.join(found.split())}")
    return FAILED if any(state == "bad" for state, _, _ in rows) else 0


def _limit_rows() -> list[tuple[str, str, str]]:
    from wiseflow_nb.quantities import size
    from wiseflow_nb.resources import ResourceMonitor

    limits = ResourceMonitor().limits
    try:
        mounts = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        mounts = ""
    found = [version for version, kind in (("1", "cgroup"), ("2", "cgroup2")) if f" - {kind} " in mounts]
    return [
        ("ok", "memory", f"{size(limits.memory_limit_bytes)} ({limits.memory_source})"),
        ("ok", "cpu", f"{limits.cpu_limit_cores:g} cores ({limits.cpu_source})"),
        ("ok", "cgroup", f"version {' and '.join(found)}" if found else "none"),
    ]


def _json(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
