"""The engine: a data directory of blob files and the index that names them.

Invariants, each with its tests:

1. A row never names a blob that is not complete. Write = tmp, length check, fsync, rename, fsync of the directory, then
   one index commit for the whole request; only then is the request durable.
2. Delete = index commit, then unlink, then the folders synced; only then is an eviction acknowledged. What a crash
   leaves in between is a stray file, never a dangling row. A deleted file that stays on the disk, for a reader or
   because the disk keeps it, has a tombstone (`kvstore.engine.tombstones`), so that no rebuild brings it back.
3. Blobs never change. A new one gets a new name, and its row replaces the old one's in one transaction.
4. A child is evicted before its parent, so every row can be reached from its root.
5. One counter of size (`Ledger`), in bytes on disk: files rounded up to 4096, plus index, staging, quarantine and keys.
   It is compared with the budget when the engine opens and before every write.
6. Corrupt data goes to quarantine and is a miss. Wrong bytes are never served: readers verify every checksum, and a
   blob is verified here before it is condemned.
7. Checkpoints are bounded along every chain and in all (`kvstore.engine.retention`), in the commit that adds one.

Durability: `commit` (default) syncs blobs, directory and index commit; `full` also empties the drive's cache, once for
each request; `none` syncs nothing, and the index is rebuilt from verified blobs after an unclean stop.

Threads: any thread may call anything. One lock serialises writers of the index; it is held for making room and for
commits, never while blobs are written or the caller's iterator runs. A store has its files synced on a thread that ends
with it. `match` takes no lock but LMDB's read transaction; `lease` and `touch` take one that is never held over I/O.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType

from kvstore.blocks import BLOCK_TOKENS, TOKEN_BYTES, Reason, count_tokens
from kvstore.engine import check as checking
from kvstore.engine import encryption, survey
from kvstore.engine.blobs import Fs
from kvstore.engine.directory import Hold, claim
from kvstore.engine.index import Index
from kvstore.engine.keyring import KeyRing, NamespaceKey
from kvstore.engine.matching import Exact, Found, checkpoint_at, longest_exact, longest_prefix
from kvstore.engine.nouns import (
    BlockInfo,
    CheckReport,
    EngineOptions,
    EngineStats,
    EvictReport,
    Finding,
    Match,
    NewBlock,
    Selection,
    Slice,
    StoreReceipt,
)
from kvstore.engine.pages import digest
from kvstore.engine.quality import QualityFiles
from kvstore.engine.reading import first_damaged, open_reader, sources_of
from kvstore.engine.recovery import recovered_index
from kvstore.engine.room import Room
from kvstore.engine.rows import Row
from kvstore.engine.scrub import Scrub, after_repair
from kvstore.engine.sealed import SealedReader
from kvstore.engine.state import DISPLACED, HEAD_BYTES, HEAD_TOKENS, Lease, State
from kvstore.engine.tombstones import Tombstones
from kvstore.engine.writer import Writer
from kvstore.errors import CorruptDataError, DirectoryError, KVStoreError, NotFoundError, UnknownFormatError
from kvstore.files import OPEN_FILES_MAX, FileReader, FileSource
from kvstore.keys import NamespaceInfo, block_key

log = logging.getLogger(__name__)


class Engine:
    """See the module. Make one with `Engine.open`."""

    def __init__(self, state: State, hold: Hold) -> None:
        """Not for callers: `open` is."""
        self._state = state
        self._hold = hold
        self._room = Room(state)
        self._writer = Writer(state, self._room)
        self.quality = QualityFiles(state.directory.quality, state.fs, sync=state.options.durability != "none")
        self._scrub = Scrub(state, self.recheck)
        self._closed = False

    @classmethod
    def open(
        cls, data_dir: Path, options: EngineOptions, fs: Fs | None = None, clock: Callable[[], float] = time.time
    ) -> Engine:
        """Take the directory and put it in order. `fs` and `clock` are seams for tests.

        Raises DirectoryHeldError, DirectoryError, UnknownFormatError.
        """
        fs = fs or Fs()
        directory, hold = claim(data_dir, options.keys_dir)
        index: Index | None = None
        try:
            directory.clean_staging(fs)
            ring = KeyRing(directory.keys, fs, options.master_key, sync=options.durability != "none")
            tombstones = Tombstones(directory, fs, sync=options.durability != "none")
            index = recovered_index(directory, hold, options, fs, ring, tombstones)
            hold.write(clean=False, durability=options.durability, socket=options.socket)
            engine = cls(State(directory, hold, index, options, fs, clock, tombstones), hold)
            engine._keep_to_limits()
            return engine
        except BaseException as error:
            if index is not None:
                index.close()
            hold.close()
            if isinstance(error, OSError):
                raise DirectoryError(f"the data directory {directory.root} cannot be used: {error}") from error
            raise

    def close(self) -> None:
        """Write the access order, mark the stop as clean if it is, give the directory back. Idempotent.

        A directory that was displaced is let go as it is, as by a crash.
        """
        with self._state.lock:
            if self._closed:
                return
            self._closed = True
            try:
                if not self.is_displaced():
                    self._leave_in_order()
            finally:
                self._state.index.close()
                self._hold.close()

    def _leave_in_order(self) -> None:
        self._state.end_all_leases()
        self._state.settle_deletions()
        self._state.evictions.tell()
        self._state.flush_touches()
        self._scrub.save()
        if not self._state.sync:
            self._state.sync_blobs()
        self._state.index.sync()
        left = digest(self._state.index.path / "data.mdb")
        clean = self._state.is_in_step()
        self._hold.write(clean=clean, durability=self._state.options.durability, index=left)

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    # -- finding ------------------------------------------------------------------------------------------------

    def namespace(self, root: bytes) -> NamespaceInfo | None:
        """What is known of a namespace; None if nothing is stored in it."""
        return self._state.namespaces.get(root)

    def namespaces(self) -> list[NamespaceInfo]:
        """All namespaces."""
        return list(self._state.namespaces.values())

    def match(
        self,
        root: bytes,
        tokens: bytes,
        fidelity_min: int = 0,
        limit_tokens: int | None = None,
        exact: bool = False,
    ) -> Match:
        """The longest stored prefix of packed `tokens`, at most `limit_tokens`, of blocks of `fidelity_min` or more.

        `exact`: the longest that ends at a checkpoint, likewise of `fidelity_min`; NO_CHECKPOINT when there are blocks
        for more. Plans from the index alone. CorruptDataError when the index is damaged: a miss.
        """
        limit = count_tokens(tokens) if limit_tokens is None else max(0, min(limit_tokens, count_tokens(tokens)))
        if encryption.is_key_missing(self._state, root):
            return Match(0, Reason.KEY_MISSING)
        if limit and root not in self._state.namespaces:
            why = self._why(Found((), 0, 0, root, False), tokens, limit)
            return Match(0, Reason.IDENTITY if why is Reason.UNKNOWN_PREFIX else why)
        with self._state.index.view() as view:
            found = longest_prefix(view, root, tokens, limit, fidelity_min)
            cut = longest_exact(view, root, tokens, found, fidelity_min) if exact and found.n_tokens else None
        if cut is not None:
            return self._exact(found, cut, tokens, limit)
        return Match(found.n_tokens, self._why(found, tokens, limit), found.rows)

    def _exact(self, found: Found, cut: Exact, tokens: bytes, limit: int) -> Match:
        """A match that ends at a checkpoint, or nothing for want of one."""
        end = cut.checkpoint.end if cut.checkpoint else 0
        reason = Reason.NO_CHECKPOINT if end < found.n_tokens else self._why(found, tokens, limit)
        if reason is Reason.NO_CHECKPOINT and cut.better:
            reason = Reason.FIDELITY
        return Match(end, reason, cut.rows, cut.checkpoint, cut.diverged and end < limit)

    def checkpoint_at(self, root: bytes, tokens: bytes) -> Row | None:
        """The checkpoint after exactly these packed tokens. Whether there are blocks up to it, a match says."""
        with self._state.index.view() as view:
            return checkpoint_at(view, root, tokens)

    def mark_divergence(self, row: Row) -> None:
        """Note that a prompt went another way after this checkpoint, so that its chain keeps it. Written like `touch`.

        To be called when a fetch used the checkpoint of a match that says `diverged`.
        """
        if self._state.mark(row.key):
            self._state.flush_touches()

    def _why(self, found: Found, tokens: bytes, limit: int) -> Reason:
        """Why a match gives no more."""
        if found.n_tokens >= limit:
            return Reason.OK
        if found.better:
            return Reason.FIDELITY
        rest = tokens[found.full * TOKEN_BYTES : min(limit, found.full + BLOCK_TOKENS) * TOKEN_BYTES]
        heads = [rest] if found.n_tokens - found.full >= HEAD_TOKENS else [rest, rest[:HEAD_BYTES]]
        for head in heads:
            reason = self._state.why_lost(block_key(found.parent, head))
            if reason is not None:
                return reason
        return Reason.UNKNOWN_PREFIX

    def path(self, row: Row) -> Path:
        """The file of a row."""
        return self._state.directory.path(row)

    def sources(self, slices: Iterable[Slice]) -> list[FileSource]:
        """Where a `FileReader` finds the blocks of a plan."""
        return sources_of(self._state.directory, slices)

    def reader(self, slices: Sequence[Slice], open_max: int = OPEN_FILES_MAX) -> FileReader | SealedReader:
        """A reader of the blocks of a plan, all of one namespace; what is encrypted comes out decrypted."""
        key = self._state.index.ring.key(slices[0].row.root) if slices else None
        return open_reader(self.sources(slices), slices, key, open_max)

    def is_encrypted(self, root: bytes) -> bool:
        """Whether a namespace is encrypted: then nothing of it is handed over by path."""
        return encryption.is_encrypted(self._state, root)

    def encrypt(self, root: bytes) -> NamespaceKey | None:
        """The key that a namespace is encrypted with from now on; None, and it is not, when it holds anything plain.

        KeyMissingError while the keys of what is stored are missing.

        Hold it until `store` has it: before the first store it is nowhere else.
        """
        return encryption.encrypt(self._state, root)

    def shred(self, namespace_prefix: bytes, dry_run: bool = False) -> int:
        """Drop the keys of the encrypted namespaces that start so; how many. Evict what they held afterwards."""
        return encryption.shred(self._state, namespace_prefix, dry_run)

    def first_damaged(self, slices: Sequence[Slice]) -> int | None:
        """See `kvstore.engine.reading.first_damaged`. All of one namespace."""
        info = self._state.namespaces.get(slices[0].row.root) if slices else None
        key = self._state.index.ring.key(info.root) if info else None
        return first_damaged(self.sources(slices), slices, info, key)

    def touch(self, slices: Iterable[Slice]) -> None:
        """Note that blocks were used. Kept in memory, written with the next commit, or when there are many."""
        if self._state.touch(slices):
            self._state.flush_touches()

    def lease(self, rows: Iterable[Row]) -> Lease:
        """Protect the files of rows until they are open: evicted last, and the files of replaced rows stay for now."""
        return Lease(self._state, tuple(rows))

    # -- storing ------------------------------------------------------------------------------------------------

    def store(
        self,
        namespace_record: bytes,
        blocks: Iterable[NewBlock],
        protect: Sequence[bytes] = (),
        encryption: NamespaceKey | None = None,
    ) -> StoreReceipt:
        """Write blocks, parents before children, as one durable unit. `protect`: keys that must not make room for them.

        `encryption`: with this key or not at all; when it is not the namespace's (any more), DEPENDENCY_LOST.
        `blocks` is pulled one at a time, as room is made: the bytes of a block are not needed when the next is asked
        for. An exception out of it is raised again and nothing is stored.
        Stops early, and keeps what came before, with DEPENDENCY_LOST when a parent is gone and STORE_FULL when there is
        no room. Raises InvalidRequestError for blocks that cannot be, DirectoryError when the disk fails.
        """
        return self._writer.store(namespace_record, blocks, protect, encryption)

    def await_durable(self) -> bool:
        """Wait until what a match finds now is as durable as was promised; False when the disk refuses."""
        return self._state.drive.confirm()

    # -- room ---------------------------------------------------------------------------------------------------

    @property
    def staging_dir(self) -> Path:
        """Where uploads wait; emptied when the engine opens. Count them with `add_usage`."""
        return self._state.directory.staging

    @property
    def used_bytes(self) -> int:
        """What the data directory costs on disk."""
        return self._state.ledger.total

    @property
    def budget_bytes(self) -> int:
        """Most bytes that it may cost."""
        return self._state.options.budget_bytes

    def limit(self, budget_bytes: int, free_floor_bytes: int) -> None:
        """Keep to these limits from now on, and at once."""
        self._state.options = replace(self._state.options, budget_bytes=budget_bytes, free_floor_bytes=free_floor_bytes)
        self._keep_to_limits()

    def _keep_to_limits(self) -> None:
        self._room.announce()
        self._room.make(0)
        self._room.keep_share()
        self._state.evictions.tell()

    @property
    def degraded(self) -> str:
        """Why nothing is stored at present; empty when all is well."""
        return self._state.counts.degraded

    def make_room(self, nbytes: int) -> bool:
        """Evict until `nbytes` more fit under budget and floor; False when they do not even then."""
        return self._room.make(nbytes)

    def add_usage(self, nbytes: int) -> None:
        """Count the size of a staged file, or, with the same number negative, its end."""
        self._room.book_staging(nbytes)

    def could_reserve(self, nbytes: int) -> bool:
        """Whether `reserve` may find room for so many staged bytes. Evicts nothing."""
        return self._room.could_reserve(nbytes)

    def reserve(self, nbytes: int) -> bool:
        """`make_room` and `add_usage` in one step; False, and nothing counted, when there is no room."""
        return self._room.reserve(nbytes)

    def evict(self, selection: Selection, dry_run: bool = False) -> EvictReport:
        """Remove what is selected, least recently used leaves first; `dry_run` reports the same and changes nothing.

        What it reports stays deleted, whatever happens afterwards. DirectoryError when the disk does not confirm that.
        """
        return self._room.evict(selection, dry_run)

    def maintain(self) -> None:
        """To be called every second or so: write the access order when due, keep to budget and floor, scrub a little.

        When the disk refused a write, see whether it takes one again. Raises nothing that a disk can do.
        """
        state = self._state
        state.counts.displaced = DISPLACED if self.is_displaced() else ""
        if state.counts.displaced:
            return
        try:
            if state.touches_due():
                state.flush_touches()
            state.settle_deletions()
            self._room.make(0)
            state.evictions.tell()
            state.ballast.lay()
            if state.counts.disk_error and state.can_write():
                state.counts.disk_error = ""
            self._scrub.step()
        except (KVStoreError, OSError) as error:
            state.counts.disk_error = str(error)

    def is_displaced(self) -> bool:
        """Whether the data directory was deleted or replaced underneath. Then open another engine: none can heal it."""
        return self._state.is_displaced()

    # -- care ---------------------------------------------------------------------------------------------------

    def recheck(self, key: bytes) -> bool:
        """Read a block's blob again; whether it was damaged and is in quarantine now, its descendants deleted.

        What a newer kvstore wrote, what nobody has the key of and what is in a displaced directory stays.
        """
        with self._state.index.view() as view:
            row = view.row(key)
        if row is None or self.is_displaced():
            return False
        try:
            checking.verify_row(self._state.site, row)
            return False
        except (NotFoundError, UnknownFormatError):
            return False
        except CorruptDataError as error:
            log.warning("a blob is damaged: %s", error)
        with self._state.lock:
            removed = checking.drop_tree(self._state.site, row, quarantine=True)
            after_repair(self._state, removed)
        return bool(removed)

    def check(self, repair: bool = False) -> CheckReport:
        """Read and verify everything, while others go on. The same walk as `check_directory`."""
        self._state.demand_place()
        if repair:
            with contextlib.suppress(OSError):  # `maintain` will tell
                self._state.settle_deletions()
        walk = checking.Walk(self._state.site, repair)
        try:
            walk.run()
        except CorruptDataError as error:
            advice = f"{error}; stop the daemon and run: kvstore check --repair"
            walk.report.findings.append(Finding("row", str(self._state.index.path), advice))
        with self._state.lock:
            after_repair(self._state, walk.removed)
        return walk.report

    # -- looking ------------------------------------------------------------------------------------------------

    def list_blocks(self, namespace_prefix: bytes = b"", limit: int = 1000) -> list[BlockInfo]:
        """Up to `limit` blocks and checkpoints of the namespaces that start so, most recently used first."""
        return survey.list_blocks(self._state, namespace_prefix, limit)

    def show(self, key_prefix: bytes) -> list[BlockInfo]:
        """Blocks and checkpoints whose key starts so, at most SHOW_MAX."""
        return survey.show(self._state, key_prefix)

    def stats(self) -> EngineStats:
        """Counts of this moment."""
        try:
            free_bytes = self._room.free_bytes()
        except OSError as error:
            self._state.counts.disk_error = f"the data directory cannot be reached: {error}"
            free_bytes = 0
        return replace(
            survey.stats(self._state, free_bytes), scrubbed_s=self._scrub.done_s, damaged=self._scrub.damaged
        )
