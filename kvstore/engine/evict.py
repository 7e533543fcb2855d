"""Making room: budget, free floor, and eviction of what `kvstore.engine.retain` chooses.

Every step is one index commit of at most VICTIMS_MAX blobs, then their deletion, and the lock is free in between.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Collection, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace

from kvstore.blobs.protocol import BlobId
from kvstore.core.blocks import Reason
from kvstore.core.text import size_text
from kvstore.engine.deletions import Deletion
from kvstore.engine.evictions import ASKED, BUDGET, FLOOR, TTL
from kvstore.engine.ledger import COMMIT_BYTES
from kvstore.engine.retain import (
    NO_LIMIT,
    VICTIMS_MAX,
    Mask,
    pinned_bytes,
    reachable_bytes,
    remove_rows,
    tree,
    victims,
    where,
)
from kvstore.engine.shared import DISPLACED, Shared
from kvstore.engine.shortage import Compaction, Shortage
from kvstore.engine.terms import Choose, end_pins, over_terms, preview, warn_of_deletions
from kvstore.errors import DirectoryError, InvalidRequestError, StoreFullError
from kvstore.index.rows import Row
from kvstore.index.table import Table

# Over budget, a little more is evicted than needed, so that a full store does not pay a commit for each block.
_SLACK_DIVISOR = 256
_SLACK_BYTES_MAX = 256 << 20
# How often a thread that waits for another one's eviction looks whether there is room by now.
_LOOK_AGAIN_S = 0.05
_NOTHING: frozenset[bytes] = frozenset()
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Selection:
    """What to evict. Filters are ANDed; an empty selection is an error unless `all`.

    `bytes`: stop after freeing this many. `key_prefix`: the one block whose key starts with it, and all that follow.
    `idle_s`: blocks not used for this long.
    `orphans`: namespaces that no caller named for ORPHAN_S. `is_counted`: False where a probe takes back its namespace.
    """

    namespace_prefix: bytes = b""
    key_prefix: bytes = b""
    idle_s: float = 0
    bytes: int = 0
    orphans: bool = False
    all: bool = False
    is_counted: bool = True


@dataclass(frozen=True, slots=True)
class EvictReport:
    """What was removed, or would be: blocks, checkpoints among them, and bytes on disk.

    `kept_bytes` are deleted, too, but still on the disk: readers have the files open, or the disk did not let them go.
    `pinned_bytes` were selected and stay, since they are pinned or lead to what is.
    """

    blocks: int
    freed_bytes: int
    kept_bytes: int = 0
    pinned_bytes: int = 0


class Evictor:
    """Makes room, or says that there is none. Any thread; call it without the engine's lock."""

    def __init__(self, shared: Shared) -> None:
        self._shared = shared
        self.compaction = Compaction(shared)
        self.shortage = Shortage(shared, self.compaction)
        self._evicting = threading.Lock()  # never taken by a thread that holds the engine's lock
        self._waits_until_s = 0.0

    def make_room(
        self, nbytes: int, keep: AbstractSet[bytes] = _NOTHING, book: Callable[[], None] = lambda: None
    ) -> bool:
        """Evict until `nbytes` more fit under budget and floor, never `keep`; False when they do not even then.

        `book` is called, under the engine's lock, at the moment when they fit. One thread at a time evicts; others look
        again meanwhile whether they fit.
        """
        shared, exhausted = self._shared, set[str]()
        try:
            while True:
                with shared.lock:
                    if shared.is_displaced():
                        shared.health.displaced = DISPLACED
                        return False
                    if self._lack(nbytes, exhausted) is None:
                        if has_room := self._has_room(nbytes):
                            book()
                        return has_room
                if self._evicting.acquire(timeout=_LOOK_AGAIN_S):
                    try:
                        self._evict_lack(nbytes, keep, exhausted)
                    finally:
                        self._evicting.release()
        except (StoreFullError, OSError) as error:
            shared.health.disk_error = str(error)
            return False

    def keep_to_limits(self) -> None:
        """Evict what is over budget or below the floor, unless a thread is evicting already. Raises OSError.

        A copy of the index is made before that where the budget has room for it.
        """
        shared = self._shared
        if not self._evicting.locked():
            if shared.ledger.total + shared.index.used_bytes() <= shared.options.budget_bytes:
                self.compaction.keep_up()
            self.make_room(0)
        self.shortage.look_again()

    def keep_terms(self, *, wait: bool = True) -> None:
        """Evict what namespaces have over their quota, and what was not used within its time to live."""
        shared = self._shared
        has_terms = shared.keep.terms or shared.options.ttl_s or shared.index.table.usage().aux_blocks
        if self.is_waiting or not has_terms:
            return
        try:
            for cause, need, choose in over_terms(shared) if wait or not self._evicting.locked() else ():
                with self._evicting:
                    self._run(cause, need, shared.deletions.leased(), choose)
        except (StoreFullError, OSError) as error:
            shared.health.disk_error = str(error)

    def evict(self, selection: Selection, dry_run: bool = False) -> EvictReport:
        """Remove what is selected, least recently used leaves first; a dry run chooses the same and removes nothing.

        What it reports stays deleted, whatever happens afterwards. DirectoryError unless the disk confirms all of it,
        and what was deleted before.
        """
        shared = self._shared
        choose = self._chooser(selection)
        need = selection.bytes or NO_LIMIT
        is_named = not (selection.idle_s > 0 or selection.bytes or selection.orphans)
        table = shared.settled_table()
        mask = choose(table)
        pinned = 0 if is_named else pinned_bytes(table, mask)
        if dry_run:
            if is_named:
                table.pin(())
            return EvictReport(*preview(table, need, mask, shared.options.policy), pinned_bytes=pinned)
        shared.require_place()
        try:
            # Stores that need room wait, looking whether they have it by now; nothing is evicted twice for them.
            with self._evicting:
                if is_named:
                    end_pins(shared, choose)
                if not (selection.key_prefix or selection.idle_s > 0 or selection.bytes):
                    return replace(self._evict_namespaces(selection), pinned_bytes=pinned)
                if selection.key_prefix and not (selection.idle_s > 0 or selection.bytes):
                    with shared.lock:
                        shared.evictions.mark(selection.namespace_prefix, selection.key_prefix)
                return replace(self._run(ASKED, need, _NOTHING, choose), pinned_bytes=pinned)
        except OSError as error:
            raise DirectoryError(f"what was evicted is not known to be durable: {error}; evict again") from error

    def _evict_namespaces(self, selection: Selection) -> EvictReport:
        """Whole namespaces, one after the other, and what stores bring to them that have begun. Raises OSError."""
        report = EvictReport(0, 0)
        with self._shared.lock:
            roots = self._roots(selection)
            for prefix in roots if selection.orphans else [selection.namespace_prefix]:
                self._shared.evictions.mark(prefix)
        for root in roots:
            one = self._evict_namespace(root)
            if selection.is_counted:
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
        shared, steps, failure, is_last = self._shared, list[Deletion](), None, False
        while not is_last:
            space = shared.index.spaces.get(root)
            only = [] if space is None else [space.number]
            keys = self._choose(NO_LIMIT, _NOTHING, lambda table: where(table, namespaces=only))  # noqa: B023
            with shared.lock:
                removed, is_last = self._remove(keys, _NOTHING, ASKED)
                shared.lost.remember(removed, Reason.EVICTED)
                steps.append(shared.deletions.begin(shared.costs(removed)))
        blobs = {blob for step in steps for blob in step.costs}
        dropped = all(entry.blob in blobs for entry in shared.blobs.names(root))
        if dropped:
            # Under the lock, so that no store writes to the folder meanwhile: it is one rename.
            with shared.lock:
                dropped = self._may_drop(root, blobs)
                try:
                    if dropped:
                        shared.blobs.drop(root)
                except OSError as error:
                    dropped, failure = False, error
        total = sum(nbytes for step in steps for nbytes in step.costs.values())
        kept = sum([shared.deletions.finish(step, dropped=dropped) for step in steps])
        if failure is not None:
            raise failure
        if dropped:
            kept = max(0, total - sum(iter(lambda: shared.blobs.clear(VICTIMS_MAX), 0)))
        return EvictReport(len(blobs), total - kept, kept)

    def _may_drop(self, root: bytes, blobs: AbstractSet[BlobId]) -> bool:
        """Whether a namespace has no rows, readers or writers, so that its folder may go. Hold the lock."""
        shared = self._shared
        leased = shared.deletions.leased()
        is_used = root in shared.index.spaces or any(blob.root == root for blob in shared.in_flight)
        return not is_used and not any(blob.key in leased for blob in blobs)

    def _roots(self, selection: Selection) -> list[bytes]:
        """The namespaces that a selection names."""
        shared = self._shared
        with shared.lock:
            return [
                root
                for root in shared.index.spaces
                if root.startswith(selection.namespace_prefix) and (not selection.orphans or shared.is_orphan(root))
            ]

    def _chooser(self, selection: Selection) -> Choose:
        """A selection as a mask over the table. InvalidRequestError for an empty one that does not say `all`, and for
        a `key_prefix` that several keys begin with."""
        aged = selection.idle_s > 0 or selection.orphans
        filters = (selection.namespace_prefix, selection.key_prefix, aged, selection.bytes > 0)
        if not any(filters) and not selection.all:
            raise InvalidRequestError("say what to evict: a namespace, a key, an age, orphans, some bytes, or all")
        shared = self._shared
        with shared.index.view() as view:
            tops = [row.key for row in view.rows_of(selection.key_prefix)] if selection.key_prefix else []
        if len(tops) > 1:
            raise InvalidRequestError(f"{len(tops)} blocks have a key that starts so; give more digits")
        since = int(shared.clock() - selection.idle_s) if selection.idle_s > 0 else None

        def choose(table: Table) -> Mask:
            numbers = [shared.index.spaces[root].number for root in self._roots(selection)]
            mask = where(table, namespaces=numbers, unused_since_s=since)
            return mask & tree(table, tops) if selection.key_prefix else mask

        return choose

    def _lack(self, nbytes: int, exhausted: AbstractSet[str]) -> tuple[str, int, int] | None:
        """(why, bytes that must be freed, bytes to free) for `nbytes` more; None where eviction helps no further.

        Hold the engine's lock.
        """
        if self.is_waiting:
            return None
        shared = self._shared
        ledger, budget = shared.ledger, shared.options.budget_bytes
        need = nbytes + (COMMIT_BYTES if nbytes else 0)
        over = ledger.total + need - budget
        if over > 0:
            # A blob that can never fit must not empty the store. A blob that only finds the budget used up may evict.
            may_evict = nbytes == 0 or self.shortage.fixed_bytes + need <= budget
            slack = min(budget // _SLACK_DIVISOR, _SLACK_BYTES_MAX)
            return (BUDGET, over, over + slack) if may_evict and BUDGET not in exhausted else None
        deficit = 0 if FLOOR in exhausted else self.shortage.floor_deficit(nbytes)
        return (FLOOR, deficit, deficit) if deficit > 0 else None

    def _evict_lack(self, nbytes: int, keep: AbstractSet[bytes], exhausted: set[str]) -> None:
        """Evict what lacks now; note in `exhausted` why no more can be freed. Hold `_evicting`. Raises OSError."""
        with self._shared.lock:
            lack = self._lack(nbytes, exhausted)
        if lack is None or self.compaction.keep_up():
            return
        cause, needed, wanted = lack
        freed = self._evict_bytes(cause, needed, wanted, keep)
        # For the budget again if need be: the commit of an eviction may make the index grow by some pages.
        if cause == FLOOR or not freed:
            exhausted.add(cause)
        if cause == FLOOR:
            self.shortage.floor_freed += freed

    def _has_room(self, nbytes: int) -> bool:
        """Whether `nbytes` more fit now; notes in `health` why not. Hold the engine's lock."""
        shared = self._shared
        ledger, budget = shared.ledger, shared.options.budget_bytes
        if nbytes == 0:
            full = f"the index and uploads alone pass the budget of {size_text(budget)}: raise budget_bytes"
            if self.is_waiting:
                full = f"the budget of {size_text(budget)} is about to delete much: see the daemon's log"
            shared.health.over_budget = full if ledger.total > budget else ""
        need = nbytes + (COMMIT_BYTES if nbytes else 0)
        return ledger.total + need <= budget and self.shortage.is_above_floor(nbytes)

    @property
    def is_waiting(self) -> bool:
        """Whether limits delete nothing yet, since they would delete much."""
        return self._shared.steady() < self._waits_until_s

    def begin_limits(self, at_once: bool) -> None:
        """Put limits in force: at once, unless they delete so much that it could be a mistake."""
        shared, lack_bytes = self._shared, self.shortage.floor_lack_bytes()
        wait_s = 0.0 if at_once else shared.options.deletion_wait_s
        self._waits_until_s = shared.steady() + wait_s if warn_of_deletions(shared, lack_bytes, wait_s) else 0.0
        self.keep_terms()

    def _evict_bytes(self, cause: str, needed: int, wanted: int, keep: AbstractSet[bytes]) -> int:
        """Evict least recently used leaves until `wanted` bytes are freed; leased ones last, `keep` never.

        Nothing is evicted where everything that may go would not free `needed`. Where only the index could give the
        rest, it is compacted afterwards: as many of its bytes are taken to go as of the blobs. The bytes freed.
        """
        shared = self._shared
        reachable, held = reachable_bytes(shared.index.table.snapshot(), keep), shared.ledger.get("blobs")
        of_index = self.compaction.shrinkable_bytes * reachable // max(1, held) if cause == BUDGET else 0
        if reachable + of_index < needed:
            return 0
        if is_index_needed := reachable < needed:
            wanted = wanted * reachable // (reachable + of_index) + 1
        leased = shared.deletions.leased()
        freed = self._run(cause, wanted, leased | keep).freed_bytes
        if freed < wanted and leased:
            freed += self._run(cause, wanted - freed, keep, spare_leased=False).freed_bytes
        if is_index_needed:
            self.compaction.run()
        return freed

    def _run(
        self,
        cause: str,
        need_bytes: int,
        keep: Collection[bytes],
        choose: Choose = where,
        *,
        spare_leased: bool = True,
    ) -> EvictReport:
        """Steps until the need is met or nothing is left; in the end, sync what was deleted. Raises OSError."""
        blocks, taken, kept, done = 0, 0, 0, False
        while not done and taken < need_bytes:
            spared = set(keep) if cause == ASKED else {*keep, *self._shared.index.held}
            keys = self._choose(need_bytes - taken, spared, choose)
            removed, done, kept_now = self._step(keys, spared, cause, spare_leased)
            nbytes = sum(map(self._shared.site.cost, removed))
            self._shared.evictions.note(cause, len(removed), nbytes)
            blocks, taken, kept = blocks + len(removed), taken + nbytes, kept + kept_now
        self._shared.ballast.lay()
        self._shared.deletions.sync()
        # What stays on the disk for now counts towards the need, or a disk that keeps files would cost every block.
        return EvictReport(blocks, taken - kept, kept)

    def _choose(self, need_bytes: int, keep: Collection[bytes], choose: Choose) -> list[bytes]:
        """Keys to remove next, at most VICTIMS_MAX, without the lock: it may be held over no more rows than these."""
        table = self._shared.settled_table()
        return victims(table, need_bytes, keep, choose(table), self._shared.options.policy, VICTIMS_MAX)

    def _step(
        self, keys: Sequence[bytes], keep: Collection[bytes], cause: str, spare_leased: bool
    ) -> tuple[list[Row], bool, int]:
        """(rows removed, whether none are left, bytes that stay on the disk for now): one commit, then the deletion."""
        shared = self._shared
        with shared.lock:
            try:
                removed, done = self._remove(keys, keep, cause)
            except StoreFullError:
                # The disk is so full that not even a delete goes through.
                if not shared.ballast.drop():
                    raise
                removed, done = self._remove(keys, keep, cause)
            shared.lost.remember(removed, Reason.EXPIRED if cause == TTL else Reason.EVICTED)
            deletion = shared.deletions.begin(shared.costs(removed), spare_leased)
        return removed, done, shared.deletions.finish(deletion)

    def _remove(self, keys: Sequence[bytes], keep: Collection[bytes], cause: str) -> tuple[list[Row], bool]:
        """Remove those of `keys` that are still free; and whether the caller stops selecting. Hold the lock."""
        shared = self._shared
        with shared.edit() as edit:
            shared.uses.write(edit)
            edit.spared = () if cause == ASKED else edit.spared  # a store that needs a basis is evicted with it
            used_s = {key: edit.table.value(key, "used_s") for key in keys} if cause != ASKED else {}
            rows, released = remove_rows(edit, keys, keep)
            for row in rows if used_s else ():
                shared.evictions.idle_s.observe(shared.clock() - used_s[row.key])
            # Where no selected row was free any more, stop: the same rows would be selected again.
            return rows + released, (len(keys) < VICTIMS_MAX and len(rows) == len(keys)) or not rows
