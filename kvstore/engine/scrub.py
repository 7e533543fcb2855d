"""The scrub: every blob read and verified again, in the order of keys, a little at a time and for ever.

A disk may lose bits of what nobody has asked for in months, and a fetch should not be the one to find out. So
`Engine.scrub` spends a budget of bytes a second on reading; a pass begins when the last one is older than the interval.
Where a pass is, and when the last one ended, stand in the index, so that a restart goes on from there.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from kvstore.blobs.fs import unlink_quietly
from kvstore.core.blocks import Reason
from kvstore.engine import check as checking
from kvstore.engine.evictions import REPAIR
from kvstore.engine.rows import Row
from kvstore.engine.shared import Shared
from kvstore.errors import CorruptDataError, KVStoreError, NotFoundError, UnknownFormatError

# Beside the rows: the first 8 bytes of the next key as a number, 0 between passes; when the last pass ended.
NEXT, DONE_S = "scrub_next", "scrub_done_s"
# How much may be read at once after a long pause.
_BURST_S = 2.0
_SAVE_EVERY_S = 600.0
_POSITION_BYTES = 8
_LAST = (1 << 8 * _POSITION_BYTES) - 1
log = logging.getLogger(__name__)


class Scrub:
    """One engine's scrub. One thread at a time; `recheck` moves what is damaged to quarantine."""

    def __init__(self, shared: Shared, recheck: Callable[[bytes], bool]) -> None:
        self._shared = shared
        self._recheck = recheck
        with shared.index.view() as view:
            self._next = view.meta(NEXT) or 0
            self.done_s = view.meta(DONE_S) or 0
        self._is_running = self._next > 0
        self._stepped = self._saved = time.monotonic()
        self._spare_bytes = 0.0
        self._has_moved = False
        self.damaged = 0

    def step(self) -> None:
        """Read as many bytes as the time since the last step allows. Raises KVStoreError or OSError of the disk."""
        now, last = time.monotonic(), self._stepped
        self._stepped = now
        rate = self._shared.options.scrub_bytes_per_s
        if not rate or not (self._is_running or self._is_due()):
            return
        self._is_running = True
        self._spare_bytes = min(self._spare_bytes + rate * (now - last), rate * _BURST_S)
        while self._spare_bytes > 0:
            with self._shared.index.view() as view:
                row = view.row_from(self._next.to_bytes(_POSITION_BYTES, "big"))
            if row is None or self._next == _LAST:
                self._end()
                return
            self._has_moved = True
            self.damaged += self._recheck(row.key)
            # Keys are hashes: no two share their first 8 bytes.
            self._next = min(int.from_bytes(row.key[:_POSITION_BYTES], "big") + 1, _LAST)
            self._spare_bytes -= row.blob_bytes
        if now - self._saved >= _SAVE_EVERY_S:
            self.save()

    def save(self) -> None:
        """Keep in the index where the pass is. A failure costs a part of a pass, and is no reason for another."""
        if not self._has_moved:
            return
        self._saved, self._has_moved = time.monotonic(), False
        shared = self._shared
        try:
            with shared.lock, shared.edit() as edit:
                edit.set_meta(NEXT, self._next)
                edit.set_meta(DONE_S, self.done_s)
        except (KVStoreError, OSError) as error:
            log.warning("where the scrub is could not be written: %s", error)

    def _is_due(self) -> bool:
        """Whether the last pass is older than the interval; a clock that was set back makes it due, too."""
        return not 0 <= self._shared.clock() - self.done_s < self._shared.options.scrub_interval_s

    def _end(self) -> None:
        self._next, self._is_running, self._spare_bytes = 0, False, 0.0
        self.done_s = int(self._shared.clock())
        self._has_moved = True
        log.info("every blob was read; %d damaged since the start", self.damaged)
        self.save()


def after_repair(shared: Shared, removed: list[Row]) -> None:
    """Rows changed behind the counters: take them again, and keep quarantine in its bounds. Hold the lock."""
    costs = (shared.blobs.stored_bytes(row.root, row.blob_bytes) for row in removed)
    shared.evictions.note(REPAIR, len(removed), sum(costs))
    shared.lost.remember(removed, Reason.CORRUPT)
    for path in shared.directory.quarantined()[: -shared.options.quarantine_files_max]:
        unlink_quietly(shared.fs, [str(path)])
    shared.measure()


def recheck(shared: Shared, key: bytes) -> bool:
    """See `Engine.recheck`."""
    with shared.index.view() as view:
        row = view.row(key)
    if row is None or shared.is_displaced():
        return False
    try:
        checking.verify_row(shared.site, row)
        return False
    except (NotFoundError, UnknownFormatError):
        return False
    except CorruptDataError as error:
        log.warning("a blob is damaged: %s", error)
    with shared.lock:
        removed = checking.drop_tree(shared.site, row, keep_blob=True)
        after_repair(shared, removed)
    return bool(removed)
