"""An idle kernel under a real Jupyter server: announced, stopped, and not started again."""

from __future__ import annotations

import json
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from tests.servers import TOKEN, free_port, private_environment, serving
from wiseflow_nb.records import SessionState
from wiseflow_nb.session import open_session, sessions

CODE = """
%load_ext wiseflow_nb
import wiseflow_nb
wiseflow_nb.current_session().tasks.submit(sum, [1, 2]).result()
"""


def asked(base: str, path: str, method: str = "GET") -> object:
    request = urllib.request.Request(f"{base}{path}", method=method, headers={"Authorization": f"token {TOKEN}"})
    with urllib.request.urlopen(request, timeout=20) as answer:
        return json.loads(answer.read() or b"null")


@pytest.mark.kernel
def test_an_idle_kernel_is_stopped_by_its_server(tmp_path: Path) -> None:
    from jupyter_client import BlockingKernelClient

    environment = private_environment(tmp_path) | {
        "WISEFLOW_AUTO_SHUTDOWN_ENABLED": "true",
        "WISEFLOW_AUTO_SHUTDOWN_KERNEL": "true",
        "WISEFLOW_AUTO_SHUTDOWN_IDLE_TIME": "3",
        "WISEFLOW_AUTO_SHUTDOWN_CHECK_INTERVAL": "1",
    }
    port = free_port()
    base = f"http://127.0.0.1:{port}"
    command = [
        sys.executable,
        "-m",
        "jupyter_server",
        "--allow-root",
        "--no-browser",
        f"--port={port}",
        "--ServerApp.ip=127.0.0.1",
        "--ServerApp.port_retries=0",
        f"--IdentityProvider.token={TOKEN}",
        f"--ServerApp.root_dir={tmp_path}",
    ]
    with serving(command, f"{base}/api/status?token={TOKEN}", environment, tmp_path / "server.log"):
        kernel = asked(base, "/api/kernels", "POST")
        client = BlockingKernelClient()
        client.load_connection_file(str(tmp_path / "runtime" / f"kernel-{kernel['id']}.json"))
        client.start_channels()
        try:
            client.wait_for_ready(timeout=60)
            reply = client.execute_interactive(CODE, timeout=60, output_hook=lambda message: None)
            assert reply["content"]["status"] == "ok"
        finally:
            client.stop_channels()
        deadline = time.monotonic() + 60
        while asked(base, "/api/kernels"):
            assert time.monotonic() < deadline, (tmp_path / "server.log").read_text()[-3000:]
            time.sleep(0.2)
        (info,) = sessions()
        assert info.state is SessionState.ENDED
        view = open_session(info.session_id)
        told = list(view.events().kind)
        view.close()
        assert told.index("idle_shutdown_soon") < told.index("idle_shutdown") < told.index("session_closed")
        # A server starts a kernel again that it did not end itself.
        time.sleep(2.0)
        assert asked(base, "/api/kernels") == []
        assert "restarted" not in (tmp_path / "server.log").read_text()
