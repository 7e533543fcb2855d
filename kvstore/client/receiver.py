"""Reads the layers of a stream from its messages, each range when it is asked for, in the order of the stream.

The next message is received meanwhile, on a thread that ends with the stream.
"""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Self

import numpy as np

from kvstore.blobs.ranges import MemoryReader, Range
from kvstore.core.byte_budget import ByteBudget
from kvstore.errors import CorruptDataError, LimitError
from kvstore.wire.frames import CHUNK_BYTES, LayerBytes
from kvstore.wire.v1 import kvstore_pb2 as pb

Message = pb.FetchReply | LayerBytes

# Messages that are received before they are asked for. Two are no faster.
AHEAD_MAX = 1
# Below this a thread costs more than it gains.
AHEAD_BYTES_MIN = 4 << 20
# The message that is read, and the next one: it has arrived or is on its way through gRPC.
STREAM_BYTES = (1 + AHEAD_MAX) * CHUNK_BYTES
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


class ReadAhead:
    """Receives the messages of one stream while earlier ones are read: at most AHEAD_MAX, in their order.

    gRPC hands out one message at a time, and begins with the next when that is asked for. So without this, copying and
    hashing a message and receiving the next one take turns. Iterated, entered and left by the fetching thread. From
    entering to leaving `messages` belong to a thread of its own, until `nbytes` of data have come; what comes after
    them is received when it is asked for. A `with` block that ends before, for whatever reason, cancels the call and
    waits for the thread, which has nothing to wait for then.
    """

    def __init__(self, messages: Iterator[Message], nbytes: int, cancel: Callable[[], object]) -> None:
        """Whatever `messages` raise is raised in their place. `cancel` ends a wait for the next of them."""
        self._messages = messages
        self._left_bytes = nbytes
        self._cancel = cancel
        self._room: queue.SimpleQueue[bool] = queue.SimpleQueue()  # an item for each message that may be received
        self._arrived: queue.SimpleQueue[Message | BaseException | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._closed = False

    def __enter__(self) -> Self:
        if self._left_bytes >= AHEAD_BYTES_MIN:
            for _ in range(AHEAD_MAX):
                self._room.put(True)
            thread = threading.Thread(target=self._receive, name="kvstore-receive", daemon=True)
            with suppress(RuntimeError):  # no thread can start: receiving and reading take turns
                thread.start()
                self._thread = thread
        return self

    def __exit__(self, *_: object) -> None:
        if self._thread is None:
            return
        if self._left_bytes > 0:  # counted before a message is handed over: never so when all of them were read
            self._closed = True
            self._cancel()
            self._room.put(True)
        self._join()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Message:
        if self._thread is not None:
            arrived = self._arrived.get()
            if isinstance(arrived, BaseException):
                self._join()
                raise arrived
            if arrived is not None:
                self._room.put(True)
                return arrived
            self._join()
        return next(self._messages)

    def _join(self) -> None:
        assert self._thread is not None
        self._thread.join()
        self._thread = None
        self._arrived = queue.SimpleQueue()  # an error that is handled later would hold what was not read

    def _receive(self) -> None:
        """Hand over messages until all data have come, and then None; or the error that ended them."""
        try:
            while self._left_bytes > 0 and self._room.get() and not self._closed:
                message = next(self._messages, None)
                if message is None:
                    break
                if isinstance(message, LayerBytes):
                    self._left_bytes -= message.data.nbytes
                self._arrived.put(message)
                del message  # it is the reader's now
            self._arrived.put(None)
        except BaseException as error:  # noqa: BLE001  # raised in the thread that waits
            self._arrived.put(error)


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
