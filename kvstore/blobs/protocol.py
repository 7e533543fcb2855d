"""The protocol of a blob store, and the names of blobs.

    put      write all bytes under a temporary name; `Pending` then syncs them and gives the blob its name
    sync     make the names of one namespace durable
    reader   read byte ranges of blobs
    delete   take names away
    names    list every entry, including names that kvstore never uses
    size     bytes of one blob
    path     its file, for readers in other processes on this host; None where only this process can read it
    drop     take a whole namespace away
    quarantine   move one blob or entry out of the way, for a person to look at
    room     what may still be written

Blobs never change: a new blob gets a new number, and a number is never used twice for one key. What implements this
decides where bytes lie and whether they are encrypted; nothing above it knows.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

SUFFIX = ".safetensors"
TMP_SUFFIX = ".tmp"
# No store counts this far. A file that was given such a number by hand would use up the numbers of all later blobs.
NUMBER_END = 1 << 62
# What a file costs on disk is counted in blocks of this size: APFS and ext4 both allocate units of 4 KiB.
DISK_BLOCK_BYTES = 4096
_NAME = re.compile(r"([0-9a-f]{64})-(0|[1-9][0-9]{0,18})\.safetensors")
_ROOT = re.compile(r"[0-9a-f]{64}")


class BlobId(NamedTuple):
    """Which blob: its namespace, its key, and the number that makes its name unique."""

    root: bytes
    key: bytes
    number: int

    @property
    def name(self) -> str:
        """The name inside its namespace: <key in hex>-<number>.safetensors."""
        return f"{self.key.hex()}-{self.number}{SUFFIX}"


class Room(NamedTuple):
    """Free bytes and free names; very large numbers where there is no limit."""

    free_bytes: int
    free_names: int


class Source(NamedTuple):
    """A blob to read: where its payload starts in it, and its exact size."""

    blob: BlobId
    payload_offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Entry:
    """One name of a listing. `blob` is None for a name that kvstore does not give.

    `place` is where it lies, for messages and for `quarantine`. `is_unfinished`: a blob that is being written, or was
    when its process ended; it was never acknowledged, and its name does not exist yet.
    """

    place: str
    blob: BlobId | None
    nbytes: int
    is_unfinished: bool = False


class RangeReader(Protocol):
    """Reads the payloads of the blocks of a plan, the sources, by their position in it. Any thread may read.

    They lie in blobs, or in what arrived of a stream (`ranges.py`).
    """

    def readinto(self, source: int, offset: int, views: Sequence[memoryview]) -> None:
        """Fill `views` one after the other from payload bytes `[offset, offset + sum(len))` of source `source`.

        Raises CorruptDataError when these bytes are not there, or do not pass the cipher's tag.
        """


class BlobReader(RangeReader, Protocol):
    """A `RangeReader` that holds files open until it is closed. No read may be in progress then."""

    def close(self) -> None:
        """Let go of everything."""


class Pending(Protocol):
    """A blob that is written in full and has no name yet: synced, then named, or abandoned. Any thread, in turn."""

    def sync(self) -> None:
        """Make the bytes durable. Raises OSError; then nothing of the blob is left."""

    def rename(self) -> None:
        """Give the blob its name, once it is synced. Raises OSError; then nothing of it is left."""

    def abandon(self) -> None:
        """Remove what was written, unless it has its name. Safe to call twice."""


class Blobs(Protocol):
    """See the module. Any thread may call; calls for different blobs may run side by side."""

    def put(self, blob: BlobId, parts: Iterable[memoryview]) -> Pending:
        """Write a blob, without its name. Raises OSError when the disk refuses; then nothing of it is left."""

    def sync(self, root: bytes) -> None:
        """Make the names of a namespace durable, those that came and those that went. Raises OSError."""

    def reader(self, sources: Sequence[Source], open_max: int) -> BlobReader:
        """A reader of blobs of one namespace, with at most `open_max` of them open. Opens nothing yet."""

    def delete(self, blobs: Iterable[BlobId]) -> list[BlobId]:
        """Take names away; those that are gone already do not count. Returns the blobs that are still there."""

    def names(self, root: bytes | None = None) -> Iterator[Entry]:
        """Every entry of one namespace, or of all, in no order."""

    def size(self, blob: BlobId) -> int | None:
        """Bytes of a blob as a reader sees them; None when it is not there, or is no regular file."""

    def stored_bytes(self, root: bytes, nbytes: int) -> int:
        """Bytes on disk of a blob of `nbytes` in this namespace."""

    def path(self, blob: BlobId) -> str | None:
        """The file of a blob, None where others cannot read it."""

    def write_identity(self, root: bytes, text: bytes) -> None:
        """Keep beside the blobs of a namespace, once, what it is. It has a blob already. Raises OSError."""

    def drop(self, root: bytes) -> None:
        """Take away all names of a namespace at once, durably. `clear` frees their bytes. Raises OSError."""

    def clear(self, count_max: int) -> int:
        """Free at most `count_max` files of dropped namespaces; the bytes of blobs that are free now.

        0 at the end, and where the disk lets none of them go.
        """

    @property
    def overhead_bytes(self) -> int:
        """Bytes on disk besides named blobs: folders, identities, and dropped files that are not cleared yet."""

    def discard(self, entry: Entry) -> None:
        """Remove an entry that is no blob, such as an unfinished one. Raises OSError."""

    def quarantine(self, what: Entry | BlobId) -> None:
        """Move something out of the way; nothing if it is gone. Raises OSError, or DirectoryError for a bad folder."""

    def quarantined(self) -> tuple[int, int]:
        """How many files are in quarantine, and what they cost on disk. Raises OSError."""

    def trim_quarantine(self, count_max: int) -> None:
        """Delete the oldest files in quarantine; keep this many. What the disk refuses stays. Raises OSError."""

    def room(self) -> Room:
        """Free space. Raises OSError."""


def disk_bytes(nbytes: int) -> int:
    """Bytes on disk of a file of this size."""
    return -(-nbytes // DISK_BLOCK_BYTES) * DISK_BLOCK_BYTES


def parse_name(root: bytes, name: str) -> BlobId | None:
    """The blob of a name; None for a name that kvstore does not give."""
    found = _NAME.fullmatch(name)
    if not found or int(found[2]) >= NUMBER_END:
        return None
    return BlobId(root, bytes.fromhex(found[1]), int(found[2]))


def parse_root(folder: str) -> bytes | None:
    """The namespace of a folder's name; None for any other name."""
    return bytes.fromhex(folder) if _ROOT.fullmatch(folder) else None
