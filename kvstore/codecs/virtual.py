"""Arrays that MLX allocates and kvstore fills: bytes are read straight into MLX's buffers, on threads of kvstore.

MLX takes no foreign memory without a copy, and has no call for an array whose bytes do not matter. So MLX loads a
safetensors file of which there is only a header: it allocates every tensor, and `readinto` leaves the memory as it is.
It is then written through the buffer protocol. That is one copy; preadv into numpy and then `mx.array` are two, at half
the speed. mx.load of a file object is eager.
"""

from __future__ import annotations

import functools
import io
import json
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, wait
from typing import Any, BinaryIO, Generic, Protocol, Self, TypeVar, cast

import mlx.core as mx

from kvstore.blobs.readers import THREADS_MAX, Readers
from kvstore.codecs import device
from kvstore.core.blocks import ITEM_BYTES

T = TypeVar("T")

# Handing a read to another thread and back takes about as long as copying this much. So what is smaller is read by one
# job for all tensors of a file.
SMALL_BYTES = 256 << 10


class Reads(Protocol):
    """Protocol for file reads that may miss their deadline: see `kvstore.client.reads`."""

    @property
    def jobs_max(self) -> int:
        """How many jobs at most fill the tensors of one file."""

    def start(self, work: Callable[[], None]) -> Future[None]:
        """Have `work` done on a reader thread. ReadDeadlineError where none can read."""

    def finish(self, jobs: Sequence[Future[None]], memory: object, nbytes: int) -> None:
        """Wait for jobs that write to `memory` of `nbytes`, and raise the first error.

        ReadDeadlineError when they do not end in time. Then some may still be running; the memory counts until they
        have returned. After any error no other of the jobs begins.
        """

    def drop(self, jobs: Sequence[Future[None]], memory: object, nbytes: int) -> None:
        """End jobs of which nothing is wanted any more: as `finish`, without their errors."""


class _Patient:
    """Reads that take as long as they take: of memory, or of files in the daemon.

    On threads of their own: nothing ends a wait behind reads of files that hang.
    """

    jobs_max = THREADS_MAX

    def __init__(self) -> None:
        self._readers = Readers(name="kvstore-copy")

    def start(self, work: Callable[[], None]) -> Future[None]:
        return self._readers.start(work)

    def finish(self, jobs: Sequence[Future[None]], memory: object, nbytes: int) -> None:
        wait(jobs)
        for job in jobs:
            job.result()

    def drop(self, jobs: Sequence[Future[None]], memory: object, nbytes: int) -> None:
        wait([job for job in jobs if not job.cancel()])


_PATIENT = _Patient()


Fill = Callable[[memoryview], Iterator[None]]


