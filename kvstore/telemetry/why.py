"""Remembers why the latest requests missed, for `kvstore why`. In memory only; nothing of tenants or encrypted data.

Of each request: what it asked for, what it shares with the nearest stored chain, 12 tokens before the place where they
part and 12 after it on both sides, and what became of its store. An eviction drops what was noted of the blocks that it
removes. That a block was evicted, not merely never stored, the engine remembers by hashes, of the last 32,768 blocks.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace

from kvstore.core.blocks import BLOCK_TOKENS, TOKEN_BYTES, Reason
from kvstore.core.bounded import Bounded
from kvstore.core.causes import ADAPTER, DTYPE, ENGINE, LAYOUT, PROFILE, SALT, WEIGHTS, Cause
from kvstore.core.keys import BLOCK_BYTES, Chain, NamespaceInfo, block_key
from kvstore.core.reasons import NOT_NEEDED
from kvstore.engine import Match
from kvstore.engine.match import Nearest
from kvstore.errors import KVStoreError
from kvstore.telemetry.places import AHEAD_TOKENS, Places
from kvstore.telemetry.requests import Asked

ENTRIES_MAX = 256
SIDE_TOKENS = 12
# Stores that left something out, by a hash of where.
UNSTORED_MAX = 4096
IDENTITIES_MAX = 64
# Other namespaces that are searched for a prompt: of each request, and when an admin asks.
OTHERS_MAX = 4
OTHERS_ASKED_MAX = 256
# This many more tokens in another namespace make the identity the cause.
OTHER_TOKENS_MIN = 32
log = logging.getLogger(__name__)
_UNUSABLE = frozenset({Reason.CORRUPT, Reason.KEY_MISSING, Reason.UNKNOWN_RECIPE, Reason.SLOWER_THAN_PREFILL})


@dataclass(frozen=True, slots=True)
class NamespaceIdentity:
    """What makes a namespace, without the salt itself, and the root that it comes to."""

    root: bytes
    weights: bytes
    adapter: bytes
    layout: bytes
    dtype: str
    engine: str
    salted: bool
    alias: str = ""

    @classmethod
    def of(cls, info: NamespaceInfo) -> NamespaceIdentity:
        """Of a namespace that is stored."""
        layout = info.layout.digest
        return cls(info.root, info.weights, info.adapter, layout, info.dtype, info.engine, info.is_salted, info.alias)

    def differs(self, other: NamespaceIdentity) -> str:
        """The fields in which two identities differ, for people."""
        pairs = (
            (WEIGHTS, self.weights, other.weights),
            (ADAPTER, self.adapter, other.adapter),
            (LAYOUT, self.layout, other.layout),
            (DTYPE, self.dtype, other.dtype),
            (ENGINE, self.engine, other.engine),
        )
        return ", ".join(name for name, ours, theirs in pairs if ours != theirs) or SALT


# Reasons of a miss that say what became of what was stored.
_GONE = {Reason.EVICTED: Cause.EVICTED, Reason.EXPIRED: Cause.EXPIRED}


@dataclass(frozen=True, slots=True)
class StoreEnd:
    """What became of the stores of a prompt: tokens offered, of these stored now, bytes newly on disk, why not more."""

    offered_tokens: int
    stored_tokens: int
    new_bytes: int
    reason: Reason


@dataclass(frozen=True, slots=True)
class Other:
    """The namespace that has more of a prompt: the field in which it differs, and how many tokens it has."""

    field: str
    root: bytes = b""
    alias: str = ""
    n_tokens: int = 0


@dataclass(frozen=True, slots=True)
class RequestEntry:
    """One request and its cause. Token strings are packed; `spot` is a hash of the place where it parts.

    `nearest`: the key of the stored block in which the common tokens end. `keys`: with any of them deleted after
    `since`, the entry goes too. `unstored`: why an earlier store left out what is missing. `remote`: see `Why.note`.
    """

    asked: Asked
    at_s: float
    common_tokens: int
    given_tokens: int
    reason: Reason
    cause: Cause
    before: bytes
    after: bytes
    stored: bytes
    nearest: bytes
    parent: bytes
    spot: bytes
    keys: tuple[bytes, ...]
    since: tuple[int, int]
    other: Other | None = None
    unstored: Reason | None = None
    store: StoreEnd | None = None
    remote: str = ""

    @property
    def root(self) -> bytes:
        """Its namespace."""
        return self.asked.who.root


class Why:
    """See the module. Any thread may call; its lock is never held over I/O."""

    def __init__(self, nearest: Nearest, *, keeps: bool = True, clock: Callable[[], float] = time.time) -> None:
        """`keeps`: whether anything may be kept; not where everything is to be encrypted."""
        self.places = Places()
        self.not_kept = 0
        self._nearest = nearest
        self._keeps = keeps
        self._clock = clock
        self._lock = threading.Lock()
        self._entries: OrderedDict[tuple[str, str], RequestEntry] = OrderedDict()
        self._unstored: Bounded[bytes, tuple[Reason, bool]] = Bounded(UNSTORED_MAX)
        self._identities: Bounded[bytes, NamespaceIdentity] = Bounded(IDENTITIES_MAX)
        self._numbers = itertools.count()
        self._looked: tuple[int, int] = nearest.since

    # -- noting ----------------------------------------------------------------------------------------------------

    def drop(self) -> None:
        """A request of which nothing is kept."""
        with self._lock:
            self.not_kept += 1

    def note(
        self,
        asked: Asked,
        chain: Chain,
        match: Match,
        identity: NamespaceIdentity,
        since: tuple[int, int] | None = None,
        remote: str = "",
        is_late: Callable[[], bool] = lambda: False,
    ) -> None:
        """A request was matched. In the order of requests, before anything of it can be stored. Raises nothing.

        `since`: `Nearest.since` before the match. `remote`: what the remote tier had to do with it: a hit, or why it
        gave nothing. `is_late`: whether something of it may have been stored since; then nothing is kept.
        """
        root = chain.root
        if is_late() or not self._keeps or identity.salted or self._nearest.is_encrypted(root):
            self.drop()
            return
        with self._lock:
            self._identities[root] = identity
        try:
            entry = replace(self.explained(asked, chain, match, identity), remote=remote)
            entry = entry if since is None else replace(entry, since=since)
            if is_late():  # the disk was slow: what was read may be what came since
                self.drop()
                return
            if entry.cause is Cause.CHANGED:
                self._note_place(entry, chain)
        except KVStoreError as error:  # the index is damaged: the request itself is what matters
            log.debug("a request is not remembered: %s", error)
            return
        name = asked.request_id or f"#{next(self._numbers)}"
        key = (asked.who.caller, name)
        with self._lock:
            before = self._entries.get(key)
            # Another layout of the same model was asked about, and has more.
            if before is None or before.root == root or before.common_tokens <= entry.common_tokens:
                self._entries[key] = entry
            self._entries.move_to_end(key)
            if len(self._entries) > ENTRIES_MAX:
                self._entries.popitem(last=False)

    def _note_place(self, entry: RequestEntry, chain: Chain) -> None:
        """Note where a prompt differs from what is stored in the middle."""
        root, end = chain.root, entry.common_tokens * TOKEN_BYTES

        def ahead() -> tuple[bytes, bytes]:
            after = self._nearest.after(root, entry.nearest, entry.common_tokens, AHEAD_TOKENS)
            return chain.tokens[end : end + AHEAD_TOKENS * TOKEN_BYTES], after

        self.places.note(root, entry.asked.who.alias, chain.tokens[:end], (entry.after, entry.stored), ahead)

    def explained(
        self, asked: Asked, chain: Chain, match: Match, identity: NamespaceIdentity, others_max: int = OTHERS_MAX
    ) -> RequestEntry:
        """What is to be said about a prompt. Looks into `others_max` other namespaces where this one has little."""
        since = self._nearest.since
        common, end = match.common_tokens, match.common_tokens * TOKEN_BYTES
        stored = b""
        if common < chain.n_tokens - 1 and match.reason is not Reason.IDENTITY:
            stored = self._nearest.after(chain.root, match.nearest, common, SIDE_TOKENS)
        parent = chain.parent(common // BLOCK_TOKENS)
        start = common // BLOCK_TOKENS * BLOCK_BYTES
        spot = _spot(chain, common, chain.n_tokens)
        given, reason = match.n_tokens, match.reason
        if reason is Reason.SLOWER_THAN_PREFILL and common <= asked.covered:
            # The worker's memory holds as much: it needed nothing, and what it computed is not stored.
            given, reason = common, Reason.UNKNOWN_PREFIX if common < chain.n_tokens - 1 else Reason.OK
        entry = RequestEntry(
            asked=asked,
            at_s=self._clock(),
            common_tokens=common,
            given_tokens=given,
            reason=reason,
            cause=Cause.WHOLE,
            before=chain.tokens[max(0, end - SIDE_TOKENS * TOKEN_BYTES) : end],
            after=chain.tokens[end : end + SIDE_TOKENS * TOKEN_BYTES],
            stored=stored,
            nearest=match.nearest,
            parent=parent,
            spot=spot,
            keys=(match.nearest, self._nearest.head_key(parent, chain.tokens[start : start + BLOCK_BYTES])),
            since=since,
        )
        return self._with_cause(entry, chain, identity, others_max)

    def _with_cause(
        self, entry: RequestEntry, chain: Chain, identity: NamespaceIdentity, others_max: int
    ) -> RequestEntry:
        common, reason = entry.common_tokens, entry.reason
        if reason is Reason.FIDELITY:
            return replace(entry, cause=Cause.IDENTITY, other=Other(PROFILE, chain.root, identity.alias, common))
        if reason in _UNUSABLE:
            return replace(entry, cause=Cause.LIMITED)
        if common >= chain.n_tokens - 1:
            return entry if reason is Reason.OK else replace(entry, cause=Cause.LIMITED)
        if reason in _GONE:
            return replace(entry, cause=_GONE[reason])
        looks = common < OTHER_TOKENS_MIN or others_max > OTHERS_MAX
        is_empty = reason is Reason.IDENTITY
        other = self._other(chain, common, identity, others_max, is_empty=is_empty) if looks else None
        if other is not None:
            return replace(entry, cause=Cause.IDENTITY, other=other)
        with self._lock:
            unstored = self._unstored.get(entry.spot)
        if unstored is not None:
            return replace(entry, cause=Cause.CUT if unstored[1] else Cause.REFUSED, unstored=unstored[0])
        return replace(entry, cause=Cause.CHANGED if entry.stored and common else Cause.NEVER_STORED)

    def _other(
        self, chain: Chain, common: int, identity: NamespaceIdentity, others_max: int, *, is_empty: bool
    ) -> Other | None:
        """The namespace that has more of the prompt. Those of tenants, and encrypted ones, are not searched.

        Where this namespace holds nothing, also one that is the same but for the salt, whatever it has.
        """
        best: Other | None = None
        limit = chain.n_tokens - 1 if others_max > OTHERS_MAX else min(chain.n_tokens - 1, BLOCK_TOKENS)
        for info in self._nearest.namespaces(others_max, readable=True):
            if info.root == chain.root:
                continue
            has = self._nearest.common_tokens(Chain(info.root, chain.tokens), limit)
            if has >= common + OTHER_TOKENS_MIN and (best is None or has > best.n_tokens):
                best = Other(identity.differs(NamespaceIdentity.of(info)), info.root, info.alias, has)
        if best is None and is_empty:
            private = self._nearest.namespaces(others_max, readable=False)
            kin = [info for info in private if identity.differs(NamespaceIdentity.of(info)) == SALT]
            best = Other(SALT, kin[0].root, kin[0].alias) if kin else None
        return best

    # -- stores ----------------------------------------------------------------------------------------------------

    def stored(self, chain: Chain, end: StoreEnd, *, private: bool) -> None:
        """A store has ended. `private`: of a tenant, or encrypted."""
        if private or not self._keeps or self._nearest.is_encrypted(chain.root):
            return
        if end.reason not in NOT_NEEDED and end.stored_tokens < chain.n_tokens:
            spot = _spot(chain, end.stored_tokens, chain.n_tokens)
            with self._lock:
                self._unstored[spot] = end.reason, end.new_bytes > 0
        with self._lock:
            waiting = [(key, one) for key, one in self._entries.items() if one.root == chain.root]
        for key, one in reversed(waiting):
            more = one.store is None or one.store.offered_tokens <= end.offered_tokens
            if more and _spot(chain, one.common_tokens, one.asked.prompt_tokens) == one.spot:
                written = end.new_bytes + (one.store.new_bytes if one.store else 0)
                with self._lock:
                    if self._entries.get(key) is one:
                        self._entries[key] = replace(one, store=replace(end, new_bytes=written))
                return

    # -- telling ---------------------------------------------------------------------------------------------------

    def last(self, count: int, root_prefix: bytes = b"", alias: str = "") -> list[RequestEntry]:
        """The latest requests, the newest first."""
        with self._lock:
            found = [one for one in reversed(self._entries.values()) if one.root.startswith(root_prefix)]
        return [one for one in found if not alias or one.asked.who.alias == alias][:count]

    def identities(self) -> dict[bytes, NamespaceIdentity]:
        """The identities that asked lately, by root, the latest first."""
        with self._lock:
            return dict(reversed(self._identities.items()))

    def forget(self) -> None:
        """Drop what was noted of blocks that were deleted since. Once a second, and after each eviction."""
        now = self._nearest.since
        if now == self._looked:
            return
        self._looked = now
        with self._lock:
            entries = list(self._entries.items())
        gone = [key for key, one in entries if self._nearest.is_gone(one.root, one.keys, one.since)]
        with self._lock:
            for key in gone:
                self._entries.pop(key, None)
        self.places.forget(frozenset(one.root for key, one in entries if key in gone))


def _spot(chain: Chain, common: int, n_tokens: int) -> bytes:
    """A hash of a prompt of `n_tokens` from its first token to some after the first `common`."""
    full = common // BLOCK_TOKENS
    if full > chain.full:
        return b""
    end = min(common + SIDE_TOKENS, n_tokens) * TOKEN_BYTES
    return block_key(chain.parent(full), chain.tokens[full * BLOCK_BYTES : end])
