"""Promotion: blobs of the remote tier become blobs of this store, for one request and within its time.

Blobs are read whole and in order, a few MiB at a time, verified to the last byte, and stored through `Importer`, as
those of an export are; the next ones are read meanwhile. From then on they are local: by path or stream, for this
request and for later ones. Whatever goes wrong ends a promotion with what came before.

Large blobs are read in ranges side by side. Reading layer by layer, and storing afterwards, was rejected: see
docs/decisions.md.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from kvstore.blobs import format as blob_format
from kvstore.core.blocks import Reason
from kvstore.core.breaker import Deadline
from kvstore.core.byte_budget import ByteBudget
from kvstore.core.remote_words import RemoteReason
from kvstore.errors import (
    CorruptDataError,
    DeadlineError,
    DirectoryError,
    InvalidRequestError,
    KVStoreError,
    LimitError,
    NotFoundError,
    ObjectChangedError,
    RemoteError,
    UnknownFormatError,
)
from kvstore.remote.finder import RemoteBlock
from kvstore.remote.object_store import Wanted, parts
from kvstore.remote.objects import require_block
from kvstore.remote.tier import RemoteTier
from kvstore.server.storing.importer import Importer
from kvstore.server.threads import Pool
from kvstore.server.tier.remote_watch import Watch

# Of blobs that are read at once; one that is larger is read alone.
BATCH_BYTES = 16 << 20
# Why a promotion ended early where the store here did not take what came.
_NOT_STORED = {
    Reason.OK: None,
    Reason.STORE_FULL: RemoteReason.NO_ROOM,
    Reason.NO_BASIS: RemoteReason.NO_BASIS,
    Reason.EVICTED: RemoteReason.EVICTED,
    Reason.DEPENDENCY_LOST: RemoteReason.DEPENDENCY_LOST,
}
# From this part on what was read says whether the rest will come in time.
TELLING_SHARE = 0.1
Answers = list[list[memoryview] | KVStoreError]
T = TypeVar("T")
log = logging.getLogger(__name__)


class Promotion:
    """One request's. Made and used on the event loop; `run` takes what blocks. `close` it in any case."""

    def __init__(
        self,
        tier: RemoteTier,
        watch: Watch,
        importer: Importer,
        buffers: ByteBudget,
        fidelity_min: int,
        run: Pool,
    ) -> None:
        self._tier = tier
        self._watch = watch
        self._importer = importer
        self._buffers = buffers
        self._fidelity_min = fidelity_min
        self._run = run
        self._held_bytes = 0  # of blobs that are read or stored now
        self._reading: asyncio.Future[Answers] | None = None
        self._reading_bytes = 0
        self._storing: asyncio.Future[Any] | None = None
        self._is_closed = False
        self.read_bytes = 0
        self.stored = 0
        self.keys: list[bytes] = []  # of blocks that came whole and sound

    async def take(self, blocks: Sequence[RemoteBlock], deadline: Deadline) -> RemoteReason | None:
        """Read these blobs, parents first, and store them; why not all of them, None when all."""
        started_s = time.monotonic()
        try:
            why = await self._take(blocks, deadline)
        except (RemoteError, DeadlineError) as error:
            self._watch.failed(error, time.monotonic() - started_s)
            why = why_of(error)
        try:
            done = await self._store(self._importer.finish)
        except DirectoryError as error:
            log.warning("what was read from the remote tier is not stored: %s", error)
            return RemoteReason.NO_ROOM
        self.stored = done.blobs
        return why or _NOT_STORED.get(done.reason, RemoteReason.NO_ROOM)

    async def _take(self, blocks: Sequence[RemoteBlock], deadline: Deadline) -> RemoteReason | None:
        total, started_s, allowed_s = sum(one.head.nbytes for one in blocks), time.monotonic(), deadline.left_s
        batches = batched(blocks)
        batch = next(batches)
        if not self._begin(batch, deadline):
            return RemoteReason.NO_MEMORY
        while self._reading is not None:
            # Shielded: a thread that reads goes on after a cancel, and `close` must see when it ends.
            answers, reading, self._reading = await asyncio.shield(self._reading), batch, None
            batch, no_memory = next(batches, []), False
            if batch and not any(isinstance(one, KVStoreError) for one in answers):
                no_memory = not self._begin(batch, deadline)
            why = await self._store(self._store_all, reading, answers)
            self._release(reading)
            if why or no_memory:
                return why or RemoteReason.NO_MEMORY
            share = self.read_bytes / total
            # What will be late is of use up to where it got; but a caller that computes has waited for nothing.
            if TELLING_SHARE <= share < 1 and (time.monotonic() - started_s) / share > allowed_s:
                return RemoteReason.LATE
        return None

    def _begin(self, batch: Sequence[RemoteBlock], deadline: Deadline) -> bool:
        """Begin to read; False when there is no memory for it."""
        nbytes = sum(one.head.nbytes for one in batch)
        if not self._buffers.try_acquire(nbytes):
            return False
        self._held_bytes += nbytes
        self._reading_bytes = nbytes
        wanted = [Wanted(one.name, one.head.etag, parts(one.head)) for one in batch]
        self._reading = asyncio.ensure_future(self._run(self._read, wanted, deadline))
        return True

    def _read(self, wanted: Sequence[Wanted], deadline: Deadline) -> Answers:
        return [] if self._is_closed else self._tier.store.read_all(wanted, deadline)

    async def _store(self, work: Callable[..., T], *args: object) -> T:
        """Run a step of the importer. It goes on if the caller is cancelled; `close` waits for it."""
        storing = self._storing = asyncio.ensure_future(self._run(work, *args))
        return await asyncio.shield(storing)

    def _release(self, batch: Sequence[RemoteBlock]) -> None:
        nbytes = sum(one.head.nbytes for one in batch)
        self._held_bytes -= nbytes
        self._buffers.release(nbytes)

    def _store_all(self, batch: Sequence[RemoteBlock], answers: Answers) -> RemoteReason | None:
        """Verify blobs and have them stored up to the first that cannot be; why that is, None for none."""
        for one, answer in zip(batch, answers, strict=True):
            if isinstance(answer, (RemoteError, DeadlineError)):
                self._watch.failed(answer, 0.0)
                return why_of(answer)
            if isinstance(answer, KVStoreError):
                return RemoteReason.UNAVAILABLE
            self._watch.succeeded()
            self.read_bytes += one.head.nbytes
            if why := self._store_one(one, answer):
                self._importer.drop()
                return why
            self.keys.append(one.key)
        return None

    def _store_one(self, one: RemoteBlock, pieces: list[memoryview]) -> RemoteReason | None:
        try:
            first = pieces[0] if pieces else memoryview(b"")
            nbytes = one.head.nbytes
            length = blob_format.header_length(bytes(first[: blob_format.LENGTH_BYTES]), nbytes)
            if length > len(first):
                first, pieces = memoryview(b"".join(pieces)), []
            require_block(blob_format.parse_header(bytes(first[:length]), nbytes), one, self._fidelity_min)
            wants_more = self._importer.take(nbytes, first[:length])
            for piece in (first[length:], *pieces[1:]):
                wants_more = wants_more and self._importer.take(0, piece)
            return None if wants_more else _NOT_STORED.get(self._importer.done.reason, RemoteReason.NO_ROOM)
        except (CorruptDataError, UnknownFormatError, InvalidRequestError, NotFoundError) as error:
            self._tier.finder.report_wrong(one, error)
            return RemoteReason.WRONG
        except LimitError:
            return RemoteReason.NO_MEMORY

    async def close(self) -> None:
        """Release everything. What a running read still brings is dropped; its memory is released when it ends."""
        self._is_closed = True
        if self._storing is not None:
            await asyncio.wait([self._storing])  # the importer is one thread's at a time
        if self._reading is not None:
            self._held_bytes -= self._reading_bytes
            self._reading.add_done_callback(functools.partial(self._read_ended, self._reading_bytes))
        self._buffers.release(self._held_bytes)
        self._held_bytes = 0
        await self._run.finish(self._importer.close)

    def _read_ended(self, nbytes: int, reading: asyncio.Future[Answers]) -> None:
        self._buffers.release(nbytes)
        if not reading.cancelled():
            reading.exception()  # nobody waits for it any more: without a look asyncio logs it


def batched(blocks: Sequence[RemoteBlock]) -> Iterator[list[RemoteBlock]]:
    """The blocks in order, in batches of at most BATCH_BYTES."""
    batch: list[RemoteBlock] = []
    nbytes = 0
    for one in blocks:
        if batch and nbytes + one.head.nbytes > BATCH_BYTES:
            yield batch
            batch, nbytes = [], 0
        batch.append(one)
        nbytes += one.head.nbytes
    if batch:
        yield batch


def why_of(error: RemoteError | DeadlineError) -> RemoteReason:
    """The word for what the remote store did not do."""
    if isinstance(error, DeadlineError):
        return RemoteReason.LATE
    return RemoteReason.CHANGED if isinstance(error, ObjectChangedError) else RemoteReason.UNAVAILABLE
