"""A hit put together from many blocks, against numpy that does it the slow way."""

from __future__ import annotations

import contextlib
import io
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.blobs.ranges import BufferReader, FileReader, Range
from kvstore.client.receiver import LayerReader
from kvstore.codecs import device, gather, virtual
from kvstore.codecs.assemble import assemble_layer, begin_layer, dense_bytes, dense_runs
from kvstore.codecs.byte_plan import HitBlock, layer_ranges
from kvstore.codecs.codec import BlockCorruptError, codec_of, packer_of
from kvstore.codecs.encode import encode_run
from kvstore.codecs.profiles import parse_profile
from kvstore.codecs.runs import EncodedRun, pack_run, payload_run, stacks_of
from kvstore.codecs.virtual import VirtualFile
from kvstore.core.blocks import ITEM_BYTES, Recipe, Run, Stack
from kvstore.core.layers import KVLayer, LayerSpec, Layout, PartSpec
from kvstore.errors import CorruptDataError, UnknownFormatError
from kvstore.wire.frames import LayerBytes
from tests.support.stored import finish_runs, random_payload, streamed, write_source

PLAIN = PartSpec(2, 64, "BF16")
GROUPED = ("channel4:affine4-g32", "channel5", "lossless:channel3,edge1=affine8-g32:channel8")
LAYOUTS = {
    "plain": Layout((LayerSpec(PLAIN, PLAIN),) * 3),
    "fp16": Layout((LayerSpec(PartSpec(3, 32, "F16"), PartSpec(3, 32, "F16")),) * 2),
    "fp32 folded": Layout((LayerSpec(PartSpec(4, 40, "F32"), PartSpec(4, 40, "F32")),) * 2),
    "latent": Layout((LayerSpec(PartSpec(1, 64, "BF16"), PartSpec(1, 0, "BF16")), LayerSpec(PLAIN, PLAIN))),
    "engine-quantized": Layout((LayerSpec(PartSpec(2, 64, "BF16", 4, 32), PLAIN), LayerSpec(PLAIN, PLAIN))),
}


