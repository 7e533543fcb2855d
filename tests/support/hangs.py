"""Processes that a test started and that hang: they are ended, and say on stderr where their threads stand."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
from collections.abc import Iterator

# Longer than any test takes on a busy machine, and shorter than `timeout` of pyproject.toml, by which only the threads
# of the test itself are told of, while it waits for another process.
PATIENCE_S = 600.0
# Where this is set, Python tells the threads' stacks when it is aborted. Processes inherit it.
TELLS_STACKS = "PYTHONFAULTHANDLER"


@contextlib.contextmanager
def ending_hung_processes(after_s: float = PATIENCE_S) -> Iterator[None]:
    """What the block started is aborted after so long, so that whoever waits for it goes on and fails."""
    timer = threading.Timer(after_s, abort_processes)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()


def abort_processes(below: int | None = None) -> None:
    """SIGABRT to all processes that this one, or another, started, and to those that they started."""
    for pid in _below(below or os.getpid()):
        with contextlib.suppress(OSError):
            os.kill(pid, signal.SIGCONT)  # those that a test has stopped
            os.kill(pid, signal.SIGABRT)


def _below(root: int) -> list[int]:
    listed = subprocess.run(["ps", "-eo", "pid=,ppid="], capture_output=True, text=True, check=True, timeout=60)
    children: dict[int, list[int]] = {}
    for line in listed.stdout.splitlines():
        pid, parent = map(int, line.split())
        children.setdefault(parent, []).append(pid)
    found = [root]
    for pid in found:
        found += children.get(pid, [])
    return found[1:]
