"""Receiving the layers of a stream into two buffers, on a thread, while the caller puts the layer before together."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Self

from kvstore.bounds import ByteBudget
from kvstore.errors import CorruptDataError, LimitError
from kvstore.wire.frames import LayerBytes
from kvstore.wire.v1 import kvstore_pb2 as pb

Message = pb.FetchReply | LayerBytes

BUFFERS = 2


class Receiver:
    """The bytes of layer after layer, `sizes` of them. One thread makes it and takes layers; `cancel` ends the stream.

    Buffers are used again: pages that were never touched before cost more than the bytes that go into them. They count
    against `budget`, and where it has room for one of them only, receiving and what the caller does take turns.
    """

    def __init__(
        self,
        messages: Iterator[Message],
        sizes: Sequence[int],
        budget: ByteBudget,
        cancel: Callable[[], object],
        patience_s: float,
    ) -> None:
        """LimitError when the largest layer finds no room in the budget within `patience_s`."""
        self._messages = messages
        self._sizes = sizes
        self._budget = budget
        self._cancel = cancel
        largest = max(sizes, default=0)
        count = BUFFERS if budget.try_acquire(BUFFERS * largest) else 1
        if count == 1 and not budget.acquire(largest, patience_s):
            raise LimitError(f"memory_bytes = {budget.limit_bytes} have no room for a layer of {largest} bytes")
        self._held_bytes = count * largest
        self._free: queue.SimpleQueue[bytearray | None] = queue.SimpleQueue()
        self._filled: queue.SimpleQueue[bytearray | BaseException] = queue.SimpleQueue()
        for _ in range(count):
            self._free.put(bytearray(largest))
        self._taken: bytearray | None = None
        self._thread = threading.Thread(target=self._run, name="kvstore-receive", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._cancel()
        self._free.put(None)
        self._thread.join()
        self._budget.release(self._held_bytes)

    def take(self, layer: int) -> memoryview:
        """The bytes of the next layer, good until the next is taken. Raises what receiving it raised."""
        if self._taken is not None:
            self._free.put(self._taken)
            self._taken = None
        filled = self._filled.get()
        if isinstance(filled, BaseException):
            raise filled
        self._taken = filled
        return memoryview(filled)[: self._sizes[layer]]

    def _run(self) -> None:
        try:
            for layer, nbytes in enumerate(self._sizes):
                buffer = self._free.get()
                if buffer is None:
                    return
                receive(self._messages, layer, memoryview(buffer)[:nbytes])
                self._filled.put(buffer)
            next(self._messages, None)  # a call that is cancelled before its end is no measure of anything
        except BaseException as error:  # noqa: BLE001  # handed to whoever takes the layer
            self._filled.put(error)


def receive(messages: Iterator[Message], layer: int, buffer: memoryview) -> None:
    """Fill the buffer with one layer's bytes. CorruptDataError when the stream has fewer, more, or another layer's."""
    received, nbytes = 0, buffer.nbytes
    while received < nbytes:
        message = next(messages, None)
        if message is None:
            raise CorruptDataError(f"the stream ended in layer {layer}, after {received} of {nbytes} bytes")
        if not isinstance(message, LayerBytes) or message.layer != layer or not message.data:
            raise CorruptDataError(f"the stream carries something else than layer {layer}")
        end = received + message.data.nbytes
        if end > nbytes:
            raise CorruptDataError(f"the stream carries more than the {nbytes} bytes of layer {layer}")
        buffer[received:end] = message.data
        received = end
