"""Runs with their bytes: encoding, narrowing, joining, reading back."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.blobs.ranges import FileReader
from kvstore.codecs import device, encode
from kvstore.codecs.affine import affine_recipe
from kvstore.codecs.codec import BlockCorruptError
from kvstore.codecs.encode import encode_run
from kvstore.codecs.profiles import parse_profile
from kvstore.codecs.runs import EncodedRun, join_runs, load_run, narrow_run, payload_run
from kvstore.core.blocks import FIDELITY_EXACT, ITEM_BYTES, RAW
from kvstore.core.layers import LayerSpec, Layout, PartSpec, raw_ranges
from kvstore.errors import InvalidRequestError
from tests.support.stored import finish_runs, random_payload, write_source

DTYPES = ("BF16", "F16", "F32")
NAN = {"BF16": 0x7FC1, "F16": 0x7E01, "F32": 0x7FC00001}
INF = {"BF16": 0xFF80, "F16": 0xFC00, "F32": 0xFF800000}
CARRIER = {"BF16": "<u2", "F16": "<u2", "F32": "<u4"}


def plain(dtype: str = "BF16", heads: int = 2, width: int = 64, layers: int = 3) -> Layout:
    """Equal layers."""
    part = PartSpec(heads, width, dtype)
    return Layout((LayerSpec(part, part),) * layers)


def random_run(layout: Layout, n_tokens: int, seed: int = 0, fidelity: int = FIDELITY_EXACT) -> EncodedRun:
    """A raw run of finite values; for layouts of one float dtype."""
    dtype = layout.layers[0].keys.dtype
    n_values = n_tokens * layout.token_bytes // ITEM_BYTES[dtype]
    payload = random_payload(np.random.default_rng(seed), dtype, n_values)
    return payload_run(layout, payload, n_tokens, fidelity)


def same(a: EncodedRun, b: EncodedRun) -> bool:
    """Equal run and equal bytes."""
    return a.run == b.run and all(np.array_equal(x, y) for x, y in zip(a.buffers, b.buffers, strict=True))


def cut_payload(layout: Layout, run: EncodedRun, first: int, last: int) -> EncodedRun:
    """A raw run of some tokens of a raw run."""
    parts = [np.ascontiguousarray(buffer[:, :, first:last]) for buffer in run.buffers]
    return payload_run(layout, b"".join(parts), last - first, run.run.fidelity)


@pytest.mark.parametrize(
    "name", ["raw", "affine8", "affine6", "affine5", "affine4", "affine3", "affine2", "affine4-g32"]
)
def test_profiles_have_names(name: str) -> None:
    """A name is all that configuration says."""
    profile = parse_profile(name)
    assert profile.name == name
    assert profile.fidelity == (FIDELITY_EXACT if name == "raw" else 100 * int(name[6]))


def test_a_profile_leaves_what_the_engine_quantized_alone() -> None:
    """Quantizing twice drifts; width 0 has nothing to quantize."""
    profile = parse_profile("affine4")
    assert profile.recipe("keys", PartSpec(8, 128, "BF16", 8, 64), 0, 1) == RAW
    assert profile.recipe("values", PartSpec(8, 0, "BF16"), 0, 1) == RAW
    assert profile.recipe("values", PartSpec(8, 128, "BF16"), 0, 1) == affine_recipe(4, 64)


def test_a_raw_run_has_one_buffer_a_tensor() -> None:
    """It describes them as the layout does."""
    layout = plain()
    run = random_run(layout, 5)
    assert [buffer.shape for buffer in run.buffers] == [(3, 2, 5, 128)] * 2
    again = payload_run(layout, b"".join(buffer.tobytes() for buffer in run.buffers), 5)
    assert same(run, again)
    assert run.nbytes == 5 * layout.token_bytes


def test_the_bytes_of_a_piece_are_a_raw_run() -> None:
    """In the documented order of raw KV, for layers of several geometries."""
    layout = Layout((LayerSpec(PartSpec(2, 64, "BF16"), PartSpec(1, 32, "BF16")), plain().layers[0]) * 2)
    payload = np.random.default_rng(0).integers(0, 255, 6 * layout.token_bytes, np.uint8)
    run = payload_run(layout, payload, 6)
    tensors = [
        (s, t, buffer)
        for (s, t), buffer in zip([(s, t) for s in layout.raw_stacks for t in s.tensors], run.buffers, strict=True)
    ]
    for stack, tensor, layer, offset, length in raw_ranges(layout, 6):
        (buffer,) = [b for s, t, b in tensors if s == stack and t == tensor]
        assert np.array_equal(buffer[stack.layers.index(layer)].reshape(-1), payload[offset : offset + length])


@pytest.mark.parametrize("change", [1, -1, 64])
def test_bytes_of_the_wrong_length_are_refused(change: int) -> None:
    """Client input ends here when it lies about its length."""
    layout = plain()
    with pytest.raises(InvalidRequestError):
        payload_run(layout, bytes(5 * layout.token_bytes + change), 5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["affine8", "affine3-g32"])
@pytest.mark.parametrize("piece_bytes", [1, 40_000, 32 << 20])
def test_an_encoded_run_holds_what_mlx_makes_of_its_rows(
    dtype: str, name: str, piece_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit, in one piece or layer by layer."""
    monkeypatch.setattr(encode, "PIECE_BYTES", piece_bytes)
    layout, profile = plain(dtype, heads=2, width=128, layers=5), parse_profile(name)
    raw = random_run(layout, 17)
    encoded = encode_run(layout, raw, profile)
    bits, group = profile.keys.param("bits"), profile.keys.param("group")
    assert encoded.run.fidelity == 100 * bits
    assert [stack.recipe for stack in encoded.run.stacks] == [affine_recipe(bits, group)] * 2
    for number, buffer in enumerate(raw.buffers):
        wanted = mx.quantize(device.to_array(buffer, dtype), group_size=group, bits=bits)
        mx.eval(*wanted)
        for ours, theirs in zip(encoded.buffers[3 * number : 3 * number + 3], wanted, strict=True):
            assert ours.tobytes() == device.to_bytes(theirs).tobytes()
    assert encoded.nbytes == encoded.run.nbytes()


