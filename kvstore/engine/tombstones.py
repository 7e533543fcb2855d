"""Tombstones: deleted blobs whose names are still there. A start deletes them before anything looks for blobs.

A blob outlives its row when a reader has a lease on it, or when the disk does not let it go. Nothing in it says that it
was deleted, so an index that is rebuilt from the blobs would bring it back. `settings/tombstones` names such blobs, one
a line, as `<root in hex>/<name>`; it is written before the deletion is acknowledged, and a line leaves it when the name
is gone and that is durable. Lines that name no blob are ignored.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path

from kvstore.blobs.fs import Fs, unlink_quietly, write_durably
from kvstore.blobs.protocol import TMP_SUFFIX, BlobId, Blobs, disk_bytes, parse_name, parse_root


class Tombstones:
    """The tombstones of one data directory. Any thread may call; a lock of its own is held over the I/O."""

    def __init__(self, settings: Path, blobs: Blobs, fs: Fs, *, sync: bool = True) -> None:
        """Read them. Raises OSError."""
        self._path = settings / "tombstones"
        self._blobs = blobs
        self._fs = fs
        self._sync = sync
        self._lock = threading.Lock()
        self.blobs = frozenset(self._read())

    def next_number(self) -> int:
        """A blob number above theirs: a new blob must not get the name of one of them."""
        return max((blob.number + 1 for blob in self.blobs), default=1)

    def disk_bytes(self) -> int:
        """What the file of tombstones costs on disk."""
        return disk_bytes(sum(len(_line(blob)) for blob in self.blobs))

    def add(self, blobs: Iterable[BlobId]) -> None:
        """Make it durable that these blobs were deleted. Raises OSError, and then nothing is added."""
        with self._lock:
            self._write(self.blobs.union(blobs))

    def settle(self, busy: Collection[BlobId] = ()) -> None:
        """Delete the blobs that are not `busy`, and drop the tombstones of what is gone. Raises OSError."""
        if not self.blobs:
            return
        with self._lock:
            wanted = self.blobs.difference(busy)
            gone = wanted.difference(self._blobs.delete(wanted))
            for root in {blob.root for blob in gone}:
                self._blobs.sync(root)
            if gone:
                self._write(self.blobs - gone)

    def _write(self, blobs: frozenset[BlobId]) -> None:
        path = str(self._path)
        unlink_quietly(self._fs, [path + TMP_SUFFIX])
        if blobs:
            write_durably(self._fs, path, [memoryview(b"".join(map(_line, sorted(blobs))))], self._sync)
        else:
            with contextlib.suppress(FileNotFoundError):
                self._fs.unlink(path)
        self.blobs = blobs
        if self._sync:
            self._fs.fsync_dir(str(self._path.parent))

    def _read(self) -> Iterator[BlobId]:
        with contextlib.suppress(FileNotFoundError):
            fd = os.open(self._path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
            with os.fdopen(fd, "rb") as file:
                for line in file.read().decode("latin-1").splitlines():
                    folder, _, name = line.partition("/")
                    root = parse_root(folder)
                    if root is not None and (blob := parse_name(root, name)) is not None:
                        yield blob


def _line(blob: BlobId) -> bytes:
    return f"{blob.root.hex()}/{blob.name}\n".encode()
