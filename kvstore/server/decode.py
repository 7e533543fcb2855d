"""Decoding on the daemon's device, in pieces of one layer.

A whole layer of a long hit would hold up every other fetch, and take device memory for all of it. So blocks are taken a
few at a time: this thread reads and gathers, the lane only decodes, and while it does the next piece is being read. The
device never waits for the disk.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future

import numpy as np

from kvstore.codecs.assemble import HitBlock, assemble_layer, dense_bytes, layer_ranges
from kvstore.codecs.base import BlockCorruptError
from kvstore.codecs.device import Bytes
from kvstore.codecs.encode import PIECE_BYTES
from kvstore.errors import CorruptDataError
from kvstore.files import BufferReader, RangeReader
from kvstore.layers import PARTS, Layout
from kvstore.server.lane import Lane


def dense_layer(
    lane: Lane,
    layout: Layout,
    layer: int,
    blocks: Sequence[HitBlock],
    reader: RangeReader,
    decoded: Callable[[int, float], None],
) -> list[memoryview]:
    """One decoded kv layer, as bytes in the order of `layer_ranges` over `dense_runs`. Blocks this thread.

    `decoded(nbytes, seconds)` is told of every piece. Raises BlockCorruptError, LimitError, UnavailableError.
    """
    spec, n_tokens = layout.layers[layer], sum(block.take for block in blocks)
    tensors = [tensor for part in PARTS if spec.part(part).width for tensor in spec.part(part).tensors()]
    out = [np.empty((t.heads, n_tokens, t.layer_bytes(1) // t.heads), np.uint8) for t in tensors]
    row = 0
    waiting: Future[list[Bytes]] | None = None
    for first, group in pieces(blocks, layout.layer_token_bytes(layer)):
        work = functools.partial(_decode, layout, layer, group, first, _gathered(layer, group, first, reader), decoded)
        row += 0 if waiting is None else _place(out, waiting.result(), row)
        waiting = lane.submit_fetch(work)
    if waiting is not None:
        _place(out, waiting.result(), row)
    return [rows.data.cast("B") for rows in out]


def pieces(blocks: Sequence[HitBlock], token_bytes: int) -> Iterator[tuple[int, list[HitBlock]]]:
    """(number of the first, blocks) of consecutive blocks that decode to about PIECE_BYTES, at least one each."""
    first, rows = 0, 0
    for index, block in enumerate(blocks):
        if rows and (rows + block.take) * token_bytes > PIECE_BYTES:
            yield first, list(blocks[first:index])
            first, rows = index, 0
        rows += block.take
    if rows:
        yield first, list(blocks[first:])


def _gathered(layer: int, group: Sequence[HitBlock], first: int, reader: RangeReader) -> BufferReader:
    """The stored bytes of the layer in these blocks, read."""
    ranges = layer_ranges(group, layer)
    buffer = memoryview(bytearray(sum(span.nbytes for span in ranges)))
    at = 0
    for source, offset, nbytes in ranges:
        try:
            reader.readinto(first + source, offset, [buffer[at : at + nbytes]])
        except CorruptDataError as error:
            raise BlockCorruptError(str(error), first + source) from error
        at += nbytes
    return BufferReader(buffer, ranges)


def _decode(
    layout: Layout,
    layer: int,
    group: Sequence[HitBlock],
    first: int,
    reader: BufferReader,
    decoded: Callable[[int, float], None],
) -> list[Bytes]:
    """One piece, on the lane: `[heads, rows, row_bytes]` of each tensor."""
    started = time.monotonic()
    try:
        views = dense_bytes(assemble_layer(layout, layer, group, reader, headroom_tokens=0))
    except BlockCorruptError as error:
        raise BlockCorruptError(str(error), first + error.source) from error
    decoded(sum(view.nbytes for view in views), time.monotonic() - started)
    return [np.frombuffer(view, np.uint8) for view in views]


def _place(out: Sequence[Bytes], piece: Sequence[Bytes], row: int) -> int:
    """Copy a piece to its rows of all tensors; how many rows it has."""
    rows = 0
    for whole, part in zip(out, piece, strict=True):
        rows = part.size // (whole.shape[0] * whole.shape[2])
        whole[:, row : row + rows] = part.reshape(whole.shape[0], rows, whole.shape[2])
    return rows
