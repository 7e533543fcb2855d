"""Client side of STORE, foreground half: finds the new tokens of a cache and copies them from the engine's arrays."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from kvstore.client.provenance import HeldPrefixes, Provenance, weights_of
from kvstore.client.results import StoreResult
from kvstore.client.uploader import Captured, StoreJob
from kvstore.codecs.device import Capture, evaluate
from kvstore.codecs.states import StateCapture, describe
from kvstore.core.blocks import BLOCK_TOKENS, Reason
from kvstore.core.bounded import Bounded
from kvstore.core.breaker import Deadline
from kvstore.core.byte_budget import ByteBudget
from kvstore.core.keys import Chain, Namespace
from kvstore.core.layers import KVLayer, StateLayer
from kvstore.errors import InvalidRequestError

# Prompts of a session whose parts are on their way, at most: as many as an engine computes at once.
_UNFINISHED_MAX = 256
_GOOD = (Reason.OK, Reason.ALREADY_STORED)
KV_STORED = (*_GOOD, Reason.NO_CHECKPOINT)

# REST_S: how long the uncopied rest of a sequence is kept. ROOM_S: how long the background thread waits for memory.
REST_S = 60.0
ROOM_S = 10.0


@dataclass(slots=True)
class Touch:
    """Marks the store of a caller whose own memory keeps the sequence, too: the daemon may defer it (DEFERRED).

    Such a caller offers it again, without this, when it ends soon after. `prompt` is the number, not 0, of the prompt
    that it was computed for, below 2^24: what two prompts offer is written. `tokens`: leading tokens that this prompt
    found in the caller's memory. `deferred`: the daemon has left something of the prompt to the caller's memory.
    """

    prompt: int
    tokens: int = 0
    deferred: bool = False


@dataclass(frozen=True, slots=True)
class StoreArguments:
    """Arguments of one store: the prompt and the caller's whole cache.

    `restored_tokens`: leading tokens that the caller got from the store; None: use the session's own record.
    """

    chain: Chain
    layers: Sequence[KVLayer | StateLayer]
    restored_tokens: int | None
    fidelity_min: int
    touch: Touch | None = None


class Rest:
    """The part of a sequence that is not copied yet, as views of the caller's evaluated arrays.

    Used for a sequence larger than the budget, and for one whose first tokens were left out, until the daemon confirms
    that it holds them. The background thread copies it in pieces (`next_job`) when memory is free. While a rest is
    held, an engine that writes into these arrays has to copy them first. So a rest is dropped after `REST_S`, or when
    the session's next one is made.
    """

    def __init__(self, storer: Storer, request: StoreArguments, start: int, after: StoreJob | None) -> None:
        self.start = start
        self._after = after
        self._is_begun = after is not None
        self.request: StoreArguments | None = replace(request, layers=[_own(layer) for layer in request.layers])
        self._storer = storer
        self._give_up_at_s = time.monotonic() + REST_S

    def next_job(self) -> StoreJob | None:
        """Copy the next piece. None if the rest was dropped, memory is short, or the piece before it was not stored."""
        request, left_s = self.request, self._give_up_at_s - time.monotonic()
        after, self._after = self._after, None
        if request is None or left_s <= 0 or (after is not None and after.result.reason not in KV_STORED):
            return None
        found = self._storer.next_piece(request, self.start, min(ROOM_S, left_s))
        if found is None:
            return None
        job, is_last = found
        job.continued_tokens, self._is_begun = self.start * self._is_begun, True
        self.start = job.end
        if is_last:
            self.request = None
        return job

    def start_over(self) -> bool:
        """Begin after what the store is known to hold by now; whether there is anything left to copy from."""
        request = self.request
        if request is not None:
            self.start = self._storer.held.held_tokens(request.chain)
        return request is not None

    def let_go(self) -> None:
        """Hold nothing any more. Any thread."""
        self.request = None


def _own(layer: KVLayer | StateLayer) -> KVLayer | StateLayer:
    """The layer with evaluated arrays of its own over the same buffers: the caller may write into its own ones."""
    if isinstance(layer, KVLayer):
        own: KVLayer | StateLayer = replace(
            layer, keys=tuple(a[:] for a in layer.keys), values=tuple(a[:] for a in layer.values)
        )
        arrays = [*own.part("keys"), *own.part("values")] if isinstance(own, KVLayer) else []
    else:
        own = replace(
            layer, arrays=tuple((name, array[:] if array.ndim else array[...]) for name, array in layer.arrays)
        )
        arrays = [array for _, array in own.arrays]
    evaluate(arrays)
    return own


class Storer:
    """Turns stores into jobs. It keeps the latest `Rest`s, and the ends of prompts that may go on.

    Any thread may call. Each call works on its caller's thread.
    """

    def __init__(
        self,
        namespace: Namespace,
        budget: ByteBudget,
        held: HeldPrefixes,
        provenance: Provenance,
        submit: Callable[[StoreJob | Rest], bool],
    ) -> None:
        self._layout = namespace.layout
        self._budget = budget
        self.held = held
        self._provenance = provenance
        self._weights = weights_of(namespace)
        self._submit = submit
        self._lock = threading.Lock()  # over the three below
        self._unfinished: Bounded[bytes, int] = Bounded(_UNFINISHED_MAX)
        self._rest: Rest | None = None
        self._again: Rest | None = None

    def storable(self, layers: Sequence[KVLayer | StateLayer], n_tokens: int) -> tuple[int, Reason]:
        """(leading tokens whose KV the layers hold, why none). InvalidRequestError for layers of another layout.

        Without any kv layer that is the position of the window and state layers.
        """
        if len(layers) != len(self._layout.layers):
            raise InvalidRequestError(f"{len(layers)} layers where the layout has {len(self._layout.layers)}")
        for index, (layer, spec) in enumerate(zip(layers, self._layout.layers, strict=True)):
            if layer.spec != spec or isinstance(layer, StateLayer) != spec.is_exact:
                raise InvalidRequestError(f"layer {index} is not what the layout says")
        kv = [layer for layer in layers if isinstance(layer, KVLayer)]
        offsets = {layer.n_tokens for layer in kv or layers}
        # More KV than tokens, or layers that disagree: which tokens the values belong to is unknown.
        if len(offsets) != 1 or max(offsets) > n_tokens:
            return 0, Reason.OFFSET_MISMATCH
        offset = offsets.pop()
        return offset, Reason.OK if offset else Reason.BELOW_THRESHOLD

    def capture(self, request: StoreArguments, deadline: Deadline, *, wait: bool) -> tuple[list[StoreJob], Reason]:
        """Copy what is not known to be held and queue it: (jobs queued, why not everything).

        A sequence that fits the budget is queued or refused at once. A larger one goes in pieces of half the budget,
        each stored on its own, so that one is captured while the one before is sent; between pieces the caller waits
        for room until the deadline. What is left then is copied by the background thread (`Rest`) unless the caller
        asked to `wait`. The checkpoint goes with the last piece, or by itself where that has no room for it.
        """
        n_tokens = request.chain.n_tokens
        start = self.held.held_tokens(request.chain)
        state_bytes, reason = self._checkpoint(request)
        nbytes = (n_tokens - start) * self._layout.token_bytes + (state_bytes or 0)
        is_small = nbytes <= self._budget.limit_bytes
        ends = [n_tokens] if is_small else self._pieces(start, n_tokens, state_bytes or 0)
        jobs: list[StoreJob] = []
        for number, end in enumerate(ends, 1):
            timeout_s = deadline.left_s if wait or jobs else 0.0
            job = self._copied(request, start, end, state_bytes if number == len(ends) else None, timeout_s)
            if job is None:
                later = len(ends) > 1 and not wait and self._leave(request, start, jobs[-1] if jobs else None)
                return jobs, reason if later else Reason.QUEUE_FULL
            if jobs and jobs[-1].done.is_set() and jobs[-1].result.reason not in KV_STORED:
                job.release()  # the piece before this one was not stored
                return jobs, jobs[-1].result.reason
            job.continued_tokens = start if jobs else self._continued(request, start)
            if start and not jobs and not wait:
                job.again = self._keep_whole(request)
            if not self._queue(job):
                return jobs, Reason.QUEUE_FULL
            jobs.append(job)
            start = end
        if request.touch:
            self._may_go_on(request, start)
        return jobs, reason

    def capture_part(self, request: StoreArguments, tokens_max: int, *, checkpoint: bool) -> tuple[int, Reason]:
        """Copy and queue what is new of a prompt that is still being computed: (tokens held or queued, why not all).

        Never waits, and holds none of the caller's arrays afterwards, since the engine writes into them with its next
        step. Whole blocks only, at most `tokens_max` tokens; with the `checkpoint` at their end, all tokens.
        """
        start, n_tokens = self.held.held_tokens(request.chain), request.chain.n_tokens
        state_bytes = self._checkpoint(request)[0] if checkpoint and n_tokens - start <= tokens_max else None
        end = min(n_tokens, start + tokens_max) // BLOCK_TOKENS * BLOCK_TOKENS if state_bytes is None else n_tokens
        if end <= start and state_bytes is None:
            return start, Reason.ALREADY_STORED
        ends = self._pieces(start, end, state_bytes or 0)
        for number, piece_end in enumerate(ends, 1):
            job = self._copied(request, start, piece_end, state_bytes if number == len(ends) else None, 0.0)
            if job is None:
                return start, Reason.QUEUE_FULL
            job.interim = bool(job.checkpoint)
            job.continued_tokens = self._continued(request, start)
            if not self._queue(job):
                return start, Reason.QUEUE_FULL
            start = piece_end
            self._may_go_on(request, start)
        return start, Reason.OK

    def _queue(self, job: StoreJob) -> bool:
        """Queue a job; its tokens then count as held, until it fails, so that no later one brings them again."""
        self.held.hold(job.chain)
        if self._submit(job):
            return True
        self.held.forget(job.chain, job.start)
        job.release()
        return False

    def _may_go_on(self, request: StoreArguments, end: int) -> None:
        """Note that a later store may continue the same prompt after `end`."""
        key = request.chain.parent(end // BLOCK_TOKENS)
        with self._lock:
            self._unfinished[key] = request.touch.prompt if request.touch else 0

    def _continued(self, request: StoreArguments, start: int) -> int:
        """`start` where earlier jobs of the same prompt had the tokens before it, else 0.

        One that was deferred is offered again without its number.
        """
        key = request.chain.parent(start // BLOCK_TOKENS)
        with self._lock:
            number = self._unfinished.get(key)
            if number is None or (request.touch is not None and request.touch.prompt != number):
                return 0
            del self._unfinished[key]
        return start

    def _keep_whole(self, request: StoreArguments) -> Rest:
        """Keep the whole sequence until the daemon confirms its first tokens. Only the latest store is kept."""
        rest = Rest(self, request, 0, None)
        with self._lock:
            before, self._again = self._again, rest
        if before is not None:
            before.let_go()
        return rest

    def _leave(self, request: StoreArguments, start: int, after: StoreJob | None) -> bool:
        """Let the background thread copy the tokens after `start`. Returns whether that was queued."""
        rest = Rest(self, request, start, after)
        with self._lock:
            before, self._rest = self._rest, rest
        if before is not None:
            before.let_go()
        return self._submit(rest)

    def next_piece(self, request: StoreArguments, start: int, timeout_s: float) -> tuple[StoreJob, bool] | None:
        """(the next piece from `start`, whether it is the last); None if memory is short. Background thread."""
        state_bytes, _ = self._checkpoint(request)
        n_tokens = request.chain.n_tokens
        ends = self._pieces(start, n_tokens, state_bytes or 0) if start < n_tokens else [n_tokens]
        job = self._copied(request, start, ends[0], state_bytes if len(ends) == 1 else None, timeout_s)
        return None if job is None else (job, len(ends) == 1)

    def _checkpoint(self, request: StoreArguments) -> tuple[int | None, Reason]:
        """(bytes of the checkpoint to offer, None for no checkpoint; the reason why there is none).

        Window and state layers are valid only at their exact token count, so all must be at the end.
        """
        states = [layer for layer in request.layers if isinstance(layer, StateLayer)]
        if not states:
            return None, Reason.OK
        if {layer.n_tokens for layer in states} != {request.chain.n_tokens}:
            return None, Reason.NO_CHECKPOINT
        if self.held.holds_checkpoint(request.chain):
            return None, Reason.OK
        return sum(state.nbytes for state in describe(request.layers)), Reason.OK

    def _pieces(self, start: int, n_tokens: int, state_bytes: int) -> list[int]:
        """Token positions at which pieces of half a budget end.

        If the checkpoint does not fit beside the last piece, the last end is listed twice: the checkpoint goes alone.
        """
        token_bytes, limit_bytes = self._layout.token_bytes, self._budget.limit_bytes
        step = max(1, limit_bytes // 2 // max(1, BLOCK_TOKENS * token_bytes)) * BLOCK_TOKENS
        first = start // BLOCK_TOKENS * BLOCK_TOKENS + step
        ends = [*range(first, n_tokens, step), n_tokens]
        last = n_tokens - (ends[-2] if len(ends) > 1 else start)
        fits = last * token_bytes + state_bytes <= limit_bytes
        return ends if fits or not state_bytes else [*ends, n_tokens]

    def _copied(
        self, request: StoreArguments, start: int, end: int, state_bytes: int | None, timeout_s: float
    ) -> StoreJob | None:
        """A job with a copy of tokens `[start, end)` and, where it has `state_bytes`, of the checkpoint.

        None if there is no room in the budget within `timeout_s`.
        """
        nbytes = (end - start) * self._layout.token_bytes + (state_bytes or 0)
        if not self._budget.acquire(nbytes, timeout_s):
            return None
        try:
            restored_tokens, fidelity = self._restored_part(request)
            capture = Capture(request.layers, start, end) if end > start else None
            states = StateCapture(request.layers) if state_bytes is not None else None
        except BaseException:
            self._budget.release(nbytes)
            raise
        return StoreJob(
            chain=request.chain.head(end),
            start=start,
            restored_tokens=min(restored_tokens, end),
            restored_fidelity=fidelity,
            captured=Captured(self._budget, nbytes, capture, states),
            checkpoint=states.states if states else (),
            touch=request.touch,
        )

    def _restored_part(self, request: StoreArguments) -> tuple[int, int]:
        """(leading tokens that came out of the store, their fidelity).

        If only the caller knows that tokens were restored, their rank is unknown: the lower of what the session accepts
        and the lowest rank of any hit is used. It is never 0: the daemon refuses 0, which means "not given".
        """
        known, fidelity = self._provenance.restored(self._weights, request.chain.tokens)
        if request.restored_tokens is None or request.restored_tokens <= known:
            given = known if request.restored_tokens is None else max(0, request.restored_tokens)
            return given, max(1, fidelity)
        lowest = self._provenance.lowest(self._weights)
        return request.restored_tokens, max(1, min(fidelity, lowest, request.fidelity_min))


def combine(results: Sequence[StoreResult], reason: Reason) -> StoreResult:
    """One result for the pieces of a store; `reason` says why not all pieces were queued.

    Bytes are summed. `stored_tokens` is that of the last good piece, and the reason that of the first failed piece.
    """
    bad = next((one.reason for one in results if one.reason not in _GOOD), reason)
    if bad is Reason.OK and results and all(one.reason is Reason.ALREADY_STORED for one in results):
        bad = Reason.ALREADY_STORED
    return StoreResult(
        stored_tokens=max((one.stored_tokens for one in results), default=0),
        new_bytes=sum(one.new_bytes for one in results),
        reason=bad,
        durable=bool(results) and bad in KV_STORED and all(one.durable for one in results),
        detail=next((one.detail for one in results if one.reason is bad), ""),
    )
