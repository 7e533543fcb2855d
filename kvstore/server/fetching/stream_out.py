"""Sends the frames of a fetch: reads ahead on worker threads, at the pace of the receiving client.

A stream holds two batches, the one being sent and the next; the maker of the frames counts them. A client that stops
reading holds them for `stall_s` and no longer; one that goes away, until the batch in the making is done.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Generator
from typing import Any

from kvstore.errors import DeadlineError
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

    def __init__(self, frames: Frames, run: Callable[..., Awaitable[list[bytes]]], stall_s: float) -> None:
        self._frames = frames
        self._run = run
        self._stall_s = stall_s
        self._ahead = self._read()
        self.sent_bytes = 0

    def _read(self) -> asyncio.Future[list[bytes]]:
        return asyncio.ensure_future(self._run(take_batch, self._frames))

    async def send(self, context: Context) -> None:
        """Write every frame. DeadlineError when one is not taken within `stall_s`; whatever the generator raises."""
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(None) as patience:
                while batch := await asyncio.shield(self._ahead):
                    self._ahead = self._read()
                    for frame in batch:
                        patience.reschedule(loop.time() + self._stall_s)
                        await context.write(frame)
                        self.sent_bytes += len(frame)
                    patience.reschedule(None)
        except TimeoutError as error:
            raise DeadlineError(f"the worker took nothing for {self._stall_s:g} s") from error

    async def close(self) -> None:
        """Return when the generator is closed."""
        await asyncio.wait([self._ahead])
        if not self._ahead.cancelled():
            self._ahead.exception()  # the sender was told, or has gone
        await self._run(close_frames, self._frames)


async def write_within(context: Context, message: Any, stall_s: float) -> None:
    """Write one message. DeadlineError when it is not taken within `stall_s`."""
    try:
        async with asyncio.timeout(stall_s):
            await context.write(message)
    except TimeoutError as error:
        raise DeadlineError(f"the worker took nothing for {stall_s:g} s") from error


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
