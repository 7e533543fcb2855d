"""The session: an inference worker's interface to one namespace of the store.

Its methods never raise for cache errors, so that generation never fails because of the cache. Every error becomes a
Miss or a StoreResult with a reason.
"""

from __future__ import annotations

import functools
import logging
import math
import time
import weakref
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Self, get_args

from kvstore.client import provenance
from kvstore.client.attempt import Caller
from kvstore.client.background import Background
from kvstore.client.client import SessionOptions
from kvstore.client.connection import Connection
from kvstore.client.fetch import Fetcher, Representation, Transport
from kvstore.client.results import (
    Hit,
    LayerHit,
    Match,
    Miss,
    SessionStats,
    StoreResult,
    reason_of,
    request_id,
    say_fetched,
)
from kvstore.client.store import StoreArguments, Storer, Touch, combine
from kvstore.client.uploader import StoreJob, Uploader
from kvstore.core.blocks import (
    FIDELITY_EXACT,
    TOKEN_BYTES,
    Reason,
    count_tokens,
    pack_tokens,
)
from kvstore.core.breaker import Deadline
from kvstore.core.byte_budget import ByteBudget
from kvstore.core.interrupts import each_uninterrupted, turn_s, undivided
from kvstore.core.keys import Chain, Namespace
from kvstore.core.layers import KVLayer, StateLayer
from kvstore.core.process import FORKED, is_forked, unless_forked
from kvstore.core.reasons import ABSENT
from kvstore.errors import InvalidRequestError, KVStoreError, LimitError, UnavailableError
from kvstore.wire.v1 import kvstore_pb2 as pb

log = logging.getLogger(__name__)

STORE_WAIT_S = 60.0
CLOSE_S = 5.0
# Shorter than any call to the daemon.
ASK_MS = 1.0


def prefill_share_ms(caller: Caller, n_tokens: int) -> float:
    """How long a fetch may take: half of what computing the prompt would, without a limit where that is not known."""
    if not caller.prefill_tokens_per_s:
        return math.inf
    return 500 * max(0, n_tokens - 1 - caller.covered_tokens) / caller.prefill_tokens_per_s


