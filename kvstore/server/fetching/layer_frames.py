"""The bytes of a fetch's layers as frames of a stream: as they are stored, or decoded on the lane in bounded pieces.

Memory: a few MiB a stream, whatever the length of the hit. Frames keep to the borders of stored ranges where these are
no longer than a frame, so that a client finds each of them whole.
"""

from __future__ import annotations

import contextlib
import functools
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, wait
from typing import TypeVar

from kvstore.blobs.protocol import RangeReader
from kvstore.blobs.ranges import OPEN_FILES_MAX, Range
from kvstore.codecs.assemble import dense_runs
from kvstore.codecs.byte_plan import HitBlock, layer_ranges
from kvstore.codecs.codec import BlockCorruptError
from kvstore.codecs.encode import PIECE_BYTES
from kvstore.codecs.states import state_ranges
from kvstore.core.byte_budget import ByteBudget
from kvstore.core.layers import Layout
from kvstore.core.records import runs_to_record
from kvstore.engine import Engine
from kvstore.errors import LimitError
from kvstore.server.fetching.costs import Way
from kvstore.server.fetching.decode import decode_piece, pieces
from kvstore.server.fetching.fetch import FetchPlan
from kvstore.server.fetching.stream_out import BATCH_BYTES, BATCHES_MAX, Frames
from kvstore.server.lane import Lane
from kvstore.wire.frames import CHUNK_BYTES, filled_layer_frame, layer_frame
from kvstore.wire.v1 import kvstore_pb2 as pb

# Pieces as read, in the lane (gathered, and decoded) and waiting to be sent; and the frames of others.
DENSE_BYTES = 5 * PIECE_BYTES + BATCHES_MAX * (BATCH_BYTES + PIECE_BYTES)
PACKED_BYTES = 2 * CHUNK_BYTES + BATCHES_MAX * BATCH_BYTES
# Open files that each fetch may have at least. All fetches together have at most OPEN_FILES_MAX: under launchd a
# process may open 256.
OPEN_FILES_MIN = 4
RETRY_S = 0.2


# Bytes to be sent: a stored byte range, or a view of memory.
P = TypeVar("P", Range, memoryview)


class LayerFrames:
    """Makes frames. The generators block on disk and lane: run them on worker threads, any, one at a time."""

    def __init__(self, engine: Engine, lane: Lane, buffers: ByteBudget) -> None:
        self._engine = engine
        self._lane = lane
        self._buffers = buffers
        self._files = ByteBudget(OPEN_FILES_MAX)

    def packed(self, plan: FetchPlan, layout: Layout) -> Frames:
        """Every layer's stored ranges, in the order of `layer_ranges`.

        Raises CorruptDataError for a file that is short or gone, LimitError when memory_bytes are in use.
        """
        blocks = plan.blocks
        with self._buffered(PACKED_BYTES), self._reader(plan) as reader:
            for layer, spec in enumerate(layout.layers):
                ranges = checkpoint_ranges(plan, layer) if spec.is_exact else layer_ranges(blocks, layer)
                yield from read_frames(reader, layer, ranges)

    def dense(self, plan: FetchPlan, layout: Layout) -> Frames:
        """Every layer as `dense_block` describes it: decoded on the lane, a piece ahead of the one that is sent.

        Window and state layers as stored. Raises as `packed`, and BlockCorruptError for a block that does not verify,
        which is then quarantined.
        """
        ahead: deque[tuple[int, Future[list[memoryview]] | None]] = deque()
        with self._buffered(DENSE_BYTES), self._reader(plan) as reader:
            try:
                for layer, piece in self._decoded(plan, layout, reader):
                    ahead.append((layer, piece))
                    if len(ahead) > 1:
                        yield from piece_frames(plan, reader, *ahead.popleft())
                while ahead:
                    yield from piece_frames(plan, reader, *ahead.popleft())
            except BlockCorruptError as error:
                self._engine.recheck(plan.match.slices[error.source].row.key)
                raise
            finally:
                wait([piece for _, piece in ahead if piece is not None and not piece.cancel()])

    def _decoded(
        self, plan: FetchPlan, layout: Layout, reader: RangeReader
    ) -> Iterator[tuple[int, Future[list[memoryview]] | None]]:
        """(layer, what the lane makes of it) of every piece in the order of the stream; None: sent as stored."""
        groups, root = dense_pieces(plan, layout), plan.match.parts[0].row.root
        aux = self._engine.aux(root, plan.references)
        for layer, spec in enumerate(layout.layers):
            if spec.is_exact:
                yield layer, None
                continue
            for first, group in groups:
                decoded = plan.stopwatch.decoded
                yield (
                    layer,
                    decode_piece(self._lane.submit_fetch, layout, layer, group, first, reader, decoded, aux=aux),
                )

    @contextlib.contextmanager
    def _buffered(self, nbytes: int) -> Iterator[None]:
        """Count `nbytes` against the memory of all streams; LimitError at once when there is none left.

        Never waits: a waiting thread would be one that other streams need.
        """
        if not self._buffers.try_acquire(nbytes):
            limit = self._buffers.limit_bytes
            raise LimitError(f"memory_bytes = {limit} of buffers are in use; try again later", RETRY_S, "memory_bytes")
        try:
            yield
        finally:
            self._buffers.release(nbytes)

    @contextlib.contextmanager
    def _reader(self, plan: FetchPlan) -> Iterator[RangeReader]:
        """Open the plan's files within the daemon's limit on open files. A fetch always gets a minimum of them."""
        wanted = min(len(plan.match.parts), OPEN_FILES_MAX)
        granted = wanted if self._files.try_acquire(wanted) else 0
        try:
            with contextlib.closing(
                self._engine.reader(plan.match.parts, open_max=granted or OPEN_FILES_MIN)
            ) as reader:
                yield reader
        finally:
            self._files.release(granted)


