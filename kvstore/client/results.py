"""Results of a session's methods, each with a reason where it is incomplete; the worker's log line of each request.

A log line has the request id that the daemon's log has for the same request. The level is DEBUG, because a server has
its own log; `kvstore run` raises it to INFO (`say_requests`).
"""

from __future__ import annotations

import logging
import secrets
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

from kvstore import errors
from kvstore.core import log as lines
from kvstore.core.blocks import Reason, fidelity_text
from kvstore.core.keys import Namespace
from kvstore.core.layers import KVLayer, StateLayer
from kvstore.core.reasons import NOT_NEEDED
from kvstore.core.text import plain_text

ID_BYTES = 3
log = logging.getLogger(__name__)
_request_id: ContextVar[str] = ContextVar("kvstore_request_id", default="")
_level = logging.DEBUG


@dataclass(frozen=True, slots=True)
class Match:
    """The result of a match: how much of a prompt a fetch would return now. False if it is nothing."""

    n_tokens: int
    reason: Reason
    fidelity: int = 0

    @property
    def precision(self) -> str:
        """The fidelity in words: "exact", or "8 bits" a value."""
        return fidelity_text(self.fidelity)

    def __bool__(self) -> bool:
        return self.n_tokens > 0


@dataclass(frozen=True, slots=True)
class HitSource:
    """Where a hit came from and what it took: `nbytes` were read and verified in `elapsed_s`."""

    transport: str
    representation: str
    blocks: int
    nbytes: int
    elapsed_s: float


@dataclass(frozen=True, slots=True, eq=False)
class Hit:
    """The cache after the first `n_tokens` of a prompt, always fewer than the prompt has; all layers or none.

    `layers` are in the layout's order and belong to the caller: KVLayer for kv, StateLayer for window and state layers.
    `reason` says why there is no more; OK when there is only the last token left. `fidelity` is a rank: the higher, the
    more exact; `precision` says it in words.
    """

    n_tokens: int
    layers: tuple[KVLayer | StateLayer, ...] = field(repr=False)
    reason: Reason
    fidelity: int
    source: HitSource

    @property
    def precision(self) -> str:
        """The fidelity in words: "exact", or "8 bits" a value."""
        return fidelity_text(self.fidelity)


@dataclass(frozen=True, slots=True, eq=False)
class LayerHit:
    """A hit that is read layer by layer: `layers` yields each layer once, in layout order, on the caller's thread.

    Each layer is verified and usable before the next is read. If `layers` raises KVStoreError, discard everything that
    was computed with the earlier layers, and prefill the whole prefix.
    """

    n_tokens: int
    layers: Iterator[KVLayer | StateLayer] = field(repr=False)
    reason: Reason
    fidelity: int

    @property
    def precision(self) -> str:
        """The fidelity in words: "exact", or "8 bits" a value."""
        return fidelity_text(self.fidelity)


@dataclass(frozen=True, slots=True)
class Miss:
    """No KV, and why. Always false, so `if hit := session.fetch(tokens)` reads as it should."""

    reason: Reason
    detail: str = ""
    n_tokens: int = 0

    def __bool__(self) -> bool:
        return False


@dataclass(frozen=True, slots=True)
class StoreResult:
    """Result of a store. Without `wait`, OK means queued; `durable` is known only with `wait`.

    `stored_tokens`: leading tokens of the sequence that are in the store now; `new_bytes`: written to disk for it.
    `detail`: what the reason leaves open, for people, such as which limit; may be empty.
    """

    stored_tokens: int = 0
    new_bytes: int = 0
    reason: Reason = Reason.OK
    durable: bool = False
    detail: str = field(default="", compare=False)


