"""The dashboard as a page of its own: Voilà, a token, and a session that watches this machine."""

from __future__ import annotations

import importlib.resources
import ipaddress
import os
import secrets
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs

from wiseflow_nb.config import Settings
from wiseflow_nb.errors import DashboardError, SessionNotFoundError, UsageError

if TYPE_CHECKING:
    from wiseflow_nb.dashboard import Dashboard

#: The session that a page shows when no notebook is live.
SESSION_VARIABLE = "WISEFLOW_SESSION"

#: A page that is left closes its socket at once; a laptop that sleeps is found out by the pings.
VISITOR_GONE_SECONDS = 18.0
#: A kernel that still renders its page is busy; longer than this it is stuck.
RENDER_SECONDS = 120.0
_SWEEP_SECONDS = 2.0
_PING_MILLISECONDS = 5_000
#: More than one interval, or an answer that came in time looks late when the next ping is due.
_PONG_MILLISECONDS = 8_000

_EXTENSIONS = ["anywidget", "@jupyter-widgets/jupyterlab-manager", "@voila-dashboards/widgets-manager8"]


def serve(
    settings: Settings, *, no_token: bool = False, open_browser: bool = False, base_url: str = "/", say: Any = None
) -> None:
    """Serve the dashboard until the process is told to stop (SIGINT or SIGTERM); call it in the main thread.

    Parameters
    ----------
    settings
        ``dashboard_address``, ``dashboard_port`` and ``dashboard_token`` count, and what a session needs.
    no_token
        Let everybody in who can reach the address; loopback addresses only.
    open_browser
        Open the page in the user's browser.
    base_url
        The path that a proxy in front serves the page under.
    say
        Called with each line for people; by default it is written to standard output.

    Raises
    ------
    DashboardError
        If the port is taken or the address is not one of this machine.
    UsageError
        If ``no_token`` is asked for on an address that others can reach.
    """
    address, port = settings.dashboard_address, settings.dashboard_port
    if no_token and not is_loopback(address):
        raise UsageError(
            f"--no-token on {address} would let everybody on the network in; leave it out, or use --address 127.0.0.1"
        )
    check_port(address, port)
    token = "" if no_token else settings.dashboard_token or secrets.token_urlsafe(24)
    base_url = normal_base_url(base_url)
    url = page_url(address, port, base_url, token)
    from wiseflow_nb.session import Session

    stop = _Stop()
    with stop.installed(), _package_on_jupyter_path() as notebook:
        try:
            with Session(settings, title="this machine") as session:
                os.environ[SESSION_VARIABLE] = session.id
                if settings.state_dir:
                    # The page's kernel runs in another directory, so a relative path would differ there.
                    os.environ["WISEFLOW_STATE_DIR"] = str(Path(settings.state_dir).expanduser().absolute())
                os.environ["VOILA_APP_IP"] = "127.0.0.1" if address in {"0.0.0.0", "::", ""} else address

                def ready(loop: Any) -> None:
                    if stop.asked:
                        loop.stop()
                    else:
                        _ready(url, open_browser, say or _say)

                if not stop.asked:
                    server = _make_server(address, port, token, base_url, notebook, ready)
                    server.initialize([])
                    stop.attach(server)
                    _run(server, address, port)
        except KeyboardInterrupt:
            pass


def open_page() -> Dashboard:
    """Return the dashboard of one visitor; the packaged notebook calls this and shows its ``widget``.

    The page's query may name a session (``?session=<id>``). Otherwise it shows the newest live
    notebook, then the server's own session; where there is neither, one for this kernel is started.
    """
    from wiseflow_nb.dashboard import Dashboard
    from wiseflow_nb.view import default_view

    if os.environ.get("VOILA_PREHEAT") == "True":
        from voila.utils import wait_for_request

        # All that is slow has been imported by now; the rest depends on who asks, and when.
        wait_for_request()
    wanted = parse_qs(os.environ.get("QUERY_STRING", "")).get("session", [""])[0]
    try:
        view = default_view()
    except SessionNotFoundError:
        from wiseflow_nb.session import start_default

        return Dashboard(start_default(title="this machine"))
    if wanted:
        # A link to a session that was pruned still shows something.
        with suppress(SessionNotFoundError):
            view = view.open(wanted)
    return Dashboard(view)


