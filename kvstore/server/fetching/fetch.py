"""Plans a FETCH from the index and leases its blobs. A caller that states its prefill speed gets only hits that save
time (`costs.py`).

`layer_frames.py` makes the bytes of it, `stream_out.py` sends them. Anything that is wrong with a block makes the
prefix shorter before the plan is sent; after that it ends the stream, and the next fetch finds the block gone.
"""

from __future__ import annotations

import functools
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

from kvstore.blobs.protocol import BlobId
from kvstore.codecs.byte_plan import HitBlock
from kvstore.codecs.codec import check_runs
from kvstore.config import Config
from kvstore.core.blocks import TOKEN_BYTES, LayerState, Reason
from kvstore.core.keys import Chain, NamespaceInfo
from kvstore.engine import Engine, Lease, Match
from kvstore.errors import CorruptDataError, InvalidRequestError, UnknownFormatError
from kvstore.server.fetching.costs import Costs, Offer, Timing, Way, work_of, worthwhile
from kvstore.server.lane import Lane
from kvstore.telemetry.why import NamespaceIdentity
from kvstore.wire.v1 import kvstore_pb2 as pb

REPLANS_MAX = 8
# A block that is not what its row says, and is not in quarantine either, is read so often before the prefix ends there:
# what a newer kvstore wrote stays as it is, a process that lacks descriptors may have some the next time.
READS_MAX = 2
# Sets of templates that are remembered as readable; a build writes a handful.
RECIPES_MAX = 1024

Unusable = Callable[[Match], tuple[int, Reason] | None]
# Whether a namespace has all that recipes refer to by these digests.
HasAux = Callable[[bytes, Iterable[bytes]], bool]
NOTHING_SAID = Offer()


@dataclass(slots=True)
class Stopwatch:
    """Measures the time of a fetch while the daemon works on it. One thread at a time."""

    started_s: float = field(default_factory=time.monotonic)
    decoded_bytes: int = 0
    decode_s: float = 0.0

    def decoded(self, nbytes: int, seconds: float) -> None:
        """Count a piece of decoding."""
        self.decoded_bytes += nbytes
        self.decode_s += seconds

    def timing(self, read_bytes: int) -> Timing:
        """The fetch as it stands now."""
        read_s = time.monotonic() - self.started_s - self.decode_s
        return Timing(read_bytes, max(0.0, read_s), self.decoded_bytes, self.decode_s)


