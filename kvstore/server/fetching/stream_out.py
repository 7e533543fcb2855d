"""Sends the frames of a fetch: reads ahead on worker threads, at the pace of the receiving client.

A stream holds two batches, the one being sent and the next; the maker of the frames counts them. A client that stops
reading holds them until its call is cancelled for that (`PacedContext` in `kvstore/server/calls/call_limits.py`); one
that goes away, until the batch in the making is done.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Generator

from kvstore.server.calls.rpc_errors import Context

# Frames that one hop to a thread brings: with one frame a hop, hops took as long as sending.
BATCH_BYTES = 4 << 20
BATCHES_MAX = 2

Frames = Generator[bytes, None, None]


class Sender:
    """Sends the frames of one generator. Made and used on the event loop.

    `run(work, *args)` does `work` on a worker thread. The generator runs there, never on two threads at once, and is
    closed there whatever happens: that is when its files and buffers are free.
    """

    def __init__(self, frames: Frames, run: Callable[..., Awaitable[list[bytes]]]) -> None:
        self._frames = frames
        self._run = run
        self._ahead = self._read()
        self.sent_bytes = 0

    def _read(self) -> asyncio.Future[list[bytes]]:
        return asyncio.ensure_future(self._run(take_batch, self._frames))

    async def send(self, context: Context) -> None:
        """Write every frame. Raises whatever the generator raises."""
        while batch := await asyncio.shield(self._ahead):
            self._ahead = self._read()
            for frame in batch:
                await context.write(frame)
                self.sent_bytes += len(frame)

    async def close(self) -> None:
        """Return when the generator is closed."""
        await asyncio.wait([self._ahead])
        if not self._ahead.cancelled():
            self._ahead.exception()  # the sender was told, or has gone
        await self._run(close_frames, self._frames)


def take_batch(frames: Frames) -> list[bytes]:
    """The next frames, about BATCH_BYTES of them; none when it is at its end."""
    batch: list[bytes] = []
    nbytes = 0
    for frame in frames:
        batch.append(frame)
        nbytes += len(frame)
        if nbytes >= BATCH_BYTES:
            break
    return batch


def close_frames(frames: Frames) -> list[bytes]:
    """End the generator."""
    frames.close()
    return []