def is_loopback(address: str) -> bool:
    """Whether only this machine can reach the address."""
    try:
        return ipaddress.ip_address(address.strip("[]")).is_loopback
    except ValueError:
        return address == "localhost"


def check_port(address: str, port: int) -> None:
    """Bind and release the port.

    Raises
    ------
    DashboardError
        If it is taken, is not allowed, or the address is not one of this machine.
    """
    try:
        family, kind, protocol, _, where = socket.getaddrinfo(
            address or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        with socket.socket(family, kind, protocol) as probe:
            if os.name == "posix":
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(where)
            probe.listen(1)
    except OSError as error:
        raise DashboardError(_port_problem(address, port, error)) from None


def _port_problem(address: str, port: int, error: OSError) -> str:
    import errno

    if isinstance(error, socket.gaierror) or error.errno == errno.EADDRNOTAVAIL:
        return f"{address} is not an address of this machine; use --address 127.0.0.1"
    if error.errno == errno.EACCES:
        return f"port {port} needs privileges; choose one above 1023, for example --port 5001"
    hint = ""
    if sys.platform == "darwin" and port == 5000:
        hint = " (on macOS the AirPlay Receiver takes port 5000: System Settings, General, AirDrop & Handoff)"
    return f"port {port} on {address} is taken{hint}; choose another, for example --port {port % 65535 + 1}"


def normal_base_url(base_url: str) -> str:
    """The path with a slash at both ends.

    Examples
    --------
    >>> normal_base_url("user/ann"), normal_base_url("/"), normal_base_url("")
    ('/user/ann/', '/', '/')
    """
    inner = base_url.strip("/")
    return f"/{inner}/" if inner else "/"


def page_url(address: str, port: int, base_url: str, token: str) -> str:
    """The URL to open.

    Examples
    --------
    >>> page_url("0.0.0.0", 5000, "/", "secret")
    'http://127.0.0.1:5000/?token=secret'
    """
    host = {"0.0.0.0": "127.0.0.1", "": "127.0.0.1", "::": "[::1]"}.get(address, address)
    if ":" in host and not host.startswith("["):
        host = f"[{host}]"
    return f"http://{host}:{port}{base_url}" + (f"?token={token}" if token else "")


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def _ready(url: str, open_browser: bool, say: Callable[[str], None]) -> None:
    say(f"wiseflow dashboard: {url}")
    say("press Ctrl-C to stop")
    if open_browser:
        import webbrowser

        threading.Thread(target=webbrowser.open, args=(url,), daemon=True, name="wiseflow-browser").start()


@contextmanager
def _package_on_jupyter_path() -> Iterator[str]:
    """Let Voilà find the packaged template; yields the path of the packaged notebook."""
    package = importlib.resources.files("wiseflow_nb") / "dashboard"
    with importlib.resources.as_file(package) as directory:
        before = os.environ.get("JUPYTER_PATH")
        os.environ["JUPYTER_PATH"] = str(directory) + (os.pathsep + before if before else "")
        try:
            yield str(directory / "app.ipynb")
        finally:
            if before is None:
                del os.environ["JUPYTER_PATH"]
            else:
                os.environ["JUPYTER_PATH"] = before


class _Stop:
    """Turns the first signal into an orderly end, whatever stage the start has reached.

    Nothing is raised at the first one: an exception in the middle of a start would leave behind
    what was half started. A second one interrupts.
    """

    def __init__(self) -> None:
        self._server: Any = None
        self.asked = False

    @contextmanager
    def installed(self) -> Iterator[None]:
        before = {number: signal.signal(number, self._handle) for number in self._numbers()}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def attach(self, server: Any) -> None:
        # Voilà installs a handler of its own that needs a running loop.
        self._server = server
        for number in self._numbers():
            signal.signal(number, self._handle)

    @staticmethod
    def _numbers() -> list[int]:
        return [int(getattr(signal, name)) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]

    def _handle(self, _number: int, _frame: Any) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        loop = getattr(self._server, "ioloop", None)
        if loop is not None:
            loop.add_callback_from_signal(loop.stop)


def _run(server: Any, address: str, port: int) -> None:
    try:
        server.start()
    except SystemExit:
        # Voilà exits when somebody took the port after it was checked.
        raise DashboardError(f"port {port} on {address} is taken; choose another with --port") from None


def _make_server(
    address: str, port: int, token: str, base_url: str, notebook: str, ready: Callable[[Any], None]
) -> Any:
    import logging

    from jupyter_server.services.kernels.kernelmanager import AsyncMappingKernelManager
    from tornado.ioloop import IOLoop, PeriodicCallback
    from tornado.web import RequestHandler
    from traitlets.config import Config
    from voila.app import Voila

    # Its stubs call what is a coroutine here a plain function.
    base: Any = AsyncMappingKernelManager

    class Kernels(base):  # type: ignore[misc]
        async def start_kernel(self, **options: Any) -> Any:
            # ipykernel 7 warns of TCP at each start; here it listens on loopback, behind a key.
            options.setdefault("extra_arguments", ["--IPKernelApp.log_level=40"])
            return await super().start_kernel(**options)

    class Health(RequestHandler):
        def get(self) -> None:
            self.set_header("Content-Type", "text/plain")
            self.finish("ok\n")

    class Server(Voila):  # type: ignore[misc]
        def init_settings(self) -> Any:
            found = super().init_settings()
            if not token:
                # Without a token the Host header is what keeps a foreign page's DNS rebinding out.
                found["allow_remote_access"] = False
            return found

        def init_handlers(self) -> Any:
            return [(f"{self.server_url.rstrip('/')}/health", Health), *super().init_handlers()]

        def listen(self) -> None:
            loop = IOLoop.current()
            sweeper = Sweeper(self.kernel_manager, loop.time)
            callback = PeriodicCallback(sweeper.sweep, _SWEEP_SECONDS * 1000)
            loop.add_callback(callback.start)
            loop.add_callback(ready, loop)
            super().listen()

        def stop(self) -> None:
            import shutil

            from jupyter_core.utils import run_sync

            # At once: a preheated kernel waits for its visitor and would not hear a polite request.
            run_sync(self.kernel_manager.shutdown_all)(now=True)
            shutil.rmtree(self.connection_dir, ignore_errors=True)

    # Tornado takes Jupyter's milliseconds for seconds of its own and warns at every connection.
    logging.getLogger("tornado.general").setLevel(logging.ERROR)
    options = {
        "multi_kernel_manager_class": Kernels,
        "template": "wiseflow",
        "allow_template_override": "NO",
        "file_allowlist": [],
        "extension_allowlist": _EXTENSIONS,
        "preheat_kernel": True,
        "default_pool_size": 1,
        "show_tracebacks": False,
    }
    return Server(
        config=Config({"VoilaConfiguration": options}),
        config_file_paths=[],
        ip=address,
        port=port,
        port_retries=0,
        open_browser=False,
        token=token,
        base_url=base_url,
        notebook_path=notebook,
        log_level=logging.ERROR,
        tornado_settings={"ws_ping_interval": _PING_MILLISECONDS, "ws_ping_timeout": _PONG_MILLISECONDS},
    )


class Sweeper:
    """Ends the kernels of visitors who have gone.

    Upstream's goodbye request is refused, and a kernel that pushes is never idle, so what counts is
    whether a page is connected. Preheated kernels wait in a pool and are left alone.
    """

    def __init__(self, manager: Any, now: Callable[[], float]) -> None:
        self._manager = manager
        self._now = now
        self._alone_since: dict[str, float] = {}

    def gone(self) -> list[str]:
        """The kernels to end now."""
        now, waiting = self._now(), self._waiting()
        alone: dict[str, float] = {}
        found = []
        for kernel_id in self._manager.list_kernel_ids():
            if kernel_id in waiting or self._manager._kernel_connections.get(kernel_id, 0) > 0:
                continue
            since = alone[kernel_id] = self._alone_since.get(kernel_id, now)
            busy = getattr(self._manager.get_kernel(kernel_id), "execution_state", "") == "busy"
            if now - since >= (RENDER_SECONDS if busy else VISITOR_GONE_SECONDS):
                found.append(kernel_id)
        self._alone_since = alone
        return found

    async def sweep(self) -> None:
        """End them."""
        from jupyter_core.utils import ensure_async

        for kernel_id in self.gone():
            if kernel_id in self._manager:
                await ensure_async(self._manager.shutdown_kernel(kernel_id, now=True))

    def _waiting(self) -> set[str]:
        pools: dict[str, list[Any]] = getattr(self._manager, "_pools", {})
        done = [task for pool in pools.values() for task in pool if task.done() and not task.cancelled()]
        return {task.result()["kernel_id"] for task in done if task.exception() is None}
