"""Room on disk: budget, free floor, and eviction in the order of `kvstore.engine.eviction`."""

from __future__ import annotations

from collections.abc import Set as AbstractSet

from kvstore.blocks import Reason
from kvstore.engine.blobs import disk_bytes
from kvstore.engine.eviction import NO_LIMIT, Sweep, picker
from kvstore.engine.nouns import EvictReport, Selection
from kvstore.engine.rows import Row
from kvstore.engine.state import DISPLACED, State
from kvstore.errors import DirectoryError, StoreFullError

# Over budget, a little more is evicted than needed, so that a full store does not pay a commit for each block.
_SLACK_DIVISOR = 256
_SLACK_BYTES_MAX = 256 << 20
# Before a write this much stays free for the index, which copies the pages that a commit changes.
_COMMIT_BYTES = 64 << 10
_NOTHING: frozenset[bytes] = frozenset()


class Room:
    """Makes room, or says that there is none. Every method takes the engine's lock."""

    def __init__(self, state: State) -> None:
        self._state = state
        self._floor_freed = 0
        self._floor_wanted = 0

    def make(self, nbytes: int, keep: AbstractSet[bytes] = _NOTHING) -> bool:
        """Evict until `nbytes` more fit under budget and floor, never `keep`; False when they do not even then."""
        state = self._state
        with state.lock:
            if state.is_displaced():
                state.counts.displaced = DISPLACED
                return False
            try:
                return self._is_in_budget(nbytes, keep) and self._is_above_floor(nbytes, keep)
            except (StoreFullError, OSError) as error:
                state.counts.disk_error = str(error)
                return False

    def keep_share(self) -> None:
        """Evict checkpoints over their share of the budget; after commits they are kept to it anyhow."""
        state = self._state
        with state.lock:
            held = sum(use.checkpoint_bytes for use in state.usage.values())
            over = held - state.options.checkpoint_share_bytes
            try:
                if over > 0:
                    self._run(Sweep(lambda row, stamp: True, state.leased(), over, checkpoints_only=True))
            except (StoreFullError, OSError) as error:
                state.counts.disk_error = str(error)

    def book_staging(self, nbytes: int) -> None:
        """Count staged bytes, or with a negative number the end of them."""
        self._state.ledger.add("staging", disk_bytes(nbytes) if nbytes >= 0 else -disk_bytes(-nbytes))

    def reserve(self, nbytes: int) -> bool:
        """Make room for staged bytes and count them, in one step; False, and nothing counted, when there is none."""
        with self._state.lock:
            if not self.make(disk_bytes(nbytes)):
                return False
            self.book_staging(nbytes)
            return True

    def evict(self, selection: Selection, dry_run: bool) -> EvictReport:
        """Remove what is selected, least recently used leaves first; a dry run is the same walk, aborted."""
        state = self._state
        with state.lock:
            if not dry_run:
                state.demand_place()
            with state.index.view() as view:
                pick = picker(view, selection, state.clock())
            work = Sweep(pick, need_bytes=selection.bytes or NO_LIMIT)
            if not dry_run:
                self._run_acknowledged(work)
            else:
                with state.edit(dry_run=True) as edit:
                    state.read_touches(edit)
                    while not work.done:
                        work.step(edit)
            return EvictReport(work.blocks, work.freed_bytes, work.kept_bytes)

    def _is_in_budget(self, nbytes: int, keep: AbstractSet[bytes]) -> bool:
        ledger, budget = self._state.ledger, self._state.options.budget_bytes
        need = nbytes + (_COMMIT_BYTES if nbytes else 0)
        slack = min(budget // _SLACK_DIVISOR, _SLACK_BYTES_MAX)
        # What can never fit must not empty the store; a budget that others have used up may.
        may_evict = nbytes == 0 or ledger.fixed + need <= budget
        while may_evict and (over := ledger.total + need - budget) > 0:
            # Again if need be: the commit of an eviction may make the index grow by some pages.
            may_evict = self._evict_bytes(over + slack, keep) > 0
        if nbytes == 0:
            full = f"the index and uploads alone pass the budget of {budget} bytes"
            self._state.counts.over_budget = full if ledger.total > budget else ""
        return ledger.total + need <= budget

    def _is_above_floor(self, nbytes: int, keep: AbstractSet[bytes]) -> bool:
        """Whether the volume keeps its free floor after `nbytes` more. Evicts the deficit for it, once.

        A snapshot may hold on to what was unlinked (APFS). Evicting again for the same deficit would empty the store
        and free nothing, so what was freed is remembered until there is room for all that was asked for.
        """
        floor = self._state.options.free_floor_bytes
        spare = self.free_bytes() - floor if floor else nbytes
        if nbytes - spare > self._floor_freed:
            self._floor_freed += self._evict_bytes(nbytes - spare - self._floor_freed, keep)
            spare = self.free_bytes() - floor
        if spare < nbytes:
            self._floor_wanted = max(self._floor_wanted, nbytes)
            self._state.counts.under_floor = f"the volume has less free space than the floor of {floor} bytes"
        elif spare >= self._floor_wanted:
            self._floor_freed = self._floor_wanted = 0
            self._state.counts.under_floor = ""
        return spare >= nbytes

    def free_bytes(self) -> int:
        """Free on the volume."""
        return self._state.fs.free_bytes(str(self._state.directory.root))

    def _evict_bytes(self, nbytes: int, keep: AbstractSet[bytes]) -> int:
        """Evict least recently used leaves until `nbytes` are freed; leased ones last, `keep` never."""
        leased = self._state.leased()
        work = Sweep(lambda row, stamp: True, leased | keep, nbytes)
        self._run(work)
        freed = work.freed_bytes
        if freed < nbytes and leased:
            work = Sweep(lambda row, stamp: True, keep, nbytes - freed)
            self._run(work, spare_leased=False)
            freed += work.freed_bytes
        return freed

    def _run_acknowledged(self, work: Sweep) -> None:
        """As `_run`; DirectoryError unless the disk confirms all of it, and what was unlinked before."""
        try:
            self._run(work)
        except OSError as error:
            raise DirectoryError(f"what was evicted is not known to be durable: {error}; evict again") from error

    def _run(self, work: Sweep, spare_leased: bool = True) -> None:
        """Index commit, then unlink, a bounded number of rows at a time; in the end sync what was unlinked."""
        state = self._state
        while not work.done:
            try:
                removed = self._step(work)
            except StoreFullError:
                # The disk is so full that not even a delete goes through.
                if not state.ballast.drop():
                    raise
                work.rewind()
                removed = self._step(work)
            state.counts.evicted_blocks += len(removed)
            state.remember_lost(removed, Reason.EVICTED)
            work.kept_bytes += state.delete_files(removed, spare_leased)
        state.ballast.lay()
        state.sync_deletions()

    def _step(self, work: Sweep) -> list[Row]:
        with self._state.edit() as edit:
            self._state.write_touches(edit)
            return work.step(edit)
