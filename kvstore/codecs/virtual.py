"""A virtual safetensors file: its content is assembled while MLX reads it.

kvstore makes the header. When MLX reads a tensor, `readinto` writes the bytes directly into MLX's buffer. That is one
copy; preadv into numpy and then `mx.array` are two, at half the speed. mx.load of a file object is eager.
"""

from __future__ import annotations

import functools
import io
import json
import math
import threading
from collections.abc import Callable
from typing import Any, BinaryIO, Protocol, cast

import mlx.core as mx

from kvstore.codecs.device import load_stream, loading
from kvstore.core.blocks import ITEM_BYTES
from kvstore.core.byte_budget import ByteBudget
from kvstore.errors import KVStoreError, ReadDeadlineError

# MLX loads with four threads, and tensors of one file wait for each other there. Loads that would wait in MLX wait here
# instead, where a deadline ends it: four threads may be held by files whose reads do not return.
_MLX_THREADS = ByteBudget(4)


# Handing a read to another thread and back takes about as long as copying this much. So what is smaller is read at once
# for all tensors of a file, and copied.
SMALL_BYTES = 256 << 10


class Reads(Protocol):
    """Protocol for file reads that may miss their deadline: see `kvstore.client.reads`."""

    @property
    def left_s(self) -> float:
        """Seconds that are left for all reads."""

    def run(self, work: Callable[[], None]) -> None:
        """Do what reads. ReadDeadlineError when it does not end in time, and then it may still be running."""

    def keep(self, memory: object, nbytes: int) -> None:
        """The memory that reads write to. It must live, and is counted, until the last of them has returned."""

    def settle(self) -> None:
        """Return when no read is running any more, however long that takes."""


class VirtualFile(io.RawIOBase):
    """Tensors, each with a function that fills its bytes. Made, loaded and dropped by one thread.

    MLX calls seek and readinto from its own pool threads, and another thread may come in between the two: the position
    is kept per thread. No exception may cross MLX: 0.32 makes a RuntimeError of it with a traceback for a message, 0.31
    swallows it and hands out the unfilled buffer. So the first error is kept, later reads are skipped, and `load`
    raises it; and whatever else happens, `load` returns nothing unless every tensor was filled.
    """

    def __init__(self, reads: Reads | None = None) -> None:
        """Without `reads` tensors are filled on MLX's threads, for as long as it takes."""
        super().__init__()
        self._reads = reads
        self._error: KVStoreError | OSError | None = None
        self._filled: set[int] = set()
        self._header: dict[str, dict[str, Any]] = {}
        self._fills: dict[int, tuple[int, Callable[[memoryview], None]]] = {}
        self._small: dict[int, bytearray] = {}
        self._size = 0
        self._head = b""
        self._thread = threading.local()

    def add(self, name: str, dtype: str, shape: tuple[int, ...], fill: Callable[[memoryview], None]) -> None:
        """Let the file hold a tensor of at least one byte; `fill` writes all of them, on any thread."""
        nbytes = math.prod(shape) * ITEM_BYTES[dtype]
        assert nbytes and name not in self._header
        self._fills[self._size] = (nbytes, fill)
        end = self._size + nbytes
        self._header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [self._size, end]}
        self._size = end

    def load(self) -> dict[str, mx.array]:
        """Read everything; the first error of reading or verifying is raised as it was."""
        if not self._header:
            return {}
        header = json.dumps(self._header).encode()
        self._head = len(header).to_bytes(8, "little") + header
        threads = min(len(self._fills), _MLX_THREADS.limit_bytes)
        if not _MLX_THREADS.acquire(threads, math.inf if self._reads is None else self._reads.left_s):
            raise ReadDeadlineError("other reads hold the threads with which MLX loads")
        try:
            arrays = self._load()
        finally:
            _MLX_THREADS.release(threads)
        if self._error is not None:
            raise self._error
        if self._filled != self._fills.keys() or not isinstance(arrays, dict):
            raise RuntimeError("MLX did not read every tensor of a layer")
        return arrays

    def _load(self) -> object:
        try:
            with loading():
                arrays = mx.load(cast(BinaryIO, self), format="safetensors", stream=load_stream())
            if self._error is not None and self._reads is not None:
                self._reads.keep(arrays, self._size)
        except BaseException:
            if self._reads is not None:  # MLX may have taken its buffers back
                self._reads.settle()
            raise
        return arrays

    def _read_small(self) -> None:
        small = {start: bytearray(nbytes) for start, (nbytes, _) in self._fills.items() if nbytes <= SMALL_BYTES}
        for start, buffer in small.items():
            self._fills[start][1](memoryview(buffer))
        self._small = small

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
        """Fill MLX's buffer: a piece of the header, or the whole of one tensor."""
        view, at = memoryview(buffer).cast("B"), self.tell()
        if not view.nbytes:
            return 0
        if at < len(self._head):
            chunk = self._head[at : at + view.nbytes]
            view[: len(chunk)] = chunk
            self._thread.position = at + len(chunk)
            return len(chunk)
        start = at - len(self._head)
        if self._error is None:
            try:
                nbytes, fill = self._fills[start]
                assert view.nbytes == nbytes, "MLX reads a tensor at once"
                if self._reads is None:
                    fill(view)
                elif nbytes <= SMALL_BYTES:
                    if not self._small:
                        self._reads.run(self._read_small)
                    view[:] = self._small[start]
                else:
                    self._reads.run(functools.partial(fill, view))
                self._filled.add(start)
            except (KVStoreError, OSError) as error:
                self._error = error
        self._thread.position = at + view.nbytes
        return view.nbytes
