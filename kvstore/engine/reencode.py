"""Re-encoding: the blob of a block is replaced by a smaller one, and its rank is lowered in the same index transaction.

Only what the profile `auto` stored, once, the least recently used leaves first; never what a named profile stored or
relies on, what is pinned, or what leads to either. What the codes become is the caller's: the engine moves bytes.

    put the new blob under a number of its own, sync, rename, sync the folder
    one commit: the row names the new blob, its rank is the lower one, the table says that it was re-encoded
    the old blob is deleted, or kept until its last reader has let go

A kill before the commit leaves the old row and a blob without one, which the next start deletes; after it, the new row
and the old blob, deleted as well. A rebuild of an index that is lost on top of it finds both blobs and takes the one of
the higher rank. Descendants keep the rank in their rows: a match takes the least rank of all blocks that it names.

The header of the blob says the same (`Origin`), so a rebuild of the index knows what `auto` stored, what was re-encoded
and with which error. It forgets claims, which are renewed whenever a session that names its profile meets the blocks,
and what was left alone, which is tried once more.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import threading
from collections.abc import Collection
from dataclasses import dataclass, replace

import numpy as np

from kvstore.blobs.format import make_ready
from kvstore.blobs.write_behind import WriteBehind
from kvstore.core.blocks import Origin, Reason
from kvstore.core.keys import aux_key
from kvstore.engine.adopt import NEXT_NUMBER
from kvstore.engine.bases import hold, let_go
from kvstore.engine.evict import Evictor
from kvstore.engine.retain import VICTIMS_MAX, evictable, leads_to, where
from kvstore.engine.shared import Shared
from kvstore.engine.store import Batch, BatchEntry, NewBlock, Settled, Writer
from kvstore.errors import InvalidRequestError
from kvstore.index.rows import Row
from kvstore.index.table import AUTO, CHECKPOINT, LIVE, SETTLED, Table
from kvstore.index.transaction import Edit

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Reencoded:
    """Since the engine was opened: blocks re-encoded, what they cost on disk before and after, blocks left alone.

    And of the blocks that are stored now: how many were re-encoded, and the mean and the largest of their relative
    errors.
    """

    blocks: int = 0
    before_bytes: int = 0
    after_bytes: int = 0
    left_blocks: int = 0
    held_blocks: int = 0
    error_mean: float = 0.0
    error_max: float = 0.0


def coldest(table: Table, namespaces: Collection[int], leased: Collection[bytes], count_max: int) -> list[bytes]:
    """Keys of blocks to re-encode next: at most `count_max` that `auto` stored, the least recently used first.

    Blocks whose children were all re-encoded count as leaves; a child that a named profile stored keeps its ancestors
    as they are. Nothing that is pinned or leased, nor what leads to it. Checkpoints are exact and stay.
    """
    rows = table.rows
    waiting = (rows["flags"] & (LIVE | CHECKPOINT | SETTLED)) == LIVE
    parents = rows["parent"][waiting]
    inner = np.bincount(parents[parents >= 0], minlength=len(rows)) > 0
    mask = where(table, namespaces=namespaces) & waiting & ((rows["flags"] & AUTO) != 0) & ~inner
    found = np.flatnonzero(evictable(table, leased, mask))
    # Of blocks that were used together the deepest goes first, as in an eviction.
    order = np.lexsort((-rows["depth"][found].astype(np.int64), rows["last_use"][found]))
    return table.keys(found[order][:count_max].tolist())


@dataclass
class _Exchange(Batch):
    """One blob in the place of another, of this row. `error`: the relative error of the values."""

    old: Row | None = None
    error: float = 0.0


class Reencoder(Writer):
    """Exchanges blobs. Any thread may call, without the engine's lock; one at a time re-encodes."""

    def __init__(self, shared: Shared, evictor: Evictor) -> None:
        super().__init__(shared, evictor)
        self._lock = threading.Lock()
        self._blocks = self._before_bytes = self._after_bytes = self._left_blocks = 0

    @property
    def roots(self) -> list[bytes]:
        """The namespaces that hold something."""
        return list(self._shared.namespaces)

    def claim(self, keys: Collection[bytes]) -> None:
        """Note that a session that names its profile relies on these blocks: they stay as they are, even if another
        session stored them. Written with the next commit, or within half a minute; a crash before that loses it."""
        if keys:
            with self._shared.lock:
                self._shared.index.table.claim(keys)
            self._shared.uses.remind()

    def origin(self, keys: Collection[bytes]) -> tuple[bool, bool]:
        """Whether `auto` stored all of these blocks, and whether any of them is not to be re-encoded."""
        with self._shared.lock:
            flags = [self._shared.index.table.value(key, "flags") for key in keys]
        return all(one & AUTO for one in flags), any(one & SETTLED for one in flags)

    def coldest(self, roots: Collection[bytes], count_max: int) -> list[Row]:
        """The blocks of these namespaces to re-encode next. Raises CorruptDataError when the index is damaged."""
        shared = self._shared
        readable = {root for root in roots if not shared.is_key_missing(root)}
        numbers = [space.number for root, space in list(shared.index.spaces.items()) if root in readable]
        keys = coldest(shared.settled_table(), numbers, shared.deletions.leased(), count_max)
        with shared.index.view() as view:
            return [row for key in keys if (row := view.row(key)) is not None]

    def leave(self, row: Row, why: str = "") -> None:
        """Never try this block again; counted and logged with `why`. Raises OSError, StoreFullError."""
        with self._shared.lock, self._shared.edit() as edit:
            if edit.table.value(row.key, "flags") & AUTO:
                edit.table.settle(row.key)
        if why:
            with self._lock:
                self._left_blocks += 1
            log.info("block %s is not re-encoded: %s", row.key.hex()[:12], why)

    def reencode(self, row: Row, new: NewBlock, error: float) -> bool:
        """Put a block of a lower rank in the place of a row; `error`: the relative error of its values.

        False, and all is as before, when the block was replaced, evicted, pinned, leased or claimed meanwhile, or the
        disk takes no write. Raises DirectoryError when the disk fails.
        """
        shared, root = self._shared, row.root
        space = shared.index.spaces.get(root)
        if new.block.key != row.key or new.block.fidelity >= row.fidelity:
            raise InvalidRequestError("a block is re-encoded under its own key, to a lower rank")
        if space is None or row.is_key_missing:
            return False
        # Above 0: that it was re-encoded is said by its error.
        error = max(error, float(np.finfo(np.float32).tiny))
        batch = _Exchange(
            root,
            space.record,
            {row.key},
            shared.index.ring.key(root),
            WriteBehind(shared.blobs),
            shared.evictions.number,
            old=row,
            error=error,
        )
        try:
            entry = BatchEntry(row.key, row.parent)
            hold(shared.site, batch.held, {aux_key(root, digest) for digest in new.block.references})
            block = replace(new.block, namespace=space.record, origin=Origin(auto=True, settled=True, error=error))
            with contextlib.closing(batch.behind):
                if not self._write(batch, make_ready(block, new.buffers), entry):
                    return False
                batch.unsynced.append(entry)
                is_synced = self._await_synced(batch, 0)
            settled = self._commit(batch) if is_synced else Settled(reason=Reason.STORE_FULL)
        finally:
            self._discard(batch)
            let_go(shared.site, batch.held)
        if not settled.kept:
            return False
        with self._lock:
            self._blocks += 1
            self._before_bytes += shared.site.cost(row)
            self._after_bytes += sum(map(shared.site.cost, settled.kept))
        return True

    def _settle(self, edit: Edit, batch: Batch) -> Settled:
        """The new row in the place of the old one, unless that is another one by now, or must stay as it is."""
        assert isinstance(batch, _Exchange) and batch.old is not None
        settled, shared, old, table = Settled(), self._shared, batch.old, edit.table
        shared.uses.write(edit)
        (new,) = batch.rows()
        space, held = shared.index.spaces.get(batch.root), edit.row(old.key)
        is_same = held is not None and held.number == old.number and shared.index.ring.key(batch.root) is batch.key
        is_same = is_same and not edit.lacks_aux(new)
        if not is_same or space is None or not self._is_free(edit, old.key):
            settled.reason = Reason.DEPENDENCY_LOST
            return settled
        edit.replace(old, new, shared.site.cost(new))
        table.settle(new.key, batch.error)
        edit.set_meta(NEXT_NUMBER, shared.next_number)
        settled.kept.append(new)
        settled.replaced += [old, *edit.released]
        settled.blocks = 1
        return settled

    def _is_free(self, edit: Edit, key: bytes) -> bool:
        """What `coldest` says of all blocks, of one, for at most as many rows as the lock may be held over."""
        flags, table = edit.table.value(key, "flags"), edit.table
        if flags & (LIVE | CHECKPOINT | SETTLED | AUTO) != LIVE | AUTO:
            return False
        children = list(itertools.islice(edit.children(key), VICTIMS_MAX + 1))
        if len(children) > VICTIMS_MAX or any(
            not table.value(child, "flags") & (CHECKPOINT | SETTLED) for child in children
        ):
            return False
        return not leads_to(table, key, [*self._shared.deletions.leased(), *self._shared.keep.pins])

    def stats(self) -> Reencoded:
        """Counts of this moment."""
        errors = self._shared.index.table.snapshot().rows["error"].astype(np.float64)
        errors = errors[errors > 0]
        with self._lock:
            return Reencoded(
                self._blocks,
                self._before_bytes,
                self._after_bytes,
                self._left_blocks,
                len(errors),
                float(errors.mean()) if len(errors) else 0.0,
                float(errors.max(initial=0.0)),
            )
