"""STORE on the worker's side, foreground half: what of a cache is new, copied out of the engine's arrays in pieces."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kvstore.blocks import BLOCK_TOKENS, TOKEN_BYTES, Reason, count_tokens
from kvstore.bounds import ByteBudget
from kvstore.client.breaker import Deadline
from kvstore.client.prefixes import HeldPrefixes, RestoredPrefixes
from kvstore.client.results import StoreResult
from kvstore.client.uploader import StoreJob
from kvstore.codecs.device import Capture
from kvstore.errors import InvalidRequestError
from kvstore.keys import Namespace
from kvstore.layers import KVLayer

_GOOD = (Reason.OK, Reason.ALREADY_STORED)


@dataclass(frozen=True, slots=True)
class StoreRequest:
    """Packed tokens, the caller's whole cache, and what the caller says came out of the store (None: ask memory)."""

    tokens: bytes
    layers: Sequence[KVLayer]
    restored_tokens: int | None
    fidelity_min: int


class Storer:
    """Turns stores into jobs. Stateless but for what it is given; each call works on its caller's thread."""

    def __init__(
        self,
        namespace: Namespace,
        budget: ByteBudget,
        held: HeldPrefixes,
        restored: RestoredPrefixes,
        submit: Callable[[StoreJob], bool],
    ) -> None:
        self._layout = namespace.layout
        self._budget = budget
        self._held = held
        self._restored = restored
        self._submit = submit

    def storable(self, layers: Sequence[KVLayer], n_tokens: int) -> tuple[int, Reason]:
        """(leading tokens whose KV the layers hold, why none). InvalidRequestError for layers of another layout."""
        if len(layers) != len(self._layout.layers):
            raise InvalidRequestError(f"{len(layers)} layers where the layout has {len(self._layout.layers)}")
        for index, (layer, spec) in enumerate(zip(layers, self._layout.layers, strict=True)):
            if layer.spec != spec:
                raise InvalidRequestError(f"layer {index} is not what the layout says")
        offsets = {layer.n_tokens for layer in layers}
        # More KV than tokens, or layers that disagree: nobody can say which tokens these values belong to.
        if len(offsets) != 1 or max(offsets) > n_tokens:
            return 0, Reason.OFFSET_MISMATCH
        offset = offsets.pop()
        return offset, Reason.OK if offset else Reason.BELOW_THRESHOLD

    def capture(self, request: StoreRequest, deadline: Deadline, *, wait: bool) -> tuple[list[StoreJob], Reason]:
        """Copy what is not known to be held and queue it: (jobs queued, why not everything).

        A sequence that fits the budget is queued or refused at once. A larger one goes in pieces of half the budget,
        each stored on its own, so that one is captured while the one before is sent; between pieces the caller waits
        for room until the deadline. What is left then is dropped: the next store goes on from there.
        """
        n_tokens = count_tokens(request.tokens)
        start = self._held.held_tokens(request.tokens)
        jobs: list[StoreJob] = []
        for end in self._ends(start, n_tokens):
            timeout_s = deadline.left_s if wait or jobs else 0.0
            nbytes = (end - start) * self._layout.token_bytes
            if not self._budget.acquire(nbytes, timeout_s):
                return jobs, Reason.QUEUE_FULL
            if jobs and jobs[-1].done.is_set() and jobs[-1].result.reason not in _GOOD:
                self._budget.release(nbytes)  # the pieces before this one are not there to build on
                return jobs, jobs[-1].result.reason
            job = self._job(request, start, end, nbytes)
            if not self._submit(job):
                job.release()
                return jobs, Reason.QUEUE_FULL
            jobs.append(job)
            start = end
        return jobs, Reason.OK

    def _ends(self, start: int, n_tokens: int) -> list[int]:
        """Where the pieces end: one if all fits the budget, else block boundaries half a budget apart."""
        if (n_tokens - start) * self._layout.token_bytes <= self._budget.limit_bytes:
            return [n_tokens]
        block_bytes = BLOCK_TOKENS * self._layout.token_bytes
        step = max(1, self._budget.limit_bytes // 2 // block_bytes) * BLOCK_TOKENS
        first = start // BLOCK_TOKENS * BLOCK_TOKENS + step
        return [*range(first, n_tokens, step), n_tokens]

    def _job(self, request: StoreRequest, start: int, end: int, nbytes: int) -> StoreJob:
        """Copy tokens `[start, end)`; the caller's share of the budget goes to the job, or back if this raises."""
        try:
            restored_tokens, fidelity = self._restored_part(request)
            capture = Capture(request.layers, start, end) if end > start else None
        except BaseException:
            self._budget.release(nbytes)
            raise
        return StoreJob(
            tokens=request.tokens[: end * TOKEN_BYTES],
            start=start,
            end=end,
            restored_tokens=min(restored_tokens, end),
            restored_fidelity=fidelity,
            budget=self._budget,
            nbytes=nbytes,
            capture=capture,
        )

    def _restored_part(self, request: StoreRequest) -> tuple[int, int]:
        """(leading tokens that came out of the store, their fidelity).

        Of tokens that only the caller knows to be restored, the rank is unknown: at least what the session accepts. It
        is never 0, which a daemon would read as "not said".
        """
        known, fidelity = self._restored.restored(request.tokens)
        if request.restored_tokens is None or request.restored_tokens <= known:
            given = known if request.restored_tokens is None else max(0, request.restored_tokens)
            return given, max(1, fidelity)
        return request.restored_tokens, max(1, min(fidelity, request.fidelity_min))


def combine(results: Sequence[StoreResult], reason: Reason) -> StoreResult:
    """One result for the pieces of a store; `reason` is why not all of it was queued.

    Bytes add up, the last good piece says how many tokens are held, and the first piece that fell short says why.
    """
    bad = next((one.reason for one in results if one.reason not in _GOOD), reason)
    if bad is Reason.OK and results and all(one.reason is Reason.ALREADY_STORED for one in results):
        bad = Reason.ALREADY_STORED
    return StoreResult(
        stored_tokens=max((one.stored_tokens for one in results), default=0),
        new_bytes=sum(one.new_bytes for one in results),
        reason=bad,
        durable=bool(results) and bad in _GOOD and all(one.durable for one in results),
    )
