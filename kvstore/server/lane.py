"""The threads that own MLX: one, and on devices that support it a second one for stores."""

from __future__ import annotations

import heapq
import itertools
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

from kvstore.core.thread_priority import lower_thread_priority
from kvstore.errors import LimitError, UnavailableError

T = TypeVar("T")

# Delay added to a store piece's place in the queue: fetches go first, but no store waits forever.
STORE_HANDICAP_S = 0.25
QUEUE_MAX = 256
# A lane that has been idle for this long frees the memory that MLX keeps for reuse.
IDLE_S = 5.0
# Weight of the newest piece in the moving average of durations.
MEAN_STEP = 0.2
RETRY_S = 0.5


class Lane:
    """Queue of device work, which runs fetches before stores. Any thread may submit.

    One thread runs one piece at a time. With `two_threads`, on devices that support it, stores run on a second thread
    of low priority, so that fetches never wait for them. Submit work in pieces of about 50 ms: a running piece is never
    interrupted.
    """

    def __init__(
        self,
        start: Callable[[], None] | None = None,
        idle: Callable[[], None] | None = None,
        *,
        two_threads: bool = False,
    ) -> None:
        """`start` runs on each thread before its first piece, to set device limits. `idle` runs when a thread that
        has worked gets no piece for `IDLE_S`, to free device memory."""
        self._idle = idle
        release = None if idle is None else self._release
        self._fetches = _Queue("kvstore-lane", start, release)
        self._stores = (
            _Queue("kvstore-lane-store", start, release, lower_thread_priority) if two_threads else self._fetches
        )

    def submit_fetch(self, work: Callable[[], T]) -> Future[T]:
        """Queue a piece of a fetch. Raises LimitError when the queue is full, UnavailableError after close."""
        return self._fetches.submit(work, 0.0)

    def submit_store(self, work: Callable[[], T]) -> Future[T]:
        """Queue a piece of a store, behind fetches that come within `STORE_HANDICAP_S`."""
        return self._stores.submit(work, STORE_HANDICAP_S if self._stores is self._fetches else 0.0)

    def run_store(self, work: Callable[[], T]) -> T:
        """The result of a piece of a store, once it has run. Raises as `submit_store`, and what the piece raises."""
        return self.submit_store(work).result()

    @property
    def backlog_s(self) -> float:
        """About how long a piece of a fetch that came now would wait. Takes no lock; any thread."""
        return self._fetches.backlog_s

    @property
    def used(self) -> bool:
        """Whether any piece has run."""
        return self._fetches.used or self._stores.used

    def _release(self) -> None:
        """Call `idle` unless the other thread is at work: MLX would wait for it, and keep Python's lock meanwhile."""
        if self._idle is not None and not (self._fetches.busy or self._stores.busy):
            self._idle()

    def close(self) -> None:
        """Finish running pieces, cancel what waits, end the threads."""
        self._fetches.close()
        self._stores.close()


class _Queue:
    """Pieces in the order in which they are due, and the thread that runs them, which owns its arrays."""

    def __init__(
        self,
        name: str,
        start: Callable[[], None] | None,
        idle: Callable[[], None] | None,
        begin: Callable[[], None] | None = None,
    ) -> None:
        """`begin` runs first of all on the thread, before the device is there: the device's threads come after it."""
        self._begin = begin
        self._start = start
        self._idle = idle
        self._piece_s = 0.0
        self._running = False
        self._heap: list[tuple[float, int, Future[object], Callable[[], object]]] = []
        self._order = itertools.count()
        self._ready = threading.Condition()
        self._closed = False
        self.used = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    @property
    def busy(self) -> bool:
        """Whether a piece runs or waits."""
        return self._running or bool(self._heap)

    @property
    def backlog_s(self) -> float:
        """See `Lane.backlog_s`."""
        waiting = self._running + sum(1 for item in tuple(self._heap) if item[0] <= time.monotonic())
        return waiting * self._piece_s

    def submit(self, work: Callable[[], T], handicap_s: float) -> Future[T]:
        """Queue a piece that is due in `handicap_s`. Raises as `Lane.submit_fetch`."""
        future: Future[T] = Future()
        with self._ready:
            if self._closed:
                raise UnavailableError("the daemon is stopping")
            if len(self._heap) >= QUEUE_MAX:
                raise LimitError(f"more than {QUEUE_MAX} pieces of work wait for the device", RETRY_S)
            item = (time.monotonic() + handicap_s, next(self._order), future, work)
            heapq.heappush(self._heap, item)  # type: ignore[misc]  # futures of any T, completed by _run
            self._ready.notify()
        return future

    def close(self) -> None:
        """Finish the running piece, cancel what waits, end the thread."""
        with self._ready:
            self._closed = True
            for _, _, future, _ in self._heap:
                future.cancel()
            self._heap.clear()
            self._ready.notify()
        self._thread.join()

    def _run(self) -> None:
        if self._begin is not None:
            self._begin()
        while (item := self._take()) is not None:
            future, work = item
            if not future.set_running_or_notify_cancel():
                continue
            self._running, started = True, time.monotonic()
            try:
                if not self.used and self._start is not None:
                    self._start()
                self.used = True
                future.set_result(work())
            except BaseException as error:  # noqa: BLE001  # raised in the thread that waits; the lane must go on
                future.set_exception(error)
            took_s = time.monotonic() - started
            self._piece_s += MEAN_STEP * (took_s - self._piece_s)
            self._running = False
            del future, work, item  # a waiting lane must not keep the last piece's arrays alive

    def _take(self) -> tuple[Future[object], Callable[[], object]] | None:
        """The next piece, None when the lane is closed. What MLX keeps goes back when there is none for a while."""
        idle = self._idle if self.used else None
        while True:
            with self._ready:
                if self._ready.wait_for(lambda: self._heap or self._closed, None if idle is None else IDLE_S):
                    if self._closed:
                        return None
                    _, _, future, work = heapq.heappop(self._heap)
                    return future, work
            if idle is not None:
                idle()
                idle = None
