"""Whether there is room for a store before it sends anything, and, while there is none, why and what to do."""

from __future__ import annotations

from kvstore.blobs.protocol import disk_bytes
from kvstore.engine.compact import Compaction
from kvstore.engine.evictions import gigabytes
from kvstore.engine.shared import Shared

# Before a write this much stays free for the index, which copies the pages that a commit changes.
COMMIT_BYTES = 64 << 10
# A store of more than this part of the budget is too large for it; that it is refused says nothing about the next one.
_LARGE_DIVISOR = 2
# Accounts that no eviction frees and that do not go by themselves, as uploads do.
_LASTING = ("folders", "index", "quarantine", "settings")


class Shortage:
    """The smallest store that was refused for want of space, until one of its size would find room again.

    Any thread may call; nothing is evicted here and no lock is taken.
    """

    def __init__(self, shared: Shared, compaction: Compaction) -> None:
        self._shared = shared
        self._compaction = compaction
        self._refused_bytes = 0

    @property
    def fixed_bytes(self) -> int:
        """What stays on the disk whatever is evicted."""
        shared = self._shared
        return shared.ledger.fixed - shared.deletions.deleting_bytes - self._compaction.shrinkable_bytes

    def has_room(self, nbytes: int) -> bool:
        """Whether room for so many staged bytes may be found, by evicting or not. Notes in `health` when there is none.

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
        """A write of so many bytes failed: note it if the volume has no room for them. Raises OSError."""
        floor = self._shared.options.free_floor_bytes
        spare = self.free_bytes() - floor
        if floor and spare < nbytes + COMMIT_BYTES:
            self._note(nbytes + COMMIT_BYTES, self._volume_words(spare))

    def look_again(self) -> None:
        """See whether what was refused would find room by now. Raises OSError."""
        health = self._shared.health
        if not health.no_space:
            return
        _, health.no_space = self._look(self._refused_bytes)

    def free_bytes(self) -> int:
        """Free on the volume."""
        return self._shared.fs.free_bytes(str(self._shared.directory.root))

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
        spare = self.free_bytes() - options.free_floor_bytes if options.free_floor_bytes else need
        if spare >= need or (not shared.health.under_floor and spare + ledger.get("blobs") >= need):
            return True, ""
        return False, self._volume_words(spare)

    def _budget_words(self, lasting: int) -> str:
        budget = gigabytes(self._shared.options.budget_bytes)
        words = f"the index and the quarantine take {gigabytes(lasting)} of the budget of {budget}"
        return f"{words}: raise budget_bytes, or delete what is in quarantine/"

    def _volume_words(self, spare: int) -> str:
        floor = self._shared.options.free_floor_bytes
        words = f"the volume has {gigabytes(spare + floor)} free, and the floor is {gigabytes(floor)}"
        return f"{words}: free some, or lower free_floor_bytes"
