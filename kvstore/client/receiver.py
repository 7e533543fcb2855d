"""Receives the layers of a stream on a thread, one layer ahead of the one that the caller assembles."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Self

from kvstore.core.byte_budget import ByteBudget
from kvstore.errors import CorruptDataError, LimitError
from kvstore.wire.frames import Bytes, LayerBytes
from kvstore.wire.v1 import kvstore_pb2 as pb

Message = pb.FetchReply | LayerBytes

LAYERS_AHEAD = 2
# Smaller parts are joined, so that a sender of tiny messages cannot raise the overhead per byte.
PART_BYTES_MIN = 16 << 10


class Receiver:
    """The bytes of layer after layer, `sizes` of them. One thread makes it and takes layers; `cancel` ends the stream
    when the block ends before all of it is received.

    Messages are kept as gRPC hands them out: collecting a layer in one buffer first took 0.3 of a fetch. They count
    against `budget`, as two layers; where it has room for one only, receiving and what the caller does take turns.
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
        count = LAYERS_AHEAD if budget.try_acquire(LAYERS_AHEAD * largest) else 1
        if count == 1 and not budget.acquire(largest, patience_s):
            raise LimitError(f"memory_bytes = {budget.limit_bytes} have no room for a layer of {largest} bytes")
        self._held_bytes = count * largest
        self._room = threading.Semaphore(count)
        self._received: queue.SimpleQueue[list[Bytes] | BaseException] = queue.SimpleQueue()
        self._taken = self._left = self._whole = False
        self._thread = threading.Thread(target=self._run, name="kvstore-receive", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._left = True
        if not self._whole:
            self._cancel()
        self._room.release()
        self._thread.join()
        self._budget.release(self._held_bytes)

    def take(self) -> list[Bytes]:
        """The bytes of the next layer, in parts; those of the one before must be dropped by then.

        Raises what receiving it raised.
        """
        if self._taken:
            self._room.release()
        received = self._received.get()
        if isinstance(received, BaseException):
            raise received
        self._taken = True
        return received

    def _run(self) -> None:
        try:
            for layer, nbytes in enumerate(self._sizes):
                self._room.acquire()
                if self._left:
                    return
                received = receive(self._messages, layer, nbytes)
                self._whole = (
                    layer == len(self._sizes) - 1
                )  # before the layer is there to be taken, and the caller leaves
                self._received.put(received)
        except BaseException as error:  # noqa: BLE001  # raised again in the thread that takes the layer
            self._received.put(error)


def receive(messages: Iterator[Message], layer: int, nbytes: int) -> list[Bytes]:
    """One layer's bytes as they come. CorruptDataError when the stream has fewer, more, or another layer's."""
    parts: list[Bytes] = []
    received, joined = 0, None
    while received < nbytes:
        message = next(messages, None)
        if message is None:
            raise CorruptDataError(f"the stream ended in layer {layer}, after {received} of {nbytes} bytes")
        if not isinstance(message, LayerBytes) or message.layer != layer or not message.data:
            raise CorruptDataError(f"the stream carries something else than layer {layer}")
        received += message.data.nbytes
        if received > nbytes:
            raise CorruptDataError(f"the stream carries more than the {nbytes} bytes of layer {layer}")
        if message.data.nbytes >= PART_BYTES_MIN:
            parts.append(message.data)
            joined = None
            continue
        if joined is None:
            joined = bytearray()
            parts.append(joined)
        joined += message.data
    return parts
