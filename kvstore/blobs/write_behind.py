"""Writes and syncs the blobs of one request while the next ones are made: one is synced, one written, one received.

The disk syncs a file while the processor copies the next one into the page cache. On two cores and a disk of 3 GB/s, 32
files of 32 MiB then take 0.75 of the time that writing and syncing one file of 1 GiB takes; two threads that each write
and sync take 1.0, and one thread 1.2.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

from kvstore.blobs.protocol import BlobId, Blobs, Pending

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class BlobWrite:
    """A blob on its way to the disk. OSError in one of these: the disk refused it, and nothing of it is left.

    `written`: ends when its bytes are no longer needed. `synced`: ends when it is durable, but for its name.
    """

    written: Future[Pending]
    synced: Future[Pending]

    def abandon(self) -> None:
        """Remove what was written, which must not be under way. Safe to call twice."""
        if self.written.exception() is None:
            self.written.result().abandon()


class WriteBehind:
    """The two threads of one request, started when needed, with the priority of the thread that starts them.

    `ahead`: how many blobs may be made while earlier ones are written; at 0 `put` returns when the blob is written. Use
    it on one thread, and `close` it.
    """

    def __init__(self, blobs: Blobs, ahead: int = 0) -> None:
        self.ahead = ahead
        self._blobs = blobs
        self._writing = ThreadPoolExecutor(1, "kvstore-put")
        self._syncing = ThreadPoolExecutor(1, "kvstore-sync")

    def close(self) -> None:
        """Wait for all blobs, and end the threads."""
        self._writing.shutdown()
        self._syncing.shutdown()

    def put(self, blob: BlobId, parts: Sequence[memoryview], on_disk: Callable[[], object]) -> BlobWrite:
        """Begin to write and sync a blob. Raises OSError if it cannot be, or if no thread can be started.

        `on_disk` is called on the thread that writes, when the volume has given the bytes their place, or refused it.
        """

        def write() -> Pending:
            try:
                return self._blobs.put(blob, parts)
            finally:
                on_disk()

        def sync() -> Pending:
            pending = written.result()
            pending.sync()
            return pending

        written = _submit(self._writing, write)
        if not self.ahead:
            written.result()
        try:
            return BlobWrite(written, _submit(self._syncing, sync))
        except OSError:
            if written.exception() is None:
                written.result().abandon()
            raise


def _submit(pool: ThreadPoolExecutor, work: Callable[[], T]) -> Future[T]:
    try:
        return pool.submit(work)
    except RuntimeError as error:
        # Its thread could not be started, so what was queued all the same will never run.
        raise OSError(errno.EAGAIN, str(error)) from error
