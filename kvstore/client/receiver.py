"""Reads the layers of a stream from its messages, each range when it is asked for, in the order of the stream."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np

from kvstore.blobs.ranges import MemoryReader, Range
from kvstore.core.byte_budget import ByteBudget
from kvstore.errors import CorruptDataError, LimitError
from kvstore.wire.frames import CHUNK_BYTES, LayerBytes
from kvstore.wire.v1 import kvstore_pb2 as pb

Message = pb.FetchReply | LayerBytes

# The message that is read, and the next one on its way through gRPC.
STREAM_BYTES = 2 * CHUNK_BYTES
_NOTHING = memoryview(b"")


@contextmanager
def counted(budget: ByteBudget, patience_s: float) -> Iterator[None]:
    """Count the messages of one stream. LimitError when they find no room in the budget within `patience_s`."""
    if not budget.acquire(STREAM_BYTES, patience_s):
        raise LimitError(f"memory_bytes = {budget.limit_bytes} have no room for a stream's {STREAM_BYTES} bytes")
    try:
        yield
    finally:
        budget.release(STREAM_BYTES)


class LayerReader(MemoryReader):
    """Reads one layer of a stream: gives its `ranges` once each, in their order. The fetching thread's.

    One message is held at a time, as gRPC hands it out. `broken` is the error of the stream itself, which says nothing
    about the blocks: none of them is reported as corrupt.
    """

    def __init__(self, messages: Iterator[Message], layer: int, ranges: Sequence[Range]) -> None:
        self._messages = messages
        self._layer = layer
        self._due = deque(ranges)
        self._arrived = _NOTHING
        self.broken: CorruptDataError | None = None

    def view(self, source: int, offset: int, nbytes: int) -> memoryview | None:
        """See `MemoryReader.view`. CorruptDataError as `readinto`; None where the range goes on in the next message."""
        self._receive()
        if self._arrived.nbytes < nbytes:
            return None
        self._begin(Range(source, offset, nbytes))
        return self._taken(nbytes)

    def readinto(self, source: int, offset: int, views: Sequence[memoryview]) -> None:
        """See `RangeReader.readinto`. CorruptDataError when the stream has fewer bytes, or another layer's."""
        self._begin(Range(source, offset, sum(view.nbytes for view in views)))
        for target in views:
            while target.nbytes:
                self._receive()
                part = self._taken(min(target.nbytes, self._arrived.nbytes))
                np.copyto(np.frombuffer(target[: part.nbytes], np.uint8), np.frombuffer(part, np.uint8))
                target = target[part.nbytes :]

    def end(self) -> None:
        """CorruptDataError unless every range was read, and nothing came with the last one."""
        if self._due or self._arrived.nbytes:
            raise self._break(f"the stream carries something else than the ranges of layer {self._layer}")

    def _begin(self, asked: Range) -> None:
        due = self._due.popleft() if self._due else None
        if asked != due:
            raise self._break(f"the stream of layer {self._layer} goes on with {due}, not with {asked}")

    def _receive(self) -> None:
        """Wait for the next message unless there is something left of this one."""
        if self._arrived.nbytes:
            return
        self._arrived = _NOTHING  # the memory of the message is free for the next one
        message = next(self._messages, None)
        if message is None:
            raise self._break(f"the stream ended in layer {self._layer}")
        if not isinstance(message, LayerBytes) or message.layer != self._layer or not message.data:
            raise self._break(f"the stream carries something else than layer {self._layer}")
        self._arrived = message.data

    def _taken(self, nbytes: int) -> memoryview:
        taken, self._arrived = self._arrived[:nbytes], self._arrived[nbytes:]
        return taken

    def _break(self, what: str) -> CorruptDataError:
        self.broken = CorruptDataError(what)
        return self.broken
