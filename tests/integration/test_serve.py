"""The standalone dashboard as a real child process."""

from __future__ import annotations

import contextlib
import http.client
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

pytestmark = pytest.mark.kernel
START_SECONDS = 60.0


def outlived(family: list[psutil.Process], seconds: float = 3.0) -> list[psutil.Process]:
    """Those that still run after so long; an orphan that nobody has reaped yet does not run."""
    _, alive = psutil.wait_procs(family, timeout=seconds)
    running = []
    for process in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.status() != psutil.STATUS_ZOMBIE:
                running.append(process)
    return running


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Server:
    """``python -m wiseflow_nb dashboard`` and what it said."""

    def __init__(self, log: Path, *arguments: str) -> None:
        self.port = free_port()
        self.log = log
        command = [sys.executable, "-m", "wiseflow_nb", "dashboard", "--port", str(self.port), *arguments]
        with log.open("wb") as stream:
            self.process = subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT)
        deadline = time.monotonic() + START_SECONDS
        while "wiseflow dashboard: " not in self.said():
            assert self.process.poll() is None, self.said()
            assert time.monotonic() < deadline, self.said()
            time.sleep(0.05)

    def said(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")

    @property
    def token(self) -> str:
        found = re.search(r"\?token=(\S+)", self.said())
        return found.group(1) if found else ""

    def get(self, path: str, **headers: str) -> tuple[int, dict[str, str], str]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        with contextlib.closing(connection):
            connection.request("GET", path, headers=headers)
            response = connection.getresponse()
            return response.status, dict(response.getheaders()), response.read().decode("utf-8", "replace")

    def family(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def end(self, number: int = signal.SIGTERM) -> tuple[int, list[psutil.Process]]:
        """Signal the server; return its exit code and the descendants that outlived it by 3 seconds."""
        family = self.family()
        self.process.send_signal(number)
        code = self.process.wait(timeout=20)
        return code, outlived(family)


@contextlib.contextmanager
def running(log: Path, *arguments: str) -> Iterator[Server]:
    server = Server(log, *arguments)
    try:
        yield server
    finally:
        if server.process.poll() is None:
            family = server.family()
            server.process.terminate()
            try:
                server.process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                for process in [*family, psutil.Process(server.process.pid)]:
                    with contextlib.suppress(psutil.NoSuchProcess):
                        process.kill()
                server.process.wait()


def until(condition: object, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():  # type: ignore[operator]
            return True
        time.sleep(0.2)
    return False


def kernels(server: Server) -> int:
    count = 0
    for process in server.family():
        with contextlib.suppress(psutil.NoSuchProcess):
            count += any("ipykernel" in word for word in process.cmdline())
    return count


def test_a_visit_with_and_without_the_token(tmp_path: Path) -> None:
    with running(tmp_path / "log") as server:
        assert len(server.token) >= 20
        status, headers, body = server.get("/")
        assert (status, "login" in headers["Location"]) == (302, True)
        status, _, _ = server.get("/api/kernels/00000000-0000-0000-0000-000000000000")
        assert status in (302, 403)
        assert server.get("/health")[::2] == (200, "ok\n")

        status, _, body = server.get(f"/?token={server.token}")
        assert status == 200
        assert "<title>wiseflow</title>" in body
        assert "application/vnd.jupyter.widget-view+json" in body, body[-3000:]
        loads = re.findall(r'<(?:script|link|img)[^>]+(?:src|href)="(https?://[^"]+)"', body)
        assert loads == []
        assert "fontawesome" not in body

        # This visitor read the page and opened no socket: its kernel goes, the preheated one stays.
        assert until(lambda: kernels(server) >= 1, 10)
        time.sleep(3)
        assert until(lambda: kernels(server) == 1, 30), kernels(server)

        code, alive = server.end()
        assert code == 0, server.said()
        assert alive == []
        assert "Traceback" not in server.said()


def test_interrupt_and_base_url_and_no_token(tmp_path: Path) -> None:
    with running(tmp_path / "log", "--no-token", "--base-url", "proxy/wise") as server:
        assert server.token == ""
        assert server.get("/proxy/wise/health")[0] == 200
        status, _, body = server.get("/proxy/wise/")
        assert status == 200
        assert '"baseUrl": "/proxy/wise/"' in body
        # DNS rebinding: a foreign page's host name that points here.
        assert server.get("/proxy/wise/", Host="evil.example")[0] == 403
        code, alive = server.end(signal.SIGINT)
        assert (code, alive) == (0, [])


def test_a_stop_while_it_starts_leaves_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "wiseflow_nb", "dashboard", "--port", str(free_port())]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        started = psutil.Process(process.pid)
        assert until(lambda: started.children(), 30)
        family = started.children(recursive=True)
        process.send_signal(signal.SIGTERM)
        out, _ = process.communicate(timeout=30)
    assert outlived(family) == []
    assert process.returncode == 0, out
    assert b"Traceback" not in out


def test_its_session_ends_with_it(tmp_path: Path) -> None:
    from wiseflow_nb.session import sessions

    with running(tmp_path / "log") as server:
        [info] = sessions()
        assert (info.state, info.title) == ("live", "this machine")
        server.end()
    [info] = sessions()
    assert info.state == "ended"


def test_a_taken_port_is_an_error_before_anything_starts(state_dir: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen(1)
        port = taken.getsockname()[1]
        done = subprocess.run(
            [sys.executable, "-m", "wiseflow_nb", "dashboard", "--port", str(port)],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
            env={**os.environ},
        )
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert not state_dir.exists()
