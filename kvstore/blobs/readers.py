"""Threads on which files are read, so that a read that does not return holds up its own thread only.

The system cannot cancel a read that blocks: a disk that hangs, a share that is away. A fetch therefore hands its reads
to one of a few threads and waits for them until its deadline. When that passes the fetch abandons the read, which keeps
its thread, and the memory that it writes to, until it returns. When every thread is held so, nothing can be read:
`ReadDeadlineError` at once. The threads are daemon threads, so that a read that hangs does not hold up the exit either.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import CancelledError, Future
from queue import SimpleQueue
from typing import Any, TypeAlias, TypeVar

from kvstore.errors import ReadDeadlineError

T = TypeVar("T")
# Is told of a job that was abandoned.
Left: TypeAlias = Callable[[Future[Any]], None]

# A fetch uses four at most. Two more are for another fetch.
THREADS_MAX = 6

log = logging.getLogger(__name__)


def usable_cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


class Readers:
    """At most `threads_max` daemon threads, started when they are needed. Any thread may call.

    Not a ThreadPoolExecutor, whose threads hold up the exit.
    """

    def __init__(self, threads_max: int = THREADS_MAX, name: str = "kvstore-read") -> None:
        self._threads_max = threads_max
        self._name = name
        self._jobs: SimpleQueue[tuple[Future[Any], Callable[[], Any]]] = SimpleQueue()
        self._lock = threading.Lock()
        self._threads = 0
        self._pending = 0  # queued or running
        self._stuck: set[Future[Any]] = set()  # abandoned, and not returned yet

    @property
    def stuck(self) -> int:
        """How many threads are held by reads that were abandoned and have not returned."""
        return len(self._stuck)

    def run(self, work: Callable[[], T], timeout_s: float, left: Left | None = None) -> T:
        """Run `work` on one of the threads and wait for it; what it raises is raised here.

        ReadDeadlineError when it has not ended within `timeout_s`, or at once when every thread is held. If it had
        begun by then, it still runs: `left(job)` is told so.
        """
        self.require_free()
        job = self.start(work)
        self.wait(job, timeout_s, left)
        return job.result()

    def require_free(self) -> None:
        """ReadDeadlineError when every thread is held."""
        if len(self._stuck) >= self._threads_max:
            raise ReadDeadlineError(f"all {self._threads_max} reader threads wait for reads that do not return")

    def wait(self, job: Future[Any], timeout_s: float, left: Left | None = None) -> None:
        """Wait for the end of a job, whatever comes of it. ReadDeadlineError as `run`."""
        try:
            job.exception(timeout_s)
        except CancelledError:
            return
        except TimeoutError as error:
            if not job.cancel() and self._abandon(job) and left is not None:
                left(job)
            raise ReadDeadlineError(f"a read did not return within {timeout_s * 1e3:.0f} ms") from error

    def start(self, work: Callable[[], T]) -> Future[T]:
        """Queue `work`. Work that runs here must not wait for work that it queues."""
        job: Future[T] = Future()
        with self._lock:
            self._pending += 1
            if self._pending > self._threads and self._threads < self._threads_max:
                self._threads += 1
                self._start_thread()
        self._jobs.put((job, work))
        return job

    def _start_thread(self) -> None:
        try:
            threading.Thread(target=self._serve, name=self._name, daemon=True).start()
        except RuntimeError:  # no more threads; those that are there do the job
            self._threads -= 1
            if not self._threads:
                self._pending -= 1
                raise

    def _abandon(self, job: Future[Any]) -> bool:
        """Count the thread that a job holds as stuck until it returns; False if it has just ended."""
        with self._lock:
            if job.done():
                return False
            before = len(self._stuck)
            self._stuck.add(job)
            now = len(self._stuck)
        if before == 0 or now >= self._threads_max:
            log.warning("%d of %d reader threads wait for reads of files that do not return", now, self._threads_max)
        return True

    def _serve(self) -> None:
        while True:
            job, work = self._jobs.get()
            if job.set_running_or_notify_cancel():
                try:
                    job.set_result(work())
                except BaseException as error:  # noqa: BLE001  # raised in the thread that waits
                    job.set_exception(error)
            with self._lock:
                self._pending -= 1
                was_stuck = job in self._stuck
                self._stuck.discard(job)
                is_over = was_stuck and not self._stuck
            if is_over:
                log.warning("reads of files return again")
            del job, work  # what they hold must not live until the next job comes


READERS = Readers()
