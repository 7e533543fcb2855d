"""Reads the bytes of segments: reads, verifies and unpacks them, and writes the rows to their destination.

Each byte range of a file is read directly into its destination with one read call; one in memory is verified there,
then copied. Rejected: reading small ranges (the scales and
biases of 8-bit KV, four of the six ranges that a layer has in a block) for eight layers at once and copying them. That
needs an eighth of the calls, but took exactly as long.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from kvstore.blobs.protocol import RangeReader
from kvstore.blobs.ranges import MemoryReader
from kvstore.codecs.byte_plan import Segment, Span
from kvstore.codecs.codec import BlockCorruptError, ByteCodec, verify_range
from kvstore.codecs.device import Bytes
from kvstore.core.blocks import ITEM_BYTES, Tensor
from kvstore.errors import CorruptDataError


class _Place(NamedTuple):
    """Where tensor `number` of a segment goes: `rows` [heads, capacity, row_bytes] of bytes, and the same by head."""

    tensor: Tensor
    number: int
    rows: Bytes
    heads: list[memoryview]


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
        rows = np.frombuffer(view, np.uint8).reshape(tensor.heads, capacity, tensor.row_bytes)
        nbytes = capacity * tensor.row_bytes
        heads = [view[head * nbytes : (head + 1) * nbytes] for head in range(tensor.heads)]
        place = _Place(tensor, index, rows, heads)
        for span in segment.spans:
            self._fill_span(place, span)
            yield
        rows[:, tensor.rows(segment.held) :] = 0

    def _fill_span(self, place: _Place, span: Span) -> None:
        """Read the rows of one span. Unused rows of it are read and verified too."""
        if span.packer is None:
            self._read_rows(place, span)
            return
        tensor = place.tensor
        at, first, last = tensor.rows(span.at), tensor.rows(span.first), tensor.rows(span.last)
        rows = self._unpacked(tensor, span, span.packer, span.stack.tensors[place.number])
        place.rows[:, at : at + last - first] = rows[:, first:last]

    def _unpacked(self, tensor: Tensor, span: Span, packer: ByteCodec, stored: Tensor) -> Bytes:
        """Read, verify and unpack one layer's packed bytes of a tensor: `[heads, rows, row_bytes]`."""
        packed = self._view(span, stored)
        if packed is None:
            packed = memoryview(bytearray(stored.layer_range(span.position, span.n_tokens)[1]))
            self._read(span, stored, [packed])
        try:
            shape = tensor.heads, tensor.rows(span.n_tokens), tensor.row_bytes
            return packer.unpack(packed, shape, ITEM_BYTES[tensor.dtype])
        except CorruptDataError as error:
            raise BlockCorruptError(f"block {span.source}: {error}", span.source) from error

    def _read_rows(self, place: _Place, span: Span) -> None:
        """Copy one stored range from memory, or read it straight into its place.

        Of a file the rows that are not used go to scratch.
        """
        tensor, stored = place.tensor, span.stack.tensors[place.number]
        at, first, last = tensor.rows(span.at), tensor.rows(span.first), tensor.rows(span.last)
        arrived = self._view(span, stored)
        if arrived is not None:
            rows = np.frombuffer(arrived, np.uint8).reshape(tensor.heads, tensor.rows(span.n_tokens), tensor.row_bytes)
            place.rows[:, at : at + last - first] = rows[:, first:last]
            return
        row = tensor.row_bytes
        skip, shown = first * row, (last - first) * row
        rest = (tensor.rows(span.n_tokens) - last) * row
        views = [head[at * row : at * row + shown] for head in place.heads]
        if skip or rest:
            scratch = memoryview(bytearray((skip + rest) * len(views)))
            parts: list[memoryview] = []
            for number, head in enumerate(views):
                unused = scratch[number * (skip + rest) : (number + 1) * (skip + rest)]
                parts += (part for part in (unused[:skip], head, unused[skip:]) if part.nbytes)
            views = parts
        self._read(span, stored, views)

    def _view(self, span: Span, stored: Tensor) -> memoryview | None:
        """The stored range where it lies in memory, verified there: one call each hashes and copies it."""
        if not isinstance(self.reader, MemoryReader):
            return None
        with _of_block(span.source):
            view = self.reader.view(span.source, *stored.layer_range(span.position, span.n_tokens))
        if view is not None and self.verify:
            verify_range([view], stored.checksum(span.position), span.source)
        return view

    def _read(self, span: Span, stored: Tensor, views: list[memoryview]) -> None:
        with _of_block(span.source):
            self.reader.readinto(span.source, stored.layer_range(span.position, span.n_tokens)[0], views)
        if self.verify:
            verify_range(views, stored.checksum(span.position), span.source)


@contextmanager
def _of_block(source: int) -> Iterator[None]:
    """CorruptDataError of reading becomes that block's."""
    try:
        yield
    except BlockCorruptError:
        raise
    except CorruptDataError as error:
        raise BlockCorruptError(str(error), source) from error
