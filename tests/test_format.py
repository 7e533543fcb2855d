"""The bytes of a blob: held still by a golden file, canonical, and nothing else is accepted."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import msgpack
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file

from kvstore.blobs.format import (
    FORMAT_VERSION,
    HEADER_BYTES_MAX,
    ReadyBlob,
    aux_block,
    build_header,
    checked_ranges,
    make_ready,
    parse_header,
)
from kvstore.blobs.memory import MemoryBlobs
from kvstore.blobs.protocol import BlobId
from kvstore.codecs.assemble import assemble_layer
from kvstore.codecs.byte_plan import HitBlock
from kvstore.core.blocks import (
    FIDELITY_EXACT,
    Block,
    LayerState,
    Origin,
    Recipe,
    Run,
    Stack,
    StateArray,
    Tensor,
    pack_tokens,
)
from kvstore.core.keys import block_key, checkpoint_key
from kvstore.core.layers import LayerSpec, Layout, PartSpec
from kvstore.core.records import block_from_record, block_to_record
from kvstore.engine.adopt import read_block
from kvstore.errors import CorruptDataError, InvalidRequestError, UnknownFormatError
from tests.support.engine import RECURRENT, namespace, new_block
from tests.support.stored import streamed

GOLDEN = Path(__file__).parent / "golden" / "block-v3.safetensors"
GOLDEN_PACKED = GOLDEN.with_name("packed-v3.safetensors")
GOLDEN_CHECKPOINT = GOLDEN.with_name("checkpoint-v3.safetensors")
GOLDEN_AUX = GOLDEN.with_name("aux-v3.safetensors")
GOLDEN_REFERRING = GOLDEN.with_name("referring-v3.safetensors")


def ready_golden() -> ReadyBlob:
    """Two runs, one of them quantized and cut; every field of the format is used."""
    ns = namespace("golden")
    tokens = pack_tokens([1, -2, (1 << 63) - 1, 0, 5])
    affine = Recipe("affine", 1, (("bits", 8), ("group", 64)))
    codes = (Tensor("codes", "U32", 1, 1), Tensor("scales", "BF16", 1, 1), Tensor("biases", "BF16", 1, 1))
    runs = (
        Run(3, 0, 3, FIDELITY_EXACT, (Stack("keys", (0, 1), Recipe("raw"), (Tensor("data", "F32", 1, 2),)),)),
        Run(4, 1, 2, 850, (Stack("keys", (0, 1), affine, codes),)),
    )
    block = Block(ns.root, ns.root, block_key(ns.root, tokens), 0, tokens, 850, runs, 1_700_000_000, ns.to_record())
    sizes = [stack.nbytes(run.n_tokens) if len(stack.tensors) == 1 else 0 for run in runs for stack in run.stacks]
    assert sizes == [48, 0]
    buffers = [np.arange(n, dtype=np.uint8).reshape(2, -1) for n in (48, 32, 16, 16)]
    return make_ready(block, buffers)


def ready_checkpoint() -> ReadyBlob:
    """Window and recurrent layers: an empty array, one without dimensions, negative numbers, a layer with nothing."""
    ns = namespace("golden", RECURRENT)
    parent, tokens = bytes(range(32)), pack_tokens([7, -(1 << 59)])
    states = (
        LayerState(
            0,
            (("offset", 258), ("left", -1)),
            (StateArray("keys", "BF16", (1, 2, 3, 4)), StateArray("values", "BF16", (1, 2, 3, 0))),
        ),
        LayerState(2, (), ()),
        LayerState(5, (), (StateArray("s0", "BOOL", ()), StateArray("s2", "I64", (1, 2)))),
    )
    key = checkpoint_key(parent, tokens)
    block = Block(ns.root, parent, key, 256, tokens, 850, (), 1_700_000_000, ns.to_record(), states)
    return make_ready(block, [bytes(range(48)), b"", np.array(True), np.array([[1, -1]], np.int64)])


def ready_aux() -> ReadyBlob:
    """What recipes refer to."""
    ns, data = namespace("golden"), bytes(range(100))
    block = replace(aux_block(ns.root, data), namespace=ns.to_record(), created_s=1_700_000_000)
    return make_ready(block, [data])


def ready_referring() -> ReadyBlob:
    """A block whose recipe refers to it."""
    ns, tokens = namespace("golden"), pack_tokens([1, 2, 3])
    aux = ready_aux().block.aux
    assert aux is not None
    recipe = Recipe("pca", 1, (("point", 2),), (aux.digest,))
    stacks = (Stack("keys", (0, 1), recipe, (Tensor("codes", "I16", 1, 4),)),)
    runs = (Run(3, 0, 3, 190, stacks),)
    block = Block(ns.root, ns.root, block_key(ns.root, tokens), 0, tokens, 190, runs, 1_700_000_000, ns.to_record())
    return make_ready(block, [bytes(range(48))])


def file_of(ready: ReadyBlob) -> bytes:
    """What is written."""
    return ready.header + b"".join(ready.payload)


def read_file(path: Path, verify: bool = True) -> tuple[Block, int, int]:
    """(block, where its payload starts, its size) of a file, read as a blob that has just these bytes."""
    blobs, blob = MemoryBlobs(), BlobId(bytes(32), bytes(32), 1)
    pending = blobs.put(blob, [memoryview(path.read_bytes())])
    pending.sync()
    pending.rename()
    block, source = read_block(blobs, blob, path.stat().st_size, verify=verify)
    assert source.blob == blob
    return block, source.payload_offset, source.nbytes


def test_the_bytes_of_a_blob_do_not_change() -> None:
    """A difference here is a new format version, not a new golden file."""
    assert file_of(ready_golden()) == GOLDEN.read_bytes()
    assert file_of(ready_checkpoint()) == GOLDEN_CHECKPOINT.read_bytes()
    assert file_of(ready_aux()) == GOLDEN_AUX.read_bytes()
    assert file_of(ready_referring()) == GOLDEN_REFERRING.read_bytes()


def test_the_golden_blob_reads_back(tmp_path: Path) -> None:
    """From the committed bytes to the block, checksums included."""
    block, payload_offset, nbytes = read_file(GOLDEN)
    assert block == ready_golden().block
    assert payload_offset % 64 == 0 and nbytes == GOLDEN.stat().st_size
    assert [length for _, length, _ in checked_ranges(block)] == [24, 24, 16, 16, 8, 8, 8, 8]


def test_the_golden_checkpoint_reads_back() -> None:
    """States in order, exact bytes without gaps; an empty array has its checksum and no bytes."""
    block, payload_offset, nbytes = read_file(GOLDEN_CHECKPOINT)
    assert block == ready_checkpoint().block
    assert nbytes - payload_offset == 48 + 1 + 16
    assert [(at, length) for at, length, _ in checked_ranges(block)] == [(0, 48), (48, 0), (48, 1), (49, 16)]
    assert block.is_checkpoint and block.end == 258


def test_the_golden_aux_block_and_the_block_that_refers_to_it_read_back() -> None:
    """The key follows from the digest, and the references come back with the recipe."""
    aux, payload_offset, nbytes = read_file(GOLDEN_AUX)
    assert aux == ready_aux().block and aux.aux is not None and nbytes - payload_offset == 100
    assert (aux.parent, aux.n_tokens, aux.runs) == (aux.root, 0, ())
    block, _, _ = read_file(GOLDEN_REFERRING)
    assert block == ready_referring().block and block.references == {aux.aux.digest}


def test_the_packed_golden_blob_reads_back(tmp_path: Path) -> None:
    """Packed tensors and groups of tokens; made once, so that nothing depends on the zstd that made its frames."""
    block, payload_offset, nbytes = read_file(GOLDEN_PACKED)
    payload = GOLDEN_PACKED.read_bytes()[payload_offset:]
    ranges = [(at, length) for at, length, _ in checked_ranges(block)]
    assert [at for at, _ in ranges] == [sum(n for _, n in ranges[:i]) for i in range(len(ranges))]
    assert sum(length for _, length in ranges) == nbytes - payload_offset
    tensors = [(run, stack, tensor) for run in block.runs for stack in run.stacks for tensor in stack.tensors]
    buffers = [payload[t.offset : t.offset + t.stored_bytes(len(s.layers), r.n_tokens)] for r, s, t in tensors]
    assert file_of(make_ready(block, buffers)) == GOLDEN_PACKED.read_bytes()
    (tmp_path / "a").write_bytes(GOLDEN_PACKED.read_bytes().replace(b'"BF16"', b'"F16" '))
    shapes = {name: (str(array.dtype), array.shape) for name, array in load_file(tmp_path / "a").items()}
    assert shapes["r1.s0.keys.codes"] == ("uint32", (2, 1, 2, 48))
    assert shapes["r1.s0.keys.scales"] == ("float16", (2, 1, 2, 6))
    assert shapes["r0.s1.values.data"][0] == "uint8"
    assert len(shapes["r0.s1.values.data"][1]) == 1


@pytest.mark.parametrize("layer", [0, 1])
def test_the_packed_golden_blob_decodes_to_what_it_was(layer: int) -> None:
    """Lossless: the very bits. Channel: by the formula of the format, without MLX, and near to what was encoded."""
    block, payload_offset, _ = read_file(GOLDEN_PACKED)
    part = PartSpec(1, 6, "BF16")
    layout = Layout((LayerSpec(part, part),) * 2)
    payload = GOLDEN_PACKED.read_bytes()[payload_offset:]
    hit = [HitBlock(block.runs, block.n_tokens)]
    got = assemble_layer(layout, layer, hit, streamed(hit, [payload], layer), 0)
    keys, values = (np.array(a[0, 0, :133].astype(mx.float32)) for a in (*got.keys, *got.values))
    token, channel = np.mgrid[0:133, 0:6]
    exact = (((token * 7 + channel * 3 + layer) % 128 - 64) / 4 * 4.0**channel).astype(np.float32)
    assert np.array_equal(values, exact)
    assert np.array_equal(keys[:2], exact[:2]) and np.array_equal(keys[128:], exact[128:])
    run = block.runs[1]
    codes, scales, biases = (
        payload[slice(at, at + n)] for at, n in (t.layer_range(layer, run.n_tokens) for t in run.stacks[0].tensors)
    )
    nibbles = np.frombuffer(codes, np.uint8).reshape(2, 6, 32)
    steps = np.stack([nibbles & 15, nibbles >> 4], axis=-1).reshape(2, 6, 64)
    scale, bias = (
        (np.frombuffer(raw, "<u2").astype(np.uint32) << 16).view(np.float32).reshape(2, 6, 1)
        for raw in (scales, biases)
    )
    formula = (steps * scale + bias).transpose(0, 2, 1).reshape(128, 6)
    rounding = 2**-7 * 32 * 4.0 ** channel[2:128]  # in bfloat16, of a channel's range
    assert (np.abs(keys[2:128] - formula[2:]) <= rounding).all()
    assert (np.abs(formula - exact[:128])[2:] <= np.abs(np.repeat(scale[..., 0], 64, 0))[2:] + 0.01).all()


def test_any_safetensors_reader_can_look_inside_a_checkpoint(tmp_path: Path) -> None:
    """Each array under its layer and name, of its own shape."""
    (tmp_path / "a").write_bytes(GOLDEN_CHECKPOINT.read_bytes().replace(b'"BF16"', b'"F16" '))
    tensors = load_file(tmp_path / "a")
    shapes = {name: array.shape for name, array in tensors.items()}
    assert shapes == {"l0.keys": (1, 2, 3, 4), "l0.values": (1, 2, 3, 0), "l5.s0": (), "l5.s2": (1, 2)}
    assert tensors["l5.s2"].tolist() == [[1, -1]] and tensors["l0.keys"].tobytes() == bytes(range(48))


def test_a_block_without_kv_layers_is_a_header_alone(tmp_path: Path) -> None:
    """Its tokens say that they were seen; any reader opens it."""
    ns = namespace("golden", RECURRENT)
    new = new_block(ns.root, ns.root, 0, pack_tokens([1, 2]), layout=RECURRENT)
    ready = make_ready(replace(new.block, namespace=ns.to_record()), new.buffers)
    path = tmp_path / "a"
    path.write_bytes(file_of(ready))
    assert read_file(path) == (ready.block, len(ready.header), len(ready.header))
    assert load_file(path) == {}


def test_any_safetensors_reader_can_look_inside(tmp_path: Path) -> None:
    """Names, shapes and dtypes are those of the format; BF16 is renamed, since numpy has none."""
    (tmp_path / "a").write_bytes(GOLDEN.read_bytes().replace(b'"BF16"', b'"F16" '))
    tensors = load_file(tmp_path / "a")
    shapes = {name: (str(array.dtype), array.shape) for name, array in tensors.items()}
    assert shapes == {
        "r0.s0.keys.data": ("float32", (2, 1, 3, 2)),
        "r1.s0.keys.codes": ("uint32", (2, 1, 4, 1)),
        "r1.s0.keys.scales": ("float16", (2, 1, 4, 1)),
        "r1.s0.keys.biases": ("float16", (2, 1, 4, 1)),
    }
    assert tensors["r0.s0.keys.data"].tobytes() == bytes(range(48))


@given(st.booleans(), st.integers(0, 10_000), st.binary(min_size=1, max_size=4))
def test_a_changed_header_is_never_read(states: bool, at: int, patch: bytes) -> None:
    """Whatever byte of the header changes, padding included, the blob is corrupt or of an unknown format."""
    ready = ready_checkpoint() if states else ready_golden()
    header = bytearray(ready.header)
    at %= len(header)
    header[at : at + len(patch)] = patch
    changed = bytes(header)
    if changed == ready.header:
        assert parse_header(changed, ready.nbytes) == ready.block
        return
    with pytest.raises((CorruptDataError, UnknownFormatError)):
        parse_header(changed, ready.nbytes)


@pytest.mark.parametrize("golden", [GOLDEN, GOLDEN_PACKED, GOLDEN_CHECKPOINT])
def test_a_changed_payload_does_not_verify(tmp_path: Path, golden: Path) -> None:
    """One flipped bit anywhere in the payload is found."""
    data = bytearray(golden.read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    path = tmp_path / "a"
    for at in range(start, len(data), 1 if len(data) < 2000 else 7):
        data[at] ^= 0x10
        path.write_bytes(data)
        assert read_file(path, verify=False)[0]
        with pytest.raises(CorruptDataError, match="checksum"):
            read_file(path)
        data[at] ^= 0x10


@pytest.mark.parametrize("size", [0, 7, 8, 100, -1, 1])
def test_a_file_of_another_length_is_corrupt(tmp_path: Path, size: int) -> None:
    """Cut in the header, cut in the payload, or longer than it says."""
    data = GOLDEN.read_bytes()
    cut = data[:size] if size >= 0 and size != 1 else data[:-1] if size < 0 else data + b"x"
    (tmp_path / "a").write_bytes(cut)
    with pytest.raises(CorruptDataError):
        read_file(tmp_path / "a")


def with_metadata(**changes: str) -> tuple[bytes, int]:
    """The golden header with other metadata, and the file size to match."""
    ready = ready_golden()
    fields = json.loads(ready.header[8:])
    fields["__metadata__"].update(changes)
    text = json.dumps(fields, separators=(",", ":")).encode()
    total = -(-(8 + len(text)) // 64) * 64
    header = (total - 8).to_bytes(8, "little") + text.ljust(total - 8)
    return header, total + sum(map(len, ready.payload))


@pytest.mark.parametrize("version", [FORMAT_VERSION + 1, FORMAT_VERSION - 1, 0])
def test_another_format_version_is_refused_by_name(version: int) -> None:
    """It may be fine; it is not ours to judge."""
    with pytest.raises(UnknownFormatError, match=f"version {version}"):
        parse_header(*with_metadata(version=str(version)))


def test_foreign_metadata_is_corrupt() -> None:
    """Another format name, extra keys, a wrong checksum."""
    for changes in ({"format": "pt"}, {"extra": "x"}, {"check": "0" * 16}, {"record": "AAAA"}, {"version": "x"}):
        with pytest.raises(CorruptDataError):
            parse_header(*with_metadata(**changes))


def test_what_auto_stored_says_so_in_its_header_and_other_blocks_say_nothing() -> None:
    """After the place of an aux block, which has none; other blocks keep their bytes."""
    plain = ready_golden().block
    for origin in (Origin(auto=True), Origin(settled=True), Origin(auto=True, settled=True, error=0.25)):
        block = replace(plain, origin=origin)
        record = block_to_record(block)
        told = [None, [origin.auto, origin.settled, origin.error]]
        assert msgpack.unpackb(record) == [*msgpack.unpackb(block_to_record(plain)), *told]
        assert block_from_record(record) == block


@pytest.mark.parametrize(
    "told",
    [
        [None],
        [None, None],
        [None, [True, True]],
        [None, [1, False, 0.0]],
        [None, [False, False, 0.0]],
        [None, [True, True, -1.0]],
        [None, [True, True, float("nan")]],
        [None, [True, True, float("inf")]],
        [None, [True, True, 1]],
        [None, [True, False, 0.0], 1],
    ],
)
def test_a_header_that_says_something_impossible_of_auto_is_corrupt(told: list[object]) -> None:
    """Of another shape, a number that is no error, or a place that says nothing."""
    fields = msgpack.unpackb(block_to_record(ready_golden().block))
    with pytest.raises(CorruptDataError):
        block_from_record(msgpack.packb([*fields, *told]))


def test_an_oversized_or_hostile_header_is_corrupt() -> None:
    """Lengths over the limit, unaligned, or nested JSON: refused before anything is built from it."""
    for length in (HEADER_BYTES_MAX + 56, 1 << 62, 57, 0):
        with pytest.raises(CorruptDataError):
            parse_header(length.to_bytes(8, "little") + b" " * 56, 1 << 40)
    bomb = b"[" * (64 * 1000 - 8)
    with pytest.raises(CorruptDataError):
        parse_header(len(bomb).to_bytes(8, "little") + bomb, 64 * 1000)


def test_the_message_for_a_damaged_header_holds_nothing_of_the_header() -> None:
    """It is logged, and the header has the tokens of a prompt."""
    ready = ready_golden()
    for at in range(8, len(ready.header)):
        changed = bytearray(ready.header)
        changed[at] ^= 0x80
        with pytest.raises(CorruptDataError) as caught:
            parse_header(bytes(changed), ready.nbytes)
        assert len(str(caught.value)) < 200


def test_blocks_that_cannot_be_are_not_made_ready() -> None:
    """Wrong buffers, a key that does not follow, a fidelity that the runs do not have: refused before writing."""
    ready = ready_golden()
    good = [bytes(view) for view in ready.payload]
    bare = replace(ready.block)
    for block, buffers in (
        (bare, good[:-1]),
        (bare, [*good, b"x"]),
        (bare, [good[0] + b"x", *good[1:]]),
        (replace(bare, key=bytes(32)), good),
        (replace(bare, fidelity=FIDELITY_EXACT), good),
        (replace(bare, tokens=b""), good),
        (replace(bare, runs=bare.runs[:1]), good[:1]),
    ):
        with pytest.raises(InvalidRequestError):
            make_ready(block, buffers)
    with pytest.raises(InvalidRequestError, match="contiguous"):
        make_ready(bare, [np.zeros((4, 24), np.uint8)[:, ::2], *good[1:]])


def test_checkpoints_that_cannot_be_are_not_made_ready() -> None:
    """Wrong buffers, the key of a block, too many tokens, no position, one name twice, lossy beyond exact."""
    ready = ready_checkpoint()
    good, bare = [bytes(view) for view in ready.payload], ready.block
    full = pack_tokens(range(256))
    twice = replace(bare.states[2], arrays=(replace(bare.states[2].arrays[0], name="s2"), bare.states[2].arrays[1]))
    for block, buffers in (
        (bare, good[:-1]),
        (bare, [*good, b"x"]),
        (bare, [good[0], b"x", *good[2:]]),
        (replace(bare, key=block_key(bare.parent, bare.tokens)), good),
        (replace(bare, tokens=full, key=checkpoint_key(bare.parent, full)), good),
        (replace(bare, tokens=b"", start=0, key=checkpoint_key(bare.parent, b"")), good),
        (replace(bare, states=bare.states[::-1]), [*good[2:], *good[:2]]),
        (replace(bare, states=(*bare.states[:2], twice)), good),
        (replace(bare, fidelity=FIDELITY_EXACT + 1), good),
        (replace(bare, states=()), []),
        (replace(bare, runs=ready_golden().block.runs), good),
    ):
        with pytest.raises(InvalidRequestError):
            make_ready(block, buffers)


def test_a_header_over_the_limit_is_refused_when_built() -> None:
    """What a reader would refuse is not written."""
    block = replace(ready_golden().block, namespace=bytes(HEADER_BYTES_MAX))
    with pytest.raises(InvalidRequestError, match="header"):
        build_header(block, block_to_record(block))
