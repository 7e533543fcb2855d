"""Reads the bytes of segments: reads, verifies and unpacks them, and writes the rows to their destination.

Each byte range of a file is read directly into its destination with one read call; one in memory is verified there,
then copied. Rejected: reading small ranges (the scales and biases of 8-bit KV, four of the six ranges that a layer has
in a block) for eight layers at once and copying them. That needs an eighth of the calls, but took exactly as long.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from kvstore.blobs.protocol import RangeReader
from kvstore.blobs.ranges import MemoryReader
from kvstore.codecs.byte_plan import Segment, Span
from kvstore.codecs.codec import BlockCorruptError, ByteCodec, verify_range
from kvstore.codecs.device import Bytes
from kvstore.core.blocks import ITEM_BYTES, Tensor
from kvstore.core.fresh_pages import address_of, populate
from kvstore.errors import CorruptDataError

# Pages of fresh memory are mapped for so much at a time: little enough that what the kernel clears is still in the
# processor's cache when it is filled, and enough calls saved. 1 and 4 MiB took a little more processor time.
MAPPED_BYTES = 2 << 20


class _Place:
    """Where tensor `number` of a segment goes: `rows` [heads, capacity, row_bytes] of `view`. Its filling thread's."""

    def __init__(self, tensor: Tensor, number: int, capacity: int, view: memoryview) -> None:
        self.tensor = tensor
        self.number = number
        self.rows = np.frombuffer(view, np.uint8).reshape(tensor.heads, capacity, tensor.row_bytes)
        self._view = view
        self._capacity = capacity
        self._heads = range(0, view.nbytes, capacity * tensor.row_bytes)
        self._address = address_of(view)
        self._mapped = 0

    def map(self, last: int) -> None:
        """Have the pages of the rows before `last` mapped, and of some more."""
        if last <= self._mapped:
            return
        row, first = self.tensor.row_bytes, self._mapped
        ahead = first + MAPPED_BYTES // (row * len(self._heads))
        self._mapped = min(self._capacity, max(last, ahead))
        populate(self._address, [head + first * row for head in self._heads], (self._mapped - first) * row)

    def views(self, first: int, last: int) -> list[memoryview]:
        """These rows of each head."""
        view, start, end = self._view, first * self.tensor.row_bytes, last * self.tensor.row_bytes
        return [view[head + start : head + end] for head in self._heads]


@dataclass(frozen=True, slots=True)
class Filler:
    """Fills tensors of a virtual file with the rows of their segments."""

    reader: RangeReader
    verify: bool = True

    def fill(self, segment: Segment, index: int, capacity: int, view: memoryview) -> Iterator[None]:
        """Tensor `index` of a segment as `[1, heads, capacity, width]`; rows beyond the segment's are zero.

        One stored range a step; the rest after the last.
        """
        tensor = segment.tensors[index]
        place = _Place(tensor, index, capacity, view)
        for span in segment.spans:
            place.map(tensor.rows(span.at + span.last - span.first))
            self._fill_span(place, span)
            yield
        place.map(capacity)
        place.rows[:, tensor.rows(segment.held) :] = 0

    def _fill_span(self, place: _Place, span: Span) -> None:
        """Copy the rows of one span out of memory, or read them straight into their place.

        Unused rows of it are read and verified too: of a file they go to scratch.
        """
        tensor, stored = place.tensor, span.stack.tensors[place.number]
        at, first, last = tensor.rows(span.at), tensor.rows(span.first), tensor.rows(span.last)
        shape = tensor.heads, tensor.rows(span.n_tokens), tensor.row_bytes
        arrived = self._view(span, stored)
        if span.packer is not None:
            rows = self._unpacked(span, span.packer, stored, arrived, shape)
        elif arrived is not None:
            rows = np.frombuffer(arrived, np.uint8).reshape(shape)
        else:
            row, views = tensor.row_bytes, place.views(at, at + last - first)
            self._read(span, stored, _with_scratch(views, first * row, (shape[1] - last) * row))
            return
        place.rows[:, at : at + last - first] = rows[:, first:last]

    def _unpacked(
        self, span: Span, packer: ByteCodec, stored: Tensor, packed: memoryview | None, shape: tuple[int, int, int]
    ) -> Bytes:
        """Unpack one layer's bytes of a tensor, which are read and verified if they are not in memory."""
        if packed is None:
            packed = memoryview(bytearray(stored.layer_range(span.position, span.n_tokens)[1]))
            self._read(span, stored, [packed])
        try:
            return packer.unpack(packed, shape, ITEM_BYTES[stored.dtype])
        except CorruptDataError as error:
            raise BlockCorruptError(f"block {span.source}: {error}", span.source) from error

    def _view(self, span: Span, stored: Tensor) -> memoryview | None:
        """The stored range where it lies in memory, verified there: one call each hashes and copies it."""
        if not isinstance(self.reader, MemoryReader):
            return None
        try:
            view = self.reader.view(span.source, *stored.layer_range(span.position, span.n_tokens))
        except BlockCorruptError:
            raise
        except CorruptDataError as error:
            raise BlockCorruptError(str(error), span.source) from error
        if view is not None and self.verify:
            verify_range([view], stored.checksum(span.position), span.source)
        return view

    def _read(self, span: Span, stored: Tensor, views: list[memoryview]) -> None:
        try:
            self.reader.readinto(span.source, stored.layer_range(span.position, span.n_tokens)[0], views)
        except BlockCorruptError:
            raise
        except CorruptDataError as error:
            raise BlockCorruptError(str(error), span.source) from error
        if self.verify:
            verify_range(views, stored.checksum(span.position), span.source)


def _with_scratch(views: list[memoryview], before: int, behind: int) -> list[memoryview]:
    """The views, each between scratch buffers of `before` and `behind` bytes."""
    if not before + behind:
        return views
    scratch = memoryview(bytearray((before + behind) * len(views)))
    parts: list[memoryview] = []
    for number, view in enumerate(views):
        unused = scratch[number * (before + behind) : (number + 1) * (before + behind)]
        parts += (part for part in (unused[:before], view, unused[before:]) if part.nbytes)
    return parts
