"""One running fetch: its caller, its deadlines, what it took so far, and its layers decoded as they are read."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from kvstore.client.results import Hit, Miss
from kvstore.codecs import device
from kvstore.core.breaker import Deadline
from kvstore.core.keys import Chain
from kvstore.core.layers import KVLayer, StateLayer
from kvstore.wire.v1 import kvstore_pb2 as pb

Layer: TypeAlias = KVLayer | StateLayer

# Layers that are decoded while the next one is read. If decoding is faster than reading, one is enough; if it is
# slower, waiting layers take memory.
DECODING_MAX = 2


class Meter:
    """Bytes and seconds of one fetch. The fetching thread owns it; `read` may be called by any."""

    def __init__(self) -> None:
        self._started_s = time.monotonic()
        self._lock = threading.Lock()
        self._read_bytes = 0
        self._decoded_bytes = 0
        self._decode_s = 0.0

    def read(self, nbytes: int) -> None:
        """Count bytes that were read."""
        with self._lock:
            self._read_bytes += nbytes

    def decoded(self, nbytes: int, seconds: float) -> None:
        """Count a layer that was evaluated."""
        self._decoded_bytes += nbytes
        self._decode_s += seconds

    def report(
        self, fetch_id: str, planned_tokens: int, answer: Hit | Miss, *, by_path: bool, again: bool = False
    ) -> pb.ReportRequest:
        """The fetch as a message: what it took, and what it gave where that is not what was planned.

        Of a stream the daemon has measured the reading itself. `again`: another call for the same request follows.
        """
        timing = pb.FetchTiming(fetch_id=fetch_id, decoded_bytes=self._decoded_bytes, decode_s=self._decode_s)
        if by_path:
            timing.read_bytes = self._read_bytes
            timing.read_s = max(0.0, time.monotonic() - self._started_s - self._decode_s)
        if answer.n_tokens != planned_tokens:
            timing.got_tokens, timing.reason, timing.again = answer.n_tokens, answer.reason.value, again
        return pb.ReportRequest(timing=timing)


@dataclass(frozen=True, slots=True)
class Caller:
    """What a caller states: its speed (0: unknown), leading tokens that it holds already, whether it wants every
    layer evaluated, so that the arrays may be viewed on any thread, and whether it attends to quantized layers.
    `request_id` names what it asks in the logs of both ends."""

    prefill_tokens_per_s: float = 0.0
    covered_tokens: int = 0
    evaluate: bool = False
    keep_codes: bool = False
    request_id: str = ""


@dataclass(frozen=True, slots=True)
class Attempt:
    """One fetch: its tokens, its time limits, who asks, what it took so far, and what its recipes refer to. Of the
    thread that fetches.

    For a caller that wants them evaluated, layers are decoded while the next ones are read: of 1 GiB of 8-bit KV on a
    CPU that takes 0.75 of the time that one after the other does. For others decoding stays lazy.
    """

    chain: Chain
    stall_s: float
    deadline: Deadline
    started: float
    caller: Caller
    meter: Meter = field(default_factory=Meter)
    aux: Mapping[bytes, bytes] = field(default_factory=dict)

    def begin(self, layer: Layer) -> None:
        """Have a layer decoded that has been read, if the caller wants that. DeadlineError when time is over."""
        if self.caller.evaluate:
            self._decode(device.begin, layer, nbytes=0)
        self.deadline.check()

    def decoded(self, layers: Generator[Layer, None, None]) -> Iterator[Layer]:
        """Yields layers. If the caller wants them evaluated, each is computed while the next ones are read.

        Raises DeadlineError at the deadline. Reading ends when the iteration ends, for whatever reason.
        """
        begun: deque[Layer] = deque()
        try:
            for layer in layers:
                begun.append(layer)
                if len(begun) > DECODING_MAX:
                    yield self._evaluated(begun.popleft())
            while begun:
                yield self._evaluated(begun.popleft())
        finally:
            layers.close()

    def _evaluated(self, layer: Layer) -> Layer:
        if self.caller.evaluate:
            self._decode(device.evaluate, layer, nbytes=sum(array.nbytes for array in _arrays_of(layer)))
            self.deadline.check()
        return layer

    def _decode(self, work: Callable[[list[Any]], None], layer: Layer, nbytes: int) -> None:
        """Work on the device; what it holds up this thread counts as decoding. Beginning does, too, behind others."""
        started = time.monotonic()
        work(_arrays_of(layer))
        self.meter.decoded(nbytes, time.monotonic() - started)


def _arrays_of(layer: Layer) -> list[Any]:
    return [*layer.keys, *layer.values] if isinstance(layer, KVLayer) else [array for _, array in layer.arrays]