class VirtualFile(io.RawIOBase, Generic[T]):
    """A layer that is read: tensors, each with a function that fills its bytes step by step, and what they make.

    Made, finished or dropped by one thread, which then owns the layer.

    MLX calls seek and readinto from its own pool threads, and another thread may come in between the two: the position
    is kept per thread. No exception may cross MLX: 0.32 makes a RuntimeError of it with a traceback for a message, 0.31
    swallows it and hands out the unfilled buffer. None can: nothing is read there.
    """

    def __init__(self, reads: Reads | None = None, order: Sequence[str] = ()) -> None:
        """Without `reads` tensors are filled for as long as it takes.

        `order`: whose step is the next, for bytes that come in one order only; then `finish` fills all tensors itself.
        """
        super().__init__()
        self._reads = reads or _PATIENT
        self._order = order
        self._header: dict[str, dict[str, Any]] = {}
        self._fills: dict[str, tuple[int, Fill]] = {}
        self._size = 0
        self._head = b""
        self._thread = threading.local()
        self._build: Callable[[dict[str, mx.array]], T] | None = None
        self._arrays: dict[str, mx.array] = {}
        self._jobs: list[Future[None]] = []

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return self._size

    def add(self, name: str, dtype: str, shape: tuple[int, ...], fill: Fill) -> None:
        """Let the file hold a tensor of at least one byte; `fill` writes all of them, on any thread."""
        nbytes = math.prod(shape) * ITEM_BYTES[dtype]
        assert nbytes and name not in self._header
        self._fills[name] = (nbytes, fill)
        end = self._size + nbytes
        self._header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [self._size, end]}
        self._size = end

    def begin(self, build: Callable[[dict[str, mx.array]], T]) -> Self:
        """Allocate the tensors and have them filled; `build` makes the layer of them. Raises ReadDeadlineError.

        `finish` or `drop` must follow.
        """
        self._build = build
        if not self._header:
            return self
        sizes = {name: nbytes for name, (nbytes, _) in self._fills.items()}
        header = json.dumps(self._header).encode()
        self._head = len(header).to_bytes(8, "little") + header
        with device.loading():
            arrays = mx.load(cast(BinaryIO, self), format="safetensors", stream=device.load_stream())
        if not isinstance(arrays, dict) or {name: a.nbytes for name, a in arrays.items()} != sizes:
            raise RuntimeError("MLX did not allocate every tensor of a layer")
        self._arrays = arrays
        if self._order:
            return self
        # Each job holds the memory that it writes to, so that an abandoned read never writes to memory that was reused.
        work = [(fill, device.flat_bytes(arrays[name]).data) for name, (_, fill) in self._fills.items()]
        try:
            for job in _jobs(work, self._reads.jobs_max):
                self._jobs.append(self._reads.start(functools.partial(_fill_all, job)))
        except BaseException:
            self.drop()
            raise
        return self

    def finish(self) -> T:
        """The layer, once everything is read; the first error of reading or verifying is raised as it was."""
        assert self._build is not None
        arrays, jobs = self._arrays, self._jobs
        self._arrays, self._jobs = {}, []
        if self._order:
            self._fill_in_order(arrays)
        self._reads.finish(jobs, arrays, self._size)
        return self._build(arrays)

    def _fill_in_order(self, arrays: dict[str, mx.array]) -> None:
        steps = {name: fill(device.flat_bytes(arrays[name]).data) for name, (_, fill) in self._fills.items()}
        for name in self._order:
            next(steps[name], None)
        for rest in steps.values():
            for _ in rest:
                pass

    def drop(self) -> None:
        """End what `begin` began without a result. Does nothing after `finish`.

        Waits for reads that run, at most until the deadline.
        """
        arrays, jobs = self._arrays, self._jobs
        self._arrays, self._jobs = {}, []
        self._reads.drop(jobs, arrays, self._size)

    def readable(self) -> bool:
        """MLX asks."""
        return True

    def seekable(self) -> bool:
        """MLX asks."""
        return True

    def tell(self) -> int:
        """Position of the calling thread."""
        position: int = getattr(self._thread, "position", 0)
        return position

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        """Move the calling thread's position."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self.tell(), io.SEEK_END: len(self._head) + self._size}[whence]
        self._thread.position = base + offset
        return base + offset

    def readinto(self, buffer: Any, /) -> int:
        """Fill MLX's buffer with a piece of the header; leave that of a tensor as it is."""
        view, at = memoryview(buffer).cast("B"), self.tell()
        nbytes = view.nbytes
        if at < len(self._head):
            chunk = self._head[at : at + nbytes]
            view[: len(chunk)] = chunk
            nbytes = len(chunk)
        self._thread.position = at + nbytes
        return nbytes


def _jobs(tensors: Sequence[tuple[Fill, memoryview]], jobs_max: int) -> list[list[tuple[Fill, memoryview]]]:
    """Tensors by job, at most `jobs_max`: one job for each large tensor, and one for all small ones."""
    jobs = [[one] for one in tensors if one[1].nbytes > SMALL_BYTES]
    if small := [one for one in tensors if one[1].nbytes <= SMALL_BYTES]:
        jobs.append(small)
    return [[one for job in jobs[first::jobs_max] for one in job] for first in range(min(jobs_max, len(jobs)))]


def _fill_all(tensors: Sequence[tuple[Fill, memoryview]]) -> None:
    for fill, view in tensors:
        for _ in fill(view):
            pass
