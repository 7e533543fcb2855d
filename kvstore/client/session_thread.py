"""The background thread of a session and its bounded queue."""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

from kvstore.core.thread_priority import lower_thread_priority

J = TypeVar("J")

ITEMS_MAX = 256


class Sender(Generic[J]):
    """Runs jobs one after the other on one daemon thread, which starts with the first job. Any thread may submit.

    `work(job)` runs on that thread and must not raise; `drop(job)` is called instead for jobs that `close` leaves
    undone. A daemon thread, so that an interpreter that exits never waits for the store.
    """

    def __init__(self, work: Callable[[J], None], drop: Callable[[J], None], items_max: int = ITEMS_MAX) -> None:
        self._work = work
        self._drop = drop
        self._items_max = items_max
        self._jobs: deque[J] = deque()
        self._busy = False
        self._closed = False
        self._give_up_at = math.inf
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None

    @property
    def closed(self) -> bool:
        """Whether nothing is taken any more."""
        return self._closed

    def submit(self, job: J) -> bool:
        """Queue a job; False when the queue is full or closed, and then the job is still the caller's."""
        with self._changed:
            if self._closed or len(self._jobs) >= self._items_max:
                return False
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="kvstore-sender", daemon=True)
                self._thread.start()
            self._jobs.append(job)
            self._changed.notify_all()
            return True

    def flush(self, timeout_s: float) -> bool:
        """Wait for all jobs submitted so far. Returns whether they are done."""
        give_up_at = time.monotonic() + timeout_s
        with self._changed:
            while self._jobs or self._busy:
                left_s = give_up_at - time.monotonic()
                if left_s <= 0:
                    return False
                self._changed.wait(left_s)
            return True

    def close(self, timeout_s: float) -> bool:
        """Take nothing more, drop what waits, join the thread within `timeout_s`; whether it ended."""
        with self._changed:
            self._closed = True
            dropped = list(self._jobs)
            self._jobs.clear()
            self._changed.notify_all()
            thread = self._thread
        for job in dropped:
            self._drop(job)
        if thread is None:
            return True
        thread.join(timeout_s)
        return not thread.is_alive()

    def retire(self, within_s: float) -> None:
        """Accept no more jobs. The thread ends when the queue is empty; it starts no job after `within_s`.

        Does not wait, since the owner may be gone. A job in progress ends at its own time limits.
        """
        with self._changed:
            self._closed = True
            self._give_up_at = time.monotonic() + within_s
            self._changed.notify_all()

    def _run(self) -> None:
        lower_thread_priority()  # to the threads that decode, in this process and in the others
        while (job := self._take()) is not None:
            try:
                (self._work if time.monotonic() < self._give_up_at else self._drop)(job)
            finally:
                del job  # what it captured must not live until the next one comes
                with self._changed:
                    self._busy = False
                    self._changed.notify_all()

    def _take(self) -> J | None:
        with self._changed:
            while not self._jobs and not self._closed:
                self._changed.wait()
            if not self._jobs:
                return None
            self._busy = True
            return self._jobs.popleft()
