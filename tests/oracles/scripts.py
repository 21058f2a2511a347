"""Scripts in an interpreter of their own, for what happens at its end."""

from __future__ import annotations

import subprocess
import sys


def run_script(script: str) -> subprocess.CompletedProcess[str]:
    """Run a script to its end; the bound only tells an end from none."""
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return done
