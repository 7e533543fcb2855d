"""Decodes layers on the daemon's device, a few blocks at a time.

Decoding a whole layer of a long hit at once would delay every other fetch and need device memory for the full layer.
The calling thread reads and gathers the next piece while the lane decodes the current one, so the device never waits
for the disk.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from typing import TypeAlias

from kvstore.blobs.protocol import RangeReader
from kvstore.blobs.ranges import BufferReader
from kvstore.codecs.assemble import assemble_layer, dense_bytes
from kvstore.codecs.byte_plan import HitBlock, layer_ranges
from kvstore.codecs.codec import NO_CONTEXT, BlockCorruptError, Context
from kvstore.codecs.encode import PIECE_BYTES
from kvstore.core.blocks import BLOCK_TOKENS
from kvstore.core.layers import Layout
from kvstore.errors import CorruptDataError

Submit: TypeAlias = Callable[[Callable[[], list[memoryview]]], Future[list[memoryview]]]


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


def decode_piece(
    submit: Submit,
    layout: Layout,
    layer: int,
    group: Sequence[HitBlock],
    first: int,
    reader: RangeReader,
    decoded: Callable[[int, float], None],
    aux: Mapping[bytes, bytes] = NO_CONTEXT.aux,
    start: int | None = None,
) -> Future[list[memoryview]]:
    """Read some blocks of a kv layer and have them decoded; `submit` queues a piece of work on the lane.

    `first`: the number of the first of them in the hit. `start`: the position of its first token; None: all blocks of
    the hit up to there are full. `aux`: files that recipes refer to, by digest.

    The result: their bytes in the order of `layer_ranges` over `dense_runs`; `decoded(nbytes, seconds)` is told of it.
    Raises BlockCorruptError, here or in the result, LimitError, UnavailableError.
    """
    gathered = _gathered(layer, group, first, reader)
    start = first * BLOCK_TOKENS if start is None else start
    work = functools.partial(_decode, layout, layer, group, first, gathered, decoded, Context(start, aux=aux))
    return submit(work)


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
    return BufferReader([buffer], ranges)


def _decode(
    layout: Layout,
    layer: int,
    group: Sequence[HitBlock],
    first: int,
    reader: BufferReader,
    decoded: Callable[[int, float], None],
    context: Context,
) -> list[memoryview]:
    """One piece, on the lane."""
    started = time.monotonic()
    try:
        views = dense_bytes(assemble_layer(layout, layer, group, reader, headroom_tokens=0, context=context))
    except BlockCorruptError as error:
        raise BlockCorruptError(str(error), first + error.source) from error
    decoded(sum(view.nbytes for view in views), time.monotonic() - started)
    return views
