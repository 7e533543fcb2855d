"""The remote tier of the daemon: made, looked after, and told about. Requests go through `RemotePath`.

What is pushed to it: what was asked for twice (a stored block that a fetch uses), and what is pinned, with everything
before it. Keys are queued; the bytes are read when it is their turn, by the thread that pushes.
"""

from __future__ import annotations

import logging
import time
from collections import Counter, OrderedDict
from collections.abc import Sequence

from kvstore.config import Config
from kvstore.engine import Engine
from kvstore.errors import KVStoreError
from kvstore.remote.open_store import configured_store
from kvstore.remote.push_queue import PushItem
from kvstore.remote.tier import RemoteTier
from kvstore.server.fetching.costs import Costs
from kvstore.server.storing.store import StorePath
from kvstore.server.threads import Threads
from kvstore.server.tier.remote_path import ENCRYPTED, NOTHING, RemotePath
from kvstore.server.tier.remote_watch import Watch
from kvstore.wire.v1 import kvstore_pb2 as pb

QUEUE = "push_queue"
# Chains that wait to be looked through, and keys that were offered a short while ago and are not offered again.
WAITING_MAX, OFFERED_MAX, OFFERED_S = 256, 65_536, 600.0
# Chains that are looked through in one step.
CHAINS_MAX = 32
CLOSE_S = 2.0
# Why blocks are not pushed, beside `ENCRYPTED` and the counters of `Pushes`: they, or blocks before them, need a basis.
NEEDS_BASIS = "needs_basis"
log = logging.getLogger(__name__)


class Remote:
    """See the module. `path` is None, and nothing is done, where no tier is configured.

    Event loop only, but `step` for the thread `watch`, and `message` and `close` for `admin`. Event loop and `watch`
    share `_waiting` and `_offered` without a lock: each access is one operation of a dict.
    """

    def __init__(self, engine: Engine, store: StorePath, costs: Costs, threads: Threads, config: Config) -> None:
        """ConfigError for a tier that cannot be used as it is configured. Nothing is asked of it yet."""
        self._engine = engine
        self._waiting: OrderedDict[bytes, None] = OrderedDict()
        self._offered: OrderedDict[bytes, float] = OrderedDict()
        self._not_pushed: Counter[str] = Counter()
        self.path: RemotePath | None = None
        if config.remote:
            queue = config.data_dir / "settings" / QUEUE
            is_synced = config.durability != "none"
            self._tier = RemoteTier(configured_store(config), self._load, queue, config.limits, sync=is_synced)
            self._watch = Watch(self._tier)
            self.path = RemotePath(engine, store, costs, threads.remote, self._tier, self._watch)

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

    def served(self, gained: int, why: str, keys: Sequence[bytes]) -> None:
        """A request got `gained` tokens more with the tier, or none, and `why`. `keys`: of all blocks that it got."""
        assert self.path is not None
        if gained:
            self.path.counters.hit(gained)
            now_s = time.monotonic()
            self._offered.update(dict.fromkeys(keys, now_s))  # they came from there, with all before them
        elif why not in ("", NOTHING):
            self.path.counters.served_without(why)

    # -- pushing -----------------------------------------------------------------------------------------------------

    def push(self, keys: Sequence[bytes]) -> None:
        """Have these blocks pushed, with everything before them, unless they were a short while ago."""
        if self.path is None:
            return
        for key in keys:
            if not self._is_offered(key):
                self._waiting[key] = None
                while len(self._waiting) > WAITING_MAX:
                    self._waiting.popitem(last=False)

    def _is_offered(self, key: bytes) -> bool:
        return time.monotonic() - self._offered.get(key, -OFFERED_S) < OFFERED_S

    def step(self) -> None:
        """Once a second: see whether the tier serves, and queue what is to be pushed. Raises nothing of a store."""
        if self.path is None:
            return
        self._watch.look()
        for _ in range(CHAINS_MAX):
            try:
                key, _ = self._waiting.popitem(last=False)
            except KeyError:
                return
            try:
                self._offer(key)
            except KVStoreError as error:  # the next look must come: nothing else closes a circuit that is open
                log.warning("a prefix is not pushed to the remote tier: %s", error)

    def _offer(self, key: bytes) -> None:
        """Queue what may be pushed of the chain up to a key, and count what may not."""
        chain, count = self._engine.transfer.chain(key)
        why = NEEDS_BASIS
        if chain and self._engine.is_encrypted(chain[0].root):
            count, why = 0, ENCRYPTED
        items = [PushItem(row.root, row.key, row.blob_bytes) for row in chain[:count] if not self._is_offered(row.key)]
        kept = [row.key for row in chain[count:] if not self._is_offered(row.key)]
        self._tier.offer(items)
        if kept:
            self._not_pushed[why] += len(kept)
        now_s = time.monotonic()
        for seen in (*(item.key for item in items), *kept):
            self._offered[seen] = now_s
            self._offered.move_to_end(seen)
        while len(self._offered) > OFFERED_MAX:
            self._offered.popitem(last=False)

    def _load(self, item: PushItem) -> Sequence[memoryview] | None:
        """The bytes of a blob; None when it is gone, or encrypted by now."""
        pieces = self._engine.transfer.blob(item.key)
        return [memoryview(piece) for piece in pieces] or None

    # -- telling -----------------------------------------------------------------------------------------------------

    def message(self) -> pb.RemoteStats:
        """The tier as Stats tells it."""
        if self.path is None:
            return pb.RemoteStats(state="off")
        stats, (state, detail) = self._tier.stats(), self._watch.state
        counters, requests, pushes = self.path.counters, stats.requests, stats.pushes
        with counters.lock:
            unused, hits, hit_tokens = dict(counters.unused), counters.hits, counters.hit_tokens
        dropped = {"queue_full": stats.dropped_blobs - pushes.failed, "gone": pushes.gone, "failed": pushes.failed}
        dropped[NEEDS_BASIS] = pushes.needs_basis
        not_pushed = Counter(dropped) + self._not_pushed.copy()  # `step` counts meanwhile
        return pb.RemoteStats(
            state=state,
            detail=detail or (stats.error if stats.pushes_open else ""),
            place=stats.place,
            requests=requests.heads + requests.reads + requests.lists + requests.puts + requests.deletes,
            read_bytes=requests.read_bytes,
            written_bytes=requests.pushed_bytes,
            hits=hits,
            hit_tokens=hit_tokens,
            unused_reasons=unused,
            not_pushed=not_pushed,
            pushed_blobs=pushes.pushed,
            queued_blobs=stats.queued_blobs,
            queued_bytes=stats.queued_bytes,
            bytes_per_s=stats.speed.bytes_per_s if requests.read_bytes else 0.0,
            latency_s=stats.speed.latency_s if requests.heads else 0.0,
            wrong_objects=stats.wrong_objects,
            create_only=self._watch.create_only,
        )
