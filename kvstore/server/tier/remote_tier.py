"""The remote tier of the daemon: made, looked after, and told about. Requests go through `RemotePath`.

What is pushed to it: what was asked for twice (a stored block that a fetch uses), and what is pinned, with everything
before it, but not what was just read from there. Keys are queued; the bytes are read when it is their turn, by the
thread that pushes.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from kvstore.config import Config
from kvstore.core.remote_words import NOT_USED, RemoteReason, RemoteState
from kvstore.engine import Engine
from kvstore.errors import KVStoreError
from kvstore.remote.open_store import configured_store
from kvstore.remote.push_queue import PushItem
from kvstore.remote.tier import RemoteTier
from kvstore.server.fetching.costs import Costs
from kvstore.server.storing.store import StorePath
from kvstore.server.threads import Threads
from kvstore.server.tier.remote_path import Promoted, RemotePath
from kvstore.server.tier.remote_watch import Watch
from kvstore.wire.v1 import kvstore_pb2 as pb

QUEUE = "push_queue"
# Chains that are looked through in one step.
CHAINS_MAX = 32
CLOSE_S = 2.0
log = logging.getLogger(__name__)


class Remote:
    """See the module. `path` is None, and nothing is done, where no tier is configured.

    Event loop only, but `step` for the thread `watch`, and `message` and `close` for `admin`.
    """

    def __init__(self, engine: Engine, store: StorePath, costs: Costs, threads: Threads, config: Config) -> None:
        """ConfigError for a tier that cannot be used as it is configured. Nothing is asked of it yet."""
        self._engine = engine
        self.path: RemotePath | None = None
        if config.remote:
            queue = config.data_dir / "settings" / QUEUE
            is_synced = config.durability != "none"
            self._tier = RemoteTier(configured_store(config), self._load, queue, config.limits, sync=is_synced)
            self._watch = Watch(self._tier)
            self.path = RemotePath(engine, store, costs, threads.remote, self._tier, self._watch)

    @property
    def takes(self) -> bool:
        """Whether it serves, and has room as far as is known."""
        return self.serves and not self._tier.is_full

    @property
    def serves(self) -> bool:
        """Whether there is a tier, and it answers."""
        return self.path is not None and self._watch.serves

    def start(self) -> None:
        """Begin to push what waits."""
        if self.path is not None:
            self._tier.start()

    def close(self) -> None:
        """End pushing. What waits is kept for the next start."""
        if self.path is not None:
            self._tier.close(CLOSE_S)

    def served(self, gained: int, promoted: Promoted) -> None:
        """A request got `gained` tokens more with the tier, or none."""
        assert self.path is not None
        self._tier.offers.note_present(promoted.keys)
        if gained:
            self.path.counters.hit(gained)
        elif promoted.why in NOT_USED:
            self.path.counters.served_without(promoted.why)

    # -- pushing -----------------------------------------------------------------------------------------------------

    def push(self, keys: Sequence[bytes]) -> None:
        """Have these blocks pushed, with everything before them, unless they were a short while ago."""
        if self.path is not None:
            self._tier.offers.want(keys)

    def step(self) -> None:
        """Once a second: see whether the tier serves, and queue what is to be pushed. Raises nothing of a store."""
        if self.path is None:
            return
        self._watch.look()
        for _ in range(CHAINS_MAX):
            if (key := self._tier.offers.next()) is None:
                return
            try:
                self._offer(key)
            except KVStoreError as error:  # the next look must come: nothing else closes a circuit that is open
                log.warning("a prefix is not pushed to the remote tier: %s", error)

    def _offer(self, key: bytes) -> None:
        """Queue what may be pushed of the chain up to a key."""
        chain, count = self._engine.transfer.chain(key)
        why, first_refused = RemoteReason.NEEDS_BASIS, count
        if chain and self._engine.is_encrypted(chain[0].root):
            why, first_refused = RemoteReason.ENCRYPTED, 0
        items = [PushItem(row.root, row.key, row.parent, row.blob_bytes) for row in chain]
        self._tier.offer(items, why, first_refused)

    def _load(self, item: PushItem) -> Sequence[memoryview] | None:
        """The bytes of a blob; None when it is gone, or encrypted by now."""
        pieces = self._engine.transfer.blob(item.key)
        return [memoryview(piece) for piece in pieces] or None

    # -- telling -----------------------------------------------------------------------------------------------------

    def message(self) -> pb.RemoteStats:
        """The tier as Stats tells it."""
        if self.path is None:
            return pb.RemoteStats(state=RemoteState.OFF)
        stats, (state, detail) = self._tier.stats(), self._watch.state
        if state == RemoteState.SERVING and stats.is_full:
            state = RemoteState.FULL
        counters, requests = self.path.counters, stats.requests
        with counters.lock:
            unused, hits, hit_tokens = dict(counters.unused), counters.hits, counters.hit_tokens
        return pb.RemoteStats(
            state=state,
            detail=detail or (stats.error if stats.pushes_open or stats.is_full else ""),
            place=stats.place,
            requests=requests.heads + requests.reads + requests.lists + requests.puts + requests.deletes,
            read_bytes=requests.read_bytes,
            written_bytes=requests.pushed_bytes,
            hits=hits,
            hit_tokens=hit_tokens,
            unused_reasons={str(code): count for code, count in unused.items()},
            not_pushed={str(code): count for code, count in stats.not_pushed.items()},
            pushed_blobs=stats.pushes.pushed,
            queued_blobs=stats.queued_blobs,
            queued_bytes=stats.queued_bytes,
            bytes_per_s=stats.speed.bytes_per_s if requests.read_bytes else 0.0,
            latency_s=stats.speed.latency_s if requests.heads else 0.0,
            wrong_objects=stats.wrong_objects,
            create_only=self._watch.create_only,
            failed_calls=requests.failed,
            late_calls=requests.late,
        )
