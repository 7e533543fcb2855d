"""Bytes and arrays, and what is captured from an engine's buffers."""

from __future__ import annotations

import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm.models.cache import KVCache, QuantizedKVCache

from kvstore.codecs import device
from kvstore.codecs.device import Capture
from kvstore.core.layers import KVLayer, LayerSpec, Layout, PartSpec, Piece, cut_pieces
from kvstore.errors import InvalidRequestError, KVStoreError, UnsupportedLayerError
from tests.support.fault_proxy import wait_for

DTYPES = {"BF16": mx.bfloat16, "F16": mx.float16, "F32": mx.float32, "U32": mx.uint32, "U8": mx.uint8}


def raw_bytes(array: mx.array) -> bytes:
    """What the array holds, through a path of its own: as integers."""
    array = mx.contiguous(array).view(mx.uint8)
    return np.array(array).tobytes()


def piece_bytes(capture: Capture, layout: Layout, piece: Piece) -> bytes:
    """All views of a piece, joined."""
    return b"".join(capture.piece_views(layout, piece))


def expected_piece(layout: Layout, layers: list[KVLayer], piece: Piece) -> bytes:
    """The documented byte order, from the arrays themselves."""
    joined = b""
    for stack in layout.raw_stacks:
        for number, _ in enumerate(stack.tensors):
            for index in stack.layers:
                joined += raw_bytes(layers[index].part(stack.part)[number][:, :, piece.start : piece.end])
    return joined


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=20, deadline=None)
@given(data=st.binary(min_size=24, max_size=24))
def test_bytes_survive_the_way_to_the_device_and_back(dtype: str, data: bytes) -> None:
    """Every bit pattern, NaNs with payloads included."""
    array = device.to_array(np.frombuffer(data, np.uint8).reshape(1, 3, 8), dtype)
    assert array.dtype == DTYPES[dtype]
    mx.eval(array)
    assert device.to_bytes(array).tobytes() == data
    assert device.dtype_name(array) == dtype


def test_bytes_of_an_array_are_a_view_not_a_copy() -> None:
    """Two views of a bf16 array are the same memory."""
    array = mx.ones((1, 2, 3, 4), mx.bfloat16)
    mx.eval(array)
    assert np.shares_memory(device.to_bytes(array), device.to_bytes(array))


def test_bytes_of_a_strided_array_are_refused() -> None:
    """Its buffer is in another order; wrong bytes would be silent."""
    array = mx.ones((2, 3, 4), mx.bfloat16).transpose(1, 0, 2)
    mx.eval(array)
    with pytest.raises((ValueError, BufferError)):
        device.to_bytes(array)


def test_bytes_of_an_empty_array_are_empty() -> None:
    """A layout may have values of width 0."""
    array = mx.zeros((1, 8, 4, 0), mx.bfloat16)
    mx.eval(array)
    assert device.to_bytes(array).shape == (1, 8, 4, 0)


def test_a_dtype_that_is_never_stored_is_refused() -> None:
    """Nothing is converted behind the caller's back."""
    with pytest.raises(UnsupportedLayerError, match="complex64"):
        device.dtype_name(mx.array(1j))


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 0.0, -1.0, 65504.0])
def test_finite_agrees_with_mlx(dtype: str, value: float) -> None:
    """Infinities and NaNs of both signs, at any place in a large buffer."""
    values = np.zeros((1, 1, 5000, 64), np.float32)
    values[0, 0, 4321, 63] = value
    array = mx.array(values).astype(DTYPES[dtype])
    mx.eval(array)
    assert device.all_finite(device.to_bytes(array), dtype) == mx.all(mx.isfinite(array)).item()


