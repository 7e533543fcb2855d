"""FETCH: plan from the index, take a lease, hand over as stored or decoded, layer by layer.

Memory: one layer of one hit. Anything that is wrong with a block makes the prefix shorter before the plan is sent;
after that it ends the stream, and the next fetch finds the block gone.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from kvstore.blocks import FIDELITY_EXACT, TOKEN_BYTES, Reason, count_tokens
from kvstore.bounds import ByteBudget
from kvstore.codecs.assemble import HitBlock, assemble_layer, dense_bytes, dense_runs, layer_ranges
from kvstore.codecs.base import BlockCorruptError, check_runs
from kvstore.config import Config
from kvstore.engine import Engine, Lease, Match, Slice
from kvstore.errors import CorruptDataError, InvalidRequestError, UnknownFormatError
from kvstore.files import OPEN_FILES_MAX, FileReader
from kvstore.keys import NamespaceInfo
from kvstore.layers import Layout
from kvstore.server.lane import Lane

CHUNK_BYTES = 1 << 20
# All fetches together keep OPEN_FILES_MAX files open, and each at least so many: launchd gives a process 256.
OPEN_FILES_MIN = 4


@dataclass(frozen=True)
class FetchPlan:
    """What a fetch will hand over. `match.n_tokens` is 0 for a miss; then there is no lease."""

    namespace: NamespaceInfo | None
    match: Match
    lease: Lease | None

    @property
    def blocks(self) -> list[HitBlock]:
        """The blocks as the codecs want them."""
        return [HitBlock(piece.row.block.runs, piece.take) for piece in self.match.slices]

    def release(self) -> None:
        """Give the lease back."""
        if self.lease is not None:
            self.lease.release()


class FetchPath:
    """Plans and carries out fetches. All methods block on disk: call them on worker threads, any of them."""

    def __init__(self, engine: Engine, lane: Lane, config: Config) -> None:
        self._engine = engine
        self._lane = lane
        self._config = config
        self._files = ByteBudget(OPEN_FILES_MAX)

    def match(self, root: bytes, tokens: bytes, fidelity_min: int) -> Match:
        """The longest usable prefix, at most all tokens but one; n_tokens 0 with a reason is a miss.

        Raises InvalidRequestError when `tokens` are not packed token ids.
        """
        if len(tokens) % TOKEN_BYTES:
            raise InvalidRequestError(f"tokens must be {TOKEN_BYTES} bytes each, got {len(tokens)} bytes")
        limit = max(0, count_tokens(tokens) - 1)
        return self._usable(self._engine.match(root, tokens, fidelity_min, limit))

    def _usable(self, match: Match) -> Match:
        """Cut the match at the first block with a recipe that this build cannot read, then apply the minimum."""
        for at, piece in enumerate(match.slices):
            try:
                check_runs(piece.row.block.runs)
            except UnknownFormatError:
                match = shorten(match, match.slices[:at], Reason.UNKNOWN_RECIPE)
                break
            except CorruptDataError:
                match = shorten(match, match.slices[:at], Reason.CORRUPT)
                break
        short = 0 < match.n_tokens < self._config.min_prefix_tokens
        if short or (match.reason is Reason.OK and not match.n_tokens):  # nothing is asked for but the last token
            return shorten(match, (), Reason.BELOW_THRESHOLD)
        return match

    def plan(self, root: bytes, tokens: bytes, fidelity_min: int) -> FetchPlan:
        """Match again, take a lease and make sure that every file is there, shortening the prefix where one is not."""
        match = self.match(root, tokens, fidelity_min)
        while match.slices:
            lease = self._engine.lease([piece.row for piece in match.slices])
            lost = self._engine.first_missing(match.slices)
            if lost is None:
                self._engine.touch(match.slices)
                return FetchPlan(self._engine.namespace(root), match, lease)
            lease.release()
            self._engine.recheck(match.slices[lost].row.key)
            match = self._usable(shorten(match, match.slices[:lost], Reason.CORRUPT))
        return FetchPlan(None, match, None)

    def packed_layers(self, plan: FetchPlan, layout: Layout) -> Iterator[tuple[int, bytes]]:
        """Chunks of every layer's stored ranges, in the order of `layer_ranges`. CorruptDataError on a short file."""
        blocks = plan.blocks
        with self._reader(plan) as reader:
            for layer in range(len(layout.layers)):
                chunks = Chunks()
                for span in layer_ranges(blocks, layer):
                    buffer = bytearray(span.nbytes)
                    reader.readinto(span.source, span.offset, [memoryview(buffer)])
                    yield from ((layer, chunk) for chunk in chunks.add(buffer))
                yield from ((layer, chunk) for chunk in chunks.rest())

    def dense_layers(self, plan: FetchPlan, layout: Layout) -> Iterator[tuple[int, bytes]]:
        """Chunks of every layer, decoded on the lane according to the recipes stored with the data.

        A block that does not verify is quarantined and ends the iteration with CorruptDataError.
        """
        blocks = plan.blocks
        with self._reader(plan) as reader:
            for layer in range(len(layout.layers)):
                decode = self._decoder(layout, layer, blocks, reader)
                try:
                    parts = self._lane.submit_fetch(decode).result()
                except BlockCorruptError as error:
                    self._engine.recheck(plan.match.slices[error.source].row.key)
                    raise
                chunks = Chunks()
                for part in parts:
                    yield from ((layer, chunk) for chunk in chunks.add(part))
                yield from ((layer, chunk) for chunk in chunks.rest())

    @contextlib.contextmanager
    def _reader(self, plan: FetchPlan) -> Iterator[FileReader]:
        """The plan's files, with a share of the daemon's descriptors. A fetch that finds none free reads with few."""
        wanted = min(len(plan.match.slices), OPEN_FILES_MAX)
        granted = wanted if self._files.try_acquire(wanted) else 0
        try:
            with FileReader(self._engine.sources(plan.match.slices), open_max=granted or OPEN_FILES_MIN) as reader:
                yield reader
        finally:
            self._files.release(granted)

    @staticmethod
    def _decoder(
        layout: Layout, layer: int, blocks: Sequence[HitBlock], reader: FileReader
    ) -> Callable[[], list[memoryview]]:
        return lambda: dense_bytes(assemble_layer(layout, layer, blocks, reader, headroom_tokens=0))

    @staticmethod
    def dense_block(plan: FetchPlan, layout: Layout) -> HitBlock:
        """The one raw block that describes a dense answer."""
        return HitBlock(dense_runs(layout, plan.match.n_tokens), plan.match.n_tokens)


def shorten(match: Match, slices: tuple[Slice, ...], reason: Reason) -> Match:
    """The match cut down to its leading `slices`."""
    fidelity = min([FIDELITY_EXACT, *(piece.row.fidelity for piece in slices)])
    return Match(sum(piece.take for piece in slices), reason, slices, fidelity)


class Chunks:
    """Regroups byte strings into messages of about CHUNK_BYTES: small ranges are gathered, large ones cut."""

    def __init__(self) -> None:
        self._gathered = bytearray()

    def add(self, data: bytearray | memoryview) -> Iterator[bytes]:
        """Take more bytes; gives chunks that are full."""
        view = memoryview(data).cast("B")
        while len(self._gathered) + len(view) >= CHUNK_BYTES:
            take = CHUNK_BYTES - len(self._gathered)
            yield bytes(self._gathered) + bytes(view[:take])
            self._gathered.clear()
            view = view[take:]
        self._gathered += view

    def rest(self) -> Iterator[bytes]:
        """What is left at the end of a layer."""
        if self._gathered:
            yield bytes(self._gathered)
            self._gathered.clear()
