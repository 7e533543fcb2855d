"""Room on disk: budget, free floor, and eviction in the order of `kvstore.engine.eviction`."""

from __future__ import annotations

import logging
from collections.abc import Set as AbstractSet

from kvstore.blocks import Reason
from kvstore.engine.blobs import disk_bytes
from kvstore.engine.eviction import NO_LIMIT, Sweep, picker
from kvstore.engine.evictions import ASKED, BUDGET, FLOOR, SHARE, gigabytes
from kvstore.engine.nouns import EvictReport, Selection
from kvstore.engine.rows import Row
from kvstore.engine.state import DISPLACED, State
from kvstore.errors import DirectoryError, StoreFullError

# Over budget, a little more is evicted than needed, so that a full store does not pay a commit for each block.
_SLACK_DIVISOR = 256
_SLACK_BYTES_MAX = 256 << 20
# What limits delete at once is announced when it is more than this part of the store.
_MANY_DIVISOR = 10
# A request makes a few files; with fewer inodes left it would fail half-way.
_NAMES_MIN = 8
# Before a write this much stays free for the index, which copies the pages that a commit changes.
_COMMIT_BYTES = 64 << 10
_NOTHING: frozenset[bytes] = frozenset()
log = logging.getLogger(__name__)


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
                    self._run(Sweep(lambda row, stamp: True, state.leased(), over, checkpoints_only=True), SHARE)
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

    def could_reserve(self, nbytes: int) -> bool:
        """Whether `reserve` may find room, by evicting or not; nothing is evicted to find out."""
        state = self._state
        with state.lock:
            if state.is_displaced():
                return False
            ledger, options = state.ledger, state.options
            need = disk_bytes(nbytes)
            if ledger.fixed + need + _COMMIT_BYTES > options.budget_bytes:
                return False
            try:
                spare = self.free_bytes() - options.free_floor_bytes if options.free_floor_bytes else need
            except OSError as error:
                state.counts.disk_error = str(error)
                return False
            return spare >= need or (not state.counts.under_floor and spare + ledger.get("blobs") >= need)

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
            may_evict = self._evict_bytes(over + slack, keep, BUDGET) > 0
        if nbytes == 0:
            full = f"the index and uploads alone pass the budget of {gigabytes(budget)}"
            self._state.counts.over_budget = full if ledger.total > budget else ""
        return ledger.total + need <= budget

    def _is_above_floor(self, nbytes: int, keep: AbstractSet[bytes]) -> bool:
        """Whether the volume keeps its free floor after `nbytes` more. Evicts the deficit for it, once.

        A snapshot may hold on to what was unlinked (APFS). Evicting again for the same deficit would empty the store
        and free nothing, so what was freed is remembered until there is room for all that was asked for.
        """
        if not self._has_names():
            return False
        floor = self._state.options.free_floor_bytes
        spare = self.free_bytes() - floor if floor else nbytes
        if nbytes - spare > self._floor_freed:
            self._floor_freed += self._evict_bytes(nbytes - spare - self._floor_freed, keep, FLOOR)
            spare = self.free_bytes() - floor
        if spare < nbytes:
            self._floor_wanted = max(self._floor_wanted, nbytes)
            short = f"the volume has {gigabytes(spare + floor)} free, and the floor is {gigabytes(floor)}"
            self._tell_floor(f"{short}: free some, or lower free_floor_bytes")
        elif spare >= self._floor_wanted:
            self._floor_freed = self._floor_wanted = 0
            self._tell_floor("")
        return spare >= nbytes

    def _has_names(self) -> bool:
        """Whether the volume has inodes left for a store's files."""
        names = self._state.fs.free_names(str(self._state.directory.root))
        if names < _NAMES_MIN:
            self._tell_floor("the volume has no inodes left: delete some files on it")
        return names >= _NAMES_MIN

    def _tell_floor(self, why: str) -> None:
        """Note why the volume takes no stores, or that it does again; a line in the log when that changes."""
        counts = self._state.counts
        if why and not counts.under_floor:
            log.warning("nothing is stored any more: %s", why)
        elif counts.under_floor and not why:
            log.info("stores are taken again: the volume has room")
        counts.under_floor = why

    def announce(self) -> None:
        """Before limits take effect: WARN when they delete more than a tenth of the store. A typo can."""
        state = self._state
        with state.lock:
            held = state.ledger.get("blobs")
            budget, floor = state.options.budget_bytes, state.options.free_floor_bytes
            try:
                short = floor - self.free_bytes() if floor else 0
            except OSError:
                short = 0
            share = sum(use.checkpoint_bytes for use in state.usage.values()) - state.options.checkpoint_share_bytes
            over = {BUDGET: state.ledger.total - budget, FLOOR: short, SHARE: share}
            cause = max(over, key=lambda each: over[each])
            if held and over[cause] > held // _MANY_DIVISOR:
                words = "about to delete %s of %s stored (%s): budget_bytes is %s, free_floor_bytes %s"
                doomed = gigabytes(min(held, over[cause]))
                log.warning(words, doomed, gigabytes(held), cause, gigabytes(budget), gigabytes(floor))

    def free_bytes(self) -> int:
        """Free on the volume."""
        return self._state.fs.free_bytes(str(self._state.directory.root))

    def _evict_bytes(self, nbytes: int, keep: AbstractSet[bytes], cause: str) -> int:
        """Evict least recently used leaves until `nbytes` are freed; leased ones last, `keep` never."""
        leased = self._state.leased()
        work = Sweep(lambda row, stamp: True, leased | keep, nbytes)
        self._run(work, cause)
        freed = work.freed_bytes
        if freed < nbytes and leased:
            work = Sweep(lambda row, stamp: True, keep, nbytes - freed)
            self._run(work, cause, spare_leased=False)
            freed += work.freed_bytes
        return freed

    def _run_acknowledged(self, work: Sweep) -> None:
        """As `_run`; DirectoryError unless the disk confirms all of it, and what was unlinked before."""
        try:
            self._run(work, ASKED)
        except OSError as error:
            raise DirectoryError(f"what was evicted is not known to be durable: {error}; evict again") from error

    def _run(self, work: Sweep, cause: str, spare_leased: bool = True) -> None:
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
            state.evictions.note(cause, removed)
            state.remember_lost(removed, Reason.EVICTED)
            work.kept_bytes += state.delete_files(removed, spare_leased)
        state.ballast.lay()
        state.sync_deletions()

    def _step(self, work: Sweep) -> list[Row]:
        with self._state.edit() as edit:
            self._state.write_touches(edit)
            return work.step(edit)
