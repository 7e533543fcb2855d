"""The codec `pca`: exact, whoever multiplies and wherever it is cut; packed codes come back; damage is refused."""

from __future__ import annotations

import contextlib
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.blobs.ranges import BufferReader, Range
from kvstore.codecs import basis as basis_module
from kvstore.codecs.assemble import assemble_layer
from kvstore.codecs.basis import EXACT_BELOW, Basis, PartBasis, group_width
from kvstore.codecs.byte_plan import HitBlock
from kvstore.codecs.code_packing import pack, unpack
from kvstore.codecs.codec import NO_CONTEXT, Context, codec_of
from kvstore.codecs.encode import encode_run, encode_runs
from kvstore.codecs.pca import pca_recipe
from kvstore.codecs.profiles import parse_profile
from kvstore.codecs.rope import Rope, turns
from kvstore.codecs.runs import load_run, narrow_run, pack_run, payload_run
from kvstore.core.blocks import RAW, Recipe, packed_bytes_max
from kvstore.core.bounded import Bounded
from kvstore.core.layers import LayerSpec, Layout, PartSpec
from kvstore.errors import AuxMissingError, CorruptDataError
from tests.support.pca_bases import in_context, layout_basis, make_basis, make_part
from tests.support.stored import finish_runs, streamed

GOLDEN = Path(__file__).parent.parent / "golden" / "pca.json"
Array = np.ndarray[Any, Any]


def make_rows(seed: int, part: PartBasis, tokens: int) -> Array:
    """float32 `[tokens, heads, width]`."""
    return np.random.default_rng(seed).normal(size=(tokens, part.heads, part.width)).astype(np.float32)


def decoded(part: PartBasis, codes: Array, start: int, point: int = 0) -> Array:
    """float32 `[heads, tokens, width]`."""
    out = np.empty((part.heads, codes.shape[1], part.width), np.float32)
    part.decode(np.ascontiguousarray(codes), point, start, out)
    return out


def reference(part: PartBasis, codes: Array, start: int, point: int = 0) -> Array:
    """The format again: whole numbers in 64 bits, then each rounding by itself, token by token and pair by pair."""
    tokens = codes.shape[1]
    sums = np.concatenate(
        [one.astype(np.int64) @ m.astype(np.int64) for one, m in zip(codes, part.matrix, strict=True)], 1
    )
    flat = sums.astype(np.float32) * (part.scale * part.steps[point]) + part.mean
    rows = flat.reshape(tokens, part.heads, part.width).transpose(1, 0, 2).copy()
    if part.rope is not None:
        cos, sin = turns(start, tokens, part.rope.frequencies.tobytes())
        factor = np.float32(part.rope.factor)
        for i in range(part.rope.pairs):
            a, b = (i, i + part.rope.pairs) if part.rope.halves else (2 * i, 2 * i + 1)
            first, second, c, s = rows[..., a].copy(), rows[..., b].copy(), cos[:, i] * factor, sin[:, i] * factor
            rows[..., a], rows[..., b] = first * c - second * s, second * c + first * s
    return rows


parts = st.builds(
    make_part,
    st.integers(0, 9),
    st.sampled_from([1, 2, 4, 8]),
    st.sampled_from([16, 64, 320]),
    st.booleans(),
    st.booleans(),
)


@settings(max_examples=10, deadline=None)
@given(part=parts, tokens=st.integers(1, 300), start=st.integers(0, 1 << 19), data=st.data())
def test_values_are_those_of_the_reference_wherever_they_are_cut(
    part: PartBasis, tokens: int, start: int, data: st.DataObject
) -> None:
    """Bit for bit: float32 sums of these whole numbers are exact in any order. Codes of a cut are the cut codes."""
    codes = part.encode(make_rows(1, part, tokens), 0, start)
    assert codes is not None and part.is_exact(codes)
    whole = decoded(part, codes, start)
    assert np.array_equal(whole, reference(part, codes, start))
    first = data.draw(st.integers(0, tokens - 1))
    last = data.draw(st.integers(first + 1, tokens))
    assert np.array_equal(whole[:, first:last], decoded(part, codes[:, first:last], start + first))
    apart = part.encode(make_rows(1, part, tokens)[first:last], 0, start + first)
    assert apart is not None and np.array_equal(apart, codes[:, first:last])


