"""Taking in the chunks of an upload: what arrives while a worker thread writes is the next batch that it writes.

Memory: two batches an upload, counted. A worker that sends faster than the disk takes it finds its stream held up.
"""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from kvstore.core.byte_budget import ByteBudget
from kvstore.errors import DeadlineError, InvalidRequestError, LimitError
from kvstore.server.stream_out import BATCH_BYTES
from kvstore.server.uploads import Upload, Uploads
from kvstore.wire.frames import UploadBytes

# How often a full budget is looked at again. Nobody can be woken: it is given back on other threads.
ROOM_EVERY_S = 0.01


class Intake:
    """Receives one upload. Made and used on the event loop; `run(work, *args)` does `work` on a worker thread."""

    def __init__(self, uploads: Uploads, run: Callable[..., Awaitable[Any]], budget: ByteBudget, idle_s: float) -> None:
        self._uploads = uploads
        self._run = run
        self._budget = budget
        self._idle_s = idle_s
        self._batch: list[memoryview] = []
        self._batch_bytes = 0
        self._writing: asyncio.Future[None] | None = None
        self.upload: Upload | None = None

    async def receive(self, chunks: AsyncIterator[UploadBytes]) -> int:
        """Take in all chunks; how many bytes that was.

        Raises InvalidRequestError, NotFoundError, StoreFullError; DeadlineError when nothing comes for `idle_s`,
        LimitError when memory_bytes stay in use for so long.
        """
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(self._idle_s) as patience:
                async for chunk in chunks:
                    patience.reschedule(None)
                    await self._take(chunk)
                    patience.reschedule(loop.time() + self._idle_s)
        except TimeoutError as error:
            raise DeadlineError(f"nothing came of the upload for {self._idle_s:g} s") from error
        if self.upload is None or self.upload.staging is None:
            raise InvalidRequestError("an upload names its upload_id in the first chunk")
        await self._write()
        await self._written()
        received = self.upload.staging.received_bytes
        if received != self.upload.upload_bytes:
            raise InvalidRequestError(f"the upload has {received} bytes, {self.upload.upload_bytes} were asked for")
        return received

    async def _take(self, chunk: UploadBytes) -> None:
        if self.upload is None:
            self.upload = self._uploads.get(chunk.upload_id)
        if self.upload.staging is None or self.upload.committing:
            raise InvalidRequestError("this upload takes no bytes")
        await self._room(chunk.data.nbytes)
        self._batch.append(chunk.data)
        self._batch_bytes += chunk.data.nbytes
        idle = self._writing is None or self._writing.done()
        if idle or self._batch_bytes >= BATCH_BYTES:
            await self._write()

    async def _room(self, nbytes: int) -> None:
        give_up_at = time.monotonic() + self._idle_s
        while not self._budget.try_acquire(nbytes):
            if nbytes > self._budget.limit_bytes or time.monotonic() >= give_up_at:
                words = f"memory_bytes = {self._budget.limit_bytes} of buffers are in use; try again later"
                raise LimitError(words, limit="memory_bytes")
            await self._write()  # what this upload holds itself
            await asyncio.sleep(ROOM_EVERY_S)

    async def _write(self) -> None:
        """Have the batch written, when the one before it is."""
        await self._written()
        batch, nbytes = self._batch, self._batch_bytes
        self._batch, self._batch_bytes = [], 0
        if batch and self.upload is not None and self.upload.staging is not None:
            self._writing = asyncio.ensure_future(self._run(self.upload.staging.append, batch))
            self._writing.add_done_callback(functools.partial(self._ended, nbytes))

    def _ended(self, nbytes: int, writing: asyncio.Future[None]) -> None:
        self._budget.release(nbytes)
        if not writing.cancelled():
            writing.exception()  # whoever waits hears of it; after a cancelled call nobody does

    async def _written(self) -> None:
        writing, self._writing = self._writing, None
        if writing is not None:
            await asyncio.shield(writing)

    def close(self) -> None:
        """Give back what was not written any more."""
        self._budget.release(self._batch_bytes)
        self._batch, self._batch_bytes = [], 0
