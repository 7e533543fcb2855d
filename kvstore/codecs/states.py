"""Converts window and state layers to the bytes of a checkpoint and back: bit for bit, without a codec.

The bytes of a checkpoint are those of its arrays, row by row: by layer, then by array in the layer's own order, without
gaps. What describes them (`blocks.LayerState`) travels beside them, and so do the whole numbers that belong to a layer.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence

import mlx.core as mx

from kvstore.blobs.protocol import RangeReader
from kvstore.blobs.ranges import Range
from kvstore.codecs import device
from kvstore.codecs.codec import BlockCorruptError, verify_range
from kvstore.codecs.device import Bytes
from kvstore.codecs.virtual import Reads, VirtualFile
from kvstore.core.blocks import LayerState, StateArray
from kvstore.core.layers import KVLayer, Layout, StateLayer
from kvstore.core.records import states_from_list, states_to_list
from kvstore.core.rules import check_state
from kvstore.errors import CorruptDataError, InvalidRequestError


def describe(layers: Sequence[KVLayer | StateLayer]) -> tuple[LayerState, ...]:
    """Descriptions of all window and state layers of a cache, in order; without offsets and checksums.

    Reads shapes and dtypes only. InvalidRequestError for what cannot be stored or breaks a rule of its layer's spec,
    UnsupportedLayerError for a dtype that is never stored.
    """
    return tuple(describe_layer(layer, index) for index, layer in enumerate(layers) if isinstance(layer, StateLayer))


def describe_layer(layer: StateLayer, index: int = 0) -> LayerState:
    """As `describe`, of one layer."""
    arrays = ((name, device.dtype_name(array), tuple(array.shape)) for name, array in layer.arrays)
    state = LayerState(index, layer.numbers, tuple(StateArray(*one) for one in arrays))
    try:
        states_from_list(states_to_list([state]))  # what the other side will insist on
        check_state(layer.spec, state, layer.n_tokens)
    except CorruptDataError as error:
        raise InvalidRequestError(f"a layer that cannot be stored: {error}") from error
    return state


class StateCapture:
    """A copy of the window and state layers of a cache.

    Make it on the thread that owns the arrays. The copies are plain bytes, not arrays: the engine cannot change them,
    they keep no larger buffer alive, and any thread may take views.
    """

    def __init__(self, layers: Sequence[KVLayer | StateLayer]) -> None:
        """Raises as `describe` does. Evaluates what is lazy."""
        self.states = describe(layers)
        arrays = [array for layer in layers if isinstance(layer, StateLayer) for _, array in layer.arrays]
        device.evaluate(arrays)
        self._copies = [_copy(array) for array in arrays]

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(copy.nbytes for copy in self._copies)

    def views(self) -> Iterator[memoryview]:
        """The bytes of all arrays, in the order in which they travel and are stored."""
        return (copy.data for copy in self._copies if copy.nbytes)


def _copy(array: mx.array) -> Bytes:
    whole = mx.contiguous(array)
    device.evaluate([whole])
    return device.flat_bytes(whole).copy()


def state_ranges(state: LayerState, source: int) -> list[Range]:
    """Byte ranges of one layer in stream order; `source` is the checkpoint's number."""
    return [Range(source, array.offset, array.nbytes) for array in state.arrays if array.nbytes]


def begin_state(
    layout: Layout,
    state: LayerState,
    n_tokens: int,
    source: int,
    reader: RangeReader,
    reads: Reads | None = None,
    order: Sequence[Range] = (),
) -> VirtualFile[StateLayer]:
    """Begin to read one window or state layer after `n_tokens` tokens, into arrays of its own.

    Everything is read, verified and evaluated when `finish` returns; the arrays are the calling thread's. `order`: as
    for `assemble.begin_layer`. Both raise BlockCorruptError with `source` for damaged or missing bytes, OSError if the
    disk fails, what `reads` raises.
    """
    spec = layout.layers[state.layer]
    assert spec.is_exact, "kv layers come from blocks: see assemble.py"
    file = VirtualFile[StateLayer](
        reads, [str(number) for number, array in enumerate(state.arrays) if order and array.nbytes]
    )
    for number, array in enumerate(state.arrays):
        if array.nbytes:
            file.add(str(number), array.dtype, array.shape or (1,), functools.partial(_fill, reader, source, array))

    def build(loaded: dict[str, mx.array]) -> StateLayer:
        arrays = [
            loaded[str(number)].reshape(array.shape) if array.nbytes else device.zeros(array.shape, array.dtype)
            for number, array in enumerate(state.arrays)
        ]
        device.evaluate(arrays)
        names = (array.name for array in state.arrays)
        return StateLayer(spec, tuple(zip(names, arrays, strict=True)), state.numbers, n_tokens)

    return file.begin(build)


def _fill(reader: RangeReader, source: int, array: StateArray, view: memoryview) -> Iterator[None]:
    """Read one array and verify it: one step. State without a checksum is never served.

    It cannot be told from another's.
    """
    try:
        reader.readinto(source, array.offset, [view])
    except CorruptDataError as error:
        raise BlockCorruptError(str(error), source) from error
    if not array.checksum:
        raise BlockCorruptError(f"array {array.name} of a checkpoint has no checksum", source)
    verify_range([view], int.from_bytes(array.checksum, "little"), source)
    yield
