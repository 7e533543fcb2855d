"""The layers of a plan, read and assembled for one fetch: one at a time, or the next one while one is awaited."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from kvstore.blobs.protocol import RangeReader
from kvstore.blobs.ranges import FileReader, Range
from kvstore.client.attempt import Attempt, Layer, TimedReader
from kvstore.client.plan import Plan, layer_bytes
from kvstore.client.reads import FileReads
from kvstore.client.receiver import LayerReader, Message
from kvstore.codecs.assemble import begin_layer
from kvstore.codecs.byte_plan import layer_ranges
from kvstore.codecs.codec import BlockCorruptError, Context
from kvstore.codecs.states import begin_state, state_ranges
from kvstore.codecs.virtual import LayerRead
from kvstore.core.layers import Layout

# How many layers are read at a time, if they have at least `OVERLAPPED_BYTES_MIN`. Of smaller ones a file that hangs
# would only hold more threads.
OVERLAPPED = 2
OVERLAPPED_BYTES_MIN = 1 << 20


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
        begun: deque[LayerRead[Any]] = deque()
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
    ) -> LayerRead[Any]:
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

    def _finished(self, read: LayerRead[Any]) -> Layer:
        layer: Layer = read.finish()
        self.attempt.begin(layer)
        return layer
