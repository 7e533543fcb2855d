"""The parts of the remote tier of one daemon: what finds, what pushes, what counts, over one store.

Reads and pushes have a breaker each. That of reads belongs to who reads: after a few failures in a row the store is not
asked for a while, so that no caller waits for it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from kvstore.core.breaker import CircuitBreaker
from kvstore.core.limits import Limits
from kvstore.core.remote_words import RemoteReason
from kvstore.remote.finder import Finder
from kvstore.remote.link import Link, Speed
from kvstore.remote.metered import MeteredStore, RequestCounts
from kvstore.remote.object_store import ObjectStore
from kvstore.remote.push_queue import Offers, PushItem, PushQueue
from kvstore.remote.pusher import Pusher, Pushes


@dataclass(frozen=True, slots=True)
class RemoteStats:
    """The remote tier at one moment. `pushes_open`: their breaker has opened. `is_full`: blobs wait, and there is no
    room for them. `error`: the last failure of a push."""

    place: str
    pushes_open: bool
    is_full: bool
    error: str
    requests: RequestCounts
    pushes: Pushes
    queued_blobs: int
    queued_bytes: int
    not_pushed: Mapping[RemoteReason, int]
    wrong_objects: int
    speed: Speed


class RemoteTier:
    """See the module. Any thread may call.

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
        self.offers = Offers(self.queue)
        most = limits.remote_push_bytes_per_s_max
        self.pusher = Pusher(self.store, self.queue, load, self.finder, self.offers, most)
        self.reads = CircuitBreaker()

    def start(self) -> None:
        """Begin to push."""
        self.pusher.start()

    def close(self, timeout_s: float) -> None:
        """End pushing, wait no longer than this, and keep what was not pushed."""
        self.pusher.close(timeout_s)

    def offer(self, chain: Sequence[PushItem], why: RemoteReason | None = None, first_refused: int = 0) -> None:
        """Queue what is to be pushed of a chain, ancestors first: see `Offers.offer`. Never waits."""
        self.offers.offer(chain, why, first_refused)

    @property
    def is_full(self) -> bool:
        """Whether blobs wait, and the store has no room for them."""
        return self.pusher.is_full and len(self.queue) > 0

    def stats(self) -> RemoteStats:
        """For stats, metrics and health."""
        return RemoteStats(
            self.store.place,
            self.pusher.breaker.has_opened,
            self.is_full,
            self.pusher.error,
            self.store.requests,
            self.pusher.counts,
            len(self.queue),
            self.queue.nbytes,
            self.offers.not_pushed,
            self.finder.wrong,
            self.link.speed,
        )
