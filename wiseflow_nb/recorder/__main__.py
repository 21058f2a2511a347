"""``python -m wiseflow_nb.recorder``: started by a session, configured by its first line of input."""

from __future__ import annotations

import os
import signal
import sys
import traceback

import psutil

from wiseflow_nb.errors import WiseflowError
from wiseflow_nb.recorder.protocol import config_from, decode
from wiseflow_nb.recorder.run import run


def _watch_parent(pid: int) -> bool:
    if hasattr(os, "getppid") and os.name == "posix":
        return os.getppid() == pid
    return psutil.pid_exists(pid)


def main() -> int:
    """Record the session that the first line describes; 0 if it ended in order, 3 if it vanished."""
    # Jupyter interrupts the kernel's whole process group; this is a session of its own, and deaf besides.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.setswitchinterval(0.0005)
    first = sys.stdin.buffer.readline()
    if not first:
        return 2
    config = config_from(decode(first)["config"])
    in_order = run(config, sys.stdin.buffer, sys.stdout.buffer, parent_alive=lambda: _watch_parent(config.pid))
    return 0 if in_order else 3


if __name__ == "__main__":
    try:
        code = main()
    except WiseflowError:
        traceback.print_exc()
        code = 1
    sys.stderr.flush()
    # The reading thread may still block in a pipe that a forked child of the kernel holds open.
    os._exit(code)
