"""Tombstones: the deleted blob files that are still on the disk. A start unlinks them before anything looks for blobs.

A file outlives its row when a reader has a lease on it, or when the disk does not let it go. Nothing in the file says
that it was deleted, so an index that is rebuilt from the files would bring it back. `settings/tombstones` names such
files, one a line, as `folder/name`; it is written before the deletion is acknowledged, and a name leaves it when the
file is gone and its folder synced. Lines that are not names of blobs are ignored.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path

from kvstore.engine.blobs import TMP_SUFFIX, Fs, disk_bytes, parse_name, unlink_quietly, write_durably
from kvstore.engine.directory import Directory


class Tombstones:
    """The tombstones of one data directory. Any thread may call; a lock of its own is held over the I/O."""

    def __init__(self, directory: Directory, fs: Fs, *, sync: bool = True) -> None:
        """Read them. Raises OSError."""
        self._path = directory.settings / "tombstones"
        self._blobs = directory.blobs
        self._fs = fs
        self._sync = sync
        self._lock = threading.Lock()
        self._files = frozenset(self._read())

    def names(self) -> frozenset[str]:
        """Names of the files."""
        return frozenset(path.name for path in self._files)

    def next_seq(self) -> int:
        """A blob number above those of the files: a new blob must not get the name of one of them."""
        return max((named[1] + 1 for name in self.names() if (named := parse_name(name))), default=1)

    def disk_bytes(self) -> int:
        """What the file of tombstones costs on disk."""
        return disk_bytes(sum(len(_line(path)) for path in self._files))

    def add(self, files: Iterable[Path]) -> None:
        """Make it durable that these files were deleted. Raises OSError, and then nothing is added."""
        with self._lock:
            self._write(self._files.union(files))

    def settle(self, busy: Iterable[Path] = ()) -> None:
        """Unlink the files that are not `busy`, and drop the tombstones of what is gone. Raises OSError."""
        if not self._files:
            return
        with self._lock:
            for path in self._files.difference(busy):
                unlink_quietly(self._fs, [str(path)])
            gone = {path for path in self._files if not os.path.lexists(path)}
            if gone:
                self._sync_folders({path.parent for path in gone})
                self._write(self._files - gone)

    def _sync_folders(self, folders: Iterable[Path]) -> None:
        if self._sync:
            for folder in folders:
                with contextlib.suppress(FileNotFoundError):
                    self._fs.fsync_dir(str(folder))

    def _write(self, files: frozenset[Path]) -> None:
        path = str(self._path)
        unlink_quietly(self._fs, [path + TMP_SUFFIX])
        if files:
            write_durably(self._fs, path, [memoryview(b"".join(map(_line, sorted(files))))], self._sync)
        else:
            with contextlib.suppress(FileNotFoundError):
                self._fs.unlink(path)
        self._files = files
        if self._sync:
            self._fs.fsync_dir(str(self._path.parent))

    def _read(self) -> Iterator[Path]:
        with contextlib.suppress(FileNotFoundError):
            fd = os.open(self._path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
            with os.fdopen(fd, "rb") as file:
                for line in file.read().decode("latin-1").splitlines():
                    folder, _, name = line.partition("/")
                    if len(folder) == 2 and set(folder) <= set("0123456789abcdef") and parse_name(name):
                        yield self._blobs / folder / name


def _line(path: Path) -> bytes:
    return f"{path.parent.name}/{path.name}\n".encode()
