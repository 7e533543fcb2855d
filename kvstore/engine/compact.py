"""Compaction: when the index is given a file without free pages, since LMDB itself never gives pages back.

Without it, a budget below the size of an index that was larger once would refuse stores for ever.
"""

from __future__ import annotations

import logging
import time

from kvstore.engine.shared import Shared
from kvstore.errors import KVStoreError

# A smaller index is not worth a copy; and what a copy of one takes that has no rows, with some pages to spare.
INDEX_BYTES_MIN, EMPTY_BYTES = 1 << 20, 128 << 10
# Copies that no eviction waits for are this far apart.
EVERY_S = 60.0
log = logging.getLogger(__name__)


class Compaction:
    """Any thread; call it without the engine's lock, which is held over a copy."""

    def __init__(self, shared: Shared) -> None:
        self._shared = shared
        self._not_before_s = 0.0
        self._has_failed = False

    @property
    def shrinkable_bytes(self) -> int:
        """By how much a copy would shrink the index if all its rows were evicted; 0 since one failed."""
        file_bytes = self._shared.index.file_bytes
        return file_bytes - EMPTY_BYTES if file_bytes > INDEX_BYTES_MIN and not self._has_failed else 0

    def keep_up(self) -> bool:
        """Compact a large index of which most pages are free, now and then; whether that was done."""
        index = self._shared.index
        if time.monotonic() < self._not_before_s or index.file_bytes <= INDEX_BYTES_MIN:
            return False
        return (self._has_failed or 2 * index.used_bytes() < index.file_bytes) and self.run()

    def run(self) -> bool:
        """Compact the index; False, and it is as it was, when that failed.

        While the copy is made it is booked, too; it may pass the budget, which it ends below. Others match meanwhile.
        """
        shared, index = self._shared, self._shared.index
        with shared.lock:
            if shared.is_displaced():
                return False
            before, nbytes = index.file_bytes, index.used_bytes()
            self._not_before_s = time.monotonic() + EVERY_S
            shared.ledger.add("pending", nbytes)
            try:
                index.compact(nbytes)
                self._has_failed = False
            except (KVStoreError, OSError) as error:
                self._has_failed = True
                log.warning("the index could not be compacted: %s", error)
                return False
            finally:
                shared.ledger.add("pending", -nbytes)
                shared.measure()
        log.info("the index was compacted from %d to %d bytes", before, index.file_bytes)
        return True