@settings(max_examples=6, deadline=None)
@given(part=parts, tokens=st.integers(1, 40), start=st.integers(0, 1 << 19), point=st.integers(0, 1))
def test_what_comes_back_is_within_half_a_step_of_each_component(
    part: PartBasis, tokens: int, start: int, point: int
) -> None:
    """Plain rounding; the rest is that of float32."""
    rows = make_rows(3, part, tokens)
    codes = part.encode(rows.copy(), point, start)
    assert codes is not None
    size = part.matrix.shape[1]
    reach = np.abs(part.matrix * part.scale.reshape(-1, 1, size).astype(np.float64)).sum(1).max()
    bound = float(part.steps[point]) / 2 * reach * math.sqrt(2)
    assert np.abs(decoded(part, codes, start, point).transpose(1, 0, 2) - rows).max() <= bound + 1e-4


def test_what_would_not_be_exact_is_not_trusted_and_stays_raw() -> None:
    """A sum of products of 2^24 or more; a code over 15 bits; values that float16 does not hold."""
    part = make_part(0, 4, 64)
    aligned = np.full((1, 1, 256), 120, np.int16) * np.sign(part.matrix[0, :, 0])
    assert not part.is_exact(aligned.astype(np.int16))
    codes = part.encode(make_rows(0, part, 8), 0, 0)
    assert codes is not None and part.is_exact(codes)
    tiny = replace(part, steps=np.array([1e-7], np.float32))
    assert tiny.encode(make_rows(0, part, 8), 0, 0) is None

    spec = PartSpec(4, 64, "BF16")
    for steps, size in (((1e-7,), 1.0), ((1000.0,), 1e6)):
        basis = Basis({(0, "keys"): make_part(0, 4, 64, steps=steps)})
        recipe, context = in_context(basis, 1)
        array = mx.array(size * make_rows(0, part, 8).transpose(1, 0, 2)[None]).astype(mx.bfloat16)
        tensors = codec_of(recipe).encode(array, recipe, context)
        assert not codec_of(recipe).trusted(tensors, recipe, context).item()
    assert group_width(spec.heads, spec.width) == 256


def test_a_layer_without_a_basis_stays_raw_and_is_never_decoded_by_another() -> None:
    """A basis of another layout, a point that is not there, a file that is not at hand."""
    basis = make_basis(2, 16, 1)
    recipe, context = in_context(basis, 1)
    codec, part = codec_of(recipe), PartSpec(2, 16, "BF16")
    array = mx.zeros((1, 2, 3, 16), mx.bfloat16)
    codes = codec.encode(array, recipe, context)
    assert codec.trusted(codes, recipe, context).item()
    for wrong, where in (
        (recipe, replace(context, layers=(1,))),
        (pca_recipe(basis.digest, 2, 450), context),
    ):
        assert not codec.trusted(codec.encode(array, wrong, where), wrong, where).item()
        with pytest.raises(CorruptDataError):
            codec.decode(codes, wrong, part, where)
    with pytest.raises(CorruptDataError):
        codec.decode(codes, recipe, PartSpec(1, 32, "BF16"), context)
    for call in (codec.encode, lambda *a: codec.decode(codes, recipe, part, NO_CONTEXT)):
        with pytest.raises(AuxMissingError) as missing:
            call(array, recipe, NO_CONTEXT)
        assert missing.value.digest == basis.digest


@pytest.mark.parametrize(
    "recipe",
    [
        Recipe("pca"),
        Recipe("pca", 1, (("point", 0), ("fidelity", 450))),
        Recipe("pca", 1, (("point", 0),), (bytes(32),)),
        Recipe("pca", 1, (("point", 0), ("fidelity", 0)), (bytes(32),)),
        Recipe("pca", 1, (("point", 0), ("fidelity", 450)), (bytes(32),) * 2),
    ],
    ids=str,
)
def test_a_recipe_that_cannot_be_is_corrupt(recipe: Recipe) -> None:
    """Recipes come from files."""
    with pytest.raises(CorruptDataError):
        codec_of(recipe).tensors(PartSpec(2, 64, "BF16"), recipe)


