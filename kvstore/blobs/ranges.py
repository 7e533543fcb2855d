"""Reading byte ranges of blob files, or of a buffer that arrived by stream, behind one protocol.

A *source* is one block of a plan, by its number. Offsets count from the start of the block's payload. Whatever is
wrong with a file (gone, shorter, longer, not a regular file) is CorruptDataError: callers turn it into a miss.
"""

from __future__ import annotations

import bisect
import itertools
import os
import stat
import threading
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from kvstore.errors import CorruptDataError, ReadDeadlineError

# launchd gives a process 256 files, and several workers may read at once.
OPEN_FILES_MAX = 64
# The limits of one preadv: IOV_MAX, and on macOS no more than INT_MAX bytes.
VECTORS_MAX = 1024
READ_BYTES_MAX = 1 << 30

Bytes: TypeAlias = bytes | bytearray | memoryview
_NOTHING = np.empty(0, np.uint8)


class Range(NamedTuple):
    """`nbytes` payload bytes of a source from `offset` on."""

    source: int
    offset: int
    nbytes: int


class MemoryReader(ABC):
    """A `RangeReader` of bytes that lie in memory: it may also show them there."""

    @abstractmethod
    def readinto(self, source: int, offset: int, views: Sequence[memoryview]) -> None:
        """See `RangeReader.readinto`."""

    @abstractmethod
    def view(self, source: int, offset: int, nbytes: int) -> memoryview | None:
        """The bytes of a range where they lie; None unless they lie there in one piece. Raises as `readinto`."""


@dataclass(frozen=True, slots=True)
class FileSource:
    """A blob's file, where its payload starts in it, and its exact size."""

    path: str
    payload_offset: int
    file_bytes: int


@dataclass(slots=True)
class _OpenFile:
    """An open descriptor and the number of reads that use it now."""

    fd: int
    users: int = 0


class FileReader:
    """Reads ranges of blob files, with at most `open_max` of them open. Any thread may read.

    A file is opened at its first read and stays open while it is among the most recently used; a read in progress
    keeps its file open whatever others do.
    """

    def __init__(
        self,
        sources: Sequence[FileSource],
        open_max: int = OPEN_FILES_MAX,
        closed: Callable[[], None] = lambda: None,
    ) -> None:
        """`closed` is called once when all files are closed, on the thread that closes the last."""
        self._sources = tuple(sources)
        self._open_max = max(1, open_max)
        self._on_closed = closed
        self._open: OrderedDict[int, _OpenFile] = OrderedDict()
        self._busy: list[int] = []  # sources that are being opened or read now, once for each thread
        self._closing = False
        self._lock = threading.Lock()

    @property
    def all_open(self) -> bool:
        """Whether every source is open: nothing that happens to the names can take the bytes away any more."""
        with self._lock:
            return len(self._open) == len(self._sources)

    def open_all(self) -> bool:
        """Open as many sources as allowed, in order; whether that is all of them. CorruptDataError as `readinto`."""
        for source in range(min(len(self._sources), self._open_max)):
            self._give_back(source, self._borrow(source))
        return self.all_open

    def readinto(self, source: int, offset: int, views: Sequence[memoryview]) -> None:
        """See `RangeReader.readinto`. The range must lie inside the file."""
        if not 0 <= source < len(self._sources) or offset < 0:
            raise CorruptDataError(f"no such range: source {source}, offset {offset}")
        file, position = self._sources[source], self._sources[source].payload_offset + offset
        if position + sum(view.nbytes for view in views) > file.file_bytes:
            raise CorruptDataError(f"{file.path}: a range ends beyond the file")
        entry = self._borrow(source)
        try:
            _read_fully(entry.fd, position, views, file.path)
        finally:
            self._give_back(source, entry)

    def _borrow(self, source: int) -> _OpenFile:
        """The open file of a source. Opening may block, so it holds no lock."""
        with self._lock:
            if self._closing:
                raise ReadDeadlineError("the fetch that this read belongs to has ended")
            self._busy.append(source)
            entry = self._open.get(source)
            if entry is not None:
                entry.users += 1
                self._open.move_to_end(source)
                return entry
        try:
            fd = _open_checked(self._sources[source])
        except BaseException:
            self._give_back(source, None)
            raise
        spare: list[int] = []
        with self._lock:
            entry = self._open.get(source)
            if entry is None:
                entry = self._open[source] = _OpenFile(fd)
            else:
                spare.append(fd)  # another thread has opened it meanwhile
            entry.users += 1
            self._open.move_to_end(source)
            spare += self._taken(self._open_max)
        _close(spare)
        return entry

    def _give_back(self, source: int, entry: _OpenFile | None) -> None:
        with self._lock:
            if entry is not None:
                entry.users -= 1
            self._busy.remove(source)
            spare = self._taken(0 if self._closing else self._open_max)
            over = self._closing and not self._busy
        _close(spare)
        if over:
            _ABANDONED.discard(self)
            self._on_closed()

    def _taken(self, limit: int) -> list[int]:
        """Descriptors of the least recently used files over the limit, except those in use; to be closed."""
        if len(self._open) <= limit:
            return []
        idle = [source for source, entry in self._open.items() if not entry.users]
        return [self._open.pop(source).fd for source in idle[: len(self._open) - limit]]

    def busy_paths(self) -> set[str]:
        """Files that are being opened or read now."""
        with self._lock:
            return {self._sources[source].path for source in self._busy}

    def close(self) -> None:
        """Close all files. Never waits for a read: the last one that was abandoned closes them when it returns."""
        with self._lock:
            if self._closing:
                return
            self._closing = True
            busy = bool(self._busy)
            spare = [] if busy else self._taken(0)
            if busy:
                _ABANDONED.add(self)
        _close(spare)
        if not busy:
            self._on_closed()


