"""Pushes blobs to the remote store in the background: one thread of low priority, one blob at a time.

No request waits for a push, and each push has a deadline. An object that is there already stays, whatever its bytes: if
its header is not that of the block, it is reported and passed over by this daemon's fetches. Nothing is overwritten or
deleted. A block that is not pushed, or has a wrong object under its name, takes with it those that wait and build on
it. After failures a breaker stops pushing for a while; the queue fills, and what does not fit is dropped. A
store without room is tried again in the same way, and no blob is given up for it. `Offers` counts all of that.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from kvstore.core.blocks import Block
from kvstore.core.breaker import CircuitBreaker, Deadline
from kvstore.core.keys import NamespaceInfo
from kvstore.core.remote_words import RemoteReason
from kvstore.core.thread_priority import lower_thread_priority
from kvstore.errors import CorruptDataError, DeadlineError, KVStoreError, RemoteError, RemoteFullError
from kvstore.remote.finder import Finder, RemoteBlock
from kvstore.remote.object_names import Naming, label_of
from kvstore.remote.object_store import Head, ObjectStore
from kvstore.remote.objects import parse_blob, read_header, require_block
from kvstore.remote.push_queue import Offers, PushItem, PushQueue

STALL_S = 5.0
# A push that is slower than this over its whole length is given up.
BYTES_PER_S_MIN = 1 << 20
TRIES_MAX = 3
SAVE_S = 5.0
_IDLE_S = 1.0
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Pushes:
    """Counters since the start, in blobs.

    `present`: there already. What was not pushed is counted by `Offers`.
    """

    pushed: int = 0
    present: int = 0


class Pusher:
    """See the module. `start` begins the thread, `close` ends it and saves the queue. Blobs that refer to an aux block
    are not pushed: the remote store holds no aux blocks, so no host could decode them.

    `load` gives the bytes of a blob, verified by the local store, in one or more parts. If a longer block with the same
    parent replaced it, these are that block's. None when it is gone, or must not leave this machine: a namespace whose
    data is encrypted is never pushed, since its keys are here alone. `load` is called on the thread of the pusher, may
    read, and raises KVStoreError only.
    """

    def __init__(
        self,
        store: ObjectStore,
        queue: PushQueue,
        load: Callable[[PushItem], Sequence[memoryview] | None],
        finder: Finder,
        offers: Offers,
        bytes_per_s_max: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store, self._queue, self._load = store, queue, load
        self._finder, self._offers = finder, offers
        self._bytes_per_s_max, self._clock = bytes_per_s_max, clock
        self.breaker = CircuitBreaker()
        self.counts = Pushes()
        self.error = ""  # the last one
        self.is_full = False  # the store had no room for the last blob that was sent
        self._identified: set[bytes] = set()
        self._troubled = False
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._serve, name="kvstore-push", daemon=True)

    def start(self) -> None:
        """Begin to push what waits."""
        self._thread.start()

    def close(self, timeout_s: float) -> None:
        """End after the push that is under way, or without waiting longer for it than `timeout_s`. Saves the queue."""
        self._ending.set()
        self._queue.wake()
        if self._thread.is_alive():
            self._thread.join(timeout_s)
        self._queue.save()

    def _serve(self) -> None:
        lower_thread_priority()
        saved_s = self._clock()
        while not self._ending.is_set():
            if self._clock() - saved_s >= SAVE_S:
                self._queue.save()
                saved_s = self._clock()
            if not self.breaker.allow():
                self._ending.wait(_IDLE_S)
                continue
            if self._troubled and len(self._queue) and not self._is_there():
                continue
            item = self._queue.take(_IDLE_S)
            if item is None:
                self.breaker.undecided()
                continue
            started_s = self._clock()
            sent = self.push(item)
            self._ending.wait(max(0.0, sent / self._bytes_per_s_max - (self._clock() - started_s)))

    def _is_there(self) -> bool:
        """Whether the store answers at all. While it does not, no blob is tried, and so none is given up."""
        try:
            self._store.require_mark(Deadline(STALL_S))
        except (RemoteError, DeadlineError) as error:
            self.error = str(error)
            self.breaker.failed()
            return False
        return True

    def push(self, item: PushItem) -> int:
        """Push one blob that was taken from the queue; the bytes that were sent."""
        try:
            sent = self._push(item)
        except RemoteFullError as error:
            self.error = str(error)
            self.breaker.failed()
            self._queue.again(tries=0)
            if not self.is_full:
                log.warning("nothing is pushed any more: %s", error)
            self.is_full = True
            return 0
        except (RemoteError, DeadlineError) as error:
            self._troubled, self.error = True, str(error)
            self.breaker.failed()
            if item.tries + 1 < TRIES_MAX:
                self._queue.again()
            else:
                self._offers.drop(RemoteReason.FAILED)
            log.warning("a blob was not pushed: %s", error)
            return 0
        except KVStoreError as error:
            self.breaker.undecided()
            self._offers.drop(RemoteReason.FAILED)
            log.warning("a blob is not pushed: %s", error)
            return 0
        if isinstance(sent, RemoteReason):
            self._offers.drop(sent)
            return 0
        self._queue.done()
        return sent

    def _push(self, item: PushItem) -> int | RemoteReason:
        """The bytes that were sent, or why what builds on the blob would not be found."""
        parts = self._load(item)
        if parts is None:
            self.breaker.undecided()
            return RemoteReason.GONE
        blob = parts[0] if len(parts) == 1 else memoryview(b"".join(parts))
        block = parse_blob(blob)
        # Not by key: a longer block with the same parent may have replaced it.
        if (block.root, block.parent) != (item.root, item.parent):
            raise CorruptDataError("the local store gave another blob than was asked for")
        if block.references:
            self.breaker.undecided()
            return RemoteReason.NEEDS_BASIS
        naming = Naming(NamespaceInfo.from_record(block.namespace))
        name = naming.name(block.parent, block.key, label_of(block.fidelity))
        deadline = Deadline(STALL_S + len(blob) / BYTES_PER_S_MIN)
        self._identify(naming, deadline)
        (head,) = self._store.head([name], deadline)
        created = head is None and self._store.create(name, [blob], deadline)
        if created:
            self._finder.absences.forget([name, naming.children(block.parent)])
            self._count(pushed=1)
            sound = True
            if self.is_full:
                log.info("blobs are pushed again: %s has room", self._store.place)
            self.is_full = False
        else:
            sound = self._look_at(block, name, head, deadline)
            self._count(present=1)
        self._troubled = False
        self.breaker.succeeded()
        if not sound:
            return RemoteReason.WRONG
        return len(blob) if created else 0

    def _identify(self, naming: Naming, deadline: Deadline) -> None:
        """Write what the namespace is, for people, once."""
        if naming.root not in self._identified:
            self._store.create(naming.identity_name, [memoryview(naming.identity())], deadline)
            self._identified.add(naming.root)

    def _look_at(self, block: Block, name: str, head: Head | None, deadline: Deadline) -> bool:
        """Whether an object that another host wrote under this name has the right header. It stays in any case."""
        if head is None:
            (head,) = self._store.head([name], deadline)
        if head is None:
            return True
        wanted = RemoteBlock(
            name,
            head,
            label_of(block.fidelity),
            block.root,
            block.parent,
            block.key,
            block.tokens,
            block.start,
            block.is_checkpoint,
        )
        try:
            require_block(read_header(self._store, wanted, deadline), wanted, block.fidelity)
        except (RemoteError, DeadlineError):
            raise
        except KVStoreError as error:
            self._finder.report_wrong(wanted, error)
            return False
        return True

    def _count(self, **counts: int) -> None:
        self.counts = replace(self.counts, **{name: getattr(self.counts, name) + n for name, n in counts.items()})
