"""What was deleted and why: counts by cause, evictions of namespaces by number, and which blocks are gone."""

from __future__ import annotations

import logging
import threading
from collections import Counter, OrderedDict
from collections.abc import Collection, Iterable

from kvstore.core.blocks import TOKEN_BYTES, Reason
from kvstore.core.histogram import AGE_BOUNDS_S, Histogram
from kvstore.core.keys import block_key
from kvstore.core.text import size_text
from kvstore.index.rows import Row

# A miss says "evicted" also when only the beginning of what was evicted is asked for.
HEAD_TOKENS = 16
HEAD_TOKENS_BYTES = HEAD_TOKENS * TOKEN_BYTES
log = logging.getLogger(__name__)


# Evictions of single namespaces that are told apart.
MARKS_MAX = 64
ASKED, BUDGET, FLOOR, CHAIN, REPAIR = "asked", "budget", "floor", "chain", "repair"
QUOTA, TTL = "quota", "ttl"
_WHY = {
    BUDGET: "the budget was reached",
    FLOOR: "the volume had less free space than the floor",
    QUOTA: "namespaces took more than their quota",
    TTL: "it was not used within its time to live",
    CHAIN: "sequences had others that save almost as much",
    REPAIR: "blobs were damaged or missing",
}


class Evictions:
    """Blocks and bytes deleted since the start, by cause, and which namespaces users had evicted. Any thread may call.

    A store that began before its namespace was evicted is evicted with it. So evictions are numbered, a store notes
    the number at which it began, and its commit asks. `mark` and that question need the engine's lock.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        # How long blocks had not been used when limits evicted them.
        self.idle_s = Histogram(AGE_BOUNDS_S)
        self.number = 0
        # (prefix of namespaces, prefix of keys in them): the number of the last eviction
        self._marks: dict[tuple[bytes, bytes], int] = {}
        self._blocks: Counter[str] = Counter()
        self._bytes: Counter[str] = Counter()
        self._told: Counter[str] = Counter()
        self._told_bytes: Counter[str] = Counter()

    def note(self, cause: str, blocks: int, nbytes: int) -> None:
        """Count blocks that were removed, and what they cost on disk."""
        if blocks:
            with self._lock:
                self._blocks[cause] += blocks
                self._bytes[cause] += nbytes

    def mark(self, namespace_prefix: bytes, key_prefix: bytes = b"") -> None:
        """Number an eviction of what namespaces that start so hold, of keys that start so. Hold the engine's lock."""
        self.number += 1
        new = (namespace_prefix, key_prefix)
        self._marks = {old: at for old, at in self._marks.items() if not all(map(bytes.startswith, old, new))} | {
            new: self.number
        }
        if len(self._marks) > MARKS_MAX:
            # The oldest counts for everything from now on: only a store that outlasts this many evictions is affected.
            oldest = next(prefixes for prefixes in self._marks if any(prefixes))
            self._marks[b"", b""] = max(self._marks.pop(oldest), self._marks.get((b"", b""), 0))

    def covers(self, root: bytes, since: int, keys: Collection[bytes] = ()) -> bool:
        """Whether a namespace, or a sequence in it with these keys, was evicted after the eviction of this number."""
        return any(
            at > since and root.startswith(spaces) and (not tops or any(key.startswith(tops) for key in keys))
            for (spaces, tops), at in self._marks.items()
        )

    def totals(self) -> dict[str, tuple[int, int]]:
        """(blocks, bytes on disk) by cause; causes that did not occur are left out."""
        with self._lock:
            return {cause: (blocks, self._bytes[cause]) for cause, blocks in self._blocks.items()}

    def tell(self) -> None:
        """Log one line for each cause since the last call; what a user asked for is not logged."""
        with self._lock:
            new = {cause: self._blocks[cause] - self._told[cause] for cause in _WHY}
            nbytes = {cause: self._bytes[cause] - self._told_bytes[cause] for cause in _WHY}
            self._told, self._told_bytes = self._blocks.copy(), self._bytes.copy()
        for cause, blocks in new.items():
            if blocks:
                log.info("evicted %d blocks %s %s: %s", blocks, size_text(nbytes[cause]), cause, _WHY[cause])


class Lost:
    """Records why blocks were deleted, for the last `limit` keys. Any thread may call.

    Deletions are numbered, so that code which remembers something of a block can ask whether it was deleted since.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._lock = threading.Lock()
        self._gone: OrderedDict[bytes, tuple[Reason, int]] = OrderedDict()
        self._forgotten = 0  # the number of the latest deletion that is no longer known
        self.number = 0

    def remember(self, rows: Iterable[Row], reason: Reason) -> None:
        """A checkpoint or aux block that is gone costs no tokens of its own."""
        with self._lock:
            self.number += 1
            for row in rows:
                if not row.kind:
                    for key in (row.key, block_key(row.parent, row.tokens[:HEAD_TOKENS_BYTES])):
                        self._gone[key] = reason, self.number
                        self._gone.move_to_end(key)
            while len(self._gone) > self._limit:
                _, (_, self._forgotten) = self._gone.popitem(last=False)

    def forget(self, key: bytes) -> None:
        """It is here again."""
        with self._lock:
            self._gone.pop(key, None)

    def why(self, key: bytes) -> Reason | None:
        """Why a block is gone, if that is remembered."""
        with self._lock:
            gone = self._gone.get(key)
        return gone[0] if gone else None

    def any_since(self, keys: Iterable[bytes], number: int) -> bool:
        """Whether a block of these keys was deleted after the deletion of this number. Yes where that is forgotten."""
        with self._lock:
            gone = [self._gone[key][1] for key in keys if key in self._gone]
            return number < self._forgotten or any(at > number for at in gone)
