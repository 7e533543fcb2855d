"""Writes captured bytes to the staging file that the daemon made, and to nothing else.

The daemon says where, so what it says is checked against what it can be: a direct child of the directory that it named
when this client connected, which is ours alone; an empty regular file of ours with one name. A daemon that lies gets an
UntrustedError and no byte, and no file that holds anything is ever opened for writing.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator

from kvstore.errors import KVStoreError, UntrustedError

VECTORS_MAX = 1024  # IOV_MAX on Linux and macOS


def write_staged(directory: str, path: str, views: Iterator[memoryview], nbytes: int) -> None:
    """Write exactly `nbytes` to the staging file `path` in `directory`. OSError as the system gives it.

    Raises UntrustedError for a file that no honest daemon names, KVStoreError when there are not `nbytes`.
    """
    fd = _open(directory, path)
    try:
        written = 0
        batch: list[memoryview] = []
        for view in views:
            batch.append(view)
            if len(batch) == VECTORS_MAX:
                written += _write_all(fd, batch)
                batch = []
        written += _write_all(fd, batch)
    finally:
        os.close(fd)
    if written != nbytes:
        raise KVStoreError(f"{written} bytes captured where {nbytes} are wanted")


def _open(directory: str, path: str) -> int:
    head, name = os.path.split(path)
    if not os.path.isabs(directory) or head != directory or name in ("", ".", ".."):
        raise UntrustedError(f"the daemon's staging file {path} is not in {directory or 'any directory that it named'}")
    directory_fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        info = os.fstat(directory_fd)
        if info.st_uid != os.geteuid() or info.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise UntrustedError(f"the daemon's staging directory {directory} is not ours alone")
        # Not blocking: opening a FIFO waits for its reader.
        flags = os.O_WRONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        fd = os.open(name, flags, dir_fd=directory_fd)
    finally:
        os.close(directory_fd)
    info = os.fstat(fd)
    sound = stat.S_ISREG(info.st_mode) and info.st_uid == os.geteuid() and info.st_nlink == 1 and not info.st_size
    if not sound:
        os.close(fd)
        raise UntrustedError(f"the daemon's staging file {path} is not an empty file of ours with one name")
    return fd


def _write_all(fd: int, views: list[memoryview]) -> int:
    """Write all views, over as many short writes as it takes; their bytes."""
    pending = [view for view in views if view.nbytes]
    total = sum(view.nbytes for view in pending)
    while pending:
        count = os.writev(fd, pending)
        while pending and count >= pending[0].nbytes:
            count -= pending.pop(0).nbytes
        if count:
            pending[0] = pending[0][count:]
    return total
