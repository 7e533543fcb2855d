"""File reads of one fetch by path, on reader threads. A read that misses the fetch's deadline is abandoned."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

from kvstore.blobs.ranges import OPEN_FILES_MAX, FileReader, unreadable_paths
from kvstore.blobs.readers import READERS, usable_cores
from kvstore.client.plan import Plan
from kvstore.core.blocks import Reason
from kvstore.core.breaker import Deadline
from kvstore.core.byte_budget import ByteBudget
from kvstore.errors import ReadDeadlineError

T = TypeVar("T")

# Reads of one fetch at a time, on as many cores. More threads than cores only wait for Python's lock: on two cores a
# fetch of 1 GiB took 1.09 times the processor time with four.
READS_MAX = 4

# launchd gives a process 256 files. All fetches of a process share this many; one that finds none free reads with few.
_FILES = ByteBudget(OPEN_FILES_MAX)
OPEN_FILES_MIN = 4


class FileReads:
    """Runs file operations on the process's reader threads. Used by the fetching thread.

    A read that does not return in time is abandoned. It may still write to MLX's buffers, so these stay allocated, and
    count against `budget`, until the read returns.
    """

    def __init__(self, deadline: Deadline, budget: ByteBudget, layers_max: int = 1) -> None:
        """`layers_max`: how many layers are read at a time."""
        self.jobs_max = max(1, min(READS_MAX, usable_cores()) // layers_max)
        self._deadline = deadline
        self._budget = budget
        self._left: list[Future[Any]] = []

    def run(self, work: Callable[[], T]) -> T:
        """Run `work` and wait for it. ReadDeadlineError at the deadline, or at once where no thread can read."""
        return READERS.run(work, self._deadline.left_s, self._left.append)

    def start(self, work: Callable[[], None]) -> Future[None]:
        """See `codecs.virtual.Reads`."""
        READERS.require_free()
        return READERS.start(work)

    def finish(self, jobs: Sequence[Future[Any]], memory: object, nbytes: int) -> None:
        """See `codecs.virtual.Reads`."""
        try:
            for job in jobs:
                READERS.wait(job, self._deadline.left_s, self._left.append)
                job.result()
        except BaseException:
            self.drop(jobs, memory, nbytes)
            raise

    def drop(self, jobs: Sequence[Future[Any]], memory: object, nbytes: int) -> None:
        """See `codecs.virtual.Reads`."""
        for job in jobs:
            job.cancel()
        for job in jobs:
            if job not in self._left:
                with suppress(ReadDeadlineError):
                    READERS.wait(job, self._deadline.left_s, self._left.append)
        if left := [job for job in jobs if job in self._left]:
            self.keep(left, memory, nbytes)

    def keep(self, left: Sequence[Future[Any]], memory: object, nbytes: int) -> None:
        """Hold `memory` of `nbytes`, counted, until the jobs `left`, which were abandoned, have returned."""
        kept, lock, running = [memory], threading.Lock(), [len(left)]
        self._budget.charge(nbytes)

        def returned(_: Future[Any]) -> None:
            with lock:
                running[0] -= 1
                if running[0]:
                    return
            kept.clear()
            self._budget.release(nbytes)

        for job in left:
            job.add_done_callback(returned)


@contextmanager
def file_reader(plan: Plan) -> Iterator[FileReader]:
    """A file reader whose open files count against the process's limit, in an abandoned read too until it returns."""
    wanted = min(len(plan.files), OPEN_FILES_MAX)
    granted = wanted if _FILES.try_acquire(wanted) else 0
    closed = functools.partial(_FILES.release, granted)
    with contextlib.closing(FileReader(plan.files, open_max=granted or OPEN_FILES_MIN, closed=closed)) as reader:
        yield reader


def _unreadable(plan: Plan) -> int | None:
    """The first source of a plan whose file a read of this process waits for in vain."""
    held = unreadable_paths()
    return next((number for number, file in enumerate(plan.files) if file.path in held), None) if held else None


def require_readable(plan: Plan) -> None:
    """ReadDeadlineError if a file of the plan is one of those: waiting for it too would take another thread."""
    if (number := _unreadable(plan)) is not None:
        raise ReadDeadlineError(f"an earlier read of {plan.files[number].path} has not returned")


def before_unreadable(plan: Plan) -> Plan:
    """The plan without what such a file has and what comes after it. ReadDeadlineError where it cannot be cut."""
    number = _unreadable(plan)
    if number is None:
        return plan
    if plan.states or not number:
        require_readable(plan)
    return plan.first(number, Reason.DEADLINE)


def errno_of(error: BaseException) -> int | None:
    """The errno at the root of an error, if there is one."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError):
            return cause.errno
        cause = cause.__cause__
    return None
