"""Blobs in memory, for tests and for `kvstore bench eviction`. See `protocol.Blobs`."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Sequence

from kvstore.blobs.protocol import NUMBER_END, BlobId, Entry, Room, Source, disk_bytes
from kvstore.errors import CorruptDataError


class MemoryBlobs:
    """Dicts of what was put, and of what was moved out of the way."""

    def __init__(self) -> None:
        self._blobs: dict[BlobId, bytes] = {}
        self._dropped: list[bytes] = []
        self._lock = threading.Lock()
        self._quarantine: dict[str, bytes] = {}

    def put(self, blob: BlobId, parts: Iterable[memoryview]) -> _Pending:
        """The bytes, joined."""
        if blob in self._blobs:
            raise FileExistsError(f"{blob.name} is there")
        return _Pending(self._blobs, blob, b"".join(parts))

    def sync(self, root: bytes) -> None:
        """Nothing to do."""

    def reader(self, sources: Sequence[Source], open_max: int) -> _MemoryReader:
        """Reads the blob's present bytes on every call."""
        return _MemoryReader(self._blobs, sources)

    def delete(self, blobs: Iterable[BlobId]) -> list[BlobId]:
        """Always all of them."""
        with self._lock:
            for blob in blobs:
                self._blobs.pop(blob, None)
        return []

    def names(self, root: bytes | None = None) -> Iterator[Entry]:
        """A snapshot."""
        for blob, data in list(self._blobs.items()):
            if root in (None, blob.root):
                yield Entry(f"{blob.root.hex()}/{blob.name}", blob, len(data))

    def size(self, blob: BlobId) -> int | None:
        """Bytes of the blob; None if it is missing."""
        data = self._blobs.get(blob)
        return None if data is None else len(data)

    def stored_bytes(self, root: bytes, nbytes: int) -> int:
        """As on a disk."""
        return disk_bytes(nbytes)

    def path(self, blob: BlobId) -> str | None:
        """There is none."""
        return None

    def write_identity(self, root: bytes, text: bytes) -> None:
        """Does nothing: memory needs no read-ahead."""

    def drop(self, root: bytes) -> None:
        """Out of the names, still in memory."""
        with self._lock:
            for blob in [blob for blob in self._blobs if blob.root == root]:
                self._dropped.append(self._blobs.pop(blob))

    def clear(self, count_max: int) -> int:
        """Out of memory."""
        with self._lock:
            gone, self._dropped = self._dropped[:count_max], self._dropped[count_max:]
            return sum(disk_bytes(len(data)) for data in gone)

    @property
    def overhead_bytes(self) -> int:
        """Bytes that `clear` has not freed yet."""
        return sum(disk_bytes(len(data)) for data in self._dropped)

    def discard(self, entry: Entry) -> None:
        """Nothing is ever unfinished here."""

    def quarantine(self, what: Entry | BlobId) -> None:
        """Into a dict of its own."""
        blob = what.blob if isinstance(what, Entry) else what
        if blob is not None and blob in self._blobs:
            self._quarantine[f"{blob.root.hex()}/{blob.name}"] = self._blobs.pop(blob)

    def quarantined(self) -> tuple[int, int]:
        """As on a disk."""
        return len(self._quarantine), sum(disk_bytes(len(data)) for data in self._quarantine.values())

    def trim_quarantine(self, count_max: int) -> None:
        """In the order in which they came."""
        for place in list(self._quarantine)[: max(0, len(self._quarantine) - count_max)]:
            del self._quarantine[place]

    def room(self) -> Room:
        """Unlimited."""
        return Room(NUMBER_END, NUMBER_END)


class _Pending:
    def __init__(self, blobs: dict[BlobId, bytes], blob: BlobId, data: bytes) -> None:
        self._blobs, self._blob, self._data = blobs, blob, data

    def sync(self) -> None:
        pass

    def rename(self) -> None:
        self._blobs[self._blob] = self._data

    def abandon(self) -> None:
        self._data = b""


class _MemoryReader:
    def __init__(self, blobs: dict[BlobId, bytes], sources: Sequence[Source]) -> None:
        self._blobs, self._sources = blobs, tuple(sources)

    def readinto(self, source: int, offset: int, views: Sequence[memoryview]) -> None:
        if not 0 <= source < len(self._sources) or offset < 0:
            raise CorruptDataError(f"no such range: source {source}, offset {offset}")
        one = self._sources[source]
        data = self._blobs.get(one.blob)
        if data is None or len(data) != one.nbytes:
            raise CorruptDataError(f"{one.blob.name}: not {one.nbytes} bytes")
        at = one.payload_offset + offset
        if at + sum(view.nbytes for view in views) > len(data):
            raise CorruptDataError(f"{one.blob.name}: a range ends beyond the blob")
        for view in views:
            view.cast("B")[:] = data[at : at + view.nbytes]
            at += view.nbytes

    def close(self) -> None:
        self._sources = ()
