"""STORE: blocks of one request become files, then, in one index commit, rows.

Blocks are taken as they come, which may be as slowly as a worker sends them. While one file is synced, the next ones
are written and made: a few at most, so that little is lost of a disk that refuses. Until the commit every file has a
temporary name, so a kill before it leaves nothing that the next start does not clear.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import wait
from dataclasses import dataclass, field, replace
from functools import partial

from kvstore.blobs.format import Buffer, ReadyBlob, make_ready
from kvstore.blobs.keyring import NamespaceKey
from kvstore.blobs.protocol import BlobId, disk_bytes
from kvstore.blobs.write_behind import BlobWrite, WriteBehind
from kvstore.core.blocks import BLOCK_TOKENS, Block, Reason
from kvstore.core.keys import NamespaceInfo, aux_key
from kvstore.engine.adopt import NEXT_NUMBER
from kvstore.engine.bases import hold, let_go
from kvstore.engine.deletions import Deletion
from kvstore.engine.evict import Evictor
from kvstore.engine.evictions import CHAIN
from kvstore.engine.retain import thin_chains
from kvstore.engine.shared import Shared
from kvstore.errors import DirectoryError, InvalidRequestError, KVStoreError, StoreFullError
from kvstore.index.children import is_covered, replaced_by
from kvstore.index.rows import Row, pack_row
from kvstore.index.table import INTERIM, origin_flags
from kvstore.index.transaction import Edit

# Errors of a disk that is full, or of a process that is short of descriptors or threads; they pass.
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.EMFILE, errno.ENFILE, errno.EAGAIN)

# Files of one request that are written, are synced or wait for that; of more the disk gets no faster.
UNSYNCED_MAX = 3


@dataclass
class NewBlock:
    """A block to be stored. Its tensors carry no offsets or checksums yet; `buffers` holds one for each tensor.

    Order: runs, stacks, tensors; each C-contiguous `[layers, heads, tokens, width]`. Of a checkpoint: one for each
    state array, also the empty ones, in the order of layers and arrays.

    `interim`: a checkpoint within a prompt that is still being computed. The next one of the sequence replaces it.
    """

    block: Block
    buffers: Sequence[Buffer]
    interim: bool = False


@dataclass(frozen=True, slots=True)
class StoreReceipt:
    """How many of the blocks given, counted from the first, are in the store now, and what they newly cost on disk."""

    blocks: int
    new_bytes: int
    reason: Reason


@dataclass
class BatchEntry:
    """A block of a request; without a row and a file if it is held already. `write` until the file has its name."""

    key: bytes
    parent: bytes
    row: Row | None = None
    write: BlobWrite | None = None
    flags: int = 0


@dataclass
class Batch:
    """One request on its way. `entries` have synced files, those of `unsynced` are being synced or wait for that.

    `behind` writes and syncs them. `since` is the number of the last eviction before it began. `held` are the keys of
    the aux blocks that it needs.
    """

    root: bytes
    record: bytes
    keep: set[bytes]
    key: NamespaceKey | None
    behind: WriteBehind
    since: int
    entries: list[BatchEntry] = field(default_factory=list)
    unsynced: deque[BatchEntry] = field(default_factory=deque)
    ends: dict[bytes, int] = field(default_factory=dict)
    held: set[bytes] = field(default_factory=set)

    def wait_written(self, count: int) -> None:
        """Wait until the bytes of the first `count` unsynced blobs are no longer needed."""
        wait([one.write.written for one in itertools.islice(self.unsynced, max(0, count)) if one.write is not None])

    def rows(self) -> list[Row]:
        """Rows whose blobs are on the disk."""
        return [entry.row for entry in self.entries if entry.row is not None]


@dataclass
class Settled:
    """The result of committing one batch."""

    blocks: int = 0
    kept: list[Row] = field(default_factory=list)
    replaced: list[Row] = field(default_factory=list)
    evicted: list[Row] = field(default_factory=list)
    reason: Reason = Reason.OK
    deletion: Deletion = field(default_factory=Deletion)


class Writer:
    """Carries out stores, any number at a time. Files are written without the lock; room and commits are under it."""

    def __init__(self, shared: Shared, evictor: Evictor) -> None:
        self._shared = shared
        self._evictor = evictor

    def store(
        self,
        record: bytes,
        blocks: Iterable[NewBlock],
        protect: Iterable[bytes] = (),
        encryption: NamespaceKey | None = None,
        since: int | None = None,
        agreed: Callable[[], None] = lambda: None,
        ahead: int = 0,
    ) -> StoreReceipt:
        """Write blocks, parents before children, as one durable unit. `protect`: keys that must not make room for them.

        `encryption`: with this key or not at all; when it is not the namespace's (any more), DEPENDENCY_LOST.
        `since`: the `evictions` when the store began, None: now; EVICTED, and nothing of it stays, when the namespace
        was evicted later.
        `blocks` is pulled one at a time, as room is made: the bytes of a block are not needed when the next is asked
        for, or with `ahead` when one that many blocks later is: they are written meanwhile. `agreed` is called when all
        that is to be stored is on the disk, under temporary names, before any of it is visible: it may wait for the
        caller's word.
        An exception out of either is raised again and nothing is stored.
        Stops early, and keeps what came before, with DEPENDENCY_LOST when a parent is gone, NO_BASIS when an aux block
        that it refers to is not there, and STORE_FULL when there is no room. Raises InvalidRequestError for blocks that
        cannot be, DirectoryError when the disk fails.
        """
        root = NamespaceInfo.from_record(record).root
        key = self._shared.index.ring.key(root)
        # A key may be dropped at any time. Then nothing more may be written, so its blobs are written at once.
        behind = WriteBehind(self._shared.blobs, ahead=ahead if key is None else 0)
        since = self._shared.evictions.number if since is None else since
        batch = Batch(root, record, set(protect), key, behind, since)
        if encryption is not None and batch.key is not encryption:
            return StoreReceipt(0, 0, Reason.DEPENDENCY_LOST)
        try:
            with contextlib.closing(behind):
                reason = self._write_all(batch, blocks)
            if not batch.entries:
                return StoreReceipt(0, 0, reason)
            agreed()
            settled = self._commit(batch)
            why = reason if settled.reason is Reason.OK else settled.reason
            if settled.kept and why is Reason.OK:
                self._shared.health.disk_error = ""
            lasting = [row for row in settled.kept if row not in settled.evicted]
            return StoreReceipt(settled.blocks, sum(map(self._shared.site.cost, lasting)), why)
        finally:
            self._discard(batch)
            if batch.held:
                let_go(self._shared.site, batch.held)

    def _write_all(self, batch: Batch, blocks: Iterable[NewBlock]) -> Reason:
        """Write blobs until the blocks end or something stops them; those before it are on the disk."""
        reason = Reason.OK
        for new in blocks:
            block = new.block
            if self._shared.evictions.covers(batch.root, batch.since, [block.key]):
                reason = Reason.EVICTED
                break
            if references := block.references:
                hold(self._shared.site, batch.held, {aux_key(batch.root, digest) for digest in references})
            # Of a namespace whose key was dropped meanwhile nothing may be written, least of all as it is.
            if self._shared.index.ring.key(batch.root) is not batch.key or not self._has_parent(batch, block):
                reason = Reason.DEPENDENCY_LOST
                break
            with self._shared.index.view() as view:
                held = view.row(block.key)
            flags = origin_flags(block.origin) | (INTERIM if new.interim else 0)
            entry = BatchEntry(block.key, block.parent, flags=flags)
            if held is None or held.is_key_missing or held.is_lost or held.fidelity < block.fidelity:
                created_s = block.created_s or int(self._shared.clock())
                block = replace(block, namespace=batch.record, created_s=created_s)
                ready = make_ready(block, new.buffers)
                if not self._write(batch, ready, entry):
                    reason = Reason.STORE_FULL
                    break
            batch.unsynced.append(entry)
            if not block.is_checkpoint:
                batch.ends[block.key] = block.end
            batch.wait_written(len(batch.unsynced) - batch.behind.ahead)
            if not self._await_synced(batch, UNSYNCED_MAX):
                return Reason.STORE_FULL
        return reason if self._await_synced(batch, 0) else Reason.STORE_FULL

    def _await_synced(self, batch: Batch, most: int) -> bool:
        """Wait until at most this many blobs are unsynced; False if the disk refuses one.

        What comes after that one has lost its parent: it is discarded with it.
        """
        while len(batch.unsynced) > most:
            entry = batch.unsynced[0]
            try:
                if entry.write is not None:
                    entry.write.synced.result()
            except OSError as error:
                self._note_refused_write(error, batch)
                return False
            batch.entries.append(batch.unsynced.popleft())
        return True

    def _has_parent(self, batch: Batch, block: Block) -> bool:
        """Whether the parent is in the index or this request. InvalidRequestError if the block does not continue it."""
        if block.root != batch.root:
            raise InvalidRequestError("a block of another namespace")
        end = 0 if block.parent == batch.root else batch.ends.get(block.parent)
        if end is None:
            with self._shared.index.view() as view:
                parent = view.row(block.parent)
            if parent is None:
                return False
            # A row with a child is never evicted before it, so its own ancestors are safe with it.
            batch.keep.add(parent.key)
            # A checkpoint has nothing after it.
            end = -1 if parent.is_checkpoint else parent.end
        if block.start != end or end % BLOCK_TOKENS:
            raise InvalidRequestError(f"a block that starts at {block.start} cannot follow one that ends at {end}")
        return True

    def _write(self, batch: Batch, ready: ReadyBlob, entry: BatchEntry) -> bool:
        """Make room for a blob, write it and have it synced; False when there is no room."""
        shared, key = self._shared, ready.block.key
        nbytes = shared.blobs.stored_bytes(batch.root, ready.nbytes)
        # The row is no longer than the header, on pages of its own, and has a few small entries beside it.
        nbytes += disk_bytes(len(ready.header)) + disk_bytes(1)
        blob = BlobId(batch.root, key, shared.take_number())

        def book() -> None:
            shared.in_flight[blob] = shared.unwritten[blob] = nbytes
            shared.ledger.add("pending", nbytes)
            shared.health.put_bytes += nbytes

        if nbytes + self._evictor.shortage.floor_lack_bytes() > 0:
            # A blob that is half written counts as half more than it is, and nothing is to be evicted for that.
            batch.wait_written(len(batch.unsynced))
        if not self._evictor.make_room(nbytes, batch.keep, book):
            return False
        try:
            entry.row = pack_row(ready.block, blob.number, len(ready.header), ready.nbytes, ready.packed)
            on_disk = partial(shared.unwritten.pop, blob, None)
            entry.write = batch.behind.put(blob, (memoryview(ready.header), *ready.payload), on_disk)
        except BaseException as error:
            self._end_flight(blob)
            if not isinstance(error, OSError):
                raise
            self._note_refused_write(error, batch, nbytes)
            return False
        return True

    def _note_refused_write(self, error: OSError | StoreFullError, batch: Batch, nbytes: int = 0) -> None:
        """Note that the disk refuses writes; DirectoryError if the error is about something else than room.

        `nbytes`: of a blob that has not joined the batch yet.
        """
        health = self._shared.health
        health.disk_error = f"the disk refused a write: {error}; free some space on it, or see the system's log"
        with contextlib.suppress(OSError):
            waiting = (entry.row for entry in batch.unsynced if entry.row is not None)
            self._evictor.shortage.note_full_disk(nbytes + sum(map(self._shared.site.cost, [*batch.rows(), *waiting])))
        health.tell()
        if isinstance(error, OSError) and error.errno not in _FULL:
            raise DirectoryError(f"cannot write to {self._shared.directory.root}: {error}") from error

    def _commit(self, batch: Batch) -> Settled:
        """Rename all written blobs, sync their folder once, and commit the index once."""
        shared = self._shared
        try:
            for entry in batch.entries:
                if entry.write is not None:
                    entry.write.synced.result().rename()
                    entry.write = None
            if batch.rows():
                shared.blobs.sync(batch.root)
            settled = self._commit_rows(batch)
            if settled.deletion.costs:
                shared.deletions.finish(settled.deletion)
            # After the commit: blobs and index went to the drive in this order, and now both leave its cache. Also when
            # nothing was written: what is held may be another request's whose commit is as young.
            shared.drive.wait()
            # Again, and last: what a directory took with it that was displaced meanwhile must not be acknowledged.
            if shared.is_displaced():
                return Settled(reason=Reason.STORE_FULL)
        except (OSError, StoreFullError) as error:
            self._note_refused_write(error, batch)
            return Settled(reason=Reason.STORE_FULL)
        # The index may have grown by more than was set aside. Others go before what was just stored.
        own = {row.key for row in settled.kept}
        if not self._evictor.make_room(0, batch.keep | own):
            self._evictor.make_room(0)
        self._evictor.keep_terms(wait=False)  # while another thread evicts, the next upkeep does it
        return settled

    def _commit_rows(self, batch: Batch) -> Settled:
        shared = self._shared
        with shared.lock:
            if shared.is_displaced():
                return Settled(reason=Reason.STORE_FULL)
            if shared.evictions.covers(batch.root, batch.since, [entry.key for entry in batch.entries]):
                return Settled(reason=Reason.EVICTED)
            if not batch.rows():
                with shared.index.view() as view:
                    held = itertools.takewhile(lambda entry: view.stored(entry.key), batch.entries)
                    blocks = sum(1 for _ in held)
                return Settled(blocks, reason=Reason.OK if blocks == len(batch.entries) else Reason.DEPENDENCY_LOST)
            shared.blobs.write_identity(batch.root, batch.record)
            if batch.key is not None:
                # Before any row: what a crash leaves between the two is a key of nothing.
                shared.index.ring.write(batch.root, batch.key)
            with shared.drive.committing(), shared.edit() as edit:
                settled = self._settle(edit, batch)
            self._after_commit(settled)
            return settled

    def _settle(self, edit: Edit, batch: Batch) -> Settled:
        """Insert the rows of a batch that the index can still hold: their parents and namespace exist."""
        settled, shared = Settled(), self._shared
        if shared.index.ring.key(batch.root) is not batch.key:
            # Its key was dropped, or it was first encrypted, while this request was under way.
            settled.reason = Reason.DEPENDENCY_LOST
            return settled
        edit.put_namespace(batch.root, batch.record, int(shared.clock()))
        shared.uses.name(batch.root)
        shared.uses.write(edit)
        # One moment for all of them: so a checkpoint, which is deeper, goes before the blocks that lead to it.
        moment = edit.table.next()
        for entry in batch.entries:
            has_parent = entry.parent == batch.root or entry.parent in edit.table
            if not has_parent or (entry.row is None and entry.key not in edit.table):
                settled.reason = Reason.DEPENDENCY_LOST
                break
            if entry.row is not None and edit.lacks_aux(entry.row):
                settled.reason = Reason.NO_BASIS
                break
            if entry.row is not None and not is_covered(edit, entry.row):
                self._put(edit, entry.row, settled, moment, entry.flags)
            settled.blocks += 1
        edit.set_meta(NEXT_NUMBER, shared.next_number)
        if checkpoints := [row for row in settled.kept if row.is_checkpoint]:
            settled.evicted += thin_chains(edit, checkpoints)
        settled.replaced += edit.released
        return settled

    def _put(self, edit: Edit, row: Row, settled: Settled, moment: int, flags: int) -> None:
        """A row in the place of those that it replaces, last used at this number of the sequence."""
        pins = self._shared.keep.pins
        for old in replaced_by(edit, row, self._shared.options.short_tokens):
            if old.key == row.key:
                edit.replace(old, row, self._shared.site.cost(row))
            elif old.key in pins:
                continue
            else:
                edit.remove(old, by=row)
            settled.replaced.append(old)
        if row.key not in edit.table:
            edit.put(row, self._shared.site.cost(row))
            if row.key in pins:
                edit.table.pin(pins)
        edit.table.stamp(row.key, int(self._shared.clock()), last_use=moment, flags=flags)
        settled.kept.append(row)

    def _after_commit(self, settled: Settled) -> None:
        """Names are no longer in flight, what was replaced is to be deleted."""
        shared = self._shared
        for row in settled.kept:
            self._end_flight(row.blob)
            shared.health.written_bytes += self._shared.site.cost(row)
            shared.lost.forget(row.key)
        # A request may contain one key twice: its first blob is then deleted with the blobs that were not kept.
        own = {row.blob for row in settled.kept}
        if gone := [*(row for row in settled.replaced if row.blob not in own), *settled.evicted]:
            shared.evictions.note(CHAIN, len(settled.evicted), sum(map(shared.site.cost, settled.evicted)))
            settled.deletion = shared.deletions.begin(shared.costs(gone))

    def _end_flight(self, blob: BlobId) -> None:
        with self._shared.lock:
            self._shared.ledger.add("pending", -self._shared.in_flight.pop(blob, 0))
        self._shared.unwritten.pop(blob, None)

    def _discard(self, batch: Batch) -> None:
        """Delete what a request wrote and no row names. A commit that failed may have happened: the index decides."""
        shared = self._shared
        for entry in (*batch.entries, *batch.unsynced):
            row = entry.row
            if row is None or row.blob not in shared.in_flight:
                continue
            if entry.write is not None:
                entry.write.abandon()
                self._end_flight(row.blob)
                continue
            try:
                with shared.index.view() as view:
                    named = view.row(row.key)
            except KVStoreError:
                continue
            # While it is in flight it is no stray.
            if (named is None or named.number != row.number) and not shared.is_displaced():
                shared.blobs.delete([row.blob])
            self._end_flight(row.blob)
