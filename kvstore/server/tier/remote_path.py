"""The remote tier as the daemon uses it: asked where this store lacks part of a prompt, read where that is worth it.

    reach      how much of a prompt there would be with it, for Match
    promote    read what is worth it into this store, within the time of the request (`promotion.py`)

No request waits for the tier longer than a part of its own deadline, and to be told what is there no longer than a
twentieth of the prefill that is at stake; what is late is served from here. After some failures in a row no request
asks it until `remote_watch.py` has seen it answer. Encrypted namespaces have no part in it: the names alone would
tell who asks for what.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import math
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from kvstore.core.blocks import Block, Reason
from kvstore.core.bounded import Bounded
from kvstore.core.breaker import Deadline
from kvstore.core.keys import NamespaceInfo
from kvstore.core.remote_words import RemoteReason
from kvstore.engine import Engine, Match
from kvstore.engine.adopt import require_own_namespace
from kvstore.errors import CorruptDataError, DeadlineError, KVStoreError, RemoteError
from kvstore.remote.finder import Reach, RemoteBlock
from kvstore.remote.object_names import Naming, labels_from
from kvstore.remote.objects import extended, read_header
from kvstore.remote.tier import RemoteTier
from kvstore.server.fetching.costs import Correction, Costs, Work
from kvstore.server.storing.importer import Importer
from kvstore.server.storing.store import StorePath
from kvstore.server.threads import Pool
from kvstore.server.tier.promotion import Promotion, why_of
from kvstore.server.tier.remote_choice import GAIN_TOKENS_MIN, Choice, Want, choose, options
from kvstore.server.tier.remote_watch import Watch
from kvstore.wire.convert import namespace_from_message

# Promotions at a time: more would share the same link, and each holds a thread.
PROMOTIONS_MAX = 4
# Of the disk budget one promotion may bring this part, so that what one prompt needs does not displace all others.
BUDGET_DIVISOR = 4
INFOS_MAX = 256
# Round trips in which it is found out what there is.
FIND_ROUNDS = 2
# A caller that says how long it waits for a message gets this many in that time while the tier is read.
BEATS = 3
# A moving average: the weight of one promotion, and the most that it can say, in times what the link alone would take.
PACE_STEP, PACE_MAX = 0.4, 64.0
log = logging.getLogger(__name__)


@dataclass
class RemoteCounters:
    """Since the daemon started. Any thread may count."""

    hits: int = 0
    hit_tokens: int = 0
    unused: Counter[RemoteReason] = field(default_factory=Counter)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def served_without(self, why: RemoteReason) -> None:
        """A request was served without the tier, which might have had more."""
        with self.lock:
            self.unused[why] += 1

    def hit(self, n_tokens: int) -> None:
        """A request got this many tokens more."""
        with self.lock:
            self.hits += 1
            self.hit_tokens += n_tokens


class Promoted(NamedTuple):
    """What came of reading from the tier for a request: whether there may be more here now, and why it is not all.

    `keys`: of the blocks that were read from there whole and sound, for this request.
    """

    more: bool
    why: RemoteReason | None
    keys: tuple[bytes, ...] = ()


class RemotePath:
    """See the module. Event loop only; what blocks goes to `run`."""

    def __init__(
        self, engine: Engine, store: StorePath, costs: Costs, run: Pool, tier: RemoteTier, watch: Watch
    ) -> None:
        self._engine = engine
        self._store = store
        self._costs = costs
        self._run = run
        self._tier = tier
        self._watch = watch
        self.counters = RemoteCounters()
        self._promoting: dict[bytes, asyncio.Future[None]] = {}  # by `Want.before_missing`
        self._infos: Bounded[bytes, NamespaceInfo] = Bounded(INFOS_MAX)  # of namespaces that nothing is stored of here
        self._lock = threading.Lock()  # over them
        self._pace = Correction()  # what promotions take beyond what the link alone would

    def why_not(self, want: Want) -> RemoteReason | None:
        """Why the tier is not asked for a request that it might have more for; None when it should be asked."""
        if self._store.is_to_encrypt(want.chain.root, isolated=bool(want.identity.salt)):
            return RemoteReason.ENCRYPTED
        return None if self._watch.serves else RemoteReason.UNAVAILABLE

    # -- looking -----------------------------------------------------------------------------------------------------

    async def reach(self, want: Want) -> int:
        """How many tokens of the prompt a fetch would give with the tier; what there is without, if no more."""
        if not want.may_gain or self.why_not(want) is not None:
            return want.match.n_tokens
        choice, _ = await self._choose(want)
        return choice.n_tokens if choice is not None else want.match.n_tokens

    async def _choose(self, want: Want) -> tuple[Choice | None, RemoteReason | None]:
        """What is worth reading, or why nothing is."""
        if self._tier.link.seconds(0, FIND_ROUNDS) > want.find_s:
            return None, RemoteReason.NOT_WORTH
        started_s = time.monotonic()
        try:
            reach, info = await self._run(self._find, want)
        except (RemoteError, DeadlineError) as error:
            self._watch.failed(error, time.monotonic() - started_s)
            return None, why_of(error)
        except CorruptDataError:
            return None, RemoteReason.WRONG
        self._watch.succeeded()
        if info is None:
            return None, RemoteReason.NOTHING
        found = list(options(reach, want.limit, exact=bool(info.layout.exact_layers)))
        if not found or found[-1].n_tokens < want.have + GAIN_TOKENS_MIN:
            return None, RemoteReason.NOTHING
        cost_s = functools.partial(self._cost_s, want, info)
        choice = choose(want, found, self._engine.budget_bytes // BUDGET_DIVISOR, cost_s)
        return choice, None if choice is not None else RemoteReason.NOT_WORTH

    def _find(self, want: Want) -> tuple[Reach, NamespaceInfo | None]:
        """What there is, and the namespace; None when there is nothing. Blocks."""
        chain, deadline = want.chain, Deadline(want.find_s)
        info = self._engine.namespace(chain.root) or self._infos.get(chain.root)
        naming = Naming(None, root=chain.root, is_salted=bool(want.identity.salt))
        labels = labels_from(want.fidelity_min, self._store.gate.choose(chain.root).profile.fidelity)
        find = functools.partial(self._tier.finder.find, chain, naming, labels, deadline, first=want.full)
        reach = find(needs_checkpoint=info is not None and bool(info.layout.exact_layers))
        if info is None and reach.blocks:
            info = self._learn(want, reach.blocks[0], deadline)
            if info.layout.exact_layers and not reach.checkpoints:
                reach = find(needs_checkpoint=True)
        if info is not None and not info.layout.exact_layers:
            reach = extended(self._tier.store, reach, chain, naming, deadline)
        return reach, info

    def _learn(self, want: Want, one: RemoteBlock, deadline: Deadline) -> NamespaceInfo:
        """The namespace of a request, with the layout that a blob of it says: nothing of it is stored here yet."""
        try:
            info = named(want, read_header(self._tier.store, one, deadline))
        except (RemoteError, DeadlineError):
            raise
        except KVStoreError as error:
            self._tier.finder.report_wrong(one, error)
            raise CorruptDataError(f"{one.name}: {error}") from error
        with self._lock:
            self._infos[info.root] = info
        return info

    def _cost_s(self, want: Want, info: NamespaceInfo, choice: Choice) -> float:
        """How long it takes to have a choice here, and then to restore it from here."""
        link_s = self._tier.link.seconds(choice.nbytes)
        layout = info.layout
        tokens = max(0, choice.n_tokens - want.match.n_tokens)
        work = Work(len(layout.layers), len(choice.objects), choice.nbytes, tokens * layout.token_bytes)
        here_s = self._costs.seconds(want.chain.root, want.offer.way, work)
        return link_s * self._pace.factor(self._costs.clock()) + here_s

    # -- promoting ---------------------------------------------------------------------------------------------------

    async def promote(
        self, want: Want, match: Callable[[], Awaitable[Match]], beat: Callable[[], Awaitable[None]], beat_s: float
    ) -> Promoted:
        """Read what is worth it into this store.

        `beat` is awaited every `beat_s` meanwhile, `match` looks again at what is here. Two requests that lack the same
        block do not both read it: the second waits for the first, as long as it has time, and then asks for what is
        still missing.
        """
        working = asyncio.ensure_future(self._promote(want, match))
        try:
            while not (await asyncio.wait([working], timeout=beat_s))[0]:
                await beat()
        except BaseException:
            working.cancel()
            await asyncio.wait([working])
            raise
        return working.result()

    async def _promote(self, want: Want, match: Callable[[], Awaitable[Match]]) -> Promoted:
        waited = False
        while (other := self._promoting.get(want.before_missing)) is not None:
            waited = True
            if not (await asyncio.wait([other], timeout=want.deadline.left_s))[0]:
                return Promoted(False, RemoteReason.LATE)
            want = replace(want, match=await match())
            if not want.may_gain or self.why_not(want) is not None:
                return Promoted(True, None)
        if len(self._promoting) >= PROMOTIONS_MAX:
            return Promoted(waited, RemoteReason.BUSY)
        missing = want.before_missing
        done = self._promoting[missing] = asyncio.get_running_loop().create_future()
        try:
            promoted = await self._read(want)
            return promoted._replace(more=promoted.more or waited)
        finally:
            del self._promoting[missing]
            done.set_result(None)

    async def _read(self, want: Want) -> Promoted:
        if self._store.admission.refusal() is not Reason.OK:
            return Promoted(False, RemoteReason.NOT_WRITTEN)
        choice, why = await self._choose(want)
        if choice is None:
            return Promoted(False, why)
        buffers = self._store.receiver.buffers
        importer = Importer(self._engine, lambda root: None, buffers, functools.partial(named, want), 0.0)
        promotion = Promotion(self._tier, self._watch, importer, buffers, want.fidelity_min, self._run)
        started_s, expected_s = self._costs.clock(), self._tier.link.seconds(choice.nbytes)
        try:
            why = await promotion.take(choice.objects, want.deadline)
        finally:
            await promotion.close()
        if promotion.read_bytes and why in (None, RemoteReason.LATE):
            took_s, share = self._costs.clock() - started_s, promotion.read_bytes / choice.nbytes
            self._learn_pace(took_s / max(expected_s * share, 1e-6))
        return Promoted(promotion.stored > 0, why, tuple(promotion.keys))

    def _learn_pace(self, ratio: float) -> None:
        """A promotion took `ratio` times as long as the link alone was expected to."""
        now_s = self._costs.clock()
        ratio = max(1 / PACE_MAX, min(ratio, PACE_MAX))
        self._pace.move(PACE_STEP * (math.log(ratio) - math.log(self._pace.factor(now_s))), now_s)


def named(want: Want, block: Block) -> NamespaceInfo:
    """The namespace of a request, if it is that of a block. CorruptDataError when the block is another's."""
    said = require_own_namespace(block)
    info = namespace_from_message(want.identity, said.layout.record)
    if info is None or replace(said, alias=info.alias) != info:
        raise CorruptDataError("the blob is of another namespace")
    return info