def plan_message(engine: Engine, plan: FetchPlan, way: Way) -> pb.FetchPlan:
    """The plan as a worker gets it, before all bytes; of a miss the reason alone. Paths only where `way` is by path."""
    match, checkpoint, path = plan.match, plan.match.checkpoint, engine.path
    if plan.namespace is None:
        return pb.FetchPlan(reason=match.reason)
    layout = plan.namespace.layout
    if way == "dense":
        runs, templates = runs_to_record(dense_block(plan, layout).runs)
        slices = [pb.BlockSlice(n_tokens=match.n_tokens, runs=runs)]
    else:
        templates = match.needed_templates()
        slices = [
            pb.BlockSlice(
                key=row.key,
                n_tokens=take,
                runs=row.described,
                path=(path(row.blob) if way == "path" else None) or "",
                payload_offset=row.payload_offset,
                file_bytes=row.blob_bytes,
            )
            for row, take in ((piece.row, piece.take) for piece in match.slices)
        ]
    states = checkpoint and pb.StateSlice(
        key=checkpoint.key,
        states=checkpoint.described,
        path=(path(checkpoint.blob) if way == "path" else None) or "",
        payload_offset=checkpoint.payload_offset,
        file_bytes=checkpoint.blob_bytes,
    )
    return pb.FetchPlan(
        n_tokens=match.n_tokens,
        reason=match.reason,
        fidelity=match.fidelity,
        layout=layout.record,
        blocks=slices,
        checkpoint=states,
        fetch_id=plan.fetch_id,
        templates=templates.values(),
    )


def dense_block(plan: FetchPlan, layout: Layout) -> HitBlock:
    """The one raw block that describes a dense answer: a run for every piece."""
    runs = dense_runs(layout, [sum(block.take for block in group) for _, group in dense_pieces(plan, layout)])
    return HitBlock(runs, plan.match.n_tokens)


def dense_pieces(plan: FetchPlan, layout: Layout) -> list[tuple[int, list[HitBlock]]]:
    """(number of the first, blocks) that are decoded at once, in every layer the same: the widest decides."""
    widest = max(map(layout.layer_token_bytes, range(len(layout.layers))))
    return list(pieces(plan.blocks, widest))


def piece_frames(
    plan: FetchPlan, reader: RangeReader, layer: int, piece: Future[list[memoryview]] | None
) -> Iterator[bytes]:
    """Frames of a piece when it is decoded, or of a layer that is sent as stored."""
    if piece is None:
        yield from read_frames(reader, layer, checkpoint_ranges(plan, layer))
        return
    cut = (view[at : at + CHUNK_BYTES] for view in piece.result() for at in range(0, len(view), CHUNK_BYTES))
    for views in gathered(cut):
        yield layer_frame(layer, views)


def read_frames(reader: RangeReader, layer: int, ranges: Iterable[Range]) -> Iterator[bytes]:
    """Frames of stored ranges, which are read into their place."""
    cut = (
        Range(one.source, one.offset + at, min(CHUNK_BYTES, one.nbytes - at))
        for one in ranges
        for at in range(0, one.nbytes, CHUNK_BYTES)
    )
    for group in gathered(cut):
        fill = functools.partial(_read_group, reader, group)
        yield filled_layer_frame(layer, sum(one.nbytes for one in group), fill)


def _read_group(reader: RangeReader, group: Iterable[Range], data: memoryview) -> None:
    """Read some ranges one after the other."""
    end = 0
    for one in group:
        reader.readinto(one.source, one.offset, [data[end : end + one.nbytes]])
        end += one.nbytes


def checkpoint_ranges(plan: FetchPlan, layer: int) -> list[Range]:
    """A window or state layer's ranges of the checkpoint, which is the source after the blocks."""
    return state_ranges(plan.states[layer], len(plan.match.slices))


def gathered(pieces: Iterable[P]) -> Iterator[list[P]]:
    """Group adjacent pieces into chunks of at most CHUNK_BYTES. No piece may be larger than that."""
    group: list[P] = []
    nbytes = 0
    for piece in pieces:
        if group and nbytes + piece.nbytes > CHUNK_BYTES:
            yield group
            group, nbytes = [], 0
        group.append(piece)
        nbytes += piece.nbytes
    if group:
        yield group
