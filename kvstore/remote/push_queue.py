"""Blobs that wait to be pushed to the remote store: references to what lies in the local one, in order.

The queue is bounded by the bytes that it refers to. What does not fit is dropped and counted, from the first block on
that does not: a block without its ancestors is of no use. It is saved in a file now and then and at the end, so that a
restart goes on where it was; a kill loses the last seconds, and a blob that is pushed again is there already.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import msgpack
import xxhash

from kvstore.blobs.fs import replace_file
from kvstore.core.blocks import KEY_BYTES

_MAGIC = b"kvpush1\n"
_SUM_BYTES = 8
_FILE_BYTES_MAX = 1 << 28
log = logging.getLogger(__name__)


class PushItem(NamedTuple):
    """A blob to push: its block's root and key, and its bytes. `tries`: how often that failed so far."""

    root: bytes
    key: bytes
    nbytes: int
    tries: int = 0


class PushQueue:
    """See the module. Any thread may call; only `save` touches the disk."""

    def __init__(self, path: Path | None, bytes_max: int, *, sync: bool = True) -> None:
        """`path`: the file that it is kept in, which need not exist; None: in memory only."""
        self._path, self._bytes_max, self._sync = path, bytes_max, sync
        self._lock = threading.Lock()
        self._waiting = threading.Condition(self._lock)
        self._items: OrderedDict[tuple[bytes, bytes], PushItem] = OrderedDict()
        self._taken: PushItem | None = None
        self._nbytes = 0
        self._changed = False
        self.dropped = 0
        for item in _read(path) if path is not None else []:
            self._add(item)

    def __len__(self) -> int:
        """Blobs that wait, with the one that is under way."""
        with self._lock:
            return len(self._items) + (self._taken is not None)

    @property
    def nbytes(self) -> int:
        """Bytes that they refer to."""
        return self._nbytes

    def offer(self, items: Iterable[PushItem]) -> int:
        """Add the blobs of one sequence, ancestors first; how many were added. Never waits for a disk or a network.

        Those that wait already stay where they are. From the first that does not fit all others are dropped.
        """
        added = 0
        with self._lock:
            offered = list(items)
            for at, item in enumerate(offered):
                if self._holds(item):
                    continue
                if self._nbytes + item.nbytes > self._bytes_max:
                    self.dropped += sum(not self._holds(one) for one in offered[at:])
                    break
                self._add(item)
                added += 1
            if added:
                self._changed = True
                self._waiting.notify()
        return added

    def _holds(self, item: PushItem) -> bool:
        same = self._taken is not None and self._taken[:2] == item[:2]
        return same or item[:2] in self._items

    def _add(self, item: PushItem) -> None:
        self._items[item[:2]] = item
        self._nbytes += item.nbytes

    def take(self, timeout_s: float) -> PushItem | None:
        """The first blob, once there is one; None after `timeout_s`. Of one thread: it ends what it took first."""
        with self._lock:
            if not self._items:
                self._waiting.wait(timeout_s)
            if not self._items:
                return None
            _, self._taken = self._items.popitem(last=False)
            return self._taken

    def done(self) -> None:
        """What was taken was pushed, or needs no push."""
        with self._lock:
            self._end()

    def drop(self) -> None:
        """What was taken will not be pushed."""
        with self._lock:
            self.dropped += 1
            self._end()

    def again(self) -> None:
        """What was taken was not pushed and stands first again."""
        with self._lock:
            item = self._taken
            if item is not None:
                self._taken = None
                self._items[item[:2]] = item._replace(tries=item.tries + 1)
                self._items.move_to_end(item[:2], last=False)

    def _end(self) -> None:
        if self._taken is not None:
            self._nbytes -= self._taken.nbytes
            self._taken, self._changed = None, True

    def wake(self) -> None:
        """End a `take` that waits."""
        with self._lock:
            self._waiting.notify_all()

    def save(self) -> None:
        """Write the file if anything changed. What the disk refuses is logged; the next save tries again."""
        with self._lock:
            if self._path is None or not self._changed:
                return
            self._changed = False
            held = [self._taken] if self._taken is not None else []
            rows = [[item.root, item.key, item.nbytes] for item in (*held, *self._items.values())]
        body: bytes = msgpack.packb(rows)
        try:
            replace_file(self._path, _MAGIC + body + xxhash.xxh3_64_digest(body), self._sync)
        except OSError as error:
            with self._lock:
                self._changed = True
            log.warning("what waits for the remote store could not be saved: %s", error)


def _read(path: Path) -> list[PushItem]:
    """What was saved. A damaged file is a cache that is gone."""
    try:
        if path.stat().st_size > _FILE_BYTES_MAX:
            raise ValueError("it is too large")
        data = path.read_bytes()
        body = data[len(_MAGIC) : -_SUM_BYTES]
        if not data.startswith(_MAGIC) or xxhash.xxh3_64_digest(body) != data[-_SUM_BYTES:]:
            raise ValueError("it does not match its checksum")
        items = [PushItem(root, key, nbytes) for root, key, nbytes in msgpack.unpackb(body)]
        if not all(len(one.root) == len(one.key) == KEY_BYTES and one.nbytes >= 0 for one in items):
            raise ValueError("it has other fields")
    except FileNotFoundError:
        return []
    except (OSError, ValueError, TypeError, msgpack.exceptions.UnpackException) as error:
        log.warning("what waited for the remote store is lost: %s: %s", path, error)
        return []
    return items
