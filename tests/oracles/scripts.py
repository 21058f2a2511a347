"""Scripts in an interpreter of their own, for what happens at its end."""

from __future__ import annotations

import subprocess
import sys


def run_script(script: str, says: str = "") -> subprocess.CompletedProcess[str]:
    """Run a script to its end; the bound only tells an end from none.

    Nothing is written to its stderr, or one line that holds ``says``.
    """
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    lines = done.stderr.splitlines()
    assert done.returncode == 0, done.stderr
    assert (len(lines) == 1 and says in lines[0]) if says else not lines, done.stderr
    return done
