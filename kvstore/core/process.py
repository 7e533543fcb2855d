"""Process-wide state: termination signals, open files, freed memory, and whether this process was forked.

gRPC, MLX and kvstore's threads do not work in a child of a process that had connected.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import signal
from collections.abc import Callable

from kvstore.core.interrupts import uninterrupted

FORKED = (
    "this process was forked from one that uses kvstore, and neither gRPC nor MLX survives a fork: start workers with "
    "multiprocessing's `spawn`, or connect only after the fork"
)
OPEN_FILES_WANTED = 4096
# Options of mallopt (malloc.h): the size from which memory is mapped directly, and how much freed memory is kept.
M_MMAP_THRESHOLD, M_TRIM_THRESHOLD = -3, -1
KEPT_BYTES = 32 << 20
_connected_in: int | None = None  # the process that connected first, here or in what this one was forked from


def ending_signals() -> list[signal.Signals]:
    """Signals that tell a process to end in good order. A terminal's that goes away is not, where `nohup` says so."""
    numbers = [signal.SIGTERM, signal.SIGINT]
    return numbers if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else [*numbers, signal.SIGHUP]


def keep_freed_memory() -> None:
    """Let the C library keep some of what is freed, where that is glibc, instead of giving each MiB back to the system.

    A stream makes and frees frames of 1 MiB all the time. With fresh pages for each, page faults took three
    times as long as reading and sending.
    """
    with contextlib.suppress(OSError, AttributeError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_THRESHOLD, KEPT_BYTES)
        mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)


def raise_file_limit() -> None:
    """Raise the soft limit on open files as far as is useful; launchd starts agents with 256."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = OPEN_FILES_WANTED if hard == resource.RLIM_INFINITY else min(OPEN_FILES_WANTED, hard)
    if soft < wanted:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def connecting() -> None:
    """A connection is made in this process. Only the first counts: in a child of it another cannot work."""
    global _connected_in
    if _connected_in is None:
        _connected_in = os.getpid()


def is_forked() -> bool:
    """Whether this process was forked after it had connected: then gRPC and locks must not be used. Takes no lock."""
    return _connected_in is not None and _connected_in != os.getpid()


def unless_forked(call: Callable[[], object]) -> None:
    """Run `call` uninterrupted, except in a forked child: there it would wait for a thread or lock of the parent."""
    if not is_forked():
        uninterrupted(call)