def test_the_raw_profile_changes_nothing() -> None:
    """Not even a copy."""
    layout = plain()
    raw = random_run(layout, 4)
    encoded = encode_run(layout, raw, parse_profile("raw"))
    assert same(raw, encoded)
    assert all(a is b for a, b in zip(raw.buffers, encoded.buffers, strict=True))


def test_what_is_encoded_is_not_encoded_again() -> None:
    """Under any profile: its values are not first-hand."""
    layout = plain()
    once = encode_run(layout, random_run(layout, 4), parse_profile("affine8"))
    assert same(encode_run(layout, once, parse_profile("affine4")), once)


def test_fidelity_is_the_least_of_source_and_recipes() -> None:
    """A raw run that came from 4 bits stays a run of 4 bits."""
    layout = plain()
    low = random_run(layout, 4, fidelity=400)
    assert encode_run(layout, low, parse_profile("affine8")).run.fidelity == 400
    assert encode_run(layout, low, parse_profile("affine3")).run.fidelity == 300
    assert encode_run(layout, low, parse_profile("raw")).run.fidelity == 400


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("poison", ["nan", "inf", "overflow"])
def test_a_stack_with_values_that_cannot_be_quantized_stays_raw(
    dtype: str, poison: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit, NaN payloads included, also when only the last layer of the last piece is bad."""
    monkeypatch.setattr(encode, "PIECE_BYTES", 1)
    layout = plain(dtype)
    raw = random_run(layout, 6)
    keys = raw.buffers[0].copy()
    values = keys.view(CARRIER[dtype])
    if poison == "overflow":
        top = {"BF16": 0x7F7F, "F16": 0x7BFF, "F32": 0x7F7FFFFF}[dtype]
        sign = 1 << (8 * ITEM_BYTES[dtype] - 1)
        values[2, 1, 5, 62:64] = top, top | sign
    else:
        values[2, 1, 5, 63] = (NAN if poison == "nan" else INF)[dtype]
    poisoned = EncodedRun(raw.run, (keys, raw.buffers[1]))
    encoded = encode_run(layout, poisoned, parse_profile("affine8"))
    keys_stack, values_stack = encoded.run.stacks
    assert keys_stack == raw.run.stacks[0]
    assert encoded.buffers[0].tobytes() == keys.tobytes()
    assert values_stack.recipe == affine_recipe(8, 64)
    assert encoded.run.fidelity == 800


def test_a_run_that_stays_raw_altogether_stays_exact() -> None:
    """Nothing was lost, so nothing is ranked lower."""
    layout = plain()
    raw = random_run(layout, 2)
    poisoned = EncodedRun(raw.run, tuple(buffer.copy() for buffer in raw.buffers))
    for buffer in poisoned.buffers:
        buffer.view("<u2")[0, 0, 0, 0] = NAN["BF16"]
    assert same(encode_run(layout, poisoned, parse_profile("affine8")), poisoned)


def test_mixed_layers_are_encoded_stack_by_stack() -> None:
    """Plain, folded, engine-quantized, and values of width 0 in one layout."""
    layout = Layout(
        (
            LayerSpec(PartSpec(2, 64, "BF16"), PartSpec(2, 0, "BF16")),
            LayerSpec(PartSpec(8, 80, "BF16"), PartSpec(8, 80, "BF16")),
            LayerSpec(PartSpec(2, 64, "BF16", 8, 64), PartSpec(1, 7, "BF16")),
        )
    )
    raw = random_run(layout, 3)
    encoded = encode_run(layout, raw, parse_profile("affine8"))
    recipes = {(stack.part, stack.layers): stack.recipe for stack in encoded.run.stacks}
    assert recipes == {
        ("keys", (0,)): affine_recipe(8, 64),
        ("keys", (1,)): affine_recipe(8, 64, fold=True),
        ("keys", (2,)): RAW,
        ("values", (1,)): affine_recipe(8, 64, fold=True),
        ("values", (2,)): RAW,
    }
    assert encoded.nbytes == encoded.run.nbytes()


def test_encoding_needs_little_memory_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is there at once is bounded by the piece, not by the run."""
    monkeypatch.setattr(encode, "PIECE_BYTES", 1 << 20)
    layout = plain(heads=8, width=128, layers=16)
    raw = random_run(layout, 256)
    assert raw.nbytes == 16 << 20
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    encode_run(layout, raw, parse_profile("affine8"))
    assert mx.get_peak_memory() - before < 6 << 20


@settings(max_examples=30, deadline=None)
@given(
    n_tokens=st.integers(1, 12),
    cut=st.integers(1, 12),
    name=st.sampled_from(["raw", "affine8", "affine3-g32"]),
    width=st.sampled_from([64, 80, 96]),
    seed=st.integers(0, 999),
)
def test_encoding_then_narrowing_is_narrowing_then_encoding(
    n_tokens: int, cut: int, name: str, width: int, seed: int
) -> None:
    """So what a longer block cuts from a shorter one is what it would have encoded itself."""
    layout, profile = plain(width=width, heads=4), parse_profile(name)
    shown = min(cut, n_tokens)
    raw = random_run(layout, n_tokens, seed)
    narrowed = narrow_run(encode_run(layout, raw, profile), shown)
    assert same(narrowed, encode_run(layout, cut_payload(layout, raw, 0, shown), profile))
    assert all(buffer.flags.c_contiguous for buffer in narrowed.buffers)
    assert narrowed.nbytes == narrowed.run.nbytes()


def test_narrowing_drops_what_was_hidden_behind() -> None:
    """Rows before what is shown stay: groups begin with them."""
    layout = plain()
    raw = random_run(layout, 10)
    hidden = replace(raw, run=replace(raw.run, skip=3, shown=5))
    cut = cut_payload(layout, raw, 0, 7)
    assert same(narrow_run(hidden, 4), replace(cut, run=replace(cut.run, skip=3, shown=4)))


@pytest.mark.parametrize("shown", [0, -1, 6])
def test_narrowing_to_what_is_not_shown_is_refused(shown: int) -> None:
    """A planner's mistake must not become rows of other tokens."""
    with pytest.raises(InvalidRequestError):
        narrow_run(random_run(plain(), 5), shown)


@settings(max_examples=30, deadline=None)
@given(cuts=st.sets(st.integers(1, 11)), name=st.sampled_from(["raw", "affine4"]), seed=st.integers(0, 999))
def test_joining_neighbours_is_as_if_they_had_never_been_cut(cuts: set[int], name: str, seed: int) -> None:
    """However many pieces the tokens came in."""
    layout, profile = plain(), parse_profile(name)
    raw = random_run(layout, 12, seed)
    edges = [0, *sorted(cuts), 12]
    pieces = [
        encode_run(layout, cut_payload(layout, raw, a, b), profile) for a, b in zip(edges, edges[1:], strict=False)
    ]
    (joined,) = join_runs(pieces)
    assert same(joined, encode_run(layout, raw, profile))


def test_runs_that_differ_are_not_joined() -> None:
    """Recipe, fidelity, or hidden rows."""
    layout = plain()
    raw, low = random_run(layout, 3), random_run(layout, 3, fidelity=800)
    encoded = encode_run(layout, random_run(layout, 3), parse_profile("affine8"))
    behind, before = replace(raw, run=replace(raw.run, shown=2)), replace(raw, run=replace(raw.run, skip=1, shown=2))
    cases: Sequence[list[EncodedRun]] = ([raw, low], [raw, encoded], [low, encoded], [raw, before], [behind, raw])
    for case in cases:
        assert join_runs(case) == case
    assert len(join_runs([raw, raw, encoded, encoded, raw])) == 3
    (joined,) = join_runs([before, raw, behind])
    assert (joined.run.n_tokens, joined.run.skip, joined.run.shown) == (9, 1, 7)
    assert join_runs([]) == []


def test_a_stored_run_is_read_back_as_it_was(tmp_path: Path) -> None:
    """To be spliced into another block."""
    layout = plain()
    encoded = [encode_run(layout, random_run(layout, n, n), parse_profile(p)) for n, p in ((5, "affine8"), (3, "raw"))]
    sealed, payload = finish_runs(encoded)
    with closing(
        FileReader([write_source(tmp_path / "other", b""), write_source(tmp_path / "blob", payload)])
    ) as reader:
        for stored, original in zip(sealed, encoded, strict=True):
            assert same(load_run(stored, 1, reader), original)


def test_a_damaged_run_is_not_read_back(tmp_path: Path) -> None:
    """Any flipped bit of any tensor; a file that is gone or short."""
    layout = plain()
    (run,), payload = finish_runs([encode_run(layout, random_run(layout, 4), parse_profile("affine8"))])
    rng = np.random.default_rng(0)
    path = tmp_path / "blob"
    for at in [0, len(payload) - 1, *rng.integers(0, len(payload), 20)]:
        flipped = bytearray(payload)
        flipped[at] ^= 1 << int(rng.integers(8))
        with (
            closing(FileReader([write_source(path, bytes(flipped))])) as reader,
            pytest.raises(BlockCorruptError) as caught,
        ):
            load_run(run, 0, reader)
        assert caught.value.source == 0
    source = write_source(path, payload)
    path.write_bytes(b"")
    with closing(FileReader([source])) as reader, pytest.raises(BlockCorruptError):
        load_run(run, 0, reader)
    path.unlink()
    with closing(FileReader([source])) as reader, pytest.raises(BlockCorruptError):
        load_run(run, 0, reader)
