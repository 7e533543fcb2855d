"""STORE: blocks of one request become files, then, in one index commit, rows.

While the disk syncs a file, the next ones are made and written: a few at most, so that little is lost of a disk that
refuses, and before the commit all of them have landed.
"""

from __future__ import annotations

import contextlib
import errno
from collections import deque
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import TypeAlias

from kvstore.blocks import BLOCK_TOKENS, Block, Reason
from kvstore.engine.blobs import abandon, blob_name, disk_bytes, land, write_unsynced
from kvstore.engine.evictions import CHAIN
from kvstore.engine.format import Sealed, seal
from kvstore.engine.index import Edit
from kvstore.engine.keyring import NamespaceKey
from kvstore.engine.matching import is_covered, replaced_by
from kvstore.engine.nouns import NewBlock, StoreReceipt
from kvstore.engine.retention import keep_share, thin_chains
from kvstore.engine.room import Room
from kvstore.engine.rows import Row, pack_row
from kvstore.engine.sealed import seal_blob, sealed_bytes
from kvstore.engine.state import State
from kvstore.errors import DirectoryError, InvalidRequestError, KVStoreError, StoreFullError
from kvstore.keys import NamespaceInfo

# Errors of a disk that is full, or of a process that is short of descriptors or threads; they pass.
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.EMFILE, errno.ENFILE, errno.EAGAIN)

# Files of one request that are synced or wait for that; of more the disk gets no faster.
UNSYNCED_MAX = 2

# Key, parent, row of the file written, or None if it is held already.
_Entry: TypeAlias = tuple[bytes, bytes, Row | None]


@dataclass
class _Batch:
    """One request on its way. `entries` have their files, those of `landing` are being synced or wait for that.

    `syncing` is its thread for that: it ends with the request, and has the priority of the one that stores.
    """

    root: bytes
    record: bytes
    keep: set[bytes]
    key: NamespaceKey | None
    syncing: ThreadPoolExecutor
    folder: int = -1
    entries: list[_Entry] = field(default_factory=list)
    landing: deque[tuple[_Entry, Future[None] | None]] = field(default_factory=deque)
    ends: dict[bytes, int] = field(default_factory=dict)

    def rows(self) -> list[Row]:
        """Rows of the files that have landed."""
        return [row for _, _, row in self.entries if row is not None]


@dataclass
class _Settled:
    """What a commit does with a batch."""

    blocks: int = 0
    kept: list[Row] = field(default_factory=list)
    replaced: list[Row] = field(default_factory=list)
    evicted: list[Row] = field(default_factory=list)
    reason: Reason = Reason.OK


