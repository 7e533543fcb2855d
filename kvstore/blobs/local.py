"""Blobs as files of one directory, a folder a namespace.

    <directory>/<root in hex>/identity.json                   what the namespace is, for people and for an import
    <directory>/<root in hex>/<key in hex>-<number>.safetensors     0600, never changed
    <directory>/<root in hex>/<name>.tmp                      being written
    <directory>/<root in hex>-<n>.dropped/                    a namespace that was evicted: no rebuild looks into it

A request syncs one folder. Links are not followed: what lies behind one belongs to somebody else.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from kvstore.blobs.fs import (
    Fs,
    PendingFile,
    entries,
    still_there,
    taken_bytes,
    unlink_quietly,
    write_durably,
    write_pending,
)
from kvstore.blobs.protocol import TMP_SUFFIX, BlobId, Entry, Room, Source, disk_bytes, parse_name, parse_root
from kvstore.blobs.ranges import FileReader, FileSource
from kvstore.errors import DirectoryError

IDENTITY = "identity.json"
DROPPED = ".dropped"


class LocalBlobs:
    """See `protocol.Blobs`. `sync` False leaves out every fsync: for tests."""

    def __init__(self, directory: Path, quarantine: Path, fs: Fs, *, sync: bool = True) -> None:
        self._directory = str(directory)
        self._quarantine = str(quarantine)
        self._fs = fs
        self._sync = sync

    def put(self, blob: BlobId, parts: Iterable[memoryview]) -> PendingFile:
        """A temporary file in the folder of the namespace, which is made if it is not there."""
        folder = self._folder(blob.root)
        if not os.path.isdir(folder):
            with contextlib.suppress(FileExistsError):
                self._fs.mkdir(folder)
            if self._sync:
                self._fs.fsync_dir(self._directory)
        return write_pending(self._fs, self._path(blob), parts, self._sync)

    def sync(self, root: bytes) -> None:
        """Sync the namespace's folder; its parent if the folder is missing."""
        if self._sync:
            try:
                self._fs.fsync_dir(self._folder(root))
            except FileNotFoundError:
                self._fs.fsync_dir(self._directory)

    def reader(self, sources: Sequence[Source], open_max: int) -> FileReader:
        """Positions are offsets in the file."""
        files = [FileSource(self._path(one.blob), one.payload_offset, one.nbytes) for one in sources]
        return FileReader(files, open_max)

    def delete(self, blobs: Iterable[BlobId]) -> list[BlobId]:
        """Unlink."""
        left = []
        for blob in blobs:
            try:
                self._fs.unlink(self._path(blob))
            except FileNotFoundError:
                continue
            except OSError:
                left.append(blob)
        return left

    def names(self, root: bytes | None = None) -> Iterator[Entry]:
        """Files of the folders; what is not a folder of a namespace is an entry itself, unless it was dropped."""
        if root is not None:
            yield from self._entries(root, self._folder(root))
            return
        with os.scandir(self._directory) as folders:
            for folder in folders:
                found = parse_root(folder.name)
                if found is not None and folder.is_dir(follow_symlinks=False):
                    yield from self._entries(found, folder.path)
                elif not folder.name.endswith(DROPPED):
                    yield Entry(folder.path, None, _size(folder))

    def _entries(self, root: bytes, folder: str) -> Iterator[Entry]:
        for entry in entries(folder):
            is_file = entry.is_file(follow_symlinks=False)
            blob = parse_name(root, entry.name.removesuffix(TMP_SUFFIX)) if is_file else None
            if blob is None and entry.name.removesuffix(TMP_SUFFIX) == IDENTITY:
                continue
            unfinished = blob is not None and entry.name.endswith(TMP_SUFFIX)
            yield Entry(entry.path, blob, _size(entry), unfinished)

    def size(self, blob: BlobId) -> int | None:
        """st_size."""
        try:
            info = os.lstat(self._path(blob))
        except OSError:
            return None
        return info.st_size if stat.S_ISREG(info.st_mode) else None

    def stored_bytes(self, root: bytes, nbytes: int) -> int:
        """Whole blocks of the file system."""
        return disk_bytes(nbytes)

    def path(self, blob: BlobId) -> str | None:
        """The file."""
        return self._path(blob)

    def write_identity(self, root: bytes, text: bytes) -> None:
        """Make `identity.json` of a namespace if it is not there. Raises OSError."""
        path = os.path.join(self._folder(root), IDENTITY)
        if not os.path.lexists(path):
            write_durably(self._fs, path, text, self._sync)

    def drop(self, root: bytes) -> None:
        """One rename and one sync, however many files the folder has."""
        folder = self._folder(root)
        for number in range(1 << 30):
            target = f"{folder}-{number}{DROPPED}"
            if not os.path.lexists(target):
                break
        with contextlib.suppress(FileNotFoundError):
            self._fs.rename(folder, target)
        if self._sync:
            self._fs.fsync_dir(self._directory)

    def clear(self, count_max: int) -> int:
        """Unlink files of dropped folders, then the folders; what the disk keeps stays for a later call."""
        freed = 0
        for folder in self._dropped():
            for entry in entries(folder):
                if count_max <= 0:
                    return freed
                nbytes = 0 if entry.name == IDENTITY else disk_bytes(_size(entry))
                count_max -= 1
                freed += 0 if unlink_quietly(self._fs, [entry.path]) else nbytes
            with contextlib.suppress(OSError):
                self._fs.rmdir(folder)
        return freed

    @property
    def overhead_bytes(self) -> int:
        """Folders, identities, and what dropped folders still hold."""
        with os.scandir(self._directory) as folders:
            own = [one.path for one in folders if one.is_dir(follow_symlinks=False)]
        files = [os.path.join(folder, IDENTITY) for folder in own if not folder.endswith(DROPPED)]
        files += [one.path for folder in own if folder.endswith(DROPPED) for one in entries(folder)]
        return taken_bytes([self._directory, *own, *files])

    def discard(self, entry: Entry) -> None:
        """Unlink."""
        with contextlib.suppress(FileNotFoundError):
            self._fs.unlink(entry.place)

    def quarantine(self, what: Entry | BlobId) -> None:
        """Move what has this name to the quarantine folder, which is made again if somebody deleted it."""
        place = what.place if isinstance(what, Entry) else self._path(what)
        with contextlib.suppress(FileExistsError):
            self._fs.mkdir(self._quarantine)
        if not stat.S_ISDIR(os.lstat(self._quarantine).st_mode):
            raise DirectoryError(f"{self._quarantine} is not a directory")
        with contextlib.suppress(FileNotFoundError):
            self._fs.rename(place, os.path.join(self._quarantine, os.path.basename(place)))

    def quarantined(self) -> tuple[int, int]:
        """None where somebody has deleted the folder, or put a link in its place."""
        files = self._in_quarantine()
        return len(files), taken_bytes(files)

    def trim_quarantine(self, count_max: int) -> None:
        """The oldest by the time of their last change."""
        files = sorted(still_there(self._in_quarantine()), key=lambda file: file[1].st_mtime_ns)
        unlink_quietly(self._fs, [path for path, _ in files[: max(0, len(files) - count_max)]])

    def _in_quarantine(self) -> list[str]:
        if os.path.islink(self._quarantine):
            return []
        return [entry.path for entry in entries(self._quarantine)]

    def room(self) -> Room:
        """Free space of the volume for this user."""
        return self._fs.room(self._directory)

    def _dropped(self) -> list[str]:
        with os.scandir(self._directory) as folders:
            return [one.path for one in folders if one.name.endswith(DROPPED) and one.is_dir(follow_symlinks=False)]

    def _folder(self, root: bytes) -> str:
        return f"{self._directory}/{root.hex()}"

    def _path(self, blob: BlobId) -> str:
        return f"{self._directory}/{blob.root.hex()}/{blob.name}"


def _size(entry: os.DirEntry[str]) -> int:
    with contextlib.suppress(OSError):
        return entry.stat(follow_symlinks=False).st_size
    return 0
