"""Process-wide state: termination signals, and whether this process was forked from one that had connected.

gRPC, MLX and kvstore's threads do not work in a forked child.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable

FORKED = (
    "this process was forked from one that uses kvstore, and neither gRPC nor MLX survives a fork: start workers with "
    "multiprocessing's `spawn`, or connect only after the fork"
)
_connected_in: int | None = None  # the process that connected first, here or in what this one was forked from


def ending_signals() -> list[signal.Signals]:
    """Signals that tell a process to end in good order. A terminal's that goes away is not, where `nohup` says so."""
    numbers = [signal.SIGTERM, signal.SIGINT]
    return numbers if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else [*numbers, signal.SIGHUP]


def connecting() -> None:
    """A connection is made in this process. Only the first counts: in a child of it another cannot work."""
    global _connected_in
    if _connected_in is None:
        _connected_in = os.getpid()


def is_forked() -> bool:
    """Whether this process was forked after it had connected: then gRPC and locks must not be used. Takes no lock."""
    return _connected_in is not None and _connected_in != os.getpid()


def unless_forked(call: Callable[[], object]) -> None:
    """Run `call`, except in a forked child: there it would wait for a thread or lock of the parent process."""
    if not is_forked():
        call()