class Writer:
    """Carries out stores, any number at a time. Files are written without the lock; room and commits are under it."""

    def __init__(self, state: State, room: Room) -> None:
        self._state = state
        self._room = room

    def store(
        self, record: bytes, blocks: Iterable[NewBlock], protect: Iterable[bytes], encryption: NamespaceKey | None
    ) -> StoreReceipt:
        """See `Engine.store`."""
        root = NamespaceInfo.from_record(record).root
        syncing = ThreadPoolExecutor(1, "kvstore-sync")
        batch = _Batch(root, record, set(protect), self._state.index.ring.key(root), syncing)
        if encryption is not None and batch.key is not encryption:
            return StoreReceipt(0, 0, Reason.DEPENDENCY_LOST)
        try:
            reason = self._write_all(batch, blocks)
            if not batch.entries:
                return StoreReceipt(0, 0, reason)
            settled = self._commit(batch)
            why = reason if settled.reason is Reason.OK else settled.reason
            if settled.kept and why is Reason.OK:
                self._state.counts.disk_error = ""
            lasting = [row for row in settled.kept if row not in settled.evicted]
            return StoreReceipt(settled.blocks, sum(row.disk_bytes for row in lasting), why)
        finally:
            syncing.shutdown()
            self._discard(batch)

    def _write_all(self, batch: _Batch, blocks: Iterable[NewBlock]) -> Reason:
        """Write files until the blocks end or something stops them; those before it have landed."""
        reason = Reason.OK
        for new in blocks:
            block = new.block
            if not self._has_parent(batch, block):
                reason = Reason.DEPENDENCY_LOST
                break
            with self._state.index.view() as view:
                held = view.row(block.key)
            row = landed = None
            if held is None or held.is_sealed or held.fidelity < block.fidelity:
                created_s = block.created_s or int(self._state.clock())
                sealed = seal(replace(block, namespace=batch.record, created_s=created_s), new.buffers)
                written = self._write(batch, sealed)
                if written is None:
                    reason = Reason.STORE_FULL
                    break
                row, landed = written
            batch.landing.append(((block.key, block.parent, row), landed))
            if not block.is_checkpoint:
                batch.ends[block.key] = block.end
            if not self._land(batch, UNSYNCED_MAX):
                return Reason.STORE_FULL
        return reason if self._land(batch, 0) else Reason.STORE_FULL

    def _land(self, batch: _Batch, most: int) -> bool:
        """Wait until no more than so many files are to be synced; False when the disk refuses one, the first in order.

        What comes after that one has lost its parent: it is discarded with it.
        """
        while len(batch.landing) > most:
            entry, landed = batch.landing[0]
            try:
                if landed is not None:
                    landed.result()
            except OSError as error:
                self._demand_full(error)
                return False
            batch.landing.popleft()
            batch.entries.append(entry)
        return True

    def _has_parent(self, batch: _Batch, block: Block) -> bool:
        """Whether the parent is in the index or this request. InvalidRequestError if the block does not continue it."""
        if block.root != batch.root:
            raise InvalidRequestError("a block of another namespace")
        end = 0 if block.parent == batch.root else batch.ends.get(block.parent)
        if end is None:
            with self._state.index.view() as view:
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

    def _write(self, batch: _Batch, sealed: Sealed) -> tuple[Row, Future[None] | None] | None:
        """Make room for a blob, write it and have it synced (None: it need not be); None when there is no room."""
        state = self._state
        key = sealed.block.key
        file_bytes = sealed_bytes(sealed.file_bytes) if batch.key else sealed.file_bytes
        if sealed.block.is_checkpoint and disk_bytes(file_bytes) > state.options.checkpoint_share_bytes:
            return None
        if batch.folder < 0:
            batch.folder = key[0]
        with state.lock:
            # The row is no longer than the header, on pages of its own, and has four small entries beside it.
            nbytes = disk_bytes(file_bytes) + disk_bytes(len(sealed.header)) + disk_bytes(1)
            if not self._room.make(nbytes, batch.keep):
                return None
            seq, state.next_seq = state.next_seq, state.next_seq + 1
            state.in_flight[blob_name(key, seq)] = nbytes
            state.ledger.add("pending", nbytes)
        row = pack_row(replace(sealed.block, namespace=b""), batch.folder, seq, len(sealed.header), file_bytes)
        try:
            self._make_folder(batch.folder)
            parts = (memoryview(sealed.header), *sealed.payload)
            if batch.key:
                parts = tuple(seal_blob(batch.key, batch.root, key, parts))
            path = str(state.directory.path(row))
            fd = write_unsynced(state.fs, path, parts)
            if state.sync:
                return row, self._land_later(batch, path, fd)
            land(state.fs, path, fd, False)
        except BaseException as error:
            self._end_flight(row)
            if not isinstance(error, OSError):
                raise
            self._demand_full(error)
            return None
        return row, None

    def _land_later(self, batch: _Batch, path: str, fd: int) -> Future[None]:
        """Have a file synced on the thread of the request. OSError when there can be no thread, which passes."""
        try:
            return batch.syncing.submit(land, self._state.fs, path, fd, True)
        except RuntimeError as error:
            # The first of a request. What was queued all the same nobody will ever run.
            abandon(self._state.fs, path, fd)
            raise OSError(errno.EAGAIN, str(error)) from error

    def _make_folder(self, number: int) -> None:
        path = self._state.directory.folder(number)
        if path.is_dir():
            return
        with contextlib.suppress(FileExistsError):
            self._state.fs.mkdir(str(path))
        if self._state.sync:
            self._state.fs.fsync_dir(str(self._state.directory.blobs))

    def _demand_full(self, error: OSError | StoreFullError) -> None:
        """Note that the disk refuses writes; DirectoryError if the error is about something else than room."""
        self._state.counts.disk_error = f"the disk refused a write: {error}"
        if isinstance(error, OSError) and error.errno not in _FULL:
            raise DirectoryError(f"cannot write to {self._state.directory.root}: {error}") from error

    def _commit(self, batch: _Batch) -> _Settled:
        """One directory sync and one index commit for everything that was written."""
        state = self._state
        written = bool(batch.rows())
        try:
            if written and state.sync:
                state.fs.fsync_dir(str(state.directory.folder(batch.folder)))
            with state.lock:
                if state.is_displaced():
                    return _Settled(reason=Reason.STORE_FULL)
                if written and batch.key is not None:
                    # Before any row: what a crash leaves between the two is a key of nothing.
                    state.index.ring.write(batch.root, batch.key)
                state.drive.begin()
                try:
                    with state.edit(dry_run=not written) as edit:
                        settled = self._settle(edit, batch)
                finally:
                    state.drive.end()
                self._after_commit(batch, settled)
            # After the commit: blobs and index went to the drive in this order, and now both leave its cache. Also when
            # nothing was written: what is held may be another request's whose commit is as young.
            state.drive.wait()
            # Again, and last: what a directory took with it that was displaced meanwhile must not be acknowledged.
            if state.is_displaced():
                return _Settled(reason=Reason.STORE_FULL)
        except (OSError, StoreFullError) as error:
            self._demand_full(error)
            return _Settled(reason=Reason.STORE_FULL)
        # The index may have grown by more than was set aside. Others go before what was just stored.
        own = {row.key for row in settled.kept}
        if not self._room.make(0, batch.keep | own):
            self._room.make(0)
        return settled

    def _settle(self, edit: Edit, batch: _Batch) -> _Settled:
        """Put the rows of a batch as far as the index still bears them out."""
        settled = _Settled()
        stamp = self._state.now()
        if self._state.index.ring.key(batch.root) is not batch.key:
            # Its key was dropped, or it was first encrypted, while this request was under way.
            settled.reason = Reason.DEPENDENCY_LOST
            return settled
        for key, parent, row in batch.entries:
            if (parent != batch.root and edit.value(parent) is None) or (row is None and edit.value(key) is None):
                settled.reason = Reason.DEPENDENCY_LOST
                break
            if row is not None and not is_covered(edit, row):
                marked = edit.marked(row.key)
                for old in replaced_by(edit, row, self._state.options.short_tokens):
                    edit.remove(old)
                    settled.replaced.append(old)
                edit.put(row, stamp, marked)
                settled.kept.append(row)
            settled.blocks += 1
        if settled.kept:
            edit.put_namespace(batch.root, batch.record)
        edit.set_meta("next_seq", self._state.next_seq)
        self._state.write_touches(edit)
        self._thin_checkpoints(edit, settled)
        return settled

    def _thin_checkpoints(self, edit: Edit, settled: _Settled) -> None:
        """In the same commit: no more checkpoints than their chains and their share of the budget have places for."""
        added = [row for row in settled.kept if row.is_checkpoint]
        if added:
            options = self._state.options
            settled.evicted += thin_chains(edit, added, options.checkpoints_max)
            settled.evicted += keep_share(edit, options.checkpoint_share_bytes, self._state.leased())

    def _after_commit(self, batch: _Batch, settled: _Settled) -> None:
        """Names are no longer in flight, what was replaced is unlinked."""
        state = self._state
        if settled.kept:
            state.namespaces.setdefault(batch.root, NamespaceInfo.from_record(batch.record))
        for row in settled.kept:
            self._end_flight(row)
            state.counts.written_bytes += row.disk_bytes
            state.forget_lost(row.key)
        state.evictions.note(CHAIN, settled.evicted)
        # A request may hold one key twice: what it replaced of its own is unlinked with what was not kept.
        own = {(row.key, row.seq) for row in settled.kept}
        gone = [row for row in settled.replaced if (row.key, row.seq) not in own]
        state.delete_files(gone + settled.evicted)

    def _end_flight(self, row: Row) -> None:
        with self._state.lock:
            nbytes = self._state.in_flight.pop(blob_name(row.key, row.seq), 0)
            self._state.ledger.add("pending", -nbytes)

    def _discard(self, batch: _Batch) -> None:
        """Unlink what a request wrote and no row names. A commit that failed may have happened: the index decides."""
        state = self._state
        rows = batch.rows() + [row for (_, _, row), _ in batch.landing if row is not None]
        for row in rows:
            with state.lock:
                if blob_name(row.key, row.seq) not in state.in_flight:
                    continue
                try:
                    with state.index.view() as view:
                        named = view.row(row.key)
                except KVStoreError:
                    continue
                if named is None or named.seq != row.seq:
                    state.unlink([row])
                else:
                    state.namespaces.setdefault(batch.root, NamespaceInfo.from_record(batch.record))
                self._end_flight(row)
