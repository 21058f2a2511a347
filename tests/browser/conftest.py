"""What every browser test shares: Chromium without a way out, free ports, child processes that end."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

CHROMIUM_FLAGS = (
    "--no-sandbox",
    "--headless",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE localhost, EXCLUDE 127.0.0.1",
)


def find_chromium() -> str | None:
    """The browser to drive: ``WISEFLOW_CHROMIUM``, else ``chromium`` on the path."""
    return os.environ.get("WISEFLOW_CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")


def free_port() -> int:
    """A loopback port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def child(argv: list[str], url: str, env: dict[str, str], log: Path, timeout: float = 60.0) -> Iterator[None]:
    """Run a server as a child in a session of its own until the block ends; ready when the URL answers."""
    with log.open("wb") as stream:
        process = subprocess.Popen(argv, env=env, stdout=stream, stderr=stream, start_new_session=True)
        try:
            _wait_until_up(process, url, log, timeout)
            yield
        finally:
            kernels = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(10)
            _, alive = psutil.wait_procs(kernels, timeout=5)
            for kernel in alive:
                kernel.kill()
            psutil.wait_procs(alive, timeout=5)


def _wait_until_up(process: subprocess.Popen[bytes], url: str, log: Path, timeout: float) -> None:
    deadline = time.monotonic() + timeout
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    while time.monotonic() < deadline:
        if process.poll() is not None:
            break
        try:
            opener.open(url, timeout=2).close()
            return
        except urllib.error.HTTPError:
            return
        except OSError:
            time.sleep(0.1)
    raise AssertionError(f"{url} did not come up:\n{log.read_text(errors='replace')[-4000:]}")


@pytest.fixture(scope="session")
def chromium_path() -> str:
    path = find_chromium()
    if path is None:
        if os.environ.get("WISEFLOW_REQUIRE_BROWSER") == "1":
            pytest.fail("Chromium is not installed, and WISEFLOW_REQUIRE_BROWSER=1 asks for it")
        pytest.skip("Chromium is not installed")
    return path


@pytest.fixture(scope="session")
def browser(chromium_path: str) -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=chromium_path, args=list(CHROMIUM_FLAGS))
        yield started
        started.close()


@pytest.fixture
def new_page(browser: Any) -> Iterator[Callable[..., Any]]:
    """Make pages in fresh profiles; each has ``foreign``, the requests that left loopback."""
    contexts = []

    def make(width: int = 1280, height: int = 980, **options: Any) -> Any:
        context = browser.new_context(viewport={"width": width, "height": height}, **options)
        contexts.append(context)
        page = context.new_page()
        page.foreign = []
        page.problems = []

        def look(request: Any) -> None:
            url = request.url
            if url.startswith(("http", "ws")) and "//127.0.0.1" not in url and "//localhost" not in url:
                page.foreign.append(url)

        page.on("request", look)
        page.on("pageerror", lambda error: page.problems.append(str(error)))
        return page

    yield make
    for context in contexts:
        context.close()


@pytest.fixture
def page(new_page: Callable[..., Any]) -> Any:
    return new_page()


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


@contextmanager
def voila(folder: Path, source: str, *, theme: str = "light", extra_path: str = "") -> Iterator[str]:
    """Serve one code cell with Voilà on loopback and give its URL."""
    import nbformat

    folder.mkdir(parents=True, exist_ok=True)
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source)])
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    path = folder / "page.ipynb"
    nbformat.write(notebook, path)
    port = free_port()
    env = dict(os.environ)
    for name in ("CONFIG", "DATA", "RUNTIME"):
        env[f"JUPYTER_{name}_DIR"] = str(folder / f"jupyter-{name.lower()}")
    env["JUPYTER_PATH"] = str(write_template(folder / "share"))
    env["PYTHONPATH"] = os.pathsep.join(item for item in (extra_path, env.get("PYTHONPATH", "")) if item)
    env["IPYTHONDIR"] = str(folder / "ipython")
    argv = [sys.executable, "-m", "voila", str(path), "--no-browser", f"--port={port}", "--Voila.ip=127.0.0.1"]
    argv += ["--Voila.port_retries=0", "--template=plain", f"--theme={theme}"]
    url = f"http://127.0.0.1:{port}/"
    with child(argv, f"{url}voila/static/none", env, folder / "voila.log"):
        yield url
