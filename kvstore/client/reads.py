"""How one fetch reads: layer after layer of its plan, from files on reader threads or from the messages of a stream.

A read of a file that misses the fetch's deadline is abandoned.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, TypeVar

from kvstore.blobs.protocol import RangeReader
from kvstore.blobs.ranges import OPEN_FILES_MAX, FileReader, MemoryReader, Range, unreadable_paths
from kvstore.blobs.readers import READERS, usable_cores
from kvstore.client.attempt import Attempt, Layer, Meter
from kvstore.client.plan import Plan, layer_bytes
from kvstore.client.receiver import LayerReader, Message
from kvstore.codecs.assemble import begin_layer
from kvstore.codecs.byte_plan import layer_ranges
from kvstore.codecs.codec import BlockCorruptError, Context
from kvstore.codecs.states import begin_state, state_ranges
from kvstore.codecs.virtual import VirtualFile
from kvstore.core.blocks import Reason
from kvstore.core.breaker import Deadline
from kvstore.core.byte_budget import ByteBudget
from kvstore.core.layers import Layout
from kvstore.errors import ReadDeadlineError

T = TypeVar("T")

# Reads of one fetch at a time, on as many cores. More threads than cores only wait for Python's lock: on two cores a
# fetch of 1 GiB took 1.09 times the processor time with four.
READS_MAX = 4
# How many layers are read at a time, if they have at least `OVERLAPPED_BYTES_MIN`. Of smaller ones a file that hangs
# would only hold more threads.
OVERLAPPED = 2
OVERLAPPED_BYTES_MIN = 1 << 20

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


@dataclass(frozen=True)
class TimedReader(MemoryReader):
    """Wraps a reader, counts its bytes and time, and raises DeadlineError between two ranges after the deadline."""

    reader: RangeReader
    meter: Meter
    deadline: Deadline

    def readinto(self, source: int, offset: int, views: Sequence[memoryview]) -> None:
        """See `RangeReader.readinto`."""
        self.deadline.check()
        self.reader.readinto(source, offset, views)
        self.meter.read(sum(view.nbytes for view in views))

    def view(self, source: int, offset: int, nbytes: int) -> memoryview | None:
        """See `MemoryReader.view`; None of a file."""
        if not isinstance(self.reader, MemoryReader):
            return None
        self.deadline.check()
        view = self.reader.view(source, offset, nbytes)
        self.meter.read(nbytes if view is not None else 0)
        return view


@dataclass(frozen=True, slots=True)
class LayerReads:
    """The layers of one plan. Used by the fetching thread, which then owns them. All raise as `begin_layer`."""

    layout: Layout
    headroom_tokens: int
    attempt: Attempt
    plan: Plan

    def receive(self, index: int, messages: Iterator[Message]) -> Layer:
        """One layer of a stream, read as it arrives. CorruptDataError for a stream of anything else."""
        ranges = self._ranges(index)
        reader = LayerReader(messages, index, ranges)
        try:
            layer = self._finished(self._begin(index, reader, order=ranges))
        except BlockCorruptError:
            if reader.broken is not None:
                raise reader.broken from None
            raise
        reader.end()
        return layer

    def _ranges(self, index: int) -> list[Range]:
        """What a stream carries of a layer. CorruptDataError for far more bytes than its rows can take."""
        spec, plan = self.layout.layers[index], self.plan
        if spec.is_exact:
            return state_ranges(plan.state(index), plan.state_source)
        ranges = layer_ranges(plan.blocks, index)
        layer_bytes(plan.blocks, ranges, spec)
        return ranges

    def read(self, index: int, reader: RangeReader, reads: FileReads | None = None) -> Layer:
        """One layer. Without `reads` for as long as it takes."""
        return self._finished(self._begin(index, reader, reads))

    def overlapped(self, reader: FileReader, reads: FileReads) -> Generator[Layer, None, None]:
        """All layers in order; while one is awaited, the next one is read, if layers are large."""
        n_layers = len(self.layout.layers)
        ahead = OVERLAPPED - 1 if self.plan.nbytes >= OVERLAPPED_BYTES_MIN * n_layers else 0
        begun: deque[VirtualFile[Any]] = deque()
        try:
            for index in range(n_layers):
                begun.append(self._begin(index, reader, reads))
                if len(begun) > ahead:
                    yield self._finished(begun.popleft())
            while begun:
                yield self._finished(begun.popleft())
        finally:
            for one in begun:
                one.drop()

    def _begin(
        self, index: int, reader: RangeReader, reads: FileReads | None = None, order: Sequence[Range] = ()
    ) -> VirtualFile[Any]:
        attempt, plan = self.attempt, self.plan
        reader = TimedReader(reader, attempt.meter, attempt.deadline)
        if self.layout.layers[index].is_exact:
            return begin_state(self.layout, plan.state(index), plan.n_tokens, plan.state_source, reader, reads, order)
        return begin_layer(
            self.layout,
            index,
            plan.blocks,
            reader,
            self.headroom_tokens,
            keep_codes=attempt.caller.keep_codes,
            reads=reads,
            context=Context(aux=attempt.aux),
            order=order,
        )

    def _finished(self, read: VirtualFile[Any]) -> Layer:
        layer: Layer = read.finish()
        self.attempt.begin(layer)
        return layer


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
