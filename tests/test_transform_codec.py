"""The prototype of a transform codec: exact, whoever multiplies and wherever it is cut; damage is refused."""

from __future__ import annotations

import contextlib
import json
import math
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.errors import CorruptDataError
from tests.bench.transform_codec import EXACT_BELOW, Basis, Rotation, pack, turns, unpack

GOLDEN = Path(__file__).parent / "golden" / "transform-codec.json"
Array = np.ndarray[Any, Any]


def make_basis(seed: int, heads: int = 2, width: int = 16, halves: bool = True, turning: bool = True) -> Basis:
    """A random orthogonal basis in 12 bits, rotated as a model of 10,000 would."""
    rng = np.random.default_rng(seed)
    n = heads * width
    rows = np.linalg.qr(rng.normal(size=(n, n)))[0] * np.exp(rng.uniform(-1, 1, n))
    scale = (np.abs(rows).max(0) / 2047).astype(np.float32)
    rotation = Rotation(10_000.0 ** (-np.arange(0, width, 2) / width), halves) if turning else None
    return Basis(np.round(rows / scale).astype(np.int16), scale, rng.normal(size=n).astype(np.float32), heads, rotation)


def make_rows(seed: int, basis: Basis, tokens: int) -> Array:
    """float32 `[heads, tokens, width]`."""
    shape = (basis.heads, tokens, basis.matrix.shape[1] // basis.heads)
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


bases = st.builds(
    make_basis, st.integers(0, 99), st.sampled_from([1, 2, 4]), st.sampled_from([16, 64]), st.booleans(), st.booleans()
)


@settings(max_examples=6, deadline=None)
@given(basis=bases, tokens=st.integers(1, 70), start=st.integers(0, 1 << 19), data=st.data())
def test_a_cut_of_what_decodes_is_what_decodes_from_the_cut(
    basis: Basis, tokens: int, start: int, data: st.DataObject
) -> None:
    """Bit for bit, for any rows: float32 sums of these integers are exact in any order."""
    codes = basis.encode(make_rows(1, basis, tokens), 0.2, start)
    assert codes is not None
    whole = basis.decode(codes, 0.2, start)
    first = data.draw(st.integers(0, tokens - 1))
    last = data.draw(st.integers(first + 1, tokens))
    assert np.array_equal(whole[:, first:last], basis.decode(codes[first:last], 0.2, start + first))
    apart = basis.encode(make_rows(1, basis, tokens)[:, first:last], 0.2, start + first)
    assert apart is not None and np.array_equal(apart, codes[first:last])


@settings(max_examples=6, deadline=None)
@given(basis=bases, tokens=st.integers(1, 40), seed=st.integers(0, 99))
def test_mlx_numpy_and_whole_numbers_multiply_alike(basis: Basis, tokens: int, seed: int) -> None:
    """The product of codes and basis, in float32 on the device, in float32 on the CPU, and in 64-bit integers."""
    codes = basis.encode(make_rows(seed, basis, tokens), 0.1, 5)
    assert codes is not None
    matrix = basis.matrix.astype(np.float32)
    exact = codes.astype(np.int64) @ basis.matrix.astype(np.int64)
    assert np.abs(exact).max() < EXACT_BELOW
    on_device = np.array(mx.array(codes.astype(np.float32)) @ mx.array(matrix))
    assert np.array_equal(on_device, exact) and np.array_equal(codes.astype(np.float32) @ matrix, exact)
    decoded = basis.decode(codes, 0.1, 5)
    assert np.array_equal(np.array(basis.decode_lazily(mx.array(codes), 0.1, 5)), decoded)
    rows = [basis.decode(codes[at : at + 1], 0.1, 5 + at) for at in range(tokens)]
    assert np.array_equal(np.concatenate(rows, 1), decoded)


@settings(max_examples=6, deadline=None)
@given(basis=bases, tokens=st.integers(1, 40), start=st.integers(0, 1 << 19), step=st.sampled_from([0.1, 0.3, 1.0]))
def test_what_comes_back_is_within_half_a_step_of_each_component(
    basis: Basis, tokens: int, start: int, step: float
) -> None:
    """Plain rounding; the rest is that of float32."""
    rows = make_rows(3, basis, tokens)
    codes = basis.encode(rows, step, start)
    assert codes is not None
    back = basis.decode(codes, step, start)
    bound = step / 2 * np.abs(basis.matrix * basis.scale.astype(np.float64)).sum(0).max() * math.sqrt(2)
    assert np.abs(back - rows).max() <= bound + 1e-4


def test_what_would_not_be_exact_is_not_encoded() -> None:
    """A sum of products of 2^24 or more, a code over 15 bits, a value that is not finite."""
    basis = make_basis(0, heads=4, width=64)
    rows = make_rows(0, basis, 8)
    assert basis.encode(rows, 0.2, 0) is not None
    assert basis.encode(rows, 1e-7, 0) is None
    aligned = basis.decode(np.full((1, 256), 120, np.int16), 1.0, 0)
    assert basis.encode(aligned, 1.0, 0) is None
    rows[1, 3, 5] = np.inf
    assert basis.encode(rows, 0.2, 0) is None


@settings(max_examples=6, deadline=None)
@given(start=st.integers(0, 1 << 20), count=st.integers(1, 9), seed=st.integers(0, 99))
def test_turns_are_cos_and_sin(start: int, count: int, seed: int) -> None:
    """To the last bit of float32, up to a million tokens."""
    frequencies = np.random.default_rng(seed).uniform(0, 1, 5)
    cos, sin = turns(start, count, frequencies.tobytes())
    angles = np.arange(start, start + count)[:, None] * frequencies
    assert np.abs(cos - np.cos(angles)).max() < 2**-24 and np.abs(sin - np.sin(angles)).max() < 2**-24


codes_like = st.tuples(st.integers(0, 99), st.integers(0, 70), st.integers(1, 40), st.sampled_from([0.2, 1, 5, 60]))


def make_codes(seed: int, tokens: int, components: int, size: float) -> Array:
    """int16 `[tokens, components]` of falling size; a few over 127 where they are large."""
    rng = np.random.default_rng(seed)
    falling = size * np.exp(-np.arange(components) / 8)
    return np.clip(np.rint(rng.laplace(size=(tokens, components)) * falling), -32_000, 32_000).astype(np.int16)


@settings(max_examples=6, deadline=None)
@given(shape=codes_like)
def test_packed_codes_come_back(shape: tuple[int, int, int, float]) -> None:
    """Of both kinds, all classes, and none."""
    codes = make_codes(*shape)
    assert np.array_equal(unpack(pack(codes), *codes.shape), codes)


@settings(max_examples=6, deadline=None)
@given(shape=codes_like, cut=st.integers(0, 70))
def test_an_open_tail_is_extended_without_being_quantized_again(shape: tuple[int, int, int, float], cut: int) -> None:
    """What was packed early, unpacked, and packed again with what follows is what is packed at once."""
    codes = make_codes(*shape)
    first = unpack(pack(codes[:cut]), min(cut, len(codes)), codes.shape[1])
    assert pack(np.concatenate([first, codes[cut:]])) == pack(codes)


def test_packing_is_shorter_than_entropy_coding_bytes_token_by_token() -> None:
    """Components that are mostly zero cost little more than their information."""
    codes = make_codes(0, 252, 128, 8)
    assert len(pack(codes)) < 0.36 * codes.size


@settings(max_examples=6, deadline=None)
@given(shape=codes_like, data=st.data())
def test_damaged_codes_are_refused_or_of_their_geometry(
    shape: tuple[int, int, int, float], data: st.DataObject
) -> None:
    """Checksums find damage before. Nothing else may be raised, and no more memory taken than the geometry says."""
    codes = make_codes(*shape)
    packed = bytearray(pack(codes))
    for _ in range(data.draw(st.integers(1, 4))):
        packed[data.draw(st.integers(0, len(packed) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(packed)))
    for damaged in (bytes(packed), bytes(packed[:cut])):
        with contextlib.suppress(CorruptDataError):
            assert unpack(damaged, *codes.shape).shape == codes.shape


@given(basis=bases)
@settings(max_examples=6, deadline=None)
def test_a_basis_comes_back_from_its_bytes(basis: Basis) -> None:
    """Equal decoding, equal digest."""
    again = Basis.from_bytes(basis.to_bytes())
    codes = np.random.default_rng(0).integers(-9, 10, (5, basis.matrix.shape[0])).astype(np.int16)
    assert np.array_equal(again.decode(codes, 0.1, 7), basis.decode(codes, 0.1, 7))
    assert again.digest == basis.digest


@settings(max_examples=6, deadline=None)
@given(data=st.data())
def test_damaged_bases_are_refused_or_possible(data: st.DataObject) -> None:
    """Only CorruptDataError, and what is accepted has possible numbers."""
    whole = make_basis(1).to_bytes()
    at = data.draw(st.integers(0, len(whole) - 1))
    damaged = whole[:at] + bytes([data.draw(st.integers(0, 255))]) + whole[at + 1 :]
    for one in (damaged, whole[:at], whole + b"x"):
        try:
            basis = Basis.from_bytes(one)
        except CorruptDataError:
            continue
        assert np.isfinite(basis.scale).all() and np.abs(basis.matrix).max() <= 2047


@pytest.mark.parametrize("case", json.loads(GOLDEN.read_text()), ids=lambda case: case["name"])
def test_golden_bytes_stay_readable(case: dict[str, Any]) -> None:
    """Basis, packed codes and decoded values of the first release, bit for bit."""
    basis = Basis.from_bytes(bytes.fromhex(case["basis"]))
    codes = unpack(bytes.fromhex(case["packed"]), case["tokens"], basis.matrix.shape[0])
    assert codes.tolist() == case["codes"]
    decoded = basis.decode(codes, case["step"], case["start"])
    assert decoded.tobytes().hex() == case["decoded"]
