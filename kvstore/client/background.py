"""Background work of a session: stores and damage reports, one after the other, on one thread.

The thread holds references to parts of the session but never to the session itself. So a session that is dropped
without `close` is freed at once. Its thread ends when the queue is empty, or after a few seconds.
"""

from __future__ import annotations

import atexit
import logging
import math
import threading
import time
import weakref
from collections import deque
from dataclasses import dataclass
from typing import TypeAlias

from kvstore.client.connection import Connection
from kvstore.client.provenance import HeldPrefixes
from kvstore.client.results import SessionStats, StoreResult, reason_of, say_stored
from kvstore.client.store import KV_STORED, Rest
from kvstore.client.uploader import StoreJob, Uploader
from kvstore.core.blocks import BLOCK_TOKENS, Reason
from kvstore.core.interrupts import turn_s
from kvstore.core.keys import Namespace
from kvstore.core.process import is_forked
from kvstore.core.thread_priority import lower_thread_priority
from kvstore.errors import KVStoreError, LimitError

log = logging.getLogger(__name__)

STORE_TRIES_MAX = 5
JOIN_S = 2.0
# How long the thread of a session that was dropped may still begin to store what was queued.
RETIRE_S = 5.0

ITEMS_MAX = 256


@dataclass(frozen=True, slots=True)
class DamageReport:
    """A block that failed verification, to be reported to the daemon in the background."""

    key: bytes
    detail: str


Job: TypeAlias = StoreJob | Rest | DamageReport