@settings(max_examples=6, deadline=None)
@given(start=st.integers(0, 1 << 20), count=st.integers(1, 9), seed=st.integers(0, 99))
def test_turns_are_cos_and_sin(start: int, count: int, seed: int) -> None:
    """To the last bit of float32, up to a million tokens."""
    frequencies = np.random.default_rng(seed).uniform(0, 1, 5)
    cos, sin = turns(start, count, frequencies.tobytes())
    angles = np.arange(start, start + count)[:, None] * frequencies
    assert np.abs(cos - np.cos(angles)).max() < 2**-24 and np.abs(sin - np.sin(angles)).max() < 2**-24


def test_turning_back_undoes_turning_with_a_factor_and_channels_that_stay() -> None:
    """Of partial rotations, in both orders."""
    rows = np.random.default_rng(0).normal(size=(5, 2, 12)).astype(np.float32)
    for halves in (True, False):
        rope, turned = Rope(np.array([1.0, 0.1, 0.01]), halves, 1.25), rows.copy()
        rope.apply(turned, 777)
        assert np.array_equal(turned[..., 6:], rows[..., 6:]) and not np.allclose(turned, rows)
        rope.apply(turned, 777, back=True)
        assert np.allclose(turned, rows, atol=1e-5)


codes_like = st.tuples(
    st.integers(0, 99), st.integers(1, 3), st.integers(0, 70), st.integers(1, 40), st.sampled_from([0.2, 1, 5, 60])
)


def make_codes(seed: int, groups: int, tokens: int, components: int, size: float) -> Array:
    """int16 `[groups, tokens, components]` of falling size; a few over 127 where they are large; some rows repeat."""
    rng = np.random.default_rng(seed)
    falling = size * np.exp(-np.arange(components) / 8)
    codes = np.clip(np.rint(rng.laplace(size=(groups, tokens, components)) * falling), -32_000, 32_000)
    codes[:, tokens // 2 :] = codes[:, : tokens - tokens // 2] if seed % 2 else codes[:, tokens // 2 :]
    return codes.astype(np.int16)


@settings(max_examples=20, deadline=None)
@given(shape=codes_like)
def test_packed_codes_come_back(shape: tuple[int, int, int, int, float]) -> None:
    """Of both kinds, all classes, and none."""
    codes = make_codes(*shape)
    assert np.array_equal(unpack(pack(codes), codes.shape), codes)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.165, 0.3, 1.0])