@pytest.fixture(params=[virtual.SMALL_BYTES, 0], ids=["small", "large"])
def by_size(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small tensors as they are read, and as large ones are: each on a thread of its own."""
    monkeypatch.setattr(virtual, "SMALL_BYTES", request.param)


class Case:
    """Stored blocks and, for each, the decoded rows that it shows, per (layer, part, array): `[heads, rows, bytes]`."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.blocks: list[HitBlock] = []
        self.payloads: list[bytes] = []
        self.shown: list[dict[tuple[int, str, int], np.ndarray]] = []

    def add(self, runs: Sequence[EncodedRun], take: int) -> None:
        """A block, and how much of it the hit uses."""
        sealed, payload = finish_runs(runs)
        self.blocks.append(HitBlock(sealed, take))
        self.payloads.append(payload)
        decoded = [decode_all(self.layout, run) for run in runs]
        self.shown.append({key: np.concatenate([d[key] for d in decoded], axis=1)[:, :take] for key in decoded[0]})

    @property
    def n_tokens(self) -> int:
        """Length of the hit."""
        return sum(block.take for block in self.blocks)

    def expected(self, layer: int, part: str, number: int) -> np.ndarray:
        """All rows of the hit."""
        return np.concatenate([shown[layer, part, number] for shown in self.shown], axis=1)

    def check(self, layer: int, got: KVLayer, headroom: int) -> None:
        """Every byte of every array: the rows, then zeros, in the right shape and dtype."""
        spec = self.layout.layers[layer]
        capacity = -(-(self.n_tokens + headroom) // 256) * 256
        assert (got.spec, got.n_tokens) == (spec, self.n_tokens)
        for part in ("keys", "values"):
            tensors, arrays = spec.part(part).tensors(), got.part(part)
            assert len(arrays) == len(tensors)
            mx.eval(*arrays)
            for number, (array, tensor) in enumerate(zip(arrays, tensors, strict=True)):
                assert array.shape == (1, tensor.heads, capacity, tensor.width)
                assert device.dtype_name(array) == tensor.dtype
                rows = device.to_bytes(mx.contiguous(array))[0]
                assert np.array_equal(rows[:, : self.n_tokens], self.expected(layer, part, number))
                assert not rows[:, self.n_tokens :].any()


def decode_all(layout: Layout, encoded: EncodedRun) -> dict[tuple[int, str, int], np.ndarray]:
    """What a run shows, decoded layer by layer."""
    found: dict[tuple[int, str, int], np.ndarray] = {}
    first, last = encoded.run.skip, encoded.run.skip + encoded.run.shown
    for stack, buffers in stacks_of(encoded):
        for at, layer in enumerate(stack.layers):
            part = layout.layers[layer].part(stack.part)
            mine = [share_of(encoded.run, stack, n, buffer, at) for n, buffer in enumerate(buffers)]
            if part.bits:
                found.update({(layer, stack.part, i): b[:, first:last] for i, b in enumerate(mine)})
                continue
            arrays = [device.to_array(b[None], t.dtype) for b, t in zip(mine, stack.tensors, strict=True)]
            decoded = mx.contiguous(codec_of(stack.recipe).decode(arrays, stack.recipe, part))
            mx.eval(decoded)
            found[layer, stack.part, 0] = device.to_bytes(decoded)[0][:, first:last]
    return found


def share_of(run: Run, stack: Stack, number: int, buffer: np.ndarray, position: int) -> np.ndarray:
    """One layer's share of a tensor as `[heads, rows, row_bytes]`, unpacked."""
    tensor, packer = stack.tensors[number], packer_of(stack.recipe)
    if packer is None:
        return buffer[position]
    at, length = replace(tensor, offset=0).layer_range(position, run.n_tokens)
    shape = tensor.heads, tensor.rows(run.n_tokens), tensor.row_bytes
    return packer.unpack(buffer[at : at + length].data, shape, ITEM_BYTES[tensor.dtype])


def make_run(layout: Layout, n_tokens: int, seed: int, profile: str, skip: int = 0, hidden: int = 0) -> EncodedRun:
    """A run of random values that hides `skip` rows before and `hidden` behind, and what its groups need."""
    dtype, how = layout.layers[0].keys.dtype, parse_profile(profile)
    held = skip + n_tokens + hidden
    if profile in GROUPED:
        held = -(-held // 64) * 64
    payload = random_payload(np.random.default_rng(seed), dtype, held * layout.token_bytes // ITEM_BYTES[dtype])
    encoded = pack_run(layout, encode_run(layout, payload_run(layout, payload, held), how), how)
    return replace(encoded, run=replace(encoded.run, skip=skip, shown=n_tokens))


run_shapes = st.tuples(
    st.one_of(st.integers(1, 40), st.sampled_from([63, 64, 65, 128, 150])),
    st.integers(0, 999),
    st.sampled_from(["raw", "lossless", "affine8-g32", "affine8-g32", "affine4-g32", *GROUPED]),
    st.sampled_from([0, 0, 1, 3, 64]),
    st.sampled_from([0, 0, 1, 3]),
)


@settings(max_examples=100, deadline=None)
@given(
    name=st.sampled_from(sorted(LAYOUTS)),
    blocks=st.lists(
        st.tuples(st.lists(run_shapes, min_size=1, max_size=3), st.integers(0, 119)), min_size=1, max_size=4
    ),
    headroom=st.sampled_from([0, 1, 256]),
    small_bytes=st.sampled_from([0, virtual.SMALL_BYTES]),
    message_bytes=st.sampled_from([100, 4_000, 1 << 20]),
)
def test_a_hit_is_the_rows_of_its_blocks_one_after_the_other(
    name: str,
    blocks: list[tuple[list[tuple[int, int, str, int, int]], int]],
    headroom: int,
    small_bytes: int,
    message_bytes: int,
) -> None:
    """Any layout, runs, recipes, hidden rows and cuts: bit-equal to decoding each run alone, zeros behind.

    Also from messages of any size, read as they come.
    """
    case = Case(LAYOUTS[name])
    for runs, cut in blocks:
        made = [make_run(case.layout, *shape) for shape in runs]
        shown = sum(run.run.shown for run in made)
        case.add(made, max(1, shown - cut))
    for layer in range(len(case.layout.layers)):
        reader = streamed(case.blocks, case.payloads, layer)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(virtual, "SMALL_BYTES", small_bytes)
            got = assemble_layer(case.layout, layer, case.blocks, reader, headroom)
        case.check(layer, got, headroom)
        ranges = layer_ranges(case.blocks, layer)
        arriving = LayerReader(messages(case, layer, message_bytes), layer, ranges)
        begun = begin_layer(case.layout, layer, case.blocks, arriving, headroom, order=ranges)
        case.check(layer, begun.finish(), headroom)
        arriving.end()


def messages(case: Case, layer: int, nbytes: int) -> Iterator[LayerBytes]:
    """One layer as a stream carries it, in messages of this size."""
    ranges = layer_ranges(case.blocks, layer)
    data = b"".join(case.payloads[r.source][r.offset : r.offset + r.nbytes] for r in ranges)
    return (LayerBytes(layer, memoryview(data[at : at + nbytes])) for at in range(0, len(data), nbytes))


def test_a_range_that_no_tensor_of_the_layer_has_is_a_corrupt_block() -> None:
    """It would have no place to go, and what comes after it would be taken for it."""
    case = Case(LAYOUTS["plain"])
    case.add([make_run(case.layout, 8, 1, "raw")], 8)
    ranges = [*layer_ranges(case.blocks, 0), Range(0, 1, 1)]
    with pytest.raises(BlockCorruptError, match="not of the layer"):
        begin_layer(case.layout, 0, case.blocks, LayerReader(iter(()), 0, ranges), order=ranges)


@pytest.mark.parametrize("message_bytes", [100, 1 << 20])
def test_a_flipped_bit_of_a_stream_names_its_block_as_it_arrives(message_bytes: int) -> None:
    """Where a range lies in one message, and where it goes on in the next."""
    case = Case(LAYOUTS["plain"])
    for number in range(3):
        case.add([make_run(case.layout, 8, number, "raw")], 8)
    ranges = layer_ranges(case.blocks, 1)
    flipped = bytearray(case.payloads[1])
    flipped[next(r.offset for r in ranges if r.source == 1)] ^= 1
    case.payloads[1] = bytes(flipped)
    arriving = LayerReader(messages(case, 1, message_bytes), 1, ranges)
    with pytest.raises(BlockCorruptError) as raised:
        begin_layer(case.layout, 1, case.blocks, arriving, order=ranges).finish()
    assert (raised.value.source, arriving.broken) == (1, None)


@pytest.mark.usefixtures("by_size")
def test_files_and_streams_give_the_same(tmp_path: Path) -> None:
    """Path and stream differ only in who reads."""
    case = Case(LAYOUTS["plain"])
    for number, profile in enumerate(["affine8", "affine8", "raw"]):
        case.add([make_run(case.layout, 256, number, profile)], 256 if number < 2 else 44)
    sources = [write_source(tmp_path / str(i), payload) for i, payload in enumerate(case.payloads)]
    with contextlib.closing(FileReader(sources, open_max=2)) as reader:
        for layer in range(3):
            case.check(layer, assemble_layer(case.layout, layer, case.blocks, reader), 256)


def test_one_recipe_is_one_array_without_any_copy() -> None:
    """Raw values are read straight into the array that is handed over: nothing is left to evaluate or concatenate."""
    case = Case(LAYOUTS["plain"])
    for number in range(4):
        case.add([make_run(case.layout, 256, number, "raw")], 256)
    readers = [streamed(case.blocks, case.payloads, layer) for layer in range(3)]
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    layer = assemble_layer(case.layout, 0, case.blocks, readers[0])
    assert mx.get_peak_memory() - before <= sum(a.nbytes for a in (*layer.keys, *layer.values)) + 65_536


def test_affine_rows_are_what_mlx_makes_of_the_values() -> None:
    """From the values to the hit and not through our codec: several blocks, cut inside the last."""
    layout = LAYOUTS["plain"]
    rng = np.random.default_rng(7)
    payloads = [random_payload(rng, "BF16", 256 * layout.token_bytes // 2) for _ in range(2)]
    raws = [payload_run(layout, payload, 256) for payload in payloads]
    case = Case(layout)
    for raw, take in zip(raws, (256, 17), strict=True):
        case.add([encode_run(layout, raw, parse_profile("affine8"))], take)
    values = np.concatenate([raw.buffers[1][2] for raw in raws], axis=1)[None, :, :273]
    wanted = mx.dequantize(*mx.quantize(device.to_array(values, "BF16"), group_size=64, bits=8), group_size=64, bits=8)
    got = assemble_layer(layout, 2, case.blocks, streamed(case.blocks, case.payloads, 2))
    assert mx.array_equal(got.values[0][:, :, :273], wanted).item()


def test_ranges_name_exactly_what_is_read() -> None:
    """In the order of the stream; runs that the cut leaves out are not read at all."""

    class Recorder:
        """Notes every read."""

        def __init__(self, inner: BufferReader) -> None:
            self.inner = inner
            self.reads: list[tuple[int, int, int]] = []

        def readinto(self, source: int, offset: int, views: Sequence[memoryview]) -> None:
            self.reads.append((source, offset, sum(view.nbytes for view in views)))
            self.inner.readinto(source, offset, views)

    layout = LAYOUTS["engine-quantized"]
    case = Case(layout)
    case.add([make_run(layout, 8, 1, "affine8-g32"), make_run(layout, 8, 2, "raw", hidden=2)], 12)
    case.add([make_run(layout, 8, 3, "raw"), make_run(layout, 8, 4, "raw")], 8)
    ranges = layer_ranges(case.blocks, 0)
    # The first run: three raw key tensors of the engine and three encoded value tensors; then twice three and one.
    assert [r.source for r in ranges] == [0] * 10 + [1] * 4
    recorder = Recorder(streamed(case.blocks, case.payloads, 0))
    assemble_layer(layout, 0, case.blocks, recorder)
    assert sorted(recorder.reads) == sorted(ranges)


@pytest.mark.usefixtures("by_size")
@pytest.mark.parametrize(("take", "first"), [(20, "affine8"), (7, "affine8"), (7, "lossless"), (20, GROUPED[0])])
def test_a_flipped_bit_is_caught_and_its_block_is_named(take: int, first: str) -> None:
    """In any byte that a layer stores, also in rows that the hit does not use."""
    layout = LAYOUTS["plain"]
    case = Case(layout)
    case.add([make_run(layout, 20, 1, "raw")], 20)
    case.add([make_run(layout, 16, 2, first, skip=2, hidden=2), make_run(layout, 4, 3, "raw")], take)
    rng = np.random.default_rng(1)
    for span in layer_ranges(case.blocks, 1):
        for at in (0, span.nbytes - 1, int(rng.integers(span.nbytes))):
            damaged = [bytearray(payload) for payload in case.payloads]
            damaged[span.source][span.offset + at] ^= 1 << int(rng.integers(8))
            reader = streamed(case.blocks, [bytes(d) for d in damaged], 1)
            with pytest.raises(BlockCorruptError, match="checksum") as caught:
                assemble_layer(layout, 1, case.blocks, reader)
            assert caught.value.source == span.source
            if first != "lossless":  # its frames notice by themselves, most of the time
                assemble_layer(layout, 1, case.blocks, reader, verify=False)


@pytest.mark.usefixtures("by_size")
def test_missing_and_short_files_are_corrupt_blocks(tmp_path: Path) -> None:
    """As what went wrong, not as MLX's RuntimeError; and the next assembly works."""
    layout = LAYOUTS["plain"]
    case = Case(layout)
    for number in range(2):
        case.add([make_run(layout, 30, number, "affine8")], 30)
    sources = [write_source(tmp_path / str(i), payload) for i, payload in enumerate(case.payloads)]
    good = (tmp_path / "1").read_bytes()
    for damage in (good[:-1], good[:64], b"", None):
        (tmp_path / "1").unlink()
        if damage is not None:
            (tmp_path / "1").write_bytes(damage)
        with contextlib.closing(FileReader(sources)) as reader, pytest.raises(BlockCorruptError) as caught:
            assemble_layer(layout, 0, case.blocks, reader)
        assert caught.value.source == 1
        (tmp_path / "1").write_bytes(good)
    with contextlib.closing(FileReader(sources)) as reader:
        case.check(0, assemble_layer(layout, 0, case.blocks, reader), 256)


def first_stack(run: Run, **changes: object) -> Run:
    """The run with its first stack changed."""
    return replace(run, stacks=(replace(run.stacks[0], **changes), *run.stacks[1:]))  # type: ignore[arg-type]


def test_records_that_do_not_fit_the_layout_are_corrupt() -> None:
    """A record is outside input: no reading past what it describes, no array of another shape."""
    layout = LAYOUTS["plain"]
    case = Case(layout)
    case.add([make_run(layout, 10, 1, "affine8")], 10)
    (run,) = case.blocks[0].runs
    stack = run.stacks[0]
    wrong_width = (replace(stack.tensors[0], width=stack.tensors[0].width * 2), *stack.tensors[1:])
    bad = [
        replace(run, stacks=run.stacks[1:]),
        replace(run, stacks=(stack, *run.stacks)),
        first_stack(run, layers=(1, 2)),
        first_stack(run, tensors=wrong_width),
        first_stack(run, tensors=stack.tensors[:2]),
        first_stack(run, recipe=Recipe("affine", 1, (("bits", 4), ("group", 64)))),
        first_stack(run, recipe=Recipe("affine", 1, (("bits", 8),))),
        replace(run, shown=9),
    ]
    reader = streamed(case.blocks, case.payloads, 0)
    for wrong in bad:
        with pytest.raises(CorruptDataError) as caught:
            assemble_layer(layout, 0, [HitBlock((wrong,), 10)], reader)
        assert isinstance(caught.value, BlockCorruptError)


def test_a_recipe_of_a_newer_kvstore_is_refused() -> None:
    """Not guessed at, and not called corrupt."""
    layout = LAYOUTS["plain"]
    case = Case(layout)
    case.add([make_run(layout, 10, 1, "affine8")], 10)
    newer = first_stack(case.blocks[0].runs[0], recipe=Recipe("affine", 2))
    with pytest.raises(UnknownFormatError):
        assemble_layer(layout, 0, [HitBlock((newer,), 10)], streamed(case.blocks, case.payloads, 0))


@pytest.mark.usefixtures("by_size")
def test_a_reader_that_fails_otherwise_is_heard() -> None:
    """A failing disk stays an OSError, and a defect is an error too: mlx 0.31 would hand out the unfilled buffer."""

    class Failing:
        """Raises what it is given."""

        def __init__(self, error: Exception) -> None:
            self.error = error

        def readinto(self, source: int, offset: int, views: Sequence[memoryview]) -> None:
            raise self.error

    layout = LAYOUTS["plain"]
    blocks = [HitBlock(finish_runs([make_run(layout, 4, 1, "raw")])[0], 4)] * 2
    with pytest.raises(OSError, match="disk"):
        assemble_layer(layout, 0, blocks, Failing(OSError("disk")))
    with pytest.raises(ZeroDivisionError, match="defect"):
        assemble_layer(layout, 0, blocks, Failing(ZeroDivisionError("defect")))


@pytest.mark.parametrize("error", [OSError("disk"), ZeroDivisionError("defect")])
def test_what_fails_for_one_tensor_is_heard_after_the_others(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a failing disk nor a defect may leave a buffer unfilled unnoticed, or a thread that writes to one."""
    monkeypatch.setattr(virtual, "SMALL_BYTES", 0)
    failed, reading = threading.Event(), []

    class FailingOnce:
        """The first read fails; one of another tensor ends later."""

        def readinto(self, source: int, offset: int, views: Sequence[memoryview]) -> None:
            reading.append(offset)
            if len(reading) == 1:
                failed.set()
                raise error
            assert failed.wait(60)
            time.sleep(0.05)
            reading.remove(offset)

    layout = LAYOUTS["plain"]
    runs, _ = finish_runs([make_run(layout, 4, 1, "raw")])
    with pytest.raises(type(error), match=str(error)):
        assemble_layer(layout, 0, [HitBlock(runs, 4)] * 3, FailingOnce(), verify=False)
    assert len(reading) == 1, "nothing is read any more"


@pytest.mark.parametrize("mapped_bytes", [1, 1 << 20])
def test_pages_are_mapped_before_rows_are_read_and_once(mapped_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """All rows of every head, the head-room too, in order, some of them ahead of the rows that are read next."""
    calls: list[tuple[int, list[int], int]] = []
    read: list[int] = []

    class Reader:
        def readinto(self, source: int, offset: int, views: Sequence[memoryview]) -> None:
            mapped = {at for _, starts, nbytes in calls for start in starts for at in (start, start + nbytes - 1)}
            assert mapped, "nothing is read into pages that were not asked for"
            read.append(source)

    monkeypatch.setattr(gather, "MAPPED_BYTES", mapped_bytes)
    monkeypatch.setattr(gather, "populate", lambda *call: calls.append(call))
    layout = LAYOUTS["plain"]
    runs, _ = finish_runs([make_run(layout, 4, 1, "raw")])
    assemble_layer(layout, 0, [HitBlock(runs, 4)] * 3, Reader(), verify=False)
    assert sorted(read) == [0, 0, 1, 1, 2, 2]
    row = PLAIN.width * 2
    for address in {address for address, _, _ in calls}:
        ranges = [(starts, nbytes) for at, starts, nbytes in calls if at == address]
        assert sum(nbytes for _, nbytes in ranges) == 512 * row
        assert [starts[0] for starts, _ in ranges] == sorted(starts[0] for starts, _ in ranges)
        assert all(starts[1] - starts[0] == 512 * row for starts, _ in ranges)
        assert len(ranges) == (4 if mapped_bytes == 1 else 1)


def test_a_tensor_that_mlx_did_not_read_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """What an MLX that swallows errors would hand out: arrays of whatever was in memory."""
    case = Case(LAYOUTS["plain"])
    case.add([make_run(case.layout, 4, 1, "raw")], 4)
    monkeypatch.setattr(mx, "load", lambda file, **_: {"keys.0.0": mx.zeros(1), "values.0.0": mx.zeros(1)})
    with pytest.raises(RuntimeError, match="every tensor"):
        assemble_layer(case.layout, 0, case.blocks, streamed(case.blocks, case.payloads, 0))


def test_the_position_in_a_virtual_file_belongs_to_a_thread() -> None:
    """Between the seek and the read of one of MLX's threads another one may come."""
    file = VirtualFile[object]()
    file._head = bytes(range(100))
    buffer = bytearray(2)
    file.seek(10)
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(file.tell).result() == 0
        pool.submit(file.seek, 50).result()
        assert file.readinto(buffer) == 2
        assert bytes(buffer) == b"\x0a\x0b"
        pool.submit(file.readinto, buffer).result()
    assert bytes(buffer) == b"\x32\x33"
    assert file.tell() == 12


@pytest.mark.parametrize("name", sorted(LAYOUTS))
def test_a_dense_answer_assembles_to_the_same_layer(name: str) -> None:
    """The daemon's decoded bytes, described by one raw run, are read like stored ones."""
    layout = LAYOUTS[name]
    case = Case(layout)
    for number, profile in enumerate(["raw", "affine8-g32"]):
        case.add([make_run(layout, 33, number, profile)], 33 - number)
    dense = [HitBlock(dense_runs(layout, [case.n_tokens]), case.n_tokens)]
    for layer in range(len(layout.layers)):
        decoded = assemble_layer(layout, layer, case.blocks, streamed(case.blocks, case.payloads, layer), 0)
        data = b"".join(dense_bytes(decoded))
        ranges = layer_ranges(dense, layer)
        assert len(data) == sum(r.nbytes for r in ranges) == case.n_tokens * layout.layer_token_bytes(layer)
        case.check(layer, assemble_layer(layout, layer, dense, BufferReader([data], ranges)), 256)


def test_ranges_of_a_dense_answer_cover_it_once() -> None:
    """Offsets are those of a raw payload of all tokens."""
    layout = LAYOUTS["engine-quantized"]
    dense = [HitBlock(dense_runs(layout, [77]), 77)]
    spans = sorted((r.offset, r.nbytes) for layer in range(2) for r in layer_ranges(dense, layer))
    assert [offset for offset, _ in spans] == [sum(n for _, n in spans[:i]) for i in range(len(spans))]
    assert sum(n for _, n in spans) == 77 * layout.token_bytes


@pytest.mark.usefixtures("by_size")
def test_layers_are_assembled_on_many_threads_at_once() -> None:
    """MLX reads a file object from its own threads; their seeks must not meet."""
    case = Case(LAYOUTS["plain"])
    for number, profile in enumerate(["raw", "affine8", "raw"]):
        case.add([make_run(case.layout, 200, number, profile)], 200)

    def assemble_one(turn: int) -> tuple[int, KVLayer]:
        layer = turn % 3
        got = assemble_layer(case.layout, layer, case.blocks, streamed(case.blocks, case.payloads, layer))
        mx.eval(*got.keys, *got.values)
        return layer, got

    with ThreadPoolExecutor(4) as pool:
        for layer, got in pool.map(assemble_one, range(24)):
            case.check(layer, got, 256)


def test_more_heads_than_one_read_may_have_views(tmp_path: Path) -> None:
    """A read scatters over the heads; more of them than IOV_MAX is two reads."""
    part = PartSpec(1500, 1, "F32")
    layout = Layout((LayerSpec(part, part),))
    case = Case(layout)
    case.add([make_run(layout, 3, 1, "raw")], 2)
    with contextlib.closing(FileReader([write_source(tmp_path / "blob", case.payloads[0])])) as reader:
        case.check(0, assemble_layer(layout, 0, case.blocks, reader, 0), 0)


@settings(max_examples=20, deadline=None)
@given(take=st.integers(1, 40))
def test_each_cut_of_a_block_is_a_hit(take: int) -> None:
    """Token-exact: every prefix length of a quantized block."""
    case = Case(LAYOUTS["plain"])
    case.add([make_run(case.layout, 40, 11, "affine4")], take)
    case.check(1, assemble_layer(case.layout, 1, case.blocks, streamed(case.blocks, case.payloads, 1), 0), 0)


def test_a_virtual_file_is_what_a_file_on_disk_would_be(tmp_path: Path) -> None:
    """mx.load of the same bytes as a real safetensors file gives the same arrays."""
    case = Case(LAYOUTS["plain"])
    case.add([make_run(case.layout, 256, 5, "raw")], 256)
    got = assemble_layer(case.layout, 0, case.blocks, streamed(case.blocks, case.payloads, 0), 0)
    path = tmp_path / "one.safetensors"
    mx.save_safetensors(str(path), {"keys": got.keys[0], "values": got.values[0]})
    from_disk = mx.load(io.BytesIO(path.read_bytes()), format="safetensors")
    assert isinstance(from_disk, dict)
    assert mx.array_equal(from_disk["keys"], got.keys[0]).item()
    assert mx.array_equal(from_disk["values"], got.values[0]).item()