def test_limits_are_set_without_wiring_memory() -> None:
    """A quarter of the limit may be kept for reuse."""
    before = mx.set_memory_limit(1 << 30), mx.set_cache_limit(1 << 20)
    try:
        device.set_limits(1 << 29)
        assert mx.set_memory_limit(1 << 30) == 1 << 29
        assert mx.set_cache_limit(0) in (1 << 27, 0)  # mlx 0.31 keeps nothing on a CPU
        device.release_memory()
    finally:
        mx.set_memory_limit(before[0])
        mx.set_cache_limit(before[1])
    assert device.name() in ("cpu", "gpu")


part_specs = st.one_of(
    st.builds(PartSpec, st.integers(1, 3), st.sampled_from([32, 40, 64]), st.sampled_from(["BF16", "F16", "F32"])),
    st.builds(PartSpec, st.integers(1, 3), st.just(64), st.just("BF16"), st.sampled_from([4, 8]), st.just(32)),
)
layer_specs = st.builds(LayerSpec, part_specs, st.one_of(part_specs, st.just(PartSpec(1, 0, "BF16"))))


def make_layers(layout: Layout, capacity: int, n_tokens: int, seed: int) -> list[KVLayer]:
    """Random bytes in every array, head-room included."""
    rng = np.random.default_rng(seed)
    layers = []
    for spec in layout.layers:
        arrays = {}
        for name in ("keys", "values"):
            shapes = [(t, (1, t.heads, capacity, t.layer_bytes(1) // t.heads)) for t in spec.part(name).tensors()]
            arrays[name] = tuple(
                device.to_array(rng.integers(0, 255, shape, np.uint8), tensor.dtype) for tensor, shape in shapes
            )
        layers.append(KVLayer(spec, arrays["keys"], arrays["values"], n_tokens))
    return layers


@settings(max_examples=40, deadline=None)
@given(
    specs=st.lists(layer_specs, min_size=1, max_size=4),
    bounds=st.tuples(st.integers(0, 20), st.integers(1, 20)),
    slack=st.integers(0, 7),
    restored=st.integers(0, 30),
    seed=st.integers(0, 999),
)
def test_pieces_hold_exactly_their_tokens_in_the_order_that_travels(
    specs: list[LayerSpec], bounds: tuple[int, int], slack: int, restored: int, seed: int
) -> None:
    """Any mixture of layers, any cut, against slicing the arrays themselves."""
    layout = Layout(tuple(specs))
    start, end = bounds[0], bounds[0] + bounds[1]
    layers = make_layers(layout, end + slack, end, seed)
    capture = Capture(layers, start, end)
    assert capture.nbytes == (end - start) * layout.token_bytes
    for piece in cut_pieces(start, end, restored, block_tokens=8):
        assert piece_bytes(capture, layout, piece) == expected_piece(layout, layers, piece)


@pytest.mark.parametrize("heads", [1, 4])
def test_a_trimmed_cache_gives_none_of_its_stale_rows(heads: int) -> None:
    """44 tokens after an extension and a trim: nothing of the 236 rows behind them, and what comes later stays out."""
    spec = PartSpec(heads, 64, "BF16")
    layout = Layout((LayerSpec(spec, spec),))
    cache = KVCache()
    first, later = (mx.random.normal((1, heads, n, 64)).astype(mx.bfloat16) for n in (40, 4))
    stale = mx.full((1, heads, 240, 64), 99.0, mx.bfloat16)
    cache.update_and_fetch(first, first)
    cache.update_and_fetch(stale, stale)
    cache.trim(240)
    cache.update_and_fetch(later, later)
    assert cache.offset == 44
    assert cache.keys.shape[2] > 44
    capture = Capture([KVLayer(layout.layers[0], (cache.keys,), (cache.values,), cache.offset)], 0, 44)
    cache.trim(44)
    cache.update_and_fetch(stale, stale)
    mx.eval(cache.keys, cache.values)
    wanted = raw_bytes(mx.concatenate([first, later], axis=2))
    assert piece_bytes(capture, layout, Piece(0, 44)) == wanted + wanted
    assert capture.nbytes == 2 * heads * 44 * 64 * 2


def test_an_engine_quantized_cache_is_captured_as_its_three_tensors() -> None:
    """Codes, scales and biases of mlx-lm's own quantized cache."""
    spec = PartSpec(2, 64, "BF16", 8, 64)
    layout = Layout((LayerSpec(spec, spec),))
    cache = QuantizedKVCache(group_size=64, bits=8)
    rows = mx.random.normal((1, 2, 10, 64)).astype(mx.bfloat16)
    cache.update_and_fetch(rows, rows)
    capture = Capture([KVLayer(layout.layers[0], tuple(cache.keys), tuple(cache.values), 10)], 0, 10)
    wanted = b"".join(raw_bytes(tensor) for tensor in mx.quantize(rows, group_size=64, bits=8))
    assert piece_bytes(capture, layout, Piece(0, 10)) == wanted + wanted


def test_views_are_taken_on_another_thread_while_the_engine_goes_on() -> None:
    """No evaluation there: a lazy array would raise `There is no Stream` on a foreign thread."""
    layout = Layout((LayerSpec(PartSpec(2, 64, "BF16"), PartSpec(1, 64, "BF16")),) * 3)
    layers = make_layers(layout, 40, 32, seed=5)
    lazy = [KVLayer(x.spec, (x.keys[0] * 1,), (x.values[0] * 1,), 32) for x in layers]
    wanted = [expected_piece(layout, lazy, piece) for piece in cut_pieces(0, 32, block_tokens=8)]
    capture = Capture(lazy, 0, 32)
    seen: list[threading.Thread] = []

    def read(piece: Piece) -> bytes:
        seen.append(threading.current_thread())
        return piece_bytes(capture, layout, piece)

    with ThreadPoolExecutor(2) as pool:
        futures = [pool.submit(read, piece) for piece in cut_pieces(0, 32, block_tokens=8)]
        for layer in lazy:
            layer.keys[0][:, :, 0:32, :] = 0
            layer.values[0][:, :, 0:32, :] = 0
            mx.eval(layer.keys[0], layer.values[0])
        got = [future.result() for future in futures]
    assert got == wanted
    assert threading.main_thread() not in seen
    assert [piece_bytes(capture, layout, piece) for piece in cut_pieces(0, 32, block_tokens=8)] == wanted


def test_a_piece_that_was_not_captured_is_refused() -> None:
    """Better an error than bytes of other tokens."""
    layout = Layout((LayerSpec(PartSpec(2, 64, "BF16"), PartSpec(2, 64, "BF16")),))
    capture = Capture(make_layers(layout, 32, 32, seed=1), 8, 24)
    for piece in (Piece(0, 8), Piece(7, 9), Piece(20, 25), Piece(9, 9)):
        with pytest.raises(InvalidRequestError, match="not captured"):
            list(capture.piece_views(layout, piece))


GOOD = PartSpec(2, 64, "BF16")
BAD_ARRAYS = {
    "batch of two": (mx.zeros((2, 2, 32, 64), mx.bfloat16),),
    "three dimensions": (mx.zeros((2, 32, 64), mx.bfloat16),),
    "other dtype": (mx.zeros((1, 2, 32, 64), mx.float16),),
    "other heads": (mx.zeros((1, 3, 32, 64), mx.bfloat16),),
    "other width": (mx.zeros((1, 2, 32, 80), mx.bfloat16),),
    "too few rows": (mx.zeros((1, 2, 20, 64), mx.bfloat16),),
    "no array": (),
    "unknown dtype": (mx.zeros((1, 2, 32, 64), mx.complex64),),
}


@pytest.mark.parametrize("name", BAD_ARRAYS)
def test_arrays_that_are_not_what_the_spec_says_are_refused(name: str) -> None:
    """Checked before anything is sliced: a wrong shape would slice something else."""
    good = (mx.zeros((1, 2, 32, 64), mx.bfloat16),)
    with pytest.raises(KVStoreError):
        Capture([KVLayer(LayerSpec(GOOD, GOOD), good, BAD_ARRAYS[name], 32)], 0, 24)


@pytest.mark.parametrize(("start", "end"), [(-1, 4), (4, 4), (5, 4), (0, 33)])
def test_tokens_that_the_layers_do_not_hold_are_refused(start: int, end: int) -> None:
    """`n_tokens` is the truth, not the capacity."""
    good = (mx.zeros((1, 2, 64, 64), mx.bfloat16),)
    with pytest.raises(InvalidRequestError, match="holds 32 tokens"):
        Capture([KVLayer(LayerSpec(GOOD, GOOD), good, good, 32)], start, end)


def test_what_is_captured_of_a_buffer_that_is_itself_a_slice_or_transposed_is_right() -> None:
    """Such buffers cannot be viewed row by row, so they are made contiguous first."""
    spec = PartSpec(2, 64, "BF16")
    layout = Layout((LayerSpec(spec, spec),))
    keys = mx.random.normal((1, 2, 60, 64)).astype(mx.bfloat16)[:, :, 3:50, :]
    values = mx.random.normal((1, 47, 2, 64)).astype(mx.bfloat16).transpose(0, 2, 1, 3)
    mx.eval(keys, values)
    layers = [KVLayer(layout.layers[0], (keys,), (values,), 40)]
    assert piece_bytes(Capture(layers, 5, 40), layout, Piece(7, 31)) == expected_piece(layout, layers, Piece(7, 31))


def test_memory_is_not_given_back_while_a_file_object_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU mx.clear_cache waits for the load, and the load for Python's lock, which clear_cache keeps."""
    cleared: list[int] = []
    monkeypatch.setattr(device, "_clear_cache", lambda: cleared.append(1))
    with device.loading():
        device.release_memory()
        with device.loading():
            device.release_memory()
        device.release_memory()
        assert not cleared
    device.release_memory()
    assert cleared == [1]


def test_a_limit_waits_for_loads_that_have_begun_and_others_for_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """MLX's own function waits for the loads, too, but with Python's lock, which they need."""
    order: list[str] = []
    monkeypatch.setattr(device, "_set_cache_limit", lambda limit: order.append("limit") or limit)

    def load() -> None:
        with device.loading():
            order.append("load")

    with device.loading():
        limiting = threading.Thread(target=mx.set_cache_limit, args=(1,))
        limiting.start()
        wait_for(lambda: device._waiting == 1, "the limit waits")
        loading = threading.Thread(target=load)
        loading.start()
        loading.join(0.1)
        assert not order
    limiting.join(30)
    loading.join(30)
    assert order == ["limit", "load"]


DEADLOCK = """
import os, threading, time
import mlx.core as mx
from kvstore.codecs import device
from kvstore.codecs.virtual import VirtualFile

ended = threading.Event()

def fill(view):
    view[:] = bytes(len(view))
    yield

def load():
    while not ended.is_set():
        file = VirtualFile()
        for name in "abcd":
            file.add(name, "BF16", (64, 1024), fill)
        file.begin(dict).finish()

thread = threading.Thread(target=load)
thread.start()
for _ in range(1000):
    mx.eval(mx.ones(1 << 10) + 1)  # something to give back
    {call}
    time.sleep(0.001)
ended.set()
thread.join()
{call}
print("done", flush=True)
os._exit(0)  # at an ordinary end MLX aborts now and then, with "terminate called without an active exception"
"""


@pytest.mark.parametrize("call", ["mx.clear_cache()", "mx.set_cache_limit(1 << 10)", "device.set_limits(1 << 30)"])
def test_a_load_and_giving_memory_back_do_not_wait_for_each_other(call: str) -> None:
    """In a process of its own, which would hang: a generation loop, a server's own limit, the daemon's."""
    program = DEADLOCK.replace("{call}", call)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert (done.stdout, done.stderr) == ("done\n", "")