# Most specific first: the first class that an error is an instance of decides.
_REASONS: tuple[tuple[type[errors.KVStoreError], Reason], ...] = (
    (errors.LayoutMismatchError, Reason.IDENTITY),
    (errors.UnsupportedLayerError, Reason.UNSUPPORTED_LAYER),
    (errors.InvalidRequestError, Reason.INVALID),
    (errors.NotFoundError, Reason.EVICTED),
    (errors.StoreFullError, Reason.STORE_FULL),
    (errors.LimitError, Reason.QUEUE_FULL),
    (errors.CredentialsError, Reason.DENIED),
    (errors.UntrustedError, Reason.UNTRUSTED),
    (errors.CircuitOpenError, Reason.CIRCUIT_OPEN),
    (errors.ForkedError, Reason.FORKED),
    (errors.TLSError, Reason.TLS),
    (errors.VersionError, Reason.VERSION),
    (errors.UnavailableError, Reason.UNAVAILABLE),
    (errors.DeadlineError, Reason.DEADLINE),
    (errors.CorruptDataError, Reason.CORRUPT),
    (errors.UnknownFormatError, Reason.UNKNOWN_RECIPE),
    (errors.AuxMissingError, Reason.NO_BASIS),
)


def reason_of(error: errors.KVStoreError) -> Reason:
    """The reason under which an error shows in a Miss or StoreResult."""
    for kind, reason in _REASONS:
        if isinstance(error, kind):
            return reason
    return Reason.INTERNAL


def missed(error: BaseException) -> Miss:
    """The miss for a fetch that ended with an error."""
    return Miss(reason_of(error) if isinstance(error, errors.KVStoreError) else Reason.DEADLINE)


class SessionStats:
    """Plain counters of one session. Any thread may count; reading takes no lock."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.hits = 0
        self.hit_tokens = 0
        self.misses: Counter[str] = Counter()  # by reason
        self.stores: Counter[str] = Counter()  # by reason, "ok" among them; one for each piece that was sent
        self.stored_bytes = 0
        self.not_captured_tokens = 0

    def fetched(self, answer: Hit | LayerHit | Miss) -> None:
        """Count a fetch."""
        with self._lock:
            if isinstance(answer, Miss):
                self.misses[answer.reason.value] += 1
            else:
                self.hits += 1
                self.hit_tokens += answer.n_tokens

    def stored(self, result: StoreResult, n_tokens: int = 0) -> None:
        """Count the end of a store of `n_tokens`."""
        with self._lock:
            self.stores[result.reason.value] += 1
            self.stored_bytes += result.new_bytes
            if result.reason is Reason.NOT_CAPTURED:
                self.not_captured_tokens += max(0, n_tokens - result.stored_tokens)


def say_requests() -> None:
    """Log requests at INFO from now on, in all sessions of the process."""
    global _level
    _level = logging.INFO


def request_id() -> str:
    """The id of the request that this thread is about, or a new one."""
    return _request_id.get() or secrets.token_hex(ID_BYTES)


@contextmanager
def one_request() -> Iterator[str]:
    """All that is asked in this block is about one request."""
    made = _request_id.set(secrets.token_hex(ID_BYTES))
    try:
        yield _request_id.get()
    finally:
        _request_id.reset(made)


def say_fetched(
    namespace: Namespace, name: str, prompt_tokens: int, answer: Hit | LayerHit | Miss, seconds: float
) -> None:
    """The line of a fetch; `name` is the id of its request."""
    alias = lines.plain_alias(namespace.alias, namespace.root)
    if not answer.n_tokens:
        say_miss(alias, name, prompt_tokens, answer.reason)
        return
    source = getattr(answer, "source", None)
    nbytes = source.nbytes if source else 0
    line = lines.hit_line(alias, answer.n_tokens, prompt_tokens, nbytes, seconds, answer.reason)
    log.log(_level, "%s", lines.with_id(line, name))


def say_miss(alias: str, name: str, prompt_tokens: int, reason: Reason) -> None:
    """The line of a request that got nothing."""
    line = lines.miss_line(plain_text(alias, lines.ALIAS_CHARACTERS_MAX), prompt_tokens, reason)
    log.log(_level, "%s", lines.with_id(line, name))


def say_stored(namespace: Namespace, name: str, span: tuple[int, int], result: StoreResult, seconds: float) -> None:
    """The line of a store of the tokens from `span[0]` to `span[1]`."""
    alias, (start, end) = lines.plain_alias(namespace.alias, namespace.root), span
    if result.new_bytes:
        line = lines.stored_line(alias, max(0, result.stored_tokens - start), result.new_bytes, seconds)
        log.log(_level, "%s", lines.with_id(line, name))
        return
    level = logging.DEBUG if result.reason in NOT_NEEDED else _level
    log.log(level, "%s", lines.with_id(lines.not_stored_line(alias, end, result.reason), name))
