"""One running fetch: its caller, its deadlines, the time taken so far, and its layers as they are read and decoded."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from kvstore.blobs.protocol import RangeReader
from kvstore.blobs.ranges import FileReader, MemoryReader, Range
from kvstore.client.plan import Plan, layer_bytes
from kvstore.client.reads import FileReads
from kvstore.client.receiver import LayerReader, Message
from kvstore.client.results import Hit, Miss
from kvstore.codecs import device
from kvstore.codecs.assemble import begin_layer
from kvstore.codecs.byte_plan import layer_ranges
from kvstore.codecs.codec import BlockCorruptError, Context
from kvstore.codecs.states import begin_state, state_ranges
from kvstore.codecs.virtual import VirtualFile
from kvstore.core.breaker import Deadline
from kvstore.core.keys import Chain
from kvstore.core.layers import KVLayer, Layout, StateLayer
from kvstore.wire.v1 import kvstore_pb2 as pb

Layer: TypeAlias = KVLayer | StateLayer

# Layers that are decoded while the next one is read. If decoding is faster than reading, one is enough; if it is
# slower, waiting layers take memory.
DECODING_MAX = 2
# How many layers are read at a time, if they have at least `OVERLAPPED_BYTES_MIN`. Of smaller ones a file that hangs
# would only hold more threads.
OVERLAPPED = 2
OVERLAPPED_BYTES_MIN = 1 << 20


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


@dataclass(frozen=True)
class TimedReader(MemoryReader):
    """Wraps a reader, counts its bytes and time, and raises DeadlineError between two ranges after the deadline."""

    reader: RangeReader
    meter: Meter
    deadline: Deadline

    def readinto(self, source: int, offset: int, views: Sequence[memoryview]) -> None:
        """See `RangeReader.readinto`."""
        self.deadline.check()
        self.reader.readinto(source, offset, views)
        self.meter.read(sum(view.nbytes for view in views))

    def view(self, source: int, offset: int, nbytes: int) -> memoryview | None:
        """See `MemoryReader.view`; None of a file."""
        if not isinstance(self.reader, MemoryReader):
            return None
        self.deadline.check()
        view = self.reader.view(source, offset, nbytes)
        self.meter.read(nbytes if view is not None else 0)
        return view


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


@dataclass(frozen=True, slots=True)
class LayerReads:
    """The layers of one plan. Used by the fetching thread, which then owns them. All raise as `begin_layer`."""

    layout: Layout
    headroom_tokens: int
    attempt: Attempt
    plan: Plan

    def receive(self, index: int, messages: Iterator[Message]) -> Layer:
        """One layer of a stream, read as it arrives. CorruptDataError for a stream of anything else."""
        ranges = self._ranges(index)
        reader = LayerReader(messages, index, ranges)
        try:
            layer = self._finished(self._begin(index, reader, order=ranges))
        except BlockCorruptError:
            if reader.broken is not None:
                raise reader.broken from None
            raise
        reader.end()
        return layer

    def _ranges(self, index: int) -> list[Range]:
        """What a stream carries of a layer. CorruptDataError for far more bytes than its rows can take."""
        spec, plan = self.layout.layers[index], self.plan
        if spec.is_exact:
            return state_ranges(plan.state(index), plan.state_source)
        ranges = layer_ranges(plan.blocks, index)
        layer_bytes(plan.blocks, ranges, spec)
        return ranges

    def read(self, index: int, reader: RangeReader, reads: FileReads | None = None) -> Layer:
        """One layer. Without `reads` for as long as it takes."""
        return self._finished(self._begin(index, reader, reads))

    def overlapped(self, reader: FileReader, reads: FileReads) -> Generator[Layer, None, None]:
        """All layers in order; while one is awaited, the next one is read, if layers are large."""
        n_layers = len(self.layout.layers)
        ahead = OVERLAPPED - 1 if self.plan.nbytes >= OVERLAPPED_BYTES_MIN * n_layers else 0
        begun: deque[VirtualFile[Any]] = deque()
        try:
            for index in range(n_layers):
                begun.append(self._begin(index, reader, reads))
                if len(begun) > ahead:
                    yield self._finished(begun.popleft())
            while begun:
                yield self._finished(begun.popleft())
        finally:
            for one in begun:
                one.drop()

    def _begin(
        self, index: int, reader: RangeReader, reads: FileReads | None = None, order: Sequence[Range] = ()
    ) -> VirtualFile[Any]:
        attempt, plan = self.attempt, self.plan
        reader = TimedReader(reader, attempt.meter, attempt.deadline)
        if self.layout.layers[index].is_exact:
            return begin_state(self.layout, plan.state(index), plan.n_tokens, plan.state_source, reader, reads, order)
        return begin_layer(
            self.layout,
            index,
            plan.blocks,
            reader,
            self.headroom_tokens,
            keep_codes=attempt.caller.keep_codes,
            reads=reads,
            context=Context(aux=attempt.aux),
            order=order,
        )

    def _finished(self, read: VirtualFile[Any]) -> Layer:
        layer: Layer = read.finish()
        self.attempt.begin(layer)
        return layer


def _arrays_of(layer: Layer) -> list[Any]:
    return [*layer.keys, *layer.values] if isinstance(layer, KVLayer) else [array for _, array in layer.arrays]