class Background:
    """The background half of one session: jobs one after the other, on one thread that starts with the first.

    Any thread may call; `_run` and what it calls run on that thread. It is a daemon thread, so that an interpreter that
    exits never waits for the store.
    """

    def __init__(
        self,
        namespace: Namespace,
        connection: Connection,
        uploader: Uploader,
        held: HeldPrefixes,
        stats: SessionStats,
    ) -> None:
        self._namespace = namespace
        self._connection = connection
        self._uploader = uploader
        self._held = held
        self._stats = stats
        self._jobs: deque[Job] = deque()
        self._is_busy = False
        self._give_up_at = math.inf
        self._changed = threading.Condition()
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None
        self.closed = False  # whether nothing is taken any more
        _alive.add(self)

    def submit(self, job: Job) -> bool:
        """Queue a job; False when the queue is full or closed, and then the job is still the caller's."""
        with self._changed:
            if self.closed or len(self._jobs) >= ITEMS_MAX:
                return False
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="kvstore-sender", daemon=True)
                self._thread.start()
            self._jobs.append(job)
            self._changed.notify_all()
            return True

    @property
    def n_queued(self) -> int:
        """How many stores have not ended, with the job that runs now, whatever it is. Any thread."""
        with self._changed:
            return sum(not isinstance(job, DamageReport) for job in self._jobs) + self._is_busy

    def report(self, key: bytes, detail: str) -> None:
        """Tell the daemon of a block that did not verify, some time. Does not wait; lost when the queue is full."""
        self.submit(DamageReport(key, detail))

    def flush(self, timeout_s: float) -> bool:
        """Wait until everything that is queued has ended, one way or the other; whether it has."""
        give_up_at = time.monotonic() + timeout_s
        with self._changed:
            while self._jobs or self._is_busy:
                left_s = give_up_at - time.monotonic()
                if left_s <= 0:
                    return False
                self._changed.wait(min(turn_s(left_s), threading.TIMEOUT_MAX))
            return True

    def close(self, timeout_s: float) -> None:
        """Give what is queued `timeout_s` to be stored, drop the rest, end the thread. Safe to call twice.

        Ctrl-C ends the first of these only.
        """
        try:
            self.flush(timeout_s)
        finally:
            self._end_thread()

    def _end_thread(self) -> None:
        self._closing.set()
        self._uploader.cancel()
        with self._changed:
            self.closed = True
            dropped = list(self._jobs)
            self._jobs.clear()
            self._changed.notify_all()
        for job in dropped:
            self._drop(job)
        if self._thread is not None:
            self._thread.join(JOIN_S)
            if self._thread.is_alive():
                log.warning("the background thread did not end within %.0f s", JOIN_S)

    def retire(self) -> None:
        """The session is gone: the thread ends when the queue is empty, and starts no job after RETIRE_S.

        Neither waits nor fails: the garbage collector calls this, on any thread. A job in progress ends at its own time
        limits.
        """
        with self._changed:
            self.closed = True
            self._give_up_at = time.monotonic() + RETIRE_S
            self._changed.notify_all()

    def _run(self) -> None:
        lower_thread_priority()  # to the threads that decode, in this process and in the others
        while (job := self._take()) is not None:
            try:
                (self._work if time.monotonic() < self._give_up_at else self._drop)(job)
            finally:
                del job  # what it captured must not live until the next one comes
                with self._changed:
                    self._is_busy = False
                    self._changed.notify_all()

    def _take(self) -> Job | None:
        """The next job, once there is one; None when the queue is closed and empty."""
        with self._changed:
            self._changed.wait_for(lambda: self._jobs or self.closed)
            if not self._jobs:
                return None
            self._is_busy = True
            return self._jobs.popleft()

    def _work(self, job: Job) -> None:
        """One job on the background thread; the other edge at which trouble ends."""
        result = StoreResult(reason=Reason.INTERNAL)
        try:
            if isinstance(job, Rest):
                self._go_on(job)
            elif (away := self._connection.health.absence()) is not None:
                result = StoreResult(reason=reason_of(away), detail=str(away))
            elif isinstance(job, DamageReport):
                with self._connection.attempt():
                    self._uploader.report(job.key, job.detail)
            else:
                result = self._store_patiently(job)
                self._learn(job, result)
                if result.reason is Reason.DEFERRED and job.touch:
                    job.touch.deferred = True
                if result.reason is Reason.NOT_CAPTURED:
                    self._start_over(job)
        except KVStoreError as error:
            log.debug("background: %s", str(error))
            result = StoreResult(reason=reason_of(error), detail=str(error))
        except Exception:
            log.exception("background work failed")
        finally:
            if isinstance(job, StoreJob):
                self._end(job, result)

    def _start_over(self, job: StoreJob) -> None:
        """The store held less than the session believed: have all of it copied, if the caller's arrays are there."""
        again = job.again
        if again is not None and again.start_over() and self.submit(again):
            job.again = None  # from now on the job must not drop it

    def _go_on(self, rest: Rest) -> None:
        """Copy and store a piece of the rest of a large sequence; what is left then goes to the end of the queue."""
        try:
            job = rest.next_job()
        except BaseException:
            rest.let_go()  # else the storer's reference would hold the caller's arrays until its next rest
            raise
        if job is None:
            self._drop(rest)
            return
        self._work(job)
        if job.result.reason not in KV_STORED or (rest.request is not None and not self.submit(rest)):
            rest.let_go()

    def _store_patiently(self, job: StoreJob) -> StoreResult:
        """Store on the background thread; what a busy daemon refuses is offered again when it says, a few times."""
        for _ in range(STORE_TRIES_MAX - 1):
            try:
                with self._connection.attempt():
                    return self._uploader.store(job)
            except LimitError as error:
                if not error.retry_s or self.closed or self._closing.wait(error.retry_s):
                    raise
        with self._connection.attempt():
            return self._uploader.store(job)

    def _learn(self, job: StoreJob, result: StoreResult) -> None:
        """The daemon's final word says what it holds of the sequence, and so what it does not."""
        whole = result.stored_tokens >= job.end
        held = job.end if whole else result.stored_tokens // BLOCK_TOKENS * BLOCK_TOKENS
        self._held.forget(job.chain, held)
        lasting = whole and bool(job.checkpoint) and not job.interim
        checkpoint = lasting and result.reason in (Reason.OK, Reason.ALREADY_STORED)
        self._held.hold(job.chain.head(held), checkpoint=checkpoint)

    def _end(self, job: StoreJob, result: StoreResult) -> None:
        if result.stored_tokens < job.end:  # what is queued is believed to be held
            self._held.forget(job.chain, max(job.start, result.stored_tokens))
        self._stats.stored(result, job.end)
        took_s = time.monotonic() - job.begun_s
        say_stored(self._namespace, job.request_id, (max(job.start, job.new_from), job.end), result, took_s)
        job.finish(result)

    def _drop(self, job: Job) -> None:
        """A job that the end of the session, or a lack of room, leaves undone."""
        if isinstance(job, StoreJob):
            self._end(job, StoreResult(reason=Reason.UNAVAILABLE))
        elif isinstance(job, Rest):
            job.let_go()
            self._stats.stored(StoreResult(reason=Reason.QUEUE_FULL))


_alive: weakref.WeakSet[Background] = weakref.WeakSet()


@atexit.register
def tell_lost() -> None:
    """Say what is lost as the program ends: an exit never waits for the store."""
    lost = 0 if is_forked() else sum(background.n_queued for background in list(_alive))
    if lost:
        log.warning("stores lost at the end of this program: %d; call `close` or `flush` before it", lost)
