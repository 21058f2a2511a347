"""Real servers for the tests: JupyterLab, Voilà and the standalone dashboard, as child processes."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import nbformat
import psutil

TOKEN = "a-token-for-tests"


def free_port() -> int:
    """A port on loopback that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def private_environment(directory: Path) -> dict[str, str]:
    """An environment in which Jupyter reads and writes nothing of the user's."""
    environment = dict(os.environ)
    for name in ("CONFIG", "DATA", "RUNTIME"):
        environment[f"JUPYTER_{name}_DIR"] = str(directory / name.lower())
    environment["IPYTHONDIR"] = str(directory / "ipython")
    return environment


def status_of(url: str) -> int:
    """The HTTP status of a GET, redirects followed; 0 while nobody listens."""
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        error.close()
        return int(error.code)
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return 0


@contextlib.contextmanager
def serving(command: list[str], url: str, environment: dict[str, str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Run a server until the block ends; wait first until the URL answers."""
    with log.open("wb") as stream:
        child = subprocess.Popen(
            command, env=environment, stdout=stream, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, cwd=log.parent
        )
        try:
            deadline = time.monotonic() + 90
            while status_of(url) != 200:
                assert child.poll() is None, log.read_text(errors="replace")[-4000:]
                assert time.monotonic() < deadline, log.read_text(errors="replace")[-4000:]
                time.sleep(0.2)
            yield child
        finally:
            kernels = psutil.Process(child.pid).children(recursive=True) if child.poll() is None else []
            child.terminate()
            try:
                child.wait(20)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()
            _, left = psutil.wait_procs(kernels, timeout=5)
            for kernel in left:
                kernel.kill()
            psutil.wait_procs(left, timeout=5)


def write_notebook(path: Path, cells: list[str]) -> None:
    """A notebook of these code cells for the default kernel."""
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(notebook, path)


@contextlib.contextmanager
def jupyter_lab(directory: Path, cells: list[str]) -> Iterator[str]:
    """Serve a notebook of these cells in JupyterLab; yield its URL."""
    write_notebook(directory / "work.ipynb", cells)
    port = free_port()
    command = [
        sys.executable,
        "-m",
        "jupyterlab",
        "--allow-root",
        "--no-browser",
        f"--port={port}",
        "--ServerApp.ip=127.0.0.1",
        "--ServerApp.port_retries=0",
        f"--IdentityProvider.token={TOKEN}",
        f"--ServerApp.root_dir={directory}",
        "--LabApp.expose_app_in_browser=True",
    ]
    base = f"http://127.0.0.1:{port}"
    with serving(command, f"{base}/api/status?token={TOKEN}", private_environment(directory), directory / "lab.log"):
        yield f"{base}/lab/tree/work.ipynb?token={TOKEN}"


@contextlib.contextmanager
def dashboard_server(directory: Path, *options: str) -> Iterator[str]:
    """Run ``wiseflow dashboard``; yield its URL, token included."""
    port = free_port()
    log = directory / "dashboard.log"
    command = [sys.executable, "-m", "wiseflow_nb", "dashboard", f"--port={port}", f"--token={TOKEN}", *options]
    base = f"http://127.0.0.1:{port}"
    health = f"{base}/voila/static/voila.js"
    environment = private_environment(directory)
    with serving(command, health, environment, log):
        printed = re.search(r"http://\S+token=\S+", log.read_text())
        yield printed.group(0) if printed else f"{base}/?token={TOKEN}"


TEMPLATE_INDEX = """{% extends 'voila/templates/lab/index.html.j2' %}
{%- block notebook_css -%}
{% set plain = super() %}
{{ plain | replace('https://cdn.jsdelivr.net/npm/@fortawesome/fontawesome-free@^5/css/all.min.css', 'data:text/css,')
| replace('https://cdn.jsdelivr.net/npm/@fortawesome/fontawesome-free@^5/css/v4-shims.min.css', 'data:text/css,') }}
{%- endblock notebook_css -%}
"""


def write_template(root: Path) -> Path:
    """A Voilà template ``plain`` below ``root`` (for ``JUPYTER_PATH``) that loads nothing from a CDN."""
    folder = root / "voila" / "templates" / "plain"
    folder.mkdir(parents=True)
    (folder / "conf.json").write_text('{"base_template": "lab"}')
    (folder / "index.html.j2").write_text(TEMPLATE_INDEX)
    return root


@contextlib.contextmanager
def voila(directory: Path, source: str, *, theme: str = "light", extra_path: str = "") -> Iterator[str]:
    """Serve one code cell with Voilà, without the dashboard's own template; yield its URL."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "page.ipynb"
    write_notebook(path, [source])
    port = free_port()
    environment = private_environment(directory)
    environment["JUPYTER_PATH"] = str(write_template(directory / "share"))
    environment["PYTHONPATH"] = os.pathsep.join(
        item for item in (extra_path, environment.get("PYTHONPATH", "")) if item
    )
    command = [sys.executable, "-m", "voila", str(path), "--no-browser", f"--port={port}", "--Voila.ip=127.0.0.1"]
    command += ["--Voila.port_retries=0", "--template=plain", f"--theme={theme}"]
    base = f"http://127.0.0.1:{port}/"
    with serving(command, f"{base}voila/static/voila.js", environment, directory / "voila.log"):
        yield base
