"""The remote tier of one daemon: what it finds, what is worth having, what comes, what is pushed, in one place.

Nothing here fails a caller. A store that is slow, gone, full or wrong gives an empty answer or a shorter one, and is
counted. After a few failures in a row it is not asked for a while, so that a caller does not wait for it at all: reads
and pushes have a breaker each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from kvstore.core.breaker import CircuitBreaker, Deadline
from kvstore.core.keys import Chain
from kvstore.core.limits import Limits
from kvstore.errors import DeadlineError, KVStoreError, RemoteError
from kvstore.remote.finder import Finder, Reach, RemoteBlock
from kvstore.remote.link import Link, Speed
from kvstore.remote.metered import MeteredStore, Requests
from kvstore.remote.object_names import Naming
from kvstore.remote.object_store import ObjectStore
from kvstore.remote.objects import Pulled, pull
from kvstore.remote.push_queue import PushItem, PushQueue
from kvstore.remote.pusher import Pusher, Pushes

# Of blobs that are read whole: held in memory at once, besides the one that is over it alone.
PULL_BYTES = 16 << 20


@dataclass(frozen=True, slots=True)
class RemoteStats:
    """The remote tier at one moment. `reads_open`, `pushes_open`: its breaker refuses. `error`: the last failure."""

    place: str
    reads_open: bool
    pushes_open: bool
    error: str
    requests: Requests
    pushes: Pushes
    queued_blobs: int
    queued_bytes: int
    dropped_blobs: int
    absences: int
    absence_hits: int
    wrong_objects: int
    speed: Speed


class RemoteTier:
    """See the module. Any thread may call; `find` and `pulled` take the calling thread for their round trips.

    `load` gives the bytes of a blob to push: see `Pusher`. `queue_path`: where the queue of pushes is kept.
    """

    def __init__(
        self,
        store: ObjectStore,
        load: Callable[[PushItem], Sequence[memoryview] | None],
        queue_path: Path | None,
        limits: Limits,
        *,
        sync: bool = True,
    ) -> None:
        self.link = Link()
        self.store = MeteredStore(store, self.link)
        self.finder = Finder(self.store)
        self.queue = PushQueue(queue_path, limits.remote_queue_bytes_max, sync=sync)
        self.pusher = Pusher(self.store, self.queue, load, self.finder, limits.remote_push_bytes_per_s_max)
        self.reads = CircuitBreaker()
        self._error = ""

    def start(self) -> None:
        """Begin to push."""
        self.pusher.start()

    def close(self, timeout_s: float) -> None:
        """End pushing, wait no longer than this, and keep what was not pushed."""
        self.pusher.close(timeout_s)

    def offer(self, items: Iterable[PushItem]) -> int:
        """Queue the blobs of a sequence for a push, ancestors first; how many were added. Never waits."""
        return self.queue.offer(items)

    def find(
        self,
        chain: Chain,
        naming: Naming,
        labels: Sequence[str],
        deadline: Deadline,
        *,
        first: int = 0,
        needs_checkpoint: bool = False,
    ) -> Reach:
        """See `Finder.find`; nothing where the store fails, is late, or was too often."""
        if not self.reads.allow():
            return Reach(first)
        try:
            reach = self.finder.find(chain, naming, labels, deadline, first=first, needs_checkpoint=needs_checkpoint)
        except (RemoteError, DeadlineError) as error:
            self._failed(error)
            return Reach(first)
        self.reads.succeeded()
        return reach

    def pulled(self, blocks: Sequence[RemoteBlock], fidelity_min: int, deadline: Deadline) -> Iterator[Pulled]:
        """Blobs, whole and verified, up to the first that cannot be had in time. A wrong one is reported."""
        for batch in _batches(blocks):
            if not self.reads.allow():
                return
            try:
                answers = pull(self.store, batch, fidelity_min, deadline)
            except (RemoteError, DeadlineError) as error:
                self._failed(error)
                return
            for wanted, answer in zip(batch, answers, strict=True):
                if isinstance(answer, Pulled):
                    self.reads.succeeded()
                    yield answer
                    continue
                self._report(wanted, answer)
                return

    def _report(self, wanted: RemoteBlock, error: KVStoreError) -> None:
        if isinstance(error, (RemoteError, DeadlineError)):
            self._failed(error)
        else:
            self.reads.succeeded()
            self.finder.report_wrong(wanted, error)

    def _failed(self, error: KVStoreError) -> None:
        self._error = str(error)
        self.reads.failed()

    def stats(self) -> RemoteStats:
        """For stats, metrics and health."""
        return RemoteStats(
            self.store.place,
            self.reads.is_open,
            self.pusher.breaker.is_open,
            self._error,
            self.store.requests,
            self.pusher.counts,
            len(self.queue),
            self.queue.nbytes,
            self.queue.dropped,
            len(self.finder.absences),
            self.finder.absences.hits,
            self.finder.wrong,
            self.link.speed,
        )


def _batches(blocks: Sequence[RemoteBlock]) -> Iterator[list[RemoteBlock]]:
    batch: list[RemoteBlock] = []
    nbytes = 0
    for one in blocks:
        if batch and nbytes + one.head.nbytes > PULL_BYTES:
            yield batch
            batch, nbytes = [], 0
        batch.append(one)
        nbytes += one.head.nbytes
    if batch:
        yield batch
