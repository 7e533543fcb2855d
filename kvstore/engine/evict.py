"""Making room: budget, free floor, and eviction of what `kvstore.engine.retain` chooses.

Every step is one index commit of at most VICTIMS_MAX blobs, then their deletion, and the lock is free in between.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Sequence
from collections.abc import Set as AbstractSet

from kvstore.blobs.base import BlobId, disk_bytes
from kvstore.blocks import Reason
from kvstore.engine.evictions import ASKED, BUDGET, FLOOR, SHARE, gigabytes
from kvstore.engine.index import Edit
from kvstore.engine.retain import VICTIMS_MAX, Mask, Table
from kvstore.engine.rows import Row
from kvstore.engine.shared import DISPLACED, Shared
from kvstore.engine.types import EvictReport, Selection
from kvstore.errors import DirectoryError, InvalidRequestError, StoreFullError

NO_LIMIT = 1 << 62
# Over budget, a little more is evicted than needed, so that a full store does not pay a commit for each block.
_SLACK_DIVISOR = 256
_SLACK_BYTES_MAX = 256 << 20
# Before a write this much stays free for the index, which copies the pages that a commit changes.
_COMMIT_BYTES = 64 << 10
# What limits delete at once is announced when it is more than this part of the store.
_MANY_DIVISOR = 10
# A request makes a few files; with fewer inodes left it would fail half-way.
_NAMES_MIN = 8
_NOTHING: frozenset[bytes] = frozenset()
log = logging.getLogger(__name__)
Choose = Callable[[Table], Mask]


class Evictor:
    """Makes room, or says that there is none. Every method takes the engine's lock."""

    def __init__(self, shared: Shared) -> None:
        self._shared = shared
        self._floor_freed = 0
        self._floor_wanted = 0

    def make_room(self, nbytes: int, keep: AbstractSet[bytes] = _NOTHING) -> bool:
        """Evict until `nbytes` more fit under budget and floor, never `keep`; False when they do not even then."""
        shared = self._shared
        with shared.lock:
            if shared.is_displaced():
                shared.health.displaced = DISPLACED
                return False
            try:
                return self._is_in_budget(nbytes, keep) and self._is_above_floor(nbytes, keep)
            except (StoreFullError, OSError) as error:
                shared.health.disk_error = str(error)
                return False

    def keep_checkpoint_share(self) -> None:
        """Evict checkpoints over their share of the budget; after commits they are kept to it anyhow."""
        shared = self._shared
        with shared.lock:
            over = shared.index.table.usage().checkpoint_bytes - shared.options.checkpoint_share_bytes
            try:
                if over > 0:
                    self._run(SHARE, over, shared.deletions.leased(), lambda table: table.where(checkpoints=True))
            except (StoreFullError, OSError) as error:
                shared.health.disk_error = str(error)

    def book_staging(self, nbytes: int) -> None:
        """Count staged bytes, or with a negative number the end of them."""
        self._shared.ledger.add("staging", disk_bytes(nbytes) if nbytes >= 0 else -disk_bytes(-nbytes))

    def could_reserve(self, nbytes: int) -> bool:
        """Whether `reserve` may find room, by evicting or not; nothing is evicted to find out."""
        shared = self._shared
        with shared.lock:
            if shared.is_displaced():
                return False
            ledger, options = shared.ledger, shared.options
            need = disk_bytes(nbytes)
            if ledger.fixed + need + _COMMIT_BYTES > options.budget_bytes:
                return False
            try:
                spare = self.free_bytes() - options.free_floor_bytes if options.free_floor_bytes else need
            except OSError as error:
                shared.health.disk_error = str(error)
                return False
            return spare >= need or (not shared.health.under_floor and spare + ledger.get("blobs") >= need)

    def reserve(self, nbytes: int) -> bool:
        """Make room for staged bytes and count them, in one step; False, and nothing counted, when there is none."""
        with self._shared.lock:
            if not self.make_room(disk_bytes(nbytes)):
                return False
            self.book_staging(nbytes)
            return True

    def evict(self, selection: Selection, dry_run: bool) -> EvictReport:
        """Remove what is selected, least recently used leaves first; a dry run chooses the same and removes nothing.

        DirectoryError unless the disk confirms all of it, and what was deleted before.
        """
        shared = self._shared
        choose = self._chooser(selection)
        need = selection.bytes or NO_LIMIT
        if dry_run:
            with shared.lock:
                table = shared.index.table
                shared.uses.apply(table)
                keys = table.victims(need, mask=choose(table), count_max=len(table) or 1)
                return EvictReport(len(keys), sum(table.value(key, "nbytes") for key in keys))
        shared.demand_place()
        try:
            if not (selection.key_prefix or selection.idle_s > 0 or selection.bytes):
                return self._evict_namespaces(selection)
            return self._run(ASKED, need, _NOTHING, choose)
        except OSError as error:
            raise DirectoryError(f"what was evicted is not known to be durable: {error}; evict again") from error

    def _evict_namespaces(self, selection: Selection) -> EvictReport:
        """Whole namespaces, one after the other. Raises OSError."""
        report = EvictReport(0, 0)
        for root in self._roots(selection):
            one = self._evict_namespace(root)
            self._shared.evictions.note(ASKED, one.blocks, one.freed_bytes)
            kept = report.kept_bytes + one.kept_bytes
            report = EvictReport(report.blocks + one.blocks, report.freed_bytes + one.freed_bytes, kept)
        self._shared.ballast.lay()
        self._shared.deletions.sync()
        with self._shared.lock:
            self._shared.measure()
        return report

    def _evict_namespace(self, root: bytes) -> EvictReport:
        """A namespace: its rows, a step at a time, then all its blobs at once, by one rename and one sync.

        One by one where a reader has a lease, a store is under way, or the folder has other files, such as blobs of
        another format version, which are not ours to delete.
        """
        shared, costs = self._shared, dict[BlobId, int]()
        kept: int | None = 0
        while True:
            with shared.lock:
                space = shared.index.spaces.get(root)
                only = [] if space is None else [space.number]
                removed, _ = self._remove(NO_LIMIT, _NOTHING, lambda table: table.where(namespaces=only))  # noqa: B023
                shared.lost.remember(removed, Reason.EVICTED)
                shared.leaving.update(shared.costs(removed))
                costs.update(shared.costs(removed))
                if len(removed) == VICTIMS_MAX:
                    continue
                try:
                    kept = self._delete_namespace(root, costs)
                finally:
                    for blob in costs:
                        del shared.leaving[blob]
                break
        total = sum(costs.values())
        if kept is None:
            kept = max(0, total - sum(iter(lambda: shared.blobs.clear(VICTIMS_MAX), 0)))
        return EvictReport(len(costs), total - kept, kept)

    def _delete_namespace(self, root: bytes, costs: dict[BlobId, int]) -> int | None:
        """Delete the blobs of a namespace that has no rows; the bytes that stay for now. Raises OSError.

        None when the namespace was dropped as a whole: its bytes are still to be cleared.
        """
        shared = self._shared
        leased = shared.deletions.leased()
        is_leased = any(blob.key in leased for blob in costs)
        is_written = any(blob.root == root for blob in shared.in_flight)
        if is_leased or is_written or any(entry.blob not in costs for entry in shared.blobs.names(root)):
            return shared.deletions.delete(costs)
        try:
            shared.blobs.drop(root)
        except OSError:
            shared.deletions.delete(costs)
            raise
        return None

    def _roots(self, selection: Selection) -> list[bytes]:
        """The namespaces that a selection names."""
        shared = self._shared
        with shared.lock:
            return [
                root
                for root, space in shared.index.spaces.items()
                if root.startswith(selection.namespace_prefix) and (not selection.orphans or shared.is_orphan(space))
            ]

    def free_bytes(self) -> int:
        """Free on the volume."""
        return self._shared.fs.free_bytes(str(self._shared.directory.root))

    def _chooser(self, selection: Selection) -> Choose:
        """A selection as a mask over the table. InvalidRequestError for an empty one that does not say `all`."""
        aged = selection.idle_s > 0 or selection.orphans
        filters = (selection.namespace_prefix, selection.key_prefix, aged, selection.bytes > 0)
        if not any(filters) and not selection.all:
            raise InvalidRequestError("say what to evict: a namespace, a key, an age, orphans, some bytes, or all")
        shared = self._shared
        since = int(shared.clock() - selection.idle_s) if selection.idle_s > 0 else None

        def choose(table: Table) -> Mask:
            numbers = [shared.index.spaces[root].number for root in self._roots(selection)]
            mask = table.where(namespaces=numbers, unused_since_s=since)
            if selection.key_prefix:
                with shared.index.view() as view:
                    tops = [row.key for row in view.rows(selection.key_prefix)]
                mask &= table.tree(tops)
            return mask

        return choose

    def _is_in_budget(self, nbytes: int, keep: AbstractSet[bytes]) -> bool:
        shared = self._shared
        ledger, budget = shared.ledger, shared.options.budget_bytes
        need = nbytes + (_COMMIT_BYTES if nbytes else 0)
        slack = min(budget // _SLACK_DIVISOR, _SLACK_BYTES_MAX)
        # What can never fit must not empty the store; a budget that others have used up may.
        may_evict = nbytes == 0 or ledger.fixed + need <= budget
        while may_evict and (over := ledger.total + need - budget) > 0:
            # Again if need be: the commit of an eviction may make the index grow by some pages.
            may_evict = self._evict_bytes(BUDGET, over, over + slack, keep) > 0
        if nbytes == 0:
            full = f"the index and uploads alone pass the budget of {gigabytes(budget)}"
            shared.health.over_budget = full if ledger.total > budget else ""
        return ledger.total + need <= budget

    def _is_above_floor(self, nbytes: int, keep: AbstractSet[bytes]) -> bool:
        """Whether the volume keeps its free floor after `nbytes` more. Evicts the deficit for it, once.

        A snapshot may hold on to what was deleted (APFS). Evicting again for the same deficit would empty the store and
        free nothing, so what was freed is remembered until there is room for all that was asked for.
        """
        if not self._has_names():
            return False
        floor = self._shared.options.free_floor_bytes
        spare = self.free_bytes() - floor if floor else nbytes
        deficit = nbytes - spare
        if deficit > self._floor_freed:
            deficit -= self._floor_freed
            self._floor_freed += self._evict_bytes(FLOOR, deficit, deficit, keep)
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
        names = self._shared.fs.free_names(str(self._shared.directory.root))
        if names < _NAMES_MIN:
            self._tell_floor("the volume has no inodes left: delete some files on it")
        return names >= _NAMES_MIN

    def _tell_floor(self, why: str) -> None:
        """Note why the volume takes no stores, or that it does again; a line in the log when that changes."""
        health = self._shared.health
        if why and not health.under_floor:
            log.warning("nothing is stored any more: %s", why)
        elif health.under_floor and not why:
            log.info("stores are taken again: the volume has room")
        health.under_floor = why

    def announce(self) -> None:
        """Before limits take effect: WARN when they delete more than a tenth of the store. A typo can."""
        shared = self._shared
        with shared.lock:
            usage = shared.index.table.usage()
            held = usage.disk_bytes
            budget, floor = shared.options.budget_bytes, shared.options.free_floor_bytes
            try:
                short = floor - self.free_bytes() if floor else 0
            except OSError:
                short = 0
            share = usage.checkpoint_bytes - shared.options.checkpoint_share_bytes
            over = {BUDGET: shared.ledger.total - budget, FLOOR: short, SHARE: share}
            cause = max(over, key=lambda each: over[each])
            if held and over[cause] > held // _MANY_DIVISOR:
                words = "about to delete %s of %s stored (%s): budget_bytes is %s, free_floor_bytes %s"
                lost = gigabytes(min(held, over[cause]))
                log.warning(words, lost, gigabytes(held), cause, gigabytes(budget), gigabytes(floor))

    def _evict_bytes(self, cause: str, needed: int, wanted: int, keep: AbstractSet[bytes]) -> int:
        """Evict least recently used leaves until `wanted` bytes are freed; leased ones last, `keep` never.

        Nothing is evicted where everything that may go would not free `needed`. The bytes freed.
        """
        shared = self._shared
        if shared.index.table.reachable_bytes(keep) < needed:
            return 0
        leased = shared.deletions.leased()
        freed = self._run(cause, wanted, leased | keep).freed_bytes
        if freed < wanted and leased:
            freed += self._run(cause, wanted - freed, keep, spare_leased=False).freed_bytes
        return freed

    def _run(
        self,
        cause: str,
        need_bytes: int,
        keep: Collection[bytes],
        choose: Choose = Table.where,
        *,
        spare_leased: bool = True,
    ) -> EvictReport:
        """Steps until the need is met or nothing is left; in the end, sync what was deleted. Raises OSError."""
        blocks = taken = kept = 0
        done = False
        while not done and taken < need_bytes:
            removed, nbytes, kept_now = self._step(need_bytes - taken, keep, choose, spare_leased)
            self._shared.evictions.note(cause, len(removed), nbytes)
            blocks, taken, kept = blocks + len(removed), taken + nbytes, kept + kept_now
            done = len(removed) < VICTIMS_MAX
        self._shared.ballast.lay()
        self._shared.deletions.sync()
        # What stays on the disk for now counts towards the need, or a disk that keeps files would cost every block.
        return EvictReport(blocks, taken - kept, kept)

    def _step(
        self, need_bytes: int, keep: Collection[bytes], choose: Choose, spare_leased: bool
    ) -> tuple[list[Row], int, int]:
        """(rows removed, their bytes, how many of these stay on the disk for now): one commit, then the deletion."""
        shared = self._shared
        with shared.lock:
            try:
                removed, nbytes = self._remove(need_bytes, keep, choose)
            except StoreFullError:
                # The disk is so full that not even a delete goes through.
                if not shared.ballast.drop():
                    raise
                removed, nbytes = self._remove(need_bytes, keep, choose)
            shared.lost.remember(removed, Reason.EVICTED)
            return removed, nbytes, shared.deletions.delete(shared.costs(removed), spare_leased)

    def _remove(self, need_bytes: int, keep: Collection[bytes], choose: Choose) -> tuple[list[Row], int]:
        with self._shared.edit() as edit:
            self._shared.uses.write(edit)
            keys = edit.table.victims(need_bytes, keep, choose(edit.table), count_max=VICTIMS_MAX)
            nbytes = sum(edit.table.value(key, "nbytes") for key in keys)
            return remove_rows(edit, keys), nbytes


def remove_rows(edit: Edit, keys: Sequence[bytes]) -> list[Row]:
    """Remove the rows of keys, children before parents; returns them."""
    rows = [row for key in keys if (row := edit.row(key)) is not None]
    for row in rows:
        edit.remove(row)
    return rows
