"""The one counter of size: what the data directory costs on disk, by account. Its ballast, and its health."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

# Before a write this much stays free for the index, which copies the pages that a commit changes.
COMMIT_BYTES = 64 << 10
log = logging.getLogger(__name__)


class Ledger:
    """Bytes on disk by account. Any thread may book; a total is a consistent moment.

    blobs: files that rows name; pending: files being written, and what their rows will take; kept: files without a
    row that a lease or the disk keeps a moment longer; folders: of blobs, and what was dropped with one; index: LMDB's
    files; quarantine: damaged blobs; settings: tombstones.
    """

    ACCOUNTS = ("blobs", "pending", "kept", "folders", "index", "quarantine", "settings")

    def __init__(self) -> None:
        self._bytes = dict.fromkeys(self.ACCOUNTS, 0)
        self._lock = threading.Lock()

    def add(self, account: str, nbytes: int) -> None:
        """Book `nbytes`, which may be negative; an account never goes below zero."""
        with self._lock:
            self._bytes[account] = max(0, self._bytes[account] + nbytes)

    def set(self, account: str, nbytes: int) -> None:
        """A measured size replaces the booked one."""
        with self._lock:
            self._bytes[account] = nbytes

    def get(self, account: str) -> int:
        """Bytes on one of `ACCOUNTS`; KeyError for any other name."""
        return self._bytes[account]

    @property
    def total(self) -> int:
        """Everything."""
        with self._lock:
            return sum(self._bytes.values())

    @property
    def fixed(self) -> int:
        """Bytes that no eviction can free."""
        with self._lock:
            return sum(self._bytes.values()) - self._bytes["blobs"]


class Ballast:
    """A file of zeros that is given up when the disk is full, so that the index can commit an eviction.

    LMDB writes new pages before it frees old ones: on a volume without a free block, not even a delete goes through
    (seen on tmpfs: EIO), and nothing could ever be evicted. Its bytes are in the index account. Not thread-safe.
    """

    def __init__(self, path: Path, nbytes: int) -> None:
        self._path = path
        self._nbytes = nbytes

    def lay(self) -> None:
        """Have it there, if there is room for it; at once when it is there already."""
        with contextlib.suppress(OSError):
            if self._nbytes and not self._path.exists():
                tmp = self._path.with_suffix(".tmp")
                fd = os.open(tmp, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
                try:
                    os.fchmod(fd, 0o600)
                    os.write(fd, bytes(self._nbytes))
                    complete = os.fstat(fd).st_size == self._nbytes
                finally:
                    os.close(fd)
                if complete:
                    tmp.rename(self._path)
                else:
                    tmp.unlink()

    def drop(self) -> bool:
        """Give it up; whether there was one."""
        try:
            self._path.unlink()
        except OSError:
            return False
        return True


@dataclass
class DiskHealth:
    """Plain counters since the engine was opened, and why stores are refused at present. Plain values: no lock.

    written_bytes: of blobs that rows came to name; put_bytes: of all that were begun, counted before they are written.
    over_budget: what is stored passes it; under_floor: the volume has less free than the floor, or no inodes; no_space:
    a store of a usual size was refused, and would be again; disk_error: a write failed; displaced: the directory is
    gone.
    """

    written_bytes: int = 0
    put_bytes: int = 0
    over_budget: str = ""
    under_floor: str = ""
    no_space: str = ""
    disk_error: str = ""
    displaced: str = ""
    told: bool = False  # whether the log's last word is that stores are refused

    @property
    def degraded(self) -> str:
        """Why stores are refused, and what to do; empty when all is well."""
        return self.displaced or self.disk_error or self.under_floor or self.no_space or self.over_budget

    def tell(self) -> None:
        """A line in the log when stores begin to be refused, and one when they are taken again.

        None of a displaced directory, which may be back in a second: the daemon says what it makes of it.
        """
        if self.displaced:
            return
        why, told = self.degraded, self.told
        self.told = bool(why)
        if why and not told:
            log.warning("nothing is stored any more: %s", why)
        elif told and not why:
            log.info("stores are taken again")


class DriveCache:
    """Knows which commits have left the drive's cache. Rows are visible before that, and not promised yet.

    One thread empties the cache while others wait; what it began after, it covers. Any thread may wait.
    """

    def __init__(self, flush: Callable[[], None] | None) -> None:
        """`flush` empties the cache; None: nothing is ever waited for."""
        self._flush = flush
        self._changed = threading.Condition()
        self._begun = self._committed = self._flushed = 0
        self._is_flushing = False

    @contextlib.contextmanager
    def committing(self) -> Iterator[None]:
        """Around a commit, under the engine's lock: its rows may be visible before it ends, well or not."""
        with self._changed:
            self._begun += 1
        try:
            yield
        finally:
            with self._changed:
                self._committed = self._begun
                self._changed.notify_all()

    def confirm(self) -> bool:
        """Wait until what a match finds now is as durable as was promised; False when the disk refuses."""
        try:
            self.wait()
        except OSError as error:
            log.warning("the drive did not empty its cache: %s", error)
            return False
        return True

    def wait(self) -> None:
        """Return once every row that is visible now has left the drive's cache. Raises OSError of the flush."""
        if self._flush is None:
            return
        with self._changed:
            wanted = self._begun
            while self._flushed < wanted:
                if self._is_flushing or self._committed <= self._flushed:
                    self._changed.wait()
                    continue
                covered, self._is_flushing = self._committed, True
                self._changed.release()
                try:
                    self._flush()
                except BaseException:
                    covered = 0
                    raise
                finally:
                    self._changed.acquire()
                    self._is_flushing = False
                    self._flushed = max(self._flushed, covered)
                    self._changed.notify_all()
