"""``python -m wiseflow_nb.recorder``: started by a session, configured by its first line of input."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from pathlib import Path

import psutil

from wiseflow_nb.errors import WiseflowError
from wiseflow_nb.recorder._launch import tell_failure
from wiseflow_nb.recorder.protocol import config_from, decode
from wiseflow_nb.recorder.run import run


def _watch_parent(pid: int) -> bool:
    if hasattr(os, "getppid") and os.name == "posix":
        return os.getppid() == pid
    return psutil.pid_exists(pid)


def _be_spared() -> None:
    """Ask the OOM killer to pass this process by: who tells of the kernel's death must outlive it.

    A group is over its limit for some milliseconds more while the kernel's memory is given back, and this
    process, small as it is, would be all that is left to kill. Where that is not allowed (it takes
    CAP_SYS_RESOURCE) it stays as it is.
    """
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("-1000")


def main() -> int:
    """Record the session that the first line describes; 0 if it ended in order, 3 if it vanished."""
    # Jupyter interrupts the kernel's whole process group; this is a session of its own, and deaf besides.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _be_spared()
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
    except WiseflowError as error:
        tell_failure(sys.stdout.buffer, error)
        code = 1
        # The log is on the same disk, which may be full. (A file that cannot be opened is tried again and again.)
        with contextlib.suppress(OSError):
            sys.stderr.write(f"the recorder cannot run: {error}\n")
    with contextlib.suppress(OSError):
        sys.stderr.flush()
    # The reading thread may still block in a pipe that a forked child of the kernel holds open.
    os._exit(code)
