"""Blobs that wait to be pushed to the remote store: references to what lies in the local one, in order.

The queue is bounded by the bytes that it refers to. What does not fit is dropped, from the first block on that does
not: a block without its ancestors is of no use. For the same reason a block that is dropped later takes those with it
that build on it. The queue is saved in a file now and then and at the end, so that a restart goes on where it was; a
kill loses the last seconds, and a blob that is pushed again is there already.

`Offers` decides what goes into it: keys of chains wait there until somebody looks them through, and what was looked at
a short while ago is not looked at again. It counts what was not pushed.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import msgpack
import xxhash

from kvstore.blobs.fs import replace_file
from kvstore.core.blocks import KEY_BYTES
from kvstore.core.bounded import Bounded
from kvstore.core.remote_words import RemoteReason

# Chains that wait to be looked through.
WAITING_MAX = 256
# Keys that are remembered, and for how long.
SEEN_MAX, SEEN_S = 65_536, 600.0
_MAGIC = b"kvpush2\n"
_SUM_BYTES = 8
_FILE_BYTES_MAX = 1 << 28
log = logging.getLogger(__name__)


class PushItem(NamedTuple):
    """A blob to push: root, key and parent of its block, and its bytes. `tries`: how often that failed so far."""

    root: bytes
    key: bytes
    parent: bytes
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

    def offer(self, items: Iterable[PushItem]) -> list[PushItem]:
        """Add the blobs of one sequence, ancestors first; those that were dropped. Never waits for a disk or a network.

        Those that wait already stay where they are. From the first that does not fit all others are dropped.
        """
        with self._lock:
            left = [item for item in items if not self._holds(item)]
            fitting = 0
            for item in left:
                if self._nbytes + item.nbytes > self._bytes_max:
                    break
                self._add(item)
                fitting += 1
            if fitting:
                self._changed = True
                self._waiting.notify()
        return left[fitting:]

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

    def drop(self) -> list[bytes]:
        """What was taken will not be found in the remote store: its key, and those of all that wait and build on it."""
        with self._lock:
            if self._taken is None:
                return []
            gone = {self._taken.key: self._taken.root}
            for item in list(self._items.values()):
                if gone.get(item.parent) == item.root:
                    gone[item.key] = item.root
                    self._nbytes -= self._items.pop(item[:2]).nbytes
            self._end()
            return list(gone)

    def again(self, tries: int = 1) -> None:
        """What was taken was not pushed and stands first again; it counts as tried so often more."""
        with self._lock:
            item = self._taken
            if item is not None:
                self._taken = None
                self._items[item[:2]] = item._replace(tries=item.tries + tries)
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
            rows = [[item.root, item.key, item.parent, item.nbytes] for item in (*held, *self._items.values())]
        body: bytes = msgpack.packb(rows)
        try:
            replace_file(self._path, _MAGIC + body + xxhash.xxh3_64_digest(body), self._sync)
        except OSError as error:
            with self._lock:
                self._changed = True
            log.warning("what waits for the remote store could not be saved: %s", error)


class Offers:
    """What goes into a queue. Any thread may call: one lock over all that changes, under which nothing waits.

    The queue is added to and dropped from here alone, so that nothing is queued behind a block that is being dropped.
    """

    def __init__(self, queue: PushQueue, clock: Callable[[], float] = time.monotonic) -> None:
        self._queue = queue
        self._lock = threading.Lock()
        self._waiting: Bounded[bytes, None] = Bounded(WAITING_MAX)
        self._walked = _Recent(clock)  # keys whose chains were looked through
        self._seen = _Recent(clock)  # why a block is not pushed; None: it is queued, or lies in the remote store
        self._not_pushed: Counter[RemoteReason] = Counter()

    @property
    def not_pushed(self) -> dict[RemoteReason, int]:
        """Blobs that were not pushed since the start, by reason."""
        with self._lock:
            return dict(self._not_pushed)

    def want(self, keys: Iterable[bytes]) -> None:
        """The chains up to these keys are to be looked through, unless they were a short while ago.

        Of more than WAITING_MAX the oldest are forgotten, and counted.
        """
        with self._lock:
            for key in keys:
                # A key that waits keeps its place: otherwise what is asked for often would always be last.
                if key not in self._waiting and not self._walked.has(key):
                    # Counted as one block, however long the chain: so far only its last key is known.
                    if len(self._waiting) == WAITING_MAX:
                        self._not_pushed[RemoteReason.QUEUE_FULL] += 1
                    self._waiting[key] = None

    def next(self) -> bytes | None:
        """The key of a chain to look through."""
        with self._lock:
            return self._waiting.popitem(last=False)[0] if self._waiting else None

    def note_present(self, keys: Iterable[bytes]) -> None:
        """These blocks were read from the remote store just now. That says nothing of those before them."""
        with self._lock:
            self._seen.note(keys)

    def offer(self, chain: Sequence[PushItem], why: RemoteReason | None = None, first_refused: int = 0) -> None:
        """Queue a chain, parents first, but for what was looked at a short while ago; never waits.

        With `why`, blocks from `first_refused` on are not pushed, for that reason. Neither is what builds on a block
        that was refused a short while ago, nor what does not fit.
        """
        refused: dict[bytes, RemoteReason] = {}
        chosen: list[PushItem] = []
        with self._lock:
            for at, item in enumerate(chain):
                seen = self._seen.has(item.key)
                reason = self._seen.why(item.key) if seen else refused.get(item.parent)
                if reason is None and not seen and why is not None and at >= first_refused:
                    reason = why
                if reason is not None:
                    refused[item.key] = reason
                    if not seen:
                        self._refuse([item.key], reason)
                elif not seen:
                    chosen.append(item)
            self._seen.note(item.key for item in chosen)
            self._walked.note(item.key for item in chain)
            self._refuse([item.key for item in self._queue.offer(chosen)], RemoteReason.QUEUE_FULL)

    def drop(self, why: RemoteReason) -> None:
        """What was taken from the queue is not pushed, nor what waits there and builds on it."""
        with self._lock:
            self._refuse(self._queue.drop(), why)

    def _refuse(self, keys: Sequence[bytes], why: RemoteReason) -> None:
        if keys:
            self._not_pushed[why] += len(keys)
            self._seen.note(keys, why)


class _Recent:
    """Keys of the last `SEEN_S`, at most `SEEN_MAX`, each with a reason or none. Not locked."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._keys: Bounded[bytes, tuple[float, RemoteReason | None]] = Bounded(SEEN_MAX)

    def has(self, key: bytes) -> bool:
        """Whether it was noted a short while ago."""
        return key in self._keys and self._clock() - self._keys[key][0] < SEEN_S

    def why(self, key: bytes) -> RemoteReason | None:
        """The reason of a key that is noted."""
        return self._keys[key][1]

    def note(self, keys: Iterable[bytes], why: RemoteReason | None = None) -> None:
        """Note keys as of now, with a reason or none."""
        now_s = self._clock()
        for key in keys:
            self._keys[key] = (now_s, why)


def _read(path: Path) -> list[PushItem]:
    """What was saved. A damaged file is a cache that is gone."""
    try:
        if path.stat().st_size > _FILE_BYTES_MAX:
            raise ValueError("it is too large")
        data = path.read_bytes()
        body = data[len(_MAGIC) : -_SUM_BYTES]
        if not data.startswith(_MAGIC) or xxhash.xxh3_64_digest(body) != data[-_SUM_BYTES:]:
            raise ValueError("it does not match its checksum")
        items = [PushItem(root, key, parent, nbytes) for root, key, parent, nbytes in msgpack.unpackb(body)]
        if not all({len(key) for key in one[:3]} == {KEY_BYTES} and one.nbytes >= 0 for one in items):
            raise ValueError("it has other fields")
    except FileNotFoundError:
        return []
    except (OSError, ValueError, TypeError, msgpack.exceptions.UnpackException) as error:
        log.warning("what waited for the remote store is lost: %s: %s", path, error)
        return []
    return items
