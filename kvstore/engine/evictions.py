"""What was deleted and why: counters by cause, and the log lines of evictions that no user asked for."""

from __future__ import annotations

import logging
import threading
from collections import Counter

ASKED, BUDGET, FLOOR, SHARE, CHAIN, REPAIR = "asked", "budget", "floor", "share", "chain", "repair"
_WHY = {
    BUDGET: "the budget was reached",
    FLOOR: "the volume had less free space than the floor",
    SHARE: "checkpoints took more than their share of the budget",
    CHAIN: "sequences had more checkpoints than are kept",
    REPAIR: "blobs were damaged or missing",
}
# Evictions of single namespaces that are told apart.
MARKS_MAX = 64
log = logging.getLogger(__name__)


class Evictions:
    """Blocks and bytes deleted since the start, by cause, and which namespaces users had evicted. Any thread may call.

    A store that began before its namespace was evicted is evicted with it. So evictions are numbered, a store notes
    the number at which it began, and its commit asks. `mark` and that question need the engine's lock.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.number = 0
        self._marks: dict[bytes, int] = {}  # prefix of namespaces: the number of its last eviction
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

    def mark(self, namespace_prefix: bytes) -> None:
        """Number an eviction of all namespaces that start so. Hold the engine's lock."""
        self.number += 1
        self._marks = {prefix: at for prefix, at in self._marks.items() if not prefix.startswith(namespace_prefix)}
        self._marks[namespace_prefix] = self.number
        if len(self._marks) > MARKS_MAX:
            # The oldest counts for every namespace from now on: only a store that saw so many evictions can tell.
            oldest = next(prefix for prefix in self._marks if prefix)
            self._marks[b""] = max(self._marks.pop(oldest), self._marks.get(b"", 0))

    def covers(self, root: bytes, since: int) -> bool:
        """Whether a namespace was evicted after the eviction of this number."""
        return any(at > since and root.startswith(prefix) for prefix, at in self._marks.items())

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
                log.info("evicted %d blocks, %s (%s): %s", blocks, gigabytes(nbytes[cause]), cause, _WHY[cause])


def gigabytes(nbytes: int) -> str:
    """A size for people, in GB."""
    return f"{nbytes / 1e9:.2f} GB"