# Readers that were closed while a read had not returned; under no lock, since adding and removing are atomic.
_ABANDONED: set[FileReader] = set()


def unreadable_paths() -> set[str]:
    """Number of files with a read that has not returned although its caller has given up."""
    return {path for reader in list(_ABANDONED) for path in reader.busy_paths()} if _ABANDONED else set()


class BufferReader(MemoryReader):
    """Reads ranges of received bytes. Any thread may read.

    `parts` hold the payload ranges `ranges`, one after the other; ranges need not begin and end where parts do. They
    are read where they arrived, and numpy copies them without the interpreter's lock.
    """

    def __init__(self, parts: Iterable[Bytes], ranges: Iterable[Range]) -> None:
        self._parts = [np.frombuffer(part, np.uint8) for part in parts if len(part)]
        self._ends = list(itertools.accumulate(map(len, self._parts)))
        self._starts: dict[int, list[tuple[int, int, int]]] = {}
        position = 0
        for source, offset, nbytes in ranges:
            self._starts.setdefault(source, []).append((offset, nbytes, position))
            position += nbytes
        for entries in self._starts.values():
            entries.sort()

    def readinto(self, source: int, offset: int, views: Sequence[memoryview]) -> None:
        """See `RangeReader.readinto`. A read may cross ranges that are neighbours in the payload."""
        chunk = _NOTHING
        for view in views:
            target = np.frombuffer(view, np.uint8) if view.nbytes else _NOTHING
            while len(target):
                if not len(chunk):
                    chunk = self._chunk(source, offset)
                count = min(len(chunk), len(target))
                np.copyto(target[:count], chunk[:count])
                target, chunk = target[count:], chunk[count:]
                offset += count

    def view(self, source: int, offset: int, nbytes: int) -> memoryview | None:
        """See `MemoryReader.view`."""
        chunk = self._chunk(source, offset)
        return chunk[:nbytes].data if len(chunk) >= nbytes else None

    def _chunk(self, source: int, offset: int) -> npt.NDArray[np.uint8]:
        """Bytes from `offset` on, to the end of their range or part."""
        entries = self._starts.get(source, [])
        at = bisect.bisect_right(entries, (offset, 1 << 62, 0)) - 1
        if at >= 0:
            start, nbytes, position = entries[at]
            inside = offset - start
            number = bisect.bisect_right(self._ends, position + inside)
            if inside < nbytes and number < len(self._parts):
                part, end = self._parts[number], self._ends[number]
                begin = position + inside - (end - len(part))
                return part[begin : begin + nbytes - inside]
        raise CorruptDataError(f"the bytes at offset {offset} of block {source} did not arrive")


def _close(fds: Sequence[int]) -> None:
    for fd in fds:
        os.close(fd)


def _open_checked(source: FileSource) -> int:
    """Open a blob for reading; CorruptDataError unless it is a regular file of the exact size."""
    try:
        # Not blocking: opening a FIFO would wait until another process opens it for writing.
        fd = os.open(source.path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise CorruptDataError(f"{source.path}: {error.strerror}") from error
    info = os.fstat(fd)
    if not stat.S_ISREG(info.st_mode) or info.st_size != source.file_bytes:
        os.close(fd)
        raise CorruptDataError(f"{source.path}: {info.st_size} bytes where {source.file_bytes} were expected")
    return fd


def _read_fully(fd: int, position: int, views: Sequence[memoryview], path: str) -> None:
    """Fill all views from `position` on, over as many short reads as it takes."""
    while views := [view for view in views if view.nbytes]:
        try:
            got = os.preadv(fd, _at_once(views), position)
        except OSError as error:
            raise CorruptDataError(f"{path}: {error.strerror}") from error
        if got == 0:
            raise CorruptDataError(f"{path}: the file ended early")
        position += got
        views = _left(views, got)


def _at_once(views: Sequence[memoryview]) -> list[memoryview]:
    """The leading views that one call may fill."""
    batch: list[memoryview] = []
    room = READ_BYTES_MAX
    for view in views[:VECTORS_MAX]:
        if view.nbytes > room:
            batch.append(view.cast("B")[:room])
            break
        batch.append(view)
        room -= view.nbytes
    return batch


def _left(views: Sequence[memoryview], got: int) -> list[memoryview]:
    """The views that remain to be filled after `got` bytes."""
    for index, view in enumerate(views):
        if got < view.nbytes:
            return [view.cast("B")[got:], *views[index + 1 :]]
        got -= view.nbytes
    return []
