"""Everything that touches the MLX device: evaluation, its memory limits, and every bridge between bytes and arrays.

Importing this module does not touch the device; the first call that computes does. Nothing here (or anywhere in
kvstore) calls `set_wired_limit`: wiring memory beside an inference process can panic macOS (mlx#3186).

bytes -> array  through numpy with an integer of the same size, then `view`: numpy has no bfloat16. One copy.
array -> bytes  through the buffer protocol as plain bytes, which ignores the element format and so works for bfloat16
                too, without a copy and without evaluating anything: safe on any thread once the array is evaluated.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from typing import Any, cast

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from kvstore.core.blocks import ITEM_BYTES
from kvstore.core.layers import PARTS, KVLayer, Layout, Piece, StateLayer, raw_ranges
from kvstore.errors import InvalidRequestError, UnsupportedLayerError

Bytes = npt.NDArray[np.uint8]

_MX_DTYPES = {
    "BF16": mx.bfloat16,
    "F16": mx.float16,
    "F32": mx.float32,
    "BOOL": mx.bool_,
    "U8": mx.uint8,
    "I8": mx.int8,
    "U16": mx.uint16,
    "I16": mx.int16,
    "U32": mx.uint32,
    "I32": mx.int32,
    "U64": mx.uint64,
    "I64": mx.int64,
}
_NAMES = {dtype: name for name, dtype in _MX_DTYPES.items()}
_CARRIERS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.int64}

# All bits of the exponent, as an integer of the element's size: set in infinities and NaNs only.
_EXPONENT = {"BF16": 0x7F80, "F16": 0x7C00, "F32": 0x7F80_0000}
_FINITE_SPAN = 1 << 18


def name() -> str:
    """The default device as "cpu" or "gpu"; asking does not start it."""
    return "gpu" if mx.default_device().type == mx.DeviceType.gpu else "cpu"


def supports_two_threads() -> bool:
    """Whether two threads may compute at a time. On Metal they had better not: streams that run side by side while
    memory is released and taken again can panic the kernel (mlx#3186)."""
    return name() == "cpu"


_clear_cache = mx.clear_cache
_set_cache_limit = mx.set_cache_limit
_loading = threading.Condition()
_loads = 0
_waiting = 0


@contextlib.contextmanager
def loading() -> Iterator[None]:
    """Around `mx.load` of a file object; any number at once, never within another. See `release_memory`."""
    global _loads
    with _loading:
        _loading.wait_for(lambda: not _waiting)
        _loads += 1
    try:
        yield
    finally:
        with _loading:
            _loads -= 1
            _loading.notify_all()


def release_memory() -> None:
    """Give memory that MLX keeps for reuse back to the system; not while a file object is being loaded. Any thread.

    Without a GPU, MLX's own `clear_cache` and `set_cache_limit` wait for the streams of all threads and hold Python's
    lock meanwhile. A load from a file object on another thread needs that lock, so the two would wait for each other
    forever. Generation loops and servers call them, also in a user's program, so this function and `set_cache_limit`
    replace them in `mlx.core` as soon as this module is imported.
    """
    with _loading:
        if not _loads:
            _clear_cache()


def set_cache_limit(limit: int) -> int:
    """Limit the bytes that MLX keeps for reuse, and release the excess; returns the previous limit.

    Waits for the file objects that are being loaded, and loads begin after it: see `release_memory`. Any thread that
    is not loading one.
    """
    global _waiting
    with _loading:
        _waiting += 1
        try:
            _loading.wait_for(lambda: not _loads)
            return _set_cache_limit(limit)
        finally:
            _waiting -= 1
            _loading.notify_all()


for _name, _function in (("clear_cache", release_memory), ("set_cache_limit", set_cache_limit)):
    setattr(mx, _name, _function)


def set_limits(gpu_memory_bytes: int) -> None:
    """Bound what MLX allocates in this process, and what it keeps for reuse to a quarter of that."""
    mx.set_memory_limit(gpu_memory_bytes)
    set_cache_limit(gpu_memory_bytes // 4)


_streams = threading.local()


def begin(arrays: Sequence[mx.array]) -> None:
    """Begin to compute lazy arrays; waits only for some of what was begun before, of which MLX bounds the number.

    Only the thread that made them may do this. Without a GPU what it loads from then on has a stream of its own, so
    that it need not wait for what is computed; like every stream of a thread MLX keeps it for ever.
    """
    if name() == "cpu" and not hasattr(_streams, "load"):
        _streams.load = mx.new_stream(mx.cpu)
    mx.async_eval(*arrays)  # type: ignore[no-untyped-call]


def load_stream() -> mx.Stream | None:
    """The MLX stream on which this thread loads files; None selects MLX's default load stream, on the CPU."""
    stream: mx.Stream | None = getattr(_streams, "load", None)
    return stream


def evaluate(arrays: Sequence[mx.array]) -> None:
    """Compute lazy arrays now. Only the thread that made them may do this; afterwards any thread may read them."""
    mx.eval(*arrays)


def dtype_name(array: mx.array) -> str:
    """The safetensors name of an array's dtype; UnsupportedLayerError for one that is never stored."""
    known = _NAMES.get(array.dtype)
    if known is None:
        raise UnsupportedLayerError(f"arrays of dtype {array.dtype} cannot be stored")
    return known


def dtype_of(name: str) -> mx.Dtype:
    """The dtype of a safetensors name."""
    return _MX_DTYPES[name]


def to_array(rows: Bytes, dtype: str) -> mx.array:
    """Bytes `[..., row_bytes]` as an array `[..., width]` of `dtype`. Copies; any thread, the array is its thread's."""
    carrier = _CARRIERS[ITEM_BYTES[dtype]]
    return mx.array(np.ascontiguousarray(rows).view(carrier)).view(_MX_DTYPES[dtype])


def to_bytes(array: mx.array) -> Bytes:
    """The bytes `[..., row_bytes]` of an evaluated, row-contiguous array, without a copy. Any thread.

    The view keeps the buffer alive. Only `virtual.py` writes to it, before anybody else has the array. BufferError or
    ValueError if the array is not row-contiguous.
    """
    return flat_bytes(array).reshape(*array.shape[:-1], array.shape[-1] * array.itemsize)


def flat_bytes(array: mx.array) -> Bytes:
    """As `to_bytes`, in one dimension, for arrays of any shape."""
    return np.frombuffer(cast(Any, array), dtype=np.uint8) if array.size else np.empty(0, np.uint8)


def zeros(shape: tuple[int, ...], dtype: str) -> mx.array:
    """Zeros, lazy; with a size of 0 somewhere they hold nothing."""
    return mx.zeros(shape, _MX_DTYPES[dtype])


def all_finite(rows: Bytes, dtype: str) -> bool:
    """Whether no element is an infinity or NaN. Integers of the bytes, without the device.

    numpy in spans that stay in the processor's cache: 5x the speed of mx.isfinite on a CPU.
    """
    exponent = _EXPONENT[dtype]
    flat = np.ascontiguousarray(rows).reshape(-1).view(_CARRIERS[ITEM_BYTES[dtype]])
    for at in range(0, flat.size, _FINITE_SPAN):
        if int((flat[at : at + _FINITE_SPAN] & exponent).max()) == exponent:
            return False
    return True


class Capture:
    """Tokens `[start, end)` of the kv layers of a cache, copied out of the engine's buffers.

    Made on the thread that owns the arrays, which it evaluates; any thread may take views, since those are plain bytes.
    One copy, into memory that is given back with the capture; what mx.contiguous of every slice takes, MLX keeps.
    """

    def __init__(self, layers: Sequence[KVLayer | StateLayer], start: int, end: int) -> None:
        """`layers`: the whole cache, in which window and state layers are passed over (`states.StateCapture`).

        Raises InvalidRequestError when an array has another shape or dtype than its layer's spec says.
        """
        self.start = start
        self.end = end
        checked = {
            (index, part): _checked(layer, part, index, start, end)
            for index, layer in enumerate(layers)
            if isinstance(layer, KVLayer)
            for part in PARTS
        }
        evaluate([array for arrays in checked.values() for array in arrays])
        sizes = (array.shape[1] * array.shape[3] * array.itemsize for arrays in checked.values() for array in arrays)
        self._memory = np.empty((end - start) * sum(sizes), np.uint8)
        self._rows: dict[tuple[int, str, str], Bytes] = {}
        at = 0
        for (index, part), arrays in checked.items():
            for array, tensor in zip(arrays, layers[index].spec.part(part).tensors(), strict=True):
                rows = _rows_of(array, start, end)
                copy = self._memory[at : at + rows.size].reshape(rows.shape)
                np.copyto(copy, rows)
                self._rows[index, part, tensor.name] = copy
                at += rows.size

    @property
    def nbytes(self) -> int:
        """Bytes of all captured tokens."""
        return self._memory.nbytes

    def piece_views(self, layout: Layout, piece: Piece) -> Iterator[memoryview]:
        """The bytes of a piece within `[start, end)`, in the order of `layers.raw_ranges`, without copies."""
        if not self.start <= piece.start < piece.end <= self.end:
            raise InvalidRequestError(f"tokens {piece.start}..{piece.end} were not captured")
        first, last = piece.start - self.start, piece.end - self.start
        for stack, tensor, layer, _, _ in raw_ranges(layout, piece.n_tokens):
            rows = self._rows[layer, stack.part, tensor.name]
            if first == 0 and last == rows.shape[1]:
                yield rows.data.cast("B")
            else:
                yield from (head[first:last].data.cast("B") for head in rows)


def _rows_of(array: mx.array, start: int, end: int) -> Bytes:
    """Rows `[start, end)` of an evaluated `[1, heads, capacity, width]` as `[heads, tokens, row_bytes]`: a view.

    Of the engine's buffer itself, so that nothing beyond these rows is read: buffers carry slack and, after a trim,
    stale rows. Buffers that are themselves slices or transposed are made contiguous first.
    """
    try:
        whole = to_bytes(array)
    except (BufferError, ValueError):
        sliced = mx.contiguous(array[:, :, start:end, :])
        evaluate([sliced])
        whole, start, end = to_bytes(sliced), 0, end - start
    rows: Bytes = whole[0, :, start:end]
    return rows


def _checked(layer: KVLayer, part: str, index: int, start: int, end: int) -> tuple[mx.array, ...]:
    """The part's arrays, if they are what the spec says and hold `[start, end)`."""
    if not 0 <= start < end <= layer.n_tokens:
        raise InvalidRequestError(f"layer {index} holds {layer.n_tokens} tokens, not {start}..{end}")
    arrays, tensors = layer.part(part), layer.spec.part(part).tensors()
    if len(arrays) != len(tensors):
        raise InvalidRequestError(f"layer {index} {part}: {len(arrays)} arrays instead of {len(tensors)}")
    for array, tensor in zip(arrays, tensors, strict=True):
        heads, capacity, width = (array.shape[1:]) if array.ndim == 4 and array.shape[0] == 1 else (0, 0, 0)
        if (heads, width) != (tensor.heads, tensor.width) or capacity < end or dtype_name(array) != tensor.dtype:
            raise InvalidRequestError(
                f"layer {index} {part}.{tensor.name}: {array.dtype} {tuple(array.shape)} is not "
                f"{tensor.dtype} [1, {tensor.heads}, >= {end}, {tensor.width}]"
            )
    return arrays
