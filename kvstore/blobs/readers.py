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
from queue import SimpleQueue
from typing import Any, TypeVar

from kvstore.errors import ReadDeadlineError

T = TypeVar("T")

# A fetch uses four at most. Two more are for another fetch.
THREADS_MAX = 6

log = logging.getLogger(__name__)


def usable_cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


class Job:
    """One piece of work on a reader thread. Made by `Readers`; any thread may wait for it."""

    def __init__(self, work: Callable[[], Any]) -> None:
        self._work: Callable[[], Any] | None = work
        self._ended = threading.Event()
        self._result: Any = None
        self._error: BaseException | None = None
        # Set by the pool under its lock.
        self.running = False
        self.stuck = False
        self.at_end: Callable[[], None] | None = None

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait for its end; whether it has ended."""
        return self._ended.wait(timeout_s)

    def result(self) -> Any:
        """Wait for the end. Returns the work's result or raises its exception."""
        if self._error is not None:
            raise self._error
        return self._result

    def run(self) -> None:
        """Do the work and keep what came of it. On a reader thread."""
        assert self._work is not None
        try:
            self._result = self._work()
        except BaseException as error:  # noqa: BLE001  # handed to the thread that waits
            self._error = error
        finally:
            self._work = None  # what it refers to must not live until the next job comes

    def end(self) -> None:
        """Wake those that wait."""
        self._work = None
        self._ended.set()


class Readers:
    """At most `threads_max` daemon threads, started when they are needed. Any thread may call."""

    def __init__(self, threads_max: int = THREADS_MAX, name: str = "kvstore-read") -> None:
        self._threads_max = threads_max
        self._name = name
        self._jobs: SimpleQueue[Job] = SimpleQueue()
        self._lock = threading.Lock()
        self._threads = 0
        self._pending = 0  # queued or running
        self._stuck = 0

    @property
    def stuck(self) -> int:
        """How many threads are held by reads that were abandoned and have not returned."""
        return self._stuck

    def run(self, work: Callable[[], T], timeout_s: float, left: Callable[[Job], None] | None = None) -> T:
        """Run `work` on one of the threads and wait for it; what it raises is raised here.

        ReadDeadlineError when it has not ended within `timeout_s`, or at once when every thread is held. If it had
        begun by then, it still runs: `left(job)` is told so, and `when_ended` says when it is over.
        """
        self.require_free()
        job = self.start(work)
        self.wait(job, timeout_s, left)
        result: T = job.result()
        return result

    def require_free(self) -> None:
        """ReadDeadlineError when every thread is held."""
        if self._stuck >= self._threads_max:
            raise ReadDeadlineError(f"all {self._threads_max} reader threads wait for reads that do not return")

    def wait(self, job: Job, timeout_s: float, left: Callable[[Job], None] | None = None) -> None:
        """Wait for the end of a job, whatever comes of it. ReadDeadlineError as `run`."""
        if not job.wait(timeout_s):
            if not self.cancel(job) and self._abandon(job) and left is not None:
                left(job)
            raise ReadDeadlineError(f"a read did not return within {timeout_s * 1e3:.0f} ms")

    def start(self, work: Callable[[], Any]) -> Job:
        """Queue `work`. Work that runs here must not wait for work that it queues."""
        job = Job(work)
        with self._lock:
            self._pending += 1
            if self._pending > self._threads and self._threads < self._threads_max:
                self._threads += 1
                self._start_thread()
        self._jobs.put(job)
        return job

    def _start_thread(self) -> None:
        try:
            threading.Thread(target=self._serve, name=self._name, daemon=True).start()
        except RuntimeError:  # no more threads; those that are there do the job
            self._threads -= 1
            if not self._threads:
                self._pending -= 1
                raise

    def cancel(self, job: Job) -> bool:
        """Take back a job that no thread has begun; whether that was so."""
        with self._lock:
            if job.running or job.wait(0):
                return False
            job.end()
            return True

    def when_ended(self, job: Job, call: Callable[[], None]) -> None:
        """Call `call` once when an abandoned job has returned: on its thread, or here if it already has."""
        with self._lock:
            if job.running:
                job.at_end = call
                return
        call()

    def _abandon(self, job: Job) -> bool:
        """Count the thread that a job holds as stuck until it returns; False if it has just ended."""
        with self._lock:
            if not job.running:
                return False
            before = self._stuck
            if not job.stuck:
                job.stuck = True
                self._stuck += 1
            now = self._stuck
        if before == 0 or now >= self._threads_max:
            log.warning("%d of %d reader threads wait for reads of files that do not return", now, self._threads_max)
        return True

    def _serve(self) -> None:
        while True:
            job = self._jobs.get()
            with self._lock:
                cancelled = job.wait(0)
                job.running = not cancelled
            if not cancelled:
                try:
                    job.run()
                finally:
                    self._end(job)
            with self._lock:
                self._pending -= 1
            del job  # what it holds must not live until the next one comes

    def _end(self, job: Job) -> None:
        with self._lock:
            job.running = False
            self._stuck -= job.stuck
            returned = job.stuck and not self._stuck
            call, job.at_end = job.at_end, None
            job.end()
        if returned:
            log.warning("reads of files return again")
        if call is not None:
            call()


READERS = Readers()
