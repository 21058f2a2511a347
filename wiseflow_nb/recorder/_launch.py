"""Starting a recorder: in a process of its own, or the very same on a thread of this one."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import sqlite3
import subprocess
import sys
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from wiseflow_nb.clock import Clock
from wiseflow_nb.errors import WiseflowError
from wiseflow_nb.recorder._child import child_environment
from wiseflow_nb.recorder.protocol import config_from, decode, encode
from wiseflow_nb.store.paths import LOG_NAME

LOOK_SECONDS = 0.1
#: Why a process cannot be started now, though perhaps later.
PASSING = frozenset({errno.EMFILE, errno.ENFILE, errno.EAGAIN, errno.ENOMEM})
logger = logging.getLogger("wiseflow_nb.recorder")


@dataclass(slots=True, eq=False)
class Started:
    """A recorder that was started: where to write, what to hear, and how it took that.

    ``first_word`` is set once it has said that it is ready or why it is not, or has ended without a word.
    """

    to_write: int
    to_hear: BinaryIO
    process: subprocess.Popen[bytes] | None = None
    thread: threading.Thread | None = None
    first_word: threading.Event = field(default_factory=threading.Event)
    ready: bool = False
    failure: str = ""
    #: Whether somebody else ended its process by a signal.
    was_killed: bool = False

    def wait(self, seconds: float) -> None:
        """Wait for its first word, so long at most, and not for one that has ended."""
        left = int(seconds / LOOK_SECONDS)
        while left > 0 and not self.first_word.wait(LOOK_SECONDS):
            # Its end may not be heard: a process that was forked just then can hold its pipe open.
            ended = self.process is not None and self.process.poll() is not None
            left = min(left - 1, 2) if ended else left - 1

    def abandon(self) -> None:
        """Nobody will hear it: let it end before it has begun."""
        os.close(self.to_write)
        self.to_hear.close()
        self.end()

    def end(self) -> None:
        """Let the process, if it is one, be no more."""
        if self.process is not None:
            if self.first_word.is_set():  # its pipe was closed, a moment before it is no more
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self.was_killed = self.process.wait(1.0) < 0
            self.process.kill()
            self.process.wait()

    def how_it_ended(self) -> str:
        """`` (signal 9)`` or `` (exit code 1: why)``; empty for a thread that does not say."""
        told = [self.failure] if self.failure else []
        if self.process is not None:
            code = self.process.wait()
            told.insert(0, f"signal {-code}" if code < 0 else f"exit code {code}")
        return f" ({': '.join(told)})" if told else ""


def start_process(directory: str) -> Started:
    """Start a process that waits for its configuration.

    Raises
    ------
    OSError
        If there can be none; what is in ``PASSING`` may pass.
    """
    if not sys.executable:
        raise OSError(errno.ENOENT, "the interpreter's own file is unknown")
    try:
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | getattr(os, "O_NOFOLLOW", 0)
        log = os.open(Path(directory) / LOG_NAME, flags, 0o600)
        try:
            if hasattr(os, "fchmod"):
                os.fchmod(log, 0o600)
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", "wiseflow_nb.recorder"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                start_new_session=True,
                env=child_environment(),
                bufsize=0,
            )
        finally:
            os.close(log)
    except ValueError as error:
        raise OSError(errno.EINVAL, str(error)) from error
    assert process.stdin is not None
    assert process.stdout is not None
    with process.stdin, process.stdout:
        try:
            to_write = os.dup(process.stdin.fileno())
            return Started(to_write, os.fdopen(os.dup(process.stdout.fileno()), "rb"), process)
        except OSError:
            process.kill()
            process.wait()
            raise


def start_thread(clock: Clock) -> Started:
    """Start the same on a thread of this process; it waits for its configuration likewise.

    Raises
    ------
    OSError, RuntimeError
        If there are no descriptors left, or no more threads can be started.
    """
    from wiseflow_nb.recorder.run import run

    to_read, to_write = os.pipe()
    try:
        from_read, from_write = os.pipe()
    except OSError:
        _close(to_read, to_write)
        raise

    def record() -> None:
        with os.fdopen(to_read, "rb") as incoming, os.fdopen(from_write, "wb") as outgoing:
            first = incoming.readline()
            if not first:
                return
            try:
                run(config_from(decode(first)["config"]), incoming, outgoing, clock=clock)
            except (WiseflowError, sqlite3.Error) as error:
                # Who started it tells why, once.
                logger.info("the recorder's thread ended", exc_info=True)
                tell_failure(outgoing, error)

    thread = threading.Thread(target=record, name="wiseflow-recorder", daemon=True)
    try:
        thread.start()
    except RuntimeError:
        _close(to_read, to_write, from_read, from_write)
        raise
    return Started(to_write, os.fdopen(from_read, "rb"), thread=thread)


def _close(*fds: int) -> None:
    for fd in fds:
        os.close(fd)


def tell_failure(outgoing: BinaryIO, error: Exception) -> None:
    """Say why a recorder cannot run, to whom it was started for."""
    try:
        outgoing.write(encode({"t": "failed", "message": str(error)}))
        outgoing.flush()
    except (OSError, ValueError):
        pass  # nobody is there to hear it; the log has it
