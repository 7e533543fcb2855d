"""Whether there is room: notes of refused stores, and the index, which only a compacting copy shrinks."""

from __future__ import annotations

import contextlib
import logging
import time

from kvstore.blobs.protocol import disk_bytes
from kvstore.core.text import size_text
from kvstore.engine.ledger import COMMIT_BYTES
from kvstore.engine.retain import NO_LIMIT
from kvstore.engine.shared import Shared
from kvstore.errors import KVStoreError

# A smaller index is not worth a copy; and what a copy of one takes that has no rows, with some pages to spare.
INDEX_BYTES_MIN, EMPTY_BYTES = 1 << 20, 128 << 10
# Copies that no eviction waits for are this far apart.
EVERY_S = 60.0


# A store of more than this part of the budget is too large for it; that it is refused says nothing about the next one.
_LARGE_DIVISOR = 2
# Accounts that no eviction frees and that do not go by themselves, as uploads do.
_LASTING = ("folders", "index", "quarantine", "settings")
# A request makes a few files; with fewer inodes left it would fail half-way.
_NAMES_MIN = 8
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
        """Compact the index. Returns False, with the index unchanged, if that failed.

        The copy counts against the disk budget while it is made, and may exceed it for that time. Matches continue
        meanwhile.
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


class Shortage:
    """The smallest store that was refused for want of space, until one of its size would find room again.

    Also the free floor: `floor_freed` is what was evicted for it since it was last met. Any thread may call; nothing is
    evicted here and no lock is taken. What is about the floor is asked under the engine's lock.
    """

    def __init__(self, shared: Shared, compaction: Compaction) -> None:
        self._shared = shared
        self._compaction = compaction
        self._refused_bytes = 0
        self.floor_freed = 0
        self._floor_wanted = 0

    @property
    def fixed_bytes(self) -> int:
        """Bytes that stay on disk even if everything is evicted."""
        shared = self._shared
        return shared.ledger.fixed - shared.deletions.deleting_bytes - self._compaction.shrinkable_bytes

    def has_room(self, nbytes: int) -> bool:
        """Whether this many bytes may fit, with or without evicting. Records a shortage in `health`.

        A store that is too large for the budget is refused without a note.
        """
        shared, need = self._shared, disk_bytes(nbytes)
        if shared.is_displaced():
            return False
        try:
            fits, why = self._look(need)
        except OSError as error:
            shared.health.disk_error = f"the data directory cannot be reached: {error}"
            return False
        if why:
            self._note(need, why)
        return fits

    def note_full_disk(self, nbytes: int) -> None:
        """Record a failed write of this many bytes as a shortage if the volume has no room for it. Raises OSError."""
        if (spare := self._spare_bytes()) < nbytes + COMMIT_BYTES:
            self._note(nbytes + COMMIT_BYTES, self.volume_words(spare))

    def look_again(self) -> None:
        """See whether what was refused would find room by now. Raises OSError."""
        health = self._shared.health
        if not health.no_space:
            return
        _, health.no_space = self._look(self._refused_bytes)

    def free_bytes(self) -> int:
        """Free on the volume once what is being written has been written."""
        unwritten = sum(tuple(self._shared.unwritten.values()))  # first: what is written meanwhile is counted twice
        return self._shared.blobs.room().free_bytes - unwritten

    def _spare_bytes(self) -> int:
        """What the volume has free beyond its floor, below 0 where it lacks some; without a floor there is no limit."""
        floor = self._shared.options.free_floor_bytes
        return self.free_bytes() - floor if floor else NO_LIMIT

    def floor_lack_bytes(self) -> int:
        """What the volume lacks of its free floor; 0 or less where it lacks nothing, or does not say."""
        with contextlib.suppress(OSError):
            return -self._spare_bytes()
        return 0

    def floor_deficit(self, nbytes: int) -> int:
        """Bytes to evict so that the volume keeps its floor after `nbytes` more; at most 0 where nothing is to be."""
        deficit = nbytes - self._spare_bytes() - self.floor_freed
        return deficit if deficit > 0 and self._has_names() else 0

    def is_above_floor(self, nbytes: int) -> bool:
        """Whether the volume keeps its free floor after `nbytes` more; notes in `health` why not.

        A snapshot may hold on to what was deleted (APFS). Evicting again for the same deficit would empty the store and
        free nothing, so what was freed is remembered until there is room for all that was asked for.
        """
        if not self._has_names():
            return False
        spare = self._spare_bytes()
        if spare < nbytes:
            self._floor_wanted = max(self._floor_wanted, nbytes)
            self._tell_floor(self.volume_words(spare))
        elif spare >= self._floor_wanted:
            self.floor_freed = self._floor_wanted = 0
            self._tell_floor("")
        return spare >= nbytes

    def _has_names(self) -> bool:
        """Whether the volume has inodes left for a store's files."""
        names = self._shared.blobs.room().free_names
        if names < _NAMES_MIN:
            self._tell_floor("the volume has no inodes left: delete some files on it")
        return names >= _NAMES_MIN

    def _tell_floor(self, why: str) -> None:
        """Note why the volume takes no stores, or that it does again."""
        health = self._shared.health
        health.under_floor = why
        health.tell()

    def _note(self, need: int, why: str) -> None:
        health = self._shared.health
        self._refused_bytes = min(need, self._refused_bytes) if health.no_space else need
        health.no_space = why
        health.tell()

    def _look(self, need: int) -> tuple[bool, str]:
        """(whether `need` may find room, why the store is short of space if not). Raises OSError."""
        shared = self._shared
        ledger, options = shared.ledger, shared.options
        if self.fixed_bytes + need + COMMIT_BYTES > options.budget_bytes:
            lasting = sum(ledger.get(account) for account in _LASTING) - self._compaction.shrinkable_bytes
            is_large = need > options.budget_bytes // _LARGE_DIVISOR
            is_short = lasting + need + COMMIT_BYTES > options.budget_bytes and not is_large
            return False, self._budget_words(lasting) if is_short else ""
        spare = self._spare_bytes()
        if spare >= need or (not shared.health.under_floor and spare + ledger.get("blobs") >= need):
            return True, ""
        return False, self.volume_words(spare)

    def _budget_words(self, lasting: int) -> str:
        budget = size_text(self._shared.options.budget_bytes)
        words = f"the index and the quarantine take {size_text(lasting)} of the budget of {budget}"
        return f"{words}: raise budget_bytes, or delete what is in quarantine/"

    def volume_words(self, spare: int) -> str:
        """That the volume keeps no more than its floor, and what to do."""
        floor = self._shared.options.free_floor_bytes
        words = f"the volume has {size_text(spare + floor)} free, and the floor is {size_text(floor)}"
        return f"{words}: free some, or lower free_floor_bytes"
