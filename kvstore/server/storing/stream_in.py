"""Receives the chunks of an upload over gRPC and queues them for the upload's thread.

Memory: two batches per upload, counted. A worker that sends faster than the disk writes is slowed down.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable

from kvstore.core.byte_budget import ByteBudget
from kvstore.errors import DeadlineError, InvalidRequestError, LimitError
from kvstore.server.fetching.stream_out import BATCH_BYTES
from kvstore.server.storing.uploads import Upload, Uploads
from kvstore.wire.frames import UploadBytes

# How often a full budget is checked again. It is polled, since other threads give memory back without a signal.
ROOM_EVERY_S = 0.01


class ChunkSource:
    """A queue of chunks: the event loop puts, the upload's thread reads. See `UploadSource`.

    Its bytes are counted in `budget` until they are read; the caller of `put` has acquired them.
    """

    def __init__(self, budget: ByteBudget) -> None:
        self._budget = budget
        self._loop = asyncio.get_running_loop()
        self._taken = asyncio.Event()
        self._changed = threading.Condition()
        self._parts: deque[memoryview] = deque()
        self._bytes = 0
        self._ended = False
        self.is_closed = False

    async def put(self, part: memoryview) -> None:
        """Add counted bytes, once few are unread. Dropped if the reader has gone, or this is cancelled."""
        try:
            while not self._add(part):
                await self._taken.wait()
        except asyncio.CancelledError:
            self._budget.release(part.nbytes)
            raise

    def _add(self, part: memoryview) -> bool:
        with self._changed:
            self._taken.clear()
            if self.is_closed:
                self._budget.release(part.nbytes)
                return True
            if self._bytes and self._bytes + part.nbytes > 2 * BATCH_BYTES:
                return False
            self._parts.append(part)
            self._bytes += part.nbytes
            self._changed.notify()
            return True

    async def end(self) -> None:
        """Mark the end. Returns when everything was read or the reader has gone."""
        with self._changed:
            self._ended = True
            self._changed.notify()
        while not self._is_done():
            await self._taken.wait()

    def _is_done(self) -> bool:
        with self._changed:
            self._taken.clear()
            return self.is_closed or not self._parts

    def readinto(self, view: memoryview) -> int | None:
        """See `UploadSource`. Waits without a limit: the stream's handler ends uploads that stall."""
        with self._changed:
            self._changed.wait_for(lambda: self._parts or self._ended or self.is_closed)
            if self.is_closed or not self._parts:
                return 0
            part = self._parts[0]
        got = min(len(view), part.nbytes)
        view[:got] = part[:got]
        if self._drop(got):
            self._budget.release(got)
            self._wake()
        return got

    def _drop(self, nbytes: int) -> bool:
        """Remove the first bytes, which were read. False if `close` has removed everything meanwhile."""
        with self._changed:
            if self.is_closed:
                return False
            part = self._parts.popleft()
            if nbytes < part.nbytes:
                self._parts.appendleft(part[nbytes:])
            self._bytes -= nbytes
            return True

    def confirm(self) -> None:
        """See `UploadSource`. Does nothing: the reply of the call confirms."""

    def close(self) -> None:
        """See `UploadSource`."""
        with self._changed:
            self.is_closed = True
            self._parts.clear()
            nbytes, self._bytes = self._bytes, 0
            self._changed.notify()
        self._budget.release(nbytes)
        self._wake()

    def _wake(self) -> None:
        try:
            self._loop.call_soon_threadsafe(self._taken.set)
        except RuntimeError:  # the daemon has stopped: no reader waits
            return


class StreamIn:
    """Receives one upload. Made and used on the event loop; `begin(upload)` starts the upload's thread."""

    def __init__(self, uploads: Uploads, begin: Callable[[Upload], object], budget: ByteBudget, idle_s: float) -> None:
        self._uploads = uploads
        self._begin = begin
        self._budget = budget
        self._idle_s = idle_s
        self._source: ChunkSource | None = None
        self._received_bytes = 0
        self.upload: Upload | None = None

    async def receive(self, chunks: AsyncIterator[UploadBytes]) -> int:
        """Receive all chunks. Returns the number of bytes; fewer than asked for if the daemon stops receiving.

        Raises InvalidRequestError, NotFoundError, DeadlineError if nothing comes for `idle_s`, and LimitError if
        memory_bytes stay in use that long.
        """
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(self._idle_s) as patience:
                async for chunk in chunks:
                    patience.reschedule(None)
                    if not await self._take(chunk):
                        return self._received_bytes
                    patience.reschedule(loop.time() + self._idle_s)
        except TimeoutError as error:
            raise DeadlineError(f"no bytes of the upload for {self._idle_s:g} s; the worker may store again") from error
        if self.upload is None:
            raise InvalidRequestError("an upload names its upload_id in the first chunk")
        nbytes = self.upload.upload_bytes
        if self._received_bytes != nbytes:
            raise InvalidRequestError(f"the upload has {self._received_bytes} bytes, {nbytes} were asked for")
        if self._source is not None:
            await self._source.end()
            self._require_kept()
        return self._received_bytes

    async def _take(self, chunk: UploadBytes) -> bool:
        """Queue one chunk. False if the daemon stops receiving."""
        if self.upload is None:
            self._open(self._uploads.get(chunk.upload_id))
        assert self.upload is not None
        assert self._source is not None
        if self._received_bytes + chunk.data.nbytes > self.upload.upload_bytes:
            words = f"the upload is longer than the {self.upload.upload_bytes} bytes that were asked for"
            raise InvalidRequestError(words)
        await self._room(chunk.data.nbytes)
        await self._source.put(chunk.data)
        self._received_bytes += chunk.data.nbytes
        self._require_kept()
        return not self._source.is_closed

    def _open(self, upload: Upload) -> None:
        source = ChunkSource(self._budget)
        upload.intake.open(source)
        self.upload, self._source = upload, source
        self._begin(upload)

    def _require_kept(self) -> None:
        if self.upload is not None and self.upload.intake.error is not None:
            raise self.upload.intake.error

    async def _room(self, nbytes: int) -> None:
        give_up_at = time.monotonic() + self._idle_s
        while not self._budget.try_acquire(nbytes):
            if nbytes > self._budget.limit_bytes or time.monotonic() >= give_up_at:
                words = f"memory_bytes = {self._budget.limit_bytes} of buffers are in use; try again later"
                raise LimitError(words, limit="memory_bytes")
            self._require_kept()
            await asyncio.sleep(ROOM_EVERY_S)
