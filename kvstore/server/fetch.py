"""FETCH: plan from the index, take a lease, hand over as stored or decoded, layer by layer. Who says how fast it
computes gets no more than is worth it (`costs.py`).

Memory: one layer of one hit. Anything that is wrong with a block makes the prefix shorter before the plan is sent;
after that it ends the stream, and the next fetch finds the block gone.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace

from kvstore.blocks import TOKEN_BYTES, LayerState, Reason, count_tokens
from kvstore.bounds import ByteBudget
from kvstore.codecs.assemble import HitBlock, dense_runs, layer_ranges
from kvstore.codecs.base import BlockCorruptError, check_runs
from kvstore.codecs.encode import PIECE_BYTES
from kvstore.config import Config
from kvstore.engine import Engine, Lease, Match
from kvstore.engine.rows import recipes_of
from kvstore.errors import CorruptDataError, InvalidRequestError, LimitError, UnknownFormatError
from kvstore.files import OPEN_FILES_MAX, FileReader, Range
from kvstore.keys import NamespaceInfo
from kvstore.layers import Layout
from kvstore.server.costs import Costs, Offer, Timing, work_of, worthwhile
from kvstore.server.decode import dense_layer
from kvstore.server.lane import Lane

CHUNK_BYTES = 1 << 20
REPLANS_MAX = 8
# All fetches together keep OPEN_FILES_MAX files open, and each at least so many: launchd gives a process 256.
OPEN_FILES_MIN = 4
# Sets of recipes that are remembered as readable; a build writes a handful.
RECIPES_MAX = 1024

Unusable = Callable[[Match], tuple[int, Reason] | None]
NOTHING_SAID = Offer()


class Stopwatch:
    """What a fetch takes, while the daemon itself carries it out. One thread at a time."""

    def __init__(self) -> None:
        self._started_s = time.monotonic()
        self._decoded_bytes = 0
        self._decode_s = 0.0

    def decoded(self, nbytes: int, seconds: float) -> None:
        """Count a piece of decoding."""
        self._decoded_bytes += nbytes
        self._decode_s += seconds

    def timing(self, read_bytes: int) -> Timing:
        """The fetch as it stands now."""
        read_s = time.monotonic() - self._started_s - self._decode_s
        return Timing(read_bytes, max(0.0, read_s), self._decoded_bytes, self._decode_s)


@dataclass(frozen=True)
class FetchPlan:
    """What a fetch will hand over. `match.n_tokens` is 0 for a miss; then there is no lease.

    `fetch_id` is that of `costs.Costs`, to which it is active until it is measured or ended.
    """

    namespace: NamespaceInfo | None
    match: Match
    lease: Lease | None
    fetch_id: int = 0
    stopwatch: Stopwatch = field(default_factory=Stopwatch)

    @property
    def blocks(self) -> list[HitBlock]:
        """The blocks as the codecs want them."""
        return [HitBlock(piece.row.block.runs, piece.take) for piece in self.match.slices]

    @property
    def states(self) -> dict[int, LayerState]:
        """The checkpoint's layers by index."""
        checkpoint = self.match.checkpoint
        return {} if checkpoint is None else {state.layer: state for state in checkpoint.block.states}

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
        self._buffers = ByteBudget(config.memory_bytes)
        self._files = ByteBudget(OPEN_FILES_MAX)
        self.costs = Costs(lambda: lane.backlog_s)
        self._readable = Readable()

    def match(self, root: bytes, tokens: bytes, fidelity_min: int, offer: Offer = NOTHING_SAID) -> Match:
        """The longest usable prefix, at most all tokens but one; n_tokens 0 with a reason is a miss.

        Where the caller says how fast it computes, a prefix that costs more than it saves is left out.

        Raises InvalidRequestError when `tokens` are not packed token ids.
        """
        return self._usable(root, tokens, fidelity_min, offer, self._readable.first_unreadable)

    def _usable(self, root: bytes, tokens: bytes, fidelity_min: int, offer: Offer, unusable: Unusable) -> Match:
        """The longest prefix of which `unusable` names no part."""
        if len(tokens) % TOKEN_BYTES:
            raise InvalidRequestError(f"tokens must be {TOKEN_BYTES} bytes each, got {len(tokens)} bytes")
        limit = max(0, count_tokens(tokens) - 1)
        namespace = self._engine.namespace(root)
        exact = namespace is not None and bool(namespace.layout.exact_layers)
        match = self._engine.match(root, tokens, fidelity_min, limit, exact=exact)
        while (found := unusable(match)) is not None:
            start, reason = found
            shorter = self._engine.match(root, tokens, fidelity_min, start, exact=exact)
            match = replace(shorter, reason=reason)
        if offer.prefill_tokens_per_s and match.n_tokens and namespace is not None:
            cost_s = functools.partial(self.costs.seconds, root, offer.way)
            match = worthwhile(match, namespace.layout, offer, cost_s)
        short = 0 < match.n_tokens < self._config.min_prefix_tokens
        if short or (match.reason is Reason.OK and not match.n_tokens):  # nothing is asked for but the last token
            return Match(0, Reason.BELOW_THRESHOLD)
        return match

    def plan(self, root: bytes, tokens: bytes, fidelity_min: int, offer: Offer = NOTHING_SAID) -> FetchPlan:
        """Match again, take a lease and make sure that every file is there; what is not is dropped from the index."""
        for _ in range(REPLANS_MAX):
            match = self._usable(root, tokens, fidelity_min, offer, first_unreadable)
            namespace = self._engine.namespace(root)
            if not match.n_tokens or namespace is None:
                return FetchPlan(None, match, None)
            plan = FetchPlan(namespace, match, self._engine.lease(part.row for part in match.parts))
            missing = self._engine.first_missing(match.parts)
            if missing is None:
                self._engine.touch(match.parts)
                if match.checkpoint is not None and match.diverged:
                    self._engine.mark_divergence(match.checkpoint)
                return replace(plan, fetch_id=self.costs.start(root, offer.way, work_of(match, namespace.layout)))
            plan.release()
            self._engine.recheck(match.parts[missing].row.key)
        return FetchPlan(None, Match(0, Reason.CORRUPT), None)

    def packed_layers(self, plan: FetchPlan, layout: Layout) -> Iterator[tuple[int, bytes]]:
        """Chunks of every layer's stored ranges, in the order of `layer_ranges`. CorruptDataError on a short file."""
        blocks = plan.blocks

        def stored(reader: FileReader, layer: int) -> Iterable[memoryview]:
            return read_ranges(reader, layer_ranges(blocks, layer))

        runs = [run for block in blocks for run in block.runs]
        tensors = [(t, len(s.layers), run.n_tokens) for run in runs for s in run.stacks for t in s.tensors]
        sizes = [t.layer_range(at, n_tokens)[1] for t, layers, n_tokens in tensors for at in range(layers)]
        return self._layers(plan, layout, stored, max(sizes, default=0))

    def dense_layers(self, plan: FetchPlan, layout: Layout) -> Iterator[tuple[int, bytes]]:
        """Chunks of every layer, decoded on the lane according to the recipes stored with the data.

        A block that does not verify is quarantined and ends the iteration with CorruptDataError.
        """
        blocks = plan.blocks

        def decode(reader: FileReader, layer: int) -> Iterable[memoryview]:
            try:
                return dense_layer(self._lane, layout, layer, blocks, reader, plan.stopwatch.decoded)
            except BlockCorruptError as error:
                self._engine.recheck(plan.match.slices[error.source].row.key)
                raise

        largest = plan.match.n_tokens * max(map(layout.layer_token_bytes, range(len(layout.layers))))
        return self._layers(plan, layout, decode, largest + min(largest, 2 * PIECE_BYTES))

    def _layers(
        self, plan: FetchPlan, layout: Layout, kv: Callable[[FileReader, int], Iterable[memoryview]], kv_bytes: int
    ) -> Iterator[tuple[int, bytes]]:
        """(layer, chunk) of all layers in order: kv layers as `kv` gives them, window and state layers as stored.

        `kv_bytes`: most bytes that `kv` holds at once.
        """
        states, checkpoint = plan.states, len(plan.match.slices)
        with self._reader(plan) as reader:
            for layer, spec in enumerate(layout.layers):
                with self._buffered(states[layer].nbytes if spec.is_exact else kv_bytes):
                    if spec.is_exact:
                        ranges = [Range(checkpoint, array.offset, array.nbytes) for array in states[layer].arrays]
                        parts: Iterable[memoryview] = read_ranges(reader, ranges)
                    else:
                        parts = kv(reader, layer)
                    yield from ((layer, chunk) for chunk in chunked(parts))

    def measured(self, plan: FetchPlan) -> None:
        """The daemon has handed over all of a plan by stream; learn from what it took."""
        read_bytes = sum(part.row.file_bytes - part.row.payload_offset for part in plan.match.parts)
        self.costs.measured(plan.fetch_id, plan.stopwatch.timing(read_bytes))

    @contextlib.contextmanager
    def _buffered(self, nbytes: int) -> Iterator[None]:
        """Count `nbytes` and a chunk against the memory of all streams; LimitError at once when there is none left.

        Nobody waits here: the threads that would wait are those that the other streams need to go on.
        """
        nbytes += CHUNK_BYTES
        if not self._buffers.try_acquire(nbytes):
            raise LimitError(f"memory_bytes = {self._config.memory_bytes} of buffers are in use; try again later")
        try:
            yield
        finally:
            self._buffers.release(nbytes)

    @contextlib.contextmanager
    def _reader(self, plan: FetchPlan) -> Iterator[FileReader]:
        """The plan's files, with a share of the daemon's descriptors. A fetch that finds none free reads with few."""
        wanted = min(len(plan.match.parts), OPEN_FILES_MAX)
        granted = wanted if self._files.try_acquire(wanted) else 0
        try:
            with FileReader(self._engine.sources(plan.match.parts), open_max=granted or OPEN_FILES_MIN) as reader:
                yield reader
        finally:
            self._files.release(granted)

    @staticmethod
    def dense_block(plan: FetchPlan, layout: Layout) -> HitBlock:
        """The one raw block that describes a dense answer."""
        return HitBlock(dense_runs(layout, plan.match.n_tokens), plan.match.n_tokens)


