"""Stopping the kernel from inside: by its server where it has one, which then does not start it again."""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

logger = logging.getLogger("wiseflow_nb.notebook")
SERVER_SECONDS = 5.0


def kernel_id(connection_file: str) -> str:
    """The id that a server gave the kernel, from its connection file's name; empty if none did.

    Examples
    --------
    >>> kernel_id("/run/kernel-5f3c.json"), kernel_id("/run/mine.json")
    ('5f3c', '')
    """
    found = re.fullmatch(r"kernel-([0-9a-zA-Z-]+)\.json", Path(connection_file).name)
    return found.group(1) if found else ""


def stop_kernel(connection_file: str) -> None:
    """End this kernel: ask each server of this user that may own it, else end the process."""
    number = kernel_id(connection_file)
    if number and any(_asked(server, number) for server in _servers(Path(connection_file).parent)):
        return
    os.kill(os.getpid(), signal.SIGTERM)


def _servers(runtime: Path) -> Iterator[dict[str, Any]]:
    """What the servers of this user wrote of themselves (address, token), beside the connection files."""
    for path in sorted(runtime.glob("jpserver-*.json")):
        try:
            info = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue  # it is just ending
        if isinstance(info, dict) and isinstance(info.get("url"), str):
            yield info


def _asked(server: dict[str, Any], number: str) -> bool:
    """Whether this server has the kernel and is ending it."""
    request = urllib.request.Request(f"{server['url'].rstrip('/')}/api/kernels/{number}", method="DELETE")
    if server.get("token"):
        request.add_header("Authorization", f"token {server['token']}")
    try:
        with urllib.request.urlopen(request, timeout=SERVER_SECONDS) as answer:
            return bool(answer.status == 204)
    except (urllib.error.URLError, OSError, ValueError) as error:
        # Another server's kernel (404), or a server that is gone.
        logger.debug("%s does not end this kernel: %s", server["url"], error)
        return False