class Session:
    """KV of one namespace: match, fetch, store. Any thread may call any method; nothing is raised for cache trouble.

    `fetch` works on the caller's thread, and what it returns belongs to that thread. `store` copies tokens out of the
    caller's arrays on the caller's thread, which must own them; everything after that happens on the session's one
    background thread, a daemon thread. Captured arrays, and what a stream is received into, count against the client's
    `memory_bytes`. Dropped without `close`, a session stores what was queued for some seconds and ends its thread.

    On the main thread the handlers of signals, such as Ctrl-C's, run when a method has ended, and so after a fetch's
    deadlines at the latest; in `flush`, `close` and a store that waits they run within 0.1 s.
    """

    def __init__(
        self, connection: Connection, namespace: Namespace, budget: ByteBudget, options: SessionOptions
    ) -> None:
        self.namespace = namespace
        self.options = options
        self.stats = SessionStats()
        self._root = namespace.root
        self._connection = connection
        self._rest_until_s = 0.0
        self._told_tokens_per_s = 0.0
        self._held = provenance.HeldPrefixes()
        self._provenance = provenance.PROCESS
        self._weights = provenance.weights_of(namespace)
        self._uploader = Uploader(connection, namespace, options.profile, same_host=options.same_host)
        self._background = Background(namespace, connection, self._uploader, self._held, self.stats)
        self._storer = Storer(namespace, budget, self._held, self._provenance, self._background.submit)
        self._fetcher = Fetcher(connection, namespace, options, budget, self._background.report)
        weakref.finalize(
            self, unless_forked, self._background.retire
        ).atexit = False  # an exit never waits for the store

    @undivided
    def match(self, tokens: Iterable[int] | bytes, prefill_tokens_per_s: float = 0.0, covered_tokens: int = 0) -> Match:
        """How much of `tokens` a fetch would return now, by asking the index only. Speed and tokens as in `fetch`."""
        if is_forked():
            return Match(0, Reason.FORKED)
        try:
            packed = pack_tokens(tokens)
            if refusal := self._refusal(packed):
                return Match(0, refusal)
            with self._resting(), self._connection.attempt():
                caller = Caller(self._speed(prefill_tokens_per_s), covered_tokens, request_id=request_id())
                reply = self._fetcher.match(Chain(self._root, packed), self.options.deadlines, caller)
            return Match(reply.n_tokens, Reason.of(reply.reason, Reason.INTERNAL), reply.fidelity)
        except KVStoreError as error:
            _tell("match", error)
            return Match(0, reason_of(error))
        except Exception:
            log.exception("match failed")
            return Match(0, Reason.INTERNAL)

    @undivided
    def fetch(
        self,
        tokens: Iterable[int] | bytes,
        representation: Representation = "auto",
        transport: Transport = "auto",
        total_ms: float | None = None,
        *,
        prefill_tokens_per_s: float = 0.0,
        covered_tokens: int = 0,
        evaluate: bool = False,
    ) -> Hit | Miss:
        """KV of the longest usable prefix of `tokens`, at most all but the last; a falsy Miss when there is none.

        Every byte of a hit is read and verified; decoding may be lazy, so evaluate on this thread. `representation`:
        "packed" (decoded here), "quantized" (packed, but layers that are affine throughout stay codes, which mlx-lm
        attends to as they are; their specs say so), "dense" (decoded by the daemon), "auto" (packed, unless only the
        daemon can decode it).
        `transport`: "path" (files), "stream", "auto" (path if the daemon is on this host and lets us). `total_ms`: a
        tighter limit for this call. `prefill_tokens_per_s`: how fast the caller computes, 0 if it does not know; a
        prefix that costs more than it saves is then left out (SLOWER_THAN_PREFILL), and the call takes at most half of
        what the prefill would. `covered_tokens`: leading tokens that the caller has anyway. `evaluate`: also decode
        every layer here and now, so that any thread may view the arrays.
        """
        if is_forked():
            return Miss(Reason.FORKED, FORKED)
        packed, name, started_s = b"", request_id(), time.monotonic()
        try:
            packed = pack_tokens(tokens)
            speed = self._speed(prefill_tokens_per_s)
            caller = Caller(speed, covered_tokens, evaluate, representation == "quantized", name)
            answer = self._fetch(Chain(self._root, packed), representation, transport, total_ms, caller)
        except KVStoreError as error:
            _tell("fetch", error)
            answer = Miss(reason_of(error), str(error))
        except Exception:
            log.exception("fetch failed")
            answer = Miss(Reason.INTERNAL, "see the log")
        self.stats.fetched(answer)
        say_fetched(self.namespace, name, count_tokens(packed), answer, time.monotonic() - started_s)
        return answer

    def _speed(self, prefill_tokens_per_s: float) -> float:
        """The caller's speed as far as it decides about hits; 0: not known."""
        return 0.0 if self.options.slow_hits else prefill_tokens_per_s

    def _fetch(
        self,
        chain: Chain,
        representation: Representation,
        transport: Transport,
        total_ms: float | None,
        caller: Caller,
    ) -> Hit | Miss:
        if representation not in get_args(Representation) or transport not in get_args(Transport):
            raise InvalidRequestError(f"no such representation or transport: {representation}, {transport}")
        if refusal := self._refusal(chain.tokens):
            return Miss(refusal)
        limits = self.options.deadlines
        longest_ms = prefill_share_ms(caller, chain.n_tokens)
        if longest_ms < ASK_MS:
            return Miss(Reason.SLOWER_THAN_PREFILL)
        total_ms = min(longest_ms, limits.total_ms, math.inf if total_ms is None else total_ms)
        with self._resting(), self._connection.attempt(hurried=total_ms < limits.stall_ms):
            answer = self._fetcher.fetch(chain, representation, transport, replace(limits, total_ms=total_ms), caller)
        if answer.n_tokens:
            found = chain.head(answer.n_tokens)
            self._held.hold(found, checkpoint=bool(self.namespace.layout.exact_layers))
            self._provenance.remember(
                self._weights, found.tokens, answer.fidelity if isinstance(answer, Hit) else FIDELITY_EXACT
            )
        if answer.reason in ABSENT:
            self._held.forget(chain, answer.n_tokens)
        return answer

    @undivided
    def fetch_layers(self, tokens: Iterable[int] | bytes, transport: Transport = "auto") -> LayerHit | Miss:
        """As `fetch`, packed, for callers that can start a prefill over: layers one by one, as they are asked for.

        Until the first layer nothing is raised; while they are read, a KVStoreError is: CorruptDataError for bytes that
        do not verify, DeadlineError, UnavailableError. The session's time limits run on between the layers.
        """
        if is_forked():
            return Miss(Reason.FORKED, FORKED)
        answer: LayerHit | Miss
        packed, name, started_s = b"", request_id(), time.monotonic()
        try:
            packed = pack_tokens(tokens)
            answer = self._fetch_layers(Chain(self._root, packed), transport, Caller(request_id=name))
        except KVStoreError as error:
            _tell("fetch_layers", error)
            answer = Miss(reason_of(error), str(error))
        except Exception:
            log.exception("fetch_layers failed")
            answer = Miss(Reason.INTERNAL, "see the log")
        self.stats.fetched(answer)
        say_fetched(self.namespace, name, count_tokens(packed), answer, time.monotonic() - started_s)
        return answer

    def _fetch_layers(self, chain: Chain, transport: Transport, caller: Caller) -> LayerHit | Miss:
        if transport not in get_args(Transport):
            raise InvalidRequestError(f"no such transport: {transport}")
        if refusal := self._refusal(chain.tokens):
            return Miss(refusal)
        with self._resting(), self._connection.attempt():
            plan, layers = self._fetcher.open(chain, transport, self.options.deadlines, caller)
        if plan.reason in ABSENT:
            self._held.forget(chain, plan.n_tokens)
        if not plan.n_tokens:
            return Miss(plan.reason)
        found = chain.head(plan.n_tokens)
        self._provenance.remember(self._weights, found.tokens, plan.fidelity)
        return LayerHit(plan.n_tokens, each_uninterrupted(self._one_by_one(found, layers)), plan.reason, plan.fidelity)

    def _one_by_one(
        self, found: Chain, layers: Iterator[KVLayer | StateLayer]
    ) -> Generator[KVLayer | StateLayer, None, None]:
        with self._connection.attempt():
            yield from layers
        self._held.hold(found, checkpoint=bool(self.namespace.layout.exact_layers))

    @undivided
    def store(
        self,
        tokens: Iterable[int] | bytes,
        layers: Iterable[KVLayer | StateLayer],
        wait: bool = False,
        restored_tokens: int | None = None,
        timeout_s: float = STORE_WAIT_S,
        touch: Touch | None = None,
    ) -> StoreResult:
        """Store the KV of `tokens`; `layers` are the whole cache, in the layout's order, and stay the caller's.

        Only tokens that the layers cover (their offset) and that the store is not known to hold are copied. Window and
        state layers make a checkpoint if they are at exactly that offset; if not, the rest is stored and the reason is
        NO_CHECKPOINT. Without `wait` the answer is OK when that is queued; with it, the daemon's final word, or
        DEADLINE after `timeout_s`.
        `restored_tokens`: how many leading tokens came out of the store; None: as recorded for this process's hits.
        `touch`: of a caller whose own memory keeps the sequence, so that it need not be written yet.
        """
        work = functools.partial(self._store, timeout_s=timeout_s, wait=wait)
        return self._storing(tokens, layers, restored_tokens, touch, work)

    @undivided
    def store_part(
        self,
        tokens: Iterable[int] | bytes,
        layers: Iterable[KVLayer | StateLayer],
        tokens_max: int,
        checkpoint: bool,
        touch: Touch | None = None,
    ) -> StoreResult:
        """Queue what is new of a prompt that is still being computed, between two steps of the engine; never waits.

        Of `layers`, as for `store`, whole blocks are read from the first token that is neither held nor queued, and
        nothing is kept. `checkpoint`: window and state layers too, until the sequence has its next checkpoint.
        `stored_tokens` are those held or queued. What finds no room (QUEUE_FULL) comes with the next part or `store`.
        """

        def work(request: StoreArguments) -> StoreResult:
            held, reason = self._storer.capture_part(request, tokens_max, checkpoint=checkpoint)
            return StoreResult(held, reason=reason)

        if touch and touch.deferred:
            return StoreResult(reason=Reason.DEFERRED)
        return self._storing(tokens, layers, None, touch, work)

    def _storing(
        self,
        tokens: Iterable[int] | bytes,
        layers: Iterable[KVLayer | StateLayer],
        restored_tokens: int | None,
        touch: Touch | None,
        work: Callable[[StoreArguments], StoreResult],
    ) -> StoreResult:
        """What `work` makes of the request, or why it never got to that. Nothing is raised."""
        if is_forked():
            return StoreResult(reason=Reason.FORKED)
        try:
            if self._background.closed:
                raise UnavailableError("the session is closed")
            if (away := self._connection.health.absence()) is not None:
                raise type(away)(str(away))  # not the one that others raise, too
            packed, given = pack_tokens(tokens), list(layers)
            n_tokens, reason = self._storer.storable(given, count_tokens(packed))
            chain = Chain(self._root, packed[: n_tokens * TOKEN_BYTES])
            if n_tokens:
                return work(StoreArguments(chain, given, restored_tokens, self.options.fidelity_min, touch))
            result = StoreResult(reason=reason)
        except KVStoreError as error:
            _tell("store", error)
            result = StoreResult(reason=reason_of(error), detail=str(error))
        except Exception:
            log.exception("store failed")
            result = StoreResult(reason=Reason.INTERNAL, detail="see the log")
        self.stats.stored(result)
        return result

    def _store(self, request: StoreArguments, *, timeout_s: float, wait: bool) -> StoreResult:
        deadline = Deadline(timeout_s if wait else self.options.store_block_ms / 1e3)
        result, late = StoreResult(reason=Reason.NOT_CAPTURED), StoreResult(reason=Reason.DEADLINE)
        for _ in range(2 if wait else 1):  # once more from the start, if the store held less than the session believed
            jobs, reason = self._storer.capture(request, deadline, wait=wait)
            if reason is not Reason.OK:
                self.stats.stored(StoreResult(reason=reason))
            if not wait:
                return StoreResult(reason=reason)
            result = combine([job.result if _is_done(job, deadline) else late for job in jobs], reason)
            if result.reason is not Reason.NOT_CAPTURED:
                break
        return result

    @undivided
    def reject(self, tokens: Iterable[int] | bytes, detail: str) -> None:
        """The caller could not use a hit of exactly `tokens`: nothing of them is believed to be held any more.

        In the background the daemon is told to check the end of them. Raises InvalidRequestError for tokens that are
        none.
        """
        packed = pack_tokens(tokens)
        chain = Chain(self._root, packed)
        self._held.forget(chain)
        self._background.report(chain.block_keys()[-1], detail)
        if self.namespace.layout.exact_layers:
            self._background.report(chain.checkpoint_key(), detail)

    def computes(self, tokens_per_s: float) -> None:
        """How fast the caller computes prompts, as measured: the daemon's statistics say what hits save. Does not wait.

        Told when it has changed by a tenth.
        """
        told = self._told_tokens_per_s
        if tokens_per_s > 0 and abs(tokens_per_s - told) > told / 10:
            self._told_tokens_per_s = tokens_per_s
            speed = pb.PrefillSpeed(namespace_id=self._root, tokens_per_s=tokens_per_s)
            self._connection.tell(pb.ReportRequest(speed=speed))

    @undivided
    def flush(self, timeout_s: float = STORE_WAIT_S) -> bool:
        """Wait until everything that is queued has ended, one way or the other; whether it has."""
        return not is_forked() and self._background.flush(timeout_s)

    @undivided
    def close(self, timeout_s: float = CLOSE_S) -> None:
        """Give what is queued `timeout_s` to be stored, drop the rest, end the thread. Safe to call twice."""
        if not is_forked():
            self._background.close(timeout_s)

    def __repr__(self) -> str:
        profile = f", profile={self.options.profile!r}" if self.options.profile else ""
        closed = ", closed" if self._background.closed else ""
        return f"<Session of {self.namespace!r} at {self._connection.address.target}{profile}{closed}>"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _refusal(self, tokens: bytes) -> Reason | None:
        """Why a prompt is not worth asking about, if so. Takes the breaker's trial when there is one."""
        if count_tokens(tokens) < 2:
            return Reason.BELOW_THRESHOLD
        if self._background.closed:
            return Reason.UNAVAILABLE
        if time.monotonic() < self._rest_until_s:
            return Reason.QUEUE_FULL
        return None if self._connection.breaker.allow() else Reason.CIRCUIT_OPEN

    @contextmanager
    def _resting(self) -> Iterator[None]:
        """A daemon that is busy says for how long; until then nothing is asked of it, and fetches are misses."""
        try:
            yield
        except LimitError as error:
            self._rest_until_s = time.monotonic() + error.retry_s
            raise


def _is_done(job: StoreJob, deadline: Deadline) -> bool:
    """Wait for the end of a job; whether it has come by the deadline."""
    while not job.done.wait(turn_s(deadline.left_s)):
        if not deadline.left_s:
            return False
    return True


def _tell(call: str, error: KVStoreError) -> None:
    """Log why a call failed; that the daemon is away, and each request's miss, have lines of their own."""
    log.debug("%s: %s", call, error)