class Readable:
    """Recipes that this build was seen to read, so that a match decodes no runs. Any thread: sets of numbers only."""

    def __init__(self) -> None:
        self._recipes: set[int] = set()

    def first_unreadable(self, match: Match) -> tuple[int, Reason] | None:
        """As `first_unreadable`, for less: runs are decoded only of rows with recipes that were not seen before."""
        seen = {recipes_of(value) for _, value, _ in match.rows}
        if seen <= self._recipes and match.checkpoint is None:
            return None
        found = first_unreadable(match)
        if found is None and len(self._recipes | seen) <= RECIPES_MAX:
            self._recipes |= seen - {0}
        return found


def first_unreadable(match: Match) -> tuple[int, Reason] | None:
    """(start, reason) of the first block with a recipe or row that this build cannot read; None when all are fine.

    Of a checkpoint: the position before the last token that it stands for.
    """
    for piece in match.slices:
        try:
            check_runs(piece.row.block.runs)
        except UnknownFormatError:
            return piece.row.start, Reason.UNKNOWN_RECIPE
        except CorruptDataError:
            return piece.row.start, Reason.CORRUPT
    if match.checkpoint is not None:
        try:
            _ = match.checkpoint.block
        except CorruptDataError:
            return match.n_tokens - 1, Reason.CORRUPT
    return None


def read_ranges(reader: FileReader, ranges: Iterable[Range]) -> Iterator[memoryview]:
    """The bytes of each range."""
    for span in ranges:
        view = memoryview(bytearray(span.nbytes))
        reader.readinto(span.source, span.offset, [view])
        yield view


def chunked(parts: Iterable[memoryview]) -> Iterator[bytes]:
    """Regroup byte strings into messages of at most CHUNK_BYTES: small ones are gathered, large ones cut."""
    gathered = bytearray()
    for part in parts:
        view = part
        while len(gathered) + len(view) >= CHUNK_BYTES:
            take = CHUNK_BYTES - len(gathered)
            yield bytes(gathered) + bytes(view[:take])
            gathered.clear()
            view = view[take:]
        gathered += view
    if gathered:
        yield bytes(gathered)