@dataclass(frozen=True)
class FetchPlan:
    """A planned fetch. For a miss `match.n_tokens` is 0 and there is no lease.

    `fetch_id` is that of `costs.Costs`, to which it is active until it is measured or ended.
    """

    namespace: NamespaceInfo | None
    match: Match
    lease: Lease | None
    fetch_id: str = ""
    stopwatch: Stopwatch = field(default_factory=Stopwatch)

    @property
    def blocks(self) -> list[HitBlock]:
        """The blocks as the codecs want them."""
        return [HitBlock(piece.row.block.runs, piece.take) for piece in self.match.slices]

    @property
    def references(self) -> frozenset[bytes]:
        """Digests of what its recipes refer to."""
        return frozenset().union(*(piece.row.block.references for piece in self.match.slices))

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
    """Plans fetches. All methods block on disk: call them on worker threads, any of them."""

    def __init__(self, engine: Engine, lane: Lane, config: Config) -> None:
        self._engine = engine
        self._config = config
        self._same_host = bool(config.address.path)
        self.costs = Costs(lambda: lane.backlog_s)
        self._readable = Readable(engine.has_aux)

    def match(self, chain: Chain, fidelity_min: int, offer: Offer = NOTHING_SAID) -> Match:
        """The longest usable prefix, at most all tokens but one; n_tokens 0 with a reason is a miss.

        Where the caller says how fast it computes, a prefix that costs more than it saves is left out.

        Raises InvalidRequestError when its tokens are not packed token ids.
        """
        unreadable = functools.partial(self._readable.first_unreadable, chain.root)
        return self._usable(chain, fidelity_min, offer, unreadable)

    def _usable(self, chain: Chain, fidelity_min: int, offer: Offer, unusable: Unusable) -> Match:
        """The longest prefix of which `unusable` names no part."""
        if len(chain.tokens) % TOKEN_BYTES:
            raise InvalidRequestError(f"tokens must be {TOKEN_BYTES} bytes each, got {len(chain.tokens)} bytes")
        root, limit = chain.root, max(0, chain.n_tokens - 1)
        namespace = self._engine.namespace(root)
        # A namespace that is stored only after this look-up may need checkpoints.
        exact = namespace is None or bool(namespace.layout.exact_layers)
        match = self._engine.match(chain, fidelity_min, limit, exact=exact)
        while (found := unusable(match)) is not None:
            start, reason = found
            shorter = self._engine.match(chain, fidelity_min, start, exact=exact)
            match = replace(shorter, reason=reason, common_tokens=match.common_tokens, nearest=match.nearest)
        if offer.prefill_tokens_per_s and match.n_tokens and namespace is not None:
            match = worthwhile(match, namespace.layout, offer, self.costs.price(root, offer.way))
        short = 0 < match.n_tokens < self._config.limits.min_prefix_tokens
        if short or (match.reason is Reason.OK and not match.n_tokens):  # nothing is asked for but the last token
            reason = Reason.BELOW_THRESHOLD
            return Match(0, reason, common_tokens=match.common_tokens, nearest=match.nearest)
        return match

    def plan(
        self, chain: Chain, fidelity_min: int, offer: Offer = NOTHING_SAID, caller: str = "", *, is_counted: bool = True
    ) -> FetchPlan:
        """Match again, take a lease and make sure that every blob is there; a row whose blob is not there goes.

        `caller`: who may report what it took. `is_counted`: whether the idle time of its blocks is counted.
        """
        asked_s = self.costs.clock()
        failed: Counter[BlobId] = Counter()
        unusable = functools.partial(first_unusable, failed, self._engine.has_aux)
        for _ in range(REPLANS_MAX):
            match = self._usable(chain, fidelity_min, offer, unusable)
            namespace = self._engine.namespace(chain.root)
            if match.n_tokens and namespace is None:  # it was evicted since
                match = Match(0, Reason.EVICTED, common_tokens=match.common_tokens, nearest=match.nearest)
            if not match.n_tokens or namespace is None:
                return FetchPlan(None, match, None)
            plan = FetchPlan(namespace, match, self._engine.lease(part.row for part in match.parts))
            unusable_at = self._engine.first_unusable(match.parts)
            if unusable_at is None:
                self._engine.touch(match.parts, fetched=is_counted)
                if match.checkpoint is not None and match.diverged:
                    self._engine.mark_divergence(match.checkpoint)
                work = work_of(match, namespace.layout)
                return replace(plan, fetch_id=self.costs.start(chain.root, offer.way, work, caller, asked_s))
            plan.release()
            row = match.parts[unusable_at].row
            if not self._engine.recheck(row.key):
                failed[row.blob] += 1
        return FetchPlan(None, Match(0, Reason.CORRUPT), None)

    def way(self, identity: NamespaceIdentity, transport: pb.Transport, *, dense: bool) -> Way:
        """How bytes go. As files not those of tenants, nor where there are none."""
        if dense:
            return "dense"
        same_files = transport == pb.TRANSPORT_PATH and self._same_host and not identity.salted
        return "path" if same_files and self._engine.has_paths(identity.root) else "stream"

    def measured(self, plan: FetchPlan) -> None:
        """The daemon has handed over all of a plan by stream; learn from what it took."""
        read_bytes = sum(part.row.blob_bytes - part.row.payload_offset for part in plan.match.parts)
        self.costs.measured(plan.fetch_id, plan.stopwatch.timing(read_bytes))


class Readable:
    """What recipes refer to that this build was seen to read, so that a match decodes no runs. Any thread.

    By number of the templates of a row: what they refer to, nothing for most.
    """

    def __init__(self, has_aux: HasAux) -> None:
        self._has_aux = has_aux
        self._references: dict[int, frozenset[bytes]] = {0: frozenset()}

    def first_unreadable(self, root: bytes, match: Match) -> tuple[int, Reason] | None:
        """As `first_unreadable`, for less: runs are decoded only of rows with recipes that were not seen before."""
        known, seen = self._references, match.templates_digests
        if match.checkpoint is None and seen <= known.keys():
            needed = frozenset().union(*(known[one] for one in seen))
            if not needed or self._has_aux(root, needed):
                return None
        found = first_unreadable(self._has_aux, match)
        if found is None and len(known.keys() | seen) <= RECIPES_MAX:
            known.update({piece.row.templates_digest: piece.row.block.references for piece in match.slices})
        return found


def first_unreadable(has_aux: HasAux, match: Match) -> tuple[int, Reason] | None:
    """(start, reason) of the first block with a recipe or row that this build cannot read; None when all are fine.

    Of a checkpoint: the position before the last token that it stands for.
    """
    there: set[frozenset[bytes]] = {frozenset()}
    for piece in match.slices:
        try:
            check_runs(piece.row.block.runs)
        except UnknownFormatError:
            return piece.row.start, Reason.UNKNOWN_RECIPE
        except CorruptDataError:
            return piece.row.start, Reason.CORRUPT
        if (needed := piece.row.block.references) not in there:
            if not has_aux(piece.row.root, needed):
                return piece.row.start, Reason.NO_BASIS
            there.add(needed)
    if match.checkpoint is not None:
        try:
            _ = match.checkpoint.block
        except CorruptDataError:
            return match.n_tokens - 1, Reason.CORRUPT
    return None


def first_unusable(failed: Counter[BlobId], has_aux: HasAux, match: Match) -> tuple[int, Reason] | None:
    """As `first_unreadable`, also for blobs that failed as often as they may."""
    stuck = next((part.row for part in match.parts if failed[part.row.blob] >= READS_MAX), None) if failed else None
    if stuck is None:
        return first_unreadable(has_aux, match)
    return (match.n_tokens - 1 if stuck.is_checkpoint else stuck.start), Reason.CORRUPT