@pytest.mark.parametrize("shape", [(1, 1, 16), (16, 1, 256), (2, 5, 64), (1, 256, 256)])
def test_packed_codes_are_never_longer_than_a_blob_may_have_them(shape: tuple[int, int, int], share: float) -> None:
    """However many are large, as of a prompt that is unlike the calibration's: its block can be stored and read."""
    rng = np.random.default_rng(1)
    codes = rng.integers(-127, 128, shape).astype(np.int16)
    large = rng.integers(-32_767, 32_768, shape).astype(np.int16)
    codes = np.where(rng.random(shape) < share, large, codes)
    packed = pack(codes)
    assert len(packed) <= packed_bytes_max(codes.nbytes)
    assert np.array_equal(unpack(packed, shape), codes)
    for end in range(0, len(packed), max(1, len(packed) // 50)):
        with pytest.raises(CorruptDataError):
            unpack(packed[:end], shape)


def test_both_kinds_of_packing_are_used_where_they_are_shorter() -> None:
    """Repeated tokens as rows; else components that are mostly zero cost little more than their information."""
    mixed = make_codes(0, 1, 252, 128, 8)
    repeated = np.repeat(mixed[:, :63], 4, axis=1)
    assert pack(mixed)[0] == 1 and len(pack(mixed)) < 0.36 * mixed.size
    assert pack(repeated)[0] == 0 and len(pack(repeated)) < 0.8 * len(pack(mixed))


@settings(max_examples=20, deadline=None)
@given(shape=codes_like, data=st.data())
def test_damaged_codes_are_refused_or_of_their_geometry(
    shape: tuple[int, int, int, int, float], data: st.DataObject
) -> None:
    """Checksums find damage before. Nothing else may be raised, and no more memory taken than the geometry says."""
    codes = make_codes(*shape)
    packed = bytearray(pack(codes))
    for _ in range(data.draw(st.integers(1, 4))):
        packed[data.draw(st.integers(0, len(packed) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(packed)))
    for damaged in (bytes(packed), bytes(packed[:cut])):
        with contextlib.suppress(CorruptDataError):
            assert unpack(damaged, codes.shape).shape == codes.shape


@given(part=parts)
@settings(max_examples=6, deadline=None)
def test_a_basis_comes_back_from_its_file(part: PartBasis) -> None:
    """Equal decoding, equal digest."""
    basis = Basis({(3, "keys"): part, (4, "values"): replace(part, rope=None)})
    again = Basis.from_bytes(basis.data)
    assert list(again.parts) == [(3, "keys"), (4, "values")] and again.digest == basis.digest
    groups, size, _ = part.matrix.shape
    codes = np.random.default_rng(0).integers(-9, 10, (groups, 5, size)).astype(np.int16)
    for key, one in basis.parts.items():
        assert np.array_equal(decoded(again.parts[key], codes, 7, 1), decoded(one, codes, 7, 1))


@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_damaged_bases_are_refused_or_possible(data: st.DataObject) -> None:
    """Only CorruptDataError, and what is accepted has possible numbers."""
    whole = make_basis(1, 16, 2).data
    at = data.draw(st.integers(0, len(whole) - 1))
    damaged = whole[:at] + bytes([data.draw(st.integers(0, 255))]) + whole[at + 1 :]
    for one in (damaged, whole[:at], whole + b"x"):
        with contextlib.suppress(CorruptDataError):
            for part in Basis.from_bytes(one).parts.values():
                assert np.isfinite(part.scale).all() and np.abs(part.matrix).max() <= 2047


def test_a_basis_that_is_being_parsed_holds_up_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """A large one takes a while. It is parsed where its lock is free."""
    free: list[bool] = []

    def from_bytes(data: bytes) -> Any:
        free.append(not basis_module._lock.locked())
        return data

    monkeypatch.setattr(basis_module.Basis, "from_bytes", from_bytes)
    monkeypatch.setattr(basis_module, "_parsed", Bounded(2))
    assert basis_module.parsed(b"digest", b"data") is basis_module.parsed(b"digest", b"data")
    assert free == [True]


LAYOUT = Layout((LayerSpec(PartSpec(2, 16, "BF16"), PartSpec(2, 32, "BF16")),) * 2)


def payload(n_tokens: int, seed: int = 0) -> bytes:
    """Random bfloat16 KV of LAYOUT."""
    rows = np.random.default_rng(seed).normal(size=n_tokens * LAYOUT.token_bytes // 2).astype(np.float32)
    return bytes((rows.view(np.uint32) >> 16).astype(np.uint16).tobytes())


def test_an_open_tail_is_extended_without_being_quantized_again() -> None:
    """Stored, read back, narrowed and joined with the tokens that follow, it is what is encoded and packed at once."""
    basis = layout_basis(LAYOUT)
    profile = replace(parse_profile("exact"), **dict.fromkeys(("keys", "values"), pca_recipe(basis.digest, 0, 450)))
    aux = {basis.digest: basis.data}
    raw = payload_run(LAYOUT, payload(100), 100)
    at_once = encode_runs(LAYOUT, [raw], profile, 512, aux=aux)
    stored = pack_run(LAYOUT, narrow_run(at_once[0], 60), profile)
    runs, data = finish_runs([stored])
    assert runs[0].stacks[0].recipe.name == "pca" and len(runs[0].stacks) == 2
    loaded = load_run(runs[0], 0, BufferReader([data], [Range(0, 0, len(data))]))
    rest = [np.ascontiguousarray(buffer[:, :, 60:]) for buffer in raw.buffers]
    later = replace(raw, run=replace(raw.run, n_tokens=40, shown=40), buffers=tuple(rest))
    extended = encode_runs(LAYOUT, [loaded, later], profile, 512, aux=aux)
    assert len(extended) == 1 and extended[0].run == at_once[0].run
    for one, other in zip(extended[0].buffers, at_once[0].buffers, strict=True):
        assert np.array_equal(one, other)
    again = encode_run(LAYOUT, at_once[0], profile, context=Context(512, aux=aux))
    assert again.run == at_once[0].run and all(map(np.array_equal, again.buffers, at_once[0].buffers))


def test_the_first_tokens_stay_exact_and_a_hit_turns_keys_by_their_place() -> None:
    """Sinks unquantized; every row of two blocks comes back as encoding and decoding it at its position gives it."""
    basis = layout_basis(LAYOUT)
    recipe, aux = pca_recipe(basis.digest, 0, 450), {basis.digest: basis.data}
    profile = replace(parse_profile("exact"), keys=recipe, values=recipe, sinks=4)
    blocks, payloads, raws = [], [], []
    for number, n_tokens in enumerate((256, 77)):
        raw = payload_run(LAYOUT, payload(n_tokens, number), n_tokens)
        runs, data = finish_runs(
            [pack_run(LAYOUT, one, profile) for one in encode_runs(LAYOUT, [raw], profile, number * 256, aux=aux)]
        )
        assert all(stack.recipe.references == (basis.digest,) for run in runs[-1:] for stack in run.stacks)
        blocks.append(HitBlock(runs, n_tokens))
        payloads.append(data)
        raws.append(raw)
    for layer in range(2):
        got = assemble_layer(LAYOUT, layer, blocks, streamed(blocks, payloads, layer), 10, context=Context(aux=aux))
        for number, (name, arrays) in enumerate((("keys", got.keys), ("values", got.values))):
            words = np.array(arrays[0].view(mx.uint16))[0]
            exact = np.concatenate([raw.buffers[number][layer].view(np.uint16) for raw in raws], 1)
            assert np.array_equal(words[:, :4], exact[:, :4]) and not words[:, 333:].any()
            part = basis.parts[layer, name]
            rows = (exact.astype(np.uint32) << 16).view(np.float32).transpose(1, 0, 2).copy()
            codes = part.encode(rows, 0, 0)
            assert codes is not None
            expected = np.empty(exact.shape, np.uint16)
            part.decode(codes, 0, 0, expected)
            assert np.array_equal(words[:, 4:333], expected[:, 4:])
    with pytest.raises(AuxMissingError):
        assemble_layer(LAYOUT, 0, blocks, streamed(blocks, payloads, 0), 10)
    assert RAW not in {stack.recipe for block in blocks for run in block.runs for stack in run.stacks}


def test_sums_of_the_golden_bound_are_exact_in_mlx_too() -> None:
    """The product alone: up to 2^24 float32 holds every sum, on whatever device."""
    part = make_part(0, 4, 64)
    codes = part.encode(make_rows(0, part, 64), 0, 0)
    assert codes is not None
    exact = codes[0].astype(np.int64) @ part.matrix[0].astype(np.int64)
    product = mx.array(codes[0].astype(np.float32)) @ mx.array(part.matrix[0].astype(np.float32))
    assert np.abs(exact).max() < EXACT_BELOW and np.array_equal(np.array(product), exact)


@pytest.mark.parametrize("case", json.loads(GOLDEN.read_text()), ids=lambda case: case["name"])
def test_golden_bytes_stay_readable(case: dict[str, Any]) -> None:
    """Basis, packed codes and decoded values of the first release, bit for bit."""
    part = Basis.from_bytes(bytes.fromhex(case["basis"])).parts[0, "keys"]
    groups, size, _ = part.matrix.shape
    codes = unpack(bytes.fromhex(case["packed"]), (groups, case["tokens"], size))
    assert codes.tolist() == case["codes"]
    assert decoded(part, codes, case["start"], case["point"]).tobytes().hex() == case["decoded"]
